"""A policy whose rollouts are predicted, with all that is known of it beforehand."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import er_jax
from benchmarks.lib import presets, trained, workloads
from er_jax import Controller, PolicyParams, RolloutConfig
from er_jax.costs.table import LatencyTable
from er_jax.engine.engine import Engine
from er_jax.engine.kept import engine_for
from er_jax.tools.survey import Survey, survey_engine
from er_jax.types import Policy


@dataclasses.dataclass(frozen=True)
class Shape:
    """One kind of rollout: prompts, completions of each, slots, limit in tokens."""

    num_prompts: int
    n: int
    slots: int
    max_new_tokens: int


# Of a trained policy, which has lengths of its own.
TRAINED_SHAPES = (
    Shape(1, 1, 1, 240),
    Shape(4, 1, 4, 240),
    Shape(2, 8, 16, 240),
    Shape(32, 1, 32, 240),
    Shape(64, 1, 16, 240),
    Shape(48, 4, 32, 240),
    Shape(96, 1, 8, 96),
    Shape(64, 2, 32, 64),
)
# Of a preset, whose lengths are planned.
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
class Subject:
    """The policy that is predicted, and what is known of it beforehand.

    prompts: of a trained policy; None where lengths are planned. shapes: of the
      rollouts. survey: of its costs. keep_probs: chance that a draft is kept, by depth,
      from a rollout that always drafted.
    """

    policy: Policy
    params: PolicyParams
    prompts: Sequence[Sequence[int]] | None
    stop_id: int
    dtype: str
    shapes: tuple[Shape, ...]
    engine: Engine
    survey: Survey
    keep_probs: np.ndarray
    gammas: tuple[int, ...]

    @functools.cached_property
    def costs(self) -> LatencyTable:
        """The costs that the survey has found."""
        return LatencyTable(passes=self.survey.costs)

    def controller(self, control: str) -> Controller:
        """Return a controller that knows the survey's costs, and compiles at once."""
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


def _load(name: str) -> dict[str, Any]:
    """Return the fields of `Subject` that a trained policy or a preset has."""
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
    run = trained.load_run(Path(name))
    return {
        "policy": run.policy,
        "params": run.params,
        "prompts": run.prompts,
        "stop_id": trained.STOP_ID,
        "dtype": run.policy.config.dtype,
        "shapes": TRAINED_SHAPES,
    }


def prepare(
    name: str,
    rows: Sequence[int],
    lengths: Sequence[int],
    gammas: Sequence[int],
    budget_s: float,
) -> Subject:
    """Load a policy, survey its costs and measure its acceptance.

    Args:
      name: directory of a run of `train.grpo`, or a preset. rows, lengths, gammas,
      budget_s: of the survey.
    """
    loaded = _load(name)
    engine = engine_for(loaded["policy"], loaded["params"], "coupled")
    pair = engine.attach_draft(loaded.pop("params"), er_jax.DrafterConfig())
    survey = survey_engine(
        engine, pair, rows, lengths, gammas, budget_s=budget_s, progress=True
    )
    longest = max(gammas)
    subject = Subject(
        params=pair,
        engine=engine,
        survey=survey,
        keep_probs=np.ones(longest),
        gammas=tuple(sorted(gammas)),
        **loaded,
    )
    # Acceptance is measured on the largest batch among the shapes without refill.
    shape = max(subject.shapes, key=lambda s: (s.num_prompts * s.n <= s.slots, s.slots))
    drafting = Controller(f"fixed:{longest}", patience=0)
    subject.run(shape, drafting.control, drafting)
    keep_probs = drafting.acceptance.keep_probs(longest)
    return dataclasses.replace(subject, keep_probs=keep_probs)
