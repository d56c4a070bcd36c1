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

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from er_jax.arguments import MOST, is_number, is_whole
from er_jax.types import Program

# How seconds grow with rows and cache length where nothing says so: between free
# (bound by weights) and proportional (bound by arithmetic or by the cache).
ROWS_EXPONENT = 0.5
LENGTH_EXPONENT = 0.3

Kind = Literal["target", "draft", "verify", "round"]

# A record of costs is at most so large, and holds at most so many readings of passes:
# whatever is larger was not written by `save_record`. No pass takes less or more than
# these seconds.
MAX_RECORD_BYTES = 1 << 24
MAX_READINGS = 2000
LEAST_SECONDS, MOST_SECONDS = 1e-9, 1e6

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


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The published cost model: a pass is bound by bytes or by arithmetic.

    All of it in seconds, so that no device and no model needs to be known: bytes over
    bandwidth and operations over throughput appear as their quotients. With B rows of S
    positions and n positions per row (1, or gamma + 1 in a verification):

        pass = max(weights + cache B S, n B (dense + attention S)) + overhead B

    target_weights_s, draft_weights_s: reading the weights once.
    cache_s: reading one position of one row. dense_s: one position's products with the
      weights. attention_s: one position's attention to another one.
    target_overhead_s, draft_overhead_s, verify_overhead_s: per row and pass.
    """

    target_weights_s: float
    draft_weights_s: float
    cache_s: float
    dense_s: float
    attention_s: float
    target_overhead_s: float
    draft_overhead_s: float
    verify_overhead_s: float

    @classmethod
    def fit(cls, readings: Sequence[Reading]) -> Roofline:
        """Fit to readings by relative error, outliers counted less.

        Starting points and bounds come from the readings themselves.

        Args:
          readings: target passes, and drafts and verifications or rounds.
        """
        from scipy import optimize

        kinds = np.array([reading.kind for reading in readings])
        rows = np.array([reading.rows for reading in readings], float)
        length = np.array([reading.length for reading in readings], float)
        gamma = np.array([reading.gamma for reading in readings], float)
        seconds = np.array([reading.seconds for reading in readings])
        weight = np.sqrt([reading.weight for reading in readings])
        is_target, is_draft = kinds == "target", kinds == "draft"
        # How many draft passes a reading holds, and whether it holds a target's.
        num_drafts = np.select([is_draft, kinds == "round"], [1.0, gamma], 0.0)
        positions = np.where(is_target | is_draft, 1.0, gamma + 1)

        fastest = seconds[is_target].min()
        fastest_draft = seconds[is_draft].min() if is_draft.any() else fastest / 2
        work = (positions * rows).max()
        dense = seconds[positions * rows == work].min() / work
        cache = np.ptp(seconds[is_target]) / (rows * length).max()
        least = 1e-6 * fastest / work
        start = np.array(
            [0.9 * fastest, 0.9 * fastest_draft, cache, dense, dense / 1e4]
            + [fastest / 100] * 3
        )
        start = np.maximum(start, least)

        def error(log_values: np.ndarray) -> np.ndarray:
            weights, draft, cache, dense, attention, *over = np.exp(log_values)
            one = rows * (dense + attention * length)
            drafted = np.maximum(draft + cache * rows * length, one) + over[1] * rows
            verified = np.maximum(weights + cache * rows * length, positions * one)
            verified += np.where(is_target, over[0], over[2]) * rows
            predicted = num_drafts * drafted + ~is_draft * verified
            return weight * np.log(predicted / seconds)

        bounds = (np.full(8, np.log(least) - 20), np.full(8, np.log(seconds.max()) + 1))
        best = None
        # The larger of two is not smooth; several starts find the right side of it.
        for dense_factor, overhead_factor in itertools.product((0.3, 1.0), (0.1, 1.0)):
            factors = np.array([1, 1, 1, dense_factor, 1] + [overhead_factor] * 3)
            found = optimize.least_squares(
                error,
                np.log(start * factors),
                bounds=bounds,
                loss="soft_l1",
                f_scale=0.03,
            )
            if best is None or found.cost < best.cost:
                best = found
        assert best is not None
        return cls(*np.exp(best.x).tolist())

    def pass_seconds(self, kind: Kind, rows: int, length: int, gamma: int = 0) -> float:
        """Return the seconds of one pass; arguments as in `PassCosts.pass_seconds`."""
        if kind == "round":
            return self.round_seconds(Program(rows, length, gamma))
        weights, overhead, positions = {
            "target": (self.target_weights_s, self.target_overhead_s, 1),
            "draft": (self.draft_weights_s, self.draft_overhead_s, 1),
            "verify": (self.target_weights_s, self.verify_overhead_s, gamma + 1),
        }[kind]
        read = weights + self.cache_s * rows * length
        computed = positions * rows * (self.dense_s + self.attention_s * length)
        return max(read, computed) + overhead * rows

    def round_seconds(self, program: Program) -> float:
        """Return the seconds of a whole round, drafts and verification."""
        return seconds_of_passes(self, program)

    def save(self, path: str | os.PathLike[str], about: Mapping[str, str]) -> None:
        """Write the model as JSON, with what it holds for; see `save_record`."""
        save_record(path, "roofline", about, dataclasses.asdict(self))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], about: Mapping[str, str] | None = None
    ) -> Roofline:
        """Read what `save` wrote; errors as in `load_record`."""
        values = load_record(path, "roofline", about)
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise ValueError(
                f"{path} is damaged: a roofline must have {', '.join(names)}; measure "
                "it again"
            )
        with damaged(path):
            return cls(**{name: checked_real(name, values[name]) for name in names})


def checked_whole(name: str, value: Any, *, least: int = 0, most: int = MOST) -> int:
    """Return a number of a file as an int.

    Raises:
      ValueError: it is no whole number, or outside of its limits; `name` is in it.
    """
    if not is_whole(value, least, most):
        raise ValueError(
            f"{name} is {_short(value)}, and must be a whole number from {least} to "
            f"{most}"
        )
    return int(value)


def checked_real(
    name: str, value: Any, *, least: float = 0.0, most: float = math.inf
) -> float:
    """Return a finite number of a file as a float; errors as of `checked_whole`."""
    if (
        not is_number(value)
        or not least <= value <= most
        or abs(value) > 1e300  # inf, and whole numbers that no float holds
    ):
        above = f" to {most:g}" if most < math.inf else ""
        raise ValueError(
            f"{name} is {_short(value)}, and must be a finite number from {least:g}"
            f"{above}"
        )
    return float(value)


def checked_seconds(name: str, value: Any) -> float:
    """Return the seconds of a pass or round; errors as of `checked_whole`."""
    return checked_real(name, value, least=LEAST_SECONDS, most=MOST_SECONDS)


def checked_list(name: str, value: Any, length: int | None = None) -> list[Any]:
    """Return a list of a file, of this length if one is given; errors alike."""
    is_list = isinstance(value, list | tuple)
    if not is_list or (length is not None and len(value) != length):
        of = "" if length is None else f" of {length}"
        raise ValueError(f"{name} is {_short(value)}, and must be a list{of}")
    return list(value)


def checked_program(name: str, value: Any) -> Program:
    """Return a program: rows, cache length, gamma, joint or not; errors alike."""
    fields = checked_list(name, value)
    if len(fields) not in (3, 4) or not isinstance(fields[-1], bool | int):
        raise ValueError(
            f"{name} is {_short(value)}, and must be rows, cache length, gamma and "
            "whether joint"
        )
    joint = fields[3] if len(fields) == 4 else False
    if not isinstance(joint, bool):
        raise ValueError(f"joint of {name} is {_short(joint)}, and must be true, false")
    return Program(
        rows=checked_whole(f"rows of {name}", fields[0], least=1),
        cache_length=checked_whole(f"cache length of {name}", fields[1], least=1),
        gamma=checked_whole(f"gamma of {name}", fields[2]),
        joint=joint,
    )


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
            f"{name} is {_short(value)}, and must be a kind of {get_args(Kind)}, rows, "
            "length, gamma, seconds and weight"
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextlib.contextmanager
def damaged(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have a `ValueError` of what is wrong in a file name the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; measure them again") from error


def save_record(
    path: str | os.PathLike[str], kind: str, about: Mapping[str, str], values: Any
) -> None:
    """Write costs as JSON.

    Args:
      path: the file; its directory is made. kind: of costs, "roofline" for instance.
      about: what they hold for: device, versions, policy, ...
      values: JSON-ready.
    """
    record = {"kind": kind, "about": dict(about), "values": values}
    # Renamed into place: a reader never meets half a file. Of a name that no other
    # thread or process writes to.
    whole = Path(path)
    whole.parent.mkdir(parents=True, exist_ok=True)
    part = whole.with_name(f"{whole.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        part.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        part.replace(whole)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load_record(
    path: str | os.PathLike[str], kind: str, about: Mapping[str, str] | None
) -> Any:
    """Read the values that `save_record` wrote.

    Args:
      path: the file. kind: of costs. about: what it must hold for; None takes anything.
    Raises:
      ValueError: no such record, or of another device, version or policy.
      OSError: the file cannot be read.
    """
    size = Path(path).stat().st_size
    if size > MAX_RECORD_BYTES:
        raise ValueError(
            f"{path} holds no costs: it has {size} bytes, more than "
            f"{MAX_RECORD_BYTES}; measure them again"
        )
    try:
        record = json.loads(Path(path).read_text("utf-8"))
        found, values = dict(record["about"]), record["values"]
        found_kind = record["kind"]
    # Deeply nested brackets, too, are no costs.
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no costs; measure them again") from error
    if found_kind != kind:
        raise ValueError(
            f"{path} holds {str(found_kind)[:80]}, not {kind}; give another file"
        )
    for name, wanted in (about or {}).items():
        if found.get(name) != wanted:
            raise ValueError(
                f"{path} was measured with {name} {found.get(name)!r}, and this is "
                f"{wanted!r}: costs do not carry over; measure them again"
            )
    return values
