"""The protocol of a controller: what the library calls, whichever rule it follows.

`controller.Controller` is the default. A subclass of it may replace `choose` alone; any
other object with these members serves as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from er_jax.costs.table import LatencyTable
from er_jax.types import Program


class ControllerProtocol(Protocol):
    """Chooses the next program of a batch, and learns from every window.

    table: costs of rounds. Costs saved on disk replace an empty one.
    """

    table: LatencyTable

    @property
    def gammas(self) -> tuple[int, ...]:
        """The draft lengths it chooses from.

        They are those of `config.parse_control` for the config of a call; a call with
        others is refused.
        """

    @property
    def measuring(self) -> AbstractContextManager[Any]:
        """A lock, held while first costs are read or measured."""

    @property
    def broken_drafter(self) -> tuple[float, float] | None:
        """Acceptance rates (expected, found) to warn of after a call, or None."""

    def sampling(self, setting: Sequence[float] = ()) -> AbstractContextManager[Any]:
        """Return the context of one rollout, from its first choice to its last window.

        Args:
          setting: (temperature, top-k, top-p, min-p).
        """

    def first_look(
        self, rows: int, cache_length: int, compile_s: Callable[[Program], float]
    ) -> tuple[Program, ...]:
        """Return programs to measure before anything else is chosen, or none.

        It is called on controllers with two gammas or more.

        Args:
          rows: of the smallest batch. cache_length: of the longest cache.
          compile_s: returns the expected compile seconds of a program; 0 if it is
            ready.
        """

    def observe_first_look(
        self, seconds: Mapping[Program, float], num_rounds: int
    ) -> None:
        """Learn the costs that `first_look` asked for.

        Args:
          seconds: of a round of each program. num_rounds: rounds that each counts for.
        """

    def choose(
        self,
        options: Sequence[Program],
        current: Program | None,
        *,
        compile_s: Callable[[Program], float],
        live: int = 0,
        length: float = 0.0,
    ) -> Program:
        """Return the program to run next.

        Args:
          options: the programs that can run now; the last is the fallback, which may
            be chosen although it is not compiled.
          current: the program that ran last; None at the beginning.
          compile_s: as in `first_look`.
          live: rows that generate. length: their mean length, prompt included.
        Returns:
          One of `options`.
        """

    def observe(
        self,
        program: Program,
        num_rounds: int,
        emitted: np.ndarray,
        seconds: float,
        accepted: np.ndarray | None = None,
        live: int = 0,
    ) -> None:
        """Learn from a window.

        Args:
          program: that ran. num_rounds: its rounds; 0 if the seconds are not a
            measurement.
          emitted: histogram `[G + 1]` of row-rounds by tokens emitted, from 1 upwards.
          seconds: the window's time on the device, without compilation.
          accepted: histogram `[G + 1]` of row-rounds by drafts kept, emitted or not;
            None is `emitted`.
          live: rows that were live at its start; 0 if unknown.
        """

    def speed(self, program: Program) -> float | None:
        """Return expected tokens per second of each live row; None if unknown.

        Called by `er_jax.compile_ahead` alone.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return all that was learnt as JSON-ready values.

        It and `load_state_dict` are called by `er_jax.rollout_replicas` with several
        processes, and by checkpoints of training.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace what was learnt by the state of another controller of this kind."""
