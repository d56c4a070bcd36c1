"""Digests: 16 hex digits that tell whether two sets of values are the same.

Checkpoints are checked by digest when they are read, and every GRPO step logs the
digest of its policy, so that two runs can be compared line by line. That of arrays is
`er_jax.engine.digests.tree_digest`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any


def text_digest(values: Any) -> str:
    """Return 16 hex digits that change when the values, as JSON, do."""
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
