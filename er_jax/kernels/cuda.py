"""Attention of few queries over the cache on an NVIDIA GPU: cuDNN's, as JAX offers it.

The queries of all heads that share a key/value head are its queries, so that its
entries are read once. What lies behind the last entry that a row's queries see is not
read at all, where cuDNN is told their number. A single query needs no mask beside it.

cuDNN may give an entry whose score is -inf no weight, and so hide that its key is not
finite. Two more queries per head look for such keys: ones, and minus ones. One of them
meets +inf, which makes its result NaN.

Left out: gradients; numbers of 32 bits, which cuDNN does not take.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Heads that every GPU takes on which cuDNN fuses attention at all.
MOST_SIZE = 128


def refusal(
    query: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> str | None:
    """Return why the kernel does not take these arrays; None if it does."""
    size = query.shape[3]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{query.dtype} is not a type of 16 bits"
    if not query.dtype == keys.dtype == values.dtype:
        return f"queries are {query.dtype}, entries {keys.dtype} and {values.dtype}"
    if size > MOST_SIZE or size % 8:
        return f"heads of {size} are not multiples of 8 up to {MOST_SIZE}"
    try:
        jax.eval_shape(attend, query, keys, values, positions)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        # cuDNN is not installed, or too old. JAX has no other way to ask.
        return f"cuDNN: {error}"
    return None


def attend(
    query: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> jax.Array:
    """Attend as `attention.attend` does; no `refusal` must speak against it.

    Args:
      query: `[B, T, H, D]`, bfloat16 or float16, over the square root of D already.
      keys, values: `[B, S, K * D]`, of the same type.
      positions: `[B, T]` int32; the results of padding (-1) mean nothing.
    Returns:
      `[B, T, H * D]`, NaN in all queries of a row that see a non-finite entry.
    """
    batch, num_queries, heads, size = query.shape
    length, kv_heads = keys.shape[1], keys.shape[2] // size
    group = heads // kv_heads
    q = query.reshape(batch, num_queries, kv_heads, group, size)
    q = jnp.moveaxis(q, 2, 3).reshape(batch, -1, kv_heads, size)
    # The mean of finite numbers is finite.
    mean = jnp.full((batch, 1, kv_heads, size), 1 / size, query.dtype)
    q = jnp.concatenate([q, mean, -mean], axis=1)
    furthest = jnp.max(positions, axis=1, keepdims=True)
    mask = None
    if num_queries > 1:
        seen = jnp.repeat(positions, group, axis=1)
        seen = jnp.concatenate([seen, furthest, furthest], axis=1)
        slots = jnp.arange(length, dtype=positions.dtype)[None, None]
        mask = (slots <= seen[..., None])[:, None]
    out = jax.nn.dot_product_attention(
        q,
        keys.reshape(batch, length, kv_heads, size),
        values.reshape(batch, length, kv_heads, size),
        mask=mask,
        scale=1.0,
        # At least one: a softmax over nothing is not a number.
        key_value_seq_lengths=jnp.maximum(furthest[:, 0] + 1, 1),
        implementation="cudnn",
    )
    out, found = out[:, :-2], out[:, -2:]
    out = out.reshape(batch, num_queries, group, kv_heads, size)
    out = jnp.moveaxis(out, 3, 2).reshape(batch, num_queries, heads * size)
    is_sound = jnp.all(jnp.isfinite(found), axis=(1, 2, 3))[:, None, None]
    return jnp.where(is_sound, out, jnp.asarray(jnp.nan, out.dtype))
