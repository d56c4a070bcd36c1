"""What a finished run shows a person: a summary in words, and pictures.

Left out: the numbers themselves, which `trainer` logs through `metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import er_jax
from er_jax.figures import new_figure
from train.files import replace_text, writing

# The fields that summary and picture show of a record of each kind.
SHOWN = {
    "warmup": ("solution_chance", "timing.seconds"),
    "eval": ("reward", "num_completions"),
    "step": (
        "reward",
        "logprob_gap",
        "length.p50",
        "length.p90",
        "length.max",
        "timing.rollout_s",
        "timing.rollout_compile_s",
        "timing.update_s",
        "timing.tokens_by_gamma",
    ),
}


def write_report(
    out: Path,
    records: Sequence[dict[str, Any]],
    seconds: float,
    trained: Path | None,
    rollout: er_jax.Rollout | None,
) -> None:
    """Print and write the summary of a run, and draw its pictures.

    Args:
      out: directory of the run. records: its metrics; incomplete ones are left out.
      seconds: that this process took.
      trained: the checkpoint that was saved for other programs; None if none was.
      rollout: the last one; None when this process took no step.
    """
    records = [record for record in records if is_complete(record)]
    text = summary(records, seconds)
    if trained is not None:
        text += f"\nthe trained checkpoint is in {trained}"
    if rollout is not None:
        text += "\nlast rollout: " + rollout.stats.summary()
    print("\n" + text)
    with writing("the summary", out):
        replace_text(out / "summary.txt", text + "\n")
        try:
            plot(records, out / "metrics.png")
            if rollout is not None:
                rollout.stats.plot(out / "rollout.png")
        except ImportError as error:
            print(f"no pictures: {error}")


def is_complete(record: dict[str, Any]) -> bool:
    """Return whether a record holds all that is shown of its kind."""

    def holds(values: Any, names: Sequence[str]) -> bool:
        for name in names:
            if not isinstance(values, dict) or name not in values:
                return False
            values = values[name]
        return True

    names = SHOWN.get(record["kind"])
    return names is not None and all(holds(record, n.split(".")) for n in names)


def summary(records: Sequence[dict[str, Any]], seconds: float) -> str:
    """Return what a person wants to know about a finished run.

    Args:
      records: complete ones. seconds: that this process took.
    """
    steps = [r for r in records if r["kind"] == "step"]
    evals = [r for r in records if r["kind"] == "eval"]
    warm = [r for r in records if r["kind"] == "warmup"]
    lines = []
    if warm:
        lines.append(
            f"warm-up: {warm[-1]['step']} steps in "
            f"{warm[-1]['timing']['seconds']:.0f} s, chance of a written-out solution "
            f"{warm[-1]['solution_chance']:.2f}"
        )
    if evals:
        text = " -> ".join(f"{r['reward']:.3f} (step {r['step']})" for r in evals)
        lines.append(f"held-out reward, {evals[0]['num_completions']} samples: {text}")
    if steps:
        few = steps[:3], steps[-3:]
        first, last = (np.mean([r["reward"] for r in part]) for part in few)
        lines.append(f"training reward, mean of 3 steps: {first:.3f} -> {last:.3f}")
        times = [r["timing"] for r in steps]
        total = {
            name: sum(t[name] for t in times)
            for name in ("rollout_s", "rollout_compile_s", "update_s")
        }
        lines.append(
            f"{len(steps)} GRPO steps: rollouts {total['rollout_s']:.1f} s (of it "
            f"compiling {total['rollout_compile_s']:.1f} s), updates "
            f"{total['update_s']:.1f} s"
        )
        gammas: dict[str, int] = {}
        for one in times:
            for gamma, count in one["tokens_by_gamma"].items():
                gammas[gamma] = gammas.get(gamma, 0) + count
        shares = ", ".join(f"gamma {g}: {n}" for g, n in sorted(gammas.items()))
        lines.append(f"tokens sampled by draft length: {shares}")
        gap = max(r["logprob_gap"] for r in steps)
        lines.append(f"largest rollout-trainer log-probability difference: {gap:.1e}")
    lines.append(f"this process took {seconds:.0f} s")
    return "\n".join(lines)


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw reward, lengths, seconds and the log-probability gap over the GRPO steps.

    Args:
      records: complete ones. path: the picture to write.
    Raises:
      ImportError: matplotlib is missing; install the extra `plot`.
    """
    steps = [record for record in records if record["kind"] == "step"]
    evals = [record for record in records if record["kind"] == "eval"]
    x = [record["step"] for record in steps]
    figure = new_figure(9, 6)
    reward, length, seconds, gap = figure.subplots(2, 2).flat

    reward.plot(x, [r["reward"] for r in steps], label="training prompts")
    reward.plot(
        [r["step"] for r in evals],
        [r["reward"] for r in evals],
        "o",
        label="held-out prompts",
    )
    reward.set(title="mean reward", ylim=(0, 1.02))
    reward.legend()
    for name in ("p50", "p90", "max"):
        length.plot(x, [r["length"][name] for r in steps], label=name)
    length.set(title="completion length, tokens", yscale="log")
    length.legend()
    phases = ("rollout_s", "update_s")
    columns = [[r["timing"][phase] for r in steps] for phase in phases]
    seconds.stackplot(x, *columns, labels=[p.removesuffix("_s") for p in phases])
    seconds.set(title="seconds per step, compilation included", ylim=(0, None))
    seconds.legend(loc="upper right")
    gap.plot(x, [r["logprob_gap"] for r in steps])
    gap.set(title="largest |rollout - trainer| log-probability, nats", yscale="log")
    for axes in (reward, length, seconds, gap):
        axes.set(xlabel="GRPO step")
    figure.savefig(path, dpi=130)
