"""Moments of a rollout: an act at the n-th event of a kind, for a process of its own.

Events are met where they happen, in the library's own functions: a window that starts
or is waited for, an admission, a move of the batch, a write of the journal. What comes
after an event comes before its caller has the result, as a signal does that arrived
while compiled code ran.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from benchmarks.lib.chains import (
    COMPACTION,
    FINISH,
    GROWTH,
    JOURNAL,
    PREFILL,
    TOOL,
    WINDOW,
    Interrupt,
    Workload,
)
from er_jax import Completion, Turn, journal
from er_jax.engine.engine import Engine, RunningWindow
from er_jax.mesh.topology import DataShards
from er_jax.scheduler.topology import OneDevice


class Moments:
    """Counts events, and acts at one of them.

    Args:
      interrupt: says at which; None is at none. act: what to do there.
    """

    def __init__(self, interrupt: Interrupt | None, act: Callable[[], None]) -> None:
        self._interrupt, self._act = interrupt, act
        self._left = 0 if interrupt is None else interrupt.nth
        self._lock = threading.Lock()
        self.has_begun = False
        """Whether a batch is there, and so everything that is sampled is kept."""

    def meet(self, moment: str, is_before: bool) -> None:
        """Act, if this is the event."""
        if self._is_it(moment, is_before):
            self._act()

    def _is_it(self, moment: str, is_before: bool) -> bool:
        wanted = self._interrupt
        if wanted is None or (moment, is_before) != (wanted.moment, wanted.is_before):
            return False
        with self._lock:
            self._left -= 1
            return self._left == 0

    def around(self, moment: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are events."""

        def called(*arguments: Any, **named: Any) -> Any:
            self.meet(moment, True)
            result = function(*arguments, **named)
            self.meet(moment, False)
            return result

        return called

    def place(self) -> None:
        """Meet the events of all rollouts of this process; not to be undone."""
        for owner, name, moment in (
            (Engine, "start_window", WINDOW),
            (RunningWindow, "wait", WINDOW),
            (Engine, "admit", PREFILL),
            (Engine, "go_on", PREFILL),
        ):
            setattr(owner, name, self.around(moment, getattr(owner, name)))
        allocate = Engine.allocate

        def allocated(*arguments: Any) -> Any:
            self.has_begun = True
            return allocate(*arguments)

        Engine.allocate = allocated  # type: ignore[method-assign, assignment]
        for topology in (OneDevice, DataShards):
            topology.move = self._moving(topology.move)  # type: ignore[method-assign]
        journal._write = self._writing(journal._write)

    def _moving(self, move: Callable[..., Any]) -> Callable[..., Any]:
        def moved(topology: Any, state: Any, old: Any, new: Any, index: Any) -> Any:
            is_growth = new[0] > old[0] or new[1] > old[1]
            moment = GROWTH if is_growth else COMPACTION
            return self.around(moment, move)(topology, state, old, new, index)

        return moved

    def _writing(self, write: Callable[[int, bytes], None]) -> Callable[..., None]:
        def written(descriptor: int, data: bytes) -> None:
            self.meet(JOURNAL, True)
            half = len(data) // 2
            write(descriptor, data[:half])
            self.meet(JOURNAL, False)
            write(descriptor, data[half:])

        return written

    def finishing(
        self, on_finish: Callable[[int, Completion], None]
    ) -> Callable[[int, Completion], None]:
        """Return an `on_finish` whose calls are events."""
        return self.around(FINISH, on_finish)

    def answering(
        self, workload: Workload, tell: Callable[..., None]
    ) -> Callable[[int, Turn], list[int] | None]:
        """Return what answers the turns of a workload; its calls are events.

        Args:
          tell: is told of every call.
        """

        def respond(sequence_id: int, turn: Turn) -> list[int] | None:
            tokens = turn.completion_ids.tolist()
            tell(asked=sequence_id, tokens=tokens)
            answer = workload.answer(sequence_id, tokens)
            return None if answer is None else answer[: turn.room]

        return self.around(TOOL, respond)
