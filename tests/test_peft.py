"""Adapters in PEFT's format, made by hand, and by PEFT itself where it is installed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import load_file, save_file

import er_jax
from er_jax.io import peft as peft_files
from er_jax.lora import has_lora
from tests.small import POLICY, SIZES

RANK, ALPHA = 3, 12.0
PREFIX = "base_model.model.model.layers.0"
# Module -> (leaf, outputs, inputs) of the small decoder.
MODULES = {
    "self_attn.q_proj": ("q_proj", 16, 16),
    "self_attn.k_proj": ("k_proj", 8, 16),
    "mlp.down_proj": ("down_proj", 16, 32),
}
FIELDS: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
    "target_modules": ["q_proj", "k_proj", "down_proj"], "bias": "none",
    "lora_dropout": 0.05, "use_rslora": False, "use_dora": False,
    "modules_to_save": None, "init_lora_weights": True, "rank_pattern": {},
    "base_model_name_or_path": "anything", "peft_version": "0.21.2",
}  # fmt: skip


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for module, (_, num_out, num_in) in MODULES.items():
        for part, shape in (("A", (RANK, num_in)), ("B", (num_out, RANK))):
            name = f"{PREFIX}.{module}.lora_{part}.weight"
            made[name] = rng.normal(size=shape).astype(np.float32)
    return made


def write(directory: Path, arrays: dict[str, np.ndarray], **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(arrays, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(FIELDS | changes))
    return directory


@pytest.fixture(scope="module")
def params() -> Any:
    return POLICY.init(jax.random.key(0))


@pytest.mark.parametrize(
    ("rslora", "scale"), [(False, ALPHA / RANK), (True, ALPHA / math.sqrt(RANK))]
)
def test_an_adapter_is_the_change_that_it_says(
    rslora: bool, scale: float, params: Any, tmp_path: Path
) -> None:
    arrays = tensors()
    write(tmp_path, arrays, use_rslora=rslora)
    found = er_jax.load_peft_adapter(tmp_path, POLICY, params)
    merged = er_jax.merge_lora(found)["layers"][0]
    layer = params["layers"][0]
    for module, (leaf, _, _) in MODULES.items():
        a, b = (arrays[f"{PREFIX}.{module}.lora_{p}.weight"] for p in "AB")
        wanted = np.asarray(layer[leaf]).T + scale * b @ a
        np.testing.assert_allclose(merged[leaf].T, wanted, atol=1e-5)
    assert found["layers"][0]["up_proj"] is layer["up_proj"]
    wide = er_jax.load_peft_adapter(tmp_path, POLICY, params, dtype="bfloat16")
    assert wide["layers"][0]["q_proj"].a.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="params has low-rank pairs already"):
        er_jax.load_peft_adapter(tmp_path, POLICY, found)


@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), ("up_proj",)])
def test_what_is_saved_is_loaded_again(
    targets: tuple[str, ...], tmp_path: Path
) -> None:
    policy = er_jax.Decoder(dataclasses.replace(SIZES, num_layers=2))
    params = policy.init(jax.random.key(0))
    made = er_jax.add_lora(
        params, rank=2, alpha=5, key=jax.random.key(1), targets=targets
    )
    pairs = jax.tree.map(lambda x: x + 0.5, er_jax.lora_pairs(made))
    made = er_jax.with_lora_pairs(made, pairs)
    er_jax.save_peft_adapter(tmp_path / "adapter", policy, made)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["target_modules"] == sorted(targets) and fields["lora_alpha"] == 5
    found = er_jax.load_peft_adapter(tmp_path / "adapter", policy, params)
    jax.tree.map(np.testing.assert_array_equal, found, made)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    if "up_proj" in targets:
        name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
        assert saved[name].shape == (32, 2)
        # In one layer alone, modules are named in full.
        made["layers"][0]["up_proj"] = params["layers"][0]["up_proj"]
        er_jax.save_peft_adapter(tmp_path / "one", policy, made)
        fields = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
        assert fields["target_modules"] == ["model.layers.1.mlp.up_proj"]
        found = er_jax.load_peft_adapter(tmp_path / "one", policy, params)
        jax.tree.map(np.testing.assert_array_equal, found, made)
    with pytest.raises(ValueError, match="already holds something"):
        er_jax.save_peft_adapter(tmp_path / "adapter", policy, made)


REFUSED = [
    ("use_dora", True, "use_dora=True, which is not supported"),
    ("modules_to_save", ["lm_head"], r"modules_to_save=\['lm_head'\]"),
    ("bias", "all", "bias='all', which is not supported; only 'none' is"),
    ("layers_to_transform", [0], r"layers_to_transform=\[0\]"),
    ("layers_pattern", "layers", "layers_pattern='layers'"),
    ("rank_pattern", {"q_proj": 8}, "rank_pattern"),
    ("alpha_pattern", {"q_proj": 8}, "alpha_pattern"),
    ("fan_in_fan_out", True, "fan_in_fan_out=True"),
    ("target_parameters", ["experts"], "target_parameters"),
    ("something_new", 1, "something_new=1, which is not supported and may change"),
    ("peft_type", "LOHA", "peft_type='LOHA', which is not supported; only 'LORA' is"),
    ("peft_type", None, "peft_type=None"),
    ("task_type", "SEQ_CLS", "task_type='SEQ_CLS'"),
    ("init_lora_weights", "pissa", "init_lora_weights='pissa'"),
    ("r", 0, "r=0, which is not supported; only a whole number from 1"),
    ("r", None, "has no r; copy the adapter again"),
    ("lora_alpha", -1, "lora_alpha=-1"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_fields_that_are_not_supported_are_refused_by_name(
    name: str, value: Any, message: str, params: Any, tmp_path: Path
) -> None:
    write(tmp_path, tensors(), **{name: value})
    with pytest.raises(ValueError, match=f"adapter_config.json .*{message}"):
        er_jax.load_peft_adapter(tmp_path, POLICY, params)


def test_tensors_that_do_not_fit_are_refused(params: Any, tmp_path: Path) -> None:
    arrays = tensors()
    first = f"{PREFIX}.self_attn.q_proj.lora_A.weight"
    without = {name: x for name, x in arrays.items() if name != first}
    experts = f"{PREFIX}.mlp.experts.0.up_proj.lora_A.weight"
    embedding = "base_model.model.model.embed_tokens.lora_embedding_A"
    head = "base_model.model.lm_head.base_layer.weight"  # PEFT adds it to its pair
    magnitude = f"{PREFIX}.self_attn.q_proj.lora_magnitude_vector.weight"
    wrong = [
        (without, r"lacks .*q_proj.lora_A.weight; copy"),
        ({**arrays, experts: arrays[first]}, r"experts\.0\.up_proj.*no low-rank pair"),
        ({**arrays, embedding: arrays[first]}, "lora_embedding_A, which is no low-r"),
        ({**arrays, head: arrays[first]}, "with save_embedding_layers=False"),
        ({**arrays, magnitude: arrays[first]}, "magnitude_vector.weight, which is no"),
        ({**arrays, first: arrays[first].T.copy()}, r"shape \(16, 3\), and .* \(3, 16"),
        ({**arrays, first: arrays[first].astype(np.int8)}, "type I8; only float64"),
    ]
    for number, (given, message) in enumerate(wrong):
        write(tmp_path / str(number), given)
        with pytest.raises(ValueError, match=message):
            er_jax.load_peft_adapter(tmp_path / str(number), POLICY, params)
    # A module that the configuration names has to be there.
    fewer = {name: x for name, x in arrays.items() if "down_proj" not in name}
    write(tmp_path / "fewer", fewer)
    with pytest.raises(ValueError, match=r"lacks .*down_proj.lora_A"):
        er_jax.load_peft_adapter(tmp_path / "fewer", POLICY, params)
    (tmp_path / "fewer" / "adapter_model.safetensors").rename(
        tmp_path / "fewer" / "adapter_model.bin"
    )
    with pytest.raises(ValueError, match=r"only adapter_model.bin; save it again"):
        er_jax.load_peft_adapter(tmp_path / "fewer", POLICY, params)
    with pytest.raises(ValueError, match="cannot be read"):
        er_jax.load_peft_adapter(tmp_path / "nothing", POLICY, params)


def test_what_cannot_be_saved_is_refused(params: Any, tmp_path: Path) -> None:
    key = jax.random.key(1)
    with pytest.raises(ValueError, match="params has 0 low-rank pairs"):
        er_jax.save_peft_adapter(tmp_path / "a", POLICY, params)
    one, two = (
        er_jax.add_lora(params, rank=rank, key=key, targets=("q_proj", "up_proj"))
        for rank in (2, 3)
    )
    mixed = {**one, "layers": [dict(one["layers"][0])]}
    mixed["layers"][0]["up_proj"] = two["layers"][0]["up_proj"]
    with pytest.raises(ValueError, match="pairs of several ranks and scales"):
        er_jax.save_peft_adapter(tmp_path / "a", POLICY, mixed)
    with pytest.raises(ValueError, match=r"has low-rank pairs; save er_jax.merge_lora"):
        er_jax.save_hf(tmp_path / "a", POLICY, one)
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_nothing(
    params: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*unused: Any, **also: Any) -> None:
        raise OSError("No space left on device")

    made = er_jax.add_lora(params, rank=2, key=jax.random.key(1))
    monkeypatch.setattr(peft_files, "save_file", full)
    with pytest.raises(OSError, match=r"a cannot be written \(No space left"):
        er_jax.save_peft_adapter(tmp_path / "a", POLICY, made)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_read_onto_a_mesh(tmp_path: Path) -> None:
    policy = er_jax.Decoder(dataclasses.replace(SIZES, num_kv_heads=2))
    params = policy.init(jax.random.key(0))
    made = er_jax.add_lora(params, rank=2, key=jax.random.key(1))
    er_jax.save_peft_adapter(tmp_path / "adapter", policy, made)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    found = er_jax.load_peft_adapter(tmp_path / "adapter", policy, params, mesh=mesh)
    layer = found["layers"][0]
    assert layer["o_proj"].a.sharding.spec == PartitionSpec("model", None)
    assert layer["q_proj"].b.sharding.spec == PartitionSpec(None, "model")
    jax.tree.map(np.testing.assert_array_equal, found, made)


# ---------------------------------------------------------------------- PEFT itself

FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2, rslora": (
        "qwen2",
        {},
        dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    ),
    "llama, all": ("llama 3", {}, dict(r=3, target_modules="all-linear")),
    "qwen3, head": (
        "qwen3",
        {},
        dict(r=2, lora_alpha=16, target_modules=["o_proj", "lm_head"]),
    ),
}


# PEFT reads an attribute that `transformers` is about to rename.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from tests.test_hf import make

    family, changes, settings = FAMILIES[name]
    model = make(family, tmp_path / "base", **changes)
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **settings)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:  # which begins at zero
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    policy, plain = er_jax.load_hf(tmp_path / "base")
    params = er_jax.load_peft_adapter(tmp_path / "adapter", policy, plain)
    assert has_lora(params)
    tokens = np.random.default_rng(0).integers(3, 90, (2, 12))

    def ours(params: Any) -> np.ndarray:
        positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
        hidden, _ = policy.forward(
            params, jnp.asarray(tokens, jnp.int32), jnp.asarray(positions),
            policy.init_cache(2, 12),
        )  # fmt: skip
        return np.asarray(policy.logits(params, hidden))

    def theirs(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.numpy()

    assert np.abs(ours(params) - ours(plain)).max() > 0.1
    np.testing.assert_allclose(ours(params), theirs(adapted), atol=1e-4)
    er_jax.save_peft_adapter(tmp_path / "saved", policy, params)
    base = type(model).from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    np.testing.assert_allclose(theirs(again), theirs(adapted), atol=1e-5)
