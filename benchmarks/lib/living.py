"""A life of rollouts: calls that are decided upon event by event, and held to be right.

A `Life` makes the calls that a training makes over time: requests that share prompts
with those before, new parameters and old ones again, completions that are ended early,
fail, go on elsewhere, are answered, and are read from a journal, in sessions with room
for few prompts. At every point where something may happen it asks what does, and it
holds whatever can be seen to what has to be (`held_call`, `known`).

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

import er_jax
from benchmarks.lib.controllers import Restless
from benchmarks.lib.events import (
    GAMMAS,
    LONGEST_PROMPT,
    MOST_NEW,
    NUM_PARAMS,
    SLOTS,
    STOPS,
    TEMPERATURES,
    Begin,
    End,
    Event,
    GoOn,
    Learn,
    Point,
    Share,
    Style,
    Tear,
)
from benchmarks.lib.held_call import Failure, Held, HeldCall
from benchmarks.lib.known import (
    OPEN,
    VOCAB_SIZE,
    Row,
    Sum,
    Terms,
    Text,
    require,
    sum_params,
)
from benchmarks.lib.reference import Reference, settings_of
from er_jax import Respond, Rollout, Session, Stop, Until, journal
from er_jax import request as requests
from er_jax.engine import kept
from er_jax.scheduler import batch, turns
from er_jax.scheduler.options import Options
from er_jax.types import Program

POLICY = Sum()
CACHE_LENGTH = 64


class Ended(BaseException):
    """The life ends within a call."""


@dataclasses.dataclass
class Request:
    """What is asked for, over several calls.

    rows: its completions, the n of a prompt adjacent.
    limit, is_answered: of the latest call.
    part: what the last call that returned anything gave.
    journal: its file. base, named: what a call must resume, and what else must be the
    same, to go on with that journal. versions: of the calls that wrote it.
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
        self._call: HeldCall | None = None
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
            mock.patch.object(turns, "Calls", self._held),
            mock.patch.object(journal, "EVERY_S", 0.0),
            # Prompts of up to 16 tokens are prefilled two at a time, longer ones alone.
            mock.patch.object(requests, "PREFILL_TOKENS_CPU", 32),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "drafts were kept", RuntimeWarning)
            warnings.filterwarnings("ignore", "respond failed", RuntimeWarning)
            yield

    def _held(self, respond: Respond) -> Held:
        assert self._call is not None
        return Held(self._call, respond)

    def window(self, options: Sequence[Program], num_live: int) -> Program:
        """Return the program of the next window; see `HeldCall.window`."""
        assert self._call is not None
        return self._call.window(options, num_live)

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
            row.known = Text() if base is None else Text.of_row(base, number)
            row.is_vague, row.is_closed = True, False

    # A call.

    def _journal(self, request: Request, wanted: bool, terms: Any) -> Any:
        """Return what to resume, with the request's journal, an old or a new one."""
        if not wanted or request.journal is None or request.named != terms:
            # What only the old journal knows is given up.
            base = request.part
            for number, row in enumerate(request.rows):
                row.known = Text() if base is None else Text.of_row(base, number)
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
        key = jax.random.key(begin.key)
        self._set_reference(config, key)
        until = until_of(style)
        resumed: dict[int, Text] = {}
        if resume is not None:
            for number, row in enumerate(request.rows):
                resumed[row.sequence_id] = Text.of_row(resume, number)
        call = self._call = HeldCall(
            self._next, self.counts, request.rows, begin.n, terms, self._token,
            resumed=resumed, has_journal=request.journal is not None, until=until,
        )  # fmt: skip
        respond = Respond(
            call.respond,
            timeout_s=None,
            max_turns=begin.max_turns,
            max_turn_tokens=begin.turn_tokens,
        )
        if resume is not None and style.from_file:
            path = self._folder / "part.npz"
            resume.save(path)
            resume = path
        journal.EVERY_S = 0.0 if style.is_noted else 1e9
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
                on_finish=call.on_finish,
                resume=resume,
                until=until,
                version=version,
                journal=request.journal,
                respond=respond if is_answered else None,
                session=self._session,
            )
        except KeyboardInterrupt as error:
            require(call.may_break, "an interrupt that nobody made")
            require(hasattr(error, "rollout"), "an interrupted call kept nothing")
            out, is_broken = error.rollout, True  # type: ignore[attr-defined]
        except er_jax.RolloutError as error:
            if call.difference is None:
                if not isinstance(error.__cause__, Failure):
                    raise
                call.failed(error.completions)
        if call.difference is not None:
            raise call.difference
        if out is not None:
            call.returned(out, is_broken=is_broken)
            request.part = out
            self._count(out)
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


def until_of(style: Style) -> Until | None:
    """Return when a call ends early."""
    limits = {
        name: value
        for name in ("finished", "groups", "tokens")
        if (value := getattr(style, name)) is not None
    }
    stop = Stop() if style.is_stoppable else None
    return Until(stop=stop, **limits) if limits or stop else None


def prompts_of(seed: int) -> list[tuple[int, ...]]:
    """Return prompts of 1 to 20 tokens, many of which begin alike."""
    rng = np.random.default_rng(seed)

    def drawn(count: int) -> list[int]:
        return rng.integers(0, VOCAB_SIZE, count).tolist()

    stem = drawn(LONGEST_PROMPT)
    found = [stem[:length] for length in (1, 2, 9, 16, 17, LONGEST_PROMPT)]
    found += [[*stem[:3], *drawn(4)], [*stem[:17], *drawn(3)], drawn(5), drawn(1)]
    return [tuple(prompt) for prompt in found]
