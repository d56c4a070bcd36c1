"""Rent or buy: the time lost without a program, against its compile time.

For every program that is not compiled, the time lost by running the fastest compiled
one instead is added up; the program is compiled when the sum reaches its compile time.
At first nothing is known of drafts. They are assumed to be `UNKNOWN_SPEED_UP` times as
fast as plain decoding, until one row is measured with and without drafts.

Source: Karlin et al. 1988 ("Competitive snoopy caching").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from er_jax.request import offered_views
from er_jax.types import Program, View

# Assumed speed-up of drafts before any were timed: a sixth of plain decoding is lost.
# Measuring drafts then costs at most a sixth of the time spent so far.
# `benchmarks.cold` compares first calls with an oracle.
UNKNOWN_SPEED_UP = 1.2

Speeds = Callable[[Sequence[Program]], Mapping[Program, float]]
"""Returns the speed of each program, 0 where it is unknown."""


@dataclasses.dataclass
class Accounts:
    """Seconds lost because faster programs were not compiled.

    lost_s: by program that is not compiled. plain_s: seconds of plain decoding by
      `Program.shape`, while nothing is known of drafts.
    """

    lost_s: dict[Program, float] = dataclasses.field(default_factory=dict)
    plain_s: dict[tuple[int, int, bool], float] = dataclasses.field(
        default_factory=dict
    )

    def book(
        self, ran: Program, seconds: float, wanted: Sequence[Program], speeds: Speeds
    ) -> None:
        """Book what each faster program would have saved of a window's seconds.

        Args:
          ran: the window's program. seconds: of the window. wanted: the faster
            programs; the speeds of all are known.
        """
        if not wanted:
            return
        found = speeds([ran, *wanted])
        for other in wanted:
            lost_s = seconds * max(0.0, 1 - found[ran] / found[other])
            self.lost_s[other] = self.lost_s.get(other, 0.0) + lost_s

    def book_plain(self, ran: Program, seconds: float) -> None:
        """Book a window of plain decoding while nothing is known of drafts."""
        self.plain_s[ran.shape] = self.plain_s.get(ran.shape, 0.0) + seconds

    def paid(
        self,
        wanted: Sequence[Program],
        patience: float,
        compile_s: Callable[[Program], float],
    ) -> list[Program]:
        """Return those that have lost `patience` times their compile time."""
        return [
            program
            for program in wanted
            if self.lost_s.get(program, 0.0) >= patience * compile_s(program)
        ]

    def is_look_paid(self, price_s: float) -> bool:
        """Whether plain decoding has, by assumption, lost the price of measuring."""
        return sum(self.plain_s.values()) * (1 - 1 / UNKNOWN_SPEED_UP) >= price_s

    def book_look(
        self, gammas: Sequence[int], views: Sequence[View], speeds: Speeds
    ) -> None:
        """Book the time that plain decoding has lost, now that drafts were measured.

        Args:
          gammas: draft lengths. views: drafts to choose from. speeds: see `Speeds`.
        """
        plain_s, self.plain_s = self.plain_s, {}
        for (rows, length, shared), seconds in plain_s.items():
            programs = [
                Program(rows, length, gamma, shared).drafting(view)
                for gamma in gammas
                for view in offered_views(views, length, gamma)
            ]
            found = speeds(programs)
            plain = next(program for program in programs if not program.gamma)
            for program in programs:
                if found[program] > found[plain]:
                    lost_s = seconds * (1 - found[plain] / found[program])
                    self.lost_s[program] = lost_s

    def settle(self, bought: Program, before: Program, speeds: Speeds) -> None:
        """Subtract what a newly compiled program saves from the other accounts.

        The same seconds were booked for every program that would have been faster. A
        program that is no larger keeps the part that it would save beside the new one.
        One with more rows or positions keeps the seconds in which the new one could not
        have run.

        Args:
          bought: the new program. before: the fastest compiled one before.
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
