"""Completions computed one token at a time, without anything that is kept.

Every token comes from a forward pass over the whole text before it. There is no batch,
no cache that outlives a pass, no draft and no round. The rules that end a completion
are written again here, in plain Python. Two parts are the library's own, because they
define what is sampled: the policy, and the noise of a token.

Probabilities come from `tests.toy.oracle_logprobs`, in float64 by sorting.

Left out: how a rollout came to its completions (`benchmarks.fuzz`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from er_jax import RolloutConfig, sampling
from er_jax.config import LOGPROB_KINDS
from er_jax.types import NONE, LogprobKind, Params, Policy, Sampling
from tests.toy import oracle_logprobs

# By dtype of the parameters: by how much rounding may move a logit, and by what share a
# threshold of the truncation. In float64 no difference is accepted.
SLACK = {"float64": 0.0, "float32": 5e-5}

# How far off a log-probability may be, divided by 1 + its size. It is float32.
LOGPROB_ERROR = {"float64": 1e-6, "float32": 1e-4}


@dataclasses.dataclass(frozen=True)
class Found:
    """A completion as a rollout returns it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Expected:
    """A completion as it has to be.

    num_ties: draws that rounding decides; there the token that was found counts.
    """

    tokens: tuple[int, ...]
    reason: str
    num_ties: int


@functools.partial(jax.jit, static_argnames="policy")
def _logits(
    policy: Policy, params: Params, tokens: jax.Array, count: jax.Array
) -> jax.Array:
    """Return the logits `[T, V]` after each token of `[T]`, the first `count` real."""
    places = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    positions = jnp.where(places < count, places, NONE)[None]
    cache = policy.init_cache(1, tokens.shape[0])
    hidden, _ = policy.forward(params, tokens[None], positions, cache)
    return policy.logits(params, hidden)[0]


@functools.partial(jax.jit, static_argnames="policy")
def _next(
    policy: Policy,
    params: Params,
    tokens: jax.Array,
    count: jax.Array,
    settings: Sampling,
    sequence_id: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return logits, noised log-probabilities and noise `[V]` of the next token."""
    logits = _logits(policy, params, tokens, count)[count - 1]
    noised = sampling.noised_logprobs(logits, settings, sequence_id, count)
    noise = sampling.gumbel(
        settings, sequence_id, count, logits.shape[-1], logits.dtype
    )
    return logits, noised, noise


def settings_of(config: RolloutConfig, key: jax.Array) -> Sampling:
    """Return the traced settings of a configuration, as the reference needs them."""
    stops = [*config.stop_token_ids, NONE]
    return Sampling(
        key=np.asarray(jax.random.key_data(key)),
        temperature=np.float32(config.temperature),
        top_k=np.int32(config.top_k),
        top_p=np.float32(config.top_p),
        min_p=np.float32(config.min_p),
        stop_ids=np.array((stops * 2)[:4], np.int32),
        logprob_kind=np.int32(LOGPROB_KINDS.index(config.logprobs)),
    )


def can_be_drawn(logits: np.ndarray) -> bool:
    """Whether logits `[V]` are a distribution: -inf may mask tokens, but not all."""
    has_bad = np.isnan(logits).any() or (logits == np.inf).any()
    return not has_bad and bool((logits > -np.inf).any())


class Reference:
    """The completions of one policy under given parameters and settings.

    Args:
      policy, params: the target; drafts play no part.
      settings: of sampling, key and stop ids included.
      max_new_tokens: limit of a completion. length: T, tokens that a pass is padded
        to; at least as many as any text has.
      dtype: of the parameters.
    """

    def __init__(
        self,
        policy: Policy,
        params: Params,
        settings: Sampling,
        *,
        max_new_tokens: int,
        length: int,
        dtype: str,
    ) -> None:
        self.policy, self.params, self.settings = policy, params, settings
        self.max_new_tokens, self.length = max_new_tokens, length
        self.stop_ids = {int(token) for token in settings.stop_ids} - {NONE}
        self.slack, self.error = SLACK[dtype], LOGPROB_ERROR[dtype]

    def _padded(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.int32]:
        padded = np.zeros(self.length, np.int32)
        padded[: len(tokens)] = tokens
        return padded, np.int32(len(tokens))

    def _drawn(self, text: Sequence[int], sequence_id: int) -> list[np.ndarray]:
        out = _next(
            self.policy, self.params, *self._padded(text), self.settings,
            np.int32(sequence_id),
        )  # fmt: skip
        return [np.asarray(x) for x in out]

    def token(self, text: Sequence[int], sequence_id: int) -> tuple[int, float] | None:
        """Return what follows a text, and its log-probability; None if nothing can.

        As `completion`, where no tie is to be expected.

        Args:
          text: the prompt and all behind it. sequence_id: of the completion.
        """
        logits, noised, _ = self._drawn(text, sequence_id)
        if not can_be_drawn(logits):
            return None
        token = int(np.argmax(noised))
        sampled = [oracle_logprobs(logits, self.settings)]
        return token, float(self._logprobs(logits, sampled)[0, token])

    def completion(
        self, prompt: Sequence[int], sequence_id: int, found: Sequence[int] = ()
    ) -> Expected:
        """Return what the completion of a prompt has to be.

        It holds where tokens are the argmax of the target's noised log-probabilities:
        with the rule `coupled`, and with any rule at temperature 0.

        Args:
          prompt: token ids. sequence_id: of the completion.
          found: what a rollout sampled; its token counts where a draw is a tie.
        """
        text, num_ties = [*prompt], 0
        made: list[int] = []
        while True:
            logits, noised, noise = self._drawn(text, sequence_id)
            if not can_be_drawn(logits):
                reason = "nonfinite"
                break
            token = int(np.argmax(noised))
            other = found[len(made)] if len(made) < len(found) else token
            if other != token and self.is_tie(logits, noise, token, other):
                token, num_ties = other, num_ties + 1
            text.append(token)
            made.append(token)
            if token in self.stop_ids:
                reason = "stop"
                break
            if len(made) == self.max_new_tokens:
                reason = "length"
                break
        return Expected(tuple(made), reason, num_ties)

    def is_tie(
        self, logits: np.ndarray, noise: np.ndarray, token: int, other: int
    ) -> bool:
        """Whether rounding could have made `other` the draw instead of `token`.

        It could if `other` is the draw after both logits are moved by the slack.
        """
        if not self.slack:
            return False
        moved = logits.astype(np.float64)
        moved[token] -= self.slack
        moved[other] += self.slack
        return any(
            int(np.argmax(oracle_logprobs(moved, settings) + noise)) == other
            for settings in self._nearby()
        )

    def _nearby(self) -> Iterator[Sampling]:
        """Yield the settings, and those with thresholds moved by rounding."""
        yield self.settings
        for way in (self.slack, -self.slack) if self.slack else ():
            top_p, min_p = float(self.settings.top_p), float(self.settings.min_p)
            yield dataclasses.replace(
                self.settings,
                top_p=np.float64(min(top_p * (1 + way), 1.0) if top_p < 1 else 1.0),
                min_p=np.float64(min_p * (1 - way)),
            )

    def problems(self, prompt: Sequence[int], found: Found) -> list[str]:
        """Return what is wrong with a completion under any rule and temperature.

        One pass over the text gives the tokens that were possible, and their
        log-probabilities. Nothing is drawn again.
        """
        text = [*prompt, *found.tokens]
        bad: list[str] = []
        if found.tokens:
            # The last token is not fed: its entries, poisoned or not, come after these.
            logits = np.asarray(
                _logits(self.policy, self.params, *self._padded(text[:-1]))
            )
            for i, token in enumerate(found.tokens):
                bad += [
                    f"token {i}, {token}, {what}"
                    for what in self._impossible(
                        logits[len(prompt) - 1 + i], token, found.logprobs[i]
                    )
                ]
        stops = [i for i, t in enumerate(found.tokens) if t in self.stop_ids]
        if stops and stops[0] < len(found.tokens) - 1:
            bad.append(f"goes on after the stop at {stops[0]}")
        if stops:
            reason = "stop"
        elif len(found.tokens) >= self.max_new_tokens:
            reason = "length"
        else:
            logits = np.asarray(_logits(self.policy, self.params, *self._padded(text)))
            reason = "goes on" if can_be_drawn(logits[len(text) - 1]) else "nonfinite"
        if len(found.tokens) > self.max_new_tokens or found.reason != reason:
            bad.append(
                f"ends by {found.reason!r} after {len(found.tokens)} tokens, where it "
                f"has to be {reason!r}"
            )
        return bad

    def _impossible(
        self, logits: np.ndarray, token: int, logprob: float
    ) -> Iterator[str]:
        """Yield why logits `[V]` cannot give this token, or this `logprob` of it."""
        if not can_be_drawn(logits):
            yield "follows a text that nothing can follow"
            return
        moved = logits.astype(np.float64)
        moved[token] += self.slack
        # -inf for tokens that are truncated.
        sampled = [oracle_logprobs(moved, settings) for settings in self._nearby()]
        if all(line[token] == -np.inf for line in sampled):
            yield "has probability 0"
            return
        wanted = self._logprobs(logits, sampled)[:, token]
        off = np.abs(wanted - logprob) / (1 + np.abs(wanted))
        if not off.min() <= self.error:
            yield f"has log-probability {logprob}, and not {wanted[0]}"

    def _logprobs(self, logits: np.ndarray, sampled: Any) -> np.ndarray:
        """Return log-probabilities `[ways, V]`, of the kind that the settings name."""
        if self.settings.logprob_kind == LogprobKind.PROCESSED:
            return np.array(sampled)
        scores = logits.astype(np.float64)
        is_scaled = self.settings.logprob_kind == LogprobKind.TEMPERATURE
        if is_scaled and self.settings.temperature > 0:
            scores = scores / float(self.settings.temperature)
        scores = scores - scores.max()
        return (scores - np.log(np.exp(scores).sum()))[None]
