"""What is known of completions that live through many calls, and what may follow.

A completion is sampled by several calls, under parameters that change, and is answered
in between. What a call must sample is told by `Reference`, one token after another.
The rules that end turns and completions are written again here, in plain Python, from
what docs/living-rollouts.md says.

Left out: the calls themselves (`living`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from er_jax import Completion, Rollout, kv_cache
from er_jax.types import NONE, Cache, Params

STOP, LENGTH, TOOL, OPEN = "stop", "length", "tool", "unfinished"

# By how much a log-probability may be off, divided by 1 + its size. It is float32.
LOGPROB_ERROR = 1e-6

VOCAB_SIZE = 6


class Difference(AssertionError):
    """A call did other than it has to."""


def require(condition: Any, message: str) -> None:
    """Raise a `Difference` unless a condition holds."""
    if not condition:
        raise Difference(message)


@dataclasses.dataclass(frozen=True)
class Sum:
    """A `Policy` whose logits are a sum over all tokens of a text.

    The cache entry of a token is its line of `pages`, and counts the less the further
    back it lies; the last token has its line of `lines` besides. So an entry that is
    missing, stale or at another position changes every later log-probability.
    """

    vocab_size: int = VOCAB_SIZE

    def init_cache(self, rows: int, length: int) -> Cache:
        """Return the lines of no tokens, `[B, S, V]`."""
        return jnp.zeros((rows, length, self.vocab_size), jnp.float64)

    def forward(
        self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Return the logits `[B, T, V]` as what hidden states are."""
        pages, lines = jnp.asarray(params["pages"]), jnp.asarray(params["lines"])
        cache = kv_cache.write(cache, pages[tokens], positions)
        places = jnp.arange(cache.shape[1], dtype=positions.dtype)[None, None]
        age = (positions[..., None] - places).astype(jnp.float64)
        weight = jnp.where(age > 0, 0.9**age, 0.0)
        return jnp.einsum("bts,bsv->btv", weight, cache) + lines[tokens], cache

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Return the hidden states, which are the logits."""
        return hidden


def sum_params(seed: int) -> dict[str, jax.Array]:
    """Return random parameters of the policy."""
    rng = np.random.default_rng(seed)
    shape = (VOCAB_SIZE, VOCAB_SIZE)
    return {name: jnp.asarray(rng.normal(0, 0.8, shape)) for name in ("pages", "lines")}


Answer: TypeAlias = tuple[int, ...] | str | None
"""Tokens; `TOOL` for a function that raises; None for the end of a completion."""


def answer_of(numbers: Sequence[int], room: int) -> tuple[int, ...]:
    """Return an answer of one to three tokens, none of which begins as another one.

    So a text shows which answers it holds.

    Args:
      numbers: three, from 0 on. room: tokens that it may have, >= 1.
    """
    tokens = [number % VOCAB_SIZE for number in numbers]
    length = 1 + tokens[0] % 3
    if length > room:
        tokens[0] -= tokens[0] % 3
        length = 1
    return tuple(tokens[:length])


@dataclasses.dataclass(frozen=True)
class Text:
    """A completion: tokens, which were sampled, their log-probabilities and versions.

    versions: None where they cannot be seen, in what `on_finish` gets.
    """

    tokens: tuple[int, ...] = ()
    mask: tuple[bool, ...] = ()
    logprobs: tuple[float, ...] = ()
    versions: tuple[int, ...] | None = ()
    reason: str = OPEN

    @classmethod
    def of(cls, found: Completion) -> Text:
        """Return it of a completion as `on_finish` gets it."""
        return cls(
            tuple(found.token_ids.tolist()),
            tuple(found.mask.tolist()),
            tuple(found.logprobs.tolist()),
            None,
            found.finish_reason,
        )

    @classmethod
    def of_row(cls, out: Rollout, number: int) -> Text:
        """Return it of a row of a rollout."""
        length = int(out.lengths[number])
        return cls(
            tuple(out.completion_ids[number, :length].tolist()),
            tuple(out.completion_mask[number, :length].tolist()),
            tuple(out.logprobs[number, :length].tolist()),
            tuple(out.version[number, :length].tolist()),
            str(out.finish_reason[number]),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_sampled(self) -> int:
        """Tokens that were not appended."""
        return sum(self.mask)


@dataclasses.dataclass
class Row:
    """A completion's prompt and id, and what is known of it before the next call.

    known: what must not be lost. is_vague: whether more may be there: in a journal of a
    call that failed, or of which a part is cut off. is_closed: whether it has ended in
    a journal, and so goes on under no limit.
    answers: what was answered, by all tokens so far; the latest last.
    """

    prompt: tuple[int, ...]
    sequence_id: int
    known: Text = dataclasses.field(default_factory=Text)
    is_vague: bool = False
    is_closed: bool = False
    answers: dict[tuple[int, ...], list[Answer]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass(frozen=True)
class Terms:
    """What decides how completions go on in a call.

    limit: tokens of a completion. stops: token ids.
    is_answered: whether turns are. turn_tokens, max_turns: their limits, if they are;
      None is no limit.
    versions: that the call may give; the last is its own.
    """

    limit: int
    stops: tuple[int, ...]
    is_answered: bool
    turn_tokens: int | None
    max_turns: int | None
    versions: tuple[int, ...]

    def is_over(self, known: Text) -> bool:
        """Whether a completion is returned as it is; one ended by length may go on."""
        if known.reason == LENGTH:
            return len(known) >= self.limit
        return known.reason != OPEN

    def turn_end(self, tokens: Sequence[int], mask: Sequence[bool]) -> str | None:
        """Return why the last turn of a text has ended; None if it goes on."""
        if not tokens or not mask[-1]:
            return LENGTH if len(tokens) >= self.limit else None
        if tokens[-1] in self.stops:
            return STOP
        if len(tokens) >= self.limit:
            return LENGTH
        turn = list(mask)[::-1]
        length = turn.index(False) if False in turn else len(turn)
        is_long = self.is_answered and self.turn_tokens is not None
        return LENGTH if is_long and length >= (self.turn_tokens or 0) else None

    def is_asked(self, tokens: Sequence[int], mask: Sequence[bool]) -> bool:
        """Whether a text whose turn has ended is asked about."""
        turns = num_turns(mask)
        is_last = self.max_turns is not None and turns >= self.max_turns
        return self.is_answered and len(tokens) < self.limit and not is_last


def num_turns(mask: Sequence[bool]) -> int:
    """Return how many runs of sampled tokens there are."""
    before = [False, *mask]
    return sum(now and not was for was, now in zip(before, mask, strict=False))


Token: TypeAlias = Callable[[tuple[int, ...], int], tuple[int, float]]
"""The token behind a text, and its log-probability, of a sequence id."""


@dataclasses.dataclass(frozen=True)
class Walk:
    """A completion as it has to be, as far as its tokens go.

    state: `OPEN`, "asked" where a turn has ended and an answer may follow, or "over".
    reason: why the turn has ended.
    """

    mask: tuple[bool, ...]
    logprobs: tuple[float, ...]
    state: str
    reason: str | None


def walk(row: Row, terms: Terms, tokens: Sequence[int], token: Token) -> Walk:
    """Follow a completion from what is known of it, and hold every token.

    Raises:
      Difference: it is not what it has to be.
    """
    require(not row.is_closed, f"sequence {row.sequence_id} is over, and goes on")
    name, known, found = f"sequence {row.sequence_id}", row.known, tuple(tokens)
    require(
        found[: len(known)] == known.tokens,
        f"{name}: {found} does not begin with {known.tokens}, which was there",
    )
    mask, logprobs = list(known.mask), list(known.logprobs)
    while True:
        at = len(mask)
        text = found[:at]
        reason = terms.turn_end(text, mask)
        if reason is not None and not terms.is_asked(text, mask):
            require(
                at == len(found), f"{name}: {found} goes on behind {reason} at {at}"
            )
            return Walk(tuple(mask), tuple(logprobs), "over", reason)
        if at == len(found):
            state = OPEN if reason is None else "asked"
            return Walk(tuple(mask), tuple(logprobs), state, reason)
        if reason is not None:
            given = [a for a in row.answers.get(text, []) if isinstance(a, tuple)]
            fits = [a for a in given if found[at : at + len(a)] == a]
            require(fits, f"{name}: {found[at:]} is behind {text}, not one of {given}")
            mask += [False] * len(fits[0])
            logprobs += [0.0] * len(fits[0])
            continue
        wanted, logprob = token(row.prompt + text, row.sequence_id)
        require(
            found[at] == wanted,
            f"{name}: token {at} of {found} is not {wanted}, the draw behind {text}",
        )
        mask.append(True)
        logprobs.append(logprob)


def check(row: Row, terms: Terms, found: Text, token: Token) -> None:
    """Hold a completion, finished or not.

    Raises:
      Difference: it is not what it has to be.
    """
    name, known = f"sequence {row.sequence_id}", row.known
    if row.is_closed or terms.is_over(known):
        own = dataclasses.replace(
            known, versions=None if found.versions is None else known.versions
        )
        require(found == own, f"{name}: {found} was {own}, and over")
        return
    wanted = walk(row, terms, found.tokens, token)
    require(found.mask == wanted.mask, f"{name}: mask of {found}, not {wanted.mask}")
    old = len(known)
    require(found.logprobs[:old] == known.logprobs, f"{name}: {found} was {known}")
    off = np.abs(np.subtract(found.logprobs, wanted.logprobs))
    bad = off > LOGPROB_ERROR * (1 + np.abs(wanted.logprobs))
    require(not bad.any(), f"{name}: log-probabilities of {found}, not {wanted}")
    reasons = [OPEN if wanted.state == OPEN else wanted.reason]
    if wanted.state == "asked":
        given = row.answers.get(found.tokens, [])
        reasons = [OPEN] + [wanted.reason] * (None in given) + [TOOL] * (TOOL in given)
    require(
        found.reason in reasons,
        f"{name}: {found} ends by {found.reason}, not {reasons}",
    )
    if found.versions is None:
        return
    require(found.versions[:old] == known.versions, f"{name}: {found} was {known}")
    allowed = terms.versions if row.is_vague else terms.versions[-1:]
    for version, is_sampled in list(
        zip(found.versions, found.mask, strict=True)
    )[old:]:  # fmt: skip
        right = version in allowed if is_sampled else version == NONE
        require(right, f"{name}: versions of {found}, of {allowed}")
