"""What a rollout returns, and what it raises with the completions finished by then."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from er_jax.config import RolloutConfig
from er_jax.engine.protocol import Agreement
from er_jax.request import Request
from er_jax.stats import RolloutStats
from er_jax.types import (
    FINISH_NAMES,
)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Completions of a request, N = len(prompts) * n in prompt order.

    The n completions of a prompt are adjacent. With T the longest prompt:

    prompt_ids: int32 `[N, T]`, left-padded. prompt_mask: bool `[N, T]`.
    completion_ids: int32 `[N, max_new_tokens]`, right-padded, the stop token included.
    completion_mask: bool `[N, max_new_tokens]`, true on sampled tokens.
    logprobs: float32 `[N, max_new_tokens]`, of the emitted token under the target model
      by the meaning in the config, 0 where masked.
    lengths: int32 `[N]`, sampled tokens.
    finish_reason: `[N]` words, "stop", "length" or "nonfinite".
    sequence_ids: int32 `[N]`, the names of the completions for the noise.
    stats: what the rollout did; see `RolloutStats`.
    """

    prompt_ids: np.ndarray
    prompt_mask: np.ndarray
    completion_ids: np.ndarray
    completion_mask: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    finish_reason: np.ndarray
    sequence_ids: np.ndarray
    stats: RolloutStats


def assemble(
    prompts: list[np.ndarray],
    completions: Mapping[int, Completion],
    sequence_ids: np.ndarray,
    config: RolloutConfig,
    stats: RolloutStats,
    agreement: Agreement,
) -> Rollout:
    """Lay the completions out; of several processes, each brings those it has."""
    count, width = len(sequence_ids), max(len(p) for p in prompts)
    prompt_ids = np.full((count, width), config.pad_id, np.int32)
    prompt_mask = np.zeros((count, width), bool)
    for row in range(count):
        prompt = prompts[row // config.n]
        prompt_ids[row, width - len(prompt) :] = prompt
        prompt_mask[row, width - len(prompt) :] = True
    completion_ids = np.zeros((count, config.max_new_tokens), np.int32)
    logprobs = np.zeros((count, config.max_new_tokens), np.float32)
    lengths, reasons = np.zeros((2, count), np.int32)
    for row, completion in completions.items():
        length = len(completion.token_ids)
        completion_ids[row, :length] = completion.token_ids
        logprobs[row, :length] = completion.logprobs
        lengths[row] = length
        reasons[row] = FINISH_NAMES.index(completion.finish_reason)
    # Every process holds zeros where another one has the completion.
    completion_ids, logprobs, lengths, reasons = map(
        agreement.sum, (completion_ids, logprobs, lengths, reasons)
    )
    completion_mask = np.arange(config.max_new_tokens)[None] < lengths[:, None]
    completion_ids = np.where(completion_mask, completion_ids, np.int32(config.pad_id))
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        logprobs=logprobs,
        lengths=lengths,
        finish_reason=np.array(FINISH_NAMES)[reasons],
        sequence_ids=sequence_ids.astype(np.int32),
        stats=stats,
    )


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished sequence.

    token_ids: int32 `[length]`, a stop token included. logprobs: float32 `[length]`.
    finish_reason: "stop", "length" or "nonfinite".
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str

    def copy(self) -> Completion:
        """Return the same with arrays of its own."""
        return dataclasses.replace(
            self, token_ids=self.token_ids.copy(), logprobs=self.logprobs.copy()
        )


class RolloutError(RuntimeError):
    """A rollout failed half-way; `completions` holds what had finished.

    completions: sequence id -> `Completion`. The cause is the original exception.
    request: whose completions they are, None of several replicas.
    """

    request: Request | None = None

    def __init__(self, message: str, completions: dict[int, Completion]) -> None:
        super().__init__(message)
        self.completions = completions


@contextlib.contextmanager
def keeping(
    completions: Callable[[], Mapping[int, Completion]], request: Request
) -> Iterator[None]:
    """Have whatever ends the block early carry the completions there are by then.

    A failure becomes a `RolloutError`, also one of another rollout that a callback
    made. What is no failure, as Ctrl-C or `sys.exit`, stays what it is and gets an
    attribute `completions`. Of two such blocks for one request the inner one counts.

    Args:
      completions: called then; sequence -> completion. request: names the sequences.
    """
    try:
        yield
    except BaseException as error:
        if getattr(error, "request", None) is request:
            raise
        done = {int(request.sequence_ids[s]): c for s, c in completions().items()}
        state = f"{len(done)} of {len(request.prompt_of)} completions"
        if isinstance(error, Exception):
            failure = RolloutError(
                f"the rollout failed after {state}, which this exception holds: "
                f"{error}",
                done,
            )
            failure.request = request
            raise failure from error
        error.completions = done  # type: ignore[attr-defined]
        error.request = request  # type: ignore[attr-defined]
        error.add_note(f"{state} had finished; `completions` holds them")
        raise
