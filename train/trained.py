"""What is trained of a policy: all of it, or its low-rank pairs if it has any.

Gradients, the optimizer's state and checkpoints are of that part. The rest stays the
same arrays from step to step, so nothing of it is computed, moved or saved again.
"""

from __future__ import annotations

from typing import Any

import er_jax
from er_jax.lora import has_lora


def trained_part(params: Any) -> Any:
    """Return the part of a policy's parameters, or of their shapes, that is trained."""
    return er_jax.lora_pairs(params) if has_lora(params) else params


def with_trained_part(params: Any, part: Any) -> Any:
    """Return parameters with another trained part."""
    return er_jax.with_lora_pairs(params, part) if has_lora(params) else part


def reference_of(params: Any, kept: Any) -> Any:
    """Return the policy of step 0, which pairs have not changed yet.

    Args:
      params: the policy now. kept: a copy of it at step 0; None for one with pairs.
    """
    return er_jax.without_lora(params) if has_lora(params) else kept
