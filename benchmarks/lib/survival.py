"""What must survive the end of a process, and what must never happen again.

What is kept of a completion is read from what a call returned or, where there is
nothing of that, from its journal. From life to life it may only grow; in float64, it is
at any time a beginning of what a rollout gives that nothing disturbed.

Left out: where the files come from (`life_process`), and ties (`agreement`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.known import LENGTH, OPEN, require
from er_jax import Completion, Rollout
from er_jax.journal_format import contents_of, joined
from er_jax.result import NOTHING

LOGPROB_ERROR = 1e-5


@dataclasses.dataclass(frozen=True)
class Kept:
    """A completion, as far as it goes.

    tokens, versions: int32 `[length]`. logprobs: float32. mask: bool, sampled tokens.
    reason: why it ended, or "unfinished".
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    mask: np.ndarray
    versions: np.ndarray
    reason: str

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.reason != OPEN

    def __len__(self) -> int:
        return len(self.tokens)

    def as_completion(self) -> Completion:
        """Return it without versions."""
        return Completion(self.tokens, self.logprobs, self.reason, self.mask)


def nothing(count: int) -> list[Kept]:
    """Return completions without a token."""
    return [_of(NOTHING, np.zeros(0, np.int32))] * count


def _of(found: Completion, versions: np.ndarray) -> Kept:
    return Kept(
        found.token_ids, found.logprobs, found.mask, versions, found.finish_reason
    )


def of_rollout(out: Rollout) -> list[Kept]:
    """Return the completions of a rollout."""
    return [
        Kept(
            tokens=out.completion_ids[row, :length],
            logprobs=out.logprobs[row, :length],
            mask=out.completion_mask[row, :length],
            versions=out.version[row, :length],
            reason=str(out.finish_reason[row]),
        )
        for row, length in enumerate(out.lengths.tolist())
    ]


def of_journal(path: Path, resumed: Sequence[Kept]) -> list[Kept]:
    """Return the completions that a journal holds.

    Args:
      path: of the file, which may not be there. resumed: what the call that wrote it
        went on with.
    """
    found = list(resumed)
    if not path.exists():
        return found
    contents = contents_of(path.read_bytes())
    require(not contents.damaged, f"damaged at {contents.damaged}, by a kill")
    for row, before in enumerate(resumed):
        pieces = [piece for piece in contents.pieces if piece.row == row]
        if pieces:
            known = joined(before.as_completion(), before.versions, pieces)
            found[row] = _of(*known)
    return found


def as_resumed(known: Sequence[Kept], limits: Sequence[int]) -> list[Kept]:
    """Return completions as `resume` takes them, without their journal.

    One that ended by length before its limit, at a turn that got no answer, is asked
    about again.

    Args:
      known: completions. limits: in tokens, of each.
    """
    return [
        dataclasses.replace(kept, reason=OPEN)
        if kept.reason == LENGTH and len(kept) < limit
        else kept
        for kept, limit in zip(known, limits, strict=True)
    ]


@dataclasses.dataclass
class Survival:
    """What is known of a chain's completions, and how far they are off.

    wanted: the undisturbed ones. is_exact: whether every token must be theirs, or a tie
      may have fallen otherwise.
    known: after the last life. worst: the largest difference of log-probabilities.
    """

    wanted: Sequence[Kept]
    is_exact: bool
    known: Sequence[Kept] = ()
    worst: float = 0.0

    def __post_init__(self) -> None:
        self.known = nothing(len(self.wanted))

    @property
    def is_over(self) -> bool:
        """Whether all completions have ended."""
        return all(kept.is_over for kept in self.known)

    @property
    def num_kept(self) -> int:
        """Tokens that are known."""
        return sum(map(len, self.known))

    def hold(self, found: Sequence[Kept], version: int) -> None:
        """Take what a life has left, and hold it.

        Args:
          found: its completions. version: of the life.
        Raises:
          Difference: something is lost, sampled again, or another.
        """
        for row, (was, now) in enumerate(zip(self.known, found, strict=True)):
            self._hold_kept(f"completion {row}", was, now, version)
            self._hold_wanted(f"completion {row}", self.wanted[row], now)
        self.known = list(found)

    def _hold_kept(self, name: str, was: Kept, now: Kept, version: int) -> None:
        old = len(was)
        require(len(now) >= old, f"{name}: {len(now)} tokens are left of {old}")
        for field in ("tokens", "logprobs", "mask", "versions"):
            before, after = getattr(was, field), getattr(now, field)[:old]
            require(
                np.array_equal(before, after),
                f"{name}: {field} were {before.tolist()}, and are {after.tolist()}",
            )
        if was.is_over:
            is_same = (len(now), now.reason) == (old, was.reason)
            require(is_same, f"{name}: had ended by {was.reason}, and goes on")
        new = np.where(now.mask, version, -1)[old:]
        require(
            np.array_equal(now.versions[old:], new),
            f"{name}: versions {now.versions.tolist()}, of which {old} are old",
        )

    def _hold_wanted(self, name: str, wanted: Kept, now: Kept) -> None:
        length = min(len(now), len(wanted))
        same = now.tokens[:length] == wanted.tokens[:length]
        if self.is_exact:
            require(
                len(now) <= len(wanted) and same.all(),
                f"{name}: {now.tokens.tolist()}, not {wanted.tokens.tolist()}",
            )
            require(np.array_equal(now.mask, wanted.mask[:length]), f"{name}: its mask")
            if now.is_over:
                is_same = (len(now), now.reason) == (len(wanted), wanted.reason)
                require(is_same, f"{name}: ended by {now.reason} at {len(now)}")
        else:
            length = int(np.argmin(same)) if not same.all() else length
        off = np.abs(now.logprobs[:length] - wanted.logprobs[:length])
        self.worst = max(self.worst, float(off.max(initial=0.0)))
        require(
            self.worst <= LOGPROB_ERROR, f"{name}: log-probabilities {self.worst} off"
        )

    def is_same(self) -> bool:
        """Whether all tokens are those wanted; in float32 a tie may make them others.

        Raises:
          Difference: a completion has not ended.
        """
        require(self.is_over, "unfinished at the end")
        return all(
            np.array_equal(now.tokens, wanted.tokens) and now.reason == wanted.reason
            for now, wanted in zip(self.known, self.wanted, strict=True)
        )


def hold_told(
    told: Sequence[Mapping[str, Any]],
    was: Sequence[Kept],
    now: Sequence[Kept],
    resumed: Sequence[Kept],
    *,
    is_whole: bool,
) -> None:
    """Hold what `on_finish` and the tool were told in a life.

    Args:
      told: in order. was, now: completions before and after it.
      resumed: of what the call was given to resume; nobody is told of these again.
      is_whole: whether the life ran to the end.
    Raises:
      Difference: somebody was told twice, or of something else, or never.
    """
    finished: dict[int, list[int]] = {}
    for what in told:
        if "finished" in what:
            row = what["finished"]
            require(row not in finished, f"completion {row} finished twice in a life")
            require(
                not resumed[row].is_over, f"completion {row} was over, and is told of"
            )
            finished[row] = what["tokens"]
            require(
                not was[row].is_over or was[row].tokens.tolist() == what["tokens"],
                f"completion {row} was {was[row].tokens.tolist()}, and is told of as "
                f"{what['tokens']}",
            )
        elif "asked" in what:
            row, tokens = what["asked"], what["tokens"]
            known = was[row].tokens.tolist()
            is_new = not was[row].is_over and tokens[: len(known)] == known
            require(is_new, f"completion {row}: {tokens} is asked about behind {known}")
    if is_whole:
        wanted = {row for row, kept in enumerate(resumed) if not kept.is_over}
        require(
            set(finished) == wanted,
            f"told of {sorted(finished)} as finished, not of {sorted(wanted)}",
        )
        for row, tokens in finished.items():
            require(
                now[row].tokens.tolist() == tokens,
                f"completion {row} is {now[row].tokens.tolist()}, and was told of as "
                f"{tokens}",
            )


def hold_counts(
    ended: Mapping[str, Any], was: Sequence[Kept], now: Sequence[Kept], version: int
) -> None:
    """Hold the statistics of a call that returned.

    Args:
      ended: what it counted. was, now: completions before and after it.
      version: of its tokens.
    Raises:
      Difference: it sampled more or fewer tokens than there are.
    """
    kept = sum(map(len, was))
    require(ended["resumed"] == kept, f"{ended['resumed']} tokens resumed of {kept}")
    new = sum(int((one.versions == version).sum()) for one in now)
    # A window that an interrupt has cut off gives no tokens, and counts none.
    require(
        ended["sampled"] == new, f"{ended['sampled']} tokens sampled, and {new} are new"
    )


def hold_noted(noted: Sequence[Kept], now: Sequence[Kept]) -> None:
    """Hold the journal of a call that has returned: all that there is.

    Args:
      noted: completions of the file. now: those returned.
    Raises:
      Difference: the journal has less, or something else.
    """
    for row, (own, kept) in enumerate(zip(noted, now, strict=True)):
        require(
            np.array_equal(own.tokens, kept.tokens) and own.reason == kept.reason,
            f"completion {row}: the journal has {own.tokens.tolist()}, {own.reason}, "
            f"and returned was {kept.tokens.tolist()}, {kept.reason}",
        )
