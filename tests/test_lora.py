"""Low-rank pairs: the product, their draft, rollouts, scores and meshes."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

import er_jax
from er_jax import drafter, lora
from er_jax.drafter import DrafterConfig, PolicyParams
from er_jax.lora import LoRAWeight
from er_jax.mesh import layout, rules
from tests.small import SIZES

pytestmark = pytest.mark.usefixtures("unoptimized_module")

NUM_IN, NUM_OUT, RANK, SCALE = 24, 40, 3, 1.75
PROMPTS = [[3, 1, 4], [7], [2, 7, 1, 8, 2, 8, 1, 8]]


def added(params: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(rank=RANK, alpha=SCALE * RANK)
    return er_jax.add_lora(params, key=jax.random.key(5), **settings | changes)


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def weight(dtype: Any = np.float32) -> LoRAWeight:
    base = normal(NUM_IN, NUM_OUT, seed=1, dtype=dtype)
    a = normal(NUM_IN, RANK, seed=2, dtype=dtype)
    return LoRAWeight(base, a, normal(RANK, NUM_OUT, seed=3, dtype=dtype), SCALE)


def moved(params: Any, seed: int = 9, size: float = 0.3) -> Any:
    """Return parameters whose pairs are others, as after some updates."""
    rng = np.random.default_rng(seed)

    def other(leaf: jax.Array) -> jax.Array:
        return leaf + jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype)

    pairs = jax.tree.map(other, er_jax.lora_pairs(params))
    return er_jax.with_lora_pairs(params, pairs)


def policy_of(kind: str = "float32") -> er_jax.Decoder:
    return er_jax.Decoder(dataclasses.replace(SIZES, dtype=kind))


@functools.cache
def parameters(kind: str) -> Any:
    return jax.jit(policy_of(kind).init)(jax.random.key(0))


def plain_of(kind: str = "float32") -> Any:
    return parameters(kind)


def with_pairs(kind: str = "float32", **changes: Any) -> Any:
    return added(plain_of(kind), **changes)


# ----------------------------------------------------------------------- the product


@pytest.mark.parametrize(("dtype", "error"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("shape", [(), (1, 1), (2, 3)])
def test_a_product_is_that_of_the_sum(
    x64: None, dtype: str, error: float, shape: tuple[int, ...]
) -> None:
    w, x = weight(dtype), normal(*shape, NUM_IN, dtype=dtype)
    found = er_jax.dot(x, w)
    whole = np.asarray(w.base) + SCALE * np.asarray(w.a) @ np.asarray(w.b)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, np.asarray(x) @ whole, atol=error * 40)


def test_the_sum_of_base_and_change_is_never_made() -> None:
    traced = jax.jit(er_jax.dot).trace(normal(2, NUM_IN), weight())
    for platform in ("cpu", "tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.dot_general") == 3
        assert re.findall(r"= stablehlo\.(\w+) .*-> tensor<24x40x", text) == []


def test_pairs_may_be_wider_than_the_activations() -> None:
    w = dataclasses.replace(weight("float32"), base=weight("bfloat16").base)
    x = normal(2, NUM_IN, dtype=jnp.bfloat16)
    found = er_jax.dot(x, w, out_dtype=jnp.float32)
    whole = np.asarray(w.base, np.float64) + SCALE * np.asarray(w.a @ w.b, np.float64)
    exact = np.asarray(x, np.float64) @ whole
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(whole) + 10
    assert (np.abs(np.asarray(found) - exact) < 2.0**-6 * size).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_pairs_change_nothing_to_the_bit(dtype: str) -> None:
    w, x = weight(dtype), normal(3, NUM_IN, dtype=dtype)
    new = dataclasses.replace(w, b=jnp.zeros_like(w.b))
    np.testing.assert_array_equal(er_jax.dot(x, new), er_jax.dot(x, w.base))
    assert np.any(er_jax.dot(x, w) != er_jax.dot(x, w.base))


def lora_weights(params: Any) -> dict[str, LoRAWeight]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lora.is_lora)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
        if lora.is_lora(leaf)
    }


def test_the_gradient_is_the_pairs_alone(x64: None) -> None:
    """dA = scale dW B^T and dB = scale A^T dW; the base and what is frozen get none."""
    w, x = weight("float64"), normal(5, NUM_IN, dtype="float64")
    down = normal(5, NUM_OUT, seed=4, dtype="float64")
    found = jax.grad(lambda w: jnp.sum(er_jax.dot(x, w) * down))(w)
    of_whole = np.asarray(x).T @ np.asarray(down)
    np.testing.assert_allclose(found.a, SCALE * of_whole @ np.asarray(w.b).T)
    np.testing.assert_allclose(found.b, SCALE * np.asarray(w.a).T @ of_whole)
    assert not np.any(found.base)


# ----------------------------------------------------------------- adding and merging


def test_targets_decide_which_weights_have_pairs() -> None:
    whole = lora_weights(with_pairs())
    assert sorted(whole) == [f"layers/0/{name}" for name in sorted(lora.TARGETS)]
    some = lora_weights(with_pairs(targets=("v_proj", "lm_head", "norm")))
    assert sorted(some) == ["layers/0/v_proj", "lm_head"]
    made = some["lm_head"]
    assert made.a.shape == (16, RANK) and made.b.shape == (RANK, 24)
    assert (
        made.scale == SCALE and with_pairs(alpha=None)["layers"][0]["q_proj"].scale == 1
    )
    assert np.abs(made.a).max() < 16**-0.5
    assert not any(np.any(w.b) for w in whole.values())
    firsts = {float(w.a[0, 0]) for w in whole.values()}
    assert len(firsts) == len(whole)  # a key of its own each
    wide = lora_weights(with_pairs("bfloat16", dtype="float32"))
    assert {w.a.dtype.name for w in wide.values()} == {"float32"}
    shapes = jax.eval_shape(lambda p: added(p), plain_of())
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape),
                 shapes, with_pairs())  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=0), "rank=0 must be a whole number from 1"),
        (dict(rank=2.0), "rank=2.0 must be a whole number"),
        (dict(alpha=0), "alpha=0 must be a number above 0"),
        (dict(alpha=float("inf")), "alpha=inf must be a number above 0"),
        (dict(dtype="int8"), "dtype='int8' must be a floating-point type"),
        (dict(targets="q_proj"), "targets='q_proj' must be several words"),
        (dict(targets=("q_proj", "")), "must be several words, none of them empty"),
        (dict(targets=("query",)), r"name no matrix .*layers/0/down_proj"),
    ],
)
def test_wrong_arguments_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_pairs(**changes)


def test_what_can_have_no_pair_is_refused_by_name() -> None:
    sizes = dataclasses.replace(
        SIZES, tied_embeddings=True, num_experts=4, experts_per_token=2, expert_dim=8
    )
    policy = er_jax.Decoder(sizes)
    params = jax.eval_shape(policy.init, jax.random.key(0))

    def add(params: Any, *targets: str) -> Any:
        made = functools.partial(added, targets=targets)
        return jax.eval_shape(made, params)

    for target, message in (
        (
            "up_experts",
            r"layers/0/up_experts has shape \(4, 16, 8\), a stack .*experts",
        ),
        ("embed", r"embed is an embedding that is the projection as well"),
    ):
        with pytest.raises(ValueError, match=message):
            add(params, target)
    made = added(plain_of())
    with pytest.raises(ValueError, match="has low-rank pairs already"):
        added(made)
    with pytest.raises(ValueError, match="qvalue has dtype int8"):
        jax.eval_shape(lambda p: added(er_jax.quantize(p, DrafterConfig())), plain_of())


def test_merged_and_without() -> None:
    params = moved(with_pairs())
    merged, plain = er_jax.merge_lora(params), er_jax.without_lora(params)
    assert not lora.has_lora(merged)
    jax.tree.map(lambda x, y: np.testing.assert_(x is y), plain, plain_of())
    w = params["layers"][0]["down_proj"]
    exact = np.asarray(w.base, np.float64) + SCALE * np.asarray(
        w.a, np.float64
    ) @ np.asarray(w.b, np.float64)
    np.testing.assert_allclose(merged["layers"][0]["down_proj"], exact, atol=1e-6)
    draft = drafter.draft_params(er_jax.attach_draft(params, DrafterConfig()))
    with pytest.raises(ValueError, match="q_proj has a quantized base"):
        er_jax.merge_lora({"q_proj": draft["layers"][0]["q_proj"]})
    for function in (er_jax.merge_lora, er_jax.without_lora, er_jax.lora_pairs):
        with pytest.raises(ValueError, match="no low-rank pairs; add them"):
            function(plain_of())


def test_pairs_are_taken_out_and_put_back() -> None:
    params = with_pairs()
    pairs = er_jax.lora_pairs(params)
    assert len(jax.tree.leaves(pairs)) == 2 * len(lora.TARGETS)
    doubled = er_jax.with_lora_pairs(params, jax.tree.map(lambda x: 2 * x, pairs))
    for name, w in lora_weights(params).items():
        other = lora_weights(doubled)[name]
        np.testing.assert_array_equal(other.a, 2 * w.a)
        assert other.base is w.base and other.scale == w.scale
    assert doubled["embed"] is params["embed"]
    fewer = er_jax.lora_pairs(with_pairs(targets=("q_proj",)))
    with pytest.raises(ValueError, match="pairs has another structure"):
        er_jax.with_lora_pairs(params, fewer)
    other = er_jax.lora_pairs(with_pairs(rank=2, alpha=2 * SCALE))
    with pytest.raises(
        ValueError, match=r"pairs has shape \(32, 2\) at layers/0/down_p"
    ):
        er_jax.with_lora_pairs(params, other)


# ------------------------------------------------------------------------- the draft


@pytest.mark.parametrize(
    "config", [DrafterConfig(), DrafterConfig(bits=4, group_size=8)]
)
def test_a_draft_is_the_quantized_bases_with_the_live_pairs(
    config: DrafterConfig,
) -> None:
    params = moved(with_pairs())
    made = er_jax.attach_draft(params, config)
    of_bases = er_jax.attach_draft(plain_of(), config).draft
    jax.tree.map(
        np.testing.assert_array_equal, er_jax.without_lora(made.draft), of_bases
    )
    drafter.check_draft(made)
    updated = moved(params)
    draft = drafter.draft_params(PolicyParams(policy=updated, draft=made.draft))
    for name, w in lora_weights(updated).items():
        own = lora_weights(draft)[name]
        assert own.a is w.a and own.b is w.b
        x = normal(3, len(w.base), dtype=np.float32)
        base = er_jax.dot(x, of_bases["layers"][0][name.split("/")[-1]])
        change = np.asarray(x, np.float64) @ np.asarray(w.a) @ np.asarray(w.b)
        np.testing.assert_allclose(
            er_jax.dot(x, own), np.asarray(base) + SCALE * change, atol=1e-4
        )
    with pytest.raises(ValueError, match=r"params\.draft has another structure"):
        drafter.check_draft(PolicyParams(policy=plain_of(), draft=made.draft))


def test_a_weight_that_is_skipped_is_the_policys_own() -> None:
    params = with_pairs()
    config = DrafterConfig(skip=("embed", "norm", "q_proj"))
    made = er_jax.attach_draft(params, config)
    assert made.draft["layers"][0]["q_proj"] is None
    draft = drafter.draft_params(made)
    assert draft["layers"][0]["q_proj"] is params["layers"][0]["q_proj"]


def test_codes_of_the_same_arrays_are_kept() -> None:
    params = with_pairs(targets=("q_proj", "down_proj"))
    configs = (DrafterConfig(), DrafterConfig(bits=4))
    first = er_jax.attach_draft(params, configs)
    updated = moved(params)
    layer = updated["layers"][0]
    updated["layers"][0] = layer | {"up_proj": layer["up_proj"] * 2}
    again = er_jax.attach_draft(updated, configs, previous=first)
    assert again.policy is updated
    fresh = er_jax.attach_draft(updated, configs)
    jax.tree.map(np.testing.assert_array_equal, again, fresh)
    for old, new in zip(first.drafts, again.drafts, strict=True):
        kept = jax.tree.map(lambda x, y: x is y, old, new)
        was_made = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, same in jax.tree_util.tree_leaves_with_path(kept)
            if not same
        ]
        assert was_made and all("up_proj" in name for name in was_made)
    # The draft of the weights before they had pairs will do as well.
    plain = er_jax.attach_draft(plain_of(), DrafterConfig())
    of_pairs = er_jax.attach_draft(params, DrafterConfig(), previous=plain)
    kept = er_jax.without_lora(of_pairs.draft)
    jax.tree.map(lambda x, y: np.testing.assert_(x is y), kept, plain.draft)
    with pytest.raises(ValueError, match="params has 2 drafts, and drafter 1"):
        er_jax.attach_draft(updated, DrafterConfig(), previous=first)


def pointers(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def test_an_update_in_a_jit_moves_no_byte_of_base_or_codes() -> None:
    """As a trainer does it: parameters and draft donated, the pairs stepped."""
    config = DrafterConfig()

    def update(params: PolicyParams) -> PolicyParams:
        pairs = er_jax.lora_pairs(params.policy)
        pairs = jax.tree.map(lambda x: x * jnp.asarray(0.5, x.dtype), pairs)
        policy = er_jax.with_lora_pairs(params.policy, pairs)
        return er_jax.attach_draft(policy, config, previous=params)

    start = er_jax.attach_draft(moved(with_pairs()), config)
    start = jax.tree.map(jnp.copy, start)  # the parameters of other tests stay
    halves = jax.tree.map(lambda x: 0.5 * x, er_jax.lora_pairs(start.policy))
    compiled = jax.jit(update, donate_argnums=0).lower(start).compile()
    text = compiled.as_text()
    assert text is not None
    operations = re.findall(r"\] (\w+)\(", text)
    assert not {"round-nearest-even", "divide", "reduce"} & set(operations)
    shapes = {w.base.shape for w in lora_weights(start.policy).values()}
    for size in shapes:
        made = rf"= \w+\[{size[0]},{size[1]}\]\S* (?!parameter)\w+\("
        assert not re.findall(made, text)
    before = pointers(start)
    new = compiled(start)
    assert pointers(new) == before
    jax.tree.map(np.testing.assert_array_equal, er_jax.lora_pairs(new.policy), halves)


# --------------------------------------------------------------- rollouts and scores


CONFIG = er_jax.RolloutConfig(
    max_new_tokens=24, n=2, gammas=(0, 3), stop_token_ids=(0,), control="ar"
)


def sampled(policy: Any, params: Any, **changes: Any) -> er_jax.Rollout:
    config = dataclasses.replace(CONFIG, **changes)
    key = jax.random.key(1)
    return er_jax.rollout(policy, params, PROMPTS, key=key, config=config)


@pytest.mark.slow
def test_drafts_with_the_live_pair_change_no_token(x64: None) -> None:
    policy, params = policy_of("float64"), moved(with_pairs("float64"))
    plain = sampled(policy, params)
    given = er_jax.attach_draft(params, DrafterConfig())
    drafted = sampled(policy, given, control="fixed:3")
    np.testing.assert_array_equal(plain.completion_ids, drafted.completion_ids)
    np.testing.assert_allclose(plain.logprobs, drafted.logprobs, atol=1e-6)
    assert drafted.stats.keep_rate(3) > 0.9
    # A draft of earlier pairs is as good, because its pairs are those of the policy.
    old = er_jax.attach_draft(with_pairs("float64"), DrafterConfig())
    live = PolicyParams(policy=params, draft=old.draft)
    again = sampled(policy, live, control="fixed:3")
    np.testing.assert_array_equal(plain.completion_ids, again.completion_ids)
    assert again.stats.keep_rate(3) == drafted.stats.keep_rate(3)


@pytest.mark.slow
def test_tokens_are_those_of_merged_weights(x64: None) -> None:
    policy, params = policy_of("float64"), moved(with_pairs("float64"))
    plain = sampled(policy, params)
    merged = sampled(policy, er_jax.merge_lora(params))
    frozen = sampled(policy, er_jax.without_lora(params))
    np.testing.assert_array_equal(plain.completion_ids, merged.completion_ids)
    assert np.any(plain.completion_ids != frozen.completion_ids)
    old = er_jax.attach_draft(with_pairs("float64"), DrafterConfig())
    stale = PolicyParams(policy=params, draft=drafter.draft_params(old))
    unsound = sampled(policy, stale, control="fixed:3")
    np.testing.assert_array_equal(plain.completion_ids, unsound.completion_ids)
    assert unsound.stats.keep_rate(3) < 0.7
    two = (DrafterConfig(), DrafterConfig(bits=4))
    for given in (params, er_jax.attach_draft(params, two)):
        drafted = sampled(policy, given, control="best", drafter=two)
        np.testing.assert_array_equal(plain.completion_ids, drafted.completion_ids)
        np.testing.assert_allclose(plain.logprobs, drafted.logprobs, atol=1e-6)


@pytest.mark.slow
def test_scores_and_their_gradients_are_of_the_pairs() -> None:
    policy, params = policy_of(), moved(with_pairs())
    out = sampled(policy, params)

    def loss(pairs: Any, chunk_tokens: int) -> jax.Array:
        own = er_jax.with_lora_pairs(params, pairs)
        found = er_jax.score(policy, own, out, config=CONFIG, chunk_tokens=chunk_tokens)
        return jnp.sum(found.logprobs)

    pairs = er_jax.lora_pairs(params)
    found = er_jax.score(policy, params, out, config=CONFIG)
    np.testing.assert_allclose(found.logprobs, out.logprobs, atol=2e-5)
    whole, cut = (jax.grad(loss)(pairs, tokens) for tokens in (2048, 64))
    for one, other in zip(*map(jax.tree.leaves, (whole, cut)), strict=True):
        assert np.any(one)
        np.testing.assert_allclose(one, other, atol=2e-3)


# ----------------------------------------------------------------------------- meshes


def test_pairs_lie_as_the_dimensions_of_their_bases() -> None:
    sizes = dataclasses.replace(SIZES, num_heads=4, num_kv_heads=2)
    policy = er_jax.Decoder(sizes)
    params = jax.eval_shape(lambda key: added(policy.init(key)), jax.random.key(0))
    mesh = AbstractMesh((2, 4), ("fsdp", "model"))
    shardings = rules.param_shardings(params, sizes, mesh)
    layer = shardings["layers"][0]
    for name, ins, outs in (
        ("q_proj", "fsdp", "model"),
        ("o_proj", "model", "fsdp"),
        ("k_proj", "fsdp", None),  # two heads over four devices lie whole
    ):
        assert layer[name].base.spec == PartitionSpec(ins, outs)
        assert layer[name].a.spec == PartitionSpec(ins, None)
        assert layer[name].b.spec == PartitionSpec(None, outs)
    pairs = rules.param_shardings(er_jax.lora_pairs(params), sizes, mesh)
    jax.tree.map(np.testing.assert_equal, pairs, er_jax.lora_pairs(shardings))
    draft = jax.eval_shape(
        lambda p: er_jax.attach_draft(p, DrafterConfig()).draft, params
    )
    found = rules.draft_shardings(draft, shardings)
    jax.tree.map(lambda x, sharding: sharding.shard_shape(x.shape), draft, found)
    assert found["layers"][0]["o_proj"].base.codes.spec == PartitionSpec(
        "fsdp", "model"
    )


@pytest.mark.slow
def test_rollouts_on_a_mesh_are_those_of_one_device(x64: None) -> None:
    sizes = dataclasses.replace(SIZES, num_heads=4, num_kv_heads=2, dtype="float64")
    policy = er_jax.Decoder(sizes)
    params = moved(added(policy.init(jax.random.key(0))))
    alone = sampled(policy, params)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    config = dataclasses.replace(CONFIG, control="fixed:3")
    for given in (params, er_jax.attach_draft(params, DrafterConfig())):
        out = er_jax.rollout(
            policy, given, PROMPTS, key=jax.random.key(1), config=config, mesh=mesh
        )
        np.testing.assert_array_equal(out.completion_ids, alone.completion_ids)
        assert out.stats.keep_rate(3) > 0.9
    put = layout.put_on_mesh(policy, params, layout.rollout_mesh(mesh))
    assert put["layers"][0]["o_proj"].a.sharding.spec == PartitionSpec("model", None)
