"""Ending a rollout early: when enough is there, or when another thread says so."""

from __future__ import annotations

import dataclasses
import math
import threading

from er_jax.arguments import MOST, is_number, is_whole


class Stop:
    """Ends a rollout at its next window, from any thread; call it to do so.

    Example:
      >>> import er_jax
      >>> stop = er_jax.Stop()
      >>> until = er_jax.Until(stop=stop)  # for a rollout in another thread
      >>> stop()
      >>> stop.is_set
      True
    """

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self) -> None:
        """End the rollouts that were given this object, now and later."""
        self._event.set()

    @property
    def is_set(self) -> bool:
        """Whether it was called."""
        return self._event.is_set()


@dataclasses.dataclass(frozen=True)
class Until:
    """When a rollout ends before all completions have: at the first that is reached.

    It ends with the window that is running then, about a quarter of a second later, and
    returns everything; a completion that goes on has the finish reason "unfinished".
    With several processes, clock and `stop` are those of the first process.

    Args:
      seconds: since the call began, compilation included; > 0.
      finished: completions that have finished, those of `resume` included; >= 1.
      groups: prompts of which all completions have finished; >= 1.
      tokens: sampled by this call; >= 1.
      stop: ends the rollout when another thread calls it.
    Raises:
      ValueError: another value.
    """

    seconds: float | None = None
    finished: int | None = None
    groups: int | None = None
    tokens: int | None = None
    stop: Stop | None = None

    def __post_init__(self) -> None:
        seconds = self.seconds
        if seconds is not None and (
            not is_number(seconds) or not 0 < float(seconds) < math.inf
        ):
            raise ValueError(f"until.seconds={seconds!r} must be a number above 0")
        for name in ("finished", "groups", "tokens"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, 1, MOST):
                raise ValueError(
                    f"until.{name}={value!r} must be a whole number of at least 1"
                )
        if self.stop is not None and not isinstance(self.stop, Stop):
            raise ValueError(f"until.stop={self.stop!r} must be an er_jax.Stop()")

    @property
    def asks_leader(self) -> bool:
        """Whether processes could differ in whether it is reached."""
        return self.seconds is not None or self.stop is not None

    def is_reached(
        self, *, seconds: float, finished: int, groups: int, tokens: int
    ) -> bool:
        """Whether a rollout that has got this far ends; see the arguments."""
        reached = (
            (self.seconds, seconds),
            (self.finished, finished),
            (self.groups, groups),
            (self.tokens, tokens),
        )
        is_stopped = self.stop is not None and self.stop.is_set
        return is_stopped or any(
            limit is not None and value >= limit for limit, value in reached
        )
