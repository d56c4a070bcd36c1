"""The demo with and without a calculator to call: the reward, step by step.

    python -m benchmarks.tool
    python -m benchmarks.tool --quick

Two trainings start from one warmed-up policy, sample the same prompts, and take steps
in turn. In one of them a calculator writes what follows every "=". The policy has been
warmed up on solutions with slips; whether it puts the right sum in front of the "=", it
has to learn in both.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import trange

from benchmarks.lib import records, tables
from configs import arithmetic, calculator, tiny
from train.config import RunConfig, ToolConfig
from train.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Args:
    """What to train.

    Args:
      steps: GRPO steps of both. every: steps from one evaluation to the next.
      quick: a tiny model, to check the script. out: directory of the record; None is
        benchmarks/results.
    """

    steps: int = 30
    every: int = 5
    quick: bool = False
    out: Path | None = None


def trainers(config: RunConfig) -> dict[str, Trainer]:
    """Return two trainers from one warmed-up policy, without and with the tool."""
    found: dict[str, Trainer] = {}
    params = None
    for name, tool in (("none", ToolConfig()), ("calculator", calculator.CONFIG.tool)):
        trainer = Trainer.of(
            dataclasses.replace(config, tool=tool, out=config.out / name)
        )
        params = trainer.first_params() if params is None else params
        trainer.start_from(jax.tree.map(jnp.copy, params))
        found[name] = trainer
    return found


def points_of(config: RunConfig, args: Args) -> list[dict[str, Any]]:
    """Train both in turn; return a point for each."""
    both = trainers(config)
    rewards = {name: [trainer.evaluate()["reward"]] for name, trainer in both.items()}
    calls: dict[str, list[float]] = {name: [] for name in both}
    learnt: dict[str, list[float]] = {name: [] for name in both}
    for step in trange(1, args.steps + 1, desc="steps of both", file=sys.stderr):
        for name, trainer in both.items():
            data = trainer.rollout_step()
            answered = [max(len(spans) - 1, 0) for spans in data.out.turns]
            calls[name].append(float(np.mean(answered)))
            learnt[name].append(trainer.learn(data)["reward"])
            if step % args.every == 0:
                rewards[name].append(trainer.evaluate()["reward"])
    return [
        {
            "preset": "demo",
            "rows": config.grpo.max_slots,
            "dtype": config.dtype,
            "tool": name,
            "steps": list(range(0, args.steps + 1, args.every)),
            "reward": rewards[name],
            "completions": config.eval_samples * len(both[name].problems["eval"]),
            "learnt_reward": learnt[name],
            "calls": float(np.mean(calls[name])),
        }
        for name in both
    ]


def rows_of(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows, one per training."""
    header = (
        *("tool", "calls a completion", "held-out completions"),
        *(f"reward after {step} steps" for step in points[0]["steps"]),
    )
    rows = [
        (
            *(p["tool"], round(p["calls"], 1), p["completions"]),
            *(f"{reward:.3f}" for reward in p["reward"]),
        )
        for p in points
    ]
    return header, rows


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw the held-out reward by step."""
    picture, axes = records.figure(1, width=5.2)
    for point in record["points"]:
        axes[0][0].plot(point["steps"], point["reward"], "o-", label=point["tool"])
    axes[0][0].set_xlabel("GRPO step")
    axes[0][0].set_ylabel("held-out reward")
    axes[0][0].legend(title="tool")
    records.save_figure(picture, record, path)


def main(args: Args) -> dict[str, Any]:
    """Train, print a table, write and return the record."""
    config = arithmetic.CONFIG
    if args.quick:
        args = dataclasses.replace(args, steps=1, every=1)
        config = tiny.CONFIG
    out = records.results_dir(args.out, args.quick)
    record = records.new_record("tool", records.settings_of(args))
    with tempfile.TemporaryDirectory() as folder:
        here = dataclasses.replace(config, out=Path(folder), eval_samples=4)
        record["points"] += points_of(here, args)
    print(tables.text(rows_of(record["points"])))
    records.save(out / "tool.json", record)
    draw(record, out / "tool.png")
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.tool"))
