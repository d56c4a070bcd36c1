"""Requests: what to sample, in the sizes that programs are compiled for.

Prompt lengths, rows and cache lengths are rounded up to buckets, so that other prompts
use the same programs. Left out: checks of the arguments (`checks`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from er_jax.config import LOGPROB_KINDS, RolloutConfig
from er_jax.types import NONE, Sampling, Span


@functools.cache
def row_buckets(slots: int, num_shards: int = 1) -> tuple[int, ...]:
    """Return the batch sizes worth compiling: 1, 2, 3, 4, 6, 8, 12, ... and `slots`.

    With several data shards, these are the sizes of one shard times their number.
    """
    per_shard = slots // num_shards
    sizes = {per_shard}
    power = 1
    while power < per_shard:
        sizes |= {power, power * 3 // 2 if power > 1 else power}
        power *= 2
    return tuple(sorted(num_shards * size for size in sizes if size <= per_shard))


def bucket_of(size: int, buckets: Iterable[int]) -> int:
    """Return the smallest bucket that holds `size`."""
    return min(bucket for bucket in buckets if bucket >= size)


# Prompt tokens prefilled at once: enough to be bound by arithmetic, few enough that
# refilling with one short prompt wastes little. A CPU is so bound with fewer.
PREFILL_TOKENS = 256
PREFILL_TOKENS_CPU = 64

MIN_PROMPT_BUCKET = 16


def power_of_two(size: int, least: int) -> int:
    """Return the least power of two >= `size`, but at least `least`."""
    return max(least, 1 << (size - 1).bit_length())


def request_of(
    prompts: list[np.ndarray],
    sequence_ids: np.ndarray,
    config: RolloutConfig,
    num_shards: int = 1,
) -> Request:
    """Return the request of some prompts, with sizes rounded up to buckets.

    Args:
      prompts: int32 `[length]` each. sequence_ids: int `[len(prompts) * n]`.
      config: settings of the rollout. num_shards: data shards; the slots are divided
        evenly among them.
    """
    distinct: dict[bytes, int] = {}
    prompt_of = np.repeat(
        [distinct.setdefault(p.tobytes(), len(distinct)) for p in prompts], config.n
    )
    unique = [np.frombuffer(data, np.int32) for data in distinct]
    bucket = power_of_two(max(len(p) for p in prompts), MIN_PROMPT_BUCKET)
    longest = bucket + config.max_new_tokens
    step = 64 if longest <= 512 else 128
    lengths = [-(-longest // step) * step]
    while lengths[-1] // 2 >= max(bucket + 64, 128):
        lengths.append(-(-lengths[-1] // 2 // step) * step)
    is_cpu = jax.default_backend() == "cpu"
    chunk_tokens = PREFILL_TOKENS_CPU if is_cpu else PREFILL_TOKENS
    # Only "best" chooses what drafts see.
    is_left_out = None in config.drafter.spans and config.control != "best"
    slots = min(config.max_slots, power_of_two(len(sequence_ids), 1))
    return Request(
        prompts=unique,
        prompt_of=prompt_of,
        sequence_ids=sequence_ids,
        max_new_tokens=config.max_new_tokens,
        slots=-(-slots // num_shards) * num_shards,
        cache_lengths=tuple(sorted(set(lengths))),
        prompt_bucket=bucket,
        chunk=min(max(chunk_tokens // bucket, 1), 16),
        spans=(None,) if is_left_out else config.drafter.spans,
    )


def offered_spans(
    spans: Sequence[Span | None], cache_length: int, gamma: int
) -> list[Span | None]:
    """Return what the drafts of a program may see, all positions last.

    A stated window is used wherever there are positions outside of it. One of several
    choices must leave out half of the cache, or it could not pay.

    Args:
      spans: see `DrafterConfig.spans`. cache_length, gamma: of the program.
    """
    is_stated = None not in spans

    def pays(span: Span) -> bool:
        if is_stated:
            return span.head + span.window < cache_length
        return 2 * span.ring_length(gamma) <= cache_length

    found: list[Span | None] = [s for s in spans if gamma and s is not None and pays(s)]
    return found if found and is_stated else [*found, None]


def sampling_of(config: RolloutConfig, key: jax.Array) -> Sampling:
    """Return the traced settings of a config and a key.

    Raises:
      ValueError: `key` is not one random key.
    """
    remedy = "give one key, as jax.random.key makes it"
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(f"key={key!r} is not a random key; {remedy}")
    typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and key.dtype != np.uint32:
        raise ValueError(f"key has dtype {key.dtype}, not uint32; {remedy}")
    if key.shape != (() if typed else (2,)):
        raise ValueError(f"key has shape {key.shape}; {remedy}")
    data = np.asarray(jax.random.key_data(key) if typed else key)
    if data.shape != (2,):
        # The key of another generator: two words drawn with it become the noise key.
        data = np.asarray(jax.random.bits(key, (2,), np.uint32))
    stops = list(dict.fromkeys(config.stop_token_ids))
    num_stops = power_of_two(max(len(stops), 1), 8)
    return Sampling(
        key=data.astype(np.uint32),
        temperature=np.float32(config.temperature),
        top_k=np.int32(min(config.top_k, 2**31 - 1)),
        top_p=np.float32(config.top_p),
        min_p=np.float32(config.min_p),
        stop_ids=np.array(stops + [NONE] * (num_stops - len(stops)), np.int32),
        logprob_kind=np.int32(LOGPROB_KINDS.index(config.logprobs)),
    )


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample, as host values.

    prompts: the distinct prompts, int32 arrays.
    prompt_of: int `[N]`, index into `prompts` for each sequence.
    sequence_ids: int `[N]`. max_new_tokens: limit of each completion in tokens.
    slots: rows of the full batch.
    cache_lengths: lengths the cache may have, ascending; the last holds any row.
    prompt_bucket: T, tokens of a prefilled prompt, padding included.
    chunk: C, prompts prefilled together.
    state_limit_bytes: bytes of a device that all states together may take; None where
      its memory is unknown.
    spans: what drafts may see; see `DrafterConfig.spans`.
    ring_slots: of the shortest ring in the policy's cache; None where no row goes past
      one.
    """

    prompts: Sequence[np.ndarray]
    prompt_of: np.ndarray
    sequence_ids: np.ndarray
    max_new_tokens: int
    slots: int
    cache_lengths: tuple[int, ...]
    prompt_bucket: int
    chunk: int
    state_limit_bytes: int | None = None
    spans: tuple[Span | None, ...] = (None,)
    ring_slots: int | None = None

    def spans_at(self, cache_length: int, gamma: int) -> list[Span | None]:
        """Return what the drafts of a program may see; see `offered_spans`."""
        return offered_spans(self.spans, cache_length, gamma)

    def limit(self, sequence: int) -> int:
        """Return the length in tokens at which a sequence ends, prompt included."""
        return len(self.prompts[self.prompt_of[sequence]]) + self.max_new_tokens
