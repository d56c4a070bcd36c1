"""Whole rollouts: no speculation, each fixed draft length, and `best`.

    python -m benchmarks.rollout                  # everything that is quoted
    python -m benchmarks.rollout --quick          # a few minutes, to see that it runs
    python -m benchmarks.rollout --policy RUN     # a policy trained by train.grpo

Three parts. *workloads*: the same prompts under every control, and as static batches,
for flat, long-tailed and capped lengths (see `workloads`). *rows*: as many prompts as
slots, 1 to 32. *cold*: the quick start of README.md in a fresh process.

All controls must give the same tokens; a difference is forgiven only where it begins at
a tie of the two best candidates, and then counted. Writes `rollout.json`, `rollout.png`
and the timeline of `best` on the last long-tailed workload.
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

import jax
import numpy as np
import tyro
from tqdm import tqdm

import er_jax
from benchmarks import measure, passes, peers, presets, workloads
from er_jax import Controller, PolicyParams, Rollout, RolloutConfig
from er_jax.engine import kept
from er_jax.figures import text_table
from er_jax.types import Policy

Part = Literal["workloads", "rows", "cold"]

PEER = "transformers"

FIGURE = measure.ROOT / "docs" / "figures" / "rollout.png"

# A warm-up ends when this many rollouts in a row compile nothing.
CLEAN_RUNS = 3
MAX_WARM_UPS = 25


@dataclasses.dataclass(frozen=True)
class Size:
    """How much to sample from a preset.

    Args:
      num: completions of a workload. slots: rows decoded at once.
      max_new_tokens: limit of a completion, before `LIMIT_SHARE`.
      sweep_tokens: tokens of each completion in the sweep over rows.
    """

    num: int
    slots: int
    max_new_tokens: int
    sweep_tokens: int


# Flat and capped completions are many times as long on average as a tail's at the same
# limit; theirs is this part of it, so that all kinds take minutes.
LIMIT_SHARE = {"flat": 0.25, "tail": 1.0, "capped": 0.125}

SIZES = {
    "tiny": Size(num=12, slots=4, max_new_tokens=32, sweep_tokens=8),
    "3M": Size(num=128, slots=32, max_new_tokens=512, sweep_tokens=128),
    "90M": Size(num=48, slots=16, max_new_tokens=512, sweep_tokens=48),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure.

    Args:
      parts: any of workloads, rows, cold.
      presets: decoders, by their names in benchmarks/presets.py.
      lengths: workloads: flat, tail, capped.
      rows: batch sizes of the sweep.
      gammas: draft lengths, each run fixed; `best` chooses from them and 0.
      draft: kind of draft: int8, int4, int4g128 or int4g32.
      dtype: of weights, activations and cache: float32 or bfloat16.
      repeats: interleaved readings of each control, after the warm-up.
      patience: of the controllers: a better program is compiled when the time lost
        without it exceeds this many times its compilation. Below the library's default
        of 1, so that a short warm-up ends where a long training run would.
      policy: directory of a run of train.grpo; its policy, prompts and own lengths
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
    patience: float = 0.1
    policy: Path | None = None
    readme: Path = measure.ROOT / "README.md"
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


@dataclasses.dataclass(frozen=True)
class Task:
    """One request, and all that is needed to run it under any control.

    name: what it is called. policy, params: the model and its draft. prompts: of the
    request. max_new_tokens, slots, stop_ids: of the request. dtype: of the model.
    """

    name: str
    policy: Policy
    params: PolicyParams
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    slots: int
    stop_ids: tuple[int, ...]
    dtype: str

    @property
    def key(self) -> jax.Array:
        """The key of every run, so that all must sample the same tokens."""
        return jax.random.key(17)


class Runner:
    """One control on one task: keeps its controller, remembers the last result."""

    def __init__(self, task: Task, control: str, args: Args) -> None:
        self.task, self.control = task, control
        gammas = (0, *args.gammas)
        self.config = RolloutConfig(
            max_new_tokens=task.max_new_tokens,
            max_slots=task.slots,
            stop_token_ids=task.stop_ids,
            gammas=gammas,
            control=control,
            drafter=presets.drafter(args.draft),
        )
        self.controller = Controller(control, gammas, patience=args.patience)
        self.outs: list[Rollout] = []
        self.compile_s = 0.0
        self.programs = 0
        self.num_warm_ups = 0

    def run(self, profile: Path | None = None) -> float:
        """Run the task and return its seconds, compilation not counted."""
        start = time.perf_counter()
        out = er_jax.rollout(
            self.task.policy,
            self.task.params,
            self.task.prompts,
            key=self.task.key,
            config=self.config,
            controller=self.controller,
            profile=profile,
        )
        compile_s = out.stats.seconds["compile"]
        self.compile_s += compile_s
        self.programs += len(out.stats.compiled)
        self.outs.append(out)
        return time.perf_counter() - start - compile_s

    def warm_up(self) -> None:
        """Run until nothing is compiled any more."""
        clean = 0
        with tqdm(
            desc=f"{self.task.name}: warm-up of {self.control}", unit="run"
        ) as bar:
            while clean < CLEAN_RUNS and self.num_warm_ups < MAX_WARM_UPS:
                self.run()
                self.num_warm_ups += 1
                clean = 0 if self.outs[-1].stats.compiled else clean + 1
                bar.set_postfix(programs=self.programs, refresh=False)
                bar.update()
        self.outs.clear()

    def completions(self) -> list[np.ndarray]:
        """Return the tokens of the last run."""
        out = self.outs[-1]
        return [
            ids[:length]
            for ids, length in zip(out.completion_ids, out.lengths, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """Return what the measured runs did, besides their seconds."""
        stats = [out.stats for out in self.outs]
        last = stats[-1]
        total = {phase: 0.0 for phase in last.seconds}
        for each in stats:
            for phase, seconds in each.seconds.items():
                total[phase] += seconds / len(stats)
        steady = sum(s for phase, s in total.items() if phase != "compile")
        proposed = sum(gamma * rounds for gamma, rounds in last.rounds.items())
        kept = sum(
            float(np.arange(gamma + 1) @ histogram)
            for gamma, histogram in last.accepted.items()
        )
        return {
            "phase_s": total,
            "host_share": total["host"] / steady,
            "outside_windows_share": 1 - total["windows"] / steady,
            "tokens_by_gamma": last.tokens,
            "keep_rate": kept / proposed if proposed else None,
            "num_windows": len(last.timeline),
            "num_warm_ups": self.num_warm_ups,
            "num_programs": self.programs,
            "compile_s": self.compile_s,
            "compiled_while_measured": sum(len(each.compiled) for each in stats),
        }


class StaticRunner:
    """The static batch on one task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.settings = workloads.sampling_settings(task.key, task.stop_ids)
        self.batch = workloads.StaticBatch(
            task.policy,
            task.params.policy,
            task.slots,
            task.max_new_tokens,
            prompt_length=max(len(prompt) for prompt in task.prompts),
        )
        self.last: list[np.ndarray] = []

    def run(self) -> float:
        """Run the task and return its seconds, compilation not counted."""
        self.last, seconds = self.batch.run(self.task.prompts, self.settings)
        return seconds


def controls_of(gammas: Sequence[int]) -> tuple[str, ...]:
    """Return the controls that are compared."""
    return ("ar", *(f"fixed:{gamma}" for gamma in gammas), "best")


def measure_task(
    task: Task, args: Args, *, static: bool
) -> tuple[dict[str, Any], dict[str, Runner]]:
    """Run a task under every control, interleaved, and return the point."""
    kept.forget_engines()
    runners = {name: Runner(task, name, args) for name in controls_of(args.gammas)}
    cases: dict[str, Callable[[], float]] = {
        name: runner.run for name, runner in runners.items()
    }
    for runner in runners.values():
        runner.warm_up()
    baseline = StaticRunner(task) if static else None
    if baseline:
        baseline.run()
        cases["static"] = baseline.run
    if args.peer:
        cases[PEER] = peer_of(task, runners["ar"]).run
    seconds = measure.interleave(cases, args.repeats, desc=task.name)

    expected = runners["ar"].completions()
    num_tokens = sum(map(len, expected))
    settings = workloads.sampling_settings(task.key, task.stop_ids)
    found = []
    for name in cases:
        tokens = baseline.last if name == "static" and baseline else None
        entry: dict[str, Any] = {
            "control": name,
            "seconds": measure.spread(seconds[name]),
            "tokens_per_s": num_tokens / float(np.median(seconds[name])),
            "speedup_over_ar": measure.paired_ratio(seconds["ar"], seconds[name]),
        }
        if baseline:
            entry["speedup_over_static"] = measure.paired_ratio(
                seconds["static"], seconds[name]
            )
        if name in runners:
            entry |= runners[name].describe()
            tokens = runners[name].completions()
        if tokens is None:  # of a peer, which draws other noise
            found.append(entry)
            continue
        entry["agreement_with_ar"] = dataclasses.asdict(
            workloads.compare(
                task.policy,
                task.params.policy,
                task.prompts,
                expected,
                tokens,
                settings,
                workloads.TIE_GAP[task.dtype],
            )
        )
        found.append(entry)
    if args.profile is not None:
        runners["best"].run(args.profile)
    fixed = [name for name in runners if name != "best"]
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
    return point, runners


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


def planned_task(
    preset: str, args: Args, lengths: Sequence[int], slots: int, max_new_tokens: int
) -> Task:
    """Return a task on random parameters whose completions have these lengths."""
    inner = presets.decoder(preset, dtype=args.dtype)
    policy = workloads.PlannedLengths(policy=inner, stop_id=0)
    params = presets.random_params(inner)
    draft = presets.drafts(params, (args.draft,))[args.draft]
    return Task(
        name=f"{preset}, {len(lengths)} prompts, {slots} slots",
        policy=policy,
        params=PolicyParams(policy=params, draft=draft),
        prompts=workloads.planned_prompts(lengths, inner.vocab_size),
        max_new_tokens=max_new_tokens,
        slots=slots,
        stop_ids=(0,),
        dtype=args.dtype,
    )


def trained_task(directory: Path, args: Args, num: int, slots: int) -> Task:
    """Return a task on a trained policy, its own prompts, and its own lengths."""
    from train import checkpoints, tasks

    policy, params, tokenizer = checkpoints.load_policy(directory)
    problems = tasks.read_jsonl(directory / "data" / "eval.jsonl", tokenizer)
    prompts = [tokenizer.encode_prompt(problem.prompt) for problem in problems]
    repeated = (prompts * -(-num // len(prompts)))[:num]
    draft = presets.drafts(params, (args.draft,))[args.draft]
    return Task(
        name=f"{directory.name}, {num} prompts, {slots} slots",
        policy=policy,
        params=PolicyParams(policy=params, draft=draft),
        prompts=repeated,
        max_new_tokens=256,
        slots=slots,
        stop_ids=(tasks.EOS,),
        dtype=policy.config.dtype,
    )


def measure_workloads(args: Args, timeline: Path) -> Iterator[dict[str, Any]]:
    """Measure the part *workloads*."""
    if args.policy:
        task = trained_task(args.policy, args, num=128, slots=32)
        point, runners = measure_task(task, args, static=True)
        runners["best"].outs[-1].stats.plot(timeline)
        yield _labelled("workload", task, "trained", "own", point)
        return
    for preset in args.presets:
        size = SIZES[preset]
        for kind in args.lengths:
            limit = int(size.max_new_tokens * LIMIT_SHARE[kind])
            lengths = workloads.LENGTHS[kind](size.num, limit).tolist()
            task = planned_task(preset, args, lengths, size.slots, limit)
            point, runners = measure_task(task, args, static=True)
            if kind == "tail":
                timeline.parent.mkdir(parents=True, exist_ok=True)
                runners["best"].outs[-1].stats.plot(timeline)
            yield _labelled("workload", task, preset, kind, point)


def measure_rows(args: Args) -> Iterator[dict[str, Any]]:
    """Measure the part *rows*."""
    if args.policy:
        for rows in args.rows:
            task = trained_task(args.policy, args, num=rows, slots=rows)
            point, _ = measure_task(task, args, static=False)
            yield _labelled("rows", task, "trained", "own", point)
        return
    for preset in args.presets:
        tokens = SIZES[preset].sweep_tokens
        for rows in args.rows:
            task = planned_task(preset, args, [tokens] * rows, rows, tokens)
            point, _ = measure_task(task, args, static=False)
            yield _labelled("rows", task, preset, "flat", point)


def _labelled(
    part: str, task: Task, preset: str, kind: str, point: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "part": part,
        "preset": preset,
        "num_params": presets.num_params(task.params.policy),
        "weight_bytes": passes.weight_bytes(task.params.policy),
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
    """Run the quick start in fresh processes and return the point.

    Nothing is reused: JAX's compilation cache is off.
    """
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
            cwd=measure.ROOT,
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
            100
            * (entry["seconds"]["q3"] - entry["seconds"]["q1"])
            / entry["seconds"]["median"],
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
    return f"{title}\n{text_table(rows, header)}"


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw tokens per second by workload, and speed-ups over rows; save the picture."""
    points = [p for p in record["points"] if p["part"] != "cold"]
    names = list(dict.fromkeys(p["preset"] for p in points))
    if not names:
        return
    picture, axes = measure.figure(2, len(names), width=6)
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
    picture.suptitle(measure.conditions(record), fontsize="small")
    picture.savefig(path, dpi=110)


def _agreement(entry: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the columns of ties and of wrong tokens; empty for a peer."""
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
    out = measure.results_dir(args.out, args.quick)
    settings = dataclasses.asdict(args)
    for name in ("out", "readme", "policy", "profile"):
        del settings[name]
    settings["policy"] = args.policy.name if args.policy else None
    name = "rollout_trained" if args.policy else "rollout"
    name += "_peer" if args.peer else ""
    record = measure.new_record(name, settings)
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
        measure.save(out / f"{name}.json", record)
        print(lines(point), flush=True)
    plot(record, out / f"{name}.png")
    is_figure = out == measure.RESULTS and name == "rollout"
    if is_figure and timeline.exists():
        FIGURE.parent.mkdir(parents=True, exist_ok=True)
        FIGURE.write_bytes(timeline.read_bytes())
    wrong = unexplained(record)
    if wrong:
        raise SystemExit(f"tokens differ, and not at ties: {'; '.join(wrong)}")
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.rollout"))
