"""Training with Tunix: its own sampler and er_jax's, in turn, from the same weights.

    pip install -e ".[tunix]"
    python -m benchmarks.tunix

The run is that of examples/tunix_grpo.py: two learners make the same steps of GRPO on
the same problems, one after the other, each with its own noise. Told are the rewards
and the seconds of rollouts, compilation apart. Both sample all rows of a step at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.lib import records
from benchmarks.lib.tables import Table, number


@dataclasses.dataclass(frozen=True)
class Args:
    """What to run.

    Args:
      steps: of GRPO. quick: three steps of a model that was hardly warmed up; nothing
        that can be quoted. out: directory of the record.
    """

    steps: int = 20
    quick: bool = False
    out: Path | None = None


def point(name: str, found: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return the point of one engine from what its learner recorded."""
    seconds = np.array(found["rollout_s"])
    q1, median, q3 = np.percentile(seconds, (25, 50, 75))
    return {
        "preset": "Qwen3 of Tunix, 2 layers of 96",
        "rows": rows,
        "dtype": "float32",
        "engine": name,
        "rewards": found["reward"],
        "tokens": found["tokens"],
        "rollout_s": {"median": median, "q1": q1, "q3": q3},
        "compilation_s": float(seconds.sum() - median * len(seconds)),
        "all_rollout_s": found["rollout_s"],
    }


def difference(points: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the mean difference of rewards, step by step, and its standard error.

    The steps of both have the same problems.
    """
    first, second = (np.array(p["rewards"]) for p in points)
    apart = second - first
    return float(apart.mean()), float(apart.std(ddof=1) / math.sqrt(len(apart)))


def rows_of(points: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the record's points."""
    header = [
        "engine", "reward, first 5 steps", "last 5 steps", "s per rollout (quartiles)",
        "compilation s", "tokens per step", "reward less that of the first (s.e.)",
    ]  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    for p in points:
        apart = (
            ""
            if p is points[0]
            else "{:+.3f} ({:.3f})".format(*difference([points[0], p]))
        )
        s = p["rollout_s"]
        rows.append(
            (
                p["engine"],
                float(np.mean(p["rewards"][:5])),
                float(np.mean(p["rewards"][-5:])),
                f"{number(s['median'])} ({number(s['q1'])}, {number(s['q3'])})",
                p["compilation_s"],
                float(np.median(p["tokens"])),
                apart,
            )
        )
    return header, rows


def main(args: Args) -> None:
    """Train with both engines; print and save what happened."""
    from examples import tunix_grpo

    settings = tunix_grpo.Settings(steps=args.steps)
    if args.quick:
        settings = tunix_grpo.Settings(steps=3, warm_up_steps=5, prompts=4)
    record = records.new_record("tunix", dataclasses.asdict(settings))
    found = tunix_grpo.run(tunix_grpo.engines(), settings)
    rows = settings.prompts * settings.generations
    record["points"] = [point(name, one, rows) for name, one in found.items()]
    print(tunix_grpo.summary(found))
    records.save(records.results_dir(args.out, args.quick) / "tunix.json", record)


if __name__ == "__main__":
    main(tyro.cli(Args))
