"""The host loop: queue, slots, refill, compaction, growth, switching.

`run` is the whole policy of a rollout and the only loop over windows. It decides with
host integers only; the device is asked once per window.

* Refill: free slots take the next sequences while there are any. A prompt's entries are
  computed once and copied to its other completions.
* Shape: the controller picks rows, cache length and gamma among the programs that could
  run now. Rows shrink only when the queue is empty.
* A window ends where one of these could change.

Left out: time, acceptance, compile costs (`control`); shapes of requests (`rollout`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from er_jax.control import Controller
from er_jax.costs import row_buckets
from er_jax.drafter import PolicyParams
from er_jax.engine import Engine, RunningWindow, Text
from er_jax.stats import Moment, RolloutStats
from er_jax.types import (
    FINISH_NAMES,
    NONE,
    Admission,
    Program,
    Sampling,
    WindowInfo,
)

# A window is at most about this long, so that progress shows and decisions are fresh.
WINDOW_S = 0.25
MIN_ROUNDS, MAX_ROUNDS = 16, 4096

# The first window that drafts, after one that did not, is a trial of so many
# row-rounds: enough to tell a broken draft from a good one, and little is lost by it.
TRIAL_ROW_ROUNDS = 64

# Slots are refilled when this share of them is free: a prefill is shared by the rows
# it fills, and an idle row costs only its share of a step.
REFILL_SHARE = 8


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished sequence.

    token_ids: int32 `[length]`, a stop token included. logprobs: float32 `[length]`.
    finish_reason: "stop", "length" or "nonfinite".
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str


class RolloutError(RuntimeError):
    """A rollout failed half-way; `completions` holds what had finished.

    completions: sequence id -> `Completion`. The cause is the original exception.
    """

    def __init__(self, message: str, completions: dict[int, Completion]) -> None:
        super().__init__(message)
        self.completions = completions


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample, as host values.

    prompts: the distinct prompts, int32 arrays. prompt_of: int `[N]`, the prompt of
    each sequence. sequence_ids: int `[N]`. max_new_tokens: limit of each completion.
    slots: rows of the full batch. cache_lengths: sizes the cache may have, ascending;
    the last holds any row. prompt_bucket: T, tokens of a prefilled prompt.
    chunk: C, prompts prefilled together.
    position_bytes: device bytes of one position of one row. state_limit_bytes: what all
    states together may take; None where the device's memory is unknown.
    """

    prompts: Sequence[np.ndarray]
    prompt_of: np.ndarray
    sequence_ids: np.ndarray
    max_new_tokens: int
    slots: int
    cache_lengths: tuple[int, ...]
    prompt_bucket: int
    chunk: int
    position_bytes: int = 0
    state_limit_bytes: int | None = None

    def limit(self, sequence: int) -> int:
        """Return the length at which a sequence ends."""
        return len(self.prompts[self.prompt_of[sequence]]) + self.max_new_tokens


def run(
    engine: Engine,
    params: PolicyParams,
    request: Request,
    settings: Sampling,
    controller: Controller,
    stats: RolloutStats,
    *,
    on_finish: Callable[[int, Completion], None] | None = None,
    progress: bool = False,
) -> list[Completion]:
    """Sample every sequence of the request and return the completions in its order.

    Args:
      engine, params, settings: what to run; see `engine.Engine.window`.
      request: the sequences. controller: decides on programs and learns from windows.
      stats: filled in. on_finish: called with (sequence id, completion) as rows end.
      progress: show a progress bar of finished sequences.
    Raises:
      RolloutError: anything failed on the way; it carries the finished completions.
    """
    batch = Batch(engine, params, request, stats, settings)

    def deliver(finished: list[int]) -> None:
        for sequence in finished:
            bar.update()
            if on_finish is not None:
                sequence_id = int(request.sequence_ids[sequence])
                on_finish(sequence_id, batch.completions[sequence])

    with tqdm(total=len(request.prompt_of), unit="seq", disable=not progress) as bar:
        try:
            while batch.queue or batch.num_live:
                if batch.is_refill_due():
                    batch.refill()
                program = batch.program
                if program is None or batch.is_decision_due():
                    program = controller.choose(
                        batch.options(controller.gammas),
                        batch.program,
                        compile_s=batch.compile_s,
                        live=batch.num_live,
                        length=batch.mean_length,
                    )
                    batch.move_to(program)
                with jax.profiler.StepTraceAnnotation("window", **program._asdict()):
                    batch.start_window(program, controller.table.round_seconds(program))
                    # What ended in the one before is delivered while this one runs.
                    deliver(batch.collect())
                    if progress:
                        bar.set_postfix_str(
                            f"live={batch.num_live}, gamma={program.gamma}",
                            refresh=False,
                        )
                    batch.end_window(controller)
            deliver(batch.collect())
        except Exception as error:
            # A window may be under way, or over and not yet collected. Where the device
            # itself has failed, there is nothing more to fetch.
            with contextlib.suppress(Exception):
                batch.end_window(controller)
            with contextlib.suppress(Exception):
                batch.collect()
            done = {
                int(request.sequence_ids[s]): c for s, c in batch.completions.items()
            }
            raise RolloutError(
                f"the rollout failed after {len(done)} of {len(request.prompt_of)} "
                f"completions, which this exception holds: {error}",
                done,
            ) from error
    return [batch.completions[s] for s in range(len(request.prompt_of))]


class _Running(NamedTuple):
    """A window under way: its program, whether that ran before, when, live rows."""

    window: RunningWindow
    program: Program
    has_run: bool
    second: float
    num_live: int


class _Over(NamedTuple):
    """A window that is over and not yet booked; int `[rows]` as they were before it."""

    info: WindowInfo
    text: Text
    moment: Moment
    sequence: np.ndarray
    length: np.ndarray


class Batch:
    """The rows on the device and the host's record of them.

    sequence: int `[rows]`, the sequence in each slot, `NONE` when free.
    resident: int `[rows]`, the prompt whose entries lie in each slot, `NONE` if none.
    length, limit: int `[rows]`, as in the state.
    """

    def __init__(
        self,
        engine: Engine,
        params: PolicyParams,
        request: Request,
        stats: RolloutStats,
        settings: Sampling,
    ) -> None:
        self.engine, self.params, self.settings = engine, params, settings
        self.request, self.stats = request, stats
        self.queue = collections.deque(range(len(request.prompt_of)))
        self.completions: dict[int, Completion] = {}
        self.start_s = time.perf_counter()
        self.program: Program | None = None
        self._decided_ago_s = 0.0
        self._is_drafting = self._is_trial = False
        self._draft_kind = engine.draft_kind(params.draft)
        self._compiled: set[Program] = set()
        self._running: _Running | None = None
        self._over: _Over | None = None
        rows, cache_length = request.slots, request.cache_lengths[-1]
        self.sequence = np.full(rows, NONE)
        self.resident = np.full(rows, NONE)
        self.length = np.zeros(rows, int)
        self.limit = np.zeros(rows, int)
        with self._timed("moves"):
            self.state = engine.allocate(rows, cache_length)

    @property
    def num_live(self) -> int:
        """Rows that still generate."""
        return int((self.sequence != NONE).sum())

    @property
    def mean_length(self) -> float:
        """Mean tokens of the live rows, prompt included."""
        is_live = self.sequence != NONE
        return float(self.length @ is_live) / max(int(is_live.sum()), 1)

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Wait for device work on the state, and book its time."""
        with self.stats.timed(phase, lambda: self.engine.compile_s):
            yield
            jax.block_until_ready(self.state.length)

    def is_decision_due(self) -> bool:
        """Whether another program may be better now, or the last one cannot go on.

        While sequences wait, windows end for refills and little else changes.
        """
        assert self.program is not None
        if not self.queue or self._is_trial or self._decided_ago_s >= WINDOW_S:
            return True
        needed = max(self.needed_length(self.program.gamma), self.request.prompt_bucket)
        return needed > self.program.cache_length

    def is_refill_due(self) -> bool:
        """Whether enough slots are free, and there is something to put in them."""
        free = len(self.sequence) - self.num_live
        wanted = min(len(self.queue), max(1, self.request.slots // REFILL_SHARE))
        return bool(self.queue) and (free >= wanted or self.num_live == 0)

    def refill(self) -> None:
        """Start queued sequences in the free slots."""
        slots = [int(s) for s in np.flatnonzero(self.sequence == NONE)]
        count = min(len(slots), len(self.queue))
        starting = [self.queue.popleft() for _ in range(count)]
        admission = self._plan_admission(starting, slots)
        with self._timed("prefill"):
            self.state = self.engine.admit(self.params, self.state, admission)

    def _plan_admission(self, starting: list[int], free: list[int]) -> Admission:
        """Assign slots: clones of resident prompts first, then prefills by prompt."""
        request, rows = self.request, len(self.sequence)
        clones: list[tuple[int, int, int]] = []  # sequence, from, to
        fresh: dict[int, list[int]] = {}
        for sequence in starting:
            prompt = int(request.prompt_of[sequence])
            found = np.flatnonzero(self.resident == prompt)
            if not len(found):
                fresh.setdefault(prompt, []).append(sequence)
                continue
            own = [slot for slot in found if slot in free]
            slot = int(own[0]) if own else free[0]
            free.remove(slot)
            self.resident[slot] = prompt
            clones.append((sequence, int(found[0]), slot))
        # A clone may have overwritten the last copy of a prompt that a later one was
        # promised; clones run in this order, so what was found was there.

        order: list[tuple[int, int, int]] = []  # sequence, slot, index of its prompt
        prompts = list(fresh)
        num_chunks = -(-len(prompts) // request.chunk)
        num_prompts = -(-rows // request.chunk) * request.chunk
        first_row, num_rows = np.zeros((2, num_prompts // request.chunk), np.int32)
        for index, prompt in enumerate(prompts):
            chunk = index // request.chunk
            if index % request.chunk == 0:
                first_row[chunk] = len(order)
            for sequence in fresh[prompt]:
                slot = free.pop(0)
                self.resident[slot] = prompt
                order.append((sequence, slot, index))
                num_rows[chunk] += 1
        for sequence, _, slot in clones:
            prompt = int(request.prompt_of[sequence])
            if prompt not in prompts:
                prompts.append(prompt)
            order.append((sequence, slot, prompts.index(prompt)))

        tokens = np.zeros((num_prompts, request.prompt_bucket), np.int32)
        length = np.zeros(num_prompts, np.int32)
        for index, prompt in enumerate(prompts):
            ids = request.prompts[prompt]
            tokens[index, : len(ids)] = ids
            length[index] = len(ids)
        for sequence, row, index in order:
            self.sequence[row] = sequence
            self.length[row] = length[index]
            self.limit[row] = request.limit(sequence)
        self.stats.num_prefilled += len(fresh)
        self.stats.num_cloned += len(clones)

        to_row, prompt_index, sequence_id, limit = np.zeros((4, rows), np.int32)
        to_row[:], sequence_id[:] = rows, NONE
        for i, (sequence, row, index) in enumerate(order):
            to_row[i], prompt_index[i] = row, index
            sequence_id[i] = request.sequence_ids[sequence]
            limit[i] = self.limit[row]
        clone_from, clone_to, clone_length = np.zeros((3, rows), np.int32)
        for i, (_, source, row) in enumerate(clones):
            clone_from[i], clone_to[i] = source, row
            clone_length[i] = self.length[row]
        return Admission(
            tokens=tokens,
            length=length,
            num_chunks=np.int32(num_chunks),
            slot=to_row,
            prompt=prompt_index,
            sequence_id=sequence_id,
            limit=limit,
            first_row=first_row,
            num_rows=num_rows,
            num_clones=np.int32(len(clones)),
            clone_from=clone_from,
            clone_to=clone_to,
            clone_length=clone_length,
        )

    def needed_length(self, gamma: int) -> int:
        """Return the cache length that one turn of a window needs for the live rows."""
        reach = self.engine.rounds_per_test * (gamma + 1)
        needed = np.minimum(self.length + reach, self.limit)
        return max(int((needed * (self.sequence != NONE)).max()), 1)

    def options(self, gammas: Sequence[int]) -> list[Program]:
        """Return the programs that can run the live rows now, the safest one last.

        With sequences waiting, the batch keeps all its slots. A batch of fewer rows is
        not made larger for a program that would have to be compiled, but for the last.
        A cache is shortened only if the live rows leave a quarter of it free, so that
        it is not grown at once.
        """
        slots, num_live = self.request.slots, self.num_live
        sizes = (slots,) if self.queue else row_buckets(slots)
        sizes = tuple(rows for rows in sizes if rows >= num_live)
        prompts = self.request.prompt_bucket if self.queue else 1
        shapes = [
            shape
            for shape in itertools.product(sizes, self.request.cache_lengths)
            if self._fits(*shape)
        ]
        found = []
        for gamma in sorted(gammas, reverse=True):
            least = max(self.needed_length(gamma), prompts)
            for rows, length in shapes:
                is_shorter = length < self.state.cache_length
                if (least + length // 4 if is_shorter else least) > length:
                    continue
                program = Program(rows, length, gamma)
                is_larger = len(self.sequence) < rows < slots
                if not is_larger or self._is_compiled(program):
                    found.append(program)
        return found

    def _fits(self, rows: int, length: int) -> bool:
        """Whether there is memory to move to this shape, and to grow again from it."""
        limit, shape = self.request.state_limit_bytes, self.state.tokens.shape
        if limit is None or shape == (rows, length):
            return True
        positions = rows * length
        longest = self.request.cache_lengths[-1]
        regrown = positions + rows * longest if length < longest else 0
        moving = positions + shape[0] * shape[1]
        return max(moving, regrown) * self.request.position_bytes <= limit

    def _is_compiled(self, program: Program) -> bool:
        if program not in self._compiled:
            num_stop_ids = len(self.settings.stop_ids)
            if not self.engine.has_window(program, self._draft_kind, num_stop_ids):
                return False
            self._compiled.add(program)  # and stays so: asked some hundred times
        return True

    def compile_s(self, program: Program) -> float:
        """Return the seconds until this batch can run a program; 0 if it is ready."""
        seconds = 0.0
        if not self._is_compiled(program):
            seconds += self.engine.expected_compile_s("window")
        if not self.engine.has_take(self.state, program.rows, program.cache_length):
            seconds += self.engine.expected_compile_s("take")
        return seconds

    def move_to(self, program: Program) -> None:
        """Compact or grow the state to the shape of a program."""
        self.program, self._decided_ago_s = program, 0.0
        old_rows = len(self.sequence)
        if (old_rows, self.state.cache_length) == (program.rows, program.cache_length):
            return
        keep = np.flatnonzero(self.sequence != NONE)
        if program.rows >= old_rows:
            keep = np.arange(old_rows)
        index = np.full(program.rows, NONE)
        index[: len(keep)] = keep

        def moved(values: np.ndarray, empty: int) -> np.ndarray:
            return np.where(index >= 0, values[np.maximum(index, 0)], empty)

        self.sequence = moved(self.sequence, NONE)
        self.resident = moved(self.resident, NONE)
        self.length, self.limit = moved(self.length, 0), moved(self.limit, 0)
        with self._timed("moves"):
            self.state = self.engine.take(self.state, index, program.cache_length)

    def _exit_live(self) -> int:
        """Return the live count at which the next decision is due."""
        if self.queue:
            return self.request.slots - max(1, self.request.slots // REFILL_SHARE)
        smaller = [b for b in row_buckets(self.request.slots) if b < self.num_live]
        return max(smaller, default=0)

    def start_window(self, program: Program, round_s: float | None) -> None:
        """Have the device run a window.

        Args:
          program: of the state's own shape. round_s: seconds a round should take; None
            if nothing is known.
        """
        has_run = self._is_compiled(program)
        max_rounds = 64 if round_s is None else int(WINDOW_S / round_s)
        max_rounds = min(max(max_rounds, MIN_ROUNDS), MAX_ROUNDS) if has_run else 1
        second, num_live = time.perf_counter() - self.start_s, self.num_live
        self._is_trial = program.gamma > 0 and not self._is_drafting
        self._is_drafting = program.gamma > 0
        if self._is_trial:
            enough = -(-TRIAL_ROW_ROUNDS // num_live)
            max_rounds = min(max_rounds, enough, MIN_ROUNDS)
        self.state, window = self.engine.start_window(
            self.params,
            self.state,
            self.settings,
            program.gamma,
            exit_live=min(self._exit_live(), num_live - 1),
            max_rounds=max_rounds,
            draft_kind=self._draft_kind,
        )
        self._running = _Running(window, program, has_run, second, num_live)

    def end_window(self, controller: Controller) -> None:
        """Wait for the window that runs, if any, and free the rows that ended.

        What need not be known for the next window is left to `collect`.
        """
        if self._running is None:
            return
        (window, program, has_run, second, live_before) = self._running
        self._running = None
        info, seconds, is_measured = window.wait()
        self._decided_ago_s += seconds
        sequence, length = self.sequence, self.length
        self.sequence = np.where(info.live, sequence, NONE)
        self.length = info.length.astype(int)
        num_rounds = int(info.num_rounds)
        moment = Moment(
            second=second,
            duration_s=seconds,
            live=live_before,
            num_live_after=self.num_live,
            rows=program.rows,
            cache_length=program.cache_length,
            gamma=program.gamma,
            num_rounds=num_rounds,
        )
        self._over = _Over(info, window.text, moment, sequence, length)
        # A program's first run touches memory and packs weights for the first time: a
        # part of its compilation, and no measure of its rounds.
        is_measured &= has_run
        controller.observe(
            program,
            num_rounds if is_measured else 0,
            info.emitted,
            seconds,
            info.accepted,
            live=live_before if is_measured else 0,
        )

    def collect(self) -> list[int]:
        """Book the last window, and fetch what ended in it; return those sequences.

        Completions come from the window's own copies, so it makes no difference what
        has been started on the state since.
        """
        if self._over is None:
            return []
        (info, text, moment, sequences, length_before) = self._over
        self._over = None
        was_live = sequences != NONE
        num_tokens = int((info.length - length_before)[was_live].sum())
        self.stats.add_window(moment, num_tokens, info.accepted)
        ended = np.flatnonzero(was_live & ~info.live)
        if not len(ended):
            return []
        tokens, logprobs = jax.device_get(text)
        for slot in ended:
            sequence = int(sequences[slot])
            prompt = self.request.prompts[self.request.prompt_of[sequence]]
            part = slice(len(prompt), int(info.length[slot]))
            # Copies: the fetched arrays may be the device's own buffers, and hold all
            # the rows.
            self.completions[sequence] = Completion(
                token_ids=np.array(tokens[slot, part]),
                logprobs=np.array(logprobs[slot, part]),
                finish_reason=FINISH_NAMES[int(info.finish_reason[slot])],
            )
        return [int(sequences[slot]) for slot in ended]
