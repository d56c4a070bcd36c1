"""What stands between Tunix and a rollout, without Tunix: plain arrays and threads.

tests/test_tunix_installed.py runs Tunix itself, where it is installed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import er_jax
from er_jax.drafter import TiedEmbedding
from er_jax.engine.adoption import Adoption, run_logits
from er_jax.integrations import tunix_calls
from er_jax.integrations.batching import Batcher, Call
from er_jax.integrations.tunix_calls import GenerateCall, Noise
from er_jax.integrations.tunix_families import family_of
from er_jax.integrations.tunix_sampling import CallSampler
from er_jax.integrations.tunix_weights import Weights, placed
from er_jax.mesh.layout import rollout_mesh
from er_jax.mesh.rules import MeshAxes
from er_jax.result import Completion
from er_jax.rotary import LinearScaling
from tests.small import small_policy

pytestmark = pytest.mark.usefixtures("unoptimized_module")

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 60

# -- weights ---------------------------------------------------------------------------

V, DIM, HEADS, KV, SIZE, HIDDEN = 24, 8, 4, 2, 6, 10
CONFIG = SimpleNamespace(rope_theta=1e6, norm_eps=1e-6)


def arrays_of(family: str, *, tied: bool, lora: bool = False) -> dict[str, jax.Array]:
    """Return arrays with Tunix's paths and shapes; every entry is another number."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedder/input_embedding": (V, DIM),
        "final_norm/w": (DIM,),
    }
    if not tied:
        shapes["lm_head/w"] = (DIM, V)
    for i in range(2):
        at = f"layers/{i}"
        shapes |= {
            f"{at}/input_layernorm/w": (DIM,),
            f"{at}/post_attention_layernorm/w": (DIM,),
            f"{at}/attn/q_proj/w": (DIM, HEADS, SIZE),
            f"{at}/attn/k_proj/w": (DIM, KV, SIZE),
            f"{at}/attn/v_proj/w": (DIM, KV, SIZE),
            f"{at}/attn/o_proj/w": (HEADS, SIZE, DIM),
            f"{at}/mlp/gate_proj/kernel": (DIM, HIDDEN),
            f"{at}/mlp/up_proj/kernel": (DIM, HIDDEN),
            f"{at}/mlp/down_proj/kernel": (HIDDEN, DIM),
        }
        if family == "Qwen2":
            shapes[f"{at}/attn/q_bias"] = (HEADS * SIZE,)
            shapes |= {f"{at}/attn/{x}_bias": (KV * SIZE,) for x in "kv"}
        if family == "Qwen3":
            shapes |= {f"{at}/attn/{x}_norm/w": (SIZE,) for x in "qk"}
        if lora:
            shapes[f"{at}/attn/q_proj/w_lora_a"] = (DIM, 2)
            shapes[f"{at}/attn/q_proj/w_lora_b"] = (2, HEADS, SIZE)
            shapes[f"{at}/attn/o_proj/w_lora_a"] = (HEADS, SIZE, 2)
            shapes[f"{at}/attn/o_proj/w_lora_b"] = (2, DIM)
            shapes[f"{at}/mlp/down_proj/kernel_lora_a"] = (HIDDEN, 2)
            shapes[f"{at}/mlp/down_proj/kernel_lora_b"] = (2, DIM)
    return drawn(shapes)


def gemma3(**changes: Any) -> Any:
    """Return what Tunix's configuration of a Gemma 3 has that no array shows."""
    fields: dict[str, Any] = dict(
        embed_dim=DIM, num_heads=HEADS, sliding_window_size=5,
        local_base_frequency=10_000, global_base_frequency=1_000_000,
        local_scale_factor=1.0, global_scale_factor=8.0,
        query_pre_attn_norm=SimpleNamespace(name="BY_ONE_OVER_SQRT_HEAD_DIM"),
    )  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def gemma3_arrays(
    kv: int = KV, layers: int = 2, lora: bool = False
) -> dict[str, jax.Array]:
    """Return arrays with the paths and shapes of Tunix's Gemma 3."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedder/input_embedding": (V, DIM),
        "final_norm/scale": (DIM,),
    }
    for i in range(layers):
        at = f"layers/{i}"
        for name in ("pre_attention", "post_attention", "pre_ffw", "post_ffw"):
            shapes[f"{at}/{name}_norm/scale"] = (DIM,)
        shapes |= {f"{at}/attn/_{x}_norm/scale": (SIZE,) for x in ("query", "key")}
        shapes[f"{at}/attn/attn_vec_einsum/w"] = (HEADS, SIZE, DIM)
        shapes |= {f"{at}/mlp/{x}_proj/kernel": (DIM, HIDDEN) for x in ("gate", "up")}
        shapes[f"{at}/mlp/down_proj/kernel"] = (HIDDEN, DIM)
        if kv == HEADS:
            shapes[f"{at}/attn/qkv_einsum/w"] = (3, HEADS, DIM, SIZE)
        else:
            shapes[f"{at}/attn/q_einsum/w"] = (HEADS, DIM, SIZE)
            shapes[f"{at}/attn/kv_einsum/w"] = (2, kv, DIM, SIZE)
        if lora:
            shapes[f"{at}/attn/q_einsum/w_lora_a"] = (DIM, 2)
            shapes[f"{at}/attn/q_einsum/w_lora_b"] = (2, HEADS, SIZE)
            shapes[f"{at}/attn/kv_einsum/w_lora_a"] = (DIM, 2)
            shapes[f"{at}/attn/kv_einsum/w_lora_b"] = (2, 2, kv, SIZE)
    return drawn(shapes)


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("kv", [1, KV, HEADS])
def test_every_array_of_gemma3_has_its_place(kv: int) -> None:
    """Compared by hand: their entry [.., h, d, i] is our row d, column h * D + i."""
    arrays = gemma3_arrays(kv)
    weights = Weights.of("Gemma3", gemma3(), arrays)
    params = weights.convert(arrays)
    wanted = jax.eval_shape(weights.policy.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)
    at, layer = "layers/1/attn", params["layers"][1]
    if kv == HEADS:
        q, k, v = arrays[f"{at}/qkv_einsum/w"]
    else:
        q, (k, v) = arrays[f"{at}/q_einsum/w"], arrays[f"{at}/kv_einsum/w"]
    for name, theirs in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
        for h, d, i in ((0, 3, 5), (len(theirs) - 1, 7, 1)):
            assert layer[name][d, h * SIZE + i] == theirs[h, d, i], name
    assert (
        layer["o_proj"][2 * SIZE + 5, 3] == arrays[f"{at}/attn_vec_einsum/w"][2, 5, 3]
    )
    for ours, theirs in {
        "attn_norm": "pre_attention_norm/scale",
        "attn_out_norm": "post_attention_norm/scale",
        "mlp_norm": "pre_ffw_norm/scale",
        "mlp_out_norm": "post_ffw_norm/scale",
        "q_norm": "attn/_query_norm/scale",
        "k_norm": "attn/_key_norm/scale",
        "gate_proj": "mlp/gate_proj/kernel",
        "up_proj": "mlp/up_proj/kernel",
        "down_proj": "mlp/down_proj/kernel",
    }.items():
        np.testing.assert_array_equal(layer[ours], arrays[f"layers/1/{theirs}"])
    np.testing.assert_array_equal(params["final_norm"], arrays["final_norm/scale"])
    assert isinstance(params["embed"], TiedEmbedding) and "lm_head" not in params
    assert weights.policy.config.num_kv_heads == kv


def test_gemma3_is_set_as_its_configuration_says() -> None:
    arrays = jax.eval_shape(lambda: gemma3_arrays(layers=13))

    def of(**changes: Any) -> er_jax.DecoderConfig:
        return Weights.of("Gemma3", gemma3(**changes), arrays).policy.config

    config = of()
    assert config == er_jax.DecoderConfig(
        vocab_size=V, dim=DIM, num_layers=13, num_heads=HEADS, num_kv_heads=KV,
        head_dim=SIZE, hidden_dim=HIDDEN, rope_theta=1e6,
        rope_scaling=LinearScaling(8.0), local_rope_theta=1e4, qk_norm=True,
        tied_embeddings=True, activation="gelu", norm_offset=True, post_norms=True,
        scaled_embeddings=True, window=5, global_layers=(5, 11),
    )  # fmt: skip
    assert of(global_scale_factor=1.0).rope_scaling is None
    kind = SimpleNamespace(name="BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS")
    assert of(query_pre_attn_norm=kind).query_scalar == DIM // HEADS
    with pytest.raises(ValueError, match=r"local_scale_factor=2\.0 is not supported"):
        of(local_scale_factor=2.0)
    images = {**arrays, "vision_encoder/embedding/kernel": arrays["final_norm/scale"]}
    with pytest.raises(ValueError, match="holds vision_encoder/embedding/kernel, for"):
        Weights.of("Gemma3", gemma3(), images)


def test_lora_parameters_of_stacked_weights_are_merged() -> None:
    arrays = gemma3_arrays(lora=True)
    weights = Weights.of("Gemma3", gemma3(), arrays, lora_scale=0.5)
    layer = weights.convert(arrays)["layers"][1]

    def parts(name: str) -> list[np.ndarray]:
        ends = ("", "_lora_a", "_lora_b")
        return [np.asarray(arrays[f"layers/1/attn/{name}/w{x}"]) for x in ends]

    w, a, b = parts("q_einsum")
    wanted = w + 0.5 * np.einsum("dr,rhi->hdi", a, b)
    np.testing.assert_allclose(
        layer["q_proj"], wanted.swapaxes(0, 1).reshape(DIM, -1), rtol=1e-5, atol=1e-6
    )
    w, a, b = parts("kv_einsum")
    for name, wanted in zip(
        "kv", w + 0.5 * np.einsum("dr,rchi->chdi", a, b), strict=True
    ):
        wanted = wanted.swapaxes(0, 1).reshape(DIM, -1)
        np.testing.assert_allclose(layer[f"{name}_proj"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["Llama3", "Qwen2", "Qwen3"])
def test_every_array_has_its_place(family: str) -> None:
    """Compared with the layout by hand: our column h * D + i is their entry [h, i]."""
    arrays = arrays_of(family, tied=False)
    weights = Weights.of(family, CONFIG, arrays)
    params = weights.convert(arrays)
    wanted = jax.eval_shape(weights.policy.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)
    their_q, their_o = (arrays[f"layers/1/attn/{x}_proj/w"] for x in "qo")
    layer = params["layers"][1]
    assert layer["q_proj"][3, 2 * SIZE + 5] == their_q[3, 2, 5]
    assert layer["o_proj"][2 * SIZE + 5, 3] == their_o[2, 5, 3]
    assert layer["v_proj"][3, SIZE + 1] == arrays["layers/1/attn/v_proj/w"][3, 1, 1]
    same = {
        "attn_norm": "input_layernorm/w",
        "mlp_norm": "post_attention_layernorm/w",
        "gate_proj": "mlp/gate_proj/kernel",
        "up_proj": "mlp/up_proj/kernel",
        "down_proj": "mlp/down_proj/kernel",
        **({f"{x}_bias": f"attn/{x}_bias" for x in "qkv"} if family == "Qwen2" else {}),
        **(
            {f"{x}_norm": f"attn/{x}_norm/w" for x in "qk"} if family == "Qwen3" else {}
        ),
    }
    for ours, theirs in same.items():
        np.testing.assert_array_equal(layer[ours], arrays[f"layers/1/{theirs}"])
    np.testing.assert_array_equal(params["lm_head"], arrays["lm_head/w"])
    config = weights.policy.config
    assert (config.num_kv_heads, config.head_size, config.hidden_dim) == (
        KV,
        SIZE,
        HIDDEN,
    )
    assert (config.qkv_bias, config.qk_norm) == (family == "Qwen2", family == "Qwen3")


def test_a_tied_model_has_a_tied_embedding() -> None:
    arrays = arrays_of("Qwen3", tied=True)
    weights = Weights.of("Qwen3", CONFIG, arrays)
    params = weights.convert(arrays)
    assert isinstance(params["embed"], TiedEmbedding) and "lm_head" not in params
    assert weights.policy.config.tied_embeddings


def test_adopted_weights_are_shared_and_nothing_passes_the_host() -> None:
    arrays = arrays_of("Qwen3", tied=True)
    weights = Weights.of("Qwen3", CONFIG, arrays)
    drafter = er_jax.DrafterConfig()
    drafters = (drafter, er_jax.DrafterConfig(bits=4))
    adopt = Adoption(weights.convert, weights.kept(arrays), drafters)
    with jax.transfer_guard("disallow"):
        params = adopt(arrays)
    # All but the four attention weights of each layer.
    assert params.policy["embed"].table is arrays["embedder/input_embedding"]
    layer = params.policy["layers"][0]
    assert layer["up_proj"] is arrays["layers/0/mlp/up_proj/kernel"]
    assert len(jax.tree.leaves(params.policy)) == len(arrays)
    wanted = jax.jit(lambda x: er_jax.attach_draft(weights.convert(x), drafters))(
        arrays
    )
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    bfloat16 = Weights.of("Qwen3", CONFIG, arrays, dtype=jnp.bfloat16)
    assert set(jax.tree.leaves(bfloat16.kept(arrays))) == {""}
    leaves = jax.tree.leaves(jax.eval_shape(bfloat16.convert, arrays))
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}


def test_lora_parameters_are_merged_or_refused_by_name() -> None:
    arrays = arrays_of("Llama3", tied=False, lora=True)
    name = "layers/0/attn/o_proj/w_lora_a"
    with pytest.raises(ValueError, match=rf"{name} first; .* lora_scale=alpha / rank"):
        Weights.of("Llama3", CONFIG, arrays)
    weights = Weights.of("Llama3", CONFIG, arrays, lora_scale=0.5)
    layer = weights.convert(arrays)["layers"][1]
    for name, shape in (
        ("attn/q_proj/w", (DIM, -1)),
        ("attn/o_proj/w", (-1, DIM)),
        ("mlp/down_proj/kernel", (-1, DIM)),
    ):
        w, a, b = (
            np.asarray(arrays[f"layers/1/{name}{part}"], np.float64)
            for part in ("", "_lora_a", "_lora_b")
        )
        wanted = (w + 0.5 * np.tensordot(a, b, 1)).reshape(shape)
        found = layer[name.split("/")[1]]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    kept = jax.tree.leaves(weights.kept(arrays))
    assert "layers/0/mlp/up_proj/kernel" in kept
    assert not any("down_proj" in theirs for theirs in kept)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"layers/0/mlp/router/kernel": (2, 2)},
            "layers/0/mlp/router/kernel, for which",
        ),
        ({"layers/1/mlp/up_proj/kernel": None}, "lacks layers/1/mlp/up_proj/kernel"),
    ],
)
def test_other_arrays_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    arrays: dict[str, Any] = arrays_of("Qwen3", tied=True)
    for name, shape in change.items():
        if shape is None:
            del arrays[name]
        else:
            arrays[name] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=words):
        Weights.of("Qwen3", CONFIG, arrays)


def test_other_models_and_types_are_refused() -> None:
    assert family_of(["MyQwen", "Qwen3", "Module"]) == "Qwen3"
    with pytest.raises(
        ValueError, match=r"is a Gemma4; .* samples Llama3, Qwen2, Qwen3, Gemma3 and"
    ):
        family_of(["Gemma4", "Module"])
    with pytest.raises(ValueError, match="data_type=float16 is not supported"):
        Weights.of(
            "Qwen3", CONFIG, arrays_of("Qwen3", tied=True), dtype=jnp.dtype("float16")
        )


@pytest.mark.parametrize("rows_axis", ["data", "fsdp"])
def test_shardings_are_those_of_the_arrays(rows_axis: str) -> None:
    arrays = arrays_of("Qwen3", tied=True)
    theirs = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp"))
    specs = {
        "q_proj/w": ("fsdp", "tp", None),
        "o_proj/w": ("tp", None, "fsdp"),
        "up_proj/kernel": ("fsdp", "tp"),
        "k_proj/w": ("fsdp", None, "tp"),  # heads whole, their entries spread
        "input_layernorm/w": ("tp",),
    }

    def sharding(name: str) -> NamedSharding:
        found = next((s for end, s in specs.items() if name.endswith(end)), ())
        return NamedSharding(theirs, PartitionSpec(*found))

    arrays = {name: jax.device_put(x, sharding(name)) for name, x in arrays.items()}
    axes = MeshAxes(
        data=rows_axis, fsdp="none" if rows_axis == "fsdp" else "fsdp", model="tp"
    )
    mesh = rollout_mesh(theirs, axes)
    weights = Weights.of("Qwen3", CONFIG, arrays)
    drafters = (er_jax.DrafterConfig(), er_jax.DrafterConfig(bits=4))
    shardings = weights.shardings(arrays, mesh, axes, drafters)
    kept = weights.kept(arrays, shardings.policy)
    params = Adoption(weights.convert, kept, drafters, shardings)(arrays)
    layer = params.policy["layers"][0]
    other = None if rows_axis == "fsdp" else "fsdp"  # nothing is sharded like rows

    def spec(array: jax.Array) -> tuple[Any, ...]:
        assert isinstance(array.sharding, NamedSharding)
        found = array.sharding.spec
        return (*found, *[None] * (array.ndim - len(found)))

    assert spec(layer["q_proj"]) == (other, "model")
    assert spec(layer["k_proj"]) == (other, "model")
    assert spec(layer["o_proj"]) == ("model", other)
    assert spec(layer["attn_norm"]) == (None,)
    is_kept = layer["up_proj"] is arrays["layers/0/mlp/up_proj/kernel"]
    assert is_kept == (rows_axis == "data")
    for draft in params.drafts:
        codes = draft["layers"][0]["q_proj"].codes  # [out, in]
        assert spec(codes) == ("model", other)
    wanted = weights.convert(jax.device_get(arrays))
    jax.tree.map(np.testing.assert_array_equal, params.policy, wanted)


def test_arrays_elsewhere_are_sent_to_the_rollouts_devices() -> None:
    devices = jax.devices()
    there = Mesh(np.array(devices[:2]).reshape(2, 1), ("fsdp", "tp"))
    here = Mesh(np.array(devices[2:4]).reshape(1, 2), ("fsdp", "tp"))
    spec = PartitionSpec("fsdp", "tp")
    array = jax.device_put(jnp.ones((4, 6)), NamedSharding(there, spec))
    found = placed({"a": array}, here, devices[0])["a"]
    assert found.sharding == NamedSharding(here, spec)
    assert placed({"a": found}, here, devices[0])["a"] is found
    assert placed({"a": array}, None, devices[5])["a"].devices() == {devices[5]}


# -- scores ----------------------------------------------------------------------------


def test_scores_are_those_of_the_text_without_padding() -> None:
    """Pad ids, wherever they are, are as if they were not there."""
    policy = small_policy("tunix scores")
    params = policy.init(jax.random.key(0))
    text, temperature = [5, 7, 3, 9, 2, 4], 0.7
    logits = np.asarray(run_logits(policy, params, jnp.asarray(text)), np.float64)
    logprobs = jax.nn.log_softmax(logits / temperature)
    wanted = [float(logprobs[i - 1, text[i]]) for i in range(2, 6)]
    config = er_jax.RolloutConfig(max_new_tokens=40, temperature=0.7, control="ar")

    def scores(prompts: Any, completions: Any, pad_id: int = 0) -> jax.Array:
        ids, completion_ids = jnp.asarray(prompts), jnp.asarray(completions)
        return tunix_calls.completion_logprobs(
            policy,
            er_jax.PolicyParams(policy=params, draft=None),
            (ids, ids != pad_id),
            (completion_ids, completion_ids != pad_id),
            config,
        )

    found = scores([[0, 5, 0, 7], [1, 2, 3, 4]], [[3, 9, 0, 2, 4, 0], [6, 5, 8] * 2])
    kept = [found[0, i] for i in (0, 1, 3, 4)]
    np.testing.assert_allclose(kept, wanted, atol=1e-5)
    assert found[0, 2] == found[0, 5] == 0
    out = er_jax.rollout(policy, params, [[5, 7]], key=jax.random.key(1), config=config)
    found = scores(out.prompt_ids, out.completion_ids, pad_id=-1)
    np.testing.assert_allclose(found, out.logprobs, atol=1e-5)


# -- settings, prompts, outputs --------------------------------------------------------


def asked(**changes: Any) -> Any:
    """Return what Tunix's `RolloutConfig` has, with its defaults."""
    fields: dict[str, Any] = dict(
        max_tokens_to_generate=8, temperature=0.9, top_p=1.0, top_k=None, seed=None,
        max_prompt_length=6, eos_tokens=None, return_logprobs=False, data_type=None,
    )  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def settings(**changes: Any) -> er_jax.RolloutConfig:
    return tunix_calls.settings_of(asked(**changes), eos_id=2, pad_id=1, options={})


def test_settings_mean_the_same() -> None:
    assert settings() == er_jax.RolloutConfig(
        max_new_tokens=8, temperature=0.9, stop_token_ids=(2, 1), pad_id=1
    )
    for off in (None, -1, 0):
        assert settings(top_k=off).top_k == 0
    assert settings(top_k=5).top_k == 5
    assert settings(top_p=None).top_p == 1.0
    assert settings(temperature=0.0).temperature == 0.0
    assert settings(eos_tokens=[7, 8]).stop_token_ids == (7, 8, 1)
    assert settings(eos_tokens=[]).stop_token_ids == (2, 1)
    with pytest.raises(ValueError, match="top_k=-2"):
        settings(top_k=-2)
    options = dict(control="ar", max_slots=3)
    found = tunix_calls.settings_of(asked(), eos_id=2, pad_id=2, options=options)
    assert (found.control, found.max_slots, found.stop_token_ids) == ("ar", 3, (2,))
    with pytest.raises(ValueError, match="temperature=1 is no option of ErJaxRollout"):
        tunix_calls.checked_options({"temperature": 1})
    names = {field.name for field in dataclasses.fields(er_jax.RolloutConfig)}
    assert set(tunix_calls.OPTIONS) <= names


def test_seeds_are_keys() -> None:
    wanted = jax.random.key(3)
    for seed in (3, np.int32(3), jnp.int32(3), wanted):
        found = tunix_calls.key_of(seed)
        assert found is not None and found == wanted
    raw = tunix_calls.key_of(jax.random.PRNGKey(3))
    np.testing.assert_array_equal(raw, jax.random.key_data(wanted))
    assert tunix_calls.key_of(None) is None
    with pytest.raises(ValueError, match="seed='x' is neither"):
        tunix_calls.key_of("x")


class Letters:
    """Ids from 3 on for the letters; 0 begins a text, 1 pads, 2 ends."""

    def __init__(self, bos: int | None = 0) -> None:
        self.bos = bos

    def encode(self, text: str) -> list[int]:
        return [1 if letter == "_" else ord(letter) - 94 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i + 94) if i > 2 else f"<{i}>" for i in ids)

    def bos_id(self) -> int | None:
        return self.bos

    def pad_id(self) -> int:
        return 1

    def dedup_bos_ids(self, ids: list[int]) -> list[int]:
        while len(ids) > 1 and ids[0] == ids[1] == self.bos:
            ids = ids[1:]
        return ids


def test_prompts_are_tokenized_and_padded_as_in_tunix() -> None:
    assert tunix_calls.tokenized("ab", Letters(bos=9)) == [9, 3, 4]
    assert tunix_calls.tokenized("gab", Letters(bos=9)) == [9, 3, 4]  # "g" is 9
    for none in (0, None):
        assert tunix_calls.tokenized("a_b", Letters(bos=none)) == [3, 4]
    found = tunix_calls.left_padded([[3, 4], [5]], 4, 1)
    np.testing.assert_array_equal(found, [[1, 1, 3, 4], [1, 1, 1, 5]])
    assert found.dtype == np.int32
    # A longer prompt is kept whole.
    assert tunix_calls.left_padded([[3] * 5], 4, 1).shape == (1, 8)


def test_a_call_gets_its_completions_cut_at_its_limit() -> None:
    call = GenerateCall([[3], [4]], settings(max_tokens_to_generate=2), None)

    def completion(*ids: int, reason: str = "stop") -> Completion:
        return Completion(
            np.array(ids, np.int32), np.ones(len(ids), np.float32), reason
        )

    assert not call.put(1, completion(5, 6, 2))
    assert not call.put(1, completion(7))  # there already
    assert call.put(0, completion(5, 2))
    first, second = call.completions
    assert first is not None and second is not None
    assert second.token_ids.tolist() == [5, 6] and second.finish_reason == "length"
    assert len(second.logprobs) == 2
    assert tunix_calls.text_of(first, Letters()) == "c"
    assert tunix_calls.text_of(second, Letters()) == "cd"


def test_noise_follows_from_what_is_asked() -> None:
    noise, same, other = Noise(5), Noise(5), Noise(6)
    ids = noise.ask([[1, 2], [3], [1, 2]])
    assert len(set(ids)) == 3 and ids[2] == (ids[0] + 1) % 2**31
    # Another order, in other calls: all together have the same ids.
    rest = [same.ask([prompt])[0] for prompt in ([1, 2], [1, 2], [3])]
    assert sorted(rest) == sorted(ids)
    assert noise.key == same.key != other.key
    before = noise.key
    noise.advance()
    assert noise.key != before  # a new step has noise of its own
    assert noise.ask([[1, 2]]) == ids[:1]
    with pytest.raises(ValueError, match="seed=-1"):
        Noise(-1)


def test_ids_that_meet_are_sampled_apart() -> None:
    assert tunix_calls.rollouts_of([4, 5, 6]) == [[0, 1, 2]]
    assert tunix_calls.rollouts_of([4, 5, 4, 4, 5, 7]) == [[0, 1, 5], [2, 4], [3]]


def test_batches_are_of_one_kind_and_few_limits() -> None:
    def call(key: Any = None, **changes: Any) -> GenerateCall:
        return GenerateCall([[3]], settings(**changes), key)

    short, long = call(), call(max_tokens_to_generate=30)
    warm, seeded = call(temperature=2.0), call(key=jax.random.key(0))
    assert tunix_calls.batch_of([short, warm, long, seeded]) == [short, long]
    assert tunix_calls.batch_of([warm, short, seeded]) == [warm]
    assert tunix_calls.batch_of([seeded, short]) == [seeded]

    def limit(*limits: int) -> int:
        calls = [call(max_tokens_to_generate=number) for number in limits]
        return tunix_calls.shared_limit(calls, 100)

    assert [limit(n) for n in (3, 9, 33, 65, 100, 130)] == [4, 16, 64, 100, 100, 130]
    assert limit(3, 40, 7) == 64


# -- threads ---------------------------------------------------------------------------


def together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        return [f.result(WAIT_S) for f in [pool.submit(f) for f in functions]]


class Counted(Call):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def test_calls_that_wait_are_run_together() -> None:
    batches: list[list[int]] = []
    may_go_on = threading.Event()

    def run(batch: list[Counted]) -> None:
        batches.append([call.number for call in batch])
        if len(batches) == 1:
            assert may_go_on.wait(WAIT_S)
        for call in batch:
            batcher.finish(call)

    batcher: Batcher[Counted] = Batcher(lambda calls: calls, run, 0.0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(batcher.submit, Counted(0))
        while not batches:
            time.sleep(0.001)
        rest = [pool.submit(batcher.submit, Counted(i)) for i in (1, 2, 3)]
        while len(batcher._waiting) < 3:
            time.sleep(0.001)
        may_go_on.set()
        for future in [first, *rest]:
            future.result(WAIT_S)
    assert batches[0] == [0] and sorted(batches[1]) == [1, 2, 3]


def test_a_call_waits_for_others_and_no_longer() -> None:
    sizes: list[int] = []

    def run(batch: list[Counted]) -> None:
        sizes.append(len(batch))
        for call in batch:
            batcher.finish(call)

    batcher: Batcher[Counted] = Batcher(lambda calls: calls, run, 0.5)
    together([functools.partial(batcher.submit, Counted(i)) for i in range(5)])
    start = time.monotonic()
    batcher.submit(Counted(9))
    assert time.monotonic() - start >= 0.4
    assert sizes == [5, 1]


def test_a_thread_goes_on_before_its_batch_is_over() -> None:
    is_back = threading.Event()

    def run(batch: list[Counted]) -> None:
        early = next(call for call in batch if call.number == 1)
        batcher.finish(early)
        assert is_back.wait(WAIT_S)  # while the other call still runs
        batcher.finish(next(call for call in batch if call.number == 0))

    def later() -> None:
        while not batcher._waiting:
            time.sleep(0.001)
        batcher.submit(Counted(1))
        is_back.set()

    batcher: Batcher[Counted] = Batcher(lambda calls: calls, run, 0.3)
    together([lambda: batcher.submit(Counted(0)), later])


def test_what_fails_fails_for_every_call_of_the_batch() -> None:
    def run(batch: list[Counted]) -> None:
        batcher.finish(batch[0])
        raise RuntimeError("no more memory")

    def outcome(number: int) -> str:
        try:
            batcher.submit(Counted(number))
        except RuntimeError as error:
            return str(error)
        return "done"

    batcher: Batcher[Counted] = Batcher(lambda calls: calls, run, 0.3)
    found = together([functools.partial(outcome, i) for i in range(3)])
    assert sorted(found) == ["done", "no more memory", "no more memory"]
    assert outcome(0) == "done"  # the next batch runs

    def interrupted(batch: list[Counted]) -> None:
        raise KeyboardInterrupt

    stopped: Batcher[Counted] = Batcher(lambda calls: calls, interrupted, 0.0)
    with pytest.raises(KeyboardInterrupt):
        stopped.submit(Counted(0))
    assert stopped._waiting == []


# -- sampling --------------------------------------------------------------------------


def sampler_of(name: str, **also: Any) -> tuple[CallSampler, er_jax.Decoder, Any]:
    policy = small_policy(name)
    params = policy.init(jax.random.key(0))
    sampler = CallSampler(
        policy,
        er_jax.Controller("ar"),
        **{
            **dict(seed=0, max_wait_s=0.2, usual_limit=8, device=jax.devices()[0]),
            **also,
        },
    )
    sampler.update(lambda: er_jax.PolicyParams(policy=params, draft=None))
    return sampler, policy, params


PROMPTS = [[3, 4], [3, 4], [5], [6, 7, 8], [3, 4], [9]]
PLAIN = dataclasses.replace(settings(temperature=1.0), control="ar")


def sampled(
    sampler: CallSampler, prompts: list[list[int]], key: Any = None
) -> list[Any]:
    done = sampler.sample(GenerateCall(prompts, PLAIN, key))
    return [
        (tuple(p), *c.token_ids.tolist()) for p, c in zip(prompts, done, strict=True)
    ]


def test_threads_get_what_one_call_gets() -> None:
    rollouts: list[er_jax.Rollout] = []
    sampler, _, _ = sampler_of("tunix calls", on_rollout=rollouts.append)
    one = sampled(sampler, PROMPTS)
    assert len(rollouts) == 1 and len(set(one)) == len(one)
    more = sampled(sampler, PROMPTS)
    assert set(more).isdisjoint(one)  # nothing repeats
    again, _, _ = sampler_of("tunix calls", on_rollout=rollouts.append)
    rollouts.clear()
    calls = [functools.partial(sampled, again, [p]) for p in reversed(PROMPTS)]
    found = together(calls)
    assert len(rollouts) == 1 and len(rollouts[0].lengths) == len(PROMPTS)
    assert sorted(row for rows in found for row in rows) == sorted(one)
    other, _, _ = sampler_of("tunix calls", seed=1)
    assert set(sampled(other, PROMPTS)).isdisjoint(one)


def test_a_seed_samples_what_the_library_does() -> None:
    sampler, policy, params = sampler_of("tunix calls")
    key = jax.random.key(7)
    found = sampled(sampler, PROMPTS, key)
    assert sampled(sampler, PROMPTS, key) == found
    out = er_jax.rollout(policy, params, PROMPTS, key=key, config=PLAIN)
    wanted = [
        (tuple(p), *row[:n].tolist())
        for p, row, n in zip(PROMPTS, out.completion_ids, out.lengths, strict=True)
    ]
    assert found == wanted


def test_new_weights_have_new_noise_and_a_failed_update_is_said() -> None:
    sampler, _, params = sampler_of("tunix calls")
    before = sampled(sampler, PROMPTS)
    same = er_jax.PolicyParams(policy=params, draft=None)
    sampler.update(lambda: same)
    assert set(sampled(sampler, PROMPTS)).isdisjoint(before)

    def fail() -> Any:
        raise MemoryError

    with pytest.raises(MemoryError):
        sampler.update(fail)
    with pytest.raises(RuntimeError, match="the last update of the weights failed"):
        sampled(sampler, PROMPTS)
    sampler.update(lambda: same)
    assert sampled(sampler, PROMPTS)
    with pytest.raises(ValueError, match=r"prompts\[0\] holds token id 99"):
        sampled(sampler, [[99]])


# -- without Tunix ---------------------------------------------------------------------


def test_a_missing_tunix_is_named_with_its_remedy() -> None:
    program = (
        "import sys; sys.modules['tunix'] = None\n"
        "import er_jax\n"
        "try:\n    import er_jax.integrations.tunix\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "install it with: pip install 'er-jax[tunix]'" in done.stdout
