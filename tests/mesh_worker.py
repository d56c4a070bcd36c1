"""One of several processes that sample together; started by test_processes.py.

    python -m tests.mesh_worker RANK COUNT PORT SHAPE DIRECTORY [FAILING]

Every process has its share of eight devices and a clock of its own: that of rank r runs
1 + 7 r times as fast, so that what any of them measures is another's nonsense. It
samples twice together with the others, by measured costs and then by as many changes as
can be, and once by replicas. Writes what it got to
DIRECTORY/RANK.npz, and a file DIRECTORY/RANK.started at the first
completion that it is told of. With FAILING, the process of that rank fails at its third
completion of every rollout, cannot compile a program in one more, and all write what
was raised in them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

NAMES = ("data", "model")
# How long JAX waits for a sign of life of another process before it ends this one.
HEARTBEAT_S = 10


class NoRoom:
    """A program that this process cannot compile."""

    def lower(self, *_: Any, **__: Any) -> Any:
        raise MemoryError("no room to compile")

    def clear_cache(self) -> None: ...


def main(
    rank: int,
    count: int,
    port: int,
    shape: str,
    out: Path,
    failing: int | None = None,
) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // count)
    jax.distributed.initialize(
        f"127.0.0.1:{port}", count, rank, heartbeat_timeout_seconds=HEARTBEAT_S
    )
    true_clock, start = time.perf_counter, time.perf_counter()
    time.perf_counter = lambda: start + (true_clock() - start) * (1 + 7 * rank)

    import er_jax
    from er_jax.checks import checked_prompts
    from er_jax.engine import engine
    from tests import test_mesh

    sizes = [int(size) for size in shape.split("x")]
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), NAMES)
    params = jax.tree.map(np.asarray, test_mesh.parameters())
    config = test_mesh.config_of(control="best")
    controllers = [
        kind(config.control, config.gammas)
        for kind in (er_jax.Controller, test_mesh.Switching)
    ]
    together = [
        functools.partial(er_jax.rollout, config=config, controller=controller)
        for controller in controllers
    ]
    apart = functools.partial(
        er_jax.rollout_replicas, config=dataclasses.replace(config, control="ar")
    )
    told: list[int] = []

    def on_finish(sequence_id: int, completion: Any) -> None:
        told.append(sequence_id)
        (out / f"{rank}.started").touch()
        if rank == failing and len(told) % 3 == 0:
            raise OSError("disk full")

    # Every process has prompts of its own, not equally many, the last one none of four.
    prompts, cuts = test_mesh.prompts(), {2: [0, 4, 9], 4: [0, 4, 6, 9, 9]}[count]
    everything, rows = er_jax.gather_prompts(
        prompts[cuts[rank] : cuts[rank + 1]], config.n
    )
    assert everything == prompts
    # Those that lie over all processes are the same to each.
    square = np.array([prompt[:2] for prompt in prompts[:8]], np.int32)
    spread: Any = jax.make_array_from_callback(
        square.shape, NamedSharding(mesh, PartitionSpec("data")), square.__getitem__
    )
    np.testing.assert_array_equal(checked_prompts(spread, 512), square)
    with pytest.raises(ValueError) as refused:
        er_jax.gather_prompts([[3, 1 << 40], []] if rank == count - 1 else [[3]])

    def sampled(sample: Any) -> er_jax.Rollout:
        return sample(
            test_mesh.POLICY, params, everything, key=jax.random.key(3),
            mesh=mesh, on_finish=on_finish,
        )  # fmt: skip

    if failing is not None:
        errors: list[er_jax.RolloutError] = []
        for sample in (together[0], apart):
            told.clear()
            try:
                sampled(sample)
            except er_jax.RolloutError as error:
                errors.append(error)
        with pytest.MonkeyPatch.context() as patch:
            if rank == failing:
                patch.setattr(engine, "run_allocation", NoRoom())
            with pytest.raises((RuntimeError, MemoryError)) as uncompiled:
                larger = dataclasses.replace(config, max_slots=24)
                sampled(functools.partial(together[0], config=larger))
        # And all are still in step.
        assert er_jax.gather_prompts([[rank]])[0] == [[other] for other in range(count)]
        np.savez(
            out / f"{rank}.npz",
            messages=[str(error) for error in errors],
            uncompiled=str(uncompiled.value),
            together=list(errors[0].completions),
            apart=list(errors[1].completions),
        )
        return
    rollouts = [sampled(sample) for sample in (*together, apart)]
    programs = [m[3:] for found in rollouts[:2] for m in found.stats.timeline]
    np.savez(
        out / f"{rank}.npz",
        completion_ids=[found.completion_ids for found in rollouts],
        logprobs=[found.logprobs for found in rollouts],
        told=told,
        refused=str(refused.value),
        own=np.arange(len(prompts) * config.n)[rows],
        programs=programs,
        switched=[
            sum(a.gamma != b.gamma for a, b in itertools.pairwise(found.stats.timeline))
            for found in rollouts[:2]
        ],
        replica_s=rollouts[2].stats.replica_s,
    )


if __name__ == "__main__":
    os.environ["ER_JAX_CACHE"] = ""
    rank, count, port, shape, directory, *failing = sys.argv[1:]
    main(int(rank), int(count), int(port), shape, Path(directory), *map(int, failing))
