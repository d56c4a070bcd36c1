"""Compiled windows: when they end, what crosses to the host, which are compiled."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from er_jax import devices, steps
from er_jax.drafter import DrafterConfig, PolicyParams
from er_jax.engine import kept, windows
from er_jax.engine.engine import Engine, RunningWindow
from er_jax.types import NONE, DecodeState, Finish, Program, Sampling, WindowInfo
from tests.small import POLICY

# When windows end and what they leave, not what a round computes.
pytestmark = pytest.mark.usefixtures("unoptimized_module")

ROWS, S = 4, 32
FOREVER = 10_000

SETTINGS = Sampling(
    key=np.array([3, 4], np.uint32),
    temperature=np.float32(1),
    top_k=np.int32(0),
    top_p=np.float32(1),
    min_p=np.float32(0),
    stop_ids=np.full(8, NONE, np.int32),
    logprob_kind=np.int32(0),
)


@pytest.fixture(scope="module")
def params() -> PolicyParams:
    return er_jax.attach_draft(POLICY.init(jax.random.key(0)), DrafterConfig())


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(POLICY, "coupled")


def start(engine: Engine, limits: Any = S, lengths: Any = 1) -> DecodeState:
    """Live rows from one-token prompts, which need no entries in the cache."""
    state = engine.allocate(ROWS, S)
    tokens = np.zeros((ROWS, S), np.int32)
    tokens[:] = np.arange(1, ROWS + 1)[:, None]
    return dataclasses.replace(
        state,
        tokens=tokens,
        length=np.broadcast_to(np.int32(lengths), ROWS).copy(),
        prompt_length=np.ones(ROWS, np.int32),
        limit=np.broadcast_to(np.int32(limits), ROWS).copy(),
        sequence_id=np.arange(ROWS, dtype=np.int32),
        live=np.ones(ROWS, np.bool_),
    )


def window(
    engine: Engine,
    params: PolicyParams,
    state: DecodeState,
    gamma: int,
    *,
    exit_live: int = 0,
    max_rounds: int = FOREVER,
) -> tuple[DecodeState, WindowInfo]:
    state, running = engine.start_window(
        params, state, SETTINGS, gamma, exit_live=exit_live, max_rounds=max_rounds
    )
    info, seconds, _ = running.wait()
    assert seconds > 0
    return state, info


@pytest.mark.parametrize("gamma", [0, 2])
def test_it_runs_until_nothing_is_live(
    engine: Engine, params: PolicyParams, gamma: int
) -> None:
    limits = np.array([5, 9, 32, 2])
    _, info = window(engine, params, start(engine, limits), gamma)
    np.testing.assert_array_equal(info.length, limits)
    assert not info.live.any()
    assert (info.finish_reason == Finish.LENGTH).all()
    if gamma == 0:
        assert info.num_rounds == 31
        np.testing.assert_array_equal(info.accepted, [(limits - 1).sum()])
        np.testing.assert_array_equal(info.emitted, info.accepted)
    else:
        # A good draft: near three tokens a round, and never more.
        assert 11 <= info.num_rounds < 25
        kept = info.accepted @ np.arange(3)
        row_rounds = info.accepted.sum()
        assert row_rounds <= info.num_rounds * ROWS
        # Each row-round emits its kept drafts and one more, less what limits cut off.
        assert (limits - 1).sum() <= kept + row_rounds <= (limits - 1).sum() + 2 * ROWS
        # What was emitted adds up exactly.
        assert info.emitted.sum() == row_rounds
        assert info.emitted @ np.arange(1, 4) == (limits - 1).sum()


@pytest.mark.parametrize("gamma", [0, 2])
def test_a_window_is_rounds(engine: Engine, params: PolicyParams, gamma: int) -> None:
    state, info = window(engine, params, start(engine), gamma, max_rounds=5)
    assert info.num_rounds == 5
    by_hand = start(engine)
    one_round = jax.jit(
        functools.partial(steps.decode_round, POLICY, gamma=gamma, accept="coupled")
    )
    accepted, emitted = np.zeros(gamma + 1, int), np.zeros(gamma + 1, int)
    for _ in range(5):
        by_hand, done = one_round(params, jax.tree.map(np.array, by_hand), SETTINGS)
        accepted += np.bincount(done.num_accepted, minlength=gamma + 1)
        emitted += np.bincount(done.num_emitted - 1, minlength=gamma + 1)
    np.testing.assert_array_equal(info.accepted, accepted)
    np.testing.assert_array_equal(info.emitted, emitted)
    np.testing.assert_array_equal(state.tokens, by_hand.tokens)
    np.testing.assert_array_equal(state.length, by_hand.length)
    np.testing.assert_allclose(state.logprobs, by_hand.logprobs, rtol=0, atol=1e-5)


def test_it_ends_when_few_enough_are_live(engine: Engine, params: PolicyParams) -> None:
    limits = np.array([4, 7, 7, 20])
    for exit_live, num_rounds, length in (
        (3, 3, [4, 4, 4, 4]),
        (2, 6, [4, 7, 7, 7]),
        (1, 6, [4, 7, 7, 7]),
        (0, 19, limits),
    ):
        _, info = window(engine, params, start(engine, limits), 0, exit_live=exit_live)
        assert info.num_rounds == num_rounds
        np.testing.assert_array_equal(info.length, length)


def test_it_runs_no_round_when_nothing_is_to_do(
    engine: Engine, params: PolicyParams
) -> None:
    state = start(engine)
    before = jax.tree.map(np.array, state)
    for changes, exit_live, max_rounds in (
        ({}, ROWS, FOREVER),
        ({}, 0, 0),
        ({"live": np.zeros(ROWS, np.bool_)}, 0, FOREVER),
    ):
        given = dataclasses.replace(jax.tree.map(np.array, before), **changes)
        after, info = window(
            engine, params, given, 0, exit_live=exit_live, max_rounds=max_rounds
        )
        assert info.num_rounds == 0
        assert (info.accepted == 0).all()
        np.testing.assert_array_equal(after.tokens, before.tokens)
        np.testing.assert_array_equal(after.length, before.length)


@pytest.mark.parametrize("gamma", [0, 2])
def test_it_ends_before_a_row_outgrows_the_cache(
    engine: Engine, params: PolicyParams, gamma: int
) -> None:
    """A limit beyond the cache: the host has to grow it, and loses no token by that."""
    state, info = window(engine, params, start(engine, limits=2 * S), gamma)
    assert info.live.all()
    assert info.length.max() <= S
    assert info.length.max() + gamma + 1 > S  # and it ended no earlier than it had to
    grown = steps.take(state, jnp.arange(ROWS, dtype=jnp.int32), 2 * S)
    whole = steps.take(start(engine, 2 * S), jnp.arange(ROWS, dtype=jnp.int32), 2 * S)
    grown, _ = window(engine, params, grown, gamma)
    whole, _ = window(engine, params, whole, gamma)
    np.testing.assert_array_equal(grown.tokens, whole.tokens)
    np.testing.assert_array_equal(grown.length, [2 * S] * ROWS)


def test_a_limit_at_the_end_of_the_cache_is_reached(
    engine: Engine, params: PolicyParams
) -> None:
    """Drafts past the last position are dropped, not written somewhere else."""
    one, _ = window(engine, params, start(engine), 0)
    two, info = window(engine, params, start(engine), 2)
    np.testing.assert_array_equal(info.length, [S] * ROWS)
    np.testing.assert_array_equal(two.tokens, one.tokens)


def test_tests_may_be_rare(engine: Engine, params: PolicyParams) -> None:
    """Three rounds between exit tests: the same tokens, some idle rounds at the end."""
    limits = np.array([5, 9, 12, 2])
    state, info, _ = windows.run_window(
        POLICY,
        params,
        start(engine, limits),
        SETTINGS,
        np.int32(0),
        np.int32(FOREVER),
        gamma=0,
        accept="coupled",
        rounds_per_test=3,
    )
    assert info.num_rounds == 12
    usual, _ = window(engine, params, start(engine, limits), 0)
    np.testing.assert_array_equal(state.tokens, usual.tokens)
    np.testing.assert_array_equal(info.accepted, [(limits - 1).sum()])
    # Whoever could outgrow the cache between two tests ends the window first.
    _, info, _ = windows.run_window(
        POLICY,
        params,
        start(engine, limits=2 * S),
        SETTINGS,
        np.int32(0),
        np.int32(FOREVER),
        gamma=0,
        accept="coupled",
        rounds_per_test=3,
    )
    np.testing.assert_array_equal(info.length, [31] * ROWS)


def test_one_small_transfer_per_window(
    engine: Engine, params: PolicyParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    window(engine, params, start(engine), 2, max_rounds=1)
    sent: list[int] = []
    fetch = jax.device_get

    def counted(tree: Any) -> Any:
        sent.append(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        return fetch(tree)

    monkeypatch.setattr(jax, "device_get", counted)
    state, info = window(engine, params, start(engine), 2, max_rounds=1)
    assert sent == [ROWS * (1 + 4 + 4) + 4 + 2 * 3 * 4]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(info))
    monkeypatch.undo()
    for field in ("live", "length", "finish_reason"):
        np.testing.assert_array_equal(getattr(info, field), getattr(state, field))


def test_the_state_is_consumed(engine: Engine, params: PolicyParams) -> None:
    first, _ = window(engine, params, start(engine), 0, max_rounds=1)
    second, _ = window(engine, params, first, 0, max_rounds=1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(second))


def test_programs_are_named_by_rows_length_and_gamma(params: PolicyParams) -> None:
    engine = Engine(POLICY, "coupled")
    assert engine.expected_compile_s("window") == 1.0  # a guess, with nothing known
    program = Program(ROWS, S, 0)
    assert not engine.has_window(program, engine.draft_kind(params.draft), SETTINGS)
    window(engine, params, start(engine), 0, max_rounds=1)
    assert engine.has_window(program, engine.draft_kind(params.draft), SETTINGS)
    count = len(engine.compiled)
    assert engine.expected_compile_s("window") == max(
        made.compile_s for name, made in engine.compiled.items() if name[0] == "window"
    )
    assert engine.compile_s == sum(x.compile_s for x in engine.compiled.values())

    # Plain decoding needs no draft, so any draft, or none, meets the same program.
    four_bits = er_jax.attach_draft(params.policy, DrafterConfig(bits=4))
    for draft in (None, params.policy, four_bits.draft):
        policy_and_draft = PolicyParams(policy=params.policy, draft=draft)
        assert engine.has_window(
            program, engine.draft_kind(policy_and_draft.draft), SETTINGS
        )
        window(engine, policy_and_draft, start(engine), 0, max_rounds=1)
    assert len(engine.compiled) == count

    # Speculation does: a program reads one kind of codes.
    for gamma in (1, 2):
        assert not engine.has_window(
            Program(ROWS, S, gamma), engine.draft_kind(params.draft), SETTINGS
        )
    assert not engine.has_window(
        Program(ROWS, 2 * S, 0), engine.draft_kind(params.draft), SETTINGS
    )
    assert not engine.has_window(
        Program(ROWS + 1, S, 0), engine.draft_kind(params.draft), SETTINGS
    )


def test_a_draft_of_another_kind_is_another_program(
    engine: Engine, params: PolicyParams
) -> None:
    window(engine, params, start(engine), 2, max_rounds=1)
    program = Program(ROWS, S, 2)
    assert engine.has_window(program, engine.draft_kind(params.draft), SETTINGS)
    for other in (DrafterConfig(bits=4), DrafterConfig(act_bits=16)):
        policy_and_draft = er_jax.attach_draft(params.policy, other)
        assert not engine.has_window(
            program, engine.draft_kind(policy_and_draft.draft), SETTINGS
        )


def test_moves_are_programs_too(engine: Engine, params: PolicyParams) -> None:
    state = start(engine)
    state = jax.tree.map(jnp.asarray, state)
    assert engine.has_take((ROWS, S), (ROWS, S))  # nothing to do
    assert not engine.has_take((ROWS, S), (3, S))
    smaller = engine.take(state, np.array([2, NONE, 0]), S)
    assert engine.has_take((ROWS, S), (3, S))
    assert not engine.has_take((3, S), (ROWS, S))
    np.testing.assert_array_equal(smaller.live, [True, False, True])
    np.testing.assert_array_equal(smaller.sequence_id, [2, NONE, 0])
    np.testing.assert_array_equal(smaller.tokens[:, 0], [3, 1, 1])
    # The state a move came from is still there: moving does not donate.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_engines_are_shared_by_policy_shapes_and_rule(params: PolicyParams) -> None:
    policy = params.policy
    first = kept.engine_for(POLICY, policy, "coupled")
    same = er_jax.Decoder(dataclasses.replace(POLICY.config))
    other_values = POLICY.init(jax.random.key(5))
    assert kept.engine_for(same, other_values, "coupled") is first
    assert kept.engine_for(POLICY, policy, "block") is not first
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy)
    assert kept.engine_for(POLICY, half, "coupled") is not first
    wide = er_jax.Decoder(dataclasses.replace(POLICY.config, rope_theta=5.0))
    assert kept.engine_for(wide, policy, "coupled") is not first
    assert kept.engine_for(POLICY, policy, "coupled") is first


def test_engines_are_forgotten_oldest_first(
    params: PolicyParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_kept", type(kept._kept)())
    monkeypatch.setattr(kept, "MAX_ENGINES", 2)
    shapes = params.policy

    def get(theta: float) -> Engine:
        config = dataclasses.replace(POLICY.config, rope_theta=theta)
        return kept.engine_for(er_jax.Decoder(config), shapes, "coupled")

    one, two = get(1.0), weakref.ref(get(2.0))
    assert get(1.0) is one  # used again: now the younger
    three = get(3.0)
    assert get(1.0) is one
    assert get(3.0) is three
    assert two() is None


def test_nonfinite_parameters_are_found_by_name(
    engine: Engine, params: PolicyParams
) -> None:
    assert engine.find_nonfinite(params.policy) == []
    bad = jax.tree.map(lambda x: x, params.policy)
    bad["layers"][0]["q_proj"] = bad["layers"][0]["q_proj"].at[1, 2].set(jnp.nan)
    bad["final_norm"] = bad["final_norm"].at[0].set(-jnp.inf)
    assert set(engine.find_nonfinite(bad)) == {"layers/0/q_proj", "final_norm"}


def test_integer_leaves_are_not_asked_whether_they_are_finite() -> None:
    engine = Engine(POLICY, "coupled")
    tree = {"a": jnp.arange(3), "b": jnp.array([1.0, jnp.inf]), "c": jnp.ones(2)}
    assert engine.find_nonfinite(tree) == ["b"]


def test_memory_of_this_device() -> None:
    limit = devices.device_memory_bytes()
    assert limit is not None
    assert 2**28 < limit < 2**50


def test_forgotten_programs_are_freed(params: PolicyParams) -> None:
    """On CPU some hundred of them exhaust the memory mappings of a process."""
    client = jax.devices()[0].client

    def num_programs() -> int:
        gc.collect()
        return len(client.live_executables())

    kept.forget_engines()
    jax.clear_caches()  # Of other tests, which compiling would empty in between.
    before = num_programs()
    engine = kept.engine_for(POLICY, params.policy, "coupled")
    window(engine, params, start(engine), 0, max_rounds=1)
    window(engine, params, start(engine), 2, max_rounds=1)
    assert num_programs() >= before + 3
    del engine
    kept.forget_engines()
    assert num_programs() <= before


def test_more_stop_ids_than_there_is_room_for(
    engine: Engine, params: PolicyParams
) -> None:
    """Their number is a shape, so it has to be part of what names a program."""
    window(engine, params, start(engine), 0, max_rounds=1)
    many = dataclasses.replace(SETTINGS, stop_ids=np.full(16, NONE, np.int32))
    _, running = engine.start_window(
        params, start(engine), many, 0, exit_live=0, max_rounds=1
    )
    assert running.wait()[0].num_rounds == 1


def test_what_ended_can_be_fetched_while_the_next_window_runs(
    engine: Engine, params: PolicyParams
) -> None:
    state, first = engine.start_window(
        params, start(engine), SETTINGS, 0, exit_live=0, max_rounds=3
    )
    info, _, _ = first.wait()
    wanted = np.array(state.tokens), np.array(state.logprobs)
    assert (info.length == 4).all() and wanted[0][:, 1:4].any()
    state, second = engine.start_window(
        params, state, SETTINGS, 0, exit_live=0, max_rounds=3
    )
    np.testing.assert_array_equal(first.buffers[0], wanted[0])
    np.testing.assert_array_equal(first.buffers[1], wanted[1])
    assert (second.wait()[0].length == 7).all()
    assert not np.array_equal(state.tokens, wanted[0])


@dataclasses.dataclass
class Clock:
    """A clock that somebody else moves."""

    now_s: float = 100.0

    def read(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made.read)
    return made


def test_seconds_of_a_window_leave_out_what_the_host_did_meanwhile(
    engine: Engine, params: PolicyParams, clock: Clock
) -> None:
    _, running = engine.start_window(
        params, start(engine), SETTINGS, 0, exit_live=0, max_rounds=20
    )
    running._info.num_rounds.block_until_ready()
    clock.now_s += 5
    _, seconds, is_measured = running.wait()
    assert seconds == 0
    # A window may be over as soon as it was started, and is measured by that.
    assert is_measured == running._is_sync


def test_windows_are_measured(engine: Engine, params: PolicyParams) -> None:
    def is_measured() -> bool:
        _, running = engine.start_window(
            params, start(engine), SETTINGS, 0, exit_live=0, max_rounds=20
        )
        return running.wait()[2]

    # A busy machine may let the host sleep through many windows.
    assert any(is_measured() for _ in range(100))


class Result:
    """Rounds of a window that is over when the test says so."""

    def __init__(self, clock: Clock, seconds_left: float) -> None:
        self.clock, self.end_s = clock, clock.now_s + seconds_left

    def is_ready(self) -> bool:
        return self.clock.now_s >= self.end_s

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self.clock.now_s = max(self.clock.now_s, self.end_s)
        return np.array(7)


@pytest.mark.parametrize(
    ("took_s", "meanwhile_s", "wanted_s", "is_measured"),
    [
        (5, 2, 5 + 1, True),  # waited for
        (5, 30, 1, False),  # over before: only what it took to start it
        (0, 30, 1, True),  # started and over at once
    ],
)
def test_a_window_is_measured_by_who_waits_for_it(
    took_s: float, meanwhile_s: float, wanted_s: float, is_measured: bool, clock: Clock
) -> None:
    """Each was told to the device one second after its start."""
    start_s = clock.now_s
    clock.now_s += 1
    rest = dict.fromkeys((f.name for f in dataclasses.fields(WindowInfo)), np.zeros(1))
    info = WindowInfo(**rest | {"num_rounds": Result(clock, took_s)})  # type: ignore[arg-type]
    window = RunningWindow(info, (), start_s)  # type: ignore[arg-type]
    clock.now_s += meanwhile_s
    found, seconds, was_measured = window.wait()
    assert found.num_rounds == 7
    assert (seconds, was_measured) == (wanted_s, is_measured)


def test_rows_are_fetched_by_their_number(engine: Engine, params: PolicyParams) -> None:
    state, window = engine.start_window(
        params, start(engine), SETTINGS, 0, exit_live=0, max_rounds=3
    )
    window.wait()
    wanted = np.array(state.tokens), np.array(state.logprobs)
    found = engine.fetch_rows(window.buffers, np.array([2, 0]))
    assert list(found) == [2, 0]
    assert len({row.tobytes() for row in wanted[0]}) == len(wanted[0])
    for row, parts in found.items():
        for part, whole in zip(parts, wanted, strict=True):
            np.testing.assert_array_equal(part, whole[row])
