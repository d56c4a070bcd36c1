"""One pass over the weights, compiled as a loop and timed.

There are four kinds of passes:

* *ar*: a round without drafts, in the engine's own window.
* *draft*: one token by the draft.
* *verify*: the target over gamma + 1 positions.
* *round*: gamma drafts and one verification with all their bookkeeping, in the engine's
  own window.

Each runs many times within one compiled loop, so the time of a dispatch does not count.
Every pass is fed with the tokens of the pass before. So no part of it is the same in
every turn, and the compiler can move nothing out of the loop.

Left out: prefill, refill and moves of rows. `benchmarks.rollout` measures them within
whole rollouts.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from er_jax import PolicyParams, acceptance, drafter, sampling
from er_jax.costs.timing import neutral_sampling
from er_jax.engine import windows
from er_jax.engine.engine import Engine
from er_jax.types import DecodeState, Params, Policy, Sampling

Kind = Literal["ar", "draft", "verify", "round"]


class Pass(NamedTuple):
    """A pass: its kind, gamma, and the name of its draft ("" if it reads none)."""

    kind: Kind
    gamma: int = 0
    draft: str = ""

    @property
    def label(self) -> str:
        """A short name of the pass."""
        gamma = str(self.gamma) if self.kind in ("verify", "round") else ""
        return " ".join(word for word in (self.kind, gamma, self.draft) if word)


def passes_of(gammas: Sequence[int], drafts: Sequence[str]) -> list[Pass]:
    """Return passes of all kinds.

    Args:
      gammas: of verifications and rounds. drafts: names, of draft passes and rounds.
    """
    return [
        Pass("ar"),
        *(Pass("draft", 0, draft) for draft in drafts),
        *(Pass("verify", gamma) for gamma in gammas),
        *(Pass("round", gamma, draft) for draft in drafts for gamma in gammas),
    ]


@functools.partial(jax.jit, static_argnames=("policy",), donate_argnames=("state",))
def draft_loop(
    policy: Policy,
    draft: Params,
    state: DecodeState,
    settings: Sampling,
    num_passes: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """Draft one token after another. Donates `state`.

    Args:
      policy, draft: the model and the draft's parameters.
      state: where cache, sequence ids and the first position come from.
      settings: of sampling. num_passes: int32 `[]`.
    Returns:
      The state with its new cache, and the last tokens `[B, 1]`.
    """

    def one_pass(_: Any, carry: tuple[Any, jax.Array, jax.Array]) -> Any:
        cache, tokens, positions = carry
        hidden, cache = policy.forward(draft, tokens, positions, cache)
        logits = policy.logits(draft, hidden)
        noise = _noise(state, settings, logits, positions)
        tokens = sampling.draw(logits, settings, noise, truncated=False)
        return cache, tokens, _next_positions(positions, 1, state)

    cache, tokens, _ = lax.fori_loop(
        0, num_passes, one_pass, (state.cache, state.tokens[:, :1], _start(state, 0))
    )
    return dataclasses.replace(state, cache=cache), tokens


def _noise(
    state: DecodeState, settings: Sampling, logits: jax.Array, positions: jax.Array
) -> jax.Array:
    """Return the noise `[B, T, V]` of the tokens after inputs at `positions`."""
    return sampling.gumbel(
        settings, state.sequence_id[:, None], positions + 1, logits.shape[-1],
        logits.dtype,
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnames=("policy", "gamma"), donate_argnames=("state",)
)
def verify_loop(
    policy: Policy,
    params: Params,
    state: DecodeState,
    settings: Sampling,
    num_passes: jax.Array,
    *,
    gamma: int,
) -> tuple[DecodeState, jax.Array]:
    """Verify gamma drafts again and again. Donates `state`.

    Args:
      policy, params: the model and the target's parameters.
      state, settings, num_passes: as in `draft_loop`.
      gamma: drafts to verify; the pass has gamma + 1 positions.
    Returns:
      The state with its new cache, and sums `[B, gamma + 1]` of all that a pass
      computes, so that the compiler leaves out no part of it.
    """

    def one_pass(_: Any, carry: Any) -> Any:
        cache, tokens, positions, total = carry
        hidden, cache = policy.forward(params, tokens, positions, cache)
        logits = policy.logits(params, hidden)
        noise = _noise(state, settings, logits, positions)
        draws = sampling.draw(logits, settings, noise, truncated=False)
        kept = acceptance.coupled_num_accepted(tokens[:, 1:], draws)
        logprobs = sampling.drawn_logprobs(logits, draws, settings, truncated=False)
        total = total + logprobs + kept[:, None].astype(logprobs.dtype)
        return cache, draws, _next_positions(positions, gamma + 1, state), total

    tokens = state.tokens[:, : gamma + 1]
    total = jnp.zeros(tokens.shape, jnp.float32)
    carry = (state.cache, tokens, _start(state, gamma), total)
    cache, _, _, total = lax.fori_loop(0, num_passes, one_pass, carry)
    return dataclasses.replace(state, cache=cache), total


def _start(state: DecodeState, gamma: int) -> jax.Array:
    offsets = jnp.arange(gamma + 1, dtype=jnp.int32)[None]
    return state.length[:, None] - 1 + offsets


def _next_positions(positions: jax.Array, step: int, state: DecodeState) -> jax.Array:
    """Advance positions; rows that would leave the cache begin again at 0."""
    moved = positions + step
    fits = jnp.all(moved < state.cache_length, axis=-1, keepdims=True)
    return jnp.where(fits, moved, positions - positions[:, :1])


class Bench:
    """The passes of one decoder at one batch shape: `compile`, `warm_up`, then `read`.

    Args:
      policy: the model. params: the target's parameters.
      drafts: name -> draft parameters, as `attach_draft` makes them.
      rows, cache_length: the shape of the batch.
      settings: of sampling; None for the whole distribution at temperature 1.
    """

    def __init__(
        self,
        policy: Policy,
        params: Params,
        drafts: Mapping[str, Params],
        rows: int,
        cache_length: int,
        settings: Sampling | None = None,
    ) -> None:
        self.policy, self.params, self.drafts = policy, params, dict(drafts)
        self.rows, self.cache_length = rows, cache_length
        self.settings = settings or neutral_sampling()
        self.rounds_per_test = Engine(policy, "coupled").rounds_per_test
        self.compile_s: dict[Pass, float] = {}
        self.accepted: dict[Pass, np.ndarray] = {}
        self._calls: dict[Pass, Any] = {}
        self._num: dict[Pass, int] = {}
        self._state: DecodeState | None = None

    def _pair(self, pass_: Pass) -> PolicyParams:
        draft = self.drafts[pass_.draft] if pass_.draft else None
        return PolicyParams(policy=self.params, draft=draft)

    def draft(self, pass_: Pass) -> Params:
        """Return the parameters that a pass drafts with."""
        return drafter.draft_params(self._pair(pass_))

    def _weights(self, pass_: Pass) -> Any:
        if pass_.kind == "verify":
            return self.params
        return self.draft(pass_) if pass_.kind == "draft" else self._pair(pass_)

    def _lower(self, pass_: Pass) -> Any:
        state = jax.eval_shape(
            lambda: windows.run_allocation(self.policy, self.rows, self.cache_length)
        )
        count = jax.ShapeDtypeStruct((), jnp.int32)
        common = (self.policy, self._weights(pass_), state, self.settings)
        if pass_.kind == "draft":
            return draft_loop.lower(*common, count)
        if pass_.kind == "verify":
            return verify_loop.lower(*common, count, gamma=pass_.gamma)
        return windows.run_window.lower(
            *common,
            count,
            count,
            gamma=pass_.gamma,
            accept="coupled",
            truncated=False,
            rounds_per_test=self.rounds_per_test,
        )

    def build(self, pass_: Pass) -> None:
        """Compile a pass unless it is compiled; `compile_s` has its seconds."""
        if pass_ not in self._calls:
            start = time.perf_counter()
            self._calls[pass_] = self._lower(pass_).compile()
            self.compile_s[pass_] = time.perf_counter() - start

    def compile(self, passes: Sequence[Pass], *, workers: int = 1) -> None:
        """Compile passes, `workers` of them at a time."""
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            list(pool.map(self.build, passes))

    def _fresh_state(self) -> DecodeState:
        """Return the batch with every row live at length 1."""
        if self._state is None:
            self._state = windows.run_allocation(
                self.policy, self.rows, self.cache_length
            )
        rows = self.rows
        return dataclasses.replace(
            self._state,
            length=np.ones(rows, np.int32),
            prompt_length=np.ones(rows, np.int32),
            limit=np.full(rows, self.cache_length, np.int32),
            sequence_id=np.arange(rows, dtype=np.int32),
            live=np.ones(rows, bool),
        )

    def run(self, pass_: Pass, num_passes: int) -> tuple[float, int]:
        """Run a compiled pass at least `num_passes` times.

        Returns:
          Seconds in all, and how many passes ran: a few more where windows run whole.
        """
        call, weights = self._calls[pass_], self._weights(pass_)
        seconds, done = 0.0, 0
        while done < num_passes:
            state = self._fresh_state()
            self._state = None
            start = time.perf_counter()
            if pass_.kind in ("draft", "verify"):
                self._state, rest = call(
                    weights, state, self.settings, np.int32(num_passes)
                )
                jax.block_until_ready(rest)
                seconds += time.perf_counter() - start
                return seconds, num_passes
            reach = self.rounds_per_test * (pass_.gamma + 1)
            room = max((self.cache_length - 1 - reach) // (pass_.gamma + 1), 1)
            limit = np.int32(min(room, num_passes - done))
            self._state, info, _ = call(
                weights, state, self.settings, np.int32(0), limit
            )
            info = jax.device_get(info)
            seconds += time.perf_counter() - start
            done += int(info.num_rounds)
            known = self.accepted.get(pass_, 0)
            self.accepted[pass_] = known + np.asarray(info.accepted, np.int64)
        return seconds, done

    def warm_up(self, passes: Sequence[Pass], reading_s: float) -> None:
        """Run each pass, and find how many of them take `reading_s` seconds."""
        for pass_ in passes:
            self.run(pass_, 2)
            seconds, done = self.run(pass_, 4)
            self._num[pass_] = max(int(reading_s * done / seconds), 2)

    def read(self, pass_: Pass) -> float:
        """Return seconds per pass; call `warm_up` first."""
        seconds, done = self.run(pass_, self._num[pass_])
        return seconds / done

    def readers(self, passes: Sequence[Pass]) -> dict[str, Callable[[], float]]:
        """Return `read` of each pass by its label, for `measure.interleave`."""
        return {p.label: functools.partial(self.read, p) for p in passes}

    def tokens_per_round(self, pass_: Pass) -> float:
        """Return the mean tokens that a row gained per round, of all rounds so far."""
        histogram = self.accepted[pass_]
        return 1 + float(np.arange(len(histogram)) @ histogram) / float(histogram.sum())

    def keep_rate(self, pass_: Pass) -> float:
        """Return drafts kept / drafts proposed, of all rounds so far."""
        return (self.tokens_per_round(pass_) - 1) / pass_.gamma
