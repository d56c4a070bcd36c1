"""Speculation changes no distribution, and with coupled acceptance not one token.

Here whole rounds and whole compiled windows run, on a policy with known probabilities
(tests/toy.py) and a draft far from it: every outcome of a round by enumeration in
float64, whole completions by chi-square tests, `coupled` token by token against the
target's own draws. Then what can happen inside a draft: a stop, a limit, a bad logit.

Chi-square tests have a level of 1e-4 each: a correct library fails with that chance for
a seed nobody looked at, and never for the seeds here, which are fixed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from er_jax import acceptance, sampling, steps
from er_jax.acceptance import ACCEPT_RULES, AcceptRule
from er_jax.drafter import PolicyParams
from er_jax.engine import windows
from er_jax.types import (
    NONE,
    DecodeState,
    Finish,
    LogprobKind,
    Params,
    Purpose,
    Sampling,
    Span,
    WindowInfo,
)
from tests.toy import (
    Toy,
    assert_rate,
    assert_same_distribution,
    chain_probs,
    completion_counts,
    compose_rounds,
    full_table,
    joint_probs,
    oracle_logprobs,
    oracle_table,
    own_draws,
    same_prompt,
    settings,
    start_state,
    toy_params,
)

pytestmark = pytest.mark.usefixtures("as_users_compile")

TOY = Toy(vocab_size=3)
PROMPT = (0, 1)
rules = pytest.mark.parametrize("rule", ACCEPT_RULES)


def run(
    rule: AcceptRule,
    gamma: int,
    state: DecodeState,
    config: Sampling,
    target: Params,
    draft: Params,
    *,
    policy: Toy = TOY,
    max_rounds: int = 100,
    span: Span | None = None,
) -> tuple[DecodeState, WindowInfo]:
    """Run one compiled window until no row is live, and fetch it."""
    params = PolicyParams(policy=target, draft=draft)
    out = windows.run_window(
        policy, params, state, config, np.int32(0), np.int32(max_rounds),
        gamma=gamma, accept=rule, rounds_per_test=1, span=span,
    )  # fmt: skip
    return jax.device_get(out[:2])


# -- every outcome of a round ----------------------------------------------------------


def visit_round(
    monkeypatch: pytest.MonkeyPatch,
    rule: AcceptRule,
    gamma: int,
    policy: Toy,
    span: Span | None,
) -> Any:
    """Return a compiled round whose outcomes are chosen per row, and the choices.

    The sequence id of a row names its choice: drafts, and for each acceptance test
    whether its uniform number passes. The final token is the likeliest of what is left,
    and the distribution it would be drawn from comes back as well.
    """
    size = policy.vocab_size
    rows = np.array(
        list(itertools.product(*[range(size)] * (2 + gamma), *[range(2)] * gamma)),
        np.int32,
    )
    drafts = jnp.asarray(rows[:, 2 : 2 + gamma])
    passes = jnp.asarray(rows[:, 2 + gamma :], jnp.bool_)
    seen: dict[str, jax.Array] = {}

    def chosen_noise(
        config: Sampling, sequence_id: jax.Array, position: jax.Array, vocab: int,
        dtype: Any, *, purpose: Purpose = Purpose.TOKEN, start: Any = None,
    ) -> jax.Array:  # fmt: skip
        if purpose == Purpose.RESIDUAL:
            return jnp.zeros((*position.shape, vocab), dtype)
        assert purpose == Purpose.DRAFT
        token = drafts[sequence_id, position - start]
        return 1e6 * jax.nn.one_hot(token, vocab, dtype=dtype)

    def chosen_count(real: Any, chances: jax.Array, uniforms: jax.Array) -> jax.Array:
        assert uniforms.shape == chances.shape
        seen["chances"] = chances
        return real(chances, jnp.where(passes, chances / 2, (1 + chances) / 2))

    def watched_residual(real: Any, *args: jax.Array) -> jax.Array:
        seen["final"] = real(*args)
        return seen["final"]

    monkeypatch.setattr(sampling, "gumbel", chosen_noise)
    for name, wrap in (
        ("token_num_accepted", chosen_count),
        ("block_num_accepted", chosen_count),
        ("residual_logprobs", watched_residual),
    ):
        wrapped = functools.partial(wrap, getattr(acceptance, name))
        monkeypatch.setattr(acceptance, name, wrapped)

    @jax.jit
    def one_round(params: PolicyParams, state: DecodeState, config: Sampling) -> Any:
        state = steps.begin_window(state, span, gamma)
        state, info = steps.decode_round(
            policy, params, state, config, gamma=gamma, accept=rule
        )
        return state, info, jax.nn.softmax(seen["final"]), seen["chances"]

    return one_round, rows


@pytest.mark.parametrize(
    ("rule", "gamma", "span"),
    [
        ("token", 2, None),
        ("block", 2, None),
        ("block", 3, None),
        ("token", 2, Span(head=0, window=2)),
        ("block", 2, Span(head=1, window=2)),
    ],
)
def test_every_outcome_of_a_round(
    rule: AcceptRule,
    gamma: int,
    span: Span | None,
    x64: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All drafts and all acceptances add up to the target, to 1e-9."""
    policy = Toy(dtype="float64")
    size = policy.vocab_size
    target, draft = toy_params(policy, seed=0), toy_params(policy, seed=1)
    one_round, rows = visit_round(monkeypatch, rule, gamma, policy, span)
    params = PolicyParams(policy=target, draft=draft)
    # The first draft reads a page that the target wrote.
    first = target["pages"] + draft["lines"][None]
    cases: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 2},
        {"temperature": 1.3, "top_p": 0.8, "min_p": 0.1},
    ]
    for setting in cases:
        config = settings(**setting)
        state = start_state(policy, target, rows[:, :2], 9, cache_length=11)
        state, info, final, chances = jax.device_get(one_round(params, state, config))

        probs = oracle_table(full_table(target), config)
        ahead = oracle_table(first, config)[tuple(rows[:, :3].T)]
        later = oracle_table(full_table(draft), config)
        for i in range(1, gamma):
            ahead = ahead * later[tuple(rows[:, i : i + 3].T)]
        chances = np.where(ahead[:, None] > 0, chances, 0)
        passes = rows[:, 2 + gamma :]
        chance = ahead * np.where(passes, chances, 1 - chances).prod(axis=1)

        kernel = [np.zeros((size,) * (2 + n)) for n in range(1, gamma + 2)]
        for row in np.flatnonzero(chance):
            n = info.num_accepted[row]
            emitted = state.tokens[row, 2 : state.length[row]]
            assert list(emitted[:-1]) == list(rows[row, 2 : 2 + n])
            assert emitted[-1] == np.argmax(final[row])
            kernel[n][tuple(rows[row, : 2 + n])] += chance[row] * final[row]
        for rounds in (1, 4):
            found = compose_rounds(kernel, probs, PROMPT, 4, rounds=rounds)
            wanted = chain_probs(probs, PROMPT, 4)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


# -- whole completions, by the hundred thousand ----------------------------------------

ROWS = 32_768
# Rows that run at once. Rows with a bad logit are cleared one after the other, and each
# takes longer the more rows there are.
PART = 4096
NUM_TOKENS = 5
KEYS = ((0, 0), (0, 1), (1, 0), (2**32 - 1, 7))  # 131 072 completions
TARGET, DRAFT = toy_params(TOY, seed=0), toy_params(TOY, seed=1)


def starts(target: Params, first_id: int = 0) -> Iterator[DecodeState]:
    """Yield `ROWS` rows as they start, `PART` at a time."""
    for first in range(first_id, first_id + ROWS, PART):
        yield start_state(
            TOY, target, same_prompt(PROMPT, PART), NUM_TOKENS, cache_length=8,
            sequence_ids=np.arange(PART) + first,
        )  # fmt: skip


def check_completions(
    rule: AcceptRule,
    gamma: int,
    target: Params = TARGET,
    draft: Params = DRAFT,
    span: Span | None = None,
    **setting: Any,
) -> tuple[float, np.ndarray]:
    """Compare 131 072 completions with the exact joint distribution.

    Returns:
      The p value, and how often a round kept 0 .. gamma drafts.
    """
    counts = np.zeros(4**NUM_TOKENS, np.int64)
    accepted = np.zeros(gamma + 1, np.int64)
    for number, key in enumerate(KEYS):
        config = settings(key=key, **setting)
        for start in starts(target, number % 2 * ROWS):
            state, info = run(rule, gamma, start, config, target, draft, span=span)
            assert not state.live.any()
            counts += completion_counts(state, NUM_TOKENS, 3)
            accepted += info.accepted
    probs = oracle_table(full_table(target), config)
    wanted = joint_probs(probs, PROMPT, NUM_TOKENS, setting.get("stop_ids", ()))
    p_value = assert_same_distribution(counts, wanted)
    print(f"{rule}, gamma {gamma}, {setting}: p = {p_value:.3g}, accepted {accepted}")
    return p_value, accepted


@rules
def test_completions_follow_the_target(rule: AcceptRule) -> None:
    _, accepted = check_completions(rule, 3)
    assert (accepted > 10_000).all(), "every number of drafts should be kept often"


@pytest.mark.parametrize(
    "rule",
    [
        rule if rule == "coupled" else pytest.param(rule, marks=pytest.mark.slow)
        for rule in ACCEPT_RULES
    ],
)
def test_drafts_that_see_a_span_change_no_distribution(rule: AcceptRule) -> None:
    """The toy looks back by one position, so a span of two hides nothing from it.

    The same drafts are kept, which tells that rings hold the target's entries.
    """
    _, whole = check_completions(rule, 3, temperature=1.3, stop_ids=(2,))
    for span in (Span(head=0, window=2), Span(head=1, window=2)):
        setting: dict[str, Any] = {"temperature": 1.3, "stop_ids": (2,)}
        _, accepted = check_completions(rule, 3, span=span, **setting)
        np.testing.assert_array_equal(accepted, whole)


@rules
def test_stopped_completions_follow_the_target(rule: AcceptRule) -> None:
    check_completions(rule, 3, temperature=1.3, stop_ids=(2,))
    check_completions(rule, 3, temperature=0.7, min_p=0.05, stop_ids=(0,))


@rules
@pytest.mark.parametrize("where", ["pages", "lines"])
def test_broken_draft_changes_no_distribution(rule: AcceptRule, where: str) -> None:
    broken = {**DRAFT, where: np.full_like(DRAFT[where], np.nan)}
    check_completions(rule, 3, draft=broken)


@rules
def test_disjoint_supports_keep_none(rule: AcceptRule) -> None:
    """And the target is still followed exactly."""
    target, draft = ({**p, "lines": p["lines"].copy()} for p in (TARGET, DRAFT))
    target["lines"][:, 2], draft["lines"][:, :2] = -np.inf, -np.inf
    _, accepted = check_completions(rule, 3, target, draft)
    assert accepted[0] == len(KEYS) * ROWS * NUM_TOKENS
    assert (accepted[1:] == 0).all()


@rules
def test_all_masked_but_one(rule: AcceptRule) -> None:
    """After token 1 only token 2 is possible; the draft does not know."""
    target = {**TARGET, "lines": TARGET["lines"].copy()}
    target["lines"][1, :2] = -np.inf
    check_completions(rule, 3, target)


@rules
def test_bad_logits_leave_the_rest_of_the_distribution(rule: AcceptRule) -> None:
    """A line of NaN, seen at every depth of a draft, ends a row and biases none."""
    target = {**TARGET, "pages": TARGET["pages"].copy()}
    target["pages"][1, 0] = np.nan
    check_completions(rule, 3, target)


@dataclasses.dataclass(frozen=True)
class Leaky(Toy):
    """A toy that multiplies all entries of a row by zero, as masked attention does."""

    def forward(
        self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        hidden, cache = super().forward(params, tokens, positions, cache)
        leak = jnp.sum(0 * cache, axis=(1, 2, 3))
        return hidden + leak[:, None, None], cache


@rules
@pytest.mark.parametrize("gamma", [1, 3])
def test_entries_of_drafts_that_are_no_number_bias_nothing(
    rule: AcceptRule, gamma: int
) -> None:
    """Token 2 has no entry that is a number: it is drafted, kept or not, and ends rows.

    To give drafts up where one of them is bad, and draw anew, would be biased: whether
    they are given up depends on what they are.
    """
    policy, rows = Leaky(vocab_size=3), ROWS // 2
    target = {**TARGET, "pages": TARGET["pages"].copy()}
    target["pages"][2] = np.nan
    state = start_state(
        policy, target, same_prompt(PROMPT, rows), NUM_TOKENS, cache_length=8,
        garbage=0.0,
    )  # fmt: skip
    state, info = run(rule, gamma, state, settings(), target, DRAFT, policy=policy)
    assert not state.live.any()
    assert (info.accepted > 1000).all()
    counts = completion_counts(state, NUM_TOKENS, 3)
    probs = oracle_table(full_table(TARGET), settings())
    probs[2] = probs[:, 2] = np.nan
    assert_same_distribution(counts, joint_probs(probs, PROMPT, NUM_TOKENS))
    # Where rows go on, nothing is left of what was drafted.
    state = start_state(
        policy, target, same_prompt(PROMPT, rows), NUM_TOKENS, cache_length=8,
        garbage=0.0,
    )  # fmt: skip
    state, _ = run(
        rule, gamma, state, settings(), target, DRAFT, policy=policy, max_rounds=1
    )
    assert state.live.any()
    assert np.isfinite(state.cache[state.live]).all()


@rules
def test_draft_equal_to_the_target_keeps_all(rule: AcceptRule) -> None:
    """The draft meets the same transform, or it would sometimes be refused."""
    cases: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 2},
        {"temperature": 1.3, "min_p": 0.3, "top_p": 0.8},
    ]
    for setting in cases:
        config = settings(**setting)
        accepted = np.zeros(4, np.int64)
        for start in starts(TARGET):
            _, info = run(rule, 3, start, config, TARGET, TARGET, max_rounds=1)
            accepted += info.accepted
        # One pass of 4 tokens and 4 passes of one may round differently, which costs
        # a draft in 10^6 or fewer.
        assert accepted[:3].sum() <= 2
        assert accepted.sum() == ROWS


def agreement(target: np.ndarray, draft: np.ndarray) -> np.ndarray:
    """Chance that both draw token i with the same Gumbel noise, `[V]`, by a loop."""
    both = np.flatnonzero((target > 0) & (draft > 0))
    chance = np.zeros(len(target))
    for i in both:
        chance[i] = 1 / np.maximum(target / target[i], draft / draft[i]).sum()
    return chance


@pytest.mark.parametrize("rule", ["coupled", "token"])
def test_kept_drafts_are_as_many_as_the_closed_form_says(rule: AcceptRule) -> None:
    """The first round's count over 131 072 rows, whole distribution and first depth."""
    kept = np.zeros(4, np.int64)
    setting: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95}
    for key in KEYS:
        config = settings(key=key, **setting)
        for start in starts(TARGET):
            _, info = run(rule, 3, start, config, TARGET, DRAFT, max_rounds=1)
            assert info.num_rounds == 1
            kept += info.accepted
    target = oracle_table(full_table(TARGET), config)
    first = oracle_table(TARGET["pages"] + DRAFT["lines"][None], config)
    later = oracle_table(full_table(DRAFT), config)
    match = agreement if rule == "coupled" else np.minimum

    def survivors(before: int, last: int, depth: int) -> np.ndarray:
        """Chance that at least 1, 2, ... drafts are kept from this depth on."""
        if depth == 3:
            return np.zeros(0)
        draft = (first if depth == 0 else later)[before, last]
        each = match(target[before, last], draft)
        ahead = [survivors(last, token, depth + 1) for token in range(3)]
        return np.array([each.sum(), *(each @ ahead)])

    at_least = np.array([1.0, *survivors(*PROMPT, 0), 0.0])
    assert_same_distribution(kept, -np.diff(at_least))
    trials = len(KEYS) * ROWS
    assert_rate(trials - int(kept[0]), trials, at_least[1])
    overlap = np.minimum(target[PROMPT], first[PROMPT]).sum()
    assert overlap / (2 - overlap) <= at_least[1] + 1e-12  # (1 - d) / (1 + d)
    assert at_least[1] <= overlap + 1e-12
    library = {
        "coupled": acceptance.expected_coupled_prob,
        "token": acceptance.expected_accept_prob,
    }[rule]
    with np.errstate(divide="ignore"):
        lines = np.log([target[PROMPT], first[PROMPT]])
    lines = np.maximum(lines, sampling.NEVER).astype(np.float32)
    assert float(
        library(jnp.asarray(lines[0]), jnp.asarray(lines[1]))
    ) == pytest.approx(at_least[1], abs=1e-6)


@rules
def test_gamma_0_is_plain_sampling(rule: AcceptRule) -> None:
    _, accepted = check_completions(rule, 0, draft=None, temperature=1.3, stop_ids=(2,))
    assert accepted.shape == (1,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "gamma"),
    [("coupled", 2), ("token", 2), ("token", 4), ("block", 2), ("block", 4)],
)
def test_truncated_completions_follow_the_target(rule: AcceptRule, gamma: int) -> None:
    check_completions(rule, gamma, temperature=0.7)
    check_completions(rule, gamma, temperature=1.3, top_k=2, stop_ids=(2,))
    check_completions(rule, gamma, temperature=0.7, top_p=0.8, stop_ids=(0,))
    check_completions(rule, gamma, temperature=1.3, top_p=0.9, min_p=0.1)


# -- coupled: the target's own draws, whatever was drafted -----------------------------


def cut(
    draws: np.ndarray, limits: np.ndarray, stop_ids: tuple[int, ...]
) -> list[tuple[list[int], int]]:
    """Return what each row should emit and why it should end, one token at a time."""
    out = []
    for line, limit in zip(draws.tolist(), limits.tolist(), strict=True):
        emitted: list[int] = []
        reason = Finish.LENGTH
        for token in line[:limit]:
            emitted.append(token)
            if token in stop_ids:
                reason = Finish.STOP
                break
        out.append((emitted, int(reason)))
    return out


def emitted_and_reasons(state: DecodeState) -> list[tuple[list[int], int]]:
    return [
        (
            state.tokens[row, state.prompt_length[row] : state.length[row]].tolist(),
            int(state.finish_reason[row]),
        )
        for row in range(state.rows)
    ]


@pytest.mark.parametrize("gamma", [0, 1, 4])
def test_coupled_emits_the_targets_own_draws(gamma: int, x64: None) -> None:
    """Token for token in float64, for drafts of every kind, stops and limits."""
    policy = Toy(vocab_size=4, dtype="float64")
    target = toy_params(policy, seed=0)
    rng = np.random.default_rng(0)
    rows = 32
    prompts = rng.integers(0, 4, (rows, 3)).astype(np.int32)
    ids = rng.permutation(1000)[:rows]
    limits = rng.integers(1, 14, rows)

    def filled(value: float) -> Params:
        return jax.tree.map(lambda x: np.full_like(x, value), target)

    drafts = {
        "far": toy_params(policy, seed=1),
        "the target": target,
        "its opposite": jax.tree.map(lambda x: -3 * x, target),
        "one token only": {**filled(0), "lines": np.tile([50.0, 0, 0, 0], (4, 1))},
        "flat": filled(0),
        "NaN": filled(np.nan),
        "infinite": filled(np.inf),
        "nothing possible": filled(-np.inf),
    }
    cases: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "top_p": 0.9, "stop_ids": (2,)},
        {"temperature": 1.3, "top_k": 3, "min_p": 0.05, "stop_ids": (0, 3)},
        {"temperature": 0.0, "stop_ids": (1,)},
    ]
    for setting in cases:
        config = settings(**setting)
        draws = own_draws(full_table(target), prompts, 13, config, ids)
        wanted = cut(draws, limits, setting.get("stop_ids", ()))
        for name, draft in drafts.items():
            state = start_state(
                policy, target, prompts, limits, cache_length=16, sequence_ids=ids
            )
            state, info = run(
                "coupled", gamma, state, config, target, draft, policy=policy
            )
            assert emitted_and_reasons(state) == wanted, (name, setting)
            if gamma and name == "the target":
                assert info.accepted[:gamma].sum() == 0
            if gamma == 0:
                break


# -- inside a draft --------------------------------------------------------------------

# A chain t -> t + 1 over 4 tokens, or t -> t - 1: likely by so much that every draw of
# any rule is the likeliest token, so that all can be worked out by hand.
CHAIN = Toy(vocab_size=4)
FLAT = np.zeros((4, 4, 4), np.float32)
UPWARDS = {"pages": FLAT, "lines": 90 * np.roll(np.eye(4, dtype=np.float32), 1, 1)}
DOWNWARDS = {"pages": FLAT, "lines": 90 * np.roll(np.eye(4, dtype=np.float32), -1, 1)}
ROOM = 14  # new tokens that fit: S = 16 and prompts of 2


def chain_state(last: np.ndarray, limits: Any = ROOM, **options: Any) -> Any:
    """16 rows whose prompts end with `last`."""
    prompts = np.stack([np.zeros_like(last), last], axis=1).astype(np.int32)
    return start_state(CHAIN, UPWARDS, prompts, limits, cache_length=16, **options)


def follow(last: Any, count: Any) -> list[int]:
    """The first `count` tokens of the chain after `last`."""
    return [(int(last) + 1 + i) % 4 for i in range(int(count))]


ALL_LAST = np.arange(16) % 4
run_chain = functools.partial(run, policy=CHAIN)
drafts = pytest.mark.parametrize("draft", [UPWARDS, DOWNWARDS], ids=["good", "bad"])


@rules
@drafts
def test_stop_inside_a_draft(rule: AcceptRule, draft: Params) -> None:
    """Token 3 stops: it is the first to the fourth of the first round of some row."""
    state = chain_state(ALL_LAST)
    out, info = run_chain(rule, 3, state, settings(stop_ids=(3,)), UPWARDS, draft)
    for row, last in enumerate(ALL_LAST):
        wanted = follow(last, (2 - last) % 4 + 1)
        assert wanted[-1] == 3 and 3 not in wanted[:-1]
        assert emitted_and_reasons(out)[row] == (wanted, Finish.STOP)
    kept = [0, 0, 0, 16] if draft is UPWARDS else [4 * (1 + 2 + 3 + 4), 0, 0, 0]
    np.testing.assert_array_equal(info.accepted, kept)
    check_untouched_beyond(out)


@rules
def test_first_of_two_stops_counts(rule: AcceptRule) -> None:
    state = chain_state(ALL_LAST)
    config = settings(stop_ids=(3, 1))
    out, _ = run_chain(rule, 3, state, config, UPWARDS, UPWARDS)
    for row, last in enumerate(ALL_LAST):
        wanted = follow(last, 1 + last % 2)  # to the next odd token
        assert emitted_and_reasons(out)[row] == (wanted, Finish.STOP)


def check_untouched_beyond(state: DecodeState) -> None:
    """Nothing is written behind the last token: still what start_state put there."""
    for row in range(state.rows):
        assert (state.tokens[row, state.length[row] :] == 3).all()
        assert np.isnan(state.logprobs[row, state.length[row] :]).all()
        start = state.prompt_length[row]
        assert np.isfinite(state.logprobs[row, start : state.length[row]]).all()


@rules
@drafts
def test_limit_inside_a_draft(rule: AcceptRule, draft: Params) -> None:
    """Limits of 1 to 14 tokens, the last of which fills the cache."""
    limits = np.minimum(np.arange(16) + 1, ROOM)
    last = np.full(16, 3)
    state = chain_state(last, limits)
    out, _ = run_chain(rule, 3, state, settings(), UPWARDS, draft)
    for row, limit in enumerate(limits):
        wanted = (follow(3, limit), Finish.LENGTH)
        assert emitted_and_reasons(out)[row] == wanted
    check_untouched_beyond(out)


@rules
def test_stop_at_the_limit_is_a_stop(rule: AcceptRule) -> None:
    """Before it, the limit; at it, the stop; the stop is never cut off."""
    limits = np.arange(16) % 4 + 1
    state = chain_state(np.zeros(16, np.int64), limits)
    out, _ = run_chain(rule, 3, state, settings(stop_ids=(3,)), UPWARDS, UPWARDS)
    for row, limit in enumerate(limits):
        reason = Finish.STOP if limit >= 3 else Finish.LENGTH
        assert emitted_and_reasons(out)[row] == (follow(0, min(limit, 3)), reason)


@rules
@drafts
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_logits_inside_a_draft(rule: AcceptRule, draft: Params, bad: float) -> None:
    """The logits after token 2 are bad; rows that get there keep what they had."""
    lines = UPWARDS["lines"].copy()
    lines[2] = bad
    lines[3] = [0, 0, 0, 90]  # a loop that never meets token 2
    target = {**UPWARDS, "lines": lines}
    out, _ = run_chain(rule, 3, chain_state(ALL_LAST), settings(), target, draft)
    for row, last in enumerate(ALL_LAST):
        if last == 3:
            wanted = ([3] * ROOM, Finish.LENGTH)
        else:
            wanted = (follow(last, 2 - last), Finish.NONFINITE)
        assert emitted_and_reasons(out)[row] == wanted
    check_untouched_beyond(out)
    # A stop or a limit on the token before ends the row first.
    for limits, setting, reason in (
        (ROOM, {"stop_ids": (2,)}, Finish.STOP),
        (1, {}, Finish.LENGTH),
    ):
        state = chain_state(np.full(16, 1), limits)
        config = settings(**setting)  # type: ignore[arg-type]
        out, _ = run_chain(rule, 3, state, config, target, draft)
        assert emitted_and_reasons(out) == [([2], reason)] * 16


# -- rows and what lies around them ----------------------------------------------------


def random_case(seed: int = 3) -> tuple[np.ndarray, np.ndarray, Sampling]:
    """16 prompts, limits, and settings under which rows end for every reason."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, 4, (16, 2)).astype(np.int32)
    limits = rng.integers(2, ROOM + 1, 16)
    return prompts, limits, settings(temperature=1.3, top_p=0.95, stop_ids=(2,))


FAR_TARGET, FAR_DRAFT = toy_params(CHAIN, seed=5), toy_params(CHAIN, seed=6)


@rules
def test_garbage_behind_the_last_token_changes_nothing(rule: AcceptRule) -> None:
    """Stale cache entries and tokens are as if they were not there, bit for bit."""
    prompts, limits, config = random_case()
    outs = []
    for garbage, token in ((0.0, 0), (np.nan, 3), (1e30, 1)):
        state = start_state(
            CHAIN, FAR_TARGET, prompts, limits, cache_length=16, garbage=garbage
        )
        known = np.arange(16)[None] < 2
        state = state.replace(tokens=jnp.where(known, state.tokens, token))  # type: ignore[attr-defined]
        out, info = run_chain(rule, 3, state, config, FAR_TARGET, FAR_DRAFT)
        known = np.arange(16)[None] < out.length[:, None]
        is_new = known & (np.arange(16) >= 2)[None]
        outs.append(
            (
                np.where(known, out.tokens, 0), np.where(is_new, out.logprobs, 0),
                out.length, out.finish_reason, info.accepted,
            )
        )  # fmt: skip
    assert len(set(outs[0][2])) > 3
    for other in outs[1:]:
        for clean, found in zip(outs[0], other, strict=True):
            np.testing.assert_array_equal(clean, found)


@rules
def test_cache_holds_the_targets_entries(rule: AcceptRule) -> None:
    """After every round: positions 0 .. length - 2 of live and of ended rows."""
    prompts, limits, config = random_case()
    state = start_state(CHAIN, FAR_TARGET, prompts, limits, cache_length=16)
    for _ in range(6):
        state, _ = run_chain(
            rule, 3, state, config, FAR_TARGET, FAR_DRAFT, max_rounds=1
        )
        for row in range(16):
            known = state.length[row] - 1
            np.testing.assert_array_equal(
                state.cache[row, :known],
                FAR_TARGET["pages"][state.tokens[row, :known]],
            )


@rules
def test_dead_rows_are_not_written(rule: AcceptRule) -> None:
    """Bit for bit, whatever they hold, the empty slots among them."""
    prompts, limits, config = random_case()
    state = start_state(CHAIN, FAR_TARGET, prompts, limits, cache_length=16)
    dead = np.arange(16) % 3 == 0
    empty = np.arange(16) % 6 == 0
    before = jax.device_get(
        state.replace(  # type: ignore[attr-defined]
            live=jnp.asarray(~dead),
            finish_reason=jnp.where(dead, jnp.int32(Finish.STOP), state.finish_reason),
            length=jnp.where(empty, 0, state.length),
            sequence_id=jnp.where(empty, NONE, state.sequence_id),
        )
    )
    out, info = run_chain(
        rule, 3, jax.tree.map(jnp.asarray, before), config, FAR_TARGET, FAR_DRAFT
    )
    assert (out.length > before.length)[~dead].all()
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(out), strict=True):
        np.testing.assert_array_equal(old[dead], new[dead])
    live_rounds = info.accepted.sum()
    assert live_rounds <= (~dead).sum() * info.num_rounds


@rules
def test_rows_do_not_see_each_other(rule: AcceptRule) -> None:
    """Other prompts, ids, limits and bad logits around a row, another place for it."""
    prompts, limits, config = random_case()
    ids = np.arange(16) * 3 + 1
    state = start_state(
        CHAIN, FAR_TARGET, prompts, limits, cache_length=16, sequence_ids=ids
    )
    out, _ = run_chain(rule, 3, state, config, FAR_TARGET, FAR_DRAFT)
    reference = emitted_and_reasons(out)
    order = np.random.default_rng(1).permutation(16)
    others, other_limits, _ = random_case(seed=4)
    mine = np.arange(16) % 2 == 0
    state = start_state(
        CHAIN, FAR_TARGET, np.where(mine[:, None], prompts, others)[order],
        np.where(mine, limits, other_limits)[order], cache_length=16,
        sequence_ids=np.where(mine, ids, ids + 1000)[order],
    )  # fmt: skip
    # A neighbour with nothing but NaN in its cache.
    spoilt = jnp.asarray((order == 1).reshape(16, 1, 1, 1))
    state = state.replace(cache=jnp.where(spoilt, jnp.nan, state.cache))  # type: ignore[attr-defined]
    moved, _ = run_chain(rule, 3, state, config, FAR_TARGET, FAR_DRAFT)
    found = emitted_and_reasons(moved)
    assert found[list(order).index(1)][1] == Finish.NONFINITE
    for index, row in enumerate(order):
        if mine[row]:
            assert found[index] == reference[row]
            start, end = 2, out.length[row]
            np.testing.assert_array_equal(
                moved.logprobs[index, start:end], out.logprobs[row, start:end]
            )


@rules
def test_logprobs_are_the_targets(rule: AcceptRule) -> None:
    """By each meaning, whatever the draft thought of the token."""
    prompts, limits, _ = random_case()
    table = full_table(FAR_TARGET)
    setting: dict[str, Any] = {"temperature": 0.7, "top_k": 3}
    for kind in LogprobKind:
        config = settings(logprob_kind=kind, **setting)
        meaning = {
            LogprobKind.RAW: settings(),
            LogprobKind.TEMPERATURE: settings(temperature=0.7),
            LogprobKind.PROCESSED: config,
        }[kind]
        state = start_state(CHAIN, FAR_TARGET, prompts, limits, cache_length=16)
        out, _ = run_chain(rule, 3, state, config, FAR_TARGET, FAR_DRAFT)
        for row in range(16):
            tokens = out.tokens[row]
            for at in range(2, out.length[row]):
                line = oracle_logprobs(table[tokens[at - 2], tokens[at - 1]], meaning)
                assert out.logprobs[row, at] == pytest.approx(
                    line[tokens[at]], abs=2e-6
                )
