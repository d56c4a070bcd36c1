"""The shapes of a batch on a mesh: rows in data shards, or rows that all share."""

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
      engine: of the mesh. params: target and draft, on its mesh.
      request: sizes; the number of data shards divides its slots.
    """

    keeps_rows = False

    def __init__(
        self, engine: MeshEngine, params: PolicyParams, request: Request
    ) -> None:
        self.engine = engine
        self.num_shards = engine.layout.num_shards
        self._slots = request.slots
        self._engines, self._params = {False: engine}, {False: params}
        # If all devices can share the rows: the engine for that, and its parameters,
        # which are only shapes until they are needed.
        shapes = engine.shared_rows_params(params) if self.num_shards > 1 else None
        self._has_shared_params, self._shared_bytes = False, 0
        if shapes is not None:
            self._engines[True], self._params[True] = engine.for_shared_rows, shapes
            self._shared_bytes = device_bytes(shapes)
        self.sharings = tuple(sorted(self._engines))
        self._draft_kinds = {
            shared: [engine.draft_kind(draft) for draft in self._params[shared].drafts]
            for shared, engine in self._engines.items()
        }

    def engine_of(self, shared_rows: bool) -> MeshEngine:
        """Return the engine of states with or without shared rows."""
        return self._engines[shared_rows]

    def params_of(self, shared_rows: bool) -> PolicyParams:
        """Return the parameters on that engine."""
        return self._params[shared_rows]

    def draft_kind(self, shared_rows: bool, draft: int) -> str:
        """Return the kind of a draft."""
        return self._draft_kinds[shared_rows][draft]

    def row_buckets(self, shared_rows: bool) -> tuple[int, ...]:
        """Return the numbers of rows that a batch can have, ascending."""
        return row_buckets(self._slots, 1 if shared_rows else self.num_shards)

    def route(self, old: Shape, new: Shape, num_live: int) -> Sequence[Shape]:
        """Return the successive shapes of a state on the way from one to another.

        The batch changes between data shards and shared rows with a number of rows that
        both can have.
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
        """Return the expected seconds to compile a move, 0 if it is compiled."""
        engine = self._engines[old[2]]
        if old[2] == new[2]:
            is_ready, kind = engine.has_take(old[:2], new[:2]), "take"
        else:
            kind = self.engine.move_name(new[2])
            is_ready = self.engine.has_move(new[2], *new[:2])
        return 0.0 if is_ready else engine.expected_compile_s(kind)

    def move(self, state: Any, old: Shape, new: Shape, index: np.ndarray) -> Any:
        """Return the state in another size, or with rows shared or in data shards."""
        if old[2] == new[2]:
            return self._engines[old[2]].take(state, index, new[1])
        if not self._has_shared_params:
            params = self.engine.params_to_shared_rows(self._params[False])
            self._params[True], self._has_shared_params = params, True
        if new[2]:
            return self.engine.to_shared_rows(state)
        return self.engine.to_data_shards(state)

    def rows_after(self, keep: np.ndarray, old: Shape, new: Shape) -> np.ndarray:
        """Return the old row of each new row after a move, `NONE` for an empty one."""
        if old[2] != new[2]:
            return np.arange(new[0])
        if old[2]:
            return packed(keep, new[0])
        return rows_of_shards(keep, old[0], new[0], self.num_shards)

    def state_bytes(self, shape: Shape) -> float:
        """Return the bytes of a state on one device."""
        rows, length, shared = shape
        return rows * self._engines[shared].row_bytes(length)

    def weight_bytes(self, shared_rows: bool) -> int:
        """Return the bytes on one device of weights laid out a second time."""
        return self._shared_bytes if shared_rows or self._has_shared_params else 0

    def admission(
        self,
        plan: PlanShard,
        starting: list[int],
        free: np.ndarray,
        resident: np.ndarray,
        prompt_of: np.ndarray,
    ) -> Admission:
        """Return the admission that starts sequences in rows of every data shard."""
        each = len(resident) // self.num_shards
        bounds = [slice(i * each, (i + 1) * each) for i in range(self.num_shards)]
        free_of = [free[(free >= b.start) & (free < b.stop)].tolist() for b in bounds]
        held = [set(resident[b].tolist()) for b in bounds]
        dealt = deal(starting, prompt_of, [len(rows) for rows in free_of], held)
        admissions = map(plan, dealt, free_of, bounds)

        def joined(*arrays: np.ndarray) -> np.ndarray:
            # All shards run as many chunks and clones as the one that needs most.
            return np.concatenate(arrays) if arrays[0].ndim else max(arrays)

        return jax.tree.map(joined, *admissions)


def deal(
    starting: Sequence[int],
    prompt_of: np.ndarray,
    num_free: Sequence[int],
    held: Sequence[set[int]],
) -> list[list[int]]:
    """Deal sequences to data shards: to one that has their prompt, else the freest.

    Args:
      starting: sequences, no more than free rows. prompt_of: int `[N]`, the prompt of
        each sequence.
      num_free: free rows of each shard. held: prompts of each shard; updated.
    Returns:
      The sequences of each shard.
    """
    dealt: list[list[int]] = [[] for _ in num_free]
    for sequence in starting:
        prompt = int(prompt_of[sequence])
        left = [free - len(own) for free, own in zip(num_free, dealt, strict=True)]
        shard = max(
            (i for i in range(len(num_free)) if left[i]),
            key=lambda i: (prompt in held[i], left[i], -i),
        )
        dealt[shard].append(sequence)
        held[shard].add(prompt)
    return dealt


def rows_of_shards(
    keep: np.ndarray, old_rows: int, new_rows: int, num_shards: int
) -> np.ndarray:
    """Return the old row of each new row, `NONE` for an empty one.

    Rows stay in their data shard if it has enough new rows; the others go to shards
    with free ones. So a batch of few rows is spread evenly.

    Args:
      keep: int, rows to keep, ascending; at most `new_rows`.
      old_rows, new_rows: of the batch. num_shards: divides both.
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
