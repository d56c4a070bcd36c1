"""What `stats.summary()` says of the switch: why drafts ran or did not."""

from __future__ import annotations

import sys
import threading

import jax
import numpy as np
import pytest

import er_jax
from er_jax import Controller
from er_jax.control.explain import explain
from er_jax.types import Program
from tests.small import small_policy

pytestmark = pytest.mark.usefixtures("unoptimized_module")

PLAIN = [Program(8, 128, 0), Program(2, 128, 0)]


def knowing(round_s: float, *, kept: float | None = None) -> Controller:
    """A controller that timed plain steps of 10 ms and rounds of four drafts."""
    controller = Controller("best", (0, 4))
    for rows in (1, 2, 8):
        controller.table.observe(Program(rows, 128, 0), 1000 * 0.01, 1000)
        controller.table.observe(Program(rows, 128, 4), 1000 * round_s, 1000)
    if kept is not None:
        controller.acceptance.tested[:] = 1e4
        controller.acceptance.kept[:] = kept * 1e4
    return controller


@pytest.mark.parametrize(
    ("control", "said"),
    [
        ("ar", "no drafts: control='ar'"),
        ("fixed:4", "drafts in 1 of 2 windows: control='fixed:4'"),
        ("best", "drafts in 1 of 2 windows: what they cost is not known yet"),
    ],
)
def test_what_was_asked_for_needs_no_figures(control: str, said: str) -> None:
    ran = [Program(8, 128, 0), Program(8, 128, 4)]
    assert explain(Controller(control, (0, 4)), ran).startswith(said)


def test_drafts_that_lose_are_said_to() -> None:
    text = explain(knowing(0.05), PLAIN)
    assert "drafts in 0 of 2 windows" in text
    assert (
        "a round of 4 drafts costs plain steps: 5.00 at 1 row, 5.00 at 2 rows" in text
    )
    assert "as of a good drafter: none has run yet" in text
    # 1 + .95 + .95**2 + .95**3 + .95**4 tokens in five steps.
    assert "emits 4.52 tokens of 5" in text
    assert "0.90 at 1 row (gamma 4)" in text
    assert "plain decoding is the fastest here" in text


def test_drafts_that_win_show_by_how_much() -> None:
    text = explain(knowing(0.02, kept=0.8), [Program(8, 128, 4)])
    assert "drafts in 1 of 1 windows" in text
    assert "2.00 at 1 row, 2.00 at 8 rows" in text
    assert "80.0 % of those tested were used" in text
    # 1 + .8 + .64 + .512 + .4096 tokens in two steps.
    assert "1.68 at 1 row (gamma 4), 1.68 at 8 rows (gamma 4)" in text
    assert "nothing is amiss" not in text


def test_few_sizes_are_shown_of_many() -> None:
    controller = knowing(0.02)
    ran = [Program(rows, 128, 0) for rows in (1, 2, 3, 4, 6, 8, 12, 16)]
    line = explain(controller, ran).splitlines()[-1]
    assert line.count(" at ") == 4 and "1 row" in line and "16 rows" in line


def test_the_summary_says_it() -> None:
    policy = small_policy("summary")
    out = er_jax.rollout(
        policy, policy.init(jax.random.key(0)), [[1, 2]], key=jax.random.key(1),
        config=er_jax.RolloutConfig(max_new_tokens=4, n=2),
        controller=Controller(),
    )  # fmt: skip
    assert "drafts in 0 of" in out.stats.summary()
    merged = er_jax.RolloutStats.merged([out.stats, out.stats])
    assert merged.switch == out.stats.switch != ""
    assert np.isfinite(out.logprobs).all()


def test_programs_may_be_timed_meanwhile() -> None:
    """By a rollout in another thread that shares the controller."""
    controller = Controller("best", (0, 4))
    plain = [Program(rows, 128, 0) for rows in range(1, 2001)]
    for program in plain:
        controller.table.observe(program, 1.0, 100)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    is_over = threading.Event()

    def time_others() -> None:
        for length in range(129, 2129):
            controller.table.observe(Program(1, length, 0), 1.0, 100)
        is_over.set()

    other = threading.Thread(target=time_others)
    try:
        other.start()
        while not is_over.is_set():
            assert "not known yet" in explain(controller, plain[:1])
    finally:
        other.join()
        sys.setswitchinterval(interval)
