"""Modules of other frameworks as policies: no layer of theirs knows the library.

The two examples here are those of docs/any-policy.md.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import er_jax
from er_jax import kv_cache
from er_jax.integrations.linen import LinenPolicy
from er_jax.integrations.nnx import NnxPolicy
from er_jax.types import Policy

pytestmark = pytest.mark.usefixtures("unoptimized_module")

VOCAB, DIM, HEADS = 48, 32, 2
PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]


class LinenModel(linen.Module):
    """One layer of attention and a feed-forward part."""

    vocab: int = VOCAB
    dim: int = DIM
    heads: int = HEADS

    def setup(self) -> None:
        self.embed = linen.Embed(self.vocab, self.dim)
        self.qkv = linen.Dense(3 * self.dim)
        self.out = linen.Dense(self.dim, use_bias=False)
        self.up = self.feature_layer(2 * self.dim)
        self.down = linen.Dense(self.dim)
        self.head = linen.Dense(self.vocab, use_bias=False)

    def feature_layer(self, size: int) -> Any:
        return linen.Dense(size)

    def init_cache(self, rows: int, length: int) -> Any:
        shape = (rows, length, self.dim)
        return {"keys": jnp.zeros(shape), "values": jnp.zeros(shape)}

    def __call__(self, tokens: Any, positions: Any, cache: Any) -> Any:
        x = self.embed(tokens)
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        keys = kv_cache.write(cache["keys"], k, positions)
        values = kv_cache.write(cache["values"], v, positions)
        q = q.reshape(*q.shape[:2], self.heads, -1)
        x = x + self.out(kv_cache.attend(q, keys, values, positions))
        x = x + self.down(jax.nn.gelu(self.up(x)))
        return x, {"keys": keys, "values": values}

    def logits(self, hidden: Any) -> Any:
        return self.head(hidden)


class NnxModel(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, DIM, rngs=rngs)
        self.qkv = nnx.Linear(DIM, 3 * DIM, rngs=rngs)
        self.out = nnx.Linear(DIM, DIM, use_bias=False, rngs=rngs)
        self.up: Any = nnx.Linear(DIM, 2 * DIM, rngs=rngs)
        self.down = nnx.Linear(2 * DIM, DIM, rngs=rngs)
        self.head = nnx.Linear(DIM, VOCAB, use_bias=False, rngs=rngs)

    def init_cache(self, rows: int, length: int) -> Any:
        shape = (rows, length, DIM)
        return {"keys": jnp.zeros(shape), "values": jnp.zeros(shape)}

    def __call__(self, tokens: Any, positions: Any, cache: Any) -> Any:
        x = self.embed(tokens)
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        keys = kv_cache.write(cache["keys"], k, positions)
        values = kv_cache.write(cache["values"], v, positions)
        q = q.reshape(*q.shape[:2], HEADS, -1)
        x = x + self.out(kv_cache.attend(q, keys, values, positions))
        x = x + self.down(jax.nn.gelu(self.up(x)))
        return x, {"keys": keys, "values": values}

    def logits(self, hidden: Any) -> Any:
        return self.head(hidden)


def made(framework: str) -> tuple[Policy, Any]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if framework == "linen":
            policy: Any = LinenPolicy(LinenModel(), VOCAB)
            params = policy.init(jax.random.key(0))
        else:
            policy, params = NnxPolicy.of(NnxModel(nnx.Rngs(0)), VOCAB)
        # Biases begin at zero, where a forgotten one would not show.
        return policy, jax.tree.map(lambda x: x + 0.1 * (x.ndim == 1), params)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_a_module_is_sampled_with_a_draft_of_its_own(framework: str) -> None:
    policy, params = made(framework)
    policy_and_draft = er_jax.attach_draft(params, er_jax.DrafterConfig())
    quantized = [
        leaf
        for leaf in jax.tree.leaves(
            policy_and_draft.draft,
            is_leaf=lambda x: isinstance(x, er_jax.QuantizedWeight),
        )
    ]
    assert len(quantized) == 5  # every product but the look-up
    found = []
    with jax.numpy_rank_promotion("allow"):  # the frameworks' own layers need it
        for control in ("ar", "fixed:4"):
            config = er_jax.RolloutConfig(max_new_tokens=24, n=2, control=control)
            key = jax.random.key(1)
            found.append(
                er_jax.rollout(
                    policy, policy_and_draft, PROMPTS, key=key, config=config
                )
            )
    plain, drafted = found
    np.testing.assert_array_equal(plain.completion_ids, drafted.completion_ids)
    np.testing.assert_allclose(plain.logprobs, drafted.logprobs, atol=1e-5)
    assert drafted.stats.keep_rate(4) > 0.8


@pytest.mark.parametrize(
    "framework", [pytest.param("linen", marks=pytest.mark.slow), "nnx"]
)
def test_the_quantized_kernels_are_what_is_multiplied(framework: str) -> None:
    """The draft's logits are those of kernels rounded to its codes, and no others."""
    policy, params = made(framework)
    config = er_jax.DrafterConfig(act_bits=16)
    draft = er_jax.quantize(params, config)

    def widened(leaf: Any) -> Any:
        if isinstance(leaf, er_jax.QuantizedWeight):
            return (leaf.codes.astype(jnp.float32) * leaf.scale).T
        return leaf

    rounded = jax.tree.map(
        widened, draft, is_leaf=lambda x: isinstance(x, er_jax.QuantizedWeight)
    )
    tokens = jnp.asarray([PROMPTS[1]], jnp.int32)
    positions = jnp.arange(4, dtype=jnp.int32)[None]
    logits = []
    with jax.numpy_rank_promotion("allow"):
        for tree in (draft, rounded, params):
            cache = policy.init_cache(1, 8)
            hidden, _ = policy.forward(tree, tokens, positions, cache)
            logits.append(np.asarray(policy.logits(tree, hidden)))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    assert np.abs(logits[0] - logits[2]).max() > 1e-3


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_kernels_may_have_low_rank_pairs(framework: str) -> None:
    policy, params = made(framework)
    lora = dict(rank=2, alpha=3, key=jax.random.key(2))
    changed = er_jax.add_lora(params, targets=("qkv", "up"), **lora)  # type: ignore[arg-type]
    pairs = jax.tree.map(lambda x: x + 0.1, er_jax.lora_pairs(changed))
    changed = er_jax.with_lora_pairs(changed, pairs)
    tokens = jnp.asarray([PROMPTS[1]], jnp.int32)
    positions = jnp.arange(4, dtype=jnp.int32)[None]
    logits = []
    with jax.numpy_rank_promotion("allow"):
        for tree in (changed, er_jax.merge_lora(changed), params):
            cache = policy.init_cache(1, 8)
            hidden, _ = policy.forward(tree, tokens, positions, cache)
            logits.append(np.asarray(policy.logits(tree, hidden)))
        np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
        assert np.abs(logits[0] - logits[2]).max() > 1e-2
        wrong = er_jax.add_lora(params, targets=("embed",), **lora)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"has a low-rank pair, but a Embed"):
            policy.forward(wrong, tokens, positions, policy.init_cache(1, 8))


class General(LinenModel):
    """With a layer that is no `Dense`."""

    def feature_layer(self, size: int) -> Any:
        return linen.DenseGeneral(size)


class NnxGeneral(NnxModel):
    """With a layer that is no `Linear`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.up = nnx.LinearGeneral(DIM, 2 * DIM, rngs=rngs)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_a_layer_that_cannot_is_named(framework: str) -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        policy: Any
        if framework == "linen":
            policy = LinenPolicy(General(), VOCAB)
            params = policy.init(jax.random.key(0))
        else:
            policy, params = NnxPolicy.of(NnxGeneral(nnx.Rngs(0)), VOCAB)
        config = er_jax.RolloutConfig(max_new_tokens=4, control="fixed:2")
        with pytest.raises(ValueError, match=r"up/kernel is quantized, but a .*Gen"):
            er_jax.rollout(
                policy, params, PROMPTS, key=jax.random.key(0), config=config
            )
        drafter = er_jax.DrafterConfig(skip=("embed", "norm", "up/kernel"))
        config = er_jax.RolloutConfig(
            max_new_tokens=4, control="fixed:2", drafter=drafter
        )
        er_jax.rollout(policy, params, PROMPTS, key=jax.random.key(0), config=config)


def test_state_beside_the_parameters_is_refused() -> None:
    class Dropping(NnxModel):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)

    with pytest.raises(ValueError, match="holds state beside its parameters, drop"):
        NnxPolicy.of(Dropping(nnx.Rngs(0)), VOCAB)
