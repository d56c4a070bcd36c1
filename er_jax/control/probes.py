"""Whether drafts would pay, where none run: ruled out, or worth a try."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from er_jax.acceptance import expected_tokens
from er_jax.control.estimate import PRIOR_KEEP, AcceptanceEstimate
from er_jax.costs.table import LatencyTable
from er_jax.types import Program

# A change of program must promise this much, so that noise does not move the batch.
HYSTERESIS = 0.03

# While nothing is drafted nothing is learnt of drafts: this share of the seconds of
# plain decoding may be spent on finding out.
PROBE_SHARE = 0.01
PROBE_ROUNDS = 16


def drafts_lose(
    table: LatencyTable,
    acceptance: AcceptanceEstimate,
    gammas: Sequence[int],
    least_rows: int,
) -> bool:
    """Whether one row was measured, and gains nothing by any draft that is kept.

    Kept as often as they are known to be, or as those of a good drafter. A survey has
    measured more than one row, and is believed.

    Args:
      table: what rounds cost. acceptance: how likely drafts are used. gammas: draft
        lengths to choose from. least_rows: of the smallest batch.
    """
    one_row = [
        program
        for program in table.seconds
        if program.gamma and program.rows == least_rows and not program.shared_rows
    ]
    if table.passes is not None or not one_row:
        return False
    is_compared = False
    for measured in one_row:
        plain_s = table.round_seconds(measured._replace(gamma=0))
        for gamma in gammas:
            round_s = table.round_seconds(measured._replace(gamma=gamma))
            if not gamma or not plain_s or not round_s:
                continue
            is_compared = True
            if hoped_tokens(acceptance, gamma) * plain_s > round_s:
                return False
    return is_compared


def find_probe(
    table: LatencyTable,
    acceptance: AcceptanceEstimate,
    plain: Program,
    ready: Sequence[Program],
    earned_s: float,
) -> Program | None:
    """Return what to run instead of plain decoding, to see if drafts would pay.

    The shortest draft at the same rows and cache length that would be faster if drafts
    were kept as a good drafter's are, once the time for it has been earned.

    Args:
      table, acceptance: as in `drafts_lose`. plain: would run otherwise. ready: the
        programs that are compiled. earned_s: seconds that may be spent.
    """
    plain_s = table.round_seconds(plain)
    for program in sorted(p for p in ready if p.gamma and p.shape == plain.shape):
        round_s = table.round_seconds(program)
        if not round_s or not plain_s:
            continue
        speed = hoped_tokens(acceptance, program.gamma) / round_s
        is_earned = PROBE_ROUNDS * round_s <= earned_s
        if is_earned and speed > (1 + HYSTERESIS) / plain_s:
            return program
    return None


def hoped_tokens(acceptance: AcceptanceEstimate, gamma: int) -> float:
    """Return the tokens of a round whose drafts are kept as a good drafter's are."""
    chances = np.maximum(acceptance.keep_probs(gamma), PRIOR_KEEP)
    return expected_tokens(list(chances))
