"""Timing the engine's own windows on this device.

Left out: what is done with the seconds (`table`, `control`), files (`store`), which
programs are worth timing ahead of a run (`tools.survey`).
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
from er_jax.types import (
    NONE,
    DecodeState,
    LogprobKind,
    Program,
    Sampling,
)

# Seconds of rounds behind one reading, and readings per program; the least is taken,
# because other work on the machine only ever adds time.
READING_S = 0.03
NUM_READINGS = 3

# Seconds that a first rollout may be held up for, compilation not counted.
FIRST_BUDGET_S = 20.0


def neutral_sampling(num_stop_ids: int = 8) -> Sampling:
    """Return settings that never stop or cut anything: plain sampling, key 0.

    Their number of stop ids names programs; all of them are unused.
    """
    return Sampling(
        key=np.zeros(2, np.uint32),
        temperature=np.float32(1),
        top_k=np.int32(0),
        top_p=np.float32(1),
        min_p=np.float32(0),
        stop_ids=np.full(num_stop_ids, NONE, np.int32),
        logprob_kind=np.int32(LogprobKind.TEMPERATURE),
    )


def measure_round(
    engine: EngineProtocol,
    params: PolicyParams,
    program: Program,
    settings: Sampling | None = None,
    *,
    budget_s: float = math.inf,
) -> float:
    """Time one program on a batch of junk and return seconds per round.

    Args:
      engine, params: what to time. program: rows, cache length, gamma; compiled if it
        is not yet, which is not counted.
      settings: traced sampling settings; None is `neutral_sampling`.
      budget_s: no reading is begun after so many seconds, but for the first.
    """
    if settings is None:
        settings = neutral_sampling()
    state = engine.allocate(program.rows, program.cache_length)
    reach = engine.rounds_per_test * (program.gamma + 1)
    # No further than the policy has positions, whatever the cache has room for.
    most = getattr(engine.policy, "max_length", None) or program.cache_length
    limit = min(program.cache_length, most)
    room = max(limit - 1 - reach, reach) // (program.gamma + 1)

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
            params, state, settings, program.gamma, exit_live=0, max_rounds=num_rounds
        )
        info, seconds, _ = window.wait()
        (seconds,) = engine.agreement.broadcast_from_leader([seconds]).tolist()
        return state, seconds, seconds / max(int(info.num_rounds), 1)

    # The first run touches memory for the first time: it only says how long to read.
    state, spent_s, round_s = run(state, 1)
    readings: list[float] = []
    while not readings or (len(readings) < NUM_READINGS and spent_s < budget_s):
        num_rounds = min(max(int(READING_S / round_s), 1), room)
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
    num_stop_ids: int = 8,
    budget_s: float = FIRST_BUDGET_S,
) -> tuple[dict[Program, float], int]:
    """Time several programs of a rollout that waits for them.

    Args:
      engine, params: what to time. programs: which.
      num_stop_ids: of the rollout, which then runs the very programs that are compiled.
      budget_s: seconds after which no reading is begun, compilation not counted; one of
        each program there always is.
    Returns:
      Seconds per round of each; the rounds that each is worth, for `LatencyTable`: the
      least of several readings stands.
    """
    each_s, settings = budget_s / len(programs), neutral_sampling(num_stop_ids)
    seconds = {
        program: measure_round(engine, params, program, settings, budget_s=each_s)
        for program in programs
    }
    return seconds, TRUSTED_POSITIONS
