"""Replays of a trace of lengths with known costs: rollouts without a device.

Sequences of known length are decoded in slots, refilled while any wait. The costs
predict the seconds of a round from live rows and their mean length. Whether the draft
of a sequence's k-th token is kept is drawn in advance, so that every controller gets
the same drafts. Prefill, refresh of the draft and host work cost nothing here.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from er_jax.arguments import (
    MOST_DRAFTS,
    check_chance,
    check_gammas,
    check_whole,
)
from er_jax.config import parse_control
from er_jax.control.paper import PaperRule
from er_jax.costs.passes import PassPredictor, Reading
from er_jax.costs.table import LatencyTable
from er_jax.figures import new_figure
from er_jax.tools.deciders import (
    Best,
    Decider,
    DecisionPoint,
    Fixed,
    Oracle,
    Paper,
    RoundCosts,
)
from er_jax.tools.sweep import read_sweep
from er_jax.tools.traces import KeptDrafts, Trace
from er_jax.types import Program

# Rounds between two decisions, which are also taken when a row ends.
HORIZON = 64
SPECULATIVE_HORIZON = 16

# Mean lengths are rounded up to a multiple of this, so that costs are looked up once.
LENGTH_STEP = 32

# Kinds of readings that suffice to predict rounds: whole rounds, or their passes.
PRICED: tuple[set[str], ...] = ({"target", "round"}, {"target", "draft", "verify"})


def read_costs(path: str | os.PathLike[str]) -> list[Reading]:
    """Return readings that predict rounds.

    Args:
      path: a file of `LatencyTable.save` (.json), or a latency sweep (CSV).
    Raises:
      ValueError: neither of them, or readings that predict no rounds with drafts.
      OSError: the file cannot be read.
    """
    if Path(path).suffix.lower() == ".json":
        found = LatencyTable.load(path).readings()
    else:
        found = read_sweep(path).fitted()
    kinds = {reading.kind for reading in found}
    if not any(enough <= kinds for enough in PRICED):
        raise ValueError(
            f"{path} holds {' and '.join(sorted(kinds)) or 'no'} readings, which price "
            "no rounds with drafts; measure steps and rounds (er-jax calibrate), or "
            "target, draft and verify passes"
        )
    return found


@dataclasses.dataclass
class Outcome:
    """What a replayed rollout did.

    seconds: in total. tokens: emitted. done: int `[N]`, tokens of each completion at
      the end. by_gamma: gamma -> seconds. by_live: live rows, rounded up to a power of
      two -> seconds. timeline: (second, live, gamma) of every decision.
    """

    seconds: float = 0.0
    tokens: int = 0
    done: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))
    by_gamma: dict[int, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    by_live: dict[int, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    timeline: list[tuple[float, int, int]] = dataclasses.field(default_factory=list)


def replay(
    trace: Trace,
    costs: RoundCosts,
    decider: Decider,
    kept_drafts: KeptDrafts,
    *,
    slots: int | None = None,
    until_s: float = math.inf,
    is_enough: Callable[[np.ndarray], bool] = lambda done: False,
) -> Outcome:
    """Run a decider over a trace.

    Args:
      trace: lengths. costs: predict rounds. decider: chooses gammas. kept_drafts: drawn
        for this trace. slots: rows decoded at once; None is all. until_s: stop at the
        first decision after this many seconds.
      is_enough: asked at every decision, a row that has just ended is one, with the
        tokens done of each completion, int `[N]`; whether to stop there.
    Raises:
      ValueError: no slots, `until_s` below 0 or NaN, or `kept_drafts` of another trace.
    """
    if slots is not None:
        check_whole("slots", slots)
    if not until_s >= 0:
        raise ValueError(f"until_s={until_s} must be seconds, 0 or more")
    starts, runs = kept_drafts.start, kept_drafts.run
    if len(runs) != trace.lengths.sum() or len(starts) != len(trace.lengths):
        raise ValueError(
            f"kept drafts were drawn for {len(runs)} tokens, the trace has "
            f"{trace.lengths.sum()}; draw them for this trace"
        )
    slots = len(trace.lengths) if slots is None else slots
    waiting = len(trace.lengths)
    rows = np.arange(min(slots, waiting))
    waiting -= len(rows)
    done = np.zeros(len(trace.lengths), int)
    outcome = Outcome(tokens=int(trace.lengths.sum()))
    seconds_of: dict[Program, float] = {}

    def rounded(length: float) -> int:
        # A row that decodes has at least one token, even if its prompt is not known,
        # and no costs predict a pass over no positions.
        return int(-(-max(length, 1) // LENGTH_STEP) * LENGTH_STEP)

    def round_s(live: int, length: float, gamma: int) -> float:
        program = Program(live, rounded(length), gamma)
        if program not in seconds_of:
            seconds_of[program] = costs.round_seconds(program)
        return seconds_of[program]

    while len(rows) and outcome.seconds < until_s and not is_enough(done):
        live = len(rows)
        left = trace.lengths[rows] - done[rows]
        length = float((trace.prompt_lengths[rows] + done[rows]).mean())
        gamma = decider.choose(DecisionPoint(live, rounded(length), left))
        outcome.timeline.append((outcome.seconds, live, gamma))
        if gamma == 0:
            count = int(min(left.min(), HORIZON))
            spent = count * round_s(live, length + count / 2, 0)
            done[rows] += count
            histogram = np.array([live * count])
            decider.observe(histogram, histogram, spent)
        else:
            spent = 0.0
            emitted = np.zeros(gamma + 1, int)
            kept = np.zeros(gamma + 1, int)
            start, ends = starts[rows], trace.lengths[rows]
            at = done[rows]
            for _ in range(SPECULATIVE_HORIZON):
                run = np.minimum(runs[start + at], gamma)
                gained = np.minimum(run + 1, ends - at)
                at = at + gained
                kept += np.bincount(run, minlength=gamma + 1)
                emitted += np.bincount(gained - 1, minlength=gamma + 1)
                mean = length + float((at - done[rows]).mean())
                spent += round_s(live, mean, gamma)
                if (at == ends).any():
                    break
            done[rows] = at
            decider.observe(emitted, kept, spent)
        outcome.seconds += spent
        outcome.by_gamma[gamma] += spent
        outcome.by_live[1 << (live - 1).bit_length()] += spent
        rows = rows[done[rows] < trace.lengths[rows]]
        fresh = min(slots - len(rows), waiting)
        if fresh:
            first = len(trace.lengths) - waiting
            rows = np.concatenate([rows, np.arange(first, first + fresh)])
            waiting -= fresh
    decider.end()
    outcome.done = done
    return outcome


CONTROLS = ("ar", "fixed:N", "paper", "best", "oracle")


def make_decider(
    control: str,
    costs: RoundCosts,
    roofline: PassPredictor,
    gammas: Sequence[int],
    keep_prob: float,
) -> Decider:
    """Return a decider by name.

    Args:
      control: one of `CONTROLS`, N a draft length. costs: the true ones. roofline: the
        cost model of the published rule. gammas: choices of `best` and the oracle.
      keep_prob: chance that a draft is kept; only the oracle gets it.
    Raises:
      ValueError: an unknown control, gammas without 0 or out of range, or a `keep_prob`
        outside 0 to 1.
    """
    check_gammas(gammas)
    check_chance("keep_prob", keep_prob)
    if control == "paper":
        return Paper(PaperRule(roofline))
    if control == "best":
        return Best(costs, gammas)
    if control == "oracle":
        return Oracle(costs, gammas, keep_prob)
    try:
        return Fixed(*parse_control(control, gammas))
    except ValueError as error:
        raise ValueError(
            f"control={control!r} is unknown; use one of {', '.join(CONTROLS)}, N from "
            f"0 to {MOST_DRAFTS}"
        ) from error


@dataclasses.dataclass
class Comparison:
    """Several controls on the same traces with the same kept drafts.

    outcomes: control -> one outcome per trace; "ar" is always among them.
    """

    outcomes: dict[str, list[Outcome]]

    def saved(self, control: str) -> np.ndarray:
        """Return the share of plain decoding's seconds that was saved, by trace."""
        plain = np.array([outcome.seconds for outcome in self.outcomes["ar"]])
        return 1 - np.array([o.seconds for o in self.outcomes[control]]) / plain

    def summary(self) -> str:
        """Return a table of seconds, tokens per second and time saved, by control."""
        lines = [
            f"{'control':10}{'seconds':>9}{'tokens/s':>10}{'saved %':>9}{'+-':>6}"
            "  seconds by gamma; by live rows"
        ]
        for control, outcomes in self.outcomes.items():
            seconds = np.mean([outcome.seconds for outcome in outcomes])
            tokens = np.mean([outcome.tokens for outcome in outcomes])
            saved = 100 * self.saved(control)
            lines.append(
                f"{control:10}{seconds:9.1f}{tokens / seconds:10.0f}{saved.mean():9.1f}"
                f"{saved.std():6.1f}  {_parts(outcomes, 'by_gamma', '')}; "
                f"{_parts(outcomes, 'by_live', '<=')}"
            )
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw live rows and gamma over time on the first trace, and save the picture.

        Raises:
          ImportError: matplotlib is missing; install the extra `plot`.
        """
        figure = new_figure(8, 5)
        above, below = figure.subplots(2, sharex=True)
        for control, outcomes in self.outcomes.items():
            second, live, gamma = np.array(outcomes[0].timeline).T
            end = outcomes[0].seconds
            label = f"{control}, {end:.0f} s"
            above.step([*second, end], [*live, 0], where="post", label=label)
            below.step([*second, end], [*gamma, gamma[-1]], where="post")
        above.set(ylabel="live rows", yscale="symlog")
        below.set(xlabel="seconds", ylabel="gamma")
        above.legend(fontsize="small")
        figure.savefig(path, dpi=130)


def _parts(outcomes: list[Outcome], field: str, prefix: str) -> str:
    sums: dict[int, float] = collections.defaultdict(float)
    for outcome in outcomes:
        for key, seconds in getattr(outcome, field).items():
            sums[key] += seconds / len(outcomes)
    return ", ".join(f"{prefix}{key}: {sums[key]:.1f}" for key in sorted(sums))


def compare(
    traces: Sequence[Trace],
    costs: RoundCosts,
    roofline: PassPredictor,
    controls: Sequence[str],
    *,
    gammas: Sequence[int],
    keep_prob: float,
    slots: int | None = None,
    num_warm_ups: int = 8,
    progress: bool = False,
) -> Comparison:
    """Replay several controls over the same traces, as rollouts one after the other.

    Controllers are kept from one trace to the next, as in training. They replay the
    first traces once before anything is counted, because the published ladder takes
    several rollouts to settle.

    Args:
      traces: rollouts in order. costs: the true ones. roofline: the cost model of the
        published rule. controls: names, see `make_decider`; "ar" is added.
      gammas: choices of "best" and the oracle. keep_prob: chance that a draft is kept,
        at any depth and position.
      slots: rows decoded at once; None is all. num_warm_ups: rollouts not counted.
      progress: show a progress bar.
    Raises:
      ValueError: no trace; or as `make_decider` and `replay`, before the first rollout.
    """
    if not len(traces):
        raise ValueError("traces is empty; give one or more")
    if slots is not None:
        check_whole("slots", slots)
    check_whole("num_warm_ups", num_warm_ups, 0)
    deciders = {
        control: make_decider(control, costs, roofline, gammas, keep_prob)
        for control in dict.fromkeys(("ar", *controls))
    }
    comparison = Comparison({control: [] for control in deciders})
    order = [*range(min(num_warm_ups, len(traces))), *range(len(traces))]
    for turn, index in enumerate(
        tqdm(order, unit="rollout", desc="replay", disable=not progress)
    ):
        is_counted = turn >= len(order) - len(traces)
        trace = traces[index]
        kept_drafts = KeptDrafts(trace, keep_prob, seed=turn)
        for control, decider in deciders.items():
            outcome = replay(trace, costs, decider, kept_drafts, slots=slots)
            if is_counted:
                comparison.outcomes[control].append(outcome)
    return comparison
