"""Rollouts by replicas: sets of devices that sample independently of each other.

A replica has one or several indices of the mesh's axis `data`, such as the devices of
one host. It has its own scheduler (in a thread of its process) and its own prompts, and
no collective crosses replicas until the results are gathered at the end. The division
of work does not change the tokens, which depend on sequence ids alone.

The cost is the time that replicas wait for the slowest. Prompts are dealt to even out
expected work: the longest first, each to the replica with the least work so far, the n
completions of a prompt together. `ExpectedLengths` remembers lengths of earlier steps.

Left out: moving sequences between replicas (one rollout over the whole mesh does that).

Source: the dealing rule, Graham 1969, "Bounds on multiprocessing timing anomalies".
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
from er_jax.respond import Respond, RespondFunction, as_respond
from er_jax.result import Completion, Rollout, RolloutError, assemble
from er_jax.rollout import profiled, rollout
from er_jax.stats import RolloutStats
from er_jax.thread_settings import ThreadSettings
from er_jax.types import Finish, Params, Policy
from er_jax.until import Stop, Until


def deal(costs: Sequence[float], num_replicas: int) -> list[list[int]]:
    """Deal tasks to replicas, the costliest first, each to the one with least so far.

    Args:
      costs: expected work of each task, in any unit, >= 0. num_replicas: >= 1.
    Returns:
      The tasks of each replica, ascending. Ties go to the lower number.
    """
    loads = np.zeros(num_replicas)
    counts = np.zeros(num_replicas, int)
    dealt: list[list[int]] = [[] for _ in range(num_replicas)]
    for task in np.argsort(-np.asarray(costs, float), kind="stable").tolist():
        # Counting tasks spreads also those that cost nothing.
        replica = min(range(num_replicas), key=lambda r: (loads[r], counts[r], r))
        loads[replica] += costs[task]
        counts[replica] += 1
        dealt[replica].append(task)
    return [sorted(tasks) for tasks in dealt]


@dataclasses.dataclass
class ExpectedLengths:
    """Lengths of the completions of prompts in earlier steps; keep it across steps.

    Args:
      forget: weight of a new observation, in (0, 1]; 1 keeps the last step only.
      known: prompt, as bytes of its ids -> mean tokens of its completions.
    Raises:
      ValueError: `forget` outside its range.
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
        """Return expected tokens `[P]`; for unknown prompts, the mean of known ones."""
        mean = float(np.mean(list(self.known.values()))) if self.known else 1.0
        return np.array([self.known.get(_name(p), mean) for p in prompts])

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
      mesh: from `layout.rollout_mesh`. count: of replicas; divides its axis data.
    """
    axis = mesh.axis_names.index(DATA_AXIS)
    return [
        Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
        for devices in np.split(mesh.devices, count, axis=axis)
    ]


def replica_params(params: Any, mesh: Mesh, replica_mesh: Mesh) -> Any:
    """Return the parameters on the mesh of one replica; nothing is copied.

    Args:
      params: arrays on `mesh`. mesh: from `layout.rollout_mesh`.
      replica_mesh: one of `replica_meshes`, with a device of this process.
    """
    devices = set(replica_mesh.devices.flat)

    def leaf(x: jax.Array) -> jax.Array:
        sharding = layout.on_mesh(x.sharding, mesh)
        assert sharding is not None
        own = NamedSharding(replica_mesh, sharding.spec)
        return layout.relabelled(x, own, devices)

    return jax.tree.map(leaf, params)


def _policy_params(params: Params | PolicyParams) -> Params:
    return params.policy if isinstance(params, PolicyParams) else params


def _is_here(replica_mesh: Mesh) -> bool:
    """Whether this process has a device of a replica."""
    here = jax.process_index()
    return any(device.process_index == here for device in replica_mesh.devices.flat)


def _returns_results(replica_mesh: Mesh) -> bool:
    """Whether this process returns the results of a replica: only its first does."""
    return replica_mesh.devices.flat[0].process_index == jax.process_index()


def _checked_lengths(lengths: Sequence[float] | None, num_prompts: int) -> np.ndarray:
    """Return the expected length of every prompt's completions, float `[P]`."""
    costs = np.asarray(np.ones(num_prompts) if lengths is None else lengths, float)
    if costs.shape != (num_prompts,) or not (np.isfinite(costs) & (costs >= 0)).all():
        raise ValueError(
            f"expected_lengths={lengths!r} must be {num_prompts} finite numbers of at "
            "least 0, one for each prompt; use None if nothing is known"
        )
    return costs


def _check_shared(meshes: Sequence[Mesh]) -> None:
    """Check that the replicas of every process can share a controller.

    A shared controller learns in the order in which windows end. A replica that spans
    processes must decide alike in each, but that order differs between processes.

    Args:
      meshes: the mesh of every replica, so that all processes find the same.
    """
    processes = [
        {device.process_index for device in mesh.devices.flat} for mesh in meshes
    ]
    for replica, own in enumerate(processes):
        for other in range(len(meshes)):
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
    journal: str | os.PathLike[str] | None = None,
    respond: Respond | RespondFunction | None = None,
) -> Rollout:
    """Sample as `rollout` does, by replicas that do not wait for each other.

    Args:
      policy: as for `rollout`. It and what follows, up to `sequence_ids`, are the same
        in all processes.
      params: as for `rollout`.
      prompts: as for `rollout`.
      key: a random key, as for `rollout`.
      config: as for `rollout`; every replica has `config.max_slots` rows.
      sequence_ids: as for `rollout`.
      mesh: as for `rollout`.
      num_replicas: divides the mesh's axis data; each replica is a rollout over its
        part of the mesh. None is one replica for every index of that axis.
      expected_lengths: `[P]`, expected tokens of a completion of each prompt, such as
        `ExpectedLengths.of(prompts)`; None expects equal lengths.
      controller: one shared by all replicas, which have the same costs and acceptance;
        keep it across calls. When the call returns, every process has what the first
        process learnt. None uses one for each replica, which lives as long as the
        process.
      on_finish: called with (sequence id, `Completion`) as rows finish, by one thread
        at a time, in one process for each completion.
      progress: show a progress bar of the sequences of this process.
      profile: directory for a trace of this process with all its replicas; as for
        `rollout`.
      journal: as for `rollout`; replica I writes a file of its own, with the suffix
        ".replica-I". To go on from them, give the same `expected_lengths` again, which
        decide which replica has which prompts.
      respond: as for `rollout`; each replica asks for its own sequences, in threads of
        its own.
    Returns:
      The whole `Rollout`, in every process. `stats` has the counts of this process's
      replicas, `stats.replica_s` the seconds of all, `stats.idle_share` the share of
      time spent waiting.
    Raises:
      ValueError: a wrong argument.
      RolloutError: a replica failed; it carries the completions finished by this
        process's replicas.
      KeyboardInterrupt: Ctrl-C; its attribute `completions` holds the same.
    """
    checks.check_outside_jit(params, prompts, key)
    checks.check_policy(policy)
    checks.check_alive(params)
    whole_mesh = layout.rollout_mesh(mesh)
    arrays = checks.checked_prompts(prompts, policy.vocab_size)
    ids = checks.checked_sequence_ids(sequence_ids, len(arrays) * config.n)
    checks.check_num_prompts(config, len(arrays))
    answering = as_respond(respond)
    costs = _checked_lengths(expected_lengths, len(arrays))
    size = whole_mesh.shape[DATA_AXIS]
    num_replicas = size if num_replicas is None else num_replicas
    if num_replicas < 1 or size % num_replicas:
        raise ValueError(
            f"num_replicas={num_replicas} must divide the mesh's axis data of {size}; "
            "use None for one replica per index"
        )
    meshes = replica_meshes(whole_mesh, num_replicas)
    if controller is not None:
        _check_shared(meshes)
    own = {replica: part for replica, part in enumerate(meshes) if _is_here(part)}
    params = layout.put_on_mesh(policy, params, whole_mesh)
    # Done here and not in threads: if two threads ask for the shards of one array at
    # once, JAX 0.10 may return some twice and others not at all.
    own_params = {
        replica: replica_params(params, whole_mesh, part)
        for replica, part in own.items()
    }
    # Held to the end of the call, so that none is dropped before its thread needs it.
    engine, *_held = mesh_engines_for(
        policy,
        config.accept,
        [
            (_policy_params(params), whole_mesh),
            *((_policy_params(own_params[i]), part) for i, part in own.items()),
        ],
        config.attention,
    )
    agreement = engine.agreement
    # The first collective may have a time limit, so it runs now, while all processes
    # are here; they reach the last one at different times.
    agreement.broadcast_from_leader([0.0])

    dealt = deal(costs.tolist(), num_replicas)
    columns = np.arange(len(ids)).reshape(len(arrays), config.n)

    def sample(
        replica: int, on_finish: Callable[[int, Completion], None], until: Until
    ) -> Rollout | None:
        own_prompts = dealt[replica]
        if not own_prompts:
            return None
        return rollout(
            policy,
            own_params[replica],
            [arrays[prompt].tolist() for prompt in own_prompts],
            key=key,
            config=config.of_prompts(own_prompts),
            sequence_ids=ids[columns[own_prompts].reshape(-1)].tolist(),
            controller=controller,
            mesh=own[replica],
            on_finish=on_finish,
            until=until,
            journal=None
            if journal is None
            else f"{os.fspath(journal)}.replica-{replica}",
            respond=answering,
        )

    num_sequences = sum(config.n * len(dealt[replica]) for replica in own)
    with (
        tqdm(total=num_sequences, unit="seq", disable=not progress) as bar,
        profiled(profile),
    ):
        found = _side_by_side(list(own), sample, on_finish, bar)
    completions = found.completions(own, ids)
    # Otherwise processes would wait forever for one whose replica failed.
    _, failure = agreement.sync_or_raise([], found.failure)
    if failure is not None:
        error = found.error(failure, completions, ids)
        if isinstance(error, RolloutError):
            raise error from failure
        raise error
    if controller is not None and agreement.is_spread:
        # Controllers of other processes have learnt from other windows.
        learnt = agreement.broadcast_text(json.dumps(controller.state_dict()))
        assert learnt is not None, "the leading process has a text"
        controller.load_state_dict(json.loads(learnt))
    stats = found.stats(own)
    seconds = np.zeros(num_replicas, np.float32)
    for replica in found.outs:
        if _returns_results(own[replica]):
            seconds[replica] = found.seconds[replica]
    stats.replica_s = agreement.sum(seconds).tolist()
    return assemble(arrays, completions, ids, config, stats, agreement)


@dataclasses.dataclass
class _Found:
    """The outcomes of this process's replicas.

    outs: results by replica, of those that finished with prompts. seconds: by replica.
    errors: by replica, of those that failed. stop: an exception that ended all of them
    and is not a failure, such as Ctrl-C.
    """

    outs: dict[int, Rollout] = dataclasses.field(default_factory=dict)
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    errors: dict[int, BaseException] = dataclasses.field(default_factory=dict)
    stop: BaseException | None = None

    @property
    def failure(self) -> Exception | None:
        """The failure to report to the other processes, or None."""
        if self.stop is not None:
            return RuntimeError(f"the rollout was ended by {self.stop!r}")
        errors = (self.errors[replica] for replica in sorted(self.errors))
        return next((e for e in errors if isinstance(e, Exception)), None)

    def completions(
        self, own: Mapping[int, Mesh], ids: np.ndarray
    ) -> dict[int, Completion]:
        """Return this process's completions by sequence, those of failures included."""
        sequence_of = {int(name): sequence for sequence, name in enumerate(ids)}
        found: dict[int, Completion] = {}
        for error in self.errors.values():
            done: dict[int, Completion] = getattr(error, "completions", {})
            found |= {sequence_of[name]: c for name, c in done.items()}
        for replica, out in self.outs.items():
            if not _returns_results(own[replica]):
                continue
            for row, length in enumerate(out.lengths):
                if out.finish[row] == Finish.UNFINISHED:
                    continue
                found[sequence_of[int(out.sequence_ids[row])]] = Completion(
                    token_ids=out.completion_ids[row, :length],
                    logprobs=out.logprobs[row, :length],
                    finish_reason=str(out.finish_reason[row]),
                    mask=out.completion_mask[row, :length],
                )
        return found

    def stats(self, own: Mapping[int, Mesh]) -> RolloutStats:
        """Return the stats of the replicas whose results this process returns."""
        parts = [o.stats for i, o in self.outs.items() if _returns_results(own[i])]
        return RolloutStats.merged(parts) if parts else RolloutStats()

    def error(
        self, failure: Exception, completions: Mapping[int, Completion], ids: np.ndarray
    ) -> BaseException:
        """Return the exception to raise for a failure, with finished completions."""
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
    sample: Callable[[int, Callable[[int, Completion], None], Until], Rollout | None],
    on_finish: Callable[[int, Completion], None] | None,
    bar: Any,
) -> _Found:
    """Sample with all replicas of this process at once, a thread for each.

    Args:
      replicas: their numbers. sample: samples with one until told to end; returns None
        if it has no prompts.
      on_finish: as for `rollout_replicas`, called by one thread at a time.
      bar: shows progress.
    """
    settings = ThreadSettings.here()
    lock, stop = threading.Lock(), Stop()
    found = _Found()

    def finished(sequence_id: int, completion: Completion) -> None:
        with lock:
            if stop.is_set:
                raise InterruptedError("the rollout was interrupted")
            bar.update()
            if on_finish is not None:
                on_finish(sequence_id, completion)

    def run(replica: int) -> None:
        start = time.perf_counter()
        try:
            out = settings.call(sample, replica, finished, Until(stop=stop))
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
            # Only the main thread gets it; the others end with their windows. One that
            # spans processes may be told by another, and ends with its next completion.
            stop()
            found.stop = error
    if found.stop is None:  # A callback in a replica's thread may have raised one.
        errors = found.errors.values()
        found.stop = next((e for e in errors if not isinstance(e, Exception)), None)
    return found
