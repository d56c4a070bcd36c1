"""Rollouts of two processes on one mesh that live: turns, ended early, gone on with."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import er_jax
from er_jax.journal_format import contents_of
from er_jax.stats import RolloutStats
from tests import test_turns
from tests.test_processes import TIME_LIMIT_S, start, wait

RANKS = (0, 1)


def begin(task: str, directory: Path) -> list[subprocess.Popen[bytes]]:
    words = (directory, task)
    return start(len(RANKS), directory, *words, module="tests.living_worker")


def run(task: str, directory: Path) -> list[Any]:
    """Return what the two processes found."""
    wait(begin(task, directory), directory)
    return [np.load(directory / f"{rank}.{task}.npz") for rank in RANKS]


def rollout_of(found: Any, name: str) -> er_jax.Rollout:
    fields = {
        key.partition(".")[2]: found[key]
        for key in found
        if key.startswith(f"{name}.") and found[key].ndim
    }
    for other in ("failed", "told"):
        fields.pop(other, None)
    return er_jax.Rollout(**fields, stats=RolloutStats())


@pytest.mark.slow
def test_turns_are_those_of_calls_turn_by_turn(tmp_path: Path, x64: None) -> None:
    first, second = run("turns", tmp_path)
    assert len(first["asked"]) and not len(second["asked"]), "the leader alone asks"
    for name in first:
        if name != "asked" and not name.endswith("told"):
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    for name in ("whole", "rest"):
        test_turns.assert_turn_by_turn(rollout_of(first, name))
    whole, part = rollout_of(first, "whole"), rollout_of(first, "part")
    assert len({len(spans) for spans in whole.turns}) > 1, "all have as many turns"
    # On a mesh what goes on is prefilled whole, once; its prompt may have been cloned.
    lengths = [len(prompt) for prompt in test_turns.PROMPTS]
    later = sum(
        lengths[row // 2] + start - 1
        for row, spans in enumerate(whole.turns)
        for start, _ in spans[1:]
    )
    once = sum(length - 1 for length in lengths)
    assert later + once <= first["whole.prefilled"] <= later + 2 * once
    assert first["whole.answers"] == sum(len(spans) - 1 for spans in whole.turns) + sum(
        not whole.completion_mask[row, whole.lengths[row] - 1]
        for row in test_turns.ROWS
    )
    assert "unfinished" in part.finish_reason
    assert (
        ~part.completion_mask & (np.arange(test_turns.MOST) < part.lengths[:, None])
    ).any()
    # Each completion is told by one process.
    for name in ("whole", "failing"):
        told = [*first[f"{name}.told"], *second[f"{name}.told"]]
        assert sorted(told) == list(test_turns.ROWS)
    failing = rollout_of(first, "failing")
    assert [row for row in test_turns.ROWS if failing.finish_reason[row] == "tool"] == [
        1,
        4,
        5,
    ]
    told = [str(text) for text in first["failing.failed"]]
    for text, words in zip(
        told, ("OSError: no tool", "no answer in 2", "token id 99"), strict=True
    ):
        assert words in text
    same = [row for row in test_turns.ROWS if row not in (1, 4, 5)]
    np.testing.assert_array_equal(
        failing.completion_ids[same], whole.completion_ids[same]
    )


@pytest.mark.slow
def test_killed_they_go_on_from_their_journals(tmp_path: Path, x64: None) -> None:
    """Also where these were cut in different places, and then share all they hold."""
    workers = begin("journal", tmp_path)
    deadline = time.monotonic() + TIME_LIMIT_S
    try:
        while not all((tmp_path / f"{rank}.ready").exists() for rank in RANKS):
            assert time.monotonic() < deadline
            assert all(worker.poll() is None for worker in workers), [
                (tmp_path / f"{rank}.log").read_text() for rank in RANKS
            ]
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()  # By SIGKILL.
            worker.wait()
    paths = [tmp_path / f"journal.{rank}-of-2" for rank in RANKS]
    for path, share in zip(paths, (0.9, 0.7), strict=True):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
    held = [contents_of(path.read_bytes()).pieces for path in paths]
    ends = [
        {piece.row: piece.end for piece in pieces} for pieces in held
    ]  # Of one row the pieces are in order.
    assert ends[0] != ends[1] and all(ends)
    furthest = [max(end.get(row, 0) for end in ends) for row in test_turns.ROWS]
    first, second = run("resume", tmp_path)
    for name in first:
        if name not in ("whole.told", "refusals"):
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    whole = rollout_of(first, "whole")
    test_turns.assert_turn_by_turn(whole)
    old = np.arange(test_turns.MOST) < np.array(furthest)[:, None]
    np.testing.assert_array_equal(whole.version == 0, old & whole.completion_mask)
    told = [*first["whole.told"], *second["whole.told"]]
    assert sorted(told) == list(test_turns.ROWS)
    again = rollout_of(first, "again")
    np.testing.assert_array_equal(again.version, whole.version)
    test_turns.assert_turn_by_turn(again)
    assert first["again.tokens"] == 0
    # What one refuses all do, and nothing is left of a file that was begun then.
    assert not first["left"]
    for found, who in ((first, "process 1 of the mesh: "), (second, "")):
        junk, other = map(str, found["refusals"])
        assert junk.startswith(f"{who}journal=") and "no journal of er_jax" in junk
        assert "is of another request (temperature: " in other
