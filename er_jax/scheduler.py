"""The host loop: queue, slots, refill, compaction, growth, switching.

`run` is the whole policy of a rollout and the only loop over windows. It decides with
host integers only; the device is asked once per window.

* Refill: free slots take the next sequences while there are any. A prompt's entries are
  computed once and copied to its other completions.
* Shape: the controller picks rows, cache length and gamma among the programs that could
  run now. Rows shrink only when the queue is empty; then all groups of devices may also
  become one, for rows too few to keep each busy.
* A window ends where one of these could change.

Left out: time, acceptance, compile costs (`control`); shapes of requests (`rollout`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
from tqdm import tqdm

from er_jax import calibrate
from er_jax.control import Controller
from er_jax.costs import bucket_of, row_buckets
from er_jax.drafter import PolicyParams
from er_jax.engine import Engine, RunningWindow, Text, device_bytes, fetch_rows
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

    def copy(self) -> Completion:
        """Return the same with arrays of its own."""
        return dataclasses.replace(
            self, token_ids=self.token_ids.copy(), logprobs=self.logprobs.copy()
        )


class RolloutError(RuntimeError):
    """A rollout failed half-way; `completions` holds what had finished.

    completions: sequence id -> `Completion`. The cause is the original exception.
    request: whose completions they are, None of several replicas.
    """

    request: Request | None = None

    def __init__(self, message: str, completions: dict[int, Completion]) -> None:
        super().__init__(message)
        self.completions = completions


@contextlib.contextmanager
def keeping(
    completions: Callable[[], Mapping[int, Completion]], request: Request
) -> Iterator[None]:
    """Have whatever ends the block early carry the completions there are by then.

    A failure becomes a `RolloutError`, also one of another rollout that a callback
    made. What is no failure, as Ctrl-C or `sys.exit`, stays what it is and gets an
    attribute `completions`. Of two such blocks for one request the inner one counts.

    Args:
      completions: called then; sequence -> completion. request: names the sequences.
    """
    try:
        yield
    except BaseException as error:
        if getattr(error, "request", None) is request:
            raise
        done = {int(request.sequence_ids[s]): c for s, c in completions().items()}
        state = f"{len(done)} of {len(request.prompt_of)} completions"
        if isinstance(error, Exception):
            failure = RolloutError(
                f"the rollout failed after {state}, which this exception holds: "
                f"{error}",
                done,
            )
            failure.request = request
            raise failure from error
        error.completions = done  # type: ignore[attr-defined]
        error.request = request  # type: ignore[attr-defined]
        error.add_note(f"{state} had finished; `completions` holds them")
        raise


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample, as host values.

    prompts: the distinct prompts, int32 arrays. prompt_of: int `[N]`, the prompt of
    each sequence. sequence_ids: int `[N]`. max_new_tokens: limit of each completion.
    slots: rows of the full batch. cache_lengths: sizes the cache may have, ascending;
    the last holds any row. prompt_bucket: T, tokens of a prefilled prompt.
    chunk: C, prompts prefilled together.
    groups: of devices, each with as many of the rows (see `engine`); divides slots.
    position_bytes: of one position of one row, such that times all rows it is what a
    device holds. state_limit_bytes: what all states together may take of a device; None
    where its memory is unknown.
    """

    prompts: Sequence[np.ndarray]
    prompt_of: np.ndarray
    sequence_ids: np.ndarray
    max_new_tokens: int
    slots: int
    cache_lengths: tuple[int, ...]
    prompt_bucket: int
    chunk: int
    groups: int = 1
    position_bytes: float = 0
    state_limit_bytes: int | None = None

    def limit(self, sequence: int) -> int:
        """Return the length at which a sequence ends."""
        return len(self.prompts[self.prompt_of[sequence]]) + self.max_new_tokens

    def row_buckets(self, joint: bool = False) -> tuple[int, ...]:
        """Return the sizes a batch may have, with all groups as one if `joint`."""
        return row_buckets(self.slots, 1 if joint else self.groups)


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
) -> dict[int, Completion]:
    """Sample every sequence of the request and return the completions.

    Of several processes on one mesh, each returns those whose rows it held at last, and
    all of them decide alike: from the state, which they share, and from measurements of
    one of them (`Engine.agree`).

    Args:
      engine, params, settings: what to run; see `engine.Engine.window`.
      request: the sequences. controller: decides on programs and learns from windows.
      stats: filled in. on_finish: called with (sequence id, completion) as rows end.
      progress: show a progress bar of finished sequences.
    Returns:
      Sequence (0 .. N-1) -> completion.
    Raises:
      RolloutError: anything failed on the way; it carries the finished completions.
      KeyboardInterrupt: with the same in an attribute `completions`; see `keeping`.
    """
    batch = Batch(engine, params, request, stats, settings)

    def deliver(finished: list[int]) -> Exception | None:
        for sequence in finished:
            bar.update()
            if on_finish is None:
                continue
            try:
                sequence_id = int(request.sequence_ids[sequence])
                # A copy: what is done to it must not change the result.
                on_finish(sequence_id, batch.completions[sequence].copy())
            except Exception as error:
                return error
        return None

    def finished() -> dict[int, Completion]:
        # A window may be over and not yet collected, and another under way. Where the
        # device itself has failed, there is nothing more to fetch.
        with contextlib.suppress(Exception):
            batch.collect()
        with contextlib.suppress(Exception):
            batch.end_window(controller)
        with contextlib.suppress(Exception):
            batch.collect()
        return batch.completions

    with (
        tqdm(total=len(request.prompt_of), unit="seq", disable=not progress) as bar,
        keeping(finished, request),
    ):
        while batch.queue or batch.num_live:
            if batch.is_refill_due():
                batch.refill()
            program = batch.program
            if program is None or batch.is_decision_due():
                batch.look(controller)
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
                failure = deliver(batch.collect())
                if progress:
                    bar.set_postfix_str(
                        f"live={batch.num_live}, gamma={program.gamma}",
                        refresh=False,
                    )
                batch.end_window(controller, failure)
        _, failure = engine.meet([], deliver(batch.collect()))
        if failure is not None:
            raise failure
    return batch.completions


def placed(keep: np.ndarray, old_rows: int, new_rows: int, groups: int) -> np.ndarray:
    """Return which old row each new row is, `NONE` for none.

    Rows stay in their group of devices as long as there is room; what is left over is
    moved to groups that have some. So a batch of few rows is spread evenly.

    Args:
      keep: int, rows to keep, ascending; at most `new_rows`.
      old_rows, new_rows: of the batch. groups: that divide both.
    """
    old_each, new_each = old_rows // groups, new_rows // groups
    own = [keep[keep // old_each == group] for group in range(groups)]
    left_over = collections.deque(row for rows in own for row in rows[new_each:])
    index = np.full((groups, new_each), NONE)
    for group, rows in enumerate(own):
        stay = rows[:new_each].tolist()
        while len(stay) < new_each and left_over:
            stay.append(left_over.popleft())
        index[group, : len(stay)] = stay
    return index.reshape(-1)


def _joined(parts: Sequence[Admission]) -> Admission:
    """Lay the admissions of all groups out one after the other."""

    def join(*arrays: np.ndarray) -> np.ndarray:
        # All groups run as many chunks and clones as the one that needs most.
        return np.concatenate(arrays) if arrays[0].ndim else max(arrays)

    return jax.tree.map(join, *parts)


# Rows, cache length, joint: all of a `Program` that a state must be made for.
Shape: TypeAlias = tuple[int, int, bool]


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


class _Places:
    """Which rows of a group hold which prompt, and which of them are free.

    Every answer takes the same time however many rows there are: lists are used up from
    their ends, and what is no longer true of a row is dropped when it is met.

    Args:
      resident: int `[rows]`, the prompt in each row of all groups; kept up to date.
      rows: of this group. free: its free rows, ascending.
    """

    def __init__(self, resident: np.ndarray, rows: slice, free: list[int]) -> None:
        self._resident = resident
        self._free = free[::-1]
        self._is_free = set(free)
        self._holders: dict[int, list[int]] = collections.defaultdict(list)
        self._free_holders: dict[int, list[int]] = collections.defaultdict(list)
        for row, prompt in enumerate(resident[rows].tolist(), rows.start):
            self._holders[prompt].append(row)
        for row in self._free:
            self._free_holders[int(resident[row])].append(row)

    def holder(self, prompt: int) -> int | None:
        """Return a row that holds a prompt, None if there is none."""
        rows = self._holders[prompt]
        while rows and self._resident[rows[-1]] != prompt:
            rows.pop()
        return rows[-1] if rows else None

    def take(self, prompt: int) -> int:
        """Take a free row for a prompt, if possible one that holds it already."""
        own = self._free_holders[prompt] or self._free
        while own[-1] not in self._is_free:
            own.pop()
            own = own or self._free
        row = own.pop()
        self._is_free.remove(row)
        if self._resident[row] != prompt:
            self._resident[row] = prompt
            self._holders[prompt].append(row)
        return row


class Batch:
    """The rows on the device and the host's record of them.

    sequence: int `[rows]`, the sequence in each slot, `NONE` when free.
    resident: int `[rows]`, the prompt whose entries lie in each slot, `NONE` if none.
    length, limit: int `[rows]`, as in the state.
    is_joint: whether all groups of devices work as one now.
    """

    def __init__(
        self,
        engine: Engine,
        params: PolicyParams,
        request: Request,
        stats: RolloutStats,
        settings: Sampling,
    ) -> None:
        self.settings, self.request, self.stats = settings, request, stats
        self.is_joint = False
        self.queue = collections.deque(range(len(request.prompt_of)))
        self.completions: dict[int, Completion] = {}
        self.start_s = time.perf_counter()
        self.program: Program | None = None
        self._decided_ago_s = 0.0
        self._is_drafting = self._is_trial = False
        self._compiled: set[Program] = set()
        # Where all groups of devices can work as one: its engine, and parameters, which
        # are shapes until they are needed.
        shapes = engine.joint_shapes(params) if request.groups > 1 else None
        self._engines, self._params = {False: engine}, {False: params}
        self._joint_bytes, self._has_joint_params = 0, False
        if shapes is not None:
            self._engines[True], self._params[True] = engine.joint, shapes
            self._joint_bytes = device_bytes(shapes)
        self._draft_kinds = {
            joint: own.draft_kind(self._params[joint].draft)
            for joint, own in self._engines.items()
        }
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
    def engine(self) -> Engine:
        """What runs the state as it lies now."""
        return self._engines[self.is_joint]

    @property
    def params(self) -> PolicyParams:
        """Its parameters."""
        return self._params[self.is_joint]

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
        request, each = self.request, len(self.sequence) // self.request.groups
        slots = np.flatnonzero(self.sequence == NONE)
        free = [
            [int(slot) for slot in slots if slot // each == group]
            for group in range(request.groups)
        ]
        starting = [
            self.queue.popleft() for _ in range(min(len(slots), len(self.queue)))
        ]
        admission = _joined(
            [
                self._plan_group(dealt, slots, slice(group * each, (group + 1) * each))
                for group, (dealt, slots) in enumerate(
                    zip(self._deal(starting, free), free, strict=True)
                )
            ]
        )
        with self._timed("prefill"):
            self.state = self.engine.admit(self.params, self.state, admission)

    def _deal(self, starting: list[int], free: list[list[int]]) -> list[list[int]]:
        """Deal sequences to groups: with their prompts' others, else where is room."""
        dealt: list[list[int]] = [[] for _ in free]
        each = len(self.sequence) // len(free)
        has_prompt = [
            set(self.resident[group * each : (group + 1) * each].tolist())
            for group in range(len(free))
        ]
        for sequence in starting:
            prompt = int(self.request.prompt_of[sequence])
            room = [len(slots) - len(d) for slots, d in zip(free, dealt, strict=True)]
            group = max(
                (g for g in range(len(free)) if room[g]),
                key=lambda g: (prompt in has_prompt[g], room[g], -g),
            )
            dealt[group].append(sequence)
            has_prompt[group].add(prompt)
        return dealt

    def _plan_group(
        self, starting: list[int], free: list[int], rows: slice
    ) -> Admission:
        """Assign slots of one group: clones of resident prompts first, then prefills.

        Args:
          starting: sequences. free: at least as many slots. rows: of the group, within
            which the admission counts.
        """
        request, first, count = self.request, rows.start, rows.stop - rows.start
        places = _Places(self.resident, rows, free)
        clones: list[tuple[int, int, int]] = []  # sequence, from, to
        fresh: dict[int, list[int]] = {}
        for sequence in starting:
            prompt = int(request.prompt_of[sequence])
            source = places.holder(prompt)
            if source is None:
                fresh.setdefault(prompt, []).append(sequence)
            else:
                clones.append((sequence, source, places.take(prompt)))
        # A clone may have overwritten the last copy of a prompt that a later one was
        # promised; clones run in this order, so what was found was there.

        order: list[tuple[int, int, int]] = []  # sequence, slot, index of its prompt
        index_of = {prompt: index for index, prompt in enumerate(fresh)}
        num_chunks = -(-len(fresh) // request.chunk)
        num_prompts = -(-count // request.chunk) * request.chunk
        first_row, num_rows = np.zeros((2, num_prompts // request.chunk), np.int32)
        for prompt, index in index_of.items():
            chunk = index // request.chunk
            if index % request.chunk == 0:
                first_row[chunk] = len(order)
            for sequence in fresh[prompt]:
                order.append((sequence, places.take(prompt), index))
                num_rows[chunk] += 1
        for sequence, _, slot in clones:
            prompt = int(request.prompt_of[sequence])
            order.append((sequence, slot, index_of.setdefault(prompt, len(index_of))))

        tokens = np.zeros((num_prompts, request.prompt_bucket), np.int32)
        length = np.zeros(num_prompts, np.int32)
        for prompt, index in index_of.items():
            ids = request.prompts[prompt]
            tokens[index, : len(ids)] = ids
            length[index] = len(ids)
        for sequence, row, index in order:
            self.sequence[row] = sequence
            self.length[row] = length[index]
            self.limit[row] = request.limit(sequence)
        self.stats.num_prefilled += len(fresh)
        self.stats.num_cloned += len(clones)

        to_row, prompt_index, sequence_id, limit = np.zeros((4, count), np.int32)
        to_row[:], sequence_id[:] = count, NONE
        for i, (sequence, row, index) in enumerate(order):
            to_row[i], prompt_index[i] = row - first, index
            sequence_id[i] = request.sequence_ids[sequence]
            limit[i] = self.limit[row]
        clone_from, clone_to, clone_length = np.zeros((3, count), np.int32)
        # Where another group has more clones, this one copies a row onto itself.
        clone_length[:] = self.state.cache_length + 1
        for i, (_, source, row) in enumerate(clones):
            clone_from[i], clone_to[i] = source - first, row - first
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
        sizes = {joint: self.request.row_buckets(joint) for joint in self._engines}
        if self.queue:
            sizes = {False: (slots,)}
        prompts = self.request.prompt_bucket if self.queue else 1
        shapes = [
            (rows, length, joint)
            for joint in sorted(sizes, reverse=True)
            for rows, length in itertools.product(
                sizes[joint], self.request.cache_lengths
            )
            if rows >= num_live and self._fits((rows, length, joint))
        ]
        found = []
        for gamma in sorted(gammas, reverse=True):
            least = max(self.needed_length(gamma), prompts)
            for rows, length, joint in shapes:
                is_shorter = length < self.state.cache_length
                if (least + length // 4 if is_shorter else least) > length:
                    continue
                program = Program(rows, length, gamma, joint)
                is_larger = len(self.sequence) < rows < slots
                if not is_larger or self._is_compiled(program):
                    found.append(program)
        return found

    @property
    def _shape(self) -> Shape:
        """Rows, cache length and joint of the state."""
        return len(self.sequence), self.state.cache_length, self.is_joint

    def _route(self, shape: Shape) -> list[Shape]:
        """Return the shapes that the state takes one after the other to become one.

        Groups become one, or several again, with as many rows as all of them share.
        """
        rows, length, joint = shape
        if joint and not self.is_joint:
            few = bucket_of(self.num_live, self.request.row_buckets())
            stops = [(few, length, False), (few, length, True), shape]
        elif self.is_joint and not joint:
            stops = [(rows, length, True), shape]
        else:
            stops = [shape]
        stops = [self._shape, *stops]
        return [new for old, new in itertools.pairwise(stops) if new != old]

    def _fits(self, shape: Shape) -> bool:
        """Whether there is memory to move to this shape, and to grow again from it."""
        if self.request.state_limit_bytes is None or shape == self._shape:
            return True
        rows, _, joint = shape
        limit: float = self.request.state_limit_bytes
        if joint or self._has_joint_params:
            limit -= self._joint_bytes
        stops = [self._shape, *self._route(shape)]
        longest = (rows, self.request.cache_lengths[-1], joint)
        pairs = itertools.pairwise([*stops, longest])
        return max(sum(map(self._bytes, {old, new})) for old, new in pairs) <= limit

    def _bytes(self, shape: Shape) -> float:
        """Return what a device holds of a state."""
        rows, length, joint = shape
        per_position = self.request.position_bytes
        if joint:
            per_position = self._engines[True].position_bytes
        return rows * length * per_position

    def _is_compiled(self, program: Program) -> bool:
        if program not in self._compiled:
            num_stop_ids = len(self.settings.stop_ids)
            engine, kind = (
                self._engines[program.joint],
                self._draft_kinds[program.joint],
            )
            if not engine.has_window(program, kind, num_stop_ids):
                return False
            self._compiled.add(program)  # and stays so: asked some hundred times
        return True

    def _window_compile_s(self, program: Program) -> float:
        """Return the seconds that its window has to be compiled for, 0 if it is."""
        if self._is_compiled(program):
            return 0.0
        return self._engines[program.joint].expected_compile_s("window")

    def compile_s(self, program: Program) -> float:
        """Return the seconds until this batch can run a program; 0 if it is ready."""
        seconds = self._window_compile_s(program)
        if program.shape == self._shape:
            return seconds
        stops = [self._shape, *self._route(program.shape)]
        for old, new in itertools.pairwise(stops):
            engine = self._engines[old[2]]
            if old[2] == new[2]:
                is_ready, kind = engine.has_take(old[:2], new[:2]), "take"
            else:
                kind = "join" if new[2] else "part"
                is_ready = self._engines[False].has_move(kind, *new[:2])
            seconds += 0.0 if is_ready else engine.expected_compile_s(kind)
        return seconds

    def look(self, controller: Controller) -> None:
        """Have the controller find out what drafts cost, if it is time for that."""
        if len(controller.gammas) < 2:
            return  # There is nothing to decide.
        longest = self.request.cache_lengths[-1]
        least = self.request.row_buckets()[0]
        with controller.measuring:
            programs = controller.first_look(least, longest, self._window_compile_s)
            if not programs:
                return
            own = self._engines[False]
            with self.stats.timed("calibration", lambda: own.compile_s):
                calibrate.look(
                    own, self._params[False], controller, programs,
                    num_stop_ids=len(self.settings.stop_ids),
                )  # fmt: skip

    def move_to(self, program: Program) -> None:
        """Compact or grow the state to the shape of a program."""
        self.program, self._decided_ago_s = program, 0.0
        for rows, length, joint in self._route(program.shape):
            with self._timed("moves"):
                if joint != self.is_joint:
                    self._relay(joint)
                else:
                    self._take(rows, length)

    def _relay(self, joint: bool) -> None:
        """Have all groups of devices work as one from now on, or each for itself."""
        own = self._engines[False]
        if not self._has_joint_params:
            self._params[True] = own.join_params(self._params[False])
            self._has_joint_params = True
        self.state = own.join(self.state) if joint else own.part(self.state)
        self.is_joint = joint

    def _take(self, rows: int, length: int) -> None:
        """Give the state another size."""
        old_rows = len(self.sequence)
        keep = np.flatnonzero(self.sequence != NONE)
        if rows >= old_rows:
            keep = np.arange(old_rows)
        groups = 1 if self.is_joint else self.request.groups
        index = placed(keep, old_rows, rows, groups)

        def moved(values: np.ndarray, empty: int) -> np.ndarray:
            return np.where(index >= 0, values[np.maximum(index, 0)], empty)

        self.sequence = moved(self.sequence, NONE)
        self.resident = moved(self.resident, NONE)
        self.length, self.limit = moved(self.length, 0), moved(self.limit, 0)
        self.state = self.engine.take(self.state, index, length)

    def _exit_live(self) -> int:
        """Return the live count at which the next decision is due."""
        if self.queue:
            return self.request.slots - max(1, self.request.slots // REFILL_SHARE)
        buckets = self.request.row_buckets(self.is_joint)
        smaller = [b for b in buckets if b < self.num_live]
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
            draft_kind=self._draft_kinds[self.is_joint],
        )
        self._running = _Running(window, program, has_run, second, num_live)

    def end_window(
        self, controller: Controller, failure: Exception | None = None
    ) -> None:
        """Wait for the window that runs, if any, and free the rows that ended.

        What need not be known for the next window is left to `collect`.

        Args:
          controller: learns from the window.
          failure: of something else meanwhile. It is raised when the window is over, in
            all processes: those without it would wait for this one in the next window.
        """
        if self._running is None:
            return
        (window, program, has_run, second, live_before) = self._running
        info, seconds, is_measured = window.wait()
        measured, failure = self.engine.meet([seconds, is_measured], failure)
        seconds, is_measured = float(measured[0]), bool(measured[1])
        num_rounds = int(info.num_rounds)
        sequence = np.where(info.live, self.sequence, NONE)
        moment = Moment(
            second=second,
            duration_s=seconds,
            live=live_before,
            num_live_after=int((sequence != NONE).sum()),
            rows=program.rows,
            cache_length=program.cache_length,
            gamma=program.gamma,
            num_rounds=num_rounds,
            joint=program.joint,
        )
        over = _Over(info, window.text, moment, self.sequence, self.length)
        # Together and at last: whatever interrupts before can wait for it once more.
        self._over, self._running = over, None
        self.sequence, self.length = sequence, info.length.astype(int)
        self._decided_ago_s += seconds
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
        if failure is not None:
            raise failure

    def collect(self) -> list[int]:
        """Book the last window, and fetch what ended in it; return those sequences.

        Completions come from the window's own copies, so it makes no difference what
        has been started on the state since.
        """
        if self._over is None:
            return []
        (info, text, moment, sequences, length_before) = self._over
        was_live = sequences != NONE
        ended = np.flatnonzero(was_live & ~info.live)
        found = fetch_rows(text, ended) if len(ended) else {}
        for slot, (tokens, logprobs) in found.items():
            sequence = int(sequences[slot])
            prompt = self.request.prompts[self.request.prompt_of[sequence]]
            part = slice(len(prompt), int(info.length[slot]))
            self.completions[sequence] = Completion(
                token_ids=np.array(tokens[part]),
                logprobs=np.array(logprobs[part]),
                finish_reason=FINISH_NAMES[int(info.finish_reason[slot])],
            )
        num_tokens = int((info.length - length_before)[was_live].sum())
        self.stats.add_window(moment, num_tokens, info.accepted)
        self._over = None  # Only now: an interrupted fetch can be made again.
        return [int(sequences[slot]) for slot in found]
