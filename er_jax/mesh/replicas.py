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
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from er_jax import checks
from er_jax.config import RolloutConfig
from er_jax.control.controller import Controller
from er_jax.drafter import PolicyParams
from er_jax.mesh import layout
from er_jax.mesh.engine import mesh_engines_for
from er_jax.mesh.rules import DATA_AXIS
from er_jax.result import Completion, Rollout, RolloutError, assemble
from er_jax.rollout import profiled, rollout
from er_jax.stats import RolloutStats
from er_jax.types import Params, Policy


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
      mesh: of `layout.rollout_mesh`. count: of replicas; divides its axis data.
    """
    axis = mesh.axis_names.index(DATA_AXIS)
    return [
        Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
        for devices in np.split(mesh.devices, count, axis=axis)
    ]


def replica_params(params: Any, mesh: Mesh, own: Mesh) -> Any:
    """Return the parameters as one replica has them, without copying anything.

    Args:
      params: arrays that lie on `mesh`. mesh: of `layout.rollout_mesh`.
      own: one of `replica_meshes`, with a device of this process.
    """
    devices = set(own.devices.flat)

    def leaf(x: jax.Array) -> jax.Array:
        sharding = layout.on_mesh(x.sharding, mesh)
        assert sharding is not None
        return layout.relabelled(x, NamedSharding(own, sharding.spec), devices)

    return jax.tree.map(leaf, params)


def _policy_params(params: Params | PolicyParams) -> Params:
    return params.policy if isinstance(params, PolicyParams) else params


def _is_here(part: Mesh) -> bool:
    """Whether a device of a replica is of this process."""
    here = jax.process_index()
    return any(device.process_index == here for device in part.devices.flat)


def _brings_results(part: Mesh) -> bool:
    """Whether this is the process, of those that share a replica, that brings them."""
    return part.devices.flat[0].process_index == jax.process_index()


def _checked_lengths(lengths: Sequence[float] | None, num_prompts: int) -> np.ndarray:
    """Return the expected length of every prompt's completions, float `[P]`."""
    costs = np.asarray(np.ones(num_prompts) if lengths is None else lengths, float)
    if costs.shape != (num_prompts,) or not (np.isfinite(costs) & (costs >= 0)).all():
        raise ValueError(
            f"expected_lengths={lengths!r} must be {num_prompts} finite numbers of at "
            "least 0, one for each prompt; use None if nothing is known"
        )
    return costs


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
    checks.check_outside_jit(params, prompts, key)
    checks.check_policy(policy)
    checks.check_alive(params)
    whole_mesh = layout.rollout_mesh(mesh)
    arrays = checks.checked_prompts(prompts, policy.vocab_size)
    ids = checks.checked_sequence_ids(sequence_ids, len(arrays) * config.n)
    costs = _checked_lengths(expected_lengths, len(arrays))
    size = whole_mesh.shape[DATA_AXIS]
    num_replicas = size if num_replicas is None else num_replicas
    if num_replicas < 1 or size % num_replicas:
        raise ValueError(
            f"num_replicas={num_replicas} must divide the mesh's axis data of {size}; "
            "use None for one at every place"
        )
    parts = replica_meshes(whole_mesh, num_replicas)
    if controller is not None:
        _check_shared(parts)
    own = {replica: part for replica, part in enumerate(parts) if _is_here(part)}
    params = layout.put_on_mesh(policy, params, whole_mesh)
    # Here and not in threads: of one array, JAX 0.10 may hand two threads that ask for
    # its shards at once some of them twice or not at all.
    own_params = {
        replica: replica_params(params, whole_mesh, part)
        for replica, part in own.items()
    }
    # Held to the end of the call, so that none is dropped before its thread asks.
    engine, *_held = mesh_engines_for(
        policy,
        config.accept,
        [
            (_policy_params(params), whole_mesh),
            *((_policy_params(own_params[i]), part) for i, part in own.items()),
        ],
    )
    agreement = engine.agreement
    # Processes meet now, while they are together: the first meeting of their devices
    # may have a time limit, and they come to the last one when they are done.
    agreement.broadcast_from_leader([0.0])

    dealt = deal(costs.tolist(), num_replicas)
    columns = np.arange(len(ids)).reshape(len(arrays), config.n)

    def sample(
        replica: int, on_finish: Callable[[int, Completion], None]
    ) -> Rollout | None:
        own_prompts = dealt[replica]
        if not own_prompts:
            return None
        return rollout(
            policy,
            own_params[replica],
            [arrays[prompt].tolist() for prompt in own_prompts],
            key=key,
            config=config,
            sequence_ids=ids[columns[own_prompts].reshape(-1)].tolist(),
            controller=controller,
            mesh=own[replica],
            on_finish=on_finish,
        )

    num_sequences = sum(config.n * len(dealt[replica]) for replica in own)
    with (
        tqdm(total=num_sequences, unit="seq", disable=not progress) as bar,
        profiled(profile),
    ):
        found = _side_by_side(list(own), sample, on_finish, bar)
    completions = found.completions(own, ids)
    # A replica that failed elsewhere would be waited for without end.
    _, failure = agreement.sync_or_raise([], found.failure)
    if failure is not None:
        error = found.error(failure, completions, ids)
        if isinstance(error, RolloutError):
            raise error from failure
        raise error
    if controller is not None and agreement.is_spread:
        # Replicas of other processes have met other windows.
        learnt = agreement.broadcast_text(json.dumps(controller.state_dict()))
        assert learnt is not None, "the leading process has a text"
        controller.load_state_dict(json.loads(learnt))
    stats = found.stats(own)
    seconds = np.zeros(num_replicas, np.float32)
    for replica in found.outs:
        if _brings_results(own[replica]):
            seconds[replica] = found.seconds[replica]
    stats.replica_s = agreement.sum(seconds).tolist()
    return assemble(arrays, completions, ids, config, stats, agreement)


@dataclasses.dataclass
class _Found:
    """What the replicas of this process came to.

    outs: by replica, of those that sampled something to the end. seconds: by replica.
    errors: of the others. stop: what ended all of them early, if it was no failure.
    """

    outs: dict[int, Rollout] = dataclasses.field(default_factory=dict)
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    errors: dict[int, BaseException] = dataclasses.field(default_factory=dict)
    stop: BaseException | None = None

    @property
    def failure(self) -> Exception | None:
        """What the other processes are told of."""
        if self.stop is not None:
            return RuntimeError(f"the rollout was ended by {self.stop!r}")
        errors = (self.errors[replica] for replica in sorted(self.errors))
        return next((e for e in errors if isinstance(e, Exception)), None)

    def completions(
        self, own: Mapping[int, Mesh], ids: np.ndarray
    ) -> dict[int, Completion]:
        """Return what this process brings, by sequence; of failed replicas, too."""
        sequence_of = {int(name): sequence for sequence, name in enumerate(ids)}
        found: dict[int, Completion] = {}
        for error in self.errors.values():
            done: dict[int, Completion] = getattr(error, "completions", {})
            found |= {sequence_of[name]: c for name, c in done.items()}
        for replica, out in self.outs.items():
            if not _brings_results(own[replica]):
                continue
            for row, length in enumerate(out.lengths):
                found[sequence_of[int(out.sequence_ids[row])]] = Completion(
                    token_ids=out.completion_ids[row, :length],
                    logprobs=out.logprobs[row, :length],
                    finish_reason=str(out.finish_reason[row]),
                )
        return found

    def stats(self, own: Mapping[int, Mesh]) -> RolloutStats:
        """Return the counts of the replicas whose results this process brings."""
        parts = [o.stats for i, o in self.outs.items() if _brings_results(own[i])]
        return RolloutStats.merged(parts) if parts else RolloutStats()

    def error(
        self, failure: Exception, completions: Mapping[int, Completion], ids: np.ndarray
    ) -> BaseException:
        """Return what to raise for a failure, with the completions finished so far."""
        named = {int(ids[sequence]): c for sequence, c in completions.items()}
        if self.stop is not None:
            self.stop.completions = named  # type: ignore[attr-defined]
            return self.stop
        if not completions and isinstance(failure, ValueError):
            return failure
        num_here = len(self.seconds)
        return RolloutError(
            f"{len(self.errors)} of {num_here} replicas here failed; "
            f"{len(completions)} of {len(ids)} completions had finished, which this "
            f"exception holds: {failure}",
            named,
        )


def _side_by_side(
    replicas: Sequence[int],
    sample: Callable[[int, Callable[[int, Completion], None]], Rollout | None],
    on_finish: Callable[[int, Completion], None] | None,
    bar: Any,
) -> _Found:
    """Sample with all replicas of this process at once, a thread for each.

    Args:
      replicas: numbers. sample: samples with one; None where it has no prompts.
      on_finish: as for `rollout_replicas`, called by one thread at a time.
      bar: shows progress.
    """
    # The setting of a `with` block holds for its own thread only.
    is_wide = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    lock, interrupted = threading.Lock(), threading.Event()
    found = _Found()

    def finished(sequence_id: int, completion: Completion) -> None:
        with lock:
            if interrupted.is_set():
                raise InterruptedError("the rollout was interrupted")
            bar.update()
            if on_finish is not None:
                on_finish(sequence_id, completion)

    def run(replica: int) -> None:
        start = time.perf_counter()
        try:
            with jax.enable_x64(is_wide):
                out = sample(replica, finished)
            if out is not None:
                found.outs[replica] = out
        except BaseException as error:
            found.errors[replica] = error
        finally:
            found.seconds[replica] = time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor(len(replicas)) as pool:
        running = [pool.submit(run, replica) for replica in replicas]
        try:
            concurrent.futures.wait(running)
        except KeyboardInterrupt as error:
            # The main thread's alone: the others end with their next completion.
            interrupted.set()
            found.stop = error
    if found.stop is None:  # Or was a callback's, of a replica?
        errors = found.errors.values()
        found.stop = next((e for e in errors if not isinstance(e, Exception)), None)
    return found
