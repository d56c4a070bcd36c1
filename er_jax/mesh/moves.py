"""Moves of rows between data shards, when a state changes its size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from er_jax import kv_cache
from er_jax.types import NONE, Array, DecodeState


@struct.dataclass
class Moves:
    """Rows that change their data shard when a state changes its size.

    count: int32 `[]`, the number of moves; the rest of the arrays is padding.
    from_shard, from_row: int32 `[M]`, data shard and row (within it) in the old state.
    to_shard, to_row: int32 `[M]`, data shard and row (within it) in the new state.
    """

    count: Array
    from_shard: Array
    from_row: Array
    to_shard: Array
    to_row: Array


def plan_moves(
    rows: np.ndarray, old_rows: int, num_shards: int
) -> tuple[np.ndarray, Moves]:
    """Separate the rows that stay in their data shard from those that move.

    Args:
      rows: int `[R]`, the old row of each new row, over all shards; `NONE` for an empty
        one.
      old_rows: rows of the old state. num_shards: data shards, with equally many rows.
    Returns:
      int32 `[R]`, the old row (within its shard) of each new row, `NONE` where it is
      empty or comes from another shard; and the moves between shards.
    """
    old_each, new_each = old_rows // num_shards, len(rows) // num_shards
    to = np.arange(len(rows))
    shard, is_some = rows // old_each, rows != NONE
    is_moved = is_some & (shard != to // new_each)
    local = np.where(is_some & ~is_moved, rows % old_each, NONE)
    moved = np.flatnonzero(is_moved)

    def padded(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, len(rows) - len(values))).astype(np.int32)

    return local.astype(np.int32), Moves(
        count=np.int32(len(moved)),
        from_shard=padded(shard[moved]),
        from_row=padded(rows[moved] % old_each),
        to_shard=padded(moved // new_each),
        to_row=padded(moved % new_each),
    )


def exchange(
    old: DecodeState, new: DecodeState, moves: Moves, axis: str
) -> DecodeState:
    """Copy rows of other data shards into a state; all shards run it together.

    Rows are sent one at a time, by a sum to which every other shard adds zeros: few
    rows move, and the memory is that of one row.

    Args:
      old: this shard's state before `take`. new: its state after it. moves: of all
        shards. axis: the mesh axis of the data shards.
    """
    here = lax.axis_index(axis)

    def move(i: jax.Array, new: DecodeState) -> DecodeState:
        is_from = moves.from_shard[i] == here
        is_to = moves.to_shard[i] == here

        def leaf(old: jax.Array, new: jax.Array) -> jax.Array:
            row = lax.dynamic_slice_in_dim(old, moves.from_row[i], 1, axis=0)
            sent = row.astype(jnp.int32) if row.dtype == jnp.bool_ else row
            sent = lax.psum(jnp.where(is_from, sent, jnp.zeros_like(sent)), axis)
            if new.ndim > 1:
                sent = kv_cache.resize(sent, new.shape[1])
            kept = lax.dynamic_slice_in_dim(new, moves.to_row[i], 1, axis=0)
            row = jnp.where(is_to, sent.astype(row.dtype), kept)
            return lax.dynamic_update_slice_in_dim(new, row, moves.to_row[i], axis=0)

        return jax.tree.map(leaf, old, new)

    return lax.fori_loop(0, moves.count, move, new)
