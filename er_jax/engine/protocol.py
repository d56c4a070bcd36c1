"""The protocols of an engine, of its layout on devices, of agreement among processes.

`EngineProtocol` is all that the scheduler and the timing of costs use; `engine.Engine`
implements it, and so do the engine of a mesh and the simulated engines of tests and
benchmarks. `Layout` says how the arrays of a program lie on devices, and `Agreement`
how processes come to the same decisions; `OneDevice` and `OneProcess` are trivial.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from er_jax.drafter import PolicyParams
from er_jax.kernels import choice
from er_jax.types import (
    Admission,
    Continuation,
    DecodeState,
    Params,
    Policy,
    Program,
    Sampling,
    Span,
    WindowInfo,
)

# Tokens int32 `[B, S]` and log-probabilities float32 `[B, S]` after a window.
TokenBuffers: TypeAlias = tuple[jax.Array, jax.Array]

# Marks for arguments and results of a program: arrays whose first axis is the rows of
# the batch, and arrays that are the same for all rows.
ROWS, SAME = "rows", "same"


class Layout(Protocol):
    """How a program's arrays lie on devices; hashable, as a static argument."""

    @property
    def attention(self) -> str:
        """The implementation of attention in its programs; see `kernels.choice`."""

    @property
    def name(self) -> str:
        """The number of devices along each axis, as text for people and files."""

    @property
    def num_shards(self) -> int:
        """The number of data shards, which divides every number of rows."""

    def over_rows(self, function: Any, in_marks: Any, out_marks: Any) -> Any:
        """Return a function that runs `function` on the rows of each data shard.

        Args:
          function: takes and returns pytrees. in_marks: `ROWS` or `SAME` for each
            argument, or for each of its leaves. out_marks: likewise for its results.
        """

    def sum(self, x: jax.Array) -> jax.Array:
        """Return the sum over all data shards, called inside `over_rows`."""

    def is_any(self, rows: jax.Array) -> jax.Array:
        """Whether a flag `[B]` is set, here or in a shard that this one waits for."""

    def all_rows(self, rows: jax.Array) -> jax.Array:
        """Return `[k, B]` with rows of all data shards, called inside `over_rows`."""

    def lay_out(self, state: DecodeState, policy: Policy) -> DecodeState:
        """Constrain a state to the layout that it has between programs."""

    def replicate(self, tree: Any) -> Any:
        """Constrain arrays to be the same on every device."""


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """The layout of a single device: methods return their argument.

    attention: the implementation that programs are traced with.
    """

    attention: str = choice.XLA
    num_shards: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """One device; and how it attends, unless by XLA."""
        return described("one device", self.attention)

    def over_rows(self, function: Any, in_marks: Any, out_marks: Any) -> Any:
        """Return the function, traced with this implementation of attention."""
        return choice.traced_with(self.attention, function)

    def sum(self, x: jax.Array) -> jax.Array:
        """Return the array."""
        return x

    def is_any(self, rows: jax.Array) -> jax.Array:
        """Return whether any row is true."""
        return jnp.any(rows)

    def all_rows(self, rows: jax.Array) -> jax.Array:
        """Return the rows."""
        return rows

    def lay_out(self, state: DecodeState, policy: Policy) -> DecodeState:
        """Return the state."""
        return state

    def replicate(self, tree: Any) -> Any:
        """Return the tree."""
        return tree


def described(name: str, attention: str) -> str:
    """Return the name of a layout with its implementation of attention."""
    return name if attention == choice.XLA else f"{name}, kernel for {attention}"


class Agreement(Protocol):
    """How the processes of one rollout come to the same decisions.

    All of them must call the same methods in the same order.

    is_spread: whether there are several processes.
    is_leader: whether the measurements of this one count.
    """

    is_spread: bool
    is_leader: bool

    def sync_or_raise(
        self, values: Any, failure: Exception | None = None
    ) -> tuple[np.ndarray, Exception | None]:
        """Return the leader's numbers, and the failure that this process must raise.

        Args:
          values: numbers, equally many in all processes; several processes send them
            as float32.
          failure: of this process, if any.
        Returns:
          The leader's values; and the failure of this process, or an error that names
          another process's failure, or None if no process has failed.
        """

    def broadcast_from_leader(self, values: Any) -> np.ndarray:
        """Return the leader's numbers, in every process."""

    def broadcast_text(self, text: str | None) -> str | None:
        """Return the leader's text, in every process; None if that is None."""

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return the bytes that each process gives, in every process."""

    def sum(self, own: np.ndarray) -> np.ndarray:
        """Return the sum of all processes' arrays, in every process.

        Args:
          own: this process's array, int32 or float32, of one shape in all processes.
        """


class OneProcess:
    """The agreement of a single process with itself."""

    is_spread, is_leader = False, True

    def sync_or_raise(
        self, values: Any, failure: Exception | None = None
    ) -> tuple[np.ndarray, Exception | None]:
        """Return both unchanged, the values as an array."""
        return np.asarray(values, np.float64), failure

    def broadcast_from_leader(self, values: Any) -> np.ndarray:
        """Return the numbers."""
        return np.asarray(values, np.float64)

    def broadcast_text(self, text: str | None) -> str | None:
        """Return the text."""
        return text

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return the bytes alone."""
        return [data]

    def sum(self, own: np.ndarray) -> np.ndarray:
        """Return the array."""
        return own


class WindowHandle(Protocol):
    """A dispatched window.

    buffers: tokens and log-probabilities after it; see `windows.run_window`.
    """

    buffers: Any

    def wait(self) -> tuple[WindowInfo, float, bool]:
        """Wait for the window.

        Returns:
          The info as NumPy arrays; the window's seconds, without compilation; whether
          these are a measurement.
        """


class EngineProtocol(Protocol):
    """The compiled programs of one policy, as the scheduler uses them."""

    @property
    def policy(self) -> Any:
        """The model."""

    @property
    def agreement(self) -> Agreement:
        """How its processes agree."""

    @property
    def rounds_per_test(self) -> int:
        """Rounds between two exit tests of a window."""

    def row_bytes(self, length: int) -> float:
        """Return the bytes on one device of a row of `length` positions.

        A device holds this times the rows of the whole batch; on a mesh it is therefore
        a fraction of a row's size.
        """

    @property
    def compile_s(self) -> float:
        """Seconds this thread has spent compiling."""

    def allocate(self, rows: int, cache_length: int) -> Any:
        """Return a state of `rows` empty slots of `cache_length` positions."""

    def admit(self, params: PolicyParams, state: Any, admission: Admission) -> Any:
        """Start sequences in free slots. Donates `state`."""

    def go_on(
        self,
        params: PolicyParams,
        state: Any,
        continuation: Continuation,
        chunk: int,
        piece: int,
    ) -> Any:
        """Have rows go on behind appended tokens. Donates `state`.

        Args:
          params, state, continuation: see `prefill.go_on`.
          chunk, piece: rows and tokens of each that are prefilled together.
        """

    def has_take(self, old: tuple[int, int], new: tuple[int, int]) -> bool:
        """Whether the move between states of two sizes (rows, length) is compiled."""

    def take(self, state: Any, rows: np.ndarray, length: int) -> Any:
        """Move rows (`NONE` for an empty one) to a state of `length` positions."""

    def draft_kind(self, draft: Params) -> str:
        """Return a short name shared by all drafts of these shapes and dtypes."""

    def has_window(self, program: Program, draft_kind: str, settings: Sampling) -> bool:
        """Whether a window is compiled for a kind of draft and for these settings."""

    def expected_compile_s(self, kind: str) -> float:
        """Return the expected seconds to compile one more program of a kind."""

    def start_window(
        self,
        params: PolicyParams,
        state: Any,
        settings: Sampling,
        gamma: int,
        *,
        exit_live: int,
        max_rounds: int,
        draft_kind: str | None = None,
        span: Span | None = None,
    ) -> tuple[Any, WindowHandle]:
        """Start one window without waiting for it; see `engine.Engine`."""

    def fetch_rows(
        self, buffers: Any, rows: np.ndarray
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return tokens and log-probabilities, `[S]` each, of rows after a window."""
