"""Losses: supervised cross-entropy, and the clipped policy gradient of GRPO.

Every loss is a sum over one batch. The caller divides by the number of tokens or
completions in the whole step, so that the gradient does not depend on how the step was
cut into batches.

Sources: Shao et al. 2024 (arXiv 2402.03300) for group-relative advantages and the KL
estimator; Schulman et al. 2017 (arXiv 1707.06347) for the clipped ratio; Yu et al. 2025
(arXiv 2503.14476) for two clip bounds.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import er_jax
from train.batching import Batch

# Rollout and trainer agree where the ratio of their probabilities is in this range.
AGREED = (0.999, 1.002)

# Supervised training has no temperature.
_RAW = er_jax.RolloutConfig(max_new_tokens=1, logprobs="raw")


def token_logprobs(
    policy: er_jax.Policy, params: Any, batch: Batch, config: er_jax.RolloutConfig
) -> jax.Array:
    """Return every target's log-probability, as a rollout with `config` reports it.

    Args:
      policy, params: the model. batch: `[R, T]`, small enough for one chunk.
      config: says of which distribution.
    Returns:
      `[R, T]` in the dtype of the policy's logits; 0 where `batch.mask` is 0.
    """
    return er_jax.score(
        policy, params, batch, config=config, chunk_tokens=batch.targets.size
    ).logprobs


def supervised_loss(policy: er_jax.Policy, params: Any, batch: Batch) -> jax.Array:
    """Return the sum of -log p over the completion tokens, in nats."""
    return -jnp.sum(token_logprobs(policy, params, batch, _RAW))


def solution_logprobs(policy: er_jax.Policy, params: Any, batch: Batch) -> jax.Array:
    """Return `[R]`, each row's log-probability of its completion; 0 for empty rows."""
    return jnp.sum(token_logprobs(policy, params, batch, _RAW), axis=-1)


def group_advantages(rewards: np.ndarray, *, scale: bool) -> np.ndarray:
    """Return every reward minus its group's mean, scaled if asked for.

    A group of equal rewards does not tell which completion was better: its advantages
    are exactly 0.

    Args:
      rewards: `[P, n]`, n completions of each of P prompts.
      scale: divide by the group's standard deviation + 1e-4.
    Returns:
      `[P, n]` float32.
    """
    rewards = np.asarray(rewards, np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    centred[np.ptp(rewards, axis=1) == 0] = 0.0
    if scale:
        centred /= rewards.std(axis=1, keepdims=True) + 1e-4
    return centred.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """The options of `policy_loss`.

    Attributes:
      clip_low: the ratio is clipped from below at 1 - clip_low, in (0, 1).
      clip_high: the ratio is clipped from above at 1 + clip_high, > 0.
      kl_coef: weight of the divergence from the reference; 0 needs no reference.
    """

    clip_low: float
    clip_high: float
    kl_coef: float


def policy_loss(
    policy: er_jax.Policy,
    params: Any,
    ref_params: Any,
    batch: Batch,
    config: er_jax.RolloutConfig,
    options: PolicyLoss,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the clipped policy-gradient loss, with a KL term if asked for.

    The loss of a completion is the mean of its tokens' losses, and the loss of a batch
    the sum over its completions. A long completion therefore weighs no more than a
    short one: its reward says less about each of its many tokens.

    With ratio = exp(policy_logprob - behavior_logprob) and A the advantage, the loss of
    a token is -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), plus
    kl_coef times exp(d) - d - 1 where d = ref_logprob - policy_logprob. That term is
    >= 0, and its mean over sampled tokens estimates the KL divergence from the
    reference.

    Args:
      policy: the model.
      params: its parameters, which the loss is differentiated by.
      ref_params: those of the reference; None when `options.kl_coef` is 0.
      batch: `[R, T]`; `behavior_logprobs` are the rollout's own.
      config: of the rollout; it says of which distribution its numbers are.
      options: clip bounds and KL weight.
    Returns:
      loss: scalar, a sum over completions of means over their tokens.
      info: "clipped" (share of tokens) and "kl" (nats per token), summed like the loss;
        of fresh tokens "logprob_gap", the largest |policy_logprob - behavior_logprob|;
        the sum of these, "gap_sum"; "disagreed", those whose ratio is outside of
        `AGREED`; and "tokens", their number.
    """
    logprobs = token_logprobs(policy, params, batch, config)
    dtype = logprobs.dtype
    mask = batch.mask.astype(dtype)
    gap = (logprobs - batch.behavior_logprobs.astype(dtype)) * mask
    ratios = jnp.exp(gap)
    advantages = batch.advantages.astype(dtype)[:, None]
    bounded = jnp.clip(ratios, 1.0 - options.clip_low, 1.0 + options.clip_high)
    gains = jnp.minimum(ratios * advantages, bounded * advantages)
    weights = mask / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1.0)
    loss = -jnp.sum(gains * weights)
    kl = jnp.zeros((), dtype)
    if options.kl_coef > 0:
        ref = jax.lax.stop_gradient(token_logprobs(policy, ref_params, batch, config))
        behind = (ref - logprobs) * mask
        kl = jnp.sum((jnp.exp(behind) - behind - 1.0) * weights)
        loss = loss + options.kl_coef * kl
    # Of tokens that earlier parameters sampled, the gap is what was learnt since.
    fresh = batch.fresh.astype(dtype)
    low, high = AGREED
    info = {
        "clipped": jnp.sum(jnp.where(gains < ratios * advantages, weights, 0.0)),
        "kl": kl,
        "logprob_gap": jnp.max(jnp.abs(gap) * fresh),
        "gap_sum": jnp.sum(jnp.abs(gap) * fresh),
        "disagreed": jnp.sum(((ratios < low) | (ratios > high)).astype(dtype) * fresh),
        "tokens": jnp.sum(fresh),
    }
    return loss, info
