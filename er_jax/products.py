"""Products of activations and weights, floating-point or quantized, by platform.

The fast and small form of a quantized product differs:

* TPU, GPU: weight-only. Codes are cast to the activation type *inside* the fused dot
  and the *output* is scaled, so no dequantized weight ever exists. In groups, a program
  for NVIDIA GPUs can scale the codes inside the dot as well (`scales_inside`).
* CPU: int8 x int8 -> int32 with one activation scale per token. With a weight-only dot
  the compiler would cast the codes once, outside the decoding loop, and the loop would
  read floats.

Codes and scales are laid out as in `drafter.QuantizedWeight`. Left out: how they are
made (`drafter`), and how programs are compiled (`engine.lowering`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from er_jax.types import wide_dtype

# On CPU, codes with at least this many entries are the left factor (`_integer`):
# 768 x 768 is faster that way, 256 x 704 slower.
CODES_FIRST_SIZE = 2**19


def of_floats(x: jax.Array, w: jax.Array, axis: int, out_dtype: Any) -> jax.Array:
    """Multiply `[..., in]` by a float matrix whose axis `axis` is the input.

    Sums are float32 or wider. On an NVIDIA GPU the product itself rounds to
    `out_dtype`: XLA joins products that share their activations, as of q, k and v, and
    writes the joint one before it is cut and rounded.

    Returns:
      `[..., out]` in `out_dtype`.
    """
    wide = wide_dtype(x.dtype)
    dims = (((x.ndim - 1,), (axis,)), ((), ()))

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        product = lax.dot_general(x, w, dims, preferred_element_type=wide)
        return product.astype(out_dtype)

    def rounded(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(x, w, dims, preferred_element_type=out_dtype)

    if x.dtype == jnp.bfloat16:
        return lax.platform_dependent(
            x, w, cpu=_two_rows(plain), cuda=rounded, default=plain
        )
    return plain(x, w)


def of_codes(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *,
    act_bits: int | str,
    scales_inside: bool,
) -> jax.Array:
    """Multiply `[..., in]` by a quantized weight.

    Args:
      x: activations, of rank 2 or more.
      codes: `[out, in]` or `[out, in/g, g]`. scale: `[out, 1]` or `[out, in/g, 1]`.
      act_bits: see `drafter.DrafterConfig`.
      scales_inside: see `drafter.with_scales_inside`.
    Returns:
      `[..., out]`, float32 or wider.
    """
    default: Any = _integer if act_bits == 8 else _weight_only
    forms: dict[str, Any] = {}
    if act_bits != 16:
        forms["cpu"] = _two_rows(functools.partial(_integer, on_cpu=True))
    if act_bits != 8 and (codes.ndim == 3 or codes.dtype == jnp.int4):
        forms["cuda"] = functools.partial(_alone, scales_inside=scales_inside)
    if not forms:
        return default(x, codes, scale)
    return lax.platform_dependent(x, codes, scale, **forms, default=default)


def _two_rows(product: Any) -> Any:
    """Have a product pad a single row to two.

    XLA's CPU backend compiles a product with a single row of bfloat16 or int8 into an
    untuned loop, ten to twenty-five times slower than with two rows.
    """

    def padded(x: jax.Array, *rest: Any) -> jax.Array:
        if x.size != x.shape[-1]:
            return product(x, *rest)
        twice = jnp.concatenate([x, jnp.zeros_like(x)], axis=0)
        return product(twice, *rest)[:1]

    return padded


def _weight_only(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply with codes cast to the type of the activations; scale the result."""
    codes = codes.astype(x.dtype)
    if codes.ndim == 3:
        return _sum_groups(x, codes, scale)
    wide = wide_dtype(x.dtype)
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    product = lax.dot_general(x, codes, dims, preferred_element_type=wide)
    return product * _per_output(scale.astype(wide), x.ndim)


def _alone(
    x: jax.Array, codes: jax.Array, scale: jax.Array, *, scales_inside: bool
) -> jax.Array:
    """Multiply with the codes cast, in a product that XLA merges with no other.

    For a GPU, XLA makes one product of several that share their activations, as of q, k
    and v. It joins int8 codes inside of that product, but int4 codes, and scaled ones,
    it writes to memory as floats first. The barrier gives each product activations of
    its own.
    """
    x, codes = lax.optimization_barrier((x, codes))
    if not scales_inside or codes.ndim == 2:
        return _weight_only(x, codes, scale)
    wide = wide_dtype(x.dtype)
    weight = (codes.astype(wide) * scale.astype(wide)).reshape(len(codes), -1)
    # The product itself rounds its factors to bfloat16: a cast to a smaller type XLA
    # keeps out of it, and would write the scaled weight.
    is_low = x.dtype == jnp.bfloat16
    return lax.dot_general(
        x.astype(wide),
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=lax.DotAlgorithmPreset.BF16_BF16_F32 if is_low else None,
        preferred_element_type=wide,
    )


def _integer(
    x: jax.Array, codes: jax.Array, scale: jax.Array, *, on_cpu: bool = False
) -> jax.Array:
    """Multiply in int8 x int8 -> int32 with one activation scale per token.

    on_cpu: make large codes the left factor, and a product of every group. XLA's CPU
    backend repacks the right factor at every call, which is dear for large codes. The
    barrier keeps the compiler from moving the transposition back into the product.
    """
    wide = wide_dtype(x.dtype)
    x32 = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x32), axis=-1, keepdims=True)
    step = jnp.where(peak == 0, jnp.ones((), jnp.float32), peak) / 127.0
    x8 = jnp.round(x32 / step).astype(jnp.int8)
    scale = scale.astype(wide)
    # int4 codes are widened first: a mixed product would become int32 x int32.
    codes = codes.astype(jnp.int8)
    if codes.ndim == 3:
        total = (_add_groups if on_cpu else _sum_groups)(x8, codes, scale)
    else:
        if on_cpu and codes.size >= CODES_FIRST_SIZE:
            dims = (((1,), (x.ndim - 1,)), ((), ()))
            total = lax.dot_general(codes, x8, dims, preferred_element_type=jnp.int32)
            total = jnp.moveaxis(lax.optimization_barrier(total), 0, -1)
        else:
            dims = (((x.ndim - 1,), (1,)), ((), ()))
            total = lax.dot_general(x8, codes, dims, preferred_element_type=jnp.int32)
        total = total.astype(wide) * _per_output(scale, x.ndim)
    return total * step.astype(wide)


def _sum_groups(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply by `[out, in/g, g]` codes of the same type; sum the scaled products."""
    grouped = x.reshape(x.shape[:-1] + codes.shape[1:])
    dims = (((grouped.ndim - 1,), (2,)), ((grouped.ndim - 2,), (1,)))
    total, wide = _sum_dtypes(x, scale)
    partial = lax.dot_general(grouped, codes, dims, preferred_element_type=total)
    turned = scale[..., 0].T.astype(wide)
    shape = (len(turned),) + (1,) * (x.ndim - 1) + (-1,)
    return jnp.sum(partial.astype(wide) * turned.reshape(shape), axis=0)


def _add_groups(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """Do as `_sum_groups`, one group after the other.

    XLA's CPU backend would transpose all codes to make one product of all groups.
    """
    num_groups, size = codes.shape[1:]
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    total, wide = _sum_dtypes(x, scale)
    found = jnp.zeros((*x.shape[:-1], len(codes)), wide)
    for group in range(num_groups):
        part = lax.slice_in_dim(x, group * size, (group + 1) * size, axis=-1)
        product = lax.dot_general(
            part, codes[:, group], dims, preferred_element_type=total
        )
        found += product.astype(wide) * _per_output(scale[:, group], x.ndim)
    return found


def _sum_dtypes(x: jax.Array, scale: jax.Array) -> tuple[Any, Any]:
    """Return the types of a sum over a group and of scaled sums."""
    if x.dtype == jnp.int8:
        return jnp.int32, scale.dtype
    return wide_dtype(x.dtype), wide_dtype(x.dtype)


def _per_output(scale: jax.Array, ndim: int) -> jax.Array:
    """Return scales `[out, 1]` in a shape that is broadcast to `[..., out]`."""
    return scale.reshape((1,) * (ndim - 1) + (-1,))
