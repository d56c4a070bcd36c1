"""The benchmarks: what they count, what they write, that they run. No speeds."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from benchmarks import (
    accelerator,
    acceptance,
    cold,
    disturbed,
    fuzz,
    host,
    imitation,
    measure,
    passes,
    peers,
    plans,
    predicted,
    presets,
    published,
    report,
    rollout,
    sampling,
    scaling,
    steps,
    trace,
    workloads,
)
from benchmarks.passes import Pass
from er_jax import Controller, Decoder, DecoderConfig, DrafterConfig, RolloutConfig
from er_jax.acceptance import AcceptRule, expected_tokens
from er_jax.config import DEFAULT_GAMMAS
from er_jax.costs import timing
from er_jax.costs.passes import PassCosts, Reading
from er_jax.costs.table import LatencyTable
from er_jax.request import Request
from er_jax.types import Program
from train import tasks

SMALL = Decoder(
    DecoderConfig(
        vocab_size=32, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=24
    )
)
# A layer of SMALL: q and o 16 x 16, k and v 16 x 8, gate, up and down 16 x 24.
LAYER_WEIGHTS = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24
# Outputs of those seven products: one scale each in the draft.
LAYER_OUTPUTS = 16 + 8 + 8 + 16 + 24 + 24 + 16
LAYER_NORMS = 2 * 16


@pytest.fixture(scope="module")
def params() -> Any:
    return presets.random_params(SMALL)


def test_weight_bytes_by_hand(params: Any) -> None:
    """Every weight once; the embedding table is looked up and not read."""
    matrices = 2 * LAYER_WEIGHTS + 16 * 32
    vectors = 2 * LAYER_NORMS + 16
    assert passes.weight_bytes(params) == 4 * (matrices + vectors)


@pytest.mark.parametrize(("bits", "code_bytes"), [(8, 1.0), (4, 0.5)])
def test_draft_bytes_by_hand(params: Any, bits: int, code_bytes: float) -> None:
    """Codes by their bits, a float32 scale for each output, norms as they are."""
    draft = er_jax.quantize(params, DrafterConfig(bits=bits))
    codes = 2 * LAYER_WEIGHTS + 16 * 32
    scales = 2 * LAYER_OUTPUTS + 32
    vectors = 2 * LAYER_NORMS + 16
    assert passes.weight_bytes(draft) == codes * code_bytes + 4 * (scales + vectors)


def test_grouped_draft_bytes_by_hand(params: Any) -> None:
    """Groups of 8: as many scales as weights over 8."""
    draft = er_jax.quantize(params, DrafterConfig(bits=4, group_size=8))
    codes = 2 * LAYER_WEIGHTS + 16 * 32
    vectors = 2 * LAYER_NORMS + 16
    assert passes.weight_bytes(draft) == codes // 2 + 4 * (codes // 8 + vectors)


def test_tied_table_is_read_as_the_projection() -> None:
    config = dataclasses.replace(SMALL.config, tied_embeddings=True)
    tied = presets.random_params(Decoder(config))
    untied = presets.random_params(SMALL)
    assert passes.weight_bytes(tied) == passes.weight_bytes(untied)
    draft = er_jax.quantize(tied, DrafterConfig())
    assert passes.weight_bytes(draft) == passes.weight_bytes(
        er_jax.quantize(untied, DrafterConfig())
    )


def test_cache_bytes_by_hand() -> None:
    """Two layers, keys and values, 2 heads of 4 features, float32."""
    assert passes.cache_bytes(SMALL, rows=3, cache_length=10) == 2 * 2 * 3 * 10 * 8 * 4


def test_bytes_of_a_pass() -> None:
    """A round of three drafts reads the draft three times, the cache four times."""
    sizes = {"target": 1000, "draft": 100, "cache": 10}
    assert passes.pass_bytes(Pass("ar"), **sizes) == 1010
    assert passes.pass_bytes(Pass("draft", 0, "int8"), **sizes) == 110
    assert passes.pass_bytes(Pass("verify", 3), **sizes) == 1010
    assert passes.pass_bytes(Pass("round", 3, "int8"), **sizes) == 1010 + 3 * 110


def test_presets_have_the_sizes_they_are_named_for() -> None:
    for name, low, high in (("3M", 2.5e6, 3.5e6), ("90M", 8e7, 1e8), ("7B", 7e9, 8e9)):
        policy = presets.decoder(name)
        shapes = jax.eval_shape(policy.init, jax.random.key(0))
        assert low < presets.num_params(shapes) < high
    assert presets.decoder("7B", num_layers=3).config.num_layers == 3
    with pytest.raises(ValueError, match="'8B' is unknown"):
        presets.decoder("8B")
    with pytest.raises(ValueError, match="'int3' is unknown"):
        presets.drafter("int3")


def test_spread_and_ratios() -> None:
    assert measure.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 5.0, "num": 5,
    }  # fmt: skip
    # Paired: both were twice as slow in the second repeat, the ratio was not.
    assert measure.paired_ratio([2.0, 4.0], [1.0, 2.0])["median"] == 2.0


def test_interleaving_runs_every_case_once_a_repeat() -> None:
    ran: list[str] = []

    def case(name: str) -> float:
        ran.append(name)
        return float(len(ran))

    names = ("a", "b", "c")
    readings = measure.interleave(
        {name: functools.partial(case, name) for name in names}, 4
    )
    rounds = [ran[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(each) == sorted(names) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1  # not always in one order
    assert readings["b"] == [i + 1.0 for i, name in enumerate(ran) if name == "b"]


def test_a_record_says_what_it_was_measured_on(tmp_path: Path) -> None:
    record = measure.new_record("steps", {"rows": (1, 2)})
    assert measure.problems(record) == []
    found = record["environment"]
    assert found["platform"] == "cpu"
    assert found["versions"]["jax"] == jax.__version__
    assert str(measure.ROOT) not in json.dumps(record)

    point = {"preset": "3M", "rows": 1, "dtype": "float32", "x": float("nan")}
    record["points"].append(point | {"seconds": np.float32(1 / 3), "n": np.int32(2)})
    measure.save(tmp_path / "out.json", record)
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["points"][0]["seconds"] == pytest.approx(1 / 3, rel=1e-4)
    assert (read["points"][0]["n"], read["points"][0]["x"]) == (2, None)

    record["points"].append({"preset": "3M", "dtype": "float32"})
    with pytest.raises(ValueError, match="point 1 has no 'rows'"):
        measure.save(tmp_path / "out.json", record)
    assert len(list(tmp_path.iterdir())) == 1  # what was there before, untouched


@pytest.mark.parametrize(
    "path", sorted(measure.RESULTS.glob("*.json")), ids=lambda p: p.name
)
def test_committed_records_can_be_quoted(path: Path) -> None:
    record = json.loads(path.read_text())
    assert measure.problems(record) == []
    assert record["points"]


def test_readme_quotes_the_committed_records() -> None:
    """No number is copied by hand; `python -m benchmarks.report` mends this."""
    assert report.README.read_text() == report.updated(report.README.read_text())


def test_tables_hold_what_the_record_holds(tmp_path: Path) -> None:
    spread = {"median": 0.002, "q1": 0.0019, "q3": 0.0021}
    record = measure.new_record("steps", {})
    passes_ = [
        {"kind": "ar", "gamma": 0, "draft": "", "seconds": spread, "bytes_per_s": 7e9,
         "cost_ratio": {"median": 1.0}},
        {"kind": "verify", "gamma": 4, "draft": "", "cost_ratio": {"median": 1.25}},
        {"kind": "round", "gamma": 4, "draft": "int8", "keep_rate": 0.75,
         "speedup": 1.5},
    ]  # fmt: skip
    point = {"preset": "3M", "rows": 2, "dtype": "float32", "cache_length": 64}
    record["points"].append({**point, "passes": passes_})
    measure.save(tmp_path / "steps.json", record)
    text = report.updated(f"before\n{report.MARKER}\nold\n", tmp_path)
    assert text.startswith("before\n")
    assert "old" not in text
    assert "| 2 | 2 (10) | 7 | 1.25 | 0.75, 1.5 |" in text
    with pytest.raises(ValueError, match="has no line"):
        report.updated("no marker")


def test_peaks_are_those_of_the_device() -> None:
    peaks = {
        "NVIDIA H100 80GB HBM3": 3350e9,
        "NVIDIA H100 PCIe": 2000e9,
        "NVIDIA H200": 4800e9,
        "NVIDIA A100-SXM4-40GB": 1555e9,
        "NVIDIA A100-SXM4-80GB": 2039e9,
        "NVIDIA L40S": 864e9,
        "NVIDIA L4": 300e9,
        "TPU v5 lite": 819e9,
        "TPU v5p": 2765e9,
        "TPU v6 lite": 1638e9,
    }
    assert {kind: measure.peak_bytes_per_s(kind) for kind in peaks} == peaks
    assert measure.peak_bytes_per_s("cpu") is None


def test_copies_have_a_speed() -> None:
    assert 1e8 < measure.copy_bytes_per_s(2**22, repeats=2, passes=2) < 1e13


def test_lengths_have_the_shapes_they_are_named_for() -> None:
    flat = workloads.flat_lengths(64, 512)
    tail = workloads.tail_lengths(256, 512)
    capped = workloads.capped_lengths(256, 512)
    assert set(flat) == {128}
    # The trace: median 466, mean 581, 99 % below 2711, of 8192.
    assert np.median(tail) == pytest.approx(466 / 16, rel=0.05)
    assert tail.mean() == pytest.approx(581 / 16, rel=0.1)
    assert tail.max() / tail.mean() > 6
    # The trace: mean 9382 of 16000, 15 % at the cap.
    assert capped.mean() / 512 == pytest.approx(9382 / 16000, abs=0.05)
    assert 0.05 < (capped == 512).mean() < 0.2
    for lengths in (tail, capped):
        assert lengths.min() >= 1
        assert lengths.max() <= 512
        assert np.abs(np.diff(lengths)).max() > 20  # not sorted


@pytest.fixture(scope="module")
def planned() -> rollout.Task:
    args = rollout.Args()
    return rollout.planned_task("tiny", args, [5, 1, 12, 3, 9], 2, max_new_tokens=12)


@pytest.mark.parametrize("control", ["ar", "fixed:2"])
def test_planned_lengths_are_what_comes_out(
    planned: rollout.Task, control: str
) -> None:
    """Also where a draft reaches past the planned end, and where the limit is it."""
    out = er_jax.rollout(
        planned.policy,
        planned.params,
        planned.prompts,
        key=planned.key,
        config=RolloutConfig(
            max_new_tokens=12, max_slots=2, stop_token_ids=(0,), control=control
        ),
    )
    assert out.lengths.tolist() == [5, 1, 12, 3, 9]
    assert set(out.finish_reason) == {"stop"}
    for ids, length in zip(out.completion_ids, out.lengths, strict=True):
        assert ids[length - 1] == 0
        assert 0 not in ids[: length - 1]  # the stop token comes nowhere else
    # The stop is certain where it comes; every other token is not.
    last = out.logprobs[np.arange(5), out.lengths - 1]
    np.testing.assert_allclose(last, 0, atol=1e-6)
    assert (out.logprobs[2, :11] < -1e-3).all()


def test_static_batch_samples_the_same_tokens(planned: rollout.Task) -> None:
    config = RolloutConfig(
        max_new_tokens=12, max_slots=2, stop_token_ids=(0,), control="ar"
    )
    out = er_jax.rollout(
        planned.policy,
        planned.params,
        planned.prompts,
        key=planned.key,
        config=config,
    )
    baseline = rollout.StaticRunner(planned)
    assert baseline.run() > 0
    expected = [ids[:n] for ids, n in zip(out.completion_ids, out.lengths, strict=True)]
    settings = baseline.settings
    found = workloads.compare(
        planned.policy,
        planned.params.policy,
        planned.prompts,
        expected,
        baseline.last,
        settings,
        workloads.TIE_GAP["float32"],
    )
    assert found.unexplained == ()
    assert found.num_tokens + 12 * found.num_different >= 30


def test_a_wrong_token_is_not_taken_for_a_tie(planned: rollout.Task) -> None:
    baseline = rollout.StaticRunner(planned)
    baseline.run()
    expected = baseline.last
    found = [tokens.copy() for tokens in expected]
    found[2][4] = (found[2][4] + 1) % 100 + 1
    found[4] = found[4][:-1]

    def compare(tie_gap: float) -> workloads.Agreement:
        return workloads.compare(
            planned.policy,
            planned.params.policy,
            planned.prompts,
            expected,
            found,
            baseline.settings,
            tie_gap,
        )

    strict = compare(1e-6)
    assert strict.unexplained == (2, 4)
    assert (strict.num_different, strict.num_ties) == (2, 0)
    assert strict.num_tokens == 5 + 1 + 4 + 3 + 8
    # With any gap forgiven it is a tie; a completion cut short never is.
    assert compare(np.inf).unexplained == (4,)


def test_prompts_that_cannot_hold_their_plan_are_refused() -> None:
    with pytest.raises(ValueError, match="two digits of base 4"):
        workloads.planned_prompts([100], 4)


def test_loops_feed_each_pass_with_the_last(params: Any) -> None:
    """One pass more gives other sums: nothing was moved out of the loop."""
    drafts = presets.drafts(params, ("int8",))
    bench = passes.Bench(SMALL, params, drafts, rows=2, cache_length=32)
    timed = passes.passes_of((2,), ("int8",))
    bench.compile(timed)
    for pass_ in timed:
        seconds, done = bench.run(pass_, 5)
        assert seconds > 0
        assert done >= 5
    bench.warm_up(timed, reading_s=0.001)
    assert all(bench.read(pass_) > 0 for pass_ in timed)
    assert 1 <= bench.tokens_per_round(Pass("round", 2, "int8")) <= 3
    assert bench.tokens_per_round(Pass("ar")) == 1

    sums = []
    for count in (3, 4):
        state = bench._fresh_state()
        bench._state, total = passes.verify_loop(
            SMALL, params, state, bench.settings, jnp.int32(count), gamma=2
        )
        sums.append(np.asarray(total))
    assert (sums[0] != sums[1]).all()


def test_a_point_of_steps_adds_up(params: Any) -> None:
    drafts = presets.drafts(params, ("int8",))
    bench = passes.Bench(SMALL, params, drafts, rows=2, cache_length=32)
    timed = [Pass("ar"), Pass("round", 2, "int8")]
    bench.compile(timed)
    bench.warm_up(timed, 0.001)
    readings = {"ar": [1.0, 2.0, 4.0], "round 2 int8": [2.0, 4.0, 8.0]}
    point = steps.point(bench, readings, timed)
    ar, whole = point["passes"]
    assert ar["tokens_per_s"] == 2 / 2.0
    assert whole["cost_ratio"]["median"] == 2.0
    assert whole["speedup"] == pytest.approx(whole["tokens_per_round"] / 2)
    assert whole["bytes_per_s"] == whole["bytes"] / 4.0
    assert "round" in steps.lines([{"preset": "x", **point}])


def test_quick_start_is_the_first_block_of_the_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("```bash\nls\n```\n```python\nprint(1)\n```\n```python\n2\n```\n")
    assert rollout.quick_start(readme) == "print(1)\n"
    compile(rollout.quick_start(measure.ROOT / "README.md"), "README.md", "exec")
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="no ```python block"):
        rollout.quick_start(readme)


def test_accelerator_says_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator"],
        cwd=measure.ROOT,
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
    assert passes.cache_bytes(presets.decoder("7B"), 8, 8192) == cache
    assert 15.2e9 + 7e9 + 3.5e9 < found - cache < 32e9


def test_accelerator_lists_what_it_has_no_time_for(tmp_path: Path) -> None:
    args = accelerator.Args(budget_s=-1e6, dry_run=True)
    session = accelerator.Session(args, accelerator.DRY, tmp_path)
    model = accelerator.Model.make(accelerator.DRY, num_layers=1)
    shapes, device = accelerator.DRY.shapes, accelerator.Devices(None, 1e9, 10**12)
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
        cwd=measure.ROOT,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "accelerator.json").read_text())
    assert measure.problems(record) == []
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


def test_the_documented_example_is_what_the_published_model_says() -> None:
    text = (measure.ROOT / "docs" / "system-aware.md").read_text("utf-8")
    costs = published.MODELS["Qwen2.5-7B"].costs
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
    gammas = next([int(g) for g in c[1:-1]] for c in cells if c[0] == "rows")
    rows = [c for c in cells if len(c) == len(gammas) + 2 and c[0].isdecimal()]
    assert [int(c[0]) for c in rows] == [128, 64, 32, 16, 4, 1]
    for first, *quoted, _ in rows:
        plain_s = costs.round_seconds(Program(int(first), 1024, 0))
        for gamma, value in zip(gammas, quoted, strict=True):
            round_s = costs.round_seconds(Program(int(first), 1024, gamma))
            speed = expected_tokens([0.95] * gamma) * plain_s / round_s
            assert f"{speed:.2f}" == value


def simulated(
    control: str, keep_prob: float, believed: float
) -> tuple[predicted.SimulatedEngine, er_jax.Controller, er_jax.RolloutStats]:
    """Run 48 long-tailed completions in 16 slots on costs like those of the 90M."""
    readings = [
        Reading(kind, rows, length, gamma, round_s)  # type: ignore[arg-type]
        for rows, step_s in ((1, 0.010), (4, 0.014), (16, 0.026))
        for length in (128, 512)
        for kind, gamma, round_s in (
            ("target", 0, step_s),
            ("round", 4, (1.4 + 0.8 * rows**0.35) * step_s + 0.001),
            ("round", 8, (2.8 + 1.2 * rows**0.4) * step_s + 0.001),
        )
    ]
    table = LatencyTable(passes=PassCosts(readings))
    lengths = workloads.tail_lengths(48, 512)
    request = Request(
        prompts=[np.arange(16, dtype=np.int32)],
        prompt_of=np.zeros(48, int),
        sequence_ids=np.arange(48),
        max_new_tokens=512,
        slots=16,
        cache_lengths=(128, 256, 640),
        prompt_bucket=16,
        chunk=4,
    )
    engine = predicted.SimulatedEngine(
        table,
        lambda num_chunks: 0.0,
        dict(enumerate(lengths.tolist())),
        np.full(8, keep_prob),
        rounds_per_test=1,
    )
    controller = er_jax.Controller(control, (0, 4, 8), patience=0)
    controller.table.passes = table.passes
    for estimate in (controller.acceptance, controller._rollouts.kept[()]):
        estimate.tested[:] = 2000
        estimate.kept[:] = 2000 * believed
    stats = predicted.simulate(engine, request, controller)
    assert stats.num_tokens == lengths.sum()
    return engine, controller, stats


def test_a_draft_of_noise_costs_little_and_ends_in_plain_decoding() -> None:
    plain, _, _ = simulated("ar", 0.0, 0.95)
    noise, controller, stats = simulated("best", 0.0, 0.95)
    assert controller.broken_drafter is not None
    assert 1 < noise.seconds / plain.seconds < 1.1
    assert stats.timeline[0].gamma > 0
    assert {moment.gamma for moment in stats.timeline[-10:]} == {0}
    # And good drafts pay on the same costs, or the above would say nothing.
    good, controller, _ = simulated("best", 0.95, 0.95)
    assert controller.broken_drafter is None
    assert good.seconds < 0.95 * plain.seconds


def test_a_simulated_rollout_takes_what_its_rounds_do() -> None:
    """Windows by the table, and the same tokens whatever is drafted."""
    for control in ("ar", "fixed:4"):
        engine, _, stats = simulated(control, 1.0, 1.0)
        assert stats.seconds["windows"] == pytest.approx(engine.seconds)
    # Nearly all rounds of four drafts that are always kept emit five tokens.
    assert stats.num_tokens / sum(stats.rounds.values()) > 4


def test_random_codes_make_no_drafts_worth_keeping(params: Any) -> None:
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


def test_drafts_are_counted_as_rollouts_count_them() -> None:
    """By depth over all positions, inside of completions and behind their ends."""
    rule: AcceptRule = "coupled"
    policy, gamma = presets.decoder("tiny", dtype="float32"), 3
    params = policy.init(jax.random.key(0))
    policy_and_draft = er_jax.attach_draft(
        params, er_jax.DrafterConfig(bits=4, act_bits=16)
    )
    prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    texts = acceptance.sample_texts(policy, params, prompts, 2)
    assert {len(rows) for rows in texts.batches} == {6}
    found = acceptance.measured(texts, policy_and_draft, gamma, rule)
    out = er_jax.rollout(
        policy,
        policy_and_draft,
        prompts,
        key=jax.random.key(acceptance.SEED),
        config=er_jax.RolloutConfig(
            max_new_tokens=acceptance.MAX_NEW_TOKENS,
            n=2,
            stop_token_ids=(tasks.EOS,),
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
    assert measure.problems(record) == []
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


@pytest.mark.slow
def test_the_peer_samples_as_many_tokens() -> None:
    policy = presets.decoder("tiny", dtype="float32")
    pytest.importorskip("torch")
    params = presets.random_params(policy)
    prompts, lengths = [[3, 4], [5, 6, 7], [8]], [4, 9, 2]
    peer = peers.TransformersRunner(policy, params, prompts, lengths, slots=2)
    assert peer.run() > 0
    assert peer.num_tokens == lengths


def test_plans_are_told_by_their_record() -> None:
    """The table in docs/plan.md is that of the record, and says what it should."""
    record = json.loads((measure.RESULTS / "plans.json").read_text())
    header, rows = plans.rows_of(record["points"])
    assert all(len(row) == len(header) for row in rows)
    asked = [(model, device) for model in plans.CASES for device in plans.CASES[model]]
    assert sorted(row[:2] for row in rows) == sorted(asked)
    difference = header.index("arguments: compiler / count %")
    told = [row[difference] for row in rows if not str(row[8]).endswith("refused")]
    assert len(told) >= len(rows) - 1
    assert all(abs(part) < 3 for part in told)


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


@pytest.fixture
def simulated_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure_round", cold.measured)


@pytest.mark.parametrize("name", cold.POLICIES)
def test_first_calls_are_not_much_slower_than_an_oracles(
    name: str, simulated_clock: None
) -> None:
    """The totals of 1 to 20 calls, within 1.3 times those of the record's oracle."""
    record = json.loads((measure.RESULTS / "cold.json").read_text())
    (point,) = (p for p in record["points"] if p["preset"] == name)
    args = cold.Args()
    found = cold.calls(cold.POLICIES[name], Controller(), args.calls, args.gammas)
    assert len(point["oracle_s"]) == 20
    for ours, oracle_s in zip(found, point["oracle_s"], strict=True):
        assert ours <= cold.LIMIT * oracle_s
    # The costs are still those that the oracle knew.
    plan = cold.Plan(frozenset({(cold.POLICIES[name].slots, 0)}), is_short=False)
    oracle = cold.Oracle(cold.POLICIES[name], plan)
    (first,) = cold.calls(cold.POLICIES[name], oracle, 1, args.gammas)
    assert first == pytest.approx(point["oracle_s"][0], rel=1e-4)


def test_no_draft_is_compiled_that_one_row_rules_out(
    simulated_clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[cold.CompilingEngine] = []
    made = cold.CompilingEngine

    def kept(*args: Any) -> cold.CompilingEngine:
        engines.append(made(*args))
        return engines[-1]

    monkeypatch.setattr(cold, "CompilingEngine", kept)
    costs, controller = cold.POLICIES["in the cache"], Controller()
    cold.calls(costs, controller, 80, DEFAULT_GAMMAS)
    (engine,) = engines
    drafting = [n[1] for n in engine.compiled if n[0] == "window" and n[1].gamma]
    assert [program[0::2] for program in drafting] == [(1, 4)]
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
    record = json.loads((measure.RESULTS / "fuzz.json").read_text())
    assert record["differences"] == []
    points = record["points"]
    assert fuzz.total(points, "schedules") == record["settings"]["schedules"] >= 2000
    assert {point["preset"] for point in points} == set(fuzz.POLICIES)
    header, rows = fuzz.rows_of(points)
    assert all(len(row) == len(header) for row in rows)
    assert rows[-1][header.index("differences")] == 0
    assert rows[-1][header.index("completions")] == fuzz.total(points, "completions")
    assert f"{fuzz.total(points, 'cloned')} completions" in fuzz.summary(record)


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
    alone, each = scaling.roofline(), scaling.part_of_one(8)
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
