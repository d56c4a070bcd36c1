"""Costs of single passes, fitted to timed ones: a surface for each kind and gamma.

A pass is a target pass (one autoregressive step), a draft pass or a verification. A
`Surface` over rows and length is fitted to the readings of one kind and gamma, and
`PassCosts` holds one for each.

Plain Python floats on the host. Left out: the published cost model (`roofline`), whole
rounds that ran (`table`), the origin of readings (`tools.survey`, `tools.sweep`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from er_jax.arguments import MOST
from er_jax.costs.record import (
    checked_list,
    checked_real,
    checked_seconds,
    checked_whole,
    shortened,
)
from er_jax.types import Program

# Assumed growth of seconds with rows and cache length where none was measured: between
# constant (bound by weights) and proportional (bound by arithmetic or by the cache).
ROWS_EXPONENT = 0.5
LENGTH_EXPONENT = 0.3


Kind = Literal["target", "draft", "verify", "round"]

# Most readings in a file of costs.
MAX_READINGS = 2000

# Weight of a kink in the cost of a position, at a number of rows, against errors of
# fit: enough that a surface does not follow the noise of few readings.
KINK_WEIGHT = 0.1


class Cell(NamedTuple):
    """A point of a grid: rows of a batch, and positions read per row."""

    rows: int
    length: int


class Reading(NamedTuple):
    """One timed pass or round.

    kind: "target" (an autoregressive step), "draft" (one draft pass), "verify" (one
      target pass over gamma + 1 positions) or "round" (gamma drafts and a verification
      together). rows: of the batch. length: positions read per row. gamma: of the round
      it belongs to; 0 for "target".
    seconds: of one pass or round. weight: 1, or less for an uncertain reading.
    """

    kind: Kind
    rows: int
    length: int
    gamma: int
    seconds: float
    weight: float = 1.0


class PassPredictor(Protocol):
    """Predicts the seconds of single passes; `PassCosts` and `Roofline` do."""

    def pass_seconds(self, kind: Kind, rows: int, length: int, gamma: int = 0) -> float:
        """Return the seconds of one pass."""


def seconds_of_passes(costs: PassPredictor, program: Program) -> float:
    """Return the seconds of a round as the sum of its passes.

    A draft that sees a span costs as much as one over a cache of the ring's length.
    """
    rows, length, gamma = program[:3]
    if gamma == 0:
        return costs.pass_seconds("target", rows, length)
    seen = min(length, program.draft_length)
    drafts = gamma * costs.pass_seconds("draft", rows, seen, gamma)
    return drafts + costs.pass_seconds("verify", rows, length, gamma)


def seconds_with_span(
    round_s: Callable[[Program], float | None], program: Program
) -> float | None:
    """Return the seconds of a round whose drafts see a span, from other rounds.

    Every draft pass then reads less of the cache, and saves what a plain step would
    save. It never costs less than a step over the whole cache, and what drafts add to a
    step over a cache of the ring's length; nor more than with all positions.

    Args:
      round_s: seconds of rounds whose drafts see all positions; None if unknown.
      program: its drafts see a span.
    Returns:
      Seconds; None if those of a round with all positions are unknown.
    """
    whole = program.seeing(None)
    short = whole._replace(cache_length=min(program.draft_length, whole.cache_length))
    whole_s = round_s(whole)
    step_s, short_step_s, short_s = (
        round_s(p) for p in (whole.plain, short.plain, short)
    )
    if whole_s is None or not step_s or not short_step_s:
        return whole_s
    saved_s = program.gamma * max(step_s - short_step_s, 0.0)
    least_s = step_s + max((short_s or 0.0) - short_step_s, 0.0)
    return min(max(whole_s - saved_s, least_s), whole_s)


@dataclasses.dataclass(frozen=True)
class Surface:
    """Seconds of one kind of pass over rows and length.

    They are linear in length (weights and every cache entry are read once) and at most
    proportional to it, piecewise linear in rows, and never falling in either within the
    measured rows.

    rows: numbers of rows that were measured, ascending.
    shortest, longest: the lengths of `low` and `high`.
    low, high: seconds at these lengths, for each of `rows`.
    """

    rows: tuple[int, ...]
    shortest: int
    longest: int
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def fit(cls, readings: Sequence[Reading]) -> Surface:
        """Fit a surface by least absolute relative deviations.

        It is a linear program: errors and kinks are the objective, and monotonicity is
        a constraint. Deviations are absolute, because a reading on a shared machine is
        wrong by a lot or not at all.

        Args:
          readings: at least one, all of one kind and gamma.
        """
        from scipy import optimize

        rows = sorted({reading.rows for reading in readings})
        shortest = min(reading.length for reading in readings)
        longest = max(reading.length for reading in readings)
        count, num_rows = len(readings), len(rows)
        num_kinks = max(num_rows - 2, 0)
        # Unknowns: low and high at every number of rows; then the deviation below and
        # above of every reading, and of every kink.
        num_unknowns = 2 * (num_rows + count + num_kinks)
        median_s = float(np.median([reading.seconds for reading in readings]))

        equal = np.zeros((count + num_kinks, num_unknowns))
        wanted = np.zeros(count + num_kinks)
        for i, reading in enumerate(readings):
            at = rows.index(reading.rows)
            share = (reading.length - shortest) / max(longest - shortest, 1)
            equal[i, at] = (1 - share) / reading.seconds
            equal[i, num_rows + at] = share / reading.seconds
            wanted[i] = 1
        for i in range(num_kinks):
            before, here, after = rows[i : i + 3]
            share = (here - before) / (after - before)
            for at, factor in ((i, share - 1), (i + 1, 1.0), (i + 2, -share)):
                equal[count + i, at] = -factor / median_s
                equal[count + i, num_rows + at] = factor / median_s
        first = 2 * num_rows
        for i in range(count + num_kinks):
            equal[i, first + 2 * i] = 1
            equal[i, first + 2 * i + 1] = -1
        weights = [reading.weight for reading in readings] + [KINK_WEIGHT] * num_kinks
        price = np.concatenate([np.zeros(first), np.repeat(weights, 2)])

        ascending = np.zeros((4 * num_rows - 2, num_unknowns))
        for i in range(num_rows - 1):
            ascending[2 * i, [i, i + 1]] = 1, -1
            ascending[2 * i + 1, [num_rows + i, num_rows + i + 1]] = 1, -1
        for i in range(num_rows):
            ascending[2 * num_rows - 2 + i, [i, num_rows + i]] = 1, -1
            # At most proportional to length: where rows were measured at one length,
            # nothing else keeps the seconds at the other from being 0.
            least = shortest / longest
            ascending[3 * num_rows - 2 + i, [i, num_rows + i]] = -1, least
        found = optimize.linprog(
            price,
            A_ub=ascending,
            b_ub=np.zeros(len(ascending)),
            A_eq=equal,
            b_eq=wanted,
        )
        if found.x is None:
            raise ValueError(
                f"readings of {readings[0].kind} at gamma {readings[0].gamma} cannot "
                f"be fitted: {found.message}; time them again"
            )
        low, high = found.x[:num_rows], found.x[num_rows:first]
        if shortest == longest:
            low = high
        return cls(
            rows=tuple(rows),
            shortest=shortest,
            longest=longest,
            low=tuple(low.tolist()),
            high=tuple(high.tolist()),
        )

    def seconds(self, rows: int, length: int) -> float:
        """Return the seconds of a pass.

        Beyond the measurements, fewer rows cost as much as the fewest; more rows are
        extrapolated from the last two, between constant and proportional; lengths are
        extrapolated linearly. Where only one number of rows, or one length, was
        measured, seconds grow with `ROWS_EXPONENT`, or `LENGTH_EXPONENT`.
        """
        if self.shortest == self.longest:
            seconds = self._at_rows(self.low, rows)
            return seconds * (length / self.longest) ** LENGTH_EXPONENT
        low, high = np.array(self.low), np.array(self.high)
        share = (length - self.shortest) / (self.longest - self.shortest)
        # The weights are read at any length, so seconds fall at most in proportion.
        least = low * min(length / self.shortest, 1.0)
        # Lines of different slopes may cross outside; they are put in order again.
        at_length = np.maximum.accumulate(np.maximum(low + share * (high - low), least))
        return self._at_rows(tuple(at_length.tolist()), rows)

    def _at_rows(self, seconds: tuple[float, ...], rows: int) -> float:
        if len(self.rows) == 1:
            return seconds[0] * (rows / self.rows[0]) ** ROWS_EXPONENT
        if rows <= self.rows[-1]:
            return float(np.interp(rows, self.rows, seconds))
        slope = (seconds[-1] - seconds[-2]) / (self.rows[-1] - self.rows[-2])
        slope = min(slope, seconds[-1] / self.rows[-1])
        return seconds[-1] + slope * (rows - self.rows[-1])


class PassCosts:
    """Seconds of single passes, from readings over a grid.

    Args:
      readings: of any kinds, shapes and gammas; at least one of a target pass.
    Raises:
      ValueError: no target reading, or readings that no surface can be fitted to.
    """

    def __init__(self, readings: Sequence[Reading]) -> None:
        self.readings = tuple(readings)
        by_kind: dict[tuple[Kind, int], list[Reading]] = {}
        for reading in self.readings:
            by_kind.setdefault((reading.kind, reading.gamma), []).append(reading)
        if ("target", 0) not in by_kind:
            raise ValueError(
                "readings hold no target pass at gamma 0, without which nothing can be "
                "compared; time an autoregressive step as well"
            )
        self.surfaces = {name: Surface.fit(own) for name, own in by_kind.items()}

    def gammas(self, kind: Kind) -> list[int]:
        """Return the gammas at which a kind was measured, ascending."""
        return sorted(gamma for name, gamma in self.surfaces if name == kind)

    def pass_seconds(self, kind: Kind, rows: int, length: int, gamma: int = 0) -> float:
        """Return the seconds of one pass, or of a round that was timed as a whole.

        Verifications are interpolated between measured gammas, with a target pass at
        gamma 0, and extrapolated from the last two. A draft pass beyond the measured
        gammas costs as much as at the nearest. For rounds see `_round_pass`.

        Args:
          kind: of pass. rows: of the batch. length: positions read per row.
          gamma: of the round; unused for target passes.
        Raises:
          ValueError: this kind was not measured.
        """
        if kind == "target":
            return self.surfaces["target", 0].seconds(rows, length)
        known = self.gammas(kind)
        if not known:
            raise ValueError(f"no {kind} was measured; give readings of it")
        if kind == "round":
            return self._round_pass(rows, length, gamma)
        if gamma in known:
            return self.surfaces[kind, gamma].seconds(rows, length)
        seconds = [self.surfaces[kind, g].seconds(rows, length) for g in known]
        if kind == "verify":
            target = self.surfaces["target", 0].seconds(rows, length)
            # More positions never cost less, whatever noise the readings have.
            rising = np.maximum.accumulate([target, *seconds]).tolist()
            return on_line(dict(zip([0, *known], rising, strict=True)), gamma)
        return float(np.interp(gamma, known, seconds))

    def _round_pass(self, rows: int, length: int, gamma: int) -> float:
        """Return the seconds of a round that was timed as a whole.

        Gammas that were timed at the most cells have surfaces. Of another timed gamma
        only one number is used: the ratio of its excess over a target pass to that of
        the first gamma with a surface. Few readings tell that ratio well, but not how
        rounds grow. The excess at a gamma without readings is interpolated between the
        others, or between one other and 0 at gamma 0. No round is cheaper than a target
        pass.
        """
        target = self.surfaces["target", 0].seconds(rows, length)
        full, ratios = self._rounds
        seconds = {g: self.surfaces["round", g].seconds(rows, length) for g in full}
        if gamma in seconds:
            return seconds[gamma]
        excess = max(seconds[full[0]] - target, 0.0)
        known = {g: seconds[g] - target for g in full}
        known |= {g: ratio * excess for g, ratio in ratios.items()}
        if len(known) == 1:
            known[0] = 0.0
        return target + max(on_line(known, gamma), 0.0)

    @functools.cached_property
    def _rounds(self) -> tuple[list[int], dict[int, float]]:
        """Return the gammas timed at the most cells, and ratios for the others."""
        found: dict[int, dict[Cell, float]] = {}
        for reading in self.readings:
            if reading.kind in ("round", "target"):
                cell = Cell(reading.rows, reading.length)
                found.setdefault(reading.gamma, {})[cell] = reading.seconds
        targets = found.pop(0)
        most = max(map(len, found.values()))
        full = [gamma for gamma in sorted(found) if len(found[gamma]) == most]
        ratios = {}
        for gamma in found.keys() - set(full):
            own_ratios = []
            for cell, seconds in found[gamma].items():
                target = targets.get(cell, self.pass_seconds("target", *cell))
                surface = self.surfaces["round", full[0]]
                excess = found[full[0]].get(cell, surface.seconds(*cell)) - target
                if excess > 0:
                    own_ratios.append((seconds - target) / excess)
            # Without any ratio, in proportion to gamma.
            ratios[gamma] = float(np.median(own_ratios or [gamma / full[0]]))
        return full, ratios

    def has_rounds(self, gamma: int) -> bool:
        """Whether enough was timed to predict a round of this gamma."""
        passes = self.gammas("draft") and self.gammas("verify")
        return gamma == 0 or bool(self.gammas("round") or passes)

    def round_seconds(self, program: Program) -> float:
        """Return the seconds of a whole round, drafts and verification.

        They come from rounds timed as a whole, if there are any, else from passes.
        """
        if not program.gamma or not self.gammas("round"):
            return seconds_of_passes(self, program)
        if program.window:
            return seconds_with_span(self.round_seconds, program) or 0.0
        return self.pass_seconds("round", *program[:3])


def on_line(points: Mapping[int, float], x: int) -> float:
    """Interpolate between two points or more; extrapolate from the nearest two."""
    xs = sorted(points)
    if xs[0] <= x <= xs[-1]:
        return float(np.interp(x, xs, [points[known] for known in xs]))
    near, next_ = (xs[0], xs[1]) if x < xs[0] else (xs[-1], xs[-2])
    slope = (points[near] - points[next_]) / (near - next_)
    return points[near] + slope * (x - near)


def checked_pass_costs(name: str, value: Any) -> PassCosts | None:
    """Return costs of passes from the readings of a file; None for an empty list.

    Raises:
      ValueError: as `checked_whole` and `PassCosts`.
    """
    rows = checked_list(name, value)
    if not rows:
        return None
    if len(rows) > MAX_READINGS:
        raise ValueError(f"{name} holds {len(rows)} readings, more than {MAX_READINGS}")
    return PassCosts([_checked_reading(f"{name}[{i}]", r) for i, r in enumerate(rows)])


def _checked_reading(name: str, value: Any) -> Reading:
    fields = checked_list(name, value)
    if len(fields) not in (5, 6) or fields[0] not in get_args(Kind):
        raise ValueError(
            f"{name} is {shortened(value)}, and must be a kind of {get_args(Kind)}, "
            "rows, length, gamma, seconds and weight"
        )
    kind, rows, length, gamma, seconds, weight = [*fields, 1.0][:6]
    least, most = (0, 0) if kind == "target" else (1, MOST)
    return Reading(
        kind=kind,
        rows=checked_whole(f"rows of {name}", rows, least=1),
        length=checked_whole(f"length of {name}", length, least=1),
        gamma=checked_whole(
            f"gamma of {name}",
            gamma,
            least=least,
            most=most,
        ),
        seconds=checked_seconds(f"seconds of {name}", seconds),
        weight=checked_real(f"weight of {name}", weight, least=1e-6, most=1e6),
    )
