"""Choosing programs: by speed, with hysteresis, and compiling only what will pay."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from er_jax import Controller
from er_jax.config import parse_control
from er_jax.control.estimate import PRIOR_KEEP, AcceptanceEstimate
from er_jax.control.guesses import GUESS_MARGIN, guessed_seconds
from er_jax.control.paper import PaperRule
from er_jax.control.probes import HYSTERESIS, PROBE_SHARE
from er_jax.control.rollouts import MAX_SETTINGS
from er_jax.costs.table import LatencyTable
from er_jax.request import row_buckets
from er_jax.types import Program
from tests.test_pass_costs import ROOFLINE, passes

AR, SPEC = Program(4, 128, 0), Program(4, 128, 4)


def made(
    seconds: dict[Program, float], *, keep: float = 0.9, patience: float = 1.0
) -> Controller:
    """A controller sure of its seconds, and that drafts are kept with chance `keep`."""
    controller = Controller("best", (0, 1, 2, 4, 8), patience=patience)
    controller.table.seconds = dict(seconds)
    controller.acceptance.tested[:] = 1e9
    controller.acceptance.kept[:] = 1e9 * keep
    return controller


def compiled_are(
    programs: Iterable[Program], cost: float = 1.0
) -> Callable[[Program], float]:
    programs = set(programs)
    return lambda program: 0.0 if program in programs else cost


NO_DRAFTS = np.zeros(1)
"""The histogram of a window that teaches nothing about acceptance."""

FREE = compiled_are((), cost=0.0)
"""Everything is compiled."""


# What may be chosen.


@pytest.mark.parametrize(
    ("control", "gammas", "allowed"),
    [
        ("ar", (0, 2), (0,)),
        ("ar", (), (0,)),
        ("fixed:4", (0, 2), (4,)),
        ("fixed:0", (0, 2), (0,)),
        ("best", (4, 0, 2, 2), (0, 2, 4)),
        ("paper", (0, 2), (0, 5, 7, 9, 11)),
    ],
)
def test_what_a_control_allows(
    control: str, gammas: tuple[int, ...], allowed: tuple[int, ...]
) -> None:
    assert parse_control(control, gammas) == allowed
    assert Controller(control, gammas).gammas == allowed


@pytest.mark.parametrize(
    ("control", "gammas", "parts"),
    [
        ("fast", (0, 2), ("control='fast'", "'best'", "'ar'", "'fixed:g'")),
        ("fixed:", (0, 2), ("control='fixed:'", "whole number")),
        ("fixed:-1", (0, 2), ("control='fixed:-1'", "whole number")),
        ("fixed:2.5", (0, 2), ("control='fixed:2.5'", "whole number")),
        ("best", (2, 4), ("gammas=(2, 4)", "0", "fixed:g")),
        ("best", (), ("gammas=()", "0", "fixed:g")),
        ("best", (0, -2), ("gammas=(0, -2)", "at least 0")),
    ],
)
def test_what_it_does_not(
    control: str, gammas: tuple[int, ...], parts: tuple[str, ...]
) -> None:
    for make in (parse_control, Controller):
        with pytest.raises(ValueError) as error:
            make(control, gammas)
        for part in parts:
            assert part in str(error.value)


def test_negative_patience() -> None:
    with pytest.raises(ValueError, match=r"patience=-1.*at least 0"):
        Controller(patience=-1)


# Acceptance.


def test_acceptance_by_hand() -> None:
    """10 row-rounds of 3 drafts: 2 kept none, 1 kept one, 3 kept two, 4 all three.

    Tested at depths 1, 2, 3: 10, 8, 7. Kept: 8, 7, 4. The prior is 20 rounds of 0.95;
    pooled (19 + 19) / (25 + 20), and each depth is drawn to it with weight 20.
    """
    estimate = AcceptanceEstimate.empty(3)
    estimate.observe(np.array([2, 1, 3, 4]))
    np.testing.assert_allclose(estimate.tested, [10, 8, 7], rtol=1e-3)
    np.testing.assert_allclose(estimate.kept, [8, 7, 4], rtol=1e-3)
    pooled = (8 + 7 + 4 + 19) / (10 + 8 + 7 + 20)
    chances = [(8 + 20 * pooled) / 30, (7 + 20 * pooled) / 28, (4 + 20 * pooled) / 27]
    np.testing.assert_allclose(estimate.keep_probs(3), chances, rtol=1e-6)
    a, b, c = chances
    assert estimate.tokens_per_round(3) == pytest.approx(1 + a + a * b + a * b * c)
    assert estimate.tokens_per_round(1) == pytest.approx(1 + a)
    assert estimate.tokens_per_round(0) == 1


def test_acceptance_before_anything_was_drafted() -> None:
    estimate = AcceptanceEstimate.empty(4)
    np.testing.assert_allclose(estimate.keep_probs(4), PRIOR_KEEP)
    estimate.observe(np.array([500]))  # plain rounds test no draft
    np.testing.assert_allclose(estimate.keep_probs(4), PRIOR_KEEP)


def test_short_drafts_teach_about_long_ones() -> None:
    """Depths never tested follow the pooled chance, and depths beyond are not lost."""
    estimate = AcceptanceEstimate.empty(4)
    estimate.observe(np.array([50_000, 50_000]))
    np.testing.assert_allclose(estimate.keep_probs(4), 0.5, rtol=0.001)
    estimate.observe(np.array([0, 0, 0, 0, 0, 0, 10]))  # six drafts: deeper than known
    assert estimate.tested.shape == (4,)
    np.testing.assert_allclose(estimate.tested[1:], 10, rtol=1e-3)


def test_old_acceptance_is_forgotten() -> None:
    """The policy moves: half of the evidence is left after 14 thousand row-rounds."""
    estimate = AcceptanceEstimate.empty(1)
    estimate.observe(np.array([0, 1000]))
    before = estimate.tested[0]
    estimate.observe(np.array([13_863]))  # plain rounds, which say nothing
    assert estimate.tested[0] == before
    estimate.observe(np.array([0, 13_863]))
    assert estimate.tested[0] == pytest.approx(before / 2 + 13_863)
    for _ in range(100):
        estimate.observe(np.array([700, 300]))
    assert estimate.keep_probs(1)[0] == pytest.approx(0.3, abs=0.01)


# Choosing.


def test_speed_is_expected_tokens_over_seconds() -> None:
    controller = made({AR: 0.010, SPEC: 0.020}, keep=0.5)
    assert controller.speed(AR) == pytest.approx(100)
    assert controller.speed(SPEC) == pytest.approx(
        (1 + 0.5 + 0.25 + 0.125 + 0.0625) / 0.02
    )
    assert Controller().speed(AR) is None


@pytest.mark.parametrize(("keep", "winner"), [(0.9, SPEC), (0.3, AR)])
def test_the_fastest_is_chosen(keep: float, winner: Program) -> None:
    """Four drafts for the price of two steps: 4.1 tokens at 0.9, 1.4 at 0.3."""
    controller = made({AR: 0.010, SPEC: 0.020}, keep=keep)
    for current in (None, AR, SPEC):
        for options in ([AR, SPEC], [SPEC, AR]):
            assert controller.choose(options, current, compile_s=FREE) == winner


def test_seconds_decide_between_sizes() -> None:
    """Rows and cache length are choices too, not only gamma."""
    small, large = Program(4, 128, 0), Program(8, 256, 0)
    controller = made({small: 0.010, large: 0.015})
    assert controller.choose([small, large], large, compile_s=FREE) == small
    controller = made({small: 0.015, large: 0.010})
    assert controller.choose([small, large], small, compile_s=FREE) == large


def test_the_last_option_is_taken_while_nothing_is_known() -> None:
    controller = Controller("best", (0, 4))
    options = [SPEC, AR]
    nothing = compiled_are(())
    assert controller.choose(options, None, compile_s=nothing) == AR
    assert controller.choose(options, None, compile_s=FREE) == AR
    # What is compiled goes before what is not.
    assert controller.choose(options, None, compile_s=compiled_are([SPEC])) == SPEC


def test_small_gains_do_not_move_the_batch() -> None:
    for gain in (HYSTERESIS - 0.01, HYSTERESIS + 0.01):
        other = Program(2, 128, 0)
        controller = made({AR: 0.010, other: 0.010 / (1 + gain)})
        chosen = controller.choose([other, AR], AR, compile_s=FREE)
        assert chosen == (other if gain > HYSTERESIS else AR)
        # Without a batch to move, the faster one it is.
        assert controller.choose([other, AR], None, compile_s=FREE) == other


def test_what_is_compiled_and_was_never_timed_is_tried() -> None:
    """At a promise of up to a fifth less; what would have to be compiled is not."""
    controller = made({AR: 0.010, SPEC: 0.0450}, keep=0.9)
    other = SPEC._replace(gamma=2)
    promised, known = controller.speed(other), controller.speed(AR)
    assert promised is not None and known is not None
    assert 0.8 * known < promised < known
    options = [SPEC, other, AR]
    assert controller.choose(options, AR, compile_s=FREE) == other
    price = compiled_are([AR, SPEC], cost=1.0)
    assert controller.choose(options, AR, compile_s=price) == AR
    controller.table.seconds[other] = controller.table.round_seconds(other) or 0.0
    assert controller.choose(options, AR, compile_s=FREE) == AR


def test_a_current_program_that_cannot_run_any_more_is_left() -> None:
    controller = made({AR: 0.010, SPEC: 0.009})
    bigger = Program(8, 128, 0)
    assert controller.choose([AR], bigger, compile_s=FREE) == AR


# Rent or buy.


def test_nothing_is_compiled_before_its_price_was_lost() -> None:
    """The compiled program makes half the speed: every second of it loses half one."""
    controller = made({AR: 0.010, SPEC: 0.005 * 4.0951}, keep=0.9)
    price = compiled_are([AR], cost=2.9)
    assert controller.choose([SPEC, AR], AR, compile_s=price) == AR
    seconds = 0.0
    while controller.choose([SPEC, AR], AR, compile_s=price) == AR:
        controller.observe(AR, 100, NO_DRAFTS, 1.0)
        seconds += 1.0
        assert seconds < 100
    assert seconds == 6.0
    # Once it is compiled there is nothing left to wait for.
    ready = compiled_are([AR, SPEC])
    assert controller.choose([SPEC, AR], AR, compile_s=ready) == SPEC


@pytest.mark.parametrize(("patience", "seconds"), [(0.0, 0), (0.5, 3), (2.0, 12)])
def test_patience_scales_the_wait(patience: float, seconds: int) -> None:
    controller = made({AR: 0.010, SPEC: 0.005 * 4.0951}, patience=patience)
    price = compiled_are([AR], cost=2.9)
    for _ in range(seconds):
        assert controller.choose([SPEC, AR], AR, compile_s=price) == AR
        controller.observe(AR, 100, NO_DRAFTS, 1.0)
    assert controller.choose([SPEC, AR], AR, compile_s=price) == SPEC


def test_what_is_not_better_is_never_compiled() -> None:
    controller = made({AR: 0.010, SPEC: 0.0405}, keep=0.9)
    price = compiled_are([AR], cost=0.001)
    for _ in range(1000):
        assert controller.choose([SPEC, AR], AR, compile_s=price) == AR
        controller.observe(AR, 100, NO_DRAFTS, 1.0)


@pytest.mark.parametrize("gain", [1.1, 1.5, 3.0, 20.0])
@pytest.mark.parametrize("work_s", [0.3, 2.0, 3.9, 7.0, 30.0, 400.0])
def test_at_most_twice_the_best_possible(gain: float, work_s: float) -> None:
    """Against someone who knows how much work there will be.

    Work is measured in seconds of the compiled program; the other is `gain` times as
    fast and takes 2 s to compile. One window is added, the grain of all decisions.
    """
    price, window_s = 2.0, 0.05
    controller = made({AR: 0.010, SPEC: 0.010 * 4.0951 / gain}, keep=0.9)
    ready = {AR}
    left, spent, current = work_s, 0.0, AR
    while left > 1e-9:
        chosen = controller.choose(
            [SPEC, AR], current, compile_s=compiled_are(ready, price)
        )
        if chosen not in ready:
            ready.add(chosen)
            spent += price
        speed = gain if chosen == SPEC else 1.0
        seconds = min(window_s, left / speed)
        rounds = max(int(seconds / controller.table.seconds[chosen]), 1)
        # The table is kept as it is: this is about decisions, not about learning.
        controller.observe(chosen, rounds, NO_DRAFTS, seconds)
        controller.table.seconds.update({AR: 0.010, SPEC: 0.010 * 4.0951 / gain})
        left -= seconds * speed
        spent += seconds
        current = chosen
    best = min(work_s, price + work_s / gain)
    assert spent <= 2 * best + window_s
    if work_s <= price:
        assert ready == {AR}  # it could never have paid
    if work_s >= 400:
        assert ready == {AR, SPEC}


def test_time_is_booked_against_what_was_wanted() -> None:
    """Not against programs that were no option, or were compiled."""
    other = Program(2, 128, 0)
    controller = made({AR: 0.010, SPEC: 0.02, other: 0.009})
    price = compiled_are([AR], cost=2.0)
    assert controller.choose([SPEC, AR], AR, compile_s=price) == AR
    controller.observe(AR, 500, NO_DRAFTS, 5.0)
    # SPEC has been missed for its price; `other` has not.
    assert controller.choose([other, AR], AR, compile_s=price) == AR
    assert controller.choose([SPEC, AR], AR, compile_s=price) == SPEC


def test_seconds_are_lost_once() -> None:
    """A batch too large was missed for all that are smaller; one of them is enough.

    At two rows live of 4: two rows would be 2 times as fast, one row cannot run. At one
    live, two rows are 2 and one is 2.2 times as fast.
    """
    two, one = AR._replace(rows=2), AR._replace(rows=1)
    controller = made({AR: 0.022, two: 0.011, one: 0.010})
    price = compiled_are([AR], cost=4.0)
    for options in ([two, AR], [one, two, AR]):
        for _ in range(3):
            assert controller.choose(options, AR, compile_s=price) == AR
            controller.observe(AR, 46, NO_DRAFTS, 1.012)
    # Two rows were missed for 6 half seconds, one row for 3 times 0.55.
    assert controller._accounts.lost_s[two] == pytest.approx(6 * 1.012 / 2, rel=0.1)
    before = controller._accounts.lost_s[one]
    controller.patience = 0.75
    assert controller.choose([one, two, AR], AR, compile_s=price) == two
    # What is left of it is what one row gains beside two, a tenth.
    share = (0.011 - 0.010) / (0.022 - 0.010)
    assert controller._accounts.lost_s[one] == pytest.approx(share * before, rel=0.1)
    assert two not in controller._accounts.lost_s


def test_a_smaller_batch_takes_off_only_what_it_could_have_run() -> None:
    two, one = AR._replace(rows=2), AR._replace(rows=1)
    controller = made({AR: 0.022, two: 0.011, one: 0.005})
    price = compiled_are([AR], cost=4.0)
    for options, windows in (([two, AR], 2), ([one, two, AR], 6)):
        for _ in range(windows):
            assert controller.choose(options, AR, compile_s=price) == AR
            controller.observe(AR, 46, NO_DRAFTS, 1.012)
    lost_s = dict(controller._accounts.lost_s)
    assert lost_s[two] < 4.2
    assert lost_s[one] > 4.2
    price = compiled_are([AR], cost=4.2)
    assert controller.choose([one, two, AR], AR, compile_s=price) == one
    assert controller._accounts.lost_s[two] == max(lost_s[two] - lost_s[one], 0)


# The first look.


def new(*, patience: float = 1.0, control: str = "best") -> Controller:
    return Controller(control, (0, 2, 4, 8), patience=patience)


def test_one_row_is_looked_at_when_it_is_worth_it() -> None:
    """At six times the price, a plain window and one of twice its work."""
    controller, cost = new(), compiled_are([], cost=1.99)
    assert controller.first_look(1, 256, cost) == ()
    for _ in range(35):
        assert controller.choose([SPEC, AR], AR, compile_s=compiled_are([AR])) == AR
        controller.observe(AR, 100, NO_DRAFTS, 1.0)
        assert controller.first_look(1, 256, cost) == ()
    controller.observe(AR, 100, NO_DRAFTS, 1.0)
    pair = (Program(1, 256, 0), Program(1, 256, 4))
    assert controller.first_look(1, 256, cost) == pair
    # Half of it is compiled already.
    assert new().first_look(1, 256, compiled_are([], cost=0.0)) == pair
    controller.observe_first_look({pair[0]: 0.01, pair[1]: 0.02}, 50)
    assert controller.first_look(1, 256, cost) == ()
    assert controller.knows_drafts


def test_who_cannot_choose_has_nothing_to_look_at() -> None:
    for control in ("ar", "fixed:0"):
        assert new(control=control).first_look(1, 256, FREE) == ()
    # The published rule is told of costs before it decides.
    paper = new(control="paper").first_look(1, 256, compiled_are([], cost=1e9))
    assert [p.gamma for p in paper] == [0, 5]


def test_after_the_first_look_what_was_lost_is_booked() -> None:
    controller = new()
    for _ in range(60):
        controller.observe(AR, 100, NO_DRAFTS, 1.0)
    one = Program(1, 128, 0)
    # A round of four for the price of two steps.
    controller.observe_first_look({one: 0.005, one._replace(gamma=4): 0.010}, 50)
    ready = compiled_are([AR], cost=5.0)
    bought = controller.choose([SPEC, AR], AR, compile_s=ready)
    assert bought == SPEC
    assert controller.choose([SPEC, AR], SPEC, compile_s=FREE) == SPEC


def test_where_one_row_gains_nothing_no_draft_is_compiled() -> None:
    """However fast a draft may look at other sizes, and whatever was lost."""
    controller = new(patience=0)
    one = Program(1, 128, 0)
    controller.observe_first_look({one: 0.002, one._replace(gamma=4): 0.0095}, 50)
    # Seven times a step for four drafts: it is hoped to be faster by none.
    controller.table.seconds |= {AR: 0.010, SPEC: 0.005}
    controller.observe(AR, 100, NO_DRAFTS, 100.0)
    price = compiled_are([AR], cost=1.0)
    assert controller.choose([SPEC, AR], AR, compile_s=price) == AR
    # What is compiled may run.
    assert controller.choose([SPEC, AR], AR, compile_s=FREE) == SPEC
    # At one row it does pay: 4.5 tokens for 4 steps.
    controller = new(patience=0)
    controller.observe_first_look({one: 0.002, one._replace(gamma=4): 0.008}, 50)
    controller.table.seconds |= {AR: 0.010, SPEC: 0.005}
    assert controller.choose([SPEC, AR], AR, compile_s=price) == SPEC


def test_who_always_drafts_still_makes_its_batch_smaller() -> None:
    """Though one row was timed with drafts alone, and nothing compared with it."""
    controller = Controller("fixed:4")
    one, full = Program(1, 128, 4), Program(16, 128, 4)
    controller.table.seconds |= {one: 0.01, full: 0.04}
    options = [one._replace(rows=4), full]
    price = compiled_are([full], cost=1.0)
    for _ in range(10):
        chosen = controller.choose(options, full, compile_s=price)
        if chosen != full:
            break
        controller.observe(full, 25, np.array([0, 0, 0, 0, 1]), 1.0)
    assert chosen == options[0]


def test_drafts_that_are_compiled_are_tried_without_a_look() -> None:
    controller = new()
    controller.observe(AR, 1000, NO_DRAFTS, 10.0)
    assert controller.choose([SPEC, AR], AR, compile_s=FREE) == SPEC
    assert controller.choose([SPEC, AR], AR, compile_s=compiled_are([AR])) == AR


# Drafts for the batch that runs, guessed from its plain steps.

LONG = Program(32, 4096, 0)
SEEING = LONG._replace(gamma=4, head=64, window=512)


def test_a_round_is_guessed_from_steps() -> None:
    short = LONG._replace(cache_length=SEEING.draft_length)
    table = LatencyTable({LONG: 0.010, short: 0.004})
    whole = GUESS_MARGIN * (4 * 0.5 + 5**0.5) * 0.010
    assert guessed_seconds(table, LONG._replace(gamma=4)) == pytest.approx(whole)
    # Every draft saves what a step over the ring saves, 6 of 10 ms, but a round never
    # costs less than a step, and what drafts add to a step as short as the ring.
    least = GUESS_MARGIN * (0.010 + (4 * 0.5 + 5**0.5 - 1) * 0.004)
    assert guessed_seconds(table, SEEING) == pytest.approx(least)
    assert guessed_seconds(LatencyTable(), SEEING) is None


def test_drafts_are_bought_for_a_batch_whose_steps_promise_a_gain() -> None:
    """About a fifth of plain decoding is lost by the guess; a compilation costs 2 s."""
    controller = new()
    options = [SEEING, LONG._replace(gamma=4), LONG]
    price = compiled_are([LONG], cost=2.0)
    seconds = 0
    while (chosen := controller.choose(options, LONG, compile_s=price)) == LONG:
        controller.observe(LONG, 100, NO_DRAFTS, 1.0)
        seconds += 1
        assert seconds < 100
    assert chosen == SEEING
    gain = 0.010 / (guessed_seconds(controller.table, SEEING) or math.inf)
    gain *= controller.acceptance.tokens_per_round(4)
    assert 1.1 < gain < 1.5
    # Nothing is known of the batch before its first window.
    assert seconds == 1 + math.ceil(2.0 / (1 - 1 / gain))
    # What was timed is believed.
    controller.observe(SEEING, 100, np.array([0, 0, 0, 0, 32]), 8.0)
    options = [SEEING, LONG]
    assert controller.choose(options, SEEING, compile_s=FREE) == LONG


def test_steps_that_promise_little_leave_the_first_look_to_one_row() -> None:
    controller = new()
    price = compiled_are([AR], cost=2.0)
    for _ in range(100):
        assert controller.choose([SPEC, AR], AR, compile_s=price) == AR
        controller.observe(AR, 100, NO_DRAFTS, 1.0)
    assert controller.first_look(1, 128, price) != ()
    # Drafts that were timed for a batch tell nothing of one row.
    controller.table.seconds[SEEING] = 0.050
    assert controller.knows_drafts
    assert controller.first_look(1, 128, price) != ()


# Live rows fall.


def toy_seconds(program: Program) -> float:
    """Bound by memory at few rows and by arithmetic at many, as devices are.

    A step of up to 16 row-positions costs the same, as does a draft of up to 5 rows,
    which is 0.3 of a step; beyond that both grow, less than in proportion.
    """
    rows, _, gamma = program[:3]
    step = max(1.0, rows * (gamma + 1) / 16) ** 0.7
    draft = 0.3 * max(1.0, rows / 5) ** 0.7
    return 0.001 * rows**0.3 * (step + gamma * draft)


def test_speculation_switches_on_as_rows_end() -> None:
    """Full batches decode plainly, and the fewer rows are left the longer the drafts.

    By hand: at 0.9 kept, rounds of 0, 1, 2, 4, 8 drafts emit 1, 1.9, 2.71, 4.10, 6.13
    tokens. Per step they take 1, 2.30, ... with 16 rows or more, 1, 1.42, 2.16, ...
    with 8, and 1, 1.3, 1.6, 2.2, 3.4 with 1: best are 0, 1 and 4 drafts.
    """
    controller = Controller("best", (0, 1, 2, 4, 8))
    controller.acceptance.tested[:] = 1e9
    controller.acceptance.kept[:] = 0.9e9
    buckets = row_buckets(64)
    for rows in buckets:
        for gamma in controller.gammas:
            program = Program(rows, 128, gamma)
            controller.table.seconds[program] = toy_seconds(program)
    chosen: dict[int, Program] = {}
    current = None
    for live in range(64, 0, -1):
        options = [
            Program(rows, 128, gamma)
            for gamma in sorted(controller.gammas, reverse=True)
            for rows in buckets
            if rows >= live
        ]
        current = controller.choose(options, current, compile_s=FREE)
        chosen[live] = current
        fastest = max(options, key=lambda p: controller.speed(p) or 0)
        reached, possible = controller.speed(current), controller.speed(fastest)
        assert reached and possible and reached >= possible / (1 + HYSTERESIS) - 1e-9
    for live, gamma in ((64, 0), (16, 0), (8, 1), (6, 2), (3, 4), (1, 4)):
        assert chosen[live] == Program(live, 128, gamma)
    gammas = [chosen[live].gamma for live in range(64, 0, -1)]
    assert gammas == sorted(gammas)  # only ever on
    assert set(gammas) == {0, 1, 2, 4}
    sizes = [chosen[live].rows for live in range(64, 0, -1)]
    assert sizes == sorted(sizes, reverse=True)


def test_speculation_switches_off_where_drafts_are_rejected() -> None:
    controller = made({AR: 0.010, SPEC: 0.015})
    controller.acceptance.tested[:] = 1e3
    controller.acceptance.kept[:] = 0.9e3
    num_windows = 0
    while controller.choose([SPEC, AR], SPEC, compile_s=FREE) == SPEC:
        controller.observe(SPEC, 10, np.array([190, 5, 2, 2, 1]), 0.15)
        num_windows += 1
        assert num_windows < 100
    assert num_windows == 1  # two hundred rounds of this cannot be chance


def test_a_slow_fall_of_acceptance_is_followed() -> None:
    """Too little for a contradiction; the average follows, and nothing is reported."""
    controller = Controller("best", (0, 4))
    for window in range(20):
        controller.observe(SPEC, 10, windows_of(0.95 - 0.01 * window), 0.1)
    assert controller.broken_drafter is None
    assert controller.acceptance.tested[0] > 3000
    assert 0.8 < controller.acceptance.keep_probs(1)[0] < 0.9


def windows_of(share: float, rows: int = 200) -> np.ndarray:
    """Return a histogram in which each of four drafts is kept with this chance."""
    survival = np.array([share**depth for depth in range(5)] + [0.0])
    return np.round(rows * (survival[:-1] - survival[1:])).astype(int)


def test_a_broken_drafter_is_named() -> None:
    controller = Controller("best", (0, 4))
    for _ in range(50):
        controller.observe(SPEC, 10, windows_of(0.97), 0.1)
    assert controller.broken_drafter is None
    assert controller.acceptance.keep_probs(4).min() > 0.96
    controller.observe(SPEC, 10, windows_of(0.05), 0.1)
    assert controller.broken_drafter is not None
    expected, found = controller.broken_drafter
    assert expected == pytest.approx(0.97, abs=0.01)
    assert found == pytest.approx(0.05, abs=0.02)
    # All that was learnt before weighs as little as a prior now.
    assert controller.acceptance.keep_probs(1)[0] < 0.2
    controller.start_rollout()
    assert controller.broken_drafter is None


def test_a_better_drafter_is_noticed_and_not_reported() -> None:
    controller = Controller("best", (0, 4))
    for _ in range(50):
        controller.observe(SPEC, 10, windows_of(0.5), 0.1)
    controller.start_rollout()
    controller.observe(SPEC, 10, windows_of(0.98), 0.1)
    assert controller.broken_drafter is None
    assert controller.acceptance.keep_probs(1)[0] > 0.9


def test_stops_inside_drafts_are_no_broken_drafter() -> None:
    """Used are few, because completions end; kept are as many as ever."""
    controller = Controller("best", (0, 4))
    controller.observe(SPEC, 10, windows_of(0.3), 0.1, windows_of(0.97))
    assert controller.broken_drafter is None
    assert controller.acceptance.keep_probs(1)[0] < 0.4


def test_few_rounds_contradict_nothing() -> None:
    estimate = AcceptanceEstimate.empty(4)
    estimate.observe(windows_of(0.95, rows=1000))
    assert estimate.contradiction(windows_of(0.0, rows=1)) is None
    assert estimate.contradiction(windows_of(0.85, rows=10_000)) is None
    assert estimate.contradiction(np.array([500])) is None
    assert estimate.contradiction(windows_of(0.0, rows=100)) is not None


def test_errors_of_the_estimate() -> None:
    """Standard deviations of beta distributions: sqrt(p (1 - p) / (n + 1))."""
    estimate = AcceptanceEstimate.empty(2)
    before = estimate.keep_errors(2)
    np.testing.assert_allclose(before, np.sqrt(0.95 * 0.05 / 21))
    estimate.observe(windows_of(0.95, rows=1000))
    assert (estimate.keep_errors(2) < before / 5).all()


def test_acceptance_is_known_per_setting() -> None:
    controller = Controller("best", (0, 4))
    controller.start_rollout((1.0,))
    for _ in range(20):
        controller.observe(SPEC, 10, windows_of(0.9), 0.1)
    hot = controller.acceptance.keep_probs(4)
    controller.start_rollout((0.0,))
    # What the last setting says is where another begins, with little weight.
    np.testing.assert_allclose(controller.acceptance.keep_probs(4), hot, atol=0.03)
    assert controller.acceptance.tested.max() <= 20
    for _ in range(20):
        controller.observe(SPEC, 10, windows_of(0.99), 0.1)
    assert controller.acceptance.keep_probs(4).min() > 0.97
    controller.start_rollout((1.0,))
    np.testing.assert_allclose(controller.acceptance.keep_probs(4), hot, rtol=1e-4)
    again = Controller("best", (0, 4))
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    np.testing.assert_allclose(again.acceptance.keep_probs(4), hot, rtol=1e-4)
    again.start_rollout((0.0,))
    assert again.acceptance.keep_probs(4).min() > 0.97


def test_ar_and_fixed_have_one_gamma_to_choose() -> None:
    for control, gamma in (("ar", 0), ("fixed:4", 4)):
        controller = Controller(control)
        options = [Program(rows, 128, g) for g in controller.gammas for rows in (4, 8)]
        assert {program.gamma for program in options} == {gamma}
        chosen = controller.choose(options, None, compile_s=compiled_are(()))
        assert chosen == Program(8, 128, gamma)  # the fall-back comes last
        controller.observe(chosen, 10, np.zeros(gamma + 1, int), 0.1)
        assert controller.speed(chosen) is not None


# Keeping what was learnt.


def test_state_round_trip() -> None:
    controller = made({AR: 0.010, SPEC: 0.005 * 4.0951}, keep=0.9)
    price = compiled_are([AR], cost=3.0)
    for _ in range(4):
        controller.choose([SPEC, AR], AR, compile_s=price)
        controller.observe(AR, 100, NO_DRAFTS, 1.0)
    controller.observe(SPEC, 7, np.array([1, 2, 3, 4, 5]), 0.2)
    text = json.dumps(controller.state_dict())
    again = Controller("best", controller.gammas)
    again.load_state_dict(json.loads(text))
    assert again.state_dict() == controller.state_dict()
    for program in (AR, SPEC, Program(3, 256, 2)):
        assert again.speed(program) == controller.speed(program)
    # Time that was lost counts on: both compile after the same further wait.
    waits = []
    for one in (controller, again):
        seconds = 0
        while one.choose([SPEC, AR], AR, compile_s=price) == AR:
            one.observe(AR, 100, NO_DRAFTS, 1.0)
            seconds += 1
        waits.append(seconds)
    assert waits[0] == waits[1] > 0
    # And they share nothing.
    again.observe(SPEC, 7, np.array([9, 0, 0, 0, 0]), 0.5)
    assert again.state_dict() != controller.state_dict()


def test_state_is_not_shared_with_what_was_saved() -> None:
    controller = Controller("best", (0, 2))
    saved = controller.state_dict()
    before = json.dumps(saved)
    controller.observe(Program(1, 64, 2), 5, np.array([1, 1, 3]), 0.1)
    assert json.dumps(saved) == before


@pytest.mark.parametrize(
    ("control", "gammas"), [("best", (0, 4)), ("fixed:2", (0, 2)), ("ar", (0, 2))]
)
def test_state_of_another_kind(control: str, gammas: tuple[int, ...]) -> None:
    saved = Controller("best", (0, 2)).state_dict()
    other = Controller(control, gammas)
    with pytest.raises(ValueError) as error:
        other.load_state_dict(saved)
    for part in ("best", "[0, 2]", control, "same settings"):
        assert part in str(error.value)


def test_repr_says_what_it_is() -> None:
    assert repr(Controller("best", (0, 4))) == "Controller('best', gammas=(0, 4))"


def test_the_summary_names_settings_and_deviations() -> None:
    controller = Controller("best", (0, 2, 4))
    assert controller.summary() == f"{controller!r}: 0 programs timed"
    controller.start_rollout((0.7, 0.0, 1.0, 0.0))
    controller.observe(Program(4, 64, 2), 100, np.array([40, 36, 324]), 1.0)
    first, line = controller.summary().splitlines()
    assert first == f"{controller!r}: 1 programs timed"
    assert line.startswith("temperature 0.7, top_k 0, top_p 1, min_p 0: ")
    # 360 of 400 and 324 of 360, each drawn a little to what was believed before.
    chances = controller.acceptance.keep_probs(2)
    assert 0.9 < chances.min() and chances.max() < 0.91
    error = 100 * math.sqrt(0.09 / 400)
    found = [float(word) for word in re.findall(r"± ([\d.]+)", line)]
    assert found == pytest.approx([error, error], rel=0.1)
    assert re.findall(r"([\d.]+) ±", line) == [f"{100 * c:.1f}" for c in chances]


# Probing.


def probing(share: float, num_windows: int) -> tuple[float, float]:
    """Run a controller whose drafts were broken, and may be again; seconds by kind.

    A round of four drafts takes three steps: at 0.95 kept it is 1.5 times as fast.
    """
    controller = made({AR: 0.010, SPEC: 0.030})
    controller.start_rollout()
    for estimate in (controller.acceptance, controller._rollouts.kept[()]):
        estimate.tested[:] = 1000
        estimate.kept[:] = 0
    spent = {AR: 0.0, SPEC: 0.0}
    current = AR
    for _ in range(num_windows):
        current = controller.choose([SPEC, AR], current, compile_s=FREE)
        num_rounds = 25 if current == AR else 16
        seconds = num_rounds * controller.table.seconds[current]
        emitted = windows_of(share) if current == SPEC else NO_DRAFTS
        controller.observe(current, num_rounds, emitted, seconds)
        spent[current] += seconds
    return spent[AR], spent[SPEC]


def test_probing_is_bounded() -> None:
    plain_s, probed_s = probing(share=0.0, num_windows=2000)
    assert 0.5 * PROBE_SHARE < probed_s / plain_s <= PROBE_SHARE


def test_a_probe_brings_speculation_back() -> None:
    """Nothing before the time for it is earned, and everything after it."""
    plain_s, drafted_s = probing(share=0.95, num_windows=2000)
    assert plain_s == pytest.approx(0.48 / PROBE_SHARE, rel=0.05)
    assert drafted_s > 2 * plain_s


def test_nothing_is_probed_that_could_not_pay() -> None:
    controller = made({AR: 0.010, SPEC: 0.060})  # 4.5 tokens at best
    controller.observe(AR, 10, NO_DRAFTS, 1e6)
    assert controller.choose([SPEC, AR], AR, compile_s=FREE) == AR
    controller = made({AR: 0.010, SPEC: 0.030}, keep=0.0)
    controller.observe(AR, 10, NO_DRAFTS, 1e6)
    ready = compiled_are([AR], cost=1e9)
    assert controller.choose([SPEC, AR], AR, compile_s=ready) == AR, "not compiled"
    assert controller.choose([SPEC, AR], AR, compile_s=FREE) == SPEC


# The published rule in a rollout; its own tests are in test_trace_replay.py.


def test_the_published_rule_decides_on_gamma_and_speed_on_the_rest() -> None:
    controller = Controller("paper")
    assert controller.gammas == (0, 5, 7, 9, 11)
    controller.table.passes = passes()
    options = [
        Program(rows, 512, gamma) for gamma in (11, 9, 7, 5, 0) for rows in (8, 64)
    ]

    def choose(live: int) -> Program:
        return controller.choose(options, None, compile_s=FREE, live=live, length=500.0)

    assert choose(8) == Program(8, 512, 0), "never more than 32 rows"
    assert choose(64).gamma == 0
    assert choose(8) == Program(8, 512, 5)
    assert choose(64).gamma == 5, "one way"
    for _ in range(2):
        controller.observe(Program(8, 512, 5), 10, windows(5), 0.1)
        controller.start_rollout()
    choose(64)
    assert choose(8) == Program(8, 512, 7), "two rollouts kept all: a step up"
    again = Controller("paper")
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert again.state_dict() == controller.state_dict()
    again.table.passes = passes()
    assert again.choose(options, None, compile_s=FREE, live=64, length=9.0).gamma == 0
    chosen = again.choose(options, None, compile_s=FREE, live=8, length=500.0)
    assert chosen.gamma == 7


def windows(gamma: int) -> np.ndarray:
    """Return a histogram in which every draft was kept."""
    return np.array([0] * gamma + [100])


# Rows that idle.


def test_rows_that_idle_make_a_program_slower() -> None:
    """Four rows for ten rounds, of which rows were live in 25 of 40 row-rounds."""
    controller = made({AR: 0.010, SPEC: 0.020})
    before = controller.speed(SPEC)
    emitted = np.array([0, 0, 0, 0, 25])
    controller.observe(SPEC, 10, emitted, 0.2, live=4)
    after = controller.speed(SPEC)
    assert before and after
    assert after / before == pytest.approx((25 + 20) / (40 + 20), rel=0.01)
    # Where all rows were live throughout, nothing changes; nor for other programs.
    plain = controller.speed(AR)
    controller.observe(AR, 10, np.array([40]), 0.1, live=4)
    assert controller.speed(AR) == pytest.approx(plain)
    again = Controller("best", controller.gammas)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert again.speed(SPEC) == pytest.approx(controller.speed(SPEC))


# States that are JSON, bounded, and checked.


def test_a_state_is_json_whatever_numbers_it_was_made_of() -> None:
    """NumPy's are what configurations, schedules and clocks of arrays hold."""
    gammas = tuple(np.array([0, 2]))
    controller = Controller("best", gammas)
    size = np.int64(4)
    for gamma in gammas:
        program = Program(size, np.int32(128), gamma, np.bool_(False))  # type: ignore[arg-type]
        setting = (np.float32(0.5), np.int64(3), np.float64(0.25), 0)
        controller.start_rollout(setting)  # type: ignore[arg-type]
        controller.observe(
            program,
            np.int64(10),  # type: ignore[arg-type]
            np.zeros(gamma + 1, int),
            np.float32(0.5),  # type: ignore[arg-type]
            live=np.int64(3),  # type: ignore[arg-type]
        )
    controller.choose([Program(8, 128, 0), AR], AR, compile_s=compiled_are([AR]))
    state = controller.state_dict()
    assert json.loads(json.dumps(state)) == state
    again = Controller("best", (0, 2))
    again.load_state_dict(state)
    assert again.state_dict() == state
    paper = Controller("paper")
    assert paper._rule is not None
    paper._rule.observe(np.array([0] * 5 + [100]))
    paper._rule.end_rollout()
    paper._rule.gamma = np.int64(7)  # type: ignore[assignment]
    assert json.loads(json.dumps(paper.state_dict()))["rule"]["gamma"] == 7


def test_a_temperature_that_falls_does_not_make_the_state_grow() -> None:
    controller = Controller("best", (0, 4))
    controller.start_rollout((1.0,))
    controller.observe(SPEC, 10, windows_of(0.9), 0.1)
    sizes = []
    for step in range(100):
        with controller.sampling((1 - step / 200,)):
            controller.observe(SPEC, 10, windows_of(0.9), 0.1)
        with controller.sampling((0.0,)):  # the evaluation, every time
            evaluated = controller.acceptance
        sizes.append(len(json.dumps(controller.state_dict())))
    assert sizes[-1] < 1.2 * sizes[20]
    state = controller.state_dict()
    for name in ("acceptance", "drafters"):
        settings = [setting for setting, *_ in state[name]]
        assert len(settings) == MAX_SETTINGS
        # The last used are remembered, and what is used every time is.
        assert settings[-1] == [0.0] and settings[-2] == [1 - 99 / 200]
    controller.start_rollout((0.0,))
    assert controller.acceptance is evaluated
    # A state of more is cut on loading.
    row = state["acceptance"][0]
    state["acceptance"] = [[[9.0 + i], *row[1:]] for i in range(40)]
    state["drafters"], state["setting"] = state["acceptance"], [20.0]
    again = Controller("best", (0, 4))
    again.load_state_dict(state)
    assert len(again.state_dict()["acceptance"]) == MAX_SETTINGS
    assert again.state_dict()["setting"] == [20.0]


def test_a_rollout_goes_on_whose_setting_was_dropped() -> None:
    """One that is long, beside many short ones of other settings."""
    controller = Controller("best", (0, 4))
    with controller.sampling((1.0,)):
        for step in range(2 * MAX_SETTINGS):
            with controller.sampling((step / 100,)):
                pass
        controller.observe(SPEC, 10, windows_of(0.9), 0.1)
        assert controller.acceptance.tested[0] > 0
    Controller("best", (0, 4)).load_state_dict(controller.state_dict())


DAMAGES: list[tuple[str, object, str]] = [
    ("seconds", None, "seconds is None"),
    ("seconds", {"a": 1}, "seconds is"),
    ("seconds", [[4, 128, 0, False, math.nan]], "seconds"),
    ("seconds", [[4, 128, 0, False, 0.0]], "seconds"),
    ("seconds", [[4, 128, 0, False, "1"]], "seconds"),
    ("seconds", [[4, 128, 0.1]], "seconds"),
    ("seconds", [4], "seconds"),
    ("rounds", [[4, 128, 0, False, -1]], "rounds"),
    ("rounds", [[4, 128, 0, False, 1.5]], "rounds"),
    ("rounds", [[0, 128, 0, False, 1]], "rounds"),
    ("slowdown", math.inf, "slowdown"),
    ("slowdown", 0, "slowdown"),
    ("slowdown", [1.0], "slowdown"),
    ("lost_s", [[4, 128, 0, False, -1.0]], "lost_s"),
    ("lost_s", 3, "lost_s"),
    ("setting", [math.nan], "setting"),
    ("setting", ["1"], "setting"),
    ("setting", [0.125], "setting"),
    ("setting", None, "setting"),
    ("probing", [1.0], "probing"),
    ("probing", [1.0, -1.0], "probing"),
    ("probing", [1.0, math.nan], "probing"),
    ("row_rounds", [[4, 0, 1.0]], "row_rounds"),
    ("row_rounds", [[4, 0, 1.0, math.inf]], "row_rounds"),
    ("row_rounds", [[4, -1, 1.0, 2.0]], "row_rounds"),
    ("rule", {"gamma": 5}, "rule"),
    ("acceptance", [], "acceptance"),
    ("acceptance", [[[], [1.0] * 4]], "acceptance"),
    ("acceptance", [[[], [1.0] * 3, [1.0] * 3]], "acceptance"),
    ("acceptance", [[[], [1.0] * 4, [math.nan] * 4]], "acceptance"),
    ("acceptance", [[[], [1.0] * 4, [2.0] * 4]], "acceptance"),
    ("acceptance", [[[], [-1.0] * 4, [-1.0] * 4]], "acceptance"),
    ("drafters", [[[], [1.0] * 4, None]], "drafters"),
    ("drafters", "abc", "drafters"),
    ("gammas", 4, "gammas"),
    ("gammas", None, "gammas"),
    ("control", None, "same settings"),
]


@pytest.mark.parametrize(("name", "value", "said"), DAMAGES)
def test_a_damaged_state_is_refused_whole(name: str, value: object, said: str) -> None:
    """It names the field, and nothing of it is taken over."""
    other = Controller("best", (0, 4))
    other.observe(AR, 10, NO_DRAFTS, 1.0, live=4)
    other.observe(SPEC, 10, windows_of(0.5), 1.0, live=4)
    controller = Controller("best", (0, 4))
    before = json.dumps(controller.state_dict())
    with pytest.raises(ValueError, match=said):
        controller.load_state_dict(other.state_dict() | {name: value})
    assert json.dumps(controller.state_dict()) == before
    assert controller.acceptance.tested.shape == (4,)


@pytest.mark.parametrize(
    "state", [None, [], "x", {}, {"control": "best"}, {"gammas": [0, 4]}]
)
def test_what_is_no_state_is_refused(state: object) -> None:
    with pytest.raises(ValueError, match=r"^state (is a|lacks)"):
        Controller("best", (0, 4)).load_state_dict(state)  # type: ignore[arg-type]


def test_names_that_no_state_has_are_refused() -> None:
    state = Controller("best", (0, 4)).state_dict() | {"choose": 1}
    with pytest.raises(ValueError, match="state holds 'choose'"):
        Controller("best", (0, 4)).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choose": 1}, "rule holds 'choose'"),
        ({"costs": None}, "rule holds 'costs'"),
        ({"is_adaptive": False}, "rule holds 'is_adaptive'"),
        ({"gamma": 6}, "gamma is 6, and must be on the ladder"),
        ({"gamma": "5"}, "gamma is '5'"),
        ({"gamma": None}, "gamma is None"),
        ({"tokens_per_round": math.nan}, "tokens_per_round is nan"),
        ({"tokens_per_round": 0.5}, "tokens_per_round is 0.5"),
        ({"_num_high": -1}, "_num_high is -1"),
        ({"_num_low": 1.5}, "_num_low is 1.5"),
        ({"_num_low": True}, "_num_low is True"),
    ],
)
def test_the_rule_takes_only_what_it_knows(
    change: dict[str, object], said: str
) -> None:
    """Any attribute could be set by a checkpoint, `choose` among them."""
    controller = Controller("paper")
    assert controller._rule is not None
    before = dict(vars(controller._rule))
    state = controller.state_dict()
    state["slowdown"], state["rule"] = 2.0, state["rule"] | change
    with pytest.raises(ValueError, match=said):
        controller.load_state_dict(state)
    assert vars(controller._rule) == before and controller.table.slowdown == 1.0
    bads: list[object] = [None, [], {"gamma": 5}]
    for bad in bads:
        with pytest.raises(ValueError, match="rule "):
            controller.load_state_dict(state | {"rule": bad})
    held = PaperRule(ROOFLINE, gamma=4, is_adaptive=False)
    held.load_state_dict(held.state_dict())
    assert held.gamma == 4
