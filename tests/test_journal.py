"""Journals: cut or flipped anywhere, the same call goes on to the same tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from er_jax import Rollout, Until, journal, journal_format
from er_jax.journal import Journal
from er_jax.journal_format import MAGIC, REQUEST, Piece, contents_of, joined, record
from er_jax.result import NOTHING, Completion
from er_jax.scheduler import batch
from er_jax.types import Finish
from tests.test_resume import CONFIG as RESTLESS
from tests.test_resume import KEY, POLICY, PROMPTS, Ending, assert_same, params

pytestmark = pytest.mark.usefixtures("unoptimized_module")

CONFIG = dataclasses.replace(RESTLESS, control="ar")
NUM_CUTS, NUM_FLIPS = 50, 24


@pytest.fixture(autouse=True)
def every_window(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Note after every window, of three rounds; no thread is left."""
    monkeypatch.setattr(batch, "MIN_ROUNDS", 3)
    monkeypatch.setattr(batch, "MAX_ROUNDS", 3)
    monkeypatch.setattr(journal, "EVERY_S", 0.0)
    yield
    assert [t for t in threading.enumerate() if t.name == "er_jax.journal"] == []


def sample(path: Path | None, **named: Any) -> Rollout:
    named = {"key": KEY, "config": CONFIG, "params": params()} | named
    return er_jax.rollout(
        named.pop("policy", POLICY), named.pop("params"),
        named.pop("prompts", PROMPTS), journal=path, **named,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rollout.journal"


@pytest.fixture
def wanted(x64: None) -> Rollout:
    return sample(None, version=3)


def cut_at(data: bytes, num: int) -> list[int]:
    """Return where to cut: at the ends of records, beside them, and anywhere."""
    ends = [0]
    for start, read in journal_format._records(data, len(MAGIC)):
        assert read is not None
        ends.append(start + journal_format.HEAD.size + len(read[1]))
    rng = random.Random(0)
    near = {end + by for end in ends for by in (-1, 0, 1) if 0 <= end + by <= len(data)}
    places = rng.sample(sorted(near), num // 2)
    return [*places, *(rng.randrange(len(data)) for _ in range(num - len(places)))]


def test_cut_anywhere_it_goes_on_to_the_same_tokens(
    wanted: Rollout, path: Path
) -> None:
    assert_same(sample(path, version=3), wanted)
    data = path.read_bytes()
    found = contents_of(data)
    assert not found.damaged and found.end == len(data)
    assert sum(piece.finish == Finish.UNFINISHED for piece in found.pieces) > 10
    gone_on = 0
    for cut in cut_at(data, NUM_CUTS):
        path.write_bytes(data[:cut])
        kept = sum(len(p.token_ids) for p in contents_of(data[:cut]).pieces)
        given: dict[int, Completion] = {}
        out = sample(path, version=4, on_finish=given.__setitem__)
        assert_same(out, wanted)
        assert sorted(given) == list(range(8)), "as in a call that was not disturbed"
        # What was kept was not sampled again, and has its own version.
        assert out.stats.num_tokens == wanted.lengths.sum() - kept
        assert (out.version == 3).sum() == kept
        gone_on += 0 < kept < wanted.lengths.sum()
        if cut % 5:
            continue
        again = sample(path, version=5)
        assert_same(again, wanted)
        np.testing.assert_array_equal(again.version, out.version)
        assert not again.stats.timeline
    assert gone_on > NUM_CUTS // 2


def test_a_flipped_byte_is_never_read_as_a_token(wanted: Rollout, path: Path) -> None:
    sample(path)
    data = path.read_bytes()
    rng = random.Random(1)
    for _ in range(NUM_FLIPS):
        place = rng.randrange(len(data))
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                assert_same(sample(path), wanted)
            except ValueError as error:
                # Where the request itself was, nothing tells whose tokens they are.
                assert place < len(data) // 2
                assert "give another path, or delete it to begin anew" in str(error)
                continue
        told = [
            str(w.message) for w in caught if "is damaged at bytes" in str(w.message)
        ]
        # At the end it could have been torn.
        last = contents_of(data).pieces[-1].to_bytes()
        assert told or place >= len(data) - len(last)


def test_what_is_noted_of_a_row_is_of_one_window(wanted: Rollout, path: Path) -> None:
    """Tokens and log-probabilities, beside those of the whole rollout."""
    sample(path)
    pieces = contents_of(path.read_bytes()).pieces
    assert {Finish.UNFINISHED} < {piece.finish for piece in pieces}
    lengths = np.zeros(8, int)
    for piece in pieces:
        assert piece.start == lengths[piece.row], "something is missing"
        new = slice(piece.start, piece.start + len(piece.token_ids))
        lengths[piece.row] = new.stop
        mine = wanted.completion_ids[piece.row, new], wanted.logprobs[piece.row, new]
        np.testing.assert_array_equal(piece.token_ids, mine[0])
        np.testing.assert_allclose(piece.logprobs, mine[1], atol=1e-6)
    np.testing.assert_array_equal(lengths, wanted.lengths)


def test_rows_that_run_are_noted_when_it_is_time(
    x64: None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "EVERY_S", 1e6)
    sample(path)
    pieces = contents_of(path.read_bytes()).pieces
    assert len(pieces) == 8
    assert Finish.UNFINISHED not in {piece.finish for piece in pieces}


def test_what_ends_early_is_noted_whole(wanted: Rollout, path: Path) -> None:
    part = sample(path, until=Until(tokens=40), version=1)
    found = sum(len(p.token_ids) for p in contents_of(path.read_bytes()).pieces)
    assert found == part.lengths.sum() >= 40
    out = sample(path, version=2)
    assert_same(out, wanted)
    np.testing.assert_array_equal(out.version == 1, part.completion_mask)


def test_ctrl_c_leaves_everything_in_it(wanted: Rollout, path: Path) -> None:
    config = dataclasses.replace(CONFIG, control="best")
    interrupt = Ending(3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as caught:
        sample(path, config=config, controller=interrupt)
    part: Rollout = caught.value.rollout  # type: ignore[attr-defined]
    found = sum(len(p.token_ids) for p in contents_of(path.read_bytes()).pieces)
    assert found == part.lengths.sum() > 0
    assert_same(sample(path), wanted)  # Under another control, too.


def test_ctrl_c_at_the_end_waits_for_the_journal(
    wanted: Rollout, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written before the rollout is over and waits for it."""
    waits, end, write = threading.Event(), Journal.end, journal._write

    def ended(self: Journal) -> None:
        waits.set()
        end(self)

    def written(descriptor: int, data: bytes) -> None:
        if threading.current_thread() is not threading.main_thread():
            is_first = not contents_of(path.read_bytes()).pieces
            assert waits.wait(60)
            time.sleep(0.05 * is_first)
            if is_first:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05 * is_first)
        write(descriptor, data)

    monkeypatch.setattr(Journal, "end", ended)
    monkeypatch.setattr(journal, "_write", written)
    with pytest.raises(KeyboardInterrupt) as caught:
        sample(path)
    monkeypatch.undo()
    out = getattr(caught.value, "rollout", None)
    assert out is not None
    assert_same(out, wanted)
    found = sum(len(p.token_ids) for p in contents_of(path.read_bytes()).pieces)
    assert found == wanted.lengths.sum()


def test_it_begins_where_what_is_resumed_ends(wanted: Rollout, path: Path) -> None:
    part = sample(None, until=Until(tokens=20))
    more = sample(path, resume=part, until=Until(tokens=20), version=1)
    found = sum(len(p.token_ids) for p in contents_of(path.read_bytes()).pieces)
    assert found == more.lengths.sum() - part.lengths.sum() > 0
    assert more.stats.num_journalled == found
    assert more.stats.num_resumed == part.lengths.sum()
    given: dict[int, Completion] = {}
    out = sample(path, resume=part, version=2, on_finish=given.__setitem__)
    assert_same(out, wanted)
    assert set(given) == set(np.flatnonzero(part.finish_reason == "unfinished"))
    assert set(out.version[out.completion_mask]) == {0, 1, 2}
    with pytest.raises(ValueError, match=r"of another request \(resume: '\w+' -> None"):
        sample(path)


def test_what_is_written_at_the_end_is_counted(
    x64: None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "EVERY_S", 1e6)
    part = sample(path, until=Until(tokens=20))
    assert "unfinished" in part.finish_reason
    assert part.stats.num_journalled == part.lengths.sum()


def test_a_stream_gives_what_it_holds_as_well(wanted: Rollout, path: Path) -> None:
    sample(path, until=Until(groups=1))
    with er_jax.stream(
        POLICY, params(), PROMPTS, key=KEY, config=CONFIG, by="group", journal=path
    ) as items:
        assert sorted(prompt for prompt, _ in items) == [0, 1, 2, 3]
    assert_same(items.rollout, wanted)


# -- what is refused


def other_params() -> Any:
    """One bit of one number is another."""
    first, *rest = jax.tree.leaves(params())
    changed = np.array(first)
    changed.reshape(-1)[7] = np.nextafter(changed.reshape(-1)[7], 1)
    structure = jax.tree.structure(params())
    return jax.tree.unflatten(structure, [jax.numpy.asarray(changed), *rest])


WIDER = er_jax.Decoder(dataclasses.replace(POLICY.config, hidden_dim=48))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"key": jax.random.key(6)}, r"key: \[0, 5\] -> \[0, 6\]"),
        (lambda: {"prompts": [[1, 2, 4], *PROMPTS[1:]]}, "prompts: "),
        (lambda: {"prompts": [[1, 2], [3, 4, 5], *PROMPTS[2:]]}, "prompts: "),
        (lambda: {"sequence_ids": range(1, 9)}, "sequence_ids: "),
        (
            lambda: {"config": dataclasses.replace(CONFIG, temperature=0.5)},
            "temperature: 1.0 -> 0.5",
        ),
        (
            lambda: {"config": dataclasses.replace(CONFIG, max_new_tokens=41)},
            "max_new_tokens: 40 -> 41",
        ),
        (
            lambda: {"policy": WIDER, "params": WIDER.init(jax.random.key(0))},
            "shapes: ",
        ),
        (lambda: {"params": other_params()}, "params: "),
    ],
    ids=lambda x: str(x).split(":")[0] if isinstance(x, str) else "",
)  # fmt: skip
def test_a_journal_of_another_request_is_refused(
    change: Callable[[], dict[str, Any]], message: str, x64: None, path: Path
) -> None:
    sample(path, until=Until(tokens=1))
    before = path.read_bytes()
    told = ""
    try:
        sample(path, **change())
    except ValueError as error:
        told = str(error)
    assert re.search(f"is of another request .*{message}", told)
    assert path.read_bytes() == before


def test_what_only_decides_how_fast_may_change(wanted: Rollout, path: Path) -> None:
    sample(path, until=Until(tokens=40))
    other = dataclasses.replace(CONFIG, max_slots=2, control="fixed:3")
    assert_same(sample(path, config=other), wanted)


def test_one_rollout_writes_at_a_time(x64: None, path: Path) -> None:
    with Journal(path, 0):
        with pytest.raises(ValueError, match="is being written by another rollout"):
            sample(path)
        assert path.exists(), "removed under its writer"
    assert not path.exists()


def test_what_cannot_be_written_is_told_before_anything_runs(
    x64: None, tmp_path: Path, path: Path
) -> None:
    for place in (tmp_path, tmp_path / "none" / "journal"):
        with pytest.raises(OSError, match=str(place)):
            sample(place)
    path.write_text("a user's own")
    with pytest.raises(ValueError, match="it is no journal of er_jax; give another"):
        sample(path)
    assert path.read_text() == "a user's own"


def test_a_refused_call_leaves_no_file(x64: None, path: Path) -> None:
    with pytest.raises(ValueError, match="sequence_ids"):
        sample(path, sequence_ids=[1])
    bad = jax.tree.map(lambda x: x * np.nan, params())
    with pytest.raises(ValueError, match="NaN"):
        sample(path, params=bad)
    assert not path.exists()


def test_a_disk_that_fills_up_loses_no_rollout(
    wanted: Rollout, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = os.write, 900

    def write_a_part(descriptor: int, data: bytes) -> int:
        """Write as a full disk does: what there is room for, then nothing."""
        nonlocal room
        if threading.current_thread().name != "er_jax.journal":
            return write(descriptor, data)
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, bytes(data)[: min(room, 7)])
        room -= written if room >= 7 else room
        return written

    monkeypatch.setattr(os, "write", write_a_part)
    with pytest.warns(RuntimeWarning, match=r"not be written \(.*No space") as caught:
        assert_same(sample(path), wanted)
    assert len(caught) == 1
    monkeypatch.undo()
    found = contents_of(path.read_bytes())
    assert found.end == path.stat().st_size and not found.damaged
    assert found.pieces
    assert_same(sample(path), wanted)


# -- the format alone


def some_pieces() -> list[Piece]:
    """Three completions in turn, the last without tokens of its own at its end."""
    pieces = []
    for start, row in itertools.product((0, 3, 6), range(3)):
        count = 0 if (start, row) == (6, 2) else 3
        ids = np.arange(start, start + count, dtype=np.int32) + 10 * row
        finish = Finish.STOP if start == 6 else Finish.UNFINISHED
        logprobs = -ids.astype(np.float32) / 7
        pieces.append(Piece(row, start, 1, finish, ids, logprobs))
    return pieces


def some_bytes() -> bytes:
    parts = [
        record(REQUEST, b'{"key": [0, 5]}'),
        *(p.to_bytes() for p in some_pieces()),
    ]
    return MAGIC + b"".join(parts)


def same(one: Piece, other: Piece) -> bool:
    return one.to_bytes() == other.to_bytes()


def test_every_cut_keeps_what_is_whole() -> None:
    data, pieces = some_bytes(), some_pieces()
    lengths = np.cumsum([len(piece.to_bytes()) for piece in pieces])
    first = len(data) - lengths[-1]
    for cut in range(len(data) + 1):
        found = contents_of(data[:cut])
        num = int((first + lengths <= cut).sum())
        assert not found.damaged
        assert all(map(same, found.pieces, pieces)) and len(found.pieces) == num
        assert found.request == ({"key": [0, 5]} if cut >= first else None)
        # What is appended there is read.
        if cut >= first:
            longer = contents_of(data[: found.end] + pieces[0].to_bytes())
            assert len(longer.pieces) == num + 1 and not longer.damaged


def test_every_flip_is_found() -> None:
    data, pieces = some_bytes(), some_pieces()
    whole = [piece.to_bytes() for piece in pieces]
    start_of_pieces = len(data) - sum(map(len, whole))
    for place in range(len(data)):
        for bit in (0, 5, 7):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            try:
                found = contents_of(bytes(flipped))
            except ValueError:
                assert place < start_of_pieces
                continue
            assert place >= start_of_pieces
            kept = [piece.to_bytes() for piece in found.pieces]
            assert len(kept) == len(whole) - 1
            assert all(piece in whole for piece in kept)
            assert found.damaged or place >= len(data) - len(whole[-1])


def test_a_tail_of_nothing_is_cut() -> None:
    """As a power cut leaves it where the length was written and the data was not."""
    data = some_bytes()
    found = contents_of(data + bytes(4096))
    assert found.end == len(data) and not found.damaged


def test_nothing_is_put_behind_a_piece_that_is_missing() -> None:
    """Nor what was written before the gap was filled by other tokens."""
    first, second, third = some_pieces()[::3]
    new = dataclasses.replace(second, token_ids=second.token_ids + 50, version=2)
    known, _ = joined(NOTHING, np.zeros(0, np.int32), [first, third])
    assert known.token_ids.tolist() == [0, 1, 2]
    pieces = [first, third, new]
    known, versions = joined(NOTHING, np.zeros(0, np.int32), pieces)
    assert known.token_ids.tolist() == [0, 1, 2, 53, 54, 55]
    assert versions.tolist() == [1, 1, 1, 2, 2, 2]
    assert known.finish_reason == "unfinished"
    # What an interruption had noted twice, and the second time with more behind it.
    longer = dataclasses.replace(
        second,
        token_ids=np.concatenate([second.token_ids, third.token_ids]),
        logprobs=np.concatenate([second.logprobs, third.logprobs]),
    )
    pieces = [first, second, longer, third]
    whole, _ = joined(NOTHING, np.zeros(0, np.int32), pieces)
    assert whole.token_ids.tolist() == list(range(9))
    assert whole.logprobs.tolist() == (-np.arange(9, dtype=np.float32) / 7).tolist()
    assert whole.finish_reason == "stop"
    whole, _ = joined(NOTHING, np.zeros(0, np.int32), [first, second, third])
    assert whole.token_ids.tolist() == list(range(9))
    assert whole.finish_reason == "stop"


# -- processes


SCRIPT = """
import sys, jax
jax.config.update("jax_enable_x64", True)
from er_jax import journal
from er_jax.scheduler import batch
from tests import test_journal
journal.EVERY_S, batch.MIN_ROUNDS, batch.MAX_ROUNDS = 0.02, 3, 3
with test_journal.slowed():
    out = test_journal.sample(sys.argv[1], config=test_journal.LONG)
out.save(sys.argv[2])
"""

LONG = dataclasses.replace(CONFIG, max_new_tokens=400, stop_token_ids=(11,), n=4)


@contextlib.contextmanager
def slowed() -> Iterator[None]:
    """Make windows slow, so that a kill hits the middle of a rollout."""
    start = batch.Batch.start_window

    def start_window(*args: Any) -> None:
        time.sleep(0.03)
        start(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch.Batch, "start_window", start_window)
        yield


@pytest.mark.slow
def test_killed_again_and_again_it_samples_the_same_tokens(
    x64: None, tmp_path: Path, path: Path
) -> None:
    wanted = sample(None, config=LONG)
    result, rng, kills = tmp_path / "out.npz", random.Random(2), 0
    sizes: list[int] = []
    while not result.exists():
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(path), str(result)],
            cwd=Path(__file__).parents[1], env=dict(os.environ),
        )  # fmt: skip
        before = path.stat().st_size if path.exists() else 0
        # Begun to write, it is killed at a random moment.
        while process.poll() is None and (
            not path.exists() or path.stat().st_size <= before
        ):
            time.sleep(0.005)
        if kills < 4:
            time.sleep(0.5 * rng.random())
            process.send_signal(signal.SIGKILL)
        if process.wait(120) == -signal.SIGKILL:
            kills += 1
            sizes.append(path.stat().st_size)
        assert kills < 20
    assert kills >= 3 and sizes == sorted(sizes)
    assert_same(Rollout.load(result), wanted)
