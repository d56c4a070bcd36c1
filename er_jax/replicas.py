"""Rollouts by replicas: groups of devices that sample apart and meet at the end.

A mesh has a replica for every place on its axis `data`, or for several of them, the
devices of a host for instance. Each has a scheduler of its own (a thread here) and its
share of the prompts; no collective crosses replicas until the results are gathered,
once. Tokens are the same as with any other division of work, because they depend on
sequence ids alone.

What is lost is the time that replicas wait for the last one. Prompts are dealt so that
expected work is even: the longest first, each to the replica with least, the n
completions of a prompt together. `ExpectedLengths` remembers what earlier steps showed.

Left out: moving sequences between replicas (one rollout over the whole mesh does that).

Source: the rule of dealing, Graham 1969, "Bounds on multiprocessing timing anomalies".
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from er_jax import engine, sharding
from er_jax.control import Controller
from er_jax.drafter import PolicyParams
from er_jax.rollout import (
    Rollout,
    RolloutConfig,
    assemble,
    check_alive,
    check_mesh,
    check_outside_jit,
    check_policy,
    checked_prompts,
    checked_sequence_ids,
    rollout,
)
from er_jax.scheduler import Completion, RolloutError
from er_jax.stats import RolloutStats
from er_jax.types import DATA_AXIS, Params, Policy


def deal(costs: Sequence[float], num_replicas: int) -> list[list[int]]:
    """Deal tasks to replicas, the costliest first, each to the one with least so far.

    Args:
      costs: expected work of each task, in any unit, >= 0. num_replicas: >= 1.
    Returns:
      For each replica its tasks, ascending. Of equals the lower number goes first.
    """
    loads = np.zeros(num_replicas)
    counts = np.zeros(num_replicas, int)
    dealt: list[list[int]] = [[] for _ in range(num_replicas)]
    for task in np.argsort(-np.asarray(costs, float), kind="stable").tolist():
        # Tasks that cost nothing are spread as well.
        replica = min(range(num_replicas), key=lambda r: (loads[r], counts[r], r))
        loads[replica] += costs[task]
        counts[replica] += 1
        dealt[replica].append(task)
    return [sorted(tasks) for tasks in dealt]


@dataclasses.dataclass
class ExpectedLengths:
    """How long the completions of a prompt were in earlier steps; keep it across them.

    Args:
      forget: share of what was known that a new observation replaces, in (0, 1].
    """

    forget: float = 0.5
    known: dict[bytes, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.forget <= 1:
            raise ValueError(
                f"forget={self.forget} must be above 0 and at most 1; use 1 to keep "
                "the last step only"
            )

    def of(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return expected tokens of a completion `[P]`; of unknown prompts the mean."""
        usual = float(np.mean(list(self.known.values()))) if self.known else 1.0
        return np.array([self.known.get(_name(p), usual) for p in prompts])

    def observe(self, prompts: Sequence[Sequence[int]], out: Rollout) -> None:
        """Learn from a rollout of these prompts."""
        means = out.lengths.reshape(len(prompts), -1).mean(axis=1).tolist()
        for prompt, mean in zip(prompts, means, strict=True):
            name = _name(prompt)
            old = self.known.get(name, mean)
            self.known[name] = old + self.forget * (mean - old)


def _name(prompt: Sequence[int]) -> bytes:
    return np.asarray(prompt, np.int32).tobytes()


def replica_meshes(mesh: Mesh, count: int) -> list[Mesh]:
    """Return the mesh of every replica.

    Args:
      mesh: of `sharding.rollout_mesh`. count: of replicas; divides its axis data.
    """
    axis = mesh.axis_names.index(DATA_AXIS)
    return [
        Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
        for devices in np.split(mesh.devices, count, axis=axis)
    ]


def replica_params(params: Any, mesh: Mesh, own: Mesh) -> Any:
    """Return the parameters as one replica has them, without copying anything.

    Args:
      params: arrays that lie on `mesh`. mesh: of `sharding.rollout_mesh`.
      own: one of `replica_meshes`, with a device of this process.
    """
    devices = set(own.devices.flat)

    def leaf(x: jax.Array) -> jax.Array:
        cut = sharding.on_mesh(x.sharding, mesh)
        assert cut is not None
        parts = [s.data for s in x.addressable_shards if s.device in devices]
        return jax.make_array_from_single_device_arrays(
            x.shape, NamedSharding(own, cut.spec), parts
        )

    return jax.tree.map(leaf, params)


def _bare(params: Params | PolicyParams) -> Params:
    return params.policy if isinstance(params, PolicyParams) else params


def _check_shared(parts: Sequence[Mesh]) -> None:
    """Check that the replicas of every process can share a controller.

    They learn in the order in which their windows end. Where a replica spans processes
    these must decide alike, and that order is another in each.

    Args:
      parts: the mesh of every replica, so that all processes find the same.
    """
    processes = [
        {device.process_index for device in part.devices.flat} for part in parts
    ]
    for replica, own in enumerate(processes):
        for other in range(len(parts)):
            shared = own & processes[other]
            if len(own) > 1 and other != replica and shared:
                raise ValueError(
                    f"controller is given, but replica {replica} spans processes, and "
                    f"process {min(shared)} has a part of replica {other} too, which "
                    "would share it; order the mesh's devices so that each process has "
                    "a part of one replica, or use controller=None"
                )


def rollout_replicas(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    config: RolloutConfig,
    mesh: Mesh,
    num_replicas: int | None = None,
    sequence_ids: Sequence[int] | None = None,
    expected_lengths: Sequence[float] | None = None,
    controller: Controller | None = None,
    on_finish: Callable[[int, Completion], None] | None = None,
    progress: bool = False,
    profile: str | os.PathLike[str] | None = None,
) -> Rollout:
    """Sample as `rollout` does, by replicas that do not wait for each other.

    Args:
      policy, params, prompts, key, config, sequence_ids: as for `rollout`, the same in
        all processes; `config.max_slots` is of each replica.
      mesh: as for `rollout`.
      num_replicas: divides the mesh's axis data; each replica is a rollout over its
        part of the mesh. None is one for every place on that axis.
      expected_lengths: `[P]`, tokens that completions of each prompt are expected to
        have, such as `ExpectedLengths.of(prompts)`; None takes all for equal.
      controller: one for all replicas, which are alike: what one learns of costs and
        acceptance, the others know. Keep it across calls. Of several processes each
        has what the first one learnt when the call returns. None uses one for each
        replica, which lives as long as the process.
      on_finish: called with (sequence id, `Completion`) as rows finish, by one thread
        at a time, in one process for each completion.
      progress: show a progress bar of the sequences sampled here.
      profile: directory for a trace of this process, all replicas here in it; as for
        `rollout`.
    Returns:
      The whole `Rollout`, in every process. `stats` has the counts of the replicas
      here, `stats.replica_s` the seconds of all, `stats.idle_share` what was lost.
    Raises:
      ValueError: a wrong argument. RolloutError: a replica failed; it carries what all
        replicas here have finished. KeyboardInterrupt: Ctrl-C, with the same in an
        attribute `completions`.
    """
    check_outside_jit(params, prompts, key)
    check_policy(policy)
    check_alive(params)
    check_mesh(mesh)
    arrays = checked_prompts(prompts, policy.vocab_size)
    ids = checked_sequence_ids(sequence_ids, len(arrays) * config.n)
    costs = np.ones(len(arrays)) if expected_lengths is None else expected_lengths
    costs = np.asarray(costs, float)
    if costs.shape != (len(arrays),) or not (np.isfinite(costs) & (costs >= 0)).all():
        raise ValueError(
            f"expected_lengths={expected_lengths!r} must be {len(arrays)} finite "
            "numbers of at least 0, one for each prompt; use None if nothing is known"
        )
    whole_mesh = sharding.rollout_mesh(mesh)
    size = whole_mesh.shape[DATA_AXIS]
    num_replicas = size if num_replicas is None else num_replicas
    if num_replicas < 1 or size % num_replicas:
        raise ValueError(
            f"num_replicas={num_replicas} must divide the mesh's axis data of {size}; "
            "use None for one at every place"
        )
    here = jax.process_index()
    parts = replica_meshes(whole_mesh, num_replicas)
    if controller is not None:
        _check_shared(parts)
    own = {
        replica: part
        for replica, part in enumerate(parts)
        if any(device.process_index == here for device in part.devices.flat)
    }
    params = sharding.place(policy, params, whole_mesh)
    dealt = deal(costs.tolist(), num_replicas)
    # Here and not in threads: of one array, JAX 0.10 may hand two threads that ask for
    # its shards at once some of them twice or not at all.
    own_params = {
        replica: replica_params(params, whole_mesh, part)
        for replica, part in own.items()
    }
    # Held to the end of the call, so that none is dropped before its thread asks.
    programs, *_held = engine.engines_for(
        policy,
        config.accept,
        [
            (_bare(params), whole_mesh),
            *((_bare(own_params[replica]), part) for replica, part in own.items()),
        ],
    )
    # Processes meet now, while they are together: the first meeting of their devices
    # may have a time limit, and they come to the last one when they are done.
    programs.agree([0.0])
    # The setting of a `with` block holds for its own thread only.
    is_wide = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    lock, interrupted = threading.Lock(), threading.Event()
    columns = np.arange(len(ids)).reshape(len(arrays), config.n)

    with tqdm(
        total=sum(config.n * len(dealt[replica]) for replica in own),
        unit="seq",
        disable=not progress,
    ) as bar:

        def finished(sequence_id: int, completion: Completion) -> None:
            with lock:
                if interrupted.is_set():
                    raise InterruptedError("the rollout was interrupted")
                bar.update()
                if on_finish is not None:
                    on_finish(sequence_id, completion)

        def sample(replica: int) -> tuple[Rollout, float] | None:
            if not dealt[replica]:
                return None
            start = time.perf_counter()
            with jax.enable_x64(is_wide):
                out = rollout(
                    policy,
                    own_params[replica],
                    [arrays[prompt].tolist() for prompt in dealt[replica]],
                    key=key,
                    config=config,
                    sequence_ids=ids[columns[dealt[replica]].reshape(-1)].tolist(),
                    controller=controller,
                    mesh=own[replica],
                    on_finish=finished,
                )
            return out, time.perf_counter() - start

        with (
            contextlib.nullcontext()
            if profile is None
            else jax.profiler.trace(profile),
            concurrent.futures.ThreadPoolExecutor(len(own)) as pool,
        ):
            running = {replica: pool.submit(sample, replica) for replica in own}
            stop: BaseException | None = None
            try:
                concurrent.futures.wait(running.values())
            except KeyboardInterrupt as error:
                # The main thread's alone: the others end with their next completion.
                interrupted.set()
                stop = error

    completions: dict[int, Completion] = {}
    stats: list[RolloutStats] = []
    seconds = np.zeros(len(dealt), np.float32)
    errors: list[BaseException] = []
    sequence_of = {int(name): sequence for sequence, name in enumerate(ids)}
    for replica, future in running.items():
        try:
            result = future.result()
        except BaseException as error:
            errors.append(error)
            done: dict[int, Completion] = getattr(error, "completions", {})
            completions |= {sequence_of[i]: c for i, c in done.items()}
            continue
        # Of the processes that share a replica, one brings its results.
        if result is None or own[replica].devices.flat[0].process_index != here:
            continue
        out, seconds[replica] = result
        stats.append(out.stats)
        completions |= {
            sequence_of[int(out.sequence_ids[row])]: Completion(
                token_ids=out.completion_ids[row, :length],
                logprobs=out.logprobs[row, :length],
                finish_reason=str(out.finish_reason[row]),
            )
            for row, length in enumerate(out.lengths)
        }
    # A replica that failed elsewhere would be waited for without end.
    failed = [error for error in errors if isinstance(error, Exception)]
    if stop is None:  # Or was a callback's, of a replica?
        stop = next((e for e in errors if not isinstance(e, Exception)), None)
    if stop is not None:
        failed.insert(0, RuntimeError(f"the rollout was ended by {stop!r}"))
    _, failure = programs.meet([], failed[0] if failed else None)
    if failure is not None:
        named = {int(ids[sequence]): c for sequence, c in completions.items()}
        if stop is not None:
            stop.completions = named  # type: ignore[attr-defined]
            raise stop
        if not completions and isinstance(failure, ValueError):
            raise failure
        raise RolloutError(
            f"{len(errors)} of {len(own)} replicas here failed; {len(completions)} of "
            f"{len(ids)} completions had finished, which this exception holds: "
            f"{failure}",
            named,
        ) from failure
    if controller is not None and programs.is_spread:
        # Replicas of other processes have met other windows.
        learnt = programs.agree_text(json.dumps(controller.state_dict()))
        assert learnt is not None, "the leading process has a text"
        controller.load_state_dict(json.loads(learnt))
    merged = RolloutStats.merged(stats) if stats else RolloutStats()
    merged.replica_s = programs.gather(seconds).tolist()
    return assemble(arrays, completions, ids, config, merged, programs)
