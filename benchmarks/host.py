"""What a completion costs on the host: planning, booking, laying out. No device.

    python -m benchmarks.host

The scheduler runs whole rollouts on a simulated engine. What is counted is the time
that its thread computes, less the engine's: other work on the machine adds nothing.
Long-tailed completions, at several numbers of slots, of one prompt (pass@k,
evaluation), of groups of 16 as in training, and of distinct prompts. What a completion
costs must not grow with the slots.
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

from benchmarks import measure, workloads
from benchmarks.predicted import SimulatedEngine
from er_jax import Controller, PolicyParams, RolloutConfig
from er_jax.costs.table import LatencyTable
from er_jax.costs.timing import neutral_sampling
from er_jax.figures import text_table
from er_jax.request import request_of
from er_jax.result import assemble
from er_jax.scheduler.loop import run
from er_jax.stats import RolloutStats
from er_jax.types import Program

LIMIT_MS = 0.05
"""What a completion may cost, in milliseconds."""

# What is known of the simulated engine: seconds of a round.
KNOWN_S = {Program(1, 256, gamma): 0.01 for gamma in (0, 4)}

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


class ApartEngine(SimulatedEngine):
    """A simulated engine that counts the seconds spent in it, as `busy_s`."""

    busy_s = 0.0

    def gather(self, own: np.ndarray) -> np.ndarray:
        """Return what there is in the only process."""
        return own

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("allocate", "admit", "take", "start_window"):
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            out = found(*args, **kwargs)
            self.busy_s += time.thread_time() - start
            return out

        return timed


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
    engine: Any = ApartEngine(
        LatencyTable(dict(KNOWN_S)),
        lambda chunks: 0.0,
        dict(enumerate(lengths.tolist())),
        np.full(8, 0.9),
        rounds_per_test=4,
    )
    params, stats = PolicyParams(policy=None, draft=None), RolloutStats()
    start = time.thread_time()
    ids = np.arange(count)
    request = request_of(prompts, ids, config)
    done = run(engine, params, request, neutral_sampling(), controller, stats)
    out = assemble(prompts, done, ids, config, stats, engine)
    seconds = time.thread_time() - start - engine.busy_s
    assert out.lengths.tolist() == lengths.tolist()
    return 1e3 * seconds / count


def points(args: Args) -> list[dict[str, Any]]:
    """Measure all cases in turn."""
    cases = [(slots, kind) for slots in args.slots for kind in KINDS]
    # Kept across rollouts, as a training loop does; the first one is not counted.
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


def rows_of(found: Sequence[Any]) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
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
    settings = dataclasses.asdict(args) | {"limit_ms": LIMIT_MS}
    del settings["out"]
    record = measure.new_record("host", settings)
    record["points"] = points(args)
    measure.save(measure.results_dir(args.out, args.quick) / "host.json", record)
    header, rows = rows_of(record["points"])
    print(text_table(rows, header))
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.host"))
