"""What the library asks of a controller, whichever rule it follows.

`controller.Controller` is the one that users get; a class derived from it may replace
`choose` alone. An object that is none does as well if it has these members.
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

    table: what rounds cost. Where it is empty, what was kept on disk takes its place.
    """

    table: LatencyTable

    @property
    def gammas(self) -> tuple[int, ...]:
        """The draft lengths it chooses from.

        As `config.parse_control` makes them of a config's `control` and `gammas`; a
        call with others is refused.
        """

    @property
    def measuring(self) -> AbstractContextManager[Any]:
        """Held while first costs are read or measured."""

    @property
    def broken_drafter(self) -> tuple[float, float] | None:
        """Shares of drafts (expected, found) to warn of after a call, if any."""

    def sampling(self, setting: Sequence[float] = ()) -> AbstractContextManager[Any]:
        """Be in a rollout, from its first choice to its last window.

        Args:
          setting: (temperature, top-k, top-p, min-p).
        """

    def first_look(
        self, rows: int, cache_length: int, compile_s: Callable[[Program], float]
    ) -> tuple[Program, ...]:
        """Return programs to measure before anything else is chosen, or none.

        Asked of controllers with two gammas or more.

        Args:
          rows: of the smallest batch. cache_length: of the longest cache. compile_s:
            seconds a program must be compiled for first; 0 if it is ready.
        """

    def observe_first_look(
        self, seconds: Mapping[Program, float], num_rounds: int
    ) -> None:
        """Learn what `first_look` asked for.

        Args:
          seconds: of a round of each program. num_rounds: that each is worth.
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
          options: the programs that could run now; the last is the one to fall back on
            and may be compiled without asking.
          current: the program that ran last; None at the beginning.
          compile_s: as in `first_look`.
          live: rows that generate. length: their mean tokens, prompt included.
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
          program: what ran. num_rounds: its rounds; 0 where the seconds are no measure.
          emitted: histogram `[G + 1]` of row-rounds by tokens emitted, from 1 upwards.
          seconds: the window's time on the device, compilation not counted.
          accepted: histogram `[G + 1]` of row-rounds by drafts kept, used or not; None
            is `emitted`.
          live: rows that were live at its beginning; 0 if that is not known.
        """

    def speed(self, program: Program) -> float | None:
        """Return expected tokens per second of each live row; None if unknown.

        Asked by `er_jax.compile_ahead` alone.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return all that was learnt, ready for JSON.

        This and `load_state_dict` are asked by `er_jax.rollout_replicas` over several
        processes, and by checkpoints of training.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another controller of the same kind had learnt."""
