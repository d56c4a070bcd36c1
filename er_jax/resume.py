"""Going on from an earlier rollout: what it holds, and whether it is of this request.

A completion is a function of (params, prompt, key, sequence id), so its tokens so far
are all that is needed to go on: they are prefilled behind its prompt, and the noise of
a position does not depend on where sampling began.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence

import jax
import numpy as np

from er_jax.config import RolloutConfig
from er_jax.result import Completion, Rollout
from er_jax.types import FINISH_NAMES, Finish

STOP, LENGTH, UNFINISHED = (
    FINISH_NAMES[reason] for reason in (Finish.STOP, Finish.LENGTH, Finish.UNFINISHED)
)


def earlier_rollout(
    resume: Rollout | str | os.PathLike[str],
    prompts: Sequence[np.ndarray],
    sequence_ids: np.ndarray,
    config: RolloutConfig,
    vocab_size: int,
) -> Rollout:
    """Return the rollout to go on from, checked.

    Args:
      resume: a rollout, or a file that `Rollout.save` wrote.
      prompts, sequence_ids, config: of the request; they must be those of the rollout.
      vocab_size: of the policy.
    Raises:
      ValueError: it is of another request; the message names the first difference.
    """
    if isinstance(resume, Rollout):
        found = resume
    elif isinstance(resume, str | os.PathLike):
        found = Rollout.load(resume)
    else:
        raise ValueError(
            f"resume={type(resume).__name__} must be a Rollout, or the path of a file "
            "that Rollout.save wrote"
        )
    # Its arrays may be on a device, after `jax.device_put` or `jax.jit`.
    found = jax.tree.map(np.asarray, found)
    remedy = "give the rollout of the same prompts, n and sequence_ids"
    count = len(found.sequence_ids)
    if count != len(sequence_ids):
        raise ValueError(
            f"resume holds {count} completions, and the request has "
            f"{len(sequence_ids)}; {remedy}"
        )
    different = np.flatnonzero(found.sequence_ids != sequence_ids)
    if len(different):
        row = int(different[0])
        raise ValueError(
            f"resume has sequence id {found.sequence_ids[row]} in row {row}, and the "
            f"request {sequence_ids[row]}; {remedy}"
        )
    for row in range(count):
        known = found.prompt_ids[row][found.prompt_mask[row]]
        if not np.array_equal(known, prompts[row // config.n]):
            raise ValueError(
                f"resume has another prompt than the request in row {row}; {remedy}"
            )
    limits = config.of_sequences("max_new_tokens", len(prompts))
    if (found.lengths > limits).any():
        row = int(np.argmax(found.lengths - limits))
        raise ValueError(
            f"max_new_tokens={limits[row]} counts all tokens of a completion, and "
            f"resume holds one of {found.lengths[row]}; raise it"
        )
    is_token = np.arange(found.completion_ids.shape[1]) < found.lengths[:, None]
    ids = found.completion_ids[is_token]
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= vocab_size:
        raise ValueError(
            f"resume holds token ids outside 0 .. {vocab_size - 1}: it is of another "
            "policy"
        )
    return found


def completions_of(
    earlier: Rollout, config: RolloutConfig, over: Collection[int] = ()
) -> tuple[dict[int, Completion], dict[int, Completion]]:
    """Return the completions that have ended, and those that have begun.

    One that ended by length, at a limit below the one of now, goes on.

    Args:
      earlier: from `earlier_rollout`. config: of the request.
      over: rows that have ended for this very request, whatever their reason.
    Returns:
      Two mappings from sequence (0 .. N-1) to completion.
    """
    ended: dict[int, Completion] = {}
    begun: dict[int, Completion] = {}
    limits = config.of_sequences(
        "max_new_tokens", len(earlier.sequence_ids) // config.n
    )
    for row, reason in enumerate(earlier.finish_reason.tolist()):
        length = int(earlier.lengths[row])
        is_open = reason in (LENGTH, UNFINISHED) and row not in over
        goes_on = is_open and length < limits[row]
        completion = Completion(
            token_ids=earlier.completion_ids[row, :length].copy(),
            logprobs=earlier.logprobs[row, :length].copy(),
            finish_reason=UNFINISHED if goes_on else reason,
            mask=earlier.completion_mask[row, :length].copy(),
        )
        if completion.finish_reason == UNFINISHED and not goes_on:
            # It ends as it would have under the limit of now.
            reason = turn_end(completion, config, row, None) or LENGTH
            completion = dataclasses.replace(completion, finish_reason=reason)
        if not goes_on:
            ended[row] = completion
        elif length:
            begun[row] = completion
    return ended, begun


def turn_of(completion: Completion) -> int:
    """Return the index of a completion's token that begins its last turn.

    Behind what was appended last, whether or not a token of the turn is there already.
    """
    return int(np.max(np.flatnonzero(~completion.mask), initial=-1)) + 1


def turn_end(
    completion: Completion, config: RolloutConfig, row: int, turn_tokens: int | None
) -> str | None:
    """Return why the last turn of an unfinished completion has ended, if it has.

    A rollout that ended while a turn waited for its answer holds such completions.

    Args:
      completion: so far. config: of the request. row: of the completion.
      turn_tokens: the limit of a turn; None is no limit.
    Returns:
      "stop", "length", or None for a turn that goes on.
    """
    text = completion.token_ids[turn_of(completion) :].tolist()
    if not text:
        return None
    least = config.min_new_tokens
    if isinstance(least, tuple):
        least = least[row // config.n]
    is_stop = text[-1] in config.stop_ids or any(
        len(text) > least and text[-len(sequence) :] == list(sequence)
        for sequence in config.stop_sequences
    )
    if is_stop:
        return STOP
    return LENGTH if turn_tokens is not None and len(text) >= turn_tokens else None
