"""How much of the rewards' time a stream hides behind the decoding.

    python -m benchmarks.stream
    python -m benchmarks.stream --quick

Rewards of all completions together take a share of the seconds of a rollout. Three
things are timed in turn: a rollout alone; a rollout, then the rewards; a stream, with
the rewards in its loop. A reward waits, as for a judge elsewhere (it sleeps); or it
computes (pure Python, which holds the interpreter's lock); or the loop hands it to
another process, which computes it. The decoder runs on the cores that compute the
rewards, or on a device elsewhere, which is imitated (`lib.elsewhere`). All sample the
same tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import er_jax
from benchmarks.lib import elsewhere, measure, records, tables, workloads
from benchmarks.lib.runners import Runner
from benchmarks.lib.tasks import SIZES, Task, planned_task
from er_jax.engine.kept import forget_engines


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure.

    Args:
      presets: decoders that run on the cores, by their names in
        benchmarks/lib/presets.py.
      round_s: seconds of a round of the device elsewhere.
      share: of a rollout's seconds that all rewards take together.
      repeats: of every case, interleaved.
      out: where to write. quick: a tiny decoder, to see that it runs.
    """

    presets: tuple[str, ...] = ("90M",)
    round_s: float = 0.01
    share: float = 0.2
    repeats: int = 5
    out: Path | None = None
    quick: bool = False


def compute(seconds: float) -> None:
    """Run Python for so many seconds of this thread's processor time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(100))


REWARDS = ("waits", "computes", "computes in a process")

Reward = Callable[[], Future[None] | None]
"""Scores one completion, or has it scored."""


def reward_of(kind: str, seconds: float, pool: ProcessPoolExecutor) -> Reward:
    """Return a reward that takes so long; `pool` is the other process."""
    if kind == "computes in a process":
        return functools.partial(pool.submit, compute, seconds)
    return functools.partial({"waits": time.sleep, "computes": compute}[kind], seconds)


def timed(runner: Runner, way: str, reward: Reward) -> float:
    """Return the seconds until the last reward is there.

    Args:
      runner: of the rollouts. way: "alone", "after" or "stream".
      reward: of one completion.
    """
    task = runner.task
    start = time.perf_counter()
    scored = []
    if way == "stream":
        with er_jax.stream(
            task.policy, task.params, task.prompts, key=task.key, config=runner.config,
            controller=runner.controller,
        ) as items:  # fmt: skip
            scored = [reward() for _ in items]
        out = items.rollout
    else:
        out = runner.sample()
        if way == "after":
            scored = [reward() for _ in out.lengths]
    wait([each for each in scored if each is not None])
    seconds = time.perf_counter() - start
    runner.outs.append(out)
    return seconds


def points_of(
    task: Task, where: str, args: Args, pool: ProcessPoolExecutor
) -> Iterator[dict[str, Any]]:
    """Yield a point for each kind of reward."""
    num = len(task.prompts)
    # Plain decoding, whose seconds depend on no decision.
    runner = Runner(task, "ar", gammas=())
    runner.warm_up()
    alone = [timed(runner, "alone", lambda: None) for _ in range(3)]
    reward_s = args.share * float(np.median(alone)) / num
    cases = {"alone": functools.partial(timed, runner, "alone", lambda: None)}
    for kind in REWARDS:
        reward = reward_of(kind, reward_s, pool)
        for way in ("after", "stream"):
            cases[f"{kind}, {way}"] = functools.partial(timed, runner, way, reward)
    found = measure.interleave(cases, args.repeats, desc=f"{task.name}: stream")
    first = runner.outs[0].completion_ids
    for kind in REWARDS:
        after, stream = found[f"{kind}, after"], found[f"{kind}, stream"]
        yield {
            "preset": task.name.split(",")[0],
            "device": where,
            "workload": "tail",
            "rows": task.slots,
            "dtype": task.dtype,
            "num_completions": num,
            "reward": kind,
            "reward_s": reward_s,
            "alone_s": measure.spread(found["alone"]),
            "after_over_alone": measure.paired_ratio(after, found["alone"]),
            "stream_over_alone": measure.paired_ratio(stream, found["alone"]),
            "same_tokens": all(
                np.array_equal(first, out.completion_ids) for out in runner.outs
            ),
        }


def points(args: Args) -> Iterator[dict[str, Any]]:
    """Yield the points of the device elsewhere, then those of the cores."""
    count, slots, longest = (12, 4, 32) if args.quick else (128, 32, 512)
    # No fork: this process has threads.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(compute, 0.0).result()  # It has started.
        with elsewhere.rounds_of(args.round_s):
            lengths = workloads.tail_lengths(count, longest).tolist()
            task = planned_task("tiny", lengths, slots=slots, max_new_tokens=longest)
            yield from points_of(task, "elsewhere", args, pool)
        for preset in args.presets:
            forget_engines()
            size = SIZES[preset]
            lengths = workloads.tail_lengths(size.num, size.max_new_tokens).tolist()
            task = planned_task(
                preset, lengths, slots=size.slots, max_new_tokens=size.max_new_tokens
            )
            yield from points_of(task, "the same cores", args, pool)


def rows_of(found: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows, one per point."""

    def percent(ratio: Mapping[str, float]) -> str:
        low, middle, high = (100 * (ratio[q] - 1) for q in ("q1", "median", "q3"))
        return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"

    header = (
        "decoder", "device", "slots", "completions", "a reward", "ms each",
        "rollout alone, s", "then rewards, %", "stream, %", "same tokens",
    )  # fmt: skip
    rows = [
        (
            p["preset"],
            p["device"],
            p["rows"],
            p["num_completions"],
            p["reward"],
            f"{1e3 * p['reward_s']:.2f}",
            f"{p['alone_s']['median']:.3g}",
            percent(p["after_over_alone"]),
            percent(p["stream_over_alone"]),
            "yes" if p["same_tokens"] else "NO",
        )
        for p in found
    ]
    return header, rows


def main(args: Args) -> dict[str, Any]:
    """Measure, print a table, write and return the record."""
    if args.quick:
        args = dataclasses.replace(args, presets=("tiny",), round_s=1e-3, repeats=1)
    out = records.results_dir(args.out, args.quick)
    record = records.new_record("stream", records.settings_of(args))
    for point in points(args):
        record["points"].append(point)
        records.save(out / "stream.json", record)
    print(tables.text(rows_of(record["points"])))
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.stream"))
