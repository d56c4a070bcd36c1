"""Streaming: completions, or whole groups, one by one while the device goes on.

A rollout runs in a thread of its own and puts what has finished into a queue; whoever
iterates takes it from there. The queue is unbounded, so a slow consumer never makes the
device wait; it never holds more than the N completions of the request.

Left out: several processes, which would have to agree on when one of them closes.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar, overload

import jax
from jax.sharding import Mesh

from er_jax import checks
from er_jax.call import Call
from er_jax.config import RolloutConfig
from er_jax.control.controller import Controller
from er_jax.drafter import PolicyParams
from er_jax.respond import Respond, RespondFunction
from er_jax.result import Completion, Rollout
from er_jax.rollout import sample
from er_jax.session import Session
from er_jax.thread_settings import ThreadSettings
from er_jax.types import Params, Policy
from er_jax.until import Stop, Until

Item = TypeVar("Item")

BY = ("completion", "group")


class _AnyStop(Stop):
    """Is set when one of several is."""

    def __init__(self, stops: Sequence[Stop]) -> None:
        super().__init__()
        self._stops = stops

    @property
    def is_set(self) -> bool:
        """Whether any of them was called."""
        return any(stop.is_set for stop in self._stops)


class _Work:
    """A rollout in a thread of its own, which keeps no `Stream` alive.

    run: samples, given what to call once no argument is refused, and with each
      completion; returns the rollout.
    items: what has finished, in order; `None` is the end.
    out, error: of these, one is set at the end.
    """

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.out: Rollout | None = None
        self.error: BaseException | None = None
        self.stop = Stop()
        self.is_accepted = False
        self._is_decided = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, run: Callable[[], Rollout]) -> None:
        """Start to sample; returns when all arguments were checked.

        Raises:
          ValueError: an argument was refused, and nothing was started.
        """
        settings = ThreadSettings.here()

        def work() -> None:
            try:
                self.out = settings.call(run)
            except BaseException as error:
                self.error = error
            finally:
                self.items.put(None)
                self._is_decided.set()

        # No process waits at its end for the last window of a daemon; `end` does.
        self._thread = threading.Thread(target=work, name="er_jax.stream", daemon=True)
        atexit.register(self.end)
        try:
            self._thread.start()
            self._is_decided.wait()
        except BaseException:
            self.end()
            raise
        if not self.is_accepted:
            self.end()
            error, self.error = self.error, None
            assert error is not None, "neither accepted nor refused"
            try:
                raise error
            finally:
                del error  # Its frames hold the arguments, and this frame.

    def accept(self) -> None:
        """Say, from the thread, that no argument is refused."""
        self.is_accepted = True
        self._is_decided.set()

    def end(self) -> None:
        """End the rollout with its window, and wait for the thread."""
        self.stop()
        thread = self._thread
        # What holds a stream last may be the thread itself, in a garbage collection.
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        atexit.unregister(self.end)


@dataclasses.dataclass
class _Groups:
    """Completions put together by prompt.

    put: called with (prompt, its n completions) when the last of them is there.
    n: completions of a prompt. rows: sequence id -> row of the rollout.
    members: completions so far, by row, of each prompt.
    """

    put: Callable[[tuple[int, list[Completion]]], None]
    n: int
    rows: dict[int, int] = dataclasses.field(default_factory=dict)
    members: dict[int, dict[int, Completion]] = dataclasses.field(default_factory=dict)

    def begin(self, call: Call) -> None:
        """Take the completions that had ended before the call.

        What ends as the call begins is given out, and so comes by `add`.
        """
        self.rows = {int(name): row for row, name in enumerate(call.sequence_ids)}
        for row in call.ended.keys() - call.told_at_once.keys():
            completion = call.ended[row]
            self.members.setdefault(row // self.n, {})[row] = completion

    def add(self, sequence_id: int, completion: Completion) -> None:
        """Take a completion, and put its group if it is the last one."""
        row = self.rows[sequence_id]
        prompt = row // self.n
        members = self.members.setdefault(prompt, {})
        members[row] = completion
        if len(members) == self.n:
            del self.members[prompt]
            self.put((prompt, [members[row] for row in sorted(members)]))


class Stream(Generic[Item]):
    """The items of a rollout that is running: iterate, or close it early.

    It ends when everything has been given out, when it is closed, when its `with` block
    or the loop that alone holds it is left, and at Ctrl-C.

    Args:
      work: the rollout in its thread, as `stream` starts it.
    Example:
      >>> import jax, er_jax
      >>> policy = er_jax.Decoder(er_jax.DecoderConfig(
      ...     vocab_size=32, dim=32, num_layers=1, num_heads=2, num_kv_heads=1,
      ...     hidden_dim=64))
      >>> config = er_jax.RolloutConfig(max_new_tokens=4, n=2, control="ar")
      >>> with er_jax.stream(
      ...     policy, policy.init(jax.random.key(0)), [[1, 2, 3]],
      ...     key=jax.random.key(1), config=config,
      ... ) as items:
      ...     sorted(sequence_id for sequence_id, completion in items)
      [0, 1]
      >>> items.rollout.lengths.tolist()
      [4, 4]
    """

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._has_ended = False

    def __iter__(self) -> Iterator[Item]:
        """Return the stream itself: what was given out is not given again."""
        return self

    def __next__(self) -> Item:
        """Return the next item, waiting for it.

        Raises:
          StopIteration: all have been given out, or the stream is closed.
          RolloutError: the rollout failed, after what had finished was given out.
          KeyboardInterrupt: Ctrl-C; its attribute `rollout` holds everything.
        """
        if self._has_ended:
            raise StopIteration
        try:
            item = self._work.items.get()
            if item is not None:
                return item
            self.close()
        except KeyboardInterrupt as error:
            self.close()
            error.rollout = self._work.out  # type: ignore[attr-defined]
            raise
        if self._work.error is not None:
            raise self._work.error
        raise StopIteration

    def __enter__(self) -> Stream[Item]:
        """Return the stream."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the stream."""
        self.close()

    def __del__(self) -> None:
        """Close the stream when nothing can iterate over it any more."""
        self.close()

    def close(self) -> None:
        """End the rollout with the window that runs now, and wait for that.

        Nothing is given out afterwards: `rollout` has what had finished and what had
        not. Closing again does nothing.
        """
        self._has_ended = True
        self._work.end()

    @property
    def rollout(self) -> Rollout:
        """The whole `Rollout`, once the stream has ended; `resume` takes it.

        A completion that could have gone on is "unfinished". Of a stream that failed,
        this raises what its iteration does.
        """
        if self._work.out is not None and self._has_ended:
            return self._work.out
        if self._work.error is not None and self._has_ended:
            raise self._work.error
        raise RuntimeError(
            "the rollout of a stream is there when the stream has ended; iterate to "
            "the end, or call close()"
        )


@overload
def stream(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    config: RolloutConfig,
    by: Literal["completion"] = "completion",
    sequence_ids: Sequence[int] | None = None,
    controller: Controller | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    profile: str | os.PathLike[str] | None = None,
    resume: Rollout | str | os.PathLike[str] | None = None,
    until: Until | None = None,
    version: int = 0,
    journal: str | os.PathLike[str] | None = None,
    respond: Respond | RespondFunction | None = None,
    session: Session | None = None,
) -> Stream[tuple[int, Completion]]: ...


@overload
def stream(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    config: RolloutConfig,
    by: Literal["group"],
    sequence_ids: Sequence[int] | None = None,
    controller: Controller | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    profile: str | os.PathLike[str] | None = None,
    resume: Rollout | str | os.PathLike[str] | None = None,
    until: Until | None = None,
    version: int = 0,
    journal: str | os.PathLike[str] | None = None,
    respond: Respond | RespondFunction | None = None,
    session: Session | None = None,
) -> Stream[tuple[int, list[Completion]]]: ...


def stream(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    config: RolloutConfig,
    by: Literal["completion", "group"] = "completion",
    sequence_ids: Sequence[int] | None = None,
    controller: Controller | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    profile: str | os.PathLike[str] | None = None,
    resume: Rollout | str | os.PathLike[str] | None = None,
    until: Until | None = None,
    version: int = 0,
    journal: str | os.PathLike[str] | None = None,
    respond: Respond | RespondFunction | None = None,
    session: Session | None = None,
) -> Stream[Any]:
    """Sample as `rollout` does, and give out what finishes while the rest decodes.

    The rollout runs in a thread, under the JAX settings of the caller. It never waits
    for the consumer: what has finished is kept until it is asked for, N completions at
    most. The tokens are those of `rollout`.

    Args:
      policy: as for `rollout`.
      params: as for `rollout`; do not donate them before the stream has ended.
      prompts: as for `rollout`.
      key: a random key, as for `rollout`.
      config: as for `rollout`.
      by: "completion" gives (sequence id, `Completion`) as each finishes; "group" gives
        (index of a prompt, list of its n completions) when the last of them has.
      sequence_ids: as for `rollout`.
      controller: as for `rollout`.
      mesh: as for `rollout`; its devices belong to one process.
      progress: show a progress bar.
      profile: directory for a trace, as for `rollout`.
      resume: as for `rollout`. Completions that had finished there are not given out,
        nor are groups of only such; a group that others complete has all n.
      until: as for `rollout`; the stream ends where the rollout does.
      version: as for `rollout`.
      journal: as for `rollout`. What it holds is given out first.
      respond: as for `rollout`. Conversations are given out whole, not their turns.
      session: as for `rollout`.
    Returns:
      A `Stream`: an iterator, and a context manager that closes it. Its `rollout` is
      there when it has ended.
    Raises:
      ValueError: a wrong argument, at the call. What fails later reaches the consumer
        when it asks for the next item; see `Stream`.
      OSError: the journal cannot be written, at the call.
    """
    if by not in BY:
        raise ValueError(f"by={by!r} must be one of {', '.join(map(repr, BY))}")
    checks.check_outside_jit(params, prompts, key)
    checks.check_version(version, until)
    work = _Work()
    own = until or Until()
    stops = [work.stop] if own.stop is None else [work.stop, own.stop]
    groups = _Groups(work.items.put, config.n)

    def on_checked(call: Call) -> None:
        if call.engine.agreement.is_spread:
            raise ValueError(
                "mesh has devices of several processes, and a stream ends when its own "
                "says so; call er_jax.rollout(..., on_finish=...) in all of them"
            )
        groups.begin(call)
        work.accept()

    def on_completion(sequence_id: int, completion: Completion) -> None:
        work.items.put((sequence_id, completion))

    work.start(
        functools.partial(
            sample,
            policy,
            params,
            prompts,
            key=key,
            config=config,
            sequence_ids=sequence_ids,
            controller=controller,
            mesh=mesh,
            on_finish=groups.add if by == "group" else on_completion,
            progress=progress,
            profile=profile,
            resume=resume,
            until=dataclasses.replace(own, stop=_AnyStop(stops)),
            version=version,
            journal=journal,
            respond=respond,
            session=session,
            on_checked=on_checked,
        )
    )
    return Stream(work)
