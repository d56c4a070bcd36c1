"""Replicas that sample apart: the same tokens, and work dealt evenly."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from er_jax.mesh import layout, replicas
from tests import test_mesh
from tests.test_mesh import POLICY, config_of, mesh_of, parameters
from train.controllers import RuleController
from train.trainer import Trainer

WAIT_S = 60

# Each place of a mesh has programs of its own; what they compute, it shares.
pytestmark = pytest.mark.usefixtures("unoptimized_module")


def prompts() -> list[list[int]]:
    """Nine whose completions all fit a cache of one length."""
    rng = np.random.default_rng(0)
    return [rng.integers(12, 512, rng.integers(2, 32)).tolist() for _ in range(9)]


def sample(**changes: Any) -> er_jax.Rollout:
    options: dict[str, Any] = dict(
        key=jax.random.key(3),
        config=config_of(max_new_tokens=20, control="ar", max_slots=4),
        mesh=mesh_of(data=4, model=2),
    )
    options |= changes
    return er_jax.rollout_replicas(
        POLICY, parameters(), options.pop("prompts", prompts()), **options
    )


@functools.cache
def wanted() -> er_jax.Rollout:
    return er_jax.rollout(
        POLICY, parameters(), prompts(), key=jax.random.key(3),
        config=config_of(max_new_tokens=20, control="ar"),
    )  # fmt: skip


def test_tokens_are_those_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    main, original = threading.get_ident(), replicas.replica_params

    def replica_params(*args: Any) -> Any:
        assert threading.get_ident() == main, "JAX's shards are not safe for threads"
        return original(*args)

    monkeypatch.setattr(replicas, "replica_params", replica_params)
    found = sample(
        expected_lengths=range(9), on_finish=lambda name, _: told.append(name)
    )
    test_mesh.assert_same(found, wanted())
    assert sorted(told) == list(range(27))
    assert len(found.stats.replica_s) == 4 and min(found.stats.replica_s) > 0
    assert 0 < found.stats.idle_share < 1
    assert found.stats.num_tokens == found.lengths.sum()
    assert "replicas: 4" in found.stats.summary()
    # Three completions of a prompt stay together, so each is prefilled once.
    assert found.stats.num_prefilled == 9


@pytest.mark.slow
def test_replicas_have_turns_and_a_journal_each(tmp_path: Path) -> None:
    def respond(sequence_id: int, turn: er_jax.Turn) -> list[int] | None:
        return [20 + sequence_id] * 2 if turn.room > 2 and turn.index < 2 else None

    config = config_of(max_new_tokens=20, control="ar", max_slots=4)
    alone = er_jax.rollout(
        POLICY, parameters(), prompts(), key=jax.random.key(3), config=config,
        respond=respond,
    )  # fmt: skip
    mesh, path = mesh_of(data=2, model=4), tmp_path / "journal"
    found = sample(respond=respond, journal=path, mesh=mesh)
    test_mesh.assert_same(found, alone)
    np.testing.assert_array_equal(found.completion_mask, alone.completion_mask)
    assert found.stats.num_answers == alone.stats.num_answers > 5
    assert len(list(tmp_path.iterdir())) == 2
    again = sample(respond=respond, journal=path, mesh=mesh)
    test_mesh.assert_same(again, alone)
    assert not again.stats.timeline
    with pytest.raises(ValueError, match="respond=3 must be a function"):
        sample(respond=3)
    with pytest.raises(ValueError, match="of another request"):
        sample(journal=path, mesh=mesh)


def test_a_replica_may_have_several_copies_of_the_weights() -> None:
    config = config_of(max_new_tokens=4, n=2, control="ar", max_slots=2)
    options = dict(prompts=prompts()[:3], config=config, mesh=mesh_of(data=8, model=1))
    found = sample(**options, num_replicas=2)
    assert len(found.stats.replica_s) == 2
    assert found.stats.timeline[0].rows == 4, "a row for each of four places"
    np.testing.assert_array_equal(found.completion_ids[2], first(1, 2)[:4])
    for number in (0, 3, 16):
        with pytest.raises(ValueError, match=f"num_replicas={number} must divide"):
            sample(**options, num_replicas=number)


def test_more_replicas_than_prompts() -> None:
    found = er_jax.rollout_replicas(
        POLICY, parameters(), prompts()[:2], key=jax.random.key(3),
        config=config_of(max_new_tokens=20, n=1, control="ar"),
        mesh=mesh_of(data=4, model=2),
    )  # fmt: skip
    np.testing.assert_array_equal(found.completion_ids, np.stack([first(0), first(1)]))
    assert found.stats.replica_s.count(0.0) == 2


def test_replicas_share_the_controller_they_are_given(tmp_path: Path) -> None:
    """What it says is done by all, and what they find is learnt by it."""
    config = config_of(max_new_tokens=20, control="ar", max_slots=4)
    controller = er_jax.Controller("ar", patience=1e9)
    with pytest.raises(ValueError, match="controller chooses from gammas"):
        sample(config=config, controller=er_jax.Controller("fixed:2"))
    found = sample(
        config=config, controller=controller, profile=tmp_path / "trace",
    )  # fmt: skip
    test_mesh.assert_same(found, wanted())
    assert controller.table.seconds
    alive = sum(live for live, _ in controller._live_shares.counts.values())
    assert alive > 0.3 * found.lengths.sum(), "one replica of four learnt"
    assert any((tmp_path / "trace").rglob("*.pb")), "there is no trace"


def test_replicas_follow_a_controller_of_rules() -> None:
    """Sizes of batches by fours, and not as the clock would have them."""
    config = config_of(max_new_tokens=20, control="ar", max_slots=4)
    seen: list[tuple[list[int], int]] = []

    class Told(RuleController):
        def choose(self, options: Any, current: Any, **known: Any) -> Any:
            chosen = super().choose(options, current, **known)
            seen.append((sorted({p.rows for p in options}), chosen.rows))
            return chosen

    found = sample(config=config, controller=Told("ar"))
    test_mesh.assert_same(found, wanted())
    assert {sizes[-1] for sizes, _ in seen} == {4}
    for sizes, rows in seen:
        assert rows == (1 if 1 in sizes else 4)
    assert {rows for _, rows in seen} == {1, 4}


@pytest.mark.parametrize(
    ("processes", "is_good"),
    [
        ([[0, 0], [0, 0], [1, 1], [1, 1]], True),
        ([[0, 1], [2, 3]], True),
        ([[0, 1], [0, 1]], False),
        ([[0, 1], [1, 2]], False),
        ([[0, 0], [0, 1]], False),
    ],
)
def test_replicas_that_cannot_share_a_controller(
    processes: list[list[int]], is_good: bool
) -> None:
    """A process would decide by what the other replica of its showed it first."""
    parts: Any = [
        SimpleNamespace(
            devices=np.array([SimpleNamespace(process_index=p) for p in own])
        )
        for own in processes
    ]
    if is_good:
        replicas._check_shared(parts)
        return
    with pytest.raises(ValueError, match=r"spans processes.* use controller=None"):
        replicas._check_shared(parts)


@pytest.mark.parametrize("is_replicas", [False, True])
def test_training_samples_with_its_own_controller(
    is_replicas: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--reproducible` is a controller: with replicas it was made and not used."""
    told: list[Any] = []

    def sampled(name: str) -> Any:
        def sample(*_: Any, **options: Any) -> None:
            told.append((name, options["controller"]))
            raise InterruptedError

        return sample

    for name in ("rollout", "rollout_replicas"):
        monkeypatch.setattr(er_jax, name, sampled(name))
    run: Any = SimpleNamespace(
        subject=SimpleNamespace(
            tokenizer=SimpleNamespace(encode_prompt=None), stop_token_ids=()
        ),
        placement=SimpleNamespace(sampler=lambda *_: None, sampling=None),
        state=SimpleNamespace(params=None, gathered=None),
        config=SimpleNamespace(
            mesh=SimpleNamespace(replicas=is_replicas),
            grpo=SimpleNamespace(stream=False),
            rollout_config=lambda **_: None,
        ),
        controller=object(), policy=None, tool=None,
    )  # fmt: skip
    with pytest.raises(InterruptedError):
        Trainer.sample(run, [], n=2, key=None, first_sequence_id=0)  # type: ignore[arg-type]
    name = "rollout_replicas" if is_replicas else "rollout"
    assert told == [(name, run.controller)]


def first(prompt: int, name: int | None = None) -> np.ndarray:
    """The first tokens of a completion sampled alone by its name."""
    out = er_jax.rollout(
        POLICY, parameters(), [prompts()[prompt]], key=jax.random.key(3),
        config=config_of(max_new_tokens=20, n=1, control="ar"),
        sequence_ids=[prompt if name is None else name],
    )  # fmt: skip
    return out.completion_ids[0]


def test_a_failure_keeps_what_all_replicas_finished() -> None:
    def on_finish(name: int, _: er_jax.Completion) -> None:
        if name == 0:
            raise OSError("disk full")

    with pytest.raises(
        er_jax.RolloutError, match=r"1 of 4 replicas.*disk full"
    ) as info:
        sample(on_finish=on_finish)
    found = info.value.completions
    assert len(found) > 15 and 0 in found
    for name, completion in found.items():
        length = wanted().lengths[name]
        np.testing.assert_array_equal(
            completion.token_ids, wanted().completion_ids[name, :length]
        )


def test_a_replica_refused_on_the_way_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One finds too little memory for its share, after others have begun."""

    def rollout(*args: Any, sequence_ids: list[int], **options: Any) -> Any:
        if 0 in sequence_ids or is_none:
            raise ValueError("max_slots=16 is too many")
        return er_jax.rollout(*args, sequence_ids=sequence_ids, **options)

    monkeypatch.setattr(replicas, "rollout", rollout)
    is_none = False
    with pytest.raises(
        er_jax.RolloutError, match=r"1 of 4 replicas.*max_slots"
    ) as info:
        sample()
    assert len(info.value.completions) > 15 and 0 not in info.value.completions
    is_none = True
    with pytest.raises(ValueError, match="max_slots=16 is too many"):
        sample()


def test_an_interrupted_call_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    one_is_told, stopped = threading.Event(), threading.Event()

    def wait(running: Any) -> Any:
        assert one_is_told.wait(WAIT_S)
        signal.raise_signal(signal.SIGINT)
        return concurrent.futures.wait(running)

    class Watched(er_jax.Stop):
        def __call__(self) -> None:
            super().__call__()
            stopped.set()

    # Both are the module's: where the main thread waits, and how it tells the others.
    pool = concurrent.futures.ThreadPoolExecutor
    futures = SimpleNamespace(wait=wait, ThreadPoolExecutor=pool)
    monkeypatch.setattr(replicas, "concurrent", SimpleNamespace(futures=futures))
    monkeypatch.setattr(replicas, "Stop", Watched)

    def on_finish(name: int, _: er_jax.Completion) -> None:
        told.append(name)
        if len(told) == 1:
            one_is_told.set()
            assert stopped.wait(WAIT_S)

    with pytest.raises(KeyboardInterrupt) as info:
        sample(on_finish=on_finish)
    assert len(told) < 27
    assert_kept(info.value)


def test_replicas_end_without_another_completion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An interrupted call does not wait until each replica has finished a row."""
    ends: list[er_jax.Until | None] = []

    def rollout(*_: Any, until: er_jax.Until | None = None, **__: Any) -> Any:
        ends.append(until)
        assert until is not None
        assert until.stop is not None
        assert until.stop._event.wait(WAIT_S), "nobody was told to end"

    def wait(running: Any) -> Any:
        raise KeyboardInterrupt

    pool = concurrent.futures.ThreadPoolExecutor
    futures = SimpleNamespace(wait=wait, ThreadPoolExecutor=pool)
    monkeypatch.setattr(replicas, "concurrent", SimpleNamespace(futures=futures))
    monkeypatch.setattr(replicas, "rollout", rollout)
    with pytest.raises(KeyboardInterrupt):
        sample()
    assert len(ends) == 4


def assert_kept(error: Any) -> None:
    """All that had finished by then is there, and is what it should be."""
    assert error.completions
    for name, completion in error.completions.items():
        length = wanted().lengths[name]
        np.testing.assert_array_equal(
            completion.token_ids, wanted().completion_ids[name, :length]
        )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_callback_that_ends_the_program_loses_nothing(
    stop: type[BaseException],
) -> None:
    def on_finish(name: int, _: er_jax.Completion) -> None:
        if name == 0:
            raise stop

    with pytest.raises(stop) as info:
        sample(on_finish=on_finish)
    assert len(info.value.completions) > 15  # type: ignore[attr-defined]
    assert_kept(info.value)


def test_parameters_are_not_copied() -> None:
    mesh = layout.rollout_mesh(mesh_of(data=4, model=2))
    sharded = layout.put_on_mesh(POLICY, parameters(), mesh)
    parts = replicas.replica_meshes(mesh, 4)
    assert [list(part.devices.flat) for part in parts] == [
        jax.devices()[2 * i : 2 * i + 2] for i in range(4)
    ]
    for part in parts:
        own = replicas.replica_params(sharded, mesh, part)
        for mine, whole in zip(
            jax.tree.leaves(own), jax.tree.leaves(sharded), strict=True
        ):
            np.testing.assert_array_equal(mine, whole)
            pointers = {
                s.data.unsafe_buffer_pointer() for s in whole.addressable_shards
            }
            assert {
                s.data.unsafe_buffer_pointer() for s in mine.addressable_shards
            } <= pointers


def test_the_longest_are_dealt_first() -> None:
    assert replicas.deal([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]
    assert replicas.deal([0, 0, 0, 0], 4) == [[0], [1], [2], [3]]
    assert replicas.deal([1.0], 3) == [[0], [], []]
    rng = np.random.default_rng(0)
    for _ in range(200):
        costs, count = rng.exponential(size=rng.integers(1, 8)), int(rng.integers(1, 4))
        dealt = replicas.deal(costs.tolist(), count)
        assert sorted(itertools.chain(*dealt)) == list(range(len(costs)))
        longest = max(costs[tasks].sum() for tasks in dealt)
        best = min(
            max(costs[np.array(to) == r].sum() for r in range(count))
            for to in itertools.product(range(count), repeat=len(costs))
        )
        # Graham's bound for this rule.
        assert longest <= best * (4 / 3 - 1 / (3 * count)) + 1e-12


def test_lengths_are_remembered() -> None:
    known = er_jax.ExpectedLengths(forget=0.25)
    assert known.of(prompts()).tolist() == [1.0] * 9
    out = wanted()
    known.observe(prompts(), out)
    means = out.lengths.reshape(9, 3).mean(axis=1)
    np.testing.assert_allclose(known.of(prompts()), means)
    np.testing.assert_allclose(known.of([[1]]), [means.mean()])
    twice = er_jax.rollout(
        POLICY, parameters(), prompts()[:1], key=jax.random.key(9),
        config=config_of(max_new_tokens=20, control="ar"),
    )  # fmt: skip
    known.observe(prompts()[:1], twice)
    moved = means[0] + 0.25 * (twice.lengths.mean() - means[0])
    np.testing.assert_allclose(known.of(prompts())[0], moved)
    with pytest.raises(ValueError, match="forget=0 must be above 0"):
        er_jax.ExpectedLengths(forget=0)


@pytest.mark.parametrize("lengths", [[1.0], [-1.0] * 9, [float("nan")] * 9])
def test_bad_expectations_are_refused(lengths: list[float]) -> None:
    with pytest.raises(ValueError, match="must be 9 finite numbers of at least 0"):
        sample(expected_lengths=lengths)
