"""What whole rollouts are measured on: planned lengths, and the static batch.

A random policy stops at random, so lengths are planned: a prompt's first two tokens
name the position at which its completion ends, and a wrapper around the policy masks
the stop token everywhere else. Target and draft follow the same plan, as a trained pair
would; all other tokens stay the policy's own.

Three kinds of lengths, none of which stands for all of RL. *flat*: every completion is
equally long, so nothing is ever compacted. *tail*: most are short, a few are very long.
*capped*: half are long and many meet the limit, as in long reasoning with a budget.

Source: the last two are fitted to length traces of the verl DAPO 32B run and of
DeepCoder 14B, in PolyTrace (github.com/Zhou-jiecheng/PolyTrace, arXiv 2509.25279).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from er_jax import PolicyParams, kv_cache, sampling, steps
from er_jax.costs import timing
from er_jax.types import NONE, Cache, DecodeState, Params, Policy, Sampling

PROMPT_LENGTH = 16

# Positions of the traces that `tail` and `capped` are fitted to.
TRACE_CAP = 8192


@dataclasses.dataclass(frozen=True)
class PlannedLengths:
    """A `Policy` whose completions end where their prompts say.

    Tokens 0 and 1 of a prompt are the digits, in base V, of the position of the stop
    token that ends its completion. They are kept beside the cache, indexed by position
    as every entry is, and hidden states carry one more feature: whether the next token
    is the last.

    Args:
      policy: the policy underneath. stop_id: the stop token, masked everywhere else.
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
    """Return `num` equal lengths, a quarter of the limit."""
    return np.full(num, max(max_new_tokens // 4, 1))


def tail_lengths(num: int, max_new_tokens: int) -> np.ndarray:
    """Return quantiles of a long-tailed mixture in random order.

    98.5 % are log-normal with median 460 and sigma 0.6 of `TRACE_CAP` tokens, the rest
    with median 2700; scaled to the limit.
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

    Normal around 0.59 of the limit with deviation 0.32, cut at the limit.
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


def sampling_settings(key: jax.Array, stop_ids: Sequence[int]) -> Sampling:
    """Return the settings a plain rollout under this key samples by."""
    stops = list(stop_ids)
    return dataclasses.replace(
        timing.neutral_sampling(),
        key=np.asarray(jax.random.key_data(key), np.uint32),
        stop_ids=np.array(stops + [NONE] * (8 - len(stops)), np.int32),
    )


@functools.partial(
    jax.jit, static_argnames=("policy", "prompt_length"), donate_argnames=("state",)
)
def run_static(
    policy: Policy,
    params: Params,
    state: DecodeState,
    settings: Sampling,
    *,
    prompt_length: int,
) -> DecodeState:
    """Prefill a batch and decode it until its longest row ends. Donates `state`.

    Args:
      policy, params: the model.
      state: prompts in `tokens`, all rows live. settings: of sampling.
      prompt_length: static; tokens of the longest prompt.
    """
    offsets = jnp.arange(prompt_length, dtype=jnp.int32)[None]
    known = state.prompt_length[:, None]
    positions = jnp.where(offsets < known - 1, offsets, NONE)
    prompts = state.tokens[:, :prompt_length]
    _, cache = policy.forward(params, prompts, positions, state.cache)
    pair = PolicyParams(policy=params, draft=None)

    def step(state: DecodeState) -> DecodeState:
        return steps.decode_round(
            policy, pair, state, settings, gamma=0, accept="coupled"
        )[0]

    state = dataclasses.replace(state, cache=cache)
    return lax.while_loop(lambda state: jnp.any(state.live), step, state)


class StaticBatch:
    """The baseline without a scheduler: batches in order, each until its last row ends.

    The decoding step is the library's own; there is no refill, no compaction, no growth
    of the cache, and no speculation.

    Args:
      policy, params: the model. slots: rows of a batch.
      max_new_tokens: limit of a completion; the cache holds it from the start.
      prompt_length: tokens of the longest prompt.
    """

    def __init__(
        self,
        policy: Policy,
        params: Params,
        slots: int,
        max_new_tokens: int,
        prompt_length: int = PROMPT_LENGTH,
    ) -> None:
        self.policy, self.params, self.slots = policy, params, slots
        self.max_new_tokens, self.prompt_length = max_new_tokens, prompt_length
        whole = prompt_length + max_new_tokens
        step = 64 if whole <= 512 else 128
        self.cache_length = -(-whole // step) * step
        self.compile_s = 0.0
        self._call: Any = None

    def run(
        self, prompts: Sequence[Sequence[int]], settings: Sampling
    ) -> tuple[list[np.ndarray], float]:
        """Return the completions in order, and the seconds without compilation.

        Args:
          prompts: of at most `prompt_length` tokens. settings: of sampling.
        """
        seconds, completions = 0.0, []
        for first in range(0, len(prompts), self.slots):
            batch = prompts[first : first + self.slots]
            start = time.perf_counter()
            state = self._state(batch, first)
            seconds += time.perf_counter() - start
            if self._call is None:
                start = time.perf_counter()
                arguments = (self.params, state, settings)
                self._call = run_static.lower(
                    self.policy, *arguments, prompt_length=self.prompt_length
                ).compile()
                self.compile_s = time.perf_counter() - start
            start = time.perf_counter()
            state = self._call(self.params, state, settings)
            tokens, length = jax.device_get((state.tokens, state.length))
            for row, prompt in enumerate(batch):
                completions.append(np.array(tokens[row, len(prompt) : length[row]]))
            seconds += time.perf_counter() - start
        return completions, seconds

    def _state(self, batch: Sequence[Sequence[int]], first: int) -> DecodeState:
        """Return a batch whose prompts are known and whose cache is empty."""
        rows = self.slots
        tokens = np.zeros((rows, self.cache_length), np.int32)
        length = np.ones(rows, np.int32)
        for row, prompt in enumerate(batch):
            tokens[row, : len(prompt)] = prompt
            length[row] = len(prompt)
        empty = steps.empty_state(self.policy, rows, self.cache_length)
        return dataclasses.replace(
            empty,
            tokens=jnp.asarray(tokens),
            length=jnp.asarray(length),
            prompt_length=jnp.asarray(length),
            limit=jnp.asarray(length + self.max_new_tokens),
            sequence_id=jnp.arange(first, first + rows, dtype=jnp.int32),
            live=jnp.arange(rows) < len(batch),
        )


# How close the two best noised log-probabilities are where a draw may fall either way:
# programs of different shape round differently.
TIE_GAP = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.2}


@functools.partial(jax.jit, static_argnames=("policy",))
def noised_gaps(
    policy: Policy,
    params: Params,
    tokens: jax.Array,
    sequence_id: jax.Array,
    settings: Sampling,
) -> jax.Array:
    """Return the gap between the two best candidates for every token but the first.

    Args:
      tokens: `[S]` int32, one sequence. sequence_id: int32 `[]`. settings: of sampling.
    Returns:
      `[S]`; entry s belongs to the token at s + 1.
    """
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)[None]
    cache = policy.init_cache(1, tokens.shape[0])
    hidden, _ = policy.forward(params, tokens[None], positions, cache)
    noised = sampling.noised_logprobs(
        policy.logits(params, hidden), settings, sequence_id[None, None], positions + 1
    )
    best, _ = lax.top_k(noised[0], 2)
    return best[:, 0] - best[:, 1]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How two sets of completions of the same request compare.

    num_tokens: compared, up to the first difference of each sequence.
    num_different: sequences that differ. num_ties: those that part at a tie.
    unexplained: sequence ids that part anywhere else; must be empty.
    """

    num_tokens: int
    num_different: int
    num_ties: int
    unexplained: tuple[int, ...]


def compare(
    policy: Policy,
    params: Params,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    settings: Sampling,
    tie_gap: float,
) -> Agreement:
    """Compare completions; a difference is forgiven only where it begins at a tie.

    Args:
      policy, params: what sampled both. prompts: of both. settings: of both.
      expected, found: completions, in the order of prompts and of sequence ids.
      tie_gap: the largest gap that counts as a tie; see `TIE_GAP`.
    """
    num_tokens, num_ties, unexplained = 0, 0, []
    num_different = 0
    longest = max(
        len(p) + max(len(a), len(b))
        for p, a, b in zip(prompts, expected, found, strict=True)
    )
    size = -(-longest // 64) * 64  # one program
    for index, (prompt, a, b) in enumerate(zip(prompts, expected, found, strict=True)):
        common = min(len(a), len(b))
        apart = np.flatnonzero(a[:common] != b[:common])
        if not len(apart) and len(a) == len(b):
            num_tokens += common
            continue
        num_different += 1
        at = int(apart[0]) if len(apart) else common
        num_tokens += at
        tokens = np.zeros(size, np.int32)
        known = [*prompt, *a]
        tokens[: len(known)] = known
        gaps = noised_gaps(policy, params, tokens, np.int32(index), settings)
        if len(apart) and float(gaps[len(prompt) + at - 1]) <= tie_gap:
            num_ties += 1
        else:
            unexplained.append(index)
    return Agreement(num_tokens, num_different, num_ties, tuple(unexplained))
