"""Partial rollouts: a step ends when enough groups are complete, the others go on.

Q groups are in work at once: those that earlier steps have begun, and new ones. When P
of them are complete the rollout ends, and the step learns from the P oldest that are.
The Q - P others are carried to the next step, whose parameters go on from their tokens.

What is carried is a `Rollout`. It says which groups it holds (by their sequence ids),
which step's parameters sampled each token (`version`), and with which log-probability.
The loss divides by that one, so the ratio of a token is that of the parameters of now
to those that sampled it.

Left out: sampling and learning, which are `trainer`'s.

Sources: Kimi Team 2025 (arXiv 2501.12599) for partial rollouts; Zhou et al. 2025 (arXiv
2509.18521) for more prompts at once than a step learns from.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

import er_jax
from er_jax.types import Finish
from train.config import GRPOConfig


def positions_of(out: er_jax.Rollout, n: int) -> list[int]:
    """Return the place of every group in the data stream.

    Args:
      out: a rollout whose sequence ids are place * n + number in the group.
      n: completions of a group.
    """
    return (out.sequence_ids[::n] // n).tolist()


def complete_groups(out: er_jax.Rollout, n: int) -> np.ndarray:
    """Return `[groups]`, whether all n completions of a group have ended."""
    return (out.finish != Finish.UNFINISHED).reshape(-1, n).all(axis=1)


def groups_in(out: er_jax.Rollout, groups: np.ndarray, n: int) -> er_jax.Rollout:
    """Return some groups of a rollout, with the statistics of the whole.

    Args:
      out: the rollout. groups: int `[...]`, their numbers. n: completions of a group.
    """
    rows = (groups[:, None] * n + np.arange(n)).ravel()
    return dataclasses.replace(
        jax.tree.map(lambda array: array[rows], out), stats=out.stats
    )


def divided(
    out: er_jax.Rollout, grpo: GRPOConfig
) -> tuple[np.ndarray, er_jax.Rollout, er_jax.Rollout]:
    """Divide a step's rollout into what is learnt from and what is carried.

    Args:
      out: of Q groups, the oldest first, of which at least P are complete.
      grpo: has P and n.
    Returns:
      The numbers of the P groups that are learnt from; these groups; the others.
    """
    complete = np.flatnonzero(complete_groups(out, grpo.group_size))
    learnt = complete[: grpo.prompts_per_step]
    others = np.setdiff1d(np.arange(grpo.prompts_in_work), learnt)
    return (
        learnt,
        groups_in(out, learnt, grpo.group_size),
        groups_in(out, others, grpo.group_size),
    )


class Ending:
    """Decides when the rollout of a step ends.

    It ends when P groups are complete. Groups that would be too old in the next step
    must be among them: then it is told of completions, by `on_finish`, and stops the
    rollout, which ends a window later than by a count.

    Args:
      carried: what goes on; None if nothing does.
      step: the step whose parameters sample now.
      grpo: P, n and the greatest age.
    """

    def __init__(
        self, carried: er_jax.Rollout | None, step: int, grpo: GRPOConfig
    ) -> None:
        self._stop, self._n = er_jax.Stop(), grpo.group_size
        self._wanted = grpo.prompts_per_step
        self._num_complete = 0
        # Completions that a group lacks, and the groups to wait for, by place.
        self._lacks: dict[int, int] = {}
        self._awaited: set[int] = set()
        if carried is not None:
            oldest = ages(carried, step).max(axis=1).reshape(-1, self._n).max(axis=1)
            is_open = (carried.finish == Finish.UNFINISHED).reshape(-1, self._n)
            for place, age, lacking in zip(
                positions_of(carried, self._n), oldest, is_open.sum(axis=1), strict=True
            ):
                self._lacks[place] = int(lacking)
                self._num_complete += not lacking
                if lacking and age >= grpo.partial.max_age:
                    self._awaited.add(place)

    @property
    def arguments(self) -> dict[str, Any]:
        """`until`, and `on_finish` if needed, for `er_jax.rollout`."""
        if not self._awaited:
            return {"until": er_jax.Until(groups=self._wanted)}
        return {"until": er_jax.Until(stop=self._stop), "on_finish": self._finished}

    def _finished(self, sequence_id: int, completion: er_jax.Completion) -> None:
        place = sequence_id // self._n
        self._lacks[place] = self._lacks.get(place, self._n) - 1
        if not self._lacks[place]:
            self._num_complete += 1
            self._awaited.discard(place)
        if self._num_complete >= self._wanted and not self._awaited:
            self._stop()


def ages(out: er_jax.Rollout, step: int) -> np.ndarray:
    """Return `[N, C]`, steps since each token was sampled; 0 where masked."""
    return np.where(out.completion_mask, step - out.version, 0)


def record_of(
    out: er_jax.Rollout, carried: er_jax.Rollout, step: int
) -> dict[str, float | int]:
    """Return what is logged of a step's partial rollout.

    Args:
      out: what the step learnt from. carried: what the next one goes on with.
      step: the step whose parameters sampled last.
    Returns:
      "mean_age" and "max_age", in steps, of the tokens learnt from; "old_tokens", the
      share of them that earlier parameters sampled; "carried_tokens", of completions
      that go on.
    """
    age = ages(out, step)[out.completion_mask]
    return {
        "mean_age": float(age.mean()) if age.size else 0.0,
        "max_age": int(age.max(initial=0)),
        "old_tokens": float((age > 0).mean()) if age.size else 0.0,
        "carried_tokens": int(carried.lengths.sum()),
    }
