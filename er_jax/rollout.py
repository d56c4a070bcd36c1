"""The call users make: `rollout`, its configuration and its result.

Checks every argument on the host before anything is compiled, turns the request into
buckets, runs the scheduler, and lays the completions out as arrays.

On a mesh the same call samples on all of its devices; of several processes every one
makes it, with the same arguments, and gets the same result. `gather_prompts` makes the
same arguments of prompts that every process has its own of.

Left out: text, rewards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from er_jax import calibrate, engine, scheduler, sharding
from er_jax.acceptance import ACCEPT_RULES, AcceptRule
from er_jax.arguments import MOST, is_number, is_whole, whole_numbers
from er_jax.control import DEFAULT_GAMMAS, Controller, parse_control
from er_jax.drafter import (
    DrafterConfig,
    PolicyParams,
    attach_draft,
    check_draft,
    draft_params,
)
from er_jax.scheduler import Completion, Request
from er_jax.stats import RolloutStats
from er_jax.types import (
    DATA_AXIS,
    FINISH_NAMES,
    NONE,
    LogprobKind,
    Params,
    Policy,
    Program,
    Sampling,
)

LOGPROB_KINDS = tuple(kind.name.lower() for kind in LogprobKind)

# Tokens of prompts prefilled at once: enough to be bound by arithmetic, few enough
# that refilling with one short prompt wastes little. A CPU is bound by it at once.
PREFILL_TOKENS = 256
PREFILL_TOKENS_CPU = 64
MIN_PROMPT_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How to sample.

    Only `max_new_tokens`, `max_slots`, `accept`, `drafter` and what `control` makes of
    `gammas` name programs; everything else may change from call to call for free.

    Args:
      max_new_tokens: limit of each completion in tokens, >= 1.
      n: completions per prompt, >= 1.
      temperature: >= 0; 0 is greedy.
      top_k: keep the k most likely tokens; 0 is off.
      top_p: keep the most likely tokens that hold this mass, in (0, 1]; 1 is off.
      min_p: drop tokens less likely than this times the most likely, in [0, 1]; 0 off.
      stop_token_ids: a completion ends with, and includes, the first of these.
      pad_id: fills `prompt_ids` and `completion_ids` outside their masks.
      accept: "coupled" (replayable), "token" or "block"; all are exact.
      gammas: draft lengths the controller may choose from; must contain 0.
      control: "best", "paper" (the published rule), "ar" or "fixed:g".
      logprobs: "raw" (the model's own distribution), "temperature" (after temperature,
        before truncation: what RL trainers recompute) or "processed" (what is sampled).
      max_slots: rows decoded at once, >= 1.
      drafter: how a draft is derived where `params` brings none.
    Raises:
      ValueError: naming argument, value, limit and remedy.
    """

    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    pad_id: int = 0
    accept: AcceptRule = "coupled"
    gammas: tuple[int, ...] = DEFAULT_GAMMAS
    control: str = "best"
    logprobs: str = "temperature"
    max_slots: int = 64
    drafter: DrafterConfig = dataclasses.field(default_factory=DrafterConfig)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "n", "max_slots", "top_k", "pad_id"):
            value: Any = getattr(self, name)
            if not is_whole(value, -MOST - 1, MOST):
                raise ValueError(
                    f"{name}={value!r} must be a whole number of type int32"
                )
            object.__setattr__(self, name, int(value))
        for name in ("temperature", "top_p", "min_p"):
            object.__setattr__(self, name, _real_number(name, getattr(self, name)))
        for name in ("gammas", "stop_token_ids"):
            # A tuple of plain numbers can name a program, and be written to a file.
            numbers = whole_numbers(name, getattr(self, name))
            object.__setattr__(self, name, numbers)
        if not isinstance(self.drafter, DrafterConfig):
            raise ValueError(
                f"drafter={self.drafter!r} is no DrafterConfig; give "
                "er_jax.DrafterConfig(...)"
            )
        for name in ("max_new_tokens", "n", "max_slots"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        ranges: tuple[tuple[str, float, float, str], ...] = (
            ("temperature", 0.0, math.inf, "use 0 for greedy decoding"),
            ("top_k", 0, math.inf, "use 0 to switch it off"),
            ("min_p", 0.0, 1.0, "use 0 to switch it off"),
        )
        for name, low, high, remedy in ranges:
            value = getattr(self, name)
            if not low <= value <= high or value == math.inf:
                raise ValueError(
                    f"{name}={value} must be from {low} to {high}; {remedy}"
                )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} must be above 0 and at most 1; use 1 to switch it "
                "off"
            )
        for name, known in (("accept", ACCEPT_RULES), ("logprobs", LOGPROB_KINDS)):
            value = getattr(self, name)
            if value not in known:
                names = ", ".join(repr(word) for word in known)
                raise ValueError(f"{name}={value!r} is unknown; use one of {names}")
        parse_control(self.control, self.gammas)


def _real_number(name: str, value: Any) -> float:
    """Return a number as a plain float; `ValueError` for anything else."""
    if not is_number(value):
        raise ValueError(f"{name}={value!r} must be a number, as 0.7 is")
    return float(value)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Completions of a request, N = len(prompts) * n in prompt order.

    The n completions of a prompt are adjacent. With T the longest prompt:

    prompt_ids: int32 `[N, T]`, left-padded. prompt_mask: bool `[N, T]`.
    completion_ids: int32 `[N, max_new_tokens]`, right-padded, the stop token included.
    completion_mask: bool `[N, max_new_tokens]`, true on sampled tokens.
    logprobs: float32 `[N, max_new_tokens]`, of the emitted token under the target model
      by the meaning in the config, 0 where masked.
    lengths: int32 `[N]`, sampled tokens.
    finish_reason: `[N]` words, "stop", "length" or "nonfinite".
    sequence_ids: int32 `[N]`, the names of the completions for the noise.
    stats: what the rollout did; see `RolloutStats`.
    """

    prompt_ids: np.ndarray
    prompt_mask: np.ndarray
    completion_ids: np.ndarray
    completion_mask: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    finish_reason: np.ndarray
    sequence_ids: np.ndarray
    stats: RolloutStats


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
    with speculation or without. With `accept="coupled"` they are a function of
    (params, prompt, key, sequence id) alone.

    Args:
      policy: the model; see `Policy`.
      params: its parameters, or `PolicyParams` with a draft. Bare parameters get a
        draft at the start of the call (if `control` can use one).
      prompts: P sequences of token ids, each at least one token, or an array
        `[P, length]`; of several processes it may be a global one.
      key: a JAX random key, typed or raw; folded with sequence ids and positions, so
        calls that should differ need different keys.
      config: how to sample.
      sequence_ids: N distinct integers in 0 .. 2**31-1, the completions' names for the
        noise; default 0 .. N-1. Giving one again samples that completion again.
      controller: learns costs and acceptance; keep it across calls. None uses one
        that lives as long as the process, per policy, control and drafter. Calls in
        several threads may share one; see `Controller`.
      mesh: devices to run on, with any of the axes data, fsdp and model (see
        `sharding`; `sharding.rollout_mesh` takes other names); None is the default
        device. Parameters are used as they lie on it. A decoder's are laid out by the
        rules if they lie elsewhere; every call then moves them. All processes of the
        mesh call `rollout` with the same arguments.
      on_finish: called with (sequence id, `Completion`) as rows finish, while the
        device goes on with the others: the place for rewards of single completions. Of
        several processes, one is called for each completion.
      progress: show a progress bar.
      profile: directory for a trace of host and device, for XProf or Perfetto; what
        the trace itself costs is in the seconds. See docs/profiling.md.
    Returns:
      A `Rollout`.
    Raises:
      ValueError: a wrong argument, before anything is compiled or allocated.
      RolloutError: a failure on the way, holding the completions finished so far.
      KeyboardInterrupt: Ctrl-C, with these in an attribute `completions`.
    Warns:
      RuntimeWarning: rows ended at a non-finite logit; it names their sequence ids. Or
        drafts were kept far less often than expected: a stale or broken draft.
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
    check_outside_jit(params, prompts, key)
    with _own_jax_settings():
        return _rollout(
            policy, params, prompts, key, config, sequence_ids, controller, mesh,
            on_finish, progress, profile,
        )  # fmt: skip


def check_outside_jit(params: Any, prompts: Any, key: Any = None) -> None:
    """Refuse arguments that are traced."""
    arrays = prompts if isinstance(prompts, list | tuple) else [prompts]
    arrays = [array for array in arrays if isinstance(array, jax.Array)]
    for name, leaves in (
        ("params", jax.tree.leaves(params)),
        ("prompts", arrays),
        ("key", [key]),
    ):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise ValueError(
                f"{name} is traced: a rollout decides on the host what to run next "
                "and cannot be part of jax.jit, grad, vmap or scan; call it outside of "
                "them, and jit the update alone"
            )


@contextlib.contextmanager
def _own_jax_settings() -> Iterator[None]:
    """Undo settings of the caller's that are not meant for a rollout.

    Its transfers are few and on purpose, so a guard against others must not stop them;
    and its programs are compiled ahead, which `disable_jit` would make impossible.
    """
    with jax.transfer_guard("allow"), jax.disable_jit(False):
        yield


def _rollout(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    config: RolloutConfig,
    sequence_ids: Sequence[int] | None,
    controller: Controller | None,
    mesh: Mesh | None,
    on_finish: Callable[[int, Completion], None] | None,
    progress: bool,
    profile: str | os.PathLike[str] | None,
) -> Rollout:
    """Sample; arguments as for `rollout`, which checks and sets up."""
    start_s = time.perf_counter()
    settings = _settings(config, key)
    params, arrays, ids, request, programs, controller = _begin(
        policy, params, prompts, config, sequence_ids, controller, mesh
    )
    bare = params.policy if isinstance(params, PolicyParams) else params

    stats = RolloutStats()
    before = len(programs.compiled_here)
    compiled_s = programs.compile_s
    with stats.timed("check", lambda: programs.compile_s):
        bad = programs.find_nonfinite(bare)
    if bad:
        raise ValueError(
            f"params holds NaN or infinity in {', '.join(bad[:5])}"
            f"{' and others' if len(bad) > 5 else ''}; every completion would be "
            "garbage: go back to the last finite parameters"
        )
    pair = _with_draft(programs, params, config, controller, stats)
    with stats.timed("calibration", lambda: programs.compile_s), controller.measuring:
        calibrate.recall(programs, pair, controller)
    setting = (config.temperature, config.top_k, config.top_p, config.min_p)
    completions: dict[int, Completion] = {}
    # What fails from here on, a warning made an error among it, loses no completion.
    with scheduler.keeping(lambda: completions, request):
        with (
            controller.sampling(setting),
            contextlib.nullcontext()
            if profile is None
            else jax.profiler.trace(profile),
        ):
            completions = scheduler.run(
                programs,
                pair,
                request,
                settings,
                controller,
                stats,
                on_finish=on_finish,
                progress=progress,
            )
            broken_drafter = controller.broken_drafter
        stats.compiled = [
            (_program_name(name), seconds)
            for name, seconds in programs.compiled_here[before:]
        ]
        stats.seconds["compile"] = programs.compile_s - compiled_s
        out = assemble(arrays, completions, ids, config, stats, programs)
        calibrate.remember(programs, pair, controller)
        stats.seconds["host"] = time.perf_counter() - start_s - stats.total_s
        _warn_of(broken_drafter, out)
    return out


def _warn_of(broken_drafter: tuple[float, float] | None, out: Rollout) -> None:
    """Warn the caller of `rollout` of what ought to be looked into."""
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


class _Begun(NamedTuple):
    """A rollout before anything is compiled: checked arguments, and what they name."""

    params: Params | PolicyParams
    prompts: list[np.ndarray]
    sequence_ids: np.ndarray
    request: Request
    programs: engine.Engine
    controller: Controller


def _begin(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[Sequence[int]],
    config: RolloutConfig,
    sequence_ids: Sequence[int] | None,
    controller: Controller | None,
    mesh: Mesh | None,
) -> _Begun:
    """Check the arguments of a rollout and find its engine and controller.

    Parameters that do not lie on the mesh are moved there.
    """
    check_policy(policy)
    is_drafting = max(parse_control(config.control, config.gammas)) > 0
    if isinstance(params, PolicyParams) and params.draft is None and not is_drafting:
        params = params.policy
    arrays = checked_prompts(prompts, policy.vocab_size)
    _check_result_fits(len(arrays), config)
    ids = checked_sequence_ids(sequence_ids, len(arrays) * config.n)
    _check_token_ids(config, policy.vocab_size)
    _check_length(arrays, config, getattr(policy, "max_length", None))
    if isinstance(params, PolicyParams):
        check_draft(params)
    check_alive(params)
    if mesh is not None:
        check_mesh(mesh)
        mesh = sharding.rollout_mesh(mesh)
        params = sharding.place(policy, params, mesh)
    else:
        _check_placement(params)
    groups = 1 if mesh is None else mesh.shape[DATA_AXIS]
    request = request_of(arrays, ids, config, groups)
    bare = params.policy if isinstance(params, PolicyParams) else params
    programs = engine.engine_for(policy, bare, config.accept, mesh)
    if controller is None:
        name = (config.control, config.gammas, config.drafter)
        make = programs.defaults.get(name) or Controller(config.control, config.gammas)
        controller = programs.defaults.setdefault(name, make)
    _check_controller(controller, config)
    if not programs.compiled:
        _check_parameters(policy, bare)
        if max(controller.gammas):
            _check_draft(policy, params, config)
    request = _with_memory(programs, params, request, controller)
    return _Begun(params, arrays, ids, request, programs, controller)


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
    """Compile what rollouts of such prompts are likely to need, in parallel.

    Without it every program is compiled when it is first wanted, one after the other.
    With it all of these are: the full batch at every cache length, smaller batches at
    the longest; at each, the draft length that is known to be fastest, or plain
    decoding and a draft of about four where nothing is known yet.

    Args:
      policy, params, prompts, config, controller, mesh: as for `rollout`; of the
        parameters only shapes are used, and of the prompts only lengths and number.
      progress: show a progress bar.
    Returns:
      The windows that are ready now: rows, cache length, gamma.
    Raises:
      ValueError: as for `rollout`.
    """
    check_outside_jit(params, prompts)
    with _own_jax_settings():
        return _compile_ahead(
            policy, params, prompts, config, controller, mesh, progress
        )


def _compile_ahead(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[Sequence[int]],
    config: RolloutConfig,
    controller: Controller | None,
    mesh: Mesh | None,
    progress: bool,
) -> list[Program]:
    begun = _begin(policy, params, prompts, config, None, controller, mesh)
    params, request, controller = begun.params, begun.request, begun.controller
    slots, lengths = request.slots, request.cache_lengths
    shapes = [(slots, length) for length in lengths]
    shapes += [(rows, lengths[-1]) for rows in request.row_buckets() if rows < slots]
    wanted = []
    for shape in shapes:
        programs = [Program(*shape, gamma) for gamma in controller.gammas]
        speeds = {program: controller.speed(program) or 0.0 for program in programs}
        if any(speeds.values()):
            wanted.append(max(programs, key=speeds.__getitem__))
        else:
            drafting = [p for p in programs if p.gamma]
            wanted += [p for p in programs if not p.gamma]
            wanted += sorted(drafting, key=lambda p: abs(p.gamma - 4))[:1]
    if not isinstance(params, PolicyParams):
        make = functools.partial(attach_draft, config=config.drafter)
        is_drafting = any(program.gamma for program in wanted)
        shaped = jax.eval_shape(make, params) if is_drafting else None
        params = shaped or PolicyParams(policy=params, draft=None)
    settings = _settings(config, jax.random.key(0))
    begun.programs.compile_windows(params, settings, wanted, progress=progress)
    return wanted


def gather_prompts(
    prompts: Sequence[Sequence[int]], n: int = 1
) -> tuple[list[list[int]], slice]:
    """Bring together prompts that every process has its own of; all must call.

        everything, rows = er_jax.gather_prompts(prompts, config.n)
        out = er_jax.rollout(policy, params, everything, ..., mesh=mesh)
        own = out.completion_ids[rows]

    Args:
      prompts: token ids, those of this process; none is allowed. n: completions of
        each, as in the config.
    Returns:
      The prompts of all processes, in order of processes, the same in each; and the
      rows of this process's completions in a `Rollout` of them.
    Raises:
      ValueError: a prompt is empty or no flat sequence of integers, in any process.
    """
    failure: ValueError | None = None
    try:
        arrays = _checked_arrays(prompts)
    except ValueError as error:
        # Raised when the others know: they would wait for this one.
        failure, arrays = error, []
    lengths = np.array([len(array) for array in arrays], np.int32)
    tokens = np.concatenate([np.zeros(0, np.int32), *arrays])
    # No vocabulary is so large; `rollout` names the prompt.
    tokens = np.clip(tokens, NONE, np.iinfo(np.int32).max).astype(np.int32)
    gather = multihost_utils.process_allgather
    own = [len(lengths), len(tokens), failure is not None]
    sizes = gather(np.array(own, np.int32)).reshape(-1, 3)
    bad = np.flatnonzero(sizes[:, 2])
    if len(bad):
        raise failure or ValueError(
            f"prompts of process {bad[0]} cannot be sampled; its own error says why"
        )
    sizes = sizes[:, :2]
    room = sizes.max(axis=0)
    lengths = np.pad(lengths, (0, room[0] - len(lengths)))
    tokens = np.pad(tokens, (0, room[1] - len(tokens)))
    everything: list[list[int]] = []
    for (count, _), of_one, flat in zip(
        sizes, gather(lengths), gather(tokens), strict=True
    ):
        ends = np.cumsum(of_one[:count])
        everything += [part.tolist() for part in np.split(flat, ends)[:count]]
    before = int(sizes[: jax.process_index(), 0].sum())
    return everything, slice(before * n, (before + len(prompts)) * n)


def checked_prompts(
    prompts: Sequence[Sequence[int]], vocab_size: int
) -> list[np.ndarray]:
    """Return the prompts as int32 arrays; `ValueError` for one that is none."""
    if len(prompts) == 0:
        raise ValueError("prompts is empty; give at least one prompt")
    if isinstance(prompts, jax.Array) and not prompts.is_fully_addressable:
        prompts = multihost_utils.process_allgather(prompts, tiled=True)
    arrays = _checked_arrays(prompts)
    tokens = np.concatenate(arrays)
    is_bad = (tokens < 0) | (tokens >= vocab_size)
    if is_bad.any():
        at = int(np.argmax(is_bad))
        ends = np.cumsum([len(array) for array in arrays])
        index = int(np.searchsorted(ends, at, side="right"))
        raise ValueError(
            f"prompts[{index}] holds token id {tokens[at]}, outside the vocabulary "
            f"0 .. {vocab_size - 1}; use the policy's own tokenizer"
        )
    return [array.astype(np.int32) for array in arrays]


def _checked_arrays(prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    arrays = [np.asarray(prompt) for prompt in prompts]
    for index, array in enumerate(arrays):
        if array.size == 0:
            raise ValueError(
                f"prompts[{index}] is empty; a prompt needs at least one token, a "
                "beginning-of-sequence id for instance"
            )
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"prompts[{index}] has shape {array.shape} and dtype {array.dtype}; "
                "give a flat sequence of integer token ids"
            )
    return arrays


def checked_sequence_ids(ids: Sequence[int] | None, count: int) -> np.ndarray:
    """Return the names of `count` completions; `ValueError` for unfit ones."""
    if ids is None:
        return np.arange(count)
    array = np.asarray(ids)
    if array.shape != (count,):
        raise ValueError(
            f"sequence_ids has shape {array.shape}; give one integer for each of the "
            f"{count} completions (prompts times n)"
        )
    if (
        not np.issubdtype(array.dtype, np.integer)
        or array.min() < 0
        or (array.max() >= 2**31)
    ):
        raise ValueError(
            "sequence_ids must be integers from 0 to 2**31 - 1; number the completions"
        )
    values, counts = np.unique(array, return_counts=True)
    if counts.max() > 1:
        raise ValueError(
            f"sequence_ids holds {values[counts > 1][0]} twice: two completions of one "
            "prompt would be the same; give every completion its own"
        )
    return array.astype(np.int64)


def _check_result_fits(num_prompts: int, config: RolloutConfig) -> None:
    """Check that what the call returns fits in the host's memory."""
    width = 4 + 4 + 1  # token, log-probability, mask
    size = num_prompts * config.n * config.max_new_tokens * width
    limit = engine.host_memory_bytes()
    if limit is not None and size > limit:
        raise ValueError(
            f"n={config.n} completions of each of {num_prompts} prompts, of "
            f"max_new_tokens={config.max_new_tokens}, are {size / 1e9:.1f} GB of "
            f"results, and the host has {limit / 1e9:.1f} GB; sample them in several "
            "calls, with other sequence_ids in each"
        )


def _check_token_ids(config: RolloutConfig, vocab_size: int) -> None:
    for token in config.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"stop_token_ids holds {token}, outside the vocabulary 0 .. "
                f"{vocab_size - 1}; it could never be sampled"
            )


def _check_length(
    prompts: list[np.ndarray], config: RolloutConfig, max_length: int | None
) -> None:
    if max_length is None:
        return
    for index, prompt in enumerate(prompts):
        if len(prompt) + config.max_new_tokens > max_length:
            raise ValueError(
                f"prompts[{index}] has {len(prompt)} tokens, which with max_new_tokens="
                f"{config.max_new_tokens} exceeds the policy's {max_length} positions; "
                f"shorten it to {max(max_length - config.max_new_tokens, 0)} tokens or "
                "lower max_new_tokens"
            )


def check_policy(policy: Any) -> None:
    """Refuse what is no policy, or cannot name programs."""
    missing = [
        name
        for name in ("vocab_size", "init_cache", "forward", "logits")
        if not hasattr(policy, name)
    ]
    if missing:
        raise ValueError(
            f"policy={policy!r} has no {', '.join(missing)}; docs/any-policy.md says "
            "what a policy must offer"
        )
    try:
        hash(policy)
    except TypeError as error:
        raise ValueError(
            f"policy={policy!r} cannot be hashed ({error}), and names compiled "
            "programs; make it a frozen dataclass that holds no arrays, lists or dicts"
        ) from error


def check_mesh(mesh: Any) -> None:
    """Refuse what is no mesh."""
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh={mesh!r} is no jax.sharding.Mesh; give one, or call rollout with "
            "None for the default device"
        )


def check_alive(params: Any) -> None:
    """Check that no parameter was donated to another program."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"params: {name or 'the array'} was deleted, donated to a jitted "
                "update for instance; pass the parameters that the update returned"
            )


def _check_placement(params: Any) -> None:
    """Check that parameters lie where programs without a mesh run."""
    device = engine.default_device()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not isinstance(leaf, jax.Array) or leaf.devices() == {device}:
            continue
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = sorted(leaf.devices(), key=lambda d: d.id)
        if len(found) > 1:
            place = f"is laid out over {len(found)} devices ({leaf.sharding})"
            remedy = "give mesh=, the mesh they lie on"
        else:
            place = f"lies on {found[0]}"
            remedy = "call inside jax.default_device(...) of theirs"
        raise ValueError(
            f"params: {name or 'the array'} {place}, and without a mesh a rollout runs "
            f"on {device}; move them there with jax.device_put(params, device), or "
            f"{remedy}"
        )


def _one_token(policy: Policy, params: Params) -> jax.Array:
    """Return the logits of one token, `[1, 1, V]`; for tracing with shapes alone."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    hidden, _ = policy.forward(params, tokens, tokens, policy.init_cache(1, 1))
    return policy.logits(params, hidden)


def _check_draft(
    policy: Policy, params: Params | PolicyParams, config: RolloutConfig
) -> None:
    """Trace one token through the draft, before anything is compiled."""
    if not isinstance(params, PolicyParams):
        params = jax.eval_shape(lambda p: attach_draft(p, config.drafter), params)
    try:
        jax.eval_shape(lambda p: _one_token(policy, draft_params(p)), params)
    except Exception as error:
        raise ValueError(
            f"the policy cannot draft with quantized weights: {error}; multiply them "
            "with er_jax.dot, name those that are not in DrafterConfig.skip, or sample "
            "with control='ar'"
        ) from error


def _check_parameters(policy: Policy, params: Params) -> None:
    """Trace one token through the policy, with shapes alone."""
    remedy = "use the parameters that belong to it, as policy.init makes them"
    try:
        logits = jax.eval_shape(functools.partial(_one_token, policy), params)
    except Exception as error:
        raise ValueError(
            f"params does not fit the policy: {error}; {remedy}"
        ) from error
    if logits.shape != (1, 1, policy.vocab_size):
        raise ValueError(
            f"params does not fit the policy: one token's logits have shape "
            f"{logits.shape} instead of {(1, 1, policy.vocab_size)}; {remedy}"
        )
    if logits.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"policy.logits returns {logits.dtype}; it must be float32 or wider, or "
            "the sampled distribution is rounded: add .astype(jnp.float32)"
        )


def _check_controller(controller: Controller, config: RolloutConfig) -> None:
    gammas = parse_control(config.control, config.gammas)
    if controller.gammas != gammas:
        raise ValueError(
            f"controller chooses from gammas {controller.gammas}, but config.control="
            f"{config.control!r} asks for {gammas}; make it with "
            "er_jax.Controller(config.control, config.gammas)"
        )


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


def request_of(
    prompts: list[np.ndarray],
    sequence_ids: np.ndarray,
    config: RolloutConfig,
    groups: int = 1,
) -> Request:
    """Round sizes up to buckets, so that other prompts meet the same programs.

    Args:
      prompts: int32 `[length]` each. sequence_ids: `[len(prompts) * n]`.
      config: how to sample. groups: of devices; each gets as many slots.
    """
    distinct: dict[bytes, int] = {}
    prompt_of = np.repeat(
        [distinct.setdefault(p.tobytes(), len(distinct)) for p in prompts], config.n
    )
    unique = [np.frombuffer(data, np.int32) for data in distinct]
    bucket = _power_of_two(max(len(p) for p in prompts), MIN_PROMPT_BUCKET)
    whole = bucket + config.max_new_tokens
    step = 64 if whole <= 512 else 128
    lengths = [-(-whole // step) * step]
    while lengths[-1] // 2 >= max(bucket + 64, 128):
        lengths.append(-(-lengths[-1] // 2 // step) * step)
    is_cpu = jax.default_backend() == "cpu"
    chunk_tokens = PREFILL_TOKENS_CPU if is_cpu else PREFILL_TOKENS
    slots = min(config.max_slots, _power_of_two(len(sequence_ids), 1))
    return Request(
        prompts=unique,
        prompt_of=prompt_of,
        sequence_ids=sequence_ids,
        max_new_tokens=config.max_new_tokens,
        slots=-(-slots // groups) * groups,
        cache_lengths=tuple(sorted(set(lengths))),
        prompt_bucket=bucket,
        chunk=min(max(chunk_tokens // bucket, 1), 16),
        groups=groups,
    )


def _with_memory(
    programs: engine.Engine,
    params: Params | PolicyParams,
    request: Request,
    controller: Controller,
) -> Request:
    """Check that the request fits the device, and note what is left for states."""
    limit = engine.device_memory_bytes()
    if limit is None:
        return request

    limit = int(programs.agree([limit])[0])
    size = engine.device_bytes
    if isinstance(params, PolicyParams):
        weights, draft = size(params.policy), size(params.draft)
    else:
        weights = size(params)
        width = max(leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        draft = weights // width if max(controller.gammas) else 0
    rows, length = request.slots, request.cache_lengths[-1]
    states = int(rows * length * programs.position_bytes)
    if weights + draft + states > limit:
        raise ValueError(
            f"max_slots={rows} rows of {length} positions need "
            f"{(weights + draft + states) / 1e9:.1f} GB (parameters "
            f"{weights / 1e9:.1f}, draft {draft / 1e9:.1f}, cache {states / 1e9:.1f}), "
            f"and the device has {limit / 1e9:.1f} GB; lower max_slots or "
            "max_new_tokens, or give shorter prompts"
        )
    return dataclasses.replace(
        request,
        position_bytes=programs.position_bytes,
        state_limit_bytes=limit - weights - draft,
    )


def _with_draft(
    programs: engine.Engine,
    params: Params | PolicyParams,
    config: RolloutConfig,
    controller: Controller,
    stats: RolloutStats,
) -> PolicyParams:
    if isinstance(params, PolicyParams):
        return _unbound(params)
    if not max(controller.gammas):
        return PolicyParams(policy=params, draft=None)
    with stats.timed("draft refresh", lambda: programs.compile_s):
        pair = programs.attach_draft(params, config.drafter)
        jax.block_until_ready(pair.draft)
    return pair


def _unbound(params: PolicyParams) -> PolicyParams:
    """Return a draft whose 4-bit codes are bound to no device, on CPU.

    There compiled programs refuse codes that are, as those of restored parameters are:
    they ask for a layout that JAX gives no array on a CPU.
    """
    if jax.default_backend() != "cpu":
        return params

    def leaf(x: jax.Array) -> jax.Array:
        is_bound = isinstance(x, jax.Array) and x.dtype == jnp.int4 and x.committed
        return jnp.asarray(np.asarray(x)) if is_bound else x

    return dataclasses.replace(params, draft=jax.tree.map(leaf, params.draft))


def _settings(config: RolloutConfig, key: jax.Array) -> Sampling:
    remedy = "give one key, as jax.random.key makes it"
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(f"key={key!r} is no random key; {remedy}")
    typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and key.dtype != np.uint32:
        raise ValueError(f"key has dtype {key.dtype}, not uint32; {remedy}")
    if key.shape != (() if typed else (2,)):
        raise ValueError(f"key has shape {key.shape}; {remedy}")
    data = np.asarray(jax.random.key_data(key) if typed else key)
    if data.shape != (2,):
        # Another generator's key: two words drawn from it seed the counter noise.
        data = np.asarray(jax.random.bits(key, (2,), np.uint32))
    stops = list(dict.fromkeys(config.stop_token_ids))
    num_stops = _power_of_two(max(len(stops), 1), 8)
    return Sampling(
        key=data.astype(np.uint32),
        temperature=np.float32(config.temperature),
        top_k=np.int32(min(config.top_k, 2**31 - 1)),
        top_p=np.float32(config.top_p),
        min_p=np.float32(config.min_p),
        stop_ids=np.array(stops + [NONE] * (num_stops - len(stops)), np.int32),
        logprob_kind=np.int32(LOGPROB_KINDS.index(config.logprobs)),
    )


def _program_name(name: Any) -> str:
    kind, *sizes = name
    numbers = [str(size) for size in sizes if isinstance(size, int)]
    return f"{kind}({', '.join(numbers)})"


def assemble(
    prompts: list[np.ndarray],
    completions: Mapping[int, Completion],
    sequence_ids: np.ndarray,
    config: RolloutConfig,
    stats: RolloutStats,
    programs: engine.Engine,
) -> Rollout:
    """Lay the completions out; of several processes, each brings those it has."""
    count, width = len(sequence_ids), max(len(p) for p in prompts)
    prompt_ids = np.full((count, width), config.pad_id, np.int32)
    prompt_mask = np.zeros((count, width), bool)
    for row in range(count):
        prompt = prompts[row // config.n]
        prompt_ids[row, width - len(prompt) :] = prompt
        prompt_mask[row, width - len(prompt) :] = True
    completion_ids = np.zeros((count, config.max_new_tokens), np.int32)
    logprobs = np.zeros((count, config.max_new_tokens), np.float32)
    lengths, reasons = np.zeros((2, count), np.int32)
    for row, completion in completions.items():
        length = len(completion.token_ids)
        completion_ids[row, :length] = completion.token_ids
        logprobs[row, :length] = completion.logprobs
        lengths[row] = length
        reasons[row] = FINISH_NAMES.index(completion.finish_reason)
    completion_ids, logprobs = (
        programs.gather(completion_ids),
        programs.gather(logprobs),
    )
    lengths, reasons = programs.gather(lengths), programs.gather(reasons)
    completion_mask = np.arange(config.max_new_tokens)[None] < lengths[:, None]
    completion_ids = np.where(completion_mask, completion_ids, np.int32(config.pad_id))
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        logprobs=logprobs,
        lengths=lengths,
        finish_reason=np.array(FINISH_NAMES)[reasons],
        sequence_ids=sequence_ids.astype(np.int32),
        stats=stats,
    )
