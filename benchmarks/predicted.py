"""How well a calibration predicts: the best draft length, and whole rollouts.

    python -m train.grpo arithmetic              # a policy to predict
    python -m benchmarks.predicted runs/arithmetic
    python -m benchmarks.predicted 90M --rows 1 4 16 --lengths 128 512
    python -m benchmarks.predicted runs/arithmetic --quick

One survey of 20 seconds (`er_jax.calibrate`) is all that predictions know of costs, and
one rollout that always drafts all that they know of acceptance. *cells*: at every
number of rows and cache length, the draft length that the controller chooses by them,
against the one that is fastest when every one is timed. *rollouts*: the scheduler and
the controller themselves run on a simulated engine, whose rounds take what the table
says and whose rows end where those of the policy do; against the seconds of the real
engine. Prefills are priced by timing one; what a rollout and each window take beside,
by completions of a single token. Left out of a prediction, and not of what it is
compared with: moves of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

import er_jax
from benchmarks import measure, presets, workloads
from er_jax import Controller, PolicyParams, RolloutConfig, RolloutStats
from er_jax.config import DEFAULT_GAMMAS
from er_jax.costs import timing
from er_jax.costs.table import LatencyTable
from er_jax.costs.timing import neutral_sampling
from er_jax.engine import kept
from er_jax.engine.engine import Engine
from er_jax.figures import text_table
from er_jax.request import Request, request_of
from er_jax.scheduler.batch import Batch
from er_jax.scheduler.loop import run as run_schedule
from er_jax.tools import survey
from er_jax.types import Admission, Finish, Policy, Program, WindowInfo
from train import checkpoints, tasks

CONTROLS = ("ar", "fixed:4", "best")

# A chosen draft length is as good as the best one within this share of its speed.
GOOD_SHARE = 0.03


@dataclasses.dataclass(frozen=True)
class Shape:
    """One kind of rollout: prompts, completions of each, slots, limit in tokens."""

    num_prompts: int
    n: int
    slots: int
    max_new_tokens: int


# Shapes of a trained policy's rollouts, by its own lengths; and of a preset's, whose
# lengths are planned.
SHAPES = (
    Shape(1, 1, 1, 240),
    Shape(4, 1, 4, 240),
    Shape(2, 8, 16, 240),
    Shape(32, 1, 32, 240),
    Shape(64, 1, 16, 240),
    Shape(48, 4, 32, 240),
    Shape(96, 1, 8, 96),
    Shape(64, 2, 32, 64),
)
PLANNED_SHAPES = (
    Shape(1, 1, 1, 512),
    Shape(2, 1, 2, 512),
    Shape(4, 1, 4, 512),
    Shape(12, 1, 4, 256),
    Shape(16, 1, 16, 512),
    Shape(32, 1, 8, 256),
    Shape(48, 1, 16, 512),
)


@dataclasses.dataclass(frozen=True)
class Args:
    """What to predict.

    Args:
      subject: directory of a run of train.grpo, or a preset of benchmarks/presets.py.
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


@dataclasses.dataclass
class SimulatedState:
    """Rows of the simulated engine; int `[rows]` each. `end`: where a row will end."""

    cache_length: int
    sequence_id: np.ndarray
    length: np.ndarray
    limit: np.ndarray
    end: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """Nothing, of the shape that tokens have."""
        shape = (len(self.length), self.cache_length)
        return np.broadcast_to(np.int32(0), shape)

    @property
    def live(self) -> np.ndarray:
        """Which rows generate."""
        return self.length < self.end


@dataclasses.dataclass(frozen=True)
class SimulatedWindow:
    """A window that is over."""

    info: WindowInfo
    text: tuple[np.ndarray, np.ndarray]
    seconds: float

    def wait(self) -> tuple[WindowInfo, float, bool]:
        """Return what a real window does."""
        return self.info, self.seconds, True


class SimulatedEngine:
    """What the scheduler asks of an engine, on lengths and costs instead of a device.

    All programs are compiled. `seconds` is the time of everything so far.

    Args:
      costs: of rounds. admission_s: seconds of prefilling so many chunks.
      lengths: tokens of each sequence's completion, by its id.
      keep_probs: chance of the draft at each depth. rounds_per_test: of the engine.
    """

    compile_s = 0.0

    def __init__(
        self,
        costs: LatencyTable,
        admission_s: Callable[[int], float],
        lengths: Mapping[int, int],
        keep_probs: np.ndarray,
        rounds_per_test: int,
    ) -> None:
        self._costs, self._admission_s = costs, admission_s
        self._lengths, self._keep_probs = lengths, keep_probs
        self.rounds_per_test = rounds_per_test
        self._random = np.random.default_rng(0)
        self.seconds = 0.0

    def allocate(self, rows: int, cache_length: int) -> SimulatedState:
        """Return a state of empty slots."""
        zeros = np.zeros((4, rows), int)
        return SimulatedState(cache_length, *zeros)

    def admit(
        self, params: PolicyParams, state: SimulatedState, plan: Admission
    ) -> SimulatedState:
        """Start sequences in free slots."""
        for slot, prompt, sequence, limit in zip(
            plan.slot, plan.prompt, plan.sequence_id, plan.limit, strict=True
        ):
            if slot < len(state.length):
                state.sequence_id[slot], state.limit[slot] = sequence, limit
                state.length[slot] = plan.length[prompt]
                state.end[slot] = plan.length[prompt] + self._lengths[int(sequence)]
        self.seconds += self._admission_s(int(plan.num_chunks))
        return state

    def has_take(self, old: tuple[int, int], new: tuple[int, int]) -> bool:
        """Whether a state of a size can be given another without compiling anything."""
        return True

    def take(
        self, state: SimulatedState, rows: np.ndarray, length: int
    ) -> SimulatedState:
        """Move rows (`NONE` for an empty one) to a state of another size."""
        columns = (state.sequence_id, state.length, state.limit, state.end)
        moved = [np.where(rows >= 0, column[rows], 0) for column in columns]
        return SimulatedState(length, *moved)

    def draft_kind(self, draft: Any) -> str:
        """Return a name for all drafts."""
        return "draft"

    def meet(
        self, values: Any, failure: Exception | None = None
    ) -> tuple[np.ndarray, Exception | None]:
        """Return what there is in the only process."""
        return np.asarray(values), failure

    def has_window(self, program: Program, draft_kind: str, num_stop_ids: int) -> bool:
        """Whether this window is compiled."""
        return True

    def expected_compile_s(self, kind: str) -> float:
        """Return the seconds one more program should take to compile."""
        return 0.0

    def start_window(
        self,
        params: PolicyParams,
        state: SimulatedState,
        settings: Any,
        gamma: int,
        *,
        exit_live: int,
        max_rounds: int,
        draft_kind: str,
    ) -> tuple[SimulatedState, SimulatedWindow]:
        """Run rounds until the conditions of a real window end it."""
        program = Program(len(state.length), state.cache_length, gamma)
        reach = self.rounds_per_test * (gamma + 1)
        accepted, emitted = np.zeros((2, gamma + 1), int)
        num_rounds = 0
        while state.live.sum() > exit_live and num_rounds < max_rounds:
            needed = np.minimum(state.length + reach, state.limit)[state.live]
            if needed.max() > state.cache_length:
                break
            for _ in range(self.rounds_per_test):
                live = np.flatnonzero(state.live)
                draws = self._random.random((len(live), gamma))
                is_kept = draws < self._keep_probs[:gamma]
                kept = np.logical_and.accumulate(is_kept, axis=1).sum(axis=1)
                gained = np.minimum(kept + 1, (state.end - state.length)[live])
                state.length[live] += gained
                accepted += np.bincount(kept, minlength=gamma + 1)
                emitted += np.bincount(gained - 1, minlength=gamma + 1)
            num_rounds += self.rounds_per_test
        seconds = num_rounds * (self._costs.round_seconds(program) or 0.0)
        self.seconds += seconds
        info = WindowInfo(
            live=state.live,
            length=state.length.copy(),
            finish_reason=np.full(len(state.length), Finish.STOP),
            num_rounds=np.int32(num_rounds),
            accepted=accepted,
            emitted=emitted,
        )
        return state, SimulatedWindow(info, (state.tokens, state.tokens), seconds)


@dataclasses.dataclass(frozen=True)
class Subject:
    """The policy that is predicted, and what was learnt of it beforehand.

    prompts: of a trained policy; None where they are planned. survey: of its costs.
    keep_probs: by depth, from a rollout that always drafted.
    """

    policy: Policy
    params: PolicyParams
    prompts: Sequence[Sequence[int]] | None
    stop_id: int
    dtype: str
    shapes: tuple[Shape, ...]
    engine: Engine
    survey: survey.Survey
    keep_probs: np.ndarray
    gammas: tuple[int, ...]

    @functools.cached_property
    def costs(self) -> LatencyTable:
        """What the survey says."""
        return LatencyTable(passes=self.survey.costs)

    def controller(self, control: str) -> Controller:
        """Return a controller that knows what the survey does, and compiles at once."""
        controller = Controller(control, self.gammas, patience=0)
        controller.table.passes = self.costs.passes
        return controller

    def config(self, shape: Shape, control: str) -> RolloutConfig:
        """Return how to sample rollouts of a shape."""
        return RolloutConfig(
            max_new_tokens=shape.max_new_tokens,
            n=shape.n,
            stop_token_ids=(self.stop_id,),
            max_slots=shape.slots,
            gammas=self.gammas,
            control=control,
        )

    def prompts_of(self, shape: Shape) -> list[Sequence[int]]:
        """Return the prompts of rollouts of a shape."""
        if self.prompts is None:
            lengths = workloads.tail_lengths(shape.num_prompts, shape.max_new_tokens)
            vocab_size = self.policy.vocab_size
            return list(workloads.planned_prompts(lengths.tolist(), vocab_size))
        return list(itertools.islice(itertools.cycle(self.prompts), shape.num_prompts))

    def run(
        self, shape: Shape, control: str, controller: Controller
    ) -> tuple[er_jax.Rollout, float]:
        """Return a rollout and its seconds, compilation not counted."""
        start = time.perf_counter()
        out = er_jax.rollout(
            self.policy,
            self.params,
            self.prompts_of(shape),
            key=jax.random.key(3),
            config=self.config(shape, control),
            controller=controller,
        )
        seconds = time.perf_counter() - start
        return out, seconds - out.stats.seconds["compile"]


def load(name: str) -> dict[str, Any]:
    """Return the fields of `Subject` that a trained policy or a preset brings."""
    if name in presets.PRESETS:
        inner = presets.decoder(name)
        return {
            "policy": workloads.PlannedLengths(policy=inner, stop_id=0),
            "params": presets.random_params(inner),
            "prompts": None,
            "stop_id": 0,
            "dtype": inner.config.dtype,
            "shapes": PLANNED_SHAPES,
        }
    policy, params, tokenizer = checkpoints.load_policy(Path(name))
    problems = tasks.read_jsonl(Path(name) / "data" / "eval.jsonl", tokenizer)
    return {
        "policy": policy,
        "params": params,
        "prompts": [tokenizer.encode_prompt(problem.prompt) for problem in problems],
        "stop_id": tasks.EOS,
        "dtype": policy.config.dtype,
        "shapes": SHAPES,
    }


def prepare(args: Args) -> Subject:
    """Load the policy, survey its costs and observe its acceptance."""
    loaded = load(args.subject)
    engine = kept.engine_for(loaded["policy"], loaded["params"], "coupled")
    pair = engine.attach_draft(loaded.pop("params"), er_jax.DrafterConfig())
    found = survey.survey_engine(
        engine,
        pair,
        args.rows,
        args.lengths,
        args.gammas,
        budget_s=args.budget,
        progress=True,
    )
    longest = max(args.gammas)
    subject = Subject(
        params=pair,
        engine=engine,
        survey=found,
        keep_probs=np.ones(longest),
        gammas=tuple(sorted(args.gammas)),
        **loaded,
    )
    # The largest batch of the shapes that are not refilled says how drafts are kept.
    shape = max(subject.shapes, key=lambda s: (s.num_prompts * s.n <= s.slots, s.slots))
    drafting = Controller(f"fixed:{longest}", patience=0)
    subject.run(shape, drafting.control, drafting)
    keep_probs = drafting.acceptance.keep_probs(longest)
    return dataclasses.replace(subject, keep_probs=keep_probs)


def measure_cells(subject: Subject, args: Args) -> list[dict[str, Any]]:
    """Return, per cell, the speeds of all draft lengths and the predicted best.

    Drops the programs of the subject's engine.
    """
    kept.forget_engines()
    subject.engine.compiled.clear()
    controller = subject.controller("best")
    tokens = {
        gamma: er_jax.acceptance.expected_tokens(list(subject.keep_probs[:gamma]))
        for gamma in subject.gammas
    }
    # The controller is to know the same of acceptance.
    estimate = controller.acceptance
    estimate.tested[:] = 1e9
    estimate.kept[:] = 1e9 * subject.keep_probs
    found = []
    cells = list(itertools.product(args.rows, args.lengths))
    for rows, length in tqdm(cells, desc="cells", unit="cell"):
        options = [Program(rows, length, gamma) for gamma in reversed(subject.gammas)]
        chosen = controller.choose(options, None, compile_s=lambda program: 0.0)
        # An engine for each cell: on CPU a process holds no hundreds of programs.
        engine = Engine(subject.policy, "coupled")
        cases = {
            str(program.gamma): functools.partial(
                timing.measure_round, engine, subject.params, program
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
    """Return seconds by number of chunks prefilled, from filling all slots."""
    readings = []
    for _ in range(6):
        batch = Batch(
            subject.engine,
            subject.params,
            dataclasses.replace(
                request,
                prompt_of=request.prompt_of[: request.slots],
                sequence_ids=request.sequence_ids[: request.slots],
            ),
            RolloutStats(),
            neutral_sampling(),
        )
        start = time.perf_counter()
        batch.refill()
        readings.append(time.perf_counter() - start)
        num_chunks = -(-batch.stats.num_prefilled // request.chunk)
    # The first may compile.
    return lambda chunks: chunks * float(np.median(readings[1:])) / num_chunks


def predict(
    subject: Subject, shape: Shape, control: str, out: er_jax.Rollout
) -> tuple[float, int]:
    """Return seconds and windows of a rollout whose completions have these lengths."""
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
    # The second time, acceptance is known, as it was when the real one was timed.
    for _ in range(2):
        simulated.seconds = 0.0
        stats = simulate(simulated, request, controller)
    return simulated.seconds, len(stats.timeline)


def simulate(
    simulated: SimulatedEngine, request: Request, controller: Controller
) -> RolloutStats:
    """Run a request on a simulated engine; return the scheduler's own record."""
    controller.start_rollout()
    stats = RolloutStats()
    run_schedule(
        simulated,  # type: ignore[arg-type]
        PolicyParams(policy=None, draft=None),
        request,
        neutral_sampling(),
        controller,
        stats,
    )
    return stats


def time_beside(subject: Subject, slots: int) -> tuple[float, float]:
    """Return what a rollout, and each of its windows, take beside rounds and prefills.

    From completions of a single token: of one prompt, as many as there are slots, and
    of nine prompts. A window's part is more than the host's: after a prefill weights
    and cache come from farther away.
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


Table = tuple[Sequence[str], list[tuple[Any, ...]]]


def cell_rows(point: Mapping[str, Any]) -> Table:
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


def rollout_rows(point: Mapping[str, Any]) -> Table:
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
            100 * (r["seconds"]["q3"] - r["seconds"]["q1"]) / r["seconds"]["median"],
            100 * r["error"],
        )
        for r in point["rollouts"]
    ]
    header = (
        "completions",
        "slots",
        "limit",
        "control",
        "tokens",
        "predicted s",
        "measured s",
        "IQR %",
        "error %",
    )
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
    out = measure.results_dir(args.out, args.quick)
    name = Path(args.subject).name
    settings = {"subject": name, "gammas": args.gammas, "budget": args.budget}
    record = measure.new_record("predicted", settings)
    subject = prepare(args)
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
    for header, rows in (cell_rows(point), rollout_rows(point)):
        print(text_table(rows, header))
    print(summary(point))
    measure.save(out / f"predicted_{name}.json", record)
    print(f"written: predicted_{name}.json in {out.name}", file=sys.stderr)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.predicted"))
