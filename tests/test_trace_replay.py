"""Replayed rollouts: by hand, against closed forms, and one rule beside another."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from er_jax.config import PAPER_LADDER
from er_jax.control.paper import PaperRule
from er_jax.costs.passes import PassCosts
from er_jax.tools import cli
from er_jax.tools.replay import (
    Best,
    DecisionPoint,
    Fixed,
    Oracle,
    Outcome,
    Paper,
    compare,
    make_decider,
    replay,
)
from er_jax.tools.traces import TRACES, KeptDrafts, Trace
from er_jax.types import Program
from tests.small import small_policy
from tests.test_pass_costs import ROOFLINE, passes
from tests.test_sweep import rows_of, write


class Costs:
    """A second and a tenth per live row, and half a second per draft."""

    def round_seconds(self, program: Program) -> float:
        return 1 + 0.1 * program.rows + 0.5 * program.gamma


def trace_of(*lengths: int) -> Trace:
    return Trace(np.full(len(lengths), 10), np.array(lengths))


def run(
    trace: Trace, gamma: int, keep_prob: float, slots: int | None = None
) -> Outcome:
    kept_drafts = KeptDrafts(trace, keep_prob, seed=0)
    return replay(trace, Costs(), Fixed(gamma), kept_drafts, slots=slots)


def test_plain_decoding_by_hand() -> None:
    outcome = run(trace_of(3, 5, 5), 0, 0.5)
    assert outcome.seconds == pytest.approx(3 * 1.3 + 2 * 1.2)
    assert outcome.tokens == 13
    assert outcome.by_gamma == {0: pytest.approx(outcome.seconds)}
    assert outcome.by_live == {4: pytest.approx(3.9), 2: pytest.approx(2.4)}
    assert outcome.timeline[0] == (0.0, 3, 0)
    assert outcome.timeline[1] == (outcome.by_live[4], 2, 0)


def test_slots_are_refilled() -> None:
    outcome = run(trace_of(3, 5, 4), 0, 0.5, slots=2)
    # Two rows for 3 steps, two for 2 more, one for the last 2 of the third.
    assert outcome.seconds == pytest.approx(5 * 1.2 + 2 * 1.1)


@pytest.mark.parametrize(("keep_prob", "rounds"), [(1.0, 3), (0.0, 9)])
def test_all_drafts_kept_or_none(keep_prob: float, rounds: int) -> None:
    """9 tokens: 4, 4 and 1 where drafts of 3 are kept; else one a round."""
    outcome = run(trace_of(9), 3, keep_prob)
    assert outcome.seconds == pytest.approx(rounds * (1.1 + 1.5))


def test_tokens_per_round_are_the_closed_form() -> None:
    keep_prob, gamma, length = 0.8, 4, 40_000
    outcome = run(trace_of(length), gamma, keep_prob)
    rounds = outcome.seconds / (1.1 + 2.0)
    wanted = (1 - keep_prob ** (gamma + 1)) / (1 - keep_prob)
    assert length / rounds == pytest.approx(wanted, rel=0.02)


def test_what_controllers_are_told_adds_up() -> None:
    emitted, kept = np.zeros(4, int), np.zeros(4, int)

    class Listening(Fixed):
        def observe(self, e: np.ndarray, k: np.ndarray, seconds: float) -> None:
            assert seconds > 0
            emitted[:] += e
            kept[:] += k

    trace = trace_of(70, 3, 200)
    replay(trace, Costs(), Listening(3), KeptDrafts(trace, 0.7, 0))
    assert emitted @ np.arange(1, 5) == trace.lengths.sum()
    assert emitted.sum() == kept.sum()
    assert kept @ np.arange(4) >= emitted @ np.arange(4)


def test_kept_drafts_are_a_matter_of_the_token() -> None:
    trace = trace_of(4, 6)
    kept_drafts = KeptDrafts(trace, 0.5, seed=3)
    is_kept = np.random.default_rng(3).random(10) < 0.5
    for token in range(10):
        run = 0
        while token + run < 10 and is_kept[token + run]:
            run += 1
        assert kept_drafts.run[token] == run
    assert kept_drafts.start.tolist() == [0, 4]


# -- the published rule ----------------------------------------------------------------


def rule(**options: object) -> PaperRule:
    return PaperRule(ROOFLINE, **options)  # type: ignore[arg-type]


def test_the_switch_waits_for_a_full_batch_and_stays_on() -> None:
    paper = rule()
    assert paper.choose(8, 1000) == 0, "32 rows were never exceeded"
    assert paper.choose(200, 1000) == 0, "too many rows to gain"
    assert paper.choose(8, 1000) == 5
    assert paper.choose(200, 1000) == 5, "one way"
    paper.start_rollout()
    assert paper.choose(8, 1000) == 0


def test_the_switch_needs_five_per_cent() -> None:
    for live in range(33, 200):
        paper = rule()
        target = ROOFLINE.pass_seconds("target", live, 1000)
        cycle = 5 * ROOFLINE.pass_seconds("draft", live, 1000)
        cycle += ROOFLINE.pass_seconds("verify", live, 1000, 5)
        assert (paper.choose(live, 1000) == 5) == (5 * target / cycle >= 1.05)


def after(paper: PaperRule, *shares: float) -> int:
    for share in shares:
        kept = np.zeros(paper.gamma + 1, int)
        kept[paper.gamma] = round(1000 * share)
        kept[0] = 1000 - kept[paper.gamma]
        paper.observe(kept)
        paper.end_rollout()
        paper.start_rollout()
    return paper.gamma


def test_the_ladder() -> None:
    assert after(rule(), 0.95) == 5
    assert after(rule(), 0.95, 0.95) == 7
    assert after(rule(), 0.95, 0.9, 0.95) == 5, "in a row"
    assert after(rule(), *[0.95] * 4) == 9
    assert after(rule(), *[0.95] * 20) == PAPER_LADDER[-1]
    assert after(rule(gamma=9), 0.8, 0.8) == 7
    assert after(rule(), *[0.1] * 5) == 5
    assert after(rule(gamma=7, is_adaptive=False), 0.95, 0.95) == 7


def test_tokens_per_round_are_those_of_the_rollout_before() -> None:
    paper = rule()
    assert paper.tokens_per_round == 5
    after(paper, 0.9)
    assert paper.tokens_per_round == pytest.approx(1 + 5 * 0.9)
    paper.end_rollout()
    assert paper.tokens_per_round == pytest.approx(5.5), "nothing was drafted since"
    after(paper, 0.95, 0.95)
    assert paper.gamma == 7
    assert paper.tokens_per_round == pytest.approx(5.75), "of the old length"


def test_a_length_off_the_ladder_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"gamma=6 is not on the ladder \(5, 7, 9, 11\)"
    ):
        rule(gamma=6)


# -- one beside another ----------------------------------------------------------------


@pytest.mark.parametrize("keep_prob", [0.90, 0.98])
@pytest.mark.parametrize("kind", sorted(TRACES))
def test_best_is_ahead_of_the_published_rule_and_near_the_oracle(
    kind: str, keep_prob: float
) -> None:
    costs = passes(gammas=(1, 3, 7, 11))
    traces = [TRACES[kind](64, cap=2048, seed=seed) for seed in range(4)]
    comparison = compare(
        traces,
        costs,
        ROOFLINE,
        ("paper", "best", "oracle"),
        gammas=range(13),
        keep_prob=keep_prob,
    )
    saved = {name: comparison.saved(name).mean() for name in comparison.outcomes}
    assert saved["ar"] == 0
    assert saved["best"] > saved["paper"]
    assert saved["best"] > saved["oracle"] - 0.015


def test_a_draft_that_is_never_kept_costs_little() -> None:
    """The belief it begins with is given up within some rounds."""
    trace = TRACES["tail"](64, cap=1024, seed=0)
    kept_drafts, costs = KeptDrafts(trace, 0.0, 0), passes(gammas=(1, 3, 7))
    plain = replay(trace, costs, Fixed(0), kept_drafts)
    found = replay(trace, costs, Best(costs, range(9)), kept_drafts)
    assert found.by_gamma[0] > 0.9 * found.seconds
    assert found.seconds < 1.05 * plain.seconds


def test_the_oracle_takes_what_is_left_into_account() -> None:
    costs = passes()
    oracle = Oracle(costs, range(8), keep_prob=1.0)
    assert oracle.choose(DecisionPoint(1, 512, np.array([1]))) == 0
    assert oracle.choose(DecisionPoint(1, 512, np.array([1000]))) == 7


def test_names_of_deciders() -> None:
    costs = passes()
    made = [
        make_decider(name, costs, ROOFLINE, range(5), 0.9)
        for name in ("ar", "fixed:3", "paper", "best", "oracle")
    ]
    assert [type(decider) for decider in made] == [Fixed, Fixed, Paper, Best, Oracle]
    with pytest.raises(ValueError, match="use one of ar, fixed:N, paper, best, oracle"):
        make_decider("bset", costs, ROOFLINE, range(5), 0.9)


@pytest.mark.slow
def test_thousands_of_sequences_are_replayed_in_seconds() -> None:
    trace = TRACES["capped"](4096, cap=8192, seed=0)
    kept_drafts, costs = KeptDrafts(trace, 0.95, 0), passes(gammas=(1, 3, 7))
    outcome = replay(trace, costs, Best(costs, range(9)), kept_drafts, slots=64)
    assert outcome.tokens == trace.lengths.sum() > 10_000_000
    assert sum(outcome.by_gamma.values()) == pytest.approx(outcome.seconds)
    assert sum(outcome.by_live.values()) == pytest.approx(outcome.seconds)


# -- traces, and the command -----------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(TRACES))
def test_generated_lengths(kind: str) -> None:
    make = TRACES[kind]
    trace = make(4000, cap=8192, seed=0)
    assert trace.lengths.min() >= 1
    assert trace.lengths.max() <= 8192
    np.testing.assert_array_equal(trace.lengths, make(4000, cap=8192, seed=0).lengths)
    assert not np.array_equal(trace.lengths, make(4000, cap=8192, seed=1).lengths)


def test_generated_lengths_have_their_shapes() -> None:
    tail = TRACES["tail"](20_000, cap=32_768, seed=0).lengths
    assert 440 < np.median(tail) < 490
    assert 1800 < np.quantile(tail, 0.99) < 3500
    capped = TRACES["capped"](16_000, cap=16_000, seed=0).lengths
    assert 0.05 < (capped == 16_000).mean() < 0.2
    groups = capped.reshape(-1, 8)
    assert groups.mean(axis=1).var() > 3 * groups.var(axis=1).mean()


def test_a_trace_is_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    trace_of(3, 4).save(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"prompt_length": 10, "length": 3},
        {"prompt_length": 10, "length": 4},
    ]
    loaded = Trace.load(path)
    np.testing.assert_array_equal(loaded.lengths, [3, 4])
    np.testing.assert_array_equal(loaded.prompt_lengths, [10, 10])


@pytest.mark.usefixtures("unoptimized")
def test_a_rollout_is_a_trace() -> None:
    policy = small_policy("trace")
    out = er_jax.rollout(
        policy,
        policy.init(jax.random.key(0)),
        [[1, 2, 3], [4]],
        key=jax.random.key(1),
        config=er_jax.RolloutConfig(max_new_tokens=5, control="ar"),
    )
    trace = Trace.of(out)
    assert trace.prompt_lengths.tolist() == [3, 1]
    assert trace.lengths.tolist() == [5, 5]


@pytest.mark.parametrize("line", ['{"len": 3}', "12", "nonsense"])
def test_what_is_no_trace_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text(f'{{"length": 3}}\n\n{line}\n')
    with pytest.raises(ValueError, match="line 3"):
        Trace.load(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"length": 2.5}', "line 2: .*2.5"),
        ('{"length": true}', "line 2: .*true"),
        ('{"length": 0}', "line 2: .*0"),
        ('{"length": NaN}', "line 2: .*NaN"),
        ('{"length": 9999999999}', "line 2: .*9999999999"),
        ('{"length": 3, "prompt_length": -1}', "line 2: .*-1"),
        ('{"length": 2147483647}', "lengths.jsonl: a trace of 2147483651 tokens"),
    ],
)
def test_lengths_that_no_completion_has_are_refused(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text(f'{{"length": 4}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        Trace.load(path)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"lengths.jsonl is no text in UTF-8"):
        Trace.load(path)


COSTS = passes()
TRACE = Trace(np.array([10, 0]), np.array([4, 6]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Trace(np.array([1.0]), np.array([2])), "prompt_lengths of type float"),
        (lambda: Trace(np.array([-1]), np.array([2])), "a prompt of -1 tokens"),
        (lambda: TRACES["tail"](0, cap=9, seed=0), "num=0 must be"),
        (lambda: TRACES["tail"](4, cap=0, seed=0), "cap=0 must be"),
        (lambda: TRACES["capped"](-1, cap=9, seed=0), "num=-1 must be"),
        (lambda: TRACES["mixture"](2**40, cap=9, seed=0), "num=1099511627776 must be"),
        (lambda: KeptDrafts(TRACE, 1.5, 0), "keep_prob=1.5 must be a chance"),
        (lambda: KeptDrafts(TRACE, float("nan"), 0), "keep_prob=nan must be a chance"),
        (lambda: KeptDrafts(TRACE, 0.5, -1), "seed=-1 must be"),
        (lambda: Fixed(-1), "gamma=-1 must be"),
        (lambda: Oracle(COSTS, (), 0.5), "gammas is empty"),
        (lambda: Oracle(COSTS, (-1, 0), 0.5), r"gammas=\(-1, 0\) must all be"),
        (lambda: Oracle(COSTS, (0,), 2.0), "keep_prob=2.0 must be a chance"),
        (lambda: Best(COSTS, (0, 2.5)), r"gammas=\(0, 2.5\) must all be"),  # type: ignore[arg-type]
        (
            lambda: make_decider("ar", COSTS, ROOFLINE, (), 0.5),
            "gammas is empty",
        ),
        (
            lambda: make_decider("fixed:99999", COSTS, ROOFLINE, (0,), 0.5),
            "gamma=99999 must be|N from 0 to 1024",
        ),
        *(
            (
                lambda slots=slots: replay(
                    TRACE, COSTS, Fixed(0), KeptDrafts(TRACE, 0.5, 0), slots=slots
                ),
                f"slots={slots} must be a whole number from 1",
            )
            for slots in (0, -1, 2.5)
        ),
        (
            lambda: replay(
                TRACE, COSTS, Fixed(0), KeptDrafts(TRACE, 0.5, 0), until_s=float("nan")
            ),
            "until_s=nan must be seconds",
        ),
        (
            lambda: replay(TRACE, COSTS, Fixed(0), KeptDrafts(trace_of(9, 9), 0.5, 0)),
            "kept drafts were drawn for 18 tokens, the trace has 10",
        ),
        (
            lambda: compare([], COSTS, ROOFLINE, (), gammas=(0,), keep_prob=0.5),
            "traces is empty",
        ),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_no_row_decodes_without_a_token() -> None:
    lengths = []

    class Looking(Fixed):
        def choose(self, point: DecisionPoint) -> int:
            lengths.append(point.length)
            return 0

    trace = Trace(np.zeros(2, int), np.array([1, 40]))
    replay(trace, Costs(), Looking(0), KeptDrafts(trace, 0.5, 0))
    assert lengths == [32, 32]


@pytest.mark.parametrize("control", ["ar", "fixed:3", "paper", "best", "oracle"])
def test_prompts_of_unknown_length_have_a_price(control: str) -> None:
    """On costs of one cache length a pass over no positions would take no time."""
    longest = max(reading.length for reading in COSTS.readings)
    costs = PassCosts([r for r in COSTS.readings if r.length == longest])
    trace = Trace(np.zeros(3, int), np.array([1, 2, 5]))
    decider = make_decider(control, costs, ROOFLINE, range(5), 0.9)
    outcome = replay(trace, costs, decider, KeptDrafts(trace, 0.9, 0))
    assert outcome.seconds > 0
    assert outcome.done.tolist() == [1, 2, 5]


def test_empty_traces_and_empty_completions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="at least one"):
        Trace.load(path)
    with pytest.raises(ValueError, match="a completion of 0 tokens"):
        trace_of(3, 0)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["er-jax", *map(str, arguments)])
    cli.main()


def test_the_command_replays_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = write(tmp_path / "sweep.csv", rows_of())
    trace = tmp_path / "lengths.jsonl"
    trace_of(300, 40, 50, 60).save(trace)
    picture = tmp_path / "replay.png"
    options = ("--seeds", 2, "--gammas", 0, 2, 4, "--plot", picture)
    command(monkeypatch, "replay", sweep, "--trace", trace, *options)
    out = capsys.readouterr().out
    assert "2 rollouts of 4 completions" in out
    for name in ("ar", "paper", "best", "oracle"):
        assert f"\n{name} " in out
    assert picture.stat().st_size > 1000
    command(monkeypatch, "replay", sweep, "--num", 8, "--cap", 64, "--seeds", 1)
    assert "tail: 1 rollouts of 8 completions" in capsys.readouterr().out


def test_the_command_judges_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = write(tmp_path / "sweep.csv", rows_of())
    command(monkeypatch, "sweep", sweep, sweep)
    assert capsys.readouterr().out.count("table, both halves") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep", "1.5"), "keep=1.5"),
        (("--seeds", "0"), "seeds=0"),
        (("--controls", "bset"), "use one of ar"),
        (("--gammas", "2", "4"), "must contain 0"),
    ],
)
def test_the_command_explains_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    sweep = write(tmp_path / "sweep.csv", rows_of())
    with pytest.raises(SystemExit, match=message):
        command(monkeypatch, "replay", sweep, "--num", 4, *options)


def test_pass_costs_price_rounds() -> None:
    """What the replay asks for is what both cost models give."""
    for costs in (passes(), ROOFLINE, PassCosts(passes().readings)):
        assert costs.round_seconds(Program(4, 512, 3)) > 0
