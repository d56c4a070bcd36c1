"""The shapes of a batch on its devices, the moves between them, and their bytes.

`OneDevice` is the topology of a single device, where one move of rows leads to any
shape. `mesh.topology` implements the same protocol for rows in data shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from er_jax.drafter import PolicyParams
from er_jax.engine.protocol import EngineProtocol
from er_jax.request import Request, row_buckets
from er_jax.types import NONE, Admission

# Rows, cache length, shared rows: all of a `Program` that a state's shape depends on.
Shape: TypeAlias = tuple[int, int, bool]

# Plans the start of sequences in free rows of one data shard:
# (sequences, free rows, rows of the shard) -> the admission of the shard.
PlanShard: TypeAlias = Callable[[list[int], list[int], slice], Admission]


class Topology(Protocol):
    """The shapes that a batch can have on its devices, and the moves between them."""

    @property
    def engine(self) -> EngineProtocol:
        """The engine that costs are measured with, and whose processes agree."""

    @property
    def sharings(self) -> tuple[bool, ...]:
        """The values that `Program.shared_rows` may have."""

    @property
    def keeps_rows(self) -> bool:
        """Whether a row that has ended can go on where it is; see `turns`."""

    def engine_of(self, shared_rows: bool) -> EngineProtocol:
        """Return the engine of states with or without shared rows."""

    def params_of(self, shared_rows: bool) -> PolicyParams:
        """Return the parameters on that engine."""

    def draft_kind(self, shared_rows: bool, draft: int) -> str:
        """Return the kind of a draft by number; see `EngineProtocol.draft_kind`."""

    def row_buckets(self, shared_rows: bool) -> tuple[int, ...]:
        """Return the numbers of rows that a batch can have, ascending."""

    def route(self, old: Shape, new: Shape, num_live: int) -> Sequence[Shape]:
        """Return the successive shapes of a state on the way from one to another.

        Args:
          old, new: shapes. num_live: rows that generate, and must be kept.
        Returns:
          The shapes after `old`, the last of them `new`; none if they are equal.
        """

    def move_compile_s(self, old: Shape, new: Shape) -> float:
        """Return the expected seconds to compile a move, 0 if it is compiled."""

    def move(self, state: Any, old: Shape, new: Shape, index: np.ndarray) -> Any:
        """Return the state after one move of a route.

        Args:
          state: of shape `old`. index: from `rows_after`.
        """

    def rows_after(self, keep: np.ndarray, old: Shape, new: Shape) -> np.ndarray:
        """Return the old row of each new row after a move, `NONE` for an empty one.

        Args:
          keep: int, rows to keep, ascending; no more than the new shape has.
        """

    def state_bytes(self, shape: Shape) -> float:
        """Return the bytes of a state on one device."""

    def weight_bytes(self, shared_rows: bool) -> int:
        """Return the bytes on one device of weights laid out a second time."""

    def admission(
        self,
        plan: PlanShard,
        starting: list[int],
        free: np.ndarray,
        resident: np.ndarray,
        prompt_of: np.ndarray,
    ) -> Admission:
        """Return the admission that starts sequences in free rows.

        Args:
          plan: plans one data shard. starting: sequences, no more than free rows.
          free: int, free rows, ascending. resident: int `[rows]`, the prompt in each
            row. prompt_of: int `[N]`, the prompt of each sequence.
        """


def packed(keep: np.ndarray, num_rows: int) -> np.ndarray:
    """Return the old row of each new row: those to keep, then `NONE`."""
    index = np.full(num_rows, NONE)
    index[: len(keep)] = keep
    return index


class OneDevice:
    """The topology of one device.

    Args:
      engine: of the device. params: target and draft. request: its sizes.
    """

    sharings: tuple[bool, ...] = (False,)
    keeps_rows = True

    def __init__(
        self, engine: EngineProtocol, params: PolicyParams, request: Request
    ) -> None:
        self.engine = engine
        self._params = params
        self._row_buckets = row_buckets(request.slots)
        self._draft_kinds = [engine.draft_kind(draft) for draft in params.drafts]

    def engine_of(self, shared_rows: bool) -> EngineProtocol:
        """Return the engine."""
        return self.engine

    def params_of(self, shared_rows: bool) -> PolicyParams:
        """Return the parameters."""
        return self._params

    def draft_kind(self, shared_rows: bool, draft: int) -> str:
        """Return the kind of a draft."""
        return self._draft_kinds[draft]

    def row_buckets(self, shared_rows: bool) -> tuple[int, ...]:
        """Return the numbers of rows that the batch can have, ascending."""
        return self._row_buckets

    def route(self, old: Shape, new: Shape, num_live: int) -> Sequence[Shape]:
        """Return the new shape, unless it is the old one."""
        return [] if old == new else [new]

    def move_compile_s(self, old: Shape, new: Shape) -> float:
        """Return the expected seconds to compile the move, 0 if it is compiled."""
        is_ready = self.engine.has_take(old[:2], new[:2])
        return 0.0 if is_ready else self.engine.expected_compile_s("take")

    def move(self, state: Any, old: Shape, new: Shape, index: np.ndarray) -> Any:
        """Return the state in its new size."""
        return self.engine.take(state, index, new[1])

    def rows_after(self, keep: np.ndarray, old: Shape, new: Shape) -> np.ndarray:
        """Return the rows to keep, then `NONE`."""
        return packed(keep, new[0])

    def state_bytes(self, shape: Shape) -> float:
        """Return the bytes of a state."""
        return shape[0] * self.engine.row_bytes(shape[1])

    def weight_bytes(self, shared_rows: bool) -> int:
        """Return 0: no weights are laid out twice."""
        return 0

    def admission(
        self,
        plan: PlanShard,
        starting: list[int],
        free: np.ndarray,
        resident: np.ndarray,
        prompt_of: np.ndarray,
    ) -> Admission:
        """Return the admission that starts sequences in free rows."""
        return plan(starting, free.tolist(), slice(0, len(resident)))
