"""The published switch and draft length, kept as they are: the baseline to beat.

Source: EfficientRollout (arXiv 2606.18967) and its published code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from er_jax.config import PAPER_LADDER
from er_jax.costs.passes import PassPredictor, seconds_of_passes
from er_jax.costs.record import (
    checked_real,
    checked_whole,
)
from er_jax.types import Program

# The published switch and ladder, with the constants of the published code.
PAPER_SPEED_UP = 1.05
PAPER_RAMP_ROWS = 32


PAPER_RAISE, PAPER_LOWER = 0.94, 0.85

PAPER_PERSISTENCE = 2


class PaperRule:
    """The published switch and draft length, as a baseline.

    Plain decoding until the batch has once held more than `PAPER_RAMP_ROWS` rows and a
    round is then predicted to be `PAPER_SPEED_UP` times as fast; from there on drafts,
    to the end of the rollout. The prediction takes the tokens per round of the rollout
    before. The draft length is one of a ladder for a whole rollout: a step up after
    `PAPER_PERSISTENCE` rollouts in a row that kept at least `PAPER_RAISE` of their
    drafts, a step down after as many that kept at most `PAPER_LOWER`. The cost model
    has no part in that.

    Args:
      costs: prices passes; the published rule uses a roofline.
      gamma: draft length to begin with, one of the ladder; held if `is_adaptive` is
        False.

    Source: EfficientRollout (arXiv 2606.18967) and its published code. Kept as it is
    there: the tokens per round after a change of length are those of the old one.
    """

    def __init__(
        self, costs: PassPredictor, *, gamma: int = 5, is_adaptive: bool = True
    ) -> None:
        if is_adaptive and gamma not in PAPER_LADDER:
            raise ValueError(
                f"gamma={gamma} is not on the ladder {PAPER_LADDER}; begin with one of "
                "these or give is_adaptive=False"
            )
        self.costs = costs
        self.gamma = gamma
        self.is_adaptive = is_adaptive
        self.tokens_per_round = float(gamma)
        self._num_high = self._num_low = 0
        self.start_rollout()

    def start_rollout(self) -> None:
        """Begin a rollout: speculation off, nothing counted."""
        self.is_on = False
        self._has_ramped = False
        self._num_rounds = self._num_kept = 0

    def choose(self, live: int, length: float) -> int:
        """Return the draft length of the next round, 0 while speculation is off.

        Args:
          live: rows that generate. length: their mean tokens, prompt included.
        """
        self._has_ramped |= live > PAPER_RAMP_ROWS
        if not self.is_on and self._has_ramped:
            plain = Program(live, round(length), 0)
            target = seconds_of_passes(self.costs, plain)
            cycle = seconds_of_passes(self.costs, plain._replace(gamma=self.gamma))
            self.is_on = self.tokens_per_round * target / cycle >= PAPER_SPEED_UP
        return self.gamma if self.is_on else 0

    def observe(self, kept: np.ndarray) -> None:
        """Count a histogram `[G + 1]` of row-rounds by the number of drafts kept."""
        self._num_rounds += int(kept.sum())
        self._num_kept += int(kept @ np.arange(len(kept)))

    def end_rollout(self) -> None:
        """Learn from the rollout for the next one."""
        if not self._num_rounds:
            return
        self.tokens_per_round = 1 + self._num_kept / self._num_rounds
        if not self.is_adaptive:
            return
        share = self._num_kept / (self._num_rounds * self.gamma)
        self._num_high = self._num_high + 1 if share >= PAPER_RAISE else 0
        self._num_low = self._num_low + 1 if share <= PAPER_LOWER else 0
        rung = PAPER_LADDER.index(self.gamma)
        if self._num_high >= PAPER_PERSISTENCE:
            rung = min(rung + 1, len(PAPER_LADDER) - 1)
        elif self._num_low >= PAPER_PERSISTENCE:
            rung = max(rung - 1, 0)
        else:
            return
        self._num_high = self._num_low = 0
        self.gamma = PAPER_LADDER[rung]

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept from rollout to rollout as JSON-ready values."""
        return {
            "gamma": int(self.gamma),
            "tokens_per_round": float(self.tokens_per_round),
            "_num_high": int(self._num_high),
            "_num_low": int(self._num_low),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another rule had learnt, between rollouts.

        Raises:
          ValueError: not what `state_dict` returns; it names what is wrong. Nothing is
            taken over then.
        """
        check_names("rule", state, self.state_dict())
        gamma = checked_whole("rule's gamma", state["gamma"], least=1)
        if self.is_adaptive and gamma not in PAPER_LADDER:
            raise ValueError(
                f"rule's gamma is {gamma}, and must be on the ladder {PAPER_LADDER}"
            )
        tokens = checked_real(
            "rule's tokens_per_round", state["tokens_per_round"], least=1
        )
        high, low = (
            checked_whole(f"rule's {name}", state[name])
            for name in ("_num_high", "_num_low")
        )
        self.gamma, self.tokens_per_round = gamma, tokens
        self._num_high, self._num_low = high, low
        self.start_rollout()


def check_names(name: str, state: Any, known: dict[str, Any]) -> None:
    """Check that a state has just the names it is known to have."""
    if not isinstance(state, dict):
        raise ValueError(f"{name} is a {type(state).__name__}, and must be a dict")
    for key in known.keys() ^ state.keys():
        has = "holds" if key in state else "lacks"
        raise ValueError(f"{name} {has} {key!r}; give what state_dict returned")
