"""Rollouts that end early and go on: the tokens of one that never was interrupted."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from benchmarks.lib.controllers import Restless
from er_jax import Rollout, Stop, Until
from er_jax.control.controller import Controller
from er_jax.engine.engine import Engine
from er_jax.request import request_of
from er_jax.resume import completions_of, earlier_rollout
from er_jax.scheduler import batch
from er_jax.types import Finish, Program
from tests.small import SIZES

pytestmark = pytest.mark.usefixtures("unoptimized_module")

SIZES64 = dataclasses.replace(SIZES, dtype="float64")
POLICY = er_jax.Decoder(SIZES64)
PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
CONFIG = er_jax.RolloutConfig(
    max_new_tokens=40, n=2, max_slots=4, stop_token_ids=(11, 17), control="best",
    gammas=(0, 3), drafter=er_jax.DrafterConfig(window=None),
)  # fmt: skip
KEY = jax.random.key(5)


def params() -> Any:
    return POLICY.init(jax.random.key(0))


class Ending(Restless):
    """Calls a function at its k-th decision; its programs are chosen at random."""

    def __init__(self, at: int, act: Callable[[], None], seed: int = 0) -> None:
        super().__init__("best", (0, 3), (1, 2, 4), seed)
        self.left, self.act = at, act

    def choose(
        self, options: Sequence[Program], current: Program | None, **known: Any
    ) -> Program:
        self.left -= 1
        if self.left == 0:
            self.act()
        return super().choose(options, current, **known)


def sample(config: er_jax.RolloutConfig = CONFIG, **named: Any) -> Rollout:
    return er_jax.rollout(POLICY, params(), PROMPTS, key=KEY, config=config, **named)


def ended_after(decisions: int, seed: int = 0, **named: Any) -> Rollout:
    stop = Stop()
    return sample(
        controller=Ending(decisions, stop, seed), until=Until(stop=stop), **named
    )


def assert_same(found: Rollout, wanted: Rollout) -> None:
    for name in ("completion_ids", "lengths", "finish_reason", "prompt_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)


def is_prefix(part: Rollout, whole: Rollout) -> bool:
    mask = part.completion_mask
    return bool((part.completion_ids[mask] == whole.completion_ids[mask]).all())


@pytest.fixture
def wanted(x64: None) -> Rollout:
    return sample(controller=Controller("best", (0, 3)))


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MIN_ROUNDS", 3)


@pytest.mark.usefixtures("short_windows")
@pytest.mark.slow
def test_going_on_equals_never_having_stopped(wanted: Rollout, tmp_path: Path) -> None:
    """Stopped after some number of decisions, and gone on once or many times."""
    most = 0
    for decisions in (1, 3):
        part = ended_after(decisions, seed=decisions)
        assert "unfinished" in part.finish_reason
        assert is_prefix(part, wanted)
        assert (part.version == np.where(part.completion_mask, 0, -1)).all()
        path = tmp_path / f"{decisions}.npz"
        part.save(path)
        other = dataclasses.replace(CONFIG, max_slots=2)
        restless = Restless("best", (0, 3), (1, 2), 1)
        seen: dict[int, Any] = {}
        found = sample(
            other, resume=path, controller=restless, on_finish=seen.__setitem__
        )
        assert_same(found, wanted)
        is_open = part.finish_reason == "unfinished"
        assert sorted(seen) == np.flatnonzero(is_open).tolist(), "sampled again"
        times = 0
        while "unfinished" in part.finish_reason:
            times += 1
            before = part
            part = ended_after(2, seed=times, resume=part, version=times)
            old = before.completion_mask
            np.testing.assert_array_equal(part.version[old], before.version[old])
            assert (part.version[part.completion_mask & ~old] == times).all()
            assert times < 60
        assert_same(part, wanted)
        most = max(most, times)
    assert most > 2


def test_a_completion_that_ended_by_length_goes_on_at_a_higher_limit(
    wanted: Rollout,
) -> None:
    short = sample(dataclasses.replace(CONFIG, max_new_tokens=12, control="ar"))
    assert {"length", "stop"} <= set(short.finish_reason.tolist())
    assert_same(sample(resume=short, controller=Controller("best", (0, 3))), wanted)
    with pytest.raises(ValueError, match=r"max_new_tokens=12 .* holds one of 31"):
        sample(dataclasses.replace(CONFIG, max_new_tokens=12), resume=wanted)


@pytest.mark.usefixtures("short_windows")
def test_what_waits_for_a_higher_limit_is_unfinished(wanted: Rollout) -> None:
    """Rather than ended by the limit of before."""
    short = sample(dataclasses.replace(CONFIG, max_new_tokens=4, control="ar"))
    config = dataclasses.replace(CONFIG, max_slots=1, control="ar")
    part = sample(config, resume=short, until=Until(tokens=1))
    waits = (part.lengths == short.lengths) & (short.finish_reason == "length")
    assert waits.any()
    assert set(part.finish_reason[waits].tolist()) == {"unfinished"}
    assert is_prefix(part, wanted)


def test_a_stop_at_the_limit_of_now_is_a_stop(x64: None) -> None:
    """Of a turn that waited for an answer, when the limit was higher."""
    config = dataclasses.replace(CONFIG, max_new_tokens=12, control="ar")
    short = sample(config)
    row = int(np.argmax(short.finish_reason == "stop"))
    length = int(short.lengths[row])
    finish = np.where(np.arange(8) == row, Finish.UNFINISHED, short.finish)
    part = dataclasses.replace(short, finish=finish.astype(np.int32))
    prompt, n = PROMPTS[row // 2], dataclasses.replace(config, n=1)
    own = part.for_request([prompt], [row])
    ended, begun = completions_of(own, dataclasses.replace(n, max_new_tokens=length))
    assert (ended[0].finish_reason, begun) == ("stop", {})


def test_who_ends_without_another_token_is_told_of(x64: None) -> None:
    """Unfinished completions that have all that the limit of now allows."""
    config = dataclasses.replace(CONFIG, max_new_tokens=12, control="ar")
    short = sample(config)
    is_open = short.finish_reason == "length"
    assert is_open.any() and not is_open.all()
    finish = np.where(is_open, Finish.UNFINISHED, short.finish).astype(np.int32)
    part = dataclasses.replace(short, finish=finish)
    seen: dict[int, Any] = {}
    found = sample(config, resume=part, on_finish=seen.__setitem__)
    assert_same(found, short)
    assert sorted(seen) == np.flatnonzero(is_open).tolist()
    assert {completion.finish_reason for completion in seen.values()} == {"length"}
    with er_jax.stream(
        POLICY, params(), PROMPTS, key=KEY, config=config, resume=part, by="group"
    ) as items:
        groups = sorted(prompt for prompt, _ in items)
    assert groups == np.flatnonzero(is_open.reshape(4, 2).any(1)).tolist()


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize(
    ("until", "reached"),
    [
        (Until(finished=3), lambda out: (out.finish_reason != "unfinished").sum() >= 3),
        (Until(tokens=30), lambda out: out.stats.num_tokens >= 30),
        # The window that has just ended counts.
        (Until(tokens=1), lambda out: len(out.stats.timeline) == 1),
        (
            Until(groups=1),
            lambda out: (out.finish_reason != "unfinished").reshape(4, 2).all(1).any(),
        ),
        (Until(seconds=1e-6), lambda out: len(out.stats.timeline) == 1),
    ],
    ids=["finished", "tokens", "first token", "groups", "seconds"],
)
def test_what_ends_a_rollout(
    wanted: Rollout, until: Until, reached: Callable[[Rollout], bool]
) -> None:
    out = sample(until=until, controller=Restless("best", (0, 3), (4,), 0))
    assert "unfinished" in out.finish_reason
    assert reached(out)
    assert is_prefix(out, wanted)
    # It had not been reached one window before.
    before = out.stats.timeline[:-1]
    assert all(moment.live for moment in before)


@pytest.mark.usefixtures("short_windows")
def test_ctrl_c_gives_everything_and_it_goes_on(wanted: Rollout) -> None:
    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        sample(controller=Ending(3, interrupt))
    part: Rollout = caught.value.rollout  # type: ignore[attr-defined]
    assert is_prefix(part, wanted)
    assert part.completion_mask.any()
    assert set(caught.value.completions) == set(  # type: ignore[attr-defined]
        np.flatnonzero(part.finish_reason != "unfinished").tolist()
    )
    controller = Restless("best", (0, 3), (4,), 0)
    assert_same(sample(resume=part, controller=controller), wanted)


@pytest.mark.usefixtures("short_windows")
def test_ctrl_c_keeps_what_had_ended_in_an_earlier_call(wanted: Rollout) -> None:
    part = sample(until=Until(finished=2), controller=Ending(0, Stop()))
    ended = np.flatnonzero(part.finish_reason != "unfinished")
    assert 0 < len(ended) < len(part.lengths)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        sample(resume=part, controller=Ending(2, interrupt))
    later: Rollout = caught.value.rollout  # type: ignore[attr-defined]
    assert (later.lengths >= part.lengths).all()
    for name in ("completion_ids", "logprobs", "finish"):
        was, now = getattr(part, name)[ended], getattr(later, name)[ended]
        np.testing.assert_array_equal(now, was)
    assert is_prefix(later, wanted)


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize(("name", "calls"), [("admit", 1), ("start_window", 3)])
def test_ctrl_c_while_a_program_has_the_state(
    wanted: Rollout, name: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it gave is lost then; what the window before it gave is not."""
    own, left = getattr(Engine, name), calls

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        result, left = own(*arguments, **named), left - 1
        if left < 0:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Engine, name, interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            sample(controller=Restless("best", (0, 3), (4,), 0))
    part = getattr(caught.value, "rollout", None)
    assert part is not None
    assert is_prefix(part, wanted)
    assert part.completion_mask.sum() == part.stats.num_tokens > 0
    assert_same(sample(resume=part, controller=Controller("best", (0, 3))), wanted)


def test_nothing_is_sampled_where_all_has_ended(wanted: Rollout) -> None:
    again = sample(resume=wanted, version=7)
    assert_same(again, wanted)
    assert not again.stats.timeline
    assert set(again.version[again.completion_mask]) == {0}


# -- files, and what is refused


def some_rollout() -> Rollout:
    count, width = 8, 40
    mask = np.arange(width)[None] < np.arange(count)[:, None] + 1
    longest = max(map(len, PROMPTS))
    prompt_ids = np.zeros((count, longest), np.int32)
    prompt_mask = np.zeros((count, longest), bool)
    for row in range(count):
        prompt = PROMPTS[row // 2]
        prompt_ids[row, longest - len(prompt) :] = prompt
        prompt_mask[row, longest - len(prompt) :] = True
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=np.where(mask, 5, 0).astype(np.int32),
        completion_mask=mask,
        logprobs=np.where(mask, -1.5, 0).astype(np.float32),
        lengths=mask.sum(axis=1).astype(np.int32),
        finish=np.array(
            [Finish.UNFINISHED, Finish.STOP, Finish.LENGTH, Finish.NONFINITE] * 2,
            np.int32,
        ),
        version=np.where(mask, 3, -1).astype(np.int32),
        sequence_ids=np.arange(count, dtype=np.int32),
        stats=er_jax.RolloutStats(),
    )


def cut(whole: Rollout, lengths: Sequence[int]) -> Rollout:
    """Return a rollout as if it had ended when completions had these lengths."""
    is_token = np.arange(whole.completion_ids.shape[1]) < np.array(lengths)[:, None]
    return dataclasses.replace(
        whole,
        completion_ids=np.where(is_token, whole.completion_ids, 0),
        completion_mask=is_token,
        logprobs=np.where(is_token, whole.logprobs, 0),
        lengths=np.array(lengths),
        finish=np.full(len(lengths), Finish.UNFINISHED, np.int32),
        version=np.where(is_token, 0, -1),
    )


@pytest.mark.parametrize("slots", [8, 3])
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param((0, 1, 16, 5, 2, 9, 3, 12), id="at once"),
        pytest.param((0, 5, 17, 64, 65, 130, 16, 256), id="pieces"),
        pytest.param((300, 5, 301, 64, 65, 128, 0, 290), id="as long as rows"),
    ],
)
def test_completions_of_a_prompt_share_its_prefill(
    lengths: Sequence[int], slots: int, x64: None
) -> None:
    """Each token of a prompt or of a completion is prefilled once."""
    config = dataclasses.replace(
        CONFIG, max_new_tokens=320, max_slots=slots, control="ar", stop_token_ids=()
    )
    whole = sample(config)
    found = sample(config, resume=cut(whole, lengths))
    assert_same(found, whole)
    stats = found.stats
    assert stats.num_resumed == sum(lengths)
    wanted = [len(PROMPTS[i // CONFIG.n]) for i in range(len(lengths))]
    if slots == 8:  # Rows are not used again.
        assert stats.num_prefilled == len(PROMPTS)
        wanted = [len(prompt) - 1 for prompt in PROMPTS]
    assert stats.prefilled_tokens <= sum(wanted) + sum(lengths)
    assert stats.prefilled_tokens >= sum(map(len, PROMPTS)) - 4 + sum(lengths)


def test_a_file_holds_all_but_the_statistics(tmp_path: Path) -> None:
    path, wanted = tmp_path / "rollout.npz", some_rollout()
    wanted.save(path)
    found = Rollout.load(path)
    for field in dataclasses.fields(Rollout):
        if field.name != "stats":
            mine, theirs = (getattr(x, field.name) for x in (found, wanted))
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
    assert [p.name for p in tmp_path.iterdir()] == ["rollout.npz"]
    data = path.read_bytes()
    for damaged in (b"", b"text", data[: len(data) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"rollout.npz holds no rollout"):
            Rollout.load(path)
    np.savez(path, lengths=np.ones(3))
    with pytest.raises(ValueError, match=r"rollout.npz holds no rollout"):
        Rollout.load(path)


def test_seconds_are_those_of_the_whole_call(
    x64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a call does before it samples counts, though nothing runs then."""
    module = sys.modules["er_jax.rollout"]
    before_s, seen = 100.0, list[float]()
    prepare = module.prepare
    clock = time.perf_counter
    late = 0.0

    def slow(*arguments: Any, **named: Any) -> Any:
        nonlocal late
        late = before_s
        return prepare(*arguments, **named)

    def is_reached(until: Until, *, seconds: float, **counts: int) -> bool:
        seen.append(seconds)
        return True

    monkeypatch.setattr(module, "prepare", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late)
    monkeypatch.setattr(Until, "is_reached", is_reached)
    sample(until=Until(seconds=1.0), controller=Restless("best", (0, 3), (4,), 0))
    assert seen
    assert seen[0] > before_s


def test_a_rollout_that_went_through_jax_is_taken(x64: None) -> None:
    """Its arrays are those of a device then, and it has no statistics."""
    prompts = [np.array(prompt, np.int32) for prompt in PROMPTS]
    wanted = some_rollout()
    found = earlier_rollout(
        jax.device_put(wanted), prompts, np.arange(8), CONFIG, SIZES.vocab_size
    )
    assert {type(leaf) for leaf in jax.tree.leaves(found)} == {np.ndarray}
    assert found.finish_reason is found.finish_reason, "made again at every look"
    for mine, theirs in zip(
        completions_of(found, CONFIG), completions_of(wanted, CONFIG), strict=True
    ):
        assert mine.keys() == theirs.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_ids": np.arange(1, 9, dtype=np.int32)}, "sequence id 1 in row 0"),
        ({"sequence_ids": np.arange(6, dtype=np.int32)}, "holds 6 completions"),
        ({"prompt_ids": np.zeros((8, 4), np.int32)}, "another prompt .* in row 0"),
        ({"completion_ids": np.full((8, 40), 99, np.int32)}, "outside 0 .. 23"),
    ],
)
def test_a_rollout_of_another_request_is_refused(
    changes: dict[str, np.ndarray], message: str, x64: None
) -> None:
    other = dataclasses.replace(some_rollout(), **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        sample(resume=other)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"resume": 3}, "resume=int must be a Rollout, or the path"),
        ({"version": -1}, "version=-1 must be a whole number"),
        ({"until": 5.0}, r"until=5.0 must be an er_jax.Until"),
    ],
)
def test_wrong_arguments_are_refused(
    named: dict[str, Any], message: str, x64: None
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(**named)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"seconds": 0}, "seconds=0 must be a number above 0"),
        ({"seconds": "1"}, "seconds='1'"),
        ({"finished": 0}, "finished=0 must be a whole number of at least 1"),
        ({"tokens": 2.5}, "tokens=2.5"),
        ({"stop": True}, r"stop=True must be an er_jax.Stop"),
    ],
)
def test_wrong_ends_are_refused(named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Until(**named)


def test_what_has_begun_is_part_of_the_prompt() -> None:
    prompts = [np.array(prompt, np.int32) for prompt in PROMPTS]
    ended, begun = completions_of(some_rollout(), CONFIG)
    assert sorted(ended) == [1, 3, 5, 7], "a length below the limit is no end"
    request = request_of(
        prompts, np.arange(8), CONFIG,
        begun={s: found.token_ids for s, found in begun.items()}, ended=ended,
    )  # fmt: skip
    assert request.waiting == [0, 2, 4, 6]
    for sequence in request.waiting:
        known = request.prompts[request.prompt_of[sequence]]
        assert known.tolist() == PROMPTS[sequence // 2] + [5] * (sequence + 1)
        assert request.limit(sequence) == len(PROMPTS[sequence // 2]) + 40
    fresh = request_of(prompts, np.arange(8), CONFIG)
    assert fresh.limit(6) == request.limit(6)
    # Long beginnings do not make the cache longer than what rows can reach.
    longer = request_of(
        prompts, np.arange(8), dataclasses.replace(CONFIG, max_new_tokens=4000),
        begun={0: np.ones(3900, np.int32)},
    )  # fmt: skip
    assert longer.cache_lengths[-1] == 4096


# -- memory ----------------------------------------------------------------------------


def resident_bytes() -> int:
    """Return the memory that this process has in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "count",
    [
        pytest.param(200, marks=pytest.mark.slow),
        pytest.param(1000, marks=pytest.mark.long),
    ],
)
def test_interrupted_rollouts_hold_no_memory(count: int, x64: None) -> None:
    """Ended by a limit, by a call and by Ctrl-C in turn, each goes on once."""
    config = dataclasses.replace(CONFIG, max_new_tokens=8)

    def ctrl_c() -> None:
        raise KeyboardInterrupt

    def interrupt_one(number: int) -> None:
        # All programs are chosen by these controllers, and so compiled early.
        stop = Stop()
        if number % 3 == 0:
            until, controller = Until(tokens=3), Ending(-1, ctrl_c)
        elif number % 3 == 1:
            until, controller = Until(stop=stop), Ending(1, stop)
        else:
            until, controller = None, Ending(2, ctrl_c)
        try:
            early = sample(config, until=until, controller=controller)
        except KeyboardInterrupt as interrupted:
            early = interrupted.rollout  # type: ignore[attr-defined]
        assert "unfinished" in early.finish_reason
        whole = sample(config, resume=early, controller=Ending(-1, ctrl_c))
        assert "unfinished" not in whole.finish_reason

    def held() -> tuple[int, int, int]:
        gc.collect()
        return len(jax.live_arrays()), len(gc.get_objects()), resident_bytes()

    for number in range(100):
        interrupt_one(number)
    arrays, objects, used = held()
    for number in range(count):
        interrupt_one(number)
    arrays_after, objects_after, used_after = held()
    assert arrays_after <= arrays
    assert objects_after - objects < 100  # not one for each
    assert used_after - used < 2e6  # of 1000, not 2 kB for each
