"""What a run is given: bad data, bad rewards and bad settings are named."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from configs import arithmetic, tiny
from tests.test_train_resume import CONFIG, LINES
from train import tasks
from train.batching import Example, stack_chunks
from train.completions import StepData
from train.config import (
    GRPOConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    differences,
    to_json,
)
from train.sft import SFTConfig
from train.tasks import ArithmeticConfig
from train.trainer import Trainer, derive

# ---------------------------------------------------------------------------- data


@pytest.mark.parametrize("text", ["", "\ufeff"], ids=["plain", "marked"])
def test_data_is_utf_8_whatever_the_locale(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(line, ensure_ascii=False) for line in LINES]
    path.write_bytes("\r\n".join([text + lines[0], *lines[1:]]).encode())
    assert len(tasks.read_jsonl(path, tasks.Tokenizer())) == len(LINES)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "1", "answer": "\xe9"}', "line 3: byte 0xe9 is not UTF-8; save"),
        (b"\x00\x00\x00", "line 3: not JSON"),
        (b"[" * 100_000, "line 3: not JSON"),
        (b"9" * 5_000, "line 3: not JSON"),
        (
            b'{"prompt": "1+1+1", "answer": "3"}',
            'line 3: "prompt" has 6 tokens, and .* leave 5 beside grpo.max_new_tokens',
        ),
    ],
    ids=["latin 1", "zeros", "nested", "digits", "long"],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    good = [json.dumps(fields).encode() for fields in LINES[:2]]
    path.write_bytes(b"\n".join([*good, line, good[0]]))
    with pytest.raises(ValueError, match=rf"data.jsonl, {message}"):
        tasks.read_jsonl(path, tasks.Tokenizer(), max_prompt=5)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_data_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ValueError, match=r"data='.*' cannot be read \(.*; give a JSONL"
    ):
        tasks.read_jsonl(tmp_path / name, tasks.Tokenizer())


@dataclasses.dataclass(frozen=True)
class Template(tasks.Tokenizer):
    """A tokenizer whose chat template refuses one prompt, and has no word for another.

    A checkpoint's template is a program, which may raise whatever it likes.
    """

    def encode_prompt(self, prompt: str) -> list[int]:
        if prompt == "1+1=":
            raise RuntimeError("roles must alternate")
        return []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINES[0], r'line 1: "prompt" has no tokens'),
        (LINES[1], r"line 1: .* be turned into tokens \(RuntimeError: roles must"),
    ],
)
def test_prompts_that_cannot_be_tokens_are_named(
    tmp_path: Path, line: dict[str, str], message: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=message):
        tasks.read_jsonl(path, Template())


def test_a_long_line_is_paid_for_where_it_is_sampled(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    long = {"prompt": "1+" * 10_000 + "1=", "answer": "3"}
    data.write_text("".join(json.dumps(line) + "\n" for line in [*LINES, long]))
    buckets = Trainer.of(dataclasses.replace(CONFIG, data=data, seed=3)).buckets
    assert buckets.lengths[-1] > 20_000

    def shapes(prompt: int) -> list[int]:
        examples = [Example([1] * 5, [2] * 20), Example([1] * prompt, [2] * 4)]
        chunks = stack_chunks(examples, buckets, capacity=4)
        return [bucket.batch.tokens.shape[-1] for bucket in chunks]

    # Of all steps with short prompts there is one program.
    assert shapes(5) == shapes(100) == [16, 256]
    assert shapes(300) == [16, 256, 512]
    assert shapes(20_001) == list(buckets.lengths)


def test_a_round_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffles: list[int] = []

    class Counted(tasks.random.Random):
        def shuffle(self, x: Any) -> None:
            shuffles.append(len(x))
            super().shuffle(x)

    problems = [tasks.Problem(str(i), str(i)) for i in range(500)]
    monkeypatch.setattr(tasks.random, "Random", Counted)
    taken = [tasks.problem_at(problems, i, seed=12) for i in range(400, 1400)]
    assert shuffles == [500] * 3
    assert {p.prompt for p in taken[100:600]} == {p.prompt for p in problems}


# -------------------------------------------------------------------------- rewards


def sampled(problems: int, n: int) -> Any:
    """A rollout of which every completion is "42", as far as rewards look at it."""
    ids = np.array([tasks.Tokenizer().encode_completion("42")] * problems * n)
    size = problems * n
    return types.SimpleNamespace(
        completion_ids=ids,
        completion_mask=np.ones(ids.shape, bool),
        lengths=np.full(size, ids.shape[1]),
        finish_reason=np.full(size, "stop"),
    )


def broken(completion: str, answer: str, *, finished: bool) -> float:
    raise KeyError(answer)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (broken, r"the reward raised KeyError: .*test_train_inputs.py, line \d+\)"),
        (lambda *args, **kwargs: None, "the reward returned None; let it return a"),
        (lambda *args, **kwargs: float("nan"), "the reward returned nan"),
        (lambda *args, **kwargs: float("inf"), "the reward returned inf"),
        (lambda *args, **kwargs: "1.0", "the reward returned '1.0'"),
        (lambda *args, **kwargs: [1.0], r"the reward returned \[1.0\]"),
        (lambda *args, **kwargs: np.ones(1), r"the reward returned array\(\[1.\]\)"),
        (lambda *args, **kwargs: 1j, "the reward returned 1j"),
        (lambda completion: 1.0, "the reward raised TypeError"),
    ],
)
def test_a_bad_reward_is_named_with_problem_and_completion(
    monkeypatch: pytest.MonkeyPatch, reward: Any, message: str
) -> None:
    trainer = Trainer.of(CONFIG)
    trainer.state = types.SimpleNamespace(params=None, gathered=None)
    problems = trainer.problems["train"][:2]
    calls: list[str] = []

    def second(completion: str, answer: str, *, finished: bool) -> Any:
        calls.append(completion)
        if len(calls) < 6:
            return len(calls) / 2
        return reward(completion, answer, finished=finished)

    trainer.subject.reward = second if reward is not broken else reward
    monkeypatch.setattr(er_jax, "rollout", lambda *args, **kwargs: sampled(2, 4))
    which = "1 of 4" if reward is broken else "2 of 4"
    prompt = problems[0 if reward is broken else 1].prompt
    where = re.escape(f"completion {which}, '42', of the problem '{prompt}'")
    with pytest.raises(ValueError, match=f"{message}.*{where}"):
        trainer.sample(problems, n=4, key=jax.random.key(0), first_sequence_id=0)


@pytest.mark.parametrize(
    "value", [True, 1, np.float32(1), np.ones(()), jax.numpy.ones(())]
)
def test_any_number_is_a_reward(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    trainer = Trainer.of(CONFIG)
    trainer.state = types.SimpleNamespace(params=None, gathered=None)
    trainer.subject.reward = lambda *args, **kwargs: value
    monkeypatch.setattr(er_jax, "rollout", lambda *args, **kwargs: sampled(1, 3))
    problems = trainer.problems["train"][:1]
    _, found = trainer.sample(problems, n=3, key=jax.random.key(0), first_sequence_id=0)
    assert found.dtype == np.float64 and found.tolist() == [[1.0] * 3]


def test_a_step_derives_its_draft_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the program of the update, and nowhere else."""
    trainer = Trainer.of(CONFIG)
    derived: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        derived.append("draft")
        return derive(*args, **kwargs)

    monkeypatch.setattr("train.trainer.derive", counted)
    trainer.start_from(trainer.policy.init(jax.random.key(0)))
    assert derived == ["draft"]  # of parameters that no update has made
    names = ("loss", "kl", "clip_fraction", "grad_norm", "logprob_gap")
    info = dict.fromkeys((*names, "mean_logprob_gap", "disagreed"), 0)
    monkeypatch.setattr(
        "train.trainer.update", lambda *args, **kwargs: (trainer.state, info)
    )
    monkeypatch.setattr(trainer.log, "append", lambda record: None)
    out = sampled(4, 4)
    out.logprobs = np.zeros(out.completion_ids.shape, np.float32)
    out.stats = er_jax.RolloutStats()
    problems = trainer.problems["train"][:4]
    rewards = np.arange(16.0).reshape(4, 4)
    record = trainer.learn(StepData(problems, out, rewards, seconds=1.0))
    assert derived == ["draft"]
    assert record["step"] == 1 and "refresh_s" not in record["timing"]


# ------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (GRPOConfig, {"group_size": "8"}, "group_size='8': give a whole number"),
        (GRPOConfig, {"group_size": 4.0}, "group_size=4.0: give a whole number"),
        (GRPOConfig, {"group_size": True}, "group_size=True: give a whole number"),
        (GRPOConfig, {"temperature": "1"}, "temperature='1': give a finite number"),
        (GRPOConfig, {"temperature": math.nan}, "temperature=nan: give a finite"),
        (GRPOConfig, {"learning_rate": math.inf}, "learning_rate=inf: give a finite"),
        (GRPOConfig, {"scale_advantages": 1}, "scale_advantages=1: give True or"),
        (GRPOConfig, {"bucket_lengths": 16}, "bucket_lengths=16: give several"),
        (GRPOConfig, {"bucket_lengths": "16"}, "bucket_lengths='16': give several"),
        (GRPOConfig, {"bucket_lengths": (16, None)}, "bucket_lengths=None: give a wh"),
        (MeshConfig, {"data": None}, "data=None: give a whole number"),
        (SFTConfig, {"max_steps": 2.5}, "max_steps=2.5: give a whole number"),
        (ArithmeticConfig, {"slip_rate": None}, "slip_rate=None: give a finite"),
        (ModelConfig, {"dim": np.ones(2)}, r"dim=array\(.*: give a whole number"),
        (RunConfig, {"control": None}, "control=None: give a text"),
        (RunConfig, {"out": 3}, "out=3: give a path"),
        (RunConfig, {"grpo": {}}, "grpo={}: give a GRPOConfig"),
        (RunConfig, {"resume_step": 3}, "resume_step=3: it goes with --resume"),
        (
            RunConfig,
            {"resume": True, "resume_step": -1},
            "resume_step=-1: it goes with --resume, and names a checkpoint",
        ),
    ],
)
def test_settings_of_another_type_are_named(
    kind: type, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_settings_of_numpy_are_those_of_python() -> None:
    plain = dataclasses.replace(
        CONFIG, seed=3, out=Path("runs/x"), profile=None,
        grpo=dataclasses.replace(CONFIG.grpo, kl_coef=0.5, bucket_lengths=(16, 32)),
    )  # fmt: skip
    settings: dict[str, Any] = {
        "kl_coef": np.float32(0.5), "group_size": np.int32(4), "max_slots": np.array(8),
        "bucket_lengths": np.array([16, 32]),
    }  # fmt: skip
    fields: dict[str, Any] = {
        "seed": np.int64(3), "out": "runs/x", "reproducible": np.bool_(True),
        "grpo": dataclasses.replace(CONFIG.grpo, **settings),
    }  # fmt: skip
    numpy = dataclasses.replace(CONFIG, **fields)
    assert numpy == plain and hash(numpy.grpo) == hash(plain.grpo)
    assert json.dumps(to_json(numpy)) == json.dumps(to_json(plain))


@pytest.mark.parametrize("config", [arithmetic.CONFIG, tiny.CONFIG])
def test_configs_survive_json(config: RunConfig) -> None:
    assert differences(to_json(config), json.loads(json.dumps(to_json(config)))) == []


def test_differences_name_what_a_resumed_run_may_not_change() -> None:
    grown = dataclasses.replace(tiny.CONFIG, steps=50, resume=True, save_every=7)
    assert differences(to_json(tiny.CONFIG), to_json(grown)) == []
    streamed = dataclasses.replace(tiny.CONFIG.grpo, stream=True)
    grown = dataclasses.replace(grown, grpo=streamed, mesh=MeshConfig(data=2))
    assert differences(to_json(tiny.CONFIG), to_json(grown)) == []
    other = dataclasses.replace(
        tiny.CONFIG, seed=3, grpo=dataclasses.replace(tiny.CONFIG.grpo, group_size=8)
    )
    assert differences(to_json(tiny.CONFIG), to_json(other)) == [
        "grpo.group_size: 4 -> 8",
        "seed: 0 -> 3",
    ]


def test_a_run_from_before_there_were_pairs_goes_on() -> None:
    earlier = to_json(tiny.CONFIG)
    del earlier["lora"]
    assert differences(earlier, to_json(tiny.CONFIG)) == []
    pairs = dataclasses.replace(tiny.CONFIG, lora=LoRAConfig(rank=2))
    assert differences(earlier, to_json(pairs)) == ["lora.rank: 0 -> 2"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("group_size", 1, "give >= 2"),
        ("temperature", 0.0, "give > 0"),
        ("learning_rate", -1.0, "give > 0"),
        ("clip_low", 1.0, r"give one in \(0, 1\)"),
        ("clip_high", 0.0, "give > 0"),
        ("kl_coef", -0.1, "give >= 0"),
        ("max_new_tokens", 0, "give >= 1"),
        ("chunk_tokens", 0, "give >= 1"),
    ],
)
def test_bad_grpo_configs(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value}: .*{message}"):
        GRPOConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -1}, "steps=-1: give >= 0"),
        ({"dtype": "float16"}, "dtype='float16': choose from"),
        ({"save_every": 0}, "save_every=0: give >= 1"),
        ({"control": "worst"}, "control='worst'"),
        ({"reproducible": True}, "reproducible=True: control='best' follows the clock"),
        (
            {"reproducible": True, "control": "paper"},
            "reproducible=True: control='paper' follows the clock",
        ),
        (
            {"grpo": GRPOConfig(stream=True), "mesh": MeshConfig(replicas=True)},
            "grpo.stream=True: it is for one process without replicas",
        ),
        (
            {"grpo": GRPOConfig(max_new_tokens=100)},
            "max_new_tokens=100: the longest solution has 240 tokens",
        ),
    ],
)
def test_bad_run_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop_at": 0.0}, r"stop_at=0.0: a chance must be in \(0, 1\]"),
        ({"schedule": "linear"}, "schedule='linear': choose from"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: give > 0"),
    ],
)
def test_bad_warmup_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTConfig(**fields)
