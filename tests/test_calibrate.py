"""Surveys: where speculation pays, found with few readings and in bounded time."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import pytest

import er_jax
from er_jax.acceptance import expected_tokens
from er_jax.costs import store, timing
from er_jax.costs.passes import Cell
from er_jax.costs.store import CACHE_VARIABLE
from er_jax.costs.table import LatencyTable
from er_jax.engine.engine import Engine
from er_jax.tools import calibrate, cli
from er_jax.tools.survey import Survey, plot_speed_up, speed_up, survey
from er_jax.types import Program
from tests.test_pass_costs import ROOFLINE

pytestmark = pytest.mark.usefixtures("unoptimized_module")

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


@pytest.mark.slow
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


def kept_by(
    policy: er_jax.Decoder = POLICY, bits: int = 8
) -> tuple[Engine, er_jax.PolicyParams]:
    """Return an engine, and parameters of which only shapes are known."""
    params = jax.eval_shape(policy.init, jax.random.key(0))
    config = er_jax.DrafterConfig(bits=bits)
    policy_and_draft = jax.eval_shape(lambda p: er_jax.attach_draft(p, config), params)
    return Engine(policy, "coupled"), policy_and_draft


def kept_path(policy: er_jax.Decoder = POLICY, bits: int = 8) -> Path:
    """Return where the costs of such a policy are kept."""
    path = store.cache_path(store.conditions(*kept_by(policy, bits)))
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
    """One that looks at drafts and compiles whatever is better at once."""
    return er_jax.Controller("best", (0, 2), patience=0)


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

    monkeypatch.setattr(timing, "measure_round", measure_round)
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


def damages() -> dict[str, Any]:
    """Return what may become of a file of costs: a name, and its text or a change."""
    deep, long = "[" * 100_000, [[1, 64, 0, False, 1e-3]] * 10_001
    whole = ["target", 1, 64, 0, 1e-3, 1.0]
    return {
        "truncated": lambda text: text[: len(text) // 2],
        "empty": lambda text: "",
        "not text": lambda text: "\udcff\udcfe",
        "a list": lambda text: "[]",
        "a number": lambda text: "7",
        "nested": lambda text: deep,
        "huge": lambda text: text + " " * (1 << 24),
        "about is a list": {"about": [1, 2]},
        "another kind": {"kind": ["roofline"]},
        "values are a list": {"values": []},
        "values are empty": {"values": {}},
        "programs are a dict": {"programs": {}},
        "too many programs": {"programs": long},
        "an empty row": {"programs": [[]]},
        "a short row": {"programs": [[1, 64, 1e-3]]},
        "a word for a row": {"programs": ["abcd"]},
        "rows are 0": {"programs": [[0, 64, 0, False, 1e-3]]},
        "length below 0": {"programs": [[1, -64, 0, False, 1e-3]]},
        "rows are no number": {"programs": [["1", 64, 0, False, 1e-3]]},
        "half a row": {"programs": [[1.5, 64, 0, False, 1e-3]]},
        "gamma below 0": {"programs": [[1, 64, -2, False, 1e-3]]},
        "joint is 1": {"programs": [[1, 64, 2, 1, 1e-3]]},
        "seconds are NaN": {"programs": [[1, 64, 0, False, math.nan]]},
        "seconds are infinite": {"programs": [[1, 64, 0, False, math.inf]]},
        "seconds are 0": {"programs": [[1, 64, 0, False, 0.0]]},
        "seconds below 0": {"programs": [[1, 64, 0, False, -1e-3]]},
        "seconds are null": {"programs": [[1, 64, 0, False, None]]},
        "seconds are true": {"programs": [[1, 64, 0, False, True]]},
        "seconds beyond floats": {"programs": [[1, 64, 0, False, 10**400]]},
        "passes are null": {"passes": None},
        "a pass is a number": {"passes": [1]},
        "a short pass": {"passes": [["target", 1]]},
        "an unknown kind": {"passes": [whole, ["train", 1, 64, 2, 1e-3, 1.0]]},
        "no target": {"passes": [["draft", 1, 64, 2, 1e-3, 1.0]]},
        "a target that drafts": {"passes": [["target", 1, 64, 2, 1e-3, 1.0]]},
        "a round of no drafts": {"passes": [whole, ["round", 1, 64, 0, 1e-3, 1.0]]},
        "a pass of NaN": {"passes": [["target", 1, 64, 0, math.nan, 1.0]]},
        "a pass of no time": {"passes": [["target", 1, 64, 0, 0, 1.0]]},
        "a pass of no weight": {"passes": [["target", 1, 64, 0, 1e-3, 0.0]]},
        "too many passes": {"passes": [whole] * 2001},
    }


@pytest.mark.parametrize("damage", damages())
def test_damaged_costs_are_refused_by_name_and_replaced(
    cache: Path, damage: str
) -> None:
    """Each on its own would end the rollout, or be believed."""
    engine, params = kept_by()
    path, table = kept_path(), LatencyTable()
    table.observe(Program(1, 64, 0), 1e-2, 10)
    table.save(path, store.conditions(engine, params))
    change = damages()[damage]
    if isinstance(change, dict):
        record = json.loads(path.read_text())
        for name, value in change.items():
            holder = record["values"] if name in ("programs", "passes") else record
            holder[name] = value
        path.write_text(json.dumps(record))
    else:
        path.write_text(change(path.read_text()), errors="surrogateescape")
    with pytest.warns(RuntimeWarning, match="kept costs are not used: ") as caught:
        assert store.load_costs(engine, params) is None
    assert str(path) in str(caught[0].message) and len(str(caught[0].message)) < 500
    controller = new_controller()
    controller.table.observe(Program(1, 64, 0), 2e-2, 10)
    store.save_costs(engine, params, controller.table)
    found = store.load_costs(engine, params)
    assert found is not None and found.seconds == controller.table.seconds


def test_costs_of_passes_that_do_not_draft_end_no_rollout(cache: Path) -> None:
    """What they do not price is predicted from the programs that ran."""
    target = [["target", 1, 64, 0, 1e-3, 1.0]]
    for passes in (target, [*target, ["draft", 1, 64, 2, 1e-3, 1.0]]):
        table = LatencyTable({Program(1, 64, 0): 1e-3, Program(1, 64, 2): 2e-3})
        path = cache / "costs.json"
        table.save(path, {})
        record = json.loads(path.read_text())
        record["values"]["passes"] = passes
        path.write_text(json.dumps(record))
        found = LatencyTable.load(path)
        assert found.round_seconds(Program(4, 64, 0)) is not None
        assert found.round_seconds(Program(4, 64, 2)) is not None


def test_a_place_that_is_no_file_is_not_waited_for(cache: Path) -> None:
    """Reading a FIFO would wait for a writer without end."""
    engine, params = kept_by()
    os.mkfifo(kept_path())
    assert store.load_costs(engine, params) is None
    controller = new_controller()
    controller.table.observe(Program(1, 64, 0), 2e-2, 10)
    store.save_costs(engine, params, controller.table)
    assert store.load_costs(engine, params) is not None


def test_the_version_is_known_where_nothing_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with PYTHONPATH on a source tree."""
    found = importlib.metadata.Distribution.from_name

    def from_name(name: str) -> Any:
        if name.replace("_", "-") == "er-jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    engine, params = kept_by()
    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", from_name)
    assert store.conditions(engine, params)["er_jax"] == er_jax.__version__


@dataclasses.dataclass(frozen=True)
class Addressed(er_jax.Decoder):
    """A decoder whose text holds an address, as that of a module with functions does.

    marks: objects, whose addresses are others in every process.
    """

    marks: tuple[Any, ...] = ()


def test_costs_are_found_again_by_policies_of_another_process(cache: Path) -> None:
    engine, params = kept_by(Addressed(SIZES, marks=(object(), lambda: None)))
    table = LatencyTable({Program(1, 64, 0): 1e-3})
    path = store.cache_path(store.conditions(engine, params))
    assert path is not None
    table.save(path, store.conditions(engine, params))
    again, params = kept_by(Addressed(SIZES, marks=(object(), lambda: None)))
    assert repr(again.policy) != repr(engine.policy)
    found = store.load_costs(again, params)
    assert found is not None and found.seconds == table.seconds
    # Another one's are not.
    other, params = kept_by(Addressed(SIZES, marks=(1,)))
    assert store.load_costs(other, params) is None


def test_caches_of_another_kind_are_told_apart(cache: Path) -> None:
    """Where the policy's own text says nothing."""

    @dataclasses.dataclass(frozen=True, repr=False)
    class Silent(er_jax.Decoder):
        wide: bool = False

        def init_cache(self, rows: int, length: int) -> Any:
            found = super().init_cache(rows, length)
            return (found, found) if self.wide else found

    paths = set()
    for wide in (False, True):
        engine, params = kept_by(Silent(SIZES, wide=wide))
        about = store.conditions(engine, params)
        paths.add(store.cache_path(about))
        assert "Silent" in about["policy"] and " 0x" not in about["policy"]
    assert len(paths) == 2


def test_a_long_text_is_cut_and_not_confused() -> None:
    one, other = (
        kept_by(Addressed(SIZES, marks=("a" * 100_000, mark))) for mark in (1, 2)
    )
    texts = [store.conditions(*each)["policy"] for each in (one, other)]
    assert max(map(len, texts)) < 1100 and texts[0] != texts[1]


def test_files_are_bounded_and_those_of_others_left_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_FILES", 3)
    others = ["notes.txt", "costs.json", "costs-mine.json", "costs-0123.json.part"]
    for name in others:
        (cache / name).write_text("mine")
        os.utime(cache / name, (0, 0))
    ours = [cache / f"costs-{number:016x}.json" for number in range(5)]
    for age, path in enumerate(ours):
        path.write_text("{}")
        os.utime(path, (time.time() - 10 - age,) * 2)
    killed = cache / f"{ours[0].name}.123.part"
    under_way = cache / f"{ours[0].name}.124-5.part"
    for part in (killed, under_way):
        part.write_text("{")
    os.utime(killed, (0, 0))
    engine, params = kept_by()
    controller = new_controller()
    controller.table.observe(Program(1, 64, 0), 2e-2, 10)
    store.save_costs(engine, params, controller.table)
    found = {path.name for path in cache.iterdir()}
    kept = {kept_path().name, ours[0].name, ours[1].name, under_way.name}
    assert found == {*others, *kept}
    # What is read was used: the next ones drop another.
    os.utime(kept_path(), (0, 0))
    assert store.load_costs(engine, params) is not None
    assert kept_path().stat().st_mtime > time.time() - 60


def test_two_threads_may_keep_costs_at_once(tmp_path: Path) -> None:
    path, table = tmp_path / "costs.json", LatencyTable({Program(1, 64, 0): 1e-3})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        saved = [pool.submit(table.save, path, {}) for _ in range(200)]
        assert [each.result() for each in saved] == [None] * 200
    assert [p.name for p in tmp_path.iterdir()] == ["costs.json"]
    assert LatencyTable.load(path).seconds == table.seconds


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
    assert store.cache_path(about) is None
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = store.cache_path(about)
    assert path is not None and path.parent == tmp_path / "er_jax"
    # Other versions meet the same file, which says so; other policies do not.
    assert store.cache_path({**about, "jax": "3"}) == path
    assert store.cache_path({**about, "policy": "q"}) != path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = store.cache_path(about)
    assert path is not None and path.parent == tmp_path / ".cache" / "er_jax"


def test_a_first_rollout_is_not_held_up_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over the budget, one reading of each program and not several."""
    engine = Engine(POLICY, "coupled")
    params = engine.attach_draft(POLICY.init(jax.random.key(0)), er_jax.DrafterConfig())
    started: list[int] = []
    start_window = engine.start_window

    def counted(*arguments: Any, **options: Any) -> Any:
        started.append(arguments[3])
        return start_window(*arguments, **options)

    monkeypatch.setattr(engine, "start_window", counted)
    for budget_s, readings in ((0.0, 1), (60.0, 3)):
        started.clear()
        controller = new_controller()
        pair_of = Program(1, 64, 0), Program(1, 64, 2)
        found = timing.measure_rounds(engine, params, pair_of, budget_s=budget_s)
        controller.observe_first_look(*found)
        # The first window of each only says how long to read.
        assert started == [0] * (1 + readings) + [2] * (1 + readings)
        assert controller.table.seconds.keys() == {Program(1, 64, 0), Program(1, 64, 2)}


@pytest.mark.slow
def test_rounds_with_a_window_are_measured_at_the_longest_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command; they are kept, and the plain costs stay the survey's."""
    out = tmp_path / "costs.json"
    calibrate.Calibrate(
        decoder=SIZES,
        drafter=er_jax.DrafterConfig(window=9, head=7),
        slots=2,
        max_length=64,
        gammas=(0, 2),
        budget=0.1,
        out=out,
    ).run()
    assert "drafts of 2 that see 7 first and 9 last positions of 64" in (
        capsys.readouterr().out
    )
    table = LatencyTable.load(out)
    assert set(table.seconds) == {
        Program(rows, 64, 2, head=7, window=9) for rows in (1, 2)
    }
    assert table.passes is not None
