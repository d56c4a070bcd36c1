"""Where stop sequences end among the tokens of a round.

A row knows its tokens, so a sequence is found wherever rounds and windows cut it. Only
tokens of the completion count, and only an end behind its first `min_new_tokens`.

Left out: stop ids, and ending the row (`steps`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from er_jax.types import NONE, Sampling

# In place of a token that no sequence may contain: before the completion.
OUTSIDE = -2


def ends(
    tokens: jax.Array, length: jax.Array, emitted: jax.Array, settings: Sampling
) -> jax.Array:
    """Return whether a stop sequence ends at each emitted token, bool `[B, T]`.

    Args:
      tokens: int32 `[B, S]`, of the rows before the round. length: int32 `[B]`, those
        that are known.
      emitted: int32 `[B, T]`, that follow; up to the first end they must be right.
      settings: with stop sequences `[F, W]`.
    """
    sequences, count = settings.stop_sequences, emitted.shape[1]
    longest = sequences.shape[1]
    before = jnp.arange(1 - longest, 0, dtype=jnp.int32)[None] + length[:, None]
    known = jnp.take_along_axis(tokens, jnp.maximum(before, 0), axis=1)
    known = jnp.where(before >= settings.begin[:, None], known, OUTSIDE)
    text = jnp.concatenate([known, emitted], axis=1)
    # All parts of W tokens, `[B, T, W]`: the one that ends at each emitted token.
    offsets = jnp.arange(count, dtype=jnp.int32)
    index = offsets[:, None] + jnp.arange(longest, dtype=jnp.int32)[None]
    parts = jnp.take(text, index, axis=1, mode="clip")[:, :, None]
    wanted = sequences[None, None]
    is_same = jnp.all((parts == wanted) | (wanted == NONE), axis=-1)
    # A line of padding alone is no sequence.
    is_end = jnp.any(is_same & (sequences[:, -1] != NONE)[None, None], axis=-1)
    made = length[:, None] + offsets[None] - settings.begin[:, None]
    return is_end & (made >= settings.min_new_tokens[:, None])
