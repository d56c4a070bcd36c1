"""What processes tell each other, with two threads in their place."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import er_jax
from er_jax.journal import Journal
from er_jax.journal_format import contents_of
from er_jax.result import Completion
from er_jax.scheduler.exchange import answers_of_leader, rows_of_all


@dataclasses.dataclass
class Member:
    """One of two threads that agree; see `engine.protocol.Agreement`."""

    rank: int
    barrier: threading.Barrier
    said: dict[int, Any]
    is_spread: bool = True
    is_leader: bool = False

    def __post_init__(self) -> None:
        self.is_leader = self.rank == 0

    def meet(self, own: Any) -> list[Any]:
        """Return what each has said."""
        self.said[self.rank] = own
        self.barrier.wait(1)
        found = [self.said[0], self.said[1]]
        self.barrier.wait(1)
        return found

    def sync_or_raise(self, values: Any, failure: Any = None) -> Any:
        found = self.meet((values, failure))
        failed = any(other is not None for _, other in found)
        return np.array(found[0][0]), failure or (RuntimeError() if failed else None)

    def broadcast_from_leader(self, values: Any) -> np.ndarray:
        return np.array(self.meet(values)[0])

    def broadcast_text(self, text: str | None) -> str | None:
        return self.meet(text)[0]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        return self.meet(data)

    def sum(self, own: np.ndarray) -> np.ndarray:
        return np.add(*self.meet(own))


def together(work: Callable[[Member], Any]) -> list[Any]:
    """Return what `work` gives each of two threads, or raises in it."""
    barrier = threading.Barrier(2)
    said: dict[int, Any] = {}

    def run(rank: int) -> Any:
        try:
            return work(Member(rank, barrier, said))
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, (0, 1)))


def test_all_are_told_what_the_leader_was_answered() -> None:
    answers = [(3, [1, 2]), (0, None), (7, "turn 1: OSError: \ud800 no")]

    def work(member: Member) -> Any:
        return answers_of_leader(member, answers if member.is_leader else [])

    assert together(work) == [answers, answers]
    assert together(lambda member: answers_of_leader(member, [])) == [[], []]


def test_a_failure_of_one_is_raised_in_all() -> None:
    def work(member: Member) -> Any:
        failure = OSError("disk full") if member.rank else None
        return answers_of_leader(member, [(0, [1])] * member.is_leader, failure)

    first, second = together(work)
    assert isinstance(first, RuntimeError) and isinstance(second, OSError)


def test_all_are_told_the_tokens_of_rows_that_one_holds() -> None:
    rng = np.random.default_rng(0)
    rows, lengths = np.array([1, 4, 6]), np.array([700, 3, 900])
    whole = {
        int(row): (
            rng.integers(0, 1 << 30, length).astype(np.int32),
            -rng.random(length).astype(np.float32),
        )
        for row, length in zip(rows, lengths, strict=True)
    }

    def work(member: Member) -> Any:
        mine = (4,) if member.is_leader else (1, 6)
        # Rows are fetched with all positions of the cache.
        own = {
            row: (np.pad(a, 5)[5:], np.pad(b, 5)[5:])
            for row in mine
            for a, b in [whole[row]]
        }
        return rows_of_all(member, own, rows, lengths)

    for found in together(work):
        assert isinstance(found, dict) and found.keys() == whole.keys()
        for row, arrays in found.items():
            for mine, wanted in zip(arrays, whole[row], strict=True):
                assert mine.dtype == wanted.dtype
                np.testing.assert_array_equal(mine, wanted)


CONFIG = er_jax.RolloutConfig(max_new_tokens=9)
PROMPTS = [np.array([1, 2], np.int32)] * 3


def completion(length: int, reason: str = "unfinished") -> Completion:
    ids = np.arange(length, dtype=np.int32)
    return Completion(ids, -ids.astype(np.float32), reason)


def begun(journal: Journal, request: int = 0) -> er_jax.Rollout | None:
    journal.begin({"request": request})
    found = journal.gone_on(PROMPTS, np.arange(3), CONFIG, None)
    journal.confirm("digest")
    return found


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Journals of two processes: rows by file, as a kill may leave them."""
    files = [
        {0: completion(5), 1: completion(4), 2: completion(2, "stop")},
        {0: completion(7), 1: completion(4, "stop")},
    ]
    paths = [tmp_path / str(rank) for rank in (0, 1)]
    for path, rows in zip(paths, files, strict=True):
        with Journal(path, 3) as journal:
            begun(journal)
            journal.note(rows, sync=True)
    return paths


def test_what_any_journal_holds_all_go_on_from(paths: list[Path]) -> None:
    def work(member: Member) -> Any:
        with Journal(paths[member.rank], 4, member) as journal:
            found = begun(journal)
            more = {0: completion(9, "length")} if member.is_leader else {}
            journal.note(more, sync=True)
            return found, sorted(journal.finished)

    for outcome in together(work):
        assert isinstance(outcome, tuple), outcome
        found, finished = outcome
        assert found.lengths.tolist() == [7, 4, 2] and finished == [1, 2]
        assert found.finish_reason.tolist() == ["unfinished", "stop", "stop"]
        assert (found.version[found.completion_mask] == 3).all()
    pieces = [contents_of(path.read_bytes()).pieces for path in paths]
    ends = [{piece.row: piece.end for piece in found} for found in pieces]
    assert ends == [{0: 9, 1: 4, 2: 2}, {0: 7, 1: 4, 2: 2}]
    assert [piece.version for piece in pieces[0]] == [3, 3, 3, 4]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["0", "1"]


def test_what_one_journal_refuses_all_do(paths: list[Path], tmp_path: Path) -> None:
    before = [path.read_bytes() for path in paths]

    def work(member: Member) -> Any:
        # The leader begins a new one, which is of no other request.
        new = [tmp_path / "new", paths[1]]
        with Journal(new[member.rank], 0, member) as journal:
            return begun(journal, request=1)

    first, second = together(work)
    assert str(first) == f"process 1 of the mesh: {second}"
    assert "is of another request (request: 0 -> 1)" in str(second)
    assert isinstance(first, ValueError) and isinstance(second, ValueError)
    assert not (tmp_path / "new").exists()
    assert [path.read_bytes() for path in paths] == before
