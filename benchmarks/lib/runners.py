"""A task run again and again, and timed: under one control, or as static batches."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import er_jax
from benchmarks.lib import agreement, measure, static_batch
from benchmarks.lib.tasks import Task
from er_jax import Controller, Rollout, RolloutConfig

# A warm-up ends when this many rollouts in a row compile nothing.
CLEAN_RUNS = 3
MAX_WARM_UPS = 25

# Of controllers. Below the library's default of 1, so that they compile within a short
# warm-up what a long training run would.
PATIENCE = 0.1


def controls_of(gammas: Sequence[int]) -> tuple[str, ...]:
    """Return the controls that are compared, for these draft lengths."""
    return ("ar", *(f"fixed:{gamma}" for gamma in gammas), "best")


def entry_of(
    control: str, seconds: Mapping[str, Sequence[float]], num_tokens: int
) -> dict[str, Any]:
    """Return a control's entry in a record: its seconds, and its speed beside `ar`.

    Args:
      seconds: by control, readings in the order of repeats; some may have fewer.
      num_tokens: of each reading.
    """
    own, plain = seconds[control], seconds["ar"]
    num = min(len(own), len(plain))
    return {
        "control": control,
        "seconds": measure.spread(own),
        "tokens_per_s": num_tokens / float(np.median(own)),
        "speedup_over_ar": measure.paired_ratio(plain[:num], own[:num]),
    }


class Runner:
    """One control on one task: keeps its controller, and the results of its runs.

    Args:
      task: what to run. control: as of `RolloutConfig`.
      gammas: draft lengths that `best` may choose from, beside 0.
      patience: of the controller.
    """

    def __init__(
        self,
        task: Task,
        control: str,
        *,
        gammas: Sequence[int],
        patience: float = PATIENCE,
    ) -> None:
        self.task, self.control = task, control
        self.config = RolloutConfig(
            max_new_tokens=task.max_new_tokens,
            max_slots=task.slots,
            stop_token_ids=task.stop_ids,
            gammas=(0, *gammas),
            control=control,
        )
        self.controller = Controller(control, (0, *gammas), patience=patience)
        self.outs: list[Rollout] = []
        self.compile_s = 0.0
        self.num_programs = 0
        self.num_warm_ups = 0

    def sample(self, **options: Any) -> Rollout:
        """Return a rollout of the task.

        Args:
          options: further arguments of `er_jax.rollout`.
        """
        return er_jax.rollout(
            self.task.policy,
            self.task.params,
            self.task.prompts,
            key=self.task.key,
            config=self.config,
            controller=self.controller,
            **options,
        )

    def run(self, profile: Path | None = None) -> float:
        """Run the task and return its seconds, compilation not counted."""
        start = time.perf_counter()
        out = self.sample(profile=profile)
        seconds = time.perf_counter() - start
        compile_s = out.stats.seconds["compile"]
        self.compile_s += compile_s
        self.num_programs += len(out.stats.compiled)
        self.outs.append(out)
        return seconds - compile_s

    def warm_up(self, clean_runs: int = CLEAN_RUNS, budget_s: float = math.inf) -> None:
        """Run until nothing is compiled any more, and keep no result.

        Args:
          clean_runs: how many runs in a row must compile nothing.
          budget_s: no run is begun after so many seconds.
        """
        clean, end_s = 0, time.perf_counter() + budget_s
        label = f"{self.task.name}: warm-up of {self.control}"
        with tqdm(desc=label, unit="run") as bar:
            while clean < clean_runs and self.num_warm_ups < MAX_WARM_UPS:
                if time.perf_counter() >= end_s:
                    break
                self.run()
                self.num_warm_ups += 1
                clean = 0 if self.outs[-1].stats.compiled else clean + 1
                bar.set_postfix(programs=self.num_programs, refresh=False)
                bar.update()
        self.outs.clear()

    def completions(self) -> list[np.ndarray]:
        """Return the tokens of the last run."""
        return agreement.completions_of(self.outs[-1])

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
            "num_programs": self.num_programs,
            "compile_s": self.compile_s,
            "compiled_while_measured": sum(len(each.compiled) for each in stats),
        }


class StaticRunner:
    """The baseline without a scheduler on one task.

    Args:
      task: what to run.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.settings = agreement.sampling_settings(task.key, task.stop_ids)
        self.batch = static_batch.StaticBatch(
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

    def completions(self) -> list[np.ndarray]:
        """Return the tokens of the last run."""
        return self.last
