"""Compiled programs: the only module with `jax.jit` and donation.

A window is a compiled loop of rounds that ends when the host has something to decide:
few enough rows are live, a round count is reached, or a row would outgrow the cache.
It is named by `types.Program`: (rows, cache length, gamma). Sampling settings, stop
ids, limits and keys are traced. The state is donated and aliased; what comes back to
the host is one `WindowInfo`.

Programs are compiled ahead of time and kept here, so that compile time is known apart
from run time and the host can ask what is compiled before it decides.

On a mesh, the devices that share one copy of the weights are a *group*. Each group runs
the same program on rows of its own (`over_groups`) and hears of the others only in the
exit test, in what the host is told, and in moves of rows. Inside of a group the
compiler cuts the program as the parameters are cut. For few rows all groups become one:
`Engine.joint` has the programs of that. Where the mesh spans processes, all of them
must call the same methods in the same order; what they measure is made one
(`Engine.agree`).

Threads may call the methods of one engine side by side: each program is compiled once,
and whoever wants it meanwhile waits. Not on a mesh that spans processes: these could
not call in the same order then.

Left out: which program to run (`control`), when (`scheduler`).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from er_jax import drafter, sharding, steps
from er_jax.acceptance import AcceptRule
from er_jax.drafter import DrafterConfig, PolicyParams
from er_jax.types import (
    DATA_AXIS,
    NONE,
    Admission,
    DecodeState,
    Moves,
    Params,
    Policy,
    Program,
    Sampling,
    WindowInfo,
)

# Tokens int32 `[B, S]` and log-probabilities float32 `[B, S]`.
Text: TypeAlias = tuple[jax.Array, jax.Array]

# Bytes of a text that processes agree on are sent in blocks of so many.
TEXT_BLOCK = 1 << 14

WHOLE, ROWS = PartitionSpec(), PartitionSpec(DATA_AXIS)


def over_groups(mesh: Mesh | None, function: Any, in_specs: Any, out_specs: Any) -> Any:
    """Return a function that every group of devices runs on its own rows."""
    if mesh is None:
        return function
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={DATA_AXIS},
        check_vma=False,
    )


def _laid_out(state: DecodeState, policy: Policy, mesh: Mesh | None) -> DecodeState:
    """Have the compiler lay out a state by the rules, so that it is given in place."""
    if mesh is None:
        return state
    where = sharding.state_shardings(state, policy, mesh)
    return lax.with_sharding_constraint(state, where)


@functools.partial(
    jax.jit,
    static_argnames=("policy", "gamma", "accept", "rounds_per_test", "mesh"),
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
    mesh: Mesh | None = None,
) -> tuple[DecodeState, WindowInfo, Text]:
    """Run rounds until `exit_live` or fewer rows are live; at least none, at most max.

    Args:
      policy, params, state, settings: as in `steps.decode_round`.
      exit_live: int32 `[]`. max_rounds: int32 `[]`.
      gamma, accept: static, as in `steps.decode_round`.
      rounds_per_test: static; rounds between two exit tests. A test reads one number
        back (and is a collective on a mesh); up to this many rounds minus one run idle
        at the end.
      mesh: static; of `sharding.rollout_mesh`, None for one device.
    Returns:
      The state; what the host needs to know; copies of the state's tokens and
      log-probabilities, for rows that ended: they may be fetched while the next window
      runs on the state.
    Effects: donates `state`.
    """
    reach = rounds_per_test * (gamma + 1)

    def total(x: jax.Array) -> jax.Array:
        return x if mesh is None else lax.psum(x, DATA_AXIS)

    def is_any(rows: jax.Array) -> jax.Array:
        # Where devices send to each other within a pass, all groups run as many.
        found = jnp.any(rows)
        is_apart = mesh is None or mesh.size == mesh.shape[DATA_AXIS]
        return found if is_apart else total(found.astype(jnp.int32)) > 0

    def of_all(rows: jax.Array) -> jax.Array:
        return (
            rows
            if mesh is None
            else lax.all_gather(rows, DATA_AXIS, axis=1, tiled=True)
        )

    def window(
        params: PolicyParams,
        state: DecodeState,
        settings: Sampling,
        exit_live: jax.Array,
        max_rounds: jax.Array,
    ) -> tuple[DecodeState, WindowInfo, Text]:
        def goes_on(carry: tuple[DecodeState, jax.Array, jax.Array]) -> jax.Array:
            state, num_rounds, _ = carry
            needed = jnp.minimum(state.length + reach, state.limit)
            is_full = state.live & (needed > state.cache_length)
            tests = jnp.stack([state.live, is_full]).astype(jnp.int32)
            num_live, num_full = total(jnp.sum(tests, axis=1, dtype=jnp.int32))
            return (num_live > exit_live) & (num_rounds < max_rounds) & (num_full == 0)

        def one_round(
            _: Any, carry: tuple[DecodeState, jax.Array]
        ) -> tuple[DecodeState, jax.Array]:
            state, counts = carry
            state, info = steps.decode_round(
                policy, params, state, settings, gamma=gamma, accept=accept,
                is_any=is_any,
            )  # fmt: skip
            kinds = jnp.arange(gamma + 1, dtype=jnp.int32)
            found = jnp.stack([info.num_accepted, jnp.maximum(info.num_emitted - 1, 0)])
            is_kind = found[..., None] == kinds[None, None]
            is_kind &= info.is_live[None, :, None]
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
        counts = total(counts)
        rows = jnp.stack(
            [state.live.astype(jnp.int32), state.length, state.finish_reason]
        )
        live, length, finish_reason = of_all(rows)
        info = WindowInfo(
            live=live != 0,
            length=length,
            finish_reason=finish_reason,
            num_rounds=num_rounds,
            accepted=counts[0],
            emitted=counts[1],
        )
        return state, info, (state.tokens, state.logprobs)

    run = over_groups(
        mesh, window, (WHOLE, ROWS, WHOLE, WHOLE, WHOLE), (ROWS, WHOLE, ROWS)
    )
    state, info, text = run(params, state, settings, exit_live, max_rounds)
    return _laid_out(state, policy, mesh), info, text


@functools.partial(
    jax.jit, static_argnames=("policy", "mesh"), donate_argnames=("state",)
)
def run_admission(
    policy: Policy,
    params: Params,
    state: DecodeState,
    admission: Admission,
    *,
    mesh: Mesh | None = None,
) -> DecodeState:
    """Start sequences in free slots; see `steps.admit`. Donates `state`."""
    parts = jax.tree.map(lambda x: ROWS if x.ndim else WHOLE, admission)
    run = over_groups(
        mesh, functools.partial(steps.admit, policy), (WHOLE, ROWS, parts), ROWS
    )
    return _laid_out(run(params, state, admission), policy, mesh)


@functools.partial(jax.jit, static_argnames=("cache_length",))
def run_take(state: DecodeState, rows: jax.Array, *, cache_length: int) -> DecodeState:
    """Move rows to a state of another size; see `steps.take`."""
    return steps.take(state, rows, cache_length)


@functools.partial(jax.jit, static_argnames=("policy", "cache_length", "mesh"))
def run_take_over(
    policy: Policy,
    state: DecodeState,
    rows: jax.Array,
    moves: Moves,
    *,
    cache_length: int,
    mesh: Mesh,
) -> DecodeState:
    """Move rows within and between groups; see `steps.take`, `steps.exchange`."""

    def move(state: DecodeState, rows: jax.Array, moves: Moves) -> DecodeState:
        taken = steps.take(state, rows, cache_length)
        if mesh.shape[DATA_AXIS] == 1:
            return taken
        return steps.exchange(state, taken, moves, DATA_AXIS)

    run = over_groups(mesh, move, (ROWS, ROWS, WHOLE), ROWS)
    return _laid_out(run(state, rows, moves), policy, mesh)


@functools.partial(jax.jit, static_argnames=("policy", "rows", "cache_length", "mesh"))
def run_allocation(
    policy: Policy, rows: int, cache_length: int, *, mesh: Mesh | None = None
) -> DecodeState:
    """Allocate a state of empty slots; see `steps.empty_state`."""
    return _laid_out(steps.empty_state(policy, rows, cache_length), policy, mesh)


def _same(tree: Any) -> Any:
    """Return arrays as they are; for programs that only lay them out anew."""
    return tree


def derive_draft(params: Params, *, config: DrafterConfig) -> Params:
    """Derive the draft alone (the policy would be copied if it were returned)."""
    return drafter.attach_draft(params, config).draft


run_attach = jax.jit(derive_draft, static_argnames=("config",))


@functools.partial(
    jax.jit, static_argnames=("config",), donate_argnames=("old",), keep_unused=True
)
def run_refresh(params: Params, old: Params, *, config: DrafterConfig) -> Params:
    """Derive the draft into the buffers of the old one. Donates `old`."""
    del old  # Unused on purpose: kept as an argument so that its buffers are reused.
    return drafter.attach_draft(params, config).draft


@functools.partial(jax.jit, static_argnames=("mesh",))
def run_finite_check(params: Params, *, mesh: Mesh | None = None) -> list[jax.Array]:
    """Return, per floating-point leaf, whether all of it is finite."""
    found = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(params)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if mesh is None:
        return found
    return lax.with_sharding_constraint(found, NamedSharding(mesh, WHOLE))


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
    """An executable, and what its compilation took here."""

    call: Callable[..., Any]
    compile_s: float


class _Own(threading.local):
    """What compilation has cost one thread.

    seconds: of compiling, and of waiting for others that did. compiled: name and
      seconds of all that this thread compiled, in order.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.compiled: list[tuple[tuple[Any, ...], float]] = []


class _Books:
    """What an engine has compiled, and how long that took."""

    def __init__(self) -> None:
        self.compiled: dict[tuple[Any, ...], CompiledProgram] = {}
        self.slowest_s: dict[str, float] = {}
        self.own = _Own()
        self.lock = threading.Lock()
        self._under_way: dict[tuple[Any, ...], threading.Lock] = {}

    def program(
        self, key: tuple[Any, ...], make: Callable[[], tuple[CompiledProgram, float]]
    ) -> CompiledProgram:
        """Return an executable, made first if it is not there.

        A thread that asks while another makes it waits; if that one fails it makes it
        itself. Other programs are made meanwhile.

        Args:
          key: its name. make: returns it, and the seconds that the next one of its
            kind is expected to take.
        """
        start = time.perf_counter()
        with self.lock:
            under_way = self._under_way.setdefault(key, threading.Lock())
        with under_way:
            found = self.compiled.get(key)
            if found is not None:
                self.own.seconds += time.perf_counter() - start
                return found
            found, expected_s = make()
            kind = key[0]
            with self.lock:
                self.compiled[key] = found
                self.slowest_s[kind] = max(expected_s, self.slowest_s.get(kind, 0.0))
                del self._under_way[key]
        self.own.seconds += found.compile_s
        self.own.compiled.append((key, found.compile_s))
        return found


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
          fetch the info. Several processes measure each for itself.
        """
        asked_s = time.perf_counter()
        was_over = self._info.num_rounds.is_ready()
        info = jax.device_get(self._info)
        seconds = time.perf_counter() - self._start_s
        if was_over:
            seconds -= asked_s - self._told_s
        return info, seconds, self._is_sync or not was_over


def _abstract(tree: Any, where: Any = None) -> Any:
    """Return shapes and dtypes, with the sharding given for each leaf or for all."""

    def leaf(x: Any, cut: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=cut)

    if where is None or isinstance(where, NamedSharding):
        return jax.tree.map(lambda x: leaf(x, where), tree)
    return jax.tree.map(leaf, tree, where)


def signature(tree: Any, mesh: Mesh | None = None) -> Hashable:
    """Return a hashable description of a pytree: structure, shapes, dtypes, cuts."""
    leaves, structure = jax.tree.flatten(tree)

    def describe(x: Any) -> tuple[Any, ...]:
        if mesh is None:
            return x.shape, x.dtype
        return x.shape, x.dtype, sharding.on_mesh(x.sharding, mesh)

    return structure, tuple(describe(x) for x in leaves)


def plan_moves(
    rows: np.ndarray, old_rows: int, num_groups: int
) -> tuple[np.ndarray, Moves]:
    """Tell apart the rows that stay in their group of devices and those that do not.

    Args:
      rows: int `[R]`, which old row each new one is, of all groups; `NONE` for none.
      old_rows: rows before. num_groups: groups, each with as many rows.
    Returns:
      int32 `[R]`, for each new row the old one counted within its group, `NONE` where
      there is none or it comes from another group; and the moves between groups.
    """
    old_each, new_each = old_rows // num_groups, len(rows) // num_groups
    to = np.arange(len(rows))
    group, is_some = rows // old_each, rows != NONE
    is_moved = is_some & (group != to // new_each)
    local = np.where(is_some & ~is_moved, rows % old_each, NONE)
    moved = np.flatnonzero(is_moved)

    def padded(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, len(rows) - len(values))).astype(np.int32)

    return local.astype(np.int32), Moves(
        count=np.int32(len(moved)),
        from_group=padded(group[moved]),
        from_row=padded(rows[moved] % old_each),
        to_group=padded(moved // new_each),
        to_row=padded(moved % new_each),
    )


def fetch_rows(
    text: Text, rows: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return tokens and log-probabilities `[S]` of rows, to be copied and not kept.

    They may be the device's own buffers, and hold on to all the rows. Of several
    processes each gets the rows that it is the first to hold; every row is one's.
    """
    if not isinstance(text[0], jax.Array) or text[0].is_fully_addressable:
        tokens, logprobs = jax.device_get(text)
        return {int(row): (tokens[row], logprobs[row]) for row in rows}
    where, here = text[0].sharding, jax.process_index()
    first: dict[int, int] = {}
    held: Any = where.devices_indices_map(text[0].shape)
    for device, (part, *_) in held.items():
        start = part.start or 0
        first[start] = min(device.process_index, first.get(start, device.process_index))
    found = {}
    tokens, logprobs = (
        {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        for x in text
    )
    for start, part in tokens.items():
        own = [row for row in rows.tolist() if start <= row < start + len(part)]
        if own and first[start] == here:
            pieces = jax.device_get((part, logprobs[start]))
            for row in own:
                found[row] = tuple(piece[row - start] for piece in pieces)
    return found  # type: ignore[return-value]


class Engine:
    """The compiled programs of one policy and one acceptance rule.

    Holds executables only: parameters and states are arguments, so an engine lives
    across parameter updates. `compiled` maps a program's name to its executable in the
    order of compilation. On a mesh parameters and drafts must lie on it
    (`sharding.place`); what comes from the host is the same in all processes.

    owner: the engine whose groups of devices are one in this one; programs are kept
      there, under names of their own.
    """

    def __init__(
        self,
        policy: Policy,
        accept: AcceptRule,
        mesh: Mesh | None = None,
        *,
        owner: Engine | None = None,
    ) -> None:
        self.policy = policy
        self.accept: AcceptRule = accept
        self.mesh = mesh
        self.num_groups = 1 if mesh is None else mesh.shape[DATA_AXIS]
        """Groups of devices with rows of their own; they divide all numbers of rows."""
        devices: list[Any] = [] if mesh is None else list(mesh.devices.flat)
        processes = [device.process_index for device in devices]
        self.is_spread = len(set(processes)) > 1
        """Whether the mesh spans processes."""
        self.is_leader = not self.is_spread or processes[0] == jax.process_index()
        """Whether this is the process whose measurements count."""
        self._prefix = "" if owner is None else "joint "
        self._books: _Books = _Books() if owner is None else owner._books
        self._joint: Engine | None = None
        self._draft_kinds: dict[Hashable, str] = {}
        self.defaults: dict[Hashable, Any] = {}
        """Objects callers keep per engine, such as the controller of unnamed calls."""

    @property
    def compiled(self) -> dict[tuple[Any, ...], CompiledProgram]:
        """Executables by name, in the order of compilation."""
        return self._books.compiled

    @property
    def compile_s(self) -> float:
        """Seconds this thread has spent compiling, or waiting for one that does."""
        return self._books.own.seconds

    @property
    def compiled_here(self) -> list[tuple[tuple[Any, ...], float]]:
        """Name and seconds of all that this thread has compiled, in order."""
        return self._books.own.compiled

    @property
    def joint(self) -> Engine:
        """The engine of the same devices with all their groups as one; of a mesh."""
        with self._books.lock:
            if self._joint is None:
                mesh = sharding.joint_mesh(self._mesh)
                self._joint = Engine(self.policy, self.accept, mesh, owner=self)
        return self._joint

    @property
    def _mesh(self) -> Mesh:
        assert self.mesh is not None, "only called where there is one"
        return self.mesh

    @property
    def rounds_per_test(self) -> int:
        """Rounds between exit tests: each reads a number back on an accelerator."""
        return 1 if jax.default_backend() == "cpu" else 4

    @functools.cached_property
    def position_bytes(self) -> float:
        """Bytes of one position of one row: cache, token, log-probability.

        On a mesh, on each device, and divided by the groups: times all rows and their
        positions it is what a device holds.
        """
        shape = (self.num_groups, 1)
        state = jax.eval_shape(lambda: steps.empty_state(self.policy, *shape))
        if self.mesh is not None:
            where = sharding.state_shardings(state, self.policy, self.mesh)
            state = _abstract(state, where)
        sized = (state.cache, state.tokens, state.logprobs)
        return device_bytes(sized) / self.num_groups

    def agree(self, values: Any) -> np.ndarray:
        """Return the leading process's values, in every process.

        Args:
          values: numbers, as many in all processes; float32 keeps them.
        Returns:
          float32 `[N]` where the mesh spans processes, else the values unchanged.
        """
        return self.meet(values)[0]

    def meet(
        self, values: Any, failure: Exception | None = None
    ) -> tuple[np.ndarray, Exception | None]:
        """Agree on values, and on whether to go on.

        Args:
          values: as for `agree`. failure: what has failed in this process, if anything.
        Returns:
          The values, as `agree` does; and what is to be raised: the failure here, or
          that there is one elsewhere. None if all is well in every process.
        """
        if not self.is_spread:
            return np.asarray(values, np.float64), failure

        def first_and_any(parts: jax.Array) -> jax.Array:
            return jnp.append(parts[0, :-1], jnp.max(parts[:, -1]))

        # The process that has failed, counted from 1; of several the last.
        failed = 0 if failure is None else 1 + jax.process_index()
        own = np.append(np.asarray(values, np.float32), np.float32(failed))
        found = self._combine("agree", own[None], lambda _: own[None], first_and_any)
        if found[-1] and failure is None:
            failure = RuntimeError(
                f"another process has failed, process {int(found[-1]) - 1}; its own "
                "error says why"
            )
        return found[:-1], failure

    def _combine(
        self,
        name: str,
        own: np.ndarray,
        part: Callable[[Any], np.ndarray],
        function: Callable[[jax.Array], jax.Array],
    ) -> np.ndarray:
        """Lay out an array with a part `[1, ...]` for each device, and reduce it."""
        every = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        shape = (self._mesh.size, *own.shape[1:])
        spread = jax.make_array_from_callback(shape, every, part)
        key = (self._prefix + name, str(own.dtype), *shape)

        def make() -> tuple[CompiledProgram, float]:
            whole = NamedSharding(self._mesh, WHOLE)
            start = time.perf_counter()
            program = jax.jit(function, out_shardings=whole)
            call = program.lower(_abstract(spread, every)).compile()
            seconds = time.perf_counter() - start
            return CompiledProgram(call, seconds), seconds

        program = self.compiled.get(key) or self._books.program(key, make)
        return np.asarray(program.call(spread))

    def agree_text(self, text: str | None) -> str | None:
        """Return the leading process's text, or None if it has none."""
        if not self.is_spread:
            return text
        data = np.frombuffer((text or "").encode(), np.uint8)
        (size,) = self.agree([NONE if text is None else len(data)]).astype(int)
        if size < 0:
            return None
        padded = np.zeros(-(-max(size, 1) // TEXT_BLOCK) * TEXT_BLOCK)
        padded[: min(len(data), size)] = data[:size]
        return self.agree(padded)[:size].astype(np.uint8).tobytes().decode()

    def gather(self, own: np.ndarray) -> np.ndarray:
        """Return the sum of what the processes have, in every process.

        Args:
          own: int32 or float32, of one shape in all processes: zero where another one
            knows better.
        """
        if not self.is_spread:
            return own
        devices: list[Any] = list(self._mesh.devices.flat)
        here = [device.process_index == jax.process_index() for device in devices]
        mine, nothing = here.index(True), np.zeros_like(own)

        def part(index: Any) -> np.ndarray:
            return (own if (index[0].start or 0) == mine else nothing)[None]

        def add(parts: jax.Array) -> jax.Array:
            return jnp.sum(parts, axis=0, dtype=parts.dtype)

        return self._combine("gather", own[None], part, add)

    def _whole(self, tree: Any) -> Any:
        """Shapes of what comes from the host and is the same on every device."""
        where = None if self.mesh is None else NamedSharding(self.mesh, WHOLE)
        return _abstract(tree, where)

    def _shaped_params(self, params: Any) -> Any:
        if self.mesh is None:
            return _abstract(params)
        on_mesh = functools.partial(sharding.on_mesh, mesh=self.mesh)
        return _abstract(params, jax.tree.map(lambda x: on_mesh(x.sharding), params))

    def _shaped_state(self, state: DecodeState) -> Any:
        if self.mesh is None:
            return _abstract(state)
        where = sharding.state_shardings(state, self.policy, self.mesh)
        return _abstract(state, where)

    def _program(
        self, name: tuple[Any, ...], function: Any, lower: Callable[[Any], Any]
    ) -> CompiledProgram:
        """Return a program, compiled first if it is not there.

        Raises:
          RuntimeError: it cannot be compiled in another process. What fails here is
            raised as it is. Either way it is there in no process.
        """

        def make() -> tuple[CompiledProgram, float]:
            start, call, failure = time.perf_counter(), None, None
            try:
                call = lower(function).compile()
            except Exception as error:
                failure = error
            finally:
                # JAX keeps what it compiles for a function as long as the function
                # lives; here programs are to live as long as their engine.
                function.clear_cache()
            seconds = time.perf_counter() - start
            # Others would wait in this program for one that does not have it.
            (leading_s,), failure = self.meet([seconds], failure)
            if call is None or failure is not None:
                assert failure is not None
                raise failure
            # What decides is the same in all processes; what is told is each one's own.
            return CompiledProgram(call, seconds), float(leading_s)

        key = self._key(*name)
        return self.compiled.get(key) or self._books.program(key, make)

    def _key(self, kind: str, *rest: Any) -> tuple[Any, ...]:
        return (self._prefix + kind, *rest)

    def allocate(self, rows: int, cache_length: int) -> DecodeState:
        """Return a state of `rows` empty slots of `cache_length` positions."""
        program = self._program(
            ("allocate", rows, cache_length),
            run_allocation,
            lambda f: f.lower(self.policy, rows, cache_length, mesh=self.mesh),
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
                self._shaped_params(params.policy),
                self._shaped_state(state),
                self._shaped_admission(admission),
                mesh=self.mesh,
            ),
        )
        return program.call(*arguments)

    def _shaped_admission(self, admission: Admission) -> Any:
        if self.mesh is None:
            return _abstract(admission)
        spread, whole = (NamedSharding(self.mesh, spec) for spec in (ROWS, WHOLE))
        cuts = jax.tree.map(lambda x: spread if x.ndim else whole, admission)
        return _abstract(admission, cuts)

    def has_take(self, old: tuple[int, int], new: tuple[int, int]) -> bool:
        """Whether a state of a size (rows, length) can be given another right now."""
        return old == new or self._key("take", *old, *new) in self.compiled

    def take(self, state: DecodeState, rows: np.ndarray, length: int) -> DecodeState:
        """Move rows (`NONE` for an empty one) to a state of another size."""
        rows = np.asarray(rows, np.int32)
        name = ("take", state.rows, state.cache_length, len(rows), length)
        if self.mesh is not None:
            spread = NamedSharding(self.mesh, ROWS)
            local, moves = plan_moves(rows, state.rows, self.num_groups)
            program = self._program(
                name,
                run_take_over,
                lambda f: f.lower(
                    self.policy,
                    self._shaped_state(state),
                    _abstract(local, spread),
                    self._whole(moves),
                    cache_length=length,
                    mesh=self.mesh,
                ),
            )
            return program.call(state, local, moves)
        program = self._program(
            name,
            run_take,
            lambda f: f.lower(*_abstract((state, rows)), cache_length=length),
        )
        return program.call(state, rows)

    def joint_shapes(self, params: PolicyParams) -> Any:
        """Return the shapes of parameters with the shardings they have in `joint`.

        None where there is no such thing; see `sharding.joint_shardings`.
        """
        if self.mesh is None:
            return None
        where = sharding.joint_shardings(self.policy, params, self.joint._mesh)
        return None if where is None else _abstract(params, where)

    def join_params(self, params: PolicyParams) -> PolicyParams:
        """Return parameters for `joint`: every device keeps a part of what it holds."""
        where = jax.tree.map(lambda x: x.sharding, self.joint_shapes(params))
        kind = None if params.draft is None else self.draft_kind(params.draft)
        return self._relaid(
            ("join weights", kind), params, self._shaped_params(params), where
        )

    def has_move(self, kind: str, rows: int, length: int) -> bool:
        """Whether a state of this size can be moved now; kind: "join" or "part"."""
        return (kind, rows, length) in self.compiled

    def join(self, state: DecodeState) -> DecodeState:
        """Return a state for `joint`: all rows on every device, of some heads."""
        where = sharding.state_shardings(state, self.policy, self.joint._mesh)
        name = ("join", state.rows, state.cache_length)
        return self._relaid(name, state, self._shaped_state(state), where)

    def part(self, state: DecodeState) -> DecodeState:
        """Return a state of `joint` as this engine has it; the reverse of `join`."""
        here, joint = (
            sharding.state_shardings(state, self.policy, mesh)
            for mesh in (self._mesh, self.joint._mesh)
        )
        there = self._parted(joint)
        state = jax.tree.map(sharding.relabelled, state, there)
        program = self._program(
            ("part", state.rows, state.cache_length),
            jax.jit(_same, out_shardings=here),
            lambda f: f.lower(_abstract(state, there)),
        )
        return program.call(state)

    def _relaid(self, name: tuple[Any, ...], tree: Any, shaped: Any, where: Any) -> Any:
        """Lay arrays out for `joint`, in one program."""
        program = self._program(
            name,
            jax.jit(_same, out_shardings=self._parted(where)),
            lambda f: f.lower(shaped),
        )
        return jax.tree.map(sharding.relabelled, program.call(tree), where)

    def _parted(self, where: Any) -> Any:
        """Return shardings of `joint` in the words of this engine's mesh."""
        return jax.tree.map(lambda cut: sharding.as_parted(cut, self._mesh), where)

    def draft_kind(self, draft: Params) -> str:
        """Return a short name for all drafts of these shapes and dtypes."""
        name = signature(draft, self.mesh)
        with self._books.lock:
            number = len(self._draft_kinds)
            return self._draft_kinds.setdefault(name, f"draft {number}")

    def _window_name(
        self, program: Program, draft_kind: str | None, num_stop_ids: int
    ) -> tuple[Any, ...]:
        # AR programs are the same whatever the draft is, or if there is none.
        kind = draft_kind if program.gamma else None
        sizes = (program.rows, program.cache_length, program.gamma)
        return ("window", *sizes, num_stop_ids, kind)

    def has_window(self, program: Program, draft_kind: str, num_stop_ids: int) -> bool:
        """Whether this window is compiled for such drafts and so many stop ids."""
        name = self._window_name(program, draft_kind, num_stop_ids)
        return self._key(*name) in self.compiled

    def expected_compile_s(self, kind: str) -> float:
        """Return the seconds one more program of a kind should take to compile."""
        slowest_s = self._books.slowest_s
        # A move of rows is a small part of a window.
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
        params, state, settings, *limits = arguments
        if gamma and draft_kind is None:
            draft_kind = self.draft_kind(params.draft)
        program = Program(state.rows, state.cache_length, gamma)
        return self._program(
            self._window_name(program, draft_kind, len(settings.stop_ids)),
            run_window,
            lambda f: f.lower(
                self.policy,
                self._shaped_params(params),
                self._shaped_state(state),
                *self._whole((settings, *limits)),
                gamma=gamma,
                accept=self.accept,
                rounds_per_test=self.rounds_per_test,
                mesh=self.mesh,
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
            rows, length, gamma, _ = program
            with jax.enable_x64(is_wide):
                state = jax.eval_shape(
                    lambda: steps.empty_state(self.policy, rows, length)
                )
                own = params if gamma else PolicyParams(params.policy, draft=None)
                zero = np.int32(0)
                self._window((own, state, settings, zero, zero), gamma, None)

        # Processes must compile in the same order: they agree on what it took.
        threads = 1 if self.is_spread else os.cpu_count()
        with (
            concurrent.futures.ThreadPoolExecutor(threads) as pool,
            tqdm(total=len(programs), unit="program", disable=not progress) as bar,
        ):
            for _ in pool.map(compile_one, programs):
                bar.update()

    def attach_draft(self, params: Params, config: DrafterConfig) -> PolicyParams:
        """Derive the draft of bare policy parameters."""
        function = run_attach
        if self.mesh is not None:
            # Laid out as the weights are: a compiler's choice might be another.
            shaped = self._shaped_params(params)
            cuts = jax.tree.map(lambda x: x.sharding, shaped)
            draft = jax.eval_shape(
                functools.partial(derive_draft, config=config), shaped
            )
            where = sharding.draft_shardings(draft, cuts)
            function = jax.jit(
                derive_draft, static_argnames=("config",), out_shardings=where
            )
        program = self._program(
            ("attach", config),
            function,
            lambda f: f.lower(self._shaped_params(params), config=config),
        )
        return PolicyParams(policy=params, draft=program.call(params))

    def find_nonfinite(self, params: Params) -> list[str]:
        """Return the paths of floating-point leaves that hold NaN or infinity."""
        program = self._program(
            ("finite",),
            run_finite_check,
            lambda f: f.lower(self._shaped_params(params), mesh=self.mesh),
        )
        flags = jax.device_get(program.call(params))
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        return [path for path, good in zip(paths, flags, strict=True) if not good]


# Calls whose engines are kept; those that one call needs together count as one, however
# many they are.
MAX_ENGINES = 16
_engines: list[dict[Hashable, Engine]] = []
"""By name, together what one call needs; the least recently used first."""
_living: weakref.WeakValueDictionary[Hashable, Engine] = weakref.WeakValueDictionary()
"""All that somebody still holds: kept ones, and those of calls that have not ended."""
_engines_lock = threading.Lock()


def engine_for(
    policy: Policy, params: Params, accept: AcceptRule, mesh: Mesh | None = None
) -> Engine:
    """Return the engine of this policy, these parameter shapes, this rule and mesh.

    Engines are kept, least recently used first out, so that calls of `rollout` share
    programs without the caller holding anything.
    """
    return engines_for(policy, accept, [(params, mesh)])[0]


def engines_for(
    policy: Policy, accept: AcceptRule, places: Sequence[tuple[Params, Mesh | None]]
) -> list[Engine]:
    """Return an engine for each of several places; they are kept and dropped together.

    Args:
      policy, accept: as for `engine_for`.
      places: parameters and mesh of each; what a single call needs.
    """
    names: list[Hashable] = [
        (policy, signature(params, mesh), accept, mesh or default_device())
        for params, mesh in places
    ]
    with _engines_lock:
        own = {
            name: _living.get(name) or Engine(policy, accept, mesh)
            for name, (_, mesh) in zip(names, places, strict=True)
        }
        _living.update(own)
        whole = [kept for kept in _engines if own.keys() <= kept.keys()]
        for kept in () if whole else _engines:
            for name in own.keys() & kept.keys():
                del kept[name]
        latest = whole[0] if whole else own
        _engines[:] = [kept for kept in _engines if kept and kept is not latest]
        _engines.append(latest)
        del _engines[:-MAX_ENGINES]
        return [own[name] for name in names]


def forget_engines() -> None:
    """Drop all kept engines with their programs and controllers.

    For processes that go through many models or shapes: on CPU some hundred compiled
    programs use up the memory mappings that Linux allows a process. A call that another
    thread is in goes on with its own, which ends with it.
    """
    with _engines_lock:
        _engines.clear()
        _living.clear()


def default_device() -> jax.Device:
    """Return the device that programs without a mesh run on."""
    config: Any = jax.config
    device = config.jax_default_device
    if isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device or jax.local_devices()[0]


def device_bytes(tree: Any) -> int:
    """Return the bytes that arrays, or shapes with shardings, take on one device."""

    def size(x: Any) -> int:
        cut = getattr(x, "sharding", None)
        shape = x.shape if cut is None else cut.shard_shape(x.shape)
        entries = math.prod(shape)
        return entries // 2 if x.dtype == jnp.int4 else entries * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def device_memory_bytes() -> int | None:
    """Return the memory of one device here in bytes, None where it is unknown."""
    device = default_device()
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return host_memory_bytes() if device.platform == "cpu" else None


def host_memory_bytes() -> int | None:
    """Return the memory of this host in bytes, None where it is unknown."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
