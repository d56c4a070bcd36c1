"""Passes and rollouts of a 7B-shaped policy on a GPU or a TPU, in one call.

    python -m benchmarks.accelerator            # on a GPU or a TPU; under 8 minutes
    python -m benchmarks.accelerator --dry-run  # the same on any CPU, tiny shapes

Correctness comes first (`lib/device_check.py`): a small decoder in float32 and bfloat16
must sample the tokens that a CPU samples, up to ties, from logits that are close. Then
come the passes of `lib/passes.py`, for a policy with random parameters in the shape of
Qwen2.5-7B in bfloat16, with int8 and int4 drafts, and rollouts of a long-tailed
workload.

A program of 28 layers takes about a minute to compile. So most shapes are measured with
fewer layers, and the most important ones with all; every point says how many.
The most important points are measured first, and the record is written after each. It
lists what there was no time for, and what failed, with the message.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import er_jax
from benchmarks.lib import (
    device_check,
    measure,
    pass_bytes,
    pass_points,
    presets,
    records,
    runners,
    tasks,
    workloads,
)
from benchmarks.lib.bandwidth import Device
from benchmarks.lib.passes import Bench, Pass
from benchmarks.lib.tasks import Size
from benchmarks.lib.timed_record import TimedRecord
from er_jax import Decoder, PolicyParams
from er_jax.types import Params

START_S = time.perf_counter()

NEEDED = (
    "benchmarks.accelerator needs a GPU or a TPU with at least 16 GB and a JAX that "
    'finds it (pip install "jax[cuda12]" or "jax[tpu]"); JAX found only a CPU. '
    "To see the script run on this machine: python -m benchmarks.accelerator --dry-run"
)

# Share of the device's memory that a point may need.
MEMORY_SHARE = 0.85


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, the most important first.

    preset: of the policy. depths: numbers of layers, fewer and all.
    shapes: (rows, cache length) with fewer layers. whole_shapes: the same with all.
    gamma: drafts of a round. drafts: kinds of draft; rounds and rollouts use the first.
    rollout: size of the rollouts. check: preset of the comparison with the CPU.
    """

    preset: str
    depths: tuple[int, int]
    shapes: tuple[tuple[int, int], ...]
    whole_shapes: tuple[tuple[int, int], ...]
    gamma: int
    drafts: tuple[str, ...]
    rollout: Size
    check: str


FULL = Plan(
    preset="7B",
    depths=(4, 28),
    shapes=(
        (1, 1024), (32, 1024), (8, 8192), (128, 1024),
        (8, 1024), (32, 8192), (1, 8192), (128, 8192),
    ),
    whole_shapes=((1, 1024), (32, 1024), (8, 8192)),
    gamma=4,
    drafts=("int8", "int4g128"),
    rollout=Size(num=64, slots=32, max_new_tokens=512),
    check="3M",
)  # fmt: skip

DRY = Plan(
    preset="tiny",
    depths=(1, 2),
    shapes=((1, 64), (2, 64)),
    whole_shapes=((1, 64),),
    gamma=2,
    drafts=("int8", "int4g32"),
    rollout=Size(num=6, slots=4, max_new_tokens=16),
    check="tiny",
)


@dataclasses.dataclass(frozen=True)
class Args:
    """How to measure.

    Args:
      budget_s: seconds for everything, from start to the last point.
      repeats: interleaved readings of each pass.
      reading_s: seconds that one reading is made to last.
      workers: programs compiled at the same time; 0 takes half the cores.
      out: directory of the results; default benchmarks/results, or runs/benchmarks
        for a dry run.
      dry_run: run everything on a tiny shape, on a CPU too.
      reference: for the script's own use: write what this machine's CPU samples to this
        file, and stop.
    """

    budget_s: float = 450.0
    repeats: int = 5
    reading_s: float = 0.1
    workers: int = 0
    out: Path | None = None
    dry_run: bool = False
    reference: Path | None = None


class Session(TimedRecord):
    """The record of a run, with its arguments and its plan.

    Args:
      args, plan: what to measure. out: directory of the record.
    """

    def __init__(self, args: Args, plan: Plan, out: Path) -> None:
        self.args, self.plan = args, plan
        settings = records.settings_of(args, "reference")
        settings["plan"] = dataclasses.asdict(plan)
        record = records.new_record("accelerator", settings)
        super().__init__(out / "accelerator.json", record, START_S, args.budget_s)

    def add_part(self, part: str, num_layers: int, point: Mapping[str, Any]) -> None:
        """Add the point of a part, with what all points have in common."""
        about = {
            "part": part,
            "preset": self.plan.preset,
            "dtype": "bfloat16",
            "num_layers": num_layers,
        }
        self.add({**about, **point})


@dataclasses.dataclass
class Model:
    """A policy with random parameters, its drafts, and the seconds to compile it."""

    policy: Decoder
    params: Params
    drafts: dict[str, Params]
    compile_s: float | None = None

    @classmethod
    def make(cls, plan: Plan, num_layers: int) -> Model:
        """Draw a policy of this depth and quantize it."""
        policy = presets.decoder(plan.preset, dtype="bfloat16", num_layers=num_layers)
        params = presets.random_params(policy)
        drafts = presets.drafts(params, plan.drafts)
        jax.block_until_ready((params, drafts))
        return cls(policy=policy, params=params, drafts=drafts)


def memory_needed(plan: Plan, num_layers: int, rows: int, cache_length: int) -> int:
    """Return the bytes that a point needs: parameters, drafts, cache, logits."""
    policy = presets.decoder(plan.preset, dtype="bfloat16", num_layers=num_layers)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    held = pass_bytes.size_of(params)
    for name in plan.drafts:
        config = presets.drafter(name)
        draft = functools.partial(er_jax.quantize, config=config)
        held += pass_bytes.size_of(jax.eval_shape(draft, params))
    logits = 4 * rows * (plan.gamma + 1) * policy.vocab_size
    return held + pass_bytes.cache_bytes(policy, rows, cache_length) + 4 * logits


def told(error: Exception) -> str:
    """Return what failed, in a line or two."""
    return f"{type(error).__name__}: {error}"[:300]


def with_shares(point: dict[str, Any], device: Device) -> dict[str, Any]:
    """Add to every pass its share of the device's peak bandwidth and of a copy's."""
    for entry in point["passes"]:
        rate = entry["bytes_per_s"]
        entry["share_of_copy"] = rate / device.copy_bytes_per_s
        if device.peak_bytes_per_s:
            entry["share_of_peak"] = rate / device.peak_bytes_per_s
    return point


def measure_passes(
    model: Model, plan: Plan, rows: int, cache_length: int, args: Args
) -> dict[str, Any]:
    """Compile and time every pass of one shape; the point names those that fail.

    Raises:
      RuntimeError: not even plain decoding ran.
    """
    # Rounds of other drafts follow from their draft passes.
    first = plan.drafts[0]
    wanted = [
        Pass("ar"),
        *(Pass("draft", 0, name) for name in plan.drafts),
        Pass("verify", plan.gamma),
        Pass("round", plan.gamma, first),
    ]
    bench = Bench(model.policy, model.params, model.drafts, rows, cache_length)
    failed: dict[str, str] = {}

    def attempt(pass_: Pass, action: Any) -> None:
        try:
            action()
        except Exception as error:  # whatever a compiler or an allocator raises
            failed[pass_.label] = told(error)

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(workers(args)) as pool:
        list(pool.map(lambda p: attempt(p, functools.partial(bench.build, p)), wanted))
    model.compile_s = time.perf_counter() - start
    for pass_ in wanted:
        if pass_.label not in failed:
            attempt(pass_, functools.partial(bench.warm_up, [pass_], args.reading_s))
    timed = [pass_ for pass_ in wanted if pass_.label not in failed]
    if Pass("ar") not in timed:
        raise RuntimeError(f"plain decoding failed: {failed[Pass('ar').label]}")
    readings = measure.interleave(bench.readers(timed), args.repeats)
    point = pass_points.point(bench, readings, timed)
    return {**point, "failed": failed, "compile_wall_s": model.compile_s}


def workers(args: Args) -> int:
    """Return how many programs to compile at the same time."""
    return args.workers or max((os.cpu_count() or 2) // 2, 1)


def measure_rollout(session: Session, model: Model) -> dict[str, Any]:
    """Run a long-tailed workload with and without speculation, while time is left.

    Raises:
      RuntimeError: no time was left to measure every control once.
    """
    plan, size = session.plan, session.plan.rollout
    lengths = workloads.tail_lengths(size.num, size.max_new_tokens).tolist()
    pair = PolicyParams(policy=model.params, draft=model.drafts[plan.drafts[0]])
    task = tasks.planned_task_of(
        "7B-shaped, tail", model.policy, pair, lengths,
        slots=size.slots, max_new_tokens=size.max_new_tokens,
    )  # fmt: skip
    gammas = (plan.gamma,)
    controlled = {
        name: runners.Runner(task, name, gammas=gammas, patience=1.0)
        for name in runners.controls_of(gammas)
    }
    for runner in controlled.values():
        # An even share of the time that is left, readings included.
        runner.warm_up(2, session.left_s / (2 * len(controlled)))
    seconds: dict[str, list[float]] = {name: [] for name in controlled}
    for _ in range(session.args.repeats):
        for name, runner in controlled.items():
            longest = max((max(s) for s in seconds.values() if s), default=0.0)
            if session.left_s > 2 * longest:
                seconds[name].append(runner.run())
    if not all(seconds.values()):
        raise RuntimeError("no time was left to measure rollouts")
    expected = controlled["ar"].completions()
    found = []
    for name, runner in controlled.items():
        tokens = runner.completions()
        differ = [
            not np.array_equal(a, b) for a, b in zip(expected, tokens, strict=True)
        ]
        found.append(
            {
                **runners.entry_of(name, seconds, sum(map(len, tokens))),
                "num_sequences_that_differ": sum(differ),
                **runner.describe(),
            }
        )
    return {
        "workload": "tail",
        "rows": size.slots,
        "max_new_tokens": size.max_new_tokens,
        "lengths": workloads.describe(lengths),
        "controls": found,
    }


def measure_shapes(
    session: Session,
    model: Model,
    shapes: Sequence[tuple[int, int]],
    device: Device,
    expected_s: float,
) -> None:
    """Measure the passes of several shapes as long as time and memory allow.

    Args:
      session, model, device: where to write, what to run, what it runs on.
      shapes: (rows, cache length), the most important first.
      expected_s: seconds that the first is expected to compile for.
    """
    depth = model.policy.config.num_layers
    for rows, length in shapes:
        what = f"passes of {rows} rows, length {length}, {depth} layers"
        need = memory_needed(session.plan, depth, rows, length)
        if device.memory_bytes and need > MEMORY_SHARE * device.memory_bytes:
            session.skip(what, f"needs {need / 1e9:.1f} GB of memory")
            continue
        compile_s = model.compile_s or expected_s
        if session.left_s < 1.3 * compile_s + 5:
            session.skip(what, f"{session.left_s:.0f} s were left")
            continue
        try:
            point = measure_passes(model, session.plan, rows, length, session.args)
        except Exception as error:  # for instance out of memory; the next may fit
            session.skip(what, told(error))
            continue
        session.add_part("passes", depth, with_shares(point, device))
        shown = {"preset": f"{depth} layers", **point}
        print(pass_points.lines([shown]), flush=True)


def run(session: Session, process: Any, reference: Path) -> bool:
    """Run everything, most important first; return whether the results were correct."""
    plan, args = session.plan, session.args
    device = Device.measured(2**24 if args.dry_run else 2**31)
    session.record["device"] = dataclasses.asdict(device)
    print(f"a copy reaches {device.copy_bytes_per_s / 1e9:.0f} GB/s", flush=True)

    checks = device_check.check_against_cpu(plan.check, process, reference)
    session.record["checks"] = checks
    session.save()
    for check in checks:
        print(check, flush=True)

    fewer, whole = plan.depths
    small = Model.make(plan, fewer)
    measure_shapes(session, small, plan.shapes[:2], device, expected_s=30.0)

    scale = whole / fewer
    expected_s = scale * (small.compile_s or 30.0)
    need = memory_needed(plan, whole, *plan.whole_shapes[0])
    need += pass_bytes.size_of(small.params)
    fits = not device.memory_bytes or need < MEMORY_SHARE * device.memory_bytes
    large = Model.make(plan, whole) if fits else None
    if large is None:
        session.skip(f"everything of {whole} layers", f"needs {need / 1e9:.1f} GB")
    else:
        measure_shapes(session, large, plan.whole_shapes[:1], device, expected_s)

    measure_shapes(session, small, plan.shapes[2:6], device, expected_s=30.0)
    if session.left_s < 60 and not args.dry_run:
        session.skip("rollouts", f"{session.left_s:.0f} s were left")
    else:
        try:
            session.add_part("rollout", fewer, measure_rollout(session, small))
        except Exception as error:
            session.skip("rollouts", told(error))
    if large is not None:
        measure_shapes(session, large, plan.whole_shapes[1:], device, expected_s)
    del large
    measure_shapes(session, small, plan.shapes[6:], device, expected_s=30.0)
    return all(check["correct"] for check in checks)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw costs relative to an AR pass, and shares of the bandwidth, by rows."""
    points = [p for p in record["points"] if p["part"] == "passes"]
    kinds = sorted({(p["num_layers"], p["cache_length"]) for p in points})
    picture, axes = records.figure(2, width=6)
    for (depth, length), style in zip(kinds, ("-", "--", ":", "-.") * 2, strict=False):
        chosen = [
            p
            for p in sorted(points, key=lambda p: p["rows"])
            if (p["num_layers"], p["cache_length"]) == (depth, length)
        ]
        draw = functools.partial(
            pass_points.draw, points=chosen, ls=style, marker=".",
            about=f"{depth} layers, length {length}",
        )  # fmt: skip
        ratios = ("draft", "verify", "round")
        draw(axes[0][0], kinds=ratios, value=pass_points.cost_ratio)
        shares = ("ar", "draft", "verify")
        draw(axes[0][1], kinds=shares, value=lambda e: e["share_of_copy"])
    titles = ("cost / AR pass", "bytes that must be read: share of a copy's rate")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_xscale("log", base=2)
        ax.set(title=title, xlabel="rows", ylim=(0, None))
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="xx-small")
    records.save_figure(picture, record, path)


def stop_at_once() -> None:
    """End the process, whatever it is doing."""
    print("the time is up; what was measured by now is written", file=sys.stderr)
    os._exit(0)


def main(args: Args) -> None:
    """Measure as much as the time allows.

    Raises:
      SystemExit: with 2 where there is no accelerator, with 1 where its results differ
        from the CPU's.
    """
    plan = DRY if args.dry_run else FULL
    if args.reference:
        device_check.write_reference(plan.check, args.reference)
        return
    if jax.default_backend() == "cpu" and not args.dry_run:
        print(NEEDED, file=sys.stderr)
        raise SystemExit(2)
    out = records.results_dir(args.out, args.dry_run)
    session = Session(args, plan, out)
    session.save()
    # A compiler cannot be interrupted. What was measured by then is on the disk.
    limit = threading.Timer(session.left_s + 20, stop_at_once)
    limit.daemon = True
    limit.start()
    command = ["benchmarks.accelerator", *(["--dry-run"] if args.dry_run else [])]
    command.append("--reference")
    with device_check.reference_process(command) as (process, reference):
        correct = run(session, process, reference)
    session.save()
    plot(session.record, out / "accelerator.png")
    limit.cancel()
    if not correct:
        raise SystemExit("this device's results differ from the CPU's; see the checks")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.accelerator"))
