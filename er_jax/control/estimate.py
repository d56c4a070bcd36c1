"""How likely drafts are used: per depth, forgetting old evidence, detecting changes.

Source: the expected tokens of a round, Leviathan et al. 2023 (arXiv 2211.17192),
equation 1, here with a probability per depth.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from er_jax.acceptance import expected_tokens
from er_jax.costs.record import checked_list, checked_real, checked_whole

# The prior: int8 drafts of trained policies have acceptance rates well over 0.9. Its
# weight in rounds is small enough for a few dozen rounds to outweigh it.
PRIOR_KEEP = 0.95
PRIOR_ROUNDS = 20.0

# Evidence is forgotten, because the policy changes: this share is left after every
# rollout, and half after about fourteen thousand row-rounds that drafted.
KEEP_PER_ROLLOUT = 0.8
FORGET_PER_ROUND = 5e-5

# A histogram of CHANGE_DRAFTS drafts or more that is CHANGE_DEVIATIONS standard
# deviations from the estimate replaces it. Rates of windows differ by about DRIFT
# without any change, because of their text for instance.
CHANGE_DEVIATIONS = 6.0
CHANGE_DRAFTS = 16
DRIFT = 0.05


@dataclasses.dataclass
class AcceptanceEstimate:
    """Probability that the draft at each depth is used, given that all before it were.

    A draft is used if it is kept and emitted. One behind a stop or a limit counts like
    a rejected one, so short completions make long drafts worth less.

    tested: decayed counts of row-rounds that reached each depth. kept: of those that
      also used its draft.
    """

    tested: np.ndarray
    kept: np.ndarray

    @classmethod
    def empty(cls, depth: int) -> AcceptanceEstimate:
        """Return the prior estimate for drafts up to `depth`."""
        return cls(tested=np.zeros(depth), kept=np.zeros(depth))

    def copy(self) -> AcceptanceEstimate:
        """Return an estimate with the same evidence."""
        return AcceptanceEstimate(tested=self.tested.copy(), kept=self.kept.copy())

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
        """Multiply the weight of all evidence by `share`."""
        self.tested *= share
        self.kept *= share

    def forget(self) -> None:
        """Reduce the weight of all evidence to that of the prior, at most."""
        most = float(self.tested.max(initial=0.0))
        self.decay(min(1.0, PRIOR_ROUNDS / max(most, 1e-9)))

    def contradiction(self, used: np.ndarray) -> tuple[float, float] | None:
        """Return acceptance rates (expected, found) if a histogram contradicts.

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
        """Return standard deviations of `keep_probs`, those of beta distributions."""
        chance = self.keep_probs(gamma)
        return np.sqrt(chance * (1 - chance) / (self.tested[:gamma] + PRIOR_ROUNDS + 1))

    def keep_probs(self, gamma: int) -> np.ndarray:
        """Return the probabilities at depths 1 .. gamma, shrunk to the pooled one."""
        prior_kept, prior_tested = PRIOR_KEEP * PRIOR_ROUNDS, PRIOR_ROUNDS
        pooled = (self.kept.sum() + prior_kept) / (self.tested.sum() + prior_tested)
        kept = self.kept[:gamma] + pooled * PRIOR_ROUNDS
        return kept / (self.tested[:gamma] + PRIOR_ROUNDS)

    def tokens_per_round(self, gamma: int) -> float:
        """Return the expected tokens of a round of `gamma` drafts, 1 .. gamma + 1."""
        return expected_tokens(list(self.keep_probs(gamma)))


def checked_counts(name: str, counts: Any, depth: int) -> AcceptanceEstimate:
    """Return an estimate from the two lists in a file; `ValueError` for bad ones."""
    tested, kept = (
        np.array([checked_real(name, x) for x in checked_list(name, values, depth)])
        for values in counts
    )
    # Both decay alike but are rounded separately.
    if (kept > tested * (1 + 1e-9)).any():
        raise ValueError(f"{name} kept more drafts than it tested: {counts}")
    return AcceptanceEstimate(tested=tested, kept=kept)


class LiveShares:
    """The share of a window's rounds that its rows are live for, by rows and gamma.

    A row that has ended idles until the window ends. With long drafts there are few
    rounds, and rows of equal length may end several rounds apart.
    """

    def __init__(self) -> None:
        # Row-rounds of live rows, and of all rows that were live at the start.
        self.counts: dict[tuple[int, int], tuple[float, float]] = {}

    def observe(
        self, rows: int, gamma: int, live: int, num_rounds: int, row_rounds: int
    ) -> None:
        """Take in a window.

        Args:
          rows, gamma: of its program. live: rows that were live at its start.
          num_rounds: of the window. row_rounds: of live rows.
        """
        keep = math.exp(-FORGET_PER_ROUND * row_rounds)
        alive, in_all = self.counts.get((rows, gamma), (0.0, 0.0))
        self.counts[rows, gamma] = (
            keep * alive + row_rounds,
            keep * in_all + max(live * num_rounds, row_rounds),
        )

    def share(self, rows: int, gamma: int) -> float:
        """Return the expected share, 1 where nothing is known."""
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
        """Return the shares that `state` listed; `ValueError` for anything else."""
        found = cls()
        for i, row in enumerate(checked_list(name, values)):
            rows, gamma, *counts = checked_list(f"{name}[{i}]", row, 4)
            size = checked_whole(f"rows of {name}[{i}]", rows, least=1)
            gamma = checked_whole(f"gamma of {name}[{i}]", gamma)
            alive, in_all = (checked_real(f"{name}[{i}]", value) for value in counts)
            found.counts[size, gamma] = alive, in_all
        return found
