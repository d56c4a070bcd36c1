"""Answers to turns: the tool, the user or the environment of a conversation.

`Respond` says what answers and how far a conversation goes; `Calls` runs it beside the
loop of a rollout, which asks and looks for what has been answered, and never waits for
a single call.

A call that hangs cannot be ended from outside in Python. Its answer is given up at the
time limit, and another thread takes its place.

Left out: which turn is asked about, and what becomes of an answer (`scheduler.turns`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeAlias

import numpy as np

from er_jax.arguments import check_number, check_whole
from er_jax.thread_settings import ThreadSettings

# The longest wait for a thread that runs coroutines to cancel them, in seconds.
CANCEL_S = 1.0


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn that has ended, as `respond` is asked about it; arrays are copies.

    Attributes:
      index: of the turn in its conversation, from 0.
      token_ids: int32 `[length]`, sampled in this turn, the stop token included.
      prompt_ids: int32 `[length]`.
      completion_ids: int32 `[length]`, all that follows the prompt, sampled and
        appended, this turn included.
      finish_reason: "stop", or "length" where the turn has reached `max_turn_tokens`.
      room: the most tokens that an answer may have, >= 1.
    """

    index: int
    token_ids: np.ndarray
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    finish_reason: str
    room: int


Answer: TypeAlias = Sequence[int] | np.ndarray | None
RespondFunction: TypeAlias = Callable[[int, Turn], Answer | Coroutine[Any, Any, Answer]]


@dataclasses.dataclass(frozen=True)
class Respond:
    """What answers turns, and how far a conversation goes.

    Args:
      function: called with (sequence id, `Turn`) in a thread when a turn has ended.
        Returns the tokens to append, at least one, behind which the next turn is
        sampled; or None to end the completion. A coroutine function is run by the event
        loop of one thread.
      max_parallel: calls that run at a time; others wait for them; >= 1.
      timeout_s: seconds a call may take, counted from when it runs; > 0, None is no
        limit.
      max_turns: sampled turns of a completion; the last is not asked about; >= 1, None
        is no limit.
      max_turn_tokens: sampled tokens of a turn, which then ends with the finish reason
        "length"; >= 1, None is no limit but `max_new_tokens`, which counts all tokens
        of a completion.
    Raises:
      ValueError: another value.
    """

    function: RespondFunction
    max_parallel: int = 8
    timeout_s: float | None = 60.0
    max_turns: int | None = None
    max_turn_tokens: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(
                f"respond={self.function!r} must be a function of (sequence id, Turn), "
                "or an er_jax.Respond(...) of one"
            )
        check_whole("respond.max_parallel", self.max_parallel)
        for name in ("max_turns", "max_turn_tokens"):
            if getattr(self, name) is not None:
                check_whole(f"respond.{name}", getattr(self, name))
        if self.timeout_s is not None:
            check_number("respond.timeout_s", self.timeout_s, 1e-6, 1e9, "a time limit")

    @property
    def is_async(self) -> bool:
        """Whether it is a coroutine function, or an object whose call is one."""
        function = self.function
        call = getattr(function, "__call__", None)  # noqa: B004
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            call
        )


def as_respond(respond: Respond | Callable[..., Any] | None) -> Respond | None:
    """Return what answers turns, with the usual limits for a plain function.

    Raises:
      ValueError: it is no function.
    """
    if respond is None or isinstance(respond, Respond):
        return respond
    return Respond(respond)


def checked_answer(answer: Any, vocab_size: int, room: int) -> np.ndarray:
    """Return the tokens of an answer, int32 `[length]`.

    Raises:
      ValueError: it is no answer that a conversation can go on with.
    """
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        raise ValueError("returned a coroutine; make respond a coroutine function")
    try:
        tokens = np.asarray(answer)
    except Exception as error:
        raise ValueError(
            f"returned what is no sequence of token ids: {error}"
        ) from None
    if tokens.size == 0:
        raise ValueError("returned no tokens; return None to end the completion")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"returned an array of shape {tokens.shape} and dtype {tokens.dtype}, not "
            "a flat sequence of integer token ids"
        )
    is_bad = (tokens < 0) | (tokens >= vocab_size)
    if is_bad.any():
        raise ValueError(
            f"returned token id {tokens[np.argmax(is_bad)]}, outside the vocabulary "
            f"0 .. {vocab_size - 1}"
        )
    if len(tokens) > room:
        raise ValueError(
            f"returned {len(tokens)} tokens, and max_new_tokens leaves room for {room}"
        )
    return tokens.astype(np.int32)


@dataclasses.dataclass(eq=False)
class _Call:
    """A call that was asked for.

    sequence: of the request, passed through. start_s: `time.monotonic()` when it began
    to run. is_given_up: whether its answer will not be taken.
    """

    sequence: int
    sequence_id: int
    turn: Turn
    start_s: float | None = None
    is_given_up: bool = False


class Calls:
    """Runs what answers turns, in threads; a context manager that ends them.

    Args:
      respond: what to run. Threads have the settings of JAX and the context variables
        of the thread that makes this object.
    """

    def __init__(self, respond: Respond) -> None:
        self._respond = respond
        self._settings = ThreadSettings.here()
        self._answers: queue.SimpleQueue[tuple[_Call, Any]] = queue.SimpleQueue()
        self._running: set[_Call] = set()
        self._runner = _Tasks(self) if respond.is_async else _Threads(self)

    def __enter__(self) -> Calls:
        """Return the object."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self.close()

    def ask(self, sequence: int, sequence_id: int, turn: Turn) -> None:
        """Have a turn answered; `answers` gives it, with the number of the sequence."""
        call = _Call(sequence, sequence_id, turn)
        self._running.add(call)
        self._runner.put(call, len(self._running))

    def answers(self, wait_s: float = 0.0) -> list[tuple[int, Any]]:
        """Return what has been answered since, as (sequence, answer).

        An answer is what the function has returned, or the exception that it raised; a
        `TimeoutError` where it took too long.

        Args:
          wait_s: how long to wait for the first.
        """
        found: list[tuple[int, Any]] = []
        with contextlib.suppress(queue.Empty):
            wait = {"timeout": wait_s} if wait_s else {"block": False}
            while True:
                call, answer = self._answers.get(**wait)  # type: ignore[arg-type]
                wait = {"block": False}
                if call in self._running:
                    self._running.remove(call)
                    found.append((call.sequence, answer))
        limit_s, now_s = self._respond.timeout_s, time.monotonic()
        for call in list(self._running):
            start_s = call.start_s
            if limit_s is None or start_s is None or now_s - start_s <= limit_s:
                continue
            self._running.remove(call)
            self._runner.give_up(call)
            found.append((call.sequence, TimeoutError(f"no answer in {limit_s:g} s")))
        return found

    def close(self) -> None:
        """Ask for nothing more; threads end when their calls do, coroutines at once."""
        self._running.clear()
        self._runner.close()

    def run(self, call: _Call) -> None:
        """Answer a call in this thread."""
        call.start_s = time.monotonic()
        try:
            answer = self._respond.function(call.sequence_id, call.turn)
        except BaseException as error:
            answer = error  # type: ignore[assignment]
        self._answers.put((call, answer))

    async def run_async(self, call: _Call) -> None:
        """Answer a call in this event loop."""
        call.start_s = time.monotonic()
        answer: Any

        async def answered() -> Any:
            made: Any = self._respond.function(call.sequence_id, call.turn)
            try:
                return await made
            except (SystemExit, KeyboardInterrupt) as error:
                return error  # Raised, they would end the loop.

        try:
            answer = await asyncio.wait_for(answered(), self._respond.timeout_s)
        except TimeoutError as error:
            own = f"no answer in {self._respond.timeout_s} s"
            answer = error if str(error) else TimeoutError(own)
        except BaseException as error:
            answer = error
        self._answers.put((call, answer))
        if isinstance(answer, asyncio.CancelledError):
            raise answer

    def start_thread(self, function: Callable[[], None]) -> threading.Thread:
        """Start a thread; a call that hangs keeps no process from ending."""
        thread = threading.Thread(
            target=self._settings.call,
            args=(function,),
            name="er_jax.respond",
            daemon=True,
        )
        thread.start()
        return thread

    @property
    def max_parallel(self) -> int:
        """Calls that run at a time."""
        return self._respond.max_parallel


class _Threads:
    """Runs calls in as many threads as there are calls, `max_parallel` at most."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._waiting: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_threads = 0

    def put(self, call: _Call, num_calls: int) -> None:
        self._waiting.put(call)
        if self._num_threads < min(self._calls.max_parallel, num_calls):
            self._start()

    def _start(self) -> None:
        self._num_threads += 1
        self._calls.start_thread(self._work)

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            self._calls.run(call)
            with self._lock:
                if call.is_given_up:
                    return  # Another thread has its place.

    def give_up(self, call: _Call) -> None:
        with self._lock:
            call.is_given_up = True
        self._num_threads -= 1
        self._start()

    def close(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get(block=False)
        for _ in range(self._num_threads):
            self._waiting.put(None)
        self._num_threads = 0


class _Tasks:
    """Runs calls as tasks of one event loop, `max_parallel` at a time."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_ready = threading.Event()

    def put(self, call: _Call, num_calls: int) -> None:
        if self._thread is None:
            self._thread = self._calls.start_thread(lambda: asyncio.run(self._serve()))
            self._is_ready.wait()
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin, call)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_closed = asyncio.Event()
        self._places = asyncio.Semaphore(self._calls.max_parallel)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_ready.set()
        await self._is_closed.wait()  # `asyncio.run` then cancels what still runs.

    def _begin(self, call: _Call) -> None:
        task = asyncio.ensure_future(self._run(call))
        self._tasks.add(task)  # The loop itself holds tasks weakly.
        task.add_done_callback(self._tasks.discard)

    async def _run(self, call: _Call) -> None:
        async with self._places:
            await self._calls.run_async(call)

    def give_up(self, call: _Call) -> None:
        call.is_given_up = True  # It holds up the loop, or ends by itself.

    def close(self) -> None:
        if self._thread is None or self._loop is None:
            return
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(self._is_closed.set)
        self._thread.join(CANCEL_S)
        self._thread = None
