"""Attention of new tokens over the cache, for prefill, verification, drafts, training.

Entry s of a row is visible to a query at position p when s <= p. Few queries per row
are bound by reading the cache; many are bound by arithmetic, and are taken in blocks,
so that their scores never cover all queries and all entries at once. A CPU takes long
caches in blocks of entries as well, and leaves out those that nobody sees.

What stands here is the form of XLA, which runs everywhere. Where queries are few, a
program may use a kernel of its platform instead (`kernels.choice`).

Left out: what the cache is and how it is written (`kv_cache`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from er_jax.kernels import choice
from er_jax.types import NONE, Ring, Span, wide_dtype

# Up to this many queries per row, attention is bound by reading the cache.
MERGED_QUERIES = 16

# Entries that the CPU path for non-finite values cleans at a time, at most.
CAREFUL_ENTRIES = 128

# Up to this many merged queries per row, the keys are the left factor on CPU.
KEYS_FIRST_QUERIES = 16

# From this length on, a CPU takes the cache in blocks, as far as there are entries.
LONG_CACHE = 1024

# Entries of such a block: of all rows together (1024 keys of 256 numbers are 1 MB in
# float32), and at least of each row. At most an eighth of a cache is copied at a time.
BLOCK_ENTRIES, LEAST_ENTRIES = 1024, 128

# Queries of a row that meet such a block together, at most.
LIVE_QUERIES = 64

# What an entry scores that a query does not see, and the least maximum of a query. The
# exponential of their distance is zero.
UNSEEN, LEAST_SCORE = -1e30, -1e29

# Most scores of one head and row at a time, where queries are many: 2 MB in float32.
BLOCK_SCORES = 2**19

# Fewest queries of a block: smaller products would not fill a device.
LEAST_BLOCK = 32

# Of the blocks so far, for every query: whether it has seen a non-finite entry, its
# highest score, the sum of its weights and that of weighted values.
Carry: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

# query, keys, values, positions, span -> output, as in `attend_whole`.
Attention: TypeAlias = Callable[
    [jax.Array, jax.Array, jax.Array, jax.Array, Span | None], jax.Array
]


def attend(
    query: jax.Array,
    keys: jax.Array | Ring,
    values: jax.Array | Ring,
    positions: jax.Array,
) -> jax.Array:
    """Grouped-query attention of new tokens over the cache.

    Entry s is visible to a query at position p when s <= p. The softmax is in float32
    or wider. Few queries per row are multiplied, all heads as one block-diagonal query,
    against the merged cache: K times the (few) multiplications, and one read of the
    cache without a transposition. Many queries (prefill, training) are bound by
    arithmetic and take the usual form, in blocks; the backward pass computes the scores
    of a block again.

    A query that sees a non-finite entry returns NaN; entries that a query does not see
    do not change its result. With few queries on an accelerator the latter does not
    hold, because it would cost another pass over the cache: there a non-finite entry
    may turn all queries of its row to NaN, and `steps.decode_round` runs such a row
    again, one token at a time.

    Args:
      query: `[B, T, H, D]`.
      keys, values: `[B, S, K * D]`, or rings of such entries: queries then see the
        ring's span only.
      positions: `[B, T]` int32; padding (-1) sees nothing and returns zeros.
    Returns:
      `[B, T, H * D]` in the dtype of `query`.
    """
    if isinstance(keys, Ring) and isinstance(values, Ring):
        entries = (keys.entries, values.entries)
        return _attention.get()(query, *entries, positions, keys.span)
    assert not isinstance(keys, Ring) and not isinstance(values, Ring)
    return _attention.get()(query, keys, values, positions, None)


@contextlib.contextmanager
def replaced(function: Attention) -> Iterator[None]:
    """Replace `attend` by another function while a program is traced.

    Programs whose heads are sharded over devices use it; the policy need not know.
    """
    token = _attention.set(function)
    try:
        yield
    finally:
        _attention.reset(token)


def attend_whole(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    span: Span | None = None,
) -> jax.Array:
    """Attend with all heads on one device; see `attend`.

    span: of the ring whose entries `keys` and `values` are; None if they are indexed by
    position.
    """
    is_many = query.shape[1] > MERGED_QUERIES
    # A ring is short, and its scores are few: they need no kernel.
    if not is_many and span is None:
        kernel = choice.kernel_for(query, keys, values, positions)
        if kernel is not None:
            scaled = _scaled(query, keys.shape[2] // query.shape[3])
            return kernel(scaled.reshape(query.shape), keys, values, positions)
    form = functools.partial(_attend_many if is_many else _attend_few, span=span)
    if span is not None or keys.shape[1] < LONG_CACHE:
        return form(query, keys, values, positions)
    return lax.platform_dependent(
        query, keys, values, positions, cpu=_attend_live, default=form
    )


def _scaled(query: jax.Array, kv_heads: int) -> jax.Array:
    """Return queries over the square root of D, `[B, T, K, H / K, D]`."""
    *front, heads, size = query.shape
    scale = jnp.asarray(size**-0.5, query.dtype)
    return (query * scale).reshape(*front, kv_heads, heads // kv_heads, size)


def _block_diagonal(q: jax.Array) -> jax.Array:
    """Merge queries `[B, T, K, H / K, D]` to `[B, T * H, K * D]`, zero but for a head.

    The query of head i meets only the part of head i in a merged entry.
    """
    batch, num_queries, kv_heads, group, size = q.shape
    # [.., K, 1, K, 1]. Chosen, not multiplied by zero: a product that XLA tiles for a
    # GPU may hold scales inside (`engine.lowering`), but fails with this one.
    own = jnp.eye(kv_heads, dtype=jnp.bool_)[None, None, :, None, :, None]
    merged = jnp.where(own, q[..., None, :], jnp.zeros((), q.dtype))
    return merged.reshape(batch, num_queries * kv_heads * group, kv_heads * size)


def _diagonal(out: jax.Array, num_queries: int, kv_heads: int) -> jax.Array:
    """Take each head's own part of `[B, T * H, K * D]`, as `[B, T, H * D]`."""
    batch = len(out)
    out = out.reshape(
        batch, num_queries, kv_heads, -1, kv_heads, out.shape[2] // kv_heads
    )
    # Slices; a product with the mask of `_block_diagonal` would read all K parts again.
    parts = [out[:, :, head, :, head] for head in range(kv_heads)]
    return jnp.stack(parts, axis=2).reshape(batch, num_queries, -1)


def visible(positions: jax.Array, length: int, span: Span | None) -> jax.Array:
    """Whether a query sees an entry, bool `[B, T, S]`, the same for all heads.

    Args:
      positions: int32 `[B, T]`, of the queries. length: S, of cache or ring.
      span: of a ring; None for a cache that is indexed by position.
    """
    slots = jnp.arange(length, dtype=positions.dtype)[None, None]
    at = positions[..., None]
    if span is None:
        return slots <= at
    # The newest position that slot s may hold for this query. Entries of later ones,
    # of rejected drafts, have replaced none that the query should see: the ring is
    # longer than the window by the drafts of a round.
    newest = at - (at - slots) % (length - span.head)
    is_recent = (newest >= span.head) & (newest > at - span.window)
    return jnp.where(slots < span.head, slots <= at, is_recent)


def _weights(scores: jax.Array, mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the softmax over the last axis, where `mask`; zeros where it is empty."""
    wide = scores.dtype
    # The floor is finite, so that a query which sees nothing gives zeros, not NaN.
    scores = jnp.where(mask, scores, jnp.asarray(-1e30, wide))
    top = lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
    exp = jnp.where(mask, jnp.exp(scores - top), jnp.zeros((), wide))
    total = jnp.sum(exp, -1, keepdims=True)
    return (exp / jnp.maximum(total, jnp.asarray(1e-30, wide))).astype(dtype)


def _attend_many(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    span: Span | None,
) -> jax.Array:
    """Attend with heads as a batch axis, a block of queries after the other."""
    batch, _, heads, size = query.shape
    length, kv_heads = keys.shape[1], keys.shape[2] // size
    wide = wide_dtype(query.dtype)
    is_sound = _is_sound(keys, values)
    k = keys.reshape(batch, length, kv_heads, size)
    v = jnp.where(is_sound[..., None], values, jnp.zeros((), values.dtype))
    v = v.reshape(batch, length, kv_heads, size)

    def attend_block(query: jax.Array, positions: jax.Array) -> jax.Array:
        q, seen = _scaled(query, kv_heads), visible(positions, length, span)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=wide)
        probs = _weights(scores, seen[:, None, None], query.dtype)
        out = jnp.einsum("bkgts,bskd->btkgd", probs, v)
        out = out.reshape(*positions.shape, heads * size)
        return _with_nan(out, _sees_bad(seen, is_sound))

    block = max(BLOCK_SCORES // length, LEAST_BLOCK)
    return _in_blocks(attend_block, query, positions, block)


def _in_blocks(
    attend_block: Callable[[jax.Array, jax.Array], jax.Array],
    query: jax.Array,
    positions: jax.Array,
    block: int,
) -> jax.Array:
    """Attend with `block` queries after the other, each computed again for gradients.

    attend_block: queries `[B, block, H, D]` and positions `[B, block]` ->
      `[B, block, H * D]`.
    """
    batch, num_queries, heads, size = query.shape
    if num_queries <= block:
        return attend_block(query, positions)
    num_blocks = -(-num_queries // block)
    more = num_blocks * block - num_queries

    def blocks_of(x: jax.Array, fill: int) -> jax.Array:
        pad = [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, pad, constant_values=jnp.asarray(fill, x.dtype))
        x = x.reshape(batch, num_blocks, block, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    out = lax.map(
        lambda part: jax.checkpoint(attend_block)(*part),
        (blocks_of(query, 0), blocks_of(positions, NONE)),
    )
    out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads * size)
    return out[:, :num_queries]


def _attend_few(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    span: Span | None,
) -> jax.Array:
    """Attend with all heads as one block-diagonal query against the merged entries."""
    batch, num_queries, heads, size = query.shape
    length, kv_heads = keys.shape[1], keys.shape[2] // size
    wide = wide_dtype(query.dtype)
    q, seen = _scaled(query, kv_heads), visible(positions, length, span)
    merged = _block_diagonal(q)

    def product(merged: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.einsum("bqf,bsf->bqs", merged, keys, preferred_element_type=wide)

    def keys_first(merged: jax.Array, keys: jax.Array) -> jax.Array:
        # XLA's CPU backend repacks the right factor: the few queries cost less.
        scores = jnp.einsum("bsf,bqf->bsq", keys, merged, preferred_element_type=wide)
        return jnp.swapaxes(lax.optimization_barrier(scores), 1, 2)

    on_cpu = keys_first if num_queries * heads <= KEYS_FIRST_QUERIES else product
    scores = lax.platform_dependent(merged, keys, cpu=on_cpu, default=product)
    scores = scores.reshape(batch, num_queries, heads, length)
    probs = _weights(scores, seen[:, :, None], query.dtype)
    probs = probs.reshape(batch, num_queries * heads, length)

    def combined(probs: jax.Array, values: jax.Array) -> jax.Array:
        out = jnp.einsum("bqs,bsf->bqf", probs, values)
        return _diagonal(out, num_queries, kv_heads)

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
            sees = _sees_bad(part(seen, 2), is_sound)
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


def _attend_live(
    query: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> jax.Array:
    """Attend on a CPU to a long cache: blocks of entries, up to the last one seen."""
    batch, length = keys.shape[:2]
    block = max(min(BLOCK_ENTRIES // batch, length // 8), LEAST_ENTRIES)
    block = min(block, length)

    def run(
        query: jax.Array, positions: jax.Array, is_sound: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        return _attend_entries(query, keys, values, positions, block, is_sound)

    if query.shape[1] > MERGED_QUERIES:
        is_sound = _is_sound(keys, values)
        return _in_blocks(
            lambda query, positions: _with_nan(*run(query, positions, is_sound)),
            query, positions, LIVE_QUERIES,
        )  # fmt: skip
    # What is not finite is looked at again, as in `_attend_few`.
    out, _ = run(query, positions, None)
    out = jnp.where((positions >= 0)[..., None], out, jnp.zeros((), out.dtype))
    is_clean = jnp.all(jnp.isfinite(out), axis=(1, 2), keepdims=True)

    def mended() -> jax.Array:
        careful = _with_nan(*run(query, positions, _is_sound(keys, values)))
        return jnp.where(is_clean, out, careful)

    return lax.cond(jnp.all(is_clean), lambda: out, mended)


def _attend_entries(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    block: int,
    is_sound: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Attend to `block` entries of all rows after the other, with a running softmax.

    The scores of a block stay in a core's cache between the two products. Up to
    `KEYS_FIRST_QUERIES` merged queries meet whole entries, as in `_attend_few`; for
    more, K times the multiplications cost more than a copy of each head's part.

    is_sound: which entries are finite, bool `[B, S]`; the others are looked for, and
      their values left out. None takes all for finite.
    Returns:
      `[B, T, H * D]`, and whether a query sees a non-finite entry, `[B, T, 1]`.
    """
    batch, num_queries, heads, size = query.shape
    length, kv_heads = keys.shape[1], keys.shape[2] // size
    wide = wide_dtype(query.dtype)
    q = _scaled(query, kv_heads)
    is_merged = num_queries * heads <= KEYS_FIRST_QUERIES
    if is_merged:
        q = _block_diagonal(q)[:, None]
    else:
        q = jnp.moveaxis(q, 2, 1).reshape(batch, kv_heads, -1, size)
    parts, count, width = q.shape[1:]
    last = jnp.max(positions)
    of_query = jnp.repeat(positions, count // num_queries, axis=1)[..., None]

    def add(carry: Carry, index: jax.Array) -> Carry:
        # The last block begins earlier, with entries of the one before it.
        start = jnp.minimum(index * block, length - block)
        slots = (start + jnp.arange(block, dtype=jnp.int32))[None, None]
        seen = (slots <= of_query) & (slots >= index * block)
        sees_bad, are_sound = carry[0], None
        if is_sound is not None:
            are_sound = lax.dynamic_slice_in_dim(is_sound, start, block, axis=1)
            sees_bad |= _sees_bad(seen, are_sound)

        def part_of(entries: jax.Array, part: int) -> jax.Array:
            first = (jnp.int32(0), start, jnp.int32(part * width))
            return lax.dynamic_slice(
                entries, first, (batch, block, width), allow_negative_indices=False
            )

        def add_part(part: int) -> tuple[jax.Array, jax.Array, jax.Array]:
            k, v = part_of(keys, part), part_of(values, part)
            old_top, total, out = (x[:, part] for x in carry[1:])
            scores = jnp.einsum(
                "bqd,bsd->bqs", q[:, part], k, preferred_element_type=wide
            )
            # A key of -inf would weigh nothing.
            nan = jnp.asarray(jnp.nan, wide)
            scores = jnp.where(scores == -jnp.inf, nan, scores)
            scores = jnp.where(seen, scores, jnp.asarray(UNSEEN, wide))
            top = jnp.max(scores, -1, keepdims=True)
            top = lax.stop_gradient(jnp.maximum(old_top, top))
            weights, kept = jnp.exp(scores - top), jnp.exp(old_top - top)
            if are_sound is not None:
                v = jnp.where(are_sound[..., None], v, jnp.zeros((), v.dtype))
            total = total * kept + jnp.sum(weights, -1, keepdims=True)
            added = jnp.einsum(
                "bqs,bsd->bqd", weights.astype(v.dtype), v, preferred_element_type=wide
            )
            return top, total, out * kept + added

        found = zip(*map(add_part, range(parts)), strict=True)
        top, total, out = (jnp.stack(x, axis=1) for x in found)
        return sees_bad, top, total, out

    def step(carry: Carry, index: jax.Array) -> tuple[Carry, None]:
        # A conditional, because a loop of unknown length has no gradient.
        is_live = index * block <= last
        return lax.cond(is_live, add, lambda carry, _: carry, carry, index), None

    start = (
        jnp.zeros((batch, count, 1), jnp.bool_),
        jnp.full((batch, parts, count, 1), LEAST_SCORE, wide),
        jnp.zeros((batch, parts, count, 1), wide),
        jnp.zeros((batch, parts, count, width), wide),
    )
    blocks = jnp.arange(-(-length // block), dtype=jnp.int32)
    # For gradients, scores are computed again: those of all blocks would be a square.
    step = jax.checkpoint(step, prevent_cse=False)
    sees_bad, _, total, out = lax.scan(step, start, blocks)[0]
    out = (out / jnp.maximum(total, jnp.asarray(1e-30, wide))).astype(query.dtype)
    if is_merged:
        out = _diagonal(out[:, 0], num_queries, kv_heads)
    else:
        out = out.reshape(batch, kv_heads, num_queries, -1, size)
        out = jnp.moveaxis(out, 1, 2).reshape(batch, num_queries, heads * size)
    return out, sees_bad[:, :: count // num_queries]


_attention: contextvars.ContextVar[Attention] = contextvars.ContextVar(
    "attention", default=attend_whole
)


def _is_sound(keys: jax.Array, values: jax.Array) -> jax.Array:
    """Whether entries `[B, S, K * D]` are finite in key and value, bool `[B, S]`."""
    # The maximum is finite exactly if all numbers are, because it propagates NaN. Flags
    # per number would have to be written to memory.
    largest = [jnp.max(jnp.abs(entries), axis=-1) for entries in (keys, values)]
    return jnp.isfinite(largest[0]) & jnp.isfinite(largest[1])


def _sees_bad(seen: jax.Array, is_sound: jax.Array) -> jax.Array:
    """Whether a query sees a non-finite entry: `[B, T, S]`, `[B, S]` -> `[B, T, 1]`."""
    return jnp.any(seen & ~is_sound[:, None], axis=-1, keepdims=True)


def _with_nan(out: jax.Array, sees_bad: jax.Array) -> jax.Array:
    """Return the output `[B, T, H * D]`, NaN where `sees_bad` (`[B, T, 1]`)."""
    return jnp.where(sees_bad, jnp.asarray(jnp.nan, out.dtype), out)
