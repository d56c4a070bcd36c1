"""Rewards by the final answer, and rewards named by path."""

from __future__ import annotations

import pytest

from train import rewards


@pytest.mark.parametrize(
    ("completion", "answer", "finished", "score"),
    [
        ("Paris", "Paris", True, 1.0),
        (" Paris\n", "Paris ", True, 1.0),
        ("paris", "Paris", True, 0.0),
        ("It is Paris", "Paris", True, 0.0),
        ("Paris", "Paris", False, 0.0),
    ],
)
def test_exact_match(
    completion: str, answer: str, finished: bool, score: float
) -> None:
    assert rewards.exact_match(completion, answer, finished=finished) == score


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("so the answer is 12", "12", 1.0),
        ("18 - 6 = 12.", "#### 12", 1.0),
        ("12.0", "12", 1.0),
        ("it costs $1,234.50", "1234.5", 1.0),
        ("\\boxed{-7}", "-7", 1.0),
        ("\\boxed{7}", "-7", 0.0),
        ("12 and then 13", "12", 0.0),  # the last one counts
        ("no number", "12", 0.0),
        ("12", "no number", 0.0),
        ("no number", "no number", 0.0),
    ],
)
def test_numeric_answer(completion: str, answer: str, score: float) -> None:
    assert rewards.numeric_answer(completion, answer, finished=True) == score
    assert rewards.numeric_answer(completion, answer, finished=False) == 0.0


def test_rewards_are_found_by_path() -> None:
    assert rewards.reward_of("train.rewards:exact_match") is rewards.exact_match


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numeric_answer", "names no function"),
        ("train.rewards:nothing", "cannot be imported .*nothing"),
        ("train.nothing:reward", "cannot be imported .*nothing"),
        ("train.rewards:NUMBER", "is no function"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewards.reward_of(name)
