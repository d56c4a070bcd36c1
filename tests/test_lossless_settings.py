"""Settings of rows, biases and bounds of stops are exact under speculation.

As in tests/test_lossless.py: all outcomes of a round add up to the target, and with
coupled acceptance every token is the target's own draw. Here rows differ in their
settings, some tokens are biased or banned, and none may stop at first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from er_jax.acceptance import AcceptRule
from er_jax.drafter import PolicyParams
from er_jax.sampling import gumbel
from er_jax.types import NONE, Finish, Params, Sampling
from tests.test_lossless import (
    ALL_LAST,
    DOWNWARDS,
    PROMPT,
    UPWARDS,
    chain_state,
    cut,
    emitted_and_reasons,
    run,
    run_chain,
    visit_round,
)
from tests.toy import (
    Toy,
    full_table,
    oracle_logprobs,
    own_draws,
    settings,
    start_state,
    toy_params,
)

pytestmark = pytest.mark.usefixtures("unoptimized_module")

NUM_TOKENS = 4

# Two kinds of rows, and what is the same for both.
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7, "top_k": 2, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.8, "min_p": 0.1},
)
GREEDY: dict[str, Any] = KINDS[0] | {"temperature": 0.0, "top_k": 0}


def of_kinds(kinds: np.ndarray, own: Any, **common: Any) -> Sampling:
    """Return the settings of rows, each of the kind given by its number `[B]`."""
    found = settings(**common)
    columns = {
        name: np.array([kind[name] for kind in own], getattr(found, name).dtype)[kinds]
        for name in own[0]
    }
    return dataclasses.replace(found, **columns)


def of_kind(config: Sampling, kind: dict[str, Any]) -> Sampling:
    """Return the settings of a row of a kind, as numbers."""
    types = {name: getattr(config, name).dtype.type for name in kind}
    own = {name: types[name](value) for name, value in kind.items()}
    return dataclasses.replace(config, **own)


def bounded(config: Sampling, bias: Any, least: Any, begin: Any) -> Sampling:
    """Return settings with a bias and a least number of tokens, `[B]` each."""
    early = np.array(bias, np.float32)
    early[[token for token in config.stop_ids if token >= 0]] = -np.inf
    return dataclasses.replace(
        config, bias=np.stack([np.array(bias, np.float32), early]),
        begin=np.asarray(begin, np.int32), min_new_tokens=np.asarray(least, np.int32),
    )  # fmt: skip


def probs_at(table: np.ndarray, config: Sampling, is_early: bool) -> np.ndarray:
    """Return the probabilities `[V, V, V]` of a table with the bias of a position."""
    table = table + config.bias[int(is_early)]
    flat = table.reshape(-1, table.shape[-1])
    rows = [np.exp(oracle_logprobs(line, config)) for line in flat]
    return np.array(rows).reshape(table.shape)


def chain(probs: list[np.ndarray]) -> np.ndarray:
    """Return the joint distribution of the first tokens, given each one's table."""
    joint = np.zeros((probs[0].shape[0],) * len(probs))
    for tokens in np.ndindex(joint.shape):
        text = (*PROMPT, *tokens)
        chances = [p[text[i : i + 3]] for i, p in enumerate(probs)]
        joint[tokens] = np.prod(chances)
    return joint


CASES: dict[str, dict[str, Any]] = {
    "settings of rows": {"bias": [0.0, 0.0, 0.0]},
    "bias": {"bias": [0.5, -1.0, 0.0]},
    "ban": {"bias": [0.0, 0.0, -np.inf]},
    # Token 0 stops, but not among the first two: in the middle of a round.
    "least length": {"bias": [0.3, 0.0, 0.0], "least": 2, "stop_ids": (0,)},
}


@pytest.mark.parametrize("rule", ["token", "block"])
def test_every_outcome_of_a_round(
    rule: AcceptRule, x64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All drafts and all acceptances add up to each row's own target, to 1e-9."""
    gamma, policy = 2, Toy(dtype="float64")
    size = policy.vocab_size
    target, draft = toy_params(policy, seed=0), toy_params(policy, seed=1)
    # The first draft reads a page that the target wrote.
    first, later = target["pages"] + draft["lines"][None], full_table(draft)
    one_round, rows = visit_round(monkeypatch, rule, gamma, policy, None)
    asked = np.flatnonzero((rows[:, :2] == PROMPT).all(axis=1))
    params = PolicyParams(policy=target, draft=draft)
    for name, case in CASES.items():
        stops, least = case.get("stop_ids", ()), case.get("least", 0)
        is_early = [i < least for i in range(NUM_TOKENS)]
        found = [np.zeros((size,) * NUM_TOKENS) for _ in KINDS]
        wanted = []
        for turn in range(2):  # every row is of the one kind, and then of the other
            kinds = (np.arange(len(rows)) + turn) % 2
            config = of_kinds(kinds, KINDS, stop_ids=stops)
            config = bounded(config, case["bias"], [least] * len(rows), [2] * len(rows))
            state = start_state(policy, target, rows[:, :2], 9, cache_length=11)
            state, info, final, chances = jax.device_get(
                one_round(params, state, config)
            )
            own = [of_kind(config, kind) for kind in KINDS]
            probs = [
                [probs_at(full_table(target), one, early) for early in is_early]
                for one in own
            ]
            ahead = [
                [probs_at(first, one, is_early[0]), probs_at(later, one, is_early[1])]
                for one in own
            ]
            wanted = [chain(each) for each in probs]
            for row in asked:
                kind, text = kinds[row], tuple(rows[row, : 2 + gamma])
                passes = rows[row, 2 + gamma :]
                chance = np.prod(
                    [p[text[i : i + 3]] for i, p in enumerate(ahead[kind])]
                )
                if chance:
                    chance *= np.where(passes, chances[row], 1 - chances[row]).prod()
                    kept = text[2 : 2 + int(info.num_accepted[row])]
                    found[kind] += chance * followed(kept, final[row], probs[kind])
                emitted = state.tokens[row, 2 : state.length[row]].tolist()
                ends = [i for i, t in enumerate(emitted) if t in stops and i >= least]
                assert not ends or ends[0] == len(emitted) - 1
        for joint, exact in zip(found, wanted, strict=True):
            np.testing.assert_allclose(joint, exact, rtol=0, atol=1e-9, err_msg=name)


def followed(
    kept: tuple[int, ...], final: np.ndarray, probs: list[np.ndarray]
) -> np.ndarray:
    """Return the joint distribution of the first tokens after a round.

    Args:
      kept: drafts. final: `[V]`, of the token behind them. probs: of those that follow.
    """
    joint = np.zeros((len(final),) * len(probs))
    for last, chance in enumerate(final):
        done = (*kept, last)
        for tokens in np.ndindex((len(final),) * (len(probs) - len(done))):
            whole = (*PROMPT, *done, *tokens)
            rest = [probs[i][whole[i : i + 3]] for i in range(len(done), len(probs))]
            joint[whole[2:]] = chance * np.prod(rest)
    return joint


@pytest.mark.parametrize("gamma", [0, pytest.param(1, marks=pytest.mark.slow), 4])
def test_coupled_emits_the_targets_own_draws(gamma: int, x64: None) -> None:
    """Token for token in float64, whatever settings the other rows have."""
    policy = Toy(vocab_size=4, dtype="float64")
    target = toy_params(policy, seed=0)
    drafts: list[Params] = [
        toy_params(policy, seed=1),
        jax.tree.map(lambda x: np.full_like(x, np.nan), target),
        target,
    ]
    rng = np.random.default_rng(0)
    rows = 32
    prompts = rng.integers(0, 4, (rows, 3)).astype(np.int32)
    ids, limits = rng.permutation(1000)[:rows], rng.integers(1, 14, rows)
    kinds, least = rng.integers(0, 3, rows), rng.integers(0, 6, rows)
    config = of_kinds(kinds, (*KINDS, GREEDY), stop_ids=(0, 3))
    for bias in ([0.0, 0.0, 0.0, 0.0], [1.0, -np.inf, 0.2, 0.0]):
        here = bounded(config, bias, least, np.full(rows, 3))
        draws = own_draws(full_table(target), prompts, 13, here, ids)
        by_hand = hand_draws(full_table(target), prompts, 13, here, kinds, ids)
        np.testing.assert_array_equal(draws, by_hand)
        wanted = cut(draws, limits, (0, 3))
        for draft in drafts if gamma else drafts[:1]:
            state = start_state(
                policy, target, prompts, limits, cache_length=17, sequence_ids=ids
            )
            state, info = run(
                "coupled", gamma, state, here, target, draft, policy=policy
            )
            assert emitted_and_reasons(state) == wanted
            if gamma and draft is target:
                assert info.accepted[:gamma].sum() == 0, "it sees other settings"
        more = [
            len(tokens) - least[row]
            for row, (tokens, reason) in enumerate(wanted)
            if reason == Finish.STOP
        ]
        assert min(more) == 1, "a stop should come as soon as it may"


def hand_draws(
    table: np.ndarray,
    prompts: np.ndarray,
    num_tokens: int,
    config: Sampling,
    kinds: np.ndarray,
    ids: np.ndarray,
) -> np.ndarray:
    """Return `own_draws` by the oracle, one row and one token after another."""
    begin = prompts.shape[1]
    positions = jnp.arange(begin, begin + num_tokens, dtype=jnp.int32)
    sequence_ids = jnp.asarray(ids, jnp.int32)[:, None]
    vocab_size = table.shape[-1]
    noise = np.asarray(
        gumbel(config, sequence_ids, positions[None], vocab_size, jnp.float64)
    )
    out = []
    for row, prompt in enumerate(prompts.tolist()):
        own = (*KINDS, GREEDY)[kinds[row]]
        text = list(prompt)
        for i in range(num_tokens):
            logits = table[text[-2], text[-1]]
            logits = logits + config.bias[int(i < config.min_new_tokens[row])]
            logprobs = oracle_logprobs(logits, of_kind(config, own))
            text.append(int(np.argmax(logprobs + noise[row, i])))
        out.append(text[len(prompt) :])
    return np.array(out)


@pytest.mark.parametrize(
    ("rule", "gamma"),
    [
        ("coupled", 0),
        ("coupled", 2),
        pytest.param("token", 2, marks=pytest.mark.slow),
        pytest.param("block", 2, marks=pytest.mark.slow),
    ],
)
def test_a_stop_sequence_across_rounds(rule: AcceptRule, gamma: int) -> None:
    """In windows of one round: wherever the rounds cut it, after good and bad drafts.

    The chain counts on from the prompt's last token, so rows differ in where the
    sequence begins; where the prompt has the first of it, the next time counts.
    """
    wanted = ([1, 2, 3, 0, 1, 2], [2, 3, 0, 1, 2], [3, 0, 1, 2], [0, 1, 2])
    for draft in (UPWARDS, DOWNWARDS):
        state = chain_state(ALL_LAST)
        config = dataclasses.replace(
            settings(), begin=np.full(16, 2, np.int32),
            min_new_tokens=np.zeros(16, np.int32),
            stop_sequences=np.array([[NONE, 0, 1, 2], [NONE] * 4], np.int32),
        )  # fmt: skip
        for _ in range(8):
            state, _ = run_chain(
                rule, gamma, state, config, UPWARDS, draft, max_rounds=1
            )
        found = emitted_and_reasons(state)
        for last, (tokens, reason) in zip(ALL_LAST, found, strict=True):
            assert tokens == wanted[last]
            assert reason == Finish.STOP
