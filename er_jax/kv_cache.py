"""The static key/value cache: write, attend, take rows, grow, insert a prefix.

A cache is any pytree whose leaves are `[B, S, ...]`. Entry s of a row belongs to the
token at position s, so the mask is a comparison of two integers, and dropping a
rejected draft costs nothing. Only `attend`, of the module `attention`, knows what an
entry means; the functions here move whole rows.

The built-in decoder has one `[B, S, K * D]` leaf for keys and one for values per layer.
Heads stay merged so that both minor axes are long: nothing is padded to a tile, and no
backend has to transpose the cache to batch over heads (see `attention`).

The leaves of layers that see a window are rings. Where all positions of a call are
written at once (prefill, training), a ring has a slot for each; a state keeps the
window and room for a round's drafts (`resize`, `insert_row`).

Drafts may see a span of the positions only. Its entries are then copied to rings
(`rings`), and after every round the target's new ones (`update_rings`); the drafts are
written to the rings alone.

Left out: paging, quantized entries.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from er_jax.attention import attend as attend
from er_jax.attention import visible
from er_jax.types import NONE, RING_DRAFTS, Cache, Params, Policy, Ring, Span

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


def is_ring(leaf: Any) -> bool:
    """Whether a node of a cache is a ring: `is_leaf` of `jax.tree.map`."""
    return isinstance(leaf, Ring)


def ring_slots(policy: Policy) -> int | None:
    """Return the slots of the shortest ring in a long state; None without rings."""
    cache = jax.eval_shape(lambda: policy.init_cache(1, 1))
    found = [
        leaf.span.ring_length(RING_DRAFTS)
        for leaf in jax.tree.leaves(cache, is_leaf=is_ring)
        if is_ring(leaf)
    ]
    return min(found, default=None)


def check_room(cache: Cache, cache_length: int, gamma: int) -> None:
    """Refuse, while tracing, a round with more drafts than a ring has room for.

    Args:
      cache: of a state. cache_length: of it. gamma: drafts of the round.
    """
    for leaf in jax.tree.leaves(cache, is_leaf=is_ring):
        if not is_ring(leaf) or leaf.entries.shape[1] >= cache_length:
            continue
        room = leaf.entries.shape[1] - sum(leaf.span)
        if gamma > room:
            raise ValueError(
                f"gamma={gamma} drafts would replace entries that a window of "
                f"{leaf.span.window} positions still sees; draft at most {room}"
            )


def rings(cache: Cache, span: Span, length: jax.Array, gamma: int) -> Cache:
    """Return rings in the place of all leaves, with the entries of a span.

    Of a layer that sees a window itself, drafts see what is in both windows, without
    the head.

    Args:
      cache: leaves `[B, S, ...]`, or rings. span: what the rings hold.
      length: int32 `[B]`, known tokens; entries up to `length - 2` exist. Slots without
        an entry are zero.
      gamma: drafts of a round.
    """
    last = jnp.asarray(length) - 2

    def copied(row: jax.Array) -> Cache:
        def ring(leaf: jax.Array | Ring) -> Ring:
            own = span
            if isinstance(leaf, Ring):
                own = Span(0, min(leaf.span.window, span.window))
            size = own.ring_length(gamma)
            return Ring(entries=_held(leaf, row, last[row], own, size), span=own)

        return jax.tree.map(ring, cache, is_leaf=is_ring)

    # Row by row: a gather of all rows at once would move single entries.
    return lax.map(copied, jnp.arange(len(last), dtype=jnp.int32))


def _held(
    leaf: jax.Array | Ring, row: jax.Array, last: jax.Array, span: Span, size: int
) -> jax.Array:
    """Return what a ring holds of a row, `[size, ...]`; zero where there is no entry.

    Args:
      leaf: `[B, S, ...]`, or a ring without a head. row: int32 `[]`. last: int32 `[]`,
        the last position with an entry. span, size: of the ring that is made.
    """
    source = leaf.entries if isinstance(leaf, Ring) else leaf
    length, rest = source.shape[1], source.shape[2:]
    num_recent = size - span.head

    def entries(first: jax.Array, count: int) -> jax.Array:
        start = [row, first] + [jnp.int32(0)] * len(rest)
        return lax.dynamic_slice(source, start, (1, count, *rest))[0]

    # The last entries in the order of their positions, the first of them at `first`.
    count = min(num_recent, length)
    if isinstance(leaf, Ring):
        in_order = jnp.roll(entries(jnp.int32(0), length), -(last + 1), axis=0)
        recent, first = in_order[length - count :], last + 1 - count
    else:
        first = jnp.clip(last + 1 - num_recent, 0, length - count)
        recent = entries(first, count)
    # Turned round, each is in its slot.
    recent = resize(recent[None], num_recent)[0]
    recent = jnp.roll(recent, (first - span.head) % num_recent, axis=0)
    head = entries(jnp.int32(0), min(span.head, length))
    both = jnp.concatenate([resize(head[None], span.head)[0], recent])
    slots = jnp.arange(size, dtype=jnp.int32)
    newest = last - (last - slots) % num_recent
    positions = jnp.where(slots < span.head, slots, newest)
    is_held = (positions >= jnp.minimum(slots, span.head)) & (positions <= last)
    mask = is_held.reshape((-1,) + (1,) * len(rest))
    return jnp.where(mask, both, jnp.zeros((), source.dtype))


def takes_rings(policy: Policy, params: Params) -> bool:
    """Whether a policy treats its cache with `write` and `attend` only.

    Found by tracing one token with leaves that nothing else can work with. A policy
    that handles the arrays itself would take a ring for a short cache.

    Args:
      policy: the model. params: its parameters, or their shapes.
    """

    def opaque(leaf: jax.Array | Ring) -> _Opaque:
        if isinstance(leaf, Ring):
            return _Opaque(entries=leaf.entries, span=leaf.span)
        return _Opaque(entries=leaf, span=Span(0, 1))

    def run(params: Params) -> jax.Array:
        cache = jax.tree.map(opaque, policy.init_cache(1, 1), is_leaf=is_ring)
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
      ring_cache: from `rings`. cache: leaves `[B, S, ...]`, or rings.
      positions: int32 `[B, T]`; -1 copies nothing.
    """

    def update(ring: Ring, leaf: jax.Array | Ring) -> Ring:
        return write(ring, read(leaf, positions), positions)

    return jax.tree.map(update, ring_cache, cache, is_leaf=is_ring)


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """Gather rows `[R]` into a cache of R rows."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), cache)


def resize(cache: Cache, length: int) -> Cache:
    """Shorten every leaf `[B, S, ...]` to `length` positions, or grow it with zeros.

    A ring gets the slots of a state of that length. Their number changes only where
    there is one for each position, so an entry stays in its slot.
    """

    def leaf_of_length(leaf: jax.Array | Ring) -> jax.Array | Ring:
        if isinstance(leaf, Ring):
            slots = min(length, leaf.span.ring_length(RING_DRAFTS))
            return dataclasses.replace(leaf, entries=resize(leaf.entries, slots))
        if length <= leaf.shape[1]:
            return leaf[:, :length]
        pad = [(0, 0)] * leaf.ndim
        pad[1] = (0, length - leaf.shape[1])
        return jnp.pad(leaf, pad)

    return jax.tree.map(leaf_of_length, cache, is_leaf=is_ring)


def copy_row(cache: Cache, source: jax.Array, to: jax.Array, count: jax.Array) -> Cache:
    """Overwrite row `to` with the first `count` entries of row `source`, then zeros.

    Of a ring these are the entries that a token behind them sees; it must hold them.

    Args:
      cache: leaves `[B, S, ...]`, or rings.
      source, to, count: int32 `[]`; `source` may be `to`. A count of `NONE` copies all
        of the row.
    """

    def kept(leaf: jax.Array | Ring) -> jax.Array:
        if isinstance(leaf, Ring):
            last = (count - 1).reshape(1, 1)
            return visible(last, leaf.entries.shape[1], leaf.span)[0, 0]
        return jnp.arange(leaf.shape[1], dtype=jnp.int32) < count

    def copy(leaf: jax.Array | Ring) -> jax.Array | Ring:
        entries = leaf.entries if isinstance(leaf, Ring) else leaf
        row = lax.dynamic_slice_in_dim(entries, source, 1, axis=0)
        is_kept = (kept(leaf) | (count == NONE)).reshape(
            (1, -1) + (1,) * (entries.ndim - 2)
        )
        row = jnp.where(is_kept, row, jnp.zeros((), entries.dtype))
        entries = lax.dynamic_update_slice_in_dim(entries, row, to, axis=0)
        if isinstance(leaf, Ring):
            return dataclasses.replace(leaf, entries=entries)
        return entries

    return jax.tree.map(copy, cache, is_leaf=is_ring)


def insert_row(
    cache: Cache,
    prefix: Cache,
    slot: jax.Array,
    source: jax.Array,
    count: jax.Array,
) -> Cache:
    """Overwrite row `slot` with row `source` of a shorter cache, then zeros.

    The zeros matter: attention multiplies unseen entries by zero, and a non-finite
    entry of an earlier sequence would turn that product to NaN.

    Args:
      cache: leaves `[B, S, ...]`, or rings.
      prefix: leaves `[P, T, ...]`, T <= S, or rings of T slots.
      slot, source: int32 `[]`. count: int32 `[]`, entries of the row of `prefix`.
    """

    def insert(leaf: jax.Array | Ring, short: jax.Array | Ring) -> jax.Array | Ring:
        if isinstance(leaf, Ring):
            assert isinstance(short, Ring)
            size = leaf.entries.shape[1]
            row = _held(short.entries, source, count - 1, leaf.span, size)
            entries = lax.dynamic_update_slice_in_dim(
                leaf.entries, row[None], slot, axis=0
            )
            return dataclasses.replace(leaf, entries=entries)
        assert not isinstance(short, Ring)
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

    return jax.tree.map(insert, cache, prefix, is_leaf=is_ring)
