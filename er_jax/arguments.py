"""Checks of single arguments: whole numbers, real numbers, chances, draft lengths.

Each raises a `ValueError` that names the argument, its value and what it must be. Left
out: arrays, contents of files, and checks that only one package needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# Positions, rows and counts are int32 on the device.
MOST = 2**31 - 1

# The most drafts of a round that are accepted as an argument; far fewer ever pay.
MOST_DRAFTS = 1024


def is_whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is a whole number from `low` to `high`; a bool is not."""
    is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_number and low <= int(value) <= high


def is_number(value: Any) -> bool:
    """Whether a value is a real number of Python or NumPy; a bool is not."""
    kinds = (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool)


def check_whole(name: str, value: Any, low: int = 1, high: int = MOST) -> None:
    """Refuse anything but a whole number from `low` to `high`."""
    if not is_whole(value, low, high):
        raise ValueError(
            f"{name}={value!r} must be a whole number from {low} to {high}"
        )


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """Return whole numbers as a tuple of Python ints; refuse anything else."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(
            f"{name}={values!r} must be several whole numbers; give a tuple, as "
            f"{name}=({values!r},)"
        )
    values = tuple(values)
    for i, value in enumerate(values):
        if not is_whole(value, -MOST - 1, MOST):
            raise ValueError(
                f"{name}[{i}]={value!r} must be a whole number of type int32"
            )
    return tuple(int(value) for value in values)


def check_number(name: str, value: Any, low: float, high: float, what: str) -> None:
    """Refuse anything but a finite number from `low` to `high`; `what` names it."""
    if not is_number(value) or not low <= value <= high or value == math.inf:
        limits = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
        raise ValueError(f"{name}={value!r} must be {what}, a number of {limits}")


def check_chance(name: str, value: Any) -> None:
    """Refuse anything but a probability, a number from 0 to 1."""
    check_number(name, value, 0, 1, "a chance")


def check_gammas(gammas: Sequence[Any], high: int = MOST_DRAFTS) -> None:
    """Refuse an empty list of draft lengths, and any length outside 0 to `high`."""
    if not len(gammas):
        raise ValueError("gammas is empty; give one draft length or more")
    for gamma in gammas:
        if not is_whole(gamma, 0, high):
            raise ValueError(
                f"gammas={tuple(gammas)!r} must all be whole numbers from 0 to {high}"
            )
