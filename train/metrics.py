"""The record of a run: `metrics.jsonl`, one JSON object a line.

Every line has a "kind" ("warmup", "eval" or "step") and a "step". What the clock
decides (times, and the draft lengths chosen by time) is under "timing"; everything else
is the same when a run is repeated.

Left out: what the lines hold, which is decided where they are made.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.files import replace_text, writing

QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)


class MetricsFile:
    """`metrics.jsonl`: appended to line by line, cut back when a run is resumed.

    Args:
      path: the file; the first record creates it.
      writes: whether this process writes it; of several, one does.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def append(self, record: dict[str, Any]) -> None:
        """Write one line and hand it to the operating system."""
        if not self.writes:
            return
        with writing("a line of metrics", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return all records; torn lines and lines of another form are skipped."""
        if not self.path.exists():
            return []
        found = map(_record, self.path.read_bytes().split(b"\n"))
        return [record for record in found if record is not None]

    def cut_after(self, step: int) -> list[dict[str, Any]]:
        """Drop the records after a GRPO step, in one atomic move; return the others.

        A run that is killed between two checkpoints has logged steps that the resumed
        run will log again.
        """
        if not self.writes:
            return []
        kept = [r for r in self.read() if r["kind"] == "warmup" or r["step"] <= step]
        with writing("the metrics", self.path):
            replace_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        return kept


def _record(line: bytes) -> dict[str, Any] | None:
    """Return what `append` wrote, None for any other line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # bad JSON, bad UTF-8, or nested too deeply
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if isinstance(record.get("step"), int) else None


def quantiles(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return the 10th, 50th, 90th, 99th percentile and the maximum."""
    found = np.quantile(np.asarray(values, float), QUANTILES)
    names = ("p10", "p50", "p90", "p99", "max")
    return {name: round(float(v), 1) for name, v in zip(names, found, strict=True)}
