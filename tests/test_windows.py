"""Layers that see a window: rings in the state of a rollout show what a mask shows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from er_jax import kv_cache, prefill, steps
from er_jax.request import request_of
from er_jax.scheduler.admission import Rows, plan_admission
from er_jax.types import NONE, RING_DRAFTS, Admission, Ring, Span

CONFIG = er_jax.DecoderConfig(
    vocab_size=400, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=32,
    window=5, global_layers=(1,), local_rope_theta=500.0, dtype="float64",
)  # fmt: skip
PROMPTS = [[3, 5, 7], [11] * 30 + [2, 3], [3, 5, 7], [13, 4, 17, 19, 5, 6, 7, 8, 9]]


def sample(policy: er_jax.Decoder, params: Any, **changes: Any) -> er_jax.Rollout:
    config = er_jax.RolloutConfig(
        max_new_tokens=200,
        stop_token_ids=(0, 1, 2, 10),
        n=2,
        max_slots=3,
        logprobs="raw",
    )
    return er_jax.rollout(
        policy, params, PROMPTS, key=jax.random.key(1),
        config=dataclasses.replace(config, **changes),
    )  # fmt: skip


def masked_logprobs(
    policy: er_jax.Decoder, params: Any, out: er_jax.Rollout
) -> np.ndarray:
    """Return the log-probabilities `[N, G]` of completions, in one pass with a mask."""
    ids = np.concatenate([out.prompt_ids, out.completion_ids], axis=1)
    mask = np.concatenate([out.prompt_mask, out.completion_mask], axis=1)
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, NONE)

    @jax.jit
    def run(params: Any) -> jax.Array:
        cache = policy.init_cache(*ids.shape)
        hidden, _ = policy.forward(
            params, jnp.asarray(ids), jnp.asarray(positions, jnp.int32), cache
        )
        return jax.nn.log_softmax(policy.logits(params, hidden))

    start = out.prompt_ids.shape[1]
    logprobs = np.asarray(run(params))[:, start - 1 : -1]
    found = np.take_along_axis(logprobs, out.completion_ids[..., None], axis=-1)
    return np.where(out.completion_mask, found[..., 0], 0)


# The ring is shorter than every cache; than the longer one; what drafts see as well.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "drafter"),
    [
        (5, er_jax.DrafterConfig()),
        (100, er_jax.DrafterConfig()),
        (40, er_jax.DrafterConfig(window=24, head=4)),
    ],
)
def test_speculation_past_the_window(
    x64: None, window: int, drafter: er_jax.DrafterConfig
) -> None:
    """In float64, with refill, clones, compaction and growth: the same tokens."""
    policy = er_jax.Decoder(dataclasses.replace(CONFIG, window=window))
    params = policy.init(jax.random.key(0))
    plain = sample(policy, params, control="ar")
    assert plain.lengths.max() > window + 2 * RING_DRAFTS
    assert len(set(plain.lengths.tolist())) > 2
    drafted = sample(policy, params, control="fixed:4", drafter=drafter)
    for name in ("completion_ids", "lengths", "finish_reason"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(drafted, name))
    wanted = masked_logprobs(policy, params, plain)
    for out in (plain, drafted):
        np.testing.assert_allclose(out.logprobs, wanted, atol=1e-6)


def entries(rows: int, length: int) -> jax.Array:
    """Return entries `[rows, length, 1]` that say their row and position."""
    at = np.arange(rows)[:, None] * 1000 + np.arange(length) + 1
    return jnp.asarray(at[..., None], jnp.float32)


def written(span: Span, slots: int, row: jax.Array, count: int) -> Ring:
    """Return a ring into which the first entries of a row were written in order."""
    ring = Ring(entries=jnp.zeros((1, slots, 1)), span=span)
    for position in range(count):
        at = jnp.array([[position]], jnp.int32)
        ring = kv_cache.write(ring, row[None, position : position + 1], at)
    return ring


def seen(ring: Ring, row: int, count: int) -> np.ndarray:
    """Return the entries that a query at position `count` sees, but for its own."""
    positions = np.arange(max(count - ring.span.window + 1, 0), count)
    return np.asarray(
        kv_cache.read(
            Ring(entries=ring.entries[row : row + 1], span=ring.span),
            jnp.asarray(positions[None], jnp.int32),
        )
    )[0, :, 0]


@pytest.mark.parametrize("count", [0, 1, 4, 15, 16, 17, 30, 39])
def test_rings_of_a_state_are_those_of_the_prompt(count: int) -> None:
    """Of one row to another; where there is no entry there are zeros."""
    span, prompt = Span(0, 9), entries(3, 40)
    cache = [Ring(entries=jnp.full((2, 16, 1), jnp.nan), span=span)]
    one = jnp.int32(1)
    out = kv_cache.insert_row(
        cache, [Ring(entries=prompt, span=span)], one, jnp.int32(2), jnp.int32(count)
    )[0]
    wanted = written(span, 16, prompt[2], count)
    np.testing.assert_array_equal(out.entries[1], wanted.entries[0])
    np.testing.assert_array_equal(seen(out, 1, count), seen(wanted, 0, count))
    assert np.isnan(out.entries[0]).all()


@pytest.mark.parametrize("count", [1, 5, 16, 21, 39])
@pytest.mark.parametrize("window", [4, 9, 30])
def test_rings_of_drafts_are_made_of_rings(count: int, window: int) -> None:
    """The narrower window holds, and rejected drafts are not taken for known ones."""
    local, row = Span(0, 9), entries(1, 48)[0]
    # Two positions further than is known, as rejected drafts are.
    ring = written(local, 16, row, count + 2)
    found = kv_cache.rings(
        [ring], Span(2, window), jnp.array([count + 1], jnp.int32), gamma=3
    )[0]
    assert found.span == Span(0, min(window, 9))
    np.testing.assert_array_equal(
        seen(found, 0, count), row[max(count - found.span.window + 1, 0) : count, 0]
    )


def test_a_row_is_cut_to_what_the_next_token_sees() -> None:
    span, row = Span(0, 9), entries(1, 40)[0]
    ring = written(span, 16, row, 25)
    out = kv_cache.copy_row([ring], *(jnp.int32(x) for x in (0, 0, 23)))[0]
    np.testing.assert_array_equal(seen(out, 0, 23), row[15:23, 0])
    assert int((out.entries != 0).sum()) == 9
    same = kv_cache.copy_row([ring], *(jnp.int32(x) for x in (0, 0, NONE)))[0]
    np.testing.assert_array_equal(same.entries, ring.entries)


def test_states_keep_the_window_and_room_for_drafts() -> None:
    policy = er_jax.Decoder(dataclasses.replace(CONFIG, dtype="float32", window=10))
    slots = Span(0, 10).ring_length(RING_DRAFTS)
    assert kv_cache.ring_slots(policy) == slots == 48
    state = jax.eval_shape(lambda: steps.empty_state(policy, 3, 200))
    local, whole = (layer["keys"] for layer in state.cache)
    assert local.entries.shape == (3, slots, 8) and whole.shape == (3, 200, 8)
    short = jax.eval_shape(lambda cache: kv_cache.resize(cache, 32), state.cache)
    assert short[0]["values"].entries.shape == (3, 32, 8)
    room = slots - 10
    kv_cache.check_room(state.cache, 200, room)
    with pytest.raises(ValueError, match=f"gamma={room + 1} .* at most {room}"):
        kv_cache.check_room(state.cache, 200, room + 1)
    kv_cache.check_room(short, 32, room + 1)  # every position has its slot


def test_more_drafts_than_a_ring_has_room_for_are_refused() -> None:
    policy = er_jax.Decoder(dataclasses.replace(CONFIG, dtype="float32"))
    params = policy.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"gammas=\(0, 40\) has more than 32 drafts"):
        sample(policy, params, gammas=(0, 40))


def test_a_row_past_its_ring_holds_no_prompt() -> None:
    """Its prompt is prefilled again; a shorter row's is cloned."""
    prompts = [np.array([3, 5, 7], np.int32), np.array([4, 6], np.int32)]
    config = er_jax.RolloutConfig(max_new_tokens=200, max_slots=4)
    request = dataclasses.replace(
        request_of(prompts, np.arange(2), config), ring_slots=48
    )
    rows = dataclasses.replace(
        Rows.empty(4), resident=np.array([0, 1, NONE, NONE]),
        length=np.array([17, 16, 0, 0]),
    )  # fmt: skip
    admission, num_prefilled = plan_admission(
        request, rows, 256, [0, 1], [2, 3], slice(0, 4)
    )
    assert (num_prefilled, int(admission.num_clones)) == (1, 1)
    assert admission.clone_from[0] == 1


def test_a_row_copied_onto_itself_stays() -> None:
    """As where another data shard has more clones."""
    policy = er_jax.Decoder(dataclasses.replace(CONFIG, dtype="float32"))
    params = policy.init(jax.random.key(0))
    state = steps.empty_state(policy, 1, 64)
    cache = jax.tree.map(lambda x: jnp.ones_like(x), state.cache)
    state = dataclasses.replace(state, cache=cache, live=jnp.array([True]))
    zero, zeros = np.int32(0), np.zeros(1, np.int32)
    admission = Admission(
        tokens=np.zeros((1, 4), np.int32), length=zeros, num_chunks=zero,
        slot=zeros + 1, prompt=zeros, sequence_id=zeros, limit=zeros, first_row=zeros,
        num_rows=zeros, num_clones=np.int32(1), clone_from=zeros, clone_to=zeros,
        clone_length=zeros + 65,
    )  # fmt: skip
    admission = jax.tree.map(jnp.asarray, admission)
    out = prefill.admit(policy, params, state, admission)
    for before, after in zip(
        jax.tree.leaves(cache), jax.tree.leaves(out.cache), strict=True
    ):
        np.testing.assert_array_equal(before, after)
