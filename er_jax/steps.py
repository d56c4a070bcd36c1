"""The steps of decoding: the round, moving rows to another state.

They are pure functions of (policy, params, state); nothing here is compiled, donated or
timed. A row begins with its prompt's cache entries for all but the last token
(`prefill`). Every round feeds the last known token, so the first token comes out of an
ordinary round.

A round drafts gamma tokens with the draft parameters (provisional cache entries), runs
the target once over the last token and all drafts (its own entries overwrite them), and
emits what the acceptance rule allows. Rejected drafts are dropped by not advancing
`length`. gamma = 0 drafts nothing: it is one autoregressive step.

A row's inputs end before its limit: the last token of a completion is never an input,
so nothing is fed at position `limit - 1` or later.

Non-finite entries: attention multiplies all entries of a row, those that a query may
not see by zero, and zero times NaN is NaN. So the entry of a token that was only
drafted can make the logits of earlier tokens non-finite. A row with such logits and
drafts is verified again with the same drafts, one position at a time, so that no later
entry exists yet (`_verify`); afterwards the drafts' entries are cleared. Drafting anew
instead would not be exact: whether drafts are given up would depend on their tokens.

Drafts may see a span of the positions only (`begin_window`). Their entries are then
written to rings, which get the target's entries after every round. The cache itself
then holds only entries that the target has computed.

Left out: starting rows (`prefill`), the loop over rounds (`engine`), every decision
(`scheduler`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from er_jax import acceptance, bias, kv_cache, sampling, stops
from er_jax.acceptance import AcceptRule
from er_jax.drafter import PolicyParams, draft_params
from er_jax.types import (
    NONE,
    DecodeState,
    Finish,
    Params,
    Policy,
    Purpose,
    RoundInfo,
    Sampling,
    Span,
)


def empty_state(policy: Policy, rows: int, cache_length: int) -> DecodeState:
    """Return a state of empty slots: `rows` rows of `cache_length` positions."""

    def full(value: int) -> jax.Array:
        return jnp.full(rows, value, jnp.int32)

    return DecodeState(
        tokens=jnp.zeros((rows, cache_length), jnp.int32),
        logprobs=jnp.zeros((rows, cache_length), jnp.float32),
        length=full(0),
        prompt_length=full(0),
        limit=full(0),
        sequence_id=full(NONE),
        live=jnp.zeros(rows, jnp.bool_),
        finish_reason=full(Finish.RUNNING),
        cache=kv_cache.resize(policy.init_cache(rows, cache_length), cache_length),
    )


def take(state: DecodeState, rows: jax.Array, cache_length: int) -> DecodeState:
    """Gather rows into a state of another size: compaction, growth, or both.

    Args:
      state: B rows of S positions.
      rows: int32 `[R]`, the old row of each new row; `NONE` makes an empty one.
      cache_length: positions of the new state; every live row must fit.
    Returns:
      The state of R rows and `cache_length` positions.
    """
    index = jnp.maximum(rows, 0)
    taken = jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), state)
    return dataclasses.replace(
        taken,
        tokens=kv_cache.resize(taken.tokens, cache_length),
        logprobs=kv_cache.resize(taken.logprobs, cache_length),
        live=taken.live & (rows >= 0),
        sequence_id=jnp.where(rows >= 0, taken.sequence_id, NONE),
        cache=kv_cache.resize(taken.cache, cache_length),
    )


def begin_window(state: DecodeState, span: Span | None, gamma: int) -> DecodeState:
    """Return the state with the rings that drafts see a span in; None needs none."""
    if span is None:
        return state
    with jax.named_scope("cache"):
        rings = kv_cache.rings(state.cache, span, state.length, gamma)
    return dataclasses.replace(state, draft_cache=rings)


def end_window(state: DecodeState) -> DecodeState:
    """Return the state as it is between windows, without rings."""
    return dataclasses.replace(state, draft_cache=None)


def decode_round(
    policy: Policy,
    params: PolicyParams,
    state: DecodeState,
    settings: Sampling,
    *,
    gamma: int,
    accept: AcceptRule,
    truncated: bool = True,
    is_any: Callable[[jax.Array], jax.Array] = jnp.any,
) -> tuple[DecodeState, RoundInfo]:
    """Run one round: gamma draft passes, one target pass, accept, emit, advance.

    Args:
      policy: the model. params: target and draft parameters.
      state: live rows advance by 1 .. gamma + 1 tokens; the others stay.
      settings: traced sampling settings, key and stop ids.
      gamma: drafts per round; 0 is one autoregressive step.
      accept: the acceptance rule.
      truncated: False leaves top-k and top-p out; see `sampling.is_truncated`.
      is_any: reduces flags bool `[B]` to bool `[]`, true if any is set. It covers all
        rows that run target passes together, because all devices of a mesh must run
        equally many.
    Returns:
      The new state, and what the round did.
    """
    kv_cache.check_room(state.cache, state.cache_length, gamma)
    last = jnp.take_along_axis(
        state.tokens, jnp.maximum(state.length - 1, 0)[:, None], axis=1
    )[:, 0]
    drafted = jnp.zeros((state.rows, 0), jnp.int32)
    draft_logprobs = None
    if gamma:
        with jax.named_scope("draft"):
            state, drafted, draft_logprobs = _draft(
                policy, draft_params(params), state, last, settings, gamma, accept,
                truncated,
            )  # fmt: skip
    with jax.named_scope("verify"):
        tokens = jnp.concatenate([last[:, None], drafted], axis=1)
        positions = _positions(state, _offsets(gamma + 1))
        hidden, cache, is_bad = _verify(
            policy, params.policy, state, tokens, positions, is_any
        )
        logits = policy.logits(params.policy, hidden)
        drawn_from = _biased(state, settings, logits)
        is_finite = sampling.is_distribution(drawn_from)
        # `_emit` drops tokens of bad logits.
        with jax.named_scope("sample"):
            if accept == "coupled":
                # The target's draws are emitted; drafts only say how many.
                position = state.length[:, None] + _offsets(gamma + 1)
                noise = _token_noise(state, settings, logits, position)
                emitted = sampling.draw(drawn_from, settings, noise, truncated)
                logits = bias.of_kind(logits, drawn_from, settings)
                logprobs = sampling.drawn_logprobs(logits, emitted, settings, truncated)
            else:
                target = sampling.target_logprobs(drawn_from, settings, truncated)
    with jax.named_scope("accept"):
        if accept == "coupled":
            num_accepted = acceptance.coupled_num_accepted(drafted, emitted)
        else:
            num_accepted, emitted = _accept(
                state, settings, target, draft_logprobs, drafted, accept
            )
            logprobs = sampling.token_logprobs(logits, target, emitted, settings)
    with jax.named_scope("emit"):
        state = dataclasses.replace(state, cache=cache)
        state, info = _emit(state, settings, emitted, logprobs, num_accepted, is_finite)
        if gamma:
            cache = _forget_from_last(state, is_bad)
            state = dataclasses.replace(state, cache=cache)
        if state.draft_cache is not None:
            rings = kv_cache.update_rings(state.draft_cache, state.cache, positions)
            state = dataclasses.replace(state, draft_cache=rings)
        return state, info


def _offsets(count: int) -> jax.Array:
    """Return 0 .. count-1, int32 `[1, count]`."""
    return jnp.arange(count, dtype=jnp.int32)[None]


def _positions(state: DecodeState, offsets: jax.Array) -> jax.Array:
    """Return positions `[B, T]` of inputs at `length - 1 + offsets`.

    `NONE` in dead rows, and where no token can follow before the limit.
    """
    positions = state.length[:, None] - 1 + offsets
    is_fed = state.live[:, None] & (positions < state.limit[:, None] - 1)
    return jnp.where(is_fed, positions, NONE)


def _verify(
    policy: Policy,
    params: Params,
    state: DecodeState,
    tokens: jax.Array,
    positions: jax.Array,
    is_any: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, kv_cache.Cache, jax.Array]:
    """Run the target over the last token and the drafts of every row.

    The first turn of the loop runs all positions at once. Rows whose hidden states then
    hold NaN run again, one position per turn, so that no token meets the entry of a
    later one.

    Returns:
      hidden `[B, G+1, *]`, the cache, and whether a row ran again, bool `[B]`.
    """
    count = tokens.shape[1]
    if count == 1:
        hidden, cache = policy.forward(params, tokens, positions, state.cache)
        return hidden, cache, jnp.zeros(state.rows, jnp.bool_)
    offsets = _offsets(count)
    shape, _ = jax.eval_shape(policy.forward, params, tokens, positions, state.cache)

    def goes_on(carry: tuple[jax.Array, ...]) -> jax.Array:
        turn, is_more = carry[:2]
        return (turn == 0) | ((turn <= count) & is_more)

    def run(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        turn, _, hidden, cache, is_bad = carry
        # Entries of the first turn are cleared before the second.
        again = dataclasses.replace(state, cache=cache)
        cache = _forget_from_last(again, is_bad & (turn == 1))
        is_fed = (turn == 0) | (is_bad[:, None] & (offsets == turn - 1))
        fed = jnp.where(is_fed, positions, NONE)
        new, cache = policy.forward(params, tokens, fed, cache)
        is_fed = (fed != NONE).reshape(fed.shape + (1,) * (new.ndim - 2))
        hidden = jnp.where(is_fed | (turn == 0), new, hidden)
        # A leak is zero times a non-finite entry: NaN, never infinity.
        is_nan = jnp.any(jnp.isnan(new) & is_fed, axis=range(1, new.ndim))
        is_bad = jnp.where(turn == 0, is_nan, is_bad)
        # Reduced here and not in `goes_on`: on a mesh it is a collective, and most
        # rounds then run it once.
        return turn + 1, is_any(is_bad), hidden, cache, is_bad

    start = (
        jnp.int32(0), jnp.bool_(False), jnp.zeros(shape.shape, shape.dtype),
        state.cache, jnp.zeros(state.rows, jnp.bool_),
    )  # fmt: skip
    *_, hidden, cache, is_bad = lax.while_loop(goes_on, run, start)
    return hidden, cache, is_bad


def _forget_from_last(state: DecodeState, which: jax.Array) -> kv_cache.Cache:
    """Zero the entries of flagged rows from their last token on, row by row."""

    def clear(
        carry: tuple[jax.Array, kv_cache.Cache],
    ) -> tuple[jax.Array, kv_cache.Cache]:
        pending, cache = carry
        row = jnp.argmax(pending)
        cache = kv_cache.copy_row(cache, row, row, state.length[row] - 1)
        return pending.at[row].set(False), cache

    start = (which, state.cache)
    return lax.while_loop(lambda carry: jnp.any(carry[0]), clear, start)[1]


def _draft(
    policy: Policy,
    draft: Params,
    state: DecodeState,
    last: jax.Array,
    settings: Sampling,
    gamma: int,
    accept: AcceptRule,
    truncated: bool,
) -> tuple[DecodeState, jax.Array, jax.Array | None]:
    """Return the state with the drafts' entries, drafts `[B, G]`, and logprobs.

    The entries go to the rings, if there are any, else to the cache. Log-probabilities
    `[B, G, V]` are needed by all rules but the coupled one; None for that.
    """

    def propose(
        carry: tuple[kv_cache.Cache, jax.Array], depth: jax.Array
    ) -> tuple[tuple[kv_cache.Cache, jax.Array], tuple[jax.Array, ...]]:
        cache, token = carry
        positions = _positions(state, depth[None, None])
        hidden, cache = policy.forward(draft, token[:, None], positions, cache)
        logits = policy.logits(draft, hidden)[:, 0]
        logits = _biased(state, settings, logits, depth)
        with jax.named_scope("sample"):
            # A broken draft proposes uniformly.
            position = state.length + depth
            if accept == "coupled":
                noise = _token_noise(state, settings, logits, position)
                token = sampling.draw(logits, settings, noise, truncated)
                return (cache, token), (token,)
            logprobs = sampling.target_logprobs(logits, settings, truncated)
            noise = sampling.gumbel(
                settings, state.sequence_id, position, logits.shape[-1], logits.dtype,
                purpose=Purpose.DRAFT, start=state.length,
            )  # fmt: skip
            token = jnp.argmax(logprobs + noise, axis=-1).astype(jnp.int32)
            return (cache, token), (token, logprobs)

    depths = jnp.arange(gamma, dtype=jnp.int32)
    name = "cache" if state.draft_cache is None else "draft_cache"
    (cache, _), out = lax.scan(propose, (getattr(state, name), last), depths)
    state = dataclasses.replace(state, **{name: cache})
    tokens, *logprobs = (jnp.moveaxis(x, 0, 1) for x in out)
    return state, tokens, logprobs[0] if logprobs else None


def _biased(
    state: DecodeState,
    settings: Sampling,
    logits: jax.Array,
    depth: jax.Array | None = None,
) -> jax.Array:
    """Return the logits that tokens are drawn from.

    Args:
      logits: `[B, V]` after `depth` drafts, int32 `[]`; or `[B, T, V]`, after none to
        T - 1 drafts.
    """
    if settings.bias is None:
        return logits
    if depth is None:
        position = state.length[:, None] + _offsets(logits.shape[1])
    else:
        position = state.length + depth
    return bias.biased(logits, settings, position)


def _token_noise(
    state: DecodeState, settings: Sampling, logits: jax.Array, position: jax.Array
) -> jax.Array:
    """Return the noise that draft and target share, by sequence id and position."""
    sequence_id = state.sequence_id.reshape((-1,) + (1,) * (position.ndim - 1))
    return sampling.gumbel(
        settings, sequence_id, position, logits.shape[-1], logits.dtype
    )


def _accept(
    state: DecodeState,
    settings: Sampling,
    target: jax.Array,
    draft: jax.Array | None,
    drafted: jax.Array,
    accept: AcceptRule,
) -> tuple[jax.Array, jax.Array]:
    """Apply the rules `token` and `block`.

    Returns:
      Kept drafts `[B]`, tokens to emit `[B, G+1]` (invalid past kept + 1).
    """
    gamma = drafted.shape[1]
    offsets = _offsets(gamma + 1)
    # Both rules look at drafts that they then reject, so the noise is keyed by the
    # round's start as well: the same position in a later round needs fresh noise.
    start, weight = state.length, jnp.ones(state.rows, target.dtype)
    num_accepted = jnp.zeros(state.rows, jnp.int32)
    if gamma:
        assert draft is not None
        uniforms = sampling.uniform(
            settings, state.sequence_id[:, None], start[:, None] + offsets[:, :-1],
            target.dtype, purpose=Purpose.ACCEPT, start=start[:, None],
        )  # fmt: skip
        if accept == "token":
            probs = acceptance.token_accept_probs(target, draft, drafted)
            num_accepted = acceptance.token_num_accepted(probs, uniforms)
        else:
            chances, weights = acceptance.block_accept_probs(target, draft, drafted)
            num_accepted = acceptance.block_num_accepted(chances, uniforms)
            weight = jnp.take_along_axis(weights, num_accepted[:, None], axis=1)[:, 0]
    else:
        draft = jnp.zeros((state.rows, 0, target.shape[-1]), target.dtype)
    residual = acceptance.residual_logprobs(target, draft, num_accepted, weight)
    noise = sampling.gumbel(
        settings, state.sequence_id, start + num_accepted, target.shape[-1],
        target.dtype, purpose=Purpose.RESIDUAL, start=start,
    )  # fmt: skip
    final = jnp.argmax(residual + noise, axis=-1).astype(jnp.int32)
    padded = jnp.pad(drafted, ((0, 0), (0, 1)))
    emitted = jnp.where(offsets == num_accepted[:, None], final[:, None], padded)
    return num_accepted, emitted


def _emit(
    state: DecodeState,
    settings: Sampling,
    emitted: jax.Array,
    logprobs: jax.Array,
    num_accepted: jax.Array,
    is_finite: jax.Array,
) -> tuple[DecodeState, RoundInfo]:
    """End the emitted tokens at stops, limits and bad logits, and advance the rows."""
    offsets = jnp.arange(emitted.shape[1], dtype=jnp.int32)[None]
    is_stop = jnp.any(emitted[..., None] == settings.stop_ids[None, None], axis=-1)
    if settings.stop_sequences is not None:
        is_stop |= stops.ends(state.tokens, state.length, emitted, settings)
    first_stop = jnp.min(
        jnp.where(is_stop, offsets, jnp.int32(emitted.shape[1])), axis=-1
    )
    wanted = jnp.minimum(num_accepted, first_stop) + 1
    wanted = jnp.minimum(wanted, state.limit - state.length)
    num_finite = acceptance.count_leading(is_finite)
    num_emitted = jnp.where(state.live, jnp.minimum(wanted, num_finite), 0)
    length = state.length + num_emitted

    reason = jnp.where(length >= state.limit, Finish.LENGTH, Finish.RUNNING)
    reason = jnp.where(first_stop < num_emitted, Finish.STOP, reason)
    reason = jnp.where(num_finite < wanted, Finish.NONFINITE, reason)
    reason = jnp.where(state.live, reason, state.finish_reason).astype(jnp.int32)

    positions = state.length[:, None] + offsets
    positions = jnp.where(offsets < num_emitted[:, None], positions, NONE)
    new_state = dataclasses.replace(
        state,
        tokens=kv_cache.write(state.tokens, emitted, positions),
        logprobs=kv_cache.write(state.logprobs, logprobs, positions),
        length=length,
        live=state.live & (reason == Finish.RUNNING),
        finish_reason=reason,
    )
    info = RoundInfo(
        num_accepted=num_accepted, num_emitted=num_emitted, is_live=state.live
    )
    return new_state, info
