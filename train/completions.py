"""A step's completions: scoring them, and choosing those that an update learns from.

Left out: sampling, which is `trainer`'s, and learning, which is `update`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

import er_jax
from train import rewards
from train.batching import Example
from train.placement import agreed, is_first
from train.subjects import Subject
from train.tasks import Problem

# Characters of a prompt or a completion that an error message quotes.
MOST_SHOWN = 200


@dataclasses.dataclass(frozen=True)
class StepData:
    """What one step sampled.

    Attributes:
      problems: P of them.
      out: the rollout of N = P * n completions, those of one problem in a row.
      rewards: `[P, n]` float64.
      seconds: taken by sampling and scoring.
      carried: with partial rollouts, the completions that the next step goes on with;
        else None.
    """

    problems: Sequence[Problem]
    out: er_jax.Rollout
    rewards: np.ndarray
    seconds: float
    carried: er_jax.Rollout | None = None


def score(
    subject: Subject, problems: Sequence[Problem], out: er_jax.Rollout
) -> np.ndarray:
    """Score every completion, and return the same rewards in every process.

    Only the first process calls the reward, because a user's reward may give another
    number at every call.

    Args:
      subject: has the tokenizer and the reward. problems: P of them.
      out: of N = P * n completions.
    Returns:
      `[P, n]` float64.
    Raises:
      ValueError: the reward failed or gave no finite number; in every process.
    """
    scores, failure = np.zeros(len(out.lengths)), None
    if is_first():
        try:
            scores = _scores(subject, problems, out)
        except ValueError as error:
            failure = error
    # One more number says whether scoring failed: the other processes wait for the
    # scores and have to end as well.
    told = agreed(np.append(scores, failure is not None))
    if told[-1]:
        raise failure or ValueError("the first process could not score; see there")
    return told[:-1].reshape(len(problems), -1)


def _scores(
    subject: Subject, problems: Sequence[Problem], out: er_jax.Rollout
) -> np.ndarray:
    """Return `[N]` rewards; ValueError naming the first completion without one."""
    scores = np.zeros(len(out.lengths))
    n = len(scores) // len(problems)
    for row, length in enumerate(out.lengths):
        ids, reason = out.completion_ids[row, :length], str(out.finish_reason[row])
        scores[row] = _score(subject, problems, row, n, ids, reason)
    return scores


def _score(
    subject: Subject,
    problems: Sequence[Problem],
    row: int,
    n: int,
    token_ids: np.ndarray,
    finish_reason: str,
) -> float:
    """Return the reward of one completion; ValueError naming it if it has none."""
    problem = problems[row // n]
    text = subject.tokenizer.decode(token_ids)
    finished = finish_reason == "stop"
    try:
        return rewards.score(subject.reward, text, problem.answer, finished=finished)
    except ValueError as error:
        raise ValueError(
            f"{error}; completion {row % n + 1} of {n}, {text[:MOST_SHOWN]!r}, "
            f"of the problem {problem.prompt[:MOST_SHOWN]!r}"
        ) from error


def score_stream(
    subject: Subject,
    problems: Sequence[Problem],
    items: er_jax.Stream[tuple[int, er_jax.Completion]],
    *,
    n: int,
    first_sequence_id: int,
) -> tuple[er_jax.Rollout, np.ndarray]:
    """Score completions as they finish, while the others decode.

    Args:
      subject: has the tokenizer and the reward. problems: P of them.
      items: the stream of their completions, n each; closed at the end.
      first_sequence_id: that of the first completion; the others follow.
    Returns:
      The rollout, and rewards `[P, n]` float64: those of `score`.
    Raises:
      ValueError: the reward failed or gave no finite number.
    """
    scores = np.zeros(len(problems) * n)
    with items:
        for sequence_id, found in items:
            row = sequence_id - first_sequence_id
            scores[row] = _score(
                subject, problems, row, n, found.token_ids, found.finish_reason
            )
    return items.rollout, scores.reshape(-1, n)


def examples_of(
    out: er_jax.Rollout,
    prompts: Sequence[Sequence[int]],
    advantages: np.ndarray,
    *,
    keep_equal_groups: bool,
    step: int | None = None,
) -> list[Example]:
    """Return the completions that an update has something to learn from.

    Args:
      out: the rollout, N = P * n completions. prompts: token ids of P prompts.
      advantages: `[P, n]` float32. step: whose parameters sampled last, if earlier ones
        sampled a part; then `out.version` says which.
      keep_equal_groups: whether a completion with advantage 0 is kept. A KL term gives
        it a gradient; without one it has none, and leaving it out saves its pass.
    """
    n = advantages.shape[1]
    return [
        Example(
            prompt=prompts[row // n],
            completion=out.completion_ids[row, :length],
            behavior_logprobs=out.logprobs[row, :length],
            advantage=float(advantages.flat[row]),
            fresh=None if step is None else out.version[row, :length] == step,
            sampled=out.completion_mask[row, :length],
        )
        for row, length in enumerate(out.lengths)
        # A completion is empty when its first logits were not finite.
        if length > 0 and (keep_equal_groups or advantages.flat[row] != 0)
    ]
