"""The jitted functions: windows of rounds, admission, moves, drafts.

A window is a compiled loop of rounds. It ends when the host has something to decide:
few enough rows are live, a number of rounds is reached, or a row would outgrow the
cache. Sampling settings, stop ids, limits and keys are traced. The state is donated and
aliased; one `WindowInfo` goes back to the host.

`engine.Engine` compiles the functions ahead of time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from er_jax import drafter, kv_cache, prefill, steps
from er_jax.acceptance import AcceptRule
from er_jax.drafter import (
    DrafterConfig,
    PolicyParams,
    check_number,
    drafter_configs,
)
from er_jax.engine.protocol import ROWS, SAME, Layout, OneDevice, TokenBuffers
from er_jax.settings import marked
from er_jax.types import (
    Admission,
    Cache,
    Continuation,
    DecodeState,
    Params,
    Policy,
    Sampling,
    Span,
    WindowInfo,
)

ONE_DEVICE = OneDevice()

# A window's state, its rounds so far, and counts of row-rounds, `[2, G + 1]`.
Carry: TypeAlias = tuple[DecodeState, jax.Array, jax.Array]


@functools.partial(
    jax.jit,
    static_argnames=(
        "policy",
        "gamma",
        "accept",
        "truncated",
        "span",
        "rounds_per_test",
        "layout",
        "scales_inside",
    ),
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
    truncated: bool = True,
    span: Span | None = None,
    layout: Layout = ONE_DEVICE,
    scales_inside: bool = False,
) -> tuple[DecodeState, WindowInfo, TokenBuffers]:
    """Run rounds until at most `exit_live` rows are live, `max_rounds` at most.

    Args:
      policy, params, state, settings: as in `steps.decode_round`.
      exit_live: int32 `[]`. max_rounds: int32 `[]`.
      gamma, accept, truncated: static, as in `steps.decode_round`.
      span: static; the positions that drafts see, None for all.
      rounds_per_test: static; rounds between two exit tests. A test reads one number
        back (on a mesh, a sum over devices); up to `rounds_per_test - 1` rounds run
        idle at the end.
      layout: static; how the arrays lie on devices.
      scales_inside: static; whether the program is compiled with the options of
        `lowering` for `drafter.with_scales_inside`.
    Returns:
      The state; the window's info; copies of the state's tokens and log-probabilities,
      from which rows that ended can be fetched while the next window runs.
    Effects: donates `state`.
    """
    if scales_inside:
        params = drafter.with_scales_inside(params)
    window = functools.partial(
        _window,
        policy,
        gamma=gamma,
        accept=accept,
        truncated=truncated,
        span=span,
        rounds_per_test=rounds_per_test,
        layout=layout,
    )
    marks = (SAME, ROWS, marked(settings, ROWS, SAME), SAME, SAME)
    run = layout.over_rows(window, marks, (ROWS, SAME, ROWS))
    state, info, buffers = run(params, state, settings, exit_live, max_rounds)
    return layout.lay_out(state, policy), info, buffers


def _window(
    policy: Policy,
    params: PolicyParams,
    state: DecodeState,
    settings: Sampling,
    exit_live: jax.Array,
    max_rounds: jax.Array,
    *,
    gamma: int,
    accept: AcceptRule,
    truncated: bool,
    span: Span | None,
    rounds_per_test: int,
    layout: Layout,
) -> tuple[DecodeState, WindowInfo, TokenBuffers]:
    """Run the rounds of one data shard; arguments as in `run_window`."""
    reach = rounds_per_test * (gamma + 1)

    def goes_on(carry: Carry) -> jax.Array:
        state, num_rounds, _ = carry
        needed = jnp.minimum(state.length + reach, state.limit)
        is_full = state.live & (needed > state.cache_length)
        tests = jnp.stack([state.live, is_full]).astype(jnp.int32)
        num_live, num_full = layout.sum(jnp.sum(tests, axis=1, dtype=jnp.int32))
        return (num_live > exit_live) & (num_rounds < max_rounds) & (num_full == 0)

    def one_round(
        _: Any, carry: tuple[DecodeState, jax.Array]
    ) -> tuple[DecodeState, jax.Array]:
        state, counts = carry
        state, info = steps.decode_round(
            policy, params, state, settings, gamma=gamma, accept=accept,
            truncated=truncated, is_any=layout.is_any,
        )  # fmt: skip
        kinds = jnp.arange(gamma + 1, dtype=jnp.int32)
        found = jnp.stack([info.num_accepted, jnp.maximum(info.num_emitted - 1, 0)])
        is_kind = found[..., None] == kinds[None, None]
        is_kind &= info.is_live[None, :, None]
        return state, counts + jnp.sum(is_kind, axis=1, dtype=jnp.int32)

    def several(carry: Carry) -> Carry:
        state, num_rounds, counts = carry
        if rounds_per_test == 1:
            state, counts = one_round(0, (state, counts))
        else:
            state, counts = lax.fori_loop(
                0, rounds_per_test, one_round, (state, counts)
            )
        return state, num_rounds + rounds_per_test, counts

    state = steps.begin_window(state, span, gamma)
    start = (state, jnp.int32(0), jnp.zeros((2, gamma + 1), jnp.int32))
    state, num_rounds, counts = lax.while_loop(goes_on, several, start)
    state = steps.end_window(state)
    counts = layout.sum(counts)
    rows = jnp.stack([state.live.astype(jnp.int32), state.length, state.finish_reason])
    live, length, finish_reason = layout.all_rows(rows)
    info = WindowInfo(
        live=live != 0,
        length=length,
        finish_reason=finish_reason,
        num_rounds=num_rounds,
        accepted=counts[0],
        emitted=counts[1],
    )
    return state, info, (state.tokens, state.logprobs)


@functools.partial(
    jax.jit, static_argnames=("policy", "layout"), donate_argnames=("state",)
)
def run_admission(
    policy: Policy,
    params: Params,
    state: DecodeState,
    admission: Admission,
    *,
    layout: Layout = ONE_DEVICE,
) -> DecodeState:
    """Start sequences in free slots; see `prefill.admit`. Donates `state`."""
    marks = jax.tree.map(lambda x: ROWS if x.ndim else SAME, admission)
    admit = functools.partial(prefill.admit, policy)
    run = layout.over_rows(admit, (SAME, ROWS, marks), ROWS)
    return layout.lay_out(run(params, state, admission), policy)


@functools.partial(
    jax.jit, static_argnames=("policy", "chunk", "piece"), donate_argnames=("state",)
)
def run_going_on(
    policy: Policy,
    params: Params,
    state: DecodeState,
    continuation: Continuation,
    *,
    chunk: int,
    piece: int,
) -> DecodeState:
    """Have rows of one device go on; see `prefill.go_on`. Donates `state`."""
    return prefill.go_on(policy, params, state, continuation, chunk=chunk, piece=piece)


@functools.partial(jax.jit, static_argnames=("length",))
def run_copy_out(state: DecodeState, row: jax.Array, *, length: int) -> Cache:
    """Return a copy of the first `length` entries of a row, leaves `[1, length, ...]`.

    Args:
      state: of at least `length` positions. row: int32 `[]`.
    """

    def one(leaf: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(leaf, row, 1, axis=0)

    return kv_cache.resize(jax.tree.map(one, state.cache), length)


@functools.partial(jax.jit, donate_argnames=("state",))
def run_copy_in(
    state: DecodeState, entries: Cache, row: jax.Array, count: jax.Array
) -> DecodeState:
    """Overwrite the entries of a row with the first `count` of others, then zeros.

    Args:
      state: donated. entries: from `run_copy_out` or `run_extension`, of any length.
      row, count: int32 `[]`.
    """
    zero = jnp.int32(0)
    longest = max(leaf.shape[1] for leaf in jax.tree.leaves(entries))
    length = min(longest, state.cache_length)
    # Of a longer prompt, only these entries are the row's.
    own = kv_cache.copy_row(kv_cache.resize(entries, length), zero, zero, count)
    cache = kv_cache.insert_row(state.cache, own, row, zero, count)
    return dataclasses.replace(state, cache=cache)


@functools.partial(jax.jit, static_argnames=("policy", "length", "layout"))
def run_extension(
    policy: Policy,
    params: Params,
    entries: Cache,
    tokens: jax.Array,
    start: jax.Array,
    count: jax.Array,
    *,
    length: int,
    layout: Layout = ONE_DEVICE,
) -> Cache:
    """Return a prompt's entries from those of one that begins alike: `extend`."""
    run = layout.over_rows(
        functools.partial(prefill.extend, policy, length=length),
        (SAME, ROWS, ROWS, SAME, SAME),
        ROWS,
    )
    return run(params, entries, tokens, start, count)


@functools.partial(jax.jit, static_argnames=("cache_length",))
def run_take(state: DecodeState, rows: jax.Array, *, cache_length: int) -> DecodeState:
    """Move rows to a state of another size; see `steps.take`."""
    return steps.take(state, rows, cache_length)


@functools.partial(
    jax.jit, static_argnames=("policy", "rows", "cache_length", "layout")
)
def run_allocation(
    policy: Policy, rows: int, cache_length: int, *, layout: Layout = ONE_DEVICE
) -> DecodeState:
    """Allocate a state of empty slots; see `steps.empty_state`."""
    return layout.lay_out(steps.empty_state(policy, rows, cache_length), policy)


def derive_draft(params: Params, *, config: DrafterConfig) -> Params:
    """Return the draft alone; a jitted function would copy a returned policy."""
    return drafter.attach_draft(params, config).draft


run_attach = jax.jit(derive_draft, static_argnames=("config",))


@functools.partial(
    jax.jit, static_argnames=("config",), donate_argnames=("old",), keep_unused=True
)
def run_refresh(params: Params, old: Params, *, config: DrafterConfig) -> Params:
    """Derive the draft into the buffers of the old one. Donates `old`."""
    del old  # An argument only so that its buffers are reused.
    return drafter.attach_draft(params, config).draft


def refresh_draft(
    params: PolicyParams, config: DrafterConfig | Sequence[DrafterConfig]
) -> PolicyParams:
    """Requantize the policy into the buffers of its old draft, or of several.

    For callers whose parameter update is not jitted as a whole. Inside a jit that
    donates the old parameters, `attach_draft` has the same effect.

    Args:
      params: policy and old drafts; these are donated and must not be used again.
      config: how to quantize; several for as many drafts.
    Returns:
      The same policy with its new drafts.
    Raises:
      ValueError: not as many configs as drafts.
    """
    configs = drafter_configs(config)
    check_number(params, configs)
    draft, *others = (
        run_refresh(params.policy, old, config=one.quantization)
        for old, one in zip(params.drafts, configs, strict=True)
    )
    return PolicyParams(policy=params.policy, draft=draft, others=tuple(others))


@functools.partial(jax.jit, static_argnames=("layout",))
def run_finite_check(params: Params, *, layout: Layout = ONE_DEVICE) -> list[jax.Array]:
    """Return, per floating-point leaf, whether all of it is finite."""
    found = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(params)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return layout.replicate(found)
