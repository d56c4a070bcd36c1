"""Controllers and latency tables that do as a benchmark wants.

An oracle that knows all costs, a controller that chooses at random, a table that learns
nothing, and one that notes what it learns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.lib.simulated import SimulatedPolicy
from er_jax import Controller
from er_jax.costs.table import LatencyTable
from er_jax.types import Program


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an oracle compiles.

    shapes: rows and gamma of each program. is_short: whether it compiles them for
      caches shorter than the longest as well.
    """

    shapes: frozenset[tuple[int, int]]
    is_short: bool


class Oracle(Controller):
    """Chooses the fastest program of a plan, by costs and acceptance that it knows.

    Args:
      policy: what is simulated. plan: the programs to choose from.
    """

    def __init__(self, policy: SimulatedPolicy, plan: Plan) -> None:
        super().__init__("best", tuple({0, *(gamma for _, gamma in plan.shapes)}))
        self._policy, self._plan = policy, plan
        self._longest = 0

    def choose(
        self, options: Sequence[Program], current: Program | None, **about: Any
    ) -> Program:
        """Return the fastest option that the plan has."""
        self._longest = max([self._longest, *(p.cache_length for p in options)])
        allowed = [
            p
            for p in options
            if (p.rows, p.gamma) in self._plan.shapes
            and (self._plan.is_short or p.cache_length == self._longest)
        ]

        def speed(program: Program) -> float:
            chances = [self._policy.keep**depth for depth in range(program.gamma + 1)]
            return sum(chances) / self._policy.round_seconds(program)

        return max(allowed, key=speed)

    def observe(self, *args: Any, **options: Any) -> None:
        """Learn nothing."""


class Restless(Controller):
    """Chooses any program that can run, at random, at every window.

    Args:
      control, gammas: as for `Controller`. rows: batch sizes that may be used.
      seed: of its choices.
    """

    def __init__(
        self, control: str, gammas: Sequence[int], rows: Sequence[int], seed: int
    ) -> None:
        super().__init__(control, gammas)
        self.table = ConstantTable({Program(1, 64, 1): 1.0})
        self._rows = frozenset(rows)
        self._rng = np.random.default_rng(seed)

    def choose(
        self, options: Sequence[Program], current: Program | None, **unused: Any
    ) -> Program:
        """Return one of the options."""
        allowed = [p for p in options if p.rows in self._rows] or [options[-1]]
        return allowed[self._rng.integers(len(allowed))]


class ConstantTable(LatencyTable):
    """A table in which every round takes a second; learns nothing.

    With rounds so slow, windows are as short as they can be. A program that is known
    from the start keeps the controller from measuring any.
    """

    def observe(self, program: Program, seconds: float, num_rounds: int) -> None:
        """Learn nothing."""

    def round_seconds(self, program: Program) -> float:
        """Return one second."""
        return 1.0


class WatchedTable(LatencyTable):
    """A table that notes, after every window, what it took and what the table says."""

    def observe(self, program: Program, seconds: float, num_rounds: int) -> None:
        """Learn, and note the program, its seconds per round, and the table's."""
        super().observe(program, seconds, num_rounds)
        known_s = self.round_seconds(program)
        if num_rounds and known_s is not None:
            self.notes.append((program, seconds / num_rounds, known_s))

    @functools.cached_property
    def notes(self) -> list[tuple[Program, float, float]]:
        """All notes, in order."""
        return []
