"""The measured programs that others are predicted from: which are near, and laws.

Left out: the predictions themselves (`table`).
"""

from __future__ import annotations

import math

from er_jax.costs.passes import ROWS_EXPONENT
from er_jax.types import FIRST_DRAFT, Program


class Neighbours:
    """The measured programs that a program is predicted from, remembered once found.

    Dozens of predictions are needed before every window. The neighbours depend on which
    programs were measured, not on their seconds.
    """

    def __init__(self, measured: tuple[Program, ...]) -> None:
        self.measured = measured
        self.in_data_shards = [
            program
            for program in measured
            if not program.shared_rows and program.view == FIRST_DRAFT
        ]
        self._lines: dict[Program, tuple[Program, ...]] = {}
        self._speculative: dict[Program, Program | None] = {}
        self._of_more: dict[Program, tuple[Program, ...]] = {}

    def line(self, program: Program) -> tuple[Program, ...]:
        """Return the other programs of the same gamma and the nearest length."""
        if program not in self._lines:
            points = [p for p in self.in_data_shards if p.gamma == program.gamma]
            points = [p for p in points if p != program]
            near = min(points, key=lambda p: distance(p, program), default=program)
            self._lines[program] = tuple(
                sorted(p for p in points if p.cache_length == near.cache_length)
            )
        return self._lines[program]

    def rounds_of_more(self, program: Program) -> tuple[Program, ...]:
        """Return programs that draft, with no fewer rows and no shorter cache."""
        if program not in self._of_more:
            self._of_more[program] = tuple(
                p
                for p in self.in_data_shards
                if p.gamma
                and p.rows >= program.rows
                and p.cache_length >= program.cache_length
            )
        return self._of_more[program]

    def speculative(self, program: Program) -> Program | None:
        """Return the nearest other program that drafts."""
        if program not in self._speculative:
            points = [p for p in self.in_data_shards if p.gamma and p != program]
            self._speculative[program] = min(
                points, key=lambda p: distance(p, program), default=None
            )
        return self._speculative[program]


def distance(one: Program, other: Program) -> float:
    """Return how far programs differ: in the kind of drafts and cache length most."""
    return (
        2.0 * (one.view != other.view)
        + abs(math.log2(one.cache_length / other.cache_length))
        + 0.25 * abs(math.log2(one.rows / other.rows))
        + 0.1 * abs(one.gamma - other.gamma)
    )


def power_law(line: list[tuple[int, float]], rows: int) -> float:
    """Interpolate (rows, seconds) points linearly in logarithms."""
    if len(line) == 1:
        at, seconds = line[0]
        return seconds * (rows / at) ** ROWS_EXPONENT
    after = next((i for i, (at, _) in enumerate(line) if at >= rows), len(line) - 1)
    (r0, t0), (r1, t1) = line[max(after, 1) - 1], line[max(after, 1)]
    exponent = math.log(t1 / t0) / math.log(r1 / r0)
    return t0 * (rows / r0) ** min(max(exponent, 0.0), 1.0)
