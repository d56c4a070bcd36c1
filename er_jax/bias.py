"""What is added to logits before tokens are drawn: biases, banned tokens, early stops.

A banned token has a bias of -inf. So has a stop id among the first `min_new_tokens`
tokens of a completion. Draft and target get the same, by the position of the token to
be drawn, so speculation changes nothing. Log-probabilities of the raw and temperature
kinds are of the logits without any.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from er_jax.config import RolloutConfig
from er_jax.settings import beside
from er_jax.types import LogprobKind, Sampling


def is_biased(config: RolloutConfig) -> bool:
    """Whether anything is added to logits: if not, no program mentions it."""
    is_early = bool(config.stop_token_ids) and config.least_new_tokens > 0
    return bool(config.logit_bias or config.banned_ids or is_early)


def bias_of(config: RolloutConfig, vocab_size: int) -> np.ndarray:
    """Return the bias of a config, float32 `[2, V]`; see `types.Sampling`."""
    bias = np.zeros((2, vocab_size), np.float32)
    for token, value in config.logit_bias:
        bias[:, token] = value
    bias[:, list(config.banned_ids)] = -np.inf
    bias[1, list(config.stop_token_ids)] = -np.inf
    return bias


def biased(logits: jax.Array, sampling: Sampling, position: jax.Array) -> jax.Array:
    """Return the logits that tokens are drawn from.

    Args:
      logits: `[B, ..., V]`. sampling: traced settings.
      position: int32 `[B, ...]` or broadcastable, of the token to be drawn.
    """
    if sampling.bias is None:
        return logits
    first_free = beside(sampling.begin + sampling.min_new_tokens, position)
    usual, early = sampling.bias.astype(logits.dtype).reshape(
        2, *(1,) * position.ndim, -1
    )
    return logits + jnp.where((position < first_free)[..., None], early, usual)


def of_kind(logits: jax.Array, drawn: jax.Array, sampling: Sampling) -> jax.Array:
    """Return the logits that log-probabilities are taken from.

    Args:
      logits: `[..., V]`, the model's. drawn: `[..., V]`, `biased`.
      sampling: `logprob_kind` picks.
    """
    if sampling.bias is None:
        return logits
    is_processed = sampling.logprob_kind == LogprobKind.PROCESSED
    return jnp.where(is_processed, drawn, logits)
