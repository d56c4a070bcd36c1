"""Conversations: the tokens of rollouts that are called anew, turn by turn."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import er_jax
from benchmarks.lib.controllers import Restless
from er_jax import Completion, Respond, Rollout, Stop, Turn, Until
from er_jax.journal_format import Piece, contents_of, joined, pieces_of
from er_jax.request import Request
from er_jax.respond import Calls, checked_answer
from er_jax.result import NOTHING
from er_jax.resume import turn_end, turn_of
from er_jax.scheduler import batch
from er_jax.types import Program
from tests.small import SIZES

SIZES64 = dataclasses.replace(SIZES, dtype="float64")
POLICY = er_jax.Decoder(SIZES64)
PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
ROWS = range(8)
LIMITS = (20, 44, 36, 18)
MOST = max(LIMITS)
CONFIG = er_jax.RolloutConfig(
    max_new_tokens=LIMITS, n=2, max_slots=3, stop_token_ids=(11, 17, 3),
    stop_sequences=((5,), (9, 2)), min_new_tokens=2, control="ar", gammas=(0, 3),
    logprobs="processed", drafter=er_jax.DrafterConfig(window=None),
)  # fmt: skip
KEY = jax.random.key(5)
TURN_TOKENS = 7

pytestmark = pytest.mark.usefixtures("unoptimized_module")


@pytest.fixture(autouse=True)
def float64(x64: None) -> Iterator[None]:
    yield


@functools.cache
def params() -> Any:
    return POLICY.init(jax.random.key(0))


def tool(sequence_id: int, turn: Turn) -> np.ndarray | None:
    """Return one to five tokens that depend on all that it is told."""
    if turn.index >= 2 + sequence_id % 3:
        return None
    words = [sequence_id, turn.index, *turn.prompt_ids, *turn.completion_ids]
    rng = np.random.default_rng([int(word) for word in words])
    return rng.integers(0, 24, rng.integers(1, 6))[: turn.room]


def delayed(seed: int) -> Callable[[int, Turn], Any]:
    rng = np.random.default_rng(seed)

    def call(sequence_id: int, turn: Turn) -> Any:
        time.sleep(float(rng.random()) * 0.03)
        return tool(sequence_id, turn)

    return call


def sample(function: Any = tool, **named: Any) -> Rollout:
    named.setdefault("config", CONFIG)
    respond = named.pop(
        "respond", Respond(function, max_turn_tokens=TURN_TOKENS, timeout_s=20.0)
    )
    return er_jax.rollout(
        POLICY, params(), PROMPTS, key=KEY, respond=respond, **named
    )  # fmt: skip


@functools.cache
def turn_by_turn() -> tuple[list[list[int]], list[list[bool]]]:
    """Return tokens and masks: `rollout` called anew on all texts so far."""
    texts: list[list[int]] = [[] for _ in ROWS]
    masks: list[list[bool]] = [[] for _ in ROWS]
    index, open_rows = 0, set(ROWS)
    while open_rows:
        # Those that have ended are sampled along, so that all calls are of one size.
        prompts = [PROMPTS[row // 2] + texts[row] for row in ROWS]
        room = [LIMITS[row // 2] - len(texts[row]) for row in ROWS]
        limits = tuple(max(min(TURN_TOKENS, left), 1) for left in room)
        least = tuple(min(2, limit) for limit in limits)
        config = dataclasses.replace(
            CONFIG, max_new_tokens=limits, min_new_tokens=least, n=1
        )
        out = er_jax.rollout(POLICY, params(), prompts, key=KEY, config=config)
        for row in tuple(open_rows):
            new = out.completion_ids[row, : out.lengths[row]]
            texts[row] += new.tolist()
            masks[row] += [True] * len(new)
            left = room[row] - len(new)
            answer = None
            if left:
                turn = Turn(
                    index=index,
                    token_ids=new,
                    prompt_ids=np.array(PROMPTS[row // 2]),
                    completion_ids=np.array(texts[row]),
                    finish_reason=str(out.finish_reason[row]),
                    room=left,
                )
                answer = tool(row, turn)
            if answer is not None:
                texts[row] += answer.tolist()
                masks[row] += [False] * len(answer)
            if answer is None or left == len(answer):
                open_rows.remove(row)
        index += 1
    return texts, masks


def assert_turn_by_turn(out: Rollout) -> None:
    for row, (text, mask) in enumerate(zip(*turn_by_turn(), strict=True)):
        length = out.lengths[row]
        assert out.completion_ids[row, :length].tolist() == text
        assert out.completion_mask[row, :length].tolist() == mask
    assert not out.completion_mask[np.arange(MOST) >= out.lengths[:, None]].any()
    assert (out.logprobs[~out.completion_mask] == 0).all()
    assert (out.version[~out.completion_mask] == -1).all()


@pytest.mark.parametrize(
    ("control", "slots", "delay"),
    [("ar", 3, 1), ("ar", 8, 2), ("fixed:3", 3, 3), ("best", 3, 4)],
)
def test_tokens_are_those_of_calls_turn_by_turn(
    control: str, slots: int, delay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MIN_ROUNDS", 3)
    config = dataclasses.replace(CONFIG, control=control, max_slots=slots)
    controller = None
    if control == "best":
        controller = Restless("best", (0, 3), (1, 3), delay)
    seen: dict[int, Completion] = {}
    out = sample(
        delayed(delay), config=config, controller=controller,
        on_finish=seen.__setitem__,
    )  # fmt: skip
    assert_turn_by_turn(out)
    assert len({len(spans) for spans in out.turns}) > 1, "all have as many turns"
    assert {"stop", "length"} == set(out.finish_reason.tolist())
    assert out.stats.num_answers == sum(
        int(np.diff(~mask[:length], prepend=False).sum() + 1) // 2
        for mask, length in zip(out.completion_mask, out.lengths, strict=True)
    )
    assert out.stats.num_tokens == out.completion_mask.sum()
    num_gone_on = sum(len(spans) - 1 for spans in out.turns)
    if slots == 8:
        # Every row is still there, and each prompt was prefilled once.
        assert out.stats.num_kept == num_gone_on
        appended = [
            np.diff(spans)[1::2].sum() for spans in map(np.ravel, out.turns)
        ]  # fmt: skip
        prompts = sum(len(prompt) - 1 for prompt in PROMPTS)
        assert out.stats.prefilled_tokens == prompts + sum(appended)
    else:
        # What waits in the queue takes the first rows whose turns have ended.
        assert out.stats.num_kept < num_gone_on
    assert sorted(seen) == list(ROWS)
    for row, completion in seen.items():
        assert completion.turns == out.turns[row]
        assert len(completion.token_ids) == out.lengths[row]


class Shortest(Restless):
    """Chooses the shortest cache that holds the rows."""

    def choose(
        self, options: Sequence[Program], current: Program | None, **unused: Any
    ) -> Program:
        return min(options, key=lambda program: (program.cache_length, -program.rows))


@pytest.mark.slow
def test_long_answers_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that are held, and of those that start anew."""
    monkeypatch.setattr(batch, "MIN_ROUNDS", 3)

    def call(sequence_id: int, turn: Turn) -> list[int] | None:
        return None if turn.index > 4 else [sequence_id] * min(36, turn.room)

    config = dataclasses.replace(CONFIG, max_new_tokens=236, max_slots=8)
    wanted = sample(call, config=config)
    assert wanted.stats.programs[0].cache_length == 256
    for slots in (3, 8):
        out = sample(
            call,
            config=dataclasses.replace(config, max_slots=slots),
            controller=Shortest("ar", (0, 3), (), 0),
        )
        for name in ("completion_ids", "completion_mask", "lengths", "finish"):
            np.testing.assert_array_equal(getattr(out, name), getattr(wanted, name))
        lengths = [moment.cache_length for moment in out.stats.timeline]
        assert (128, 256) in itertools.pairwise(lengths)
        assert slots < 8 or out.stats.num_kept == 8 * 5


@pytest.mark.slow
def test_rows_of_a_mesh_are_prefilled_anew() -> None:
    out = sample(mesh=Mesh(np.array(jax.devices()[:2]), ("data",)))
    assert_turn_by_turn(out)
    assert not out.stats.num_kept


@pytest.mark.slow
def test_rings_that_texts_outgrow_are_prefilled_anew() -> None:
    policy = er_jax.Decoder(dataclasses.replace(SIZES64, window=4))
    own = policy.init(jax.random.key(0))
    named: dict[str, Any] = {
        "key": KEY,
        "config": dataclasses.replace(CONFIG, control="fixed:3"),
    }
    out = er_jax.rollout(
        policy, own, PROMPTS, respond=Respond(tool, max_turn_tokens=7), **named
    )
    assert not out.stats.num_kept
    last = [spans[-1] for spans in out.turns]
    texts = [
        [*PROMPTS[row // 2], *out.completion_ids[row, :start]]
        for row, (start, _) in enumerate(last)
    ]
    limits = tuple(max(end - start, 2) for start, end in last)
    config = dataclasses.replace(CONFIG, n=1, max_new_tokens=limits)
    anew = er_jax.rollout(policy, own, texts, key=KEY, config=config)
    for row, (start, end) in enumerate(last):
        found = out.completion_ids[row, start:end].tolist()
        assert anew.completion_ids[row, : end - start].tolist() == found


def test_what_a_function_is_told() -> None:
    asked: list[tuple[int, Turn]] = []

    async def call(sequence_id: int, turn: Turn) -> np.ndarray | None:
        asked.append((sequence_id, turn))
        await asyncio.sleep(0.001)
        return tool(sequence_id, turn)

    out = sample(call)
    assert_turn_by_turn(out)
    for row, turn in asked:
        start, end = out.turns[row][turn.index]
        text = out.completion_ids[row]
        assert turn.token_ids.tolist() == text[start:end].tolist()
        assert turn.completion_ids.tolist() == text[:end].tolist()
        assert turn.prompt_ids.tolist() == PROMPTS[row // 2]
        assert turn.room == LIMITS[row // 2] - end
        is_cut = turn.finish_reason == "length"
        assert not is_cut or end - start == TURN_TOKENS
    assert {turn.finish_reason for _, turn in asked} == {"stop", "length"}


def test_turns_survive_maps_and_files(tmp_path: Path) -> None:
    out = sample()
    part = jax.tree.map(lambda a: a[2:5], out)
    assert part.turns == out.turns[2:5]
    out.save(tmp_path / "out.npz")
    assert Rollout.load(tmp_path / "out.npz").turns == out.turns


def test_scores_are_those_of_sampled_tokens_behind_appended_ones() -> None:
    out = sample()
    found = er_jax.score(POLICY, params(), out, config=CONFIG).logprobs
    np.testing.assert_allclose(found, out.logprobs, atol=1e-5)
    assert (np.asarray(found)[~out.completion_mask] == 0).all()
    # Other answers, other scores: of tokens behind them.
    other = np.where(out.completion_mask, out.completion_ids, 4)
    changed = dataclasses.replace(out, completion_ids=other.astype(np.int32))
    found = er_jax.score(POLICY, params(), changed, config=CONFIG).logprobs
    for row, (first, second, *_) in enumerate(out.turns):
        same = np.isclose(found[row], out.logprobs[row], atol=1e-5)
        assert same[: first[1]].all()
        assert not same[second[0] : second[1]].all()


def test_a_slow_tool_holds_up_nobody() -> None:
    others = threading.Semaphore(0)

    def on_finish(sequence_id: int, completion: Completion) -> None:
        others.release()

    def call(sequence_id: int, turn: Turn) -> Any:
        if (sequence_id, turn.index) == (0, 0):
            for _ in ROWS[1:]:
                assert others.acquire(timeout=20)
        return tool(sequence_id, turn)

    out = sample(call, on_finish=on_finish)
    assert_turn_by_turn(out)
    assert not out.stats.failed_turns


BAD: dict[int, tuple[Any, str]] = {
    1: (ValueError("no such file"), "ValueError: no such file"),
    2: ([3, 24], "token id 24, outside the vocabulary 0 .. 23"),
    3: ([0.5], "dtype float64, not a flat sequence of integer token ids"),
    4: ([1] * 60, "returned 60 tokens, and max_new_tokens leaves room for"),
    5: ([], "returned no tokens; return None"),
    6: ("hangs", "TimeoutError: no answer in 0.5 s"),
    7: (SystemExit(3), "SystemExit: 3"),
}


@pytest.mark.parametrize("is_async", [False, True])
def test_a_bad_answer_ends_its_own_completion(is_async: bool) -> None:
    hang = threading.Event()

    def call(sequence_id: int, turn: Turn) -> Any:
        answer = BAD.get(sequence_id, (tool(sequence_id, turn), ""))[0]
        if turn.index < 1 and sequence_id:
            return [1]
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, str) and not is_async:
            hang.wait(20)
        return answer

    async def call_async(sequence_id: int, turn: Turn) -> Any:
        answer = call(sequence_id, turn)
        await asyncio.sleep(20 if isinstance(answer, str) else 0)
        return answer

    respond = Respond(
        call_async if is_async else call,
        timeout_s=0.5, max_parallel=1, max_turn_tokens=TURN_TOKENS,
    )  # fmt: skip
    named = r"7 of 8 completions.*\[1, 2, 3, 4, 5, 6, 7\]"
    with pytest.warns(RuntimeWarning, match=named):
        out = sample(respond=respond)
    hang.set()
    assert out.finish_reason[1:].tolist() == ["tool"] * 7
    assert out.finish_reason[0] != "tool"
    text = turn_by_turn()[0][0]
    assert out.completion_ids[0, : out.lengths[0]].tolist() == text
    assert sorted(out.stats.failed_turns) == list(BAD)
    for row, (_, message) in BAD.items():
        assert message in out.stats.failed_turns[row]
        assert out.stats.failed_turns[row].startswith("turn 1: ")
        assert out.completion_mask[row, out.lengths[row] - 1], "its tokens are kept"
        assert len(out.turns[row]) == 2


def test_an_answer_goes_to_who_asked() -> None:
    """And counts for the limit of its completion."""
    config = dataclasses.replace(CONFIG, max_new_tokens=(20, 20, 20, MOST))
    rooms: list[tuple[int, int]] = []

    def call(sequence_id: int, turn: Turn) -> list[int] | None:
        rooms.append((turn.room, len(turn.completion_ids)))
        return [sequence_id] if sequence_id < 6 else None

    respond = Respond(call, max_turns=4, max_turn_tokens=TURN_TOKENS)
    out = sample(config=config, respond=respond)
    assert (out.lengths[:6] <= 20).all()
    assert 20 in out.lengths[:6]
    for row in range(6):
        text = out.completion_ids[row, : out.lengths[row]]
        appended = text[~out.completion_mask[row, : out.lengths[row]]]
        assert len(appended)
        assert set(appended.tolist()) == {row}
    assert {room + length for room, length in rooms} == {20, MOST}


def test_limits_of_turns_and_of_all_tokens() -> None:
    fills = Respond(lambda _, turn: [1] * turn.room, max_turns=2)
    out = sample(respond=fills)
    assert out.lengths.tolist() == np.repeat(LIMITS, 2).tolist()
    assert set(out.finish_reason.tolist()) == {"length"}
    assert {len(spans) for spans in out.turns} == {1}
    rooms: list[tuple[int, int]] = []

    def call(sequence_id: int, turn: Turn) -> list[int]:
        rooms.append((sequence_id, turn.room + len(turn.completion_ids)))
        return [1]

    out = sample(respond=Respond(call, max_turns=3, max_turn_tokens=3))
    assert sorted(rooms) == [(row, LIMITS[row // 2]) for row in ROWS for _ in range(2)]
    for spans, reason, length in zip(
        out.turns, out.finish_reason, out.lengths, strict=True
    ):
        assert len(spans) == 3
        assert max(end - start for start, end in spans) <= 3
        assert {after[0] - end for (_, end), after in itertools.pairwise(spans)} == {1}
        assert spans[-1][1] == length
        assert reason == "stop" or length - spans[-1][0] == 3
    assert {"stop", "length"} == set(out.finish_reason.tolist())


def test_a_rollout_that_ends_early_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MIN_ROUNDS", 3)
    stop, waiting, release = Stop(), threading.Semaphore(0), threading.Event()

    def call(sequence_id: int, turn: Turn) -> Any:
        if turn.index == 1:
            waiting.release()
            release.wait(20)
        return tool(sequence_id, turn)

    def end() -> None:
        for _ in range(2):
            waiting.acquire(timeout=20)
        stop()

    thread = threading.Thread(target=end)
    thread.start()
    part = sample(call, until=Until(stop=stop))
    release.set()
    thread.join()
    assert "unfinished" in part.finish_reason
    waits = [
        row
        for row, spans in enumerate(part.turns)
        if part.finish_reason[row] == "unfinished" and len(spans) == 2
    ]
    assert waits, "none waited for an answer"
    asked: list[tuple[int, int]] = []

    def again(sequence_id: int, turn: Turn) -> Any:
        asked.append((sequence_id, turn.index))
        return tool(sequence_id, turn)

    out = sample(again, resume=part, version=1)
    assert_turn_by_turn(out)
    old = np.arange(MOST) < part.lengths[:, None]
    assert (out.version[old & out.completion_mask] == 0).all()
    assert (out.version[~old & out.completion_mask] == 1).all()
    assert {row for row, index in asked if index == 0} == {
        row for row in ROWS if len(part.turns[row]) < 2 and part.lengths[row] < 8
        and part.completion_mask[row, : part.lengths[row]].all()
    }  # fmt: skip
    # Where nobody answers, a turn that waits for an answer is the last.
    ends = part.completion_ids[ROWS, part.lengths - 1]
    stopped = [row for row in waits if ends[row] in (3, 5, 11, 17)]
    last = sample(respond=None, resume=part)
    assert (last.lengths[stopped] == part.lengths[stopped]).all()
    assert set(last.finish_reason[stopped].tolist()) == {"stop"}


def test_prompts_of_a_session_are_those_of_conversations() -> None:
    """What a row holds beyond its prompt is never taken for the prompt's own."""
    with er_jax.Session() as session:
        for number in range(3):
            control = ("ar", "fixed:3", "ar")[number]
            config = dataclasses.replace(CONFIG, control=control)
            out = sample(session=session, config=config)
            assert_turn_by_turn(out)
    assert out.stats.num_prefilled < len(ROWS)


def test_ctrl_c_gives_everything_and_it_goes_on() -> None:
    def on_finish(sequence_id: int, completion: Completion) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        sample(on_finish=on_finish)
    part: Rollout = caught.value.rollout  # type: ignore[attr-defined]
    assert part.completion_mask.any()
    assert "unfinished" in part.finish_reason
    assert_turn_by_turn(sample(resume=part))


@pytest.mark.parametrize("calls", [0, 3])
def test_ctrl_c_while_answers_are_taken(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is returned is what the journal has."""
    own, left, path = Request.going_on, calls, tmp_path / "turns.journal"

    def interrupted(*arguments: Any) -> Request:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return own(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Request, "going_on", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            sample(journal=path)
    part = getattr(caught.value, "rollout", None)
    assert part is not None
    pieces = contents_of(path.read_bytes()).pieces
    assert sum(len(piece.token_ids) for piece in pieces) == part.lengths.sum() > 0
    assert_turn_by_turn(sample(resume=part))
    assert_turn_by_turn(sample(journal=path))


def test_a_journal_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "turns.journal"
    wanted = sample(journal=path)
    assert_turn_by_turn(wanted)
    data = path.read_bytes()
    again = sample(journal=path)
    assert_turn_by_turn(again)
    assert not again.stats.timeline
    kept = []
    for share in (0.35, 0.8):
        path.write_bytes(data[: int(len(data) * share)])
        pieces = contents_of(path.read_bytes()).pieces
        assert -1 in {piece.version for piece in pieces}
        out = sample(journal=path, version=2)
        assert_turn_by_turn(out)
        kept.append(int((out.version == 0).sum()))
    assert 0 < kept[0] < kept[1] < wanted.completion_mask.sum()
    other = Respond(tool, max_turns=2)
    with pytest.raises(ValueError, match=r"another request .*respond"):
        sample(journal=path, respond=other)


def test_a_turn_that_got_no_answer_is_the_last_in_a_journal_too(tmp_path: Path) -> None:
    """Also where it has reached the limit of a turn, and its completion has not."""
    path = tmp_path / "refused.journal"
    wanted = sample(lambda sequence_id, turn: None, journal=path)
    is_short = wanted.lengths < np.repeat(LIMITS, 2)
    assert ((wanted.finish_reason == "length") & is_short).any()
    asked: list[int] = []

    def answer(sequence_id: int, turn: Turn) -> list[int]:
        asked.append(sequence_id)
        return [1]

    again = sample(answer, journal=path)
    assert asked == [] and not again.stats.timeline
    for name in ("completion_ids", "lengths", "finish"):
        np.testing.assert_array_equal(getattr(again, name), getattr(wanted, name))


def test_a_stream_gives_whole_conversations() -> None:
    with er_jax.stream(
        POLICY,
        params(),
        PROMPTS,
        key=KEY,
        config=CONFIG,
        by="group",
        respond=Respond(tool, max_turn_tokens=TURN_TOKENS),
    ) as items:
        groups = dict(items)
    assert_turn_by_turn(items.rollout)
    assert sorted(groups) == [0, 1, 2, 3]
    assert groups[1][1].turns == items.rollout.turns[3]


# -- parts


def completion(mask: str, reason: str = "unfinished", token: int = 1) -> Completion:
    flags = np.array([letter == "x" for letter in mask], bool)
    tokens = np.full(len(mask), token, np.int32)
    logprobs = np.where(flags, -1.0, 0.0).astype(np.float32)
    return Completion(tokens, logprobs, reason, flags)


@pytest.mark.parametrize("mask", ["", "xx", "xx..x", "x.", ".x.xx"])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_pieces_of_a_journal_tell_what_was_appended(mask: str, start: int) -> None:
    whole = completion(mask, "stop")
    start = min(start, len(mask))
    pieces = [
        Piece.of(piece.to_bytes()[13:]) for piece in pieces_of(0, whole, start, 4)
    ]
    head = dataclasses.replace(
        NOTHING, token_ids=whole.token_ids[:start], logprobs=whole.logprobs[:start],
        mask=whole.mask[:start],
    )  # fmt: skip
    found, versions = joined(head, np.where(whole.mask[:start], 4, -1), pieces)
    assert found.mask.tolist() == whole.mask.tolist()
    assert versions.tolist() == np.where(whole.mask, 4, -1).tolist()
    assert found.finish_reason == "stop"


def test_where_turns_begin_and_whether_they_have_ended() -> None:
    assert [turn_of(completion(m)) for m in ("", "xx", "x.", "x..xx")] == [0, 0, 2, 3]

    def end(mask: str, *tokens: int) -> str | None:
        found = dataclasses.replace(
            completion(mask), token_ids=np.array(tokens, np.int32)
        )
        return turn_end(found, CONFIG, 0, 4)

    assert end("xxx", 1, 1, 11) == "stop"
    assert end("xx.", 1, 1, 11) is None
    assert end("xxx", 1, 9, 2) == "stop"
    assert end("xx", 9, 2) is None, "within min_new_tokens"
    assert end("x.xx", 1, 9, 9, 2) is None
    assert end("x.xxx", 1, 9, 1, 9, 2) == "stop"
    assert end("x.x", 1, 9, 2) is None, "a sequence that begins in an answer"
    assert end("xxxx", 1, 1, 1, 1) == "length"
    assert end(".xxx", 1, 1, 1, 1) is None


def test_a_coroutine_is_no_answer() -> None:
    async def call() -> None:
        pass

    with pytest.raises(ValueError, match="make respond a coroutine function"):
        checked_answer(call(), 24, 5)
    with pytest.raises(ValueError, match=r"no sequence of token ids|dtype"):
        checked_answer([[1], [1, 2]], 24, 5)
    with pytest.raises(ValueError, match="dtype bool"):
        checked_answer([True], 24, 5)


@pytest.mark.parametrize("is_async", [False, True])
def test_calls_that_hang_are_replaced(is_async: bool) -> None:
    """Those behind them run, `max_parallel` at a time, and closing waits for none."""
    running, most = 0, 0
    release = threading.Event()
    tokens = np.zeros(1, np.int32)
    turn = Turn(0, tokens, tokens, tokens, "stop", 1)

    def begin(by: int) -> None:
        nonlocal running, most
        running += by
        most = max(most, running)

    def call(sequence_id: int, turn: Turn) -> list[int]:
        begin(1)
        if sequence_id < 2:
            release.wait(20)
        time.sleep(0.002)
        begin(-1)
        return [sequence_id]

    async def call_async(sequence_id: int, turn: Turn) -> list[int]:
        begin(1)
        try:
            await asyncio.sleep(20 if sequence_id < 2 else 0.002)
        finally:
            begin(-1)
        return [sequence_id]

    function = call_async if is_async else call
    found: dict[int, Any] = {}
    with Calls(Respond(function, max_parallel=2, timeout_s=0.3)) as calls:
        for sequence in range(8):
            calls.ask(sequence, sequence, turn)
        start_s = time.monotonic()
        while len(found) < 8 and time.monotonic() - start_s < 10:
            found |= dict(calls.answers(0.02))
        assert not calls.answers()
    release.set()
    assert [found[s] for s in range(2, 8)] == [[s] for s in range(2, 8)]
    assert {str(found[s]) for s in (0, 1)} == {"no answer in 0.3 s"}
    # Those given up still count as running while they hang.
    assert most <= (2 if is_async else 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sample(respond=3), "respond=3 must be a function"),
        (
            lambda: sample(respond=Respond(tool, max_turn_tokens=1)),
            "max_turn_tokens=1 must be at least min_new_tokens=2",
        ),
        (lambda: Respond(tool, max_turns=0), "respond.max_turns=0"),
        (lambda: Respond(tool, max_turn_tokens=1.5), "respond.max_turn_tokens=1.5"),  # type: ignore[arg-type]
        (lambda: Respond(tool, max_parallel=0), "respond.max_parallel=0"),
        (lambda: Respond(tool, timeout_s=0.0), "respond.timeout_s=0.0"),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
