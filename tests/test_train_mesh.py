"""Training on meshes of eight devices: the numbers of one device.

In float64, where no difference is hidden by rounding: the same tokens and rewards, and
parameters that agree to a billionth.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import tiny
from tests.test_processes import free_port
from train.checkpoints import Checkpoints
from train.config import MeshConfig
from train.metrics import MetricsFile
from train.placement import Placement
from train.run import run

ROOT = Path(__file__).parents[1]
TIME_LIMIT_S = 300
STEPS = 5

MODEL = dataclasses.replace(tiny.CONFIG.model, num_heads=4, num_kv_heads=2, head_dim=8)
CONFIG = dataclasses.replace(tiny.CONFIG, model=MODEL, dtype="float64")


def train(out: Path, **changes: Any) -> None:
    """Run, or go on with, the tiny config."""
    run(dataclasses.replace(CONFIG, out=out, **changes))


def parameters(out: Path, step: int) -> Any:
    policy = MODEL.decoder(vocab_size(), "float64")
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    with Checkpoints(out, read_only=True) as checkpoints:
        return checkpoints.restore_policy(Placement().shaped(policy, shapes), step)


def vocab_size() -> int:
    from train.tasks import Tokenizer

    return Tokenizer().vocab_size


def assert_same_run(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float) and name not in ("reward", "mixed_groups"):
                assert one[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
            else:
                assert one[name] == value, name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some steps on one device; a checkpoint of every step of it is kept."""
    out = tmp_path_factory.mktemp("train") / "one"
    with jax.enable_x64(True):
        train(out, steps=STEPS)
    return out


def steps_of(out: Path) -> list[dict[str, Any]]:
    records = MetricsFile(out / "metrics.jsonl").read()
    return [
        {k: v for k, v in r.items() if k not in ("timing", "params_digest")}
        for r in records
        if r["kind"] == "step"
    ]


def assert_goes_on_as(out: Path, wanted: Path) -> None:
    """Go on with a run on one device, and compare it with another."""
    train(out, steps=STEPS, resume=True)
    assert_same_run(steps_of(out), steps_of(wanted))
    one, many = parameters(wanted, STEPS), parameters(out, STEPS)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "meshes",
    [
        pytest.param(
            (MeshConfig(2, 2, 2), MeshConfig(2, 1, 4)), marks=pytest.mark.slow
        ),
        pytest.param((MeshConfig(1, 4, 2, replicas=True),), marks=pytest.mark.long),
    ],
    ids=["2x2x2, then 2x1x4", "replicas 1x4x2"],
)
def test_a_run_is_that_of_one_device_and_goes_on_elsewhere(
    meshes: tuple[MeshConfig, ...], undisturbed: Path, tmp_path: Path, x64: None
) -> None:
    for step, mesh in enumerate(meshes, 1):
        train(tmp_path / "many", mesh=mesh, steps=step, resume=step > 1)
    assert_same_run(steps_of(tmp_path / "many"), steps_of(undisturbed)[: len(meshes)])
    assert_goes_on_as(tmp_path / "many", undisturbed)


def start(out: Path, *options: str) -> list[subprocess.Popen[bytes]]:
    """Start the same run as `train`, as two processes of four devices."""
    port, processes = free_port(), []
    for rank in range(2):
        command = [
            sys.executable, "-m", "train.grpo", "tiny", "--out", str(out),
            "--dtype", "float64", "--steps", str(STEPS), "--save-every", "1",
            "--model.num-heads", "4", "--model.num-kv-heads", "2",
            "--model.head-dim", "8", "--mesh.data", "2", "--mesh.fsdp", "2",
            "--mesh.model", "2", "--mesh.coordinator", f"127.0.0.1:{port}",
            "--mesh.num-processes", "2", "--mesh.process-id", str(rank),
            "--mesh.heartbeat-s", "10", *options,
        ]  # fmt: skip
        flags = "--xla_force_host_platform_device_count=4"
        with open(out.parent / f"{rank}.log", "wb") as log:
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                    env=os.environ | {"XLA_FLAGS": flags},
                )
            )  # fmt: skip
    return processes


@pytest.mark.long
def test_a_killed_run_of_two_processes_goes_on_in_one(
    undisturbed: Path, tmp_path: Path, x64: None
) -> None:
    """A process is killed at some step; the other ends; one process with fewer devices
    goes on, and the numbers are those of one device that was never disturbed.
    """
    out = tmp_path / "many"
    out.mkdir()
    processes = start(out)
    deadline = time.monotonic() + TIME_LIMIT_S
    metrics = MetricsFile(out / "metrics.jsonl")
    try:
        while not any(r["kind"] == "step" and r["step"] == 1 for r in metrics.read()):
            for rank, process in enumerate(processes):
                log = (tmp_path / f"{rank}.log").read_text()
                assert process.poll() is None and time.monotonic() < deadline, log
            time.sleep(0.1)
        os.kill(processes[1].pid, signal.SIGKILL)
        assert processes[0].wait(60) != 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    saved = json.loads((out / "config.json").read_text())
    assert saved["mesh"]["num_processes"] == 2
    # It goes on on one device, the smallest mesh there is.
    assert_goes_on_as(out, undisturbed)
