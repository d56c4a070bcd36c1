"""Rows that go from one data shard to another when a state is given another size."""

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
    """Rows that change their group of devices when a state is given another size.

    count: int32 `[]`, moves to make; the rest of the arrays is padding.
    from_group, from_row: int32 `[M]`, where each row lies, counted within its group.
    to_group, to_row: int32 `[M]`, where it is to lie in the new state.
    """

    count: Array
    from_group: Array
    from_row: Array
    to_group: Array
    to_row: Array


def plan_moves(
    rows: np.ndarray, old_rows: int, num_groups: int
) -> tuple[np.ndarray, Moves]:
    """Tell apart the rows that stay in their group of devices and those that do not.

    Args:
      rows: int `[R]`, which old row each new one is, of all groups; `NONE` for none.
      old_rows: rows before. num_groups: groups, each with as many rows.
    Returns:
      int32 `[R]`, for each new row the old one counted within its group, `NONE` where
      there is none or it comes from another group; and the moves between groups.
    """
    old_each, new_each = old_rows // num_groups, len(rows) // num_groups
    to = np.arange(len(rows))
    group, is_some = rows // old_each, rows != NONE
    is_moved = is_some & (group != to // new_each)
    local = np.where(is_some & ~is_moved, rows % old_each, NONE)
    moved = np.flatnonzero(is_moved)

    def padded(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, len(rows) - len(values))).astype(np.int32)

    return local.astype(np.int32), Moves(
        count=np.int32(len(moved)),
        from_group=padded(group[moved]),
        from_row=padded(rows[moved] % old_each),
        to_group=padded(moved // new_each),
        to_row=padded(moved % new_each),
    )


def exchange(
    old: DecodeState, new: DecodeState, moves: Moves, axis: str
) -> DecodeState:
    """Copy rows of other groups of devices into a state; runs in all groups at once.

    One row after the other, by a sum to which every other group adds zeros: few rows
    change their group, and no more memory is needed than one takes.

    Args:
      old: this group's state before `take`. new: its state after it. moves: of all
        groups. axis: of the mesh, over which the groups are spread.
    """
    here = lax.axis_index(axis)

    def move(i: jax.Array, new: DecodeState) -> DecodeState:
        is_from = moves.from_group[i] == here
        is_to = moves.to_group[i] == here

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
