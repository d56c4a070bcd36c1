"""A batch on a mesh: rows in data shards, or few rows that all devices share."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from er_jax.devices import device_bytes
from er_jax.drafter import PolicyParams
from er_jax.mesh.engine import MeshEngine
from er_jax.request import Request, bucket_of, row_buckets
from er_jax.scheduler.topology import PlanShard, Shape, packed
from er_jax.types import NONE, Admission


class DataShards:
    """The topology of a mesh; see `scheduler.topology.Topology`.

    Args:
      engine: what runs the batch. params: target and draft, on its mesh.
      request: its sizes; the data shards divide its slots.
    """

    def __init__(
        self, engine: MeshEngine, params: PolicyParams, request: Request
    ) -> None:
        self.engine = engine
        self.num_shards = engine.num_shards
        self._slots = request.slots
        self._engines, self._params = {False: engine}, {False: params}
        # Where all devices can share the rows: that engine, and its parameters, which
        # are shapes until they are needed.
        shapes = engine.shared_rows_params(params) if self.num_shards > 1 else None
        self._has_shared_params, self._shared_bytes = False, 0
        if shapes is not None:
            self._engines[True], self._params[True] = engine.for_shared_rows, shapes
            self._shared_bytes = device_bytes(shapes)
        self.sharings = tuple(sorted(self._engines))
        self._draft_kinds = {
            shared: own.draft_kind(self._params[shared].draft)
            for shared, own in self._engines.items()
        }

    def engine_of(self, shared_rows: bool) -> MeshEngine:
        """Return what runs a state that lies so."""
        return self._engines[shared_rows]

    def params_of(self, shared_rows: bool) -> PolicyParams:
        """Return its parameters."""
        return self._params[shared_rows]

    def draft_kind(self, shared_rows: bool) -> str:
        """Return the name of its drafts."""
        return self._draft_kinds[shared_rows]

    def row_buckets(self, shared_rows: bool) -> tuple[int, ...]:
        """Return the numbers of rows a batch may have."""
        return row_buckets(self._slots, 1 if shared_rows else self.num_shards)

    def route(self, old: Shape, new: Shape, num_live: int) -> Sequence[Shape]:
        """Return the shapes on the way to another.

        The rows become shared, or go back into data shards, with as many rows as are
        possible either way.
        """
        rows, length, shared = new
        stops = [new]
        if shared and not old[2]:
            few = bucket_of(num_live, self.row_buckets(False))
            stops = [(few, length, False), (few, length, True), new]
        elif old[2] and not shared:
            stops = [(rows, length, True), new]
        return [new for old, new in itertools.pairwise([old, *stops]) if new != old]

    def move_compile_s(self, old: Shape, new: Shape) -> float:
        """Return the seconds that one move is compiled for, 0 if it is."""
        own = self._engines[old[2]]
        if old[2] == new[2]:
            is_ready, kind = own.has_take(old[:2], new[:2]), "take"
        else:
            kind = self.engine.move_name(new[2])
            is_ready = self.engine.has_move(new[2], *new[:2])
        return 0.0 if is_ready else own.expected_compile_s(kind)

    def move(self, state: Any, old: Shape, new: Shape, index: np.ndarray) -> Any:
        """Give the state another size, or have its rows shared or no longer shared."""
        if old[2] == new[2]:
            return self._engines[old[2]].take(state, index, new[1])
        if not self._has_shared_params:
            own = self.engine.params_to_shared_rows(self._params[False])
            self._params[True], self._has_shared_params = own, True
        if new[2]:
            return self.engine.to_shared_rows(state)
        return self.engine.to_data_shards(state)

    def rows_after(self, keep: np.ndarray, old: Shape, new: Shape) -> np.ndarray:
        """Return which old row each new row is after a move."""
        if old[2] != new[2]:
            return np.arange(new[0])
        if old[2]:
            return packed(keep, new[0])
        return rows_of_shards(keep, old[0], new[0], self.num_shards)

    def state_bytes(self, shape: Shape) -> float:
        """Return what a device holds of a state."""
        rows, length, shared = shape
        return rows * length * self._engines[shared].position_bytes

    def weight_bytes(self, shared_rows: bool) -> int:
        """Return what a device holds of weights that are laid out a second time."""
        return self._shared_bytes if shared_rows or self._has_shared_params else 0

    def admission(
        self,
        plan: PlanShard,
        starting: list[int],
        free: np.ndarray,
        resident: np.ndarray,
        prompt_of: np.ndarray,
    ) -> Admission:
        """Have sequences start in free rows, each data shard in its own."""
        each = len(resident) // self.num_shards
        bounds = [slice(i * each, (i + 1) * each) for i in range(self.num_shards)]
        own = [free[(free >= b.start) & (free < b.stop)].tolist() for b in bounds]
        held = [set(resident[b].tolist()) for b in bounds]
        dealt = deal(starting, prompt_of, [len(rows) for rows in own], held)
        parts = map(plan, dealt, own, bounds)

        def joined(*arrays: np.ndarray) -> np.ndarray:
            # All shards run as many chunks and clones as the one that needs most.
            return np.concatenate(arrays) if arrays[0].ndim else max(arrays)

        return jax.tree.map(joined, *parts)


def deal(
    starting: Sequence[int],
    prompt_of: np.ndarray,
    num_free: Sequence[int],
    held: Sequence[set[int]],
) -> list[list[int]]:
    """Deal sequences to shards: with their prompts' others, else where most room is.

    Args:
      starting: sequences, no more than there is room for. prompt_of: int `[N]`.
      num_free: free rows of each shard. held: prompts that each holds; added to.
    """
    dealt: list[list[int]] = [[] for _ in num_free]
    for sequence in starting:
        prompt = int(prompt_of[sequence])
        room = [free - len(own) for free, own in zip(num_free, dealt, strict=True)]
        shard = max(
            (i for i in range(len(num_free)) if room[i]),
            key=lambda i: (prompt in held[i], room[i], -i),
        )
        dealt[shard].append(sequence)
        held[shard].add(prompt)
    return dealt


def rows_of_shards(
    keep: np.ndarray, old_rows: int, new_rows: int, num_shards: int
) -> np.ndarray:
    """Return which old row each new row is, `NONE` for none.

    Rows stay in their data shard as long as there is room; what is left over is moved
    to shards that have some. So a batch of few rows is spread evenly.

    Args:
      keep: int, rows to keep, ascending; at most `new_rows`.
      old_rows, new_rows: of the batch. num_shards: that divide both.
    """
    old_each, new_each = old_rows // num_shards, new_rows // num_shards
    own = [keep[keep // old_each == shard] for shard in range(num_shards)]
    left_over = collections.deque(row for rows in own for row in rows[new_each:])
    index = np.full((num_shards, new_each), NONE)
    for shard, rows in enumerate(own):
        stay = rows[:new_each].tolist()
        while len(stay) < new_each and left_over:
            stay.append(left_over.popleft())
        index[shard, : len(stay)] = stay
    return index.reshape(-1)
