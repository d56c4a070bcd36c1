"""A checkpoint of `transformers`, from the command line: sampled and trained."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import er_jax
from tests.test_text import make_tokenizer
from train.config import GRPOConfig, HFConfig
from train.subjects import subject_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, eos_token_id=2,
    max_position_embeddings=256,
)  # fmt: skip

# Classes of configuration and model, and what they have beside `SIZES`.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    # Windows that prompts with their completions go past.
    "gemma 3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"num_hidden_layers": 2, "sliding_window": 8, "query_pre_attn_scalar": 16,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3, experts": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "norm_topk_prob": True},
    ),
}  # fmt: skip


def make_checkpoint(family: str, directory: Path) -> Path:
    """Write a small random model with a tokenizer and a chat template."""
    torch.manual_seed(0)
    config, model, others = FAMILIES[family]
    made = getattr(transformers, config)(**SIZES | others)
    getattr(transformers, model)(made).save_pretrained(directory)
    make_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3 with a tokenizer and a chat template."""
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"))


def test_a_prompt_over_the_positions_is_refused_with_its_line(tmp_path: Path) -> None:
    """When the data is read; nothing of the weights is, for there are none."""
    transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, eos_token_id=2,
        max_position_embeddings=32,
    ).save_pretrained(tmp_path)  # fmt: skip
    make_tokenizer(tmp_path)
    data = tmp_path / "sums.jsonl"
    prompts = ["1+1=", "2+2=", "1+1+1+1+1+1+1="]  # the last has 17 tokens
    lines = [json.dumps({"prompt": prompt, "answer": "2"}) for prompt in prompts]
    data.write_text("\n".join(lines))
    config = HFConfig(
        model=tmp_path, data=data, grpo=GRPOConfig(max_new_tokens=15, max_slots=8)
    )
    problems = subject_of(config).problems
    assert len(problems["train"]) == 2 and len(problems["eval"]) == 1
    for max_new, message in (
        (16, r'sums.jsonl, line 3: "prompt" has 17 tokens, .* leave 16 beside grpo'),
        (32, "max_new_tokens=32: the model has 32 positions; leave some"),
    ):
        grpo = GRPOConfig(max_new_tokens=max_new, max_slots=8)
        with pytest.raises(ValueError, match=message):
            subject_of(dataclasses.replace(config, grpo=grpo))


def run(*command: object) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        check=False, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_sampled_from_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "completions.jsonl"
    text = run(
        "er_jax.tools.cli", "rollout", "--model", checkpoint, "--prompt", "1+1", "2+2",
        "--num", 2, "--max-new-tokens", 8, "--control", "fixed:2", "--out", out,
        "--profile", tmp_path / "trace",
    )  # fmt: skip
    assert "> 2+2" in text and "tokens" in text
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["1+1", "1+1", "2+2", "2+2"]
    assert all(len(line["logprobs"]) <= 8 for line in lines)
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_from_the_command_line(family: str, tmp_path: Path) -> None:
    """Three steps; the trained checkpoint is loaded by `transformers`."""
    checkpoint = make_checkpoint(family, tmp_path / "source")
    data = tmp_path / "sums.jsonl"
    problems = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(12)]
    data.write_text("".join(json.dumps(p) + "\n" for p in problems))
    out = tmp_path / "run"
    text = run(
        "train.grpo", "hf", "--model", checkpoint, "--data", data, "--out", out,
        "--steps", 3, "--save-every", 1, "--control", "fixed:2",
        "--reward", "tests.test_train_hf:long", "--num-eval", 2,
        "--grpo.prompts-per-step", 2, "--grpo.group-size", 4,
        "--grpo.max-new-tokens", 8, "--grpo.max-slots", 8,
        "--grpo.learning-rate", 0.01, "--grpo.bucket-lengths", 16,
        "--grpo.chunk-tokens", 128, "--profile", tmp_path / "trace",
    )  # fmt: skip
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert "held-out reward" in text and "the trained checkpoint is in" in text
    records = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert max(record["logprob_gap"] for record in steps) < 1e-4
    assert max(record["grad_norm"] for record in steps) > 0
    trained, source = (
        transformers.AutoModelForCausalLM.from_pretrained(path)
        for path in (out / "trained-3", checkpoint)
    )
    before, after = source.state_dict(), trained.state_dict()
    for name, value in before.items():
        assert float((after[name] - value).abs().max()) > 1e-3, name
    _, params = er_jax.load_hf(out / "trained-3")
    gain = after["model.layers.0.self_attn.q_norm.weight"]
    np.testing.assert_array_equal(params["layers"][0]["q_norm"], gain.numpy())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "trained-3")
    assert tokenizer.chat_template


def long(completion: str, answer: str, *, finished: bool) -> float:
    """A reward of a user's own: the share of characters that are digits."""
    del answer, finished
    return sum(c.isdigit() for c in completion) / max(len(completion), 1)
