"""One call of a rollout in a life: what happens in it, and what it must give.

`HeldCall` is asked by the rollout itself: by its controller, before every window, and
by whatever answers its turns, when all sequences wait. It does what is decided there,
and holds what `on_finish` and the answering function are told, and what is returned.

Left out: how the call is made (`living`), what completions must be (`known`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from benchmarks.lib.events import (
    SLOTS,
    Break,
    Event,
    Give,
    Halt,
    Point,
    Wait,
    Window,
)
from benchmarks.lib.known import (
    OPEN,
    TOOL,
    Answer,
    Difference,
    Row,
    Terms,
    Text,
    Token,
    check,
    num_turns,
    require,
    walk,
)
from er_jax import Completion, Respond, Rollout, Stop, Turn, Until
from er_jax.respond import Calls
from er_jax.scheduler import batch
from er_jax.types import NONE, Program


class Failure(Exception):
    """A failure that was decided upon."""


class Held(Calls):
    """Calls of a function that run when it is decided so, in the rollout's thread."""

    def __init__(self, call: HeldCall, respond: Respond) -> None:
        super().__init__(respond)
        self._call = call
        self._runner: Any = self

    def put(self, call: Any, num_calls: int) -> None:
        """Take a turn."""
        self._call.ask(self, call)

    def give_up(self, call: Any) -> NoReturn:
        """Never happens: there is no time limit."""
        raise AssertionError

    def answers(self, wait_s: float = 0.0) -> list[tuple[int, Any]]:
        """Return what has been answered, asking what happens where all wait."""
        if wait_s:
            self._call.wait()
        return super().answers()

    def close(self) -> None:
        """Drop what waits."""
        self._running.clear()


class HeldCall:
    """What has happened in a call, and what that call may give.

    Args:
      decide: returns what happens at a point. counts: of what comes of it.
      rows: the completions, as they are known. n: of each prompt.
      terms: of the call. token: of its reference.
      resumed: what the call goes on with, by sequence id; a journal not counted.
      has_journal: whether it has one. until: when it ends early.
    Attributes:
      difference: the first that was found; the rollout may have swallowed it.
      may_break: whether an interrupt was decided upon.
    """

    def __init__(
        self,
        decide: Callable[[Point], Event],
        counts: collections.Counter[str],
        rows: Sequence[Row],
        n: int,
        terms: Terms,
        token: Token,
        *,
        resumed: Mapping[int, Text],
        has_journal: bool,
        until: Until | None,
    ) -> None:
        self.difference: Difference | None = None
        self._decide, self._counts = decide, counts
        self._rows = {row.sequence_id: row for row in rows}
        self._n, self._terms, self._token = n, terms, token
        self._resumed, self._has_journal, self._until = resumed, has_journal, until
        # What `on_finish` got, by sequence id.
        self._told: dict[int, Text] = {}
        # Turns answered before the last point, with the tokens so far, and since then.
        self._given: list[tuple[int, tuple[int, ...]]] = []
        self._fresh: list[tuple[int, tuple[int, ...]]] = []
        # Turns that wait.
        self._asked: list[tuple[Held, Any]] = []
        self._answer: Answer = None
        # What comes with the next completion told of.
        self._to_break: Break | None = None
        self._must_end = False

    @property
    def may_break(self) -> bool:
        """Whether an interrupt or a failure was decided upon."""
        return self._must_end or self._to_break is not None

    @property
    def _stop(self) -> Stop | None:
        return None if self._until is None else self._until.stop

    def _was_over(self, row: Row) -> bool:
        """Whether a completion has nothing to be told of."""
        known = self._resumed.get(row.sequence_id)
        return known is not None and self._terms.is_over(known)

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        try:
            yield
        except Difference as error:
            self.difference = self.difference or error
            raise

    def _row(self, sequence_id: int) -> Row:
        require(sequence_id in self._rows, f"there is no sequence {sequence_id}")
        return self._rows[sequence_id]

    # Points.

    def _point(self, kind: str) -> Event:
        """Return what happens next, but for answers and the like, which are done."""
        with self._keeping():
            require(not self._must_end, "a call goes on that had to end")
        self._given += self._fresh
        self._fresh = []
        stop = self._stop
        while True:
            can_halt = stop is not None and not stop.is_set
            rooms = tuple(asked.turn.room for _, asked in self._asked)
            match event := self._decide(Point(kind, rooms, can_halt)):
                case Give(turn, answer):
                    self._give(self._asked.pop(turn % len(rooms)), answer)
                case Halt():
                    assert stop is not None
                    stop()
                case Break(is_failure, at_finish) if at_finish:
                    self._to_break = event
                case Break(is_failure):
                    self._break(is_failure)
                case Window() | Wait():
                    # Whatever told it to end, it does so after this.
                    self._must_end = stop is not None and stop.is_set
                    return event
                case _:
                    raise AssertionError(event)

    def _break(self, is_failure: bool) -> NoReturn:
        self._must_end = True
        if is_failure:
            raise Failure
        raise KeyboardInterrupt

    def window(self, options: Sequence[Program], num_live: int) -> Program:
        """Return the program of the next window.

        Args:
          options: to choose from. num_live: rows.
        """
        with self._keeping():
            require(0 < num_live <= max(SLOTS), f"{num_live} rows are live")
        event = self._point("window")
        assert isinstance(event, Window)
        batch.MIN_ROUNDS = event.rounds
        return options[event.program % len(options)]

    def wait(self) -> None:
        """Have something happen while all sequences wait."""
        self._point("waiting")

    def _give(self, waiting: tuple[Held, Any], answer: Answer) -> None:
        calls, asked = waiting
        text = tuple(asked.turn.completion_ids.tolist())
        self._row(asked.sequence_id).answers.setdefault(text, []).append(answer)
        self._fresh.append((asked.sequence_id, text))
        self._answer = answer
        self._counts["refusals"] += answer is None
        self._counts["tool failures"] += answer == TOOL
        calls.run(asked)

    def respond(self, sequence_id: int, turn: Turn) -> Any:
        """Return the answer that is given now: what the rollout is given to call."""
        if self._answer == TOOL:
            raise Failure
        return self._answer

    # What is told.

    def ask(self, calls: Held, asked: Any) -> None:
        """Take a turn that has ended, and hold what is told of it."""
        with self._keeping():
            self._hold_turn(asked.sequence_id, asked.turn)
        self._asked.append((calls, asked))

    def _hold_turn(self, sequence_id: int, turn: Turn) -> None:
        self._counts["turns asked about"] += 1
        row = self._row(sequence_id)
        require(not self._was_over(row), f"{row} is over, and asked about")
        tokens = tuple(turn.completion_ids.tolist())
        found = walk(row, self._terms, tokens, self._token)
        is_known = (sequence_id, tokens) in self._given + self._fresh
        require(not is_known, f"{row}: asked twice in a call about {tokens}")
        require(found.state == "asked", f"{row}: asked about {tokens}, {found.state}")
        start = len(tokens) - [*found.mask[::-1], False].index(False)
        wanted = (num_turns(found.mask) - 1, row.prompt, tokens[start:], found.reason)
        own = (
            turn.index, tuple(turn.prompt_ids.tolist()),
            tuple(turn.token_ids.tolist()), turn.finish_reason,
        )  # fmt: skip
        require(own == wanted, f"{row}: told {own}, not {wanted}")
        room = self._terms.limit - len(tokens)
        require(turn.room == room, f"{row}: room for {turn.room}, not {room}")

    def on_finish(self, sequence_id: int, completion: Completion) -> None:
        """Hold a completion that is told of; what was to break then does."""
        with self._keeping():
            told = sequence_id in self._told
            require(not told, f"{sequence_id} finished twice in a call")
            row, text = self._row(sequence_id), Text.of(completion)
            require(text.reason != OPEN, f"{row} is told of, and unfinished")
            require(not self._was_over(row), f"{row} was over, and is told of again")
            check(row, self._terms, text, self._token)
        self._told[sequence_id] = text
        self._counts["completions finished"] += 1
        if self._to_break is not None:
            self._break(self._to_break.is_failure)

    # Ends.

    def failed(self, completions: Mapping[int, Completion]) -> None:
        """Hold what a failed call kept; only a journal has it in the next one.

        Args:
          completions: by sequence id.
        """
        self._counts["calls failed"] += 1
        if self._has_journal:
            for sequence_id in self._rows.keys() - completions.keys():
                self._rows[sequence_id].is_vague = True
        for sequence_id, completion in completions.items():
            row, text = self._row(sequence_id), Text.of(completion)
            require(text.reason != OPEN, f"{row} is kept, and unfinished")
            check(row, self._terms, text, self._token)
            if not self._has_journal or row.is_vague or row.is_closed:
                continue
            old, own = row.known.versions or (), self._terms.versions[-1]
            new = [own if is_new else NONE for is_new in text.mask[len(old) :]]
            row.known = dataclasses.replace(text, versions=(*old, *new))
            row.is_closed = True

    def returned(self, out: Rollout, *, is_broken: bool) -> None:
        """Hold what a call has returned, and take it for known.

        Args:
          out: of the call. is_broken: whether it came with an interrupt.
        """
        self._counts["calls interrupted" if is_broken else "calls returned"] += 1
        ids = out.sequence_ids.tolist()
        require(ids == list(self._rows), f"sequence ids are {ids}")
        texts = {name: Text.of_row(out, number) for number, name in enumerate(ids)}
        is_exact = not any(row.is_vague for row in self._rows.values())
        num_new = 0
        for number, (name, text) in enumerate(texts.items()):
            row = self._rows[name]
            prompt = out.prompt_ids[number][out.prompt_mask[number]].tolist()
            require(tuple(prompt) == row.prompt, f"{row}: prompt {prompt}")
            check(row, self._terms, text, self._token)
            num_new += text.num_sampled - row.known.num_sampled
            self._hold_told(row, text, is_broken)
        _hold_behind(out, list(texts.values()))
        # What was answered at an interrupt is not taken any more.
        for name, tokens in self._given + ([] if is_broken else self._fresh):
            is_lost = texts[name].tokens == tokens and texts[name].reason == OPEN
            require(not is_lost, f"{name}: an answer to {tokens} is lost")
        counted = out.stats.num_tokens
        is_right = counted == num_new if is_exact else counted <= num_new
        require(is_right, f"{counted} tokens were sampled where {num_new} are new")
        if not is_broken:
            self._hold_end([text.reason != OPEN for text in texts.values()], counted)
        for name, text in texts.items():
            row = self._rows[name]
            row.known, row.is_vague = text, False
            is_closed = self._has_journal and text.reason != OPEN
            row.is_closed = is_closed and not self._was_over(row)

    def _hold_told(self, row: Row, text: Text, is_broken: bool) -> None:
        told, is_over = self._told.get(row.sequence_id), text.reason != OPEN
        own = dataclasses.replace(text, versions=None)
        require(told in (None, own), f"{row}: was told {told}, and is {own}")
        require(told is None or is_over, f"{row}: told {told}, and is {text}")
        if not is_broken:
            is_told = is_over and not self._was_over(row)
            require((told is not None) == is_told, f"{row}: told {told} of {text}")

    def _hold_end(self, over: Sequence[bool], num_tokens: int) -> None:
        """Hold that a call which returned was over, or had reason to end."""
        if all(over):
            return
        n, until = self._n, self._until
        require(until is not None, "a call ended early that nothing told to")
        assert until is not None
        groups = sum(all(over[i : i + n]) for i in range(0, len(over), n))
        is_reached = until.is_reached(
            seconds=0.0, finished=sum(over), groups=groups, tokens=num_tokens
        )
        require(is_reached, f"a call ended early, before {until}")


def _hold_behind(out: Rollout, texts: Sequence[Text]) -> None:
    """Hold what arrays have where there is no token, or no sampled one."""
    width = out.completion_ids.shape[1]
    is_token = np.arange(width) < out.lengths[:, None]
    sampled = np.zeros_like(is_token)
    for line, text in zip(sampled, texts, strict=True):
        line[: len(text)] = text.mask
    require((out.completion_mask == sampled).all(), "a mask beyond its text")
    require((out.completion_ids[~is_token] == -1).all(), "tokens behind a text")
    require((out.logprobs[~sampled] == 0).all(), "log-probabilities of no token")
    require((out.version[~sampled] == NONE).all(), "versions of no token")
