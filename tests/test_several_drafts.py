"""Several drafts attached at once: which one runs, what is learnt of each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from benchmarks.lib.controllers import Restless
from er_jax.control.controller import Controller
from er_jax.control.explain import explain
from er_jax.costs.table import LatencyTable
from er_jax.drafter import DrafterConfig, PolicyParams, attach_draft
from er_jax.request import request_of
from er_jax.types import FIRST_DRAFT, Program, View
from tests.small import SIZES, small_policy
from tests.test_control import FREE, made

pytestmark = pytest.mark.usefixtures("unoptimized_module")

TWO = (DrafterConfig(window=None), DrafterConfig(bits=4, window=None))
CONFIG = er_jax.RolloutConfig(max_new_tokens=60, n=2, drafter=TWO, gammas=(0, 3))
PROMPTS = [[1, 2, 3], [4, 5]]

LONG = Program(4, 1024, 0)
FIRST, SECOND = (LONG._replace(gamma=4).drafting(View(draft)) for draft in (0, 1))
OPTIONS = (SECOND, FIRST, LONG)


def shapes() -> Any:
    return jax.eval_shape(er_jax.Decoder(SIZES).init, jax.random.key(0))


# -- parameters


def test_drafts_are_made_in_the_order_of_their_configs() -> None:
    params = er_jax.Decoder(SIZES).init(jax.random.key(0))
    both = attach_draft(params, TWO)
    for number, config in enumerate(TWO):
        alone = attach_draft(params, config)
        jax.tree.map(np.testing.assert_array_equal, both.only(number), alone)
        assert not both.only(number).others
    new = er_jax.refresh_draft(attach_draft(params, TWO), TWO)
    jax.tree.map(np.testing.assert_array_equal, new, both)


def test_a_list_of_configs_is_a_tuple() -> None:
    config = er_jax.RolloutConfig(max_new_tokens=4, drafter=list(TWO))  # type: ignore[arg-type]
    assert config.drafter == TWO
    assert hash(config.drafters)


@pytest.mark.parametrize("drafter", [(), (TWO[0], 4), 8, "int8"])
def test_wrong_configs_are_refused(drafter: Any) -> None:
    with pytest.raises(ValueError, match=r"a tuple with one for each draft"):
        er_jax.RolloutConfig(max_new_tokens=4, drafter=drafter)


def test_as_many_configs_as_drafts_are_demanded() -> None:
    policy = er_jax.Decoder(SIZES)
    params = attach_draft(policy.init(jax.random.key(0)), TWO)
    message = r"params has 2 drafts, and drafter 1 configs"
    with pytest.raises(ValueError, match=message):
        er_jax.refresh_draft(params, TWO[0])
    config = er_jax.RolloutConfig(max_new_tokens=4)
    with pytest.raises(ValueError, match=message):
        er_jax.rollout(policy, params, PROMPTS, key=jax.random.key(0), config=config)


def test_a_wrong_further_draft_is_named() -> None:
    small = shapes()
    other = jax.eval_shape(
        er_jax.Decoder(er_jax.DecoderConfig(**{**vars(SIZES), "dim": 32})).init,
        jax.random.key(0),
    )
    for wrong, message in ((other, "has shape"), ({}, "has another structure")):
        params = PolicyParams(policy=small, draft=small, others=(wrong,))
        with pytest.raises(ValueError, match=rf"params.others\[0\] {message}"):
            er_jax.drafter.check_draft(params)


# -- which may run


def test_the_first_draft_is_the_last_resort() -> None:
    drafters = (DrafterConfig(), DrafterConfig(bits=4, window=100, head=28))
    config = er_jax.RolloutConfig(max_new_tokens=4096, drafter=drafters)
    request = request_of([np.ones(3, np.int32)], np.arange(1), config)
    assert request.views_at(4096, 4) == [
        View(1, 28, 100),  # a stated window leaves no choice
        View(0, 64, 512),
        FIRST_DRAFT,
    ]
    assert request.views_at(128, 4) == [View(1), FIRST_DRAFT]
    assert request.views_at(4096, 0) == [FIRST_DRAFT]


@pytest.mark.parametrize("control", ["fixed:4", "paper", "ar"])
def test_other_controls_use_the_first_draft(control: str) -> None:
    config = er_jax.RolloutConfig(max_new_tokens=64, drafter=TWO, control=control)
    request = request_of([np.ones(3, np.int32)], np.arange(1), config)
    assert request.views == (FIRST_DRAFT,)


class InTurn(Restless):
    """Runs each draft in turn, and notes what is kept of it."""

    def __init__(self) -> None:
        super().__init__("best", (0, 3), (4,), seed=0)
        self.kept: dict[int, np.ndarray] = {}

    def choose(
        self, options: Sequence[Program], current: Program | None, **unused: Any
    ) -> Program:
        wanted = 1 - current.draft if current else 0
        drafting = [p for p in options if p.rows == 4 and p.gamma]
        return next(p for p in drafting if p.draft == wanted)

    def observe(
        self,
        program: Program,
        num_rounds: int,
        emitted: np.ndarray,
        seconds: float,
        accepted: np.ndarray | None = None,
        live: int = 0,
    ) -> None:
        assert accepted is not None
        self.kept[program.draft] = self.kept.get(program.draft, 0) + accepted


def test_each_draft_is_the_one_that_its_program_names() -> None:
    """The first draft is another policy and the second the policy itself."""
    policy = small_policy("several drafts")
    params, other = (policy.init(jax.random.key(seed)) for seed in (0, 1))
    pair = PolicyParams(policy=params, draft=other, others=(params,))
    controller = InTurn()
    out = er_jax.rollout(
        policy, pair, PROMPTS, key=jax.random.key(0), config=CONFIG,
        controller=controller,
    )  # fmt: skip
    assert controller.kept[1][:-1].sum() == 0, "all that the policy itself drafts"
    assert controller.kept[0][:-1].sum() > controller.kept[0][-1]
    plain = dataclasses.replace(CONFIG, control="ar")
    wanted = er_jax.rollout(
        policy, params, PROMPTS, key=jax.random.key(0), config=plain
    )
    np.testing.assert_array_equal(out.completion_ids, wanted.completion_ids)
    # Drafts of two kinds are derived where the parameters have none.
    out = er_jax.rollout(
        policy, params, PROMPTS, key=jax.random.key(0), config=CONFIG,
        controller=InTurn(),
    )  # fmt: skip
    assert {p.draft for p in out.stats.programs} == {0, 1}
    assert "draft 2: " in out.stats.summary()
    np.testing.assert_array_equal(out.completion_ids, wanted.completion_ids)


# -- costs


def table_of(first_s: float) -> LatencyTable:
    table = LatencyTable({LONG: 0.010, FIRST: first_s})
    table.weigh_drafts([200.0, 100.0])
    return table


def test_a_draft_that_never_ran_is_predicted_by_its_bytes() -> None:
    # Four passes of half a step each, of which half the bytes are saved.
    assert table_of(0.034).round_seconds(SECOND) == pytest.approx(0.024)
    # Drafts cannot have taken more than what the round takes beyond a step.
    assert table_of(0.014).round_seconds(SECOND) == pytest.approx(0.012)
    table = LatencyTable({LONG: 0.010, FIRST: 0.034})
    assert table.round_seconds(SECOND) == pytest.approx(0.034)
    table.weigh_drafts([200.0, 100.0])
    assert table.round_seconds(SECOND) == pytest.approx(0.024)


def test_one_measured_round_corrects_the_others_of_its_draft() -> None:
    table = table_of(0.034)
    table.seconds[SECOND] = 0.036
    other = SECOND._replace(gamma=2)
    first = other.drafting(FIRST_DRAFT)
    first_s = table.round_seconds(first)
    assert first_s is not None
    expected = (first_s - 0.5 * 2 * 0.005) * 0.036 / 0.024
    assert table.round_seconds(other) == pytest.approx(expected)
    # The first draft and plain decoding are predicted as before.
    without = table_of(0.034)
    for program in (first, LONG._replace(rows=8), FIRST._replace(rows=8)):
        assert table.round_seconds(program) == without.round_seconds(program)


def test_a_window_and_another_draft_are_predicted_together() -> None:
    table = table_of(0.034)
    short = LONG._replace(cache_length=592)
    table.seconds |= {short: 0.007, short._replace(gamma=4): 0.008}
    seeing = SECOND.drafting(View(1, 64, 512))
    found = table.round_seconds(seeing)
    assert found is not None
    # Each of four passes saves what a step over the shorter cache saves.
    assert found == pytest.approx(0.024 - 4 * 0.003)


# -- decisions


def test_the_faster_draft_is_taken_for_what_it_keeps() -> None:
    controller = made({LONG: 0.010, FIRST: 0.030, SECOND: 0.020})
    assert controller.choose(OPTIONS, LONG, compile_s=FREE) == SECOND
    # It is learnt apart, and at once, that its drafts are seldom kept.
    for _ in range(3):
        controller.observe(SECOND, 100, np.array([500, 5, 0, 0, 0]), 2.0)
    assert controller.choose(OPTIONS, SECOND, compile_s=FREE) == FIRST
    assert controller.broken_drafter is None
    assert controller.acceptance.tokens_per_round(4) > 4
    assert "draft 2: a round of 4 drafts costs" in explain(controller, [FIRST])


def test_a_window_of_another_draft_begins_with_what_is_known_of_either() -> None:
    controller = made({LONG: 0.010, FIRST: 0.030, SECOND: 0.020})
    low, middle = np.array([900, 100, 0, 0, 0]), np.array([300, 100, 50, 50, 500])
    seeing = View(1, 64, 512)
    before = controller.acceptance_of(seeing).keep_probs(4)[0]
    controller.observe(SECOND.drafting(View(0, 64, 512)), 100, middle, 2.0)
    near = controller.acceptance_of(seeing).keep_probs(4)[0]
    controller.observe(SECOND, 100, low, 2.0)
    nearest = controller.acceptance_of(seeing).keep_probs(4)[0]
    assert before > near > nearest


def test_what_was_learnt_of_each_draft_is_saved() -> None:
    controller = made({LONG: 0.010, FIRST: 0.030, SECOND: 0.020})
    controller.observe(SECOND, 10, np.array([10, 5, 3, 2, 40]), 0.2)
    state = json.loads(json.dumps(controller.state_dict()))
    other = Controller("best", controller.gammas)
    other.load_state_dict(state)
    assert other.table.seconds == controller.table.seconds
    mine, theirs = (c.acceptance_of(SECOND.view) for c in (controller, other))
    np.testing.assert_array_equal(mine.tested, theirs.tested)
    assert "draft 2: used at each depth" in other.summary()
    # Files of earlier versions have no number of a draft.
    for row in (spans := state["spans"]):
        row[2] = 8
        del row[7]
    other.load_state_dict(state | {"spans": spans})
    assert other.acceptance_of(View(0, 0, 8)).tested.any()


def test_a_draft_that_gains_nothing_is_not_compiled() -> None:
    controller = made({LONG: 0.010, FIRST: 0.030})
    controller.table.weigh_drafts([100.0, 100.0])
    options = {SECOND: 5.0}
    for _ in range(50):
        found = controller.choose(
            OPTIONS, FIRST, compile_s=lambda program: options.get(program, 0.0)
        )
        assert found == FIRST
        controller.observe(FIRST, 10, np.array([1, 1, 1, 1, 40]), 0.3)
