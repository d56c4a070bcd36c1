"""The host loop on a pretended engine: no model, no compiling, outputs known by hand.

The engine below does in plain loops what the documents of `Admission`, `run_window` and
`take` say, on a model whose every token is a formula. Its cache holds the prompts, so a
wrong copy is seen; and after every window the batch's own record is checked whole.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from er_jax import Completion, Controller, RolloutError, RolloutStats
from er_jax.costs.timing import neutral_sampling
from er_jax.drafter import PolicyParams
from er_jax.engine.protocol import OneProcess
from er_jax.request import Request
from er_jax.scheduler import batch, loop
from er_jax.scheduler.batch import Batch
from er_jax.scheduler.monitor import seconds_left
from er_jax.scheduler.topology import OneDevice
from er_jax.types import (
    NONE,
    Admission,
    DecodeState,
    Finish,
    Program,
    Sampling,
    Span,
    WindowInfo,
)

STOP = 99
PARAMS = PolicyParams(policy=None, draft=None)
SETTINGS = neutral_sampling()


def natural_length(sequence_id: int) -> int:
    """Tokens until a sequence's stop, the stop included: 1 to 29, in no order."""
    return 1 + (sequence_id * 37 + 5) % 29


def token(sequence_id: int, position: int, prompt_length: int) -> int:
    if position - prompt_length == natural_length(sequence_id) - 1:
        return STOP
    return (3 * sequence_id + 5 * position) % 90


def expected(sequence_id: int, prompt: Any, max_new_tokens: int) -> Completion:
    """Return what a sequence has to come out as, whoever ran it, and with whom."""
    count = min(natural_length(sequence_id), max_new_tokens)
    positions = range(len(prompt), len(prompt) + count)
    return Completion(
        token_ids=np.array([token(sequence_id, p, len(prompt)) for p in positions]),
        logprobs=np.array([-float(p) for p in positions], np.float32),
        finish_reason=(
            "stop" if natural_length(sequence_id) <= max_new_tokens else "length"
        ),
    )


class PretendedEngine:
    """The interface of `Engine`, in NumPy.

    seconds: time of a round, by program. compiled: names, in order of compilation.
    admitted: the sequence ids of each admission. moves: (queue is empty, from, to).
    num_prefilled, num_cloned: rows' sources, counted from the admissions themselves.
    """

    def __init__(
        self, seconds: Callable[[Program], float], rounds_per_test: int = 1
    ) -> None:
        self.seconds = seconds
        self.rounds_per_test = rounds_per_test
        self.compile_s = self.position_bytes = 0.0
        self.policy, self.agreement = None, OneProcess()
        self.compiled: list[Any] = []
        self.admitted: list[list[int]] = []
        self.moves: list[tuple[tuple[int, int], tuple[int, int]]] = []
        self.windows: list[tuple[Program, int, int]] = []
        self.num_prefilled = self.num_cloned = 0
        self.fail_at_window = self.bad_sequence = NONE
        self._state: DecodeState | None = None

    def row_bytes(self, length: int) -> float:
        return length * self.position_bytes

    def _name(self, *name: Any) -> None:
        if name not in self.compiled:
            self.compiled.append(name)

    def _consume(self, state: DecodeState) -> DecodeState:
        """A state may be used once: the real one's buffers are given away."""
        assert state is self._state
        return DecodeState(
            **{
                field.name: np.array(getattr(state, field.name))
                for field in dataclasses.fields(state)
            }
        )

    def _keep(self, state: DecodeState) -> DecodeState:
        self._state = state
        return state

    def allocate(self, rows: int, cache_length: int) -> DecodeState:
        self._name("allocate", rows, cache_length)
        zeros = np.zeros(rows, np.int32)
        return self._keep(
            DecodeState(
                tokens=np.zeros((rows, cache_length), np.int32),
                logprobs=np.zeros((rows, cache_length), np.float32),
                length=zeros,
                prompt_length=zeros,
                limit=zeros,
                sequence_id=zeros + NONE,
                live=zeros > 0,
                finish_reason=zeros,
                cache=np.full((rows, cache_length), NONE, np.int32),
            )
        )

    def admit(
        self, params: PolicyParams, state: DecodeState, plan: Admission
    ) -> DecodeState:
        self._name("admit", state.rows, state.cache_length, *plan.tokens.shape)
        state = self._consume(state)
        chunk = len(plan.tokens) // len(plan.first_row)
        for i in range(plan.num_clones):
            row = state.cache[plan.clone_from[i]].copy()
            row[plan.clone_length[i] - 1 :] = NONE
            state.cache[plan.clone_to[i]] = row
        self.num_cloned += int(plan.num_clones)
        prefilled = set()
        filled: list[int] = []
        for c in range(plan.num_chunks):
            for i in range(plan.first_row[c], plan.first_row[c] + plan.num_rows[c]):
                index = int(plan.prompt[i])
                assert index // chunk == c, "a row's prompt lies in the row's own chunk"
                known = plan.length[index] - 1
                state.cache[plan.slot[i]] = NONE
                state.cache[plan.slot[i], :known] = plan.tokens[index, :known]
                prefilled.add(index)
                filled.append(int(plan.slot[i]))
        self.num_prefilled += len(prefilled)
        used = [int(s) for s in plan.slot if s < state.rows]
        assert len(set(used)) == len(used)
        assert not state.live[used].any(), "a live row was overwritten"
        cloned = plan.clone_to[: plan.num_clones].tolist()
        assert sorted(filled + cloned) == sorted(used)
        for i, slot in enumerate(used):
            tokens = plan.tokens[plan.prompt[i]]
            size = min(len(tokens), state.cache_length)
            state.tokens[slot] = 0
            state.tokens[slot, :size] = tokens[:size]
            state.logprobs[slot] = 0
            state.length[slot] = plan.length[plan.prompt[i]]
            state.prompt_length[slot] = state.length[slot]
            state.limit[slot] = plan.limit[i]
            state.sequence_id[slot] = plan.sequence_id[i]
            state.live[slot] = True
            state.finish_reason[slot] = 0
        self.admitted.append(sorted(int(plan.sequence_id[i]) for i in range(len(used))))
        return self._keep(state)

    def go_on(self, *arguments: Any) -> Any:
        raise NotImplementedError("conversations are not simulated")

    def has_take(self, old: tuple[int, int], new: tuple[int, int]) -> bool:
        return old == new or ("take", *old, *new) in self.compiled

    def take(self, state: DecodeState, rows: np.ndarray, length: int) -> DecodeState:
        shape = (state.rows, state.cache_length)
        self._name("take", *shape, len(rows), length)
        self.moves.append((shape, (len(rows), length)))
        state = self._consume(state)
        kept = [int(row) for row in rows if row >= 0]
        assert len(set(kept)) == len(kept)
        lost = sorted(set(np.flatnonzero(state.live)) - set(kept))
        assert lost == [], "a live row was left behind"
        assert state.length[state.live].max(initial=0) <= length

        def moved(values: np.ndarray) -> np.ndarray:
            values = values[np.maximum(rows, 0)]
            if values.ndim == 2:
                out = np.zeros((len(rows), length), values.dtype)
                size = min(length, values.shape[1])
                out[:, :size] = values[:, :size]
                return out
            return values

        fields = {
            f.name: moved(getattr(state, f.name))
            for f in dataclasses.fields(state)
            if f.name != "draft_cache"
        }
        fields["live"] &= rows >= 0
        fields["sequence_id"] = np.where(rows >= 0, fields["sequence_id"], NONE)
        return self._keep(DecodeState(**fields))

    def draft_kind(self, draft: Any) -> str:
        return "draft"

    def fetch_rows(
        self, buffers: Any, rows: np.ndarray
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        tokens, logprobs = buffers
        return {int(row): (tokens[row], logprobs[row]) for row in rows}

    def has_window(self, program: Program, draft_kind: str, settings: Sampling) -> bool:
        return ("window", *program[:3]) in self.compiled

    def expected_compile_s(self, kind: str) -> float:
        return 0.01

    def start_window(
        self,
        params: PolicyParams,
        state: DecodeState,
        settings: Any,
        gamma: int,
        *,
        exit_live: int,
        max_rounds: int,
        draft_kind: str | None = None,
        span: Span | None = None,
    ) -> tuple[DecodeState, PretendedWindow]:
        program = Program(state.rows, state.cache_length, gamma).seeing(span)
        self._name("window", *program[:3])
        if len(self.windows) == self.fail_at_window:
            raise MemoryError("out of memory, or so it is pretended")
        state = self._consume(state)
        reach = self.rounds_per_test * (gamma + 1)
        accepted = np.zeros(gamma + 1, np.int32)
        num_rounds = 0
        while state.live.sum() > exit_live and num_rounds < max_rounds:
            needed = np.minimum(state.length + reach, state.limit)[state.live]
            if needed.max() > state.cache_length:
                break
            for _ in range(self.rounds_per_test):
                for row in np.flatnonzero(state.live):
                    accepted[self._round(state, int(row), gamma)] += 1
            num_rounds += self.rounds_per_test
        assert num_rounds, "a window was asked for that could do nothing"
        self.windows.append((program, exit_live, max_rounds))
        info = WindowInfo(
            live=state.live.copy(),
            length=state.length.copy(),
            finish_reason=state.finish_reason.copy(),
            num_rounds=np.int32(num_rounds),
            accepted=accepted,
            emitted=accepted,
        )
        text = state.tokens.copy(), state.logprobs.copy()
        seconds = self.seconds(program) * num_rounds
        return self._keep(state), PretendedWindow(info, text, seconds)

    def _round(self, state: DecodeState, row: int, gamma: int) -> int:
        """Emit up to gamma + 1 tokens, by a pattern that rejects at every depth."""
        sequence_id = int(state.sequence_id[row])
        prompt_length = int(state.prompt_length[row])
        known = state.tokens[row, : prompt_length - 1]
        np.testing.assert_array_equal(state.cache[row, : prompt_length - 1], known)
        kept = (sequence_id + int(state.length[row])) % (gamma + 1)
        for _ in range(kept + 1):
            at = int(state.length[row])
            if sequence_id == self.bad_sequence and at == prompt_length + 2:
                state.live[row] = False
                state.finish_reason[row] = Finish.NONFINITE
                break
            state.tokens[row, at] = token(sequence_id, at, prompt_length)
            state.logprobs[row, at] = -at
            state.length[row] += 1
            is_stop = state.tokens[row, at] == STOP
            if is_stop or at + 1 == state.limit[row]:
                state.live[row] = False
                state.finish_reason[row] = Finish.STOP if is_stop else Finish.LENGTH
                break
        return kept


class PretendedWindow:
    """A window that is over as soon as it is asked for."""

    def __init__(self, info: WindowInfo, buffers: Any, seconds: float) -> None:
        self.info, self.buffers, self.seconds = info, buffers, seconds

    def wait(self) -> tuple[WindowInfo, float, bool]:
        return self.info, self.seconds, True


class CheckedBatch(Batch):
    """A batch that compares its record with the device after every window."""

    def move_to(self, program: Program) -> None:
        if self.queue:
            assert program.rows == self.request.slots, "compacted with a queue"
        super().move_to(program)

    def end_window(self, *args: Any) -> None:
        super().end_window(*args)
        request, state, own = self.request, self.state, self.rows
        rows = len(own)
        here = own.sequence[own.sequence != NONE].tolist()
        assert self._finished is not None
        was_live = self._finished.sequence != NONE
        ended = self._finished.sequence[was_live & ~self._finished.info.live].tolist()
        everyone = sorted([*here, *self.queue, *self.completions, *ended])
        assert everyone == list(range(len(request.prompt_of))), "lost, or there twice"
        assert state.tokens.shape == (rows, state.cache_length)
        assert self.program is not None
        assert self.program[:2] == (rows, state.cache_length)
        assert rows <= request.slots
        assert self.num_live == len(here)
        np.testing.assert_array_equal(state.live, own.sequence != NONE)
        for row in range(rows):
            sequence, prompt = own.sequence[row], own.resident[row]
            if prompt != NONE:
                entries = request.prompts[prompt][:-1]
                np.testing.assert_array_equal(state.cache[row, : len(entries)], entries)
            if sequence != NONE:
                assert prompt == request.prompt_of[sequence]
                assert state.sequence_id[row] == request.sequence_ids[sequence]
                assert state.length[row] == own.length[row] < own.limit[row]
                assert own.limit[row] == state.limit[row] == request.limit(sequence)
                assert own.length[row] <= state.cache_length


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "Batch", CheckedBatch)


PROMPTS = [np.arange(1, 1 + size, dtype=np.int32) for size in (3, 7, 1, 5)]


def make_request(
    prompt_of: Sequence[int],
    *,
    slots: int,
    max_new_tokens: int = 24,
    cache_lengths: tuple[int, ...] = (64,),
    sequence_ids: Sequence[int] | None = None,
    chunk: int = 2,
) -> Request:
    count = len(prompt_of)
    return Request(
        prompts=PROMPTS,
        prompt_of=np.array(prompt_of),
        bare_prompt_of=np.array(prompt_of),
        sequence_ids=np.array(range(count) if sequence_ids is None else sequence_ids),
        max_new_tokens=max_new_tokens,
        slots=slots,
        cache_lengths=cache_lengths,
        prompt_bucket=8,
        chunk=chunk,
    )


def flat(program: Program) -> float:
    return 0.001


def sublinear(program: Program) -> float:
    """Fewer rows and shorter caches are faster; drafting pays with few rows."""
    rows, length, gamma = program[:3]
    step = max(1.0, rows * (gamma + 1) / 16) * rows**0.3 * (length / 16) ** 0.3
    return 0.001 * (step + 0.2 * gamma)


def run(
    request: Request,
    controller: Controller | None = None,
    engine: PretendedEngine | None = None,
    **options: Any,
) -> tuple[list[Completion], PretendedEngine, RolloutStats]:
    engine = engine or PretendedEngine(flat)
    stats = RolloutStats()
    found = loop.run(
        OneDevice(engine, PARAMS, request),
        request,
        SETTINGS,
        controller or Controller("ar"),
        stats,
        **options,
    )
    return [found[i] for i in range(len(request.prompt_of))], engine, stats


def assert_all_as_expected(request: Request, completions: list[Completion]) -> None:
    assert len(completions) == len(request.prompt_of)
    for i, completion in enumerate(completions):
        prompt = PROMPTS[request.prompt_of[i]]
        wanted = expected(int(request.sequence_ids[i]), prompt, request.max_new_tokens)
        np.testing.assert_array_equal(completion.token_ids, wanted.token_ids)
        np.testing.assert_array_equal(completion.logprobs, wanted.logprobs)
        assert completion.finish_reason == wanted.finish_reason


def test_the_pretended_model_has_all_kinds_of_ends() -> None:
    lengths = [natural_length(i) for i in range(29)]
    assert sorted(lengths) == list(range(1, 30))
    assert expected(0, [1, 2], 24).finish_reason == "stop"
    # By hand: sequence 0 stops with its 6th token; before it 5 x position.
    np.testing.assert_array_equal(
        expected(0, [1, 2], 24).token_ids, [10, 15, 20, 25, 30, STOP]
    )
    np.testing.assert_array_equal(expected(0, [1, 2], 3).token_ids, [10, 15, 20])


def best(gammas: tuple[int, ...], **options: Any) -> Controller:
    """A controller that need not look at what drafts cost: one row was measured."""
    controller = Controller("best", gammas, **options)
    for gamma in (0, max(gammas)):
        program = Program(1, 64, gamma)
        controller.table.seconds[program] = sublinear(program)
    return controller


CONTROLS = {
    "ar": lambda: Controller("ar"),
    "fixed:1": lambda: Controller("fixed:1"),
    "fixed:4": lambda: Controller("fixed:4"),
    "best": lambda: best((0, 1, 4), patience=0.0),
    "best, slow to compile": lambda: best((0, 1, 4)),
}


@pytest.mark.parametrize("slots", [1, 3, 8, 32])
@pytest.mark.parametrize("control", CONTROLS)
def test_everything_comes_out_whatever_the_schedule(control: str, slots: int) -> None:
    """Tokens in = tokens out, for rare and frequent tests, long and short caches."""
    prompt_of = [0] * 5 + [1] * 1 + [2] * 9 + [0] * 2 + [3] * 6
    for rounds_per_test, cache_lengths in (
        (1, (16, 32, 64)),
        (4, (64,)),
        (3, (16, 64)),
    ):
        request = make_request(prompt_of, slots=slots, cache_lengths=cache_lengths)
        engine = PretendedEngine(sublinear, rounds_per_test)
        completions, engine, stats = run(request, CONTROLS[control](), engine)
        assert_all_as_expected(request, completions)
        assert stats.num_tokens == sum(len(c.token_ids) for c in completions)
        assert stats.num_prefilled == engine.num_prefilled
        assert stats.num_cloned == engine.num_cloned
        assert stats.num_prefilled + stats.num_cloned <= len(prompt_of)
        moments = stats.timeline
        assert [m.live for m in moments[1:]] >= [m.num_live_after for m in moments[:-1]]
        assert moments[-1].num_live_after == 0
        assert sum(stats.rounds.values()) == sum(
            int(histogram.sum()) for histogram in stats.accepted.values()
        )


def test_names_of_sequences_are_what_decides() -> None:
    """Neither place in the request nor slot, but the id: here in another order."""
    ids = [28, 3, 17, 2_000_000_000, 0, 11]
    request = make_request([0, 1, 2, 3, 1, 0], slots=2, sequence_ids=ids)
    completions, _, _ = run(request)
    assert_all_as_expected(request, completions)


def test_a_request_of_one() -> None:
    request = make_request([2], slots=1, max_new_tokens=1)
    completions, engine, stats = run(request)
    assert_all_as_expected(request, completions)
    assert len(engine.windows) == 1
    assert stats.num_prefilled == 1


# Refill.


def test_slots_are_refilled_in_the_order_of_the_request() -> None:
    """By hand: lengths 6, 14, 22, 1, 9, 17, 25, 4 of sequences 0 .. 7 in 3 slots."""
    assert [natural_length(i) for i in range(8)] == [6, 14, 22, 1, 9, 17, 25, 4]
    request = make_request([0, 1, 2, 3, 0, 1, 2, 3], slots=3)
    ended: list[int] = []
    completions, engine, _ = run(
        request, on_finish=lambda sequence_id, _: ended.append(sequence_id)
    )
    assert engine.admitted == [[0, 1, 2], [3], [4], [5], [6], [7]]
    # Rounds at which they end: 0 at 6, 3 at 7, 1 at 14, 4 at 16, 2 at 22, 5 at 31,
    # 7 at 35 (it starts at 31), 6 at 41 (starts at 16, or 22 if 5 took that slot).
    assert ended == [0, 3, 1, 4, 2, 7, 5, 6]
    assert_all_as_expected(request, completions)


def test_an_idle_row_waits_for_its_share_of_a_prefill() -> None:
    """Of 16 slots two are free before a refill, unless no more than one waits."""
    request = make_request([0] * 40, slots=16)
    completions, engine, _ = run(request)
    assert_all_as_expected(request, completions)
    assert engine.admitted[0] == list(range(16))
    flat_order = list(itertools.chain.from_iterable(engine.admitted))
    assert flat_order == list(range(40))
    sizes = [len(admitted) for admitted in engine.admitted]
    assert min(sizes[:-1]) >= 2
    waiting = 40 - np.cumsum([0, *sizes])
    for (program, exit_live, _), left in zip(
        engine.windows, waiting[1 : len(sizes)], strict=False
    ):
        assert program.rows == 16
        if left:
            assert exit_live == 14


def test_each_distinct_prompt_is_prefilled_once() -> None:
    for slots, prompt_of in (
        (8, [0] * 2 + [1] * 2 + [2] * 2 + [3] * 2),  # all at once
        (3, [0] * 9 + [1] * 8),  # many more completions than slots
        (1, [0] * 4 + [1] * 4),  # cloned onto itself
        (4, [2] * 3 + [0] * 7 + [1] + [3] * 9),
        (5, [0] * 40),
    ):
        request = make_request(prompt_of, slots=slots)
        completions, engine, stats = run(request)
        assert_all_as_expected(request, completions)
        assert stats.num_prefilled == len(set(prompt_of)) == engine.num_prefilled
        first = min(slots, len(prompt_of))
        assert engine.num_cloned >= len(prompt_of) - first - len(set(prompt_of))


def test_a_prompt_that_left_the_batch_is_prefilled_again() -> None:
    request = make_request([0, 1, 0, 1], slots=1)
    completions, _, stats = run(request)
    assert_all_as_expected(request, completions)
    assert (stats.num_prefilled, stats.num_cloned) == (4, 0)


def test_clones_and_prefills_in_any_order() -> None:
    """Clones from rows that the same admission gives away, and to themselves.

    All orders of eight sequences with four prompts, of every 40th a run in 2 slots and
    one in 3; the engine sees to it that no row starts from wrong entries.
    """
    orders = sorted(set(itertools.permutations([0, 0, 0, 1, 1, 1, 2, 3])))
    for order in orders[::40]:
        for slots in (2, 3):
            request = make_request(order, slots=slots, max_new_tokens=9)
            completions, engine, stats = run(request)
            assert_all_as_expected(request, completions)
            assert stats.num_prefilled + stats.num_cloned <= 8
            assert engine.num_prefilled == stats.num_prefilled


# Compaction, growth, switching.


def batch_of(lengths: Sequence[int], request: Request, waiting: int = 0) -> Batch:
    """A batch whose first rows are live and so long, with so many still to start."""
    topology = OneDevice(PretendedEngine(flat), PARAMS, request)
    batch = Batch(topology, request, RolloutStats(), SETTINGS)
    live = len(lengths)
    batch.queue = type(batch.queue)(range(live, live + waiting))
    batch.rows.sequence[:live] = range(live)
    batch.rows.length[:live] = lengths
    batch.rows.limit[:live] = 64
    return batch


def test_options_by_hand() -> None:
    """All that holds the live rows, the safest last: most rows, longest, no drafts."""
    request = make_request([0] * 9, slots=8, cache_lengths=(16, 64))
    found = batch_of([5, 9, 3], request).options((0, 2))
    # Three live rows of at most 9 tokens: 10 or, with two drafts, 12 positions.
    sizes = [Program(n, s, g) for g in (2, 0) for n in (3, 4, 6, 8) for s in (16, 64)]
    assert found == sizes
    assert found[-1] == Program(8, 64, 0)


def test_a_cache_is_not_shortened_to_be_grown_at_once() -> None:
    """A quarter of it has to stay free, the next turn of a window included."""
    request = make_request([0] * 9, slots=8, cache_lengths=(16, 32, 64))
    for length, shortest in ((11, 16), (12, 32), (23, 32), (24, 64), (60, 64)):
        options = batch_of([length], request).options((0,))
        assert min(program.cache_length for program in options) == shortest
    # Drafts reach further.
    options = batch_of([11], request).options((4,))
    assert min(program.cache_length for program in options) == 32


def test_a_batch_keeps_its_slots_while_sequences_wait() -> None:
    request = make_request([0] * 9, slots=8, cache_lengths=(16, 64))
    assert {p.rows for p in batch_of([5], request, waiting=1).options((0, 2))} == {8}
    assert {p.rows for p in batch_of([5], request).options((0, 2))} > {1, 2}
    # Nor is its cache made too short for the prompts to come.
    tall = dataclasses.replace(request, prompt_bucket=17)
    waiting = batch_of([5], tall, waiting=1).options((0,))
    assert {program.cache_length for program in waiting} == {64}


def test_rows_shrink_when_the_queue_is_empty() -> None:
    """The queue is never compacted (see `CheckedBatch`); its tail is."""
    controller = Controller("ar", patience=0.0)
    request = make_request([0] * 20, slots=8)
    completions, engine, stats = run(request, controller, PretendedEngine(sublinear))
    assert_all_as_expected(request, completions)
    sizes = [m.rows for m in stats.timeline]
    assert sizes == sorted(sizes, reverse=True)
    assert {8, 1} < set(sizes)
    for m in stats.timeline[1:]:
        assert m.rows >= m.live
    refills = len(engine.admitted)
    assert all(size == 8 for size in sizes[:refills])


def test_rows_do_not_shrink_where_nothing_is_won() -> None:
    controller = Controller("ar", patience=0.0)
    request = make_request([0] * 20, slots=8)
    controller.table.seconds = {Program(n, 64, 0): 0.001 for n in (1, 2, 3, 4, 6, 8)}
    completions, engine, _ = run(request, controller, PretendedEngine(flat))
    assert_all_as_expected(request, completions)
    assert engine.moves == []


def test_the_cache_shrinks_and_grows_with_the_rows() -> None:
    """Short caches are faster here, so it is shortened at once, and then it grows."""
    controller = Controller("ar", patience=0.0)
    request = make_request(
        [0] * 6, slots=6, cache_lengths=(16, 32, 64), max_new_tokens=40
    )
    assert max(natural_length(i) for i in range(6)) == 22
    completions, engine, stats = run(request, controller, PretendedEngine(sublinear))
    assert_all_as_expected(request, completions)
    lengths = [m.cache_length for m in stats.timeline]
    assert 16 in lengths and 32 in lengths
    first = lengths.index(16)
    assert lengths[first:] == sorted(lengths[first:])
    assert any(old[1] < new[1] for old, new in engine.moves)


def test_limits_hold_at_the_end_of_the_longest_cache() -> None:
    """A prompt of 7 and 25 more: exactly the 32 positions there are."""
    request = make_request([1] * 29, slots=4, max_new_tokens=25, cache_lengths=(16, 32))
    for control in CONTROLS.values():
        for rounds_per_test in (1, 4):
            engine = PretendedEngine(sublinear, rounds_per_test)
            completions, _, _ = run(request, control(), engine)
            assert_all_as_expected(request, completions)
            assert {len(c.token_ids) for c in completions} >= {1, 24, 25}


@pytest.mark.parametrize("share", [1.0, 1.3, 1.6, 2.5])
def test_moves_respect_the_memory_there_is(share: float) -> None:
    """Old and new state lie side by side during a move, and growing must stay open."""
    slots, longest, position_bytes = 6, 64, 10
    limit = int(share * slots * longest * position_bytes)
    request = dataclasses.replace(
        make_request(
            [0] * 20, slots=slots, cache_lengths=(16, 32, 64), max_new_tokens=40
        ),
        state_limit_bytes=limit,
    )
    moves = []
    for control in CONTROLS.values():
        engine = PretendedEngine(sublinear)
        engine.position_bytes = position_bytes
        completions, engine, _ = run(request, control(), engine)
        assert_all_as_expected(request, completions)
        moves += engine.moves
    for old, new in moves:
        assert (old[0] * old[1] + new[0] * new[1]) * position_bytes <= limit
    assert bool(moves) == (share > 1)
    if share == 2.5:
        assert (6, 64) in {old for old, _ in moves}


def test_best_switches_as_the_batch_empties() -> None:
    controller = Controller("best", (0, 4), patience=0.0)
    controller.acceptance.tested[:] = 1e6
    controller.acceptance.kept[:] = 0.8e6
    for rows in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        for gamma in (0, 4):
            program = Program(rows, 64, gamma)
            controller.table.seconds[program] = sublinear(program)
    request = make_request([0] * 60, slots=32)
    completions, _, stats = run(request, controller, PretendedEngine(sublinear))
    assert_all_as_expected(request, completions)
    gammas = [m.gamma for m in stats.timeline]
    assert gammas[0] == 0
    assert gammas[-1] == 4
    assert set(stats.tokens) == {0, 4}


def test_windows_end_where_the_choice_could_change() -> None:
    controller = Controller("ar")
    request = make_request([0] * 12, slots=12)
    _, engine, stats = run(request, controller)
    for (_, exit_live, _), m in zip(engine.windows, stats.timeline, strict=True):
        smaller = [size for size in (1, 2, 3, 4, 6, 8) if size < m.live]
        assert exit_live == max(smaller, default=0)


def test_windows_are_short_enough_to_see_progress() -> None:
    for round_s, most in ((0.01, 25), (1.0, 16), (1e-9, 4096)):
        controller = Controller("ar")
        engine = PretendedEngine(lambda program, s=round_s: s)  # type: ignore[misc]
        _, engine, _ = run(make_request([0] * 8, slots=2), controller, engine)
        assert engine.windows[0][2] == 1  # a program's first run is not timed
        assert engine.windows[1][2] == 64  # nothing known yet
        assert engine.windows[-1][2] == most


# What is told, and what goes wrong.


def test_everyone_is_told_once_and_at_once() -> None:
    told: dict[int, Completion] = {}
    counts: list[int] = []

    def on_finish(sequence_id: int, completion: Completion) -> None:
        assert sequence_id not in told
        told[sequence_id] = completion
        counts.append(len(engine.windows))

    engine = PretendedEngine(flat)
    ids = list(range(100, 112))
    request = make_request([0] * 6 + [1] * 6, slots=4, sequence_ids=ids)
    completions, _, _ = run(request, engine=engine, on_finish=on_finish)
    assert sorted(told) == ids
    for sequence_id, completion in zip(ids, completions, strict=True):
        np.testing.assert_array_equal(told[sequence_id].token_ids, completion.token_ids)
        np.testing.assert_array_equal(told[sequence_id].logprobs, completion.logprobs)
        assert told[sequence_id].finish_reason == completion.finish_reason
    assert counts[0] < counts[-1]  # on the way, not at the end


def test_a_row_that_goes_bad_ends_alone() -> None:
    request = make_request([0] * 9, slots=4)
    engine = PretendedEngine(flat)
    engine.bad_sequence = 2
    completions, _, _ = run(request, engine=engine)
    assert completions[2].finish_reason == "nonfinite"
    wanted = expected(2, PROMPTS[0], 24).token_ids[:2]
    np.testing.assert_array_equal(completions[2].token_ids, wanted)
    for i in (0, 1, 3, 4, 5, 6, 7, 8):
        np.testing.assert_array_equal(
            completions[i].token_ids, expected(i, PROMPTS[0], 24).token_ids
        )


def test_what_had_finished_is_not_lost_when_a_callback_fails() -> None:
    ids = list(range(50, 62))
    request = make_request([0] * 12, slots=4, sequence_ids=ids)
    told: list[int] = []

    def on_finish(sequence_id: int, completion: Completion) -> None:
        told.append(sequence_id)
        if len(told) == 5:
            raise OSError("disk full")

    with pytest.raises(RolloutError) as error:
        run(request, on_finish=on_finish)
    assert isinstance(error.value.__cause__, OSError)
    done = error.value.completions
    assert set(told) <= set(done) < set(ids)
    assert f"{len(done)} of 12" in str(error.value)
    assert "disk full" in str(error.value)
    for sequence_id, completion in done.items():
        wanted = expected(sequence_id, PROMPTS[0], 24)
        np.testing.assert_array_equal(completion.token_ids, wanted.token_ids)
        np.testing.assert_array_equal(completion.logprobs, wanted.logprobs)


def test_callbacks_run_while_the_next_window_does() -> None:
    engine = PretendedEngine(flat)
    windows_started: list[int] = []

    def on_finish(sequence_id: int, completion: Completion) -> None:
        windows_started.append(len(engine.windows))

    request = make_request([0] * 6, slots=2)
    _, _, stats = run(request, engine=engine, on_finish=on_finish)
    ends = [i for i, m in enumerate(stats.timeline) if m.num_live_after < m.live]
    assert set(windows_started) == {min(i + 2, len(stats.timeline)) for i in ends}


@pytest.mark.parametrize("at", [0, 3])
def test_what_had_finished_is_not_lost_when_the_device_fails(at: int) -> None:
    request = make_request([0] * 12, slots=4)
    engine = PretendedEngine(flat)
    engine.fail_at_window = at
    with pytest.raises(RolloutError, match="out of memory") as error:
        run(request, engine=engine)
    assert isinstance(error.value.__cause__, MemoryError)
    assert (len(error.value.completions) > 0) == (at > 0)
    for sequence_id, completion in error.value.completions.items():
        wanted = expected(sequence_id, PROMPTS[0], 24)
        np.testing.assert_array_equal(completion.token_ids, wanted.token_ids)


def test_completions_do_not_change_when_their_rows_are_used_again() -> None:
    kept: dict[int, np.ndarray] = {}

    def on_finish(sequence_id: int, completion: Completion) -> None:
        kept[sequence_id] = completion.token_ids.copy()

    completions, _, _ = run(make_request([0] * 20, slots=2), on_finish=on_finish)
    for sequence_id, completion in enumerate(completions):
        np.testing.assert_array_equal(completion.token_ids, kept[sequence_id])
        assert completion.token_ids.base is None  # holds no whole batch alive


@pytest.mark.parametrize("progress", [False, True])
def test_the_progress_bar(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    run(make_request([0] * 12, slots=4), progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("12/12" in err) == progress
    assert bool(err) == progress


def test_the_progress_bar_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    request = make_request([0] * 12, slots=4)
    run(request, Controller("fixed:2"), progress=True)
    shown = capsys.readouterr().err
    for part in ("of 4 rows", "2 drafts", "% kept", "tokens/s", "left"):
        assert part in shown, part


def test_how_long_a_rollout_may_go_on() -> None:
    assert seconds_left([], [3, 4], 0, 10.0) is None
    assert seconds_left([10, 20], [], 0, 0.0) is None
    assert seconds_left([10, 20], [], 4, 10.0) == 4 * 15 / 10
    # Of a row with 12 tokens one finished completion was longer, by 8.
    assert seconds_left([10, 20], [12], 0, 10.0) == 8 / 10
    assert seconds_left([10, 20], [12, 0], 0, 10.0) == 2 * 15 / 10
    assert seconds_left([10, 20], [25], 0, 10.0) == 0


def test_the_first_window_that_drafts_is_a_short_trial() -> None:
    """Whenever plain decoding went before; and it is decided upon at once."""
    engine = PretendedEngine(flat)
    request = make_request([0] * 64, slots=8)
    chosen: list[int] = []

    class Alternating(Controller):
        """Drafts twice in three decisions."""

        def choose(
            self, options: Sequence[Program], *unused: Any, **also: Any
        ) -> Program:
            gamma = 0 if len(chosen) % 3 == 0 else 1
            chosen.append(gamma)
            return [p for p in options if p.gamma == gamma][-1]

    completions, engine, _ = run(request, Alternating("best", (0, 1)), engine)
    assert_all_as_expected(request, completions)
    before = trials = 0
    for program, _, max_rounds in engine.windows:
        if program.gamma and not before:
            assert max_rounds <= batch.MIN_ROUNDS
            trials += 1
        before = program.gamma
    assert trials > 2
    # A decision follows every trial, also while sequences wait.
    assert len(chosen) >= 2 * trials
