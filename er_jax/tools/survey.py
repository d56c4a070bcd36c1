"""A survey of the costs of rounds on this device: where does speculation pay?

Rounds are timed at cells of a grid of rows and lengths. The next cell is always the one
where it is least certain whether speculation pays. The survey ends when that and the
costs of other draft lengths are known, or when its time is spent (`er-jax calibrate`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from er_jax.acceptance import expected_tokens
from er_jax.arguments import check_chance, check_gammas, check_number, check_whole
from er_jax.control.estimate import PRIOR_KEEP
from er_jax.costs.passes import Cell, PassCosts
from er_jax.costs.table import LatencyTable
from er_jax.costs.timing import measure_round
from er_jax.drafter import PolicyParams
from er_jax.engine.engine import Engine
from er_jax.figures import new_figure
from er_jax.types import (
    Program,
)

# Assumed limit of the change in the logarithm of the speed-up, from a cell to one with
# twice the rows or twice the length.
CHANGE_PER_OCTAVE = 0.2

# Speed-up of the middle draft length from which another length may pay.
NEARLY = 0.9


@dataclasses.dataclass(frozen=True)
class Survey:
    """The result of a survey.

    costs: fitted to its readings, one for each program. is_complete: whether the survey
      knows, for every cell, if speculation pays there, and the costs of other draft
      lengths where it does; otherwise its time was spent first. spent_s: seconds of
      measuring, without compilation.
    """

    costs: PassCosts
    is_complete: bool
    spent_s: float


def speed_up(costs: PassCosts, cell: Cell, keep_prob: float) -> float:
    """Return the speed-up over plain decoding of the best measured gamma.

    Args:
      costs: with rounds. cell: rows and length. keep_prob: chance that a draft is kept,
        at any depth.
    """
    plain_s = costs.round_seconds(Program(*cell, 0))
    return max(
        expected_tokens([keep_prob] * gamma)
        * plain_s
        / costs.round_seconds(Program(*cell, gamma))
        for gamma in costs.gammas("round")
    )


def survey(
    round_s: Callable[[Program], float],
    rows: Sequence[int],
    lengths: Sequence[int],
    gammas: Sequence[int],
    *,
    keep_prob: float = PRIOR_KEEP,
    budget_s: float = 20.0,
    spent_s: Callable[[], float],
    progress: bool = False,
) -> Survey:
    """Measure rounds until it is known where speculation pays, or the time is spent.

    The survey has three stages.

    1. The corners of the grid, plain and with the middle draft length; then always the
       cell with the least certain sign of speed-up - 1. A cell is less certain the
       farther it is from measured ones and the nearer its speed-up is to 1.
    2. When all signs are certain, or half of the time is spent: the longest and the
       shortest draft length, where the middle one pays or nearly does. The others are
       interpolated, see `PassCosts.pass_seconds`.
    3. In the remaining time, all programs again; the lesser seconds count, because
       other work on the machine lasts longer than a reading.

    Args:
      round_s: times a program; see `measure_round`. rows, lengths: the grid.
      gammas: draft lengths, of which the one nearest to 4 decides where speculation
        pays; 0 is always measured.
      keep_prob: chance that a draft is kept, for the speed-up. budget_s: seconds; a
        reading begun within them is finished. spent_s: returns the seconds spent so
        far, without compilation.
      progress: show a progress bar of the seconds.
    Raises:
      ValueError: an empty grid, no gamma above 0, or a number outside its range.
    """
    for name, values in (("rows", rows), ("lengths", lengths)):
        for value in values:
            check_whole(name, value)
    check_gammas(gammas)
    check_chance("keep_prob", keep_prob)
    check_number("budget_s", budget_s, 0, math.inf, "seconds")
    drafting = sorted({gamma for gamma in gammas if gamma > 0})
    if not drafting or not rows or not lengths:
        raise ValueError(
            f"rows={tuple(rows)}, lengths={tuple(lengths)}, gammas={tuple(gammas)}: a "
            "survey needs a number of rows, a length and a gamma above 0"
        )
    grid = [Cell(*cell) for cell in itertools.product(sorted(rows), sorted(lengths))]
    middle = min(drafting, key=lambda gamma: abs(gamma - 4))
    begin_s, measured = spent_s(), dict[Program, float]()
    bar = tqdm(
        total=budget_s,
        desc="calibration",
        unit="s",
        disable=not progress,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.0f} s{postfix}",
    )

    def is_over(share: float = 1.0) -> bool:
        return spent_s() - begin_s >= share * budget_s

    def measure(cell: Cell, gamma: int) -> None:
        program = Program(*cell, gamma)
        seconds = round_s(program)
        measured[program] = min(seconds, measured.get(program, seconds))
        bar.n = min(spent_s() - begin_s, budget_s)
        bar.set_postfix_str(f"{len(measured)} programs", refresh=True)

    def fit() -> PassCosts:
        table = LatencyTable(seconds=measured)
        return PassCosts(table.readings())

    def uncertainty(cell: Cell, fitted: PassCosts) -> float:
        """Return how far the speed-up may cross 1, in logarithms; <= 0 if it cannot."""
        known = {Cell(p.rows, p.cache_length) for p in measured if p.gamma}
        octaves = min(
            abs(math.log2(cell.rows / other.rows))
            + abs(math.log2(cell.length / other.length))
            for other in known
        )
        distance = abs(math.log(speed_up(fitted, cell, keep_prob)))
        return CHANGE_PER_OCTAVE * octaves - distance

    with bar:
        corners = [
            Cell(*cell)
            for cell in itertools.product(
                dict.fromkeys((min(rows), max(rows))),
                dict.fromkeys((min(lengths), max(lengths))),
            )
        ]
        for cell in corners:
            # At least one cell is measured, or nothing can be fitted.
            if measured and is_over():
                break
            measure(cell, 0)
            measure(cell, middle)
        is_complete = False
        while not is_over(0.5):
            fitted = fit()
            uncertain = {cell: uncertainty(cell, fitted) for cell in grid}
            cell = max(grid, key=uncertain.__getitem__)
            if uncertain[cell] <= 0:
                is_complete = True
                break
            measure(cell, 0)
            measure(cell, middle)
        fitted = fit()
        known = dict.fromkeys(Cell(p.rows, p.cache_length) for p in measured)
        ups = {cell: speed_up(fitted, cell, keep_prob) for cell in known}
        others = {drafting[-1], drafting[0]} - {middle}
        near = sorted((c for c in known if ups[c] >= NEARLY), key=ups.__getitem__)
        for cell, gamma in itertools.product(reversed(near), sorted(others)):
            if is_over():
                is_complete = False
                break
            measure(cell, gamma)
        for program in list(measured):
            if is_over():
                break
            measure(Cell(program.rows, program.cache_length), program.gamma)
    return Survey(fit(), is_complete, spent_s() - begin_s)


def survey_engine(
    engine: Engine,
    params: PolicyParams,
    rows: Sequence[int],
    lengths: Sequence[int],
    gammas: Sequence[int],
    *,
    keep_prob: float = PRIOR_KEEP,
    budget_s: float = 20.0,
    progress: bool = False,
) -> Survey:
    """Survey the rounds of an engine on this device; arguments as in `survey`."""
    start_s, compiled_s = time.perf_counter(), engine.compile_s

    def spent_s() -> float:
        return time.perf_counter() - start_s - (engine.compile_s - compiled_s)

    return survey(
        lambda program: measure_round(engine, params, program),
        rows,
        lengths,
        gammas,
        keep_prob=keep_prob,
        budget_s=budget_s,
        spent_s=spent_s,
        progress=progress,
    )


def plot_speed_up(
    found: Survey,
    rows: Sequence[int],
    lengths: Sequence[int],
    keep_prob: float,
    path: str | os.PathLike[str],
) -> None:
    """Draw the predicted speed-up over rows and length, and save the picture.

    Raises:
      ImportError: matplotlib is missing; install the extra `plot`.
    """
    values = [
        [speed_up(found.costs, Cell(r, length), keep_prob) for r in sorted(rows)]
        for length in sorted(lengths)
    ]
    largest = max(abs(math.log(value)) for line in values for value in line) or 1.0
    figure = new_figure(7, 4)
    axes = figure.subplots()
    image = axes.pcolormesh(
        range(len(rows)),
        range(len(lengths)),
        np.log(values),
        cmap="RdBu",
        vmin=-largest,
        vmax=largest,
        shading="nearest",
    )
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize="small")
    measured = {Cell(r.rows, r.length) for r in found.costs.readings}
    axes.plot(
        [sorted(rows).index(cell.rows) for cell in measured],
        [sorted(lengths).index(cell.length) for cell in measured],
        "ks",
        markerfacecolor="none",
        markersize=26,
        label="measured",
    )
    axes.set_xticks(range(len(rows)), [str(r) for r in sorted(rows)])
    axes.set_yticks(range(len(lengths)), [str(length) for length in sorted(lengths)])
    axes.set(xlabel="rows", ylabel="cache length")
    drafts = ", ".join(str(gamma) for gamma in found.costs.gammas("round"))
    axes.set_title(f"speed-up of drafts of {drafts}, {keep_prob} of them kept")
    figure.colorbar(image, label="log of the speed-up")
    figure.savefig(path, dpi=130)
