"""Tools: functions that a policy calls in the middle of its completions.

A tool is a function `tool(text) -> str | None`. When the policy has written the text
that calls it, it is given the completion so far, and what it returns is appended; the
policy goes on behind that. None ends the completion. Only tokens that the policy has
sampled are learnt from.

Left out: how a rollout waits for answers (`er_jax.Respond`).
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple, Protocol

import er_jax
from train.config import ToolConfig
from train.settings import import_function, require
from train.tasks import AnyTokenizer

CALCULATION = re.compile(r"([0-9]{1,9})([+-])([0-9]{1,9})=$")


class Tool(Protocol):
    """A function that a policy calls."""

    def __call__(self, text: str) -> str | None:
        """Return what to append to a completion; None, or no text, to end it."""
        ...


def calculator(text: str) -> str | None:
    """Return the sum or the difference that a text ends with, None if it has none.

    Example:
      >>> calculator("a+2:7+2=")
      '9'
      >>> calculator("a+2:7+=") is None
      True
    """
    found = CALCULATION.search(text)
    if found is None:
        return None
    first, sign, second = found.groups()
    return str(int(first) + int(sign + second))


class Use(NamedTuple):
    """How rollouts use a tool.

    call_ids: the token ids that call it: those whose text ends with its text.
    respond: answers the turns that they end.
    """

    call_ids: tuple[int, ...]
    respond: er_jax.Respond


def use_of(config: ToolConfig, tokenizer: AnyTokenizer) -> Use | None:
    """Return how rollouts use a tool; None if there is none.

    Raises:
      ValueError: it cannot be imported, or no token calls it.
    """
    if config.function is None:
        return None
    example = "train.tools:calculator"
    tool: Tool = import_function("tool.function", config.function, example)
    call_ids = tuple(
        token
        for token in range(tokenizer.vocab_size)
        if tokenizer.decode([token]).endswith(config.called_by)
    )
    require(
        bool(call_ids),
        "tool.called_by",
        config.called_by,
        "no token of the vocabulary ends with it; give the text of a single token",
    )
    respond = er_jax.Respond(
        functools.partial(_answer, tool, tokenizer, frozenset(call_ids)),
        timeout_s=config.timeout_s,
        max_turns=config.max_calls + 1,
    )
    return Use(call_ids, respond)


def _answer(
    tool: Tool,
    tokenizer: AnyTokenizer,
    calls: frozenset[int],
    sequence_id: int,
    turn: er_jax.Turn,
) -> list[int] | None:
    """Answer a turn: with what the tool says, if it was called."""
    if int(turn.completion_ids[-1]) not in calls:
        return None  # The policy has ended the completion.
    found = tool(tokenizer.decode(turn.completion_ids))
    # An answer that is cut leaves no room to go on: the completion reaches its limit.
    return None if not found else tokenizer.encode(found)[: turn.room]
