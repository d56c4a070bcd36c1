"""The shared types: the policy protocol, the decoding state and what a round reports.

Axis letters, used in every shape comment of the project:

    B rows            T positions in this call   S cache length      G gamma
    V vocabulary      L layers                   H heads             K key/value heads
    D head size       N sequences of a request   P distinct prompts  E stop ids
    F stop sequences  W tokens of the longest of these

A *row* is one index of the compiled batch; the scheduler calls the same index a *slot*.
A *live* row is still generating. `-1` (`NONE`) is the only sentinel: an unused stop id,
a padding position, an empty slot's sequence id.

The types hold data and compute nothing.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

NONE = -1

# Slots of a ring come in multiples of the rows of a tile.
RING_STEP = 16

# Drafts of a round that the rings of a state have room for.
RING_DRAFTS = 32

Params = Any
"""A pytree of policy (or draft) parameters."""


@struct.dataclass
class TiedEmbedding:
    """An embedding table that is also the vocabulary projection.

    Attributes:
      table: `[V, d]`, for look-ups, and for the projection where `projection` is None.
      projection: None in the policy; in a draft the quantized `[d, V]` projection, so
        that drafting reads the small copy while look-ups stay exact.
    """

    table: jax.Array
    projection: Any = None


Cache = Any
"""A pytree of key/value entries; every leaf is `[B, S, ...]`, indexed by position.

A leaf of a layer that sees a window is a `Ring`. While a draft sees a part of the
positions only, all leaves are.
"""

Array = Any
"""A `jax.Array` on the device, a NumPy array or scalar on the host's side of a call."""


def wide_dtype(dtype: Any) -> Any:
    """Return the dtype of sums and probabilities: float64 for float64, else float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


FINISH_NAMES = ("", "stop", "length", "nonfinite", "unfinished", "tool")


class Finish(enum.IntEnum):
    """Why a row ended: the value on the device; `FINISH_NAMES` has its name.

    Two are a completion's on the host alone. UNFINISHED: it could go on. TOOL: its
    turn got no answer that it could go on with.
    """

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    NONFINITE = 3
    UNFINISHED = 4
    TOOL = 5


class LogprobKind(enum.IntEnum):
    """The distribution that a token's log-probability is taken from.

    Traced, so changing it compiles nothing. RAW: the model's own distribution.
    TEMPERATURE: after the temperature, before any truncation. PROCESSED: the
    distribution that is sampled, truncation included.
    """

    RAW = 0
    TEMPERATURE = 1
    PROCESSED = 2


class Purpose(enum.IntEnum):
    """The use of a noise stream; two purposes never share a random number."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


@runtime_checkable
class Policy(Protocol):
    """What a model must offer to be sampled.

    Implementations are frozen dataclasses, because a policy is a static argument of the
    compiled programs: it must be hashable and must hold no arrays. Weights are
    multiplied with `er_jax.dot`, which takes an array or a quantized leaf, so that one
    `forward` serves the target and the draft. A policy with a maximum context length
    may state it as an attribute `max_length`; longer rollouts are refused.
    """

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        ...

    def init_cache(self, rows: int, length: int) -> Cache:
        """Return an empty cache, every leaf `[rows, length, ...]` and zero.

        A leaf may be a `Ring` of `length` slots: what is behind its window is then not
        kept in the state of a rollout.
        """
        ...

    def forward(
        self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Run T new tokens of every row against the cache.

        Args:
          params: policy parameters, or a draft made from them by `er_jax.quantize`.
          tokens: `[B, T]` int32.
          positions: `[B, T]` int32, absolute; -1 is padding. Nothing is written for
            padding, nor for positions at or past the cache length. A rollout never
            feeds the last token of a completion.
          cache: leaves `[B, S, ...]`; entry s belongs to the token at position s.

        Returns:
          hidden `[B, T, *]`, and the cache with the new tokens' entries written. A
          token attends to the entries at its own and earlier positions.
        """
        ...

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Project hidden states `[B, T, *]` to logits `[B, T, V]`, float32 or wider."""
        ...


class Span(NamedTuple):
    """The positions that a draft sees: the first `head` and the last `window`.

    A token at position p sees the position s <= p if s < head or s > p - window.
    """

    head: int
    window: int

    def ring_length(self, gamma: int) -> int:
        """Return the slots of a ring: a round's drafts must not replace what it sees.

        Rings have a multiple of `RING_STEP` slots.
        """
        needed = self.head + self.window + gamma
        return -(-needed // RING_STEP) * RING_STEP


class View(NamedTuple):
    """A draft, and the positions that it sees.

    draft: its number among the drafts of `PolicyParams`. head, window: the `Span` that
      it sees; both 0 where it sees all positions.
    """

    draft: int = 0
    head: int = 0
    window: int = 0

    def __str__(self) -> str:
        """Name it for people; nothing for the first draft over all positions."""
        names = [f"draft {self.draft + 1}"] if self.draft else []
        if self.window:
            names.append(f"seeing {self.head} + {self.window} positions")
        return ", ".join(names)

    @property
    def span(self) -> Span | None:
        """What it sees; None is all positions."""
        return Span(self.head, self.window) if self.window else None

    def seeing(self, span: Span | None) -> View:
        """Return the same draft, seeing a span; None is all positions."""
        return View(self.draft, *(span or (0, 0)))


FIRST_DRAFT = View()
"""The first draft, which sees all positions."""


@struct.dataclass
class Ring:
    """A cache leaf of which queries see a span, and that holds no more than it must.

    `kv_cache.write` and `attend` take it like the array whose place it has. The entry
    of position p is in slot p if p < head, else in slot
    head + (p - head) % (R - head). With as many slots as positions nothing is ever
    replaced, and the span is a mask. With fewer, a call may write T positions at once
    if R >= head + window + T - 1: else it would replace entries that it sees.

    entries: `[B, R, ...]`; in drafts R = `Span.ring_length` of a round's drafts, in a
      state that of `RING_DRAFTS`, or S if that is less.
    span: static.
    """

    entries: jax.Array
    span: Span = struct.field(pytree_node=False)


@struct.dataclass
class Sampling:
    """The sampling settings as traced arrays: changing one compiles nothing.

    Temperature and min-p are `[]`, or `[B]` where rows have their own; top-k and top-p
    are then `[B]` as well, unless both are off for all rows. What is None is not in the
    program.

    key: uint32 `[2]`, the threefry key data all noise is folded from.
    temperature: float32 `[]` or `[B]`, >= 0; 0 is greedy.
    top_k: int32 `[]` or `[B]`, 0 is off.
    top_p: float32 `[]` or `[B]` in (0, 1], 1 is off.
    min_p: float32 `[]` or `[B]` in [0, 1], 0 is off.
    stop_ids: int32 `[E]`, padded with `NONE`.
    logprob_kind: int32 `[]`, a `LogprobKind`.
    bias: None, or float32 `[2, V]`, added to the logits; the second line to those of a
      completion's first `min_new_tokens` tokens. -inf bans a token.
    stop_sequences: None, or int32 `[F, W]`, padded in front with `NONE`.
    begin: int32 `[B]`, the position of each completion's first token; None without bias
      and stop sequences.
    min_new_tokens: int32 `[B]`, tokens of a completion that no stop may be among; None
      as `begin`.
    """

    key: Array
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    stop_ids: Array
    logprob_kind: Array
    bias: Array = None
    stop_sequences: Array = None
    begin: Array = None
    min_new_tokens: Array = None


@struct.dataclass
class DecodeState:
    """The batch between two rounds: all that the next round needs.

    Between rounds the cache holds the target's entries for positions 0 .. length-2; the
    token at length-1 is known and is the next round's first input.

    tokens: int32 `[B, S]`, prompt then completion from position 0.
    logprobs: float32 `[B, S]`, of the completion tokens, 0 elsewhere.
    length: int32 `[B]`, known tokens, prompt included.
    prompt_length: int32 `[B]`.
    limit: int32 `[B]`, the length at which the row ends; at most S when S is final.
    sequence_id: int32 `[B]`, names the row's noise; `NONE` in an empty slot.
    live: bool `[B]`.
    finish_reason: int32 `[B]`, a `Finish`.
    cache: leaves `[B, S, ...]`.
    draft_cache: None, or the leaves as `Ring`s, while a window runs whose drafts see a
      span of the positions: the target's entries, as in `cache`.
    """

    tokens: Array
    logprobs: Array
    length: Array
    prompt_length: Array
    limit: Array
    sequence_id: Array
    live: Array
    finish_reason: Array
    cache: Cache
    draft_cache: Cache | None = None

    @property
    def rows(self) -> int:
        """B, the compiled batch size."""
        return self.tokens.shape[0]

    @property
    def cache_length(self) -> int:
        """S, the compiled cache length in tokens."""
        return self.tokens.shape[1]


@struct.dataclass
class RoundInfo:
    """What one round did.

    num_accepted: int32 `[B]`, drafts kept, 0 .. gamma, without the extra token.
    num_emitted: int32 `[B]`, tokens added to the row, up to its stop token and limit.
    is_live: bool `[B]`, the rows that took part.
    """

    num_accepted: Array
    num_emitted: Array
    is_live: Array


@struct.dataclass
class WindowInfo:
    """What one window did: all that the host reads after a window.

    live: bool `[B]`; length: int32 `[B]`; finish_reason: int32 `[B]`: as in the state.
    num_rounds: int32 `[]`, rounds run.
    accepted: int32 `[G + 1]`, row-rounds that kept exactly k drafts, for each k.
    emitted: int32 `[G + 1]`, row-rounds that emitted exactly k + 1 tokens. A stop token
      or a limit inside the drafts lowers k. A row-round that emitted nothing, because
      of a non-finite logit, counts at k = 0.
    """

    live: Array
    length: Array
    finish_reason: Array
    num_rounds: Array
    accepted: Array
    emitted: Array


@struct.dataclass
class Admission:
    """Sequences to start, and where their prompts' cache entries come from.

    With several data shards, every array is the concatenation of one part per shard,
    and row and prompt numbers count within the shard. Only `num_chunks` and
    `num_clones` are common to all shards: the largest that any shard needs.

    Prompts to prefill are laid out in chunks of C, run one chunk at a time, so that one
    program serves any number of prompts. `slot`, `prompt`, `sequence_id` and `limit`
    list the rows of the first chunk, of the second, ..., then the clones; the unused
    rest of `slot` is B.

    tokens: int32 `[P, T]`, right-padded prompts; P is a multiple of C. Prompts whose
      entries are cloned follow the chunks to prefill.
    length: int32 `[P]`, tokens of each prompt; 0 for padding.
    num_chunks: int32 `[]`, chunks to prefill.
    slot: int32 `[B]`, rows to start. prompt: int32 `[B]`, the prompt of each, 0 .. P-1.
    sequence_id, limit: int32 `[B]`, of each row to start.
    first_row, num_rows: int32 `[P / C]`, the part of `slot` that each chunk fills.
    num_clones: int32 `[]`; clone_from, clone_to, clone_length: int32 `[B]`, rows whose
      first `clone_length - 1` entries are copied, in order, before any prefill.
    """

    tokens: Array
    length: Array
    num_chunks: Array
    slot: Array
    prompt: Array
    sequence_id: Array
    limit: Array
    first_row: Array
    num_rows: Array
    num_clones: Array
    clone_from: Array
    clone_to: Array
    clone_length: Array


@struct.dataclass
class Continuation:
    """Rows that go on behind tokens that are appended to them.

    They have ended, or have just been started. Laid out in chunks of C rows, like the
    prompts of an `Admission`.

    slot: int32 `[A]`, the rows; B where unused. A is a multiple of C.
    tokens: int32 `[A, T]`, to append, right-padded. count: int32 `[A]`, how many.
    limit: int32 `[A]`, the new limit of each row.
    num_chunks: int32 `[]`, chunks that are used.
    """

    slot: Array
    tokens: Array
    count: Array
    limit: Array
    num_chunks: Array


class Program(NamedTuple):
    """The name of a compiled window.

    rows: compiled batch size. cache_length: in tokens. gamma: drafts per round.
    shared_rows: whether all devices of a mesh decode the same rows, each with a smaller
      part of the weights. Otherwise every data shard has its own rows.
    head, window: the `Span` that its drafts see; both 0 where they see all positions.
    draft: which of several drafts it runs, 0 for the first and without drafts.
    """

    rows: int
    cache_length: int
    gamma: int
    shared_rows: bool = False
    head: int = 0
    window: int = 0
    draft: int = 0

    @property
    def view(self) -> View:
        """Its draft, and what that sees."""
        return View(self.draft, self.head, self.window)

    @property
    def span(self) -> Span | None:
        """What its drafts see; None is all positions."""
        return self.view.span

    @property
    def plain(self) -> Program:
        """The plain step of the same shape: no drafts, and nothing for them to see."""
        return self._replace(gamma=0, head=0, window=0, draft=0)

    def drafting(self, view: View) -> Program:
        """Return the program with another draft, or one that sees something else."""
        return self._replace(**view._asdict())

    def seeing(self, span: Span | None) -> Program:
        """Return the program with drafts that see a span; None is all positions."""
        return self.drafting(self.view.seeing(span))

    @property
    def draft_length(self) -> int:
        """The positions that a draft pass reads, per row."""
        span = self.span
        return span.ring_length(self.gamma) if span else self.cache_length

    @property
    def shape(self) -> tuple[int, int, bool]:
        """Rows, cache length, shared rows: all that the shape of a state depends on."""
        return self.rows, self.cache_length, self.shared_rows
