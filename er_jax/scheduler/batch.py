"""The batch on the device, and the windows that run on it.

Starting a window does not wait for it: while it runs, the completions of the window
before are fetched and delivered. `end_window` and `collect` can be called again after
an interruption.

Left out: the order of these calls (`loop`), which programs can run (`options`), where a
sequence starts (`admission`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from er_jax.control.protocol import ControllerProtocol
from er_jax.costs import timing
from er_jax.engine.protocol import WindowHandle
from er_jax.journal import Journal
from er_jax.request import Request
from er_jax.result import NOTHING, Completion
from er_jax.scheduler.admission import Rows, plan_admission, plan_going_on
from er_jax.scheduler.exchange import FetchedRows
from er_jax.scheduler.options import Options
from er_jax.scheduler.prompts import Reuse
from er_jax.scheduler.topology import Shape, Topology
from er_jax.settings import of_rows
from er_jax.stats import Moment, RolloutStats
from er_jax.types import (
    FINISH_NAMES,
    NONE,
    Admission,
    Finish,
    Program,
    Sampling,
    WindowInfo,
)
from er_jax.until import Until

# Longest duration of a window, about, so that progress shows and decisions stay fresh.
WINDOW_S = 0.25


MIN_ROUNDS, MAX_ROUNDS = 16, 4096


# The first window that drafts, after one that did not, is a trial of this many
# row-rounds: enough to tell a broken draft from a good one, at little cost.
TRIAL_ROW_ROUNDS = 64

# Slots are refilled when one in this many is free: one prefill serves all rows that it
# fills, and an idle row costs only its share of a step.
REFILL_SHARE = 8


class InFlightWindow(NamedTuple):
    """A window that is running on the device.

    second: its start, in seconds since the rollout began. has_run: whether its program
    had run before. num_live: live rows at its start.
    """

    window: WindowHandle
    program: Program
    has_run: bool
    second: float
    num_live: int


class FinishedWindow(NamedTuple):
    """A window that is over, with completions still to be fetched.

    buffers: tokens and log-probabilities after it. moment: its entry of the timeline.
    sequence, length: int `[rows]`, sequence and length of each row before it.
    """

    info: WindowInfo
    buffers: Any
    moment: Moment
    sequence: np.ndarray
    length: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens emitted."""
        grown = self.info.length - self.length
        return int(grown[self.sequence != NONE].sum())


class Batch:
    """The rows of a rollout: their state on the device, and the host's record of them.

    Args:
      topology: the devices. request: the sequences. stats: filled in. settings: traced
        sampling settings.
      begun: completions that go on, by sequence; their tokens are part of the prompt,
        or appended to the row that starts from it.
      journal: is told of what has been sampled; None keeps none.
      reuse: the prompts kept from call to call; None prefills all.
    Attributes:
      rows: the host's record. queue: sequences that wait for a row. completions:
        sequence -> completion of those that finished. program: the program that ran
        last; None at the beginning.
    """

    def __init__(
        self,
        topology: Topology,
        request: Request,
        stats: RolloutStats,
        settings: Sampling,
        begun: Mapping[int, Completion] = MappingProxyType({}),
        journal: Journal | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        self.topology, self.request, self.stats = topology, request, stats
        self.settings = request.with_begins(settings)
        self.begun, self.journal, self.reuse = begun, journal, reuse
        self.queue = collections.deque(request.waiting)
        self.completions: dict[int, Completion] = {}
        self.start_s = time.perf_counter()
        self.program: Program | None = None
        self.rows = Rows.empty(request.slots)
        self._options = Options(topology, request, settings)
        # A ring may no longer hold a prompt's entries when what is behind it is fed.
        # A session keeps conversations whole.
        keeps_whole = reuse is not None and request.turns is not None
        has_rings = request.ring_slots is not None
        self._starts_bare = topology.keeps_rows and not (has_rings or keeps_whole)
        self._decided_ago_s = 0.0
        self._is_drafting = self._is_trial = False
        self._in_flight: InFlightWindow | None = None
        self._finished: FinishedWindow | None = None
        # The last window that is over, collected or not.
        self._last: FinishedWindow | None = None
        self._shape: Shape = (request.slots, request.cache_lengths[-1], False)
        with self._timed("moves"):
            self.state = topology.engine.allocate(*self._shape[:2])

    @property
    def num_live(self) -> int:
        """Rows that still generate."""
        return self.rows.num_live

    @property
    def waiting(self) -> list[int]:
        """The sequences that are neither live nor have ended."""
        return list(self.queue)

    @property
    def num_open(self) -> int:
        """Sequences beside those of the queue that will need rows: none."""
        return 0

    @property
    def is_going_on(self) -> bool:
        """Whether a sequence is live, or waits, or may do so."""
        return bool(self.queue) or self.num_live > 0 or self.num_open > 0

    def ask_again(self) -> list[int]:
        """Ask for answers that an earlier call got none of: only in conversations."""
        return []

    def take_answers(self, failure: Exception | None = None) -> list[int]:
        """Queue what was answered; return sequences that ended so: none."""
        return []

    def wait_for_answers(self, failure: Exception | None = None) -> list[int]:
        """Do `take_answers` a moment later; only conversations come to it."""
        return []

    def close(self) -> None:
        """Take no more answers."""

    def _start_bucket(self) -> int:
        """Return the positions that rows need to start from what waits, or may."""
        return self.request.prompt_bucket

    def _free_rows(self, count: int) -> np.ndarray:
        """Return at least `count` free rows, if there are any, ascending."""
        return np.flatnonzero(self.rows.sequence == NONE)

    def _with_held(self, rows: Rows, info: WindowInfo) -> Rows:
        """Return the rows after a window, with what those hold that ended in it."""
        return rows

    def _of_all(
        self, rows: FetchedRows, ended: np.ndarray, length: np.ndarray
    ) -> FetchedRows:
        """Return what a batch needs of fetched rows: those of this process.

        Args:
          rows: of this process. ended: int, rows of all. length: int `[rows]`.
        """
        return rows

    def _still_ended(self, ended: set[int], found: dict[int, Completion]) -> set[int]:
        """Return the sequences that have ended, of those whose rows have.

        Args:
          ended: sequences. found: completions of their rows and others; completions
            that have not ended are changed.
        """
        return ended

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Time device work on the state, waiting until it is done."""
        with self.stats.timed(phase, lambda: self.topology.engine.compile_s):
            yield
            jax.block_until_ready(self.state.length)

    def is_decision_due(self) -> bool:
        """Whether another program may be better now, or the last one cannot go on.

        While sequences wait, windows end to refill rows, and little else changes.
        """
        assert self.program is not None
        if not self.queue or self._is_trial or self._decided_ago_s >= WINDOW_S:
            return True
        if self._shape != self.program.shape:
            return True
        reach = self._options.reach(self._shape, self.program.gamma)
        needed = max(self.rows.needed_length(reach), self._start_bucket())
        return needed > self.program.cache_length

    def is_refill_due(self) -> bool:
        """Whether enough slots are free, and sequences wait for them."""
        free = len(self.rows) - self.num_live
        wanted = min(len(self.queue), max(1, self.request.slots // REFILL_SHARE))
        return bool(self.queue) and (free >= wanted or self.num_live == 0)

    def refill(self) -> None:
        """Start queued sequences in the free slots."""
        count = min(len(self.rows) - self.num_live, len(self.queue))
        free = self._free_rows(count)
        starting = list(itertools.islice(self.queue, count))
        request = self.request.starting(starting, self._starts_bare)
        if self.reuse is not None:
            with self._timed("prefill"):
                for found in self.reuse.found(request, self.rows, starting, free):
                    self.state = self.reuse.insert(self.state, self.rows, *found)

        def plan(starting: list[int], free: list[int], shard_rows: slice) -> Admission:
            admission, num_prefilled = plan_admission(
                request, self.rows, self._shape[1], starting, free, shard_rows
            )
            self.stats.num_prefilled += num_prefilled
            tokens = int(admission.length[:num_prefilled].sum()) - num_prefilled
            self.stats.prefilled_tokens += tokens
            self.stats.num_cloned += int(admission.num_clones)
            return admission

        admission = self.topology.admission(
            plan, starting, free, self.rows.resident, request.prompt_of
        )
        shared = self._shape[2]
        engine, params = (
            self.topology.engine_of(shared),
            self.topology.params_of(shared),
        )
        with self._timed("prefill"):
            self.state = engine.admit(params, self.state, admission)
            if self.reuse is not None:
                self.reuse.keep(request, self.rows, starting, self.state)
        if self._starts_bare:
            begun = self.request.num_begun.keys() & starting
            rows = enumerate(self.rows.sequence.tolist()) if begun else ()
            self._go_on({s: row for row, s in rows if s in begun})
        # Last, so that an interruption loses none of them.
        self.queue = collections.deque(itertools.islice(self.queue, count, None))

    def _go_on(self, row_of: Mapping[int, int]) -> None:
        """Append to rows what their sequences have beyond what the rows hold."""
        if not row_of:
            return
        continuation, *sizes = plan_going_on(self.request, self.rows, row_of)
        self.stats.prefilled_tokens += int(continuation.count.sum())
        with self._timed("prefill"):
            self.state = self.topology.engine.go_on(
                self.topology.params_of(False), self.state, continuation, *sizes
            )

    def options(self, gammas: Sequence[int]) -> list[Program]:
        """Return the programs that can run now; see `Options.programs`."""
        is_needed = bool(self.queue) or self.num_open > 0
        return self._options.programs(
            self.rows,
            self._shape,
            bool(self.queue),
            gammas,
            num_open=self.num_open,
            start_length=self._start_bucket() if is_needed else 1,
        )

    def compile_s(self, program: Program) -> float:
        """Return the compile seconds until this batch can run a program; 0 if ready."""
        return self._options.compile_s(program, self._shape, self.num_live)

    def look(self, controller: ControllerProtocol) -> None:
        """Measure the programs that the controller asks for, if it asks for any."""
        if len(controller.gammas) < 2:
            return  # It has nothing to choose.
        longest = self.request.cache_lengths[-1]
        least = self.topology.row_buckets(False)[0]

        def offered(program: Program) -> Program:
            # With a stated window there are no drafts that see all positions.
            return program.drafting(self.request.views_at(longest, program.gamma)[-1])

        with controller.measuring:
            found = controller.first_look(
                least, longest, lambda p: self._options.window_compile_s(offered(p))
            )
            if not found:
                return
            programs = [offered(program) for program in found]
            engine, params = self.topology.engine, self.topology.params_of(False)
            with self.stats.timed("calibration", lambda: engine.compile_s):
                seconds, num_rounds = timing.measure_rounds(
                    engine, params, programs, like=self.settings
                )
                controller.observe_first_look(seconds, num_rounds)

    def move_to(self, program: Program) -> None:
        """Compact or grow the state to the shape of a program."""
        self.program, self._decided_ago_s = program, 0.0
        self._move(program.shape)

    def _move(self, new: Shape) -> None:
        """Compact or grow the state to a shape."""
        route = self.topology.route(self._shape, new, self.num_live)
        for shape in route:
            keep = np.sort(self.rows.to_keep[: shape[0]])
            if shape[0] >= len(self.rows):
                keep = np.arange(len(self.rows))
            index = self.topology.rows_after(keep, self._shape, shape)
            rows = self.rows.moved(index)
            with self._timed("moves"):
                state = self.topology.move(self.state, self._shape, shape, index)
                # Together, so that they are of one shape after an interruption.
                self.state, self.rows, self._shape = state, rows, shape

    def _exit_live(self) -> int:
        """Return the live count at which the next decision is due."""
        if self.queue:
            return self.request.slots - max(1, self.request.slots // REFILL_SHARE)
        buckets = self.topology.row_buckets(self._shape[2])
        smaller = [b for b in buckets if b < self.num_live]
        return max(smaller, default=0)

    def start_window(self, program: Program, round_s: float | None) -> None:
        """Start a window on the device.

        Args:
          program: its shape is that of the state. round_s: expected seconds of a round;
            None if unknown.
        """
        has_run = self._options.is_compiled(program)
        max_rounds = 64 if round_s is None else int(WINDOW_S / round_s)
        max_rounds = min(max(max_rounds, MIN_ROUNDS), MAX_ROUNDS) if has_run else 1
        second, num_live = time.perf_counter() - self.start_s, self.num_live
        self._is_trial = program.gamma > 0 and not self._is_drafting
        self._is_drafting = program.gamma > 0
        if self._is_trial:
            enough = -(-TRIAL_ROW_ROUNDS // num_live)
            max_rounds = min(max_rounds, enough, MIN_ROUNDS)
        shared = self._shape[2]
        engine = self.topology.engine_of(shared)
        self.state, window = engine.start_window(
            self.topology.params_of(shared).only(program.draft),
            self.state,
            of_rows(self.settings, self.rows.sequence),
            program.gamma,
            exit_live=min(self._exit_live(), num_live - 1),
            max_rounds=max_rounds,
            draft_kind=self.topology.draft_kind(shared, program.draft),
            span=program.span,
        )
        self._in_flight = InFlightWindow(window, program, has_run, second, num_live)

    def end_window(
        self, controller: ControllerProtocol, failure: Exception | None = None
    ) -> None:
        """Wait for the running window, if any, and free the rows that ended.

        `collect` does the rest, which the next window does not depend on.

        Args:
          controller: learns from the window.
          failure: an exception of this process while the window ran. It is raised after
            the window, in all processes, because the others would wait for this one in
            the next window.
        """
        if self._in_flight is None:
            return
        (window, program, has_run, second, live_before) = self._in_flight
        info, seconds, is_measured = window.wait()
        agreement = self.topology.engine.agreement
        measured, failure = agreement.sync_or_raise([seconds, is_measured], failure)
        seconds, is_measured = float(measured[0]), bool(measured[1])
        num_rounds = int(info.num_rounds)
        sequence = np.where(info.live, self.rows.sequence, NONE)
        moment = Moment(
            second=second,
            duration_s=seconds,
            live=live_before,
            num_live_after=int((sequence != NONE).sum()),
            rows=program.rows,
            cache_length=program.cache_length,
            gamma=program.gamma,
            num_rounds=num_rounds,
            shared_rows=program.shared_rows,
            head=program.head,
            window=program.window,
            draft=program.draft,
        )
        finished = FinishedWindow(
            info, window.buffers, moment, self.rows.sequence, self.rows.length
        )
        rows = dataclasses.replace(
            self.rows,
            sequence=sequence,
            length=info.length.astype(int),
        )
        rows = self._with_held(rows, info)
        # Assigned together, last: after an interruption, it can be waited for again.
        self._finished = self._last = finished
        self._in_flight, self.rows = None, rows
        self._decided_ago_s += seconds
        # A program's first run touches memory and packs weights for the first time, so
        # its seconds do not measure its rounds.
        is_measured &= has_run
        controller.observe(
            program,
            num_rounds if is_measured else 0,
            info.emitted,
            seconds,
            info.accepted,
            live=live_before if is_measured else 0,
        )
        if failure is not None:
            raise failure

    def collect(self) -> list[int]:
        """Record the last window, fetch its completions and return their sequences.

        Completions come from the window's own copies of the tokens, so the next window
        may already run on the state. When the journal is due, rows that go on are
        fetched with them.
        """
        if self._finished is None:
            return []
        (info, buffers, moment, sequences, _) = self._finished
        is_due = self.journal is not None and self.journal.is_due()
        wanted = np.flatnonzero((sequences != NONE) & (~info.live | is_due))
        engine = self.topology.engine
        rows = engine.fetch_rows(buffers, wanted) if len(wanted) else {}
        own = {int(sequences[slot]) for slot in rows}
        has_ended = np.flatnonzero((sequences != NONE) & ~info.live)
        rows = self._of_all(rows, has_ended, info.length)
        found: dict[int, Completion] = {}
        for slot, (tokens, logprobs) in rows.items():
            sequence = int(sequences[slot])
            reason = Finish.UNFINISHED if info.live[slot] else info.finish_reason[slot]
            found[sequence] = self._completion(
                sequence,
                tokens[: info.length[slot]],
                logprobs[: info.length[slot]],
                FINISH_NAMES[int(reason)],
            )
        ended = {int(sequences[slot]) for slot in rows if not info.live[slot]}
        ended = self._still_ended(ended, found)
        found = {s: completion for s, completion in found.items() if s in own}
        self.completions |= {s: found[s] for s in found if s in ended}
        if self.journal is not None:
            self.stats.num_journalled += self.journal.note(found, sync=is_due)
        self.stats.add_window(moment, self._finished.num_tokens, info.accepted)
        self._finished = None  # Last, so that an interrupted fetch can be repeated.
        return [sequence for sequence in found if sequence in ended]

    def _completion(
        self, sequence: int, tokens: np.ndarray, logprobs: np.ndarray, reason: str
    ) -> Completion:
        """Return the completion of a sequence from all tokens of its row."""
        prompt = self.request.prompts[self.request.prompt_of[sequence]]
        sampled = slice(len(prompt), None)
        found = Completion(
            token_ids=np.array(tokens[sampled]),
            logprobs=np.array(logprobs[sampled]),
            finish_reason=reason,
        )
        begun = self.begun.get(sequence)
        return found if begun is None else begun.followed_by(found)

    def unfinished(self) -> dict[int, Completion]:
        """Return the completions of rows that still run, and of those that wait.

        Called between windows, and after an interruption. Each of several processes
        returns the rows on its own devices, and the first process those that wait.
        """
        found: dict[int, Completion] = {}
        if self.topology.engine.agreement.is_leader:
            found = {s: self.begun.get(s, NOTHING) for s in self.queue}
        if not self.num_live:
            return found
        buffers = (self.state.tokens, self.state.logprobs)
        if not any(isinstance(x, jax.Array) and x.is_deleted() for x in buffers):
            live = self.rows.sequence
            return found | self._so_far(buffers, live, self.rows.length)
        # An interruption came after a program took the state, and before anybody had
        # what it gave: only with one process. The last window's copies are there.
        live = self.rows.sequence[self.rows.is_live].tolist()
        found |= {s: self.begun.get(s, NOTHING) for s in live}
        if self._last is None:
            return found
        info, buffers, _, sequence, _ = self._last
        return found | self._so_far(
            buffers, np.where(info.live, sequence, NONE), info.length
        )

    def _so_far(
        self, buffers: Any, sequence: np.ndarray, length: np.ndarray
    ) -> dict[int, Completion]:
        """Return the completions of rows that run.

        Args:
          buffers: tokens and log-probabilities.
          sequence, length: int `[rows]`, of each row, `NONE` where none runs.
        """
        live = np.flatnonzero(sequence != NONE)
        if not len(live):
            return {}
        rows = self.topology.engine.fetch_rows(buffers, live)
        return {
            int(sequence[slot]): self._completion(
                int(sequence[slot]),
                tokens[: length[slot]],
                logprobs[: length[slot]],
                FINISH_NAMES[Finish.UNFINISHED],
            )
            for slot, (tokens, logprobs) in rows.items()
        }

    def is_reached(self, until: Until, began_s: float) -> bool:
        """Whether the rollout ends early now; the same in all processes.

        Asked after every window, so all sequences are looked at for groups only.

        Args:
          until: when to end. began_s: `time.perf_counter()` when the call began.
        """
        count, group = len(self.request.prompt_of), self.request.group
        waiting = self.waiting
        num_open = len(waiting) + self.num_live
        open_groups: set[int] = set()
        if until.groups is not None:
            live = self.rows.sequence[self.rows.is_live].tolist()
            open_groups = {s // group for s in (*waiting, *live)}
        last = 0 if self._finished is None else self._finished.num_tokens
        is_reached = until.is_reached(
            seconds=time.perf_counter() - began_s,
            finished=count - num_open,
            groups=count // group - len(open_groups),
            tokens=self.stats.num_tokens + last,
        )
        agreement = self.topology.engine.agreement
        if agreement.is_spread and until.asks_leader:
            is_reached = bool(agreement.broadcast_from_leader([is_reached])[0])
        return is_reached
