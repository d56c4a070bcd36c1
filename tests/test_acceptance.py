"""Exactness of `token` and `block`, by enumeration; closed forms; edges.

Over a vocabulary of 3 every draft, every outcome of every acceptance test and every
final token is visited with its probability, in float64, by the library's own functions.
What comes out must be the target's joint distribution, for one round and for as many
as it takes to sample 4 tokens.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from er_jax import acceptance, sampling
from er_jax.acceptance import NEVER
from er_jax.types import Sampling
from tests.toy import (
    assert_rate,
    chain_probs,
    compose_rounds,
    oracle_table,
    settings,
    tables,
)

V = 3
NUM_TOKENS = 4
TRUNCATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 2},
    {"top_p": 0.8, "min_p": 0.05},
)
SETTINGS = [
    {"temperature": temperature, **truncation}
    for temperature in (0.0, 0.7, 1.0, 1.3)
    for truncation in TRUNCATIONS
]
Kernel = list[np.ndarray]
"""For n = 1 .. gamma + 1: `[V, V, *[V] * n]`, chances of emitting exactly n tokens."""


def target_table(table: np.ndarray, config: Sampling) -> np.ndarray:
    """Return the log-probabilities of a whole table, by the library."""
    return np.asarray(jax.jit(sampling.target_logprobs)(table, config))


@functools.partial(jax.jit, static_argnames="rule")
def run_rule(
    rule: str, target: jax.Array, draft: jax.Array, drafted: jax.Array
) -> tuple[jax.Array, ...]:
    """Return chances `[B, G]`, then per pattern of outcomes `[2**G, B, ...]`.

    A pattern says which of the G acceptance tests pass if they are looked at; its
    uniform numbers lie in the middle of what makes each test come out so.
    """
    rows, gamma = drafted.shape
    if rule == "token":
        chances = acceptance.token_accept_probs(target, draft, drafted)
        weights = jnp.ones((rows, gamma + 1), target.dtype)
    else:
        chances, weights = acceptance.block_accept_probs(target, draft, drafted)
    counts, finals = [], []
    for pattern in itertools.product((True, False), repeat=gamma):
        passes = jnp.broadcast_to(jnp.array(pattern), chances.shape)
        uniforms = jnp.where(passes, chances / 2, (1 + chances) / 2)
        if rule == "token":
            count = acceptance.token_num_accepted(chances, uniforms)
        else:
            count = acceptance.block_num_accepted(chances, uniforms)
        weight = jnp.take_along_axis(weights, count[:, None], axis=1)[:, 0]
        residual = acceptance.residual_logprobs(target, draft, count, weight)
        counts.append(count)
        finals.append(jax.nn.softmax(residual, axis=-1))
    return chances, weights, jnp.stack(counts), jnp.stack(finals)


def enumerate_round(
    rule: str, gamma: int, target: np.ndarray, draft: np.ndarray
) -> tuple[Kernel, np.ndarray]:
    """Visit every outcome of one round from every pair of last tokens.

    Args:
      target, draft: `[V, V, V]` log-probabilities.
    Returns:
      The kernel, and the chance `[V, V, gamma + 1]` of keeping each number of drafts.
    """
    rows = np.array(list(itertools.product(range(V), repeat=2 + gamma)), np.int32)
    before, last = rows[:, : gamma + 1], rows[:, 1:]
    drafted = rows[:, 2:]
    target_rows, draft_rows = target[before, last], draft[before, last][:, :gamma]
    at_drafted = np.take_along_axis(draft_rows, drafted[..., None], axis=2)
    draft_prob = np.exp(at_drafted[..., 0]).prod(axis=1)
    chances, _, counts, finals = jax.device_get(
        run_rule(rule, target_rows, draft_rows, drafted)
    )
    # Of drafts that cannot be drawn nothing is promised, not even numbers.
    drawn = draft_prob > 0
    assert np.isfinite(chances[drawn]).all()
    chances = np.where(drawn[:, None], chances, 0)
    patterns = np.array(list(itertools.product((True, False), repeat=gamma)))
    kernel = [np.zeros((V,) * (2 + n)) for n in range(1, gamma + 2)]
    kept = np.zeros((V, V, gamma + 1))
    for pattern, count, final in zip(patterns, counts, finals, strict=True):
        prob = draft_prob * np.where(pattern, chances, 1 - chances).prod(axis=1)
        for row in np.flatnonzero(prob):
            n = count[row]
            kernel[n][tuple(rows[row, : 2 + n])] += prob[row] * final[row]
            kept[(*rows[row, :2], n)] += prob[row]
    return kernel, kept


def check_exact(
    rule: str, gamma: int, target: np.ndarray, draft: np.ndarray, config: Sampling
) -> np.ndarray:
    """Assert exactness for the prompts (0, 1) and (2, 2); return the kept counts."""
    probs = oracle_table(target, config)
    kernel, kept = enumerate_round(
        rule, gamma, target_table(target, config), target_table(draft, config)
    )
    np.testing.assert_allclose(kept.sum(axis=-1), 1, rtol=0, atol=1e-12)
    for prompt in ((0, 1), (2, 2)):
        wanted = chain_probs(probs, prompt, NUM_TOKENS)
        for rounds in (1, NUM_TOKENS):
            found = compose_rounds(kernel, probs, prompt, NUM_TOKENS, rounds=rounds)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)
    return kept


@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_every_outcome_adds_up_to_the_target(rule: str, gamma: int, x64: None) -> None:
    target, draft = tables(V, dtype="float64")
    for setting in SETTINGS:
        kept = check_exact(rule, gamma, target, draft, settings(**setting))
        if setting == {"temperature": 1.0}:
            # The draft is far away indeed, and not so far that nothing is kept.
            assert 0.2 < kept[..., 0].mean() < 0.8
            assert (kept[..., gamma] > 0).all()


@pytest.mark.parametrize("rule", ["token", "block"])
def test_disjoint_support_keeps_none(rule: str, x64: None) -> None:
    target, draft = tables(V, dtype="float64")
    target[..., 2], draft[..., :2] = -np.inf, -np.inf
    for temperature in (0.0, 0.7, 1.3):
        kept = check_exact(rule, 2, target, draft, settings(temperature=temperature))
        np.testing.assert_allclose(kept[..., 0], 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_partly_disjoint_support_is_exact(rule: str, x64: None) -> None:
    """Masks of draft and target that differ from line to line, single tokens too."""
    target, draft = tables(V, dtype="float64")
    rng = np.random.default_rng(5)
    target[rng.random(target.shape) < 0.4] = -np.inf
    draft[rng.random(draft.shape) < 0.4] = -np.inf
    for table in (target, draft):
        table[..., 1] = np.where(np.isinf(table).all(axis=-1), 0.0, table[..., 1])
    assert np.isinf(target).sum(axis=-1).max() == 2
    check_exact(rule, 3, target, draft, settings(temperature=0.7))


@pytest.mark.parametrize("rule", ["token", "block"])
def test_draft_equal_to_the_target_keeps_all(rule: str, x64: None) -> None:
    target, _ = tables(V, dtype="float64")
    for setting in SETTINGS:
        kept = check_exact(rule, 3, target, target, settings(**setting))
        np.testing.assert_allclose(kept[..., 3], 1, rtol=0, atol=1e-12)


def test_block_keeps_at_least_as_many_as_token(x64: None) -> None:
    """And both as many as their formulas say, from every context."""
    gains: list[float] = []
    for seed, gamma in itertools.product(range(4), (1, 2, 3)):
        target, draft = (
            target_table(table, settings())
            for table in tables(V, seed=seed, dtype="float64")
        )
        depth = np.arange(gamma + 1)
        token = enumerate_round("token", gamma, target, draft)[1] @ depth
        block = enumerate_round("block", gamma, target, draft)[1] @ depth
        assert (block >= token - 1e-12).all()
        gains.append((block - token).max() if gamma > 1 else 0.0)
        if gamma == 1:
            np.testing.assert_allclose(block, token, rtol=0, atol=1e-12)
            overlap = acceptance.expected_accept_prob(
                jnp.asarray(target), jnp.asarray(draft)
            )
            np.testing.assert_allclose(token, overlap, rtol=0, atol=1e-12)

        # token: chance of prefix x is the product of min(target, draft) along it;
        # block: draft chance of the prefix times w = min(1, w ratio).
        expected = {"token": np.zeros((V, V)), "block": np.zeros((V, V))}
        p, q = np.exp(target), np.exp(draft)
        for context in np.ndindex(V, V):
            for tokens in itertools.product(range(V), repeat=gamma):
                walk, weight, chance = (*context, *tokens), 1.0, 1.0
                ahead = np.prod([q[walk[i : i + 3]] for i in range(gamma)])
                for i in range(gamma):
                    ratio = p[walk[i : i + 3]] / q[walk[i : i + 3]]
                    chance, weight = chance * min(1, ratio), min(1, weight * ratio)
                    expected["token"][context] += ahead * chance
                    expected["block"][context] += ahead * weight
        np.testing.assert_allclose(token, expected["token"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(block, expected["block"], rtol=0, atol=1e-12)
    assert max(gains) > 0.01, "block verification should gain something here"


def test_block_by_hand(x64: None) -> None:
    """Two drafts over {a, b}: target (2/3, 1/3), draft (1/3, 2/3), whatever before.

    Token verification keeps 10/9 drafts on average, block verification 11/9.
    """
    target = np.log(np.tile([2 / 3, 1 / 3], (4, 3, 1)))
    draft = np.log(np.tile([1 / 3, 2 / 3], (4, 2, 1)))
    drafted = np.array([(0, 0), (0, 1), (1, 0), (1, 1)], np.int32)  # aa ab ba bb
    chances, weights = acceptance.block_accept_probs(
        jnp.asarray(target), jnp.asarray(draft), jnp.asarray(drafted)
    )
    wanted = np.array([[1, 1, 1], [1, 1, 0.5], [1, 0.5, 1], [1, 0.5, 0.25]])
    np.testing.assert_allclose(weights, wanted)
    # After b, w = 1/2 and w target - draft = (0, -1/2) has no positive part.
    wanted = np.array([[1, 1], [1, 0.5], [0, 1], [0, 0.25]])
    np.testing.assert_allclose(chances, wanted, atol=1e-12)
    drafts = np.array([1, 2, 2, 4]) / 9
    kept = (weights[:, 1] + weights[:, 2]) @ drafts
    assert float(kept) == pytest.approx(11 / 9)
    alone = acceptance.token_accept_probs(
        jnp.asarray(target), jnp.asarray(draft), jnp.asarray(drafted)
    )
    wanted = np.array([[1, 1], [1, 0.5], [0.5, 1], [0.5, 0.5]])
    np.testing.assert_allclose(alone, wanted)
    assert float((alone[:, 0] + alone[:, 0] * alone[:, 1]) @ drafts) == pytest.approx(
        10 / 9
    )


def test_counts_by_hand() -> None:
    keep = jnp.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 0]], jnp.bool_)
    np.testing.assert_array_equal(acceptance.count_leading(keep), [3, 1, 0, 0])
    np.testing.assert_array_equal(acceptance.count_leading(keep[:, :0]), [0] * 4)
    chances = jnp.array([[0.5, 0.5, 0.5]] * 4)
    uniforms = jnp.where(keep, 0.4, 0.6)
    token = acceptance.token_num_accepted(chances, uniforms)
    np.testing.assert_array_equal(token, [3, 1, 0, 0])
    # The longest prefix whose own test passed, failures before it notwithstanding.
    block = acceptance.block_num_accepted(chances, uniforms)
    np.testing.assert_array_equal(block, [3, 3, 3, 0])


def test_chance_1_always_passes_and_0_never() -> None:
    """The uniform numbers lie in (0, 1), and the comparison is on the right side."""
    chances = jnp.array([[1.0, 1.0], [0.0, 0.0]])
    for extreme in (2.0**-33, 1 - 2.0**-24):
        uniforms = jnp.full((2, 2), extreme, jnp.float32)
        for count in (acceptance.token_num_accepted, acceptance.block_num_accepted):
            np.testing.assert_array_equal(count(chances, uniforms), [2, 0])


def test_coupled_counts_every_draft_against_every_draw() -> None:
    pairs = np.array(list(itertools.product(range(2), repeat=5)), np.int32)
    drafted, draws = pairs[:, :2], pairs[:, 2:]
    wanted = [  # the first difference
        next((i for i in range(2) if d[i] != t[i]), 2)
        for d, t in zip(drafted, draws, strict=True)
    ]
    found = acceptance.coupled_num_accepted(jnp.asarray(drafted), jnp.asarray(draws))
    np.testing.assert_array_equal(found, wanted)


def test_residual_by_hand(x64: None) -> None:
    """Rejection, rejection with a weight, bonus; then a residual that rounding ate."""
    target = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], jnp.float64))
    draft = jnp.log(jnp.array([[0.1, 0.6, 0.3]], jnp.float64))
    count, weight = np.array([0, 0, 1], np.int32), np.array([1.0, 0.8, 1.0])
    found = acceptance.residual_logprobs(
        jnp.tile(target[None], (3, 1, 1)), jnp.tile(draft[None], (3, 1, 1)),
        jnp.asarray(count), jnp.asarray(weight),
    )  # fmt: skip
    np.testing.assert_allclose(
        np.exp(found), [[0.4, 0, 0], [0.3, 0, 0], [0.1, 0.1, 0.8]], atol=1e-15
    )
    assert found[0, 1] == NEVER
    same = acceptance.residual_logprobs(
        target[None], target[None, :1], jnp.array([0]), jnp.ones(1, jnp.float64)
    )
    np.testing.assert_array_equal(same, target[None, 0])


def test_gamma_0_draws_from_the_target() -> None:
    target = jnp.log(jnp.array([[[0.5, 0.3, 0.2]]], jnp.float32))
    found = acceptance.residual_logprobs(
        target, jnp.zeros((1, 0, 3)), jnp.zeros(1, jnp.int32), jnp.ones(1)
    )
    np.testing.assert_array_equal(found, target[:, 0])


# -- closed forms ----------------------------------------------------------------------


def pairs(rows: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random target and draft log-probabilities; the last pair has disjoint supports,
    the one before it is of equal ones."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1.5, (2, rows, vocab_size))
    logits[1, -2] = logits[0, -2]
    logits[0, -1, ::2], logits[1, -1, 1::2] = -np.inf, -np.inf
    target, draft = target_table(logits, settings(top_p=0.95))
    return target, draft


def test_expected_coupled_prob_is_the_rate_of_agreement() -> None:
    """262 144 draws for each of 6 pairs; a right form fails with chance 4e-5."""
    target, draft = (x.astype(np.float32) for x in pairs(6, 5))
    expected = np.asarray(
        acceptance.expected_coupled_prob(jnp.asarray(target), jnp.asarray(draft))
    )

    @jax.jit
    def agreements(target: jax.Array, draft: jax.Array) -> jax.Array:
        ids = jnp.arange(2**18, dtype=jnp.int32)
        noise = sampling.gumbel(settings(), ids, jnp.int32(1), 5, jnp.float32)
        same = jnp.argmax(target[None] + noise, -1) == jnp.argmax(
            draft[None] + noise, -1
        )
        return jnp.sum(same, dtype=jnp.int32)

    for i in range(6):
        found = int(agreements(target[i], draft[i]))
        if expected[i] in (0, 1):
            assert found == 2**18 * expected[i]
        else:
            assert_rate(found, 2**18, float(expected[i]))


def test_bounds_of_the_closed_forms(x64: None) -> None:
    target, draft = (jnp.asarray(x) for x in pairs(200, 7))
    overlap = np.asarray(acceptance.expected_accept_prob(target, draft))
    coupled = np.asarray(acceptance.expected_coupled_prob(target, draft))
    distance = np.abs(np.exp(target) - np.exp(draft)).sum(axis=-1) / 2
    np.testing.assert_allclose(overlap, 1 - distance, rtol=0, atol=1e-12)
    assert (coupled <= 1 - distance + 1e-12).all()
    assert (coupled >= (1 - distance) / (1 + distance) - 1e-12).all()
    assert coupled[-2] == pytest.approx(1) and overlap[-2] == pytest.approx(1)
    assert coupled[-1] == 0 and overlap[-1] == 0
    swapped = acceptance.expected_coupled_prob(draft, target)
    np.testing.assert_allclose(coupled, swapped, rtol=1e-12)


def test_expected_tokens_is_the_geometric_series() -> None:
    for rate, gamma in itertools.product((0.0, 0.3, 0.9, 0.999), range(9)):
        found = acceptance.expected_tokens([rate] * gamma)
        assert found == pytest.approx((1 - rate ** (gamma + 1)) / (1 - rate))
    assert acceptance.expected_tokens([]) == 1
    assert acceptance.expected_tokens([1.0] * 5) == 6
    assert acceptance.expected_tokens([0.5, 0.25, 1.0]) == 1 + 0.5 + 0.125 + 0.125


def test_expected_tokens_of_a_token_round(x64: None) -> None:
    """With lines that ignore the context, a round keeps drafts independently."""
    rng = np.random.default_rng(11)
    one_line = rng.normal(0, 1, (2, 1, 1, V))
    target, draft = target_table(np.tile(one_line, (1, V, V, 1)), settings())
    rate = float(
        acceptance.expected_accept_prob(
            jnp.asarray(target[0, 0]), jnp.asarray(draft[0, 0])
        )
    )
    for gamma in (1, 2, 3):
        kept = enumerate_round("token", gamma, target, draft)[1]
        mean = 1 + kept @ np.arange(gamma + 1)
        np.testing.assert_allclose(mean, acceptance.expected_tokens([rate] * gamma))
