"""Traces: the lengths of a rollout's completions, and which drafts are kept.

Source: the lengths of `tail`, `capped` and `mixture` are fitted to what PolyTrace
(arXiv 2509.25279) reports of the verl DAPO 32B run, of DeepCoder 14B and of Intern-S1.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from er_jax.arguments import (
    MOST,
    check_chance,
    check_whole,
    is_whole,
)
from er_jax.result import Rollout

# Most tokens of a trace; `KeptDrafts` takes some thirty bytes for each.
MOST_TOKENS = 2**30


@dataclasses.dataclass(frozen=True)
class Trace:
    """Lengths of a rollout's completions, in the order in which they start.

    prompt_lengths, lengths: tokens, int `[N]`; every completion has at least one.
    """

    prompt_lengths: np.ndarray
    lengths: np.ndarray

    def __post_init__(self) -> None:
        if self.lengths.shape != self.prompt_lengths.shape or not len(self.lengths):
            raise ValueError(
                f"a trace of {len(self.lengths)} lengths and "
                f"{len(self.prompt_lengths)} prompt lengths; give one of each for "
                "every completion, at least one"
            )
        for name, values in vars(self).items():
            if not np.issubdtype(values.dtype, np.integer):
                raise ValueError(f"{name} of type {values.dtype} must be whole numbers")
        if self.lengths.min() < 1:
            raise ValueError(
                f"a completion of {self.lengths.min()} tokens; each has at least one"
            )
        if self.prompt_lengths.min() < 0:
            raise ValueError(
                f"a prompt of {self.prompt_lengths.min()} tokens; give 0 if it is not "
                "known"
            )
        total = self.lengths.sum(dtype=float)
        if total > MOST_TOKENS:
            raise ValueError(
                f"a trace of {total:.0f} tokens; at most {MOST_TOKENS} are replayed: "
                "give fewer completions, or shorter ones"
            )

    @classmethod
    def of(cls, out: Rollout) -> Trace:
        """Return the lengths of a rollout, to be saved or replayed."""
        return cls(
            prompt_lengths=out.prompt_mask.sum(axis=1).astype(int),
            lengths=out.lengths.astype(int),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object per completion: prompt_length, length."""
        with Path(path).open("w", encoding="utf-8") as file:
            for prompt, length in zip(self.prompt_lengths, self.lengths, strict=True):
                line = {"prompt_length": int(prompt), "length": int(length)}
                file.write(json.dumps(line) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Return the trace that `save` wrote; a missing prompt_length is 0.

        Raises:
          ValueError: not text, no completion, a line without a length, or a length that
            no completion can have.
          OSError: the file cannot be read.
        """
        found = []
        try:
            text = Path(path).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8 ({error})") from error
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            values = values if isinstance(values, dict) else {}
            prompt, length = values.get("prompt_length", 0), values.get("length")
            if not is_whole(prompt, 0, MOST) or not is_whole(length, 1, MOST):
                raise ValueError(
                    f'{path}, line {number}: {line[:60]!r} is not like {{"length": 12, '
                    f'"prompt_length": 5}}, whole numbers from 1 and 0 to {MOST}'
                )
            found.append((prompt, length))
        prompts, lengths = np.array(found or np.zeros((0, 2)), int).T
        try:
            return cls(prompt_lengths=prompts, lengths=lengths)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def tail_trace(num: int, *, cap: int, seed: int, prompt_length: int = 256) -> Trace:
    """Return mostly short completions with a few long ones.

    98.5 % are log-normal with median 460 and sigma 0.6, the rest with median 2700.
    """
    _check_sizes(num, cap, prompt_length)
    random = np.random.default_rng(seed)
    median = np.where(random.random(num) < 0.985, 460, 2700)
    lengths = median * np.exp(0.6 * random.standard_normal(num))
    return _trace(lengths, cap, prompt_length)


def capped_trace(
    num: int, *, cap: int, seed: int, group: int = 8, prompt_length: int = 256
) -> Trace:
    """Return long completions, many of them at the cap, with similar ones per prompt.

    For a cap of 16 000, the means of prompts are normal around 9400 with deviation
    4800, and completions around these with deviation 1800; all is scaled to `cap`.
    `group` is the number of completions of a prompt.
    """
    _check_sizes(num, cap, prompt_length)
    check_whole("group", group)
    random = np.random.default_rng(seed)
    means = 9400 + 4800 * random.standard_normal(-(-num // group))
    lengths = np.repeat(means, group)[:num] + 1800 * random.standard_normal(num)
    return _trace(lengths * cap / 16_000, cap, prompt_length)


def mixture_trace(num: int, *, cap: int, seed: int, prompt_length: int = 256) -> Trace:
    """Return lengths of four kinds of mathematics problems.

    For a cap of 32 000 they are normal around 4959, 12 720, 9175 and 17 655; all is
    scaled to `cap`.
    """
    _check_sizes(num, cap, prompt_length)
    random = np.random.default_rng(seed)
    kind = random.choice(4, num, p=[0.36 / 0.99, 0.07 / 0.99, 0.37 / 0.99, 0.19 / 0.99])
    means = np.array([4959, 12_720, 9175, 17_655])[kind]
    deviations = np.array([2192, 6067, 3416, 5267])[kind]
    lengths = means + deviations * random.standard_normal(num)
    return _trace(lengths * cap / 32_000, cap, prompt_length)


TRACES = {"tail": tail_trace, "capped": capped_trace, "mixture": mixture_trace}


def _check_sizes(num: int, cap: int, prompt_length: int) -> None:
    check_whole("num", num, 1, MOST_TOKENS)
    check_whole("cap", cap)
    check_whole("prompt_length", prompt_length, 0)


def _trace(lengths: np.ndarray, cap: int, prompt_length: int) -> Trace:
    lengths = np.clip(np.round(lengths), 1, cap).astype(int)
    return Trace(prompt_lengths=np.full(len(lengths), prompt_length), lengths=lengths)


class KeptDrafts:
    """Which drafts are kept, drawn in advance for every token of a trace.

    Args:
      trace: to draw for. keep_prob: chance that a draft is kept. seed: of the draws.
    Attributes:
      start: int `[N]`, index of each sequence's first token among all tokens.
      run: int `[tokens]`, drafts kept in a row from each token on.
    """

    def __init__(self, trace: Trace, keep_prob: float, seed: int) -> None:
        check_chance("keep_prob", keep_prob)
        check_whole("seed", seed, 0, 2**63)
        total = int(trace.lengths.sum())
        is_kept = np.random.default_rng(seed).random(total) < keep_prob
        self.start = np.concatenate([[0], np.cumsum(trace.lengths)[:-1]])
        # A run lasts up to the next rejected draft. It may extend into the next
        # sequence; the replay ends it at the end of its own.
        rejected = np.where(is_kept, total, np.arange(total))
        next_rejected = np.minimum.accumulate(rejected[::-1])[::-1]
        self.run = next_rejected - np.arange(total)
