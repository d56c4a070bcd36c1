"""The engine of one device: its compiled programs, and running them.

Programs are compiled ahead of time and kept, so that compile time is measured apart
from run time, and the host can ask what is compiled before it decides.

Several threads may call the methods of one engine at once. Each program is compiled by
one thread, and the others that need it wait.

Left out: which program to run (`control`), when to run it (`scheduler`).
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from er_jax import sampling, steps
from er_jax.acceptance import AcceptRule
from er_jax.devices import default_device, device_bytes, is_cuda
from er_jax.drafter import DrafterConfig, PolicyParams, drafter_configs
from er_jax.engine import first_use
from er_jax.engine.lowering import Lowering
from er_jax.engine.programs import (
    CompiledProgram,
    ExecutableCache,
    abstract,
    signature,
)
from er_jax.engine.protocol import (
    Agreement,
    Layout,
    OneDevice,
    OneProcess,
    TokenBuffers,
)
from er_jax.engine.windows import (
    run_admission,
    run_allocation,
    run_attach,
    run_copy_in,
    run_copy_out,
    run_extension,
    run_finite_check,
    run_going_on,
    run_take,
    run_window,
)
from er_jax.settings import kinds, of_rows
from er_jax.thread_settings import ThreadSettings
from er_jax.types import (
    Admission,
    Cache,
    Continuation,
    DecodeState,
    Params,
    Policy,
    Program,
    Sampling,
    Span,
    WindowInfo,
)


class RunningWindow:
    """A dispatched window; the host is free until it calls `wait`.

    buffers: the tokens and log-probabilities after it, as `run_window` returns them.
    """

    def __init__(self, info: WindowInfo, buffers: TokenBuffers, start_s: float) -> None:
        self._info = info
        self.buffers = buffers
        self._start_s = start_s
        self._dispatched_s = time.perf_counter()
        # Where dispatch is synchronous, it ends with the window.
        self._is_sync = info.num_rounds.is_ready()

    def wait(self) -> tuple[WindowInfo, float, bool]:
        """Wait for the window.

        Returns:
          The info as NumPy arrays; the window's seconds, without compilation; whether
          these are a measurement. They are none if the window was over before `wait`:
          they then cover only its dispatch and the fetch of the info. Every process
          measures its own seconds.
        """
        waited_s = time.perf_counter()
        was_over = self._info.num_rounds.is_ready()
        info = jax.device_get(self._info)
        seconds = time.perf_counter() - self._start_s
        if was_over:
            seconds -= waited_s - self._dispatched_s
        return info, seconds, self._is_sync or not was_over


class Engine:
    """The compiled programs of one policy and one acceptance rule, on one device.

    It holds executables only. Parameters and states are arguments, so one engine serves
    across parameter updates.

    Args:
      policy: the model. accept: the acceptance rule.
      attention: which implementation its programs use, a `choice.AttentionChoice`.
      layout: of its programs; None is that of the default device.
    """

    def __init__(
        self,
        policy: Policy,
        accept: AcceptRule,
        attention: str = "auto",
        *,
        layout: Layout | None = None,
    ) -> None:
        self.policy = policy
        self.accept: AcceptRule = accept
        if layout is None:
            name = first_use.implementation(attention, default_device())
            layout = OneDevice(name)
        self.layout = layout
        self.agreement: Agreement = OneProcess()
        self._executables = ExecutableCache()
        # Begins the names of programs, to tell engines apart that share executables.
        self._prefix = ""
        self._draft_kinds: dict[Hashable, str] = {}
        self._row_bytes: dict[int, float] = {}
        self.defaults: dict[Hashable, Any] = {}
        """Objects that callers keep per engine, such as the default controller."""

    @property
    def compiled(self) -> dict[tuple[Any, ...], CompiledProgram]:
        """Executables by name, in the order of compilation."""
        return self._executables.compiled

    @property
    def compile_s(self) -> float:
        """Seconds this thread has spent compiling, or waiting for another that did."""
        return self._executables.own.seconds

    @property
    def compiled_here(self) -> list[tuple[tuple[Any, ...], float]]:
        """Name and seconds of every program this thread has compiled, in order."""
        return self._executables.own.compiled

    @property
    def rounds_per_test(self) -> int:
        """Rounds between exit tests; on an accelerator, each reads a number back."""
        return 1 if jax.default_backend() == "cpu" else 4

    def row_bytes(self, length: int) -> float:
        """Return the bytes of a row: cache entries, tokens, log-probabilities."""
        if length not in self._row_bytes:
            count = self.layout.num_shards
            state = jax.eval_shape(
                lambda: steps.empty_state(self.policy, count, length)
            )
            state = self._abstract_state(state)
            sized = (state.cache, state.tokens, state.logprobs)
            self._row_bytes[length] = device_bytes(sized) / count
        return self._row_bytes[length]

    @property
    def _device(self) -> jax.Device:
        """A device of the programs."""
        return default_device()

    def signature(self, tree: Any) -> Hashable:
        """Return a hashable description of arrays: structure, shapes, dtypes."""
        return signature(tree)

    def _abstract_same(self, tree: Any) -> Any:
        """Return abstract values of host arrays that are the same for all rows."""
        return abstract(tree)

    def _abstract_settings(self, settings: Sampling) -> Any:
        return abstract(settings)

    def _abstract_params(self, params: Any) -> Any:
        return abstract(params)

    def _abstract_state(self, state: DecodeState) -> Any:
        return abstract(state)

    def _abstract_admission(self, admission: Admission) -> Any:
        return abstract(admission)

    def _program(
        self, name: tuple[Any, ...], function: Any, lower: Callable[[Any], Any]
    ) -> CompiledProgram:
        """Return a program, compiled first if necessary.

        Raises:
          RuntimeError: its compilation failed in another process. A failure in this
            process is raised unchanged. After either, no process has the program.
        """

        def make() -> tuple[CompiledProgram, float]:
            start, call, failure = time.perf_counter(), None, None
            try:
                call = lower(function).compile()
            except Exception as error:
                failure = error
            finally:
                # JAX keeps what it compiles for a function as long as the function
                # lives; programs should live as long as their engine.
                function.clear_cache()
            seconds = time.perf_counter() - start
            # A process with the program would wait in it for one without.
            (leading_s,), failure = self.agreement.sync_or_raise([seconds], failure)
            if call is None or failure is not None:
                assert failure is not None
                raise failure
            # Decisions use the leader's seconds, reports those of this process.
            return CompiledProgram(call, seconds), float(leading_s)

        key = self._key(*name)
        return self.compiled.get(key) or self._executables.program(key, make)

    def _key(self, kind: str, *rest: Any) -> tuple[Any, ...]:
        return (self._prefix + kind, *rest)

    def allocate(self, rows: int, cache_length: int) -> DecodeState:
        """Return a state of `rows` empty slots of `cache_length` positions."""
        program = self._program(
            ("allocate", rows, cache_length),
            run_allocation,
            lambda f: f.lower(self.policy, rows, cache_length, layout=self.layout),
        )
        return program.call()

    def admit(
        self, params: PolicyParams, state: DecodeState, admission: Admission
    ) -> DecodeState:
        """Start sequences in free slots. Donates `state`."""
        shape = (state.rows, state.cache_length, *admission.tokens.shape)
        arguments = (params.policy, state, admission)
        program = self._program(
            ("admit", *shape, admission.first_row.shape[0]),
            run_admission,
            lambda f: f.lower(
                self.policy,
                self._abstract_params(params.policy),
                self._abstract_state(state),
                self._abstract_admission(admission),
                layout=self.layout,
            ),
        )
        return program.call(*arguments)

    def go_on(
        self,
        params: PolicyParams,
        state: DecodeState,
        continuation: Continuation,
        chunk: int,
        piece: int,
    ) -> DecodeState:
        """Have rows go on, `chunk` of them at a time, by `piece` tokens.

        Donates `state`.
        """
        sizes = (*continuation.tokens.shape, chunk, piece)
        shape = (state.rows, state.cache_length, *sizes)
        program = self._program(
            ("go on", *shape),
            run_going_on,
            lambda f: f.lower(
                self.policy,
                self._abstract_params(params.policy),
                self._abstract_state(state),
                abstract(continuation),
                chunk=chunk,
                piece=piece,
            ),
        )
        return program.call(params.policy, state, continuation)

    def has_take(self, old: tuple[int, int], new: tuple[int, int]) -> bool:
        """Whether the move between states of two sizes (rows, length) is compiled."""
        return old == new or self._key("take", *old, *new) in self.compiled

    def take(self, state: DecodeState, rows: np.ndarray, length: int) -> DecodeState:
        """Move rows (`NONE` for an empty one) to a state of `length` positions."""
        rows = np.asarray(rows, np.int32)
        program = self._program(
            ("take", state.rows, state.cache_length, len(rows), length),
            run_take,
            lambda f: f.lower(*abstract((state, rows)), cache_length=length),
        )
        return program.call(state, rows)

    def copy_out(self, state: DecodeState, row: int, length: int) -> Cache:
        """Return the first `length` cache entries of a row, leaves `[1, length, ...]`.

        Not on a mesh, as little as the next two.
        """
        program = self._program(
            ("copy out", state.rows, state.cache_length, length),
            run_copy_out,
            lambda f: f.lower(*abstract((state, np.int32(row))), length=length),
        )
        return program.call(state, np.int32(row))

    def copy_in(
        self, state: DecodeState, entries: Cache, row: int, count: int
    ) -> DecodeState:
        """Overwrite a row's entries with the first `count` of others. Donates `state`.

        Args:
          entries: from `copy_out` or `extend`, of any length.
        """
        arguments = (state, entries, np.int32(row), np.int32(count))
        program = self._program(
            ("copy in", state.rows, state.cache_length, _length_of(entries)),
            run_copy_in,
            lambda f: f.lower(*abstract(arguments)),
        )
        return program.call(*arguments)

    def extend(
        self,
        params: PolicyParams,
        entries: Cache,
        tokens: np.ndarray,
        start: int,
        count: int,
        length: int,
    ) -> Cache:
        """Return a prompt's entries, computed from those at `start` on.

        Args:
          params: their target. entries: as for `copy_in`; the first `start` are known.
          tokens: int32 `[1, R]`, the prompt's from `start` on, padded at the end.
          count: entries of the prompt. length: positions of the result.
        """
        arguments = (entries, tokens, np.int32(start), np.int32(count))
        program = self._program(
            ("extend", _length_of(entries), tokens.shape[1], length),
            run_extension,
            lambda f: f.lower(
                self.policy,
                *abstract((params.policy, *arguments)),
                length=length,
                layout=self.layout,
            ),
        )
        return program.call(params.policy, *arguments)

    def draft_kind(self, draft: Params) -> str:
        """Return a short name shared by all drafts of these shapes and dtypes."""
        name = self.signature(draft)
        with self._executables.lock:
            number = len(self._draft_kinds)
            return self._draft_kinds.setdefault(name, f"draft {number}")

    def _window_name(
        self, program: Program, draft_kind: str | None, settings: Sampling
    ) -> tuple[Any, ...]:
        # Plain decoding is one program for all drafts, and without one.
        kind = draft_kind if program.gamma else None
        sizes = (program.rows, program.cache_length, program.gamma)
        compiled_in = (len(settings.stop_ids), sampling.is_truncated(settings))
        return ("window", *sizes, *compiled_in, kind, program.span, *kinds(settings))

    def has_window(self, program: Program, draft_kind: str, settings: Sampling) -> bool:
        """Whether a window is compiled for a kind of draft and for these settings.

        All settings are traced but the number of stop ids, whether top-k or top-p is
        on, and the `settings.kinds` that are asked for.
        """
        name = self._window_name(program, draft_kind, settings)
        return self._key(*name) in self.compiled

    def expected_compile_s(self, kind: str) -> float:
        """Return the expected seconds to compile one more program of a kind."""
        slowest_s = self._executables.slowest_s
        # A move of rows compiles in a small part of a window's time.
        first_s = 0.1 * slowest_s["window"] if "window" in slowest_s else 1.0
        return slowest_s.get(self._prefix + kind, slowest_s.get(kind, first_s))

    def start_window(
        self,
        params: PolicyParams,
        state: DecodeState,
        settings: Sampling,
        gamma: int,
        *,
        exit_live: int,
        max_rounds: int,
        draft_kind: str | None = None,
        span: Span | None = None,
    ) -> tuple[DecodeState, RunningWindow]:
        """Start one window without waiting for it.

        Args:
          params: target and draft. state: donated. settings: traced sampling settings,
            those of rows for the rows of the state.
          gamma: drafts per round. exit_live, max_rounds: see `run_window`.
          draft_kind: kind of `params.draft`, so that callers of many windows find it
            only once; None finds it.
          span: the positions that drafts see; None is all.
        Returns:
          The state after the window, and the running window.
        """
        if gamma == 0:
            params = PolicyParams(policy=params.policy, draft=None)
        limits = (np.int32(exit_live), np.int32(max_rounds))
        arguments = (params, state, settings, *limits)
        compiled = self._window(arguments, gamma, draft_kind, span)
        start = time.perf_counter()
        state, info, buffers = compiled.call(*arguments)
        return state, RunningWindow(info, buffers, start)

    def _window(
        self,
        arguments: tuple[Any, ...],
        gamma: int,
        draft_kind: str | None,
        span: Span | None,
    ) -> CompiledProgram:
        params, state, settings, *limits = arguments
        if gamma and draft_kind is None:
            draft_kind = self.draft_kind(params.draft)
        program = Program(state.rows, state.cache_length, gamma).seeing(span)
        return self._program(
            self._window_name(program, draft_kind, settings),
            run_window,
            lambda f: Lowering(
                functools.partial(
                    f.lower,
                    self.policy,
                    self._abstract_params(params),
                    self._abstract_state(state),
                    self._abstract_settings(settings),
                    *self._abstract_same(limits),
                    gamma=gamma,
                    accept=self.accept,
                    truncated=sampling.is_truncated(settings),
                    span=span,
                    rounds_per_test=self.rounds_per_test,
                    layout=self.layout,
                ),
                params.draft,
                is_cuda(self._device),
            ),
        )

    def compile_windows(
        self,
        params: PolicyParams,
        settings: Sampling,
        programs: Sequence[Program],
        *,
        progress: bool = False,
    ) -> None:
        """Compile windows in parallel, one thread for each core.

        Args:
          params: target and draft, or their shapes. settings: traced sampling settings.
          programs: the windows. progress: show a progress bar.
        """
        of_caller = ThreadSettings.here()

        def compile_one(program: Program) -> None:
            rows, length, gamma = program[:3]
            state = jax.eval_shape(lambda: steps.empty_state(self.policy, rows, length))
            used = PolicyParams(params.policy, draft=None)
            if gamma:
                used = params.only(program.draft)
            zero = np.int32(0)
            own = of_rows(settings, np.zeros(rows, int))
            arguments = (used, state, own, zero, zero)
            self._window(arguments, gamma, None, program.span)

        # Processes compile in the same order, because they synchronise after each.
        threads = 1 if self.agreement.is_spread else os.cpu_count()
        with (
            concurrent.futures.ThreadPoolExecutor(threads) as pool,
            tqdm(total=len(programs), unit="program", disable=not progress) as bar,
        ):
            compiled = pool.map(
                functools.partial(of_caller.call, compile_one), programs
            )
            for _ in compiled:
                bar.update()

    def fetch_rows(
        self, buffers: TokenBuffers, rows: np.ndarray
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return tokens and log-probabilities, `[S]` each, of some rows.

        They may be views of the device's buffers of all rows: copy what is to be kept.
        """
        tokens, logprobs = jax.device_get(buffers)
        return {int(row): (tokens[row], logprobs[row]) for row in rows}

    def _attach_function(self, params: Params, config: DrafterConfig) -> Any:
        """Return the jitted function that derives the draft of these parameters."""
        return run_attach

    def attach_draft(
        self, params: Params, config: DrafterConfig | Sequence[DrafterConfig]
    ) -> PolicyParams:
        """Return policy parameters with newly derived drafts."""
        draft, *others = (
            self._derived(params, one.quantization) for one in drafter_configs(config)
        )
        return PolicyParams(policy=params, draft=draft, others=tuple(others))

    def _derived(self, params: Params, config: DrafterConfig) -> Params:
        """Return one draft of the parameters."""
        program = self._program(
            ("attach", config),
            self._attach_function(params, config),
            lambda f: f.lower(self._abstract_params(params), config=config),
        )
        return program.call(params)

    def find_nonfinite(self, params: Params) -> list[str]:
        """Return the paths of floating-point leaves that hold NaN or infinity."""
        program = self._program(
            ("finite",),
            run_finite_check,
            lambda f: f.lower(self._abstract_params(params), layout=self.layout),
        )
        flags = jax.device_get(program.call(params))
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        return [path for path, good in zip(paths, flags, strict=True) if not good]


def _length_of(entries: Cache) -> int:
    """Return the positions of cache entries; with rings, the slots of the longest."""
    return max(leaf.shape[1] for leaf in jax.tree.leaves(entries))
