"""Checkpoints: exact, atomic, complete, and refused when they do not fit."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import er_jax
from configs import tiny
from train.checkpoints import (
    DIRECTORY,
    Checkpoints,
    check_same_config,
    load_policy,
)
from train.config import to_json

POLICY = tiny.CONFIG.model.decoder(64, "float32")
HOST = {"config": to_json(tiny.CONFIG), "position": 7, "controller": {"x": [0.1, None]}}


def contents(seed=0):
    """A policy with its trainer items, of which no leaf is left at zero."""
    params = POLICY.init(jax.random.key(seed))
    state = optax.adam(1e-3).init(params)
    moved = jax.tree.map(lambda x: x + jnp.asarray(seed + 1, x.dtype), state)
    key = jax.random.key_data(jax.random.key(seed))
    return {"policy": params, "trainer": {"opt_state": moved, "key": key}}


def assert_same(one: Any, other: Any) -> None:
    leaves, structure = jax.tree.flatten(one)
    others, other_structure = jax.tree.flatten(other)
    assert str(structure) == str(other_structure)
    for a, b in zip(leaves, others, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_round_trip_is_exact(tmp_path):
    saved = contents()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None
        checkpoints.save(3, **saved, host=HOST)
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(**contents(seed=9))  # only the shapes are used
    assert found.step == 3
    assert found.host == HOST
    assert_same(found.policy, saved["policy"])
    assert_same(found.trainer, saved["trainer"])


def test_step_0_and_the_latest_two_are_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (0, 5, 10, 15):
            checkpoints.save(step, **contents(step), host={**HOST, "position": step})
        assert checkpoints.latest_step == 15
        for step in (0, 10, 15):
            assert checkpoints.restore_host(step)["position"] == step
            params = checkpoints.restore_policy(contents()["policy"], step)
            assert_same(params, contents(step)["policy"])
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 in"):
            checkpoints.restore_host(5)


def test_a_half_written_checkpoint_is_ignored_and_swept_away(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **contents(), host=HOST)
    torn = tmp_path / DIRECTORY / "2.orbax-checkpoint-tmp"
    (torn / "policy").mkdir(parents=True)
    assert load_policy(tmp_path)[0] == POLICY
    assert torn.exists()  # a reader leaves what a writer may be at work on
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1
        checkpoints.save(2, **contents(2), host=HOST)
        assert not torn.exists()
        assert checkpoints.restore(**contents()).step == 2


def test_load_policy(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, **contents(), host=HOST)
        checkpoints.save(4, **contents(4), host=HOST)
    policy, params, tokenizer = load_policy(tmp_path, step=0)
    assert isinstance(policy, er_jax.Decoder)
    assert policy == POLICY
    assert tokenizer.vocab_size == policy.vocab_size
    assert_same(params, contents()["policy"])
    assert_same(load_policy(str(tmp_path))[1], contents(4)["policy"])


def test_load_policy_where_there_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run; make one with"):
        load_policy(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_another_config_is_refused():
    saved = to_json(tiny.CONFIG)
    changed = to_json(dataclasses.replace(tiny.CONFIG, seed=5, control="ar"))
    with pytest.raises(ValueError, match="control: 'fixed:2' -> 'ar'; seed: 0 -> 5"):
        check_same_config(saved, changed)
    check_same_config(saved, to_json(dataclasses.replace(tiny.CONFIG, steps=9)))


SAVE_FOR_EVER = """
    import sys
    from pathlib import Path
    import jax.numpy as jnp
    from train.checkpoints import Checkpoints
    with Checkpoints(Path(sys.argv[1])) as checkpoints:
        for step in range(1_000_000):
            arrays = {"x": jnp.full((300, 1000), step, jnp.float32)}
            checkpoints.save(step, policy=arrays, trainer=arrays, host={"step": step})
            print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.09])
def test_killed_while_saving_the_one_before_is_whole(tmp_path, delay_s):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SAVE_FOR_EVER), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 2:
            break
    time.sleep(delay_s)  # into the middle of a save
    os.kill(process.pid, signal.SIGKILL)
    printed = max([2, *map(int, process.stdout.read().split())])
    process.wait()
    process.stdout.close()

    shapes = {"x": jax.ShapeDtypeStruct((300, 1000), jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(policy=shapes, trainer=shapes)
        assert found.step >= printed
        assert found.host == {"step": found.step}
        for items in (found.policy, found.trainer):
            np.testing.assert_array_equal(items["x"], found.step)
        arrays = {"x": jnp.zeros((300, 1000))}  # and the run can go on
        checkpoints.save(found.step + 1, policy=arrays, trainer=arrays, host={})
        assert checkpoints.latest_step == found.step + 1
