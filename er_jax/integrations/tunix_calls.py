"""What Tunix asks of a rollout and what its learners get back, in the library's terms.

Settings are translated, prompts tokenized, completions laid out, and every completion
gets noise that does not depend on which thread asked first. Nothing here imports Tunix:
its objects are used by the names of their fields.

Tunix's learners tell padding by the pad id alone: whatever token equals it is masked
out of attention, positions and loss. So it takes part in nothing here either: pad ids
inside of a prompt are left out, and a completion ends at the first it samples.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from er_jax.arguments import is_whole
from er_jax.config import RolloutConfig
from er_jax.drafter import PolicyParams
from er_jax.integrations.batching import Call
from er_jax.request import power_of_two
from er_jax.result import Completion
from er_jax.score import score
from er_jax.types import Policy

# Settings of ours that Tunix has no word for.
OPTIONS = (
    *("accept", "attention", "control", "drafter", "gammas"),
    *("logprobs", "max_slots", "min_p"),
)

NUM_IDS = 2**31


def settings_of(
    asked: Any, *, eos_id: int, pad_id: int, options: dict[str, Any]
) -> RolloutConfig:
    """Return Tunix's settings as the library's.

    Args:
      asked: Tunix's `RolloutConfig`. `top_k` of None, -1 or 0 and `top_p` of None are
        off; a temperature of 0 is greedy.
      eos_id: ends completions where `asked.eos_tokens` is None or empty. pad_id: ends
        them as well.
      options: those of `OPTIONS` that were given.
    """
    stops = [int(token) for token in asked.eos_tokens or [eos_id]]
    top_k = asked.top_k if asked.top_k not in (None, -1) else 0
    return RolloutConfig(
        max_new_tokens=asked.max_tokens_to_generate,
        temperature=asked.temperature,
        top_k=top_k,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        stop_token_ids=tuple(dict.fromkeys([*stops, int(pad_id)])),
        pad_id=int(pad_id),
        **options,
    )


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of a rollout; refuse names that are none."""
    for name in options:
        if name not in OPTIONS:
            raise ValueError(
                f"{name}={options[name]!r} is no option of ErJaxRollout; those of a "
                f"rollout are {', '.join(OPTIONS)}, and the rest stands in Tunix's "
                "RolloutConfig"
            )
    return options


def key_of(seed: Any) -> jax.Array | None:
    """Return the random key of Tunix's `seed`: a number, a key, or None."""
    if seed is None:
        return None
    if is_whole(seed, 0, 2**63 - 1):
        return jax.random.key(int(seed))
    is_array = isinstance(seed, jax.Array | np.ndarray)
    if is_array and seed.ndim == 0 and jnp.issubdtype(seed.dtype, jnp.integer):
        return jax.random.key(int(seed))
    if not is_array:
        raise ValueError(
            f"seed={seed!r} is neither a whole number nor a random key; use None for "
            "other noise in every call"
        )
    return seed


def tokenized(text: str, tokenizer: Any) -> list[int]:
    """Return a prompt's token ids as Tunix's own sampler makes them, without pad ids.

    Args:
      tokenizer: Tunix's `TokenizerAdapter`, or anything with its methods.
    """
    bos_id, pad_id = tokenizer.bos_id(), tokenizer.pad_id()
    tokens = [*([bos_id] if bos_id else []), *tokenizer.encode(text)]
    tokens = tokenizer.dedup_bos_ids(tokens)
    return [int(token) for token in tokens if token != pad_id]


def left_padded(
    prompts: Sequence[Sequence[int]], width: int, pad_id: int
) -> np.ndarray:
    """Return prompts as int32 `[B, width]`.

    If one is longer, they are as wide as the next power of two, as in Tunix's sampler.
    """
    longest = max(len(prompt) for prompt in prompts)
    if longest > width:
        width = power_of_two(longest, 1)
    found = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in zip(found, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return found


def completion_logprobs(
    policy: Policy,
    params: PolicyParams,
    prompts: tuple[jax.Array, jax.Array],
    completions: tuple[jax.Array, jax.Array],
    settings: RolloutConfig,
) -> jax.Array:
    """Return the log-probabilities of completions; see `er_jax.score`.

    What a mask leaves out, wherever it stands, is seen by no token and takes no
    position, as Tunix has it: `score` is asked for the rows without it.

    Args:
      policy, params: the model.
      prompts: ids `[B, P]`, and a mask of their tokens.
      completions: ids `[B, C]`, and a mask of their tokens.
      settings: their temperature is used.
    Returns:
      float32 `[B, C]`, log softmax(logits / temperature); 0 where masked. A
      temperature of 0 counts as 1.
    """
    mask = completions[1]
    last = jnp.argsort(prompts[1], axis=1, stable=True)
    first = jnp.argsort(~mask, axis=1, stable=True)
    prompt_ids, prompt_mask = (jnp.take_along_axis(x, last, axis=1) for x in prompts)
    ids, is_token = (jnp.take_along_axis(x, first, axis=1) for x in completions)
    rows = Rows(prompt_ids, prompt_mask, ids, is_token, mask.sum(axis=1))
    settings = dataclasses.replace(settings, logprobs="temperature")
    found = score(policy, params, rows, config=settings).logprobs
    return jnp.take_along_axis(found, jnp.argsort(first, axis=1), axis=1)


class Rows(NamedTuple):
    """What `er_jax.score` reads of a rollout; see `score.Completions`."""

    prompt_ids: jax.Array
    prompt_mask: jax.Array
    completion_ids: jax.Array
    completion_mask: jax.Array
    lengths: jax.Array


class GenerateCall(Call):
    """One call of `generate`: prompts, settings, and its completions as they come.

    Args:
      prompts: token ids, one completion of each. settings: of the call. key: that of a
        seed; None draws from the engine's own noise.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        settings: RolloutConfig,
        key: jax.Array | None,
    ) -> None:
        super().__init__()
        self.prompts, self.settings, self.key = prompts, settings, key
        self.completions: list[Completion | None] = [None] * len(prompts)
        self._num_missing = len(prompts)

    def put(self, index: int, completion: Completion) -> bool:
        """Keep a completion, cut at the limit of this call, unless it is there already.

        Returns:
          Whether it was the last that was missing.
        """
        if self.completions[index] is not None:
            return False
        limit = self.settings.max_new_tokens
        is_cut = len(completion.token_ids) > limit
        self.completions[index] = Completion(
            token_ids=completion.token_ids[:limit].copy(),
            logprobs=completion.logprobs[:limit].copy(),
            finish_reason="length" if is_cut else completion.finish_reason,
        )
        self._num_missing -= 1
        return self._num_missing == 0


def text_of(completion: Completion, tokenizer: Any) -> str:
    """Return a completion as text, without the token that ended it."""
    tokens = completion.token_ids.tolist()
    is_stopped = completion.finish_reason == "stop"
    return tokenizer.decode(tokens[:-1] if is_stopped else tokens)


class Noise:
    """Names the noise of completions by what is asked, not by who asks first.

    The noise of a completion follows from `seed`, the number of weight updates so far,
    the prompt, and how often that prompt was asked for since the update. Threads that
    ask for the same prompt may get each other's completions; all of them together get
    the same, whatever their order and however their calls were batched.
    """

    def __init__(self, seed: int) -> None:
        if not is_whole(seed, 0, 2**63 - 1):
            raise ValueError(f"seed={seed!r} must be a whole number of at least 0")
        self._key = jax.random.key(seed)
        self._lock = threading.Lock()
        self._version = 0
        self._asked: collections.Counter[bytes] = collections.Counter()

    def advance(self) -> None:
        """Count a weight update; later completions have other noise."""
        with self._lock:
            self._version += 1
            self._asked.clear()

    def ask(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Return a sequence id for a completion of each prompt; count them as asked."""
        ids = []
        with self._lock:
            for prompt in prompts:
                data = np.asarray(prompt, np.int32).tobytes()
                digest = hashlib.blake2b(data, digest_size=16).digest()
                # Consecutive ids: those of one prompt are never the same.
                start = int.from_bytes(digest[:4], "little")
                ids.append((start + self._asked[digest]) % NUM_IDS)
                self._asked[digest] += 1
        return ids

    @property
    def key(self) -> jax.Array:
        """The key of the weights as they are."""
        return jax.random.fold_in(self._key, self._version)


def batch_of(calls: Sequence[GenerateCall]) -> list[GenerateCall]:
    """Return the calls that one rollout can answer, the oldest among them.

    They have the same settings but for the limit of tokens. A call with a seed is
    answered by itself: its sequence ids begin at 0, as those of any other.
    """
    first = calls[0]
    if first.key is not None:
        return [first]

    def kind(call: GenerateCall) -> RolloutConfig:
        return dataclasses.replace(call.settings, max_new_tokens=1)

    return [c for c in calls if c.key is None and kind(c) == kind(first)]


def shared_limit(calls: Sequence[GenerateCall], usual: int) -> int:
    """Return the limit of tokens of a rollout for some calls.

    Programs depend on it, so there are few: the usual one, and powers of two below it.
    What a call did not ask for is cut off.

    Args:
      usual: `max_tokens_to_generate` of training.
    """
    longest = max(call.settings.max_new_tokens for call in calls)
    return longest if longest > usual else min(power_of_two(longest, 1), usual)


def rollouts_of(ids: Sequence[int]) -> list[list[int]]:
    """Deal completions to rollouts so that none has a sequence id twice.

    Ids of two prompts may meet, in one of many thousand batches. Their completions are
    then sampled one rollout after the other, with the ids that they have.

    Args:
      ids: of each completion.
    Returns:
      The indices of the completions of each rollout.
    """
    seen: collections.Counter[int] = collections.Counter()
    rollouts: list[list[int]] = []
    for index, name in enumerate(ids):
        if seen[name] == len(rollouts):
            rollouts.append([])
        rollouts[seen[name]].append(index)
        seen[name] += 1
    return rollouts
