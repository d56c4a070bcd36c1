"""A survey of what rounds cost here: where does speculation pay?

Rounds are timed at some cells of a grid of rows and lengths, next always where it is
least certain whether speculation pays, until that and the cost of other draft lengths
are known or the time is spent (`er-jax calibrate`).
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

# How much the logarithm of the speed-up is taken to change, at most, from a cell to its
# neighbour at twice the rows or twice the length.
CHANGE_PER_OCTAVE = 0.2

# Where a middling draft is this fast or faster, another length may pay.
NEARLY = 0.9


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a survey found.

    costs: fitted to its readings, one for each program. is_complete: whether it is
      known of every cell if speculation pays there, and where it does what other drafts
      cost; else the time was spent. spent_s: seconds of measuring, compilation not
      counted.
    """

    costs: PassCosts
    is_complete: bool
    spent_s: float


def speed_up(costs: PassCosts, cell: Cell, keep_prob: float) -> float:
    """Return the speed of the measured gamma over plain decoding, the best of several.

    Args:
      costs: with rounds. cell: where. keep_prob: chance of a draft at any depth.
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

    The corners come first, plain and with a middling draft; then always the cell of
    which it is least certain on which side of 1 its speed-up is: the farther from what
    was measured, and the nearer to 1, the less. When all is known of that, or half of
    the time is spent, the longest and the shortest draft where the middling one pays,
    or nearly: the others lie on a line, see `PassCosts.pass_seconds`. In the time that
    is left all are measured again, and the lesser seconds stand: other work on the
    machine lasts for longer than a reading does.

    Args:
      round_s: times a program; see `measure_round`. rows, lengths: the grid.
      gammas: draft lengths, of which the one nearest to 4 decides where speculation
        pays; 0 always is measured.
      keep_prob: chance of a draft, for the speed-up. budget_s: seconds; a reading begun
        within them is finished. spent_s: seconds spent so far, compilation not counted.
      progress: show a progress bar of the seconds.
    Raises:
      ValueError: an empty grid, no gamma above 0, or no such number.
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
        """How far the speed-up may be on the other side of 1; 0 or less if never."""
        known = {Cell(p.rows, p.cache_length) for p in measured if p.gamma}
        octaves = min(
            abs(math.log2(cell.rows / other.rows))
            + abs(math.log2(cell.length / other.length))
            for other in known
        )
        certain = abs(math.log(speed_up(fitted, cell, keep_prob)))
        return CHANGE_PER_OCTAVE * octaves - certain

    with bar:
        corners = [
            Cell(*cell)
            for cell in itertools.product(
                dict.fromkeys((min(rows), max(rows))),
                dict.fromkeys((min(lengths), max(lengths))),
            )
        ]
        for cell in corners:
            # One pair at least, or there is nothing to say.
            if measured and is_over():
                break
            measure(cell, 0)
            measure(cell, middle)
        is_complete = False
        while not is_over(0.5):
            fitted = fit()
            doubts = {cell: uncertainty(cell, fitted) for cell in grid}
            cell = max(grid, key=doubts.__getitem__)
            if doubts[cell] <= 0:
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
    """Survey the rounds of an engine on this device; arguments as for `survey`."""
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
    """Draw the predicted speed-up over rows and length, measured cells marked; save it.

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
