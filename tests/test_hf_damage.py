"""Damaged and odd checkpoints: each ends in one line that names file, field and value.

Only configurations are read, but where weights are what is damaged; nothing compiles.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import er_jax
from er_jax.io import hf_config, hf_save, hf_weights

# Configurations as they are published, each with fields that others lack.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": {  # 3.1, the older spelling
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "head_dim": None,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "vocab_size": 32768,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3": {  # the newer spelling
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "layer_types": ["full_attention"] * 28,
        "max_position_embeddings": 40960,
        "mlp_bias": None,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000000,
            "partial_rotary_factor": 1.0,
            "factor": 2,
            "low_freq_factor": 1,
            "high_freq_factor": 2,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma3_text": {  # 270M, both spellings
        "_sliding_window_pattern": 6,
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "use_bidirectional_attention": False,
        "vocab_size": 262144,
    },
    "qwen3_moe": {  # 30B-A3B
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


def nested(depth: int) -> list[Any]:
    """Return a list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


WRONG: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 10**400, -(10**400), 1e-300, 0.5,
    1.0, 1.5, 1e300, math.nan, math.inf, -math.inf, "", "x", "1", "1e-6", "null", "é\n",
    [], [1], ["x"], ["full_attention"], [None], nested(3), nested(200), {}, {"a": 1},
    {"rope_type": []}, {"rope_theta": {}}, {"type": "llama3"},
]  # fmt: skip

SIZES = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim sliding_window max_position_embeddings
    original_max_position_embeddings num_experts num_local_experts num_experts_per_tok
    moe_intermediate_size decoder_sparse_step sliding_window_pattern
    """.split()
)
SWITCHES = frozenset(["attention_bias", "tie_word_embeddings", "norm_topk_prob"])
OFF = frozenset(["mlp_bias", "use_sliding_window", "use_bidirectional_attention"])
# What null means, where it does not mean that the field is lacking.
NO_NULL = frozenset(
    "model_type hidden_act hidden_activation rms_norm_eps query_pre_attn_scalar".split()
)


def is_legal(name: str, value: Any) -> bool:
    """Tell whether a field may have a value, `None` aside; written by hand."""
    is_number = type(value) in (int, float)
    if name in SIZES:
        return type(value) is int and 1 <= value < 2**31
    if name in SWITCHES:
        return type(value) is bool
    if name in OFF:
        return value is False
    if name == "rms_norm_eps":
        return is_number and 0 < value <= 1 and float(np.float32(value)) > 0
    if name in ("query_pre_attn_scalar", "final_logit_softcapping"):
        return is_number and 1e-6 <= value <= 1e9
    if name == "mlp_only_layers":
        return value in ([], [1])
    if name in ("full_attention", "sliding_attention"):
        return value in ({}, {"rope_theta": None})
    if name in ("rope_theta", "rope_local_base_freq"):
        return is_number and 1 <= value <= 1e30
    if name == "factor":
        return is_number and 1 <= value <= 1e6
    if name in ("low_freq_factor", "high_freq_factor"):
        return is_number and 0 < value <= 1e6
    if name == "partial_rotary_factor":
        return is_number and value == 1
    if name in ("architectures", "quantization_config", "rope_scaling"):
        return value in ([], {}) and isinstance(value, list) == (
            name == "architectures"
        )
    if name == "rope_parameters":
        return value == {} and isinstance(value, dict)
    if name == "layer_types":
        return isinstance(value, list) and set(map(str, value)) <= {"full_attention"}
    return False  # names of types and families: none of `WRONG`


def paths(fields: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield where the fields are that are read, nested ones too."""
    for name, value in fields.items():
        if name in hf_config.READ_FIELDS:
            yield (name,)
            if isinstance(value, dict):
                yield from ((name, inner) for inner in value)


def parsed(path: Path, fields: dict[str, Any]) -> er_jax.DecoderConfig:
    """Write a configuration and read it."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return hf_weights.policy_of(path).config


def without(fields: dict[str, Any], *path: str) -> dict[str, Any]:
    """Return a copy that lacks a field."""
    copy = json.loads(json.dumps(fields))
    inner = copy[path[0]] if len(path) == 2 else copy
    del inner[path[-1]]
    return copy


def with_value(fields: dict[str, Any], value: Any, *path: str) -> dict[str, Any]:
    """Return a copy with another value."""
    if len(path) == 1:
        return fields | {path[0]: value}
    return fields | {path[0]: fields[path[0]] | {path[1]: value}}


def outcome(path: Path, fields: dict[str, Any]) -> er_jax.DecoderConfig | ValueError:
    """Return what a configuration is read as, or why not."""
    try:
        return parsed(path, fields)
    except ValueError as error:
        return error


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_configurations_are_read(family: str, tmp_path: Path) -> None:
    fields = PUBLISHED[family]
    config = parsed(tmp_path, fields)
    assert config.dim == fields["hidden_size"]
    assert config.head_size == fields.get("head_dim") or config.head_size in (64, 128)
    assert config.window == (512 if family == "gemma3_text" else None)
    assert config.num_experts == fields.get("num_experts", 0)
    assert config.max_length == fields["max_position_embeddings"]
    assert config.norm_eps == fields["rms_norm_eps"]
    assert (config.rope_scaling is not None) == (family in ("llama", "qwen3"))
    assert config.rope_theta in (5e5, 1e6)


@pytest.mark.parametrize(
    ("family", "path"),
    [(family, path) for family, fields in PUBLISHED.items() for path in paths(fields)],
    ids=lambda value: value if isinstance(value, str) else ".".join(value),
)
def test_every_field_is_checked(
    family: str, path: tuple[str, ...], tmp_path: Path
) -> None:
    """A wrong value is refused by name, or it is legal and means what it says."""
    fields, name = PUBLISHED[family], path[-1]
    for value in WRONG:
        found = outcome(tmp_path, with_value(fields, value, *path))
        if isinstance(found, ValueError):
            message = str(found)
            assert str(tmp_path / "config.json") in message, (value, message)
            assert name in message, (value, message)
            assert "; " in message, (value, message)  # and then the remedy
            assert "\n" not in message and len(message) < 600, (value, message)
        elif value is None:
            assert name not in NO_NULL, found
            if (family, name) != ("mistral", "sliding_window"):  # lacking, it is 4096
                assert found == outcome(tmp_path, without(fields, *path))
        else:
            assert is_legal(name, value), (value, found)


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_field_may_be_lacking_or_is_asked_for(family: str, tmp_path: Path) -> None:
    for path in paths(PUBLISHED[family]):
        found = outcome(tmp_path, without(PUBLISHED[family], *path))
        if isinstance(found, ValueError):
            assert path[-1] in str(found) and "config.json" in str(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": None}, "rms_norm_eps=None, .* only a number from"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan, .* only a number from"),
        ({"rope_theta": 0}, "rope_theta=0, .* only a number from 1 to"),
        ({"rope_theta": 10**400}, "rope_theta=1000.*000, .* only a number from 1 to"),
        ({"hidden_size": "1024"}, "hidden_size='1024', .* only a whole number from 1"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers=2147483647, .* number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1, .* only true or false is"),
        ({"model_type": ["qwen3"]}, r"model_type=\['qwen3'\] is not supported"),
        ({"layer_types": {"a": []}}, "layer_types=.* only a list of 'full_attention'"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures='Qwen3ForCausalLM'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention"),
        ({"head_dim": None, "num_attention_heads": 15}, "head_dim=128"),
        (
            {"head_dim": 15},
            "head_dim=15 must be even.* hidden_size=1024, num_attention_heads=16",
        ),
        ({"é\nnumber": 3}, r"'é\\nnumber'=3, which is not known here"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\], .* only an object"),
        (
            {"rope_scaling": PUBLISHED["llama"]["rope_scaling"]},
            "rope_scaling.factor=8.0 and rope_parameters.factor=2",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_said_of_a_wrong_value(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fields = PUBLISHED["qwen3"] | changes
    if message == "head_dim=128":  # Qwen3's own, whatever the width
        with pytest.raises(ValueError, match="num_key_value_heads=8 must divide"):
            parsed(tmp_path, fields)
        return
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, fields)


def test_a_field_said_twice_is_refused(tmp_path: Path) -> None:
    text = json.dumps(PUBLISHED["qwen3"])[:-1] + ', "hidden_size": 2048}'
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="'hidden_size' is there twice"):
        hf_weights.policy_of(tmp_path)


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "cut short": b'{"model_type": "qwen3", "hid',
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "UTF-16": '{"model_type": "qwen3"}'.encode("utf-16"),
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep, harmless": b'{"id2label": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a long number": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "zeros": b"\0" * 100,
}


def tiny_policy() -> tuple[er_jax.Decoder, Any]:
    """Return a policy of some hundred parameters, and these, drawn by NumPy."""
    config = er_jax.DecoderConfig(
        vocab_size=11, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=12,
        head_dim=6, qk_norm=True, max_length=64,
    )  # fmt: skip
    policy = er_jax.Decoder(config)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    random = np.random.default_rng(0)
    return policy, jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), shapes
    )


@pytest.fixture(scope="module")
def saved() -> tuple[er_jax.Decoder, Any]:
    """A policy and its parameters."""
    return tiny_policy()


@pytest.fixture
def checkpoint(
    saved: tuple[er_jax.Decoder, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A checkpoint in several files, of these."""
    monkeypatch.setattr(hf_save, "SHARD_BYTES", 1000)
    er_jax.save_hf(tmp_path / "model", *saved)
    assert (tmp_path / "model" / hf_weights.INDEX).exists()
    return tmp_path / "model"


@pytest.fixture
def whole(saved: tuple[er_jax.Decoder, Any], tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    er_jax.save_hf(tmp_path / "whole", *saved)
    return tmp_path / "whole"


def refused(directory: Path, *words: str) -> None:
    """Loading has to end in one line that says these words."""
    with pytest.raises(ValueError) as caught:
        er_jax.load_hf(directory)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700, message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["config.json", hf_weights.INDEX])
@pytest.mark.parametrize("damage", TEXTS)
def test_damaged_json_is_refused(damage: str, name: str, checkpoint: Path) -> None:
    (checkpoint / name).write_bytes(TEXTS[damage])
    refused(checkpoint, str(checkpoint / name), "copy it again")


@contextlib.contextmanager
def pipe(path: Path) -> Iterator[None]:
    """Put a named pipe there; a reader gets a few bytes instead of waiting for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), open(path, "wb") as file:
            file.write(b"{}")

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield
    finally:
        end = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # frees the thread
        thread.join()
        os.close(end)


@pytest.mark.parametrize("name", ["config.json", hf_weights.INDEX, hf_weights.WEIGHTS])
def test_only_files_are_read(name: str, whole: Path) -> None:
    """Not pipes, on which a reader waits for ever, and not directories or devices."""
    if name == hf_weights.INDEX:
        (whole / hf_weights.WEIGHTS).unlink()
    with pipe(whole / name):
        refused(whole, str(whole / name), "is not a regular file")
    (whole / name).unlink()
    (whole / name).mkdir()
    refused(whole, str(whole / name), "is not a regular file")
    (whole / name).rmdir()
    (whole / name).symlink_to("/dev/zero")
    refused(whole, str(whole / name), "is not a regular file")


def index_with(checkpoint: Path, value: Any) -> None:
    """Let the index name another file for its first tensor."""
    index = json.loads((checkpoint / hf_weights.INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = value
    (checkpoint / hf_weights.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["absolute", "above", "below", "backslash"])
def test_an_index_names_files_beside_it_only(kind: str, checkpoint: Path) -> None:
    """Also where such a file is there and would be a good one."""
    index = json.loads((checkpoint / hf_weights.INDEX).read_text())
    first = checkpoint / next(iter(index["weight_map"].values()))
    moved = {
        "absolute": first.parent.parent / first.name,
        "above": first.parent.parent / first.name,
        "below": first.parent / "below" / first.name,
        "backslash": first.parent / f"..\\{first.name}",
    }[kind]
    moved.parent.mkdir(exist_ok=True)
    first.rename(moved)
    name = {
        "absolute": str(moved),
        "above": f"../{first.name}",
        "below": f"below/{first.name}",
        "backslash": f"..\\{first.name}",
    }[kind]
    text = (checkpoint / hf_weights.INDEX).read_text()
    (checkpoint / hf_weights.INDEX).write_text(
        text.replace(first.name, json.dumps(name)[1:-1])
    )
    refused(checkpoint, hf_weights.INDEX, "weight_map", "a plain file name")


@pytest.mark.parametrize(
    "value", [None, 3, True, "", ".", "..", "a/..", [], ["a"], {}, "a\0b", nested(9)]
)
def test_an_index_names_files(value: Any, checkpoint: Path) -> None:
    index_with(checkpoint, value)
    refused(checkpoint, hf_weights.INDEX, "weight_map", "a plain file name")


@pytest.mark.parametrize("value", [None, 3, "x", [], ["a"], {}])
def test_an_index_has_a_map(value: Any, checkpoint: Path) -> None:
    (checkpoint / hf_weights.INDEX).write_text(json.dumps({"weight_map": value}))
    refused(checkpoint, hf_weights.INDEX, "weight_map")
    (checkpoint / hf_weights.INDEX).write_text("{}")
    refused(checkpoint, hf_weights.INDEX, "weight_map")


def test_a_shard_is_a_file(checkpoint: Path) -> None:
    shard = min(checkpoint.glob("*.safetensors"))
    with pipe(shard):
        refused(checkpoint, str(shard), "is not a regular file")
    shard.unlink()
    shard.mkdir()
    refused(checkpoint, str(shard), "is not a regular file")
    shard.rmdir()
    shard.symlink_to("nowhere")
    refused(checkpoint, str(checkpoint), "lacks 1 of", shard.name)


def test_a_snapshot_of_the_cache_is_loaded(checkpoint: Path) -> None:
    """There, files are links to blobs beside the snapshots; names are what counts."""
    blobs, snapshot = checkpoint.parent / "blobs", checkpoint.parent / "snapshots/x"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        file.rename(blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"blob{number}"))
    policy, params = er_jax.load_hf(snapshot)
    assert policy.config.head_dim == 6 and len(params["layers"]) == 2


def test_one_file_is_read_before_an_index(whole: Path, checkpoint: Path) -> None:
    """As `transformers` does, where a directory has both: the same weights."""
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            file.rename(whole / file.name)
    tensors = load_file(whole / hf_weights.WEIGHTS)
    tensors["model.norm.weight"] = np.full(8, 3, np.float32)
    save_file(tensors, whole / hf_weights.WEIGHTS)
    _, params = er_jax.load_hf(whole)
    np.testing.assert_array_equal(params["final_norm"], np.full(8, 3, np.float32))


def test_the_damaged_shard_is_named(checkpoint: Path) -> None:
    """And not the last one that was opened."""
    for shard in sorted(checkpoint.glob("*.safetensors")):
        data = shard.read_bytes()
        for damaged in (b"", data[:5], data[:40], data[:-1], b"\xff" * 64, data + b"x"):
            shard.write_bytes(damaged)
            refused(checkpoint, str(shard), "damaged or cut short", "copy it again")
        shard.write_bytes(data)
    er_jax.load_hf(checkpoint)


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"

WEIGHTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "flat table": (lambda t: t.update({TABLE: np.zeros(88, np.float32)}), TABLE),
    "empty table": (lambda t: t.update({TABLE: np.zeros((11, 0), np.float32)}), TABLE),
    "no table": (lambda t: t.pop(TABLE), TABLE),
    "flat head": (lambda t: t.update({HEAD: np.zeros(88, np.float32)}), HEAD),
    "scalar head": (lambda t: t.update({HEAD: np.zeros((), np.float32)}), HEAD),
    "head of integers": (lambda t: t.update({HEAD: np.zeros((11, 8), np.int8)}), HEAD),
    "table of booleans": (lambda t: t.update({TABLE: np.zeros((11, 8), bool)}), TABLE),
}


@pytest.mark.parametrize("damage", WEIGHTS)
def test_damaged_tied_weights_are_refused(damage: str, whole: Path) -> None:
    """The table is compared with the projection only once both are known to be one."""
    fields = json.loads((whole / "config.json").read_text())
    fields["tie_word_embeddings"] = True
    (whole / "config.json").write_text(json.dumps(fields))
    tensors = load_file(whole / hf_weights.WEIGHTS)
    tensors[HEAD] = tensors[TABLE]
    change, name = WEIGHTS[damage]
    change(tensors)
    save_file(tensors, whole / hf_weights.WEIGHTS)
    refused(whole, str(whole), name)


def test_a_name_of_several_lines_stays_one_line(whole: Path) -> None:
    tensors = load_file(whole / hf_weights.WEIGHTS)
    tensors["a\nb"] = np.zeros(1, np.float32)
    save_file(tensors, whole / hf_weights.WEIGHTS)
    refused(whole, "holds 1 tensors", "a\\nb")


def test_a_wrong_dtype_is_refused_by_name(whole: Path) -> None:
    for dtype in ("foo", 3.5, "int8", "float16", object()):
        with pytest.raises(ValueError, match=r"dtype=.*; use 'float32', 'bfloat16'"):
            er_jax.load_hf(whole, dtype=dtype)
