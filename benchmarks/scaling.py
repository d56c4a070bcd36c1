"""What many replicas lose to the last one, on paper.

    python -m benchmarks.scaling

Replicas sample apart, each on one GPU; their rollouts are replayed (`er_jax.replay`),
no device needed. Prompts are dealt in order or the longest first; the last rows are
left where they are, or shared by four or eight GPUs, each of which then reads a part of
the weights.

*Costs* are the roofline of Qwen2.5-7B in bfloat16 with an int8 draft on the data sheet
of an H100, without overheads. GPUs that share read an equal part of the weights each,
and there are two sums over all of them a layer: a fixed time each, and their bytes.
Where their number does not divide the heads, as eight does not here, every GPU has all
of the cache and of the weights of keys and values (`er_jax.sharding` lays them out so).
Sharing begins with a copy of every device's part of the weights, and the live rows'
caches are moved.

*Dealing* knows the mean length of each prompt's completions up to a factor (an earlier
step showed it, of a policy that has moved since). Sharing begins at the best of a few
moments.
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

import er_jax
from benchmarks import measure
from er_jax.costs.roofline import Roofline
from er_jax.figures import text_table
from er_jax.mesh.replicas import deal
from er_jax.tools import presets, replay, traces
from er_jax.tools.traces import Trace
from er_jax.types import Program

MODEL, CHIP = "qwen2.5-7b", "h100"
GAMMAS = (0, 2, 4, 6, 8)
GROUP = 8

# When to share, as a part of the time that the last of these replicas takes alone.
MOMENTS = (0.2, 0.4, 0.6, 0.8, 0.9)


@dataclasses.dataclass(frozen=True)
class Args:
    """What to replay.

    Args:
      replicas: numbers of them. traces: of `er_jax.replay`. prompts: of each replica,
        with eight completions each. cap: the longest completion, tokens.
      keep: chance of a draft. error: standard deviation of the logarithm of expected
        lengths, for dealing. sum_s: seconds of one sum over the GPUs of a host, beside
        its bytes. link_bytes_per_s: of one GPU, to the others. together: how many
        GPUs share, in turn; each divides `replicas`. seed: of all of it.
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


def roofline() -> Roofline:
    """Return the model's costs on one GPU, from its data sheet."""
    chip, config = presets.CHIPS[CHIP], presets.PRESETS[MODEL]
    shapes = jax.eval_shape(er_jax.Decoder(config).init, jax.random.key(0))
    matrices = sum(x.size for x in jax.tree.leaves(shapes) if x.ndim > 1)
    matrices -= config.vocab_size * config.dim  # a table that is only looked up
    entry = 2 * config.num_layers * config.num_kv_heads * config.head_size * 2
    attention = 4 * config.num_layers * config.num_heads * config.head_size
    return Roofline(
        target_weights_s=2 * matrices / chip.bytes_per_s,
        draft_weights_s=matrices / chip.bytes_per_s,
        cache_s=entry / chip.bytes_per_s,
        dense_s=2 * matrices / chip.ops_per_s,
        attention_s=attention / chip.ops_per_s,
        target_overhead_s=0.0,
        draft_overhead_s=0.0,
        verify_overhead_s=0.0,
    )


def part_of_one(size: int) -> Roofline:
    """Return what each of some GPUs has to do of the model's costs."""
    alone, config = roofline(), presets.PRESETS[MODEL]
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
    """Costs of the same rounds on several GPUs. each: those of one's part."""

    size: int
    each: Roofline
    args: Args

    def round_seconds(self, program: Program) -> float:
        """The part of one GPU, and the sums of its passes."""
        rows, _, gamma, _ = program
        config = presets.PRESETS[MODEL]
        sums = (2 * config.num_layers + 1) * (gamma + 1)
        # All positions of a round are summed once: gamma drafted, gamma + 1 verified.
        positions = rows * (2 * gamma + 1)
        sent = 2 * (self.size - 1) / self.size * config.dim * 4 * positions
        sent *= 2 * config.num_layers + 1
        link_s = sent / self.args.link_bytes_per_s
        return self.each.round_seconds(program) + sums * self.args.sum_s + link_s

    def begin_seconds(self, rows: Trace) -> float:
        """Copy a part of the weights and the draft; move the live rows' caches."""
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
    """Replay one batch with the choice that knows everything but the luck."""
    decider = replay.Oracle(costs, GAMMAS, args.keep)
    luck = traces.KeptDrafts(trace, args.keep, seed)
    return replay.replay(trace, costs, decider, luck, until_s=until_s)


def shared_seconds(
    traces: Sequence[Trace], alone: Sequence[float], args: Args, seeds: Sequence[int]
) -> float:
    """Return the seconds of GPUs that share their last rows, from the best moment."""
    costs, size = roofline(), len(traces)
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
    """Replay one number of replicas in all ways."""
    num_prompts = num_replicas * args.prompts
    trace = traces.TRACES[kind](num_prompts * GROUP, cap=args.cap, seed=args.seed)
    groups = np.arange(len(trace.lengths)).reshape(num_prompts, GROUP)
    random = np.random.default_rng(args.seed + 1)
    known = trace.lengths[groups].mean(axis=1)
    known = known * np.exp(args.error * random.standard_normal(num_prompts))
    dealings = {
        "in order": np.arange(num_prompts).reshape(num_replicas, -1).tolist(),
        "longest first": deal(known.tolist(), num_replicas),
    }
    costs, ways = roofline(), []
    for dealing, dealt in dealings.items():
        halves = [
            part(trace, groups[prompts].reshape(-1).tolist()) for prompts in dealt
        ]
        alone = []
        for seed, one in enumerate(halves):
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
                    shared_seconds(halves[which], alone[which], args, seeds)
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
) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
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
    settings = dataclasses.asdict(args)
    del settings["out"]
    record = measure.new_record("scaling", settings)
    total = 2 * (1 + len(args.together)) * sum(args.replicas) * len(args.traces)
    with tqdm(total=total, unit="replica") as bar:
        for kind in args.traces:
            for num_replicas in args.replicas:
                record["points"].append(point_of(kind, num_replicas, args, bar))
    header, rows = rows_of(record["points"])
    print(text_table(rows, header))
    out = measure.results_dir(args.out, quick=args.quick)
    measure.save(out / "scaling.json", record)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.scaling"))
