"""Seconds of one pass: autoregressive, draft, verification, round, by rows and length.

    python -m benchmarks.steps            # everything that is quoted
    python -m benchmarks.steps --quick    # a minute, to see that it runs

Writes `steps.json` and `steps.png`. `lib/passes.py` says what a pass is,
`lib/pass_bytes.py` which bytes it must read, and `lib/pass_points.py` what is recorded.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.lib import measure, pass_points, passes, presets, records


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure.

    Args:
      presets: decoders, by their names in benchmarks/lib/presets.py.
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
                    **pass_points.point(bench, readings, timed),
                }
        jax.clear_caches()


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw cost ratios, speed-ups and achieved bandwidth over rows, and save it."""
    points = record["points"]
    names = list(dict.fromkeys(p["preset"] for p in points))
    lengths = sorted({p["cache_length"] for p in points})
    picture, axes = records.figure(3, len(names))
    for line, name in zip(axes, names, strict=True):
        for length, style in zip(lengths, ("-", "--", ":", "-."), strict=False):
            chosen = [
                p for p in points if p["preset"] == name and p["cache_length"] == length
            ]
            draw = functools.partial(
                pass_points.draw, points=chosen, about=f"length {length}", ls=style
            )
            draw(line[0], kinds=("draft", "verify"), value=pass_points.cost_ratio)
            draw(line[1], kinds=("round",), value=lambda e: e["speedup"])
            draw(line[2], kinds=("ar", "draft"), value=lambda e: e["bytes_per_s"] / 1e9)
        titles = ("pass / AR pass", "round: speed-up over AR", "GB/s that must be read")
        for ax, title in zip(line, titles, strict=True):
            ax.set_xscale("log", base=2)
            ax.set(title=f"{name}: {title}", xlabel="rows", ylim=(0, None))
            ax.legend(fontsize="x-small")
        for ax in line[:2]:
            ax.axhline(1, color="0.6", linewidth=0.8)
    records.save_figure(picture, record, path)


def main(args: Args) -> dict[str, Any]:
    """Measure, print, and write the record after every shape; return it."""
    if args.quick:
        args = args.shortened()
    out = records.results_dir(args.out, args.quick)
    record = records.new_record("steps", records.settings_of(args))
    for found in measure_points(args):
        record["points"].append(found)
        records.save(out / "steps.json", record)
        print(pass_points.lines([found]), flush=True)
    plot(record, out / "steps.png")
    print(f"written: steps.json and steps.png in {out.name}", file=sys.stderr)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.steps"))
