"""A record that has limited time: written after every point, with what was left out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.lib import records


class TimedRecord:
    """A record with its path, and the seconds left for more points.

    Args:
      path: where it is written. record: as `records.new_record` returns it.
      begun_s: when its time began, by `time.perf_counter`. budget_s: seconds from then.
    """

    def __init__(
        self, path: Path, record: dict[str, Any], begun_s: float, budget_s: float
    ) -> None:
        self.path, self.record = path, record
        self._begun_s, self._end_s = begun_s, begun_s + budget_s
        self.record["skipped"] = []

    @property
    def left_s(self) -> float:
        """Seconds until the end, negative after it."""
        return self._end_s - time.perf_counter()

    def save(self) -> None:
        """Write the record."""
        self.record["seconds"] = time.perf_counter() - self._begun_s
        records.save(self.path, self.record)

    def add(self, point: Mapping[str, Any]) -> None:
        """Add a point and write the record."""
        self.record["points"].append(dict(point))
        self.save()

    def skip(self, what: str, why: str) -> None:
        """Note what was not measured, and write the record."""
        print(f"skipped {what}: {why}", flush=True)
        self.record["skipped"].append({"what": what, "why": why})
        self.save()
