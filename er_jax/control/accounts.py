"""Rent or buy: the time lost without a program, against what its compilation takes.

For every program that is not compiled, the time lost by running the fastest compiled
one instead is added up, and the program is compiled when its sum reaches the price.
Nothing is known of drafts at first: they are taken to be `UNKNOWN_SPEED_UP` times as
fast, until one row was measured with drafts and without.

Source: Karlin et al. 1988 ("Competitive snoopy caching").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from er_jax.types import Program

# What drafts are taken to gain before any were timed: a sixth of the time without them
# is lost. Then finding out costs at most a sixth of what has been spent so far.
# `benchmarks.cold` holds the first calls against an oracle.
UNKNOWN_SPEED_UP = 1.2

Speeds = Callable[[Sequence[Program]], Mapping[Program, float]]
"""Returns the speed of each program, 0 where it is unknown."""


@dataclasses.dataclass
class Accounts:
    """Seconds lost by not having compiled what would have been faster.

    lost_s: by program. plain_s: seconds of plain decoding by rows, cache length and
      shared rows, while nothing is known of drafts.
    """

    lost_s: dict[Program, float] = dataclasses.field(default_factory=dict)
    plain_s: dict[tuple[int, int, bool], float] = dataclasses.field(
        default_factory=dict
    )

    def book(
        self, ran: Program, seconds: float, wanted: Sequence[Program], speeds: Speeds
    ) -> None:
        """Book a window's seconds for programs that would have been faster.

        Args:
          ran: the window's program. seconds: that it took. wanted: the others; they
            had a speed when they were chosen, and what has one keeps one.
        """
        if not wanted:
            return
        found = speeds([ran, *wanted])
        for other in wanted:
            lost_s = seconds * max(0.0, 1 - found[ran] / found[other])
            self.lost_s[other] = self.lost_s.get(other, 0.0) + lost_s

    def book_plain(self, ran: Program, seconds: float) -> None:
        """Book a window of plain decoding, until something is known of drafts."""
        self.plain_s[ran.shape] = self.plain_s.get(ran.shape, 0.0) + seconds

    def paid(
        self,
        wanted: Sequence[Program],
        patience: float,
        compile_s: Callable[[Program], float],
    ) -> list[Program]:
        """Return the programs whose loss has reached `patience` times their price."""
        return [
            program
            for program in wanted
            if self.lost_s.get(program, 0.0) >= patience * compile_s(program)
        ]

    def is_look_paid(self, price_s: float) -> bool:
        """Whether plain decoding has lost what it takes to find out about drafts."""
        return sum(self.plain_s.values()) * (1 - 1 / UNKNOWN_SPEED_UP) >= price_s

    def book_look(self, gammas: Sequence[int], speeds: Speeds) -> None:
        """Book all plain decoding so far, now that it is known what drafts cost."""
        plain_s, self.plain_s = self.plain_s, {}
        for (rows, length, shared), seconds in plain_s.items():
            programs = [Program(rows, length, gamma, shared) for gamma in gammas]
            found = speeds(programs)
            plain = next(program for program in programs if not program.gamma)
            for program in programs:
                if found[program] > found[plain]:
                    lost_s = seconds * (1 - found[plain] / found[program])
                    self.lost_s[program] = lost_s

    def settle(self, bought: Program, before: Program, speeds: Speeds) -> None:
        """Take off the others' accounts what a program that is compiled now saves.

        The same seconds were booked for all programs that would have been faster. Where
        another is no larger, what is left is what it gains beside the new one; where it
        has more rows or positions, the seconds in which the new one could not have run.

        Args:
          bought: the program. before: the fastest one that was compiled before.
        """
        bought_s = self.lost_s.pop(bought, 0.0)
        found = speeds([bought, before, *self.lost_s])
        for other, seconds in self.lost_s.items():
            if (
                other.rows > bought.rows
                or other.cache_length > bought.cache_length
                or other.shared_rows != bought.shared_rows
            ):
                self.lost_s[other] = max(seconds - bought_s, 0.0)
                continue
            slow, now, fast = (found[p] for p in (before, bought, other))
            share = 0.0
            if 0 < slow < now < fast:
                share = (1 / now - 1 / fast) / (1 / slow - 1 / fast)
            self.lost_s[other] = share * seconds
