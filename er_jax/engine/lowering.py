"""What XLA is told about a window for NVIDIA GPUs, and what it makes where it refuses.

Decoding is bound by bytes, and XLA's defaults for a GPU move more of them than they
must. Options are set for one program at a time, never for the process:

* Long sums stay whole. By default they are split among blocks of the GPU; the parts are
  written in float32, and a second kernel adds them.
* With a draft in groups, codes are scaled inside their products
  (`drafter.with_scales_inside`). By default XLA writes scaled weights to memory.

Where the compiler does not know an option, or fails with it, the window is compiled
without any, in a form that needs none.

Source: openxla/xla, `splitk_rewriter.cc` and `triton_tiling_propagation.cc`. Its pull
request 46645 and sgl-project/DeepGEMM's 77 measured that for few rows the second kernel
costs more than the split saves. Here none of this was timed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax

from er_jax.drafter import QuantizedWeight
from er_jax.types import Params

WHOLE_SUMS = {"xla_gpu_experimental_force_split_k": 1}
# XLA fuses a scale per group ("subchannel") into sums that are whole, and only then.
SCALES_INSIDE = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Lowering:
    """A window that is yet to be lowered and compiled for a platform.

    lower: `windows.run_window.lower`, with all arguments but `scales_inside`.
    draft: the draft among these, None without one. is_cuda: whether the platform is an
    NVIDIA GPU.
    """

    lower: Callable[..., Any]
    draft: Params
    is_cuda: bool

    def compile(self) -> Any:
        """Return the executable."""
        if self.is_cuda:
            weights = jax.tree.leaves(
                self.draft, is_leaf=lambda x: isinstance(x, QuantizedWeight)
            )
            in_groups = any(
                isinstance(x, QuantizedWeight) and x.is_grouped for x in weights
            )
            options = WHOLE_SUMS | (SCALES_INSIDE if in_groups else {})
            try:
                lowered = self.lower(scales_inside=in_groups)
                return lowered.compile(compiler_options=options)
            except jax.errors.JaxRuntimeError as error:
                _log.warning(
                    "a window is compiled without %s, which fails: %s",
                    ", ".join(options),
                    str(error).partition("\n")[0],
                )
        return self.lower(scales_inside=False).compile()
