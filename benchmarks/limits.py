"""What drafts are worth by the bytes that their passes move: batches and rollouts.

    python -m benchmarks.limits              # reads results/traffic.json
    python -m benchmarks.limits --device v5p

Nothing is timed and nothing is compiled: the bytes of passes were counted in real
programs (`benchmarks.traffic`), and are moved at the bandwidth of the data sheet, or
the arithmetic of a verification takes longer. *batches*: the best speed over plain
decoding at some rows and lengths, over all draft lengths. *rollouts*: replays of
generated lengths with the library's controller (`er_jax.tools.replay`). Both for
several chances that a draft is kept, because that depends on model and text;
`benchmarks.acceptance` measures it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tyro
from tqdm import tqdm

from benchmarks.lib import records, tables
from benchmarks.traffic import SHAPES, newest_first
from er_jax.acceptance import expected_tokens
from er_jax.costs.passes import Kind, on_line, seconds_of_passes
from er_jax.tools import presets, replay
from er_jax.tools.traces import TRACES
from er_jax.tools.traffic import Count
from er_jax.types import Program

GAMMAS = tuple(range(13))
# Drafts that read a copy of the cache in 4 bits, which the library does not make; and
# its share of 16-bit entries, with two 16-bit scales for 128 numbers.
COPY = ", 4-bit copy"
COPY_SHARE = (4 + 2 * 16 / 128) / 16
# The shape whose counts predict the lengths and rows of a rollout.
COUNTED = (32, 8192)


@dataclasses.dataclass(frozen=True)
class Args:
    """What to predict.

    Args:
      model, device: of the record of `benchmarks.traffic`.
      drafts: kinds of drafts of that record. keep: chances that a draft is kept.
      num: completions of a rollout. slots: rows decoded at once. cap: their limit in
        tokens. seeds: rollouts of each kind of lengths.
      quick: few rollouts, to check the script. out: directory of the record.
    """

    model: str = "qwen2.5-7b"
    device: str = "h100"
    drafts: tuple[str, ...] = (
        *("int8", "int4", "int4" + COPY, "int8, window", "int4, window"),
    )
    keep: tuple[float, ...] = (0.95, 0.92, 0.88, 0.85, 0.8, 0.7)
    num: int = 128
    slots: int = 32
    cap: int = 8192
    seeds: int = 8
    quick: bool = False
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class CountedCosts:
    """Seconds of rounds by the counted bytes of one shape; see `RoundCosts`.

    rows, length: of the counted programs. step: the plain step. draft: a draft pass.
    verify: verifications by their gamma. is_spanned: whether drafts read as much of the
    cache at any length. chip: its data sheet. flops: of one position of one row.
    """

    rows: int
    length: int
    step: Count
    draft: Count
    verify: Mapping[int, Count]
    is_spanned: bool
    chip: presets.Chip
    flops: float

    def pass_seconds(self, kind: Kind, rows: int, length: int, gamma: int = 0) -> float:
        """Return the seconds of one pass; arguments as in `PassCosts.pass_seconds`.

        Verifications between the counted ones are interpolated, from the plain step on.
        """
        shares = rows / self.rows, length / self.length
        if kind == "draft":
            positions = 1
            seen = (shares[0], 1.0) if self.is_spanned else shares
            moved = self.draft.bytes_at(*seen)
        else:
            positions = gamma + 1
            counts = {0: self.step, **self.verify}
            points = {g: one.bytes_at(*shares) for g, one in counts.items()}
            moved = on_line(points, gamma)
        return max(
            moved / self.chip.bytes_per_s,
            rows * positions * self.flops / self.chip.ops_per_s,
        )

    def round_seconds(self, program: Program) -> float:
        """Return the seconds of a whole round."""
        return seconds_of_passes(self, program)


def costs_of(
    points: Sequence[Mapping[str, Any]],
    model: str,
    device: str,
    shape: tuple[int, int],
    draft: str,
) -> CountedCosts:
    """Return the costs of rounds with a kind of draft, by the counts of one shape.

    With `COPY` in its name, the draft reads that much less of the cache than counted.
    Verifications are those that were counted last, of whichever draft.

    Raises:
      ValueError: the record lacks a case; it says which command makes it.
    """
    rows, length = shape
    is_copy, draft = COPY in draft, draft.replace(COPY, "")
    at = [
        p
        for p in newest_first(points)
        if p["preset"] == model and p["device"].partition(":")[0] == device
        and (p["rows"], p["length"]) == shape
    ]  # fmt: skip
    found: dict[tuple[str, int], Count] = {}
    for point in at:
        for one in point["passes"]:
            if one["kind"] != "draft" or point["draft"] == draft:
                count = Count(num_bytes=dict(one["num_bytes"]))
                found.setdefault((one["kind"], point["gamma"]), count)
    drafts = [found[key] for key in sorted(found) if key[0] == "draft"]
    verify = {gamma: one for (kind, gamma), one in found.items() if kind == "verify"}
    if ("step", 0) not in found or not drafts:
        raise ValueError(
            f"results/traffic.json has no step, or no {draft!r} draft, of {model} on "
            f"{device} at {rows} x {length}; run python -m benchmarks.traffic "
            f"--models {model} --devices {device} --drafts {draft!r}"
        )
    draft_pass, step = drafts[0], found["step", 0]
    if is_copy:
        sizes = draft_pass.num_bytes
        sizes["cache"] = round(sizes["cache"] * COPY_SHARE)
    weights = (
        step.num_bytes["weights"] / jnp.dtype(presets.PRESETS[model].dtype).itemsize
    )
    return CountedCosts(
        rows=rows,
        length=length,
        step=step,
        draft=draft_pass,
        verify=verify,
        is_spanned="window" in draft,
        chip=presets.CHIPS[device],
        flops=2 * weights,
    )


def best_of(costs: CountedCosts, keep: float) -> tuple[int, float]:
    """Return the best draft length at the counted shape, and its speed over plain."""

    def speed(gamma: int) -> float:
        tokens = expected_tokens([keep] * gamma)
        program = Program(costs.rows, costs.length, gamma)
        return float(tokens) / costs.round_seconds(program)

    best = max(GAMMAS, key=speed)
    return best, speed(best) / speed(0)


def saved(costs: CountedCosts, trace: str, keep: float, args: Args) -> dict[str, float]:
    """Return the share of plain decoding's time that each control saves in replay."""
    make = TRACES[trace]
    traces = [make(args.num, cap=args.cap, seed=seed) for seed in range(args.seeds)]
    found = replay.compare(
        traces, costs, costs, ("best", "oracle"), gammas=GAMMAS, keep_prob=keep,
        slots=args.slots, num_warm_ups=min(2, args.seeds),
    )  # fmt: skip
    return {name: float(found.saved(name).mean()) for name in ("best", "oracle")}


def batch_rows(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows of the table of batches: a line for each kind of draft."""
    chosen = [p for p in points if p["part"] == "batch"]
    keeps = sorted({p["keep"] for p in chosen}, reverse=True)
    names = list(dict.fromkeys((p["rows"], p["length"], p["draft"]) for p in chosen))
    rows: list[tuple[Any, ...]] = []
    for rows_, length, draft in names:
        own = {
            p["keep"]: f"{p['speed_up']:.2f} ({p['gamma']})"
            for p in chosen
            if (p["rows"], p["length"], p["draft"]) == (rows_, length, draft)
        }
        rows.append((f"{rows_} x {length}", draft, *(own[keep] for keep in keeps)))
    header = ("rows x positions", "draft", *(f"kept {keep}" for keep in keeps))
    return header, rows


def rollout_rows(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows of the table of rollouts, one for each kind of draft."""
    chosen = [p for p in points if p["part"] == "rollout"]
    keeps = sorted({p["keep"] for p in chosen}, reverse=True)
    names = list(dict.fromkeys((p["trace"], p["draft"]) for p in chosen))
    rows: list[tuple[Any, ...]] = []
    for trace, draft in names:
        own = {
            p["keep"]: f"{100 * p['saved']['best']:.0f}"
            for p in chosen
            if (p["trace"], p["draft"]) == (trace, draft)
        }
        rows.append((trace, draft, *(own[keep] for keep in keeps)))
    header = ("lengths", "draft", *(f"% saved, kept {keep}" for keep in keeps))
    return header, rows


def main(args: Args) -> None:
    """Predict batches and rollouts, print both tables and write the record."""
    counted = json.loads((records.RESULTS / "traffic.json").read_text())
    points = counted["points"]
    record = records.new_record("limits", records.settings_of(args))
    record["traffic_commit"] = counted["environment"]["commit"]
    if args.quick:
        args = dataclasses.replace(args, num=8, seeds=1, keep=args.keep[:2], cap=256)
    about = {"preset": args.model, "device": args.device, "dtype": "bfloat16"}
    for draft in tqdm(args.drafts, unit="kind of draft"):
        for shape in SHAPES:
            costs = costs_of(points, args.model, args.device, shape, draft)
            for keep in args.keep:
                gamma, speed_up = best_of(costs, keep)
                record["points"].append(
                    {**about, "part": "batch", "rows": shape[0], "length": shape[1],
                     "draft": draft, "keep": keep, "gamma": gamma,
                     "speed_up": speed_up}
                )  # fmt: skip
        costs = costs_of(points, args.model, args.device, COUNTED, draft)
        for trace in ("tail", "capped"):
            for keep in args.keep:
                record["points"].append(
                    {**about, "part": "rollout", "rows": args.slots, "trace": trace,
                     "draft": draft, "keep": keep,
                     "saved": saved(costs, trace, keep, args)}
                )  # fmt: skip
    record["points"].sort(key=lambda p: (p["part"], p["rows"], p.get("length", 0)))
    print(tables.markdown(batch_rows(record["points"])))
    print(tables.markdown(rollout_rows(record["points"])))
    directory = records.results_dir(args.out, args.quick)
    records.save(directory / "limits.json", record)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.limits"))
