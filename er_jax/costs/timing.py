"""Timing the engine's own windows on this device.

Left out: the use of the seconds (`table`, `control`), files (`store`), the choice of
programs to time ahead of a run (`tools.survey`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from er_jax.costs.table import TRUSTED_POSITIONS
from er_jax.drafter import PolicyParams
from er_jax.engine.protocol import EngineProtocol
from er_jax.settings import of_rows
from er_jax.types import (
    NONE,
    DecodeState,
    LogprobKind,
    Program,
    Sampling,
)

# Seconds of rounds in one reading, and readings per program; the least of them counts,
# because other work on the machine only ever adds time.
READING_S = 0.03
NUM_READINGS = 3

# Seconds that measurements may delay a first rollout by, without compilation.
FIRST_BUDGET_S = 20.0


NUM_STOP_IDS = 8


def neutral_sampling(like: Sampling | None = None) -> Sampling:
    """Return settings of plain sampling: key 0, no truncation, no stop tokens.

    Args:
      like: settings whose programs are to run: with as many stop ids, all unused, with
        their truncation, and for each row if they are.
    """
    num_stop_ids = NUM_STOP_IDS if like is None else len(like.stop_ids)
    plain = Sampling(
        key=np.zeros(2, np.uint32),
        temperature=np.float32(1),
        top_k=np.int32(0),
        top_p=np.float32(1),
        min_p=np.float32(0),
        stop_ids=np.full(num_stop_ids, NONE, np.int32),
        logprob_kind=np.int32(LogprobKind.TEMPERATURE),
    )
    if like is None:
        return plain
    sequences = like.stop_sequences
    return dataclasses.replace(
        plain,
        temperature=np.ones_like(like.temperature),
        top_k=like.top_k,
        top_p=like.top_p,
        min_p=np.zeros_like(like.min_p),
        bias=like.bias,
        stop_sequences=(None if sequences is None else np.full_like(sequences, NONE)),
        begin=like.begin,
        min_new_tokens=like.min_new_tokens,
    )


def measure_round(
    engine: EngineProtocol,
    params: PolicyParams,
    program: Program,
    settings: Sampling | None = None,
    *,
    budget_s: float = math.inf,
) -> float:
    """Return the seconds per round of a program, timed on meaningless rows.

    Args:
      engine, params: to run it with. program: compiled first if necessary, which does
        not count.
      settings: traced sampling settings; None is `neutral_sampling`.
      budget_s: seconds after which no further reading begins; one always does.
    """
    if settings is None:
        settings = neutral_sampling()
    settings = of_rows(settings, np.zeros(program.rows, int))
    state = engine.allocate(program.rows, program.cache_length)
    reach = engine.rounds_per_test * (program.gamma + 1)
    # No further than the policy's context, even if the cache is longer.
    most = getattr(engine.policy, "max_length", None) or program.cache_length
    limit = min(program.cache_length, most)
    most_rounds = max(limit - 1 - reach, reach) // (program.gamma + 1)

    def run(state: DecodeState, num_rounds: int) -> tuple[DecodeState, float, float]:
        rows = program.rows
        state = dataclasses.replace(
            state,
            length=np.ones(rows, np.int32),
            prompt_length=np.ones(rows, np.int32),
            limit=np.full(rows, limit, np.int32),
            sequence_id=np.arange(rows, dtype=np.int32),
            live=np.ones(rows, bool),
        )
        state, window = engine.start_window(
            params.only(program.draft), state, settings, program.gamma, exit_live=0,
            max_rounds=num_rounds, span=program.span,
        )  # fmt: skip
        info, seconds, _ = window.wait()
        (seconds,) = engine.agreement.broadcast_from_leader([seconds]).tolist()
        return state, seconds, seconds / max(int(info.num_rounds), 1)

    # The first run touches memory for the first time; it only sets how long to read.
    state, spent_s, round_s = run(state, 1)
    readings: list[float] = []
    while not readings or (len(readings) < NUM_READINGS and spent_s < budget_s):
        num_rounds = min(max(int(READING_S / round_s), 1), most_rounds)
        state, seconds, round_s = run(state, num_rounds)
        readings.append(round_s)
        spent_s += seconds
    jax.block_until_ready(state.length)
    return min(readings)


def measure_rounds(
    engine: EngineProtocol,
    params: PolicyParams,
    programs: Sequence[Program],
    *,
    like: Sampling | None = None,
    budget_s: float = FIRST_BUDGET_S,
) -> tuple[dict[Program, float], int]:
    """Time several programs, while their rollout waits.

    Args:
      engine, params: to run them with. programs: to time.
      like: settings of the rollout, so that it runs the programs compiled here.
      budget_s: seconds after which no further reading begins, without compilation;
        every program gets one.
    Returns:
      Seconds per round of each; the rounds that each counts for in `LatencyTable`,
      enough to be trusted, because the least of several readings is.
    """
    each_s, settings = budget_s / len(programs), neutral_sampling(like)
    seconds = {
        program: measure_round(engine, params, program, settings, budget_s=each_s)
        for program in programs
    }
    return seconds, TRUSTED_POSITIONS
