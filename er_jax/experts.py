"""A feed-forward layer of experts: the router, and the products of the chosen ones.

A token's output is the sum of a few experts' outputs, weighted by the router. The
experts that any token of a call has chosen are run one after the other, each on all of
its tokens, so that a pass over few tokens reads the weights of those experts and of no
others: decoding is bound by these bytes. A weight may be quantized; a draft routes with
its own router, and a token that is padding chooses nothing.

With many tokens (prefill, training) every expert is chosen, and arithmetic counts:
there a TPU multiplies each expert with its own tokens only (`lax.ragged_dot`). Other
platforms have no such product that reads each expert once, and keep the loop.

Left out: a limit to the tokens of an expert, losses that balance the router.

Source: Shazeer et al. 2017 (arXiv 1701.06538); Qwen3 (arXiv 2505.09388).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from er_jax.drafter import QuantizedWeight, dot
from er_jax.types import Params, wide_dtype

NAMES = ("gate_experts", "up_experts", "down_experts")

# Up to this many tokens a loop over the experts is bound by reading them, on TPUs too.
FEW_TOKENS = 256

# gate, up and down, `[E, in, out]` each, or one expert's `[in, out]`.
Weights: TypeAlias = tuple[Any, Any, Any]
Act: TypeAlias = Callable[[jax.Array], jax.Array]

# tokens, shares, weights, act, num_chosen -> output, as in `mix_whole`.
Mix: TypeAlias = Callable[[jax.Array, jax.Array, Weights, Act, int], jax.Array]


def feed_forward(
    x: jax.Array,
    layer: Params,
    is_real: jax.Array,
    act: Act,
    num_chosen: int,
    is_scaled: bool,
) -> jax.Array:
    """Return the weighted sum of the outputs of each token's experts.

    Args:
      x: `[B, T, dim]`. layer: with `router` `[dim, E]` and the weights in `NAMES`.
      is_real: bool `[B, T]`; the output of other tokens is zero.
      act: of the gate. num_chosen: experts of a token.
      is_scaled: whether a token's weights of its experts are made to add up to 1.
    Returns:
      `[B, T, dim]`.
    """
    tokens = x.reshape(-1, x.shape[-1])
    shares = routed(dot(x, layer["router"]), num_chosen, is_scaled)
    shares = jnp.where(is_real[..., None], shares, jnp.zeros((), shares.dtype))
    shares = shares.reshape(len(tokens), -1)
    weights: Weights = tuple(layer[name] for name in NAMES)
    out = _mix.get()(tokens, shares, weights, act, num_chosen)
    return out.astype(x.dtype).reshape(x.shape)


def mix_whole(
    x: jax.Array, shares: jax.Array, weights: Weights, act: Act, num_chosen: int
) -> jax.Array:
    """Return the weighted sum of the experts' outputs, with all weights at hand.

    Args:
      x: `[N, dim]`. shares: `[N, E]`, the tokens' weights of all experts.
      weights: gate, up and down. act, num_chosen: see `feed_forward`.
    Returns:
      `[N, dim]`, float32 or wider.
    """
    if any(isinstance(weight, QuantizedWeight) for weight in weights):
        return _looped(x, shares, weights, act)
    if len(x) <= FEW_TOKENS:
        return _one_by_one(act, x, shares, weights)
    return lax.platform_dependent(
        x,
        shares,
        weights,
        tpu=functools.partial(_ragged, act=act, num_chosen=num_chosen),
        default=functools.partial(_one_by_one, act),
    )


@contextlib.contextmanager
def replaced(function: Mix) -> Iterator[None]:
    """Replace `mix_whole` while a program is traced whose experts lie in parts."""
    token = _mix.set(function)
    try:
        yield
    finally:
        _mix.reset(token)


def routed(logits: jax.Array, num_chosen: int, is_scaled: bool) -> jax.Array:
    """Return each token's weights of all experts, zero for those it does not choose.

    Args:
      logits: `[..., E]` of the router. num_chosen, is_scaled: see `feed_forward`.
    Returns:
      `[..., E]` in the dtype of `logits`; the softmax is in float32 or wider.
    """
    probs = jax.nn.softmax(logits.astype(wide_dtype(logits.dtype)), axis=-1)
    top, chosen = lax.top_k(probs, num_chosen)
    if is_scaled:
        top = top / jnp.sum(top, axis=-1, keepdims=True)
    hot = jax.nn.one_hot(chosen, logits.shape[-1], dtype=top.dtype)
    # Not a product of matrices, which a TPU would round to bfloat16.
    return jnp.sum(hot * top[..., None], axis=-2).astype(logits.dtype)


def expected_touched(num_experts: int, num_chosen: int, tokens: int) -> float:
    """Return how many experts some of the tokens choose, if each chooses at random."""
    return num_experts * (1 - (1 - num_chosen / num_experts) ** tokens)


def _of_one(x: jax.Array, share: jax.Array, weights: Weights, act: Act) -> jax.Array:
    """Return one expert's part of the output, `[N, dim]`, float32 or wider.

    x: `[N, dim]`. share: `[N]`, the tokens' weights of it.
    """
    gate, up, down = weights
    wide = wide_dtype(x.dtype)
    out = dot(act(dot(x, gate)) * dot(x, up), down).astype(wide)
    # Chosen, not multiplied by zero: an expert that overflows on tokens of others.
    is_chosen = (share != 0)[:, None]
    return jnp.where(is_chosen, share.astype(wide)[:, None] * out, jnp.zeros((), wide))


def _expert(weights: Weights, index: jax.Array) -> Weights:
    """Return the weights of one expert, quantized or not."""
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), weights
    )


def _looped(x: jax.Array, shares: jax.Array, weights: Weights, act: Act) -> jax.Array:
    """Add up the parts of the experts that some token has chosen, in ascending order.

    Arguments and result as in `mix_whole`.
    """
    is_touched = jnp.any(shares != 0, axis=0)
    order = jnp.argsort(~is_touched, stable=True)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        share = lax.dynamic_index_in_dim(shares, order[i], axis=1, keepdims=False)
        return total + _of_one(x, share, _expert(weights, order[i]), act)

    start = jnp.zeros(x.shape, wide_dtype(x.dtype))
    with jax.named_scope("experts"):
        count = jnp.sum(is_touched, dtype=jnp.int32)
        return lax.fori_loop(0, count, add, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_by_one(
    act: Act, x: jax.Array, shares: jax.Array, weights: Weights
) -> jax.Array:
    """Do as `_looped`, with a gradient; a loop of unknown length has none."""
    return _looped(x, shares, weights, act)


def _one_by_one_forward(
    act: Act, x: jax.Array, shares: jax.Array, weights: Weights
) -> tuple[jax.Array, Any]:
    return _looped(x, shares, weights, act), (x, shares, weights)


def _one_by_one_backward(act: Act, kept: Any, cotangent: jax.Array) -> Any:
    """Compute each expert's part again, one at a time, and its gradient."""
    x, shares, weights = kept
    wide = wide_dtype(x.dtype)

    def add(total: jax.Array, index: jax.Array) -> tuple[jax.Array, Any]:
        share = lax.dynamic_index_in_dim(shares, index, axis=1, keepdims=False)
        _, pull = jax.vjp(
            functools.partial(_of_one, act=act), x, share, _expert(weights, index)
        )
        of_x, of_share, of_weights = pull(cotangent)
        return total + of_x.astype(wide), (of_share, of_weights)

    num_experts = jnp.arange(shares.shape[1], dtype=jnp.int32)
    start = jnp.zeros(x.shape, wide)
    of_x, (of_shares, of_weights) = lax.scan(add, start, num_experts)
    return of_x.astype(x.dtype), of_shares.T, of_weights


_one_by_one.defvjp(_one_by_one_forward, _one_by_one_backward)


def _ragged(
    x: jax.Array, shares: jax.Array, weights: Weights, *, act: Act, num_chosen: int
) -> jax.Array:
    """Multiply each expert with its own tokens only, which are sorted by expert.

    Arguments and result as in `mix_whole`.
    """
    gate, up, down = weights
    wide = wide_dtype(x.dtype)
    # A padding token chooses experts with the share 0: its rows come to nothing.
    share, chosen = lax.top_k(shares, num_chosen)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    source = order // num_chosen
    sizes = jnp.sum(
        jax.nn.one_hot(chosen.reshape(-1), shares.shape[1], dtype=jnp.int32),
        axis=0, dtype=jnp.int32,
    )  # fmt: skip

    def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
        out = lax.ragged_dot(rows, weight, sizes, preferred_element_type=wide)
        return out.astype(x.dtype)

    rows = x[source]
    out = product(act(product(rows, gate)) * product(rows, up), down).astype(wide)
    share = share.reshape(-1)[order].astype(wide)[:, None]
    parts = jnp.where(share != 0, share * out, jnp.zeros((), wide))
    return jnp.zeros(x.shape, wide).at[source].add(parts)


_mix: contextvars.ContextVar[Mix] = contextvars.ContextVar("mix", default=mix_whole)
