"""Seconds of one pass: autoregressive, draft, verification, round, by rows and length.

    python -m benchmarks.steps            # everything that is quoted
    python -m benchmarks.steps --quick    # a minute, to see that it runs

Writes `steps.json` and `steps.png`. What a pass is, and which bytes it must read, is in
`passes`. The speed-up of a round is its tokens, with the acceptance measured in the
very same rounds, over its cost in autoregressive passes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks import measure, passes, presets
from benchmarks.passes import Pass
from er_jax.figures import text_table


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure.

    Args:
      presets: decoders, by their names in benchmarks/presets.py.
      rows: batch sizes.
      cache_lengths: positions of the cache; attention reads all of them.
      gammas: drafts of a round; verification has one position more.
      draft: kind of draft: int8, int4, int4g128 or int4g32.
      dtype: of weights, activations and cache: float32 or bfloat16.
      repeats: interleaved readings of each pass.
      reading_s: seconds that one reading is made to last.
      workers: programs compiled at the same time.
      out: directory of the results; default benchmarks/results, or runs/benchmarks
        for a quick run.
      quick: a small decoder and few shapes, to see that it runs.
    """

    presets: tuple[str, ...] = ("3M", "90M")
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    cache_lengths: tuple[int, ...] = (256, 1024)
    gammas: tuple[int, ...] = (2, 4, 8)
    draft: str = "int8"
    dtype: str = "float32"
    repeats: int = 7
    reading_s: float = 0.1
    workers: int = 2
    out: Path | None = None
    quick: bool = False

    def shortened(self) -> Args:
        """Return the same with the sizes of a quick run."""
        return dataclasses.replace(
            self,
            presets=("3M",),
            rows=(1, 8),
            cache_lengths=(256,),
            gammas=(4,),
            repeats=5,
            reading_s=0.03,
        )


def point(
    bench: passes.Bench,
    readings: Mapping[str, Sequence[float]],
    timed: Sequence[Pass],
) -> dict[str, Any]:
    """Return what was measured at one batch shape, ready for the record.

    Args:
      bench: what ran. readings: label -> seconds per pass. timed: the passes.
    """
    target = passes.weight_bytes(bench.params)
    cache = passes.cache_bytes(bench.policy, bench.rows, bench.cache_length)
    ar = readings[Pass("ar").label]
    found = []
    for pass_ in timed:
        draft = passes.weight_bytes(bench.draft(pass_)) if pass_.draft else 0
        must_read = passes.pass_bytes(pass_, target, draft, cache)
        seconds = measure.spread(readings[pass_.label])
        entry: dict[str, Any] = {
            "kind": pass_.kind,
            "gamma": pass_.gamma,
            "draft": pass_.draft,
            "seconds": seconds,
            "compile_s": bench.compile_s[pass_],
            "bytes": must_read,
            "bytes_per_s": must_read / seconds["median"],
            "cost_ratio": measure.paired_ratio(readings[pass_.label], ar),
        }
        if pass_.kind == "round":
            tokens = bench.tokens_per_round(pass_)
            entry["tokens_per_round"] = tokens
            entry["keep_rate"] = bench.keep_rate(pass_)
            entry["tokens_per_s"] = bench.rows * tokens / seconds["median"]
            entry["speedup"] = tokens / entry["cost_ratio"]["median"]
        elif pass_.kind == "ar":
            entry["tokens_per_s"] = bench.rows / seconds["median"]
        found.append(entry)
    return {
        "rows": bench.rows,
        "cache_length": bench.cache_length,
        "target_bytes": target,
        "cache_bytes": cache,
        "passes": found,
    }


def measure_points(args: Args) -> Iterator[dict[str, Any]]:
    """Measure every shape of every preset, smallest first."""
    for name in args.presets:
        policy = presets.decoder(name, dtype=args.dtype)
        params = presets.random_params(policy)
        drafts = presets.drafts(params, (args.draft,))
        timed = passes.passes_of(args.gammas, (args.draft,))
        for cache_length in args.cache_lengths:
            for rows in args.rows:
                bench = passes.Bench(policy, params, drafts, rows, cache_length)
                bench.compile(timed, workers=args.workers)
                bench.warm_up(timed, args.reading_s)
                readings = measure.interleave(
                    bench.readers(timed),
                    args.repeats,
                    desc=f"{name}, {rows} rows, length {cache_length}",
                )
                yield {
                    "preset": name,
                    "num_params": presets.num_params(params),
                    "dtype": args.dtype,
                    **point(bench, readings, timed),
                }
        jax.clear_caches()


def lines(points: Sequence[Mapping[str, Any]]) -> str:
    """Return the points as text."""
    rows = [
        (
            f"{p['preset']} {p['rows']}x{p['cache_length']}",
            " ".join(str(x) for x in (e["kind"], e["gamma"] or "", e["draft"]) if x),
            1e3 * e["seconds"]["median"],
            100 * (e["seconds"]["q3"] - e["seconds"]["q1"]) / e["seconds"]["median"],
            e["cost_ratio"]["median"],
            e["bytes"] / 1e6,
            e["bytes_per_s"] / 1e9,
            e.get("keep_rate", ""),
            e.get("speedup", ""),
        )
        for p in points
        for e in p["passes"]
    ]
    header = ("shape", "pass", "ms", "IQR %", "/AR", "MB", "GB/s", "kept", "speed-up")
    return text_table(rows, header)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw cost ratios, speed-ups and achieved bandwidth over rows, and save it."""
    points = record["points"]
    names = list(dict.fromkeys(p["preset"] for p in points))
    lengths = sorted({p["cache_length"] for p in points})
    picture, axes = measure.figure(3, len(names))
    for line, name in zip(axes, names, strict=True):
        for length, style in zip(lengths, ("-", "--", ":", "-."), strict=False):
            chosen = [
                p for p in points if p["preset"] == name and p["cache_length"] == length
            ]
            rows = [p["rows"] for p in chosen]
            for index, entry in enumerate(chosen[0]["passes"] if chosen else ()):
                kind, gamma = entry["kind"], entry["gamma"]
                color = f"C{index}"
                label = f"{kind} {gamma or ''}, length {length}"
                found = [p["passes"][index] for p in chosen]
                if kind in ("draft", "verify"):
                    ratio = [e["cost_ratio"]["median"] for e in found]
                    line[0].plot(rows, ratio, style, color=color, label=label)
                if kind == "round":
                    gain = [e["speedup"] for e in found]
                    line[1].plot(rows, gain, style, color=color, label=label)
                if kind in ("ar", "draft"):
                    rate = [e["bytes_per_s"] / 1e9 for e in found]
                    line[2].plot(rows, rate, style, color=color, label=label)
        titles = ("pass / AR pass", "round: speed-up over AR", "GB/s that must be read")
        for ax, title in zip(line, titles, strict=True):
            ax.set_xscale("log", base=2)
            ax.set(title=f"{name}: {title}", xlabel="rows", ylim=(0, None))
            ax.legend(fontsize="x-small")
        for ax in line[:2]:
            ax.axhline(1, color="0.6", linewidth=0.8)
    picture.suptitle(measure.conditions(record), fontsize="small")
    picture.savefig(path, dpi=110)


def main(args: Args) -> dict[str, Any]:
    """Measure, print, and write the record after every shape; return it."""
    if args.quick:
        args = args.shortened()
    out = measure.results_dir(args.out, args.quick)
    settings = dataclasses.asdict(args)
    del settings["out"]
    record = measure.new_record("steps", settings)
    for found in measure_points(args):
        record["points"].append(found)
        measure.save(out / "steps.json", record)
        print(lines([found]), flush=True)
    plot(record, out / "steps.png")
    print(f"written: steps.json and steps.png in {out.name}", file=sys.stderr)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.steps"))
