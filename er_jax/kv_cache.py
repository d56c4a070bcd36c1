"""The static key/value cache: write, attend, take rows, grow, insert a prefix.

A cache is any pytree whose leaves are `[B, S, ...]`. Entry s of a row belongs to the
token at position s, so the mask is a comparison of two integers, and dropping a
rejected draft costs nothing. Only `attend`, of the module `attention`, knows what an
entry means; the functions here move whole rows.

The built-in decoder has one `[B, S, K * D]` leaf for keys and one for values per layer.
Heads stay merged so that both minor axes are long: nothing is padded to a tile, and no
backend has to transpose the cache to batch over heads (see `attention`).

Left out: paging, ring buffers, quantized entries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from er_jax.attention import attend as attend
from er_jax.types import Cache


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
