"""The settings of a rollout (`RolloutConfig`), and the draft lengths of a control."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from er_jax.acceptance import ACCEPT_RULES, AcceptRule
from er_jax.arguments import MOST, is_number, is_whole, whole_numbers
from er_jax.drafter import DrafterConfig, drafter_configs
from er_jax.kernels.choice import ATTENTION_CHOICES, AttentionChoice
from er_jax.types import (
    LogprobKind,
)

DEFAULT_GAMMAS = (0, 2, 4, 6, 8)


def parse_control(control: str, gammas: Sequence[int]) -> tuple[int, ...]:
    """Return the gammas a control string allows.

    Args:
      control: "best", "paper", "ar" or "fixed:g".
      gammas: draft lengths that "best" may choose from.
    Returns:
      Sorted gammas; for "paper", 0 and the published ladder.
    Raises:
      ValueError: an unknown control, a gamma below 0, or gammas without 0.
    """
    remedy = "use 'best', 'paper', 'ar' or 'fixed:g' with a whole number g >= 0"
    gammas = whole_numbers("gammas", gammas)
    if not isinstance(control, str):
        raise ValueError(f"control={control!r} must be a string; {remedy}")
    if control == "ar":
        return (0,)
    if control == "paper":
        return (0, *PAPER_LADDER)
    if control.startswith("fixed:"):
        digits = control.removeprefix("fixed:")
        if not digits.isdecimal():
            raise ValueError(f"control={control!r} names no draft length; {remedy}")
        return (int(digits),)
    if control != "best":
        raise ValueError(f"control={control!r} is unknown; {remedy}")
    if any(gamma < 0 for gamma in gammas):
        raise ValueError(f"gammas={tuple(gammas)!r} must all be at least 0")
    if 0 not in gammas:
        raise ValueError(
            f"gammas={tuple(gammas)!r} must contain 0 (plain decoding), for batches "
            "that speculation slows down; add 0, or force one length with "
            "control='fixed:g'"
        )
    return tuple(sorted(set(gammas)))


PerPrompt: TypeAlias = Any
"""A sequence or flat array of numbers, one for each prompt; kept as a tuple."""

COUNTS = ("max_new_tokens", "n", "max_slots")

# Settings that may be one value for each prompt.
PER_PROMPT = (
    *("max_new_tokens", "min_new_tokens"),
    *("temperature", "top_k", "top_p", "min_p"),
)

MOST_BIAS = float(np.finfo(np.float32).max)

PAPER_LADDER = (5, 7, 9, 11)
LOGPROB_KINDS = tuple(kind.name.lower() for kind in LogprobKind)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """The settings of a rollout.

    Programs are compiled for the largest `max_new_tokens`, `max_slots`, `accept`,
    `attention`, `drafter` and the gammas that `control` allows. Changing anything else
    between calls compiles nothing, once there is a program with what is asked for:
    top-k or top-p, sampling settings of single prompts, anything added to logits.

    `max_new_tokens`, `min_new_tokens`, `temperature`, `top_k`, `top_p` and `min_p` are
    one value for all prompts, or an array or sequence of P values, one for the n
    completions of each.

    Args:
      max_new_tokens: limit of each completion in tokens, >= 1.
      n: completions per prompt, >= 1.
      temperature: >= 0; 0 is greedy.
      top_k: keep the k most likely tokens; 0 is off.
      top_p: keep the most likely tokens up to this probability mass, in (0, 1]; 1 is
        off.
      min_p: drop tokens less likely than this times the most likely, in [0, 1]; 0 is
        off.
      stop_token_ids: the first of these ends a completion and is part of it.
      min_new_tokens: tokens at the beginning of a completion, >= 0, that are drawn from
        tokens other than `stop_token_ids`, and at which no stop sequence ends it. A
        completion that stops is longer.
      stop_sequences: several tokens each; when one of them has been sampled, the
        completion ends with it. Tokens of the prompt do not count. One of a single
        token is a stop id.
      banned_ids: tokens that are never drawn.
      logit_bias: number added to the logit of a token, by token; the result is divided
        by the temperature.
      pad_id: fills `prompt_ids` and `completion_ids` outside their masks.
      accept: "coupled" (replayable), "token" or "block"; all are exact.
      gammas: draft lengths the controller may choose from; must contain 0.
      control: "best", "paper" (the published rule), "ar" or "fixed:g".
      logprobs: "raw" (the model's own distribution), "temperature" (after temperature,
        before truncation: what RL trainers recompute) or "processed" (what is sampled).
        Bias, banned tokens and `min_new_tokens` are in the last alone.
      max_slots: rows decoded at once, >= 1.
      attention: "auto" (the kernel of the platform, where there is one and it passes
        its check on the device), "xla" (never a kernel) or "kernel" (an error where
        there is none, or it fails). Where a kernel does not take the shapes or dtypes
        of a policy, XLA's form is used in any case, and the log says why.
      drafter: how to derive a draft when `params` has none, and what drafts see. A
        tuple of configs makes several drafts, as of 8 and of 4 bits, which "best"
        chooses from; any other control uses the first.
    Raises:
      ValueError: a wrong argument; it names the value, the limit and the remedy.
    """

    max_new_tokens: int | PerPrompt
    n: int = 1
    temperature: float | PerPrompt = 1.0
    top_k: int | PerPrompt = 0
    top_p: float | PerPrompt = 1.0
    min_p: float | PerPrompt = 0.0
    stop_token_ids: tuple[int, ...] = ()
    pad_id: int = 0
    accept: AcceptRule = "coupled"
    gammas: tuple[int, ...] = DEFAULT_GAMMAS
    control: str = "best"
    logprobs: str = "temperature"
    max_slots: int = 64
    attention: AttentionChoice = "auto"
    drafter: DrafterConfig | tuple[DrafterConfig, ...] = dataclasses.field(
        default_factory=DrafterConfig
    )
    min_new_tokens: int | PerPrompt = 0
    stop_sequences: Sequence[Sequence[int]] = ()
    banned_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in (*COUNTS, "min_new_tokens", "top_k", "pad_id"):
            self._set_each(name, _whole_number)
        for name in ("temperature", "top_p", "min_p"):
            self._set_each(name, _real_number)
        for name in ("gammas", "stop_token_ids", "banned_ids"):
            # A tuple of Python ints can be hashed and written to a file.
            numbers = whole_numbers(name, getattr(self, name))
            object.__setattr__(self, name, numbers)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        sequences = _stop_sequences(self.stop_sequences)
        object.__setattr__(self, "stop_sequences", sequences)
        if not isinstance(self.drafter, DrafterConfig):
            # A tuple can be hashed.
            object.__setattr__(self, "drafter", drafter_configs(self.drafter))
        for name in COUNTS:
            for own_name, value in self._each(name):
                if value < 1:
                    raise ValueError(f"{own_name}={value} must be at least 1")
        ranges: tuple[tuple[str, float, float, str], ...] = (
            ("temperature", 0.0, math.inf, "use 0 for greedy decoding"),
            ("top_k", 0, math.inf, "use 0 to switch it off"),
            ("min_new_tokens", 0, math.inf, "use 0 to let completions stop at once"),
            ("min_p", 0.0, 1.0, "use 0 to switch it off"),
        )
        for name, low, high, remedy in ranges:
            for own_name, value in self._each(name):
                if not low <= value <= high or value == math.inf:
                    raise ValueError(
                        f"{own_name}={value} must be from {low} to {high}; {remedy}"
                    )
        for name, value in self._each("top_p"):
            if not 0 < value <= 1:
                raise ValueError(
                    f"{name}={value} must be above 0 and at most 1; use 1 to switch it "
                    "off"
                )
        self._check_counts()
        for name, known in (
            ("accept", ACCEPT_RULES),
            ("logprobs", LOGPROB_KINDS),
            ("attention", ATTENTION_CHOICES),
        ):
            value = getattr(self, name)
            if value not in known:
                names = ", ".join(repr(word) for word in known)
                raise ValueError(f"{name}={value!r} is unknown; use one of {names}")
        parse_control(self.control, self.gammas)

    def _set_each(self, name: str, one: Callable[[str, Any], Any]) -> None:
        """Make a setting Python numbers, which are hashable and fit into a file."""
        value: Any = getattr(self, name)
        if name in PER_PROMPT and _is_several(value):
            values = np.asarray(value).tolist() if hasattr(value, "ndim") else value
            found: Any = tuple(one(f"{name}[{i}]", x) for i, x in enumerate(values))
        else:
            found = one(name, value)
        object.__setattr__(self, name, found)

    def _each(self, name: str) -> list[tuple[str, Any]]:
        """Return the values of a setting with their names for messages."""
        value = getattr(self, name)
        if not isinstance(value, tuple):
            return [(name, value)]
        return [(f"{name}[{i}]", x) for i, x in enumerate(value)]

    def _check_counts(self) -> None:
        """Refuse settings of single prompts that are not of as many prompts."""
        first: tuple[str, int] | None = None
        for name in PER_PROMPT:
            value = getattr(self, name)
            if not isinstance(value, tuple):
                continue
            first = first or (name, len(value))
            if not value or len(value) != first[1]:
                raise ValueError(
                    f"{name} has {len(value)} values, and {first[0]} {first[1]}; give "
                    "one for each prompt, or one number for all"
                )
        least, most = np.broadcast_arrays(self.min_new_tokens, self.max_new_tokens)
        if (least > most).any():
            index = int(np.argmax(least > most))
            raise ValueError(
                f"min_new_tokens={least.flat[index]} must be no more than "
                f"max_new_tokens={most.flat[index]}; lower it"
            )

    @property
    def num_prompts(self) -> int | None:
        """The number of prompts that settings are given for; None without any."""
        values = (getattr(self, name) for name in PER_PROMPT)
        return next((len(v) for v in values if isinstance(v, tuple)), None)

    @property
    def most_new_tokens(self) -> int:
        """The limit of the prompt with the largest; the width of the result."""
        return max(value for _, value in self._each("max_new_tokens"))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The stop ids, and the stop sequences of a single token."""
        single = (tokens[0] for tokens in self.stop_sequences if len(tokens) == 1)
        return tuple(dict.fromkeys([*self.stop_token_ids, *single]))

    @property
    def is_biased(self) -> bool:
        """Whether tokens are drawn from other logits than the model's."""
        has_early = bool(self.stop_ids) and bool(np.max(self.min_new_tokens) > 0)
        return bool(self.logit_bias or self.banned_ids or has_early)

    def of_prompts(self, prompts: Sequence[int]) -> RolloutConfig:
        """Return the settings of some of the prompts.

        Args:
          prompts: their numbers, 0 .. P-1.
        Raises:
          ValueError: a number of no prompt that there are settings for.
        """
        count = self.num_prompts
        for prompt in prompts:
            if count is not None and not is_whole(prompt, 0, count - 1):
                raise ValueError(
                    f"prompts holds {prompt!r}, and there are settings of {count} "
                    f"prompts; give numbers from 0 to {count - 1}"
                )
        values = {name: getattr(self, name) for name in PER_PROMPT}
        own: dict[str, Any] = {
            name: tuple(value[prompt] for prompt in prompts)
            for name, value in values.items()
            if isinstance(value, tuple)
        }
        return dataclasses.replace(self, **own) if own else self

    def of_sequences(
        self, name: str, num_prompts: int, dtype: Any = None
    ) -> np.ndarray:
        """Return the value of a setting for each completion, `[P * n]`."""
        values = np.asarray(getattr(self, name), dtype)
        return np.repeat(np.broadcast_to(values, num_prompts), self.n)

    @property
    def drafters(self) -> tuple[DrafterConfig, ...]:
        """The configs of all drafts."""
        return drafter_configs(self.drafter)


def _is_several(value: Any) -> bool:
    """Whether a value is a flat array, or another sequence of values."""
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return is_sequence or getattr(value, "ndim", None) == 1


def _stop_sequences(value: Any) -> tuple[tuple[int, ...], ...]:
    """Return sequences of tokens as tuples; `ValueError` for anything else."""
    is_several = isinstance(value, Iterable) and not isinstance(value, str | bytes)
    if not is_several:
        raise ValueError(
            f"stop_sequences={value!r} must be several sequences of token ids; give a "
            "tuple of them, as ((7, 2),)"
        )
    found = []
    for i, tokens in enumerate(value):
        found.append(whole_numbers(f"stop_sequences[{i}]", tokens))
        if not found[-1]:
            raise ValueError(
                f"stop_sequences[{i}] is empty and would end every completion; leave "
                "it out"
            )
    return tuple(found)


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Return pairs of token and bias, ascending; `ValueError` for anything else."""
    try:
        pairs = dict(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"logit_bias={value!r} must be a mapping from tokens to numbers, as {{7: "
            "-2.5}"
        ) from error
    found: dict[int, float] = {}
    for token, bias in pairs.items():
        number = _real_number(f"logit_bias[{token!r}]", bias)
        if not abs(number) <= MOST_BIAS:
            raise ValueError(
                f"logit_bias[{token!r}]={number} must be finite and within float32; "
                "use banned_ids to ban a token"
            )
        found[_whole_number(f"token {token!r} of logit_bias", token)] = number
    return tuple(sorted(found.items()))


def _whole_number(name: str, value: Any) -> int:
    """Return a whole number as a Python int; `ValueError` for anything else."""
    if not is_whole(value, -MOST - 1, MOST):
        raise ValueError(f"{name}={value!r} must be a whole number of type int32")
    return int(value)


def _real_number(name: str, value: Any) -> float:
    """Return a number as a Python float; `ValueError` for anything else."""
    if not is_number(value):
        raise ValueError(f"{name}={value!r} must be a number such as 0.7")
    return float(value)
