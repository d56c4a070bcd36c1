"""What a framework that trains asks of the engine: taking its parameters, scoring.

`Adoption` turns the parameters of another framework into a policy's, and derives their
draft, in one program on the device. `run_logits` and `run_token_logprobs` score texts.

Left out: which parameter becomes which (`integrations`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from er_jax.drafter import DrafterConfig, PolicyParams, attach_draft
from er_jax.types import NONE, Params, Policy, wide_dtype

# Logits of this many positions of every row are held at once while scoring.
SCORED_AT_ONCE = 32


class Adoption:
    """Parameters of another framework made a policy's, by one program.

    What the policy takes as it is stays the framework's own array and is stored once.
    All else is computed on the device; nothing goes through the host.

    Args:
      convert: maps arrays by their names to the policy's parameters; traced.
      kept: like these parameters, with the name of the array that a leaf is, unchanged;
        "" for a leaf that is computed.
      config: how to quantize the draft.
      shardings: `PolicyParams` of the shardings of parameters and draft; None leaves
        them to the compiler, for one device.
    """

    def __init__(
        self,
        convert: Callable[[Mapping[str, jax.Array]], Params],
        kept: Params,
        config: DrafterConfig,
        shardings: PolicyParams | None = None,
    ) -> None:
        self._kept, self._structure = jax.tree.flatten(kept)

        def run(arrays: Mapping[str, jax.Array]) -> tuple[list[Any], Params]:
            params = convert(arrays)
            draft = attach_draft(params, config.quantization).draft
            return self._computed(params), draft

        wanted = None
        if shardings is not None:
            wanted = (self._computed(shardings.policy), shardings.draft)
        self._run = jax.jit(run, out_shardings=wanted)

    def _computed(self, tree: Params) -> list[Any]:
        leaves = jax.tree.leaves(tree)
        return [leaf for leaf, name in zip(leaves, self._kept, strict=True) if not name]

    def __call__(self, arrays: Mapping[str, jax.Array]) -> PolicyParams:
        """Return the policy's parameters and their draft."""
        computed, draft = self._run(arrays)
        rest = iter(computed)
        leaves = [arrays[name] if name else next(rest) for name in self._kept]
        policy = jax.tree.unflatten(self._structure, leaves)
        return PolicyParams(policy=policy, draft=draft)


@functools.partial(jax.jit, static_argnames=("policy",))
def run_logits(policy: Policy, params: Params, tokens: jax.Array) -> jax.Array:
    """Return the logits `[T, V]` of one text, int32 `[T]`."""
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    cache = policy.init_cache(1, len(tokens))
    hidden, _ = policy.forward(params, tokens[None], positions, cache)
    return policy.logits(params, hidden)[0]


@functools.partial(jax.jit, static_argnames=("policy", "count"))
def run_token_logprobs(
    policy: Policy,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    temperature: jax.Array,
    *,
    count: int,
) -> jax.Array:
    """Return the log-probabilities of the last tokens of every row.

    Args:
      policy, params: the model.
      tokens: int32 `[B, T]`. mask: bool `[B, T]`; a token outside of it is seen by no
        other and takes no position.
      temperature: scalar; 0 is read as 1, as in a rollout.
      count: static, C < T; how many tokens to score.
    Returns:
      float32 `[B, C]`, log softmax(logits / temperature); 0 outside of `mask`.
    """
    rows, length = tokens.shape
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, NONE)
    cache = policy.init_cache(rows, length)
    hidden, _ = policy.forward(params, tokens, positions, cache)
    # Padding may lie between a token and the one before it.
    indices = jnp.arange(length, dtype=jnp.int32)[None]
    last = lax.cummax(jnp.where(mask, indices, NONE), axis=1)
    before = last[:, length - count - 1 : length - 1]
    targets, kept = tokens[:, -count:], mask[:, -count:] & (before >= 0)
    width = min(SCORED_AT_ONCE, count)
    pad = -count % width

    def blocks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad)))
        return jnp.moveaxis(x.reshape(rows, -1, width), 1, 0)

    def score(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        place, target = block
        found = jnp.take_along_axis(hidden, jnp.maximum(place, 0)[..., None], axis=1)
        logits = policy.logits(params, found)
        scale = temperature.astype(logits.dtype)
        logits = logits / jnp.where(scale == 0, jnp.ones_like(scale), scale)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    scores = lax.map(score, (blocks(before), blocks(targets)))
    scores = jnp.moveaxis(scores, 0, 1).reshape(rows, -1)[:, :count]
    zero = jnp.zeros((), scores.dtype)
    return jnp.where(kept, scores, zero).astype(wide_dtype(jnp.float32))
