"""Calls of several threads that are run together.

A call waits until a batch is made of it. One of the waiting threads makes the batch and
runs it; the others wait for their results, which they may get before the batch is over.
There is no thread but those of the callers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar


class Call:
    """Something that a thread waits for; a subclass says what it asks.

    `finish` or `fail` ends it, in whatever thread.
    """

    def __init__(self) -> None:
        self.arrived_s = time.monotonic()
        self.is_done = False
        self.error: BaseException | None = None


C = TypeVar("C", bound=Call)


class Batcher(Generic[C]):
    """Runs the calls of several threads in batches, one batch at a time.

    Args:
      choose: takes the waiting calls, the oldest first, and returns those to run now,
        at least one.
      run: runs these; calls `Batcher.finish` for each as soon as it has its result.
      max_wait_s: seconds that a call waits for others at most, unless a batch is
        running. Calls that arrive while one is running are in the next.
    """

    def __init__(
        self,
        choose: Callable[[list[C]], list[C]],
        run: Callable[[list[C]], Any],
        max_wait_s: float,
    ) -> None:
        self._choose, self._run, self._max_wait_s = choose, run, max_wait_s
        self._waiting: list[C] = []
        self._is_running = False
        self._changed = threading.Condition(threading.RLock())

    def submit(self, call: C) -> None:
        """Return when a call is done; raise if it failed."""
        with self._changed:
            self._waiting.append(call)
        try:
            while self._must_lead(call):
                self._lead()
        finally:  # an interrupted thread leaves no call behind
            with self._changed:
                self._waiting = [c for c in self._waiting if c is not call]
        if call.error is not None:
            raise call.error

    def _must_lead(self, call: C) -> bool:
        """Wait until a call is done (false) or this thread has to run a batch."""
        with self._changed:
            self._changed.wait_for(lambda: call.is_done or not self._is_running)
            if call.is_done:
                return False
            self._is_running = True
            return True

    def _lead(self) -> None:
        """Make a batch of waiting calls and run it; the calls get what it raises."""
        batch: list[C] = []
        failure: BaseException | None = None
        try:
            left_s = self._waiting[0].arrived_s + self._max_wait_s - time.monotonic()
            time.sleep(max(left_s, 0.0))
            with self._changed:
                batch = self._choose(list(self._waiting))
                self._waiting = [c for c in self._waiting if c not in batch]
            self._run(batch)
        except BaseException as error:
            failure = error
            # Ctrl-C is this thread's alone; so is what no call is to be told of.
            if not isinstance(error, Exception) or not batch:
                raise
        finally:
            with self._changed:
                self._is_running = False
                for call in batch:
                    if not call.is_done:
                        self.finish(call, _failure_of(failure))
                self._changed.notify_all()

    def finish(self, call: C, error: BaseException | None = None) -> None:
        """End a call: its thread goes on, or raises `error`."""
        with self._changed:
            call.error, call.is_done = error, True
            self._changed.notify_all()


def _failure_of(error: BaseException | None) -> BaseException:
    """Return what a call raises whose batch ended without its result."""
    if error is None:
        return RuntimeError("the batch ended without a result of this call")
    if isinstance(error, Exception):
        return error
    other = RuntimeError("the thread that ran this call's batch was interrupted")
    other.__cause__ = error
    return other
