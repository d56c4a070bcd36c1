"""Passes over whole texts at once: of the target, and of a draft beside its cache.

In a rollout a draft reads the cache that the target has written, and the entries of its
own round. `draft_logprobs` computes what it would say at every position of known texts,
as if a round had begun at every `gamma`-th position and all its drafts had been kept.
The query at position p of a round that began at position a sees

* the target's entries at s < a, and the round's own, of the draft, at a <= s <= p,
* of these only such with s < `head` or s > p - `window`: the first positions of the
  text, and the last ones, p itself among them.

The target's entries may be copies of fewer bits (`copied`).

Left out: policies other than the built-in decoder, whose cache is known here; rounding
as in a rollout, whose programs have other shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from er_jax import Decoder, attention, sampling
from er_jax.costs.timing import neutral_sampling
from er_jax.types import Cache, Span, wide_dtype

# Queries are taken in at most so many blocks, each compiled apart, of at least so many.
NUM_BLOCKS, LEAST_BLOCK = 8, 128


def block_size(length: int, multiple: int = 1) -> int:
    """Return the queries of a block, a multiple of `multiple`."""
    size = max(LEAST_BLOCK, -(-length // NUM_BLOCKS))
    return -(-size // multiple) * multiple


def visible(
    queries: jax.Array, entries: jax.Array, window: jax.Array, head: jax.Array
) -> jax.Array:
    """Return which entries a query may see, bool `[B, T, S]`.

    Args:
      queries: `[T]` int32, their positions. entries: `[S]` int32, theirs.
      window: int32 `[]`, how many of the last positions are seen, the query's own among
        them; at least 1.
      head: `[B]` int32, how many of the first positions are seen.
    """
    p, s = queries[None, :, None], entries[None, None]
    is_near = s > p - window
    is_first = s < head[:, None, None]
    return (s <= p) & (is_near | is_first)


def _heads_of(
    query: jax.Array, *entries: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """Return scaled queries `[B, T, K, H / K, D]` and entries `[B, S, K, D]`."""
    batch, length, heads, size = query.shape
    kv_heads = entries[0].shape[2] // size
    q = query * jnp.asarray(size**-0.5, query.dtype)
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
    return q, [x.reshape(*x.shape[:2], kv_heads, size) for x in entries]


def _scores(q: jax.Array, k: jax.Array, is_seen: jax.Array) -> jax.Array:
    """Return scores `[B, K, H / K, T, S]`, far below all others where not seen."""
    wide = wide_dtype(q.dtype)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=wide)
    return jnp.where(is_seen[:, None, None], scores, jnp.asarray(-1e30, wide))


def attend_causally(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    span: Span | None,
) -> jax.Array:
    """Attend where all rows hold positions 0, 1, ... and entries are finite.

    It takes about half of the multiplications of `er_jax.attention.attend_whole`, which
    may assume neither.

    Args: as of `er_jax.attention.attend_whole`; `positions` and `span` are not read.
    """
    length = query.shape[1]
    q, (k, v) = _heads_of(query, keys, values)
    places = np.arange(length)
    block, parts = block_size(length), []
    for start in range(0, length, block):
        end = min(start + block, length)
        is_seen = jnp.asarray(places[None, :end] <= places[start:end, None])
        scores = _scores(q[:, start:end], k[:, :end], is_seen[None])
        probs = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        parts.append(jnp.einsum("bkgts,bskd->btkgd", probs, v[:, :end]))
    return jnp.concatenate(parts, axis=1).reshape(*query.shape[:2], -1)


def _attend_beside(
    layers: Sequence[Any], window: jax.Array, head: jax.Array, gamma: int
) -> attention.Attention:
    """Return the attention of a draft that reads the target's entries of `layers`.

    The decoder attends once in every layer, one after the other: each call takes the
    next layer's entries.
    """
    remaining = iter(layers)

    def attend(
        query: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        positions: jax.Array,
        span: Span | None,
    ) -> jax.Array:
        layer = next(remaining)
        length = query.shape[1]
        q, (k, v, own_k, own_v) = _heads_of(
            query, layer["keys"], layer["values"], keys, values
        )
        places = jnp.arange(length, dtype=jnp.int32)
        starts = places - places % gamma
        block, parts = block_size(length, gamma), []
        for start in range(0, length, block):
            end = min(start + block, length)
            here, begun = places[start:end], starts[None, start:end, None]
            is_seen = visible(here, places[:end], window, head)
            is_seen &= places[None, None, :end] < begun
            is_own = visible(here, here, window, head) & (here[None, None] >= begun)
            part = q[:, start:end]
            scores = jnp.concatenate(
                [
                    _scores(part, k[:, :end], is_seen),
                    _scores(part, own_k[:, start:end], is_own),
                ],
                axis=-1,
            )
            probs = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
            both = jnp.concatenate([v[:, :end], own_v[:, start:end]], axis=1)
            parts.append(jnp.einsum("bkgts,bskd->btkgd", probs, both))
        return jnp.concatenate(parts, axis=1).reshape(*query.shape[:2], -1)

    return attend


def _forward(policy: Decoder, params: Any, tokens: jax.Array) -> tuple[Any, Cache]:
    rows, length = tokens.shape
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(positions, tokens.shape)
    cache = policy.init_cache(rows, length)
    hidden, cache = policy.forward(params, tokens, positions, cache)
    logits = policy.logits(params, hidden)
    return sampling.target_logprobs(logits, neutral_sampling(), truncated=False), cache


@functools.partial(jax.jit, static_argnames="policy")
def target_logprobs(
    policy: Decoder, params: Any, tokens: jax.Array
) -> tuple[jax.Array, Cache]:
    """Return what the target says after every token, and its cache.

    Args:
      policy, params: the model. tokens: `[B, T]` int32, texts from position 0; what
        stands behind a text's end does not change what is said within it.
    Returns:
      Log-probabilities `[B, T, V]` at temperature 1; leaves `[B, T, K * D]`.
    """
    with attention.replaced(attend_causally):
        return _forward(policy, params, tokens)


@functools.partial(jax.jit, static_argnames=("policy", "gamma"))
def draft_logprobs(
    policy: Decoder,
    draft: Any,
    tokens: jax.Array,
    cache: Cache,
    window: jax.Array,
    head: jax.Array,
    gamma: int = 1,
) -> jax.Array:
    """Return what a draft says after every token, `[B, T, V]`; see the module.

    Args:
      policy: the model. draft: parameters of its draft.
      tokens: `[B, T]`, as of `target_logprobs`, which has made `cache`.
      window, head: see `visible`.
      gamma: drafts of a round; positions p with p % gamma = d are its (d + 1)-th.
    """
    with attention.replaced(_attend_beside(cache, window, head, gamma)):
        return _forward(policy, draft, tokens)[0]


@functools.partial(jax.jit, static_argnames=("bits", "head_size"))
def copied(cache: Cache, bits: int, head_size: int) -> Cache:
    """Return a cache as its copy of fewer bits would be read.

    Every key and every value of a head has its own smallest and largest number; codes
    divide what lies between them evenly. Simpler than QuantSpec (arXiv 2502.10424),
    which scales keys per channel over a group of tokens.

    Args:
      cache: leaves `[B, S, K * D]`. bits: of a code. head_size: D.
    """

    def leaf(entries: jax.Array) -> jax.Array:
        x = entries.reshape(*entries.shape[:2], -1, head_size)
        low, high = jnp.min(x, -1, keepdims=True), jnp.max(x, -1, keepdims=True)
        step = jnp.maximum(high - low, jnp.asarray(1e-30, x.dtype)) / (2**bits - 1)
        return (low + jnp.round((x - low) / step) * step).reshape(entries.shape)

    return jax.tree.map(leaf, cache)
