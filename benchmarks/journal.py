"""What the journal of a rollout costs.

    python -m benchmarks.journal
    python -m benchmarks.journal --quick

A rollout without a journal and one with it are timed in turn, on a device elsewhere,
which is imitated (`lib.elsewhere`), so that the host's work is seen apart. Rows that
run are noted every `every` seconds; the library's default is every five. The journal
begins anew every time, on the disk of the folder for temporary files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.lib import elsewhere, measure, records, tables, workloads
from benchmarks.lib.runners import Runner
from benchmarks.lib.tasks import planned_task
from er_jax import journal

DEFAULT_S = journal.EVERY_S


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure.

    Args:
      every: seconds between two notes of the rows that run, in turn.
      round_s: seconds of a round of the device.
      count: completions. slots: rows decoded at once. length: of the longest, tokens.
      repeats: of every case, interleaved.
      out: where to write. quick: a few tokens, to see that it runs.
    """

    every: tuple[float, ...] = (DEFAULT_S, 0.25)
    round_s: float = 0.01
    count: int = 256
    slots: int = 64
    length: int = 1024
    repeats: int = 7
    out: Path | None = None
    quick: bool = False


@contextlib.contextmanager
def noting_every(seconds: float) -> Iterator[None]:
    """Let journals note the rows that run so often."""
    before, journal.EVERY_S = journal.EVERY_S, seconds
    try:
        yield
    finally:
        journal.EVERY_S = before


def timed(runner: Runner, every: float | None, folder: Path) -> dict[str, float]:
    """Return seconds and processor seconds of a rollout, and bytes of its journal.

    Args:
      every: seconds between two notes; None keeps no journal.
    """
    path = folder / "journal"
    path.unlink(missing_ok=True)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    if every is None:
        out = runner.sample()
    else:
        with noting_every(every):
            out = runner.sample(journal=path)
    seconds = time.perf_counter() - start_s
    cpu_s = time.process_time() - start_cpu_s
    runner.outs.append(out)
    size = path.stat().st_size if every is not None else 0
    return {"seconds": seconds, "cpu_s": cpu_s, "bytes": size}


def points(args: Args) -> Iterator[dict[str, Any]]:
    """Yield a point for each pause between notes."""
    lengths = workloads.tail_lengths(args.count, args.length).tolist()
    task = planned_task("tiny", lengths, slots=args.slots, max_new_tokens=args.length)
    runner = Runner(task, "ar", gammas=())
    with (
        elsewhere.rounds_of(args.round_s),
        tempfile.TemporaryDirectory() as name,
    ):
        folder = Path(name)
        runner.warm_up()
        timed(runner, DEFAULT_S, folder)  # Compiles the digest of the parameters.
        runner.outs.clear()
        other: dict[float | None, list[dict[str, float]]] = {}

        def case(every: float | None) -> float:
            found = timed(runner, every, folder)
            other.setdefault(every, []).append(found)
            return found["seconds"]

        kinds: tuple[float | None, ...] = (None, *args.every)
        cases = {str(every): lambda every=every: case(every) for every in kinds}
        found = measure.interleave(cases, args.repeats, desc="journal")
        first = runner.outs[0].completion_ids
        for every in args.every:
            plain, noted = other[None], other[every]
            yield {
                "preset": "tiny",
                "rows": args.slots,
                "dtype": task.dtype,
                "num_completions": args.count,
                "num_tokens": int(runner.outs[0].lengths.sum()),
                "every_s": every,
                "alone_s": measure.spread(found["None"]),
                "over_alone": measure.paired_ratio(found[str(every)], found["None"]),
                "more_cpu_s": measure.spread(
                    b["cpu_s"] - a["cpu_s"] for a, b in zip(plain, noted, strict=True)
                ),
                "bytes": noted[-1]["bytes"],
                "same_tokens": all(
                    np.array_equal(first, out.completion_ids) for out in runner.outs
                ),
            }


def rows_of(found: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows, one per point."""
    header = (
        "completions", "tokens", "slots", "noted every, s", "without, s",
        "more with it, %", "more processor time, ms", "bytes a token", "same tokens",
    )  # fmt: skip
    rows = []
    for p in found:
        low, middle, high = (100 * (p["over_alone"][q] - 1) for q in QUARTILES)
        rows.append(
            (
                p["num_completions"],
                p["num_tokens"],
                p["rows"],
                p["every_s"],
                f"{p['alone_s']['median']:.3g}",
                f"{middle:+.2f} ({low:+.2f} to {high:+.2f})",
                f"{1e3 * p['more_cpu_s']['median']:.0f}",
                f"{p['bytes'] / p['num_tokens']:.1f}",
                "yes" if p["same_tokens"] else "NO",
            )
        )
    return header, rows


QUARTILES = ("q1", "median", "q3")


def main(args: Args) -> dict[str, Any]:
    """Measure, print a table, write and return the record."""
    if args.quick:
        args = dataclasses.replace(
            args, every=(DEFAULT_S, 0.0), round_s=1e-3, count=12, slots=4, length=32,
            repeats=1,
        )  # fmt: skip
    out = records.results_dir(args.out, args.quick)
    record = records.new_record("journal", records.settings_of(args))
    for point in points(args):
        record["points"].append(point)
        records.save(out / "journal.json", record)
    print(tables.text(rows_of(record["points"])))
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.journal"))
