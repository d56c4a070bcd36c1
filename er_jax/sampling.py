"""From logits to a draw: the target distribution, the noise, log-probabilities.

Target and draft use the same transform: a bias (`bias`), temperature, then top-k, top-p
and min-p. All settings are traced arrays (`types.Sampling`). A draw is the argmax of
log-probability plus Gumbel noise. The noise is a pure function of (key, sequence id,
position, purpose, token) and never depends on row, round or gamma; that makes rollouts
replayable.

Left out: penalties and logit processors that read earlier tokens.

Source: the Gumbel-max trick (Maddison, Tarlow, Minka 2014, arXiv 1411.0030); top-p,
Holtzman et al. 2019 (arXiv 1904.09751); min-p, Nguyen et al. 2024 (arXiv 2407.01082).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from er_jax.bias import biased
from er_jax.settings import beside
from er_jax.types import LogprobKind, Purpose, Sampling

# Log-probability of a token that cannot be drawn. It is finite, so that sums and
# differences of two of them are too; its exp is exactly 0 in every float type.
NEVER = -1e30


def _best(logits: jax.Array) -> jax.Array:
    """Return the highest logit `[..., 1]`.

    Whoever needs it asks for it: a compiled program finds it once.
    """
    return jnp.max(logits, axis=-1, keepdims=True)


def _below_best(values: jax.Array, best: jax.Array) -> jax.Array:
    """Return logits minus the highest one, so that this is 0.

    All are 0 where the highest is not finite: such logits mean nothing, and NaN would
    bias what is drawn before them in a round.
    """
    zero = jnp.zeros((), values.dtype)
    return jnp.where(jnp.isfinite(best), values - best, zero)


def _temperature_scaled(
    values: jax.Array, best: jax.Array, sampling: Sampling
) -> jax.Array:
    """Return (logits - highest) / temperature, with temperature 0 read as 1.

    Subtracting the highest first keeps the largest score finite (0) at any temperature;
    the others may go to -inf.
    """
    one = jnp.ones((), values.dtype)
    temperature = beside(sampling.temperature, values).astype(values.dtype)
    temperature = jnp.where(temperature == 0, one, temperature)
    return _below_best(values, best) / temperature


def _log_total(scores: jax.Array) -> jax.Array:
    """Return log sum exp `[..., 1]` of scores whose maximum is 0.

    The known maximum saves a pass over the vocabulary.
    """
    return jnp.log(jnp.sum(jnp.exp(scores), axis=-1, keepdims=True))


def _log_normalized(scores: jax.Array) -> jax.Array:
    return jnp.maximum(scores - _log_total(scores), jnp.asarray(NEVER, scores.dtype))


# Bits of a threshold that one pass over the vocabulary finds. A CPU is bound by the
# comparisons, which are fewest with one bit; other devices are bound by the passes. A
# GPU fuses the seven sums for three bits into one kernel; four bits would take two.
CPU_BITS, DEVICE_BITS = 1, 3


def _keys(scores: jax.Array) -> jax.Array:
    """Return unsigned integers that ascend as the scores descend.

    Scores are at most 0, and the bits of non-negative floats order as integers do.
    """
    unsigned = jnp.uint64 if scores.dtype == jnp.float64 else jnp.uint32
    return lax.bitcast_convert_type(jnp.abs(scores), unsigned)


def _threshold(
    scores: jax.Array, is_enough: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Return the least key `[..., 1]` such that the tokens up to it are enough; exact.

    The search goes digit by digit from the highest, in fewer passes over the vocabulary
    than a sort.

    Args:
      scores: `[..., V]`.
      is_enough: takes the scores and the largest key to keep, `[..., 1]`; returns
        whether the tokens up to that key are enough, bool `[..., 1]`.
    """
    # Every pass recomputes keys and summands from the scores and so reads one array;
    # each array made beforehand would be read as well.
    unsigned = _keys(scores[..., :1])
    width = 8 * unsigned.dtype.itemsize

    def search(digit_bits: int, scores: jax.Array) -> jax.Array:
        num_digits = -(-width // digit_bits)

        def next_digit(i: jax.Array, low: jax.Array) -> jax.Array:
            shift = (digit_bits * (num_digits - 1 - i)).astype(low.dtype)
            one, highest = jnp.ones((), low.dtype), ~jnp.zeros((), low.dtype)
            digit = jnp.zeros_like(low)
            for value in range(1, 1 << digit_bits):
                # The largest key with a smaller value of this digit. The first digit is
                # shorter where `digit_bits` does not divide the key's width.
                fits = (highest >> shift) >= value
                last = jnp.where(fits, low + ((one * value) << shift) - one, highest)
                digit += (~is_enough(scores, last)).astype(low.dtype)
            return low + (digit << shift)

        return lax.fori_loop(0, num_digits, next_digit, jnp.zeros_like(unsigned))

    return lax.platform_dependent(
        scores,
        cpu=functools.partial(search, CPU_BITS),
        default=functools.partial(search, DEVICE_BITS),
    )


def _truncated(scores: jax.Array, sampling: Sampling) -> jax.Array:
    """Apply top-k, then top-p to the remaining tokens, as thresholds on the score.

    A threshold keeps every token that ties with the last one kept, so the kept set is a
    function of the scores alone, and not of a sort's order among equals.
    """
    chosen_k, chosen_p = (beside(x, scores) for x in (sampling.top_k, sampling.top_p))
    top_k = jnp.minimum(chosen_k, jnp.int32(scores.shape[-1]))

    def where_on(is_on: jax.Array, find: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Return the thresholds of rows with a setting on, and of the others none."""
        if not jnp.ndim(is_on):
            return lax.cond(is_on, find, all_of, scores)
        found = lax.cond(jnp.any(is_on), find, all_of, scores)
        return jnp.where(is_on, found, all_of(scores))

    def count(scores: jax.Array, last: jax.Array) -> jax.Array:
        kept = _keys(scores) <= last
        return jnp.sum(kept, -1, keepdims=True, dtype=jnp.int32)

    def by_count(scores: jax.Array) -> jax.Array:
        return _threshold(scores, lambda scores, last: count(scores, last) >= top_k)

    def all_of(scores: jax.Array) -> jax.Array:
        return ~jnp.zeros_like(_keys(scores[..., :1]))

    by_rank = where_on(chosen_k > 0, by_count)

    def mass(scores: jax.Array, last: jax.Array) -> jax.Array:
        kept = _keys(scores) <= jnp.minimum(last, by_rank)
        zero = jnp.zeros((), scores.dtype)
        return jnp.sum(jnp.where(kept, jnp.exp(scores), zero), -1, keepdims=True)

    def by_mass(scores: jax.Array) -> jax.Array:
        wanted = mass(scores, by_rank) * chosen_p.astype(scores.dtype)
        return _threshold(scores, lambda scores, last: mass(scores, last) >= wanted)

    nucleus = where_on(chosen_p < 1, by_mass)
    is_kept = _keys(scores) <= jnp.minimum(by_rank, nucleus)
    return jnp.where(is_kept, scores, jnp.asarray(NEVER, scores.dtype))


def is_truncated(sampling: Sampling) -> bool:
    """Whether top-k or top-p is on for any row, for settings on the host.

    It decides which of two programs runs (`truncated` below): the search for thresholds
    in a conditional would have a GPU wait for the host in every pass. Rows have a top-k
    or top-p of their own only where one is on for some row of the request.
    """
    return bool(jnp.ndim(sampling.top_k) or sampling.top_k > 0 or sampling.top_p < 1)


def _kept_scores(logits: jax.Array, sampling: Sampling, truncated: bool) -> jax.Array:
    """Return scores relative to the best, `NEVER` where a token cannot be drawn."""
    scores = _temperature_scaled(logits, _best(logits), sampling)
    if truncated:
        scores = _truncated(scores, sampling)
    # Scores are relative to the maximum, so min-p is a threshold at log(min_p).
    floor = jnp.log(beside(sampling.min_p, scores).astype(scores.dtype))
    return jnp.where(scores >= floor, scores, jnp.asarray(NEVER, scores.dtype))


def target_logprobs(
    logits: jax.Array, sampling: Sampling, truncated: bool = True
) -> jax.Array:
    """Return the log-probabilities that tokens are sampled from.

    The transform is temperature, then top-k, then top-p of the rest, then min-p
    (relative to the most likely token).

    Args:
      logits: `[..., V]` float32 or wider; -inf masks a token. Those that are no
        distribution (`is_distribution`) are read as equal.
      sampling: traced settings.
      truncated: static; False leaves top-k and top-p out, and is right only where both
        are off.
    Returns:
      `[..., V]` natural logarithms in the dtype of `logits`; `NEVER` where the
      probability is 0. At temperature 0 the first largest logit has probability 1.
    """
    logprobs = _log_normalized(_kept_scores(logits, sampling, truncated))
    first = jnp.argmax(_below_best(logits, _best(logits)), axis=-1)
    greedy = jnp.where(
        jax.nn.one_hot(first, logits.shape[-1], dtype=jnp.bool_),
        jnp.zeros((), logprobs.dtype),
        jnp.asarray(NEVER, logprobs.dtype),
    )
    return jnp.where(beside(sampling.temperature, logits) == 0, greedy, logprobs)


def is_distribution(logits: jax.Array) -> jax.Array:
    """Whether logits `[..., V]` can be sampled, bool `[...]`.

    False where one is NaN or +inf, or all are -inf. A single -inf masks its token.
    """
    # The maximum propagates NaN.
    return jnp.isfinite(_best(logits))[..., 0]


def draw(
    logits: jax.Array, sampling: Sampling, noise: jax.Array, truncated: bool = True
) -> jax.Array:
    """Return the token of largest log-probability plus noise, int32 `[...]`.

    The same as the argmax over `target_logprobs` plus noise, without making these:
    normalising moves all tokens alike. It reads the logits twice.

    Args:
      logits: `[..., V]`. noise: `[..., V]`, by `gumbel`. sampling, truncated: as in
        `target_logprobs`.
    """
    scores = _kept_scores(logits, sampling, truncated)
    is_greedy = beside(sampling.temperature, logits) == 0
    noised = jnp.where(is_greedy, scores, scores + noise)
    return jnp.argmax(noised, axis=-1).astype(jnp.int32)


def drawn_logprobs(
    logits: jax.Array, tokens: jax.Array, sampling: Sampling, truncated: bool = True
) -> jax.Array:
    """Return the log-probability of tokens that `draw` returned for these logits.

    It is that of `token_logprobs`, by one sum over the vocabulary.

    Args:
      logits: `[..., V]`. tokens: `[...]` int32. sampling, truncated: as in
        `target_logprobs`.
    Returns:
      `[...]` float32.
    """
    scores = _scores_of_kind(logits, sampling, truncated)
    # A drawn token is a kept one.
    logprobs = _of_tokens(logits, tokens, sampling) - _log_total(scores)[..., 0]
    is_certain = _is_certain(sampling, logprobs)
    return jnp.where(is_certain, jnp.zeros_like(logprobs), logprobs).astype(jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def scored_logprobs(
    logits: jax.Array, tokens: jax.Array, sampling: Sampling, truncated: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability of tokens that other logits may have drawn.

    It is that of `drawn_logprobs`, and differentiable by the logits. A token that
    truncation leaves out for these logits counts as kept beside the others: it was
    drawn, so the logits that drew it kept it, and its log-probability stays finite with
    a gradient.

    Args:
      logits: `[..., V]`. tokens: `[...]` int32. sampling, truncated: as in
        `target_logprobs`.
    Returns:
      logprobs: `[...]` in the dtype of `logits`.
      entropy: `[...]`, of the distribution of the same kind, in nats.
    """
    return _score(logits, tokens, sampling, truncated)[0]


@scored_logprobs.defjvp
def _scored_logprobs_jvp(truncated: bool, primals: Any, tangents: Any) -> Any:
    # By hand: the search for thresholds has no gradient, nor has the maximum, and what
    # is kept for the backward pass should be the logits alone.
    logits, tokens, sampling = primals
    found, slopes = _score(logits, tokens, sampling, truncated)
    return found, tuple(jnp.sum(slope * tangents[0], axis=-1) for slope in slopes)


def _score(
    logits: jax.Array, tokens: jax.Array, sampling: Sampling, truncated: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return log-probability and entropy `[...]`, and by the logits their derivatives.

    With scores s that are logits over the temperature (or as they are), a kept token
    has probability p = exp(s) / sum exp(s). The derivative by s of the log-probability
    of the token t is [is t] - p, of the entropy it is -p (s - mean of s).
    """
    zero, one, never = (jnp.asarray(value, logits.dtype) for value in (0, 1, NEVER))
    ids = lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1)
    is_own = ids == tokens[..., None]

    def pick(values: jax.Array) -> jax.Array:
        # Not by a look-up: it would gather a vocabulary that is spread over devices.
        return jnp.sum(jnp.where(is_own, values, zero), axis=-1, keepdims=True)

    scores = _scores_of_kind(logits, sampling, truncated)
    own = pick(_unprocessed(logits, _best(logits), sampling))
    weights = jnp.exp(scores)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    added = jnp.where(pick(scores) == never, jnp.exp(own), zero)
    logprobs = jnp.maximum(own - jnp.log(total + added), never)
    # A score may be -inf, where the weight is 0.
    finite = jnp.where(weights > 0, scores, zero)
    mean = jnp.sum(weights * finite, axis=-1, keepdims=True) / total
    entropy = jnp.log(total) - mean

    is_raw = sampling.logprob_kind == LogprobKind.RAW
    temperature = beside(sampling.temperature, logits).astype(logits.dtype)
    is_scaled = ~is_raw & (temperature != 0)
    scale = one / jnp.where(is_scaled, temperature, one)
    is_certain = _is_certain(sampling, logits)
    scale = jnp.where(is_certain, zero, scale)
    chance = jnp.where(is_own, weights + added, weights) / (total + added)
    slopes = (
        (is_own.astype(logits.dtype) - chance) * scale,
        (mean - finite) * (weights / total) * scale,
    )
    found = (jnp.where(is_certain, zero, x)[..., 0] for x in (logprobs, entropy))
    logprobs, entropy = found
    return (logprobs, entropy), slopes


def _is_certain(sampling: Sampling, values: jax.Array) -> jax.Array:
    """Whether tokens have probability 1: greedy decoding draws from one token.

    values: `[B, ...]`, that the result is to broadcast against.
    """
    is_processed = sampling.logprob_kind == LogprobKind.PROCESSED
    return is_processed & (beside(sampling.temperature, values) == 0)


def _scores_of_kind(
    logits: jax.Array, sampling: Sampling, truncated: bool
) -> jax.Array:
    """Return scores relative to the best, of the kind that `sampling` asks for."""
    is_processed = sampling.logprob_kind == LogprobKind.PROCESSED
    best, kept = _best(logits), _kept_scores(logits, sampling, truncated)
    return jnp.where(is_processed, kept, _unprocessed(logits, best, sampling))


def _unprocessed(values: jax.Array, best: jax.Array, sampling: Sampling) -> jax.Array:
    """Return scores without truncation: raw, or after the temperature."""
    is_raw = sampling.logprob_kind == LogprobKind.RAW
    scaled = _temperature_scaled(values, best, sampling)
    return jnp.where(is_raw, _below_best(values, best), scaled)


def _of_tokens(logits: jax.Array, tokens: jax.Array, sampling: Sampling) -> jax.Array:
    """Return the `_unprocessed` scores of given tokens.

    They are looked up among the logits: in an array of scores they would be another
    pass over the vocabulary.
    """
    own = _pick(logits, tokens)[..., None]
    return _unprocessed(own, _best(logits), sampling)[..., 0]


def _pick(values: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]


def token_logprobs(
    logits: jax.Array, target: jax.Array, tokens: jax.Array, sampling: Sampling
) -> jax.Array:
    """Return the log-probability of given tokens, of the kind that `sampling` asks for.

    Args:
      logits: `[..., V]`. target: `[..., V]`, their `target_logprobs`.
      tokens: `[...]` int32.
      sampling: `logprob_kind` picks raw, temperature or processed; the temperature kind
        reads temperature 0 as 1.
    Returns:
      `[...]` float32.
    """
    # Raw and temperature scores are both untruncated: one normalisation serves them.
    scores = _unprocessed(logits, _best(logits), sampling)
    full = _of_tokens(logits, tokens, sampling) - _log_total(scores)[..., 0]
    is_processed = sampling.logprob_kind == LogprobKind.PROCESSED
    return jnp.where(is_processed, _pick(target, tokens), full).astype(jnp.float32)


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(
    key: tuple[jax.Array, jax.Array], words: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Encrypt two uint32 words with two key words: Threefry-2x32, 20 rounds.

    Written out instead of taken from `jax.random`, so that a token's noise is one fused
    expression of its counters and stays the same whatever generator a version of JAX
    prefers.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = words[0] + key[0], words[1] + key[1]
    for block in range(5):
        for bits in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << bits) | (x1 >> (32 - bits)))
        x0 = x0 + schedule[(block + 1) % 3]
        x1 = x1 + schedule[(block + 2) % 3] + jnp.uint32(block + 1)
    return x0, x1


def _stream(
    sampling: Sampling,
    sequence_id: jax.Array,
    position: jax.Array,
    purpose: Purpose,
    start: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return the key words `[...]` of the noise stream of these counters."""
    position = position.astype(jnp.uint32) * jnp.uint32(len(Purpose)) + purpose
    shape = jnp.broadcast_shapes(sequence_id.shape, position.shape)
    words = (
        jnp.broadcast_to(sequence_id.astype(jnp.uint32), shape),
        jnp.broadcast_to(position, shape),
    )
    stream = threefry((sampling.key[0], sampling.key[1]), words)
    if start is not None:
        start = jnp.broadcast_to(start.astype(jnp.uint32), shape)
        stream = threefry(stream, (start, jnp.zeros_like(start)))
    return stream


def _open_unit(bits: jax.Array, dtype: Any) -> jax.Array:
    """Map uint32 words to (0, 1): exact near 0, the largest rounded to below 1."""
    unit = (bits.astype(dtype) + 0.5) * 2.0**-32
    return jnp.minimum(unit, 1 - 2.0**-24)


def gumbel(
    sampling: Sampling,
    sequence_id: jax.Array,
    position: jax.Array,
    vocab_size: int,
    dtype: Any,
    *,
    purpose: Purpose = Purpose.TOKEN,
    start: jax.Array | None = None,
) -> jax.Array:
    """Return the Gumbel noise of a token position, a function of its counters.

    It is -log(-log(1 - u)) with u exact near 0, so that the upper tail, which decides
    rare draws, has the full 32 bits of resolution.

    Args:
      sampling: its key is folded, never consumed.
      sequence_id: `[...]` int32. position: `[...]` int32, the absolute index of the
        token to be drawn; both broadcast against each other.
      vocab_size: V. dtype: float32 or wider.
      purpose: which stream.
      start: one more counter, for the acceptance rules that look at rejected drafts and
        must not use their noise again.
    Returns:
      `[..., V]`.
    """
    key0, key1 = _stream(sampling, sequence_id, position, purpose, start)
    token = lax.broadcasted_iota(jnp.uint32, (*key0.shape, vocab_size), key0.ndim)
    key = (key0[..., None], key1[..., None])
    bits, _ = threefry(key, (token, jnp.zeros_like(token)))
    return -jnp.log(-jnp.log1p(-_open_unit(bits, dtype)))


def uniform(
    sampling: Sampling,
    sequence_id: jax.Array,
    position: jax.Array,
    dtype: Any,
    *,
    purpose: Purpose,
    start: jax.Array | None = None,
) -> jax.Array:
    """Return one uniform number in (0, 1) per counter; arguments as in `gumbel`."""
    stream, _ = _stream(sampling, sequence_id, position, purpose, start)
    return _open_unit(stream, dtype)


def noised_logprobs(
    logits: jax.Array, sampling: Sampling, sequence_id: jax.Array, position: jax.Array
) -> jax.Array:
    """Return target log-probability plus noise; its argmax is the sampled token.

    Two programs of different shape may round differently and then disagree where the
    two largest values nearly tie; the gap between these tells such a tie.

    Args:
      logits: `[..., V]`. sampling: settings and key.
      sequence_id, position: `[...]` int32, of the token to be drawn.
    Returns:
      `[..., V]`.
    """
    noise = gumbel(sampling, sequence_id, position, logits.shape[-1], logits.dtype)
    return target_logprobs(biased(logits, sampling, position), sampling) + noise
