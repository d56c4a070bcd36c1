"""How likely drafts are used: per depth, forgetting, noticing a change.

Source: the expected tokens of a round, Leviathan et al. 2023 (arXiv 2211.17192),
equation 1, here with a chance per depth.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from er_jax.acceptance import expected_tokens
from er_jax.costs.record import checked_list, checked_real, checked_whole

# Belief before anything was drafted: int8 drafts of trained policies are kept at well
# over nine in ten; the weight is small enough that a few dozen rounds outvote it.
PRIOR_KEEP = 0.95
PRIOR_ROUNDS = 20.0

# Evidence is forgotten at these rates, because the policy moves: half is left after
# about fourteen thousand row-rounds that drafted, and this share after every rollout.
KEEP_PER_ROLLOUT = 0.8
FORGET_PER_ROUND = 5e-5

# A histogram of so many drafts, this many standard deviations from the belief, replaces
# it. Windows differ by some DRIFT for reasons of their own, the text they are at say.
CHANGE_DEVIATIONS = 6.0
CHANGE_DRAFTS = 16
DRIFT = 0.05


@dataclasses.dataclass
class AcceptanceEstimate:
    """Chance that the draft at each depth is used, given that all before it were.

    Used is kept and emitted: a draft behind a stop or a limit counts as lost like one
    that is rejected, so short completions make long drafts worth less.

    tested, kept: decayed counts of row-rounds that reached a depth and used its draft.
    """

    tested: np.ndarray
    kept: np.ndarray

    @classmethod
    def empty(cls, depth: int) -> AcceptanceEstimate:
        """Return an estimate that knows only the prior, for drafts up to `depth`."""
        return cls(tested=np.zeros(depth), kept=np.zeros(depth))

    def observe(self, used: np.ndarray) -> None:
        """Take in a histogram `[G + 1]` of row-rounds by the number of drafts used."""
        if len(used) == 1:
            return
        self.decay(math.exp(-FORGET_PER_ROUND * int(used.sum())))
        # at_least[k] counts the row-rounds that used k drafts or more.
        at_least = np.cumsum(used[::-1])[::-1].astype(float)
        depth = min(len(used) - 1, len(self.tested))
        self.tested[:depth] += at_least[:depth]
        self.kept[:depth] += at_least[1 : depth + 1]

    def decay(self, share: float) -> None:
        """Let evidence weigh this share of what it did."""
        self.tested *= share
        self.kept *= share

    def forget(self) -> None:
        """Let all evidence so far weigh no more than a prior."""
        most = float(self.tested.max(initial=0.0))
        self.decay(min(1.0, PRIOR_ROUNDS / max(most, 1e-9)))

    def contradiction(self, used: np.ndarray) -> tuple[float, float] | None:
        """Return the shares of drafts (expected, found) if a histogram contradicts.

        Args:
          used: `[G + 1]`, as in `observe`, and not yet observed.
        """
        at_least = np.cumsum(used[::-1])[::-1].astype(float)
        depth = min(len(used) - 1, len(self.tested))
        tested, found = at_least[:depth], at_least[1 : depth + 1].sum()
        total = tested.sum()
        if total < CHANGE_DRAFTS:
            return None
        chance = self.keep_probs(depth)
        expected = float(tested @ chance)
        variance = float(tested @ (chance * (1 - chance))) + (DRIFT * total) ** 2
        if abs(found - expected) <= CHANGE_DEVIATIONS * math.sqrt(variance):
            return None
        return expected / total, found / total

    def keep_errors(self, gamma: int) -> np.ndarray:
        """Return the standard deviations of `keep_probs`, as of beta distributions."""
        chance = self.keep_probs(gamma)
        return np.sqrt(chance * (1 - chance) / (self.tested[:gamma] + PRIOR_ROUNDS + 1))

    def keep_probs(self, gamma: int) -> np.ndarray:
        """Return the chances at depths 1 .. gamma, each drawn to the pooled one."""
        prior_kept, prior_tested = PRIOR_KEEP * PRIOR_ROUNDS, PRIOR_ROUNDS
        pooled = (self.kept.sum() + prior_kept) / (self.tested.sum() + prior_tested)
        kept = self.kept[:gamma] + pooled * PRIOR_ROUNDS
        return kept / (self.tested[:gamma] + PRIOR_ROUNDS)

    def tokens_per_round(self, gamma: int) -> float:
        """Return the expected tokens of a round of `gamma` drafts, 1 .. gamma + 1."""
        return expected_tokens(list(self.keep_probs(gamma)))


def checked_counts(name: str, counts: Any, depth: int) -> AcceptanceEstimate:
    """Return an estimate from the two lists of a file; `ValueError` for others."""
    tested, kept = (
        np.array([checked_real(name, x) for x in checked_list(name, values, depth)])
        for values in counts
    )
    # Both decay alike, each with roundings of its own.
    if (kept > tested * (1 + 1e-9)).any():
        raise ValueError(f"{name} kept more drafts than it tested: {counts}")
    return AcceptanceEstimate(tested=tested, kept=kept)


class LiveShares:
    """The share of a window's rounds that its rows are live for, by rows and gamma.

    Rows that end idle until the window does. Long drafts make few rounds, and rows that
    would end together end rounds apart.
    """

    def __init__(self) -> None:
        # Row-rounds of live rows, and of rows live at the beginning.
        self.counts: dict[tuple[int, int], tuple[float, float]] = {}

    def observe(
        self, rows: int, gamma: int, live: int, num_rounds: int, row_rounds: int
    ) -> None:
        """Take in a window.

        Args:
          rows, gamma: of its program. live: rows that were live at its beginning.
          num_rounds: of the window. row_rounds: that live rows took part in.
        """
        keep = math.exp(-FORGET_PER_ROUND * row_rounds)
        alive, in_all = self.counts.get((rows, gamma), (0.0, 0.0))
        self.counts[rows, gamma] = (
            keep * alive + row_rounds,
            keep * in_all + max(live * num_rounds, row_rounds),
        )

    def share(self, rows: int, gamma: int) -> float:
        """Return the share to expect, 1 where nothing is known."""
        alive, in_all = self.counts.get((rows, gamma), (0.0, 0.0))
        return (alive + PRIOR_ROUNDS) / (in_all + PRIOR_ROUNDS)

    def state(self) -> list[Any]:
        """Return all counts, ready for JSON."""
        return [
            [int(rows), int(gamma), float(alive), float(in_all)]
            for (rows, gamma), (alive, in_all) in self.counts.items()
        ]

    @classmethod
    def of_state(cls, name: str, values: Any) -> LiveShares:
        """Return what `state` made a list of; `ValueError` for anything else."""
        found = cls()
        for i, row in enumerate(checked_list(name, values)):
            rows, gamma, *counts = checked_list(f"{name}[{i}]", row, 4)
            size = checked_whole(f"rows of {name}[{i}]", rows, least=1)
            gamma = checked_whole(f"gamma of {name}[{i}]", gamma)
            alive, in_all = (checked_real(f"{name}[{i}]", value) for value in counts)
            found.counts[size, gamma] = alive, in_all
        return found
