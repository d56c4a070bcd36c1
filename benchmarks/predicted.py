"""How well a calibration predicts: the best draft length, and whole rollouts.

    python -m train.grpo arithmetic              # a policy to predict
    python -m benchmarks.predicted runs/arithmetic
    python -m benchmarks.predicted 90M --rows 1 4 16 --lengths 128 512
    python -m benchmarks.predicted runs/arithmetic --quick

Predictions know of costs only what one survey of 20 seconds (`er_jax.tools.survey`) has
found, and of acceptance only what one rollout has shown that always drafts. There are
two comparisons. *cells*: at every number of rows and cache length, the draft length
that the controller chooses by these, beside the fastest one when all are timed.
*rollouts*: the scheduler and the controller run on a simulated engine (see
`lib/simulated.py`), whose rounds take what the table says and whose rows end at the
policy's own lengths; the seconds are compared with those of the real engine. A prefill
is priced by timing one. What a rollout and each window take beside rounds and prefills
is measured with completions of a single token.

Left out of predictions, but not of what they are compared with: moves of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

import er_jax
from benchmarks.lib import measure, records, tables
from benchmarks.lib.simulated import SimulatedEngine, simulate
from benchmarks.lib.subjects import Shape, Subject, prepare
from er_jax import RolloutStats
from er_jax.config import DEFAULT_GAMMAS
from er_jax.costs.timing import measure_round, neutral_sampling
from er_jax.engine.engine import Engine
from er_jax.engine.kept import forget_engines
from er_jax.request import Request, request_of
from er_jax.scheduler.batch import Batch
from er_jax.scheduler.topology import OneDevice
from er_jax.types import Program

CONTROLS = ("ar", "fixed:4", "best")

# The controller's draft length is good if it loses at most this share of the speed of
# the best one.
GOOD_SHARE = 0.03


@dataclasses.dataclass(frozen=True)
class Args:
    """What to predict.

    Args:
      subject: directory of a run of train.grpo, or a preset of
        benchmarks/lib/presets.py.
      rows, lengths: the grid of cells. gammas: draft lengths.
      budget: seconds of the survey, compilation not counted.
      repeats: readings of every rollout.
      out: where to write. quick: few cells and rollouts, to see that it runs.
    """

    subject: tyro.conf.Positional[str]
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    lengths: tuple[int, ...] = (128, 256, 512)
    gammas: tuple[int, ...] = DEFAULT_GAMMAS
    budget: float = 20.0
    repeats: int = 5
    out: Path | None = None
    quick: bool = False

    def shortened(self) -> Args:
        """Return the same with the sizes of a quick run."""
        return dataclasses.replace(
            self, rows=(1, 4), lengths=(128, 256), gammas=(0, 4), repeats=2
        )


def measure_cells(subject: Subject, args: Args) -> list[dict[str, Any]]:
    """Return, per cell, the speeds of all draft lengths, the chosen and the best one.

    The subject's engine loses its programs.
    """
    forget_engines()
    subject.engine.compiled.clear()
    controller = subject.controller("best")
    tokens = {
        gamma: er_jax.acceptance.expected_tokens(list(subject.keep_probs[:gamma]))
        for gamma in subject.gammas
    }
    # The controller knows the same acceptance as the speeds that it is compared with.
    estimate = controller.acceptance
    estimate.tested[:] = 1e9
    estimate.kept[:] = 1e9 * subject.keep_probs
    found = []
    cells = list(itertools.product(args.rows, args.lengths))
    for rows, length in tqdm(cells, desc="cells", unit="cell"):
        options = [Program(rows, length, gamma) for gamma in reversed(subject.gammas)]
        chosen = controller.choose(options, None, compile_s=lambda program: 0.0)
        # An engine for each cell: a process on a CPU cannot hold hundreds of programs.
        engine = Engine(subject.policy, "coupled")
        cases = {
            str(program.gamma): functools.partial(
                measure_round, engine, subject.params, program
            )
            for program in options
        }
        seconds = measure.interleave(cases, args.repeats)
        speeds = {g: tokens[g] / min(seconds[str(g)]) for g in subject.gammas}
        best = max(speeds, key=speeds.__getitem__)
        found.append(
            {
                "rows": rows,
                "cache_length": length,
                "speed_over_ar": {g: s / speeds[0] for g, s in speeds.items()},
                "chosen": chosen.gamma,
                "best": best,
                "chosen_over_best": speeds[chosen.gamma] / speeds[best],
            }
        )
    return found


def time_admission(subject: Subject, request: Request) -> Callable[[int], float]:
    """Return seconds by number of chunks to prefill, measured by filling all slots."""
    request = dataclasses.replace(
        request,
        prompt_of=request.prompt_of[: request.slots],
        sequence_ids=request.sequence_ids[: request.slots],
    )
    topology = OneDevice(subject.engine, subject.params, request)
    readings = []
    for _ in range(6):
        batch = Batch(topology, request, RolloutStats(), neutral_sampling())
        start = time.perf_counter()
        batch.refill()
        readings.append(time.perf_counter() - start)
        num_chunks = -(-batch.stats.num_prefilled // request.chunk)
    # The first reading may include compilation.
    return lambda chunks: chunks * float(np.median(readings[1:])) / num_chunks


def predict(
    subject: Subject, shape: Shape, control: str, out: er_jax.Rollout
) -> tuple[float, int]:
    """Return the simulated seconds, and windows, of a rollout like `out`."""
    config = subject.config(shape, control)
    arrays = [np.asarray(prompt, np.int32) for prompt in subject.prompts_of(shape)]
    request = request_of(arrays, out.sequence_ids, config)
    simulated = SimulatedEngine(
        subject.costs,
        time_admission(subject, request),
        dict(zip(out.sequence_ids.tolist(), out.lengths.tolist(), strict=True)),
        subject.keep_probs,
        subject.engine.rounds_per_test,
    )
    controller = subject.controller(control)
    # The second time acceptance is known, as it was when the real one was timed.
    for _ in range(2):
        simulated.seconds = 0.0
        _, stats = simulate(simulated, request, controller)
    return simulated.seconds, len(stats.timeline)


def time_beside(subject: Subject, slots: int) -> tuple[float, float]:
    """Return the seconds of a rollout, and of each window, beside rounds and prefills.

    They follow from two rollouts whose completions have a single token: of one prompt
    and of nine prompts, with as many completions of each as there are slots. A window's
    seconds are more than those of the host: after a prefill, weights and cache are no
    longer in the processor's caches.
    """
    seconds, windows = [], []
    for num_prompts in (1, 9):
        shape = Shape(num_prompts, slots, slots, 1)
        controller = subject.controller("ar")
        runs = [subject.run(shape, "ar", controller) for _ in range(10)]
        rounds_s, num_windows = predict(subject, shape, "ar", runs[-1][0])
        seconds.append(float(np.median([taken for _, taken in runs])) - rounds_s)
        windows.append(num_windows)
    window_s = (seconds[1] - seconds[0]) / (windows[1] - windows[0])
    return seconds[0] - windows[0] * window_s, window_s


def measure_rollouts(subject: Subject, args: Args) -> list[dict[str, Any]]:
    """Return predicted and measured seconds of rollouts of all shapes and controls."""
    shapes = subject.shapes[::4] if args.quick else subject.shapes
    beside = {slots: time_beside(subject, slots) for slots in {s.slots for s in shapes}}
    found = []
    cases = list(itertools.product(shapes, CONTROLS))
    for shape, control in tqdm(cases, desc="rollouts", unit="rollout"):
        controller = subject.controller(control)
        out, _ = subject.run(shape, control, controller)
        for _ in range(10):
            if not out.stats.compiled:
                break
            out, _ = subject.run(shape, control, controller)
        rounds_s, num_windows = predict(subject, shape, control, out)
        rollout_s, window_s = beside[shape.slots]
        predicted = rollout_s + num_windows * window_s + rounds_s
        seconds = []
        for _ in range(args.repeats):
            out, taken = subject.run(shape, control, controller)
            seconds.append(taken)
        measured = measure.spread(seconds)
        steady = {k: s for k, s in out.stats.seconds.items() if k != "compile"}
        found.append(
            {
                **dataclasses.asdict(shape),
                "control": control,
                "tokens": int(out.lengths.sum()),
                "tokens_by_gamma": out.stats.tokens,
                "predicted_s": predicted,
                "predicted_windows": num_windows,
                "num_windows": len(out.stats.timeline),
                "seconds": measured,
                "windows_share": steady["windows"] / sum(steady.values()),
                "error": predicted / measured["median"] - 1,
            }
        )
    return found


def cell_rows(point: Mapping[str, Any]) -> tables.Table:
    """Return header and rows of the cells."""
    gammas = list(point["cells"][0]["speed_over_ar"])
    rows = [
        (
            cell["rows"],
            cell["cache_length"],
            *(cell["speed_over_ar"][gamma] for gamma in gammas),
            cell["best"],
            cell["chosen"],
            cell["chosen_over_best"],
        )
        for cell in point["cells"]
    ]
    header = ["rows", "cache length", *(f"gamma {g} / ar" for g in gammas)]
    return [*header, "best", "chosen", "chosen / best"], rows


def rollout_rows(point: Mapping[str, Any]) -> tables.Table:
    """Return header and rows of the rollouts."""
    rows = [
        (
            f"{r['num_prompts']} x {r['n']}",
            r["slots"],
            r["max_new_tokens"],
            r["control"],
            r["tokens"],
            r["predicted_s"],
            r["seconds"]["median"],
            measure.iqr_percent(r["seconds"]),
            100 * r["error"],
        )
        for r in point["rollouts"]
    ]
    header = (
        "completions", "slots", "limit", "control", "tokens", "predicted s",
        "measured s", "IQR %", "error %",
    )  # fmt: skip
    return header, rows


def summary(point: Mapping[str, Any]) -> str:
    """Return what the point says, in two sentences."""
    good = [cell["chosen_over_best"] >= 1 - GOOD_SHARE for cell in point["cells"]]
    errors = np.abs([r["error"] for r in point["rollouts"]])
    return (
        f"The chosen draft length is the best one, or within {100 * GOOD_SHARE:.0f} % "
        f"of its speed, in {sum(good)} of {len(good)} cells. Predicted seconds of "
        f"{len(errors)} rollouts are off by {100 * np.median(errors):.1f} % in the "
        f"median, {100 * errors.max():.1f} % at most, from {point['num_readings']} "
        f"readings in {point['survey_s']:.1f} s."
    )


def main(args: Args) -> dict[str, Any]:
    """Predict, measure, print and write the record; return it."""
    if args.quick:
        args = args.shortened()
    out = records.results_dir(args.out, args.quick)
    name = Path(args.subject).name
    settings = {"subject": name, "gammas": args.gammas, "budget": args.budget}
    record = records.new_record("predicted", settings)
    subject = prepare(args.subject, args.rows, args.lengths, args.gammas, args.budget)
    point = {
        "preset": name,
        "rows": max(args.rows),
        "dtype": subject.dtype,
        "num_readings": len(subject.survey.costs.readings),
        "survey_s": subject.survey.spent_s,
        "is_complete": subject.survey.is_complete,
        "keep_probs": subject.keep_probs.tolist(),
        "rollouts": measure_rollouts(subject, args),
        "cells": measure_cells(subject, args),
    }
    record["points"].append(point)
    for table in (cell_rows(point), rollout_rows(point)):
        print(tables.text(table))
    print(summary(point))
    records.save(out / f"predicted_{name}.json", record)
    print(f"written: predicted_{name}.json in {out.name}", file=sys.stderr)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.predicted"))
