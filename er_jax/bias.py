"""What is added to logits before tokens are drawn: biases, banned tokens, early stops.

A banned token has a bias of -inf. So has a stop id among the first `min_new_tokens`
tokens of a completion. Draft and target get the same, by the position of the token to
be drawn, so speculation changes nothing. Log-probabilities of the raw and temperature
kinds are of the logits without any.

Left out: which tokens (`request.sampling_of`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from er_jax.settings import beside
from er_jax.types import LogprobKind, Sampling


def biased(logits: jax.Array, sampling: Sampling, position: jax.Array) -> jax.Array:
    """Return the logits that tokens are drawn from.

    Args:
      logits: `[B, ..., V]`. sampling: traced settings.
      position: int32 `[B, ...]` or broadcastable, of the token to be drawn.
    """
    if sampling.bias is None:
        return logits
    bounds = (sampling.begin, sampling.min_new_tokens)
    begin, least = (beside(x, position) for x in bounds)
    usual, early = sampling.bias.astype(logits.dtype).reshape(
        2, *(1,) * position.ndim, -1
    )
    return logits + jnp.where((position - begin < least)[..., None], early, usual)


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
