"""What single passes cost, from timed ones: a surface per kind, and the roofline.

A pass is a target pass (one autoregressive step), a draft pass or a verification. A
`Surface` is fitted to the readings of one kind and gamma over rows and length, and
`PassCosts` holds one for each. `Roofline` is the published model in three equations,
fitted to the same readings.

Plain Python floats on the host. Left out: whole rounds that ran (`costs`), where
readings come from (`calibrate`, `sweep`).

Source: the three equations, EfficientRollout (arXiv 2606.18967), section 3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
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

# How seconds grow with rows and cache length where nothing says so: between free
# (bound by weights) and proportional (bound by arithmetic or by the cache).
ROWS_EXPONENT = 0.5
LENGTH_EXPONENT = 0.3


Kind = Literal["target", "draft", "verify", "round"]

MAX_READINGS = 2000

# What a kink in the cost of a position, from one number of rows to the next, weighs
# against errors of fit: enough that few readings do not make a surface of their noise.
KINK_WEIGHT = 0.1


class Cell(NamedTuple):
    """A point of a grid: rows of a batch, and positions read per row."""

    rows: int
    length: int


class Reading(NamedTuple):
    """One timed pass, or round.

    kind: "target" (an autoregressive step), "draft" (one draft pass), "verify" (one
      target pass over gamma + 1 positions) or "round" (gamma drafts and a verification
      together). rows: of the batch. length: positions read per row. gamma: of the round
      it belongs to; 0 for "target".
    seconds: of one. weight: 1, or less where it is in doubt.
    """

    kind: Kind
    rows: int
    length: int
    gamma: int
    seconds: float
    weight: float = 1.0


class PassPredictor(Protocol):
    """What prices single passes: `PassCosts` and `Roofline`."""

    def pass_seconds(self, kind: Kind, rows: int, length: int, gamma: int = 0) -> float:
        """Return the seconds of one pass."""


def seconds_of_passes(costs: PassPredictor, program: Program) -> float:
    """Return the seconds of a round as the sum of its passes."""
    rows, length, gamma, _ = program
    if gamma == 0:
        return costs.pass_seconds("target", rows, length)
    drafts = gamma * costs.pass_seconds("draft", rows, length, gamma)
    return drafts + costs.pass_seconds("verify", rows, length, gamma)


@dataclasses.dataclass(frozen=True)
class Surface:
    """Seconds of one kind of pass over rows and length.

    Linear in length (weights once, and every entry of the cache once) and at most in
    proportion to it, piecewise linear in rows, and never falling in either as far as
    rows were measured.

    rows: numbers of rows that were measured, ascending.
    shortest, longest: lengths at which `low` and `high` hold.
    low, high: seconds at those, for each of `rows`.
    """

    rows: tuple[int, ...]
    shortest: int
    longest: int
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def fit(cls, readings: Sequence[Reading]) -> Surface:
        """Fit a surface by least absolute relative deviations.

        A linear program: errors and kinks are paid for, order is a constraint. Absolute
        deviations, because a reading of a shared machine is wrong by a lot or not at
        all.

        Args:
          readings: at least one, all of one kind and gamma.
        """
        from scipy import optimize

        rows = sorted({reading.rows for reading in readings})
        shortest = min(reading.length for reading in readings)
        longest = max(reading.length for reading in readings)
        count, num_rows = len(readings), len(rows)
        num_kinks = max(num_rows - 2, 0)
        # Unknowns: low and high of every row, then what is too little and too much of
        # every reading, then of every kink.
        num_unknowns = 2 * (num_rows + count + num_kinks)
        usual = float(np.median([reading.seconds for reading in readings]))

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
                equal[count + i, at] = -factor / usual
                equal[count + i, num_rows + at] = factor / usual
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
            # And at most in proportion: where rows were measured at one length only,
            # nothing else keeps the other one from costing nothing.
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

        Outside of what was measured: fewer rows cost what the fewest do; more rows go
        on as the last two do, between free and proportional; lengths go on linearly.
        Where only one number of rows, or one length, was measured, `ROWS_EXPONENT` and
        `LENGTH_EXPONENT` say how seconds grow.
        """
        if self.shortest == self.longest:
            seconds = self._at_rows(self.low, rows)
            return seconds * (length / self.longest) ** LENGTH_EXPONENT
        low, high = np.array(self.low), np.array(self.high)
        share = (length - self.shortest) / (self.longest - self.shortest)
        # Even an empty cache needs the weights: below, at most in proportion.
        least = low * min(length / self.shortest, 1.0)
        # Slopes may differ, so lines that cross outside must be put in order again.
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
      readings: of any kinds, shapes and gammas; a target reading at least.
    Raises:
      ValueError: no target reading, or readings that no surface can be fitted to.
    """

    def __init__(self, readings: Sequence[Reading]) -> None:
        self.readings = tuple(readings)
        groups: dict[tuple[Kind, int], list[Reading]] = {}
        for reading in self.readings:
            groups.setdefault((reading.kind, reading.gamma), []).append(reading)
        if ("target", 0) not in groups:
            raise ValueError(
                "readings hold no target pass at gamma 0, without which nothing can be "
                "compared; time an autoregressive step as well"
            )
        self.surfaces = {name: Surface.fit(group) for name, group in groups.items()}

    def gammas(self, kind: Kind) -> list[int]:
        """Return the gammas at which a kind was measured, ascending."""
        return sorted(gamma for name, gamma in self.surfaces if name == kind)

    def pass_seconds(self, kind: Kind, rows: int, length: int, gamma: int = 0) -> float:
        """Return the seconds of one pass, or of a round that was measured as one.

        Between measured gammas it is linear, a verification of one position being a
        target pass; beyond them it goes on as the last two do, and a draft pass costs
        what the nearest does. For rounds see `_round_pass`.

        Args:
          kind: of pass. rows: of the batch. length: positions read per row.
          gamma: of the round, for all but target passes.
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
            # More positions never cost less, whatever the noise of the readings.
            rising = np.maximum.accumulate([target, *seconds]).tolist()
            return _on_line(dict(zip([0, *known], rising, strict=True)), gamma)
        return float(np.interp(gamma, known, seconds))

    def _round_pass(self, rows: int, length: int, gamma: int) -> float:
        """Return the seconds of a round that was measured as one.

        Gammas that were measured as often as any have surfaces. Of the others it is
        known what part of a round's seconds beyond a target pass they take, beside one
        of those: a few readings tell that well, and nothing of how rounds grow. Gammas
        without readings are on the line of those parts; where only one gamma has any,
        on the line to a target pass. No round is cheaper than that.
        """
        target = self.surfaces["target", 0].seconds(rows, length)
        whole, parts = self._rounds
        seconds = {g: self.surfaces["round", g].seconds(rows, length) for g in whole}
        if gamma in seconds:
            return seconds[gamma]
        beyond = max(seconds[whole[0]] - target, 0.0)
        known = {g: seconds[g] - target for g in whole}
        known |= {g: part * beyond for g, part in parts.items()}
        if len(known) == 1:
            known[0] = 0.0
        return target + max(_on_line(known, gamma), 0.0)

    @functools.cached_property
    def _rounds(self) -> tuple[list[int], dict[int, float]]:
        """Return the gammas measured most often, and the parts that others take."""
        found: dict[int, dict[Cell, float]] = {}
        for reading in self.readings:
            if reading.kind in ("round", "target"):
                cell = Cell(reading.rows, reading.length)
                found.setdefault(reading.gamma, {})[cell] = reading.seconds
        targets = found.pop(0)
        most = max(map(len, found.values()))
        whole = [gamma for gamma in sorted(found) if len(found[gamma]) == most]
        parts = {}
        for gamma in found.keys() - set(whole):
            beyond = []
            for cell, seconds in found[gamma].items():
                target = targets.get(cell, self.pass_seconds("target", *cell))
                surface = self.surfaces["round", whole[0]]
                other = found[whole[0]].get(cell, surface.seconds(*cell)) - target
                if other > 0:
                    beyond.append((seconds - target) / other)
            # Where nothing tells, in proportion.
            parts[gamma] = float(np.median(beyond or [gamma / whole[0]]))
        return whole, parts

    def has_rounds(self, gamma: int) -> bool:
        """Whether enough was measured to say what a round of this gamma takes."""
        passes = self.gammas("draft") and self.gammas("verify")
        return gamma == 0 or bool(self.gammas("round") or passes)

    def round_seconds(self, program: Program) -> float:
        """Return the seconds of a whole round, drafts and verification.

        Of rounds that were measured as such, if any were; else of their passes.
        """
        if program.gamma and self.gammas("round"):
            return self.pass_seconds("round", *program[:3])
        return seconds_of_passes(self, program)


def _on_line(points: Mapping[int, float], x: int) -> float:
    """Interpolate two points or more, and go on beyond as the nearest two do."""
    at = sorted(points)
    if at[0] <= x <= at[-1]:
        return float(np.interp(x, at, [points[place] for place in at]))
    near, next_ = (at[0], at[1]) if x < at[0] else (at[-1], at[-2])
    slope = (points[near] - points[next_]) / (near - next_)
    return points[near] + slope * (x - near)


def checked_pass_costs(name: str, value: Any) -> PassCosts | None:
    """Return costs of passes from the readings of a file, None of an empty list.

    Raises:
      ValueError: as `checked_whole`; or no costs of passes can be made of them.
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
