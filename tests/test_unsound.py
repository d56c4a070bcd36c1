"""What may not be seen has no influence: positions past the limit, non-finite entries.

Speculation feeds more than plain decoding does, tokens that are then rejected among it.
None of that may end a row, or change a token of it, whatever the policy makes of it.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from er_jax import steps
from er_jax.acceptance import ACCEPT_RULES
from er_jax.costs import timing
from er_jax.engine.engine import Engine
from er_jax.types import Finish, Params, Program
from tests.learned import Learned, poisoned

pytestmark = pytest.mark.usefixtures("unoptimized_module")

PROMPTS = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [2, 2, 2], [5, 1, 3]]
NEW = 17  # with three prompt tokens: all of the policy's twenty positions
# Compiled for each rule and attention: all but one length are left to the slow tests.
GAMMAS = [4, *(pytest.param(gamma, marks=pytest.mark.slow) for gamma in (1, 2, 8))]


def sample(
    policy: Learned, params: Params, control: str, *, seed: int = 3, **changes: Any
) -> er_jax.Rollout:
    """Sample on fewer slots than sequences, with a draft of other parameters."""
    settings: dict[str, Any] = {"max_new_tokens": NEW, "n": 2, "max_slots": 2}
    config = er_jax.RolloutConfig(control=control, **settings | changes)
    draft = er_jax.quantize(policy.init(1), er_jax.DrafterConfig())
    if control != "ar":
        params = er_jax.PolicyParams(policy=params, draft=draft)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows that end "nonfinite"
        return er_jax.rollout(
            policy, params, PROMPTS, key=jax.random.key(seed), config=config
        )


def assert_same(found: er_jax.Rollout, wanted: er_jax.Rollout) -> None:
    np.testing.assert_array_equal(found.completion_ids, wanted.completion_ids)
    np.testing.assert_array_equal(found.lengths, wanted.lengths)
    np.testing.assert_array_equal(found.finish_reason, wanted.finish_reason)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("accept", ACCEPT_RULES)
def test_no_position_past_the_limit_is_fed(accept: str, gamma: int) -> None:
    """A table of positions that ends where the completions do: NaN behind it."""
    policy = Learned(attention="plain")
    params = policy.init(0)
    out = sample(policy, params, f"fixed:{gamma}", accept=accept)
    assert (out.finish_reason == "length").all()
    assert (out.lengths == NEW).all()
    if accept == "coupled":
        assert_same(out, sample(policy, params, "ar"))
    greedy = sample(policy, params, f"fixed:{gamma}", accept=accept, temperature=0.0)
    assert_same(greedy, sample(policy, params, "ar", temperature=0.0))


def test_the_last_token_is_never_fed() -> None:
    """Nothing follows it: every position that is fed can have a next token."""
    length, limit = np.array([3, 6, 7, 7], np.int32), np.array([8, 8, 8, 8], np.int32)
    state = dataclasses.replace(
        steps.empty_state(Learned(), 4, 8),
        length=length,
        limit=limit,
        live=np.array([True, True, True, False]),
    )
    positions = steps._positions(state, jnp.arange(5)[None])
    wanted = [[2, 3, 4, 5, 6], [5, 6, -1, -1, -1], [6, -1, -1, -1, -1], [-1] * 5]
    np.testing.assert_array_equal(positions, wanted)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("accept", ACCEPT_RULES)
@pytest.mark.parametrize("attention", ["library", "plain"])
def test_a_drafted_token_ends_no_row(attention: str, accept: str, gamma: int) -> None:
    """The token whose entry is infinite ends the rows that it is sampled in."""
    policy = Learned(attention=attention)
    params = poisoned(policy.init(0), token=11)
    out = sample(policy, params, f"fixed:{gamma}", accept=accept)
    is_poison = (out.completion_ids == 11) & out.completion_mask
    last = out.completion_ids[np.arange(len(out.lengths)), out.lengths - 1]
    ended = out.finish_reason == "nonfinite"
    # Sampled last of all it has no time to do harm.
    assert (ended == ((last == 11) & (out.lengths < NEW))).all()
    assert (is_poison.sum(axis=1) == (last == 11)).all()
    assert ended.any()
    assert not ended.all()
    if accept == "coupled":
        assert_same(out, sample(policy, params, "ar"))
    greedy = sample(policy, params, f"fixed:{gamma}", accept=accept, temperature=0.0)
    assert_same(greedy, sample(policy, params, "ar", temperature=0.0))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("accept", ACCEPT_RULES)
@pytest.mark.parametrize("attention", ["library", "plain"])
def test_rows_end_at_a_poisoned_position_and_not_before(
    attention: str, accept: str, gamma: int
) -> None:
    policy = Learned(attention=attention)
    params = poisoned(policy.init(0), position=13)
    out = sample(policy, params, f"fixed:{gamma}", accept=accept)
    assert (out.finish_reason == "nonfinite").all()
    # Positions 3 .. 13 are sampled; what is fed at 13 has no next token.
    assert (out.lengths == 11).all()
    if accept == "coupled":
        assert_same(out, sample(policy, params, "ar"))


@pytest.mark.parametrize("attention", ["library", "plain"])
def test_a_poisoned_prompt_ends_its_rows_before_a_token(attention: str) -> None:
    policy = Learned(attention=attention)
    params = poisoned(policy.init(0), token=5)  # in two of the five prompts
    for control in ("ar", "fixed:4"):
        out = sample(policy, params, control, max_new_tokens=4)
        is_bad = np.repeat([5 in prompt for prompt in PROMPTS], 2)
        assert (out.finish_reason[is_bad] == "nonfinite").all()
        assert (out.lengths[is_bad] == 0).all()
        assert (out.lengths[~is_bad] > 0).all()


@pytest.mark.parametrize(
    "attention", [pytest.param("library", marks=pytest.mark.slow), "plain"]
)
def test_what_a_longer_draft_leaves_behind_is_not_met_by_a_shorter_one(
    attention: str,
) -> None:
    """Draft lengths that change from window to window, plain decoding among them."""

    class Restless(er_jax.Controller):
        turn = 0

        def choose(self, options: Any, current: Any, **about: Any) -> Any:
            self.turn += 1
            gamma = (8, 0, 2, 0)[self.turn % 4]
            return max(p for p in options if p.gamma == gamma)

    policy = Learned(attention=attention)
    params = poisoned(policy.init(0), token=11)
    policy_and_draft = er_jax.PolicyParams(
        policy=params, draft=er_jax.quantize(policy.init(1), er_jax.DrafterConfig())
    )
    controller = Restless("best")
    config = er_jax.RolloutConfig(max_new_tokens=NEW, n=8, max_slots=8)
    with pytest.warns(RuntimeWarning, match="non-finite"):
        out = er_jax.rollout(
            policy, policy_and_draft, PROMPTS, key=jax.random.key(3), config=config,
            controller=controller,
        )  # fmt: skip
    assert set(out.stats.rounds) == {0, 2, 8}
    assert_same(out, sample(policy, params, "ar", n=8, max_slots=8))


def test_a_draft_full_of_nan_costs_time_and_nothing_else() -> None:
    policy = Learned(attention="plain")
    params = policy.init(0)
    draft = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    policy_and_draft = er_jax.PolicyParams(policy=params, draft=draft)
    config = er_jax.RolloutConfig(
        max_new_tokens=NEW, n=2, max_slots=2, control="fixed:4"
    )
    # One that has learnt nothing from other tests, and says what it finds.
    with pytest.warns(RuntimeWarning, match="the draft is stale, broken or"):
        out = er_jax.rollout(
            policy, policy_and_draft, PROMPTS, key=jax.random.key(3), config=config,
            controller=er_jax.Controller("fixed:4"),
        )  # fmt: skip
    assert_same(out, sample(policy, params, "ar"))


def test_measuring_a_round_feeds_no_position_that_the_policy_has_not() -> None:
    """The caches that are measured have room for more: rows would end at once."""
    policy = Learned(max_length=20, attention="plain")
    engine = Engine(policy, "coupled")
    params = er_jax.attach_draft(policy.init(0), er_jax.DrafterConfig())
    infos: list[Any] = []
    start_window = engine.start_window

    def watched(*arguments: Any, **options: Any) -> Any:
        state, window = start_window(*arguments, **options)
        infos.append(window.wait()[0])
        return state, window

    engine.start_window = watched  # type: ignore[method-assign]
    timing.measure_round(engine, params, Program(2, 64, 2))
    assert len(infos) > 1
    assert all(info.finish_reason.max() != Finish.NONFINITE for info in infos)
    assert max(info.length.max() for info in infos) > 10
