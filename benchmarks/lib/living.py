"""A life of rollouts: calls that are decided upon event by event, and held to be right.

A `Life` makes the calls that a training makes over time: requests that share prompts
with those before, new parameters and old ones again, completions that are ended early,
fail, go on elsewhere, are answered, and are read from a journal, in sessions with room
for few prompts. At every point where something may happen it asks what does, and it
holds whatever can be seen to what has to be (`known`).

The calls are the public ones, in one thread. Three things are put in their place:
windows last a stated number of rounds; an answer is given where the life says so, in
the thread of the rollout; and a journal notes what runs after every window, or never.
So nothing depends on the clock, and the same events do the same again.

Left out: what decides (`benchmarks.living` at random, `tests/test_living.py` with
hypothesis); meshes, several processes; threads of answers and of `stream`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import jax
import numpy as np

import er_jax
from benchmarks.lib.controllers import Restless
from benchmarks.lib.known import (
    OPEN,
    TOOL,
    VOCAB_SIZE,
    Answer,
    Difference,
    Row,
    Sum,
    Terms,
    Text,
    check,
    num_turns,
    require,
    sum_params,
    walk,
)
from benchmarks.lib.reference import Reference, settings_of
from er_jax import Completion, Respond, Rollout, Session, Stop, Turn, Until, journal
from er_jax import request as requests
from er_jax.engine import kept
from er_jax.respond import Calls
from er_jax.scheduler import batch, turns
from er_jax.scheduler.options import Options
from er_jax.types import NONE, Program

POLICY = Sum()
SLOTS = (1, 2, 3)
GAMMAS = ((0,), (0, 2))
NUM_PARAMS, NUM_KEYS = 3, 2
TEMPERATURES = (1.0, 0.6, 0.0)
STOPS: tuple[tuple[int, ...], ...] = ((0,), (0, 1), ())

# Prompts and completions are so short that a text has 32 tokens at most: programs for
# prompts of two lengths serve all calls, with one length of the cache.
LONGEST_PROMPT, MOST_NEW = 20, 12
CACHE_LENGTH = 64

# Bytes that a session may keep of prompts; 768 is one of up to 16 tokens.
PROMPT_BYTES = (0, 800, 2400, 2**20)


# What may happen in a call.


@dataclasses.dataclass(frozen=True)
class Window:
    """A window runs: the `program`-th of those that can, modulo their number.

    rounds: that it may have.
    """

    program: int
    rounds: int


@dataclasses.dataclass(frozen=True)
class Give:
    """A turn is answered: the `turn`-th of those that wait, modulo their number."""

    turn: int
    answer: Answer


@dataclasses.dataclass(frozen=True)
class Halt:
    """The call is told to end early."""


@dataclasses.dataclass(frozen=True)
class Break:
    """Ctrl-C, or a failure.

    is_failure: which. at_finish: whether it comes when the next completion is told of,
    while a window runs, and not now.
    """

    is_failure: bool
    at_finish: bool


@dataclasses.dataclass(frozen=True)
class Wait:
    """Nothing, while all sequences wait for answers."""


# What may happen between calls.


@dataclasses.dataclass(frozen=True)
class Style:
    """How a call is made, which decides no token.

    slots, gammas: the latter an index of `GAMMAS`. draft: index of parameters.
    is_stoppable: whether it can be told to end early. finished, groups, tokens: see
    `Until`; None is no limit. from_file: whether it reads what it resumes.
    is_noted: whether the journal notes what runs.
    """

    slots: int = 3
    gammas: int = 1
    draft: int = 0
    is_stoppable: bool = True
    finished: int | None = None
    groups: int | None = None
    tokens: int | None = None
    from_file: bool = False
    is_noted: bool = True


@dataclasses.dataclass(frozen=True)
class Begin:
    """A request begins, perhaps with completions of the one before.

    prompts: numbers of prompts of the life. n: completions of each. key, temperature,
    stops: indices. limit: tokens of a completion. turn_tokens, max_turns: see
    `Respond`. carried: how many prompts of the request before are in front of these,
    with their completions.
    """

    prompts: tuple[int, ...]
    n: int
    key: int
    temperature: int
    stops: int
    limit: int
    is_answered: bool
    turn_tokens: int | None
    max_turns: int | None
    carried: int
    has_journal: bool
    style: Style


@dataclasses.dataclass(frozen=True)
class GoOn:
    """The request goes on.

    raised: by how many tokens the limit is.
    is_answered: whether turns are, now. has_journal: whether it has a journal, the one
    that there is if the call may go on with that. None: as before.
    """

    raised: int
    is_answered: bool | None
    has_journal: bool | None
    style: Style


@dataclasses.dataclass(frozen=True)
class Learn:
    """Other parameters, or earlier ones again: an index."""

    params: int


@dataclasses.dataclass(frozen=True)
class Share:
    """A session begins, with room for so many bytes of prompts; None: there is none."""

    prompt_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Tear:
    """The end of the journal is lost, as by a kill: a share of it stays, 0 to 1."""

    share: float


@dataclasses.dataclass(frozen=True)
class End:
    """The life ends, wherever it is."""


Event = (
    Window | Give | Halt | Break | Wait | Begin | GoOn | Learn | Share | Tear | End
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """Where something may happen.

    kind: "between" calls, before a "window", or "waiting" for answers.
    rooms: of the turns that wait for an answer, tokens that it may have.
    can_halt: whether the call can be told to end early, and has not been.
    can_go_on: whether there is a request. is_over: whether all of its completions are.
    has_journal: whether it has a journal. can_change: whether nothing has changed since
    the last call.
    """

    kind: str
    rooms: tuple[int, ...] = ()
    can_halt: bool = False
    can_go_on: bool = False
    is_over: bool = False
    has_journal: bool = False
    can_change: bool = False


class Ended(BaseException):
    """The life ends within a call."""


class Failure(Exception):
    """A failure that was decided upon."""


@dataclasses.dataclass
class Request:
    """What is asked for, over several calls.

    rows: its completions, the n of a prompt adjacent. limit, is_answered: of the
    latest call. part: what the last call that
    returned anything gave. journal: its file. base, named: what a call must resume, and
    what else must be the same, to go on with that journal.
    versions: of the calls that wrote it.
    """

    begin: Begin
    rows: list[Row]
    limit: int
    is_answered: bool
    part: Rollout | None = None
    journal: Path | None = None
    base: Rollout | None = None
    named: Any = None
    versions: tuple[int, ...] = ()


@dataclasses.dataclass
class Running:
    """What has happened in a call.

    resumed: what the call was given to go on with, by sequence id, but for a journal.
    told: what `on_finish` got, by sequence id. given: turns answered before the last
    point, as (row, tokens so far). fresh: those answered since. asked: calls of the
    function that wait. to_break: what comes with the next completion told of.
    """

    terms: Terms
    stop: Stop
    is_stoppable: bool
    resumed: Mapping[int, Text]
    told: dict[int, Text] = dataclasses.field(default_factory=dict)
    given: list[tuple[Row, tuple[int, ...]]] = dataclasses.field(default_factory=list)
    fresh: list[tuple[Row, tuple[int, ...]]] = dataclasses.field(default_factory=list)
    asked: list[tuple[Held, Any]] = dataclasses.field(default_factory=list)
    answer: Answer = None
    to_break: Break | None = None
    must_end: bool = False
    difference: Difference | None = None

    def was_over(self, row: Row) -> bool:
        """Whether a completion has nothing to be told of."""
        known = self.resumed.get(row.sequence_id)
        return known is not None and self.terms.is_over(known)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep a difference that is found in the block: a rollout may swallow it."""
        try:
            yield
        except Difference as error:
            self.difference = error
            raise


class Deciding(Restless):
    """A controller that asks its life which program is next."""

    def __init__(self, life: Life, gammas: Sequence[int]) -> None:
        super().__init__("best", gammas, SLOTS, 0)
        self._life = life

    def choose(
        self, options: Sequence[Program], current: Program | None, **known: Any
    ) -> Program:
        """Return the program that is decided upon."""
        return self._life.window(options, known["live"])


class Held(Calls):
    """Calls of a function that run when a life says so, in the rollout's thread."""

    def __init__(self, life: Life, respond: Respond) -> None:
        super().__init__(respond)
        self._life = life
        self._runner: Any = self

    def put(self, call: Any, num_calls: int) -> None:
        """Take a turn."""
        self._life.ask(self, call)

    def give_up(self, call: Any) -> NoReturn:
        """Never happens: there is no time limit."""
        raise AssertionError

    def answers(self, wait_s: float = 0.0) -> list[tuple[int, Any]]:
        """Return what has been answered, asking what happens where all wait."""
        if wait_s:
            self._life.wait()
        return super().answers()

    def close(self) -> None:
        """Drop what waits."""
        self._running.clear()


class Life:
    """Calls one after another, and what is known of them.

    Args:
      decide: returns what happens at a point.
      folder: for journals and saved rollouts. seed: of prompts and parameters.
    Attributes:
      counts: events by kind, and what came of them.
      log: the events so far.
    """

    def __init__(
        self, decide: Callable[[Point], Event], folder: Path, seed: int = 0
    ) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.log: list[Event] = []
        self._decide, self._folder = decide, folder
        self._prompts = prompts_of(seed)
        self._seed, self._params = seed, list[dict[str, jax.Array]]()
        self._now, self._version = 0, 0
        self._session: Session | None = None
        self._request: Request | None = None
        self._call: Running | None = None
        self._controllers = [Deciding(self, gammas) for gammas in GAMMAS]
        self._references: dict[Any, Reference] = {}
        self._tokens: dict[Any, tuple[int, float]] = {}

    def live(self) -> None:
        """Do what is decided until the end.

        Raises:
          Difference: something is not what it has to be.
        """
        with contextlib.suppress(Ended), jax.enable_x64(True), self._placed():
            self._params = [sum_params(10 * self._seed + i) for i in range(NUM_PARAMS)]
            try:
                while True:
                    self._between()
            finally:
                self._note_evictions()

    @contextlib.contextmanager
    def _placed(self) -> Iterator[None]:
        """Put in place what this life decides instead of the clock."""
        with (
            mock.patch.multiple(batch, WINDOW_S=0.0, MIN_ROUNDS=1),
            mock.patch.object(Options, "is_compiled", lambda self, program: True),
            mock.patch.object(turns, "Calls", lambda respond: Held(self, respond)),
            mock.patch.object(journal, "EVERY_S", 0.0),
            # Prompts of up to 16 tokens are prefilled two at a time, longer ones alone.
            mock.patch.object(requests, "PREFILL_TOKENS_CPU", 32),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "drafts were kept", RuntimeWarning)
            warnings.filterwarnings("ignore", "respond failed", RuntimeWarning)
            yield

    def _next(self, point: Point) -> Event:
        event = self._decide(point)
        self.log.append(event)
        if isinstance(event, End):
            raise Ended
        self.counts["steps"] += 1
        self.counts[type(event).__name__.lower()] += 1
        return event

    # Between calls.

    def _between(self) -> None:
        request = self._request
        has_journal = request is not None and request.journal is not None
        is_over = request is not None and all(
            row.known.reason != OPEN for row in request.rows
        )
        event = self._next(
            Point(
                "between",
                can_go_on=request is not None,
                is_over=is_over,
                has_journal=has_journal,
                can_change=not self.log or not isinstance(self.log[-1], Learn | Share),
            )
        )
        match event:
            case Learn(params):
                self._now = params
            case Share(prompt_bytes):
                self._note_evictions()
                self._session = None
                if prompt_bytes is not None:
                    self._session = Session(prompt_bytes=prompt_bytes)
                    # Programs of all lives are shared.
                    self._session.engines = kept._kept
            case Begin():
                self._begin(event)
            case GoOn():
                self._go_on(event)
            case Tear(share):
                self._tear(share)
            case _:
                raise AssertionError(event)

    def _note_evictions(self) -> None:
        if self._session is not None:
            prompts = self._session.prompts
            self.counts["prompts evicted"] += prompts.num_evicted
            self.counts["prompts outdated"] += prompts.num_outdated
            self.counts["prompts reused"] += prompts.num_uses

    def _begin(self, begin: Begin) -> None:
        before, groups = self._request, []
        if before is not None and before.begin.n == begin.n:
            own = [
                before.rows[i : i + begin.n]
                for i in range(0, len(before.rows), begin.n)
            ]
            fits = [
                rows
                for rows in own
                if all(len(row.known) <= begin.limit for row in rows)
                and not any(row.is_vague for row in rows)
            ]
            groups = fits[: begin.carried]
        num_carried = len(groups)
        for number in begin.prompts:
            prompt = self._prompts[number % len(self._prompts)]
            groups.append([Row(prompt, self._new_id()) for _ in range(begin.n)])
        rows = [row for group in groups for row in group]
        request = Request(begin, rows, begin.limit, begin.is_answered)
        if num_carried and before is not None and before.part is not None:
            prompts = [group[0].prompt for group in groups]
            ids = [row.sequence_id for row in rows]
            request.part = before.part.for_request(prompts, ids)
            self.counts["completions carried over"] += num_carried * begin.n
        self._request = request
        self._sample(begin.has_journal, begin.style)

    def _new_id(self) -> int:
        # Any order, and no number twice in a life.
        self.counts["completions"] += 1
        return (self.counts["completions"] * 7919) % 65521

    def _go_on(self, event: GoOn) -> None:
        request = self._request
        assert request is not None
        request.limit = min(request.limit + event.raised, MOST_NEW)
        if event.is_answered is not None:
            request.is_answered = event.is_answered
        has_journal = event.has_journal
        if has_journal is None:
            has_journal = request.journal is not None
        self._sample(has_journal, event.style)

    def _tear(self, share: float) -> None:
        request = self._request
        assert request is not None and request.journal is not None
        data = request.journal.read_bytes()
        request.journal.write_bytes(data[: int(share * len(data))])
        base = request.base
        for number, row in enumerate(request.rows):
            row.known = Text() if base is None else text_of(base, number)
            row.is_vague, row.is_closed = True, False

    # A call.

    def _journal(self, request: Request, wanted: bool, terms: Any) -> Any:
        """Return what to resume, with the request's journal, an old or a new one."""
        if not wanted or request.journal is None or request.named != terms:
            # What only the old journal knows is given up.
            base = request.part
            for number, row in enumerate(request.rows):
                row.known = Text() if base is None else text_of(base, number)
                row.is_vague = row.is_closed = False
            request.journal, request.versions = None, ()
            if wanted:
                request.journal = self._folder / f"{self._version}.journal"
                request.base, request.named = base, terms
            return base
        self.counts["journals gone on with"] += 1
        return request.base

    def _sample(self, wants_journal: bool, style: Style) -> None:
        request, self._version = self._request, self._version + 1
        assert request is not None
        begin, version = request.begin, self._version
        is_answered = request.is_answered
        named = (self._now, request.limit, is_answered)
        resume: Any = self._journal(request, wants_journal, named)
        request.versions = (*request.versions, version)
        terms = Terms(
            limit=request.limit,
            stops=STOPS[begin.stops],
            is_answered=is_answered,
            turn_tokens=begin.turn_tokens if is_answered else None,
            max_turns=begin.max_turns if is_answered else None,
            versions=request.versions,
        )
        resumed: dict[int, Text] = {}
        if resume is not None:
            for number, row in enumerate(request.rows):
                resumed[row.sequence_id] = text_of(resume, number)
        running = self._call = Running(terms, Stop(), style.is_stoppable, resumed)
        config = er_jax.RolloutConfig(
            max_new_tokens=request.limit,
            n=begin.n,
            temperature=TEMPERATURES[begin.temperature],
            stop_token_ids=STOPS[begin.stops],
            pad_id=-1,
            gammas=GAMMAS[style.gammas],
            max_slots=style.slots,
            drafter=er_jax.DrafterConfig(window=None),
        )
        limits = {
            name: value
            for name in ("finished", "groups", "tokens")
            if (value := getattr(style, name)) is not None
        }
        until = None
        if style.is_stoppable or limits:
            until = Until(stop=running.stop, **limits)
        respond = Respond(
            self._function,
            timeout_s=None,
            max_turns=begin.max_turns,
            max_turn_tokens=begin.turn_tokens,
        )
        if resume is not None and style.from_file:
            path = self._folder / "part.npz"
            resume.save(path)
            resume = path
        journal.EVERY_S = 0.0 if style.is_noted else 1e9
        key = jax.random.key(begin.key)
        self._set_reference(config, key)
        out: Rollout | None = None
        is_broken = False
        try:
            out = er_jax.rollout(
                POLICY,
                er_jax.PolicyParams(self._params[self._now], self._params[style.draft]),
                [row.prompt for row in request.rows[:: begin.n]],
                key=key,
                config=config,
                sequence_ids=[row.sequence_id for row in request.rows],
                controller=self._controllers[style.gammas],  # type: ignore[arg-type]
                on_finish=self._on_finish,
                resume=resume,
                until=until,
                version=version,
                journal=request.journal,
                respond=respond if is_answered else None,
                session=self._session,
            )
        except KeyboardInterrupt as error:
            require(running.to_break or running.must_end, "an interrupt of its own")
            require(hasattr(error, "rollout"), "an interrupted call kept nothing")
            out, is_broken = error.rollout, True  # type: ignore[attr-defined]
        except er_jax.RolloutError as error:
            if running.difference is None:
                if not isinstance(error.__cause__, Failure):
                    raise
                self._failed(request, terms, error.completions)
        if running.difference is not None:
            raise running.difference
        if out is not None:
            self._hold(request, running, out, style, until, is_broken)
        self._call = None

    def _set_reference(self, config: er_jax.RolloutConfig, key: jax.Array) -> None:
        assert self._request is not None
        begin = self._request.begin
        self._name = (self._now, begin.key, begin.temperature)
        self._reference = self._references.get(self._name) or Reference(
            POLICY,
            self._params[self._now],
            dataclasses.replace(
                settings_of(config, key), stop_ids=np.zeros(0, np.int32)
            ),
            max_new_tokens=MOST_NEW,
            length=CACHE_LENGTH,
            dtype="float64",
        )
        self._references[self._name] = self._reference

    def _token(self, text: tuple[int, ...], sequence_id: int) -> tuple[int, float]:
        name = (self._name, sequence_id, text)
        if name not in self._tokens:
            found = self._reference.token(text, sequence_id)
            assert found is not None
            self._tokens[name] = found
        return self._tokens[name]

    def _row(self, sequence_id: int) -> Row:
        assert self._request is not None
        rows = [r for r in self._request.rows if r.sequence_id == sequence_id]
        require(len(rows) == 1, f"there is no sequence {sequence_id}")
        return rows[0]

    # Points in a call.

    def _point(self, kind: str) -> Event:
        """Return what happens next, but for answers and the like, which are done."""
        call = self._call
        assert call is not None
        require(not call.must_end, "a call goes on that had to end")
        call.given += call.fresh
        call.fresh = []
        while True:
            can_halt = call.is_stoppable and not call.stop.is_set
            rooms = tuple(asked.turn.room for _, asked in call.asked)
            match event := self._next(Point(kind, rooms, can_halt)):
                case Give(turn, answer):
                    self._give(call.asked.pop(turn % len(rooms)), answer)
                case Halt():
                    call.stop()
                case Break(is_failure, at_finish) if at_finish:
                    call.to_break = event
                case Break(is_failure):
                    self._break(is_failure)
                case Window() | Wait():
                    # Whatever told it to end, it does so after this.
                    call.must_end = call.stop.is_set
                    return event
                case _:
                    raise AssertionError(event)

    def _break(self, is_failure: bool) -> NoReturn:
        assert self._call is not None
        self._call.must_end = True
        if is_failure:
            raise Failure
        raise KeyboardInterrupt

    def window(self, options: Sequence[Program], num_live: int) -> Program:
        """Return the program of the next window."""
        require(0 < num_live <= max(SLOTS), f"{num_live} rows are live")
        event = self._point("window")
        assert isinstance(event, Window)
        batch.MIN_ROUNDS = event.rounds
        return options[event.program % len(options)]

    def wait(self) -> None:
        """Have something happen while all sequences wait."""
        self._point("waiting")

    def _give(self, waiting: tuple[Held, Any], answer: Answer) -> None:
        assert self._call is not None
        calls, asked = waiting
        row = self._row(asked.sequence_id)
        text = tuple(asked.turn.completion_ids.tolist())
        row.answers.setdefault(text, []).append(answer)
        self._call.fresh.append((row, text))
        self._call.answer = answer
        self.counts["refusals"] += answer is None
        self.counts["tool failures"] += answer == TOOL
        calls.run(asked)

    def _function(self, sequence_id: int, turn: Turn) -> Any:
        assert self._call is not None
        if self._call.answer == TOOL:
            raise Failure
        return self._call.answer

    def ask(self, calls: Held, asked: Any) -> None:
        """Take a turn that has ended, and hold what is told of it."""
        assert self._call is not None
        with self._call.keeping():
            self._ask(self._call, asked.sequence_id, asked.turn)
        self._call.asked.append((calls, asked))

    def _ask(self, call: Running, sequence_id: int, turn: Turn) -> None:
        self.counts["turns asked about"] += 1
        row = self._row(sequence_id)
        require(not call.was_over(row), f"{row} is over, and asked about")
        tokens = tuple(turn.completion_ids.tolist())
        found = walk(row, call.terms, tokens, self._token)
        is_known = (row, tokens) in [(r, t) for r, t in call.given + call.fresh]
        require(not is_known, f"{row}: asked twice in a call about {tokens}")
        require(found.state == "asked", f"{row}: asked about {tokens}, {found.state}")
        start = len(tokens) - [*found.mask[::-1], False].index(False)
        wanted = (num_turns(found.mask) - 1, row.prompt, tokens[start:], found.reason)
        own = (
            turn.index, tuple(turn.prompt_ids.tolist()),
            tuple(turn.token_ids.tolist()), turn.finish_reason,
        )  # fmt: skip
        require(own == wanted, f"{row}: told {own}, not {wanted}")
        room = call.terms.limit - len(tokens)
        require(turn.room == room, f"{row}: room for {turn.room}, not {room}")

    def _on_finish(self, sequence_id: int, completion: Completion) -> None:
        assert self._call is not None
        with self._call.keeping():
            self._tell(self._call, sequence_id, completion)
        if self._call.to_break is not None:
            self._break(self._call.to_break.is_failure)

    def _tell(self, call: Running, sequence_id: int, completion: Completion) -> None:
        require(sequence_id not in call.told, f"{sequence_id} finished twice in a call")
        row, text = self._row(sequence_id), Text.of(completion)
        require(text.reason != OPEN, f"{sequence_id} is told of, and unfinished")
        require(not call.was_over(row), f"{sequence_id} was over, and is told of again")
        check(row, call.terms, text, self._token)
        call.told[sequence_id] = text
        self.counts["completions finished"] += 1

    # Ends of a call.

    def _failed(
        self, request: Request, terms: Terms, completions: Mapping[int, Completion]
    ) -> None:
        """Hold what a failed call kept; only a journal has it in the next one."""
        self.counts["calls failed"] += 1
        for row in request.rows if request.journal is not None else ():
            if row.sequence_id not in completions:
                row.is_vague = True
        for sequence_id, completion in completions.items():
            row, text = self._row(sequence_id), Text.of(completion)
            require(text.reason != OPEN, f"{sequence_id} is kept, and unfinished")
            check(row, terms, text, self._token)
            if request.journal is None or row.is_vague or row.is_closed:
                continue
            old, own = row.known.versions or (), terms.versions[-1]
            new = [own if is_new else NONE for is_new in text.mask[len(old) :]]
            row.known = dataclasses.replace(text, versions=(*old, *new))
            row.is_closed = True

    def _hold(
        self,
        request: Request,
        running: Running,
        out: Rollout,
        style: Style,
        until: Until | None,
        is_broken: bool,
    ) -> None:
        terms, rows = running.terms, request.rows
        self.counts["calls interrupted" if is_broken else "calls returned"] += 1
        require(
            out.sequence_ids.tolist() == [row.sequence_id for row in rows],
            f"sequence ids are {out.sequence_ids}",
        )
        texts = [text_of(out, number) for number in range(len(rows))]
        is_exact = not any(row.is_vague for row in rows)
        num_new = 0
        for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
            prompt = out.prompt_ids[number][out.prompt_mask[number]]
            require(tuple(prompt.tolist()) == row.prompt, f"{row}: prompt {prompt}")
            check(row, terms, text, self._token)
            num_new += text.num_sampled - row.known.num_sampled
            told = running.told.get(row.sequence_id)
            own = dataclasses.replace(text, versions=None)
            require(told in (None, own), f"{row}: was told {told}, and is {own}")
            is_over = text.reason != OPEN
            if not is_broken:
                is_told = is_over and not running.was_over(row)
                require((told is not None) == is_told, f"{row}: told {told} of {text}")
            require(told is None or is_over, f"{row}: told {told}, and is {text}")
        self._hold_behind(out, texts)
        for row, tokens in running.given + ([] if is_broken else running.fresh):
            text = texts[rows.index(row)]
            is_lost = text.tokens == tokens and text.reason == OPEN
            require(not is_lost, f"{row}: an answer to {tokens} is lost")
        counted = out.stats.num_tokens
        is_right = counted == num_new if is_exact else counted <= num_new
        require(is_right, f"{counted} tokens were sampled where {num_new} are new")
        if not is_broken:
            self._hold_until(texts, out, until, request.begin.n)
        for row, text in zip(rows, texts, strict=True):
            row.known, row.is_vague = text, False
            row.is_closed = request.journal is not None and text.reason != OPEN
            row.is_closed &= not running.was_over(row)
        request.part = out
        self._count(out)

    def _hold_behind(self, out: Rollout, texts: Sequence[Text]) -> None:
        """Hold what arrays have where there is no token, or no sampled one."""
        width = out.completion_ids.shape[1]
        is_token = np.arange(width) < out.lengths[:, None]
        sampled = np.zeros_like(is_token)
        for line, text in zip(sampled, texts, strict=True):
            line[: len(text)] = text.mask
        require((out.completion_mask == sampled).all(), "a mask beyond its text")
        require((out.completion_ids[~is_token] == -1).all(), "tokens behind a text")
        require((out.logprobs[~sampled] == 0).all(), "log-probabilities of no token")
        require((out.version[~sampled] == -1).all(), "versions of no token")

    def _hold_until(
        self, texts: Sequence[Text], out: Rollout, until: Until | None, n: int
    ) -> None:
        """Hold that a call which returned was over, or had reason to end."""
        over = [text.reason != OPEN for text in texts]
        if all(over):
            return
        require(until is not None, "a call ended early that nothing told to")
        assert until is not None
        groups = sum(all(over[i : i + n]) for i in range(0, len(over), n))
        is_reached = until.is_reached(
            seconds=0.0, finished=sum(over), groups=groups, tokens=out.stats.num_tokens
        )
        require(is_reached, f"a call ended early, before {until}")

    def _count(self, out: Rollout) -> None:
        stats = out.stats
        self.counts.update(
            {
                "tokens": stats.num_tokens,
                "tokens resumed": stats.num_resumed,
                "prompts prefilled": stats.num_prefilled,
                "prompts cloned": stats.num_cloned,
                "answers put behind a row": stats.num_kept,
                "drafts kept": sum(
                    int(np.arange(gamma + 1) @ histogram)
                    for gamma, histogram in stats.accepted.items()
                ),
            }
        )


def text_of(out: Rollout, number: int) -> Text:
    """Return the completion of a row of a rollout."""
    length = int(out.lengths[number])
    return Text(
        tokens=tuple(out.completion_ids[number, :length].tolist()),
        mask=tuple(out.completion_mask[number, :length].tolist()),
        logprobs=tuple(out.logprobs[number, :length].tolist()),
        versions=tuple(out.version[number, :length].tolist()),
        reason=str(out.finish_reason[number]),
    )


def prompts_of(seed: int) -> list[tuple[int, ...]]:
    """Return prompts of 1 to 20 tokens, many of which begin alike."""
    rng = np.random.default_rng(seed)

    def drawn(count: int) -> list[int]:
        return rng.integers(0, VOCAB_SIZE, count).tolist()

    stem = drawn(LONGEST_PROMPT)
    found = [stem[:length] for length in (1, 2, 9, 16, 17, LONGEST_PROMPT)]
    found += [[*stem[:3], *drawn(4)], [*stem[:17], *drawn(3)], drawn(5), drawn(1)]
    return [tuple(prompt) for prompt in found]
