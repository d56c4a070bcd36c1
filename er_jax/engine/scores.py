"""Log-probabilities of given tokens, as one program that can be differentiated.

A policy runs once over whole sequences, as a trainer does. What is large is made in
pieces: rows in chunks, and within a chunk the logits of some tokens at a time. The
backward pass computes a piece again, so it holds the activations of one chunk and the
logits of one piece. The parameters' gradient is summed over pieces in float32 or wider.

Pieces are of tokens, never of the vocabulary: truncation needs a token's whole line of
logits, `Policy.logits` returns it, and fewer tokens bound the memory as well.

Left out: which tokens (`score`), what a loss makes of the result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from er_jax import bias, sampling
from er_jax.settings import rows_own
from er_jax.types import NONE, Array, Params, Policy, Sampling

# Logits up to this many are made at once, however few tokens a chunk may have: 4 MB in
# float32. Smaller products would gain no memory worth having.
LEAST_LOGITS = 2**20


@functools.partial(
    jax.jit, static_argnames=("policy", "truncated", "entropy", "chunk_tokens")
)
def scored(
    policy: Policy,
    params: Params,
    completions: tuple[Array, ...],
    settings: Sampling,
    *,
    truncated: bool,
    entropy: bool,
    chunk_tokens: int,
) -> tuple[jax.Array, ...]:
    """Return the log-probabilities of completions, and the entropies if asked for.

    Args:
      policy, params: the model.
      completions: ids and mask of prompts, ids and mask of completions, lengths; see
        `score.Completions`.
      settings: traced; those of rows `[N]`. truncated: see `sampling.is_truncated`.
      entropy: whether to return entropies.
      chunk_tokens: of a chunk of rows, at most; one row may have more. A fourth of
        these have logits at a time.
    Returns:
      One or two arrays `[N, C]`, float32 or wider; 0 where nothing is scored.
    """
    sequences = _sequences(*completions)
    num_rows, length = sequences[0].shape
    width = sequences[2].shape[1]
    rows = max(min(chunk_tokens // length, num_rows), 1)
    most_logits = max(chunk_tokens // 4, LEAST_LOGITS // policy.vocab_size, 1)

    own = rows_own(settings)

    def score_tokens(
        settings: Sampling, params: Params, part: Any
    ) -> tuple[jax.Array, ...]:
        hidden, targets, is_scored, index = part
        # Nothing that is not scored may reach a gradient, not even as 0 times NaN.
        mask = is_scored.reshape(is_scored.shape + (1,) * (hidden.ndim - 2))
        hidden = jnp.where(mask, hidden, jnp.zeros((), hidden.dtype))
        logits = policy.logits(params, hidden)
        _check_logits(logits, (*targets.shape, policy.vocab_size))
        if settings.bias is not None:
            drawn_from = bias.biased(logits, settings, index)
            logits = bias.of_kind(logits, drawn_from, settings)
        found = sampling.scored_logprobs(logits, targets, settings, truncated)
        zero = jnp.zeros((), logits.dtype)
        return tuple(jnp.where(is_scored, x, zero) for x in found[: 1 + entropy])

    def score_rows(params: Params, part: Any) -> tuple[jax.Array, ...]:
        tokens, positions, targets, is_scored, own = part
        score_some = functools.partial(
            score_tokens, dataclasses.replace(settings, **own)
        )
        cache = policy.init_cache(*tokens.shape)
        hidden, _ = policy.forward(params, tokens, positions, cache)
        index = None
        if settings.bias is not None:
            index = _turn_index(is_scored)
        part = (hidden[:, -width:], targets, is_scored, index)
        most = max(most_logits // len(tokens), 1)
        return _in_pieces(score_some, params, part, axis=1, most=most)

    return _in_pieces(score_rows, params, (*sequences, own), axis=0, most=rows)


def _sequences(
    prompt_ids: Array,
    prompt_mask: Array,
    completion_ids: Array,
    completion_mask: Array,
    lengths: Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return what a policy runs on, and what is scored.

    Prompt and completion stay side by side: the first is padded in front, the second
    behind, so that a row is in one piece. The last token of a completion is no input.

    Returns:
      tokens, positions: int32 `[N, P + C - 1]`; position -1 is padding.
      targets: int32 `[N, C]`, which follow the last C tokens.
      is_scored: bool `[N, C]`.
    """
    offsets = jnp.arange(completion_ids.shape[1], dtype=jnp.int32)[None]
    lengths = lengths.astype(jnp.int32)[:, None]
    is_token = jnp.concatenate(
        [prompt_mask.astype(bool), offsets < lengths - 1], axis=1
    )
    is_token = is_token[:, :-1]
    positions = jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - 1
    targets = completion_ids.astype(jnp.int32)
    tokens = jnp.concatenate([prompt_ids.astype(jnp.int32), targets], axis=1)[:, :-1]
    is_scored = completion_mask.astype(bool) & (offsets < lengths)
    # The id of padding may be outside of the vocabulary.
    return (
        jnp.where(is_token, tokens, 0),
        jnp.where(is_token, positions, NONE),
        jnp.where(is_scored, targets, 0),
        is_scored,
    )


def _turn_index(is_scored: jax.Array) -> jax.Array:
    """Return each token's index in its turn, int32 `[N, C]`, from flags `[N, C]`.

    A turn begins behind what is not scored: the tokens of others in a conversation.
    """
    index = lax.broadcasted_iota(jnp.int32, is_scored.shape, 1)
    begins = jnp.where(is_scored, 0, index + 1)
    return index - lax.cummax(begins, axis=1)


def _check_logits(logits: jax.Array, shape: tuple[int, ...]) -> None:
    """Refuse logits of another shape, or so narrow that probabilities are rounded."""
    if logits.shape != shape or logits.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"policy.logits returns {logits.dtype}{list(logits.shape)}; it must return "
            f"float32 (or float64) of shape {list(shape)}"
        )


def _in_pieces(
    function: Callable[[Params, Any], Any],
    params: Params,
    arrays: Any,
    *,
    axis: int,
    most: int,
) -> Any:
    """Return what a function makes of arrays, computed for some indices at a time.

    One piece is computed as it is. Of several, the backward pass computes each again.

    Args:
      function: of the parameters and a piece; every result has the piece's `axis`.
      params: its parameters.
      arrays: pytree with the same size along `axis`.
      most: indices of a piece.
    """
    size = jax.tree.leaves(arrays)[0].shape[axis]
    count = num_pieces(size, most)
    if count == 1:
        return function(params, arrays)
    length = -(-size // count)

    def split(x: jax.Array) -> jax.Array:
        # A piece has every `count`-th index: of rows that are spread over devices, each
        # piece then has some of every device.
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, count * length - size)
        x = jnp.pad(x, pad)
        x = x.reshape(*x.shape[:axis], length, count, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 1, 0)

    def joined(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, axis + 1)
        x = x.reshape(*x.shape[:axis], count * length, *x.shape[axis + 2 :])
        return lax.slice_in_dim(x, 0, size, axis=axis)

    # A sum of many gradients in bfloat16 would lose the small ones.
    slots = jax.tree.map(_wide_slot, params)

    def piece(params: Params, slots: Params, arrays: Any) -> Any:
        return function(jax.tree.map(_with_slot, params, slots), arrays)

    again = jax.checkpoint(piece, prevent_cse=False)
    found = lax.map(
        lambda part: again(params, slots, part), jax.tree.map(split, arrays)
    )
    return jax.tree.map(joined, found)


@jax.custom_jvp
def _wide_slot(x: jax.Array) -> jax.Array:
    """Return zeros, float32 or wider, that have the gradient of `x`: see `_with_slot`.

    Of what is no narrow float, return `x` itself.
    """
    return jnp.zeros(x.shape, jnp.float32) if _is_narrow(x) else x


@jax.custom_jvp
def _with_slot(x: jax.Array, slot: jax.Array) -> jax.Array:
    """Return `x`, with its gradient going to a slot made of it, where it is summed.

    Widening `x` and narrowing it within a piece would sum as well, and would hold a
    wide copy of all parameters.
    """
    return x if _is_narrow(x) else slot


@_wide_slot.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return _wide_slot(x), dx.astype(jnp.float32) if _is_narrow(x) else dx


@_with_slot.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, slot), (_, dslot) = primals, tangents
    return _with_slot(x, slot), dslot.astype(x.dtype) if _is_narrow(x) else dslot


def _is_narrow(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def num_pieces(size: int, most: int) -> int:
    """Return how many pieces to cut `size` indices into, none longer than `most`.

    As few as can be; up to twice as many if these divide the size evenly, because
    indices that are made up cost time, and upset rows that are spread over devices.
    """
    fewest = -(-size // most)
    even = (n for n in range(fewest, 2 * fewest) if size % n == 0)
    return next(even, fewest)
