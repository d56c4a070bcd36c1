"""What is counted for a device that is not here; compiled for this CPU, and for others
where their compilers are installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import jax
import pytest

import er_jax
from er_jax.tools import hlo, plan, presets, traffic

pytestmark = pytest.mark.usefixtures("as_users_compile")

CONFIG = er_jax.DecoderConfig(
    vocab_size=512, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=128,
    dtype="bfloat16",
)  # fmt: skip


def made(device: str = "cpu", config: Any = CONFIG, **changes: Any) -> plan.Plan:
    settings: dict[str, Any] = {"slots": 8, "max_length": 128, **changes}
    return plan.plan(config, presets.target_of(device), **settings)


@pytest.fixture(scope="module")
def found() -> plan.Plan:
    return made()


def test_bytes_are_those_of_the_compiled_program(found: plan.Plan) -> None:
    step, speculative = found.programs
    assert (step.program.gamma, speculative.program.gamma) == (0, plan.GAMMA)
    counted = found.params_bytes + found.state_bytes
    assert step.argument_bytes == pytest.approx(counted, rel=0.03)
    counted += found.draft_bytes
    assert speculative.argument_bytes == pytest.approx(counted, rel=0.03)
    for count in found.programs:
        assert count.alias_bytes >= found.state_bytes
        assert count.peak_bytes >= count.argument_bytes
        assert count.collectives == ()
    assert found.peak_bytes >= speculative.argument_bytes


def test_counts_follow_from_the_sizes(found: plan.Plan) -> None:
    c = CONFIG
    layer = 2 * c.dim * (64 + 32) + 3 * c.dim * c.hidden_dim
    matrices = 2 * layer + c.vocab_size * c.dim
    norms = (2 * 2 + 1) * c.dim
    assert found.params_bytes == 2 * (matrices + c.vocab_size * c.dim + norms)
    # The look-up reads rows, not the table.
    assert found.read_bytes[0] == 2 * (matrices + norms)
    # Codes, and a float32 scale for each output channel.
    outputs = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64) + c.vocab_size
    assert found.draft_bytes == matrices + 4 * outputs
    assert found.cache_bytes == 2 * 2 * 32 * 2  # layers, keys and values, K D, bfloat16


def test_what_fits(found: plan.Plan) -> None:
    small = presets.Chip(found.peak_bytes * 1.2, 1e12, 1e14)
    roomy = dataclasses.replace(found.target, chip=small)
    fitting = dataclasses.replace(found, target=roomy)
    assert fitting.fits and "\nfits" in fitting.summary()
    assert fitting.largest(128) >= 8
    assert fitting.largest(64) >= 2 * fitting.largest(128)
    tight = presets.Chip(found.peak_bytes * 0.9, 1e12, 1e14)
    other = dataclasses.replace(found, target=dataclasses.replace(roomy, chip=tight))
    assert not other.fits and "does NOT fit" in other.summary()
    assert other.largest(128) < 8


class Refusing:
    """A window whose compilation ends for want of something."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def lower(self, *_: Any, **__: Any) -> Refusing:
        return self

    def compile(self) -> None:
        raise jax.errors.JaxRuntimeError(self.reason)


def test_what_the_compiler_refuses_does_not_fit(
    found: plan.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(reason: str) -> plan.Plan:
        monkeypatch.setattr(plan, "run_window", Refusing(reason))
        return made()

    refused = planned("RESOURCE_EXHAUSTED: Ran out of memory.\nmore")
    assert not refused.fits
    line = "gamma 4: the compiler refuses it: RESOURCE_EXHAUSTED: Ran out of memory."
    assert line in refused.summary().splitlines()
    # By shapes, what the compiler says otherwise.
    assert refused.peak_bytes == pytest.approx(
        found.params_bytes + found.draft_bytes + found.state_bytes
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        planned("INTERNAL: a bug")


def counted(**num_bytes: int) -> traffic.Count:
    return traffic.Count(num_bytes)  # type: ignore[arg-type]


def test_speed_follows_from_counted_bytes(found: plan.Plan) -> None:
    """At few rows everything is bound by bytes; at very many, by arithmetic."""
    chip = presets.Chip(1e9, 1e12, 1e14)
    whole = found.programs[1].traffic
    assert whole is not None
    sizes = whole.sizes
    step = counted(weights=10**6, cache=64_000, scores=8_000, sampling=1_600)
    verify = counted(weights=10**6, cache=64_000, scores=40_000, other=16_000)
    draft = counted(weights=400_000, cache=64_000)
    moved = (
        traffic.Traffic(step, counted(), dataclasses.replace(sizes, gamma=0)),
        traffic.Traffic(verify, draft, sizes),
    )
    here = dataclasses.replace(
        found,
        target=dataclasses.replace(found.target, chip=chip),
        keep=1.0,
        programs=tuple(
            dataclasses.replace(count, traffic=one)
            for count, one in zip(found.programs, moved, strict=True)
        ),
    )
    # Eight slots of 128 positions were compiled: a row at a quarter of the length has
    # 1/32 of what is attended, and 1/8 of the rest but the weights.
    step_s = 1_000_000 + 72_000 / 32 + 1_600 / 8
    round_s = 4 * (400_000 + 64_000 / 32) + 1_000_000 + 104_000 / 32 + 16_000 / 8
    assert here.speed_up(1, 32, 4) == pytest.approx(5 * step_s / round_s)
    assert here.speed_up(10**9, 0, 4) == pytest.approx(5 / 9, rel=0.1)
    assert "speed-up of 4 drafts" in here.summary()
    assert here.speed_up(1, 32, 3) is None  # no such program was compiled


def test_the_summary_is_readable(found: plan.Plan) -> None:
    text = found.summary()
    for word in ("parameters", "draft", "peak", "most slots that fit", "gamma 4",
                 "ratio", "scores", "kernels"):  # fmt: skip
        assert word in text
    assert "speed-up" not in text  # there is no data sheet of this machine


TEXT = """
  %a = f32[4,8]{1,0} all-reduce(f32[4,8] %x), metadata={op_name="f/draft/while"}
  %b = (bf16[8]{0}, bf16[16]{0}) all-gather-start(bf16[8] %y), metadata={}
  %c = bf16[16]{0} all-gather-done(%b)
  %d = s8[3]{0} collective-permute(s8[3] %z)
"""


def test_collectives_are_counted_by_round() -> None:
    found = {one.kind: one for one in hlo.collectives(TEXT, 4)}
    assert found["all-reduce"] == hlo.Collective(
        "all-reduce", 4, 4 * 4 * 8 * 4, 4 * 8 * 4
    )
    assert found["all-gather"] == hlo.Collective("all-gather", 1, 16 * 2, 16 * 2)
    assert found["collective-permute"].num_bytes == 3
    assert len(found) == 3


COPIES = """
%fused_computation (p: s8[4,8]) -> bf16[4,8] {
  ROOT %convert = bf16[4,8]{1,0} convert(%p)
}
ENTRY %main (a: s8[4,8]) -> bf16[8,4] {
  %a = s8[4,8]{1,0} parameter(0)
  %wide = bf16[4,8]{1,0} fusion(%a), kind=kLoop, calls=%fused_computation
  %other = bf16[4,9]{1,0} fusion(%a), kind=kLoop, calls=%fused_computation
  ROOT %turned = bf16[8,4]{0,1:T(8,128)} transpose(%wide), dimensions={1,0}
}
"""


def test_copies_of_weights_are_found() -> None:
    found = hlo.weight_copies(COPIES, {(4, 8)})
    assert found == ("fusion bf16[4,8]", "transpose bf16[8,4]")
    assert hlo.weight_copies(COPIES, {(4, 10)}) == ()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("v9:2x2", "device='v9:2x2' is not known; give a TPU slice such as v5e:2x4"),
        ("v5e", "device='v5e' is not known"),
        ("h100:2x2", "device='h100:2x2' is not known"),
        ("h100:0", "device='h100:0' is not known; .*such as h100:8"),
    ],
)
def test_unknown_devices_are_refused(device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.target_of(device)


@pytest.mark.parametrize(
    ("device", "extra"), [("v5e:2x2", "tpu-plan"), ("h100", "cuda-plan")]
)
def test_a_missing_compiler_is_named(
    device: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf'pip install "er-jax\[{extra}\]"'):
        presets.target_of(device)


def test_sizes_that_do_not_fit_the_mesh_are_refused() -> None:
    """One device has one data shard, and nine slots make no four of them."""
    with pytest.raises(ValueError, match=r"model_parallel=3 must be .* from 1 to 1"):
        made(model_parallel=3)
    target = presets.target_of("cpu")
    eight = dataclasses.replace(target, devices=tuple(jax.devices("cpu")))
    for model, slots in ((3, 8), (2, 9)):
        with pytest.raises(ValueError, match=f"model_parallel={model} with slots"):
            plan.plan(CONFIG, eight, slots=slots, max_length=128, model_parallel=model)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"slots": 0}, "slots=0 must be a whole number from 1"),
        ({"slots": True}, "slots=True must be a whole number"),
        ({"slots": 2.0}, "slots=2.0 must be a whole number"),
        ({"max_length": 2**31}, "max_length=2147483648 must be a whole number"),
        ({"gammas": ()}, "gammas is empty"),
        ({"gammas": (0, -1)}, r"gammas=\(0, -1\) must all be .* from 0 to 127"),
        ({"gammas": (0, 128)}, r"gammas=\(0, 128\) must all be .* from 0 to 127"),
        ({"gammas": (0, 2.5)}, r"gammas=\(0, 2.5\) must all be whole numbers"),
        ({"keep": 5}, "keep=5 must be a chance"),
        ({"keep": float("nan")}, "keep=nan must be a chance"),
        ({"keep": "1"}, "keep='1' must be a chance"),
        ({"accept": "maybe"}, "accept='maybe' is unknown; use one of coupled"),
        ({"model_parallel": 0}, "model_parallel=0 must be a whole number"),
        ({"model_parallel": -1}, "model_parallel=-1 must be a whole number"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**wrong)


def test_a_single_draft_is_counted_as_one() -> None:
    """The compiler unrolls its loop."""
    (count,) = made(gammas=(1,)).programs
    assert count.traffic is not None
    draft, target = (count.traffic.passes[kind] for kind in ("draft", "target"))
    assert 0 < draft.num_bytes["weights"] < target.num_bytes["weights"]


def test_only_experts_that_are_touched_are_read() -> None:
    """By count, in the compiled programs of a CPU: with one row, four of 32."""
    config = er_jax.DecoderConfig(
        vocab_size=256, dim=64, num_layers=2, num_heads=4, num_kv_heads=2,
        hidden_dim=64, num_experts=32, experts_per_token=4, expert_dim=64,
    )  # fmt: skip
    found = plan.plan(
        config, presets.target_of("cpu"), slots=1, max_length=64, gammas=(2,),
        drafter=er_jax.DrafterConfig(window=None),
    )  # fmt: skip
    traffic = found.programs[0].traffic
    assert traffic is not None
    for kind, tokens, total in (("target", 3, 0), ("draft", 1, 1)):
        moved = traffic.passes[kind].num_bytes["weights"]  # type: ignore[index]
        least = traffic.sizes.weights[total]
        assert least == pytest.approx(moved, rel=0.1)
        every = moved + found.expert_bytes[total] * (28 / 32) ** tokens
        assert every == pytest.approx(
            (found.params_bytes - 4 * 256 * 64, found.draft_bytes)[total], rel=0.1
        )
    assert found.read_bytes[0] < 0.2 * found.params_bytes


def test_entries_behind_a_window_are_not_kept() -> None:
    config = er_jax.DecoderConfig(
        vocab_size=64, dim=16, num_layers=3, num_heads=2, num_kv_heads=1,
        hidden_dim=16, window=16, global_layers=(1,),
    )  # fmt: skip
    found = plan.plan(
        config, presets.target_of("cpu"), slots=2, max_length=512, gammas=(0,),
    )  # fmt: skip
    traffic = found.programs[0].traffic
    assert traffic is not None
    entry = 2 * 8 * 4  # of a layer: keys and values, float32
    assert traffic.sizes.cache == (2 * entry * (512 + 2 * 48),) * 2
    assert traffic.sizes.entry == 2 * entry * 3
    read = traffic.target.num_bytes["cache"]
    assert read == pytest.approx(traffic.sizes.cache[0], rel=0.1)


def test_each_gamma_is_compiled_once() -> None:
    found = made(gammas=(0, 0))
    assert [count.program.gamma for count in found.programs] == [0]


def test_presets_are_of_their_published_size() -> None:
    """Parameters in 10^9, from the model cards."""
    billions = {
        "qwen2.5-7b": 7.62, "qwen2.5-14b": 14.77, "llama-3.1-8b": 8.03,
        "llama-3.1-70b": 70.55,
        "qwen3-0.6b": 0.60, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19,
        "qwen3-14b": 14.77, "qwen3-32b": 32.76, "qwen3-30b-a3b": 30.53,
        "mistral-7b-v0.1": 7.24, "gemma-3-270m": 0.268, "gemma-3-1b": 1.0,
        # The text models of the last three: their towers for images have 0.42.
        "gemma-3-4b": 3.88, "gemma-3-12b": 11.77, "gemma-3-27b": 27.01,
    }  # fmt: skip
    assert billions.keys() == presets.PRESETS.keys()
    for name, config in presets.PRESETS.items():
        shapes = jax.eval_shape(er_jax.Decoder(config).init, jax.random.key(0))
        size = sum(x.size for x in jax.tree.leaves(shapes)) / 1e9
        assert size == pytest.approx(billions[name], abs=0.006), name
