"""The policy and the prompts of a run of `train.grpo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import er_jax
from train import checkpoints, tasks

STOP_ID = tasks.EOS


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A policy with the prompts of its run's held-out problems, as token ids.

    Its completions end with `STOP_ID`.
    """

    policy: er_jax.Decoder
    params: Any
    prompts: list[list[int]]


def load_run(directory: Path, *, step: int | None = None) -> TrainedRun:
    """Load the policy of a run.

    Args:
      directory: as given to `python -m train.grpo --out`.
      step: 0 is the policy after its warm-up; None the latest checkpoint.
    Raises:
      FileNotFoundError: no such checkpoint.
    """
    policy, params, tokenizer = checkpoints.load_policy(directory, step=step)
    problems = tasks.read_jsonl(directory / "data" / "eval.jsonl", tokenizer)
    prompts = [tokenizer.encode_prompt(problem.prompt) for problem in problems]
    return TrainedRun(policy, params, prompts)
