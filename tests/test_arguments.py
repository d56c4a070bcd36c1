"""Numbers that callers give: what is refused, and by which words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from er_jax.arguments import (
    MOST,
    check_chance,
    check_gammas,
    check_number,
    check_whole,
)
from er_jax.tools.survey import survey
from er_jax.types import Program


@pytest.mark.parametrize("value", [1, MOST, np.int64(3), np.uint8(9)])
def test_whole_numbers(value: Any) -> None:
    check_whole("slots", value)


@pytest.mark.parametrize(
    "value",
    [0, -1, MOST + 1, 10**30, True, np.bool_(True), 1.0, 2.5, math.nan, "1", None, [1],
     np.float32(2)],
)  # fmt: skip
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"slots=.* must be a whole number from 1 to"):
        check_whole("slots", value)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.25), np.int32(1)])
def test_chances(value: Any) -> None:
    check_chance("keep", value)


@pytest.mark.parametrize(
    "value",
    [-1e-9, 1.1, 5, math.nan, math.inf, -math.inf, True, "1", None, 10**400, 1j,
     np.float32("nan")],
)  # fmt: skip
def test_what_is_no_chance(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"keep=.* must be a chance, a number of 0 to 1"
    ):
        check_chance("keep", value)


def test_seconds() -> None:
    check_number("budget", 1e9, 0, math.inf, "seconds")
    for value in (-1, math.nan, math.inf):
        message = f"budget={value} must be seconds, a number of 0 or more"
        with pytest.raises(ValueError, match=message):
            check_number("budget", value, 0, math.inf, "seconds")


@pytest.mark.parametrize(
    ("gammas", "message"),
    [
        ((), "gammas is empty; give one draft length or more"),
        ((0, -1), r"gammas=\(0, -1\) must all be whole numbers from 0 to 1024"),
        ([2, 2.5], r"gammas=\(2, 2.5\) must all be whole numbers"),
        ((1025,), r"gammas=\(1025,\) must all be whole numbers from 0 to 1024"),
        ((False,), r"gammas=\(False,\) must all be whole numbers"),
    ],
)
def test_gammas(gammas: Any, message: str) -> None:
    check_gammas((0, 4, 1024))
    check_gammas(range(13))
    with pytest.raises(ValueError, match=message):
        check_gammas(gammas)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": [1, 0]}, "rows=0 must be"),
        ({"lengths": [0]}, "lengths=0 must be"),
        ({"lengths": [64.5]}, "lengths=64.5 must be"),
        ({"gammas": [-1, 4]}, r"gammas=\(-1, 4\) must all be"),
        ({"keep_prob": 5}, "keep_prob=5 must be a chance"),
        ({"keep_prob": math.nan}, "keep_prob=nan must be a chance"),
        ({"budget_s": -1}, "budget_s=-1 must be seconds"),
        ({"budget_s": math.nan}, "budget_s=nan must be seconds"),
    ],
)
def test_a_survey_refuses_before_it_measures(
    wrong: dict[str, Any], message: str
) -> None:
    def measured(program: Program) -> float:
        raise AssertionError("measured")

    given: dict[str, Any] = {"rows": [1], "lengths": [64], "gammas": [0, 4], **wrong}
    with pytest.raises(ValueError, match=message):
        survey(measured, **given, spent_s=lambda: 0.0)
