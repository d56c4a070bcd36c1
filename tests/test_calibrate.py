"""Surveys: where speculation pays, found with few readings and in bounded time."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest

from er_jax import cli
from er_jax.acceptance import expected_tokens
from er_jax.calibrate import Survey, plot_speed_up, speed_up, survey
from er_jax.pass_costs import Cell, PassCosts
from er_jax.types import Program
from tests.test_pass_costs import ROOFLINE

ROWS, LENGTHS, GAMMAS = (1, 2, 4, 8, 16, 32, 64, 128), (256, 1024, 4096), (0, 2, 4, 8)
KEEP = 0.9


class Clock:
    """Times programs by the roofline, a second for each."""

    def __init__(self) -> None:
        self.asked: list[Program] = []

    def round_s(self, program: Program) -> float:
        self.asked.append(program)
        return ROOFLINE.round_seconds(program)

    def spent_s(self) -> float:
        return float(len(self.asked))

    @property
    def cells(self) -> set[Cell]:
        return {Cell(program.rows, program.cache_length) for program in self.asked}


def run(budget_s: float = 1e9) -> tuple[Survey, Clock]:
    clock = Clock()
    found = survey(
        clock.round_s,
        ROWS,
        LENGTHS,
        GAMMAS,
        keep_prob=KEEP,
        budget_s=budget_s,
        spent_s=clock.spent_s,
    )
    return found, clock


def true_speed_up(cell: Cell) -> float:
    plain_s = ROOFLINE.round_seconds(Program(*cell, 0))
    drafting_s = ROOFLINE.round_seconds(Program(*cell, 4))
    return expected_tokens([KEEP] * 4) * plain_s / drafting_s


def test_the_boundary_is_found_with_few_readings() -> None:
    found, clock = run()
    assert found.is_complete
    grid = [Cell(*cell) for cell in itertools.product(ROWS, LENGTHS)]
    signs = {cell: true_speed_up(cell) > 1 for cell in grid}
    assert set(signs.values()) == {True, False}
    for cell, is_faster in signs.items():
        assert (speed_up(found.costs, cell, KEEP) > 1) == is_faster, cell
    assert len(clock.asked) == len(set(clock.asked)) == found.spent_s
    assert len(clock.cells) < len(grid)
    assert {program.gamma for program in clock.asked} == {0, 4}


def test_cells_near_the_boundary_are_measured_rather_than_others() -> None:
    _, clock = run()
    corners = {Cell(r, s) for r in (1, 128) for s in (256, 4096)}
    chosen = clock.cells - corners
    others = {Cell(*c) for c in itertools.product(ROWS, LENGTHS)} - corners - chosen
    near = [abs(math.log(true_speed_up(cell))) for cell in chosen]
    far = [abs(math.log(true_speed_up(cell))) for cell in others]
    assert sum(near) / len(near) < sum(far) / len(far)


@pytest.mark.parametrize("budget_s", [0.0, 3.0, 9.0])
def test_the_time_is_bounded(budget_s: float) -> None:
    """A pair of readings that was begun is finished; one pair there always is."""
    found, clock = run(budget_s)
    assert not found.is_complete
    assert 2 <= len(clock.asked) <= budget_s + 2
    assert speed_up(found.costs, Cell(1, 256), KEEP) > 0


def test_one_cell_is_a_grid() -> None:
    clock = Clock()
    found = survey(clock.round_s, [4], [128], [0, 2], spent_s=clock.spent_s)
    assert found.is_complete
    assert clock.asked == [Program(4, 128, 0), Program(4, 128, 2)]


@pytest.mark.parametrize(
    ("rows", "lengths", "gammas"), [([], [1], [2]), ([1], [], [2]), ([1], [1], [0])]
)
def test_nothing_to_survey(
    rows: list[int], lengths: list[int], gammas: list[int]
) -> None:
    with pytest.raises(
        ValueError, match="needs a number of rows, a length and a gamma"
    ):
        survey(Clock().round_s, rows, lengths, gammas, spent_s=Clock().spent_s)


def test_the_picture(tmp_path: Path) -> None:
    found, _ = run()
    path = tmp_path / "speed.png"
    plot_speed_up(found, ROWS, LENGTHS, KEEP, path)
    assert path.stat().st_size > 1000


def test_the_command_measures_saves_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "costs.json", tmp_path / "speed.png"
    sizes = "--decoder.vocab-size 32 --decoder.dim 16 --decoder.num-layers 1"
    heads = "--decoder.num-heads 1 --decoder.num-kv-heads 1 --decoder.hidden-dim 16"
    grid = "--slots 2 --max-length 64 --gammas 0 2 --budget 0.5"
    command = f"er-jax calibrate {sizes} {heads} {grid} --out {out} --plot {plot}"
    monkeypatch.setattr(sys, "argv", command.split())
    cli.main()
    printed = capsys.readouterr().out
    assert "readings in" in printed and "speed-up of drafts of 2" in printed
    costs = PassCosts.load(out)
    assert {reading.kind for reading in costs.readings} == {"target", "round"}
    assert plot.stat().st_size > 1000
    # And a replay can be run on it.
    replay = f"er-jax replay {out} --num 4 --cap 32 --seeds 1 --gammas 0 2"
    monkeypatch.setattr(sys, "argv", replay.split())
    cli.main()
    assert "best" in capsys.readouterr().out
