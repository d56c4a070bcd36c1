"""Streams: the tokens of a rollout, given out as they finish; what ends early, and how.

`Ending` acts in the sampling thread at its k-th decision and `Tail` at the first with a
row less than there are, so that nothing here depends on which thread is faster.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from benchmarks.lib.controllers import Restless
from er_jax import Rollout, Stop, Until
from er_jax.scheduler import batch
from er_jax.thread_settings import ThreadSettings
from er_jax.types import Program
from tests.test_resume import (
    CONFIG,
    KEY,
    POLICY,
    PROMPTS,
    Ending,
    assert_same,
    is_prefix,
    params,
    sample,
)

pytestmark = pytest.mark.usefixtures("unoptimized_module")

WAIT_S = 60
IDS = list(range(100, 108))


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make windows short, and see to it that no thread is left."""
    monkeypatch.setattr(batch, "MIN_ROUNDS", 3)
    monkeypatch.setattr(batch, "MAX_ROUNDS", 3)
    yield
    assert sampling() == []


class Tail(Restless):
    """Calls a function once, when no sequence waits and some have been given out."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__("best", (0, 3), (1, 2, 4), 0)
        self.acts = [act]

    def choose(
        self, options: Sequence[Program], current: Program | None, **known: Any
    ) -> Program:
        if known["live"] < CONFIG.max_slots and self.acts:
            self.acts.pop()()
        return super().choose(options, current, **known)


def sampling() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "er_jax.stream"]


def streamed(
    decisions: int = 10**9, act: Callable[[], None] = lambda: None, **named: Any
) -> er_jax.Stream[Any]:
    named = {"controller": Ending(decisions, act)} | named
    return er_jax.stream(POLICY, params(), PROMPTS, key=KEY, config=CONFIG, **named)


@pytest.fixture
def wanted(x64: None) -> Rollout:
    return sample(controller=Restless("best", (0, 3), (4,), 0))


def test_the_pairs_are_those_of_a_rollout(wanted: Rollout) -> None:
    """In float64, which only the calling thread has enabled."""
    with streamed(sequence_ids=IDS) as items:
        found = list(items)
    whole = sample(sequence_ids=IDS, controller=Restless("best", (0, 3), (4,), 0))
    assert sorted(name for name, _ in found) == IDS
    for name, completion in found:
        row = IDS.index(name)
        length = whole.lengths[row]
        assert completion.finish_reason == whole.finish_reason[row]
        np.testing.assert_array_equal(
            completion.token_ids, whole.completion_ids[row, :length]
        )
    assert_same(items.rollout, whole)
    assert list(items) == [], "given out twice"


def test_groups_are_whole_and_given_once(wanted: Rollout) -> None:
    given: list[int] = []
    with streamed(by="group") as items:
        for prompt, members in items:
            given.append(prompt)
            assert len(members) == 2
            rows = range(2 * prompt, 2 * prompt + 2)
            for row, completion in zip(rows, members, strict=True):
                np.testing.assert_array_equal(
                    completion.token_ids,
                    wanted.completion_ids[row, : wanted.lengths[row]],
                )
                assert completion.finish_reason == wanted.finish_reason[row]
    assert sorted(given) == [0, 1, 2, 3]


def test_groups_that_go_on_have_what_had_finished(wanted: Rollout) -> None:
    part = sample(until=Until(finished=3), controller=Restless("best", (0, 3), (4,), 0))
    had = (part.finish_reason != "unfinished").reshape(4, 2)
    assert had.any() and not had.all()
    found = dict(streamed(by="group", resume=part))
    assert sorted(found) == np.flatnonzero(~had.all(1)).tolist()
    for prompt, members in found.items():
        for i, completion in enumerate(members):
            assert len(completion.token_ids) == wanted.lengths[2 * prompt + i]


def test_items_come_while_the_rest_decodes(wanted: Rollout) -> None:
    """The rollout waits here for its first item to be taken, or it never would end."""
    taken = threading.Event()

    def wait() -> None:
        assert taken.wait(WAIT_S)

    controller = Tail(wait)
    with streamed(controller=controller) as items:
        first, _ = next(items)
        taken.set()
        assert sorted([first, *(name for name, _ in items)]) == list(range(8))
    assert controller.acts == []


def test_a_slow_consumer_stalls_nothing(wanted: Rollout) -> None:
    with streamed() as items:
        for thread in sampling():
            thread.join(WAIT_S)
        assert sampling() == [], "it waits for its consumer"
        with pytest.raises(RuntimeError, match=r"iterate to the end, or call close"):
            _ = items.rollout
        assert len(list(items)) == 8


def test_closed_early_it_goes_on_later(wanted: Rollout) -> None:
    gc.collect()
    before = len(jax.live_arrays())
    items = streamed(by="completion")
    next(items)
    items.close()
    items.close()
    assert sampling() == [] and list(items) == []
    part = items.rollout
    assert is_prefix(part, wanted)
    del items
    gc.collect()
    assert len(jax.live_arrays()) <= before
    rest = streamed(resume=part, version=1)
    given = {name for name, _ in rest}
    assert given == set(np.flatnonzero(part.finish_reason == "unfinished").tolist())
    assert_same(rest.rollout, wanted)


def test_a_window_after_closing_is_the_last(wanted: Rollout) -> None:
    """What is closed when it has decided on a window decides on no other."""
    closing, decided = threading.Event(), threading.Event()

    def wait() -> None:
        decided.set()
        assert closing.wait(WAIT_S)

    controller = Ending(2, wait)
    items = streamed(controller=controller)
    assert decided.wait(WAIT_S)
    closer = threading.Thread(target=items.close)
    closer.start()
    while not items._work.stop.is_set:
        closer.join(0.01)
    closing.set()
    closer.join(WAIT_S)
    assert controller.left == 0
    assert "unfinished" in items.rollout.finish_reason


def test_leaving_a_loop_ends_it(x64: None) -> None:
    for _ in streamed():
        assert sampling()
        break
    gc.collect()
    assert sampling() == []


def test_an_exception_of_the_consumer_ends_it(x64: None) -> None:
    with pytest.raises(ZeroDivisionError), streamed() as items:
        for _ in items:
            1 / 0  # noqa: B018
    assert sampling() == []
    assert items.rollout.lengths.any()


def test_a_failure_reaches_the_consumer(x64: None) -> None:
    """After what had finished before it."""

    def fail() -> None:
        raise ArithmeticError("planted")

    with streamed(controller=Tail(fail)) as items:
        given = []
        with pytest.raises(er_jax.RolloutError, match="planted") as caught:
            for item in items:
                given.append(item)
    assert given
    assert {name for name, _ in given} <= set(caught.value.completions)
    with pytest.raises(er_jax.RolloutError, match="planted"):
        _ = items.rollout


def test_until_and_its_stop_are_heard(wanted: Rollout) -> None:
    stop = Stop()
    items = streamed(3, stop, until=Until(stop=stop))
    assert "unfinished" in {c.finish_reason for _, c in items} | {"unfinished"}
    assert "unfinished" in items.rollout.finish_reason
    assert is_prefix(items.rollout, wanted)
    items = streamed(until=Until(tokens=1))
    list(items)
    assert len(items.rollout.stats.timeline) == 1


def test_ctrl_c_gives_everything(wanted: Rollout) -> None:
    def interrupt() -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught, streamed(3, interrupt) as items:
        list(items)
    part: Rollout = caught.value.rollout  # type: ignore[attr-defined]
    assert part is items.rollout
    assert is_prefix(part, wanted)
    assert_same(sample(resume=part), wanted)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"by": "prompt"}, r"by='prompt' must be one of 'completion', 'group'"),
        ({"until": 3}, "until=3 must be an er_jax.Until"),
        ({"resume": 3}, "resume=int must be a Rollout"),
        ({"sequence_ids": [1]}, "sequence_ids has shape"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(
    named: dict[str, Any], message: str, x64: None
) -> None:
    with pytest.raises(ValueError, match=message):
        streamed(**named)
    assert sampling() == []


def test_parameters_that_are_no_number_are_refused_at_the_call(x64: None) -> None:
    bad = jax.tree.map(lambda x: x * jnp.nan, params())
    with pytest.raises(ValueError, match="params holds NaN"):
        er_jax.stream(POLICY, bad, PROMPTS, key=KEY, config=CONFIG)


# -- settings of a thread


def settings_seen(settings: ThreadSettings) -> tuple[dict[str, Any], Any, Any]:
    """Return what another thread sees: JAX's options, a mesh, a type that follows."""
    found: list[Any] = []

    def look() -> None:
        zeros = jax.eval_shape(lambda: jnp.zeros(1))
        found.append((dict(jax.config.values), jax.sharding.get_mesh(), zeros.dtype))

    thread = threading.Thread(target=lambda: settings.call(look))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda: jax.enable_x64(True),
        lambda: jax.default_matmul_precision("highest"),
        lambda: jax.default_device(jax.devices()[3]),
        lambda: jax.debug_nans(True),
        lambda: jax.numpy_rank_promotion("allow"),
        lambda: jax.numpy_dtype_promotion("standard"),
        lambda: jax.transfer_guard("log"),
        lambda: jax.transfer_guard_device_to_host("disallow"),
        lambda: jax.default_prng_impl("rbg"),
        lambda: jax.disable_jit(True),
        lambda: jax.set_mesh(jax.make_mesh((2,), ("x",))),
    ],
)
def test_a_thread_has_the_settings_of_its_caller(change: Callable[[], Any]) -> None:
    usual = settings_seen(ThreadSettings.here())
    with change():
        wanted = dict(jax.config.values)
        mesh = jax.sharding.get_mesh()
        values, seen, dtype = settings_seen(ThreadSettings.here())
        assert values == wanted
        assert seen == mesh
        assert dtype == jax.eval_shape(lambda: jnp.zeros(1)).dtype
        assert (values, seen) != usual[:2], "nothing was changed"


SCRIPT = """
import jax, er_jax
policy = er_jax.Decoder(er_jax.DecoderConfig(
    vocab_size=24, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=32))
items = er_jax.stream(
    policy, policy.init(jax.random.key(0)), [[1, 2, 3]] * 64, key=jax.random.key(1),
    config=er_jax.RolloutConfig(max_new_tokens=100_000, max_slots=4, control="ar"))
1 / 0
"""


@pytest.mark.slow
def test_a_program_that_ends_does_not_wait_for_its_stream() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=dict(os.environ), capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().endswith("ZeroDivisionError: division by zero")


def test_items_are_copies(wanted: Rollout) -> None:
    """What a consumer does to them changes no result."""
    with streamed() as items:
        for _, completion in items:
            completion.token_ids[:] = 0
    assert_same(items.rollout, wanted)
    assert dataclasses.is_dataclass(items.rollout)
