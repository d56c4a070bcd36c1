"""The progress bar of a rollout: what has finished, what runs, and what may be left.

How long completions are going to be is not known. Those that wait are taken to be as
long as the mean of the finished ones, and a row that runs to go on as long as the
finished ones that were longer than it, which is a guess and no promise.

Left out: counts of the whole call (`stats`).
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from er_jax.request import Request
from er_jax.scheduler.admission import Rows
from er_jax.stats import RolloutStats
from er_jax.types import FIRST_DRAFT, NONE, Program

# Tokens per second are those of so many seconds.
RECENT_S = 10.0

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Monitor:
    """A progress bar of finished sequences; a context manager.

    Args:
      total: sequences to finish. is_shown: False shows nothing and costs nothing.
      stats: of the rollout, filled in by others.
    """

    def __init__(self, total: int, is_shown: bool, stats: RolloutStats) -> None:
        self.is_shown = is_shown
        self._stats = stats
        self._bar = tqdm(total=total, unit="seq", disable=not is_shown, bar_format=BAR)
        self._lengths: list[int] = []
        self._recent = collections.deque([(time.perf_counter(), 0)])

    def __enter__(self) -> Monitor:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def finish(self, length: int) -> None:
        """Count a finished sequence of this many tokens."""
        self._lengths.append(length)
        self._bar.update()

    def show(
        self, program: Program, rows: Rows, request: Request, num_waiting: int
    ) -> None:
        """Say what runs now.

        Args:
          program: that runs. rows: of its batch. request: the sequences.
          num_waiting: sequences that have not begun.
        """
        if not self.is_shown:
            return
        ages = [
            int(rows.length[row]) - len(request.prompts[request.prompt_of[sequence]])
            for row, sequence in enumerate(rows.sequence)
            if sequence != NONE
        ]
        now = (time.perf_counter(), self._stats.num_tokens)
        self._recent.append(now)
        while len(self._recent) > 2 and now[0] - self._recent[1][0] > RECENT_S:
            self._recent.popleft()
        before = self._recent[0]
        speed = (now[1] - before[1]) / max(now[0] - before[0], 1e-9)
        parts = [f"{len(ages)} of {program.rows} rows"]
        if program.gamma:
            view = f" {program.view}" if program.view != FIRST_DRAFT else ""
            parts.append(f"{program.gamma} drafts{view}")
        else:
            parts.append("no drafts")
        kept = self._stats.kept_share
        if not math.isnan(kept):
            parts.append(f"{100 * kept:.0f} % kept")
        parts.append(f"{speed:.0f} tokens/s")
        left_s = seconds_left(self._lengths, ages, num_waiting, speed)
        if left_s is not None:
            parts.append(f"about {tqdm.format_interval(round(left_s))} left")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)


def seconds_left(
    lengths: Sequence[int], ages: Sequence[int], num_waiting: int, speed: float
) -> float | None:
    """Return a guess of the seconds that a rollout goes on; None without any ground.

    Args:
      lengths: tokens of finished completions. ages: of those that run, so far.
      num_waiting: completions that have not begun. speed: tokens per second, of all.
    """
    if not lengths or speed <= 0:
        return None
    known = np.asarray(lengths)
    waiting_s = num_waiting * float(known.mean()) / speed
    # Of rows that are longer than all others were, nothing is known.
    rests = [float((known[known > a] - a).mean()) for a in ages if a < known.max()]
    longest = max(rests, default=0.0)
    return waiting_s + longest * max(len(ages), 1) / speed
