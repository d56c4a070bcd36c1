"""The public calls: `rollout`, and `compile_ahead`.

A call checks its arguments on the host before anything is compiled (`call`, `checks`),
rounds their sizes up to buckets (`request`), samples in the scheduler's loop
(`scheduler`), and lays the completions out as arrays (`result`).

On a mesh the same call samples on all devices. Every process of the mesh makes it, with
the same arguments, and gets the same result. Left out: text, rewards.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from er_jax import checks
from er_jax.call import (
    Call,
    journal_of,
    load_saved_costs,
    prepare,
    reuse_of,
    topology_of,
    with_draft,
)
from er_jax.config import RolloutConfig
from er_jax.control.controller import Controller
from er_jax.control.explain import explain
from er_jax.costs import store
from er_jax.drafter import PolicyParams, attach_draft
from er_jax.engine.digests import tree_digest
from er_jax.request import Request, noise_key, row_buckets, sampling_of
from er_jax.respond import Respond, RespondFunction, as_respond
from er_jax.result import NOTHING, Completion, Rollout, assemble, keeping
from er_jax.scheduler import loop
from er_jax.session import Session
from er_jax.stats import RolloutStats
from er_jax.types import Params, Policy, Program, Span
from er_jax.until import Until


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
    resume: Rollout | str | os.PathLike[str] | None = None,
    until: Until | None = None,
    version: int = 0,
    journal: str | os.PathLike[str] | None = None,
    respond: Respond | RespondFunction | None = None,
    session: Session | None = None,
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
        that lives as long as the process or the session, per policy, control and
        drafter. Calls in several threads may share one; see `Controller`.
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
      resume: an earlier rollout of the same prompts, n and sequence ids, or a file that
        `Rollout.save` wrote. What has finished there is returned as it is; everything
        else goes on from its tokens, under the parameters given now. With the same
        parameters and key the result is that of a rollout that was never interrupted.
      until: when to end early; see `Until`.
      version: a number that `Rollout.version` gives to every token sampled by this
        call, such as the step of training; >= 0.
      journal: a file that finished completions are appended to and, every five seconds,
        the tokens so far of the others. Where it exists, the same call goes on from it:
        after a kill or a power cut at most the last five seconds and a window are
        sampled again. `on_finish` is called for the completions that it holds as well.
        Of N processes, number I writes `journal` with the suffix ".I-of-N". See
        docs/living-rollouts.md.
      respond: makes completions conversations of turns: a function that is called with
        (sequence id, `Turn`) when a turn has ended at a stop, and returns tokens to
        append, such as a tool's result, or None to end; or a coroutine function; or a
        `Respond` of one, with limits. Calls run in other threads. Of several processes
        the first of the mesh calls it and tells the others what it has returned; all
        give one.
      session: where engines, programs, controllers and prompts' cache entries are kept
        instead of in the process; see `Session`.
    Returns:
      A `Rollout`.
    Raises:
      ValueError: a wrong argument, before anything is compiled or allocated; or the
        journal is of another call, which it names, or written by another rollout.
      OSError: the journal cannot be written.
      RolloutError: anything later failed; it holds the completions finished before.
      KeyboardInterrupt: Ctrl-C; once sampling has begun, its attribute `completions`
        holds them as well, and `rollout` everything there is, as if the call had ended
        early (with one process).
    Warns:
      RuntimeWarning: rows ended at a non-finite logit (it names their sequence ids), or
        drafts were kept far less often than expected: a stale or broken draft; or the
        policy's drafts cannot see a window that is stated; or the journal is damaged,
        or could not be written and ends there; or `respond` failed for some completions
        (it names their sequence ids, `stats.failed_turns` says why).
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
    return sample(
        policy,
        params,
        prompts,
        key=key,
        config=config,
        sequence_ids=sequence_ids,
        controller=controller,
        mesh=mesh,
        on_finish=on_finish,
        progress=progress,
        profile=profile,
        resume=resume,
        until=until,
        version=version,
        journal=journal,
        respond=respond,
        session=session,
    )


def sample(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    config: RolloutConfig,
    sequence_ids: Sequence[int] | None,
    controller: Controller | None,
    mesh: Mesh | None,
    on_finish: Callable[[int, Completion], None] | None,
    progress: bool,
    profile: str | os.PathLike[str] | None,
    resume: Rollout | str | os.PathLike[str] | None,
    until: Until | None,
    version: int,
    journal: str | os.PathLike[str] | None,
    respond: Respond | RespondFunction | None,
    session: Session | None,
    on_checked: Callable[[Call], None] = lambda call: None,
) -> Rollout:
    """Do what `rollout` says; `on_checked` is called when no argument is refused."""
    checks.check_outside_jit(params, prompts, key)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_own_jax_settings())
        start_s, stats = time.perf_counter(), RolloutStats()
        words = noise_key(key)
        checks.check_version(version, until)
        answering = as_respond(respond)
        kept = None
        if journal is not None:
            kept = stack.enter_context(journal_of(journal, version, mesh))
        call = prepare(
            policy,
            params,
            prompts,
            config,
            sequence_ids,
            controller,
            mesh,
            resume=resume,
            journal=kept,
            key=words,
            respond=answering,
            session=session,
        )
        engine, controller, request = call.engine, call.controller, call.request
        settings = sampling_of(config, words, policy.vocab_size)
        num_compiled, compiled_s = len(engine.compiled_here), engine.compile_s
        with stats.timed("check", lambda: engine.compile_s):
            checks.check_finite(engine.find_nonfinite(call.policy_params))
            if kept is not None:
                kept.confirm(tree_digest(call.policy_params))
        on_checked(call)
        params = with_draft(call, config, stats)
        with stats.timed("calibration", lambda: engine.compile_s):
            load_saved_costs(call, params)
        completions: dict[int, Completion] = {}

        def assembled(found: Mapping[int, Completion]) -> Rollout:
            if engine.agreement.is_leader:
                found = {**call.ended, **found}  # One process gives what was there.
            if kept is not None:
                stats.num_journalled += kept.note(found, sync=True)
            return assemble(
                call.prompts,
                found,
                call.sequence_ids,
                config,
                stats,
                engine.agreement,
                version=version,
                earlier=call.resume,
            )

        earlier = [*call.ended.values(), *call.begun.values()]
        stats.num_resumed = sum(len(found.token_ids) for found in earlier)
        # A failure from here on, even a warning raised as an error, loses nothing.
        with _interruption(call, assembled), keeping(lambda: completions, request):
            if on_finish is not None and engine.agreement.is_leader:
                for sequence, completion in call.told_at_once.items():
                    on_finish(int(call.sequence_ids[sequence]), completion.copy())
            with controller.sampling(_setting(config)), profiled(profile):
                completions = loop.run(
                    topology_of(engine, params, request),
                    request,
                    settings,
                    controller,
                    stats,
                    begun=call.begun,
                    journal=kept,
                    respond=answering,
                    turned=call.turned,
                    reuse=reuse_of(session, call, params, stats),
                    until=until,
                    began_s=start_s,
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
            out = assembled(completions)
            if kept is not None:
                kept.end()  # Here, where Ctrl-C still gives what there is.
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
    session: Session | None = None,
) -> list[Program]:
    """Compile the programs that rollouts of such prompts will likely need, in parallel.

    A rollout otherwise compiles each program when it first needs it, one after the
    other. This call compiles the full batch at every cache length and smaller batches
    at the longest; for each of these, the fastest draft length if it is known,
    otherwise plain decoding and a draft length near four.

    Args:
      policy: as for `rollout`.
      params: as for `rollout`; only shapes are used.
      prompts: as for `rollout`; only their lengths and their number are used.
      config: as for `rollout`.
      controller: as for `rollout`.
      mesh: as for `rollout`.
      progress: show a progress bar.
      session: as for `rollout`; the programs are compiled for its calls.
    Returns:
      The programs that are compiled now.
    Raises:
      ValueError: as for `rollout`.
    """
    checks.check_outside_jit(params, prompts)
    with _own_jax_settings():
        call = prepare(
            policy, params, prompts, config, None, controller, mesh, session=session
        )
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
        settings = sampling_of(config, jax.random.key(0), policy.vocab_size)
        call.engine.compile_windows(params, settings, wanted, progress=progress)
    return wanted


def _worth_compiling(
    controller: Controller, request: Request, rows: int, cache_length: int
) -> list[Program]:
    """Return the programs to compile ahead for a state of this shape."""
    programs = [
        Program(rows, cache_length, gamma).drafting(view)
        for gamma in controller.gammas
        for view in request.views_at(cache_length, gamma)
    ]
    speeds = {program: controller.speed(program) or 0.0 for program in programs}
    if any(speeds.values()):
        return [max(programs, key=speeds.__getitem__)]
    drafting = sorted(
        (p for p in programs if p.gamma),
        key=lambda p: (abs(p.gamma - 4), p.draft, p.window),
    )
    return [*(p for p in programs if not p.gamma), *drafting[:1]]


@contextlib.contextmanager
def _interruption(
    call: Call, assembled: Callable[[Mapping[int, Completion]], Rollout]
) -> Iterator[None]:
    """Give a `KeyboardInterrupt` everything there is, as its attribute `rollout`.

    Not with several processes, which would have to meet for it.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if hasattr(error, "unfinished") and not call.engine.agreement.is_spread:
            # A row that was about to start when it came is as far as it was before.
            # What had ended before the call, `assembled` knows.
            waiting = call.request.waiting
            found = {s: call.begun.get(s, NOTHING) for s in waiting} | error.unfinished
            error.rollout = assembled(found)  # type: ignore[attr-defined]
        raise


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
    """Return the sampling settings that acceptance depends on.

    Of single prompts, their mean to two digits: acceptance is that of the batch.
    """
    values = (config.temperature, config.top_k, config.top_p, config.min_p)
    return tuple(
        float(f"{np.mean(x):.2g}") if isinstance(x, tuple) else x for x in values
    )


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
            stacklevel=4,
        )
    bad_ids = out.sequence_ids[out.finish_reason == "nonfinite"]
    if len(bad_ids):
        warnings.warn(
            f"{len(bad_ids)} of {len(out.sequence_ids)} completions ended at a "
            f"non-finite logit, sequence ids {bad_ids.tolist()[:20]}; their tokens "
            "before it are kept",
            RuntimeWarning,
            stacklevel=4,
        )
    failed = out.stats.failed_turns
    if failed:
        name, message = next(iter(failed.items()))
        warnings.warn(
            f"respond failed for {len(failed)} of {len(out.sequence_ids)} completions, "
            f'which ended as "tool", sequence ids {sorted(failed)[:20]}; of {name}, '
            f"{message}. stats.failed_turns has all messages",
            RuntimeWarning,
            stacklevel=4,
        )


def _program_name(name: Any) -> str:
    kind, *sizes = name
    numbers = [str(size) for size in sizes if isinstance(size, int)]
    spans = [size for size in sizes if isinstance(size, Span)]
    numbers += [f"seeing {span.head} + {span.window}" for span in spans]
    return f"{kind}({', '.join(numbers)})"
