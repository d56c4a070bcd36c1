"""The published setting, replayed: what the published rule saves, and what `best` does.

    python -m benchmarks.published                       # both parts
    python -m benchmarks.published --sweeps A.csv B.csv  # and on measured tables
    python -m benchmarks.published --quick

No device is needed. *setting*: 128 sequences per engine, a cap of 8192 tokens, three
models, lengths from the published times at which rollouts were done; what the published
rule saves in replay beside what was published. *controls*: the published rule, `best`
and the oracle on three kinds of lengths over many seeds and acceptances.

The published cost model prices forward passes only: no vocabulary projection, no
sampling, no host. The experiment adds one number per model, the time a draft pass takes
beside that, such that drafting in every round saves what was published of it, and then
predicts the rollouts with the switch. The 14B was sampled with a frequency penalty,
which that engine applies anew to every row in every draft pass: there what the other
two models need per draft pass is taken, and the number is per draft pass and row.

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

from benchmarks import measure
from er_jax.control.paper import PaperRule
from er_jax.costs.passes import PassCosts, PassPredictor, seconds_of_passes
from er_jax.costs.roofline import Roofline
from er_jax.figures import text_table
from er_jax.tools import replay, sweep, traces
from er_jax.tools.replay import RoundCosts
from er_jax.tools.traces import Trace
from er_jax.types import Program

PROMPT_LENGTH = 256
SEQUENCES, ENGINE = 1024, 128
CAP = 8192

GAMMAS = tuple(range(13))

# Rollouts that are not counted: the ladder settles in them.
WARM_UPS = 8


def _roofline(
    *,
    bandwidth: float,
    target_bytes: float,
    draft_bytes: float,
    draft_factor: float,
    cache_bytes: float,
    throughput: float,
    dense: float,
    attention: float,
    overheads_us: tuple[float, float, float],
) -> Roofline:
    """Return the published model in seconds; bytes, bytes/s, operations per token."""
    target_us, draft_us, verify_us = overheads_us
    return Roofline(
        target_weights_s=target_bytes / bandwidth,
        draft_weights_s=draft_factor * draft_bytes / bandwidth,
        cache_s=cache_bytes / bandwidth,
        dense_s=dense / throughput,
        attention_s=attention / throughput,
        target_overhead_s=target_us * 1e-6,
        draft_overhead_s=draft_us * 1e-6,
        verify_overhead_s=verify_us * 1e-6,
    )


@dataclasses.dataclass(frozen=True)
class Published:
    """What is published of one model on eight A100, one engine each.

    costs: the fitted cost model. head_s: the vocabulary projection, which its passes
      leave out. keep_prob: acceptance with the switch.
    done: share of rollouts done and the second of it, plain decoding.
    always_gamma, always_saved: drafting in every round, with which length, and the
      share of the rollout that it saved. saved: with the switch.
    """

    costs: Roofline
    head_s: float
    keep_prob: float
    done: tuple[tuple[float, float], ...]
    always_gamma: int
    always_saved: float
    saved: float


MODELS = {
    "Qwen2.5-7B": Published(
        costs=_roofline(
            bandwidth=1617462633773.974,
            target_bytes=15230974976,
            draft_bytes=5443042304,
            draft_factor=1.334,
            cache_bytes=26205,
            throughput=233.514e12,
            dense=14140571648,
            attention=401408,
            overheads_us=(39.0, 69.0, 152.3),
        ),
        head_s=0.67e-3,
        keep_prob=0.982,
        done=((0.5, 13.0), (0.9, 22.0), (0.99, 30.0), (1.0, 88.0)),
        always_gamma=7,
        always_saved=0.082,
        saved=0.196,
    ),
    "Llama-3.1-8B": Published(
        costs=_roofline(
            bandwidth=1566304179992.2922,
            target_bytes=16060522496,
            draft_bytes=5591539712,
            draft_factor=1.405,
            cache_bytes=25163,
            throughput=233.514e12,
            dense=15009316864,
            attention=524288,
            overheads_us=(74.0, 86.1, 214.2),
        ),
        head_s=0.67e-3,
        keep_prob=0.958,
        done=((0.5, 10.0), (0.9, 16.0), (0.99, 30.0), (1.0, 123.0)),
        always_gamma=5,
        always_saved=0.059,
        saved=0.107,
    ),
    # Its finishing times are not published: the 7B's lengths are taken, same data.
    "Qwen2.5-14B": Published(
        costs=_roofline(
            bandwidth=1564389351818.7363,
            target_bytes=29539379200,
            draft_bytes=9721292800,
            draft_factor=1.271,
            cache_bytes=48070,
            throughput=233.514e12,
            dense=27981250560,
            attention=983040,
            overheads_us=(50.0, 153.9, 232.3),
        ),
        head_s=1.0e-3,
        keep_prob=0.976,
        done=(),
        always_gamma=5,
        always_saved=-0.067,
        saved=0.168,
    ),
}


@dataclasses.dataclass(frozen=True)
class WithOverhead:
    """A cost model, and what its passes leave out.

    passes: the forward passes. head_s: of every pass. draft_s: of every draft pass
      beside that. draft_row_s: of every draft pass and live row.
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
    """Return the lengths at which rollouts are done when the published ones are.

    Plain decoding is integrated over time at the live count of one engine. Between the
    published shares the time of finishing is linear in the share.

    Args:
      model: with `done`. costs: seconds of plain decoding.
    Returns:
      int `[SEQUENCES]`, ascending.
    """
    shares, seconds = np.array(model.done).T
    at = (np.arange(SEQUENCES) + 0.5) / SEQUENCES
    at[-1] = 1.0
    # The first are done at a seventh of the median time: a guess of no consequence.
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
    """Return `num` rollouts, each the traces of all engines; sequences are dealt."""
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
    """Return the share of plain decoding saved, over `num` rollouts after warm-ups.

    A rollout takes what its slowest engine does. Every engine has a decider of its own.
    """
    engines = SEQUENCES // ENGINE
    deciders = [make() for _ in range(engines)]
    saved = []
    for turn, engines_traces in enumerate(rollouts(lengths, WARM_UPS + num)):
        plain, found = [], []
        for engine, trace in enumerate(engines_traces):
            luck = traces.KeptDrafts(
                trace, model.keep_prob, seed=turn * engines + engine
            )
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
    (first,) = rollouts(lengths, 1)

    def excess(overhead_s: float) -> float:
        plain, always = (
            max(
                replay.replay(
                    trace,
                    make(overhead_s),
                    decider,
                    traces.KeptDrafts(trace, model.keep_prob, seed),
                ).seconds
                for seed, trace in enumerate(first)
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
    for name, model in tqdm(MODELS.items(), desc="published setting", unit="model"):
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
    tables: dict[str, tuple[RoundCosts, PassPredictor]] = {
        f"{name}, published roofline": (model.costs, model.costs)
        for name, model in MODELS.items()
    }
    for path in sweeps:
        measured = sweep.read_sweep(path)
        fitted = measured.fitted()
        costs = PassCosts(fitted)
        tables[f"{measured.model}, measured table"] = (costs, Roofline.fit(fitted))
    cases = [(t, k, p) for t in tables for k in traces.TRACES for p in keeps]
    points = []
    for table, kind, keep_prob in tqdm(cases, desc="controls", unit="case"):
        make = traces.TRACES[kind]
        comparison = replay.compare(
            [make(ENGINE, cap=CAP, seed=seed) for seed in range(seeds)],
            *tables[table],
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


Table = tuple[Sequence[str], list[tuple[Any, ...]]]


def setting_rows(points: Sequence[Mapping[str, Any]]) -> Table:
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
        "model",
        "costs",
        "overhead µs",
        "always %",
        "published",
        "switch %",
        "published",
        "best %",
    )
    return header, rows


def control_rows(points: Sequence[Mapping[str, Any]]) -> Table:
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
        "costs",
        "lengths",
        "keep",
        "paper %",
        "best %",
        "oracle %",
        "to oracle",
        "behind paper in",
    )
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
    out = measure.results_dir(args.out, args.quick)
    settings = {"keeps": args.keeps, "seeds": args.seeds, "num": args.num}
    record = measure.new_record("published", settings)
    record["points"] = replay_setting(args.num)
    header, rows = setting_rows(record["points"])
    print(text_table(rows, header), flush=True)
    record["controls"] = compare_controls(args.sweeps, args.keeps, args.seeds)
    header, rows = control_rows(record["controls"])
    print(text_table(rows, header))
    measure.save(out / "published.json", record)
    print(f"written: published.json in {out.name}", file=sys.stderr)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.published"))
