"""Attention of few queries over the cache on a TPU: one Pallas kernel.

The grid is rows times blocks of entries. A block of keys and one of values come on chip
while the block before is used; scores never leave it. The softmax is taken as the
blocks go by, with a running maximum and a running sum (Milakov and Gimelshein 2018,
arXiv 1805.02867; over the cache of a decoder, Dao et al. 2023, "Flash-Decoding").
Blocks behind the last entry that a row's queries see are neither fetched nor computed.

Left out: gradients, quantized entries, pages.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Numbers in a line of a TPU's registers; a slice of an entry is as wide, or wider.
LANES = 128

# Entries of a row come in whole tiles of so many, for numbers of 16 bits.
TILE = 16

# Bytes of a block of keys. Large enough to hide what a step of the grid costs beside
# the transfer; small enough that little is read behind a row's last entry. And most
# entries of one, so that the scores of many queries fit beside it.
BLOCK_BYTES, BLOCK_ENTRIES = 2**19, 1024

# On-chip memory that the kernel asks for: two blocks of keys and of values in flight,
# and what it computes. Fewer than any TPU has since v4.
MEMORY_BYTES = 12 * 2**20

# Below all scores, and finite, so that the difference of two of them is.
FLOOR = -1e30


def refusal(
    query: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> str | None:
    """Return why the kernel does not take these arrays; None if it does."""
    heads, size = query.shape[2:]
    length, width = keys.shape[1:]
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{query.dtype} is not bfloat16 or float32"
    if not query.dtype == keys.dtype == values.dtype:
        return f"queries are {query.dtype}, entries {keys.dtype} and {values.dtype}"
    if max(size, LANES) % min(size, LANES) or width % LANES:
        return f"heads of {size} in entries of {width} do not fill lines of {LANES}"
    if length % TILE:
        return f"{length} entries are not whole tiles of {TILE}"
    if _memory_bytes(query, keys) > MEMORY_BYTES:
        return f"{heads} heads of {size} need more than {MEMORY_BYTES} bytes on chip"
    return None


def _block(keys: jax.Array) -> int:
    """Return the entries of a block."""
    _, length, width = keys.shape
    fitting = BLOCK_BYTES // (width * keys.dtype.itemsize)
    return min(max(fitting // LANES, 1) * LANES, BLOCK_ENTRIES, length)


def _memory_bytes(query: jax.Array, keys: jax.Array) -> int:
    """Return the bytes on chip that the kernel needs at least."""
    _, num_queries, heads, size = query.shape
    block, width = _block(keys), keys.shape[2]
    together = max(LANES // size, 1)
    # Queries and results twice, sums, and two columns that fill lines.
    row = 4 * max(size, LANES) * 4 + 2 * LANES * 4
    scores = 3 * num_queries * heads * together * block * 4 // (width // size)
    entries = 4 * block * width * keys.dtype.itemsize
    return entries + scores + num_queries * heads * row


@jax.named_scope("kernel")
def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    interpret: Any = False,
) -> jax.Array:
    """Attend as `attention.attend` does; no `refusal` must speak against it.

    Args:
      query: `[B, T, H, D]`, bfloat16 or float32, over the square root of D already.
      keys, values: `[B, S, K * D]`, of the same type.
      positions: `[B, T]` int32; padding (-1) returns zeros, or NaN beside a non-finite
        entry of its row.
      interpret: run on any device, as Pallas interprets; for tests.
    Returns:
      `[B, T, H * D]`, NaN where a query sees a non-finite entry.
    Accuracy: sums and softmax are in float32; weights are rounded to the type of the
      values before they are multiplied by these.
    """
    batch, num_queries, heads, size = query.shape
    length, width = keys.shape[1:]
    # An entry is cut in slices that fill lines. Heads smaller than a line share one;
    # their queries are block-diagonal in it.
    lanes = max(size, LANES)
    together, num_slices = lanes // size, width // lanes
    group = heads * size // width
    q = query.reshape(batch, num_queries, num_slices, together, group, size)
    q = jnp.moveaxis(q, 2, 1)
    own = jnp.eye(together, dtype=query.dtype)[None, None, None, :, None, :, None]
    q = q[..., None, :] * own if together > 1 else q
    count = num_queries * together * group
    q = q.reshape(batch, num_slices, count, lanes)
    block = _block(keys)
    last = jnp.maximum(jnp.max(positions, axis=1), 0) // block

    def whole(row: Any, *_: Any) -> tuple[Any, ...]:
        return row, 0, 0, 0

    def entries(row: Any, at: Any, last: Any, _: Any) -> tuple[Any, ...]:
        # The same block again is not fetched again.
        return row, jnp.minimum(at, last[row]), 0

    out = pl.pallas_call(
        functools.partial(
            _attend_block, num_queries=num_queries, block=block, length=length
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, pl.cdiv(length, block)),
            in_specs=[
                pl.BlockSpec((1, num_slices, count, lanes), whole),
                pl.BlockSpec((1, block, width), entries),
                pl.BlockSpec((1, block, width), entries),
            ],
            out_specs=pl.BlockSpec((1, num_slices, count, lanes), whole),
            scratch_shapes=[
                pltpu.VMEM((num_slices, count, 1), jnp.float32),
                pltpu.VMEM((num_slices, count, 1), jnp.float32),
                pltpu.VMEM((num_slices, count, lanes), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * math.prod(q.shape) * length,
            bytes_accessed=2 * (q.nbytes + keys.nbytes),
            transcendentals=batch * num_slices * count * length,
        ),
        interpret=interpret,
        name="attention",
    )(last, positions.reshape(-1), q, keys, values)
    out = out.reshape(batch, num_slices, num_queries, together, group, together, size)
    # Of a line that heads share, each has its own part.
    parts = [out[:, :, :, head, :, head] for head in range(together)]
    out = jnp.moveaxis(jnp.stack(parts, axis=3), 1, 2)
    out = out.reshape(batch, num_queries, heads * size)
    # Of an entry the kernel reads the head of a query only. If that is not finite, no
    # head of the query may go on.
    is_sound = jnp.all(jnp.isfinite(out), axis=-1, keepdims=True)
    return jnp.where(is_sound, out, jnp.asarray(jnp.nan, out.dtype))


def _attend_block(
    last: Any,
    positions: Any,
    query: Any,
    keys: Any,
    values: Any,
    out: Any,
    top: Any,
    total: Any,
    sums: Any,
    *,
    num_queries: int,
    block: int,
    length: int,
) -> None:
    """Add a block of entries to the sums of its row; the last step writes the result.

    With C slices of L numbers and R merged queries of a row, in the order of T:

    Args:
      last: int32 `[B]`, the last block that a query of the row sees; positions: int32
        `[B * T]`; both scalars.
      query, out: `[1, C, R, L]`. keys, values: `[1, block, C * L]`.
      top, total: float32 `[C, R, 1]`, the greatest score so far, and the sum of weights
        relative to it. sums: float32 `[C, R, L]`, the sum of weighted values.
      num_queries: T. length: S; the last block may reach behind it.
    """
    row, at = pl.program_id(0), pl.program_id(1)
    _, num_slices, count, lanes = query.shape
    # Products of float32 numbers would otherwise be those of their first 8 bits.
    precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else None

    @pl.when(at == 0)
    def clear() -> None:
        top[...] = jnp.full(top.shape, FLOOR, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    @pl.when(at <= last[row])
    def add() -> None:
        # The position of each merged query; scalars cannot be gathered to a column.
        index = lax.broadcasted_iota(jnp.int32, (count, 1), 0)
        seen = jnp.full((count, 1), positions[row * num_queries], jnp.int32)
        for t in range(1, num_queries):
            is_from = index >= t * (count // num_queries)
            seen = jnp.where(is_from, positions[row * num_queries + t], seen)
        entry = lax.broadcasted_iota(jnp.int32, (count, block), 1) + at * block
        is_visible = entry <= seen
        for part in range(num_slices):
            slice_ = slice(part * lanes, (part + 1) * lanes)
            scores = lax.dot_general(
                query[0, part], keys[0, :, slice_], (((1,), (1,)), ((), ())),
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip
            # A score of -inf would weigh nothing, as if its entry were not seen.
            is_sound = jnp.abs(scores) < jnp.inf
            scores = jnp.where(is_sound, scores, jnp.float32(jnp.nan))
            scores = jnp.where(is_visible, scores, jnp.float32(FLOOR))
            before = top[part]
            now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            rescale = jnp.exp(before - now)
            weights = jnp.exp(scores - now)
            weights = jnp.where(is_visible, weights, jnp.float32(0))
            value = values[0, :, slice_]
            if length % block:
                # What lies behind the cache may be anything.
                place = lax.broadcasted_iota(jnp.int32, (block, lanes), 0) + at * block
                value = jnp.where(place < length, value, jnp.zeros_like(value))
            top[part] = now
            total[part] = rescale * total[part] + jnp.sum(
                weights, axis=1, keepdims=True
            )
            sums[part] = rescale * sums[part] + lax.dot_general(
                weights.astype(value.dtype), value, (((1,), (0,)), ((), ())),
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip

    @pl.when(at == pl.num_programs(1) - 1)
    def finish() -> None:
        for part in range(num_slices):
            # Padding has sums of zero.
            divisor = jnp.maximum(total[part], jnp.float32(1e-30))
            out[0, part] = (sums[part] / divisor).astype(out.dtype)
