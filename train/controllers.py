"""A controller that decides by the number of live rows and never by the clock.

The controllers of `er_jax` choose batch and cache sizes by measured speed. Programs of
different shapes round float32 differently, so the choice changes log-probabilities in
the last bit, and at a rounding tie a token. The controller here gives up some speed for
float32 runs that repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import er_jax
from er_jax.types import Program

# The batch shrinks by this factor: few programs are compiled, and at most three rows
# are idle for each live one.
STEP_DOWN = 4


class RuleController(er_jax.Controller):
    """One draft length, one cache length, and batches that shrink by fours.

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
        # Not every size is offered: a small batch lacks some of the larger ones.
        while size >= STEP_DOWN:
            size //= STEP_DOWN
            rows = size if size in fits else rows
        return fits[rows]

    def observe(self, *args: Any, **kwargs: Any) -> None:
        """Learn nothing: measured times would change the lengths of windows."""
