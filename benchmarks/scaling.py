"""What many replicas lose while they wait for the last one, in replay.

    python -m benchmarks.scaling

No device is needed. Replicas sample apart, each on one GPU, and their rollouts are
replayed (`er_jax.tools.replay`). Prompts are dealt in order or the longest first. The
last rows stay where they are, or four or eight GPUs share theirs; then each of these
reads a part of the weights.

*Costs* are the roofline of Qwen2.5-7B in bfloat16 with an int8 draft by the data sheet
of an H100, without overheads. GPUs that share read an equal part of the weights each,
and sum over all of them twice a layer; a sum takes a fixed time and the time of its
bytes. Where their number does not divide the heads, as eight does not here, every GPU
has the whole cache and the whole weights of keys and values (`er_jax.mesh.layout` lays
them out so). When sharing begins, every device copies its part of the weights, and the
live rows' caches are moved.

*Dealing* knows the mean length of each prompt's completions up to a random factor, as
if from an earlier step with a policy that has changed since. Sharing begins at the best
of a few moments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.lib import records, tables
from benchmarks.lib.rooflines import CHIP, MODEL, h100_roofline
from er_jax.costs.roofline import Roofline
from er_jax.mesh.replicas import deal
from er_jax.tools import presets, replay
from er_jax.tools.traces import TRACES, KeptDrafts, Trace
from er_jax.types import Program

GAMMAS = (0, 2, 4, 6, 8)
GROUP = 8

# When sharing begins, in parts of the time after which the last of these replicas would
# be done alone.
MOMENTS = (0.2, 0.4, 0.6, 0.8, 0.9)


@dataclasses.dataclass(frozen=True)
class Args:
    """What to replay.

    Args:
      replicas: numbers of replicas. traces: kinds of lengths, of `er_jax.tools.traces`.
      prompts: of each replica, with eight completions each. cap: tokens of the longest
        completion. keep: chance that a draft is kept.
      error: standard deviation of the logarithm of the lengths that dealing knows.
      sum_s: seconds of one sum over the GPUs of a host, beside the time of its bytes.
      link_bytes_per_s: from one GPU to the others. together: numbers of GPUs that
        share; each divides `replicas`. seed: of traces, luck and dealing.
      out: where to write. quick: eight replicas with two prompts.
    """

    replicas: tuple[int, ...] = (8, 64, 512)
    traces: tuple[str, ...] = ("tail", "capped")
    prompts: int = 16
    cap: int = 8192
    keep: float = 0.95
    error: float = 0.2
    sum_s: float = 10e-6
    link_bytes_per_s: float = 300e9
    together: tuple[int, ...] = (4, 8)
    seed: int = 0
    out: Path | None = None
    quick: bool = False


def part_of_one(size: int) -> Roofline:
    """Return the costs of one of `size` GPUs that share the model."""
    alone, config = h100_roofline(), presets.PRESETS[MODEL]
    heads = 1 if config.num_heads % size else size
    kv_heads = 1 if config.num_kv_heads % size else size
    kv_dim = config.num_kv_heads * config.head_size
    kv_bytes = 2 * 2 * config.num_layers * config.dim * kv_dim
    kv_s = kv_bytes / presets.CHIPS[CHIP].bytes_per_s
    return dataclasses.replace(
        alone,
        target_weights_s=(alone.target_weights_s - kv_s) / size + kv_s / kv_heads,
        draft_weights_s=(alone.draft_weights_s - kv_s / 2) / size + kv_s / 2 / kv_heads,
        cache_s=alone.cache_s / kv_heads,
        dense_s=alone.dense_s / size,
        attention_s=alone.attention_s / heads,
    )


@dataclasses.dataclass(frozen=True)
class Shared:
    """Costs of rounds on several GPUs that share the model.

    size: how many. each: costs of the part of one.
    """

    size: int
    each: Roofline
    args: Args

    def round_seconds(self, program: Program) -> float:
        """Return the seconds of one GPU's part and of the sums over all."""
        rows, _, gamma = program[:3]
        config = presets.PRESETS[MODEL]
        sums = (2 * config.num_layers + 1) * (gamma + 1)
        # A round sums each of its positions once: gamma drafted, gamma + 1 verified.
        positions = rows * (2 * gamma + 1)
        sent = 2 * (self.size - 1) / self.size * config.dim * 4 * positions
        sent *= 2 * config.num_layers + 1
        link_s = sent / self.args.link_bytes_per_s
        return self.each.round_seconds(program) + sums * self.args.sum_s + link_s

    def begin_seconds(self, rows: Trace) -> float:
        """Return the seconds until these rows can be shared.

        Every GPU copies its part of the weights and the draft, and the caches move.
        """
        chip = presets.CHIPS[CHIP]
        weights_s = self.each.target_weights_s + self.each.draft_weights_s
        # Every GPU gets its part of all entries.
        entries = float(rows.prompt_lengths.sum()) * self.each.cache_s
        cache_s = entries * chip.bytes_per_s / self.args.link_bytes_per_s
        return 2 * weights_s + cache_s


def part(trace: Trace, which: Sequence[int]) -> Trace:
    """Return some completions of a trace."""
    index = np.asarray(which, int)
    return Trace(trace.prompt_lengths[index], trace.lengths[index])


def run(
    trace: Trace, costs: Any, args: Args, seed: int, until_s: float = math.inf
) -> replay.Outcome:
    """Replay one batch with the oracle, which knows everything but the luck."""
    decider = replay.Oracle(costs, GAMMAS, args.keep)
    luck = KeptDrafts(trace, args.keep, seed)
    return replay.replay(trace, costs, decider, luck, until_s=until_s)


def shared_seconds(
    traces: Sequence[Trace], alone: Sequence[float], args: Args, seeds: Sequence[int]
) -> float:
    """Return the seconds of GPUs that share their last rows from the best moment on.

    Args:
      traces: of each GPU. alone: its seconds without sharing. seeds: of its luck.
    """
    costs, size = h100_roofline(), len(traces)
    shared = Shared(size, part_of_one(size), args)
    found = [max(alone)]
    for moment in MOMENTS:
        until_s = moment * max(alone)
        stopped = [
            run(trace, costs, args, seed, until_s)
            for trace, seed in zip(traces, seeds, strict=True)
        ]
        left = [
            Trace((t.prompt_lengths + o.done)[is_left], (t.lengths - o.done)[is_left])
            for t, o in zip(traces, stopped, strict=True)
            if (is_left := o.done < t.lengths).any()
        ]
        if not left:
            continue
        rest = Trace(
            np.concatenate([t.prompt_lengths for t in left]),
            np.concatenate([t.lengths for t in left]),
        )
        begun_s = max(o.seconds for o in stopped) + shared.begin_seconds(rest)
        found.append(begun_s + run(rest, shared, args, seeds[0]).seconds)
    return min(found)


def point_of(kind: str, num_replicas: int, args: Args, bar: Any) -> dict[str, Any]:
    """Replay one number of replicas with every dealing and every sharing."""
    num_prompts = num_replicas * args.prompts
    trace = TRACES[kind](num_prompts * GROUP, cap=args.cap, seed=args.seed)
    groups = np.arange(len(trace.lengths)).reshape(num_prompts, GROUP)
    random = np.random.default_rng(args.seed + 1)
    known = trace.lengths[groups].mean(axis=1)
    known = known * np.exp(args.error * random.standard_normal(num_prompts))
    dealings = {
        "in order": np.arange(num_prompts).reshape(num_replicas, -1).tolist(),
        "longest first": deal(known.tolist(), num_replicas),
    }
    costs, ways = h100_roofline(), []
    for dealing, dealt in dealings.items():
        traces = [
            part(trace, groups[prompts].reshape(-1).tolist()) for prompts in dealt
        ]
        alone = []
        for seed, one in enumerate(traces):
            alone.append(run(one, costs, args, seed).seconds)
            bar.update()
        found = {"alone": alone}
        for size in args.together:
            name = f"shared by {size}"
            found[name] = []
            for first in range(0, num_replicas, size):
                which = slice(first, first + size)
                seeds = range(first, first + size)
                found[name].append(
                    shared_seconds(traces[which], alone[which], args, seeds)
                )
                bar.update(size)
        for way, seconds in found.items():
            ways.append(
                {
                    "dealing": dealing,
                    "last_rows": way,
                    "seconds": max(seconds),
                    "mean_seconds": float(np.mean(seconds)),
                    "idle_share": 1 - float(np.mean(seconds)) / max(seconds),
                }
            )
    return {
        "preset": MODEL,
        "dtype": presets.PRESETS[MODEL].dtype,
        "rows": args.prompts * GROUP,
        "trace": kind,
        "replicas": num_replicas,
        "completions": len(trace.lengths),
        "mean_length": float(trace.lengths.mean()),
        "longest": int(trace.lengths.max()),
        "ways": ways,
    }


def rows_of(
    points: Sequence[Any],
) -> tables.Table:
    """Return header and rows of the table."""
    header = (
        "trace", "replicas", "completions", "mean / longest tokens", "dealt",
        "last rows", "s", "idle %", "speed / in order, alone",
    )  # fmt: skip
    rows = [
        (
            p["trace"],
            p["replicas"],
            p["completions"],
            f"{p['mean_length']:.0f} / {p['longest']}",
            way["dealing"],
            way["last_rows"],
            round(way["seconds"], 2),
            round(100 * way["idle_share"], 1),
            round(p["ways"][0]["seconds"] / way["seconds"], 2),
        )
        for p in points
        for way in p["ways"]
    ]
    return header, rows


def main(args: Args) -> dict[str, Any]:
    """Replay, print a table, write and return the record."""
    if args.quick:
        args = dataclasses.replace(args, replicas=(8,), prompts=2)
    jax.config.update("jax_platforms", "cpu")
    record = records.new_record("scaling", records.settings_of(args))
    total = 2 * (1 + len(args.together)) * sum(args.replicas) * len(args.traces)
    with tqdm(total=total, unit="replica") as bar:
        for kind in args.traces:
            for num_replicas in args.replicas:
                record["points"].append(point_of(kind, num_replicas, args, bar))
    print(tables.text(rows_of(record["points"])))
    out = records.results_dir(args.out, quick=args.quick)
    records.save(out / "scaling.json", record)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.scaling"))
