"""The static key/value cache: write, attend, take rows, grow, insert a prefix.

A cache is any pytree whose leaves are `[B, S, ...]`. Entry s of a row belongs to the
token at position s, so the mask is a comparison of two integers, and dropping a
rejected draft costs nothing. Only `attend`, of the module `attention`, knows what an
entry means; the functions here move whole rows.

The built-in decoder has one `[B, S, K * D]` leaf for keys and one for values per layer.
Heads stay merged so that both minor axes are long: nothing is padded to a tile, and no
backend has to transpose the cache to batch over heads (see `attention`).

Drafts may see a span of the positions only. Its entries are then copied to rings
(`rings`), and after every round the target's new ones (`update_rings`); the drafts are
written to the rings alone.

Left out: paging, quantized entries.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from er_jax.attention import attend as attend
from er_jax.types import Cache, Params, Policy, Ring, Span

Entries = TypeVar("Entries", jax.Array, Ring)


def write(entries: Entries, new: jax.Array, positions: jax.Array) -> Entries:
    """Write one entry per position, in place where the buffer may be reused.

    Args:
      entries: `[B, S, ...]`, or a ring. new: `[B, T, ...]`.
      positions: `[B, T]` int32; negative ones are dropped (-1 is padding), and in an
        array those from S on.
    """
    if isinstance(entries, Ring):
        written = write(entries.entries, new, _slots(entries, positions))
        return dataclasses.replace(entries, entries=written)
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


def read(entries: jax.Array | Ring, positions: jax.Array) -> jax.Array:
    """Return the entries at positions, for policies that look back without attention.

    Args:
      entries: `[B, S, ...]`, or a ring; of a position that it does not hold, it returns
        some other entry.
      positions: int32 `[B, T]`; entries at negative ones are zero.
    Returns:
      `[B, T, ...]`.
    """
    if isinstance(entries, Ring):
        return read(entries.entries, _slots(entries, positions))
    index = positions.reshape(positions.shape + (1,) * (entries.ndim - 2))
    found = jnp.take_along_axis(entries, index, axis=1, mode="clip")
    return jnp.where(index >= 0, found, jnp.zeros((), entries.dtype))


def _slots(ring: Ring, positions: jax.Array) -> jax.Array:
    """Return the slots of positions in a ring, int32 `[B, T]`; see `types.Ring`."""
    size, (head, _) = ring.entries.shape[1], ring.span
    recent = head + (positions - head) % (size - head)
    return jnp.where(positions < head, positions, recent)


def rings(cache: Cache, span: Span, length: jax.Array, gamma: int) -> Cache:
    """Return rings in the place of all leaves, with the entries of a span.

    Args:
      cache: leaves `[B, S, ...]`. span: what the rings hold.
      length: int32 `[B]`, known tokens; entries up to `length - 2` exist. Slots without
        an entry are zero.
      gamma: drafts of a round.
    """
    size, num_rows = span.ring_length(gamma), length.shape[0]
    slots = jnp.arange(size, dtype=jnp.int32)
    num_recent = size - span.head
    last = jnp.asarray(length) - 2

    def copied(row: jax.Array) -> Cache:
        recent = last[row] - (last[row] - slots) % num_recent
        positions = jnp.where(slots < span.head, slots, recent)
        is_held = (positions >= jnp.minimum(slots, span.head)) & (
            positions <= last[row]
        )

        def ring(leaf: jax.Array) -> Ring:
            rest = leaf.shape[2:]

            def entries(first: jax.Array, count: int) -> jax.Array:
                start = [row, first] + [jnp.int32(0)] * len(rest)
                count = min(count, leaf.shape[1])
                return lax.dynamic_slice(leaf, start, (1, count, *rest))[0]

            # The last entries lie together; turned round, each is in its slot.
            first = jnp.clip(last[row] + 1 - num_recent, 0, leaf.shape[1])
            first = jnp.minimum(first, max(leaf.shape[1] - num_recent, 0))
            recent = resize(entries(first, num_recent)[None], num_recent)[0]
            recent = jnp.roll(recent, (first - span.head) % num_recent, axis=0)
            head = resize(entries(jnp.int32(0), span.head)[None], span.head)[0]
            both = jnp.concatenate([head, recent])
            mask = is_held.reshape((-1,) + (1,) * len(rest))
            both = jnp.where(mask, both, jnp.zeros((), leaf.dtype))
            return Ring(entries=both, span=span)

        return jax.tree.map(ring, cache)

    # Row by row: a gather of all rows at once would move single entries.
    return lax.map(copied, jnp.arange(num_rows, dtype=jnp.int32))


def takes_rings(policy: Policy, params: Params) -> bool:
    """Whether a policy treats its cache with `write` and `attend` only.

    Found by tracing one token with leaves that nothing else can work with. A policy
    that handles the arrays itself would take a ring for a short cache.

    Args:
      policy: the model. params: its parameters, or their shapes.
    """
    span = Span(0, 1)

    def run(params: Params) -> jax.Array:
        cache = jax.tree.map(
            lambda leaf: _Opaque(entries=leaf, span=span), policy.init_cache(1, 1)
        )
        tokens = jnp.zeros((1, 1), jnp.int32)
        hidden, cache = policy.forward(params, tokens, tokens, cache)
        if not all(isinstance(leaf, _Opaque) for leaf in jax.tree.leaves(cache)):
            raise TypeError("the cache holds other leaves than before")
        return hidden

    try:
        jax.eval_shape(run, params)
    except Exception:
        return False
    return True


class _Opaque(Ring):
    """A ring that JAX takes for one leaf, and that has no array's methods."""


def update_rings(ring_cache: Cache, cache: Cache, positions: jax.Array) -> Cache:
    """Copy the entries at some positions from a cache to its rings.

    Args:
      ring_cache: from `rings`. cache: leaves `[B, S, ...]`.
      positions: int32 `[B, T]`; -1 copies nothing.
    """

    def update(ring: Ring, leaf: jax.Array) -> Ring:
        return write(ring, read(leaf, positions), positions)

    return jax.tree.map(
        update, ring_cache, cache, is_leaf=lambda leaf: isinstance(leaf, Ring)
    )


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
        zeros = jnp.zeros(
            (1, leaf.shape[1] - row.shape[1], *leaf.shape[2:]), leaf.dtype
        )
        first = [slot] + [jnp.int32(0)] * (leaf.ndim - 1)
        leaf = lax.dynamic_update_slice(leaf, row, first)
        first[1] = jnp.int32(row.shape[1])
        # Written apart: a padded row is one more copy of the prefix, which XLA makes of
        # all leaves before a loop over rows that start from the same prompt.
        return lax.dynamic_update_slice(leaf, zeros, first)

    return jax.tree.map(insert, cache, prefix)
