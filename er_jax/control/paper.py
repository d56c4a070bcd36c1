"""The published rule for switch and draft length, unchanged, as a baseline.

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
    """The published rule for switch and draft length, as a baseline.

    A rollout decodes plainly until the batch has held more than `PAPER_RAMP_ROWS` rows
    and a round with drafts is predicted to be `PAPER_SPEED_UP` times as fast; it then
    drafts to its end. The prediction uses the tokens per round of the rollout before.
    The draft length comes from a ladder and holds for a whole rollout. It goes a rung
    up after `PAPER_PERSISTENCE` rollouts in a row with an acceptance rate of at least
    `PAPER_RAISE`, and down after as many with at most `PAPER_LOWER`; the cost model has
    no part in that.

    Args:
      costs: predicts seconds of passes; the published rule uses a roofline.
      gamma: first draft length, one of the ladder; constant if `is_adaptive` is False.
      is_adaptive: whether the draft length follows the ladder.

    Source: EfficientRollout (arXiv 2606.18967) and its published code. As there, after
    a change of draft length the tokens per round are those of the old length.
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
        """Begin a rollout: drafts off, all counts 0."""
        self.is_on = False
        self._has_ramped = False
        self._num_rounds = self._num_kept = 0

    def choose(self, live: int, length: float) -> int:
        """Return the draft length of the next round, 0 while drafts are off.

        Args:
          live: rows that generate. length: their mean length, prompt included.
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
        """Set the draft length and tokens per round for the next rollout."""
        if not self._num_rounds:
            return
        self.tokens_per_round = 1 + self._num_kept / self._num_rounds
        if not self.is_adaptive:
            return
        rate = self._num_kept / (self._num_rounds * self.gamma)
        self._num_high = self._num_high + 1 if rate >= PAPER_RAISE else 0
        self._num_low = self._num_low + 1 if rate <= PAPER_LOWER else 0
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
        """Return what carries over between rollouts as JSON-ready values."""
        return {
            "gamma": int(self.gamma),
            "tokens_per_round": float(self.tokens_per_round),
            "_num_high": int(self._num_high),
            "_num_low": int(self._num_low),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the state, between rollouts, by that of another rule.

        Raises:
          ValueError: not what `state_dict` returns; it names what is wrong. The state
            is then unchanged.
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
    """Check that a state has exactly the known names."""
    if not isinstance(state, dict):
        raise ValueError(f"{name} is a {type(state).__name__}, and must be a dict")
    for key in known.keys() ^ state.keys():
        has = "holds" if key in state else "lacks"
        raise ValueError(f"{name} {has} {key!r}; give what state_dict returned")
