"""A policy whose every probability is known, and assertions about samples of it.

The toy is a table: the logits of the next token given the last two. Half of them are
kept in its cache, so that an entry which the draft left behind is seen at once. A draft
is simply another table, as far from the target as a test wants it.

Distributions are computed here a second time, in float64 NumPy and by other means than
the library's (sorting, loops), so that both can be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from er_jax import kv_cache, sampling
from er_jax.types import (
    NONE,
    Cache,
    DecodeState,
    LogprobKind,
    Params,
    Sampling,
)


@dataclasses.dataclass(frozen=True)
class Toy:
    """A `Policy` of order 2: the logits after (u, t) are `lines[t] + pages[u, t]`.

    The cache entry of a token u is its page `pages[u]`, so what a token contributes to
    the next but one depends on whose parameters wrote its entry. The lines are read
    from the parameters of the call. A token at position 0 counts as its own
    predecessor.

    dtype: of parameters and cache, "float32" or "float64".
    """

    vocab_size: int = 3
    dtype: str = "float32"

    def init_cache(self, rows: int, length: int) -> Cache:
        shape = (rows, length, self.vocab_size, self.vocab_size)
        return jnp.zeros(shape, jnp.dtype(self.dtype))

    def forward(
        self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        pages, lines = jnp.asarray(params["pages"]), jnp.asarray(params["lines"])
        cache = kv_cache.write(cache, pages[tokens], positions)
        page = kv_cache.read(cache, jnp.maximum(positions - 1, 0))
        line = jnp.take_along_axis(page, tokens[..., None, None], axis=2)
        return line[:, :, 0] + lines[tokens], cache

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        return hidden


def tables(
    vocab_size: int = 3, *, seed: int = 7, spread: float = 1.5, dtype: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits `[V, V, V]` of a target and of an unrelated draft, far away."""
    rng = np.random.default_rng(seed)
    shape = (vocab_size,) * 3
    target, draft = rng.normal(0, spread, shape), rng.normal(0, spread, shape)
    return target.astype(dtype), draft.astype(dtype)


def toy_params(
    policy: Toy, *, seed: int = 0, spread: float = 1.0
) -> dict[str, np.ndarray]:
    """Return random parameters of the toy; another seed makes a far draft."""
    rng = np.random.default_rng(seed)
    size = policy.vocab_size
    pages, lines = (
        rng.normal(0, spread, (size,) * 3),
        rng.normal(0, spread, (size,) * 2),
    )
    return {"pages": pages.astype(policy.dtype), "lines": lines.astype(policy.dtype)}


def full_table(params: Params) -> np.ndarray:
    """Return the logits `[V, V, V]` of the next token given the last two."""
    return np.asarray(params["pages"]) + np.asarray(params["lines"])[None]


def settings(
    *,
    key: tuple[int, int] = (17, 42),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_ids: Sequence[int] = (),
    logprob_kind: LogprobKind = LogprobKind.TEMPERATURE,
) -> Sampling:
    """Return traced settings; always two stop ids long, so that programs are shared."""
    return Sampling(
        key=np.array(key, np.uint32),
        temperature=np.float32(temperature),
        top_k=np.int32(top_k),
        top_p=np.float32(top_p),
        min_p=np.float32(min_p),
        stop_ids=np.array((*stop_ids, NONE, NONE)[:2], np.int32),
        logprob_kind=np.int32(logprob_kind),
    )


def start_state(
    policy: Toy,
    params: Params,
    prompts: np.ndarray,
    new_tokens: int | np.ndarray,
    *,
    cache_length: int,
    sequence_ids: np.ndarray | None = None,
    garbage: float = np.nan,
) -> DecodeState:
    """Return live rows as admission leaves them, `garbage` where nothing is promised.

    Args:
      policy: the toy. params: the target's. prompts: `[B, P]`, all rows equally long.
      new_tokens: limit of each row, in tokens after the prompt.
      cache_length: S. sequence_ids: `[B]`, 0 .. B-1 by default.
      garbage: fills the cache from the last prompt token on, and the log-probabilities.
    """
    rows, known = prompts.shape
    pages = params["pages"]
    cache = np.full((rows, cache_length, *pages.shape[1:]), garbage, policy.dtype)
    cache[:, : known - 1] = pages[prompts[:, :-1]]
    tokens = np.full((rows, cache_length), policy.vocab_size - 1, np.int32)
    tokens[:, :known] = prompts
    if sequence_ids is None:
        sequence_ids = np.arange(rows)
    state = DecodeState(
        tokens=tokens,
        logprobs=np.full((rows, cache_length), garbage, np.float32),
        length=np.full(rows, known, np.int32),
        prompt_length=np.full(rows, known, np.int32),
        limit=np.broadcast_to(np.int32(known + new_tokens), (rows,)),
        sequence_id=np.asarray(sequence_ids, np.int32),
        live=np.ones(rows, np.bool_),
        finish_reason=np.zeros(rows, np.int32),
        cache=cache,
    )
    return jax.tree.map(jnp.asarray, state)


def same_prompt(prompt: Sequence[int], rows: int) -> np.ndarray:
    """Return one prompt for all rows, int32 `[rows, P]`."""
    return np.tile(np.array(prompt, np.int32), (rows, 1))


def oracle_logprobs(logits: np.ndarray, config: Sampling) -> np.ndarray:
    """Return the target log-probabilities `[V]` of logits `[V]`; -inf is impossible.

    In float64, by sorting: temperature, then top-k, then top-p of what is left, then
    min-p; whatever ties with a kept token is kept.
    """
    logits = np.asarray(logits, np.float64)
    temperature = float(config.temperature)
    if temperature == 0:
        return np.where(np.arange(len(logits)) == np.argmax(logits), 0, -np.inf)
    scores = (logits - logits.max()) / temperature
    order = np.argsort(-scores, kind="stable")
    keep = np.isfinite(scores)
    if 0 < config.top_k < len(logits):
        keep &= scores >= scores[order[config.top_k - 1]]
    if config.top_p < 1:
        probs = np.where(keep, np.exp(scores), 0)
        reached = np.cumsum(probs[order]) / probs.sum() >= float(config.top_p)
        keep &= scores >= scores[order[np.argmax(reached)]]
    keep &= np.exp(scores) >= float(config.min_p)
    total = np.log(np.sum(np.exp(scores[keep])))
    return np.where(keep, scores - total, -np.inf)


def oracle_probs(logits: np.ndarray, config: Sampling) -> np.ndarray:
    """Return the target probabilities `[V]` of logits `[V]`."""
    return np.exp(oracle_logprobs(logits, config))


def oracle_table(table: np.ndarray, config: Sampling) -> np.ndarray:
    """Return `oracle_probs` for every line of a table `[..., V]`; NaN stays NaN."""
    probs = np.full(table.shape, np.nan)
    for at in np.ndindex(table.shape[:-1]):
        if not np.isnan(table[at]).any():
            probs[at] = oracle_probs(table[at], config)
    return probs


def joint_probs(
    probs: np.ndarray,
    prompt: Sequence[int],
    num_tokens: int,
    stop_ids: Sequence[int] = (),
) -> np.ndarray:
    """Return the probability of every completion, by `completion_codes`.

    Args:
      probs: `[V, V, V]`, of the next token given the last two; NaN ends a completion.
      prompt: at least two tokens. num_tokens: the limit. stop_ids: end a completion.
    Returns:
      float64 `[(V + 1) ** num_tokens]`.
    """
    vocab_size = probs.shape[0]
    joint = np.zeros((vocab_size + 1) ** num_tokens)

    def extend(done: tuple[int, ...], prob: float) -> None:
        if len(done) == num_tokens or (done and done[-1] in stop_ids):
            joint[_code(done, num_tokens, vocab_size)] += prob
            return
        before, last = (*prompt, *done)[-2:]
        line = probs[before, last]
        if np.isnan(line).any():
            joint[_code(done, num_tokens, vocab_size)] += prob
            return
        for token in np.flatnonzero(line):
            extend((*done, int(token)), prob * line[token])

    extend((), 1.0)
    return joint


def _code(done: Sequence[int], num_tokens: int, vocab_size: int) -> int:
    padded = [*done, *[vocab_size] * (num_tokens - len(done))]
    return sum(token * (vocab_size + 1) ** i for i, token in enumerate(padded))


def completion_counts(
    state: DecodeState, num_tokens: int, vocab_size: int
) -> np.ndarray:
    """Return how often each completion was sampled, by code: `joint_probs`' places."""
    codes = completion_codes(state, num_tokens, vocab_size)
    return np.bincount(codes, minlength=(vocab_size + 1) ** num_tokens)


def completion_codes(
    state: DecodeState, num_tokens: int, vocab_size: int
) -> np.ndarray:
    """Return one number per row for what it sampled, `[B]`; V where it had ended."""
    tokens = np.asarray(state.tokens)
    start, length = np.asarray(state.prompt_length), np.asarray(state.length)
    at = start[:, None] + np.arange(num_tokens)
    taken = np.take_along_axis(tokens, np.minimum(at, tokens.shape[1] - 1), axis=1)
    digits = np.where(at < length[:, None], taken, vocab_size)
    return digits @ (vocab_size + 1) ** np.arange(num_tokens)


def own_draws(
    table: np.ndarray,
    prompts: np.ndarray,
    num_tokens: int,
    config: Sampling,
    sequence_ids: np.ndarray,
) -> np.ndarray:
    """Return the tokens `[B, num_tokens]` of the target's own noised argmax.

    One token after another and one row like any other, without cache, round or draft.
    """
    tokens = np.asarray(prompts)
    noised_logprobs = jax.jit(sampling.noised_logprobs)
    for position in range(prompts.shape[1], prompts.shape[1] + num_tokens):
        noised = noised_logprobs(
            jnp.asarray(table[tokens[:, -2], tokens[:, -1]]),
            config,
            jnp.asarray(sequence_ids, jnp.int32),
            jnp.full(len(tokens), position, jnp.int32),
        )
        draws = np.argmax(np.asarray(noised), axis=-1).astype(np.int32)
        tokens = np.concatenate([tokens, draws[:, None]], axis=1)
    return tokens[:, prompts.shape[1] :]


def compose_rounds(
    kernel: Sequence[np.ndarray],
    probs: np.ndarray,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    rounds: int,
) -> np.ndarray:
    """Return the joint distribution of the next tokens, `[V] * num_tokens`.

    Args:
      kernel: for n = 1, 2, ...: `[V, V, *[V] * n]`, the chances that a round emits
        just these n tokens, given the last two before it.
      probs: `[V, V, V]`, one token after another, for what follows the rounds.
      prompt: at least two tokens. rounds: how many to run at most.
    """
    joint = np.zeros(probs.shape[:1] * num_tokens)
    ends: dict[tuple[int, ...], float] = {(): 1.0}  # where rounds end, and the chance
    for number in range(num_tokens):
        new: dict[tuple[int, ...], float] = {}
        for prefix, prob in ends.items():
            context = (*prompt, *prefix)[-2:]
            for chunk in kernel if number < rounds else (probs,):
                for tokens, chance in np.ndenumerate(chunk[context]):
                    whole = (prefix + tokens)[:num_tokens]
                    if len(whole) == num_tokens:
                        joint[whole] += prob * chance
                    elif chance:
                        new[whole] = new.get(whole, 0.0) + prob * chance
        ends = new
    assert not ends
    return joint


def chain_probs(probs: np.ndarray, prompt: Sequence[int], num_tokens: int) -> Any:
    """Return the target's own joint distribution, `[V] * num_tokens`."""
    return compose_rounds((), probs, prompt, num_tokens, rounds=0)


def assert_same_distribution(
    counts: np.ndarray, probs: np.ndarray, *, level: float = 1e-4
) -> float:
    """Assert by Pearson's chi-square test that counts are draws from probs.

    Cells that expect fewer than 10 are taken together; a count where the probability
    is 0 fails whatever the level.

    Args:
      counts: `[K]`, how often each outcome was drawn. probs: `[K]`, adding up to 1.
      level: the chance that a correct sampler fails, for a seed not chosen by looking.
    Returns:
      The p value.
    """
    assert counts.shape == probs.shape
    assert abs(probs.sum() - 1) < 1e-9
    impossible = counts[probs == 0].sum()
    assert impossible == 0, f"{impossible} draws of outcomes of probability 0"
    expected = probs * counts.sum()
    rare = expected < 10
    found, wanted = counts[~rare], expected[~rare]
    if expected[rare].sum() >= 10:
        found = np.append(found, counts[rare].sum())
        wanted = np.append(wanted, expected[rare].sum())
    else:  # too few to be a cell: they join the largest
        largest = np.argmax(wanted)
        found[largest] += counts[rare].sum()
        wanted[largest] += expected[rare].sum()
    if len(found) == 1:
        return 1.0
    statistic = float(np.sum((found - wanted) ** 2 / wanted))
    p_value = float(scipy.stats.chi2.sf(statistic, len(found) - 1))
    assert p_value > level, (
        f"chi-square {statistic:.1f} with {len(found) - 1} degrees of freedom over "
        f"{counts.sum()} draws: p = {p_value:.2g}, not above {level}"
    )
    return p_value


def assert_rate(successes: int, trials: int, prob: float, *, k: float = 4.5) -> None:
    """Assert that a rate is within k standard errors of its probability.

    A correct sampler fails with chance 7e-6 at k = 4.5.
    """
    error = np.sqrt(prob * (1 - prob) / trials)
    off = abs(successes / trials - prob)
    assert off <= k * error, (
        f"{successes / trials:.5f} of {trials} where {prob:.5f} was expected: "
        f"{off / max(error, 1e-300):.1f} standard errors"
    )
