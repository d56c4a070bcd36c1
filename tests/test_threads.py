"""Threads that sample from one policy: each program once, no seconds below zero."""

from __future__ import annotations

import concurrent.futures
import copy
import json
import pickle
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from er_jax.control.estimate import KEEP_PER_ROLLOUT, PRIOR_ROUNDS
from er_jax.costs import timing
from er_jax.costs.table import LatencyTable
from er_jax.engine import engine as engine_module
from er_jax.engine import kept
from er_jax.engine.engine import Engine
from er_jax.types import Program
from tests.small import small_policy
from tests.test_programs import CompileCounter

pytestmark = pytest.mark.usefixtures("unoptimized_module")

SPEC = Program(4, 128, 2)
WAIT_S = 60
NUM_OBSERVED = 1000  # while others ask


def together(*functions: Callable[[], Any]) -> list[Any]:
    """Run functions in threads that begin at the same time; return what they did."""
    barrier = threading.Barrier(len(functions))

    def begin(function: Callable[[], Any]) -> Any:
        barrier.wait(WAIT_S)
        return function()

    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        return [f.result(WAIT_S) for f in [pool.submit(begin, f) for f in functions]]


# Whole rollouts.


@pytest.mark.parametrize(
    "control", ["fixed:2", pytest.param("best", marks=pytest.mark.slow)]
)
def test_threads_sample_what_one_does(
    control: str, compile_counter: CompileCounter
) -> None:
    policy = small_policy(f"threads {control}")
    params = policy.init(jax.random.key(0))
    controller = er_jax.Controller(control, (0, 2), patience=1e9)

    def sample(key: int, name: int = 0) -> er_jax.Rollout:
        return er_jax.rollout(
            policy, params, [[1, 2, 3], [4, 5]], key=jax.random.key(key),
            config=er_jax.RolloutConfig(
                max_new_tokens=12, n=2, gammas=(0, 2), control=control,
                temperature=1 + key / 10,
            ),
            controller=controller,
        )  # fmt: skip

    keys = [jax.random.key(key) for key in range(3)]
    jax.block_until_ready(keys)
    with compile_counter() as compiled:
        found = together(*(lambda key=key: sample(key) for key in range(3)))  # type: ignore[misc]
    names = [name for out in found for name, _ in out.stats.compiled]
    assert len(names) == compiled.count, (names, compiled)
    # On one thread nothing is left to compile, or was compiled beside it.
    for key, out in enumerate(found):
        assert min(out.stats.seconds.values()) >= 0, out.stats.seconds
        assert out.stats.seconds["compile"] >= sum(s for _, s in out.stats.compiled)
        alone = sample(key)
        assert alone.stats.compiled == []
        np.testing.assert_array_equal(out.completion_ids, alone.completion_ids)
    engine = kept.engine_for(policy, params, "coupled")
    assert len(engine.compiled) == len(names)
    # What was learnt is whole: another controller takes it.
    again = er_jax.Controller(control, (0, 2))
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert len(again.state_dict()["acceptance"]) == 4


def test_threads_share_the_controller_of_unnamed_calls() -> None:
    policy = small_policy("unnamed controller")
    params = policy.init(jax.random.key(0))
    measured: list[Any] = []
    measure = timing.measure_round

    def measure_round(*args: Any, **options: Any) -> float:
        measured.append(args[2])
        return measure(*args, **options)

    def sample() -> er_jax.Rollout:
        return er_jax.rollout(
            policy, params, [[1, 2, 3]], key=jax.random.key(1),
            config=er_jax.RolloutConfig(max_new_tokens=6, gammas=(0, 2)),
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "measure_round", measure_round)
        one, other = together(sample, sample)
    np.testing.assert_array_equal(one.completion_ids, other.completion_ids)
    assert len(measured) == len(set(measured)), "costs were measured twice"
    assert len(kept.engine_for(policy, params, "coupled").defaults) == 1


def test_engines_may_be_forgotten_while_a_thread_samples(
    compile_counter: CompileCounter,
) -> None:
    policy = small_policy("forgotten")
    params = policy.init(jax.random.key(0))
    key = jax.random.key(1)

    def forget(sequence_id: int, completion: er_jax.Completion) -> None:
        together(kept.forget_engines)

    with compile_counter() as compiled:
        out = er_jax.rollout(
            policy, params, [[1, 2, 3]], key=key, on_finish=forget,
            config=er_jax.RolloutConfig(
                max_new_tokens=6, n=4, max_slots=1, control="ar"
            ),
        )  # fmt: skip
    assert out.lengths.tolist() == [6] * 4
    assert compiled.count == len(out.stats.compiled) == 4


# Compiling.


class Door:
    """A lock that tells when so many threads have come to it."""

    def __init__(self, count: int) -> None:
        self.lock, self.counting = threading.Lock(), threading.Lock()
        self.missing, self.all_there = count, threading.Event()

    def __enter__(self) -> None:
        with self.counting:
            self.missing -= 1
            if self.missing == 0:
                self.all_there.set()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def door(engine: Engine, name: str, count: int) -> Door:
    """Put a door before a program that is to be asked for by `count` threads."""
    made = Door(count)
    under_way = engine._executables._under_way
    under_way[engine._key(name)] = made  # type: ignore[assignment]
    return made


class Lowered:
    """A program that does something while it is compiled, and may fail."""

    def __init__(self, meanwhile: Callable[[], Any], fails: int = 0) -> None:
        self.meanwhile, self.fails, self.num_compiled = meanwhile, fails, 0

    def clear_cache(self) -> None: ...

    def compile(self) -> Any:
        self.num_compiled += 1
        self.meanwhile()
        if self.num_compiled <= self.fails:
            raise MemoryError("no room to compile")
        return SimpleNamespace()


def ask(engine: Engine, name: str, lowered: Lowered) -> float:
    """Ask for a program; return what that cost this thread of compilation."""
    before = engine.compile_s
    engine._program((name,), lowered, lambda _: lowered)
    return engine.compile_s - before


def test_a_program_that_is_being_compiled_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(small_policy("compiling"), "coupled")
    others, now_s = door(engine, "a", 3), 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)

    def compile_for_five_seconds() -> None:
        nonlocal now_s
        assert others.all_there.wait(WAIT_S)
        now_s += 5

    lowered = Lowered(compile_for_five_seconds)
    costs = together(*[lambda: ask(engine, "a", lowered)] * 3)
    assert lowered.num_compiled == 1
    # Whoever waited spent its time on it as well, and nobody else's.
    assert costs == [5, 5, 5]
    assert engine.compile_s == 0 and engine.compiled_here == []
    assert ask(engine, "a", lowered) == 0


def test_other_programs_are_compiled_meanwhile() -> None:
    engine = Engine(small_policy("compiling"), "coupled")
    both = threading.Barrier(2)
    together(
        lambda: ask(engine, "a", Lowered(lambda: both.wait(WAIT_S))),
        lambda: ask(engine, "b", Lowered(lambda: both.wait(WAIT_S))),
    )
    assert {name[0] for name in engine.compiled} == {"a", "b"}


def test_whoever_waited_for_a_failure_tries_itself() -> None:
    engine = Engine(small_policy("compiling"), "coupled")
    both = door(engine, "a", 2)
    lowered = Lowered(lambda: both.all_there.wait(WAIT_S), fails=1)
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            ask(engine, "a", lowered)
        except MemoryError as error:
            errors.append(error)

    together(attempt, attempt)
    assert lowered.num_compiled == 2 and len(errors) == 1
    assert list(engine.compiled) == [("a",)]


def test_two_drafts_at_once_are_two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One name for both would run one with the program of the other."""
    engine = Engine(small_policy("compiling"), "coupled")
    both = threading.Barrier(2)
    describe = engine_module.signature

    def signature(*args: Any) -> Any:
        both.wait(WAIT_S)
        return describe(*args)

    monkeypatch.setattr(engine_module, "signature", signature)
    kinds = together(
        lambda: engine.draft_kind(np.zeros(3)),
        lambda: engine.draft_kind(np.zeros(4)),
    )
    assert len(set(kinds)) == 2


# A controller that rollouts share.


def test_a_rollout_in_another_thread_has_its_own_setting() -> None:
    controller = er_jax.Controller("best", (0, 2))
    begun, observed = threading.Event(), threading.Event()

    def first() -> Any:
        controller.start_rollout((1.0,))
        begun.set()
        assert observed.wait(WAIT_S)
        for _ in range(20):
            controller.observe(SPEC, 10, np.array([0, 0, 100]), 0.1)
        assert controller.broken_drafter is None
        return controller.acceptance

    def second() -> Any:
        assert begun.wait(WAIT_S)
        controller.start_rollout((0.5,))
        for _ in range(20):
            controller.observe(SPEC, 10, np.array([100, 0, 0]), 0.1)
        observed.set()
        assert controller.broken_drafter is not None
        return controller.acceptance

    kept, lost = together(first, second)
    assert kept is not lost
    assert kept.keep_probs(1)[0] > 0.95 and lost.keep_probs(1)[0] < 0.1


def test_a_rollout_inside_of_another_leaves_it_as_it_was() -> None:
    controller = er_jax.Controller("best", (0, 2))
    with controller.sampling((1.0,)):
        outer = controller.acceptance
        with controller.sampling((0.5,)):
            assert controller.acceptance is not outer
        assert controller.acceptance is outer


def test_rollouts_at_once_forget_once() -> None:
    """Replicas sample from the same policy: what is known weighs less once a step."""
    controller = er_jax.Controller("best", (0, 2))
    for _ in range(3):
        with controller.sampling((1.0,)):
            controller.acceptance.tested[:] = controller.acceptance.kept[:] = 1000.0
        everybody = threading.Barrier(4)

        def replica(everybody: threading.Barrier = everybody) -> None:
            with controller.sampling((1.0,)):
                everybody.wait(WAIT_S)

        together(*[replica] * 4)
        assert controller.acceptance.tested[0] == 1000 * KEEP_PER_ROLLOUT
    assert controller.acceptance.tested[0] > PRIOR_ROUNDS


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_a_controller_can_be_copied(how: Callable[[Any], Any]) -> None:
    controller = er_jax.Controller("paper")
    with controller.sampling((1.0,)):
        controller.observe(Program(4, 128, 5), 10, np.array([0] * 5 + [100]), 0.1)
        again = how(controller)
    assert again.state_dict() == controller.state_dict()
    with controller.sampling((1.0,)), again.sampling((1.0,)):
        assert again.acceptance is not controller.acceptance
    assert again.acceptance.tested[0] == controller.acceptance.tested[0]


def test_a_table_is_asked_while_it_is_filled() -> None:
    """Predictions are remembered, and forgotten by whoever observes."""
    table = LatencyTable({Program(4, 128, 0): 1e-3, Program(4, 128, 2): 2e-3})
    is_filled = threading.Event()

    def ask() -> None:
        while not is_filled.is_set():
            for rows in (1, 2, 8, 16):
                assert table.round_seconds(Program(rows, 128, 2))

    def fill() -> None:
        for rows in range(1, NUM_OBSERVED):
            table.observe(Program(4, 128, 2), 2e-3 * (1 + rows % 7), 1)
            table.observe(Program(32 + rows % 64, 128, 0), 2e-3, 1)
        is_filled.set()

    together(ask, ask, fill)
