"""Whether drafts would pay while none run: ruled out, or worth a probe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from er_jax.acceptance import expected_tokens
from er_jax.control.estimate import PRIOR_KEEP, AcceptanceEstimate
from er_jax.costs.table import LatencyTable
from er_jax.types import Program, View

# Least gain in speed for a change of program, so that noise does not move the batch.
HYSTERESIS = 0.03

# Plain decoding teaches nothing about drafts: this share of its seconds may be spent on
# probes, each of PROBE_ROUNDS rounds.
PROBE_SHARE = 0.01
PROBE_ROUNDS = 16


def drafts_lose(
    table: LatencyTable,
    acceptance: AcceptanceEstimate,
    gammas: Sequence[int],
    least_rows: int,
    views: Iterable[View] = (),
) -> bool:
    """Whether one row was measured and no draft length makes it faster.

    Drafts count as used at the estimated rates, or those of a good drafter if higher.
    With costs from a survey the answer is False: it measured more than one row.

    Args:
      table: costs of rounds. acceptance: how likely drafts are used. gammas: draft
        lengths to choose from. least_rows: rows of the smallest batch. views: drafts to
        choose from, beside those that were measured.
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
        plain_s = table.round_seconds(measured.plain)
        for gamma, view in itertools.product(gammas, {measured.view, *views}):
            program = measured._replace(gamma=gamma).drafting(view)
            round_s = table.round_seconds(program)
            if not gamma or not plain_s or not round_s:
                continue
            is_compared = True
            if hoped_tokens(acceptance, gamma) * plain_s > round_s:
                return False
    return is_compared


def find_probe(
    table: LatencyTable,
    acceptance_of: Callable[[View], AcceptanceEstimate],
    plain: Program,
    ready: Sequence[Program],
    earned_s: float,
) -> Program | None:
    """Return a program to run instead of plain decoding, to see if drafts would pay.

    It has the shortest drafts, at the same rows and cache length, that would be faster
    if they were used as often as a good drafter's; of several drafts, and of those that
    see more or less of the cache, the fastest. None if there is none, or if the time
    for it has not been earned yet.

    Args:
      table: costs of rounds. acceptance_of: how likely the drafts of a view are used.
        plain: the program that would run.
      ready: the compiled programs. earned_s: seconds that may be spent.
    """
    plain_s = table.round_seconds(plain)

    def order(program: Program) -> tuple[int, float]:
        return program.gamma, table.round_seconds(program) or math.inf

    same = [p for p in ready if p.gamma and p.shape == plain.shape]
    for program in sorted(same, key=order):
        round_s = table.round_seconds(program)
        if not round_s or not plain_s:
            continue
        speed = hoped_tokens(acceptance_of(program.view), program.gamma) / round_s
        is_earned = PROBE_ROUNDS * round_s <= earned_s
        if is_earned and speed > (1 + HYSTERESIS) / plain_s:
            return program
    return None


def hoped_tokens(acceptance: AcceptanceEstimate, gamma: int) -> float:
    """Return expected tokens of a round at estimated rates, or a good drafter's."""
    probs = np.maximum(acceptance.keep_probs(gamma), PRIOR_KEEP)
    return expected_tokens(list(probs))
