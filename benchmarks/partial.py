"""Partial rollouts in training: seconds per token that is learnt from, and the reward.

    python -m benchmarks.partial                   # in replay, no device
    python -m benchmarks.partial --policy RUN      # and the demo, from a run's warm-up
    python -m benchmarks.partial --quick

*replay*: the published setting (see `benchmarks.published`): eight engines of 128
slots, 16 groups of eight completions for each engine and step, a step that ends with
the slowest engine. Lengths are drawn for every completion, or for every group, whose
completions are alike then; real groups are between these. Prompts, and the tokens that
carried completions have, are prefilled at the published throughput.
*demo*: two trainings from one warmed-up policy take steps in turn until both have
learnt from so many tokens. Compilation is left out of the seconds.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.lib import records, tables
from benchmarks.lib.rooflines import PUBLISHED, Published
from benchmarks.published import (
    ENGINE,
    GAMMAS,
    PROMPT_LENGTH,
    SEQUENCES,
    WithOverhead,
    lengths_of,
)
from configs import arithmetic, tiny
from er_jax.tools import replay
from er_jax.tools.replay import RoundCosts
from er_jax.tools.traces import KeptDrafts, Trace
from train.checkpoints import load_policy
from train.config import PartialConfig, RunConfig
from train.trainer import Trainer

GROUP = 8

# Steps that are not counted: the first of a partial training begin everything anew.
WARM_UPS = 6


@dataclasses.dataclass(frozen=True)
class Args:
    """What to compare.

    Args:
      overs: groups in work over those of a step; the first is 1, whole rollouts.
      max_age: greatest age of a token, in steps.
      steps: counted steps of the replay.
      policy: directory of a run of the demo; None leaves the demo out.
      over: groups in work in the demo. num_tokens: learnt from in the demo.
      out: where to write. quick: few steps, to see that it runs.
    """

    overs: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0)
    max_age: int = 4
    steps: int = 20
    policy: Path | None = None
    over: float = 1.5
    num_tokens: int = 40_000
    out: Path | None = None
    quick: bool = False


# -- replay


@dataclasses.dataclass
class Work:
    """The groups that an engine has in work, the oldest first.

    length, done, old: tokens of each completion in the end, now, and sampled before
    this step, int `[G, n]`. began: the step that each group was begun in, int `[G]`.
    """

    length: np.ndarray
    done: np.ndarray
    old: np.ndarray
    began: np.ndarray

    def taken(self, groups: np.ndarray) -> Work:
        """Return some of the groups."""
        return Work(*(getattr(self, f.name)[groups] for f in dataclasses.fields(self)))


def engine_step(
    work: Work,
    model: Published,
    costs: RoundCosts,
    decider: replay.Decider,
    *,
    step: int,
    max_age: int,
) -> tuple[float, Work, Work]:
    """Take one engine's part of a step.

    Args:
      work: with the new groups. model, costs, decider: of the replay.
      step: its number. max_age: groups of this age are waited for.
    Returns:
      Seconds, the groups that are learnt from, and those that are carried.
    """
    num_groups = ENGINE // GROUP
    is_open = work.done < work.length
    prompts = PROMPT_LENGTH + work.done[is_open]
    trace = Trace(prompts, work.length[is_open] - work.done[is_open])
    is_due = step - work.began >= max_age
    work.old = work.done.copy()

    def complete(done: np.ndarray) -> np.ndarray:
        is_left = is_open.copy()
        is_left[is_open] = done < trace.lengths
        return np.logical_not(is_left.any(axis=1))

    def is_enough(done: np.ndarray) -> bool:
        found = complete(done)
        return bool(found.sum() >= num_groups and found[is_due].all())

    luck = KeptDrafts(trace, model.keep_prob, seed=step)
    outcome = replay.replay(
        trace, costs, decider, luck, slots=ENGINE, is_enough=is_enough
    )
    work.done[is_open] += outcome.done
    has_begun = work.old[is_open] + outcome.done > 0
    prefilled = int(prompts[has_begun].sum())
    seconds = outcome.seconds + prefilled * model.costs.dense_s
    learnt = np.flatnonzero(complete(outcome.done))[:num_groups]
    others = np.setdiff1d(np.arange(len(work.done)), learnt)
    return seconds, work.taken(learnt), work.taken(others)


def replayed(
    model: Published,
    costs: RoundCosts,
    lengths: np.ndarray,
    make: Callable[[], replay.Decider],
    over: float,
    alike: bool,
    args: Args,
) -> dict[str, float]:
    """Return the seconds per token learnt from, and the share of old ones.

    Args:
      model, costs: of the replay. lengths: to draw from. make: makes the decider of an
        engine. over: groups in work. alike: whether a group has one length.
      args: steps and the greatest age.
    """
    random = np.random.default_rng(0)
    engines = SEQUENCES // ENGINE
    deciders = [make() for _ in range(engines)]
    nothing = np.zeros((0, GROUP), int)
    works = [Work(nothing, nothing, nothing, np.zeros(0, int)) for _ in range(engines)]
    in_work = round(ENGINE // GROUP * over)
    seconds, num_tokens, num_old, oldest = 0.0, 0, 0, 0
    for step in range(WARM_UPS + args.steps):
        took = []
        for engine, work in enumerate(works):
            new = in_work - len(work.done)
            drawn = random.choice(lengths, (new, 1 if alike else GROUP))
            drawn = np.broadcast_to(drawn, (new, GROUP))
            zeros = np.zeros((new, GROUP), int)
            grown = Work(
                *(
                    np.concatenate([mine, more])
                    for mine, more in zip(
                        (work.length, work.done, work.old, work.began),
                        (drawn, zeros, zeros, np.full(new, step)),
                        strict=True,
                    )
                )
            )
            spent, learnt, works[engine] = engine_step(
                grown, model, costs, deciders[engine], step=step, max_age=args.max_age
            )
            took.append(spent)
            if step >= WARM_UPS:
                num_tokens += int(learnt.length.sum())
                num_old += int(learnt.old.sum())
                oldest = max(oldest, step - int(learnt.began.min()))
        seconds += max(took) if step >= WARM_UPS else 0.0
    return {
        "seconds_per_token": seconds / num_tokens,
        "old_tokens": num_old / num_tokens,
        "oldest": oldest,
    }


def replay_points(args: Args) -> list[dict[str, Any]]:
    """Return a point for each model, control and number of groups in work."""
    points = []
    models = {name: model for name, model in PUBLISHED.items() if model.done}
    for name, model in tqdm(models.items(), desc="replay", unit="model"):
        costs = WithOverhead(model.costs, head_s=model.head_s)
        lengths = lengths_of(model, costs)

        def best(costs: RoundCosts = costs) -> replay.Decider:
            return replay.Best(costs, GAMMAS)

        controls: tuple[tuple[str, Callable[[], replay.Decider]], ...] = (
            ("ar", lambda: replay.Fixed(0)),
            ("best", best),
        )
        for alike, (control, make) in itertools.product((False, True), controls):
            found = [
                replayed(model, costs, lengths, make, over, alike, args)
                for over in args.overs
            ]
            whole_s = found[0]["seconds_per_token"]
            points += [
                {
                    "preset": "published",
                    "rows": ENGINE,
                    "dtype": "bfloat16",
                    "model": name,
                    "control": control,
                    "alike": alike,
                    "over": over,
                    **one,
                    "over_whole": one["seconds_per_token"] / whole_s,
                }
                for over, one in zip(args.overs, found, strict=True)
            ]
    return points


# -- the demo


def trainers(config: RunConfig, policy: Path | None, part: PartialConfig) -> Any:
    """Return two trainers from the same policy: whole rollouts, and partial ones."""
    found = {}
    for name, partial in (("whole", PartialConfig()), ("partial", part)):
        grpo = dataclasses.replace(config.grpo, partial=partial)
        out = config.out / name
        trainer = Trainer.of(dataclasses.replace(config, grpo=grpo, out=out))
        if policy is None:
            params = trainer.policy.init(trainer.keys["init"])
        else:
            _, params, _ = load_policy(policy, step=0)
        trainer.start_from(jax.tree.map(jnp.array, params))
        found[name] = trainer
    return found


def demo_points(config: RunConfig, policy: Path | None, args: Args) -> list[dict]:
    """Train both in turn, and return a point for each.

    Args:
      config: of the demo. policy: the run to begin from; None is a random policy.
      args: groups in work, and tokens to learn from.
    """
    part = PartialConfig(over=args.over, max_age=args.max_age)
    both = trainers(config, policy, part)
    # Not kept: the first steps compile.
    sums = {name: dict.fromkeys(("tokens", "rollout_s", "all_s"), 0.0) for name in both}
    before = {name: trainer.evaluate()["reward"] for name, trainer in both.items()}
    ages: dict[str, list[tuple[float, ...]]] = {name: [] for name in both}
    bar = tqdm(total=2 * args.num_tokens, desc="demo", unit="token", file=sys.stderr)
    while any(total["tokens"] < args.num_tokens for total in sums.values()):
        for name, trainer in both.items():
            total = sums[name]
            if total["tokens"] >= args.num_tokens:
                continue
            start = time.perf_counter()
            record = trainer.learn(trainer.rollout_step())
            spent, timing = time.perf_counter() - start, record["timing"]
            compile_s = timing["rollout_compile_s"]
            total["tokens"] += record["num_tokens"]
            total["rollout_s"] += timing["rollout_s"] - compile_s
            total["all_s"] += spent - compile_s
            bar.update(record["num_tokens"])
            ages[name].append(
                tuple(record.get(k, 0.0) for k in ("mean_age", "old_tokens", "max_age"))
            )
    bar.close()
    points = []
    for name, trainer in both.items():
        total = sums[name]
        mean_age, old, oldest = np.array(ages[name]).T
        points.append(
            {
                "preset": "demo",
                "rows": config.grpo.max_slots,
                "dtype": config.dtype,
                "rollouts": name,
                "over": trainer.config.grpo.partial.over,
                "steps": len(ages[name]),
                "tokens": total["tokens"],
                "rollout_ms_per_token": 1e3 * total["rollout_s"] / total["tokens"],
                "ms_per_token": 1e3 * total["all_s"] / total["tokens"],
                "reward_before": before[name],
                "reward": trainer.evaluate()["reward"],
                "mean_age": float(mean_age.mean()),
                "old_tokens": float(old.mean()),
                "oldest": float(oldest.max()),
            }
        )
    return points


def replay_rows(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows of the replay."""
    header = (
        "model", "lengths of a group", "control", "groups in work",
        "µs a token learnt", "of whole, %", "old tokens, %", "oldest, steps",
    )  # fmt: skip
    rows = [
        (
            p["model"], "alike" if p["alike"] else "drawn apart", p["control"],
            p["over"], 1e6 * p["seconds_per_token"],
            100 * p["over_whole"], 100 * p["old_tokens"], p["oldest"],
        )
        for p in points
        if p["preset"] == "published"
    ]  # fmt: skip
    return header, rows


def demo_rows(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows of the demo."""
    header = (
        "rollouts", "steps", "tokens learnt", "rollout ms a token", "all ms a token",
        "held-out reward before", "after", "old tokens, %", "oldest, steps",
    )  # fmt: skip
    rows = [
        (
            p["rollouts"], p["steps"], int(p["tokens"]), p["rollout_ms_per_token"],
            p["ms_per_token"], p["reward_before"], p["reward"], 100 * p["old_tokens"],
            p["oldest"],
        )
        for p in points
        if p["preset"] == "demo"
    ]  # fmt: skip
    return header, rows


def main(args: Args) -> dict[str, Any]:
    """Compare, print, and write the record; return it."""
    config = arithmetic.CONFIG
    if args.quick:
        args = dataclasses.replace(
            args, overs=(1.0, 1.5), steps=1, num_tokens=1, policy=None
        )
        config = tiny.CONFIG
    out = records.results_dir(args.out, args.quick)
    settings = records.settings_of(args, "policy")
    record = records.new_record("partial", settings)
    record["points"] += replay_points(args)
    print(tables.text(replay_rows(record["points"])), flush=True)
    if args.quick or args.policy is not None:
        with tempfile.TemporaryDirectory() as folder:
            here = dataclasses.replace(config, out=Path(folder), eval_samples=4)
            record["points"] += demo_points(here, args.policy, args)
        print(tables.text(demo_rows(record["points"])))
    records.save(out / "partial.json", record)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.partial"))
