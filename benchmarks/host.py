"""Milliseconds of the host for each completion: planning, booking, laying out.

    python -m benchmarks.host

No device is needed: the scheduler runs whole rollouts on a simulated engine. What
counts is the time that its thread computes, without the engine's part; other work on
the machine adds nothing. Completions are long-tailed and are sampled at several numbers
of slots: of one prompt (pass@k, evaluation), of groups of 16 as in training, and of
distinct prompts. The cost of a completion must not grow with the slots.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.lib import measure, records, tables, workloads
from benchmarks.lib.simulated import SimulatedEngine, simulate
from er_jax import Controller, RolloutConfig
from er_jax.costs.table import LatencyTable
from er_jax.request import request_of
from er_jax.result import assemble
from er_jax.types import Program

LIMIT_MS = 0.05
"""What a completion may cost, in milliseconds."""

# Seconds of a round of the simulated engine; the controller knows them.
KNOWN_S = {Program(1, 256, gamma): 0.01 for gamma in (0, 4)}

# Completions of each prompt; None for all.
KINDS = {"one prompt": None, "groups of 16": 16, "distinct prompts": 1}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure.

    Args:
      slots: rows decoded at once, in turn. count: completions; four for each slot, if
        that is more.
      length: tokens of the longest completion. prompt: tokens of every prompt.
      repeats: of every case, interleaved.
      out: where to write. quick: few slots, few repeats.
    """

    slots: tuple[int, ...] = (64, 256, 1024, 4096)
    count: int = 4096
    length: int = 256
    prompt: int = 32
    repeats: int = 5
    out: Path | None = None
    quick: bool = False


def num_completions(slots: int, args: Args) -> int:
    """Return how many completions are sampled in so many slots."""
    return max(4 * slots, args.count)


def host_ms(slots: int, kind: str, controller: Controller, args: Args) -> float:
    """Run a rollout and return the host's milliseconds for each completion."""
    count = num_completions(slots, args)
    n = KINDS[kind] or count
    rng = np.random.default_rng(0)
    prompts = [
        row.astype(np.int32) for row in rng.integers(0, 1000, (count // n, args.prompt))
    ]
    lengths = workloads.tail_lengths(count, args.length)
    config = RolloutConfig(max_new_tokens=args.length, n=n, max_slots=slots)
    engine = SimulatedEngine(
        LatencyTable(dict(KNOWN_S)),
        lambda chunks: 0.0,
        dict(enumerate(lengths.tolist())),
        np.full(8, 0.9),
        rounds_per_test=4,
    )
    start = time.thread_time()
    ids = np.arange(count)
    request = request_of(prompts, ids, config)
    done, stats = simulate(engine, request, controller)
    out = assemble(prompts, done, ids, config, stats, engine.agreement)
    seconds = time.thread_time() - start - engine.busy_s
    assert out.lengths.tolist() == lengths.tolist()
    return 1e3 * seconds / count


def points(args: Args) -> list[dict[str, Any]]:
    """Measure all cases in turn."""
    cases = [(slots, kind) for slots in args.slots for kind in KINDS]
    # A training loop keeps its controller across rollouts. The first is not counted.
    controllers = {case: Controller(patience=0) for case in cases}
    for controller in controllers.values():
        controller.table.seconds |= KNOWN_S
    found: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    with tqdm(total=(args.repeats + 1) * len(cases), unit="rollout") as bar:
        for _ in range(args.repeats + 1):
            for case in cases:
                found[case].append(host_ms(*case, controllers[case], args))
                bar.update()
    return [
        {
            "preset": "simulated",
            "dtype": "none",
            "rows": slots,
            "prompts": kind,
            "completions": num_completions(slots, args),
            "host_ms": measure.spread(readings[1:]),
        }
        for (slots, kind), readings in found.items()
    ]


def rows_of(found: Sequence[Any]) -> tables.Table:
    """Return header and rows, one per point."""
    rows = [
        (
            p["prompts"],
            p["rows"],
            p["completions"],
            f"{p['host_ms']['median']:.4f}",
            f"{p['host_ms']['min']:.4f} to {p['host_ms']['max']:.4f}",
        )
        for p in sorted(found, key=lambda p: list(KINDS).index(p["prompts"]))
    ]
    return ("completions of", "slots", "number", "ms each", "extremes"), rows


def main(args: Args) -> dict[str, Any]:
    """Measure, print a table, write and return the record."""
    if args.quick:
        args = dataclasses.replace(args, slots=(16, 64), count=128, repeats=1)
    settings = records.settings_of(args) | {"limit_ms": LIMIT_MS}
    record = records.new_record("host", settings)
    record["points"] = points(args)
    records.save(records.results_dir(args.out, args.quick) / "host.json", record)
    print(tables.text(rows_of(record["points"])))
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.host"))
