"""The decision table: device, model and length -> what drafts will be worth.

Counted: the best speed over plain decoding by the bytes that passes move, at two
chances that a draft is kept, for 8-bit and 4-bit drafts. Measured: what rollouts with
`best` gained where a device was there. Both come from the records; `benchmarks.report`
writes the table into docs/expect.md.

Left out: anything that no record holds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import limits
from benchmarks.lib.tables import Table

# Chances that a draft is kept: a poor one and a good one.
LOW, HIGH = 0.85, 0.95
# The least gain for which drafts are worth the memory of one.
WORTH = 1.05

# Kinds of drafts in the record of `benchmarks.traffic`, by their bits. Of several, the
# faster counts: the controller chooses what a draft sees.
COUNTED = {8: ("int8", "int8, window"), 4: ("int4", "int4, window")}

# Records of measured rollouts.
MEASURED = ("rollout", "rollout_rows_90M", "rollout_rows_3M")

DEVICES = {
    "h100": "H100",
    "v5p": "TPU v5p",
    "v5e": "TPU v5e",
    "v6e": "TPU v6e",
    "cpu": "2 CPU cores",
}


@dataclasses.dataclass(frozen=True)
class Gain:
    """Speed over plain decoding: with few drafts kept, with many, and the drafts."""

    low: float
    high: float
    gammas: tuple[int, int]

    def __str__(self) -> str:
        """Return it as a cell of the table."""
        speeds = " to ".join(dict.fromkeys(f"{x:.2f}" for x in (self.low, self.high)))
        gammas = " to ".join(dict.fromkeys(map(str, self.gammas)))
        return f"{speeds} ({gammas})"


def counted_gains(
    points: Sequence[Mapping[str, Any]], model: str, device: str, shape: tuple[int, int]
) -> dict[int, Gain]:
    """Return what drafts gain at a shape, by their bits; none where none was counted.

    Args:
      points: of the record of `benchmarks.traffic`. model, device: as there.
      shape: rows, and positions of the cache.
    """
    found = {}
    for bits, drafts in COUNTED.items():
        ends: dict[float, tuple[int, float]] = {}
        for draft in drafts:
            try:
                costs = limits.costs_of(points, model, device, shape, draft)
            except ValueError:
                continue  # not counted
            for keep in (LOW, HIGH):
                gamma, speed = limits.best_of(costs, keep)
                if speed > ends.get(keep, (0, 0.0))[1]:
                    ends[keep] = gamma, speed
        if ends:
            (low_gamma, low), (high_gamma, high) = ends[LOW], ends[HIGH]
            found[bits] = Gain(low, high, (low_gamma, high_gamma))
    return found


def measured_gain(point: Mapping[str, Any]) -> Gain:
    """Return what `best` gained in a measured rollout, and the drafts it made."""
    best = next(entry for entry in point["controls"] if entry["control"] == "best")
    speed = best["speedup_over_ar"]["median"]
    made = [
        int(g) for g, tokens in best["tokens_by_gamma"].items() if tokens and int(g)
    ]
    gammas = (min(made), max(made)) if best.get("keep_rate") and made else (0, 0)
    return Gain(speed, speed, gammas)


def advice(gains: Mapping[int, Gain]) -> str:
    """Return which draft to attach, by its bits.

    4-bit drafts are kept less often than 8-bit ones of the same policy. So they are the
    answer where they win at the poor chance against 8 bits at the good one, and 8 bits
    where 4 lose even at equal chances. In between the controller has to find out.
    """
    if max(gain.high for gain in gains.values()) < WORTH:
        return "none"
    if len(gains) == 1:
        (bits,) = gains
        return f"{bits} bits"
    if gains[4].low > gains[8].high:
        return "4 bits"
    if gains[4].high < gains[8].high:
        return "8 bits"
    return "both"


def rows_of(directory: Path) -> Table:
    """Return header and rows of the table.

    Args:
      directory: of the records.
    """

    def points(name: str) -> Sequence[Mapping[str, Any]]:
        found: Sequence[Mapping[str, Any]] = json.loads(
            (directory / f"{name}.json").read_text()
        )["points"]
        return found

    counted = points("traffic")
    rows: list[tuple[Any, ...]] = []

    def add(
        model: str, device: str, shape: str, gains: Mapping[int, Gain], known_by: str
    ) -> None:
        cells = [str(gains[bits]) if bits in gains else None for bits in (8, 4)]
        rows.append((model, DEVICES[device], shape, *cells, advice(gains), known_by))

    cases = dict.fromkeys(
        (p["preset"], p["device"].partition(":")[0], p["rows"], p["length"])
        for p in counted
    )
    for device in DEVICES:
        for model, place, num_rows, length in cases:
            if place == device:
                gains = counted_gains(counted, model, device, (num_rows, length))
                if gains:
                    shape = f"{num_rows} x {length}"
                    add(model, device, shape, gains, "bytes, counted")
    for name in MEASURED:
        for point in points(name):
            if point["part"] in ("workload", "rows"):
                mean = f"{point['lengths']['mean']:.0f}"
                shape = f"{point['rows']} x {mean} ({point['workload']})"
                add(
                    point["preset"], "cpu", shape, {8: measured_gain(point)}, "measured"
                )
    header = (
        "model", "device", "rows x positions", "8-bit drafts (gamma)",
        "4-bit drafts (gamma)", "attach", "known by",
    )  # fmt: skip
    return header, rows
