"""Surveys: where speculation pays, found with few readings and in bounded time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import pytest

import er_jax
from er_jax import calibrate, cli
from er_jax.acceptance import expected_tokens
from er_jax.calibrate import CACHE_VARIABLE, Survey, plot_speed_up, speed_up, survey
from er_jax.costs import LatencyTable
from er_jax.engine import Engine
from er_jax.pass_costs import Cell
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
    assert len(clock.asked) == 2 * len(set(clock.asked)) == found.spent_s
    assert len(clock.cells) < len(grid)


def test_other_drafts_are_measured_where_they_may_pay() -> None:
    """The shortest and the longest, beside the middling one; then all lie on lines."""
    found, clock = run()
    cells = {
        gamma: {Cell(p.rows, p.cache_length) for p in clock.asked if p.gamma == gamma}
        for gamma in GAMMAS
    }
    assert cells[0] == cells[4]
    near = {c for c in cells[4] if speed_up(found.costs, c, KEEP) > 1}
    assert near <= cells[2] == cells[8] < cells[4]
    for cell in near:
        for gamma in range(1, 12):
            program = Program(*cell, gamma)
            wanted = ROOFLINE.round_seconds(program)
            assert found.costs.round_seconds(program) == pytest.approx(wanted, rel=0.1)


def test_cells_near_the_boundary_are_measured_rather_than_others() -> None:
    _, clock = run()
    corners = {Cell(r, s) for r in (1, 128) for s in (256, 4096)}
    chosen = clock.cells - corners
    others = {Cell(*c) for c in itertools.product(ROWS, LENGTHS)} - corners - chosen
    near = [abs(math.log(true_speed_up(cell))) for cell in chosen]
    far = [abs(math.log(true_speed_up(cell))) for cell in others]
    assert sum(near) / len(near) < sum(far) / len(far)


def test_of_two_readings_the_lesser_stands() -> None:
    """Other work on the machine only ever adds time."""
    clock, slow = Clock(), 3.0

    def round_s(program: Program) -> float:
        is_first = program not in clock.asked
        return clock.round_s(program) * (slow if is_first and program.gamma else 1.0)

    found = survey(round_s, ROWS, LENGTHS, GAMMAS, budget_s=1e9, spent_s=clock.spent_s)
    for reading in found.costs.readings:
        wanted = ROOFLINE.round_seconds(Program(*reading[1:4]))
        assert reading.seconds == pytest.approx(wanted)


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
    assert clock.asked == 2 * [Program(4, 128, 0), Program(4, 128, 2)]


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
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "kept"))
    cli.main()
    printed = capsys.readouterr().out
    assert "readings in" in printed and "speed-up of drafts of 2" in printed
    # Rollouts of such a policy begin with it.
    kept = kept_path()
    assert (tmp_path / "kept") == kept.parent and str(kept) in printed
    assert kept.read_text() == out.read_text()
    readings = LatencyTable.load(out).readings()
    assert {reading.kind for reading in readings} == {"target", "round"}
    assert plot.stat().st_size > 1000
    # And a replay can be run on it.
    replay = f"er-jax replay {out} --num 4 --cap 32 --seeds 1 --gammas 0 2"
    monkeypatch.setattr(sys, "argv", replay.split())
    cli.main()
    assert "best" in capsys.readouterr().out


SIZES = er_jax.DecoderConfig(
    vocab_size=32, dim=16, num_layers=1, num_heads=1, num_kv_heads=1, hidden_dim=16
)
POLICY = er_jax.Decoder(SIZES)


def kept_path(policy: er_jax.Decoder = POLICY, bits: int = 8) -> Path:
    """Return where the costs of such a policy are kept."""
    engine = Engine(policy, "coupled")
    params = policy.init(jax.random.key(0))
    pair = engine.attach_draft(params, er_jax.DrafterConfig(bits=bits))
    path = calibrate.cache_path(calibrate.conditions(engine, pair))
    assert path is not None
    return path


def sample(controller: er_jax.Controller) -> er_jax.Rollout:
    return er_jax.rollout(
        POLICY,
        POLICY.init(jax.random.key(0)),
        [[1, 2, 3]],
        key=jax.random.key(1),
        config=er_jax.RolloutConfig(max_new_tokens=24, n=2, gammas=(0, 2)),
        controller=controller,
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which costs are kept, unlike in other tests."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path


def new_controller() -> er_jax.Controller:
    return er_jax.Controller("best", (0, 2))


def test_what_rollouts_learn_is_kept_for_the_next_process(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = new_controller()
    out = sample(first)
    assert list(cache.iterdir()) == [kept_path()]
    kept = LatencyTable.load(kept_path())
    assert (
        {Program(1, 64, 0), Program(1, 64, 2)}
        <= kept.seconds.keys()
        <= first.table.seconds.keys()
    )

    def measure_round(*_: Any, **__: Any) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(calibrate, "measure_round", measure_round)
    second = new_controller()
    again = sample(second)
    assert again.completion_ids.tolist() == out.completion_ids.tolist()
    assert kept.seconds.keys() <= second.table.seconds.keys()


def test_costs_are_kept_apart_by_policy_and_draft(cache: Path) -> None:
    bigger = er_jax.Decoder(dataclasses.replace(SIZES, num_layers=2))
    paths = {kept_path(), kept_path(bigger), kept_path(bits=4)}
    assert len(paths) == 3
    assert {path.parent for path in paths} == {cache}


@pytest.mark.parametrize("change", ["jax", "policy", "nothing"])
def test_costs_of_something_else_are_refused_and_replaced(
    cache: Path, change: str
) -> None:
    """An older version of JAX, or a file put in another's place."""
    sample(new_controller())
    path = kept_path()
    record = json.loads(path.read_text())
    wanted = record["about"].get(change)
    record["about"][change] = "another"
    # What could not have been measured here.
    record["values"]["programs"] = [[7, 7, 0, 7.0], [7, 7, 2, 7.0]]
    path.write_text(json.dumps(record))
    controller = new_controller()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(controller)
    is_taken = Program(7, 7, 0) in controller.table.seconds
    assert is_taken == (change == "nothing")
    assert len(caught) == (not is_taken)
    if not is_taken:
        text = str(caught[0].message)
        assert f"measured with {change} 'another', and this is {wanted!r}" in text
        assert json.loads(path.read_text())["about"][change] == wanted


def test_a_damaged_file_is_replaced(cache: Path) -> None:
    kept_path().write_text("{")
    with pytest.warns(RuntimeWarning, match="holds no costs; measure them again"):
        sample(new_controller())
    assert LatencyTable.load(kept_path()).seconds


def test_costs_that_cannot_be_kept_cost_nothing_but_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning, match=f"can be written in {CACHE_VARIABLE}"):
        out = sample(new_controller())
    assert out.lengths.tolist() == [24, 24]


def test_costs_are_kept_where_the_user_keeps_such_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"device": "A", "jax": "1", "er_jax": "2", "policy": "p"}
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert calibrate.cache_path(about) is None
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = calibrate.cache_path(about)
    assert path is not None and path.parent == tmp_path / "er_jax"
    # Other versions meet the same file, which says so; other policies do not.
    assert calibrate.cache_path({**about, "jax": "3"}) == path
    assert calibrate.cache_path({**about, "policy": "q"}) != path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = calibrate.cache_path(about)
    assert path is not None and path.parent == tmp_path / ".cache" / "er_jax"


def test_a_first_rollout_is_not_held_up_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over the budget, one reading of each program and not several."""
    engine = Engine(POLICY, "coupled")
    pair = engine.attach_draft(POLICY.init(jax.random.key(0)), er_jax.DrafterConfig())
    started: list[int] = []
    start_window = engine.start_window

    def counted(*arguments: Any, **options: Any) -> Any:
        started.append(arguments[3])
        return start_window(*arguments, **options)

    monkeypatch.setattr(engine, "start_window", counted)
    for budget_s, readings in ((0.0, 1), (60.0, 3)):
        started.clear()
        controller = new_controller()
        calibrate.prepare(engine, pair, controller, 64, budget_s=budget_s)
        # The first window of each only says how long to read.
        assert started == [0] * (1 + readings) + [2] * (1 + readings)
        assert controller.table.seconds.keys() == {Program(1, 64, 0), Program(1, 64, 2)}
