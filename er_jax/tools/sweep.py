"""Latency sweeps of other engines: reading them, and judging fits to them.

A sweep is a CSV with one row per (mode, gamma, batch, seq) and the times of single
passes, in the format that EfficientRollout publishes. Such files are contaminated in
known ways, because a measured batch ramps up and down, and warm-ups count in the cell
before. Therefore:

* rows of batch or seq 0, which are warm-ups, are dropped;
* medians are read, never means;
* a row whose deviation exceeds a tenth of its mean mixes two cells, and has the weight
  `DOUBTFUL_WEIGHT`;
* the last cell of the grid (the largest batch at the largest length) has no cell after
  it and was measured while the batch ran down; it is judged, but not fitted to.

Draft passes are separate by gamma. They run the same kernel, but the engine pads a
batch to a multiple of gamma + 1, so for some batches their costs depend on gamma.

`judge` compares predictions with measurements, cell by cell. Nothing here depends on
the device or the model.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from er_jax.arguments import MOST
from er_jax.costs.passes import (
    Cell,
    Kind,
    PassCosts,
    PassPredictor,
    Reading,
    seconds_of_passes,
)
from er_jax.costs.roofline import Roofline
from er_jax.types import Program

MODES: dict[str, Kind] = {
    "target_decode": "target",
    "drafter_decode": "draft",
    "target_verify": "verify",
}

COLUMNS = ("model", "batch", "seq", "gamma", "mode", "mean_ms", "median_ms", "std_ms")

# A row is doubtful if its deviation is above DOUBTFUL_STD of its mean; a cell also if
# its draft passes at different gammas differ by more than DOUBTFUL_SPREAD.
DOUBTFUL_STD = 0.10
DOUBTFUL_SPREAD = 0.25
DOUBTFUL_WEIGHT = 0.1

# Least time of a pass; fits divide by it.
LEAST_MS = 1e-6


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The passes of one model on one device.

    model: its name in the file. readings: all of them, including those not to fit to.
      source: the file, for messages.
    """

    model: str
    readings: tuple[Reading, ...]
    source: str

    @property
    def grid(self) -> list[Cell]:
        """Cells with a target reading, in order; at least one."""
        found = {Cell(r.rows, r.length) for r in self.readings if r.kind == "target"}
        return sorted(found)

    @property
    def gammas(self) -> list[int]:
        """Draft lengths of all verifications, ascending."""
        return sorted({r.gamma for r in self.readings if r.kind == "verify"})

    def fitted(self, is_kept: Callable[[Cell], bool] | None = None) -> list[Reading]:
        """Return the readings to fit to, without the last cell; of kept cells only."""
        last = max(self.grid)
        found = [r for r in self.readings if (r.rows, r.length) != last]
        if is_kept is None:
            return found
        return [r for r in found if is_kept(Cell(r.rows, r.length))]

    def is_doubtful(self, cell: Cell, gamma: int) -> bool:
        """Whether the measurement of a cycle appears contaminated."""
        here = [r for r in self.readings if (r.rows, r.length) == cell]
        own = [r for r in here if r.gamma in (0, gamma)]
        drafts = [r.seconds for r in here if r.kind == "draft"]
        spread = max(drafts, default=1.0) / min(drafts, default=1.0) - 1
        return (
            cell == max(self.grid)
            or any(r.weight < 1 for r in own)
            or spread > DOUBTFUL_SPREAD
        )


def read_sweep(path: str | os.PathLike[str]) -> Sweep:
    """Read a sweep.

    Args:
      path: a CSV with at least the columns `COLUMNS`; times in milliseconds.
    Returns:
      The sweep, in seconds, doubtful readings with less weight.
    Raises:
      ValueError: not a CSV, a missing column, a line with impossible values, or no pass
        of some mode.
      OSError: the file cannot be read.
    """
    readings, model = [], ""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (table.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"{path} has no column {', '.join(missing)}; a sweep needs "
                    f"{', '.join(COLUMNS)}"
                )
            for row in table:
                model = model or row["model"]
                reading = _reading(row, f"{path}, line {table.line_num}")
                if reading is not None:
                    readings.append(reading)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV in UTF-8 ({error})") from error
    for kind in ("target", "draft", "verify"):
        if not any(reading.kind == kind for reading in readings):
            raise ValueError(
                f"{path} holds no {kind} pass; a sweep needs the modes "
                f"{', '.join(MODES)}"
            )
    return Sweep(model=model, readings=tuple(readings), source=os.fspath(path))


def _reading(row: dict[str, Any], line: str) -> Reading | None:
    """Return the reading of a line, None for a warm-up or another mode.

    Args:
      row: texts by column; None for columns missing from the end of the line.
      line: file and line number, for messages.
    Raises:
      ValueError: an impossible value.
    """

    def number(
        name: str, kind: Callable[[str], float], low: float, limits: str
    ) -> float:
        text = row[name]
        try:
            value = kind(text or "")
        except ValueError:
            value = math.nan
        if not low <= value <= MOST:
            raise ValueError(f"{line}: {name}={text!r} must be {limits}")
        return value

    def whole(name: str, low: int) -> int:
        return int(number(name, int, low, f"a whole number from {low} to {MOST}"))

    if None in row.values():
        raise ValueError(f"{line} is cut off: it has fewer columns than the first one")
    batch, length = whole("batch", 0), whole("seq", 0)
    if not batch or not length or row["mode"] not in MODES:
        return None
    kind = MODES[row["mode"]]
    gamma = whole("gamma", 0 if kind == "target" else 1)
    if kind == "target" and gamma:
        raise ValueError(f"{line}: gamma={gamma} of a target pass must be 0")
    for name in ("mean_ms", "std_ms"):
        number(name, float, 0, "milliseconds, 0 or more")
    number("median_ms", float, LEAST_MS, "milliseconds, above 0")
    is_doubtful = float(row["std_ms"]) > DOUBTFUL_STD * float(row["mean_ms"])
    return Reading(
        kind=kind,
        rows=batch,
        length=length,
        gamma=gamma,
        seconds=float(row["median_ms"]) / 1e3,
        weight=DOUBTFUL_WEIGHT if is_doubtful else 1.0,
    )


@dataclasses.dataclass(frozen=True)
class Miss:
    """A cycle whose speed-up was predicted on the wrong side of 1."""

    cell: Cell
    gamma: int
    measured: float
    predicted: float
    is_doubtful: bool


@dataclasses.dataclass(frozen=True)
class Judgement:
    """How predictions compare with measurements.

    target_errors, cycle_errors: absolute relative errors of target passes, and of
      cycles (gamma drafts and a verification). clean_errors: those of cycles in cells
      that are not doubtful. misses: cycles predicted on the wrong side of 1.
    """

    target_errors: tuple[float, ...]
    cycle_errors: tuple[float, ...]
    clean_errors: tuple[float, ...]
    misses: tuple[Miss, ...]

    @property
    def num_cycles(self) -> int:
        """The number of judged cycles."""
        return len(self.cycle_errors)

    @property
    def sign_share(self) -> float:
        """Share of cycles whose speed-up is predicted on the right side of 1."""
        return 1 - len(self.misses) / self.num_cycles

    def __str__(self) -> str:
        clean = "no clean cells"
        if self.clean_errors:
            clean = f"clean cells {100 * np.mean(self.clean_errors):.2f} %"
        return (
            f"target MAPE {100 * np.mean(self.target_errors):.2f} %, "
            f"cycle MAPE {100 * np.mean(self.cycle_errors):.2f} % "
            f"({clean}), "
            f"sign right in {self.num_cycles - len(self.misses)} of {self.num_cycles} "
            f"({100 * self.sign_share:.1f} %)"
        )


def joined(parts: Sequence[Judgement]) -> Judgement:
    """Return the judgements of disjoint cells as one."""
    return Judgement(
        *(
            tuple(x for part in parts for x in getattr(part, field.name))
            for field in dataclasses.fields(Judgement)
        )
    )


def judge(model: PassPredictor, sweep: Sweep, cells: Sequence[Cell]) -> Judgement:
    """Compare predictions with a sweep.

    The speed-up of a cycle counts gamma tokens: gamma target passes over gamma draft
    passes and one verification.

    Args:
      model: predicts passes. sweep: measurements. cells: those to compare.
    Raises:
      ValueError: no cycle was measured in these cells.
    """
    known = {reading[:4]: reading.seconds for reading in sweep.readings}
    target_errors, cycle_errors, clean_errors = [], [], []
    misses = []
    for cell in cells:
        target = known["target", *cell, 0]
        predicted_target = model.pass_seconds("target", *cell)
        target_errors.append(abs(predicted_target / target - 1))
        for gamma in sweep.gammas:
            draft = known.get(("draft", *cell, gamma))
            verify = known.get(("verify", *cell, gamma))
            if draft is None or verify is None:
                continue
            cycle = gamma * draft + verify
            predicted = seconds_of_passes(model, Program(*cell, gamma))
            error, is_doubtful = (
                abs(predicted / cycle - 1),
                sweep.is_doubtful(cell, gamma),
            )
            cycle_errors.append(error)
            if not is_doubtful:
                clean_errors.append(error)
            speed_up = gamma * target / cycle
            predicted_speed_up = gamma * predicted_target / predicted
            if (speed_up > 1) != (predicted_speed_up > 1):
                misses.append(
                    Miss(cell, gamma, speed_up, predicted_speed_up, is_doubtful)
                )
    if not cycle_errors:
        raise ValueError(
            f"{sweep.source} has no cycle in {len(cells)} cells; measure target, draft "
            "and verify passes of one gamma in the same cell"
        )
    return Judgement(
        target_errors=tuple(target_errors),
        cycle_errors=tuple(cycle_errors),
        clean_errors=tuple(clean_errors),
        misses=tuple(misses),
    )


def halves(sweep: Sweep) -> tuple[list[Cell], list[Cell]]:
    """Return the two colours of a checkerboard over rows and length."""
    rows = sorted({cell.rows for cell in sweep.grid})
    lengths = sorted({cell.length for cell in sweep.grid})
    black = [
        cell
        for cell in sweep.grid
        if (rows.index(cell.rows) + lengths.index(cell.length)) % 2
    ]
    return black, [cell for cell in sweep.grid if cell not in black]


def report(sweep: Sweep) -> str:
    """Return a text about how well the cost table and the roofline fit a sweep.

    Raises:
      ValueError: too few cells to fit to one half and judge the other.
    """
    lines = [
        f"{sweep.model}: {len(sweep.grid)} cells, gammas "
        f"{', '.join(map(str, sweep.gammas))}; speed-up of gamma tokens a cycle"
    ]
    fits: dict[str, Callable[[Sequence[Reading]], PassPredictor]] = {
        "table": PassCosts,
        "roofline": Roofline.fit,
    }
    halved = halves(sweep)
    for half in halved:
        kinds = {reading.kind for reading in sweep.fitted(set(half).__contains__)}
        if kinds != set(MODES.values()):
            raise ValueError(
                f"{sweep.source} has {len(sweep.grid)} cells of batch and seq, too few "
                "to fit to one half and judge the other; measure "
                f"{', '.join(MODES)} at 2 x 2 cells or more"
            )
    for name, fit in fits.items():
        overall = judge(fit(sweep.fitted()), sweep, sweep.grid)
        lines.append(f"  {name}, fitted to all: {overall}")
        lines += _misses(overall)
        parts = []
        for fitted, judged in (halved, halved[::-1]):
            parts.append(
                judge(fit(sweep.fitted(set(fitted).__contains__)), sweep, judged)
            )
            lines.append(
                f"  {name}, fitted to {len(fitted)} cells, judged on {len(judged)}: "
                f"{parts[-1]}"
            )
            lines += _misses(parts[-1])
        lines.append(f"  {name}, both halves: {joined(parts)}")
    return "\n".join(lines)


def _misses(judgement: Judgement) -> list[str]:
    return [
        f"    wrong at {miss.cell.rows} rows, length {miss.cell.length}, gamma "
        f"{miss.gamma}: measured {miss.measured:.3f}, predicted {miss.predicted:.3f}"
        f"{', contaminated' if miss.is_doubtful else ''}"
        for miss in judgement.misses
    ]
