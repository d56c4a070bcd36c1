"""Compiled programs: the only module with `jax.jit` and donation.

A window is a compiled loop of rounds that ends when the host has something to decide:
few enough rows are live, a round count is reached, or a row would outgrow the cache.
It is named by `types.Program`: (rows, cache length, gamma). Sampling settings, stop
ids, limits and keys are traced. The state is donated and aliased; what comes back to
the host is one `WindowInfo`.

Programs are compiled ahead of time and kept here, so that compile time is known apart
from run time and the host can ask what is compiled before it decides.

Left out: which program to run (`control`), when (`scheduler`).
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from er_jax import drafter, steps
from er_jax.acceptance import AcceptRule
from er_jax.drafter import DrafterConfig, PolicyParams
from er_jax.types import (
    Admission,
    DecodeState,
    Params,
    Policy,
    Program,
    Sampling,
    WindowInfo,
)

# Tokens int32 `[B, S]` and log-probabilities float32 `[B, S]`.
Text: TypeAlias = tuple[jax.Array, jax.Array]


@functools.partial(
    jax.jit,
    static_argnames=("policy", "gamma", "accept", "rounds_per_test"),
    donate_argnames=("state",),
)
def run_window(
    policy: Policy,
    params: PolicyParams,
    state: DecodeState,
    settings: Sampling,
    exit_live: jax.Array,
    max_rounds: jax.Array,
    *,
    gamma: int,
    accept: AcceptRule,
    rounds_per_test: int,
) -> tuple[DecodeState, WindowInfo, Text]:
    """Run rounds until `exit_live` or fewer rows are live; at least none, at most max.

    Args:
      policy, params, state, settings: as in `steps.decode_round`.
      exit_live: int32 `[]`. max_rounds: int32 `[]`.
      gamma, accept: static, as in `steps.decode_round`.
      rounds_per_test: static; rounds between two exit tests. A test reads one number
        back (and is a collective on a mesh); up to this many rounds minus one run idle
        at the end.
    Returns:
      The state; what the host needs to know; copies of the state's tokens and
      log-probabilities, for rows that ended: they may be fetched while the next window
      runs on the state.
    Effects: donates `state`.
    """
    reach = rounds_per_test * (gamma + 1)

    def goes_on(carry: tuple[DecodeState, jax.Array, jax.Array]) -> jax.Array:
        state, num_rounds, _ = carry
        num_live = jnp.sum(state.live, dtype=jnp.int32)
        needed = jnp.minimum(state.length + reach, state.limit)
        fits = jnp.all(~state.live | (needed <= state.cache_length))
        return (num_live > exit_live) & (num_rounds < max_rounds) & fits

    def one_round(
        _: Any, carry: tuple[DecodeState, jax.Array]
    ) -> tuple[DecodeState, jax.Array]:
        state, counts = carry
        state, info = steps.decode_round(
            policy, params, state, settings, gamma=gamma, accept=accept
        )
        kinds = jnp.arange(gamma + 1, dtype=jnp.int32)
        found = jnp.stack([info.num_accepted, jnp.maximum(info.num_emitted - 1, 0)])
        is_kind = (found[..., None] == kinds[None, None]) & info.is_live[None, :, None]
        return state, counts + jnp.sum(is_kind, axis=1, dtype=jnp.int32)

    def several(
        carry: tuple[DecodeState, jax.Array, jax.Array],
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        state, num_rounds, counts = carry
        if rounds_per_test == 1:
            state, counts = one_round(0, (state, counts))
        else:
            state, counts = lax.fori_loop(
                0, rounds_per_test, one_round, (state, counts)
            )
        return state, num_rounds + rounds_per_test, counts

    start = (state, jnp.int32(0), jnp.zeros((2, gamma + 1), jnp.int32))
    state, num_rounds, counts = lax.while_loop(goes_on, several, start)
    info = WindowInfo(
        live=state.live,
        length=state.length,
        finish_reason=state.finish_reason,
        num_rounds=num_rounds,
        accepted=counts[0],
        emitted=counts[1],
    )
    return state, info, (state.tokens, state.logprobs)


@functools.partial(jax.jit, static_argnames=("policy",), donate_argnames=("state",))
def run_admission(
    policy: Policy, params: Params, state: DecodeState, admission: Admission
) -> DecodeState:
    """Start sequences in free slots; see `steps.admit`. Donates `state`."""
    return steps.admit(policy, params, state, admission)


@functools.partial(jax.jit, static_argnames=("cache_length",))
def run_take(state: DecodeState, rows: jax.Array, *, cache_length: int) -> DecodeState:
    """Move rows to a state of another size; see `steps.take`."""
    return steps.take(state, rows, cache_length)


@functools.partial(jax.jit, static_argnames=("policy", "rows", "cache_length"))
def run_allocation(policy: Policy, rows: int, cache_length: int) -> DecodeState:
    """Allocate a state of empty slots; see `steps.empty_state`."""
    return steps.empty_state(policy, rows, cache_length)


@functools.partial(jax.jit, static_argnames=("config",))
def run_attach(params: Params, *, config: DrafterConfig) -> Params:
    """Derive the draft alone (the policy would be copied if it were returned)."""
    return drafter.attach_draft(params, config).draft


@functools.partial(
    jax.jit, static_argnames=("config",), donate_argnames=("old",), keep_unused=True
)
def run_refresh(params: Params, old: Params, *, config: DrafterConfig) -> Params:
    """Derive the draft into the buffers of the old one. Donates `old`."""
    del old  # Unused on purpose: kept as an argument so that its buffers are reused.
    return drafter.attach_draft(params, config).draft


@jax.jit
def run_finite_check(params: Params) -> list[jax.Array]:
    """Return, per floating-point leaf, whether all of it is finite."""
    return [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(params)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]


def refresh_draft(params: PolicyParams, config: DrafterConfig) -> PolicyParams:
    """Requantize the policy into the buffers of its old draft.

    For callers whose update is not one jit of its own; inside a jit that donates the
    old parameters, `attach_draft` does the same.

    Args:
      params: policy and old draft; the draft is donated and must not be used again.
      config: how to quantize.
    Returns:
      The same policy with its new draft.
    """
    draft = run_refresh(params.policy, params.draft, config=config)
    return PolicyParams(policy=params.policy, draft=draft)


@dataclasses.dataclass
class CompiledProgram:
    """An executable, what its compilation took, and how often it ran."""

    call: Callable[..., Any]
    compile_s: float


class RunningWindow:
    """A window the device was told to run; the host is free until it calls `wait`.

    text: the tokens and log-probabilities after it, as `run_window` returns them.
    """

    def __init__(self, info: WindowInfo, text: Text, start_s: float) -> None:
        self._info = info
        self.text = text
        self._start_s = start_s
        self._told_s = time.perf_counter()
        # Where dispatch itself waits, its end is the window's.
        self._is_sync = info.num_rounds.is_ready()

    def wait(self) -> tuple[WindowInfo, float, bool]:
        """Wait for the window.

        Returns:
          The info as NumPy arrays; the seconds the window took, compilation not
          counted; whether those were measured. They were not where the window was over
          before it was waited for: then they are only what it took to start it and to
          fetch the info.
        """
        asked_s = time.perf_counter()
        was_over = self._info.num_rounds.is_ready()
        info = jax.device_get(self._info)
        seconds = time.perf_counter() - self._start_s
        if was_over:
            seconds -= asked_s - self._told_s
        return info, seconds, self._is_sync or not was_over


def _abstract(tree: Any) -> Any:
    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype)

    return jax.tree.map(leaf, tree)


def signature(tree: Any) -> Hashable:
    """Return a hashable description of a pytree: structure, shapes, dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, x.dtype) for x in leaves)


class Engine:
    """The compiled programs of one policy and one acceptance rule.

    Holds executables only: parameters and states are arguments, so an engine lives
    across parameter updates. `compiled` maps a program's name to its executable in the
    order of compilation.
    """

    def __init__(self, policy: Policy, accept: AcceptRule) -> None:
        self.policy = policy
        self.accept: AcceptRule = accept
        self.compiled: dict[tuple[Any, ...], CompiledProgram] = {}
        self.compile_s = 0.0
        """Seconds spent compiling so far."""
        self._lock = threading.Lock()
        self._slowest_s: dict[str, float] = {}
        self._draft_kinds: dict[Hashable, str] = {}
        self.defaults: dict[Hashable, Any] = {}
        """Objects callers keep per engine, such as the controller of unnamed calls."""

    @property
    def rounds_per_test(self) -> int:
        """Rounds between exit tests: each reads a number back on an accelerator."""
        return 1 if jax.default_backend() == "cpu" else 4

    @functools.cached_property
    def position_bytes(self) -> int:
        """Device bytes of one position of one row: cache, token, log-probability."""
        state = jax.eval_shape(lambda: steps.empty_state(self.policy, 1, 1))
        sized = (state.cache, state.tokens, state.logprobs)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sized))

    def _program(
        self, name: tuple[Any, ...], function: Any, lower: Callable[[Any], Any]
    ) -> CompiledProgram:
        if name not in self.compiled:
            start = time.perf_counter()
            call = lower(function).compile()
            # JAX keeps what it compiles for a function as long as the function lives;
            # here programs are to live as long as their engine.
            function.clear_cache()
            seconds = time.perf_counter() - start
            kind = name[0]
            with self._lock:
                self.compiled[name] = CompiledProgram(call=call, compile_s=seconds)
                self.compile_s += seconds
                self._slowest_s[kind] = max(seconds, self._slowest_s.get(kind, 0.0))
        return self.compiled[name]

    def allocate(self, rows: int, cache_length: int) -> DecodeState:
        """Return a state of `rows` empty slots of `cache_length` positions."""
        program = self._program(
            ("allocate", rows, cache_length),
            run_allocation,
            lambda f: f.lower(self.policy, rows, cache_length),
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
            lambda f: f.lower(self.policy, *_abstract(arguments)),
        )
        return program.call(*arguments)

    def has_take(self, state: DecodeState, rows: int, length: int) -> bool:
        """Whether a state can be given this size without compiling anything."""
        if (state.rows, state.cache_length) == (rows, length):
            return True
        name = ("take", state.rows, state.cache_length, rows, length)
        return name in self.compiled

    def take(self, state: DecodeState, rows: np.ndarray, length: int) -> DecodeState:
        """Move rows (`NONE` for an empty one) to a state of another size."""
        rows = np.asarray(rows, np.int32)
        name = ("take", state.rows, state.cache_length, len(rows), length)
        program = self._program(
            name,
            run_take,
            lambda f: f.lower(*_abstract((state, rows)), cache_length=length),
        )
        return program.call(state, rows)

    def draft_kind(self, draft: Params) -> str:
        """Return a short name for all drafts of these shapes and dtypes."""
        number = len(self._draft_kinds)
        return self._draft_kinds.setdefault(signature(draft), f"draft {number}")

    def _window_name(
        self, program: Program, draft_kind: str | None, num_stop_ids: int
    ) -> tuple[Any, ...]:
        # AR programs are the same whatever the draft is, or if there is none.
        kind = draft_kind if program.gamma else None
        return ("window", *program, num_stop_ids, kind)

    def has_window(self, program: Program, draft_kind: str, num_stop_ids: int) -> bool:
        """Whether this window is compiled for such drafts and so many stop ids."""
        return self._window_name(program, draft_kind, num_stop_ids) in self.compiled

    def expected_compile_s(self, kind: str) -> float:
        """Return the seconds one more program of a kind should take to compile."""
        return self._slowest_s.get(kind, 1.0)

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
    ) -> tuple[DecodeState, RunningWindow]:
        """Run one window, and do not wait for it.

        Args:
          params: target and draft. state: donated. settings: traced sampling settings.
          gamma: drafts per round. exit_live, max_rounds: see `run_window`.
          draft_kind: of `params.draft`, for callers of many windows, who need to find
            it only once.
        Returns:
          The state after the window, and what is to be waited for.
        """
        if gamma == 0:
            params = PolicyParams(policy=params.policy, draft=None)
        limits = (np.int32(exit_live), np.int32(max_rounds))
        arguments = (params, state, settings, *limits)
        compiled = self._window(arguments, gamma, draft_kind)
        start = time.perf_counter()
        state, info, text = compiled.call(*arguments)
        return state, RunningWindow(info, text, start)

    def _window(
        self, arguments: tuple[Any, ...], gamma: int, draft_kind: str | None
    ) -> CompiledProgram:
        params, state, settings, *_ = arguments
        if gamma and draft_kind is None:
            draft_kind = self.draft_kind(params.draft)
        program = Program(state.rows, state.cache_length, gamma)
        return self._program(
            self._window_name(program, draft_kind, len(settings.stop_ids)),
            run_window,
            lambda f: f.lower(
                self.policy,
                *_abstract(arguments),
                gamma=gamma,
                accept=self.accept,
                rounds_per_test=self.rounds_per_test,
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
          programs: which. progress: show a progress bar.
        """
        # The setting of a `with` block holds for its own thread only.
        is_wide = jax.dtypes.canonicalize_dtype(np.float64) == np.float64

        def compile_one(program: Program) -> None:
            rows, length, gamma = program
            with jax.enable_x64(is_wide):
                state = jax.eval_shape(
                    lambda: steps.empty_state(self.policy, rows, length)
                )
                own = params if gamma else PolicyParams(params.policy, draft=None)
                zero = np.int32(0)
                self._window((own, state, settings, zero, zero), gamma, None)

        with (
            concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(total=len(programs), unit="program", disable=not progress) as bar,
        ):
            for _ in pool.map(compile_one, programs):
                bar.update()

    def attach_draft(self, params: Params, config: DrafterConfig) -> PolicyParams:
        """Derive the draft of bare policy parameters."""
        program = self._program(
            ("attach", config),
            run_attach,
            lambda f: f.lower(_abstract(params), config=config),
        )
        return PolicyParams(policy=params, draft=program.call(params))

    def find_nonfinite(self, params: Params) -> list[str]:
        """Return the paths of floating-point leaves that hold NaN or infinity."""
        program = self._program(
            ("finite",), run_finite_check, lambda f: f.lower(_abstract(params))
        )
        flags = jax.device_get(program.call(params))
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        return [path for path, good in zip(paths, flags, strict=True) if not good]


MAX_ENGINES = 16
_engines: collections.OrderedDict[Hashable, Engine] = collections.OrderedDict()


def engine_for(policy: Policy, params: Params, accept: AcceptRule) -> Engine:
    """Return the engine of this policy, these parameter shapes and this rule.

    Engines are kept, least recently used last out, so that calls of `rollout` share
    programs without the caller holding anything.
    """
    name = (policy, signature(params), accept)
    engine = _engines.pop(name, None) or Engine(policy, accept)
    _engines[name] = engine
    while len(_engines) > MAX_ENGINES:
        _engines.popitem(last=False)
    return engine


def forget_engines() -> None:
    """Drop all kept engines with their programs and controllers.

    For processes that go through many models or shapes: on CPU some hundred compiled
    programs use up the memory mappings that Linux allows a process.
    """
    _engines.clear()


def device_memory_bytes() -> int | None:
    """Return the memory of the default device in bytes, None where it is unknown."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
