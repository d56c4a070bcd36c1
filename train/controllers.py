"""A controller that looks at the batch and never at the clock.

`er_jax`'s own controllers pick batch and cache sizes by measured speed. Programs of
different shape round float32 differently, so two runs on a machine that is not equally
busy may differ in the last bit, and at a rounding tie in a token. This one gives up
some speed for float32 runs that repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import er_jax
from er_jax.types import Program

# Rows go down by this factor: few programs to compile, and at most three idle rows for
# each live one.
STEP_DOWN = 4


class RuleController(er_jax.Controller):
    """One draft length; rows fall by fours as sequences end; the cache never moves.

    Args:
      control: "ar" or "fixed:g".
    """

    def choose(
        self, options: Sequence[Program], current: Program | None, **unused: Any
    ) -> Program:
        """Return the program for the live rows; a function of `options` alone."""
        longest = max(program.cache_length for program in options)
        fits = {p.rows: p for p in options if p.cache_length == longest}
        rows = size = max(fits)
        # Sizes between may be missing: a small batch is not offered all larger ones.
        while size >= STEP_DOWN:
            size //= STEP_DOWN
            rows = size if size in fits else rows
        return fits[rows]

    def observe(self, *args: Any, **kwargs: Any) -> None:
        """Learn nothing: window lengths follow from the measured times as well."""
