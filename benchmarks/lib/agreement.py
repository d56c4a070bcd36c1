"""Two sets of completions of one request: whether they differ only at rounding ties.

Programs of different shape round differently. Where the two best candidates for a token
lie within rounding of each other, either may be drawn, and what follows differs too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from er_jax import Rollout, sampling
from er_jax.costs.timing import neutral_sampling
from er_jax.types import NONE, Params, Policy, Sampling

# The largest difference of the two best noised log-probabilities that is a tie.
TIE_GAP = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.2}


def completions_of(out: Rollout) -> list[np.ndarray]:
    """Return the tokens of each completion, without padding."""
    pairs = zip(out.completion_ids, out.lengths, strict=True)
    return [ids[:length] for ids, length in pairs]


def sampling_settings(key: jax.Array, stop_ids: Sequence[int]) -> Sampling:
    """Return the traced settings of a plain rollout with this key and these stops."""
    stops = list(stop_ids)
    return dataclasses.replace(
        neutral_sampling(),
        key=np.asarray(jax.random.key_data(key), np.uint32),
        stop_ids=np.array(stops + [NONE] * (8 - len(stops)), np.int32),
    )


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

    num_tokens: equal tokens, up to the first difference of each sequence.
    num_different: sequences that differ. num_ties: those whose first difference is at a
      tie. unexplained: ids of the others; must be empty.
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
    """Compare completions; a difference is explained only if it begins at a tie.

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
