"""The update: one optimizer step on a step's completions, and a new draft, in one jit.

A GRPO step calls `update` once or several times with the same completions. Gradients
are accumulated over chunks of rows, so that memory depends on the size of a chunk and
not on the number of completions. The same program requantizes what has changed of
the policy into the buffers of its old draft: the next rollout speculates with the
newest weights. Of a policy with low-rank pairs nothing has changed that a draft is made
of.

Left out: where completions come from. Where arrays lie is decided by `placement`.

Source: Shao et al. 2024 (arXiv 2402.03300); see `losses` for the rest.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

import er_jax
from train import losses
from train.batching import Chunks
from train.config import GRPOConfig
from train.losses import PolicyLoss
from train.placement import Placement
from train.trained import reference_of, trained_part, with_trained_part

ONE_DEVICE = Placement()


@struct.dataclass
class TrainState:
    """What one GRPO step hands to the next.

    Attributes:
      params: the policy and its draft; the optimizer and checkpoints use `.policy`.
      opt_state: the optimizer's state for the trained part of `params.policy`.
      key: uint32 `[2]`, key data of the run's sampling noise. It is never split: every
        completion of the run has a sequence id of its own, and so noise of its own.
      step: int32 `[]`, GRPO steps done.
      position: int32 `[]`, problems taken from the data stream.
      gathered: the policy with the sharding that rollouts need; None where that is the
        sharding of updates.
    """

    params: er_jax.PolicyParams
    opt_state: optax.OptState
    key: Any
    step: Any
    position: Any
    gathered: Any = None


@functools.lru_cache
def make_optimizer(config: GRPOConfig) -> optax.GradientTransformation:
    """Return Adam after a clip of the gradient's norm.

    Equal configs get the same object, because jit compares optimizers by identity.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm), optax.adam(config.learning_rate)
    )


def first_opt_state(
    policy: er_jax.Policy, params: Any, config: GRPOConfig, placement: Placement
) -> optax.OptState:
    """Return the optimizer's state before the first update.

    Args:
      policy, params: what will be updated. config: of the optimizer.
      placement: where arrays lie.
    """
    optimizer = make_optimizer(config)

    def make(params: Any) -> optax.OptState:
        state = optimizer.init(params)
        return placement.optimized(policy, optimizer, state, params)

    part = trained_part(params)
    return make(part) if placement.mesh is None else jax.jit(make)(part)


@functools.partial(jax.jit, static_argnames=("policy", "drafter", "placement"))
def derive(
    policy: er_jax.Policy,
    params: Any,
    *,
    drafter: er_jax.DrafterConfig,
    placement: Placement = ONE_DEVICE,
) -> tuple[er_jax.PolicyParams, Any]:
    """Derive a draft as `update` does at its end, from parameters no update has made.

    Returns:
      `TrainState.params` and `TrainState.gathered`.
    """
    return placement.drafted(policy, params, drafter)


# keep_unused: the update does not read the old draft, but writes the new one into its
# buffers.
@functools.partial(
    jax.jit,
    static_argnames=(
        "policy",
        "optimizer",
        "config",
        "options",
        "drafter",
        "placement",
    ),
    donate_argnames="state",
    keep_unused=True,
)
def update(
    policy: er_jax.Policy,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    ref_params: Any,
    chunks: tuple[Chunks, ...],
    num_completions: jax.Array,
    *,
    config: er_jax.RolloutConfig,
    options: PolicyLoss,
    drafter: er_jax.DrafterConfig,
    placement: Placement = ONE_DEVICE,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one optimizer step on the mean loss of the completions; derive the draft.

    Args:
      policy, optimizer: what to update and how.
      state: donated, the old draft included. `step` and `position` stay as they are.
      ref_params: the reference policy; None when `options.kl_coef` is 0, or if the
        policy has low-rank pairs, without which it is its own reference.
      chunks: all completions of the step, by bucket.
      num_completions: float32 `[]`, N.
      config: of the rollout. options: the loss. drafter: how the draft is made.
      placement: where arrays lie.
    Returns:
      state: with new parameters, optimizer state and draft.
      info: "loss" and "kl" in nats per token, "clip_fraction" of tokens, "grad_norm"
        before clipping; of the differences between the rollout's log-probabilities and
        those of this update's forward pass "logprob_gap", the largest, and
        "mean_logprob_gap"; and "disagreed", the share of tokens whose ratio is outside
        of `losses.AGREED`.
    """

    policy_params = state.params.policy
    reference = reference_of(policy_params, ref_params)

    def loss_fn(part: Any, batch: Any) -> Any:
        params = with_trained_part(policy_params, part)
        return losses.policy_loss(policy, params, reference, batch, config, options)

    params = trained_part(policy_params)
    first = jax.tree.map(lambda leaf: leaf[0], chunks[0].batch)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(jax.value_and_grad(loss_fn, has_aux=True), params, first),
    )

    def add_chunk(index: jax.Array, total: Any, *, batch: Any) -> Any:
        one = placement.rows(jax.tree.map(lambda leaf: leaf[index], batch))
        (loss, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, one)
        (total_loss, total_info), total_grads = total
        gap = jnp.maximum(info["logprob_gap"], total_info["logprob_gap"])
        info = jax.tree.map(jnp.add, info, total_info) | {"logprob_gap": gap}
        grads = placement.trained(policy, jax.tree.map(jnp.add, grads, total_grads))
        return (loss + total_loss, info), grads

    total = zeros
    for bucket in chunks:
        body = functools.partial(add_chunk, batch=bucket.batch)
        total = jax.lax.fori_loop(0, bucket.num_chunks, body, total)
    (loss, sums), grads = total

    def mean(value: jax.Array) -> jax.Array:
        return value / num_completions.astype(value.dtype)

    grads = jax.tree.map(mean, grads)
    with jax.numpy_dtype_promotion("standard"):  # Adam computes float ** int
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
    params = placement.trained(policy, optax.apply_updates(params, updates))
    opt_state = placement.optimized(policy, optimizer, opt_state, params)
    params = with_trained_part(policy_params, params)
    policy_and_draft, gathered = placement.drafted(
        policy, params, drafter, state.params, state.gathered
    )
    info = {
        "loss": mean(loss),
        "kl": mean(sums["kl"]),
        "clip_fraction": mean(sums["clipped"]),
        "grad_norm": optax.tree.norm(grads),
        "logprob_gap": sums["logprob_gap"],
        "mean_logprob_gap": sums["gap_sum"] / jnp.maximum(sums["tokens"], 1),
        "disagreed": sums["disagreed"] / jnp.maximum(sums["tokens"], 1),
    }
    state = dataclasses.replace(
        state, params=policy_and_draft, opt_state=opt_state, gathered=gathered
    )
    return state, info
