"""Rewards: functions that score a completion, and how a run names one of them.

A reward is a function `reward(completion, answer, *, finished) -> float`. It is given
the decoded completion without its end token, the "answer" of the data file (any text,
which the function may read as it likes), and whether the policy ended the completion
itself. The two rewards here compare final answers.
"""

from __future__ import annotations

import math
import numbers
import re
import traceback
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from train.settings import import_function


class Reward(Protocol):
    """A function that scores a completion."""

    def __call__(self, completion: str, answer: str, *, finished: bool) -> float:
        """Return the score."""
        ...


def score(reward: Reward, completion: str, answer: str, *, finished: bool) -> float:
    """Return the reward of a completion as a Python number.

    Raises:
      ValueError: the reward raised something, or returned anything but a finite number.
    """
    try:
        found: Any = reward(completion, answer, finished=finished)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"the reward raised {type(error).__name__}: {error} ({last.filename}, line "
            f"{last.lineno})"
        ) from error
    # NumPy, JAX and torch have numbers of their own.
    number = found.item() if getattr(found, "shape", None) == () else found
    if not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise ValueError(f"the reward returned {found!r}; let it return a number")
    return float(number)


NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def exact_match(completion: str, answer: str, *, finished: bool) -> float:
    """Return 1 for a finished completion that equals the answer, outer spaces aside.

    Example:
      >>> exact_match(" Paris\\n", "Paris", finished=True)
      1.0
    """
    return float(finished and completion.strip() == answer.strip())


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text; None if there is none.

    Example:
      >>> last_number("so it is $1,234.50.")
      Decimal('1234.50')
    """
    found = NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None


def numeric_answer(completion: str, answer: str, *, finished: bool) -> float:
    """Return 1 for a finished completion whose last number is the answer's last number.

    Example:
      >>> numeric_answer("18 - 6 = 12, so 12.0", "#### 12", finished=True)
      1.0
    """
    wanted = last_number(answer)
    return float(finished and wanted is not None and last_number(completion) == wanted)


def reward_of(name: str) -> Reward:
    """Import a reward by its path.

    Args:
      name: "module:function".
    Raises:
      ValueError: there is no such function.
    """
    return import_function("reward", name, "train.rewards:numeric_answer")
