"""Passes and rollouts of a 7B-shaped policy on a GPU or a TPU, in one call.

    python -m benchmarks.accelerator            # on a GPU or a TPU; under 8 minutes
    python -m benchmarks.accelerator --dry-run  # the same on any CPU, tiny shapes

First correctness: a small decoder in float32 and bfloat16 must sample the tokens that a
CPU samples, up to ties, from logits that are close. Then the passes of `passes` for a
policy of random parameters in the shape of Qwen2.5-7B, bfloat16, with int8 and int4
drafts, and rollouts of a long-tailed workload.

Compiling 28 layers takes about a minute a program, so most shapes are measured with
fewer layers and the whole depth where it matters most; every point says its depth.
Points come in the order of importance, the record is written after each, and what the
time did not allow is listed in it. What fails is recorded with its message, and the
rest goes on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import er_jax
from benchmarks import measure, passes, presets, rollout, steps, workloads
from benchmarks.passes import Bench, Pass
from er_jax import Decoder, PolicyParams, RolloutConfig, devices
from er_jax.types import Params

START_S = time.perf_counter()

NEEDED = (
    "benchmarks.accelerator needs a GPU or a TPU with at least 16 GB and a JAX that "
    'finds it (pip install "jax[cuda12]" or "jax[tpu]"); JAX found only a CPU. '
    "To see the script run on this machine: python -m benchmarks.accelerator --dry-run"
)

# Largest difference of two logits of size about one that rounding may explain.
LOGIT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}

# Share of the device's memory that a point may plan with.
MEMORY_SHARE = 0.85


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, in the order of importance.

    preset: the shape. depths: layers, fewer and all. shapes: (rows, cache length) with
    fewer layers. whole_shapes: and with all. gamma: drafts of a round. drafts: kinds of
    draft; the first also gives the rounds. rollout: size of the rollouts. check: preset
    of the comparison with the CPU.
    """

    preset: str
    depths: tuple[int, int]
    shapes: tuple[tuple[int, int], ...]
    whole_shapes: tuple[tuple[int, int], ...]
    gamma: int
    drafts: tuple[str, ...]
    rollout: rollout.Size
    check: str


FULL = Plan(
    preset="7B",
    depths=(4, 28),
    shapes=(
        (1, 1024),
        (32, 1024),
        (8, 8192),
        (128, 1024),
        (8, 1024),
        (32, 8192),
        (1, 8192),
        (128, 8192),
    ),
    whole_shapes=((1, 1024), (32, 1024), (8, 8192)),
    gamma=4,
    drafts=("int8", "int4g128"),
    rollout=rollout.Size(num=64, slots=32, max_new_tokens=512, sweep_tokens=0),
    check="3M",
)

DRY = Plan(
    preset="tiny",
    depths=(1, 2),
    shapes=((1, 64), (2, 64)),
    whole_shapes=((1, 64),),
    gamma=2,
    drafts=("int8", "int4g32"),
    rollout=rollout.Size(num=6, slots=4, max_new_tokens=16, sweep_tokens=0),
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


class Budget:
    """The seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self.end_s = START_S + seconds

    @property
    def left_s(self) -> float:
        """Seconds until the end; negative behind it."""
        return self.end_s - time.perf_counter()


# --- Correctness against the CPU ------------------------------------------------------


def check_params(policy: Decoder) -> Params:
    """Return parameters that are the same on every device: drawn by NumPy."""
    random = np.random.default_rng(0)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            values = np.ones(shape.shape)
        else:
            size = 1 if "embed" in name else shape.shape[0] ** -0.5
            values = random.standard_normal(shape.shape) * size
        return jnp.asarray(values.astype(np.float32), shape.dtype)

    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


@dataclasses.dataclass(frozen=True)
class Check:
    """A small rollout that is run on the CPU and on the device.

    preset: of the decoder. dtype: of the decoder.
    """

    preset: str
    dtype: str

    @property
    def policy(self) -> Decoder:
        """The decoder."""
        return presets.decoder(self.preset, dtype=self.dtype)

    @property
    def prompts(self) -> list[list[int]]:
        """Eight prompts of different lengths."""
        random = np.random.default_rng(1)
        top = self.policy.vocab_size
        return [list(map(int, random.integers(0, top, 3 + 2 * i))) for i in range(8)]

    def sample(self, control: str) -> er_jax.Rollout:
        """Sample the prompts' completions on the default device."""
        params = check_params(self.policy)
        return er_jax.rollout(
            self.policy,
            params,
            self.prompts,
            key=jax.random.key(3),
            config=RolloutConfig(max_new_tokens=48, control=control),
        )

    def logits(self, sequences: np.ndarray) -> np.ndarray:
        """Return the logits `[N, S, V]` along given sequences `[N, S]`."""
        policy, params = self.policy, check_params(self.policy)
        rows, length = sequences.shape
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), sequences.shape)

        def run(params: Params, tokens: jax.Array) -> jax.Array:
            cache = policy.init_cache(rows, length)
            hidden, _ = policy.forward(params, tokens, jnp.asarray(positions), cache)
            return policy.logits(params, hidden)

        return np.asarray(jax.jit(run)(params, sequences), np.float32)

    def reference(self) -> dict[str, np.ndarray]:
        """Return what this process's device samples, its logits, and its gaps."""
        out = self.sample("ar")
        longest = max(map(len, self.prompts)) + out.completion_ids.shape[1]
        sequences = np.zeros((len(self.prompts), longest), np.int32)
        for row, prompt in enumerate(self.prompts):
            known = [*prompt, *out.completion_ids[row]]
            sequences[row, : len(known)] = known
        settings = workloads.sampling_settings(jax.random.key(3), ())
        params = check_params(self.policy)
        gaps = [
            workloads.noised_gaps(self.policy, params, tokens, np.int32(i), settings)
            for i, tokens in enumerate(sequences)
        ]
        return {
            "tokens": out.completion_ids,
            "sequences": sequences,
            "logits": self.logits(sequences),
            "gaps": np.stack([np.asarray(gap) for gap in gaps]),
        }

    def compare(self, expected: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return how this process's device agrees with a reference."""
        logits = self.logits(expected["sequences"])
        difference = float(np.abs(logits - expected["logits"]).max())
        found: dict[str, Any] = {
            "preset": self.preset,
            "dtype": self.dtype,
            "rows": len(self.prompts),
            "max_logit_difference": difference,
            "controls": {},
        }
        correct = difference <= LOGIT_TOLERANCE[self.dtype]
        for control in ("ar", "fixed:4"):
            tokens = self.sample(control).completion_ids
            ties, others, num_tokens = 0, [], 0
            for row, prompt in enumerate(self.prompts):
                apart = np.flatnonzero(tokens[row] != expected["tokens"][row])
                num_tokens += int(apart[0]) if len(apart) else tokens.shape[1]
                if not len(apart):
                    continue
                # Two logits that each moved by the difference can close this gap, and
                # so can programs of other shapes on the same device.
                gap = expected["gaps"][row, len(prompt) + int(apart[0]) - 1]
                if gap <= max(2 * difference, workloads.TIE_GAP[self.dtype]):
                    ties += 1
                else:
                    others.append(row)
            correct = correct and not others
            found["controls"][control] = {
                "num_tokens": num_tokens,
                "num_ties": ties,
                "unexplained": others,
            }
        return {**found, "correct": correct}


def write_reference(preset: str, path: Path) -> None:
    """Write what this process samples for every precision."""
    arrays = {}
    for dtype in LOGIT_TOLERANCE:
        for name, array in Check(preset, dtype).reference().items():
            arrays[f"{dtype} {name}"] = array
    np.savez(path, **arrays)  # type: ignore[arg-type]


@contextlib.contextmanager
def reference_process(dry_run: bool) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run `write_reference` on the CPU in another process, and end it in the end."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "reference.npz"
        command = [sys.executable, "-m", "benchmarks.accelerator"]
        command += ["--reference", str(path), *(["--dry-run"] if dry_run else [])]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(command, cwd=measure.ROOT, env=environment)
        try:
            yield process, path
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()


def check_against_cpu(plan: Plan, process: Any, path: Path) -> list[dict[str, Any]]:
    """Return the comparisons with the CPU, one for each precision."""
    if process.wait(timeout=240):
        raise RuntimeError("the process that samples on the CPU failed; see above")
    arrays = dict(np.load(path))
    found = []
    for dtype in LOGIT_TOLERANCE:
        own = {
            key.removeprefix(f"{dtype} "): value
            for key, value in arrays.items()
            if key.startswith(f"{dtype} ")
        }
        # Float32 products are rounded to fewer bits by default on accelerators.
        precision = "highest" if dtype == "float32" else "default"
        with jax.default_matmul_precision(precision):
            found.append(Check(plan.check, dtype).compare(own))
    return found


# --- Passes ---------------------------------------------------------------------------


@dataclasses.dataclass
class Model:
    """A policy of random parameters and its drafts, and what compiling it takes."""

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


def size_of(tree: Any) -> int:
    """Return the bytes of a pytree of arrays or shapes; int4 counts half a byte."""
    return sum(-(-leaf.size * _bits(leaf.dtype) // 8) for leaf in jax.tree.leaves(tree))


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.dtype(dtype).itemsize * 8


def memory_needed(plan: Plan, num_layers: int, rows: int, cache_length: int) -> int:
    """Return the bytes that a point holds: parameters, drafts, cache, logits."""
    policy = presets.decoder(plan.preset, dtype="bfloat16", num_layers=num_layers)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    held = size_of(params)
    for name in plan.drafts:
        config = presets.drafter(name)
        draft = functools.partial(er_jax.quantize, config=config)
        held += size_of(jax.eval_shape(draft, params))
    logits = 4 * rows * (plan.gamma + 1) * policy.vocab_size
    return held + passes.cache_bytes(policy, rows, cache_length) + 4 * logits


@dataclasses.dataclass(frozen=True)
class Devices:
    """What the device can do at best.

    peak_bytes_per_s: from the vendor's sheet, None if unknown. copy_bytes_per_s: what a
    plain copy reaches. memory_bytes: None if unknown.
    """

    peak_bytes_per_s: float | None
    copy_bytes_per_s: float
    memory_bytes: int | None

    @classmethod
    def measured(cls, dry_run: bool) -> Devices:
        """Measure the default device."""
        memory = devices.device_memory_bytes()
        size = 2**24 if dry_run else min(2**31, (memory or 2**34) // 8)
        return cls(
            peak_bytes_per_s=measure.peak_bytes_per_s(jax.devices()[0].device_kind),
            copy_bytes_per_s=measure.copy_bytes_per_s(size),
            memory_bytes=memory,
        )

    def with_shares(self, point: dict[str, Any]) -> dict[str, Any]:
        """Add to every pass its share of the peak and of a copy."""
        for entry in point["passes"]:
            rate = entry["bytes_per_s"]
            entry["share_of_copy"] = rate / self.copy_bytes_per_s
            if self.peak_bytes_per_s:
                entry["share_of_peak"] = rate / self.peak_bytes_per_s
        return point


def measure_passes(
    model: Model, plan: Plan, rows: int, cache_length: int, args: Args
) -> dict[str, Any]:
    """Compile and time every pass of one shape; what fails is left out and named.

    Raises:
      RuntimeError: not even plain decoding ran.
    """
    # Rounds with the first draft; the others' follow from their draft passes.
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
        except Exception as error:  # Whatever a compiler or an allocator may raise.
            failed[pass_.label] = f"{type(error).__name__}: {error}"[:300]

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
    point = steps.point(bench, readings, timed)
    return {**point, "failed": failed, "compile_wall_s": model.compile_s}


def workers(args: Args) -> int:
    """Return how many programs to compile at the same time."""
    return args.workers or max((os.cpu_count() or 2) // 2, 1)


# --- Rollouts -------------------------------------------------------------------------


def measure_rollout(
    model: Model, plan: Plan, args: Args, budget: Budget
) -> dict[str, Any]:
    """Run a long-tailed workload with and without speculation, while time is left."""
    size = plan.rollout
    lengths = workloads.tail_lengths(size.num, size.max_new_tokens).tolist()
    policy = workloads.PlannedLengths(policy=model.policy, stop_id=0)
    task = rollout.Task(
        name="7B-shaped, tail",
        policy=policy,
        params=PolicyParams(policy=model.params, draft=model.drafts[plan.drafts[0]]),
        prompts=workloads.planned_prompts(lengths, policy.vocab_size),
        max_new_tokens=size.max_new_tokens,
        slots=size.slots,
        stop_ids=(0,),
        dtype="bfloat16",
    )
    options = rollout.Args(gammas=(plan.gamma,), draft=plan.drafts[0], patience=1.0)
    runners = {
        name: rollout.Runner(task, name, options)
        for name in rollout.controls_of(options.gammas)
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for name, runner in runners.items():
        clean, start = 0, time.perf_counter()
        # An even share of the time that is left, readings included.
        share_s = budget.left_s / (2 * len(runners))
        while clean < 2 and time.perf_counter() - start < share_s:
            runner.run()
            runner.num_warm_ups += 1
            clean = 0 if runner.outs[-1].stats.compiled else clean + 1
            print(f"warm-up of {name}: {runner.programs} programs", flush=True)
    for runner in runners.values():
        runner.outs = runner.outs[-1:]
    for _ in range(args.repeats):
        for name, runner in runners.items():
            longest = max((max(s) for s in seconds.values() if s), default=0.0)
            if budget.left_s > 2 * longest:
                seconds[name].append(runner.run())
    num = min(map(len, seconds.values()))
    if not num:
        raise RuntimeError("no time was left to measure rollouts")
    expected = runners["ar"].completions()
    found = []
    for name, runner in runners.items():
        tokens = runner.completions()
        differ = [
            not np.array_equal(a, b) for a, b in zip(expected, tokens, strict=True)
        ]
        found.append(
            {
                "control": name,
                "seconds": measure.spread(seconds[name]),
                "tokens_per_s": sum(map(len, tokens)) / float(np.median(seconds[name])),
                "speedup_over_ar": measure.paired_ratio(
                    seconds["ar"][:num], seconds[name][:num]
                ),
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


# --- The whole ------------------------------------------------------------------------


class Session:
    """The record, written after every point, and the time that is left."""

    def __init__(self, args: Args, plan: Plan, out: Path) -> None:
        self.args, self.plan, self.path = args, plan, out / "accelerator.json"
        self.budget = Budget(args.budget_s)
        settings = {**dataclasses.asdict(args), "plan": dataclasses.asdict(plan)}
        for name in ("out", "reference"):
            del settings[name]
        self.record = measure.new_record("accelerator", settings)
        self.record["skipped"] = []

    def save(self) -> None:
        """Write the record."""
        self.record["seconds"] = time.perf_counter() - START_S
        measure.save(self.path, self.record)

    def add(self, part: str, num_layers: int, point: Mapping[str, Any]) -> None:
        """Add a point and write the record."""
        self.record["points"].append(
            {
                "part": part,
                "preset": self.plan.preset,
                "dtype": "bfloat16",
                "num_layers": num_layers,
                **point,
            }
        )
        self.save()

    def skip(self, what: str, why: str) -> None:
        """Record that something was not measured."""
        print(f"skipped {what}: {why}", flush=True)
        self.record["skipped"].append({"what": what, "why": why})
        self.save()


def measure_shapes(
    session: Session,
    model: Model,
    shapes: Sequence[tuple[int, int]],
    device: Devices,
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
        if session.budget.left_s < 1.3 * compile_s + 5:
            session.skip(what, f"{session.budget.left_s:.0f} s were left")
            continue
        try:
            point = measure_passes(model, session.plan, rows, length, session.args)
        except Exception as error:  # Out of memory, for one; the next may fit.
            session.skip(what, f"{type(error).__name__}: {error}"[:300])
            continue
        session.add("passes", depth, device.with_shares(point))
        shown = {"preset": f"{depth} layers", **point}
        print(steps.lines([shown]), flush=True)


def run(session: Session, process: Any, reference: Path) -> bool:
    """Run everything, most important first; return whether the results were correct."""
    plan, args, budget = session.plan, session.args, session.budget
    device = Devices.measured(args.dry_run)
    session.record["device"] = dataclasses.asdict(device)
    print(f"a copy reaches {device.copy_bytes_per_s / 1e9:.0f} GB/s", flush=True)

    checks = check_against_cpu(plan, process, reference)
    session.record["checks"] = checks
    session.save()
    for check in checks:
        print(check, flush=True)

    fewer, whole = plan.depths
    small = Model.make(plan, fewer)
    measure_shapes(session, small, plan.shapes[:2], device, expected_s=30.0)

    scale = whole / fewer
    expected_s = scale * (small.compile_s or 30.0)
    need = memory_needed(plan, whole, *plan.whole_shapes[0]) + size_of(small.params)
    fits = not device.memory_bytes or need < MEMORY_SHARE * device.memory_bytes
    large = Model.make(plan, whole) if fits else None
    if large is None:
        session.skip(f"everything of {whole} layers", f"needs {need / 1e9:.1f} GB")
    else:
        measure_shapes(session, large, plan.whole_shapes[:1], device, expected_s)

    measure_shapes(session, small, plan.shapes[2:6], device, expected_s=30.0)
    if budget.left_s < 60 and not args.dry_run:
        session.skip("rollouts", f"{budget.left_s:.0f} s were left")
    else:
        try:
            session.add("rollout", fewer, measure_rollout(small, plan, args, budget))
        except Exception as error:
            session.skip("rollouts", f"{type(error).__name__}: {error}"[:300])
    if large is not None:
        measure_shapes(session, large, plan.whole_shapes[1:], device, expected_s)
    del large
    measure_shapes(session, small, plan.shapes[6:], device, expected_s=30.0)
    return all(check["correct"] for check in checks)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw costs relative to an AR pass, and shares of the bandwidth, by rows."""
    points = [p for p in record["points"] if p["part"] == "passes"]
    kinds = sorted({(p["num_layers"], p["cache_length"]) for p in points})
    picture, axes = measure.figure(2, width=6)
    for (depth, length), style in zip(kinds, ("-", "--", ":", "-.") * 2, strict=False):
        chosen = [
            p
            for p in sorted(points, key=lambda p: p["rows"])
            if (p["num_layers"], p["cache_length"]) == (depth, length)
        ]
        labels = dict.fromkeys(
            (e["kind"], e["gamma"], e["draft"]) for p in chosen for e in p["passes"]
        )
        for index, (kind, gamma, draft) in enumerate(labels):
            found = [
                (p["rows"], e)
                for p in chosen
                for e in p["passes"]
                if (e["kind"], e["gamma"], e["draft"]) == (kind, gamma, draft)
            ]
            rows = [r for r, _ in found]
            label = f"{kind} {gamma or ''} {draft}, {depth} layers, length {length}"
            options = {"color": f"C{index}", "marker": ".", "label": label}
            if kind != "ar":
                ratio = [e["cost_ratio"]["median"] for _, e in found]
                axes[0][0].plot(rows, ratio, style, **options)
            if kind != "round":
                share = [e["share_of_copy"] for _, e in found]
                axes[0][1].plot(rows, share, style, **options)
    titles = ("cost / AR pass", "bytes that must be read: share of a copy's rate")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_xscale("log", base=2)
        ax.set(title=title, xlabel="rows", ylim=(0, None))
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="xx-small")
    picture.suptitle(measure.conditions(record), fontsize="small")
    picture.savefig(path, dpi=110)


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
        write_reference(plan.check, args.reference)
        return
    if jax.default_backend() == "cpu" and not args.dry_run:
        print(NEEDED, file=sys.stderr)
        raise SystemExit(2)
    out = measure.results_dir(args.out, args.dry_run)
    session = Session(args, plan, out)
    session.save()
    # A compiler cannot be interrupted; what was measured by then is on the disk.
    limit = threading.Timer(session.budget.left_s + 20, stop_at_once)
    limit.daemon = True
    limit.start()
    with reference_process(args.dry_run) as (process, reference):
        correct = run(session, process, reference)
    session.save()
    plot(session.record, out / "accelerator.png")
    limit.cancel()
    if not correct:
        raise SystemExit("this device's results differ from the CPU's; see the checks")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.accelerator"))
