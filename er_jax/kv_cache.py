"""The static key/value cache: write, attend, take rows, grow, insert a prefix.

A cache is any pytree whose leaves are `[B, S, ...]`. Entry s of a row belongs to the
token at position s, so the mask is a comparison of two integers, and dropping a
rejected draft costs nothing. Only `attend` knows what an entry means; the other
functions move whole rows.

The built-in decoder has one `[B, S, K * D]` leaf for keys and one for values per layer.
Heads stay merged so that both minor axes are long: nothing is padded to a tile, and no
backend has to transpose the cache to batch over heads (see `attend`).

Left out: paging, ring buffers, quantized entries.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from er_jax.types import Cache, wide_dtype

# Up to this many queries per row, attention is bound by reading the cache.
MERGED_QUERIES = 16

# Entries that the CPU path for non-finite values cleans at a time, at most.
CAREFUL_ENTRIES = 128

# Up to this many merged queries per row, the keys are the left factor on CPU.
KEYS_FIRST_QUERIES = 16


def write(entries: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Write one entry per position, in place where the buffer may be reused.

    Args:
      entries: `[B, S, ...]`. new: `[B, T, ...]`.
      positions: `[B, T]` int32; those outside 0 .. S-1 are dropped (-1 is padding).
    """
    with jax.named_scope("cache"):
        rows = jnp.arange(entries.shape[0], dtype=positions.dtype)[:, None]
        size = entries.shape[1]
        # A negative index would wrap around; S is out of bounds and therefore dropped.
        index = jnp.where(positions < 0, size, positions)
        if index.size == 1:
            # XLA turns a scatter of one update into a conditional slice update, which
            # copies the whole buffer in every iteration of a loop. With a second,
            # dropped update it stays a scatter, done in place.
            index = jnp.concatenate([index, jnp.full_like(index, size)], axis=1)
            new = jnp.concatenate([new, new], axis=1)
        return entries.at[rows, index].set(new.astype(entries.dtype), mode="drop")


def attend(
    query: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> jax.Array:
    """Grouped-query attention of new tokens over the cache.

    Entry s is visible to a query at position p when s <= p. The softmax is in float32
    or wider. Few queries per row are multiplied, all heads as one block-diagonal query,
    against the merged cache: K times the (few) multiplications, and one read of the
    cache without a transposition. Many queries (prefill, training) are bound by
    arithmetic and take the usual form.

    A query that sees a non-finite entry returns NaN; entries that a query does not see
    do not change its result. With few queries on an accelerator the latter does not
    hold, because it would cost another pass over the cache: there a non-finite entry
    may turn all queries of its row to NaN, and `steps.decode_round` runs such a row
    again, one token at a time.

    Args:
      query: `[B, T, H, D]`. keys, values: `[B, S, K * D]`.
      positions: `[B, T]` int32; padding (-1) sees nothing and returns zeros.
    Returns:
      `[B, T, H * D]` in the dtype of `query`.
    """
    return _attention.get()(query, keys, values, positions)


@contextlib.contextmanager
def attention(function: Attention) -> Iterator[None]:
    """Replace `attend` by another function while a program is traced.

    Programs whose heads are sharded over devices use it; the policy need not know.
    """
    token = _attention.set(function)
    try:
        yield
    finally:
        _attention.reset(token)


def attend_whole(
    query: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> jax.Array:
    """Attend with all heads on one device; see `attend`."""
    batch, num_queries, heads, size = query.shape
    length, kv_heads = keys.shape[1], keys.shape[2] // size
    group = heads // kv_heads
    wide = wide_dtype(query.dtype)
    slots = jnp.arange(length, dtype=positions.dtype)[None, None]
    visible = slots <= positions[..., None]  # [B, T, S], shared by all heads
    scale = jnp.asarray(size**-0.5, query.dtype)
    q = (query * scale).reshape(batch, num_queries, kv_heads, group, size)

    def weights(scores: jax.Array, mask: jax.Array) -> jax.Array:
        # The floor is finite, so that a query which sees nothing gives zeros, not NaN.
        scores = jnp.where(mask, scores, jnp.asarray(-1e30, wide))
        top = lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
        exp = jnp.where(mask, jnp.exp(scores - top), jnp.zeros((), wide))
        total = jnp.sum(exp, -1, keepdims=True)
        return (exp / jnp.maximum(total, jnp.asarray(1e-30, wide))).astype(query.dtype)

    if num_queries > MERGED_QUERIES:
        k = keys.reshape(batch, length, kv_heads, size)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=wide)
        probs = weights(scores, visible[:, None, None])
        is_sound = _is_sound(keys, values)
        v = jnp.where(is_sound[..., None], values, jnp.zeros((), values.dtype))
        v = v.reshape(batch, length, kv_heads, size)
        out = jnp.einsum("bkgts,bskd->btkgd", probs, v)
        out = out.reshape(batch, num_queries, heads * size)
        return _with_nan(out, _sees_bad(visible, is_sound))

    # [.., K, 1, K, 1]: the query of head i meets only the part of head i in an entry.
    own = jnp.eye(kv_heads, dtype=query.dtype)[None, None, :, None, :, None]
    merged = (q[..., None, :] * own).reshape(
        batch, num_queries * heads, kv_heads * size
    )

    def product(merged: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.einsum("bqf,bsf->bqs", merged, keys, preferred_element_type=wide)

    def keys_first(merged: jax.Array, keys: jax.Array) -> jax.Array:
        # XLA's CPU backend repacks the right factor: the few queries cost less.
        scores = jnp.einsum("bsf,bqf->bsq", keys, merged, preferred_element_type=wide)
        return jnp.swapaxes(lax.optimization_barrier(scores), 1, 2)

    on_cpu = keys_first if num_queries * heads <= KEYS_FIRST_QUERIES else product
    scores = lax.platform_dependent(merged, keys, cpu=on_cpu, default=product)
    scores = scores.reshape(batch, num_queries, heads, length)
    probs = weights(scores, visible[:, :, None])
    probs = probs.reshape(batch, num_queries * heads, length)

    def combined(probs: jax.Array, values: jax.Array) -> jax.Array:
        out = jnp.einsum("bqs,bsf->bqf", probs, values)
        out = out.reshape(len(out), num_queries, kv_heads, group, kv_heads, size)
        # Slices of the diagonal; a product with `own` would read all K parts again.
        parts = [out[:, :, head, :, head] for head in range(kv_heads)]
        return jnp.stack(parts, axis=2).reshape(len(out), num_queries, heads * size)

    def careful(probs: jax.Array, values: jax.Array) -> jax.Array:
        # Cleans some entries of a row at a time; a copy of all would double the memory.
        size_s = max(n for n in range(1, CAREFUL_ENTRIES + 1) if length % n == 0)

        def add(
            done: tuple[jax.Array, jax.Array], i: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            out, sees_bad = done
            row, start = i // (length // size_s), i % (length // size_s) * size_s

            def part(x: jax.Array, axis: int) -> jax.Array:
                first, sizes = [jnp.int32(0)] * 3, list(x.shape)
                first[0], first[axis] = row, start
                sizes[0], sizes[axis] = 1, size_s
                return lax.dynamic_slice(x, first, sizes)

            k, v = part(keys, 1), part(values, 1)
            is_sound = _is_sound(k, v)
            v = jnp.where(is_sound[..., None], v, jnp.zeros((), v.dtype))
            sees = _sees_bad(part(visible, 2), is_sound)
            out = out.at[row].add(combined(part(probs, 2), v)[0].astype(wide))
            return (out, sees_bad.at[row].set(sees_bad[row] | sees[0])), None

        start = (
            jnp.zeros((batch, num_queries, heads * size), wide),
            jnp.zeros((batch, num_queries, 1), jnp.bool_),
        )
        steps = jnp.arange(batch * (length // size_s), dtype=jnp.int32)
        out, sees_bad = lax.scan(add, start, steps)[0]
        return _with_nan(out.astype(values.dtype), sees_bad)

    def checked(probs: jax.Array, values: jax.Array) -> jax.Array:
        # A CPU branches at no cost. An unseen non-finite entry that leaks into an
        # output makes it non-finite. Padding has no output and must not look like one.
        is_real = (positions >= 0)[..., None]
        out = combined(probs, values)
        out = jnp.where(is_real, out, jnp.zeros((), out.dtype))
        is_clean = jnp.all(jnp.isfinite(out), axis=(1, 2), keepdims=True)

        def mended(probs: jax.Array, values: jax.Array) -> jax.Array:
            # Clean rows stay as they are, to the last bit.
            return jnp.where(is_clean, out, careful(probs, values))

        return lax.cond(jnp.all(is_clean), lambda *_: out, mended, probs, values)

    return lax.platform_dependent(probs, values, cpu=checked, default=combined)


def _is_sound(keys: jax.Array, values: jax.Array) -> jax.Array:
    """Whether entries `[B, S, K * D]` are finite in key and value, bool `[B, S]`."""
    # The maximum is finite exactly if all numbers are, because it propagates NaN. Flags
    # per number would have to be written to memory.
    largest = [jnp.max(jnp.abs(entries), axis=-1) for entries in (keys, values)]
    return jnp.isfinite(largest[0]) & jnp.isfinite(largest[1])


def _sees_bad(visible: jax.Array, is_sound: jax.Array) -> jax.Array:
    """Whether a query sees a non-finite entry: `[B, T, S]`, `[B, S]` -> `[B, T, 1]`."""
    return jnp.any(visible & ~is_sound[:, None], axis=-1, keepdims=True)


Attention: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
_attention: contextvars.ContextVar[Attention] = contextvars.ContextVar(
    "attention", default=attend_whole
)


def _with_nan(out: jax.Array, sees_bad: jax.Array) -> jax.Array:
    """Return the output `[B, T, H * D]`, NaN where `sees_bad` (`[B, T, 1]`)."""
    return jnp.where(sees_bad, jnp.asarray(jnp.nan, out.dtype), out)


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """Gather rows `[R]` into a cache of R rows."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), cache)


def resize(cache: Cache, length: int) -> Cache:
    """Shorten every leaf `[B, S, ...]` to `length` positions, or grow it with zeros."""

    def leaf_of_length(leaf: jax.Array) -> jax.Array:
        if length <= leaf.shape[1]:
            return leaf[:, :length]
        pad = [(0, 0)] * leaf.ndim
        pad[1] = (0, length - leaf.shape[1])
        return jnp.pad(leaf, pad)

    return jax.tree.map(leaf_of_length, cache)


def copy_row(cache: Cache, source: jax.Array, to: jax.Array, count: jax.Array) -> Cache:
    """Overwrite row `to` with the first `count` entries of row `source`, then zeros.

    Args:
      cache: leaves `[B, S, ...]`. source, to, count: int32 `[]`; `source` may be `to`.
    """

    def copy(leaf: jax.Array) -> jax.Array:
        row = lax.dynamic_slice_in_dim(leaf, source, 1, axis=0)
        is_kept = jnp.arange(leaf.shape[1], dtype=jnp.int32) < count
        is_kept = is_kept.reshape((1, -1) + (1,) * (leaf.ndim - 2))
        row = jnp.where(is_kept, row, jnp.zeros((), leaf.dtype))
        return lax.dynamic_update_slice_in_dim(leaf, row, to, axis=0)

    return jax.tree.map(copy, cache)


def insert_row(
    cache: Cache, prefix: Cache, slot: jax.Array, source: jax.Array
) -> Cache:
    """Overwrite row `slot` with row `source` of a shorter cache, then zeros.

    The zeros matter: attention multiplies unseen entries by zero, and a non-finite
    entry of an earlier sequence would turn that product to NaN.

    Args:
      cache: leaves `[B, S, ...]`. prefix: leaves `[P, T, ...]`, T <= S. slot, source:
        int32 `[]`.
    """

    def insert(leaf: jax.Array, short: jax.Array) -> jax.Array:
        row = lax.dynamic_slice_in_dim(short, source, 1, axis=0)
        row = resize(row, leaf.shape[1])
        return lax.dynamic_update_slice_in_dim(leaf, row, slot, axis=0)

    return jax.tree.map(insert, cache, prefix)
