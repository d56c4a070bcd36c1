"""Completions whose lengths are planned.

A policy with random parameters stops at random. Here a prompt's first two tokens say at
which position its completion ends, and a wrapper around the policy masks the stop token
at every other position. Target and draft follow the same plan, as a trained pair would.
All other tokens are the policy's own samples.

There are three kinds of lengths; none of them stands for all of RL:

* *flat*: every completion is equally long, so the batch is never compacted.
* *tail*: most completions are short, a few are very long.
* *capped*: half of the completions are long and many meet the limit, as in long
  reasoning with a budget.

Source: the last two are fitted to length traces of the verl DAPO 32B run and of
DeepCoder 14B, in PolyTrace (github.com/Zhou-jiecheng/PolyTrace, arXiv 2509.25279).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from er_jax import kv_cache
from er_jax.types import Cache, Params, Policy

PROMPT_LENGTH = 16

# The longest completion of the traces that `tail` and `capped` are fitted to.
TRACE_CAP = 8192


@dataclasses.dataclass(frozen=True)
class PlannedLengths:
    """A `Policy` whose completions end where their prompts say.

    Tokens 0 and 1 of a prompt are the digits, in base V, of the position of the stop
    token that ends its completion. The cache also keeps the tokens, indexed by position
    as every entry is. Hidden states carry one more feature: whether the next token is
    the last.

    Args:
      policy: the policy underneath. stop_id: the stop token, masked at all other
        positions.
    """

    policy: Policy
    stop_id: int

    @property
    def vocab_size(self) -> int:
        """V of the policy underneath."""
        return self.policy.vocab_size

    def init_cache(self, rows: int, length: int) -> Cache:
        """Return the cache underneath, and the known tokens `[B, S]`."""
        known = jnp.zeros((rows, length), jnp.int32)
        return {"policy": self.policy.init_cache(rows, length), "known": known}

    def forward(
        self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Run the policy underneath; hidden has one feature more."""
        hidden, inner = self.policy.forward(params, tokens, positions, cache["policy"])
        known = kv_cache.write(cache["known"], tokens, positions)
        values = jnp.array([[self.vocab_size, 1]], jnp.int32)[:, : known.shape[1]]
        end = jnp.sum(known[:, :2] * values, axis=1, keepdims=True, dtype=jnp.int32)
        is_last = (positions + 1 == end)[..., None].astype(hidden.dtype)
        hidden = jnp.concatenate([hidden, is_last], axis=-1)
        return hidden, {"policy": inner, "known": known}

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Return the logits underneath, with the stop token forced or masked."""
        logits = self.policy.logits(params, hidden[..., :-1])
        is_stop = jnp.arange(logits.shape[-1], dtype=jnp.int32) == self.stop_id
        is_stop = is_stop.reshape((1,) * (logits.ndim - 1) + (-1,))
        is_last = hidden[..., -1:] > 0
        masked = jnp.asarray(-jnp.inf, logits.dtype)
        return jnp.where(is_stop == is_last, logits, masked)


def planned_prompts(
    lengths: Sequence[int], vocab_size: int, *, prompt_length: int = PROMPT_LENGTH
) -> list[list[int]]:
    """Return distinct prompts whose completions will have these lengths.

    Args:
      lengths: of the completions, the stop token included. vocab_size: V.
      prompt_length: tokens of each prompt, at least 3.
    Raises:
      ValueError: a length that two digits of base V cannot hold.
    """
    random = np.random.default_rng(0)
    prompts = []
    for length in lengths:
        end = prompt_length + int(length) - 1
        if end >= vocab_size**2:
            raise ValueError(
                f"length {length} cannot be written in two digits of base {vocab_size}"
            )
        rest = random.integers(0, vocab_size, prompt_length - 2)
        prompts.append([end // vocab_size, end % vocab_size, *map(int, rest)])
    return prompts


def flat_lengths(num: int, max_new_tokens: int) -> np.ndarray:
    """Return `num` equal lengths, each a quarter of the limit."""
    return np.full(num, max(max_new_tokens // 4, 1))


def tail_lengths(num: int, max_new_tokens: int) -> np.ndarray:
    """Return quantiles of a long-tailed mixture, in random order.

    Where the limit is `TRACE_CAP` tokens, 98.5 % are log-normal with median 460 and
    sigma 0.6, the others log-normal with median 2700. Other limits scale the lengths.
    """
    random = np.random.default_rng(0)
    sample = np.where(
        random.random(200_000) < 0.985,
        460 * np.exp(0.6 * random.standard_normal(200_000)),
        2700 * np.exp(0.6 * random.standard_normal(200_000)),
    )
    return _quantiles(sample, num, max_new_tokens)


def capped_lengths(num: int, max_new_tokens: int) -> np.ndarray:
    """Return quantiles of lengths of which many meet the limit, in random order.

    They are normal with mean 0.59 and deviation 0.32 of the limit, cut at the limit.
    """
    random = np.random.default_rng(0)
    sample = TRACE_CAP * (0.59 + 0.32 * random.standard_normal(200_000))
    return _quantiles(sample, num, max_new_tokens)


def _quantiles(sample: np.ndarray, num: int, limit: int) -> np.ndarray:
    """Return evenly spaced quantiles, scaled to the limit, in random order."""
    values = np.quantile(sample, (np.arange(num) + 0.5) / num) * limit / TRACE_CAP
    lengths = np.clip(np.rint(values), 1, limit).astype(int)
    return np.random.default_rng(1).permutation(lengths)


LENGTHS: dict[str, Callable[[int, int], np.ndarray]] = {
    "flat": flat_lengths,
    "tail": tail_lengths,
    "capped": capped_lengths,
}


def describe(lengths: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return count, mean, quantiles and maximum of lengths."""
    array = np.asarray(lengths)
    p50, p90, p99 = np.percentile(array, (50, 90, 99))
    return {
        "num": int(array.size),
        "mean": float(array.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": int(array.max()),
    }
