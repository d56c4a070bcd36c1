"""What the loop asks of the devices a batch lies on: shapes, routes, bytes, row places.

`OneDevice` is the answer of a single device: every shape is reached by one move of
rows. The other one, with rows in data shards, implements the same protocol elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from er_jax.drafter import PolicyParams
from er_jax.engine.protocol import EngineProtocol
from er_jax.request import Request, row_buckets
from er_jax.types import NONE, Admission

# Rows, cache length, shared rows: all of a `Program` that a state must be made for.
Shape: TypeAlias = tuple[int, int, bool]

# Plans the start of sequences in free rows of one part of the batch:
# (sequences, free rows, rows of the part) -> what the device is told.
PlanPart: TypeAlias = Callable[[list[int], list[int], slice], Admission]


class Topology(Protocol):
    """How a batch may lie on devices, and what it takes to lie otherwise."""

    @property
    def engine(self) -> EngineProtocol:
        """What measures costs, and whose processes agree."""

    @property
    def sharings(self) -> tuple[bool, ...]:
        """The values that `Program.shared_rows` may have."""

    def engine_of(self, shared_rows: bool) -> EngineProtocol:
        """Return what runs a state that lies so."""

    def params_of(self, shared_rows: bool) -> PolicyParams:
        """Return its parameters."""

    def draft_kind(self, shared_rows: bool) -> str:
        """Return the name of its drafts; see `EngineProtocol.draft_kind`."""

    def row_buckets(self, shared_rows: bool) -> tuple[int, ...]:
        """Return the numbers of rows a batch may have, ascending."""

    def route(self, old: Shape, new: Shape, num_live: int) -> Sequence[Shape]:
        """Return the shapes that a state takes one after the other to become another.

        Args:
          old, new: shapes. num_live: rows that generate, and are to be kept.
        Returns:
          Shapes behind `old`, the last of which is `new`; none if they are equal.
        """

    def move_compile_s(self, old: Shape, new: Shape) -> float:
        """Return the seconds that one move of a route is compiled for, 0 if it is."""

    def move(self, state: Any, old: Shape, new: Shape, index: np.ndarray) -> Any:
        """Make one move of a route.

        Args:
          state: of shape `old`. index: as `rows_after` returns it.
        """

    def rows_after(self, keep: np.ndarray, old: Shape, new: Shape) -> np.ndarray:
        """Return which old row each new row is after a move, `NONE` for none.

        Args:
          keep: int, rows to keep, ascending; no more than there will be.
        """

    def state_bytes(self, shape: Shape) -> float:
        """Return what a device holds of a state."""

    def weight_bytes(self, shared_rows: bool) -> int:
        """Return what a device holds of weights that are laid out a second time."""

    def admission(
        self,
        plan: PlanPart,
        starting: list[int],
        free: np.ndarray,
        resident: np.ndarray,
        prompt_of: np.ndarray,
    ) -> Admission:
        """Have sequences start in free rows.

        Args:
          plan: plans a part of the batch. starting: sequences, no more than free rows.
          free: int, free rows, ascending. resident: int `[rows]`, the prompt in each
            row. prompt_of: int `[N]`, the prompt of each sequence.
        """


def packed(keep: np.ndarray, num_rows: int) -> np.ndarray:
    """Return which old row each new row is: those to keep, then `NONE`."""
    index = np.full(num_rows, NONE)
    index[: len(keep)] = keep
    return index


class OneDevice:
    """The topology of one device.

    Args:
      engine: what runs the batch. params: target and draft. request: its sizes.
    """

    sharings: tuple[bool, ...] = (False,)

    def __init__(
        self, engine: EngineProtocol, params: PolicyParams, request: Request
    ) -> None:
        self.engine = engine
        self._params = params
        self._row_buckets = row_buckets(request.slots)
        self._draft_kind = engine.draft_kind(params.draft)

    def engine_of(self, shared_rows: bool) -> EngineProtocol:
        """Return the engine."""
        return self.engine

    def params_of(self, shared_rows: bool) -> PolicyParams:
        """Return the parameters."""
        return self._params

    def draft_kind(self, shared_rows: bool) -> str:
        """Return the name of the drafts."""
        return self._draft_kind

    def row_buckets(self, shared_rows: bool) -> tuple[int, ...]:
        """Return the numbers of rows a batch may have."""
        return self._row_buckets

    def route(self, old: Shape, new: Shape, num_live: int) -> Sequence[Shape]:
        """Return the new shape, if it is another."""
        return [] if old == new else [new]

    def move_compile_s(self, old: Shape, new: Shape) -> float:
        """Return the seconds that the move is compiled for, 0 if it is."""
        is_ready = self.engine.has_take(old[:2], new[:2])
        return 0.0 if is_ready else self.engine.expected_compile_s("take")

    def move(self, state: Any, old: Shape, new: Shape, index: np.ndarray) -> Any:
        """Give the state another size."""
        return self.engine.take(state, index, new[1])

    def rows_after(self, keep: np.ndarray, old: Shape, new: Shape) -> np.ndarray:
        """Return the rows to keep, first."""
        return packed(keep, new[0])

    def state_bytes(self, shape: Shape) -> float:
        """Return what the device holds of a state."""
        return shape[0] * shape[1] * self.engine.position_bytes

    def weight_bytes(self, shared_rows: bool) -> int:
        """Return 0: nothing is laid out twice."""
        return 0

    def admission(
        self,
        plan: PlanPart,
        starting: list[int],
        free: np.ndarray,
        resident: np.ndarray,
        prompt_of: np.ndarray,
    ) -> Admission:
        """Have sequences start in the free rows."""
        return plan(starting, free.tolist(), slice(0, len(resident)))
