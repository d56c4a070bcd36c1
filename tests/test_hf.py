"""Checkpoints of `transformers`, in and out: the same mathematics to the last digit.

Small random models of every family, written by `transformers` itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from er_jax.io import hf_save, hf_weights
from er_jax.types import NONE

pytestmark = pytest.mark.usefixtures("unoptimized_module")

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # or they wait for each other where tests share the cores

VOCAB, LENGTH = 97, 512

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    # Far from uniform, so that no greedy choice is near a tie.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

# Family and what differs from `SIZES`.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("Llama", {"num_key_value_heads": 4}),
    "llama 3": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama 3.2": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True, "head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True, "hidden_size": 40}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3, tied": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3, biases": ("Qwen3", {"head_dim": 12, "attention_bias": True}),
    "mistral, window": ("Mistral", {"sliding_window": 40}),
    "gemma 3": (
        "Gemma3",
        {
            "head_dim": 20,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 40,
            "query_pre_attn_scalar": 12,
        },
    ),
    "gemma 3, scaled": (
        "Gemma3",
        {
            "head_dim": 12,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 12,
            "attention_bias": True,
            "final_logit_softcapping": 20.0,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1e6,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
    "qwen3, experts": (
        "Qwen3Moe",
        {
            "head_dim": 12,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3, some experts": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 4,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}
# Their configuration's class, where it is not named as the model's.
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def make(name: str, directory: Path, **changes: Any) -> Any:
    """Write a random checkpoint with `transformers`, and return its model."""
    family, differences = MODELS[name]
    torch.manual_seed(sorted(MODELS).index(name))
    name = CONFIGS.get(family, f"{family}Config")
    config = getattr(transformers, name)(**SIZES | differences | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which begin at one and zero
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small Qwen3 in float32."""
    make("qwen3", tmp_path / "source")
    return tmp_path / "source"


def ragged() -> tuple[np.ndarray, np.ndarray]:
    """Return tokens `[3, LENGTH]`, padded on the left, and their mask."""
    random = np.random.default_rng(0)
    tokens = random.integers(3, VOCAB, (3, LENGTH))
    mask = np.arange(LENGTH) >= np.array([[0], [200], [509]])
    return np.where(mask, tokens, 0), mask


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path)
    policy, params = er_jax.load_hf(tmp_path)
    tokens, mask = ragged()
    positions = np.where(mask, mask.cumsum(axis=1) - 1, NONE)
    with torch.no_grad():
        wanted = model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(int)),
            position_ids=torch.tensor(np.maximum(positions, 0)),
        ).logits.numpy()

    @jax.jit
    def logits(params: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        cache = policy.init_cache(3, LENGTH)
        hidden, _ = policy.forward(params, tokens, positions, cache)
        return policy.logits(params, hidden)

    found = np.asarray(
        logits(params, tokens.astype(np.int32), positions.astype(np.int32))
    )
    assert np.ptp(wanted[mask]) > 5  # far from nothing
    np.testing.assert_allclose(found[mask], wanted[mask], atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "llama 3.1",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "mistral", "qwen2, tied", "qwen3", "mistral, window", "gemma 3",
                "qwen3, experts",
            )
        ),
    ],
)  # fmt: skip
def test_greedy_completions_are_those_of_transformers(
    name: str, tmp_path: Path
) -> None:
    """256 tokens, token for token, by plain decoding and with speculation."""
    model = make(name, tmp_path)
    policy, params = er_jax.load_hf(tmp_path)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    wanted = []
    for prompt in prompts:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=int),
            do_sample=False,
            max_new_tokens=256,
            eos_token_id=None,
        )
        wanted.append(made[0, len(prompt) :].tolist())
    assert len({tuple(ids) for ids in wanted}) == 2
    for control in ("ar", "fixed:4"):
        out = er_jax.rollout(
            policy,
            params,
            prompts,
            key=jax.random.key(0),
            config=er_jax.RolloutConfig(
                max_new_tokens=256, temperature=0.0, control=control
            ),
        )
        assert out.completion_ids.tolist() == wanted


def states(directory: Path) -> dict[str, Any]:
    """Return all tensors of a checkpoint, as `transformers` loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    return dict(model.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_equal_to_the_bit(
    name: str, dtype: str, tmp_path: Path
) -> None:
    model = make(name, tmp_path / "once")
    if dtype != "float32":
        model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "once")
    (tmp_path / "once" / "tokenizer_config.json").write_text('{"a": 1}')
    policy, params = er_jax.load_hf(tmp_path / "once")
    assert policy.config.dtype == dtype
    er_jax.save_hf(tmp_path / "again", policy, params)
    once, again = states(tmp_path / "once"), states(tmp_path / "again")
    assert once.keys() == again.keys()
    for key, value in once.items():
        assert value.dtype == again[key].dtype
        assert torch.equal(value, again[key]), key
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        texts = [(tmp_path / d / file).read_text() for d in ("once", "again")]
        assert json.loads(texts[0]) == json.loads(texts[1])


@pytest.mark.parametrize("name", MODELS)
def test_a_policy_of_no_source_becomes_a_checkpoint(name: str, tmp_path: Path) -> None:
    """Its configuration is written anew, and means the same."""
    make(name, tmp_path / "once")
    policy, params = er_jax.load_hf(tmp_path / "once")
    er_jax.save_hf(tmp_path / "again", er_jax.Decoder(policy.config), params)
    again, _ = er_jax.load_hf(tmp_path / "again")
    assert again == policy
    before, after = states(tmp_path / "once"), states(tmp_path / "again")
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        logits = [
            transformers.AutoModelForCausalLM.from_pretrained(path)(tokens).logits
            for path in (tmp_path / "once", tmp_path / "again")
        ]
    assert torch.equal(*logits)


def test_shards_are_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("qwen3", tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    monkeypatch.setattr(hf_save, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(hf_weights, "SLICE_BYTES", 1000)  # several slices a tensor
    policy, params = er_jax.load_hf(tmp_path / "shards", progress=True)
    er_jax.save_hf(tmp_path / "again", policy, params)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    for directory in ("shards", "again"):
        found = states(tmp_path / directory)
        for key, value in states(tmp_path / "whole").items():
            assert torch.equal(value, found[key])


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_are_converted(source: str, dtype: str, tmp_path: Path) -> None:
    model = make("qwen2", tmp_path).to(getattr(torch, source))
    model.save_pretrained(tmp_path)
    policy, params = er_jax.load_hf(tmp_path, dtype=jnp.dtype(dtype))
    assert policy == er_jax.load_hf(tmp_path, dtype=dtype)[0]
    assert policy.config.dtype == dtype
    wanted = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    wanted = wanted.to(getattr(torch, dtype)).float().numpy().T
    found = params["layers"][1]["up_proj"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), wanted)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    for name, value in changes.items():
        if value is ...:
            del fields[name]
        else:
            fields[name] = value
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type='gemma2' is not supported"),
        ({"architectures": ["Qwen3ForTokenClassification"]}, "architectures="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', which is not supported"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding_window=64"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_interleaved": True}, "rope_interleaved=True, which is not known"),
        ({"num_experts": 8}, "num_experts=8, which is not known here"),
        ({"logit_scale": 2.0}, "logit_scale=2.0, which is not known here"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, "'linear'"),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 2}},
            "rope_type='default' with \\['factor'\\]",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "not supported"),
        ({"vocab_size": ...}, "config.json has no vocab_size"),
        ({"num_key_value_heads": ...}, "config.json has no num_key_value_heads"),
        ({"dtype": "int8"}, "dtype='int8', which no policy here has"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    changes: dict[str, Any], message: str, checkpoint: Path
) -> None:
    edit_config(checkpoint, **changes)
    with pytest.raises(ValueError, match=message):
        er_jax.load_hf(checkpoint)


def test_a_window_is_there_where_it_is_the_default(tmp_path: Path) -> None:
    """As in `transformers`: 4096 if the file does not say, none if it says null."""
    make("mistral", tmp_path)
    assert er_jax.load_hf(tmp_path)[0].config.window is None
    edit_config(tmp_path, sliding_window=...)
    assert er_jax.load_hf(tmp_path)[0].config.window == 4096
    edit_config(tmp_path, layer_types=["full_attention"] * 2)
    with pytest.raises(ValueError, match=r"layer_types=.* a model without a window"):
        er_jax.load_hf(tmp_path)


GEMMA_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50.0.* no cap \(null"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ({"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
    ({"sliding_window": None}, "sliding_window=None"),
    ({"layer_types": ["full_attention"]}, r"layer_types=.*one for each layer"),
    ({"layer_types": ["chunked_attention"] * 3}, "layer_types="),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters=.* an object of"),
    (
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "linear", "factor": 2}
            }
        },
        "rope_parameters.sliding_attention.rope_type='linear'",
    ),
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
    ({"model_type": "gemma3"}, "model_type='gemma3' is not supported"),
]


@pytest.mark.parametrize(("changes", "message"), GEMMA_REFUSALS)
def test_what_is_not_supported_of_gemma_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make("gemma 3", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        er_jax.load_hf(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": [0, 1]}, "decoder_sparse_step=1.* experts in some layer"),
        ({"mlp_only_layers": [2]}, r"mlp_only_layers=\[2\].* from 0 to 1"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 must be from 1 to num_exp"),
        ({"moe_intermediate_size": ...}, "has no moe_intermediate_size"),
        ({"num_experts": 8}, "num_local_experts=6.* only num_experts=8 again"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8"),
    ],
)
def test_what_is_not_supported_of_experts_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make("qwen3, experts", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        er_jax.load_hf(tmp_path)


def test_older_spellings_of_gemma_and_experts_are_read(tmp_path: Path) -> None:
    make("gemma 3, scaled", tmp_path / "gemma", num_hidden_layers=6, layer_types=None)
    new = er_jax.load_hf(tmp_path / "gemma")[0].config
    assert new.global_layers == (5,) and new.local_rope_theta == 5e3
    edit_config(
        tmp_path / "gemma", rope_parameters=..., rope_theta=1e6, layer_types=...,
        rope_local_base_freq=5e3, rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=6,
    )  # fmt: skip
    assert er_jax.load_hf(tmp_path / "gemma")[0].config == new
    make("qwen3, experts", tmp_path / "experts")
    new = er_jax.load_hf(tmp_path / "experts")[0].config
    edit_config(tmp_path / "experts", num_local_experts=..., num_experts=6)
    assert er_jax.load_hf(tmp_path / "experts")[0].config == new


def test_fields_of_older_versions_are_read(tmp_path: Path) -> None:
    make("llama 3.1", tmp_path)
    new, _ = er_jax.load_hf(tmp_path)
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    edit_config(
        tmp_path,
        rope_parameters=...,
        rope_theta=LLAMA3["rope_theta"],
        rope_scaling=scaling,
        dtype=...,
        torch_dtype="float32",
    )
    old, _ = er_jax.load_hf(tmp_path)
    assert old == new
    assert old.config.rope_scaling == er_jax.RopeScaling(8.0, 1.0, 4.0, 128)


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a checkpoint of one file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"

DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "missing": (lambda t: t.pop(UP), f"lacks 1 of 25 tensors, {UP} first"),
    "extra": (
        lambda t: t.update({"model.layers.2.norm": torch.ones(3)}),
        "holds 1 tensors that the model .* model.layers.2.norm first",
    ),
    "shape": (
        lambda t: t.update({UP: torch.ones(80, 47)}),
        f"{UP} has shape \\(80, 47\\), and by the configuration it has \\(80, 48\\)",
    ),
    "type": (
        lambda t: t.update({UP: torch.ones(80, 48, dtype=torch.int32)}),
        f"{UP} has type I32; only float64, float32, bfloat16, float16 can be loaded",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused(damage: str, checkpoint: Path) -> None:
    change, message = DAMAGES[damage]
    rewrite(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        er_jax.load_hf(checkpoint)


def test_a_file_cut_short_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    for size in (3, 1000, path.stat().st_size - 10):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="is damaged or cut short"):
            er_jax.load_hf(checkpoint)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    model = make("qwen3", tmp_path / "source")
    with pytest.raises(ValueError, match=r"cannot be read .* give the directory of a"):
        er_jax.load_hf(tmp_path / "nothing")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    first = min((tmp_path / "shards").glob("*.safetensors"))
    first.unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of .* shards, {first.name} first"):
        er_jax.load_hf(tmp_path / "shards")
    (tmp_path / "source" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
        er_jax.load_hf(tmp_path / "source")
    (tmp_path / "source" / "pytorch_model.bin").write_text("")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin; save it again"):
        er_jax.load_hf(tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        er_jax.load_hf(tmp_path / "source")


def test_frequencies_of_old_checkpoints_are_left_out(checkpoint: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(checkpoint, lambda tensors: tensors.update({name: torch.ones(12)}))
    er_jax.load_hf(checkpoint)


def test_a_tied_projection_may_be_there_if_it_is_the_same(tmp_path: Path) -> None:
    make("qwen3, tied", tmp_path)
    table = "model.embed_tokens.weight"
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t[table].clone()}))
    er_jax.load_hf(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t[table] + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight that differs"):
        er_jax.load_hf(tmp_path)


def test_nothing_is_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    policy, params = er_jax.load_hf(checkpoint)
    with pytest.raises(ValueError, match="already holds something; give a new one"):
        er_jax.save_hf(checkpoint, policy, params)
    (tmp_path / "empty").mkdir()
    er_jax.save_hf(tmp_path / "empty", policy, params)
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_save_that_fails_leaves_nothing(
    file: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, params = er_jax.load_hf(checkpoint)

    class Stop(BaseException):
        """As a signal would come."""

    def failing(*unused: Any, **also: Any) -> None:
        raise Stop

    name = "save_file" if file == "model.safetensors" else "_copy_companions"
    monkeypatch.setattr(hf_save, name, failing)
    with pytest.raises(Stop):
        er_jax.save_hf(tmp_path / "out", policy, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.slow
def test_other_parameters_are_not_saved(checkpoint: Path, tmp_path: Path) -> None:
    policy, params = er_jax.load_hf(checkpoint)
    bad = {**params, "final_norm": jnp.ones(7)}
    with pytest.raises(ValueError, match=r"final_norm has shape \(7,\)"):
        er_jax.save_hf(tmp_path / "out", policy, bad)
    policy_and_draft = er_jax.attach_draft(params, er_jax.DrafterConfig())
    with pytest.raises(ValueError, match="without a draft"):
        er_jax.save_hf(tmp_path / "out", policy, policy_and_draft)
    assert not (tmp_path / "out").exists()


def test_switches_that_no_family_has_are_refused(tmp_path: Path) -> None:
    config = er_jax.DecoderConfig(
        vocab_size=8, dim=8, num_layers=1, num_heads=1, num_kv_heads=1, hidden_dim=8,
        qk_norm=True, qkv_bias=True,
    )  # fmt: skip
    policy = er_jax.Decoder(config)
    with pytest.raises(ValueError, match="no supported architecture"):
        er_jax.save_hf(tmp_path / "out", policy, policy.init(jax.random.key(0)))


ON_A_MESH = """
import sys, jax, numpy as np
import er_jax
from er_jax.io import hf_weights as hf

hf.SLICE_BYTES = 3000  # several slices a part
_, plain = er_jax.load_hf(sys.argv[1])
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"))
_, sharded = er_jax.load_hf(sys.argv[1], mesh=mesh)
jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), plain, sharded)
q = sharded["layers"][0]["q_proj"]
assert {s.data.size for s in q.addressable_shards} == {q.size // 4}, q.sharding
assert all(x.dtype == np.float32 for x in jax.tree.leaves(sharded))
print(len(q.addressable_shards), "parts")
"""


@pytest.mark.parametrize("name", ["qwen3", "llama, biases", "qwen3, experts"])
def test_a_checkpoint_is_read_onto_a_mesh(name: str, tmp_path: Path) -> None:
    """Every device's part by itself; eight devices that are this CPU."""
    make(name, tmp_path, vocab_size=96)
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=120,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )  # fmt: skip
    assert done.stdout == "8 parts\n", done.stderr


MEMORY = """
import pathlib, sys, threading, time
import jax, jax.numpy as jnp
import er_jax

def used():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

jnp.zeros(8).block_until_ready()
before, peak, over = used(), 0, threading.Event()

def watch():
    global peak
    while not over.is_set():
        peak = max(peak, used())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
_, params = er_jax.load_hf(sys.argv[1], dtype=sys.argv[2])
jax.block_until_ready(params)
over.set(), thread.join()
peak = max(peak, used())  # should the thread have been late
sizes = [x.nbytes for x in jax.tree.leaves(params)]
print(peak - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_loading_needs_no_more_than_one_tensor_beside_the_result(
    dtype: str, tmp_path: Path
) -> None:
    """Of anonymous memory; what is mapped from the file can be dropped at any time."""
    config = er_jax.DecoderConfig(
        vocab_size=8192, dim=512, num_layers=8, num_heads=8, num_kv_heads=8,
        hidden_dim=2048,
    )  # fmt: skip
    policy = er_jax.Decoder(config)
    er_jax.save_hf(tmp_path / "large", policy, policy.init(jax.random.key(0)))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "large"), dtype],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, result, largest = map(int, done.stdout.split())
    assert result > 80e6
    slack = 12e6  # interpreter, bookkeeping, allocator
    assert result * 0.9 < peak < result + largest + slack
