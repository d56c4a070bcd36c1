"""The baseline without a scheduler: batches in order, each until its last row ends.

The decoding step is the library's own. There is no refill, no compaction, no growth of
the cache and no speculation.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.lib.workloads import PROMPT_LENGTH
from er_jax import PolicyParams, steps
from er_jax.types import NONE, DecodeState, Params, Policy, Sampling


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
    """Prompts in batches of `slots`, in order; each batch runs until its last row ends.

    Args:
      policy, params: the model. slots: rows of a batch.
      max_new_tokens: limit of a completion; the cache has room for it from the start.
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
        """Return a batch with its prompts in place and an empty cache."""
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
