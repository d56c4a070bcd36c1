"""The contract of `rollout` and `Rollout`, as someone who calls them reads it."""

from __future__ import annotations

import dataclasses
import itertools
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from er_jax import sampling
from er_jax.engine import engine
from er_jax.types import NONE, LogprobKind, Sampling
from tests.small import POLICY

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
KEY = jax.random.key(11)

# What rollouts compute, the tests of their promises show at the default level.
pytestmark = pytest.mark.usefixtures("unoptimized_module")


@pytest.fixture(scope="module")
def params() -> Any:
    return POLICY.init(jax.random.key(0))


def config(**changes: Any) -> er_jax.RolloutConfig:
    settings: dict[str, Any] = {"max_new_tokens": 12, "n": 2, "max_slots": 4}
    return er_jax.RolloutConfig(**(settings | {"control": "ar"} | changes))


def sample(
    params: Any, prompts: Any = PROMPTS, *, key: Any = KEY, **changes: Any
) -> er_jax.Rollout:
    names = ("sequence_ids", "controller", "on_finish", "progress", "profile")
    options = {name: changes.pop(name) for name in names if name in changes}
    return er_jax.rollout(
        POLICY, params, prompts, key=key, config=config(**changes), **options
    )


@pytest.fixture(scope="module")
def out(params: Any) -> er_jax.Rollout:
    """Six completions that end at their limit."""
    return sample(params)


def rows(out: er_jax.Rollout) -> list[list[int]]:
    """Return the sampled tokens of each completion."""
    pairs = zip(out.completion_ids, out.completion_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def assert_well_formed(out: er_jax.Rollout, prompts: Any, n: int, pad: int) -> None:
    """What holds for every `Rollout`."""
    count, width = len(prompts) * n, max(len(prompt) for prompt in prompts)
    limit = out.completion_ids.shape[1]
    for array, shape, dtype in (
        (out.prompt_ids, (count, width), np.int32),
        (out.prompt_mask, (count, width), np.bool_),
        (out.completion_ids, (count, limit), np.int32),
        (out.completion_mask, (count, limit), np.bool_),
        (out.logprobs, (count, limit), np.float32),
        (out.lengths, (count,), np.int32),
        (out.sequence_ids, (count,), np.int32),
    ):
        assert isinstance(array, np.ndarray)
        assert array.shape == shape
        assert array.dtype == dtype
    assert out.finish_reason.shape == (count,)
    for row in range(count):
        prompt = list(prompts[row // n])
        padding = width - len(prompt)
        assert out.prompt_ids[row].tolist() == [pad] * padding + prompt
        assert out.prompt_mask[row].tolist() == [False] * padding + [True] * len(prompt)
        length = int(out.lengths[row])
        assert out.completion_mask[row].tolist() == [
            index < length for index in range(limit)
        ]
        assert (out.completion_ids[row, length:] == pad).all()
        assert (out.logprobs[row, length:] == 0).all()
        assert (out.logprobs[row, :length] < 0).all()
        assert out.finish_reason[row] in ("stop", "length", "nonfinite")
    assert out.stats.num_tokens == out.lengths.sum()


def test_what_comes_back(out: er_jax.Rollout) -> None:
    assert_well_formed(out, PROMPTS, n=2, pad=0)
    assert out.lengths.tolist() == [12] * 6
    assert out.finish_reason.tolist() == ["length"] * 6
    assert out.sequence_ids.tolist() == list(range(6))


def test_the_completions_of_a_prompt_are_adjacent_and_different(
    params: Any, out: er_jax.Rollout
) -> None:
    assert out.prompt_ids[0].tolist() == out.prompt_ids[1].tolist()
    assert len({tuple(row) for row in rows(out)}) == 6
    # Prompts that are equal are one prompt to the engine, and yet two requests.
    twice = sample(params, [[1, 2, 3], [4, 5], [1, 2, 3]])
    assert_well_formed(twice, [[1, 2, 3], [4, 5], [1, 2, 3]], n=2, pad=0)
    assert rows(twice)[:4] == rows(out)[:4]
    assert len({tuple(row) for row in rows(twice)}) == 6
    assert twice.stats.num_prefilled == 2


def test_calls_repeat_and_keys_matter(params: Any, out: er_jax.Rollout) -> None:
    assert rows(sample(params)) == rows(out)
    other = sample(params, key=jax.random.key(12))
    assert all(a != b for a, b in zip(rows(other), rows(out), strict=True))


def test_prompts_of_one_process_are_all() -> None:
    prompts: Any = [[3], np.array([1, 2])]
    everything, rows = er_jax.gather_prompts(prompts, n=2)
    assert everything == [[3], [1, 2]]
    assert range(8)[rows] == range(4)
    assert er_jax.gather_prompts([]) == ([], slice(0, 0))
    # No number becomes that of another token on the way.
    assert er_jax.gather_prompts([[1 << 40, -(1 << 40)]])[0] == [[(1 << 31) - 1, -1]]
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        er_jax.gather_prompts([[3], []])


def test_kinds_of_prompts(params: Any, out: er_jax.Rollout) -> None:
    for make in (tuple, np.array, jnp.array, lambda p: np.array(p, np.uint8)):
        assert rows(sample(params, [make(prompt) for prompt in PROMPTS])) == rows(out)
    # A two-dimensional array is a sequence of prompts too.
    square = np.array([[1, 2], [4, 5]])
    assert_well_formed(sample(params, square), square.tolist(), n=2, pad=0)


def test_a_prompt_longer_than_the_usual_bucket(params: Any) -> None:
    prompts = [[*range(1, 18)], [3]]
    long = sample(params, prompts)
    assert_well_formed(long, prompts, n=2, pad=0)
    short = sample(params, [[3], [3]])
    assert rows(long)[2:] == rows(short)[2:]


def test_stops_are_included_and_masked_in(params: Any, out: er_jax.Rollout) -> None:
    stops = (rows(out)[0][3], rows(out)[3][7])
    stopped = sample(params, stop_token_ids=stops, pad_id=5)
    assert_well_formed(stopped, PROMPTS, n=2, pad=5)
    for free, row, reason in zip(
        rows(out), rows(stopped), stopped.finish_reason, strict=True
    ):
        at = [index for index, token in enumerate(free) if token in stops]
        assert row == (free[: at[0] + 1] if at else free)
        assert reason == ("stop" if at else "length")
    assert "stop" in stopped.finish_reason
    # The same in a list, with one of them twice, is the same request.
    again = sample(params, stop_token_ids=[*stops, stops[0]])
    assert rows(again) == rows(stopped)


def test_a_stop_with_the_last_token_allowed_is_a_stop(
    params: Any, out: er_jax.Rollout
) -> None:
    row = rows(out)[0]
    at = next(i for i in range(1, 12) if row[i] not in row[:i])
    stopped = sample(params, stop_token_ids=(row[at],), max_new_tokens=at + 1)
    assert rows(stopped)[0] == row[: at + 1]
    assert stopped.finish_reason[0] == "stop"


def test_a_limit_only_cuts(params: Any, out: er_jax.Rollout) -> None:
    for limit in (1, 7):
        short = sample(params, max_new_tokens=limit)
        assert_well_formed(short, PROMPTS, n=2, pad=0)
        assert rows(short) == [row[:limit] for row in rows(out)]
        np.testing.assert_allclose(
            short.logprobs, out.logprobs[:, :limit], rtol=0, atol=1e-5
        )


def test_a_pad_id_that_is_sampled_is_a_token_like_others(
    params: Any, out: er_jax.Rollout
) -> None:
    sampled = np.bincount(out.completion_ids.ravel())
    pad = int(np.argmax(sampled))
    assert sampled[pad] >= 4
    padded = sample(params, pad_id=pad)
    assert_well_formed(padded, PROMPTS, n=2, pad=pad)
    assert rows(padded) == rows(out)
    # Nor does one outside the vocabulary do harm, as trainers use for their losses.
    outside = sample(params, pad_id=-100, stop_token_ids=(rows(out)[0][2],))
    assert_well_formed(outside, PROMPTS, n=2, pad=-100)


@jax.jit
def forced_logits(params: Any, ids: Any, mask: Any) -> jax.Array:
    """Return logits over padded sequences in one pass, as a trainer computes them."""
    offsets = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    positions = jnp.where(mask, offsets, NONE)
    cache = POLICY.init_cache(*ids.shape)
    hidden, _ = POLICY.forward(params, jnp.where(mask, ids, 0), positions, cache)
    return POLICY.logits(params, hidden)


def forced(params: Any, out: er_jax.Rollout) -> np.ndarray:
    """Return the logits `[N, max_new_tokens, V]` that each sampled token came from."""
    ids = np.concatenate([out.prompt_ids, out.completion_ids], axis=1)
    mask = np.concatenate([out.prompt_mask, out.completion_mask], axis=1)
    start = out.prompt_ids.shape[1]
    return np.asarray(forced_logits(params, ids, mask))[:, start - 1 : -1]


@pytest.mark.parametrize("control", ["ar", "fixed:2"])
@pytest.mark.parametrize("kind", ["raw", "temperature", "processed"])
def test_logprobs_are_what_a_trainer_recomputes(
    params: Any, kind: Any, control: str
) -> None:
    made = sample(
        params,
        temperature=0.7,
        top_k=6,
        min_p=0.02,
        logprobs=kind,
        control=control,
        stop_token_ids=(3,),
    )
    assert_well_formed(made, PROMPTS, n=2, pad=0)
    logits = forced(params, made).astype(np.float64)
    if kind != "raw":
        logits = logits / 0.7
    if kind == "processed":
        order = -np.sort(-logits, axis=-1)
        cut = np.maximum(order[..., 5:6], order[..., :1] + np.log(0.02))
        logits = np.where(logits >= cut - 1e-6, logits, -np.inf)
    shifted = logits - logits.max(-1, keepdims=True)
    full = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    wanted = np.take_along_axis(full, made.completion_ids[..., None], -1)[..., 0]
    mask = made.completion_mask
    assert np.isfinite(wanted[mask]).all()  # nothing was sampled that is cut off
    np.testing.assert_allclose(made.logprobs[mask], wanted[mask], rtol=0, atol=1e-4)


def test_the_meanings_of_a_logprob_differ(params: Any) -> None:
    made = {
        kind: sample(params, temperature=0.7, top_k=6, logprobs=kind)
        for kind in ("raw", "temperature", "processed")
    }
    # The tokens are the same, and the kept ones gain what the others lose.
    assert rows(made["raw"]) == rows(made["temperature"]) == rows(made["processed"])
    assert (made["processed"].logprobs > made["temperature"].logprobs + 1e-3).all()
    assert np.abs(made["raw"].logprobs - made["temperature"].logprobs).max() > 0.1


def test_tokens_are_the_targets_noised_argmax(params: Any, out: er_jax.Rollout) -> None:
    """By the public recipe: key, sequence id, absolute position."""
    settings = Sampling(
        key=np.asarray(jax.random.key_data(KEY)),
        temperature=np.float32(1),
        top_k=np.int32(0),
        top_p=np.float32(1),
        min_p=np.float32(0),
        stop_ids=np.full(8, NONE, np.int32),
        logprob_kind=np.int32(LogprobKind.RAW),
    )
    lengths = out.prompt_mask.sum(axis=1)
    position = lengths[:, None] + np.arange(12)
    noised = sampling.noised_logprobs(
        jnp.asarray(forced(params, out)),
        settings,
        jnp.asarray(out.sequence_ids)[:, None],
        jnp.asarray(position, jnp.int32),
    )
    np.testing.assert_array_equal(np.argmax(noised, axis=-1), out.completion_ids)


def test_greedy(params: Any) -> None:
    made = sample(params, temperature=0.0)
    assert rows(made)[0] == rows(made)[1]
    best = forced(params, made).argmax(axis=-1)
    np.testing.assert_array_equal(made.completion_ids, best)
    # Its log-probability is that of the model, not of the certain choice...
    assert (made.logprobs < -1e-3).all()
    # ... unless that is what is asked for.
    processed = sample(params, temperature=0.0, logprobs="processed")
    assert (processed.logprobs == 0).all()


# Sequence ids.


def test_a_completion_is_sampled_again_by_its_id(
    params: Any, out: er_jax.Rollout
) -> None:
    for row in (0, 3, 5):
        again = sample(params, [PROMPTS[row // 2]], n=1, sequence_ids=[row])
        assert rows(again) == [rows(out)[row]]
        assert again.sequence_ids.tolist() == [row]
        np.testing.assert_allclose(again.logprobs[0], out.logprobs[row], atol=1e-5)


def test_ids_name_completions_in_any_order(params: Any, out: er_jax.Rollout) -> None:
    back = sample(params, PROMPTS[::-1], sequence_ids=[4, 5, 2, 3, 0, 1])
    assert rows(back) == [rows(out)[i] for i in (4, 5, 2, 3, 0, 1)]
    far = sample(params, sequence_ids=np.array([0, 9, 2**31 - 1, 7, 6, 5]))
    assert rows(far)[0] == rows(out)[0]
    assert rows(far)[5] == rows(out)[5]
    assert rows(far)[1] != rows(out)[1]
    assert far.sequence_ids.tolist() == [0, 9, 2**31 - 1, 7, 6, 5]


# Keys.


def test_typed_and_raw_keys_are_the_same_key(params: Any, out: er_jax.Rollout) -> None:
    raw = jax.random.key_data(KEY)
    assert raw.dtype == jnp.uint32
    for key in (raw, np.asarray(raw), jax.random.wrap_key_data(raw)):
        assert rows(sample(params, key=key)) == rows(out)


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_keys_of_other_generators(params: Any, generator: str) -> None:
    made = [
        rows(sample(params, key=jax.random.key(seed, impl=generator)))
        for seed in (1, 1, 2)
    ]
    assert made[0] == made[1]
    assert made[0] != made[2]


# Speculation.


def test_speculation_changes_nothing_but_the_rounds(
    params: Any, out: er_jax.Rollout
) -> None:
    fast = sample(params, control="fixed:2")
    assert_well_formed(fast, PROMPTS, n=2, pad=0)
    assert rows(fast) == rows(out)
    np.testing.assert_allclose(fast.logprobs, out.logprobs, rtol=0, atol=1e-4)
    assert set(fast.stats.tokens) == {2}
    assert fast.stats.rounds[2] < out.stats.rounds[0] == 72
    assert fast.stats.accepted[2].sum() == fast.stats.rounds[2]


def test_a_draft_may_be_brought(params: Any, out: er_jax.Rollout) -> None:
    policy_and_draft = er_jax.attach_draft(params, er_jax.DrafterConfig())
    made = sample(policy_and_draft, control="fixed:2")
    assert rows(made) == rows(out)
    assert made.stats.seconds["draft refresh"] == 0
    bare = sample(params, control="fixed:2")
    assert bare.stats.seconds["draft refresh"] > 0
    # Another model's weights as a draft: wrong nearly always, and harmless.
    other = er_jax.attach_draft(
        POLICY.init(jax.random.key(9)), er_jax.DrafterConfig()
    ).draft
    with pytest.warns(RuntimeWarning, match="drafts were kept at .* % where .* %"):
        stale = sample(
            er_jax.PolicyParams(policy=params, draft=other), control="fixed:2"
        )
    assert rows(stale) == rows(out)
    assert stale.stats.keep_rate(2) < 0.5 < made.stats.keep_rate(2)
    # Neither is used up.
    leaves = jax.tree.leaves((params, policy_and_draft))
    assert not any(leaf.is_deleted() for leaf in leaves)


@pytest.mark.slow
@pytest.mark.parametrize("accept", ["token", "block"])
def test_other_rules_keep_the_contract(params: Any, accept: Any) -> None:
    for control in ("ar", "fixed:2"):
        made = sample(params, control=control, accept=accept, stop_token_ids=(3, 4))
        assert_well_formed(made, PROMPTS, n=2, pad=0)
        again = sample(params, control=control, accept=accept, stop_token_ids=(3, 4))
        assert rows(again) == rows(made)
        for row in rows(made):
            assert not set(row[:-1]) & {3, 4}


# Telling.


def test_on_finish_hears_of_every_completion(params: Any, out: er_jax.Rollout) -> None:
    heard: dict[int, er_jax.Completion] = {}
    ids = [10, 11, 12, 13, 14, 15]
    made = sample(params, on_finish=heard.__setitem__, sequence_ids=ids)
    assert sorted(heard) == ids
    for row, sequence_id in enumerate(ids):
        completion = heard[sequence_id]
        assert completion.token_ids.tolist() == rows(made)[row]
        assert completion.token_ids.dtype == np.int32
        np.testing.assert_array_equal(completion.logprobs, made.logprobs[row])
        assert completion.finish_reason == made.finish_reason[row]


def test_a_failing_callback_loses_nothing(params: Any, out: er_jax.Rollout) -> None:
    def fail(sequence_id: int, completion: er_jax.Completion) -> None:
        raise KeyError("no such reward")

    with pytest.raises(er_jax.RolloutError, match="no such reward") as error:
        sample(params, on_finish=fail)
    assert isinstance(error.value.__cause__, KeyError)
    # All four rows of the batch had ended together, and the last two were under way.
    done = error.value.completions
    assert sorted(done) == [0, 1, 2, 3, 4, 5]
    assert [done[i].token_ids.tolist() for i in range(6)] == rows(out)


def test_what_a_callback_does_to_a_completion_changes_no_result(
    params: Any, out: er_jax.Rollout
) -> None:
    def spoil(sequence_id: int, completion: er_jax.Completion) -> None:
        completion.token_ids[:] = 0
        completion.logprobs[:] = np.nan

    made = sample(params, on_finish=spoil)
    np.testing.assert_array_equal(made.completion_ids, out.completion_ids)
    np.testing.assert_array_equal(made.logprobs, out.logprobs)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_callback_loses_nothing(
    params: Any, out: er_jax.Rollout, stop: type[BaseException]
) -> None:
    """What is no failure stays what it is, with what had finished."""

    def interrupt(sequence_id: int, completion: er_jax.Completion) -> None:
        raise stop

    with pytest.raises(stop) as error:
        sample(params, on_finish=interrupt)
    done: Any = error.value.completions  # type: ignore[attr-defined]
    assert sorted(done) == [0, 1, 2, 3, 4, 5]
    assert [done[i].token_ids.tolist() for i in range(6)] == rows(out)
    assert any("6 of 6 completions" in note for note in error.value.__notes__)


@pytest.mark.parametrize("at", ["wait", "fetch", "plan"])
def test_ctrl_c_at_any_time_loses_nothing_that_had_finished(
    params: Any, out: er_jax.Rollout, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a window runs, while rows are fetched, while the next one is planned."""
    owner, name = {
        "wait": (engine.RunningWindow, "wait"),
        "fetch": (engine.Engine, "fetch_rows"),
        "plan": (er_jax.Controller, "choose"),
    }[at]
    real: Any = getattr(owner, name)
    calls = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (1 if at == "fetch" else 2):
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt) as error:
        sample(params, max_slots=2)
    done: Any = error.value.completions  # type: ignore[attr-defined]
    # The two rows of the window that was over, and of the next one if it was under way.
    assert sorted(done) == ([0, 1] if at == "wait" else [0, 1, 2, 3])
    assert all(done[i].token_ids.tolist() == rows(out)[i] for i in done)
    # And the next call is none the worse for it.
    np.testing.assert_array_equal(sample(params).completion_ids, out.completion_ids)


def test_a_rollout_that_fails_within_another_loses_neither(params: Any) -> None:
    def ask_again(sequence_id: int, completion: er_jax.Completion) -> None:
        def fail(*_: Any) -> None:
            raise KeyError("no such reward")

        sample(params, [[1, 2]], n=1, sequence_ids=[777], on_finish=fail)

    with pytest.raises(er_jax.RolloutError) as error:
        sample(params, on_finish=ask_again)
    assert 777 not in error.value.completions
    assert set(error.value.completions) <= set(range(6))
    inner = error.value.__cause__
    assert isinstance(inner, er_jax.RolloutError)
    assert set(inner.completions) == {777}


def test_a_warning_made_an_error_loses_nothing() -> None:
    table = jnp.zeros((8, 8), jnp.float32).at[7].set(3e38)
    with pytest.raises(er_jax.RolloutError, match="non-finite logit") as error:
        er_jax.rollout(
            Table(), {"table": table}, [[7], [1]], key=KEY, config=config()
        )  # under `filterwarnings = error`
    assert len(error.value.completions) == 4


def test_nothing_is_printed_unless_asked(
    params: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(params)
    assert capsys.readouterr() == ("", "")
    sample(params, progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "6/6" in printed.err


def test_stats_add_up(params: Any, tmp_path: Path) -> None:
    made = sample(params, control="fixed:2", stop_token_ids=(3,))
    stats = made.stats
    assert stats.tokens == {2: int(made.lengths.sum())}
    assert sum(m.num_rounds for m in stats.timeline) >= stats.rounds[2] / 4
    assert stats.timeline[0].rows == 4
    assert stats.timeline[-1].num_live_after == 0
    assert all(value >= 0 for value in stats.seconds.values())
    assert stats.num_prefilled == 3
    text = stats.summary()
    assert f"{made.lengths.sum()} tokens" in text
    assert "gamma 2" in text
    stats.plot(tmp_path / "rollout.png")
    assert (tmp_path / "rollout.png").stat().st_size > 5_000


def test_seconds_are_those_of_the_call(
    params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that is a second further whenever it is read."""
    readings = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(readings)))
    made = sample(params)
    elapsed = next(readings)
    assert elapsed > 10
    assert 0.9 * elapsed < made.stats.total_s <= elapsed


# Controllers.


def test_a_controller_is_kept_by_the_caller(params: Any) -> None:
    controller = er_jax.Controller("fixed:2")
    sample(params, control="fixed:2", controller=controller)
    first = controller.acceptance.tested.copy()
    assert first.sum() > 0
    assert len(controller.table.seconds) == 1
    sample(params, control="fixed:2", controller=controller)
    assert (controller.acceptance.tested > first * 1.5).all()


def test_the_published_rule_samples_the_same_tokens(params: Any) -> None:
    plain = sample(params, control="ar")
    made = sample(params, control="paper")
    assert rows(made) == rows(plain)


def test_best_measures_once_and_then_knows(params: Any) -> None:
    controller = er_jax.Controller("best", (0, 2), patience=0)
    made = sample(params, control="best", gammas=(0, 2), controller=controller)
    measured = {(p.rows, p.gamma) for p in controller.table.seconds}
    assert {(1, 0), (1, 2)} <= measured
    state = controller.state_dict()
    again = er_jax.Controller("best", (0, 2), patience=1e9)
    again.load_state_dict(state)
    second = sample(params, control="best", gammas=(0, 2), controller=again)
    assert rows(second) == rows(made)
    assert second.stats.compiled == []


# A policy of one's own, and what is bad in it.


@dataclasses.dataclass(frozen=True)
class Table:
    """The least a policy can be: logits by the last token, nothing in the cache.

    Logits are the table's times a thousand, so that a finite table may overflow.
    """

    vocab_size: int = 8

    def init_cache(self, rows: int, length: int) -> Any:
        return jnp.zeros((rows, length), jnp.float32)

    def forward(self, params: Any, tokens: Any, positions: Any, cache: Any) -> Any:
        return params["table"][tokens], cache

    def logits(self, params: Any, hidden: Any) -> Any:
        return hidden * 1000.0


@pytest.mark.parametrize("control", ["ar", "fixed:2"])
def test_rows_that_turn_nonfinite_end_and_are_named(control: str) -> None:
    """Token 7 leads to logits that overflow; who never draws it is not concerned."""
    policy = Table()
    rng = np.random.default_rng(0)
    table = rng.normal(size=(8, 8)).astype(np.float32) / 1000
    good = {"table": jnp.asarray(table)}
    bad = {"table": good["table"].at[7].set(3e38)}
    settings = config(control=control, n=8, max_new_tokens=6)

    def run(params: Any, draft: Any) -> er_jax.Rollout:
        policy_and_draft = er_jax.PolicyParams(policy=params, draft=draft)
        return er_jax.rollout(
            policy, policy_and_draft, [[1], [2]], key=KEY, config=settings
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean = run(good, good)
    with pytest.warns(RuntimeWarning) as caught:
        made = run(bad, good)
    assert_well_formed(made, [[1], [2]], n=8, pad=0)
    ended = []
    for row, free in enumerate(rows(clean)):
        at = free.index(7) if 7 in free[:-1] else None
        if at is None:
            assert rows(made)[row] == free
            assert made.finish_reason[row] == "length"
        else:
            assert rows(made)[row] == free[: at + 1]
            assert made.finish_reason[row] == "nonfinite"
            ended.append(row)
    assert 3 <= len(ended) <= 13
    (warning,) = caught
    message = str(warning.message)
    assert f"{len(ended)} of 16" in message
    assert str(ended) in message
    assert warning.filename == __file__  # it points at the caller


def test_a_broken_draft_costs_no_token() -> None:
    policy = Table()
    rng = np.random.default_rng(0)
    good = {"table": jnp.asarray(rng.normal(size=(8, 8)) / 1000, jnp.float32)}
    spoilt = {"table": jnp.full((8, 8), jnp.nan)}
    runs = [
        er_jax.rollout(
            policy,
            er_jax.PolicyParams(policy=good, draft=draft),
            [[1], [2]],
            key=KEY,
            config=config(control="fixed:2", n=8, max_new_tokens=6),
        )
        for draft in (good, spoilt)
    ]
    assert rows(runs[0]) == rows(runs[1])
    assert runs[0].stats.keep_rate(2) > 0.9 > runs[1].stats.keep_rate(2)


@pytest.mark.parametrize("act_bits", [8, 16])
def test_parameters_bound_to_a_device_may_have_a_draft_of_4_bits(
    params: Any, act_bits: int
) -> None:
    """As those are that a checkpoint was restored to."""
    bound = jax.device_put(params, jax.devices()[0])
    drafter = er_jax.DrafterConfig(bits=4, act_bits=act_bits)  # type: ignore[arg-type]
    out = sample(er_jax.attach_draft(bound, drafter), control="fixed:2")
    assert rows(out) == rows(sample(params))


def test_a_profile_is_written_and_changes_nothing(
    params: Any, out: er_jax.Rollout, tmp_path: Path
) -> None:
    traced = sample(params, profile=tmp_path)
    assert rows(traced) == rows(out)
    assert list(tmp_path.rglob("*.xplane.pb"))
