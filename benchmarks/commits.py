"""This tree beside an earlier commit: rollouts of both, run in turn.

    python -m benchmarks.commits COMMIT

Each tree has a process of its own, which is warmed up, compilation apart, and then runs
one rollout whenever it is asked to. Both sample the same tokens, which is checked.
Lengths are those of a policy with random parameters and several stop tokens, so long
tails come out as they do in training.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import tyro

from benchmarks.lib import measure, presets, records, tables
from er_jax.costs.store import CACHE_VARIABLE

WORKER = Path(__file__).parent / "lib" / "worker.py"

# Decoder, rows at once, sequences, tokens at most, control.
WORKLOADS: dict[str, dict[str, Any]] = {
    "3M long tail, ar": dict(
        preset="3M", slots=32, num=128, max_new_tokens=256, control="ar"
    ),
    "3M long tail, drafts of 4": dict(
        preset="3M", slots=32, num=64, max_new_tokens=128, control="fixed:4"
    ),
    "90M long tail, best": dict(
        preset="90M", slots=16, num=24, max_new_tokens=64, control="best"
    ),
}
# Rollouts before the first reading: they compile, and choose programs.
WARM_UPS = 4

QUICK = {
    "tiny": dict(preset="tiny", slots=4, num=8, max_new_tokens=16, control="ar"),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to compare.

    Args:
      commit: the earlier tree.
      repeats: readings of each tree and workload, interleaved.
      quick: one tiny workload, to check the script.
      out: directory of the record; None is benchmarks/results.
    """

    commit: tyro.conf.Positional[str]
    repeats: int = 9
    quick: bool = False
    out: Path | None = None


def decoder_sizes(preset: str) -> dict[str, Any]:
    """Return what a preset says beside the defaults, which are each tree's own."""
    config = presets.PRESETS[preset]
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }


class Tree:
    """A tree's process.

    Args:
      path: of the tree. workloads: by name, all of which it warms up first.
    """

    def __init__(self, path: Path, workloads: dict[str, dict[str, Any]]) -> None:
        told = {
            name: {**sizes, "decoder": decoder_sizes(sizes["preset"])}
            for name, sizes in workloads.items()
        }
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(path), json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, CACHE_VARIABLE: ""},  # no costs of other runs
        )

    def run(self, workload: str) -> dict[str, Any]:
        """Return seconds and tokens of one rollout."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{workload}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a tree ended: {process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()  # Closes the pipes, too.


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Have a commit's files in a directory for the time of a block."""
    with tempfile.TemporaryDirectory() as directory:
        archive = subprocess.run(
            ["git", "archive", commit],
            cwd=records.ROOT,
            check=True,
            capture_output=True,
        )
        subprocess.run(["tar", "-x", "-C", directory], check=True, input=archive.stdout)
        yield Path(directory)


def points(args: Args) -> list[dict[str, Any]]:
    """Run both trees in turn, and return a point for each workload."""
    workloads = QUICK if args.quick else WORKLOADS
    found = []
    with ExitStack() as stack:
        before = stack.enter_context(checked_out(args.commit))
        trees = {}
        for side, path in (("before", before), ("now", records.ROOT)):
            trees[side] = Tree(path, workloads)
            stack.callback(trees[side].close)
        for name in workloads:
            found.append({"workload": name, **point_of(name, workloads, trees, args)})
    return found


def point_of(
    name: str, workloads: Mapping[str, Any], trees: Mapping[str, Tree], args: Args
) -> dict[str, Any]:
    """Time one workload with both trees."""
    outs: list[dict[str, Any]] = []

    def reading(side: str) -> float:
        outs.append(trees[side].run(name))
        return outs[-1]["seconds"]

    for side in trees:
        for _ in range(WARM_UPS):
            trees[side].run(name)
    cases = {side: functools.partial(reading, side) for side in trees}
    readings = measure.interleave(cases, args.repeats, desc=name)
    sizes = workloads[name]
    return {
        **sizes,
        "rows": sizes["slots"],
        "dtype": "float32",
        "tokens": outs[0]["tokens"],
        "before_s": measure.spread(readings["before"]),
        "now_s": measure.spread(readings["now"]),
        "ratio": measure.paired_ratio(readings["now"], readings["before"]),
        "same_tokens": len({out["digest"] for out in outs}) == 1,
    }


def rows_of(found: Sequence[Any]) -> tables.Table:
    """Return header and rows, one per point."""
    rows = [
        (
            p["workload"],
            p["rows"],
            p["tokens"],
            f"{p['before_s']['median']:.3f}",
            f"{p['now_s']['median']:.3f}",
            f"{p['ratio']['median']:.3f}",
            f"{p['ratio']['q1']:.3f} to {p['ratio']['q3']:.3f}",
            "yes" if p["same_tokens"] else "NO",
        )
        for p in found
    ]
    header = (
        *("workload", "slots", "tokens", "s before", "s now"),
        *("now / before", "quartiles", "same tokens"),
    )
    return header, rows


def main(args: Args) -> dict[str, Any]:
    """Compare, print a table, write and return the record."""
    if args.quick:
        args = dataclasses.replace(args, repeats=2)
    record = records.new_record("commits", records.settings_of(args))
    record["points"] = points(args)
    path = records.results_dir(args.out, args.quick) / "commits.json"
    records.save(path, record)
    print(tables.text(rows_of(record["points"])))
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.commits"))
