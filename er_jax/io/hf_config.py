"""The config.json of Hugging Face checkpoints: read as a `DecoderConfig`, and written.

A field is supported, or known to be harmless, or refused by name; none is ignored.
Every supported field has a type and a range in `FIELDS`. Left out: tensors
(`hf_weights`), saving (`hf_save`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from er_jax.decoder import DecoderConfig, RopeScaling
from er_jax.io.json_fields import (
    OBJECT,
    Field,
    checked,
    is_texts,
    number_field,
    printable,
    refusal,
    shown,
    text_field,
    whole_field,
)

CONFIG = "config.json"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


SIZE = whole_field(1, 2**31 - 1)
SWITCH = Field("true or false", lambda value: isinstance(value, bool), default=False)

# Share of each head that is rotated; partial rotary positions are not supported.
FULL_ROTATION = dataclasses.replace(number_field(1, 1), words="1.0", default=1.0)

# Fields of sizes and switches, beside model_type; `decoder_config` reads each.
FIELDS: dict[str, Field] = {
    "architectures": Field("a list of class names", is_texts, default=()),
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": whole_field(1, 10_000),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "hidden_act": text_field("silu", "swish", is_null_missing=False),
    "rms_norm_eps": number_field(1e-30, 1, default=1e-6, is_null_missing=False),
    "rope_theta": number_field(1, 1e18, default=10_000.0),
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "tie_word_embeddings": SWITCH,
    "attention_bias": SWITCH,
    "mlp_bias": Field("false", lambda value: value is False),
    "sliding_window": SIZE,
    "use_sliding_window": SWITCH,
    "layer_types": Field(
        "a list of 'full_attention'",
        lambda value: is_texts(value, "full_attention"),
    ),
    "max_position_embeddings": SIZE,
    "partial_rotary_factor": FULL_ROTATION,
    "quantization_config": Field(
        "a checkpoint that is not quantized (null)",
        lambda value: isinstance(value, dict) and not value,
    ),
    "torch_dtype": text_field(),
    "dtype": text_field(),
}

READ_FIELDS = FIELDS.keys() | {"model_type"}

# Fields inside rope_scaling and rope_parameters.
ROPE_FIELDS: dict[str, Field] = {
    "rope_type": text_field("default", "llama3"),
    "type": text_field("default", "llama3"),
    "rope_theta": dataclasses.replace(FIELDS["rope_theta"], default=None),
    "partial_rotary_factor": FULL_ROTATION,
    "factor": number_field(1, 1e6),
    "low_freq_factor": number_field(1e-6, 1e6),
    "high_freq_factor": number_field(1e-6, 1e6),
    "original_max_position_embeddings": SIZE,
}


# Names of sizes in the file -> in `DecoderConfig`.
OUR_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}


# Fields that do not change the logits: training, generation, bookkeeping.
HARMLESS_FIELDS = frozenset(
    """
    transformers_version _name_or_path initializer_range use_cache bos_token_id
    eos_token_id pad_token_id attention_dropout hidden_dropout pretraining_tp
    max_window_layers output_attentions output_hidden_states return_dict id2label
    label2id problem_type is_encoder_decoder chunk_size_feed_forward unsloth_fixed
    unsloth_version task_specific_params finetuning_task _attn_implementation
    """.split()
)


def decoder_config(
    fields: Mapping[str, Any], dtype: str | None, file: Path
) -> DecoderConfig:
    """Return the configuration of the decoder that config.json describes.

    Args:
      fields: of config.json. dtype: its name, as in `load_hf`. file: for messages.
    Raises:
      ValueError: a field or a value that is not supported; the message names it.
    """
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ValueError(
            f"{file}: model_type={shown(family)} is not supported; load a checkpoint "
            f"of one of {', '.join(ARCHITECTURES)}"
        )
    for name in sorted(fields.keys() - READ_FIELDS - HARMLESS_FIELDS):
        if fields[name] not in (None, False, [], {}):
            raise ValueError(
                f"{file} says {printable(name)}={shown(fields[name])}, which is not "
                "known here and may change what the model computes; if it does not, "
                "remove it from the file"
            )
    read = checked(fields, FIELDS, file)
    architectures = read["architectures"]
    if architectures and ARCHITECTURES[family] not in architectures:
        words = f"{ARCHITECTURES[family]}, a language model,"
        raise refusal(file, "architectures", architectures, words)
    # Qwen names a window even where it does not use one; Mistral's is on by default.
    window, words = read["sliding_window"], "a model without one (null)"
    if family in ("qwen2", "qwen3"):
        has_window = read["use_sliding_window"]
        words = "a model without one (use_sliding_window=false)"
    else:
        has_window = window is not None
    if family == "mistral" and "sliding_window" not in fields:
        raise ValueError(
            f"{file} has no sliding_window, and a model of this family has one then; "
            f"only {words} is supported"
        )
    if has_window:
        raise refusal(file, "sliding_window", window, words)
    sizes = {own: read[name] for name, own in OUR_NAMES.items()}
    if family == "llama" and sizes["num_kv_heads"] is None:
        sizes["num_kv_heads"] = sizes["num_heads"]
    for name, own in OUR_NAMES.items():
        if sizes[own] is None:
            raise ValueError(f"{file} has no {name}; the checkpoint is incomplete")
    head_dim = read["head_dim"]
    if head_dim is None and family == "qwen3":
        head_dim = 128
    if head_dim is not None and head_dim * sizes["num_heads"] == sizes["dim"]:
        head_dim = None
    has_bias = read["attention_bias"]
    theta, scaling = _rope(read, file)
    named = dtype or _default_dtype(read, file)
    try:
        return DecoderConfig(
            **sizes,
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(read["rms_norm_eps"]),
            qkv_bias=has_bias or family == "qwen2",
            o_bias=has_bias,
            qk_norm=family == "qwen3",
            tied_embeddings=read["tie_word_embeddings"],
            max_length=read["max_position_embeddings"],
            dtype=named,
        )
    except ValueError as error:
        # Sizes that are valid alone may not fit together. The message has names of
        # `DecoderConfig`; give it those of the file.
        theirs = {own: name for name, own in OUR_NAMES.items()}
        reason = re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), str(error))
        names = ("hidden_size", "num_attention_heads", "num_key_value_heads")
        given = ", ".join(f"{name}={read[name]}" for name in (*names, "head_dim"))
        raise ValueError(f"{file}: {reason}; the file says {given}") from error


def _default_dtype(read: Mapping[str, Any], file: Path) -> str:
    name = "torch_dtype" if read["dtype"] is None else "dtype"
    known = {"float16": "float32", "float32": "float32", "bfloat16": "bfloat16"}
    named = "float32" if read[name] is None else read[name]
    if named not in known:
        raise ValueError(
            f"{file} says {name}={shown(named)}, which no policy here has; choose one "
            "with dtype='float32' or dtype='bfloat16'"
        )
    return known[named]


def _rope(read: Mapping[str, Any], file: Path) -> tuple[float, RopeScaling | None]:
    """Return theta and scaling, from the older fields or rope_parameters."""
    old, new = (
        _rope_of(read, name, file) for name in ("rope_scaling", "rope_parameters")
    )
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            key = printable(name)
            raise ValueError(
                f"{file} says rope_scaling.{key}={shown(old[name])} and "
                f"rope_parameters.{key}={shown(new[name])}; remove one of them"
            )
    found = {**old, **new}
    theta = float(found.pop("rope_theta", read["rope_theta"]))
    kind = found.pop("rope_type", "default")
    if kind == "default":
        names: dict[str, str] = {}
    else:
        names = {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_length",
        }
    if found.keys() != names.keys():
        raise ValueError(
            f"{file} says rope_type={kind!r} with {shown(sorted(found))}; it takes "
            f"exactly {sorted(names)}, in rope_parameters or rope_scaling"
        )
    if kind == "default":
        return theta, None
    try:
        return theta, RopeScaling(**{names[name]: found[name] for name in names})
    except ValueError as error:
        raise ValueError(
            f"{file}: {error}, in rope_parameters or rope_scaling; mend the file"
        ) from error


def _rope_of(read: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    """Return the fields of rope_scaling or rope_parameters, without nulls."""
    found = checked(read[name], ROPE_FIELDS, file, f"{name}.")
    del found["partial_rotary_factor"]  # It is 1, or has been refused.
    kind, older = found["rope_type"], found.pop("type")
    if kind is not None and older not in (None, kind):
        raise refusal(file, f"{name}.type", older, f"rope_type={kind!r} again")
    found["rope_type"] = kind or older
    others = {key: read[name][key] for key in read[name].keys() - ROPE_FIELDS.keys()}
    return {k: v for k, v in {**found, **others}.items() if v is not None}


def new_fields(c: DecoderConfig) -> dict[str, Any]:
    """Return a configuration for a decoder that was not loaded."""
    family = "llama"
    if c.qk_norm:
        family = "qwen3"
    elif c.qkv_bias and not c.o_bias:
        family = "qwen2"
    if c.qkv_bias != c.o_bias and family != "qwen2":
        raise ValueError(
            f"qkv_bias={c.qkv_bias}, o_bias={c.o_bias}, qk_norm={c.qk_norm}: no "
            f"supported architecture ({', '.join(ARCHITECTURES)}) has these together"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": c.rope_scaling.factor,
            "low_freq_factor": c.rope_scaling.low_freq_factor,
            "high_freq_factor": c.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": c.rope_scaling.original_length,
        }
    # Both spellings: older versions of transformers read rope_theta and rope_scaling.
    older = {k: v for k, v in rope.items() if k != "rope_theta"}
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": rope,
        "rope_theta": c.rope_theta,
        "rope_scaling": older if c.rope_scaling is not None else None,
        "tie_word_embeddings": c.tied_embeddings,
        "max_position_embeddings": c.max_length or 2**17,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": c.dtype,
        "torch_dtype": c.dtype,
    }
    if family != "qwen2":
        fields["attention_bias"] = c.qkv_bias
    if family == "llama":
        fields["mlp_bias"] = False
    return fields
