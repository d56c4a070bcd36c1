"""Whole rollouts: no speculation, each fixed draft length, and `best`.

    python -m benchmarks.rollout                  # everything that is quoted
    python -m benchmarks.rollout --quick          # a few minutes, to see that it runs
    python -m benchmarks.rollout --policy RUN     # a policy trained by train.grpo

There are three parts. *workloads*: the same prompts under every control and as static
batches, for flat, long-tailed and capped lengths (see `lib/workloads.py`). *rows*: as
many prompts as slots, 1 to 32. *cold*: the quick start of README.md in a fresh process.

All controls must sample the same tokens. A difference is accepted only where it begins
at a tie of the two best candidates; ties are counted. Writes `rollout.json`,
`rollout.png` and the timeline of `best` on the last long-tailed workload.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

import er_jax
from benchmarks.lib import (
    measure,
    pass_bytes,
    peers,
    presets,
    records,
    runners,
    tables,
    tasks,
    workloads,
)
from benchmarks.lib.runners import Runner, StaticRunner
from benchmarks.lib.tasks import Task
from er_jax.engine.kept import forget_engines

Part = Literal["workloads", "rows", "cold"]

PEER = "transformers"

FIGURE = records.ROOT / "docs" / "figures" / "rollout.png"

# Flat and capped completions are many times as long on average as those of a tail with
# the same limit. Their limit is this part of the preset's, so that all kinds take
# minutes.
LIMIT_SHARE = {"flat": 0.25, "tail": 1.0, "capped": 0.125}

# Tokens of each completion in the sweep over rows.
SWEEP_TOKENS = {"tiny": 8, "3M": 128, "90M": 48}

# Limit of a trained policy's completions.
TRAINED_LIMIT = 256


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure.

    Args:
      parts: any of workloads, rows, cold.
      presets: decoders, by their names in benchmarks/lib/presets.py.
      lengths: workloads: flat, tail, capped.
      rows: batch sizes of the sweep.
      gammas: draft lengths, each run as a fixed one; `best` chooses from them and 0.
      draft: kind of draft: int8, int4, int4g128 or int4g32.
      dtype: of weights, activations and cache: float32 or bfloat16.
      repeats: interleaved readings of each control, after the warm-up.
      patience: of the controllers: a better program is compiled when the time lost
        without it exceeds this many times its compilation. Below the library's default
        of 1, so that a short warm-up ends where a long training run would.
      policy: directory of a run of train.grpo, whose policy, prompts and lengths
        replace presets and planned lengths.
      readme: whose first Python block is the quick start.
      peer: sample with `transformers.generate` as well (needs torch).
      profile: directory for a trace of one more run of `best` on each workload.
      out: directory of the results; default benchmarks/results, or runs/benchmarks
        for a quick run.
      quick: one small workload and few row counts, to see that it runs.
    """

    parts: tuple[Part, ...] = ("workloads", "rows", "cold")
    presets: tuple[str, ...] = ("3M", "90M")
    lengths: tuple[str, ...] = ("flat", "tail", "capped")
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    gammas: tuple[int, ...] = (2, 4, 8)
    draft: str = "int8"
    dtype: str = "float32"
    repeats: int = 5
    patience: float = runners.PATIENCE
    policy: Path | None = None
    readme: Path = records.ROOT / "README.md"
    peer: bool = False
    profile: Path | None = None
    out: Path | None = None
    quick: bool = False

    def shortened(self) -> Args:
        """Return the same with the sizes of a quick run."""
        return dataclasses.replace(
            self,
            presets=("tiny",),
            lengths=("flat", "tail"),
            rows=(1, 4),
            gammas=(2, 4),
            repeats=5,
        )


def measure_task(
    task: Task, args: Args, *, static: bool
) -> tuple[dict[str, Any], dict[str, Runner]]:
    """Run a task under every control, interleaved.

    Args:
      task: what to run. static: whether to run it as static batches as well.
    Returns:
      The point, without the task's own properties, and the runners by control.
    """
    forget_engines()
    controlled = {
        name: Runner(task, name, gammas=args.gammas, patience=args.patience)
        for name in runners.controls_of(args.gammas)
    }
    for runner in controlled.values():
        runner.warm_up()
    compared: dict[str, Runner | StaticRunner] = {**controlled}
    if static:
        compared["static"] = StaticRunner(task)
        compared["static"].run()
    cases: dict[str, Callable[[], float]] = {
        name: runner.run for name, runner in compared.items()
    }
    if args.peer:
        cases[PEER] = peer_of(task, controlled["ar"]).run
    seconds = measure.interleave(cases, args.repeats, desc=task.name)

    expected = controlled["ar"].completions()
    num_tokens = sum(map(len, expected))
    found = []
    for name in cases:
        entry = runners.entry_of(name, seconds, num_tokens)
        if static:
            entry["speedup_over_static"] = measure.paired_ratio(
                seconds["static"], seconds[name]
            )
        if name in controlled:
            entry |= controlled[name].describe()
        if name in compared:  # a peer draws other noise: its tokens are not compared
            entry["agreement_with_ar"] = task.compared(
                expected, compared[name].completions()
            )
        found.append(entry)
    if args.profile is not None:
        controlled["best"].run(args.profile)
    fixed = [name for name in controlled if name != "best"]
    best_fixed = min(fixed, key=lambda name: float(np.median(seconds[name])))
    point = {
        "num_tokens": num_tokens,
        "lengths": workloads.describe([len(tokens) for tokens in expected]),
        "best_fixed": best_fixed,
        "best_over_best_fixed": measure.paired_ratio(
            seconds[best_fixed], seconds["best"]
        ),
        "controls": found,
    }
    return point, controlled


def peer_of(task: Task, like: Runner) -> peers.TransformersRunner:
    """Return the peer on this task, warmed up; its rows as long as those of `like`."""
    policy = task.policy
    if isinstance(policy, workloads.PlannedLengths):
        policy = policy.policy
    assert isinstance(policy, er_jax.Decoder)
    like.run()
    lengths = [len(tokens) for tokens in like.completions()]
    like.outs.clear()
    runner = peers.TransformersRunner(
        policy, task.params.policy, task.prompts, lengths, task.slots
    )
    runner.run()
    return runner


def planned(
    preset: str, args: Args, lengths: Sequence[int], slots: int, limit: int
) -> Task:
    """Return a task on random parameters whose completions have these lengths."""
    return tasks.planned_task(
        preset, lengths, slots=slots, max_new_tokens=limit, draft=args.draft,
        dtype=args.dtype,
    )  # fmt: skip


def trained(run: Path, args: Args, num: int, slots: int) -> Task:
    """Return a task on a trained policy, with its own prompts and lengths."""
    return tasks.trained_task(
        run, num=num, slots=slots, max_new_tokens=TRAINED_LIMIT, draft=args.draft
    )


def measure_workloads(args: Args, timeline: Path) -> Iterator[dict[str, Any]]:
    """Measure the part *workloads*."""
    if args.policy:
        task = trained(args.policy, args, num=128, slots=32)
        point, controlled = measure_task(task, args, static=True)
        controlled["best"].outs[-1].stats.plot(timeline)
        yield _labelled("workload", task, "trained", "own", point)
        return
    for preset in args.presets:
        size = tasks.SIZES[preset]
        for kind in args.lengths:
            limit = int(size.max_new_tokens * LIMIT_SHARE[kind])
            lengths = workloads.LENGTHS[kind](size.num, limit).tolist()
            task = planned(preset, args, lengths, size.slots, limit)
            point, controlled = measure_task(task, args, static=True)
            if kind == "tail":
                timeline.parent.mkdir(parents=True, exist_ok=True)
                controlled["best"].outs[-1].stats.plot(timeline)
            yield _labelled("workload", task, preset, kind, point)


def measure_rows(args: Args) -> Iterator[dict[str, Any]]:
    """Measure the part *rows*."""
    if args.policy:
        for rows in args.rows:
            task = trained(args.policy, args, num=rows, slots=rows)
            point, _ = measure_task(task, args, static=False)
            yield _labelled("rows", task, "trained", "own", point)
        return
    for preset in args.presets:
        tokens = SWEEP_TOKENS[preset]
        for rows in args.rows:
            task = planned(preset, args, [tokens] * rows, rows, tokens)
            point, _ = measure_task(task, args, static=False)
            yield _labelled("rows", task, preset, "flat", point)


def _labelled(
    part: str, task: Task, preset: str, kind: str, point: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "part": part,
        "preset": preset,
        "num_params": presets.num_params(task.params.policy),
        "weight_bytes": pass_bytes.weight_bytes(task.params.policy),
        "workload": kind,
        "rows": task.slots,
        "max_new_tokens": task.max_new_tokens,
        "dtype": task.dtype,
        **point,
    }


def quick_start(readme: Path) -> str:
    """Return the first Python block of a README.

    Raises:
      ValueError: it has none.
    """
    found = re.search(r"^```python\n(.*?)^```", readme.read_text(), re.M | re.S)
    if not found:
        raise ValueError(f"{readme.name} holds no ```python block to run")
    return found.group(1)


def measure_cold(args: Args) -> dict[str, Any]:
    """Run the quick start in fresh processes, without JAX's compilation cache."""
    program = (
        "import time; start = time.perf_counter()\n"
        + quick_start(args.readme)
        + "\nprint('seconds', time.perf_counter() - start)\n"
    )
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    inside, outside, text = [], [], ""
    for _ in range(1 if args.quick else 3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=records.ROOT,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        outside.append(time.perf_counter() - start)
        *lines, last = done.stdout.strip().splitlines()
        inside.append(float(last.split()[1]))
        text = "\n".join(lines)
    return {
        "part": "cold",
        "preset": "quick start",
        "rows": None,
        "dtype": "float32",
        "seconds": measure.spread(inside),
        "process_s": measure.spread(outside),
        "printed": text,
    }


def lines(point: Mapping[str, Any]) -> str:
    """Return a point as text."""
    if point["part"] == "cold":
        return (
            f"cold start: {point['seconds']['median']:.1f} s from import to result, "
            f"{point['process_s']['median']:.1f} s for the process"
        )
    rows = [
        (
            entry["control"],
            entry["seconds"]["median"],
            measure.iqr_percent(entry["seconds"]),
            entry["tokens_per_s"],
            entry["speedup_over_ar"]["median"],
            entry.get("speedup_over_static", {}).get("median", ""),
            entry.get("keep_rate") or "",
            100 * entry["host_share"] if "host_share" in entry else "",
            *_agreement(entry),
        )
        for entry in point["controls"]
    ]
    header = (
        "control", "s", "IQR %", "tokens/s", "/ar", "/static", "kept", "host %",
        "ties", "wrong",
    )  # fmt: skip
    title = (
        f"{point['preset']}, {point['workload']}, {point['rows']} rows: best against "
        f"{point['best_fixed']} {point['best_over_best_fixed']['median']:.3f}"
    )
    return f"{title}\n{tables.text((header, rows))}"


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw tokens per second by workload, and speed-ups over rows; save the picture."""
    points = [p for p in record["points"] if p["part"] != "cold"]
    names = list(dict.fromkeys(p["preset"] for p in points))
    if not names:
        return
    picture, axes = records.figure(2, len(names), width=6)
    for (left, right), name in zip(axes, names, strict=True):
        chosen = [p for p in points if p["preset"] == name and p["part"] == "workload"]
        for place, point in enumerate(chosen):
            for index, entry in enumerate(point["controls"]):
                x = place + (index - 3) * 0.12
                ratio = entry["speedup_over_ar"]
                left.bar(x, ratio["median"], 0.1, color=f"C{index}")
                left.vlines(x, ratio["q1"], ratio["q3"], color="black", linewidth=1)
                if place == 0:
                    left.bar(0, 0, color=f"C{index}", label=entry["control"])
        left.set_xticks(range(len(chosen)), [p["workload"] for p in chosen])
        left.set(title=f"{name}: speed over ar, by lengths")
        swept = [p for p in points if p["preset"] == name and p["part"] == "rows"]
        for index, entry in enumerate(swept[0]["controls"] if swept else ()):
            ratios = [p["controls"][index]["speedup_over_ar"] for p in swept]
            right.errorbar(
                [p["rows"] for p in swept],
                [r["median"] for r in ratios],
                yerr=[
                    [r["median"] - r["q1"] for r in ratios],
                    [r["q3"] - r["median"] for r in ratios],
                ],
                color=f"C{index}",
                linewidth=2.5 if entry["control"] == "best" else 1,
                label=entry["control"],
            )
        right.set_xscale("log", base=2)
        right.set(title=f"{name}: speed over ar, by rows", xlabel="rows")
        for ax in (left, right):
            ax.axhline(1, color="0.6", linewidth=0.8)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize="x-small")
    records.save_figure(picture, record, path)


def _agreement(entry: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the columns of ties and of wrong tokens, empty for a peer."""
    if "agreement_with_ar" not in entry:
        return "", ""
    found = entry["agreement_with_ar"]
    return found["num_ties"], len(found["unexplained"])


def unexplained(record: Mapping[str, Any]) -> list[str]:
    """Return where tokens differed other than at a tie."""
    return [
        f"{point['preset']} {point['workload']} {point['rows']} rows {entry['control']}"
        for point in record["points"]
        for entry in point.get("controls", ())
        if entry.get("agreement_with_ar", {}).get("unexplained")
    ]


def main(args: Args) -> dict[str, Any]:
    """Measure, print, and write the record after every point; return it.

    Raises:
      SystemExit: some control sampled other tokens, and not at a tie.
    """
    if args.quick:
        args = args.shortened()
    out = records.results_dir(args.out, args.quick)
    settings = records.settings_of(args, "readme", "policy", "profile")
    settings["policy"] = args.policy.name if args.policy else None
    name = "rollout_trained" if args.policy else "rollout"
    name += "_peer" if args.peer else ""
    record = records.new_record(name, settings)
    timeline = out / f"{name}_timeline.png"

    def points() -> Iterator[dict[str, Any]]:
        if "cold" in args.parts:
            yield measure_cold(args)
        if "workloads" in args.parts:
            yield from measure_workloads(args, timeline)
        if "rows" in args.parts:
            yield from measure_rows(args)

    for point in points():
        record["points"].append(point)
        records.save(out / f"{name}.json", record)
        print(lines(point), flush=True)
    plot(record, out / f"{name}.png")
    is_figure = out == records.RESULTS and name == "rollout"
    if is_figure and timeline.exists():
        FIGURE.parent.mkdir(parents=True, exist_ok=True)
        FIGURE.write_bytes(timeline.read_bytes())
    wrong = unexplained(record)
    if wrong:
        raise SystemExit(f"tokens differ, and not at ties: {'; '.join(wrong)}")
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.rollout"))
