"""Requests: what to sample, in the sizes that programs are compiled for.

Prompt lengths, rows and cache lengths are rounded up to buckets, so that other prompts
use the same programs. Left out: checks of the arguments (`checks`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np

from er_jax.config import LOGPROB_KINDS, RolloutConfig
from er_jax.types import FIRST_DRAFT, NONE, Sampling, Span, View


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

# Tokens that are appended to rows, with padding; more are as many as a row may have.
APPEND_WIDTHS = (16, 64, 256)


def power_of_two(size: int, least: int) -> int:
    """Return the least power of two >= `size`, but at least `least`."""
    return max(least, 1 << (size - 1).bit_length())


def request_of(
    prompts: list[np.ndarray],
    sequence_ids: np.ndarray,
    config: RolloutConfig,
    num_shards: int = 1,
    *,
    begun: Mapping[int, np.ndarray] = MappingProxyType({}),
    ended: Collection[int] = (),
    turns: TurnSizes | None = None,
) -> Request:
    """Return the request of some prompts, with sizes rounded up to buckets.

    Args:
      prompts: int32 `[length]` each. sequence_ids: int `[len(prompts) * n]`.
      config: settings of the rollout. num_shards: data shards; the slots are divided
        evenly among them.
      begun: tokens that sequences have already, int32 `[length]` each; they go on
        behind them. ended: sequences that are not sampled.
      turns: of conversations; None where a completion is one turn.
    """
    distinct: dict[bytes, int] = {}
    prompt_of = np.repeat(
        [distinct.setdefault(p.tobytes(), len(distinct)) for p in prompts], config.n
    )
    bare_prompt_of = prompt_of.copy()
    for sequence, tokens in begun.items():
        known = np.concatenate([prompts[sequence // config.n], tokens])
        data = known.astype(np.int32).tobytes()
        prompt_of[sequence] = distinct.setdefault(data, len(distinct))
    unique = [np.frombuffer(data, np.int32) for data in distinct]
    waiting = [s for s in range(len(sequence_ids)) if s not in ended]
    starts = {s: len(unique[prompt_of[s]]) for s in waiting}
    bucket = power_of_two(max(starts.values(), default=1), MIN_PROMPT_BUCKET)
    num_begun = {sequence: len(tokens) for sequence, tokens in begun.items()}
    limits = config.of_sequences("max_new_tokens", len(prompts))
    longest = bucket + config.most_new_tokens
    if begun:
        # A row needs no room for the tokens that it has twice.
        ends = [
            start + int(limits[s]) - num_begun.get(s, 0) for s, start in starts.items()
        ]
        longest = max(bucket, *ends)
    step = 64 if longest <= 512 else 128
    lengths = [-(-longest // step) * step]
    while lengths[-1] // 2 >= max(bucket + 64, 128):
        lengths.append(-(-lengths[-1] // 2 // step) * step)
    slots = min(config.max_slots, power_of_two(max(len(waiting), 1), 1))
    return Request(
        prompts=unique,
        prompt_of=prompt_of,
        bare_prompt_of=bare_prompt_of,
        sequence_ids=sequence_ids,
        max_new_tokens=config.most_new_tokens,
        slots=-(-slots // num_shards) * num_shards,
        cache_lengths=tuple(sorted(set(lengths))),
        prompt_bucket=bucket,
        chunk=chunk_of(bucket),
        views=_views_of(config),
        group=config.n,
        ended=frozenset(ended),
        num_begun=num_begun,
        limits=limits if isinstance(config.max_new_tokens, tuple) else None,
        turns=turns,
    )


def _tokens_at_once() -> int:
    is_cpu = jax.default_backend() == "cpu"
    return PREFILL_TOKENS_CPU if is_cpu else PREFILL_TOKENS


def chunk_of(bucket: int) -> int:
    """Return how many prompts of a bucket are prefilled together."""
    return min(max(_tokens_at_once() // bucket, 1), 16)


def append_sizes(longest: int, cache_length: int) -> tuple[int, int, int]:
    """Return the sizes in which tokens are appended to rows: few, for few programs.

    Args:
      longest: most tokens of a row. cache_length: no row has more.
    Returns:
      Tokens of a row with padding, rows of a chunk, tokens of a piece.
    """
    tokens = _tokens_at_once()
    most = -(-cache_length // tokens) * tokens
    width = next((width for width in APPEND_WIDTHS if longest <= width), most)
    piece = min(width, tokens)
    return width, chunk_of(piece), piece


@dataclasses.dataclass(frozen=True)
class TurnSizes:
    """Where turns of conversations begin, and how long they may be.

    limit: of a turn in tokens; None is no limit but the completion's.
    starts: index of the token of its completion that begins a sequence's turn, by
      sequence; 0 where there is none.
    """

    limit: int | None = None
    starts: Mapping[int, int] = dataclasses.field(default_factory=dict)


def _views_of(config: RolloutConfig) -> tuple[View, ...]:
    """Return the drafts to choose from; only "best" chooses."""
    drafters = config.drafters
    if config.control != "best":
        spans = drafters[0].spans
        return (FIRST_DRAFT.seeing(None if None in spans else spans[0]),)
    return tuple(
        View(number).seeing(span)
        for number, drafter in enumerate(drafters)
        for span in drafter.spans
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


def offered_views(views: Sequence[View], cache_length: int, gamma: int) -> list[View]:
    """Return the drafts that a program may run, the first draft last.

    Args:
      views: all drafts to choose from. cache_length, gamma: of the program.
    Returns:
      For each draft, what `offered_spans` returns; without drafts, `FIRST_DRAFT`.
    """
    if not gamma:
        return [FIRST_DRAFT]
    return [
        View(draft).seeing(span)
        for draft in sorted({view.draft for view in views}, reverse=True)
        for span in offered_spans(
            [view.span for view in views if view.draft == draft], cache_length, gamma
        )
    ]


def noise_key(key: jax.Array | np.ndarray) -> np.ndarray:
    """Return the words that noise is folded from, uint32 `[2]`.

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
    return data.astype(np.uint32)


def sampling_of(
    config: RolloutConfig, key: jax.Array | np.ndarray, vocab_size: int
) -> Sampling:
    """Return the traced settings of a config and a key.

    Settings that differ between prompts are `[N]`, and completions begin at 0; see
    `settings.of_rows`.

    Raises:
      ValueError: `key` is not one random key.
    """
    stops = list(config.stop_ids)
    num_stops = power_of_two(max(len(stops), 1), 8)
    return Sampling(
        key=noise_key(key),
        **_numbers(config),
        stop_ids=np.array(stops + [NONE] * (num_stops - len(stops)), np.int32),
        logprob_kind=np.int32(LOGPROB_KINDS.index(config.logprobs)),
        **_bounds(config, vocab_size),
    )


def _bounds(config: RolloutConfig, vocab_size: int) -> dict[str, np.ndarray]:
    """Return the fields of bias and bounds of stops; none where nothing needs them."""
    least = np.asarray(config.min_new_tokens, np.int32)
    sequences = [tokens for tokens in config.stop_sequences if len(tokens) > 1]
    found: dict[str, np.ndarray] = {}
    if config.is_biased:
        found["bias"] = _bias(config, vocab_size)
    if sequences:
        longest = power_of_two(max(map(len, sequences)), 4)
        shape = (power_of_two(len(sequences), 4), longest)
        found["stop_sequences"] = np.full(shape, NONE, np.int32)
        for line, tokens in zip(found["stop_sequences"], sequences, strict=False):
            line[-len(tokens) :] = tokens
    if not found:
        return {}
    if least.ndim:
        least = np.repeat(least, config.n)
    return found | {"begin": np.array(0, np.int32), "min_new_tokens": least}


def _bias(config: RolloutConfig, vocab_size: int) -> np.ndarray:
    """Return what is added to logits, `[2, V]`; see `types.Sampling`."""
    bias = np.zeros((2, vocab_size), np.float32)
    for token, value in dict(config.logit_bias).items():
        bias[:, token] = value
    bias[:, list(config.banned_ids)] = -np.inf
    bias[1, list(config.stop_ids)] = -np.inf
    return bias


def _numbers(config: RolloutConfig) -> dict[str, np.ndarray]:
    """Return the settings of the distribution, `[]`, or `[N]` where prompts differ.

    Then all of them are `[N]`, so that there is one more kind of program and not many;
    but top-k and top-p only where one is on.
    """
    names = ("temperature", "top_k", "top_p", "min_p")
    dtypes = (np.float32, np.int32, np.float32, np.float32)
    found = {
        name: np.asarray(getattr(config, name), dtype)
        for name, dtype in zip(names, dtypes, strict=True)
    }
    count = config.num_prompts
    if count is None or not any(x.ndim for x in found.values()):
        return found
    is_truncated = (found["top_k"] > 0).any() or (found["top_p"] < 1).any()
    for name, x in found.items():
        is_off = name in ("top_k", "top_p") and not is_truncated
        found[name] = x.max() if is_off else config.of_sequences(name, count, x.dtype)
    return found


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample, as host values.

    prompts: the distinct prompts, int32 arrays; that of a sequence which goes on ends
      with its tokens so far.
    prompt_of: int `[N]`, index into `prompts` for each sequence. bare_prompt_of: the
      same, of its prompt without tokens of its completion.
    sequence_ids: int `[N]`. max_new_tokens: limit of a completion in tokens.
    slots: rows of the full batch.
    cache_lengths: lengths the cache may have, ascending; the last holds any row.
    prompt_bucket: T, tokens of a prefilled prompt, padding included.
    chunk: C, prompts prefilled together.
    state_limit_bytes: bytes of a device that all states together may take; None where
      its memory is unknown.
    views: the drafts to choose from.
    group: n, sequences of a prompt. ended: sequences that are not sampled.
    num_begun: tokens of a completion that are part of its prompt, by sequence.
    ring_slots: of the shortest ring in the policy's cache; None where no row goes past
      one.
    limits: int `[N]`, the limit of each completion; None where it is the same for all.
    turns: of conversations; None where a completion is one turn.
    """

    prompts: Sequence[np.ndarray]
    prompt_of: np.ndarray
    bare_prompt_of: np.ndarray
    sequence_ids: np.ndarray
    max_new_tokens: int
    slots: int
    cache_lengths: tuple[int, ...]
    prompt_bucket: int
    chunk: int
    state_limit_bytes: int | None = None
    views: tuple[View, ...] = (FIRST_DRAFT,)
    group: int = 1
    ended: Collection[int] = frozenset()
    num_begun: Mapping[int, int] = dataclasses.field(default_factory=dict)
    ring_slots: int | None = None
    limits: np.ndarray | None = None
    turns: TurnSizes | None = None

    def views_at(self, cache_length: int, gamma: int) -> list[View]:
        """Return the drafts that a program may run; see `offered_views`."""
        return offered_views(self.views, cache_length, gamma)

    def limit(self, sequence: int) -> int:
        """Return the length in tokens at which a row ends, prompt included.

        That of the completion, or of its turn.
        """
        own = self.most_tokens(sequence)
        if self.turns is not None and self.turns.limit is not None:
            start = self.turns.starts.get(sequence, 0)
            own = min(own, start + self.turns.limit)
        return self.begin(sequence) + own

    def most_tokens(self, sequence: int) -> int:
        """Return the most tokens that a completion may have."""
        return (
            self.max_new_tokens if self.limits is None else int(self.limits[sequence])
        )

    def begin(self, sequence: int) -> int:
        """Return the position of the first token of a completion."""
        known = len(self.prompts[self.prompt_of[sequence]])
        return known - self.num_begun.get(sequence, 0)

    def prompt(self, sequence: int) -> np.ndarray:
        """Return the prompt of a sequence, without what it has of its completion."""
        return self.prompts[self.prompt_of[sequence]][: self.begin(sequence)]

    def with_begins(self, settings: Sampling) -> Sampling:
        """Return settings with the position where each completion begins, if used.

        Of a conversation, where its turn begins: the bounds of stops are a turn's.
        """
        if settings.begin is None:
            return settings
        starts = {} if self.turns is None else self.turns.starts
        begins = [self.begin(s) + starts.get(s, 0) for s in range(len(self.prompt_of))]
        return dataclasses.replace(settings, begin=np.array(begins, np.int32))

    def going_on(self, completions: Mapping[int, np.ndarray]) -> Request:
        """Return the request with new turns.

        Args:
          completions: int32 `[length]` each, by sequence: all tokens so far. A turn
            begins behind them.
        """
        prompts, prompt_of = list(self.prompts), self.prompt_of.copy()
        num_begun, starts = dict(self.num_begun), {}
        for sequence, tokens in completions.items():
            # A number of its own: rows that hold earlier turns do not hold this one.
            prompt_of[sequence] = len(prompts)
            prompts.append(np.concatenate([self.prompt(sequence), tokens]))
            num_begun[sequence] = starts[sequence] = len(tokens)
        assert self.turns is not None
        turns = dataclasses.replace(self.turns, starts={**self.turns.starts, **starts})
        return dataclasses.replace(
            self, prompts=prompts, prompt_of=prompt_of, num_begun=num_begun, turns=turns
        )

    def bucket(self, lengths: Iterable[int]) -> int:
        """Return the bucket that holds prompts of some lengths in tokens."""
        if self.turns is None:
            return self.prompt_bucket
        longest = power_of_two(max(lengths, default=1), self.prompt_bucket)
        return min(longest, self.cache_lengths[-1])

    def start_length(self, sequence: int) -> int:
        """Return the tokens that a sequence starts from."""
        return len(self.prompts[self.prompt_of[sequence]])

    @functools.cached_property
    def _bare(self) -> Request:
        """The request whose sequences start from their prompts alone."""
        lengths = {len(self.prompts[p]) for p in self.bare_prompt_of[self.waiting]}
        bucket = power_of_two(max(lengths, default=1), MIN_PROMPT_BUCKET)
        return dataclasses.replace(
            self,
            prompt_of=self.bare_prompt_of,
            num_begun=MappingProxyType({}),
            prompt_bucket=bucket,
            chunk=chunk_of(bucket),
        )

    def starting(self, sequences: Iterable[int], bare: bool) -> Request:
        """Return the request in the sizes of an admission of some sequences.

        Args:
          sequences: to start. bare: from their prompts alone, and not from all tokens.
        """
        if bare and self.num_begun:
            return self._bare
        bucket = self.bucket(map(self.start_length, sequences))
        if bucket == self.prompt_bucket:
            return self
        return dataclasses.replace(self, prompt_bucket=bucket, chunk=chunk_of(bucket))

    @property
    def waiting(self) -> list[int]:
        """The sequences to sample."""
        return [s for s in range(len(self.prompt_of)) if s not in self.ended]
