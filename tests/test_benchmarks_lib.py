"""What benchmarks share: what it counts, measures, plans and simulates. No speeds."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from benchmarks import peers as comparison
from benchmarks.lib import (
    agreement,
    bandwidth,
    measure,
    pass_bytes,
    pass_points,
    passes,
    peer_worker,
    peers,
    presets,
    records,
    rooflines,
    workloads,
)
from benchmarks.lib.passes import Pass
from benchmarks.lib.runners import StaticRunner
from benchmarks.lib.simulated import SimulatedEngine, simulate
from benchmarks.lib.tasks import Task, planned_task
from er_jax import Decoder, DecoderConfig, DrafterConfig, RolloutConfig
from er_jax.acceptance import expected_tokens
from er_jax.costs.passes import PassCosts, Reading
from er_jax.costs.table import LatencyTable
from er_jax.request import Request
from er_jax.types import Program

pytestmark = pytest.mark.usefixtures("unoptimized_module")

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
    assert pass_bytes.weight_bytes(params) == 4 * (matrices + vectors)


@pytest.mark.parametrize(("bits", "code_bytes"), [(8, 1.0), (4, 0.5)])
def test_draft_bytes_by_hand(params: Any, bits: int, code_bytes: float) -> None:
    """Codes by their bits, a float32 scale for each output, norms as they are."""
    draft = er_jax.quantize(params, DrafterConfig(bits=bits))
    codes = 2 * LAYER_WEIGHTS + 16 * 32
    scales = 2 * LAYER_OUTPUTS + 32
    vectors = 2 * LAYER_NORMS + 16
    assert pass_bytes.weight_bytes(draft) == codes * code_bytes + 4 * (scales + vectors)


def test_grouped_draft_bytes_by_hand(params: Any) -> None:
    """Groups of 8: as many scales as weights over 8."""
    draft = er_jax.quantize(params, DrafterConfig(bits=4, group_size=8))
    codes = 2 * LAYER_WEIGHTS + 16 * 32
    vectors = 2 * LAYER_NORMS + 16
    assert pass_bytes.weight_bytes(draft) == codes // 2 + 4 * (codes // 8 + vectors)


def test_tied_table_is_read_as_the_projection() -> None:
    config = dataclasses.replace(SMALL.config, tied_embeddings=True)
    tied = presets.random_params(Decoder(config))
    untied = presets.random_params(SMALL)
    assert pass_bytes.weight_bytes(tied) == pass_bytes.weight_bytes(untied)
    draft = er_jax.quantize(tied, DrafterConfig())
    assert pass_bytes.weight_bytes(draft) == pass_bytes.weight_bytes(
        er_jax.quantize(untied, DrafterConfig())
    )


def test_cache_bytes_by_hand() -> None:
    """Two layers, keys and values, 2 heads of 4 features, float32."""
    assert (
        pass_bytes.cache_bytes(SMALL, rows=3, cache_length=10) == 2 * 2 * 3 * 10 * 8 * 4
    )


def test_bytes_of_a_pass() -> None:
    """A round of three drafts reads the draft three times, the cache four times."""
    sizes = {"target": 1000, "draft": 100, "cache": 10}
    assert pass_bytes.pass_bytes(Pass("ar"), **sizes) == 1010
    assert pass_bytes.pass_bytes(Pass("draft", 0, "int8"), **sizes) == 110
    assert pass_bytes.pass_bytes(Pass("verify", 3), **sizes) == 1010
    assert pass_bytes.pass_bytes(Pass("round", 3, "int8"), **sizes) == 1010 + 3 * 110


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
    record = records.new_record("steps", {"rows": (1, 2)})
    assert records.problems(record) == []
    found = record["environment"]
    assert found["platform"] == "cpu"
    assert found["versions"]["jax"] == jax.__version__
    assert str(records.ROOT) not in json.dumps(record)

    point = {"preset": "3M", "rows": 1, "dtype": "float32", "x": float("nan")}
    record["points"].append(point | {"seconds": np.float32(1 / 3), "n": np.int32(2)})
    records.save(tmp_path / "out.json", record)
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["points"][0]["seconds"] == pytest.approx(1 / 3, rel=1e-4)
    assert (read["points"][0]["n"], read["points"][0]["x"]) == (2, None)

    record["points"].append({"preset": "3M", "dtype": "float32"})
    with pytest.raises(ValueError, match="point 1 has no 'rows'"):
        records.save(tmp_path / "out.json", record)
    assert len(list(tmp_path.iterdir())) == 1  # what was there before, untouched


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
    assert {kind: bandwidth.peak_bytes_per_s(kind) for kind in peaks} == peaks
    assert bandwidth.peak_bytes_per_s("cpu") is None


def test_copies_have_a_speed() -> None:
    assert 1e8 < bandwidth.copy_bytes_per_s(2**22, repeats=2, passes=2) < 1e13


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
def planned() -> Task:
    return planned_task("tiny", [5, 1, 12, 3, 9], slots=2, max_new_tokens=12)


@pytest.mark.parametrize("control", ["ar", "fixed:2"])
def test_planned_lengths_are_what_comes_out(planned: Task, control: str) -> None:
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


def test_static_batch_samples_the_same_tokens(planned: Task) -> None:
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
    baseline = StaticRunner(planned)
    assert baseline.run() > 0
    expected = [ids[:n] for ids, n in zip(out.completion_ids, out.lengths, strict=True)]
    settings = baseline.settings
    found = agreement.compare(
        planned.policy,
        planned.params.policy,
        planned.prompts,
        expected,
        baseline.last,
        settings,
        agreement.TIE_GAP["float32"],
    )
    assert found.unexplained == ()
    assert found.num_tokens + 12 * found.num_different >= 30


def test_a_wrong_token_is_not_taken_for_a_tie(planned: Task) -> None:
    baseline = StaticRunner(planned)
    baseline.run()
    expected = baseline.last
    found = [tokens.copy() for tokens in expected]
    found[2][4] = (found[2][4] + 1) % 100 + 1
    found[4] = found[4][:-1]

    def compare(tie_gap: float) -> agreement.Agreement:
        return agreement.compare(
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
    point = pass_points.point(bench, readings, timed)
    ar, whole = point["passes"]
    assert ar["tokens_per_s"] == 2 / 2.0
    assert whole["cost_ratio"]["median"] == 2.0
    assert whole["speedup"] == pytest.approx(whole["tokens_per_round"] / 2)
    assert whole["bytes_per_s"] == whole["bytes"] / 4.0
    assert "round" in pass_points.lines([{"preset": "x", **point}])


def test_the_documented_example_is_what_the_published_model_says() -> None:
    text = (records.ROOT / "docs" / "system-aware.md").read_text("utf-8")
    costs = rooflines.PUBLISHED["Qwen2.5-7B"].costs
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
) -> tuple[SimulatedEngine, er_jax.Controller, er_jax.RolloutStats]:
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
        bare_prompt_of=np.zeros(48, int),
        sequence_ids=np.arange(48),
        max_new_tokens=512,
        slots=16,
        cache_lengths=(128, 256, 640),
        prompt_bucket=16,
        chunk=4,
    )
    engine = SimulatedEngine(
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
    _, stats = simulate(engine, request, controller)
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


@pytest.mark.slow
def test_the_peer_samples_as_many_tokens() -> None:
    policy = presets.decoder("tiny", dtype="float32")
    pytest.importorskip("torch")
    params = presets.random_params(policy)
    prompts, lengths = [[3, 4], [5, 6, 7], [8]], [4, 9, 2]
    peer = peers.TransformersRunner(policy, params, prompts, lengths, slots=2)
    assert peer.run() > 0
    assert peer.num_tokens == lengths


def test_completions_end_with_their_first_stop_token() -> None:
    rows = [[5, 6, 1, 1, 0], [1, 7, 7, 7, 7], [5, 6, 7, 8, 9]]
    assert peer_worker.lengths_of(rows, [1, 2]) == [3, 1, 5]
    assert peer_worker.lengths_of(rows, []) == [5, 5, 5]


def test_every_completion_of_a_prompt_is_a_row_of_some_batch() -> None:
    task = {"prompts": [[3], [4], [5]], "group": 2, "slots": 4}
    assert list(peer_worker.batches(task)) == [[[3], [3], [4], [4]], [[5], [5]]]


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["tail", "flat"])
def test_engines_sample_the_same_task(workload: str, tmp_path: Path) -> None:
    """Where lengths are equal they give as many tokens; else at most the limit."""
    args = comparison.Args(slots=2, limit=24)
    vocab_size = comparison.checkpoint("tiny", str(tmp_path)).vocab_size
    task = comparison.task_of(str(tmp_path), vocab_size, workload, 2, 6, args)
    stops = np.array(task["stops"])
    assert not np.isin(task["prompts"], [0, *stops]).any()
    for name in filter(comparison.is_installed, peer_worker.ENGINES):
        out = peer_worker.ENGINES[name](task)(1)
        assert out.tokens <= out.row_steps or name == "er_jax, best", name
        assert 6 <= out.tokens <= 6 * 24, name
        if workload == "flat":
            assert out.tokens == 6 * 8, name
