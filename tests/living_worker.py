"""One of two processes whose rollouts live; started by test_living_processes.py.

    python -m tests.living_worker RANK COUNT PORT DIRECTORY TASK

Writes what it got to DIRECTORY/RANK.TASK.npz. The tasks:

* turns: conversations of turns of ragged length; the same ended early and gone on with;
  and with tools that fail.
* journal: conversations with a journal, which stand still after some windows, when
  DIRECTORY/RANK.ready is there: to be killed.
* resume: the same to the end, and again; and what one of the files refuses.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh


def answering(rank: int, tool: Any, asked: list[int], fails: bool) -> Any:
    """Return a tool of process 0; any other must not be asked, and would tell it."""
    hanging = threading.Event()
    rng = np.random.default_rng(1)

    def call(sequence_id: int, turn: Any) -> Any:
        asked.append(sequence_id)
        if rank:
            return [23]
        time.sleep(float(rng.random()) * 0.02)
        if fails and turn.index == 1:
            if sequence_id == 1:
                raise OSError("no tool")
            if sequence_id == 4:
                hanging.wait(60)
            if sequence_id == 5:
                return [99]
        return tool(sequence_id, turn)

    return call


def turns(rank: int, mesh: Mesh, out: Path) -> dict[str, Any]:
    import er_jax
    from benchmarks.lib.controllers import Restless
    from tests import test_turns

    config = dataclasses.replace(test_turns.CONFIG, max_slots=4, control="best")
    asked: list[int] = []
    told: list[int] = []
    found: dict[str, Any] = {}

    def sample(name: str, fails: bool = False, **named: Any) -> er_jax.Rollout:
        result = test_turns.sample(
            respond=er_jax.Respond(
                answering(rank, test_turns.tool, asked, fails),
                max_turn_tokens=test_turns.TURN_TOKENS,
                timeout_s=2.0 if fails else 20.0,
            ),
            config=config, mesh=mesh, on_finish=lambda s, c: told.append(s),
            controller=Restless("best", (0, 3), (1, 3), 1), **named,
        )  # fmt: skip
        for field in dataclasses.fields(result):
            if field.name != "stats":
                found[f"{name}.{field.name}"] = getattr(result, field.name)
        stats = result.stats
        found[f"{name}.answers"] = stats.num_answers
        found[f"{name}.prefilled"] = stats.prefilled_tokens
        failed = {str(key): text for key, text in stats.failed_turns.items()}
        found[f"{name}.failed"] = [f"{k} {failed[k]}" for k in sorted(failed)]
        found[f"{name}.told"] = list(told)
        told.clear()
        return result

    sample("whole")
    part = sample("part", until=er_jax.Until(tokens=60))
    sample("rest", resume=part)
    sample("failing", fails=True)
    return {**found, "asked": asked}


def kept(rank: int, mesh: Mesh, out: Path, is_killed: bool, **named: Any) -> Any:
    import er_jax
    from er_jax import journal
    from er_jax.scheduler import batch
    from tests import test_turns

    batch.MIN_ROUNDS = batch.MAX_ROUNDS = 3
    journal.EVERY_S = 0.0

    class Still(er_jax.Controller):
        """Goes on after so many windows only where nobody will kill it."""

        count = 0

        def choose(self, *arguments: Any, **known: Any) -> Any:
            self.count += 1
            if is_killed and self.count == 6:
                time.sleep(0.5)  # The thread that writes is done.
                (out / f"{rank}.ready").touch()
                threading.Event().wait()
            return super().choose(*arguments, **known)

    config = dataclasses.replace(test_turns.CONFIG, max_slots=4)
    named = {"journal": out / "journal", "config": config} | named
    tool = answering(0, test_turns.tool, [], False)
    return test_turns.sample(
        tool, mesh=mesh, controller=Still("ar", config.gammas), **named
    )


def killed(rank: int, mesh: Mesh, out: Path) -> dict[str, Any]:
    kept(rank, mesh, out, True)
    raise AssertionError("it was to be killed")


def resumed(rank: int, mesh: Mesh, out: Path) -> dict[str, Any]:
    told: list[int] = []
    found: dict[str, Any] = {}
    whole = kept(
        rank, mesh, out, False, version=1, on_finish=lambda s, c: told.append(s)
    )
    again = kept(rank, mesh, out, False, version=2)
    for name, result in (("whole", whole), ("again", again)):
        for field in dataclasses.fields(result):
            if field.name != "stats":
                found[f"{name}.{field.name}"] = getattr(result, field.name)
        found[f"{name}.tokens"] = result.stats.num_tokens
    found |= {
        "whole.told": told,
        "whole.failed": [],
        "again.told": [],
        "again.failed": [],
    }
    refusals = []
    if rank:
        (out / "other.1-of-2").write_bytes(b"no journal")
    for path, version in (("other", 0), ("journal", 3)):
        named: dict[str, Any] = {}
        if path == "journal":
            config = dataclasses.replace(_config(), temperature=0.5)
            named["config"] = config
        try:
            kept(rank, mesh, out, False, journal=out / path, version=version, **named)
        except ValueError as error:
            refusals.append(str(error))
    return {**found, "refusals": refusals, "left": (out / "other.0-of-2").exists()}


def _config() -> Any:
    from tests import test_turns

    return dataclasses.replace(test_turns.CONFIG, max_slots=4)


TASKS = {"turns": turns, "journal": killed, "resume": resumed}


def main(rank: int, count: int, port: int, out: Path, task: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4 // count)
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    np.savez(out / f"{rank}.{task}.npz", **TASKS[task](rank, mesh, out))


if __name__ == "__main__":
    os.environ["ER_JAX_CACHE"] = ""
    rank, count, port, directory, task = sys.argv[1:]
    main(int(rank), int(count), int(port), Path(directory), task)
