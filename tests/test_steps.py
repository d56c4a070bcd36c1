"""Admission, rounds and moves by hand: what they write, and what they leave alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from er_jax import prefill, sampling, steps
from er_jax.drafter import PolicyParams
from er_jax.types import NONE, Admission, DecodeState, Finish, LogprobKind, Sampling
from tests.small import POLICY

ROWS, S, T, CHUNK = 6, 24, 8, 2

PROMPTS = (
    [3, 1, 4, 1, 5, 9, 2, 6],
    [5],
    [8, 9, 7],
    [23, 0, 23, 0],
    [2, 7, 1, 8, 2],
)


# Rounds are compared with rounds; with distributions and replays at XLA's default
# level, tests/test_lossless.py and tests/test_replay.py compare them.
pytestmark = pytest.mark.usefixtures("unoptimized_module")


@pytest.fixture(scope="module")
def params() -> PolicyParams:
    policy, draft = (POLICY.init(jax.random.key(seed)) for seed in (0, 1))
    # The draft is another model altogether: most of what it proposes is rejected.
    return PolicyParams(policy=policy, draft=draft)


def settings(**changes: Any) -> Sampling:
    values: dict[str, Any] = {
        "key": np.array([1, 2], np.uint32),
        "temperature": np.float32(1),
        "top_k": np.int32(0),
        "top_p": np.float32(1),
        "min_p": np.float32(0),
        "stop_ids": np.full(2, NONE, np.int32),
        "logprob_kind": np.int32(LogprobKind.RAW),
    }
    return Sampling(**(values | changes))


def admission(
    prefills: Sequence[tuple[int, Sequence[int]]],
    clones: Sequence[tuple[int, int, int]] = (),
    *,
    limit: int = S,
) -> Admission:
    """Start sequences: (prompt, slots) to prefill, (prompt, from, to) to clone.

    Sequence ids are 100 + slot; the limit is the same for all.
    """
    num_prompts = 6
    order = [(slot, i) for i, (_, slots) in enumerate(prefills) for slot in slots]
    prompts = [prompt for prompt, _ in prefills]
    for prompt, _, to in clones:
        prompts.append(prompt)
        order.append((to, len(prompts) - 1))
    tokens = np.zeros((num_prompts, T), np.int32)
    length = np.zeros(num_prompts, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(PROMPTS[prompt])] = PROMPTS[prompt]
        length[i] = len(PROMPTS[prompt])
    sizes = np.array([len(slots) for _, slots in prefills] + [0] * num_prompts)
    num_rows = sizes[:num_prompts].reshape(-1, CHUNK).sum(axis=1)

    def padded(values: Sequence[int], fill: int) -> np.ndarray:
        return np.array([*values, *[fill] * (ROWS - len(values))], np.int32)

    return Admission(
        tokens=tokens,
        length=length,
        num_chunks=np.int32(-(-len(prefills) // CHUNK)),
        slot=padded([slot for slot, _ in order], ROWS),
        prompt=padded([i for _, i in order], 0),
        sequence_id=padded([100 + slot for slot, _ in order], NONE),
        limit=padded([limit] * len(order), 0),
        first_row=(np.cumsum(num_rows) - num_rows).astype(np.int32),
        num_rows=num_rows.astype(np.int32),
        num_clones=np.int32(len(clones)),
        clone_from=padded([source for _, source, _ in clones], 0),
        clone_to=padded([to for _, _, to in clones], 0),
        clone_length=padded([len(PROMPTS[prompt]) for prompt, _, _ in clones], 0),
    )


admit = functools.partial(jax.jit(prefill.admit, static_argnums=0), POLICY)
_decode_round = jax.jit(
    steps.decode_round, static_argnums=0, static_argnames=("gamma", "accept")
)
take = jax.jit(steps.take, static_argnums=2)


@jax.jit
def forward(params: Any, tokens: Any, positions: Any) -> tuple[jax.Array, Any]:
    """Return logits and cache of whole sequences, in one pass."""
    cache = POLICY.init_cache(tokens.shape[0], tokens.shape[1])
    hidden, cache = POLICY.forward(params, tokens, positions, cache)
    return POLICY.logits(params, hidden), cache


def entries_of(params: Any, tokens: Any, count: Any) -> tuple[np.ndarray, ...]:
    """Return the cache `[B, S, ...]` that the first `count` tokens of rows leave."""
    offsets = np.arange(tokens.shape[1], dtype=np.int32)[None]
    positions = np.where(offsets < np.asarray(count)[:, None], offsets, NONE)
    return tuple(
        np.asarray(leaf)
        for leaf in jax.tree.leaves(forward(params, np.asarray(tokens), positions)[1])
    )


def decode_round(
    params: PolicyParams, state: DecodeState, config: Sampling, **options: Any
) -> tuple[DecodeState, Any]:
    """Run a round, of which there is one program: states differ in weak types."""
    return _decode_round(POLICY, params, host(state), config, **options)


def empty() -> DecodeState:
    return steps.empty_state(POLICY, ROWS, S)


def host(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def assert_rows_equal(a: DecodeState, b: DecodeState, rows: Sequence[int]) -> None:
    """Bit for bit, every field."""
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x[list(rows)], y[list(rows)]),
        host(a),
        host(b),
    )


def test_an_empty_state() -> None:
    state = empty()
    assert (state.rows, state.cache_length) == (ROWS, S)
    assert not state.live.any()
    assert (state.sequence_id == NONE).all()
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(state.cache)} == {(ROWS, S)}


# Admission.


@pytest.fixture(scope="module")
def started(params: PolicyParams) -> DecodeState:
    """Three prompts in two chunks and five rows; row 3 stays empty."""
    plan = admission([(0, [4, 0]), (1, [5]), (2, [2, 1])], limit=17)
    return host(admit(params.policy, empty(), plan))


@pytest.mark.parametrize("piece", [1, 3, 4])
def test_a_prompt_may_be_prefilled_in_pieces(
    params: PolicyParams,
    started: DecodeState,
    piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pieces that divide the prompts or not; seven, two and seven tokens are fed."""
    monkeypatch.setattr(prefill, "PIECE", piece)
    plan = admission([(0, [4, 0]), (1, [5]), (2, [2, 1])], limit=17)
    in_pieces = jax.jit(lambda *given: prefill.admit(POLICY, *given))
    found = host(in_pieces(params.policy, empty(), plan))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), found, started
    )


def test_prefill_is_what_forward_gives(
    params: PolicyParams, started: DecodeState
) -> None:
    prompt_of = {4: 0, 0: 0, 5: 1, 2: 2, 1: 2}
    tokens = np.zeros((ROWS, S), np.int32)
    for slot, prompt in prompt_of.items():
        tokens[slot, : len(PROMPTS[prompt])] = PROMPTS[prompt]
    count = np.array([7, 2, 2, 0, 7, 0])  # all but the last token
    for leaf, wanted in zip(
        jax.tree.leaves(started.cache),
        entries_of(params.policy, tokens, count),
        strict=True,
    ):
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-5)
        for slot in range(ROWS):
            assert (leaf[slot, : count[slot]] != 0).any() == (count[slot] > 0)
            assert (leaf[slot, count[slot] :] == 0).all()
    np.testing.assert_array_equal(started.tokens, tokens)
    np.testing.assert_array_equal(started.length, [8, 3, 3, 0, 8, 1])
    np.testing.assert_array_equal(started.prompt_length, started.length)
    np.testing.assert_array_equal(started.limit, [17, 17, 17, 0, 17, 17])
    np.testing.assert_array_equal(started.sequence_id, [100, 101, 102, -1, 104, 105])
    np.testing.assert_array_equal(started.live, [1, 1, 1, 0, 1, 1])
    assert (started.finish_reason == Finish.RUNNING).all()
    assert (started.logprobs == 0).all()


def test_completions_of_a_prompt_have_the_same_entries(started: DecodeState) -> None:
    for leaf in jax.tree.leaves(started.cache):
        np.testing.assert_array_equal(leaf[0], leaf[4])
        np.testing.assert_array_equal(leaf[1], leaf[2])
        assert not np.array_equal(leaf[0], leaf[1])


def test_a_slot_is_overwritten_whole(params: PolicyParams) -> None:
    """Nothing of the last sequence is left, and no other row is touched."""
    old = empty()
    rng = np.random.default_rng(0)
    spoilt = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), old)
    spoilt = dataclasses.replace(
        spoilt,
        cache=jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), old.cache),
        logprobs=np.full((ROWS, S), np.nan, np.float32),
        finish_reason=np.full(ROWS, Finish.NONFINITE, np.int32),
        live=np.arange(ROWS) % 2 == 0,
    )
    plan = admission([(0, [4]), (3, [1])])
    fresh = admit(params.policy, old, plan)
    reused = admit(params.policy, spoilt, plan)
    assert_rows_equal(reused, fresh, [1, 4])
    assert_rows_equal(reused, spoilt, [0, 2, 3, 5])


def test_clones_equal_prefills_bit_for_bit(params: PolicyParams) -> None:
    first = admit(params.policy, empty(), admission([(0, [0]), (2, [3])]))
    # Rows go on generating before they are cloned: only the prompt may be copied.
    ran = first
    for _ in range(3):
        ran, _ = decode_round(params, ran, settings(), gamma=2, accept="coupled")
    cloned = admit(params.policy, ran, admission([], [(0, 0, 1), (2, 3, 5), (0, 1, 2)]))
    filled = admit(params.policy, empty(), admission([(0, [1, 2]), (2, [5])]))
    assert_rows_equal(cloned, filled, [1, 2, 5])
    assert_rows_equal(cloned, ran, [0, 3, 4])


def test_a_clone_may_overwrite_its_source(params: PolicyParams) -> None:
    first = admit(params.policy, empty(), admission([(0, [0])]))
    ran, _ = decode_round(params, first, settings(), gamma=2, accept="coupled")
    again = admit(params.policy, ran, admission([(3, [4])], [(0, 0, 0)]))
    wanted = admit(params.policy, empty(), admission([(0, [0]), (3, [4])]))
    assert_rows_equal(again, wanted, [0, 4])


def test_clones_come_before_prefills(params: PolicyParams) -> None:
    """A prefill may land on the row that a clone was made from."""
    first = admit(params.policy, empty(), admission([(0, [0])]))
    moved = admit(params.policy, first, admission([(2, [0])], [(0, 0, 1)]))
    wanted = admit(params.policy, empty(), admission([(0, [1]), (2, [0])]))
    assert_rows_equal(moved, wanted, [0, 1])


# Moving rows.


@pytest.mark.parametrize("length", [S, 32, 16])
def test_take_gathers_rows(started: DecodeState, length: int) -> None:
    rows = np.array([4, 1, NONE, 0], np.int32)
    taken = host(take(started, rows, length))
    assert (taken.rows, taken.cache_length) == (4, length)
    np.testing.assert_array_equal(taken.live, [1, 1, 0, 1])
    np.testing.assert_array_equal(taken.sequence_id, [104, 101, NONE, 100])
    kept = min(length, S)
    for new, old in ((0, 4), (1, 1), (3, 0)):
        for field in ("length", "prompt_length", "limit", "finish_reason"):
            assert getattr(taken, field)[new] == getattr(started, field)[old]
        pairs = [(taken.tokens, started.tokens), (taken.logprobs, started.logprobs)]
        leaves = (jax.tree.leaves(state.cache) for state in (taken, started))
        for after, before in [*pairs, *zip(*leaves, strict=True)]:
            np.testing.assert_array_equal(after[new, :kept], before[old, :kept])
            assert (after[new, kept:] == 0).all()


def test_moved_rows_go_on_as_before(params: PolicyParams, started: DecodeState) -> None:
    """Compacted, reordered and grown: the same tokens, and the same noise."""
    rows = np.array([5, 2, 0], np.int32)
    stayed, moved = started, take(started, rows, 32)
    for _ in range(3):
        stayed, _ = decode_round(params, stayed, settings(), gamma=2, accept="coupled")
        moved, _ = decode_round(params, moved, settings(), gamma=2, accept="coupled")
    np.testing.assert_array_equal(moved.length, stayed.length[rows])
    np.testing.assert_array_equal(moved.tokens[:, :S], stayed.tokens[rows])
    np.testing.assert_allclose(
        moved.logprobs[:, :S], stayed.logprobs[rows], rtol=0, atol=1e-5
    )


# Rounds.


@pytest.mark.parametrize("gamma", [0, 2])
def test_rounds_emit_the_targets_own_noised_argmax(
    params: PolicyParams, started: DecodeState, gamma: int
) -> None:
    state = started
    for _ in range(4):
        before = state
        state, info = decode_round(
            params, state, settings(), gamma=gamma, accept="coupled"
        )
        grown = np.asarray(state.length) - np.asarray(before.length)
        np.testing.assert_array_equal(info.num_emitted, grown)
        np.testing.assert_array_equal(
            grown[started.live], info.num_accepted[started.live] + 1
        )
    # One pass over the result, without draft, cache or rounds, says what to emit.
    positions = np.tile(np.arange(S, dtype=np.int32), (ROWS, 1))
    logits, _ = forward(params.policy, state.tokens, positions)
    noised = sampling.noised_logprobs(
        logits,
        settings(),
        jnp.asarray(state.sequence_id)[:, None],
        jnp.asarray(positions + 1),
    )
    draws, full = np.argmax(noised, axis=-1), np.asarray(jax.nn.log_softmax(logits))
    tokens, logprobs = np.asarray(state.tokens), np.asarray(state.logprobs)
    num_checked = 0
    for row in np.flatnonzero(started.live):
        for at in range(S):
            if started.length[row] <= at < state.length[row]:
                assert tokens[row, at] == draws[row, at - 1]
                wanted = full[row, at - 1, tokens[row, at]]
                assert logprobs[row, at] == pytest.approx(wanted, abs=1e-5)
                num_checked += 1
            else:
                assert logprobs[row, at] == 0
    assert num_checked >= 20


@pytest.mark.parametrize("accept", ["coupled", "token", "block"])
def test_the_cache_holds_the_targets_entries(
    params: PolicyParams, started: DecodeState, accept: Any
) -> None:
    """After any round: of positions 0 .. length-2, whatever the draft left there."""
    state, rejected = started, 0
    for _ in range(3):
        state, info = decode_round(params, state, settings(), gamma=2, accept=accept)
        rejected += int((2 - info.num_accepted)[started.live].sum())
        count = np.where(started.live, np.asarray(state.length) - 1, 0)
        wanted = entries_of(params.policy, state.tokens, count)
        for leaf, want in zip(jax.tree.leaves(state.cache), wanted, strict=True):
            for row in range(ROWS):
                known = slice(0, count[row])
                np.testing.assert_allclose(
                    leaf[row, known], want[row, known], rtol=0, atol=1e-5
                )
    assert rejected > 5


@pytest.mark.parametrize("gamma", [0, 2])
def test_what_lies_beyond_the_length_changes_nothing(
    params: PolicyParams, started: DecodeState, gamma: int
) -> None:
    """Any finite poison, in cache, tokens and log-probabilities: bit for bit."""
    positions = np.arange(S)
    beyond = positions[None] >= np.maximum(started.length - 1, 0)[:, None]

    def poisoned(value: float) -> Any:
        return lambda leaf: np.where(
            beyond.reshape(ROWS, S, *[1] * (leaf.ndim - 2)), value, leaf
        ).astype(leaf.dtype)

    after_tokens = positions[None] >= started.length[:, None]
    poison = dataclasses.replace(
        started,
        tokens=np.where(after_tokens, 13, started.tokens).astype(np.int32),
        cache=jax.tree.map(poisoned(1e30), started.cache),
    )
    clean = started
    for _ in range(3):
        clean, _ = decode_round(
            params, clean, settings(), gamma=gamma, accept="coupled"
        )
        poison, _ = decode_round(
            params, poison, settings(), gamma=gamma, accept="coupled"
        )
    np.testing.assert_array_equal(poison.length, clean.length)
    for row in np.flatnonzero(started.live):
        known = slice(0, int(clean.length[row]))
        for field in ("tokens", "logprobs"):
            np.testing.assert_array_equal(
                getattr(poison, field)[row, known], getattr(clean, field)[row, known]
            )


def test_rows_that_are_not_live_are_left_alone(
    params: PolicyParams, started: DecodeState
) -> None:
    live = started.live & (np.arange(ROWS) != 1)
    state = dataclasses.replace(
        started,
        live=live,
        finish_reason=np.where(live, 0, Finish.STOP).astype(np.int32),
    )
    after, info = decode_round(params, state, settings(), gamma=2, accept="coupled")
    assert_rows_equal(after, state, [1, 3])
    np.testing.assert_array_equal(info.is_live, live)
    assert (info.num_emitted[~live] == 0).all()
    # And who they are makes no difference to the others.
    full, _ = decode_round(params, started, settings(), gamma=2, accept="coupled")
    assert_rows_equal(after, full, [0, 2, 4, 5])


def test_a_perfect_draft_is_kept_whole(
    params: PolicyParams, started: DecodeState
) -> None:
    same = PolicyParams(policy=params.policy, draft=params.policy)
    for accept in ("coupled", "token", "block"):
        _, info = decode_round(same, started, settings(), gamma=2, accept=accept)
        assert (info.num_accepted[started.live] == 2).all()
        assert (info.num_emitted[started.live] == 3).all()


def test_greedy_rounds_equal_greedy_steps(
    params: PolicyParams, started: DecodeState
) -> None:
    greedy = settings(temperature=np.float32(0))
    one, many = started, started
    for _ in range(9):
        one, _ = decode_round(params, one, greedy, gamma=0, accept="coupled")
        many, _ = decode_round(params, many, greedy, gamma=2, accept="coupled")
    shortest = int(one.length[started.live].min())
    np.testing.assert_array_equal(
        np.asarray(one.tokens)[started.live, :shortest],
        np.asarray(many.tokens)[started.live, :shortest],
    )
    assert (np.asarray(many.length) >= np.asarray(one.length)).all()


def test_limits_end_rows_inside_a_draft(
    params: PolicyParams, started: DecodeState
) -> None:
    same = PolicyParams(policy=params.policy, draft=params.policy)
    limit = (started.length + np.arange(ROWS) % 4).astype(np.int32)
    state = dataclasses.replace(
        started, limit=limit, live=started.live & (limit > started.length)
    )
    after, info = decode_round(same, state, settings(), gamma=2, accept="coupled")
    for row in np.flatnonzero(state.live):
        emitted = min(3, int(limit[row] - started.length[row]))
        assert info.num_emitted[row] == emitted
        is_over = started.length[row] + emitted == limit[row]
        assert bool(after.live[row]) == (not is_over)
        assert after.finish_reason[row] == (Finish.LENGTH if is_over else 0)
        # What was cut off left no trace.
        assert (np.asarray(after.logprobs)[row, limit[row] :] == 0).all()


def test_a_stop_inside_a_draft_ends_the_row(
    params: PolicyParams, started: DecodeState
) -> None:
    same = PolicyParams(policy=params.policy, draft=params.policy)
    free, _ = decode_round(same, started, settings(), gamma=2, accept="coupled")
    row = 0
    start = int(started.length[row])
    emitted = np.asarray(free.tokens)[row, start : start + 3]
    for at, token in enumerate(emitted):
        first = int(np.argmax(emitted == token))
        stops = settings(stop_ids=np.array([NONE, token], np.int32))
        after, info = decode_round(same, started, stops, gamma=2, accept="coupled")
        assert info.num_emitted[row] == first + 1 <= at + 1
        assert after.finish_reason[row] == Finish.STOP
        assert not after.live[row]
        assert after.tokens[row, start + first] == token
    # A stop that is the last token allowed is a stop.
    tight = dataclasses.replace(
        started, limit=np.where(np.arange(ROWS) == row, start + 1, S).astype(np.int32)
    )
    stops = settings(stop_ids=np.array([emitted[0], NONE], np.int32))
    after, _ = decode_round(same, tight, stops, gamma=2, accept="coupled")
    assert after.finish_reason[row] == Finish.STOP


@pytest.mark.parametrize("gamma", [0, 2])
def test_a_bad_row_ends_and_the_others_go_on(
    params: PolicyParams, started: DecodeState, gamma: int
) -> None:
    bad = jax.tree.map(lambda x: np.array(x), started.cache)
    for leaf in jax.tree.leaves(bad):
        leaf[4, 0] = np.nan
    state = dataclasses.replace(started, cache=bad)
    after, info = decode_round(params, state, settings(), gamma=gamma, accept="coupled")
    clean, _ = decode_round(params, started, settings(), gamma=gamma, accept="coupled")
    assert after.finish_reason[4] == Finish.NONFINITE
    assert info.num_emitted[4] == 0
    assert after.length[4] == started.length[4]
    assert not after.live[4]
    assert_rows_equal(after, clean, [0, 1, 2, 3, 5])


def test_a_broken_draft_costs_nothing_but_time(
    params: PolicyParams, started: DecodeState
) -> None:
    """Not-a-number everywhere in the draft: the target's tokens all the same."""
    spoilt = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params.policy)
    broken = PolicyParams(policy=params.policy, draft=spoilt)
    one, many = started, started
    for _ in range(3):
        one, _ = decode_round(params, one, settings(), gamma=0, accept="coupled")
        many, _ = decode_round(broken, many, settings(), gamma=2, accept="coupled")
    assert (np.asarray(many.finish_reason) == 0).all()
    for row in np.flatnonzero(started.live):
        known = slice(0, int(one.length[row]))
        np.testing.assert_array_equal(many.tokens[row, known], one.tokens[row, known])
