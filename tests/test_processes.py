"""One rollout by several processes, on loopback.

Together, they have to take every decision alike: otherwise one waits in a program which
another never starts. Their clocks disagree by factors, and there is a time limit.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from er_jax.stats import Moment
from tests import mesh_worker, test_mesh

# For two processes. All share the cores, and nearly all of their time is compilation.
TIME_LIMIT_S = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    count: int, directory: Path, *words: object, module: str = "tests.mesh_worker"
) -> list[subprocess.Popen[bytes]]:
    """Start workers that are told their rank, `count`, a port and the words."""
    port = free_port()
    workers = []
    for rank in range(count):
        own = map(str, (rank, count, port, *words))
        with open(directory / f"{rank}.log", "wb") as log:
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *own],
                    stdout=log, stderr=subprocess.STDOUT,
                    cwd=Path(__file__).parents[1],
                )
            )  # fmt: skip
    return workers


def wait(workers: list[subprocess.Popen[bytes]], directory: Path) -> None:
    deadline = time.monotonic() + TIME_LIMIT_S * len(workers) / 2
    try:
        for rank, worker in enumerate(workers):
            worker.wait(max(deadline - time.monotonic(), 1))
            assert worker.returncode == 0, (directory / f"{rank}.log").read_text()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@pytest.mark.parametrize(
    ("count", "shape"),
    [
        pytest.param(2, "4x2", marks=pytest.mark.slow),
        pytest.param(4, "2x4", marks=pytest.mark.long),
    ],
    ids=["2 processes", "4 processes, weights sharded over two"],
)
def test_processes_sample_together_and_apart(
    count: int, shape: str, tmp_path: Path
) -> None:
    wait(start(count, tmp_path, shape, tmp_path), tmp_path)
    wanted = test_mesh.on_one_device()
    found = [np.load(tmp_path / f"{rank}.npz") for rank in range(count)]
    for rank, result in enumerate(found):
        refused = f"prompts of process {count - 1}"
        if rank == count - 1:
            refused = r"prompts\[1\] is empty"
        assert re.match(refused, str(result["refused"]))
        for ids, logprobs in zip(
            result["completion_ids"], result["logprobs"], strict=True
        ):
            np.testing.assert_array_equal(ids, wanted.completion_ids)
            np.testing.assert_allclose(logprobs, wanted.logprobs, atol=1e-4)
        np.testing.assert_array_equal(result["programs"], found[0]["programs"])
        np.testing.assert_array_equal(result["replica_s"], found[0]["replica_s"])
        assert len(result["replica_s"]) == int(shape[0])
        assert (result["replica_s"] > 0).all()
    columns = dict(zip(Moment._fields[3:], found[0]["programs"].T, strict=True))
    assert len(set(columns["rows"])) > 1, "nothing was compacted"
    assert len(set(columns["cache_length"])) > 1, "the cache never grew"
    assert any(columns["shared_rows"]), "data shards never became one"
    assert found[0]["switched"][1] >= 4, "drafts were hardly switched on and off"
    own = np.concatenate([result["own"] for result in found])
    np.testing.assert_array_equal(own, wanted.sequence_ids)
    # Of each completion exactly one process was told, in each of three rollouts.
    told = np.concatenate([result["told"] for result in found])
    assert sorted(told) == sorted([*range(27)] * 3)


@pytest.mark.slow
def test_what_fails_in_one_process_ends_the_call_in_all(tmp_path: Path) -> None:
    wait(start(2, tmp_path, "4x2", tmp_path, 1), tmp_path)
    found = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    for own, message in zip(found, ("another process", "disk full"), strict=True):
        together, apart = own["messages"]
        assert message in together and message in apart
    # Nor is a program run by some that another could not compile.
    told, own_error = (str(own["uncompiled"]) for own in found)
    assert "another process has failed, process 1" in told
    assert own_error.endswith("no room to compile")
    # Nothing that was finished is lost, and each is one process's.
    for mode in ("together", "apart"):
        first, second = (set(own[mode].tolist()) for own in found)
        assert first and second and not first & second


@pytest.mark.slow
def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    workers = start(2, tmp_path, "4x2", tmp_path)
    deadline = time.monotonic() + TIME_LIMIT_S
    try:
        while not (tmp_path / "1.started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(workers[1].pid, signal.SIGKILL)
        workers[0].wait(6 * mesh_worker.HEARTBEAT_S)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert workers[0].returncode != 0
    log = (tmp_path / "0.log").read_text()
    assert "another task died" in log or "RolloutError" in log
