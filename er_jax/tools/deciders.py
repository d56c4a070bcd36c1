"""Deciders of draft lengths in a replay: fixed, controller, published rule, oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from er_jax.arguments import MOST_DRAFTS, check_chance, check_gammas, check_whole
from er_jax.control.controller import Controller
from er_jax.control.paper import PaperRule
from er_jax.request import offered_spans
from er_jax.types import Program, Span


class RoundCosts(Protocol):
    """Predicts seconds of rounds; `costs.PassCosts` and `costs.Roofline` do."""

    def round_seconds(self, program: Program) -> float:
        """Return the seconds of a whole round."""


@dataclasses.dataclass(frozen=True)
class SpanCosts:
    """Costs of rounds whose drafts see a span wherever it hides something.

    costs: predict rounds whose drafts see a span, and others. span: what drafts see.
    """

    costs: RoundCosts
    span: Span

    def round_seconds(self, program: Program) -> float:
        """Return the seconds of a whole round."""
        seen = offered_spans((self.span,), program.cache_length, program.gamma)
        return self.costs.round_seconds(program.seeing(seen[0]))


class DecisionPoint(NamedTuple):
    """The state of a batch in which a decider chooses the next draft length.

    live: live rows. length: their mean length in tokens, rounded up. left: int
    `[live]`, tokens left of each row, for the oracle only.
    """

    live: int
    length: int
    left: np.ndarray


class Decider(Protocol):
    """Chooses the draft length of the next rounds."""

    def choose(self, point: DecisionPoint) -> int:
        """Return gamma."""

    def observe(self, emitted: np.ndarray, kept: np.ndarray, seconds: float) -> None:
        """Learn from a window.

        Args:
          emitted, kept: histograms `[G + 1]` of row-rounds by tokens emitted, and by
            drafts kept. seconds: of the window.
        """

    def end(self) -> None:
        """Learn from the rollout as a whole."""


class Fixed:
    """Always the same draft length; 0 is plain decoding."""

    def __init__(self, gamma: int) -> None:
        check_whole("gamma", gamma, 0, MOST_DRAFTS)
        self.gamma = gamma

    def choose(self, point: DecisionPoint) -> int:
        """Return gamma."""
        return self.gamma

    def observe(self, emitted: np.ndarray, kept: np.ndarray, seconds: float) -> None:
        """Learn nothing."""

    def end(self) -> None:
        """Learn nothing."""


class Best:
    """The library's controller, with the true costs of passes in its table."""

    def __init__(self, costs: RoundCosts, gammas: Sequence[int]) -> None:
        check_gammas(gammas)
        self.controller = Controller("best", gammas)
        self._costs = costs
        self._current: Program | None = None

    def choose(self, point: DecisionPoint) -> int:
        """Return the gamma of the fastest program at these rows and this length."""
        table = self.controller.table
        options = [
            Program(point.live, point.length, gamma)
            for gamma in reversed(self.controller.gammas)
        ]
        table.seconds = {p: self._costs.round_seconds(p) for p in options}
        current = self._current
        if current is not None:
            current = options[0]._replace(gamma=current.gamma)
        self._current = self.controller.choose(
            options, current, compile_s=lambda program: 0.0
        )
        return self._current.gamma

    def observe(self, emitted: np.ndarray, kept: np.ndarray, seconds: float) -> None:
        """Learn acceptance; the costs are known."""
        assert self._current is not None
        self.controller.observe(self._current, 0, emitted, seconds, kept)

    def end(self) -> None:
        """Begin the next rollout."""
        self._current = None
        self.controller.start_rollout()


class Paper:
    """The published rule; its cost model is part of `rule`."""

    def __init__(self, rule: PaperRule) -> None:
        self.rule = rule

    def choose(self, point: DecisionPoint) -> int:
        """Return the ladder's gamma once the switch is on."""
        return self.rule.choose(point.live, point.length)

    def observe(self, emitted: np.ndarray, kept: np.ndarray, seconds: float) -> None:
        """Count kept drafts, if any were proposed."""
        if len(kept) > 1:
            self.rule.observe(kept)

    def end(self) -> None:
        """Move the ladder, and begin the next rollout with plain decoding."""
        self.rule.end_rollout()
        self.rule.start_rollout()


class Oracle:
    """The best choice given true costs, true acceptance and true remaining lengths.

    Args:
      costs: of rounds. gammas: to choose from. keep_prob: chance that a draft is kept.
    """

    def __init__(
        self, costs: RoundCosts, gammas: Sequence[int], keep_prob: float
    ) -> None:
        check_gammas(gammas)
        check_chance("keep_prob", keep_prob)
        self._costs, self._gammas, self._keep_prob = costs, tuple(gammas), keep_prob

    def choose(self, point: DecisionPoint) -> int:
        """Return the gamma with the most expected tokens per second."""

        def speed(gamma: int) -> float:
            program = Program(point.live, point.length, gamma)
            survival = self._keep_prob ** np.arange(gamma + 1)
            reached = point.left[:, None] > np.arange(gamma + 1)
            tokens = float((reached * survival).sum())
            return tokens / self._costs.round_seconds(program)

        return max(self._gammas, key=speed)

    def observe(self, emitted: np.ndarray, kept: np.ndarray, seconds: float) -> None:
        """Learn nothing."""

    def end(self) -> None:
        """Learn nothing."""
