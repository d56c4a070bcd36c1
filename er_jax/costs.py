"""What a round costs: measured seconds per program, and a guess for the others.

Plain Python floats on the host. Whatever was measured is taken as it is; a program that
never ran is predicted from those that did, by power laws in rows and cache length and
by what drafts and verifications cost in autoregressive steps. A program that looks
better than it is gets measured and then seen through.

Left out: rooflines of devices that are not here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from er_jax.types import Program

# How seconds grow with rows and cache length where nothing says so: between free
# (bound by weights) and proportional (bound by arithmetic or by the cache).
ROWS_EXPONENT = 0.5
LENGTH_EXPONENT = 0.3

# A draft pass in AR steps, where none was measured: int8 weights against 16-bit ones.
DRAFT_SHARE = 0.5

# Share of an old measurement that survives this many further rounds.
MEMORY_ROUNDS = 200.0


@dataclasses.dataclass
class LatencyTable:
    """Seconds per round of each program, from windows that really ran.

    seconds: program -> seconds per round, an exponential average over rounds.
    """

    seconds: dict[Program, float] = dataclasses.field(default_factory=dict)

    def observe(self, program: Program, seconds: float, num_rounds: int) -> None:
        """Take in a window: `seconds` in total over `num_rounds` rounds.

        A single stall must not outweigh the rest, so a reading counts as at most twice
        what was known; a lasting change still gets through within a few windows.
        """
        if num_rounds < 1:
            return
        reading = seconds / num_rounds
        known = self.seconds.get(program)
        if known is None:
            self.seconds[program] = reading
            return
        weight = 1 - math.exp(-num_rounds / MEMORY_ROUNDS)
        self.seconds[program] = known + weight * (min(reading, 2 * known) - known)

    def round_seconds(self, program: Program) -> float | None:
        """Return measured or predicted seconds per round; None if nothing is known.

        A speculative round that never ran costs a step, as gamma = 0 does, and for its
        drafts what they cost in the nearest round that ran, in proportion to `_extra`.
        """
        if program in self.seconds:
            return self.seconds[program]
        step = self._curve(0, program.rows, program.cache_length)
        if program.gamma == 0:
            return step
        measured = [other for other in self.seconds if other.gamma]
        if step is None or not measured:
            return self._curve(program.gamma, program.rows, program.cache_length)
        nearest = min(measured, key=lambda other: _distance(other, program))
        nearest_step = self._curve(0, nearest.rows, nearest.cache_length) or 0.0
        dearer = (self.seconds[nearest] - nearest_step) / self._extra(nearest)
        return step + max(dearer, 0.0) * self._extra(program)

    def _extra(self, program: Program) -> float:
        """Return what drafts and their verification should add to a step.

        gamma drafts at a share of a step each, and a verification that costs what a
        step of rows x (gamma + 1) rows does: next to nothing more where steps are bound
        by weights, all of it where they are bound by arithmetic.
        """
        rows, length, gamma = program
        step = self._curve(0, rows, length) or 0.0
        verification = self._curve(0, rows * (gamma + 1), length) or 0.0
        return gamma * DRAFT_SHARE * step + verification - step

    def _curve(self, gamma: int, rows: int, length: int) -> float | None:
        """Interpolate the measured programs of one gamma, log-log in rows."""
        points = [p for p in self.seconds if p.gamma == gamma]
        if not points:
            return None
        wanted = Program(rows, length, gamma)
        near = min(points, key=lambda p: _distance(p, wanted)).cache_length
        line = sorted(
            (p.rows, self.seconds[p]) for p in points if p.cache_length == near
        )
        return _power_law(line, rows) * (length / near) ** LENGTH_EXPONENT


def _distance(one: Program, other: Program) -> float:
    """How much two programs differ: cache length most, then rows, then gamma."""
    return (
        abs(math.log2(one.cache_length / other.cache_length))
        + 0.25 * abs(math.log2(one.rows / other.rows))
        + 0.1 * abs(one.gamma - other.gamma)
    )


def _power_law(line: list[tuple[int, float]], rows: int) -> float:
    """Interpolate (rows, seconds) points by straight lines in logarithms."""
    if len(line) == 1:
        at, seconds = line[0]
        return seconds * (rows / at) ** ROWS_EXPONENT
    after = next((i for i, (at, _) in enumerate(line) if at >= rows), len(line) - 1)
    (r0, t0), (r1, t1) = line[max(after, 1) - 1], line[max(after, 1)]
    exponent = math.log(t1 / t0) / math.log(r1 / r0)
    return t0 * (rows / r0) ** min(max(exponent, 0.0), 1.0)


def row_buckets(slots: int) -> tuple[int, ...]:
    """Return the batch sizes worth compiling: 1, 2, 3, 4, 6, 8, 12, ... and `slots`."""
    sizes = {slots}
    power = 1
    while power < slots:
        sizes |= {power, power * 3 // 2 if power > 1 else power}
        power *= 2
    return tuple(sorted(size for size in sizes if size <= slots))


def bucket_of(size: int, buckets: Iterable[int]) -> int:
    """Return the smallest bucket that holds `size`."""
    return min(bucket for bucket in buckets if bucket >= size)
