"""What a run writes down: one JSON object a line, and the pictures made from them.

Every line has a "kind": "warmup", "eval" or "step". Whatever the clock decides (times,
and the draft lengths chosen by time) is under "timing"; everything else repeats.

Left out: deciding anything. The numbers come from `grpo`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from er_jax.figures import new_figure
from train.placement import on_host

QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)


class MetricsFile:
    """`metrics.jsonl`: appended to line by line, cut back when a run is resumed.

    Args:
      path: the file; made when first written to.
      writes: whether this process is the one that writes it.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def append(self, record: dict[str, Any]) -> None:
        """Write one line and hand it to the operating system."""
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines; a last one torn by a kill is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def cut_after(self, step: int) -> list[dict[str, Any]]:
        """Drop, in one atomic move, what came after a GRPO step; return what is left.

        A run killed between two checkpoints has written lines that the resumed run
        will write again.
        """
        if not self.writes:
            return []
        kept = [r for r in self.read() if r["kind"] == "warmup" or r["step"] <= step]
        draft = self.path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(draft, self.path)
        return kept


def digest(tree: Any) -> str:
    """Return 16 hex digits that change when any bit of any array of `tree` does."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = on_host(leaf)
        total.update(
            f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode()
        )
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


def quantiles(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return the 10th, 50th, 90th, 99th percentile and the maximum."""
    found = np.quantile(np.asarray(values, float), QUANTILES)
    names = ("p10", "p50", "p90", "p99", "max")
    return {name: round(float(v), 1) for name, v in zip(names, found, strict=True)}


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw reward, lengths, seconds and the log-probability gap over the GRPO steps.

    Args:
      records: the lines of `metrics.jsonl`.
      path: the picture to write.
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
