"""A policy in training that calls a tool in the middle of its completions."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import numpy as np
import pytest

import er_jax
from configs import calculator, tiny
from train import tools
from train.batching import Example, batch_of
from train.config import MeshConfig, ToolConfig, differences, to_json
from train.grpo import main
from train.tasks import EOS, Tokenizer
from train.trainer import Trainer

TOOL = calculator.CONFIG.tool
TOKENIZER = Tokenizer()


def turn(text: str, room: int = 9) -> er_jax.Turn:
    ids = np.array(TOKENIZER.encode(text) if text else [EOS])
    return er_jax.Turn(0, ids[-1:], np.array([1]), ids, "stop", room)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a+2:7+2=", "9"),
        ("a+2:7+2=9;b-5:9-5=", "4"),
        ("a-9:3-9=", "-6"),
        ("a+2:7+=", None),
        ("=", None),
        ("a+2:7+2=9", None),
    ],
)
def test_the_calculator_reads_the_last_expression(
    text: str, answer: str | None
) -> None:
    assert tools.calculator(text) == answer


def test_turns_are_answered_where_the_tool_is_called() -> None:
    use = tools.use_of(TOOL, TOKENIZER)
    assert use is not None and use.call_ids == (*TOKENIZER.encode("="),)
    assert use.respond.max_turns == TOOL.max_calls + 1
    function: Any = use.respond.function
    assert function(0, turn("a+2:7+5=")) == TOKENIZER.encode("12")
    assert function(0, turn("a+2:7+5=", room=1)) == TOKENIZER.encode("1")
    assert function(0, turn("a+2:7+5=12;b:+=")) is None
    assert function(0, turn("")) is None
    assert tools.use_of(ToolConfig(), TOKENIZER) is None


def test_what_cannot_be_called_is_refused() -> None:
    for tool, named in (
        (ToolConfig("train.tools:nothing"), "tool.function='train.tools:nothing'"),
        (ToolConfig("train.tools"), "tool.function='train.tools'"),
        (dataclasses.replace(TOOL, called_by="=="), "tool.called_by='=='"),
    ):
        with pytest.raises(ValueError, match=re.escape(named)):
            tools.use_of(tool, TOKENIZER)
    with pytest.raises(ValueError, match=r"tool\.function"):
        dataclasses.replace(tiny.CONFIG, tool=TOOL, mesh=MeshConfig(replicas=True))
    for make, name in (
        (lambda: ToolConfig(called_by=""), "called_by"),
        (lambda: ToolConfig(max_calls=0), "max_calls"),
        (lambda: ToolConfig(timeout_s=0.0), "timeout_s"),
    ):
        with pytest.raises(ValueError, match=name):
            make()


def test_runs_of_before_had_no_tool() -> None:
    before, now = to_json(tiny.CONFIG), to_json(tiny.CONFIG)
    for group, name in (
        (before, "tool"),
        (before, "lora"),
        (before["grpo"], "partial"),
    ):
        del group[name]
    assert differences(before, now) == []
    tool = ToolConfig(function=TOOL.function)
    with_tool = to_json(dataclasses.replace(tiny.CONFIG, tool=tool))
    (found,) = differences(before, with_tool)
    assert found.startswith("tool.function: None -> ")


def test_appended_tokens_are_not_learnt_from() -> None:
    example = Example(
        prompt=[1, 2],
        completion=[3, 4, 5, 6],
        behavior_logprobs=[-1.0, -2.0, 0.0, -3.0],
        fresh=np.array([False, True, True, True]),
        sampled=np.array([True, True, False, True]),
    )
    batch = batch_of([example], rows=1, length=6)
    assert batch.targets[0].tolist() == [2, 3, 4, 5, 6, 0]
    assert batch.mask[0].tolist() == [0, 1, 1, 0, 1, 0]
    assert batch.fresh[0].tolist() == [0, 0, 1, 0, 1, 0]


@pytest.mark.slow
def test_a_step_calls_the_tool_and_learns_from_sampled_tokens(tmp_path: Any) -> None:
    config = dataclasses.replace(tiny.CONFIG, tool=TOOL, out=tmp_path)
    trainer = Trainer.of(config)
    trainer.start_from(trainer.first_params())
    data = trainer.rollout_step()
    num_answers = 0
    for row, spans in enumerate(data.out.turns):
        ids = data.out.completion_ids[row]
        for (_, end), (start, _) in itertools.pairwise(spans):
            text = TOKENIZER.decode(ids[:end])
            assert TOKENIZER.decode(ids[end:start]) == tools.calculator(text)
            num_answers += 1
    assert num_answers > 0
    record = trainer.learn(data)
    # The trainer's log-probabilities are those of the rollout, behind answers as well.
    assert record["logprob_gap"] < 1e-4


@pytest.mark.slow
def test_the_command_line_trains_with_a_tool(tmp_path: Any, capsys: Any) -> None:
    tool = ["--tool.function", "train.tools:calculator"]
    main(["tiny", "--out", str(tmp_path / "run"), *tool])
    assert "reward" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"tool\.function: "):
        main(["tiny", "--out", str(tmp_path / "run"), "--resume", "--steps", "3"])
    main(["tiny", "--out", str(tmp_path / "run"), "--resume", "--steps", "3", *tool])
