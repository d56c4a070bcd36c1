"""Partial rollouts in training: nothing is lost, sampled twice or learnt from twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from configs import tiny
from er_jax.types import Finish
from tests.test_resume import PROMPTS, some_rollout
from tests.test_train_resume import files_of, flip
from train import partial
from train.checkpoints import Checkpoints, DamagedError
from train.compare import CompareConfig
from train.config import (
    GRPOConfig,
    MeshConfig,
    PartialConfig,
    RunConfig,
    differences,
    to_json,
)
from train.run import resume, run, save
from train.trainer import Trainer

STEPS = 3
GRPO = dataclasses.replace(
    tiny.CONFIG.grpo,
    group_size=2,
    prompts_per_step=4,
    max_slots=4,  # of twelve completions: those that begin late are not complete
    updates_per_step=1,
    learning_rate=3e-2,  # so that parameters of different steps differ visibly
    bucket_lengths=(48,),
    partial=PartialConfig(over=1.5),
)
CONFIG = dataclasses.replace(tiny.CONFIG, control="ar", grpo=GRPO)


def with_age(config: RunConfig, max_age: int) -> RunConfig:
    part = PartialConfig(over=1.5, max_age=max_age)
    return dataclasses.replace(
        config, grpo=dataclasses.replace(config.grpo, partial=part)
    )


def trainer_of(out: Path, config: RunConfig = CONFIG) -> Trainer:
    """A trainer whose policy is not warmed up, with rewards that differ."""
    trainer = Trainer.of(dataclasses.replace(config, out=out))
    trainer.subject.reward = lambda text, answer, *, finished: float(len({*text}))
    trainer.start_from(trainer.policy.init(trainer.keys["init"]))
    return trainer


# -- three steps of training


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("max_age", [1, 4])
def test_all_is_learnt_once_from_what_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_age: int
) -> None:
    trainer = trainer_of(tmp_path, with_age(CONFIG, max_age))
    config = trainer.config.rollout_config(group_size=2)
    examples: list[Any] = []
    update = trainer._update

    def watched(found: Any) -> Any:
        examples[:] = found
        return update(found)

    monkeypatch.setattr(trainer, "_update", watched)
    policies, learnt, num_sampled, num_learnt = [], [], 0, 0
    num_old = num_moved = 0
    for step in range(STEPS):
        policies.append(jax.tree.map(np.array, trainer.state.params.policy))
        before = trainer.carried
        data = trainer.rollout_step()
        out, carried = data.out, data.carried
        assert carried is not None
        assert out.lengths.shape == (8,) and carried.lengths.shape == (4,)
        assert (out.finish != Finish.UNFINISHED).all()
        num_sampled += out.stats.num_tokens

        # What was carried has kept its tokens, with their numbers.
        now = {
            int(name): jax.tree.map(lambda array, row=row: array[row], found)
            for found in (out, carried)
            for row, name in enumerate(found.sequence_ids)
        }
        for row in range(0 if before is None else len(before.lengths)):
            assert before is not None
            old = jax.tree.map(lambda array, row=row: array[row], before)
            new = now[int(old.sequence_ids)]
            for name in ("completion_ids", "logprobs", "version"):
                kept = getattr(new, name)[: old.lengths]
                np.testing.assert_array_equal(kept, getattr(old, name)[: old.lengths])
            assert (new.version[old.lengths : new.lengths] == step).all()

        record = trainer.learn(data)
        learnt += out.sequence_ids.tolist()
        num_learnt += int(out.lengths.sum())
        age = (step - out.version)[out.completion_mask]
        assert 0 <= age.min() and age.max() == record["max_age"] <= max_age
        assert record["mean_age"] == pytest.approx(age.mean())
        assert record["old_tokens"] == pytest.approx((age > 0).mean())
        assert record["carried_tokens"] == carried.lengths.sum()
        assert record["position"] == 6 + 4 * step
        assert record["logprob_gap"] < 1e-3, "what was learnt since is no such gap"

        # The loss divides by the probability under the parameters that sampled a token.
        scores = np.array(
            [
                er_jax.score(trainer.policy, params, out, config=config).logprobs
                for params in policies
            ]
        )
        own = np.take_along_axis(scores, np.maximum(out.version, 0)[None], 0)[0]
        behavior = np.zeros_like(out.logprobs)
        assert len(examples) == 8
        for row, example in enumerate(examples):
            behavior[row, : out.lengths[row]] = example.behavior_logprobs
        np.testing.assert_allclose(behavior, out.logprobs, atol=0)
        np.testing.assert_allclose(
            behavior, np.where(out.completion_mask, own, 0), atol=1e-4
        )
        is_old = out.completion_mask & (out.version < step)
        num_old += is_old.sum()
        num_moved += (np.abs(scores[step] - behavior)[is_old] > 1e-2).sum()
    assert num_moved > 0.5 * num_old > 0

    assert len({*learnt}) == len(learnt), "learnt from twice"
    rest = trainer.carried
    assert rest is not None
    assert {*learnt, *rest.sequence_ids.tolist()} == {*range(record["position"] * 2)}
    assert num_sampled == num_learnt + rest.lengths.sum(), "sampled twice"
    stream = [trainer.subject.tokenizer.encode_prompt(p.prompt) for p in
              trainer._problems(partial.positions_of(rest, 2))]  # fmt: skip
    held = rest.for_request(stream, rest.sequence_ids.tolist())  # of these prompts
    np.testing.assert_array_equal(held.completion_ids, rest.completion_ids)


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_a_resumed_run_goes_on_with_what_was_carried(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        save(trainer, checkpoints)
        trainer.learn(trainer.rollout_step())
        save(trainer, checkpoints)
    carried = trainer.carried
    assert carried is not None and carried.lengths.any()
    again = Trainer.of(dataclasses.replace(trainer.config, resume=True))
    assert resume(again)
    assert again.carried is not None
    for field in dataclasses.fields(carried):
        if field.name != "stats":
            mine, theirs = (getattr(x, field.name) for x in (again.carried, carried))
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
    config = dataclasses.replace(trainer.config, resume=True, steps=2)
    steps = [record for record in run(config) if record["kind"] == "step"]
    assert [record["position"] for record in steps] == [6, 10]
    other = dataclasses.replace(
        config, grpo=dataclasses.replace(GRPO, partial=PartialConfig())
    )
    with pytest.raises(ValueError, match=r"grpo.partial.over: 1.5 -> 1.0"):
        run(other)


def test_a_damaged_carry_is_named(tmp_path: Path) -> None:
    params, host = {"w": np.ones(3, np.float32)}, {"config": "none"}
    with Checkpoints(tmp_path) as checkpoints:
        for step, carried in enumerate((None, some_rollout())):
            checkpoints.save(
                step, policy=params, trainer=params, host=host, carried=carried
            )
        found = checkpoints.restore(policy=params, trainer=params)
        assert found.carried is not None
        np.testing.assert_array_equal(found.carried.version, some_rollout().version)
        assert (
            checkpoints.restore(policy=params, trainer=params, step=0).carried is None
        )
        folder = tmp_path / "checkpoints" / "1" / "carried"
        files = [folder / name for name in files_of(folder)]
        data = max(files, key=lambda path: path.stat().st_size)
        flip(data, 0.5)
        with pytest.raises(DamagedError, match=r"'carried' .*--resume-step 0"):
            checkpoints.restore(policy=params, trainer=params)


# -- which groups, and when a rollout ends


def rollout_of(lengths: list[int], finish: list[Finish], ids: list[int]) -> Any:
    """Completions of groups of two, whose tokens are of step 3."""
    mask = np.arange(4)[None] < np.array(lengths)[:, None]
    return dataclasses.replace(
        jax.tree.map(lambda array: array[: len(ids)], some_rollout()),
        lengths=np.array(lengths, np.int32),
        completion_mask=mask,
        version=np.where(mask, 3, -1).astype(np.int32),
        finish=np.array(finish, np.int32),
        sequence_ids=np.array(ids, np.int32),
    )


STOP, OPEN = Finish.STOP, Finish.UNFINISHED


def test_the_oldest_complete_groups_are_learnt_from() -> None:
    grpo = GRPOConfig(prompts_per_step=2, group_size=2, partial=PartialConfig(over=2.0))
    finish = [STOP, OPEN, STOP, STOP, STOP, STOP, STOP, STOP]
    out = rollout_of([1, 2, 3, 4, 1, 2, 3, 4], finish, [4, 5, 8, 9, 14, 15, 16, 17])
    groups, learnt, others = partial.divided(out, grpo)
    assert groups.tolist() == [1, 2]
    assert learnt.sequence_ids.tolist() == [8, 9, 14, 15]
    assert others.sequence_ids.tolist() == [4, 5, 16, 17]
    assert partial.positions_of(others, 2) == [2, 8]


@pytest.mark.parametrize("step", [4, 5, 7])
def test_a_group_that_comes_of_age_is_waited_for(step: int) -> None:
    """Tokens are of step 3: with an age of two at most, in step 5 for the last time."""
    grpo = GRPOConfig(
        prompts_per_step=2, group_size=2, partial=PartialConfig(over=2.0, max_age=2)
    )
    # Group 2 lacks one completion, group 4 is complete, group 7 has no token yet.
    finish = [STOP, OPEN, STOP, STOP, OPEN, OPEN]
    carried = rollout_of([1, 2, 3, 4, 0, 0], finish, [4, 5, 8, 9, 14, 15])
    named = partial.Ending(carried, step, grpo).arguments
    if step < 5:
        assert named == {"until": er_jax.Until(groups=2)}
        return
    assert named["until"].groups is None
    stop, told = named["until"].stop, named["on_finish"]
    nothing: Any = None
    told(14, nothing)
    told(15, nothing)  # two groups are complete now
    assert not stop.is_set
    told(5, nothing)
    assert stop.is_set


def test_enough_groups_are_waited_for_beside_the_old_ones() -> None:
    grpo = GRPOConfig(
        prompts_per_step=2, group_size=2, partial=PartialConfig(over=1.5, max_age=1)
    )
    carried = rollout_of([1, 2], [STOP, OPEN], [4, 5])
    named = partial.Ending(carried, 4, grpo).arguments
    stop, told = named["until"].stop, named["on_finish"]
    nothing: Any = None
    for sequence_id in (5, 6):
        told(sequence_id, nothing)
        assert not stop.is_set
    told(7, nothing)
    assert stop.is_set


def test_what_begins_now_may_end_by_a_count() -> None:
    named = partial.Ending(None, 0, GRPO).arguments
    assert named == {"until": er_jax.Until(groups=4)}


# -- settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"over": 0.9}, r"over=0.9: give one in \[1, 2\]"),
        ({"over": 2.5}, r"over=2.5: give one in \[1, 2\]"),
        ({"max_age": 0}, "max_age=0: give >= 1"),
    ],
)
def test_bad_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartialConfig(**fields)


def test_what_does_not_go_together() -> None:
    part = PartialConfig(over=1.5)
    with pytest.raises(ValueError, match=r"over=1.25: of 1 prompts that is no prompt"):
        GRPOConfig(prompts_per_step=1, partial=PartialConfig(over=1.25))
    with pytest.raises(ValueError, match="leave out stream"):
        GRPOConfig(stream=True, partial=part)
    grpo = GRPOConfig(partial=part)
    with pytest.raises(ValueError, match=r"grpo.partial.over=1.5: it is for one"):
        RunConfig(grpo=grpo, mesh=MeshConfig(replicas=True))
    with pytest.raises(ValueError, match=r"reproducible=True: .* by the clock"):
        RunConfig(grpo=grpo, control="ar", reproducible=True)
    with pytest.raises(ValueError, match=r"partial.over=1.5: .* by the clock"):
        CompareConfig(run=RunConfig(grpo=grpo))


def test_a_run_from_before_there_were_partial_rollouts_goes_on() -> None:
    earlier = to_json(tiny.CONFIG)
    del earlier["grpo"]["partial"]
    assert differences(earlier, to_json(tiny.CONFIG)) == []
    assert "grpo.partial.over: 1.0 -> 1.5" in differences(earlier, to_json(CONFIG))


# -- Rollout.for_request


def test_a_request_gets_what_is_there_of_it() -> None:
    whole = some_rollout()
    found = whole.for_request([PROMPTS[3], [9], PROMPTS[0]], [6, 7, 20, 21, 1, 0])
    assert found.sequence_ids.tolist() == [6, 7, 20, 21, 1, 0]
    assert found.lengths.tolist() == [7, 8, 0, 0, 2, 1]
    assert found.finish_reason.tolist()[2:4] == ["unfinished"] * 2
    assert (found.version[2:4] == -1).all() and not found.completion_mask[2:4].any()
    np.testing.assert_array_equal(found.logprobs[:2], whole.logprobs[6:])
    assert found.prompt_ids[2].tolist() == [0, 0, 0, 9]
    assert found.prompt_mask.sum(axis=1).tolist() == [4, 4, 1, 1, 3, 3]
    through = jax.device_put(whole).for_request([PROMPTS[1]], [2, 3])
    assert type(through.lengths) is np.ndarray and through.lengths.tolist() == [3, 4]


def test_another_prompt_of_the_same_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[9\] is not the prompt .* id 3 has here"):
        some_rollout().for_request([[1, 2, 3], [9]], [0, 3])
    with pytest.raises(ValueError, match="sequence_ids has 3 for 2 prompts"):
        some_rollout().for_request([[1], [2]], [1, 2, 3])
