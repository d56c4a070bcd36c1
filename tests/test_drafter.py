"""The draft: codes bit for bit, products, buffers, shardings, checks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from er_jax import drafter, products
from er_jax.drafter import DrafterConfig, PolicyParams, QuantizedWeight, TiedEmbedding
from er_jax.engine import windows

pytestmark = pytest.mark.usefixtures("unoptimized_module")

ROOT = Path(__file__).resolve().parents[1]

FORMATS = [
    DrafterConfig(bits=bits, group_size=group)
    for bits in (8, 4)
    for group in (None, 32, 8)
]


def config_id(config: DrafterConfig) -> str:
    return f"w{config.bits}g{config.group_size}a{config.act_bits}"


quantize = jax.jit(er_jax.quantize, static_argnums=1)
dot = jax.jit(er_jax.dot, static_argnames="out_dtype")


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    draw = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(draw.astype(np.float32)).astype(dtype)


def reference_codes(
    weight: jax.Array, bits: int, group: int | None
) -> tuple[jax.Array, jax.Array]:
    """Round to nearest: codes `[out, in]` or `[out, in/g, g]`, and their scales."""
    num_in, num_out = weight.shape
    weight = weight.astype(jnp.float32).T
    if group is not None:
        weight = weight.reshape(num_out, num_in // group, group)
    largest = jnp.float32(2 ** (bits - 1) - 1)
    peak = jnp.max(jnp.abs(weight), axis=-1, keepdims=True)
    scale = jnp.where(peak == 0, jnp.float32(1), peak) / largest
    codes = jnp.round(weight * (jnp.float32(1) / scale))
    return codes, scale


def dense(weight: QuantizedWeight) -> np.ndarray:
    """Return the float64 matrix `[in, out]` that a quantized weight stands for."""
    whole = np.asarray(weight.codes, np.float64) * np.asarray(weight.scale, np.float64)
    return whole.reshape(len(whole), -1).T


def small_decoder(**changes: Any) -> er_jax.Decoder:
    sizes = {
        "vocab_size": 48,
        "dim": 32,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim": 64,
    }
    return er_jax.Decoder(er_jax.DecoderConfig(**(sizes | changes)))


# Codes.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", FORMATS[::2] + FORMATS[3:4], ids=config_id)
def test_codes_are_round_to_nearest_bit_for_bit(
    config: DrafterConfig, dtype: str
) -> None:
    weight = normal(96, 80, dtype=dtype)
    weight = weight.at[:, 3].set(0)  # no peak to divide by
    weight = weight.at[:, 4].mul(1e-6)
    codes, scale = reference_codes(weight, config.bits, config.group_size)
    eager = er_jax.quantize({"w": weight}, config)["w"]
    compiled = jax.jit(er_jax.quantize, static_argnums=1)({"w": weight}, config)["w"]
    for made in (eager, compiled):
        assert made.codes.dtype == (jnp.int8 if config.bits == 8 else jnp.int4)
        assert made.scale.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(made.codes, np.float32), codes)
        np.testing.assert_array_equal(made.scale, scale)
    # The largest weight of a channel is a code of its own: the whole range is used.
    peak = np.abs(np.asarray(eager.codes, np.int32)).max(axis=-1)
    assert set(np.unique(peak)) == {0, 2 ** (config.bits - 1) - 1}


@pytest.mark.parametrize("config", FORMATS, ids=config_id)
def test_rounding_error_is_at_most_half_a_step(config: DrafterConfig) -> None:
    weight = normal(96, 80)
    made = er_jax.quantize({"w": weight}, config)["w"]
    # A step is the value of code 1.
    ones = np.ones(made.codes.shape, np.float32)
    step = dense(made.replace(tensor=made.tensor.replace(qvalue=ones)))
    error = np.abs(dense(made) - np.asarray(weight, np.float64))
    assert (error <= 0.5001 * step).all()
    assert (error > 0.45 * step).any()


def test_what_is_quantized_and_what_is_not() -> None:
    policy = small_decoder(qkv_bias=True, qk_norm=True)
    params = policy.init(jax.random.key(0))
    params["layers"][0]["norm_matrix"] = jnp.ones((4, 4))  # skipped by its name
    draft = er_jax.quantize(params, DrafterConfig())
    flat = jax.tree_util.tree_leaves_with_path(
        draft, is_leaf=lambda x: isinstance(x, QuantizedWeight)
    )
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
    }
    projections = ("q", "k", "v", "o", "gate", "up", "down")
    expected = {"lm_head"} | {f"layers/0/{name}_proj" for name in projections}
    made = {name for name, leaf in names.items() if isinstance(leaf, QuantizedWeight)}
    assert made == expected
    # Embedding, norms, biases: the very same arrays, not copies.
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in expected:
            assert names[name] is leaf


@pytest.mark.parametrize("group", [None, 8])
def test_the_vocabulary_projection_has_bits_of_its_own(group: int | None) -> None:
    for bits, projection_bits in ((4, 8), (8, 4), (4, None)):
        config = DrafterConfig(
            bits=bits, projection_bits=projection_bits, group_size=group
        )
        for tied in (False, True):
            policy = small_decoder(tied_embeddings=tied)
            draft = er_jax.quantize(policy.init(jax.random.key(0)), config)
            head = draft["embed"].projection if tied else draft["lm_head"]
            assert head.codes.dtype == f"int{projection_bits or bits}"
            assert head.is_grouped == (group is not None)
            for name, leaf in draft["layers"][0].items():
                if isinstance(leaf, QuantizedWeight):
                    assert leaf.codes.dtype == f"int{bits}", name


def test_skip_names_decide() -> None:
    params = {"embed": normal(6, 4), "head": normal(4, 6), "bias": normal(6)}
    draft = er_jax.quantize(params, DrafterConfig(skip=("head",)))
    assert isinstance(draft["embed"], QuantizedWeight)
    assert draft["head"] is params["head"]
    assert draft["bias"] is params["bias"]  # a vector, whatever it is called


def test_tied_embedding_is_projected_quantized_and_looked_up_exactly() -> None:
    policy = small_decoder(tied_embeddings=True)
    params = policy.init(jax.random.key(0))
    draft = er_jax.quantize(params, DrafterConfig())
    table = params["embed"].table
    assert draft["embed"].table is table
    codes, scale = reference_codes(table.T, 8, None)
    np.testing.assert_array_equal(draft["embed"].projection.codes, codes)
    np.testing.assert_array_equal(draft["embed"].projection.scale, scale)
    # And the decoder projects with the codes, not with the table.
    hidden = normal(1, 3, 32)
    rounded = policy.logits(draft, hidden)
    np.testing.assert_array_equal(
        rounded, er_jax.dot(hidden, draft["embed"].projection)
    )
    assert not np.array_equal(rounded, policy.logits(params, hidden))


def test_attach_draft_keeps_no_second_embedding() -> None:
    for tied in (False, True):
        policy = small_decoder(tied_embeddings=tied)
        params = policy.init(jax.random.key(0))
        policy_and_draft = er_jax.attach_draft(params, DrafterConfig())
        assert policy_and_draft.policy is params
        kept = jax.tree.leaves(policy_and_draft.draft)
        assert {leaf.dtype.name for leaf in kept} == {"int8", "float32"}
        floats = sum(leaf.size for leaf in kept if leaf.dtype == jnp.float32)
        # One scale per output channel, and nothing else in floats: 8 matrices.
        assert floats == 32 + 16 + 16 + 32 + 64 + 64 + 32 + 48
        filled = drafter.draft_params(policy_and_draft)
        whole = er_jax.quantize(params, DrafterConfig())
        chex.assert_trees_all_equal_structs(filled, whole)
        jax.tree.map(np.testing.assert_array_equal, filled, whole)


def test_group_size_that_does_not_divide() -> None:
    with pytest.raises(ValueError) as error:
        er_jax.quantize({"deep": {"w": normal(48, 8)}}, DrafterConfig(group_size=32))
    for part in ("group_size=32", "48", "deep/w", "divisor", "DrafterConfig.skip"):
        assert part in str(error.value)


def test_integer_weight() -> None:
    with pytest.raises(ValueError, match=r"table.*int32.*DrafterConfig\.skip"):
        er_jax.quantize({"table": jnp.ones((4, 4), jnp.int32)}, DrafterConfig())


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("bits", 2, "8 or 4"),
        ("bits", "8", "8 or 4"),
        ("projection_bits", 16, "8, 4 or None"),
        ("projection_bits", True, "8, 4 or None"),
        ("group_size", 0, "None"),
        ("act_bits", 4, "8, 16 or 'auto'"),
        ("act_bits", None, "8, 16 or 'auto'"),
    ],
)
def test_wrong_formats(field: str, value: Any, remedy: str) -> None:
    with pytest.raises(ValueError) as error:
        DrafterConfig(**{field: value})
    assert f"{field}={value!r}" in str(error.value)
    assert remedy in str(error.value)


def test_a_nonfinite_weight_does_not_hide() -> None:
    """A NaN in the policy must reach the draft's output, not become a zero."""
    weight = normal(8, 4).at[2, 1].set(jnp.nan)
    out = dot(jnp.ones((2, 8)), quantize({"w": weight}, DrafterConfig())["w"])
    is_nan = np.isnan(np.asarray(out))
    assert is_nan[:, 1].all()
    assert is_nan.sum() == 2


# Products.


def integer_oracle(x: np.ndarray, weight: QuantizedWeight) -> np.ndarray:
    """Quantize each token to 8 bits in float32 and multiply in float64."""
    x32 = x.astype(np.float32)
    peak = np.abs(x32).max(-1, keepdims=True)
    step = np.where(peak == 0, np.float32(1), peak) / np.float32(127)
    return np.round(x32 / step).astype(np.float64) * step @ dense(weight)


@pytest.mark.parametrize("shape", [(1, 32), (1, 1, 32), (5, 32), (2, 3, 32)])
def test_dot_of_a_float_weight(shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape, seed=1), normal(32, 24, seed=2)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    np.testing.assert_allclose(dot(x, weight), exact, rtol=0, atol=2e-5)
    low = dot(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16))
    assert low.shape == exact.shape
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), exact, rtol=0.02, atol=0.1)


def test_dot_sums_bfloat16_in_float32() -> None:
    """257 ones: bfloat16 sums stop at 256."""
    ones = jnp.ones((2, 257), jnp.bfloat16)
    out = dot(ones, jnp.ones((257, 3), jnp.bfloat16), out_dtype=jnp.float32)
    assert out.dtype == jnp.float32
    assert (out == 257).all()


@pytest.mark.parametrize("shape", [(1, 1, 32), (5, 32), (2, 3, 32)])
@pytest.mark.parametrize("act_bits", [8, 16, "auto"])
@pytest.mark.parametrize("config", FORMATS[::2] + FORMATS[3:4], ids=config_id)
def test_dot_of_a_quantized_weight(
    config: DrafterConfig, act_bits: Any, shape: tuple[int, ...]
) -> None:
    config = DrafterConfig(
        bits=config.bits, group_size=config.group_size, act_bits=act_bits
    )
    weight = quantize({"w": normal(32, 24, seed=2)}, config)["w"]
    x = normal(*shape, seed=1)
    x = x.at[..., 0, :].mul(100.0)  # each token has a scale of its own
    out = dot(x, weight)
    assert out.dtype == x.dtype
    plain = np.asarray(x, np.float64) @ dense(weight)
    # On the CPU, where tests run, "auto" takes 8 bits.
    is_integer = act_bits != 16
    expected = integer_oracle(np.asarray(x), weight) if is_integer else plain
    size = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(out - expected) <= 1e-5 * size).all()
    if is_integer:
        assert np.abs(out - plain).max() > 1e-4  # so the two kinds can be told apart
        np.testing.assert_allclose(out, plain, atol=0.05 * size.max())


@pytest.mark.parametrize("shape", [(1, 1, 32), (5, 32), (2, 3, 32)])
def test_codes_may_be_either_factor(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integer sums are exact, so the results are the same bits."""
    weight = quantize({"w": normal(32, 24, seed=2)}, DrafterConfig())["w"]
    x = normal(*shape, seed=1)
    out, programs = [], []
    for size in (32 * 24, 32 * 24 + 1):
        monkeypatch.setattr(products, "CODES_FIRST_SIZE", size)
        # A new function each time, or the first trace would be used again.
        traced = jax.jit(lambda x, w: er_jax.dot(x, w)).trace(x, weight)
        programs.append(str(traced.jaxpr))
        out.append(traced.lower().compile()(x, weight))
    assert programs[0] != programs[1]
    np.testing.assert_array_equal(out[0], out[1])


@pytest.mark.parametrize("group", [None, 8])
def test_dot_keeps_float64(x64: None, group: int | None) -> None:
    config = DrafterConfig(group_size=group, act_bits=16)
    weight = quantize({"w": normal(32, 24).astype(jnp.float64)}, config)["w"]
    x = normal(3, 32, seed=1).astype(jnp.float64)
    out = dot(x, weight)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, np.asarray(x) @ dense(weight), atol=1e-12)


@pytest.mark.parametrize("config", FORMATS, ids=config_id)
def test_out_dtype_is_what_the_sums_have(config: DrafterConfig) -> None:
    """Scaled in float32 and rounded once, at the end."""
    weight = quantize({"w": normal(64, 24)}, config)["w"]
    x = normal(3, 64, seed=1).astype(jnp.bfloat16)
    wide = dot(x, weight, out_dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    assert dot(x, weight).dtype == jnp.bfloat16
    np.testing.assert_array_equal(dot(x, weight), wide.astype(jnp.bfloat16))
    exact = integer_oracle(np.asarray(x.astype(jnp.float32)), weight)
    np.testing.assert_allclose(wide, exact, atol=1e-4)


def test_zero_activations_give_zeros() -> None:
    weight = quantize({"w": normal(32, 24)}, DrafterConfig(act_bits=8))["w"]
    out = dot(normal(2, 32).at[1].set(0), weight)
    assert (out[1] == 0).all()
    assert np.abs(out[0]).max() > 1


@pytest.mark.parametrize("act_bits", [8, 16, "auto"])
def test_dot_of_a_single_vector(act_bits: Any) -> None:
    """`[in]` is `[..., in]` without leading axes."""
    x = normal(32, seed=1)
    weight = quantize({"w": normal(32, 24)}, DrafterConfig(act_bits=act_bits))["w"]
    for given in (normal(32, 24), normal(32, 24).astype(jnp.bfloat16), weight):
        like = x.astype(given.dtype) if isinstance(given, jax.Array) else x
        out = dot(like, given)
        assert out.shape == (24,)
        np.testing.assert_array_equal(out, dot(like[None], given)[0])


def test_dot_of_a_tied_embedding() -> None:
    table, x = normal(24, 32), normal(2, 32, seed=1)
    exact = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    out = dot(x, TiedEmbedding(table=table))
    np.testing.assert_allclose(out, exact, atol=2e-5)
    projection = normal(32, 24, seed=3)
    out = dot(x, TiedEmbedding(table=table, projection=projection))
    np.testing.assert_array_equal(out, dot(x, projection))


def dots_in(x: jax.Array, weight: Any, platform: str) -> list[str]:
    """Return operand and result types of every product, lowered for a platform."""
    traced = jax.jit(er_jax.dot).trace(x, weight)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(
        r"dot_general .* : \(tensor<(\S+?)>, tensor<(\S+?)>\) -> tensor<(\S+?)>", text
    )
    return [" ".join(types) for types in found]


def test_one_row_is_padded_on_the_cpu_only() -> None:
    weight = quantize({"w": normal(32, 24)}, DrafterConfig(act_bits=8))["w"]
    x = normal(1, 1, 32)
    assert dots_in(x, weight, "cpu") == ["2x1x32xi8 24x32xi8 2x1x24xi32"]
    assert dots_in(x, weight, "tpu") == ["1x1x32xi8 24x32xi8 1x1x24xi32"]
    two = dots_in(normal(2, 1, 32), weight, "cpu")
    assert two == ["2x1x32xi8 24x32xi8 2x1x24xi32"]
    low, low_weight = x.astype(jnp.bfloat16), normal(32, 24).astype(jnp.bfloat16)
    assert dots_in(low, low_weight, "cpu") == ["2x1x32xbf16 32x24xbf16 2x1x24xf32"]
    # There products round what they write (`products.of_floats`).
    assert dots_in(low, low_weight, "cuda") == ["1x1x32xbf16 32x24xbf16 1x1x24xbf16"]
    # float32 has a good one-row product on the CPU.
    assert dots_in(x, normal(32, 24), "cpu") == ["1x1x32xf32 32x24xf32 1x1x24xf32"]


@pytest.mark.parametrize("config", FORMATS, ids=config_id)
def test_one_row_equals_the_same_row_among_others(config: DrafterConfig) -> None:
    weight = quantize({"w": normal(32, 24)}, config)["w"]
    x = normal(3, 1, 32, seed=1)
    together = dot(x, weight)
    for row in range(3):
        # Integer sums are exact; the scaled sum over groups may round otherwise.
        alone = dot(x[row : row + 1], weight)
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-6, atol=1e-6)


def test_operand_types_by_platform() -> None:
    x = normal(4, 32).astype(jnp.bfloat16)
    for group, shapes in ((None, ("4x32", "24x32")), (8, ("4x4x8", "24x4x8"))):
        for bits in (8, 4):
            made = {
                act: quantize(
                    {"w": normal(32, 24)},
                    DrafterConfig(bits=bits, group_size=group, act_bits=act),
                )["w"]
                for act in (8, 16, "auto")
            }
            integer = f"{shapes[0]}xi8 {shapes[1]}xi8"
            by_cast = f"{shapes[0]}xbf16 {shapes[1]}xbf16"
            for platform, act, operands, result in (
                ("cpu", "auto", integer, "i32"),
                ("tpu", "auto", by_cast, "f32"),
                ("cuda", "auto", by_cast, "f32"),
                ("cuda", 8, integer, "i32"),
                ("tpu", 8, integer, "i32"),
                ("cpu", 16, by_cast, "f32"),
            ):
                dots = dots_in(x, made[act], platform)
                if group is not None and operands == integer and platform == "cpu":
                    # A product of every group: of all at once, codes are transposed.
                    assert dots == 4 * ["4x8xi8 24x8xi8 4x24xi32"]
                    continue
                (found,) = dots
                assert found.startswith(operands), (platform, act, bits)
                assert found.endswith(result), (platform, act, bits)


def scaled_inside(weight: QuantizedWeight) -> QuantizedWeight:
    params = PolicyParams(policy=None, draft={"w": weight})
    return drafter.with_scales_inside(params).draft["w"]


def test_scales_inside_are_for_groups_and_nvidia_only() -> None:
    x = normal(4, 32).astype(jnp.bfloat16)
    cases: list[tuple[int | None, int, Any]]
    cases = [(8, 4, "auto"), (8, 8, 16), (None, 4, "auto"), (8, 4, 8)]
    for group, bits, act in cases:
        config = DrafterConfig(bits=bits, group_size=group, act_bits=act)
        weight = quantize({"w": normal(32, 24)}, config)["w"]
        inside = scaled_inside(weight)
        for platform in ("cpu", "tpu", "cuda"):
            plain, found = (dots_in(x, w, platform) for w in (weight, inside))
            if platform == "cuda" and group is not None and act != 8:
                assert found == ["4x32xf32 24x32xf32 4x24xf32"]
            else:
                assert found == plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_scales_inside_change_the_rounding_only(x64: None, dtype: str) -> None:
    """The form for NVIDIA GPUs, run here; bfloat16 rounds each scaled code once."""
    config = DrafterConfig(bits=4, group_size=8)
    weight = quantize({"w": normal(64, 24, seed=2).astype(dtype)}, config)["w"]
    x = normal(2, 3, 64, seed=1).astype(dtype)
    exact = np.asarray(x, np.float64) @ dense(weight)
    for inside in (False, True):
        out = products._alone(x, weight.codes, weight.scale, scales_inside=inside)
        assert out.shape == exact.shape
        assert out.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        # A rounded factor is off by 2^-9 of itself, in either direction.
        size = np.abs(np.asarray(x, np.float64)) @ np.abs(dense(weight))
        error = 2.0**-9 if inside and dtype == "bfloat16" else 1e-6
        assert (np.abs(np.asarray(out, np.float64) - exact) <= error * size).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_products_for_nvidia_are_kept_apart(bits: int) -> None:
    """XLA would unpack int4 codes, or scale codes, in memory to merge products."""
    x = normal(4, 32).astype(jnp.bfloat16)
    for group in (None, 8):
        config = DrafterConfig(bits=bits, group_size=group)
        weight = quantize({"w": normal(32, 24)}, config)["w"]
        for platform in ("tpu", "cuda"):
            traced = jax.jit(er_jax.dot).trace(x, weight)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            is_apart = platform == "cuda" and (bits == 4 or group is not None)
            assert text.count("optimization_barrier") == is_apart


# Transformations, buffers, shardings.


def test_quantizing_leaks_no_tracer() -> None:
    policy = small_decoder(tied_embeddings=True)
    params = policy.init(jax.random.key(0))
    with jax.checking_leaks():
        draft = jax.jit(er_jax.quantize, static_argnums=1)(params, DrafterConfig())
        jax.jit(er_jax.dot)(normal(2, 32), draft["embed"])
    jax.tree.map(
        np.testing.assert_array_equal, draft, er_jax.quantize(params, DrafterConfig())
    )


def pointers(tree: Any) -> set[int]:
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("bits", [8, 4])
def test_refresh_reuses_the_old_buffers(bits: int) -> None:
    policy, config = small_decoder(), DrafterConfig(bits=bits)
    first, second = (policy.init(jax.random.key(seed)) for seed in (0, 1))
    old = er_jax.attach_draft(first, config)
    buffers, leaves = pointers(old.draft), jax.tree.leaves(old.draft)
    new = er_jax.refresh_draft(PolicyParams(policy=second, draft=old.draft), config)
    assert pointers(new.draft) == buffers
    assert all(leaf.is_deleted() for leaf in leaves)
    assert new.policy is second
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(second))
    expected = er_jax.attach_draft(second, config).draft
    jax.tree.map(np.testing.assert_array_equal, new.draft, expected)


def test_refresh_allocates_nothing_for_the_draft() -> None:
    policy, config = small_decoder(), DrafterConfig()
    params = er_jax.attach_draft(policy.init(jax.random.key(0)), config)
    compiled = windows.run_refresh.lower(
        params.policy, params.draft, config=config
    ).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params.draft))
    assert memory.alias_size_in_bytes >= size


def test_attaching_inside_a_donated_update_reuses_everything() -> None:
    """The refresh as a trainer does it: at the end of its own jitted update."""
    policy, config = small_decoder(), DrafterConfig()

    def update(params: PolicyParams) -> PolicyParams:
        stepped = jax.tree.map(lambda x: x * jnp.asarray(0.5, x.dtype), params.policy)
        return er_jax.attach_draft(stepped, config)

    step = jax.jit(update, donate_argnums=0, keep_unused=True)
    old = er_jax.attach_draft(policy.init(jax.random.key(0)), config)
    halves = jax.tree.map(lambda x: 0.5 * np.asarray(x), old.policy)
    buffers, leaves = pointers(old), jax.tree.leaves(old)
    new = step(old)
    assert pointers(new) == buffers
    assert all(leaf.is_deleted() for leaf in leaves)
    jax.tree.map(np.testing.assert_array_equal, new.policy, halves)


def test_gradient_touches_the_policy_only() -> None:
    policy = small_decoder()
    params = policy.init(jax.random.key(0))
    tokens = jnp.array([[1, 2, 3, 4]], jnp.int32)
    positions = jnp.arange(4, dtype=jnp.int32)[None]

    def loss(policy_params: Any) -> jax.Array:
        cache = policy.init_cache(1, 4)
        hidden, _ = policy.forward(policy_params, tokens, positions, cache)
        return jnp.mean(policy.logits(policy_params, hidden) ** 2)

    def loss_of_pair(policy_params: Any) -> jax.Array:
        # The draft is derived next to the policy, and used, but not differentiated.
        policy_and_draft = er_jax.attach_draft(policy_params, DrafterConfig())
        frozen = jax.lax.stop_gradient(
            drafter.draft_params(policy_and_draft)["lm_head"].scale
        )
        return loss(policy_and_draft.policy) + 0 * jnp.sum(frozen)

    plain = jax.jit(jax.grad(loss))(params)
    paired = jax.jit(jax.grad(loss_of_pair))(params)
    chex.assert_trees_all_equal_structs(plain, params)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(paired), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    # Integer codes cannot be differentiated by accident.
    policy_and_draft = er_jax.attach_draft(params, DrafterConfig())
    with pytest.raises(TypeError, match="int8"):
        jax.grad(lambda params: loss(params.policy))(policy_and_draft)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, er_jax
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 4), ("data", "model"),
                     axis_types=(jax.sharding.AxisType.Auto,) * 2)
specs = {"column": P(None, "model"), "row": P("model", None),
         "both": P("data", "model")}
params = {
    name: jax.device_put(
        jax.random.normal(jax.random.key(i), (64, 32)), NamedSharding(mesh, spec))
    for i, (name, spec) in enumerate(specs.items())
}
config = er_jax.DrafterConfig()
quantize = jax.jit(er_jax.quantize, static_argnums=1)
draft, unused = quantize(params, config), quantize(params, config)
plain = quantize(jax.tree.map(np.asarray, params), config)
step = jax.jit(lambda params: er_jax.attach_draft(params.policy, config),
               donate_argnums=0, keep_unused=True)
again = step(er_jax.PolicyParams(policy=params, draft=unused)).draft
for name, spec in specs.items():
    for made in (draft[name], again[name]):
        codes = made.codes.sharding  # of the codes as they lie, [out, in]
        turned = NamedSharding(mesh, P(spec[1], spec[0]))
        assert codes.is_equivalent_to(turned, 2), (name, codes)
        scale = NamedSharding(mesh, P(spec[1], None))
        assert made.scale.sharding.is_equivalent_to(scale, 2), made.scale.sharding
        assert np.array_equal(made.codes, plain[name].codes)
        assert np.array_equal(made.scale, plain[name].scale)
print("sharded", len(jax.devices()))
"""


def test_shardings_propagate_to_the_codes() -> None:
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags.strip()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "sharded 8\n"


# Checks.


@pytest.fixture(scope="module")
def params() -> PolicyParams:
    policy_params = small_decoder().init(jax.random.key(0))
    return er_jax.attach_draft(policy_params, DrafterConfig())


def abstract_draft(policy: er_jax.Decoder, config: DrafterConfig) -> PolicyParams:
    """Shapes are all that the check looks at."""
    params = jax.eval_shape(policy.init, jax.random.key(0))
    return jax.eval_shape(lambda p: er_jax.attach_draft(p, config), params)


def test_good_drafts_pass(params: PolicyParams) -> None:
    drafter.check_draft(params)
    drafter.check_draft(PolicyParams(policy=params.policy, draft=params.policy))
    for config in FORMATS:
        for tied in (False, True):
            made = abstract_draft(small_decoder(tied_embeddings=tied), config)
            drafter.check_draft(made)
            whole = drafter.draft_params(made)
            drafter.check_draft(PolicyParams(policy=made.policy, draft=whole))


def test_draft_of_other_sizes(params: PolicyParams) -> None:
    wide = abstract_draft(small_decoder(hidden_dim=128), DrafterConfig())
    with pytest.raises(ValueError) as error:
        drafter.check_draft(PolicyParams(policy=params.policy, draft=wide.draft))
    for part in ("params.draft", "layers/0/", "128", "64", "er_jax.attach_draft"):
        assert part in str(error.value)


def test_draft_of_another_vocabulary_in_tied_weights() -> None:
    """The look-up comes from the policy, so only the projection can be wrong."""
    made, other = (
        abstract_draft(
            small_decoder(tied_embeddings=True, vocab_size=size), DrafterConfig()
        )
        for size in (48, 40)
    )
    with pytest.raises(ValueError, match=r"embed"):
        drafter.check_draft(PolicyParams(policy=made.policy, draft=other.draft))


@pytest.mark.parametrize("broken", ["missing layer", "missing leaf", "none", "renamed"])
def test_draft_of_another_structure(params: PolicyParams, broken: str) -> None:
    draft = dict(params.draft)
    if broken == "missing layer":
        draft["layers"] = []
    elif broken == "missing leaf":
        layer = dict(draft["layers"][0])
        del layer["q_proj"]
        draft["layers"] = [layer]
    elif broken == "renamed":
        draft["head"] = draft.pop("lm_head")
    bad = None if broken == "none" else draft
    with pytest.raises(ValueError, match=r"params\.draft.*er_jax\.attach_draft"):
        drafter.check_draft(PolicyParams(policy=params.policy, draft=bad))


@pytest.mark.parametrize("group", [None, 8])
def test_draft_of_a_policy_with_stacked_layers(group: int | None) -> None:
    """A policy that scans over its layers keeps `[L, in, out]` weights."""
    config = DrafterConfig(group_size=group)

    def made(layers: int) -> PolicyParams:
        params = {"layers": normal(layers, 16, 24), "head": normal(24, 8)}
        return PolicyParams(policy=params, draft=quantize(params, config))

    policy_and_draft = made(3)
    drafter.check_draft(policy_and_draft)
    with pytest.raises(ValueError, match="layers"):
        drafter.check_draft(
            PolicyParams(policy=policy_and_draft.policy, draft=made(2).draft)
        )
    # And one layer of the stack multiplies as the layer alone does.
    alone = quantize({"layer": policy_and_draft.policy["layers"][1]}, config)["layer"]
    layer = jax.tree.map(lambda leaf: leaf[1], policy_and_draft.draft["layers"])
    x = normal(2, 16, seed=5)
    np.testing.assert_array_equal(dot(x, layer), dot(x, alone))
