"""The benchmark scripts: what they count, what they write, that they run. No speeds."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from benchmarks import (
    accelerator,
    cold,
    commits,
    disturbed,
    fuzz,
    host,
    imitation,
    journal,
    killed,
    limits,
    living,
    long_caches,
    partial,
    plans,
    report,
    rollout,
    sampling,
    scaling,
    session,
    steps,
    stream,
    trace,
    traffic,
    trainer_gap,
)
from benchmarks.lib import (
    kept_formats,
    pass_bytes,
    presets,
    records,
    rooflines,
    survival,
    trained,
)
from benchmarks.lib.bandwidth import Device
from benchmarks.lib.controllers import Oracle, Plan
from benchmarks.lib.schedules import POLICIES
from benchmarks.lib.simulated import SimulatedEngine, SimulatedPolicy
from er_jax import Controller, DrafterConfig
from er_jax.acceptance import AcceptRule
from er_jax.config import DEFAULT_GAMMAS
from er_jax.types import Program

pytestmark = pytest.mark.usefixtures("unoptimized_module")


@pytest.mark.parametrize(
    "path", sorted(records.RESULTS.glob("*.json")), ids=lambda p: p.name
)
def test_committed_records_can_be_quoted(path: Path) -> None:
    record = json.loads(path.read_text())
    assert records.problems(record) == []
    assert record["points"]


def test_readme_quotes_the_committed_records() -> None:
    """No number is copied by hand; `python -m benchmarks.report` mends this."""
    assert report.README.read_text() == report.updated(report.README.read_text())


def test_tables_hold_what_the_record_holds(tmp_path: Path) -> None:
    spread = {"median": 0.002, "q1": 0.0019, "q3": 0.0021}
    record = records.new_record("steps", {})
    passes_ = [
        {"kind": "ar", "gamma": 0, "draft": "", "seconds": spread, "bytes_per_s": 7e9,
         "cost_ratio": {"median": 1.0}},
        {"kind": "verify", "gamma": 4, "draft": "", "cost_ratio": {"median": 1.25}},
        {"kind": "round", "gamma": 4, "draft": "int8", "keep_rate": 0.75,
         "speedup": 1.5},
    ]  # fmt: skip
    point = {"preset": "3M", "rows": 2, "dtype": "float32", "cache_length": 64}
    record["points"].append({**point, "passes": passes_})
    records.save(tmp_path / "steps.json", record)
    text = report.updated(f"before\n{report.MARKER}\nold\n", tmp_path)
    assert text.startswith("before\n")
    assert "old" not in text
    assert "| 2 | 2 (10) | 7 | 1.25 | 0.75, 1.5 |" in text
    with pytest.raises(ValueError, match="has no line"):
        report.updated("no marker")


def test_quick_start_is_the_first_block_of_the_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("```bash\nls\n```\n```python\nprint(1)\n```\n```python\n2\n```\n")
    assert rollout.quick_start(readme) == "print(1)\n"
    compile(rollout.quick_start(records.ROOT / "README.md"), "README.md", "exec")
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="no ```python block"):
        rollout.quick_start(readme)


def test_accelerator_says_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator"],
        cwd=records.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "needs a GPU or a TPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_memory_of_a_7b_point() -> None:
    """15.2 GB of weights, half that and a quarter in the drafts, 56 kB a position."""
    found = accelerator.memory_needed(accelerator.FULL, 28, rows=8, cache_length=8192)
    cache = 28 * 2 * 4 * 128 * 2 * 8 * 8192
    assert pass_bytes.cache_bytes(presets.decoder("7B"), 8, 8192) == cache
    assert 15.2e9 + 7e9 + 3.5e9 < found - cache < 32e9


def test_accelerator_lists_what_it_has_no_time_for(tmp_path: Path) -> None:
    args = accelerator.Args(budget_s=-1e6, dry_run=True)
    session = accelerator.Session(args, accelerator.DRY, tmp_path)
    model = accelerator.Model.make(accelerator.DRY, num_layers=1)
    shapes, device = accelerator.DRY.shapes, Device(None, 1e9, 10**12)
    accelerator.measure_shapes(session, model, shapes, device, expected_s=1.0)
    small = dataclasses.replace(device, memory_bytes=1000)
    accelerator.measure_shapes(session, model, shapes[:1], small, expected_s=1.0)
    record = json.loads((tmp_path / "accelerator.json").read_text())
    assert record["points"] == []
    reasons = [skipped["why"] for skipped in record["skipped"]]
    assert len(reasons) == 3
    assert all("s were left" in reason for reason in reasons[:2])
    assert "of memory" in reasons[2]


@pytest.mark.slow
def test_accelerator_dry_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator", "--dry-run", "--repeats", "2",
         "--reading-s", "0.01", "--out", str(tmp_path)],
        cwd=records.ROOT,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "accelerator.json").read_text())
    assert records.problems(record) == []
    assert record["skipped"] == []
    assert [check["correct"] for check in record["checks"]] == [True, True]
    parts = [(point["part"], point["num_layers"]) for point in record["points"]]
    assert parts == [("passes", 1)] * 2 + [("passes", 2), ("rollout", 1)]
    assert all(point.get("failed", {}) == {} for point in record["points"])
    assert (tmp_path / "accelerator.png").stat().st_size > 1000


@pytest.mark.slow
def test_steps_run(tmp_path: Path) -> None:
    record = steps.main(
        steps.Args(
            presets=("tiny",), rows=(1, 2), cache_lengths=(64,), gammas=(2,),
            repeats=2, reading_s=0.01, out=tmp_path,
        )
    )  # fmt: skip
    assert [point["rows"] for point in record["points"]] == [1, 2]
    assert (tmp_path / "steps.png").stat().st_size > 1000
    assert json.loads((tmp_path / "steps.json").read_text())["benchmark"] == "steps"


@pytest.mark.slow
def test_rollouts_run(tmp_path: Path) -> None:
    record = rollout.main(
        rollout.Args(
            parts=("workloads", "rows"), presets=("tiny",), lengths=("tail",),
            rows=(2,), gammas=(2,), repeats=2, out=tmp_path,
        )
    )  # fmt: skip
    workload, rows = record["points"]
    names = [entry["control"] for entry in workload["controls"]]
    assert sorted(names) == sorted(["ar", "fixed:2", "best", "static"])
    assert rollout.unexplained(record) == []
    assert [entry["control"] for entry in rows["controls"]] == ["ar", "fixed:2", "best"]
    assert (tmp_path / "rollout.png").stat().st_size > 1000
    assert (tmp_path / "rollout_timeline.png").stat().st_size > 1000


@pytest.mark.slow
def test_random_codes_make_no_drafts_worth_keeping() -> None:
    params = presets.random_params(presets.decoder("tiny"))
    draft = er_jax.attach_draft(params, DrafterConfig()).draft
    noise = disturbed.noise_draft(draft)
    assert str(jax.tree.structure(noise)) == str(jax.tree.structure(draft))
    for before, after in zip(
        jax.tree.leaves(draft), jax.tree.leaves(noise), strict=True
    ):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        is_code = jnp.issubdtype(before.dtype, jnp.integer)
        assert bool(jnp.all(before == after)) == (not is_code)


@pytest.mark.slow
def test_disturbances_run(tmp_path: Path) -> None:
    record = disturbed.main(disturbed.Args(quick=True, out=tmp_path))
    assert [point["part"] for point in record["points"]] == ["noise", "slowed"]
    for point in record["points"]:
        assert not point["agreement"]["unexplained"]
    assert (tmp_path / "disturbed.json").exists()


@pytest.mark.slow
def test_drafts_are_counted_as_rollouts_count_them() -> None:
    """By depth over all positions, inside of completions and behind their ends."""
    rule: AcceptRule = "coupled"
    policy, gamma = presets.decoder("tiny", dtype="float32"), 3
    params = policy.init(jax.random.key(0))
    policy_and_draft = er_jax.attach_draft(
        params, er_jax.DrafterConfig(bits=4, act_bits=16)
    )
    prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    texts = kept_formats.sample_texts(policy, params, prompts, 2)
    assert {len(rows) for rows in texts.batches} == {6}
    found = kept_formats.measured(texts, policy_and_draft, gamma, rule)
    out = er_jax.rollout(
        policy,
        policy_and_draft,
        prompts,
        key=jax.random.key(kept_formats.SEED),
        config=er_jax.RolloutConfig(
            max_new_tokens=kept_formats.MAX_NEW_TOKENS,
            n=2,
            stop_token_ids=(trained.STOP_ID,),
            accept=rule,
            control=f"fixed:{gamma}",
        ),
    )
    histogram = out.stats.accepted[gamma]
    at_least = np.cumsum(histogram[::-1])[::-1]
    assert found["rounds"] == histogram.sum()
    assert found["reached"] + found["behind_the_end"] == at_least[:-1].sum()
    assert 0 < found["behind_the_end"] < found["reached"]
    assert found["kept"] == at_least[1:].sum()
    assert found["tokens_per_round"] == out.lengths.sum() / histogram.sum()
    assert 0.05 < np.mean(found["by_depth"]) < 0.999
    assert found["same_as_plain_decoding"] == 1


KERNELS = """
%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %sum = f32[4]{0} fusion(%x), kind=kInput, calls=%fused
}
%off (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
}
%on (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = (s32[], f32[4,8]) while(%t), body=%body, config={"known_trip_count":{"n":"11"}}
}
ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %c = f32[4,8]{1,0} conditional(%i, %y, %y), branch_computations={%off, %on}
}
"""


def test_traffic_by_hand() -> None:
    """The fusion reads and writes 128 bytes; the loop reads 128 and writes 16."""
    assert sampling.traffic(KERNELS, (0,)) == 256
    assert sampling.traffic(KERNELS, (1,)) == 256 + 11 * (128 + 16)


@pytest.mark.slow
def test_sampling_runs(tmp_path: Path) -> None:
    record = sampling.main(sampling.Args(quick=True, out=tmp_path))
    assert records.problems(record) == []
    assert [point["rows"] for point in record["points"]] == [1, 4]
    for point in record["points"]:
        assert all(spread["median"] > 0 for spread in point["seconds"].values())
    _, rows = sampling.rows_of(record["points"])
    assert len(rows) == 2 * len(sampling.SETTINGS)


@pytest.mark.slow
def test_a_trace_is_read_by_scope(tmp_path: Path) -> None:
    path = tmp_path / "trace.png"
    args = trace.Args(preset="tiny", rows=2, gamma=2, tokens=12, out=path)
    events = trace.traced(args)
    found = {event.scope for event in events}
    assert {"draft", "verify", "draft/sample", "verify/cache"} <= found
    assert all(event.seconds >= 0 for event in events)
    trace.plot(events, args, path)
    assert path.stat().st_size > 5000


def test_plans_are_told_by_their_record() -> None:
    """The table in docs/plan.md is that of the record, and says what it should."""
    record = json.loads((records.RESULTS / "plans.json").read_text())
    header, rows = plans.rows_of(record["points"])
    assert all(len(row) == len(header) for row in rows)
    asked = [(model, device) for model in plans.CASES for device in plans.CASES[model]]
    assert sorted(row[:2] for row in rows) == sorted(asked)
    difference = header.index("arguments: compiler / count %")
    told = [row[difference] for row in rows if not str(row[8]).endswith("refused")]
    assert len(told) >= len(rows) - 1
    assert all(abs(part) < 3 for part in told)


@pytest.mark.slow
def test_four_precisions_of_scores(tmp_path: Path) -> None:
    record = trainer_gap.main(trainer_gap.Args(quick=True, out=tmp_path))
    found = {(p["dtype"], p["projection"]): p for p in record["points"]}
    assert len(found) == 4
    assert {p["num_tokens"] for p in found.values()} == {16}
    exact = found["float32", "float32"]
    assert exact["largest"] < 2e-5 and exact["outside_share"] == 0
    assert all(0 <= p["mean"] <= p["largest"] < 1 for p in found.values())


@pytest.mark.slow
def test_places_have_the_same_work_each(tmp_path: Path) -> None:
    record = imitation.main(imitation.Args(quick=True, out=tmp_path))
    found = {(p["mode"], p["places"]): p for p in record["points"]}
    assert len(found) == 4
    for (_, places), point in found.items():
        assert point["rows"] == 8 * places
        assert 0 < point["outside_share"]["median"] < 1
    header, rows = imitation.rows_of(record["points"])
    column = header.index("beside one place")
    assert [row[column] for row in rows if row[1] == 1] == [1, 1]


@pytest.mark.parametrize("name", cold.POLICIES)
def test_first_calls_are_not_much_slower_than_an_oracles(name: str) -> None:
    """The totals of 1 to 20 calls, beside those of the record's oracle."""
    record = json.loads((records.RESULTS / "cold.json").read_text())
    (point,) = (p for p in record["points"] if p["preset"] == name)
    args = cold.Args()
    policy = cold.POLICIES[name]
    _, found = cold.calls(policy, Controller(), args.calls, args.gammas)
    assert len(point["oracle_s"]) == 20
    for ours, oracle_s in zip(found, point["oracle_s"], strict=True):
        assert ours <= cold.LIMITS[name] * oracle_s
    # The costs are still those that the oracle knew.
    plan = Plan(frozenset({(policy.slots, 0)}), is_short=False)
    _, (first,) = cold.calls(policy, Oracle(policy, plan), 1, args.gammas)
    assert first == pytest.approx(point["oracle_s"][0], rel=1e-4)


def test_nobody_who_begins_with_plain_decoding_comes_near_the_oracle_of_windows() -> (
    None
):
    """Which is why its bound is another; drafts bought before any of the calls."""
    name = "7B on an H100, windows"
    record = json.loads((records.RESULTS / "cold.json").read_text())
    (point,) = (p for p in record["points"] if p["preset"] == name)
    oracle_s, seconds = np.array(point["oracle_s"]), np.array(point["seconds"])
    plain_s, drafted_s = seconds[1] - seconds[0], oracle_s[-1] - oracle_s[-2]
    assert drafted_s < plain_s
    calls = np.arange(len(oracle_s))
    for bought in calls[1:]:
        late = np.maximum(calls - bought + 1, 0)
        totals = seconds[0] + plain_s * (calls - late) + drafted_s * late
        totals += cold.POLICIES[name].drafting_s * (late > 0)
        assert (totals / oracle_s).max() > 1.3, bought


@pytest.mark.parametrize("noise", [1.0, 1.5, 3.0])
def test_plain_decoding_is_tried_where_only_drafts_ran(noise: float) -> None:
    """At sixteen rows verifications are bound by arithmetic, and plain decoding wins.

    The controller compiles at once. It has measured one row, where drafts pay, the more
    so if the plain step came out slow, so that it starts with drafts.
    """

    def step_s(rows: int) -> float:
        return 0.012 + 0.0011 * rows

    def round_s(program: Program) -> float:
        rows, _, gamma = program[:3]
        verify = 1 + gamma * (0.07 + 0.028 * rows) if gamma else 1.0
        return step_s(rows) * (0.42 * gamma + verify)

    policy = SimulatedPolicy(
        round_seconds=round_s, window_s=2.5, drafting_s=5.0, other_s=0.2, start_s=3.0,
        slots=16, count=24, mean=32, longest=64, keep=0.9,
    )  # fmt: skip
    measure = SimulatedEngine.measure_round

    def noisy(engine: SimulatedEngine, program: Program) -> float:
        return measure(engine, program) * (1.0 if program.gamma else noise)

    controller = Controller(patience=0.0)
    with mock.patch.object(SimulatedEngine, "measure_round", noisy):
        engine, _ = cold.calls(policy, controller, 12, DEFAULT_GAMMAS)
    full = [n[1].gamma for n in engine.compiled if n[0] == "window" and n[1].rows == 16]
    assert full[0] > 0 and 0 in full
    plain = controller.speed(Program(16, 128, 0))
    assert plain == pytest.approx(1 / step_s(16), rel=0.1)


def test_no_draft_is_compiled_that_one_row_rules_out() -> None:
    policy, controller = cold.POLICIES["in the cache"], Controller()
    engine, _ = cold.calls(policy, controller, 80, DEFAULT_GAMMAS)
    drafting = [n[1] for n in engine.compiled if n[0] == "window" and n[1].gamma]
    assert [(program.rows, program.gamma) for program in drafting] == [(1, 4)]
    assert controller.knows_drafts


def test_host_work_does_not_grow_with_slots(tmp_path: Path) -> None:
    """Time that the thread computes: what else the machine does adds nothing.

    Four times what fewer slots cost is far above the spread, and far below the work of
    a search through the slots for every completion, which is 64 times as much here.
    """
    record = host.main(host.Args(slots=(64, 512), count=1, repeats=2, out=tmp_path))
    found = {(p["prompts"], p["rows"]): p["host_ms"]["min"] for p in record["points"]}
    assert len(found) == 2 * len(host.KINDS)
    for kind in host.KINDS:
        assert found[kind, 512] < 4 * found[kind, 64], found


def test_schedules_are_told_by_their_record() -> None:
    """At least two thousand, no difference, and the table says both."""
    record = json.loads((records.RESULTS / "fuzz.json").read_text())
    assert record["differences"] == []
    points = record["points"]
    assert fuzz.total(points, "schedules") == record["settings"]["schedules"] >= 2000
    assert {point["preset"] for point in points} == set(POLICIES)
    header, rows = fuzz.rows_of(points)
    assert all(len(row) == len(header) for row in rows)
    assert rows[-1][header.index("differences")] == 0
    assert rows[-1][header.index("completions")] == fuzz.total(points, "completions")
    assert f"{fuzz.total(points, 'cloned')} completions" in fuzz.summary(record)


def test_lives_are_told_by_their_record() -> None:
    """No difference, and all that may happen did."""
    record = json.loads((records.RESULTS / "living.json").read_text())
    assert record["differences"] == []
    (point,) = record["points"]
    assert point["steps"] >= record["settings"]["steps"] >= 10_000
    never = [name for name in living.ROWS.values() if not point[name]]
    assert never == ["differences"]
    assert f"{point['steps']} steps" in living.summary(record)


def test_kills_are_told_by_their_record() -> None:
    """At least two hundred, by every signal and at every moment, and no difference."""
    record = json.loads((records.RESULTS / "killed.json").read_text())
    assert record["differences"] == [] and record["totals"]["differences"] == 0
    _, rows = killed.rows_of(record["points"])
    last = rows[-1]
    assert last[-1] == record["totals"]["interrupts"] >= 200
    assert all(number >= 10 for number in last[1:])
    assert all(row[-1] >= 3 for row in rows)
    assert record["totals"]["worst"] <= survival.LOGPROB_ERROR
    assert f"{last[-1]} of them interrupted" in killed.summary(record)


@pytest.mark.slow
def test_sharing_and_dealing_are_replayed(tmp_path: Path) -> None:
    record = scaling.main(scaling.Args(quick=True, out=tmp_path))
    for point in record["points"]:
        assert point["completions"] == 8 * 2 * scaling.GROUP
        ways = {(w["dealing"], w["last_rows"]): w for w in point["ways"]}
        assert len(ways) == 6
        for way in ways.values():
            assert 0 <= way["idle_share"] < 1
            assert way["seconds"] >= way["mean_seconds"] > 0
        # Not to share is one of the moments to choose from.
        for (dealing, _), way in ways.items():
            assert way["seconds"] <= ways[dealing, "alone"]["seconds"]


def test_sharing_costs_an_eighth_and_the_sums() -> None:
    args = scaling.Args(sum_s=1e-3, link_bytes_per_s=1e15)
    alone, each = rooflines.h100_roofline(), scaling.part_of_one(8)
    shared = scaling.Shared(8, each, args)
    layers = 28
    for gamma in (0, 4):
        program = Program(4, 1024, gamma)
        found = shared.round_seconds(program) - each.round_seconds(program)
        assert found == pytest.approx((2 * layers + 1) * (gamma + 1) * 1e-3, rel=1e-4)
    # 28 and 4 heads lie whole on eight GPUs; a matrix of keys is 3584 x 512.
    keys_s = 2 * layers * 3584 * 512 * 2 / 3350e9
    more_s = each.target_weights_s - alone.target_weights_s / 8
    assert more_s == pytest.approx(keys_s * 7 / 8)
    assert each.draft_weights_s - alone.draft_weights_s / 8 == pytest.approx(more_s / 2)
    assert each.cache_s == alone.cache_s
    assert each.attention_s == alone.attention_s
    assert each.dense_s == alone.dense_s / 8
    # Four divides them.
    four = scaling.part_of_one(4)
    for name in ("target_weights_s", "draft_weights_s", "cache_s", "attention_s"):
        assert getattr(four, name) == pytest.approx(getattr(alone, name) / 4), name
    # One step of the model reads its 7.07 billion weights of two bytes.
    step_s = alone.round_seconds(Program(1, 0, 0))
    assert step_s == pytest.approx(2 * 7.07e9 / 3350e9, rel=0.01)


@pytest.mark.slow
def test_a_tree_beside_itself_samples_the_same(tmp_path: Path) -> None:
    head = ["git", "rev-parse", "HEAD"]
    if subprocess.run(head, cwd=records.ROOT, capture_output=True).returncode:
        pytest.skip("an archive has no commits")
    record = commits.main(commits.Args("HEAD", quick=True, out=tmp_path))
    (point,) = record["points"]
    assert point["same_tokens"] and point["tokens"] > 0
    assert json.loads((tmp_path / "commits.json").read_text())["points"]


def test_other_tokens_of_a_commit_are_told() -> None:
    spread = dict(median=1.0, q1=1.0, q3=1.0)
    point = dict(
        workload="w", rows=1, tokens=2, before_s=spread, now_s=spread, ratio=spread,
        same_tokens=False,
    )  # fmt: skip
    assert commits.rows_of([point])[1][0][-1] == "NO"


def counted_points() -> list[dict[str, Any]]:
    """Return counts of a step, a draft that sees a span, and a verification of five."""

    def one(kind: str, weights: float, cache: float) -> dict[str, Any]:
        return {"kind": kind, "num_bytes": {"weights": weights, "cache": cache}}

    case = {"preset": "qwen2.5-7b", "device": "h100", "rows": 32, "length": 8192}
    return [
        {**case, "gamma": 0, "draft": "", "passes": [one("step", 14e9, 15e9)]},
        {
            **case,
            "gamma": 4,
            "draft": "int4, window",
            "passes": [one("verify", 14e9, 16e9), one("draft", 4e9, 1e9)],
        },
    ]


def test_what_drafts_are_worth_by_hand() -> None:
    points = counted_points()
    arguments = ("qwen2.5-7b", "h100", (32, 8192))
    costs = limits.costs_of(points, *arguments, "int4, window")
    per_s = 3350e9
    step = costs.round_seconds(Program(32, 8192, 0))
    assert step == pytest.approx(29e9 / per_s)
    # Half the rows and half the length: a quarter of the cache, and the span's half.
    halved = costs.round_seconds(Program(16, 4096, 4))
    assert halved == pytest.approx((14e9 + 16e9 / 4 + 4 * (4e9 + 1e9 / 2)) / per_s)
    gamma, speed_up = limits.best_of(costs, 1.0)
    round_s = costs.round_seconds(Program(32, 8192, gamma))
    assert speed_up == pytest.approx((gamma + 1) * step / round_s)
    assert gamma == max(limits.GAMMAS)
    assert limits.best_of(costs, 0.0) == (0, 1.0)
    args = limits.Args(num=16, seeds=2, cap=8192)
    saved = limits.saved(costs, "capped", 0.9, args)
    assert 0.4 < saved["best"] <= saved["oracle"] + 0.02 < 0.7
    with pytest.raises(ValueError, match=r"run python -m benchmarks\.traffic"):
        limits.costs_of(points, *arguments, "int8")


def test_passes_are_as_they_were_counted_last() -> None:
    """Of the same pass in two cases, the later one."""
    old = counted_points()
    for point in old:
        for one in point["passes"]:
            one |= {"ratio": 1.5, "minimum_bytes": 1e9, "kernels": 1, "branches": 0}
    new = json.loads(json.dumps(old[1])) | {"draft": "int8", "commit": "abcdef012"}
    new["date"] = "2026-11-27T04:00:00+00:00"
    new["passes"][0]["num_bytes"]["cache"] = 15e9
    new["passes"][0]["ratio"] = 1.25
    for points in ([*old, new], [new, *old]):
        costs = limits.costs_of(
            points, "qwen2.5-7b", "h100", (32, 8192), "int4, window"
        )
        assert costs.verify[4].num_bytes["cache"] == 15e9
        header, rows = traffic.rows_of(points)
        ratio, commit = header.index("moved / least"), header.index("commit")
        assert [(row[3], row[ratio], row[commit]) for row in rows] == [
            ("step", "1.50", ""),
            ("draft, int4, window", "1.50", ""),
            ("draft, int8", "1.50", "abcdef0"),
            ("verify of 5", "1.25", "abcdef0"),
        ]


@pytest.mark.slow
def test_long_caches_run_and_sample_the_same_tokens(tmp_path: Path) -> None:
    long_caches.main(long_caches.Args(quick=True, out=tmp_path))
    record = json.loads((tmp_path / "long_caches.json").read_text())
    assert records.problems(record) == []
    (point,) = record["points"]
    assert [c["control"] for c in point["controls"]] == list(long_caches.CONTROLS)
    assert {c["num_sequences_that_differ"] for c in point["controls"]} == {0}
    window = point["controls"][2]
    assert window["windows"] == [20]
    header, rows = long_caches.rows_of(record["points"])
    assert len(rows) == 4
    assert len(header) == len(rows[0])


@pytest.mark.slow  # starts a process
def test_a_stream_samples_the_same_tokens(tmp_path: Path) -> None:
    stream.main(stream.Args(quick=True, out=tmp_path))
    record = json.loads((tmp_path / "stream.json").read_text())
    assert records.problems(record) == []
    assert [p["reward"] for p in record["points"]] == 2 * list(stream.REWARDS)
    header, rows = stream.rows_of(record["points"])
    assert [row[-1] for row in rows] == ["yes"] * 2 * len(stream.REWARDS)
    assert len(rows[0]) == len(header)


@pytest.mark.slow
def test_a_session_prefills_only_what_it_does_not_know(tmp_path: Path) -> None:
    session.main(session.Args(quick=True, out=tmp_path))
    record = json.loads((tmp_path / "session.json").read_text())
    assert records.problems(record) == []
    (point,) = record["points"]
    assert point["num_prefilled"] == {"alone": 2, "new": 2, "begun": 0, "known": 0}
    header, rows = session.rows_of(record["points"])
    assert [row[-1] for row in rows] == ["yes"]
    assert len(rows[0]) == len(header)


@pytest.mark.slow
def test_partial_rollouts_save_time_in_replay(tmp_path: Path) -> None:
    partial.main(partial.Args(quick=True, out=tmp_path))
    record = json.loads((tmp_path / "partial.json").read_text())
    assert records.problems(record) == []
    header, rows = partial.replay_rows(record["points"])
    assert len(header) == len(rows[0])
    replayed = [p for p in record["points"] if "alike" in p]
    for whole, part in zip(replayed[::2], replayed[1::2], strict=True):
        assert (whole["over"], part["over"]) == (1.0, 1.5)
        assert whole["over_whole"] == 1 and whole["old_tokens"] == 0
        # One step says nothing of groups that are alike: few lengths are drawn.
        assert part["alike"] or part["over_whole"] < 0.8
        assert 0 < part["oldest"] <= 4
    header, rows = partial.demo_rows(record["points"])
    assert [row[0] for row in rows] == ["whole", "partial"]
    assert len(header) == len(rows[0])


def test_a_journal_changes_no_token(tmp_path: Path) -> None:
    journal.main(journal.Args(quick=True, out=tmp_path))
    record = json.loads((tmp_path / "journal.json").read_text())
    assert records.problems(record) == []
    header, rows = journal.rows_of(record["points"])
    assert [row[-1] for row in rows] == ["yes", "yes"]
    assert len(rows[0]) == len(header)
    # What is noted more often takes more pieces.
    default, often = record["points"]
    assert often["bytes"] > default["bytes"] > 8 * default["num_tokens"]
