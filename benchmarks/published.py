"""The published setting in replay: what the published rule and `best` save.

    python -m benchmarks.published                       # both parts
    python -m benchmarks.published --sweeps A.csv B.csv  # and on measured tables
    python -m benchmarks.published --quick

No device is needed. *setting*: three models, eight engines with 128 sequences each, at
most 8192 tokens. The lengths follow from the published times at which rollouts were
done. What the published rule saves in replay is recorded beside what was published.
*controls*: the published rule, `best` and an oracle on three kinds of lengths, over
many seeds and acceptances.

The published cost model has the costs of forward passes only: no vocabulary projection,
no sampling, no host. The experiment adds one number per model, the time that a draft
pass takes beside that. It is fitted so that drafting in every round saves what was
published of it, and then predicts the rollouts with the switch. The 14B was sampled
with a frequency penalty, which that engine applies anew to every row in every draft
pass. So its draft passes take the mean of what was fitted to the other two models, and
the fitted number is per draft pass and row.

Source: EfficientRollout (arXiv 2606.18967), tables and fitted constants of its code.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy import optimize
from tqdm import tqdm

from benchmarks.lib import records, tables
from benchmarks.lib.rooflines import PUBLISHED, Published
from er_jax.control.paper import PaperRule
from er_jax.costs.passes import PassCosts, PassPredictor, seconds_of_passes
from er_jax.costs.roofline import Roofline
from er_jax.tools import replay, sweep
from er_jax.tools.replay import RoundCosts
from er_jax.tools.traces import TRACES, KeptDrafts, Trace
from er_jax.types import Program

PROMPT_LENGTH = 256
SEQUENCES, ENGINE = 1024, 128
CAP = 8192

GAMMAS = tuple(range(13))

# The first rollouts are not counted: the published rule settles in them.
WARM_UPS = 8


@dataclasses.dataclass(frozen=True)
class WithOverhead:
    """A cost model with the seconds that it leaves out.

    passes: costs of forward passes. head_s: added to every pass. draft_s: to every
      draft pass. draft_row_s: to every draft pass, for each live row.
    """

    passes: PassPredictor
    head_s: float = 0.0
    draft_s: float = 0.0
    draft_row_s: float = 0.0

    def round_seconds(self, program: Program) -> float:
        """Return the seconds of a whole round."""
        per_draft = self.head_s + self.draft_s + self.draft_row_s * program.rows
        passes = seconds_of_passes(self.passes, program)
        return passes + self.head_s + program.gamma * per_draft


def lengths_of(model: Published, costs: RoundCosts) -> np.ndarray:
    """Return lengths whose rollouts end at the published times.

    The tokens that plain decoding has made by then follow from the costs of its rounds
    at the live count of one engine. Between the published shares, the time at which a
    rollout ends is linear in the share.

    Args:
      model: with `done`. costs: seconds of plain decoding.
    Returns:
      int `[SEQUENCES]`, ascending.
    """
    shares, seconds = np.array(model.done).T
    at = (np.arange(SEQUENCES) + 0.5) / SEQUENCES
    at[-1] = 1.0
    # It is a guess, with little effect, that the first end at a seventh of the median.
    done_s = np.interp(at, [0.0, *shares], [seconds[0] / 7, *seconds])
    lengths, tokens, now = np.zeros(SEQUENCES), 0.0, 0.0
    for index in range(SEQUENCES):
        live = max(1, -(-(SEQUENCES - index) * ENGINE // SEQUENCES))
        while now < done_s[index]:
            step = costs.round_seconds(Program(live, int(PROMPT_LENGTH + tokens), 0))
            share = min(1.0, (done_s[index] - now) / step)
            tokens += share
            now += share * step
        lengths[index] = tokens
    return np.clip(np.round(lengths), 1, CAP).astype(int)


def rollouts(lengths: np.ndarray, num: int) -> list[list[Trace]]:
    """Return `num` rollouts: the traces of all engines, sequences dealt at random."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(num):
        dealt = random.permutation(lengths).reshape(-1, ENGINE)
        prompts = np.full(ENGINE, PROMPT_LENGTH)
        found.append([Trace(prompts, engine) for engine in dealt])
    return found


def mean_saved(
    model: Published,
    costs: RoundCosts,
    lengths: np.ndarray,
    make: Callable[[], replay.Decider],
    num: int,
) -> float:
    """Return the mean share of plain decoding's seconds that is saved.

    A rollout ends with its slowest engine.

    Args:
      model, costs, lengths: what is replayed. make: makes the decider of an engine.
      num: rollouts that count, after those of the warm-up.
    """
    engines = SEQUENCES // ENGINE
    deciders = [make() for _ in range(engines)]
    saved = []
    for turn, traces in enumerate(rollouts(lengths, WARM_UPS + num)):
        plain, found = [], []
        for engine, trace in enumerate(traces):
            luck = KeptDrafts(trace, model.keep_prob, seed=turn * engines + engine)
            plain.append(replay.replay(trace, costs, replay.Fixed(0), luck).seconds)
            outcome = replay.replay(trace, costs, deciders[engine], luck)
            found.append(outcome.seconds)
        if turn >= WARM_UPS:
            saved.append(1 - max(found) / max(plain))
    return float(np.mean(saved))


def fitted_overhead(
    model: Published, lengths: np.ndarray, make: Callable[[float], RoundCosts]
) -> float:
    """Return the overhead at which drafting in every round saves what was published."""
    fixed = [replay.Fixed(0), replay.Fixed(model.always_gamma)]
    (traces,) = rollouts(lengths, 1)

    def excess(overhead_s: float) -> float:
        plain, always = (
            max(
                replay.replay(
                    trace,
                    make(overhead_s),
                    decider,
                    KeptDrafts(trace, model.keep_prob, seed),
                ).seconds
                for seed, trace in enumerate(traces)
            )
            for decider in fixed
        )
        return 1 - always / plain - model.always_saved

    return float(optimize.brentq(excess, 0.0, 0.05, xtol=1e-6))


def replay_setting(num: int) -> list[dict[str, Any]]:
    """Return, per model and assumption, what the rule and `best` save in replay."""
    points = []
    lengths: dict[str, np.ndarray] = {}
    per_pass_s: list[float] = []
    for name, model in tqdm(PUBLISHED.items(), desc="published setting", unit="model"):
        plain = WithOverhead(model.costs, head_s=model.head_s)
        source = name if model.done else "Qwen2.5-7B"
        if model.done:
            lengths[name] = lengths_of(model, plain)
        here = lengths[source]

        def per_pass(seconds: float, model: Published = model) -> RoundCosts:
            return WithOverhead(model.costs, model.head_s, draft_s=seconds)

        def per_row(seconds: float, model: Published = model) -> RoundCosts:
            return WithOverhead(
                model.costs,
                model.head_s,
                draft_s=float(np.mean(per_pass_s)),
                draft_row_s=seconds,
            )

        assumptions: list[tuple[str, RoundCosts, float]] = [
            ("forward passes alone", model.costs, 0.0),
            ("with the vocabulary projection", plain, 0.0),
        ]
        if model.done:
            overhead_s = fitted_overhead(model, here, per_pass)
            per_pass_s.append(overhead_s)
            assumptions.append(("per draft pass", per_pass(overhead_s), overhead_s))
        else:
            overhead_s = fitted_overhead(model, here, per_row)
            label = f"{1e6 * np.mean(per_pass_s):.0f} µs per draft pass, and per row"
            assumptions.append((label, per_row(overhead_s), overhead_s))
        for label, costs, overhead_s in assumptions:

            def paper(model: Published = model) -> replay.Decider:
                return replay.Paper(PaperRule(model.costs))

            def best(costs: RoundCosts = costs) -> replay.Decider:
                return replay.Best(costs, GAMMAS)

            def always(model: Published = model) -> replay.Decider:
                return replay.Fixed(model.always_gamma)

            points.append(
                {
                    "preset": "published",
                    "rows": ENGINE,
                    "dtype": "bfloat16",
                    "model": name,
                    "lengths_of": source,
                    "mean_length": float(here.mean()),
                    "costs": label,
                    "overhead_us": 1e6 * overhead_s,
                    "always": mean_saved(model, costs, here, always, num),
                    "paper": mean_saved(model, costs, here, paper, num),
                    "best": mean_saved(model, costs, here, best, num),
                    "published_always": model.always_saved,
                    "published_paper": model.saved,
                }
            )
    return points


def compare_controls(
    sweeps: Sequence[Path], keeps: Sequence[float], seeds: int
) -> list[dict[str, Any]]:
    """Return, per model, kind of lengths and acceptance, what each control saves."""
    costs_of: dict[str, tuple[RoundCosts, PassPredictor]] = {
        f"{name}, published roofline": (model.costs, model.costs)
        for name, model in PUBLISHED.items()
    }
    for path in sweeps:
        measured = sweep.read_sweep(path)
        fitted = measured.fitted()
        costs = PassCosts(fitted)
        costs_of[f"{measured.model}, measured table"] = (costs, Roofline.fit(fitted))
    cases = [(t, k, p) for t in costs_of for k in TRACES for p in keeps]
    points = []
    for table, kind, keep_prob in tqdm(cases, desc="controls", unit="case"):
        make = TRACES[kind]
        comparison = replay.compare(
            [make(ENGINE, cap=CAP, seed=seed) for seed in range(seeds)],
            *costs_of[table],
            ("paper", "best", "oracle"),
            gammas=GAMMAS,
            keep_prob=keep_prob,
            num_warm_ups=WARM_UPS,
        )
        saved = {name: comparison.saved(name) for name in comparison.outcomes}
        points.append(
            {
                "costs": table,
                "lengths": kind,
                "keep_prob": keep_prob,
                **{name: float(saved[name].mean()) for name in saved if name != "ar"},
                "best_behind_paper_in": int((saved["best"] < saved["paper"]).sum()),
                "seeds": seeds,
            }
        )
    return points


def setting_rows(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows of the replayed setting, shares in per cent."""
    rows = [
        (
            p["model"],
            p["costs"],
            p["overhead_us"],
            *(100 * p[k] for k in ("always", "published_always")),
            *(100 * p[k] for k in ("paper", "published_paper", "best")),
        )
        for p in points
    ]
    header = (
        "model", "costs", "overhead µs", "always %", "published", "switch %",
        "published", "best %",
    )  # fmt: skip
    return header, rows


def control_rows(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows of the comparison of controls, shares in per cent."""
    rows = [
        (
            p["costs"],
            p["lengths"],
            p["keep_prob"],
            *(100 * p[k] for k in ("paper", "best", "oracle")),
            100 * (p["oracle"] - p["best"]),
            p["best_behind_paper_in"],
        )
        for p in points
    ]
    header = (
        "costs", "lengths", "keep", "paper %", "best %", "oracle %", "to oracle",
        "behind paper in",
    )  # fmt: skip
    return header, rows


@dataclasses.dataclass(frozen=True)
class Args:
    """What to replay.

    Args:
      sweeps: latency sweeps (CSV) whose tables are used beside the published rooflines.
      keeps: chances that a draft is kept. seeds: traces of each kind.
      num: counted rollouts of the published setting.
      out: where to write. quick: few seeds, to see that it runs.
    """

    sweeps: tuple[Path, ...] = ()
    keeps: tuple[float, ...] = (0.90, 0.94, 0.98)
    seeds: int = 20
    num: int = 10
    out: Path | None = None
    quick: bool = False


def main(args: Args) -> dict[str, Any]:
    """Replay, print and write the record; return it."""
    if args.quick:
        args = dataclasses.replace(args, keeps=args.keeps[-1:], seeds=2, num=1)
    out = records.results_dir(args.out, args.quick)
    settings = {"keeps": args.keeps, "seeds": args.seeds, "num": args.num}
    record = records.new_record("published", settings)
    record["points"] = replay_setting(args.num)
    print(tables.text(setting_rows(record["points"])), flush=True)
    record["controls"] = compare_controls(args.sweeps, args.keeps, args.seeds)
    print(tables.text(control_rows(record["controls"])))
    records.save(out / "published.json", record)
    print(f"written: published.json in {out.name}", file=sys.stderr)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.published"))
