"""What drafts may gain where none were timed, guessed from plain steps alone.

A draft is taken to cost a share of a step, and a verification as much as a step of
gamma + 1 times the rows. That guess is good where many positions are in the cache or
steps hardly grow with rows, which is where drafts pay for a whole batch at once.
Elsewhere it promises little, and one row is measured first (`accounts`).
"""

from __future__ import annotations

from er_jax.costs.passes import seconds_with_span
from er_jax.costs.table import DRAFT_SHARE, LatencyTable
from er_jax.types import Program

# Guesses count as so much slower: what they promise has to be worth a compilation.
GUESS_MARGIN = 1.15


def guessed_seconds(table: LatencyTable, program: Program) -> float | None:
    """Return the guessed seconds of a round that drafts; None if no step was timed.

    Args:
      table: costs of rounds. program: with gamma > 0 and rows in data shards.
    """

    def round_s(part: Program) -> float | None:
        step_s = table.round_seconds(part.plain)
        if part.gamma == 0 or step_s is None:
            return step_s
        wide = part.plain._replace(rows=part.rows * (part.gamma + 1))
        verify_s = table.round_seconds(wide) or 0.0
        return part.gamma * DRAFT_SHARE * step_s + verify_s

    if program.window:
        seconds = seconds_with_span(round_s, program)
    else:
        seconds = round_s(program)
    return None if seconds is None else GUESS_MARGIN * seconds
