"""A first measurement: what speculation costs here, from the engine's own windows.

One autoregressive and one speculative window of the smallest batch are compiled and
timed. That pair decides whether anything else is worth compiling: where drafting does
not pay with one row, where it is bound by memory most, it pays nowhere.

Left out: a grid of shapes, tables on disk.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from er_jax import costs
from er_jax.control import Controller
from er_jax.drafter import PolicyParams
from er_jax.engine import Engine
from er_jax.types import NONE, DecodeState, LogprobKind, Program, Sampling

# Seconds of rounds behind one reading, and readings per program; the least is taken,
# because other work on the machine only ever adds time.
READING_S = 0.03
NUM_READINGS = 3


def neutral_sampling() -> Sampling:
    """Return settings that never stop or cut anything: plain sampling, key 0."""
    return Sampling(
        key=np.zeros(2, np.uint32),
        temperature=np.float32(1),
        top_k=np.int32(0),
        top_p=np.float32(1),
        min_p=np.float32(0),
        stop_ids=np.full(8, NONE, np.int32),
        logprob_kind=np.int32(LogprobKind.TEMPERATURE),
    )


def measure_round(
    engine: Engine,
    params: PolicyParams,
    program: Program,
    settings: Sampling | None = None,
) -> float:
    """Time one program on a batch of junk and return seconds per round.

    Args:
      engine, params: what to time. program: rows, cache length, gamma; compiled if it
        is not yet, which is not counted.
      settings: traced sampling settings; None is `neutral_sampling`.
    """
    if settings is None:
        settings = neutral_sampling()
    state = engine.allocate(program.rows, program.cache_length)
    reach = engine.rounds_per_test * (program.gamma + 1)
    room = max(program.cache_length - 1 - reach, reach) // (program.gamma + 1)

    def run(state: DecodeState, num_rounds: int) -> tuple[DecodeState, float]:
        rows = program.rows
        state = dataclasses.replace(
            state,
            length=np.ones(rows, np.int32),
            prompt_length=np.ones(rows, np.int32),
            limit=np.full(rows, program.cache_length, np.int32),
            sequence_id=np.arange(rows, dtype=np.int32),
            live=np.ones(rows, bool),
        )
        state, window = engine.start_window(
            params, state, settings, program.gamma, exit_live=0, max_rounds=num_rounds
        )
        info, seconds, _ = window.wait()
        return state, seconds / max(int(info.num_rounds), 1)

    state, round_s = run(state, min(4, room))
    num_rounds = min(max(int(READING_S / round_s), 4), room)
    readings = []
    for _ in range(NUM_READINGS):
        state, seconds = run(state, num_rounds)
        readings.append(seconds)
    jax.block_until_ready(state.length)
    return min(readings)


def measure_draft_cost(
    engine: Engine, params: PolicyParams, controller: Controller, cache_length: int
) -> None:
    """Give a controller that may speculate its first pair of readings, if it has none.

    Args:
      engine, params: what to time. controller: its table is filled in.
      cache_length: of the programs measured.
    """
    drafting = [gamma for gamma in controller.gammas if gamma]
    if not drafting or len(controller.gammas) < 2:
        return
    if any(program.gamma for program in controller.table.seconds):
        return
    middle = min(drafting, key=lambda gamma: abs(gamma - 4))
    for gamma in (0, middle):
        program = Program(1, cache_length, gamma)
        seconds = measure_round(engine, params, program)
        rounds = costs.TRUSTED_POSITIONS  # The least of several readings stands.
        controller.table.observe(program, seconds * rounds, rounds)
