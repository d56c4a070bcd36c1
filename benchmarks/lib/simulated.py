"""Engines that need no device: the scheduler runs on lengths and a table of costs.

The scheduler, the controller and all their bookkeeping are the library's own. Only the
engine is replaced: its rows end at lengths given beforehand, its clock advances by what
a table of costs says, and its tokens are zeros. `simulate` runs a request on one.

Left out: meshes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar, cast
from unittest import mock

import numpy as np

from er_jax import Completion, Controller, PolicyParams, RolloutStats
from er_jax.costs import timing
from er_jax.engine.protocol import OneProcess
from er_jax.request import Request
from er_jax.scheduler import loop
from er_jax.scheduler.topology import OneDevice
from er_jax.types import Admission, Finish, Program, Sampling, Span, WindowInfo

NO_PARAMS = PolicyParams(policy=None, draft=None)

Method = TypeVar("Method", bound=Callable[..., Any])


class RoundCosts(Protocol):
    """Anything that knows what a round takes."""

    def round_seconds(self, program: Program, /) -> float | None:
        """Return the seconds of a round; None counts as none."""
        ...


@dataclasses.dataclass(frozen=True)
class SimulatedPolicy:
    """Costs and completions of a policy whose programs have to be compiled.

    round_seconds: of a program's round. window_s: to compile a window that does not
      draft; drafting_s: one that does. other_s: to compile any smaller program, such as
      a move of rows. start_s: to compile what the first call needs beside windows.
    slots, count: rows at once, and completions, of each call.
    mean, longest: tokens of completions; each ends with equal chance at every token.
    keep: chance that a draft is kept. window: what drafts may see, as in
      `DrafterConfig`.
    """

    round_seconds: Callable[[Program], float]
    window_s: float
    drafting_s: float
    other_s: float
    start_s: float
    slots: int
    count: int
    mean: int
    longest: int
    keep: float = 0.95
    window: Literal["auto"] | None = None

    def compile_s(self, name: tuple[Any, ...]) -> float:
        """Return the seconds that a program takes to compile, by the engine's name."""
        if name[0] != "window":
            return self.other_s
        return self.drafting_s if name[1].gamma else self.window_s


@dataclasses.dataclass
class SimulatedState:
    """Rows of a simulated engine.

    sequence_id, length, limit: int `[B]`, as in `DecodeState`. end: int `[B]`, length
      at which the row will end.
    """

    cache_length: int
    sequence_id: np.ndarray
    length: np.ndarray
    limit: np.ndarray
    end: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """Zeros, in the shape of the tokens of a real state."""
        shape = (len(self.length), self.cache_length)
        return np.broadcast_to(np.int32(0), shape)

    @property
    def live(self) -> np.ndarray:
        """Which rows generate."""
        return self.length < self.end


@dataclasses.dataclass
class SimulatedWindow:
    """A window that is over."""

    info: WindowInfo
    buffers: tuple[np.ndarray, np.ndarray]
    seconds: float

    def wait(self) -> tuple[WindowInfo, float, bool]:
        """Return the info, the seconds, and that they were measured."""
        return self.info, self.seconds, True


def _counted(method: Method) -> Method:
    """Add what a method computes, in seconds of the thread, to `busy_s`."""

    @functools.wraps(method)
    def counted(self: SimulatedEngine, *args: Any, **options: Any) -> Any:
        start = time.thread_time()
        try:
            return method(self, *args, **options)
        finally:
            self.busy_s += time.thread_time() - start

    return cast(Method, counted)


class SimulatedEngine:
    """What the scheduler asks of an engine; every program is compiled already.

    `seconds` is the simulated time of everything so far, `busy_s` what the simulation
    itself has computed, in real seconds of the thread.

    Args:
      costs: of rounds. admission_s: seconds of prefilling so many chunks.
      lengths: tokens of each sequence's completion, by its id.
      keep_probs: chance of the draft at each depth. rounds_per_test: as of `Engine`.
    """

    policy = None
    agreement = OneProcess()
    compile_s = 0.0
    position_bytes = 0.0

    def row_bytes(self, length: int) -> float:
        """Return the bytes of a row, all of whose positions are kept."""
        return length * self.position_bytes

    def __init__(
        self,
        costs: RoundCosts,
        admission_s: Callable[[int], float],
        lengths: Mapping[int, int],
        keep_probs: np.ndarray,
        rounds_per_test: int,
    ) -> None:
        self._costs, self._admission_s = costs, admission_s
        self._lengths, self._keep_probs = lengths, keep_probs
        self.rounds_per_test = rounds_per_test
        self._random = np.random.default_rng(0)
        self.seconds = 0.0
        self.busy_s = 0.0

    @_counted
    def allocate(self, rows: int, cache_length: int) -> SimulatedState:
        """Return a state of empty slots."""
        zeros = np.zeros((4, rows), int)
        return SimulatedState(cache_length, *zeros)

    @_counted
    def admit(
        self, params: PolicyParams, state: SimulatedState, admission: Admission
    ) -> SimulatedState:
        """Start sequences in free slots."""
        for slot, prompt, sequence, limit in zip(
            admission.slot,
            admission.prompt,
            admission.sequence_id,
            admission.limit,
            strict=True,
        ):
            if slot < len(state.length):
                length = admission.length[prompt]
                state.sequence_id[slot], state.limit[slot] = sequence, limit
                state.length[slot] = length
                state.end[slot] = length + self._lengths[int(sequence)]
        self.seconds += self._admission_s(int(admission.num_chunks))
        return state

    def go_on(self, *arguments: Any) -> Any:
        """Refuse: no conversations are simulated."""
        raise NotImplementedError("conversations are not simulated")

    def has_take(self, old: tuple[int, int], new: tuple[int, int]) -> bool:
        """Whether a move from one size (rows, length) to another is compiled."""
        return True

    @_counted
    def take(
        self, state: SimulatedState, rows: np.ndarray, length: int
    ) -> SimulatedState:
        """Move rows (`NONE` for an empty one) to a state of another size."""
        columns = (state.sequence_id, state.length, state.limit, state.end)
        moved = [np.where(rows >= 0, column[rows], 0) for column in columns]
        return SimulatedState(length, *moved)

    def draft_kind(self, draft: Any) -> str:
        """Return one name for all drafts."""
        return "draft"

    def has_window(self, program: Program, draft_kind: str, settings: Sampling) -> bool:
        """Whether a window is compiled."""
        return True

    def expected_compile_s(self, kind: str) -> float:
        """Return the seconds one more program of a kind should take to compile."""
        return 0.0

    @_counted
    def start_window(
        self,
        params: PolicyParams,
        state: SimulatedState,
        settings: Any,
        gamma: int,
        *,
        exit_live: int,
        max_rounds: int,
        draft_kind: str | None = None,
        span: Span | None = None,
    ) -> tuple[SimulatedState, SimulatedWindow]:
        """Run rounds until a real window would end."""
        program = Program(len(state.length), state.cache_length, gamma).seeing(span)
        reach = self.rounds_per_test * (gamma + 1)
        accepted, emitted = np.zeros((2, gamma + 1), int)
        num_rounds = 0
        while state.live.sum() > exit_live and num_rounds < max_rounds:
            needed = np.minimum(state.length + reach, state.limit)[state.live]
            if needed.max() > state.cache_length:
                break
            for _ in range(self.rounds_per_test):
                live = np.flatnonzero(state.live)
                draws = self._random.random((len(live), gamma))
                is_kept = draws < self._keep_probs[:gamma]
                kept = np.logical_and.accumulate(is_kept, axis=1).sum(axis=1)
                gained = np.minimum(kept + 1, (state.end - state.length)[live])
                state.length[live] += gained
                accepted += np.bincount(kept, minlength=gamma + 1)
                emitted += np.bincount(gained - 1, minlength=gamma + 1)
            num_rounds += self.rounds_per_test
        seconds = num_rounds * self._round_s(program)
        self.seconds += seconds
        info = WindowInfo(
            live=state.live,
            length=state.length.copy(),
            finish_reason=np.full(len(state.length), Finish.STOP),
            num_rounds=np.int32(num_rounds),
            accepted=accepted,
            emitted=emitted,
        )
        return state, SimulatedWindow(info, (state.tokens, state.tokens), seconds)

    def fetch_rows(
        self, buffers: tuple[np.ndarray, np.ndarray], rows: np.ndarray
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return tokens and log-probabilities `[S]` of rows after a window."""
        tokens, logprobs = buffers
        return {int(row): (tokens[row], logprobs[row]) for row in rows}

    def _round_s(self, program: Program) -> float:
        return self._costs.round_seconds(program) or 0.0

    def measure_round(self, program: Program) -> float:
        """Return the seconds of a round, and spend those of measuring it."""
        seconds = self._round_s(program)
        rounds = timing.NUM_READINGS * max(int(timing.READING_S / seconds), 1)
        self.seconds += rounds * seconds
        return seconds


class CompilingEngine(SimulatedEngine):
    """A simulated engine that has to compile programs, which takes simulated time.

    Args:
      policy: what is simulated. lengths: tokens of the completions, by sequence id.
    """

    def __init__(self, policy: SimulatedPolicy, lengths: np.ndarray) -> None:
        step_s = policy.round_seconds(Program(16, 256, 0))
        super().__init__(
            policy,
            lambda chunks: chunks * 4 * step_s,
            dict(enumerate(lengths.tolist())),
            np.full(16, policy.keep),
            rounds_per_test=4,
        )
        self._policy = policy
        self.compiled: dict[tuple[Any, ...], float] = {}
        self.compile_s = policy.start_s
        self._slowest: dict[str, float] = {}

    @property
    def total_s(self) -> float:
        """Simulated seconds of everything so far, compilation included."""
        return self.seconds + self.compile_s

    def _compile(self, *name: Any) -> None:
        """Compile a program unless it is compiled."""
        if name not in self.compiled:
            seconds = self.compiled[name] = self._policy.compile_s(name)
            self.compile_s += seconds
            self._slowest[name[0]] = max(seconds, self._slowest.get(name[0], 0.0))

    def has_window(self, program: Program, draft_kind: str, settings: Sampling) -> bool:
        """Whether a window is compiled."""
        return ("window", program) in self.compiled

    def has_take(self, old: tuple[int, int], new: tuple[int, int]) -> bool:
        """Whether a move from one size (rows, length) to another is compiled."""
        return old == new or ("take", old, new) in self.compiled

    def expected_compile_s(self, kind: str) -> float:
        """Return the seconds one more program of a kind should take to compile."""
        first_s = 0.1 * self._slowest["window"] if "window" in self._slowest else 1.0
        return self._slowest.get(kind, first_s)

    def take(
        self, state: SimulatedState, rows: np.ndarray, length: int
    ) -> SimulatedState:
        """Move rows; compiles the move when it is needed first."""
        old = (len(state.length), state.cache_length)
        self._compile("take", old, (len(rows), length))
        return super().take(state, rows, length)

    def start_window(
        self,
        params: PolicyParams,
        state: SimulatedState,
        settings: Any,
        gamma: int,
        *,
        exit_live: int,
        max_rounds: int,
        draft_kind: str | None = None,
        span: Span | None = None,
    ) -> tuple[SimulatedState, SimulatedWindow]:
        """Run rounds; compiles their window when it is needed first."""
        program = Program(len(state.length), state.cache_length, gamma).seeing(span)
        self._compile("window", program)
        return super().start_window(
            params, state, settings, gamma, exit_live=exit_live, max_rounds=max_rounds,
            draft_kind=draft_kind, span=span,
        )  # fmt: skip

    def measure_round(self, program: Program) -> float:
        """Return the seconds of a round, and spend those of measuring it."""
        self._compile("window", program)
        return super().measure_round(program)


@contextlib.contextmanager
def _simulated_clock() -> Iterator[None]:
    """Have `timing` read the simulated clock where it would time a round."""

    def measure_round(
        engine: SimulatedEngine, params: Any, program: Program, *args: Any, **rest: Any
    ) -> float:
        return engine.measure_round(program)

    with mock.patch.object(timing, "measure_round", measure_round):
        yield


def simulate(
    engine: SimulatedEngine, request: Request, controller: Controller
) -> tuple[dict[int, Completion], RolloutStats]:
    """Run a request on a simulated engine.

    Returns:
      The completions by sequence (0 .. N-1), and the scheduler's statistics.
    """
    stats = RolloutStats()
    with _simulated_clock(), controller.sampling():
        done = loop.run(
            OneDevice(engine, NO_PARAMS, request),
            request,
            timing.neutral_sampling(),
            controller,
            stats,
        )
    return done, stats
