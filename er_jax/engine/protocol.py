"""What an engine offers, and what it asks of the devices and processes it runs on.

Three protocols. `EngineProtocol` is all that the scheduler and the timing of costs use:
`engine.Engine` implements it, and so do the engine of a mesh and the simulated ones of
tests and benchmarks. `Layout` says how the arrays of a program lie, and `Agreement` how
processes come to the same decisions; `OneDevice` and `OneProcess` are the trivial ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from er_jax.drafter import PolicyParams
from er_jax.types import (
    Admission,
    DecodeState,
    Params,
    Policy,
    Program,
    Sampling,
    WindowInfo,
)

# Tokens int32 `[B, S]` and log-probabilities float32 `[B, S]` after a window.
TokenBuffers: TypeAlias = tuple[jax.Array, jax.Array]

# Marks of a program's arguments and results: arrays whose first axis is rows of the
# batch, and arrays that are the same for all rows.
ROWS, SAME = "rows", "same"


class Layout(Protocol):
    """How the arrays of a program lie; hashable, because it names the program."""

    @property
    def name(self) -> str:
        """For people and files: devices along each axis."""

    def over_rows(self, function: Any, in_marks: Any, out_marks: Any) -> Any:
        """Return a function that is run on the rows of each data shard apart.

        Args:
          function: of pytrees. in_marks: `ROWS` or `SAME` for each argument or each of
            its leaves. out_marks: the same of its results.
        """

    def sum(self, x: jax.Array) -> jax.Array:
        """Return the sum over all data shards; inside `over_rows`."""

    def is_any(self, rows: jax.Array) -> jax.Array:
        """Return whether a row `[B]` is true that this shard has to wait for."""

    def all_rows(self, rows: jax.Array) -> jax.Array:
        """Return `[k, B]` of the rows of all data shards; inside `over_rows`."""

    def lay_out(self, state: DecodeState, policy: Policy) -> DecodeState:
        """Have the compiler lay out a state as it lies between programs."""

    def replicate(self, tree: Any) -> Any:
        """Have the compiler put the same on every device."""


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """The layout of a single device, which has nothing to lay out."""

    name = "one device"

    def over_rows(self, function: Any, in_marks: Any, out_marks: Any) -> Any:
        """Return the function."""
        return function

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


class Agreement(Protocol):
    """How processes that run the same rollout come to the same decisions.

    All of them must call the same methods in the same order.

    is_spread: whether there are several. is_leader: whether what is measured here
      counts.
    """

    is_spread: bool
    is_leader: bool

    def sync_or_raise(
        self, values: Any, failure: Exception | None = None
    ) -> tuple[np.ndarray, Exception | None]:
        """Return the leader's numbers, and what every process is to raise.

        Args:
          values: as many in all processes; of several, float32 holds them.
          failure: what has failed in this process, if anything.
        Returns:
          The leader's values; the failure here, or an error that says that there is one
          in another process, or None if all is well in every process.
        """

    def broadcast_from_leader(self, values: Any) -> np.ndarray:
        """Return the leader's numbers, in every process."""

    def broadcast_text(self, text: str | None) -> str | None:
        """Return the leader's text, in every process; None if it has none."""

    def sum(self, own: np.ndarray) -> np.ndarray:
        """Return the sum of the processes' arrays, in every process.

        Args:
          own: int32 or float32, of one shape in all processes.
        """


class OneProcess:
    """The agreement of a single process with itself."""

    is_spread, is_leader = False, True

    def sync_or_raise(
        self, values: Any, failure: Exception | None = None
    ) -> tuple[np.ndarray, Exception | None]:
        """Return both as they are."""
        return np.asarray(values, np.float64), failure

    def broadcast_from_leader(self, values: Any) -> np.ndarray:
        """Return the numbers."""
        return np.asarray(values, np.float64)

    def broadcast_text(self, text: str | None) -> str | None:
        """Return the text."""
        return text

    def sum(self, own: np.ndarray) -> np.ndarray:
        """Return the array."""
        return own


class WindowHandle(Protocol):
    """A window that the device was told to run.

    buffers: tokens and log-probabilities after it; see `windows.run_window`.
    """

    buffers: Any

    def wait(self) -> tuple[WindowInfo, float, bool]:
        """Wait for the window.

        Returns:
          The info as NumPy arrays; the seconds the window took, compilation not
          counted; whether those were measured.
        """


class EngineProtocol(Protocol):
    """The compiled programs of one policy, as the scheduler uses them."""

    @property
    def policy(self) -> Any:
        """The model."""

    @property
    def agreement(self) -> Agreement:
        """How the processes that run it agree."""

    @property
    def rounds_per_test(self) -> int:
        """Rounds between two tests of a window for its end."""

    @property
    def position_bytes(self) -> float:
        """Bytes of one position of one row.

        Such that times all rows and their positions it is what a device holds.
        """

    @property
    def compile_s(self) -> float:
        """Seconds that this thread has spent on compiling."""

    def allocate(self, rows: int, cache_length: int) -> Any:
        """Return a state of `rows` empty slots of `cache_length` positions."""

    def admit(self, params: PolicyParams, state: Any, admission: Admission) -> Any:
        """Start sequences in free slots. Donates `state`."""

    def has_take(self, old: tuple[int, int], new: tuple[int, int]) -> bool:
        """Whether a state of a size (rows, length) can be given another right now."""

    def take(self, state: Any, rows: np.ndarray, length: int) -> Any:
        """Move rows (`NONE` for an empty one) to a state of another size."""

    def draft_kind(self, draft: Params) -> str:
        """Return a short name for all drafts of these shapes and dtypes."""

    def has_window(self, program: Program, draft_kind: str, num_stop_ids: int) -> bool:
        """Whether this window is compiled for such drafts and so many stop ids."""

    def expected_compile_s(self, kind: str) -> float:
        """Return the seconds one more program of a kind should take to compile."""

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
    ) -> tuple[Any, WindowHandle]:
        """Run one window, and do not wait for it; see `engine.Engine`."""

    def fetch_rows(
        self, buffers: Any, rows: np.ndarray
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return tokens and log-probabilities `[S]` of rows after a window."""
