"""The public calls: `rollout`, and `compile_ahead`.

A call checks its arguments on the host before anything is compiled (`checks`), rounds
their sizes up to buckets (`request`), samples in the scheduler's loop (`scheduler`),
and lays the completions out as arrays (`result`).

On a mesh the same call samples on all devices. Every process of the mesh makes it, with
the same arguments, and gets the same result. Left out: text, rewards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from er_jax import checks, kv_cache
from er_jax.config import RolloutConfig, parse_control
from er_jax.control.controller import Controller
from er_jax.control.explain import explain
from er_jax.costs import store
from er_jax.drafter import PolicyParams, attach_draft, check_draft
from er_jax.engine.engine import Engine
from er_jax.engine.kept import engine_for
from er_jax.mesh import layout
from er_jax.mesh.engine import MeshEngine, mesh_engines_for
from er_jax.mesh.topology import DataShards
from er_jax.request import Request, request_of, row_buckets, sampling_of
from er_jax.result import Completion, Rollout, assemble, keeping
from er_jax.scheduler import loop
from er_jax.scheduler.topology import OneDevice, Topology
from er_jax.stats import RolloutStats
from er_jax.types import Params, Policy, Program, Span


def rollout(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    config: RolloutConfig,
    sequence_ids: Sequence[int] | None = None,
    controller: Controller | None = None,
    mesh: Mesh | None = None,
    on_finish: Callable[[int, Completion], None] | None = None,
    progress: bool = False,
    profile: str | os.PathLike[str] | None = None,
) -> Rollout:
    """Sample n completions of every prompt from the policy.

    The tokens follow the policy's distribution after the sampling transform exactly,
    with or without speculation. With `accept="coupled"` they are a function of
    (params, prompt, key, sequence id) alone.

    Args:
      policy: the model; see `Policy`.
      params: its parameters, or `PolicyParams` with a draft. Without one, a draft is
        derived at the start of the call (if `control` can use it).
      prompts: P sequences of token ids, each at least one token, or an array
        `[P, length]`; with several processes, it may be a global array.
      key: a JAX random key, typed or raw; folded with sequence ids and positions, so
        calls that should differ need different keys.
      config: settings of the rollout.
      sequence_ids: N distinct integers in 0 .. 2**31-1 that select each completion's
        noise; default 0 .. N-1. The same id samples the same completion again.
      controller: learns costs and acceptance; keep it across calls. None uses one
        that lives as long as the process, per policy, control and drafter. Calls in
        several threads may share one; see `Controller`.
      mesh: devices to run on, with any of the axes data, fsdp and model (see
        `mesh.rules`; `mesh.layout.rollout_mesh` takes other names); None is the default
        device. Parameters on the mesh are used with the shardings they have; those of a
        `Decoder` that are elsewhere are sharded by the rules, again in every call. All
        processes of the mesh call `rollout` with the same arguments.
      on_finish: called with (sequence id, `Completion`) as rows finish, while the
        device decodes the others; use it for rewards of single completions. With
        several processes, one of them calls it for each completion.
      progress: show a progress bar.
      profile: directory for a trace of host and device, for XProf or Perfetto; the
        seconds in `stats` then include the cost of tracing. See docs/profiling.md.
    Returns:
      A `Rollout`.
    Raises:
      ValueError: a wrong argument, before anything is compiled or allocated.
      RolloutError: anything later failed; it holds the completions finished before.
      KeyboardInterrupt: Ctrl-C; its attribute `completions` holds them as well.
    Warns:
      RuntimeWarning: rows ended at a non-finite logit (it names their sequence ids), or
        drafts were kept far less often than expected: a stale or broken draft; or the
        policy's drafts cannot see a window that is stated.
    Example:
      >>> import jax, er_jax
      >>> policy = er_jax.Decoder(er_jax.DecoderConfig(
      ...     vocab_size=32, dim=32, num_layers=1, num_heads=2, num_kv_heads=1,
      ...     hidden_dim=64))
      >>> out = er_jax.rollout(
      ...     policy, policy.init(jax.random.key(0)), [[1, 2, 3]],
      ...     key=jax.random.key(1),
      ...     config=er_jax.RolloutConfig(max_new_tokens=4, n=2, control="ar"))
      >>> out.completion_ids.shape
      (2, 4)
    """
    checks.check_outside_jit(params, prompts, key)
    with _own_jax_settings():
        start_s, stats = time.perf_counter(), RolloutStats()
        settings = sampling_of(config, key)
        call = _prepare(policy, params, prompts, config, sequence_ids, controller, mesh)
        engine, controller, request = call.engine, call.controller, call.request
        num_compiled, compiled_s = len(engine.compiled_here), engine.compile_s
        with stats.timed("check", lambda: engine.compile_s):
            checks.check_finite(engine.find_nonfinite(call.policy_params))
        params = _with_draft(call, config, stats)
        with stats.timed("calibration", lambda: engine.compile_s):
            _load_costs(call, params)
        completions: dict[int, Completion] = {}
        # A failure from here on, even a warning raised as an error, loses nothing.
        with keeping(lambda: completions, request):
            with controller.sampling(_setting(config)), profiled(profile):
                completions = loop.run(
                    _topology(engine, params, request),
                    request,
                    settings,
                    controller,
                    stats,
                    on_finish=on_finish,
                    progress=progress,
                )
                broken_drafter = controller.broken_drafter
                if isinstance(controller, Controller):
                    stats.switch = explain(controller, stats.programs)
            stats.compiled = [
                (_program_name(name), seconds)
                for name, seconds in engine.compiled_here[num_compiled:]
            ]
            stats.seconds["compile"] = engine.compile_s - compiled_s
            out = assemble(
                call.prompts,
                completions,
                call.sequence_ids,
                config,
                stats,
                engine.agreement,
            )
            if len(controller.gammas) > 1:
                store.save_costs(engine, params, controller.table)
            stats.seconds["host"] = time.perf_counter() - start_s - stats.total_s
            _warn_of(broken_drafter, out)
    return out


def compile_ahead(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[Sequence[int]],
    *,
    config: RolloutConfig,
    controller: Controller | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> list[Program]:
    """Compile the programs that rollouts of such prompts will likely need, in parallel.

    A rollout otherwise compiles each program when it first needs it, one after the
    other. This call compiles the full batch at every cache length and smaller batches
    at the longest; for each of these, the fastest draft length if it is known,
    otherwise plain decoding and a draft length near four.

    Args:
      policy, params, prompts, config, controller, mesh: as for `rollout`. Only the
        shapes of the parameters, and the lengths and number of prompts, are used.
      progress: show a progress bar.
    Returns:
      The programs that are compiled now.
    Raises:
      ValueError: as for `rollout`.
    """
    checks.check_outside_jit(params, prompts)
    with _own_jax_settings():
        call = _prepare(policy, params, prompts, config, None, controller, mesh)
        slots, lengths = call.request.slots, call.request.cache_lengths
        num_shards = call.engine.layout.num_shards
        shapes = [(slots, length) for length in lengths]
        shapes += [
            (rows, lengths[-1])
            for rows in row_buckets(slots, num_shards)
            if rows < slots
        ]
        wanted = [
            program
            for shape in shapes
            for program in _worth_compiling(call.controller, call.request, *shape)
        ]
        params = call.params
        if not isinstance(params, PolicyParams):
            make = functools.partial(attach_draft, config=config.drafter)
            is_drafting = any(program.gamma for program in wanted)
            shapes_of = jax.eval_shape(make, params) if is_drafting else None
            params = shapes_of or PolicyParams(policy=params, draft=None)
        settings = sampling_of(config, jax.random.key(0))
        call.engine.compile_windows(params, settings, wanted, progress=progress)
    return wanted


def _worth_compiling(
    controller: Controller, request: Request, rows: int, cache_length: int
) -> list[Program]:
    """Return the programs to compile ahead for a state of this shape."""
    programs = [
        Program(rows, cache_length, gamma).seeing(span)
        for gamma in controller.gammas
        for span in request.spans_at(cache_length, gamma)
    ]
    speeds = {program: controller.speed(program) or 0.0 for program in programs}
    if any(speeds.values()):
        return [max(programs, key=speeds.__getitem__)]
    drafting = sorted(
        (p for p in programs if p.gamma), key=lambda p: (abs(p.gamma - 4), p.window)
    )
    return [*(p for p in programs if not p.gamma), *drafting[:1]]


@contextlib.contextmanager
def _own_jax_settings() -> Iterator[None]:
    """Suspend the caller's transfer guard and `disable_jit` during a rollout.

    A rollout's few transfers are intended, and it compiles its programs ahead of time,
    which needs jit.
    """
    with jax.transfer_guard("allow"), jax.disable_jit(False):
        yield


def profiled(
    directory: str | os.PathLike[str] | None,
) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager that traces its block, or does nothing for None."""
    if directory is None:
        return contextlib.nullcontext()
    return jax.profiler.trace(directory)


def _setting(config: RolloutConfig) -> tuple[float, ...]:
    """Return the sampling settings that acceptance depends on."""
    return config.temperature, config.top_k, config.top_p, config.min_p


@dataclasses.dataclass(frozen=True)
class _Call:
    """The checked arguments of a rollout, with its request, engine and controller.

    params: as given, on the devices of `engine`.
    """

    params: Params | PolicyParams
    prompts: list[np.ndarray]
    sequence_ids: np.ndarray
    request: Request
    engine: Engine
    controller: Controller

    @property
    def policy_params(self) -> Params:
        """The parameters without a draft."""
        params = self.params
        return params.policy if isinstance(params, PolicyParams) else params


def _prepare(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[Sequence[int]],
    config: RolloutConfig,
    sequence_ids: Sequence[int] | None,
    controller: Controller | None,
    mesh: Mesh | None,
) -> _Call:
    """Check the arguments of a rollout; find its engine and controller.

    Parameters that are not on the mesh are moved there.
    """
    checks.check_policy(policy)
    is_drafting = max(parse_control(config.control, config.gammas)) > 0
    if isinstance(params, PolicyParams) and params.draft is None and not is_drafting:
        params = params.policy
    arrays = checks.checked_prompts(prompts, policy.vocab_size)
    checks.check_result_fits(len(arrays), config)
    ids = checks.checked_sequence_ids(sequence_ids, len(arrays) * config.n)
    checks.check_token_ids(config, policy.vocab_size)
    checks.check_length(arrays, config, getattr(policy, "max_length", None))
    if isinstance(params, PolicyParams):
        check_draft(params)
    checks.check_alive(params)
    params, engine = _engine_of(policy, params, config, mesh)
    if controller is None:
        name = (config.control, config.gammas, config.drafter)
        made = engine.defaults.get(name) or Controller(config.control, config.gammas)
        controller = engine.defaults.setdefault(name, made)
    checks.check_controller(controller, config)
    request = request_of(arrays, ids, config, engine.layout.num_shards)
    call = _Call(params, arrays, ids, request, engine, controller)
    if not engine.compiled:
        checks.check_parameters(policy, call.policy_params)
        if max(controller.gammas):
            checks.check_drafting(policy, params, config)
    slots = kv_cache.ring_slots(policy)
    if slots is not None and slots < request.cache_lengths[-1]:
        checks.check_window(controller.gammas)
        request = dataclasses.replace(request, ring_slots=slots)
    if not _can_draft_with_spans(call, config):
        request = dataclasses.replace(request, spans=(None,))
    limit_bytes = checks.check_memory(engine, params, request, is_drafting)
    request = dataclasses.replace(request, state_limit_bytes=limit_bytes)
    return dataclasses.replace(call, request=request)


def _can_draft_with_spans(call: _Call, config: RolloutConfig) -> bool:
    """Whether the policy can draft with a part of the positions in sight.

    Found once per engine, and only where a program could make use of it.
    """
    request, engine = call.request, call.engine
    drafting = [gamma for gamma in call.controller.gammas if gamma]
    longest = request.cache_lengths[-1]
    if not any(any(request.spans_at(longest, gamma)) for gamma in drafting):
        return True
    if "takes rings" not in engine.defaults:
        can = kv_cache.takes_rings(engine.policy, call.policy_params)
        engine.defaults["takes rings"] = can
    can = engine.defaults["takes rings"]
    if not can and config.drafter.window != "auto":
        warnings.warn(
            f"drafter.window={config.drafter.window} is not used: the policy handles "
            "the arrays of its cache itself, so drafts see all positions; use "
            "er_jax.kv_cache.write and attend in forward, or set window=None",
            RuntimeWarning,
            stacklevel=4,
        )
    return can


def _engine_of(
    policy: Policy,
    params: Params | PolicyParams,
    config: RolloutConfig,
    mesh: Mesh | None,
) -> tuple[Params | PolicyParams, Engine]:
    """Return the parameters on the devices of the rollout, and its engine."""
    if mesh is not None:
        mesh = layout.rollout_mesh(mesh)
        params = layout.put_on_mesh(policy, params, mesh)
    else:
        checks.check_placement(params)
    policy_params = params.policy if isinstance(params, PolicyParams) else params
    if mesh is None:
        engine = engine_for(policy, policy_params, config.accept, config.attention)
        return params, engine
    (engine,) = mesh_engines_for(
        policy, config.accept, [(policy_params, mesh)], config.attention
    )
    return params, engine


def _topology(engine: Engine, params: PolicyParams, request: Request) -> Topology:
    if isinstance(engine, MeshEngine):
        return DataShards(engine, params, request)
    return OneDevice(engine, params, request)


def _with_draft(
    call: _Call, config: RolloutConfig, stats: RolloutStats
) -> PolicyParams:
    """Return the parameters with a draft, derived now if none was given."""
    if isinstance(call.params, PolicyParams):
        return _uncommitted_codes(call.params)
    if not max(call.controller.gammas):
        return PolicyParams(policy=call.params, draft=None)
    engine = call.engine
    with stats.timed("draft refresh", lambda: engine.compile_s):
        params = engine.attach_draft(call.params, config.drafter)
        jax.block_until_ready(params.draft)
    return params


def _load_costs(call: _Call, params: PolicyParams) -> None:
    """Load saved costs into a controller that may draft and has timed nothing yet."""
    controller = call.controller
    with controller.measuring:
        table = controller.table
        is_empty = not table.seconds and table.passes is None
        if len(controller.gammas) > 1 and is_empty:
            found = store.load_costs(call.engine, params)
            controller.table = table if found is None else found


def _uncommitted_codes(params: PolicyParams) -> PolicyParams:
    """Return the parameters with uncommitted 4-bit codes in the draft, on CPU.

    Compiled CPU programs refuse 4-bit codes that are committed to a device, as restored
    ones are: they ask for a layout that JAX gives no CPU array.
    """
    if jax.default_backend() != "cpu":
        return params

    def leaf(x: jax.Array) -> jax.Array:
        is_bound = isinstance(x, jax.Array) and x.dtype == jnp.int4 and x.committed
        return jnp.asarray(np.asarray(x)) if is_bound else x

    return dataclasses.replace(params, draft=jax.tree.map(leaf, params.draft))


def _warn_of(broken_drafter: tuple[float, float] | None, out: Rollout) -> None:
    """Warn the caller of `rollout` of a broken drafter and of non-finite logits."""
    if broken_drafter is not None:
        expected, found = broken_drafter
        warnings.warn(
            f"drafts were kept at {100 * found:.0f} % where {100 * expected:.0f} % "
            "were expected: the draft is stale, broken or of another policy. Derive it "
            "with er_jax.attach_draft in every update. The rollout went on without "
            "drafting wherever that is faster, and its tokens are not affected",
            RuntimeWarning,
            stacklevel=3,
        )
    bad_ids = out.sequence_ids[out.finish_reason == "nonfinite"]
    if len(bad_ids):
        warnings.warn(
            f"{len(bad_ids)} of {len(out.sequence_ids)} completions ended at a "
            f"non-finite logit, sequence ids {bad_ids.tolist()[:20]}; their tokens "
            "before it are kept",
            RuntimeWarning,
            stacklevel=3,
        )


def _program_name(name: Any) -> str:
    kind, *sizes = name
    numbers = [str(size) for size in sizes if isinstance(size, int)]
    spans = [size for size in sizes if isinstance(size, Span)]
    numbers += [f"seeing {span.head} + {span.window}" for span in spans]
    return f"{kind}({', '.join(numbers)})"
