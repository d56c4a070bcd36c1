"""What a rollout says it did: counts by hand, the text, the picture."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from er_jax import RolloutStats
from er_jax.stats import PHASES, Moment


def moment(second: float, gamma: int, live: int, after: int, rows: int = 8) -> Moment:
    return Moment(
        second=second,
        duration_s=0.5,
        live=live,
        num_live_after=after,
        rows=rows,
        cache_length=64,
        gamma=gamma,
        num_rounds=10,
    )


@pytest.fixture
def stats() -> RolloutStats:
    """Three windows: 80 + 40 plain tokens, then 25 from 10 row-rounds of 3 drafts."""
    made = RolloutStats()
    made.add_window(moment(0.0, 0, 8, 4), 80, np.array([80]))
    made.add_window(moment(0.5, 0, 4, 2, rows=4), 40, np.array([40]))
    made.add_window(moment(1.5, 3, 2, 0, rows=2), 25, np.array([2, 1, 3, 4]))
    made.seconds["compile"] = 2.0
    made.seconds["host"] = 0.5
    made.num_prefilled, made.num_cloned = 3, 5
    made.compiled = [("window(8, 64, 0)", 1.25), ("window(2, 64, 3)", 0.75)]
    return made


def test_windows_are_added_up(stats: RolloutStats) -> None:
    assert stats.tokens == {0: 120, 3: 25}
    assert stats.rounds == {0: 120, 3: 10}
    np.testing.assert_array_equal(stats.accepted[0], [120])
    np.testing.assert_array_equal(stats.accepted[3], [2, 1, 3, 4])
    assert stats.num_tokens == 145
    assert stats.seconds["windows"] == pytest.approx(1.5)
    assert stats.total_s == pytest.approx(4.0)
    assert [m.gamma for m in stats.timeline] == [0, 0, 3]
    assert set(stats.seconds) == set(PHASES)


def test_what_was_given_is_not_kept() -> None:
    made = RolloutStats()
    histogram = np.array([1, 2])
    made.add_window(moment(0, 1, 2, 2), 5, histogram)
    made.add_window(moment(1, 1, 2, 2), 5, histogram)
    histogram[:] = 0
    np.testing.assert_array_equal(made.accepted[1], [2, 4])
    assert RolloutStats().seconds is not RolloutStats().seconds


def test_keep_rate(stats: RolloutStats) -> None:
    """1 + 2 x 3 + 3 x 4 of 3 x 10 drafts."""
    assert stats.keep_rate(3) == pytest.approx(19 / 30)
    assert math.isnan(stats.keep_rate(0))
    assert math.isnan(stats.keep_rate(5))
    empty = RolloutStats()
    empty.add_window(moment(0, 2, 1, 1), 0, np.zeros(3, int))
    assert math.isnan(empty.keep_rate(2))


def test_summary_is_what_people_read(stats: RolloutStats) -> None:
    assert stats.summary().splitlines() == [
        "145 tokens in 4.00 s (72 tokens/s without compilation)",
        "time: windows 1.50 s (38 %), compile 2.00 s (50 %), host 0.50 s (12 %)",
        "gamma 0: 120 tokens in 120 row-rounds, 1.00 tokens per round",
        "gamma 3: 25 tokens in 10 row-rounds, 2.50 tokens per round, "
        "63.3 % of drafts kept",
        "prompts: 3 prefilled, 5 completions started from entries already there",
        "compiled 2 programs: window(8, 64, 0) 1.2 s, window(2, 64, 3) 0.8 s",
    ]


def test_summary_of_nothing() -> None:
    text = RolloutStats().summary()
    assert text.startswith("0 tokens")
    assert "nan" not in text


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot_draws_the_batch(stats: RolloutStats, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rollout.{ending}"
    stats.plot(path)
    drawn = path.read_bytes()
    assert len(drawn) > 5_000
    if ending == "png":
        assert drawn.startswith(b"\x89PNG")
    else:
        text = drawn.decode()
        # Text in an SVG is drawn as shapes, and named in comments.
        comments = re.findall(r"<!-- (.*?) -->", text)
        for words in (
            "gamma 0 (AR)",
            "gamma 3",
            "live rows",
            "seconds",
            "145 tokens, 4.0 s",
        ):
            assert words in comments
        # One shade per gamma, and they can be told apart: windows, then the legend.
        shades = re.findall(r"style=\"fill: (#[0-9a-f]{6})", text)
        grey = [s for s in shades if s[1:3] == s[3:5] == s[5:7] and s != "#ffffff"]
        assert len(set(grey)) == 2


def test_plot_of_nothing(tmp_path: Path) -> None:
    RolloutStats().plot(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 1_000


def test_plot_without_matplotlib_says_what_to_install() -> None:
    program = """
import sys
sys.modules["matplotlib"] = None
import er_jax
try:
    er_jax.RolloutStats().plot("never.png")
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True
    )
    assert "pip install 'er-jax[plot]'" in done.stdout, done.stderr
