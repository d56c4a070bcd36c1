"""One sampling request with its model and its draft, ready to run under any control."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.lib import agreement, presets, trained, workloads
from er_jax import Decoder, PolicyParams
from er_jax.types import Policy


@dataclasses.dataclass(frozen=True)
class Size:
    """How much to sample from a preset.

    num: completions of a workload. slots: rows decoded at once.
    max_new_tokens: limit of a completion.
    """

    num: int
    slots: int
    max_new_tokens: int


SIZES = {
    "tiny": Size(num=12, slots=4, max_new_tokens=32),
    "3M": Size(num=128, slots=32, max_new_tokens=512),
    "90M": Size(num=48, slots=16, max_new_tokens=512),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One request.

    name: for people. policy, params: the model and its draft. prompts: token ids.
    max_new_tokens, slots, stop_ids: as of `RolloutConfig`. dtype: of the model.
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

    def compared(
        self, expected: Sequence[np.ndarray], found: Sequence[np.ndarray]
    ) -> dict[str, Any]:
        """Return the fields of the `agreement.Agreement` of two runs' completions."""
        compared = agreement.compare(
            self.policy,
            self.params.policy,
            self.prompts,
            expected,
            found,
            agreement.sampling_settings(self.key, self.stop_ids),
            agreement.TIE_GAP[self.dtype],
        )
        return dataclasses.asdict(compared)


def planned_task(
    preset: str,
    lengths: Sequence[int],
    *,
    slots: int,
    max_new_tokens: int,
    draft: str = "int8",
    dtype: str = "float32",
) -> Task:
    """Return a task on a preset with random parameters; see `planned_task_of`.

    Args:
      preset: decoder. lengths, slots, max_new_tokens: of the request.
      draft: kind of draft. dtype: of weights, activations and cache.
    """
    policy = presets.decoder(preset, dtype=dtype)
    params = with_draft(presets.random_params(policy), draft)
    name = f"{preset}, {len(lengths)} prompts, {slots} slots"
    return planned_task_of(
        name, policy, params, lengths, slots=slots, max_new_tokens=max_new_tokens
    )


def planned_task_of(
    name: str,
    policy: Decoder,
    params: PolicyParams,
    lengths: Sequence[int],
    *,
    slots: int,
    max_new_tokens: int,
) -> Task:
    """Return a task on a decoder whose completions have these lengths.

    Args:
      name: for people. policy, params: the model and its draft.
      lengths: tokens of the completions. slots, max_new_tokens: of the request.
    """
    return Task(
        name=name,
        policy=workloads.PlannedLengths(policy=policy, stop_id=0),
        params=params,
        prompts=workloads.planned_prompts(lengths, policy.vocab_size),
        max_new_tokens=max_new_tokens,
        slots=slots,
        stop_ids=(0,),
        dtype=policy.config.dtype,
    )


def trained_task(
    directory: Path, *, num: int, slots: int, max_new_tokens: int, draft: str = "int8"
) -> Task:
    """Return a task on the policy of a run of `train.grpo`, with the run's own prompts.

    Args:
      directory: of the run. num: prompts; the run's are repeated if it has fewer.
      slots, max_new_tokens: of the request. draft: kind of draft.
    """
    run = trained.load_run(directory)
    repeated = (run.prompts * -(-num // len(run.prompts)))[:num]
    return Task(
        name=f"{directory.name}, {num} prompts, {slots} slots",
        policy=run.policy,
        params=with_draft(run.params, draft),
        prompts=repeated,
        max_new_tokens=max_new_tokens,
        slots=slots,
        stop_ids=(trained.STOP_ID,),
        dtype=run.policy.config.dtype,
    )


def with_draft(params: Any, draft: str) -> PolicyParams:
    """Return a decoder's parameters with their draft of this kind."""
    return PolicyParams(policy=params, draft=presets.drafts(params, (draft,))[draft])
