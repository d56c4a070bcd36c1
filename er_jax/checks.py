"""Checks of a rollout's arguments, made before anything is compiled or allocated.

Each raises a `ValueError` that names the argument, its value, the limit and the remedy.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from er_jax import devices
from er_jax.arguments import MOST, is_whole
from er_jax.config import PER_PROMPT, RolloutConfig, parse_control
from er_jax.control.protocol import ControllerProtocol
from er_jax.drafter import (
    DrafterConfig,
    PolicyParams,
    attach_draft,
    draft_params,
)
from er_jax.engine.protocol import EngineProtocol
from er_jax.request import Request
from er_jax.types import RING_DRAFTS, Params, Policy
from er_jax.until import Until


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


def checked_prompts(
    prompts: Sequence[Sequence[int]], vocab_size: int
) -> list[np.ndarray]:
    """Return the prompts as int32 arrays; refuse any that is not token ids."""
    if len(prompts) == 0:
        raise ValueError("prompts is empty; give at least one prompt")
    if isinstance(prompts, jax.Array) and not prompts.is_fully_addressable:
        prompts = multihost_utils.process_allgather(prompts, tiled=True)
    arrays = checked_arrays(prompts)
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


def checked_arrays(prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return prompts as arrays; refuse any that is not a flat sequence of integers."""
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
    """Return the sequence ids of `count` completions, int64; refuse unfit ones."""
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


def check_result_fits(num_prompts: int, config: RolloutConfig) -> None:
    """Check that the arrays of the result fit in the host's memory."""
    width = 4 + 4 + 1  # token, log-probability, mask
    size = num_prompts * config.n * config.most_new_tokens * width
    limit = devices.host_memory_bytes()
    if limit is not None and size > limit:
        raise ValueError(
            f"n={config.n} completions of each of {num_prompts} prompts, of "
            f"max_new_tokens={config.most_new_tokens}, are {size / 1e9:.1f} GB of "
            f"results, and the host has {limit / 1e9:.1f} GB; sample them in several "
            "calls, with other sequence_ids in each"
        )


def check_num_prompts(config: RolloutConfig, num_prompts: int) -> None:
    """Refuse settings of single prompts that are for another number of prompts."""
    if config.num_prompts not in (None, num_prompts):
        names = [n for n in PER_PROMPT if isinstance(getattr(config, n), tuple)]
        raise ValueError(
            f"{', '.join(names)} of {config.num_prompts} prompts, and there are "
            f"{num_prompts}; give one value for each prompt, or one number for all"
        )


def check_token_ids(config: RolloutConfig, vocab_size: int) -> None:
    """Refuse tokens outside of the vocabulary, and a ban of all that could be drawn."""
    for name, tokens in (
        ("stop_token_ids", config.stop_token_ids),
        ("stop_sequences", tuple(itertools.chain(*config.stop_sequences))),
        ("banned_ids", config.banned_ids),
        ("logit_bias", tuple(dict(config.logit_bias))),
    ):
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{name} holds {token}, outside the vocabulary 0 .. "
                    f"{vocab_size - 1}; it could never be sampled"
                )
    is_early = bool(config.stop_ids) and np.max(config.min_new_tokens) > 0
    banned = {*config.banned_ids, *(config.stop_ids if is_early else ())}
    if len(banned) == vocab_size:
        raise ValueError(
            f"banned_ids{' and stop_token_ids (min_new_tokens)' if is_early else ''} "
            f"leave none of {vocab_size} tokens to be sampled; ban fewer"
        )


def check_turns(max_turn_tokens: int | None, config: RolloutConfig) -> None:
    """Refuse turns that are so short that none of them can stop."""
    least = int(np.max(config.min_new_tokens))
    if max_turn_tokens is not None and max_turn_tokens < least:
        raise ValueError(
            f"respond.max_turn_tokens={max_turn_tokens} must be at least "
            f"min_new_tokens={least}, which counts in every turn; raise it"
        )


def check_length(
    prompts: list[np.ndarray], config: RolloutConfig, max_length: int | None
) -> None:
    """Refuse prompts that exceed the policy's context with their completion."""
    if max_length is None:
        return
    limits = config.of_sequences("max_new_tokens", len(prompts))[:: config.n].tolist()
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if len(prompt) + limit > max_length:
            raise ValueError(
                f"prompts[{index}] has {len(prompt)} tokens, which with max_new_tokens="
                f"{limit} exceeds the policy's {max_length} positions; shorten it to "
                f"{max(max_length - limit, 0)} tokens or lower max_new_tokens"
            )


def check_policy(policy: Any) -> None:
    """Refuse an object that lacks methods of a policy, or cannot be hashed."""
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
            f"policy={policy!r} cannot be hashed ({error}), and compiled programs are "
            "found by its hash; make it a frozen dataclass that holds no arrays, lists "
            "or dicts"
        ) from error


def check_alive(params: Any) -> None:
    """Check that no parameter was donated to another program."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"params: {name or 'the array'} was deleted, donated to a jitted "
                "update for instance; pass the parameters that the update returned"
            )


def check_placement(params: Any) -> None:
    """Check that parameters are on the device of programs without a mesh."""
    device = devices.default_device()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not isinstance(leaf, jax.Array) or leaf.devices() == {device}:
            continue
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = sorted(leaf.devices(), key=lambda d: d.id)
        if len(found) > 1:
            location = f"is laid out over {len(found)} devices ({leaf.sharding})"
            remedy = "give mesh=, the mesh they lie on"
        else:
            location = f"lies on {found[0]}"
            remedy = "call inside jax.default_device(...) of that device"
        raise ValueError(
            f"params: {name or 'the array'} {location}, and without a mesh a rollout "
            f"runs on {device}; move them there with jax.device_put(params, device), "
            f"or {remedy}"
        )


def _one_token(policy: Policy, params: Params) -> jax.Array:
    """Return the logits of one token, `[1, 1, V]`, for abstract evaluation."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    hidden, _ = policy.forward(params, tokens, tokens, policy.init_cache(1, 1))
    return policy.logits(params, hidden)


def check_drafting(
    policy: Policy, params: Params | PolicyParams, config: RolloutConfig
) -> None:
    """Check, by tracing one token, that the policy runs with each of its drafts."""
    if not isinstance(params, PolicyParams):
        params = jax.eval_shape(lambda p: attach_draft(p, config.drafter), params)
    try:
        for number in range(len(params.drafts)):
            one = params.only(number)
            jax.eval_shape(lambda p: _one_token(policy, draft_params(p)), one)
    except Exception as error:
        raise ValueError(
            f"the policy cannot draft with quantized weights: {error}; multiply them "
            "with er_jax.dot, name those that are not in DrafterConfig.skip, or sample "
            "with control='ar'"
        ) from error


def check_parameters(policy: Policy, params: Params) -> None:
    """Check, by tracing one token, that the parameters fit the policy."""
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


def check_controller(controller: ControllerProtocol, config: RolloutConfig) -> None:
    """Refuse a controller whose draft lengths are not those of the config."""
    gammas = parse_control(config.control, config.gammas)
    if controller.gammas != gammas:
        raise ValueError(
            f"controller chooses from gammas {controller.gammas}, but config.control="
            f"{config.control!r} asks for {gammas}; make it with "
            "er_jax.Controller(config.control, config.gammas)"
        )


def check_version(version: int, until: Until | None) -> None:
    """Refuse a wrong number of a call, and an `until` of another type."""
    if not is_whole(version, 0, MOST):
        raise ValueError(
            f"version={version!r} must be a whole number of at least 0, such as the "
            "step of training"
        )
    if until is not None and not isinstance(until, Until):
        raise ValueError(f"until={until!r} must be an er_jax.Until(...)")


def check_window(gammas: Sequence[int]) -> None:
    """Refuse drafts for which the rings of a window have no room."""
    if max(gammas) > RING_DRAFTS:
        raise ValueError(
            f"gammas={tuple(gammas)} has more than {RING_DRAFTS} drafts a round, and "
            "the cache of a policy with a window has room for no more; leave "
            "longer ones out"
        )


def check_finite(bad: Sequence[str]) -> None:
    """Refuse parameters that are not finite; `bad` holds their paths."""
    if bad:
        raise ValueError(
            f"params holds NaN or infinity in {', '.join(bad[:5])}"
            f"{' and others' if len(bad) > 5 else ''}; every completion would be "
            "garbage: go back to the last finite parameters"
        )


def check_memory(
    engine: EngineProtocol,
    params: Params | PolicyParams,
    request: Request,
    drafters: Sequence[DrafterConfig],
    kept_bytes: int = 0,
) -> int | None:
    """Refuse a request that does not fit the device.

    Args:
      engine: that will run it. params: on the engine's devices. request: its sizes.
      drafters: of the drafts that are made from parameters without one.
      kept_bytes: of prompts that a session may keep.
    Returns:
      Bytes of a device that are left for states; None where its memory is unknown.
    """
    limit = devices.device_memory_bytes()
    if limit is None:
        return None
    limit = int(engine.agreement.broadcast_from_leader([limit])[0])
    size = devices.device_bytes
    if isinstance(params, PolicyParams):
        weights, draft = size(params.policy), size(params.drafts)
    else:
        weights = size(params)
        width = max(leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        draft = weights * sum(one.bits for one in drafters) // (8 * width)
    rows, length = request.slots, request.cache_lengths[-1]
    states = int(rows * engine.row_bytes(length))
    needed = weights + draft + states + kept_bytes
    if needed > limit:
        kept = f", kept prompts {kept_bytes / 1e9:.1f}" if kept_bytes else ""
        remedy = " or a session with fewer prompt_bytes" if kept_bytes else ""
        raise ValueError(
            f"max_slots={rows} rows of {length} positions need "
            f"{needed / 1e9:.1f} GB (parameters "
            f"{weights / 1e9:.1f}, draft {draft / 1e9:.1f}, cache {states / 1e9:.1f}"
            f"{kept}), and the device has {limit / 1e9:.1f} GB; lower max_slots or "
            f"max_new_tokens, or give shorter prompts{remedy}"
        )
    return limit - weights - draft - kept_bytes
