"""The config.json of Hugging Face checkpoints: read as a `DecoderConfig`, and written.

A field is supported, or known to be harmless, or refused by name; none is ignored.
Every supported field has a type and a range in `hf_fields`. Left out: tensors
(`hf_weights`), saving (`hf_save`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from er_jax.decoder import DecoderConfig, LinearScaling, RopeScaling
from er_jax.io.hf_fields import (
    ARCHITECTURES,
    EXPERT_NAMES,
    FIELDS,
    FIELDS_OF,
    GEMMA3_FIELDS,
    GEMMA3_ROPE_FIELDS,
    GLOBAL,
    HARMLESS_FIELDS,
    LOCAL,
    LOCAL_ROPE_FIELDS,
    OUR_NAMES,
    ROPE_FIELDS,
    SCALINGS,
)
from er_jax.io.hf_fields import READ_FIELDS as READ_FIELDS
from er_jax.io.json_fields import OBJECT, Field, checked, printable, refusal, shown

CONFIG = "config.json"


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
    table = FIELDS | FIELDS_OF.get(family, {})
    known = table.keys() | {"model_type"} | HARMLESS_FIELDS
    for name in sorted(fields.keys() - known):
        if fields[name] not in (None, False, [], {}):
            raise ValueError(
                f"{file} says {printable(name)}={shown(fields[name])}, which is not "
                "known here and may change what the model computes; if it does not, "
                "remove it from the file"
            )
    read = checked(fields, table, file)
    architectures = read["architectures"]
    if architectures and ARCHITECTURES[family] not in architectures:
        words = f"{ARCHITECTURES[family]}, a language model,"
        raise refusal(file, "architectures", architectures, words)
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
    found: dict[str, Any] = dict(
        **sizes,
        head_dim=head_dim,
        norm_eps=float(read["rms_norm_eps"]),
        qkv_bias=has_bias or family == "qwen2",
        o_bias=has_bias,
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
        tied_embeddings=read["tie_word_embeddings"],
        max_length=read["max_position_embeddings"],
        dtype=dtype or _default_dtype(read, file),
    )
    if family == "gemma3_text":
        found |= _gemma3(read, file)
    else:
        found["window"] = _window(family, fields, read, file)
        spelled = {name: read[name] for name in ("rope_scaling", "rope_parameters")}
        found["rope_theta"], found["rope_scaling"] = _rope(
            spelled, read["rope_theta"], ROPE_FIELDS, file
        )
    if family == "qwen3_moe":
        found |= _experts(read, file)
    try:
        return DecoderConfig(**found)
    except ValueError as error:
        # Sizes that are valid alone may not fit together. The message has names of
        # `DecoderConfig`; give it those of the file.
        theirs = {own: name for name, own in (OUR_NAMES | EXPERT_NAMES).items()}
        reason = re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), str(error))
        names = ("hidden_size", "num_attention_heads", "num_key_value_heads")
        given = ", ".join(f"{name}={read[name]}" for name in (*names, "head_dim"))
        raise ValueError(f"{file}: {reason}; the file says {given}") from error


def _window(
    family: str, fields: Mapping[str, Any], read: Mapping[str, Any], file: Path
) -> int | None:
    """Return the window of all layers; only Mistral may have one."""
    window = read["sliding_window"]
    if family == "mistral":
        if "sliding_window" not in fields:
            window = 4096
        if window is not None and read["layer_types"]:
            words = "a list for a model without a window, or null,"
            raise refusal(file, "layer_types", read["layer_types"], words)
        return window
    # Qwen names a window even where it does not use one.
    words = "a model without one (use_sliding_window=false)"
    has_window = read["use_sliding_window"]
    if family == "llama":
        has_window, words = window is not None, "a model without one (null)"
    if has_window:
        raise refusal(file, "sliding_window", window, words)
    return None


def _experts(read: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the settings of Qwen3's experts."""
    count, alias = read["num_experts"], read["num_local_experts"]
    if None not in (count, alias) and count != alias:
        raise refusal(file, "num_local_experts", alias, f"num_experts={count} again")
    sizes = {own: read[name] for name, own in EXPERT_NAMES.items()}
    sizes["num_experts"] = count or alias
    for name, own in EXPERT_NAMES.items():
        if sizes[own] is None:
            raise ValueError(f"{file} has no {name}; the checkpoint is incomplete")
    layers = range(read["num_hidden_layers"])
    named, step = read["mlp_only_layers"], read["decoder_sparse_step"] or 1
    if any(layer not in layers for layer in named):
        words = f"a list of numbers of layers, from 0 to {layers[-1]},"
        raise refusal(file, "mlp_only_layers", named, words)
    dense = tuple(i for i in layers if i in named or (i + 1) % step)
    if len(dense) == len(layers):
        words = "a model with experts in some layer"
        raise refusal(file, "decoder_sparse_step", step, words)
    return sizes | {"scaled_routing": read["norm_topk_prob"], "dense_layers": dense}


def _gemma3(read: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the settings of Gemma 3: its norms, its local layers, their rotation."""
    count, types = read["num_hidden_layers"], read["layer_types"]
    if types is None:
        every = read["sliding_window_pattern"]
        types = [LOCAL if (i + 1) % every else GLOBAL for i in range(count)]
    elif len(types) != count:
        words = GEMMA3_FIELDS["layer_types"].words
        raise refusal(file, "layer_types", types, f"{words} of num_hidden_layers,")
    named = read["rope_parameters"]
    if any(key not in (GLOBAL, LOCAL) and named[key] is not None for key in named):
        words = f"an object of {GLOBAL!r} and {LOCAL!r}"
        raise refusal(file, "rope_parameters", named, words)
    both = {key: OBJECT for key in (GLOBAL, LOCAL)}
    inner = checked(named, both, file, "rope_parameters.")
    spelled = {
        "rope_scaling": read["rope_scaling"],
        f"rope_parameters.{GLOBAL}": inner[GLOBAL],
    }
    theta, scaling = _rope(spelled, read["rope_theta"], GEMMA3_ROPE_FIELDS, file)
    spelled = {f"rope_parameters.{LOCAL}": inner[LOCAL]}
    local, _ = _rope(spelled, read["rope_local_base_freq"], LOCAL_ROPE_FIELDS, file)
    return {
        "activation": "gelu",
        "norm_offset": True,
        "post_norms": True,
        "scaled_embeddings": True,
        "query_scalar": float(read["query_pre_attn_scalar"]),
        "logit_cap": read["final_logit_softcapping"],
        "window": read["sliding_window"],
        "global_layers": tuple(i for i in range(count) if types[i] == GLOBAL),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "local_rope_theta": local,
    }


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


def _rope(
    spelled: Mapping[str, Mapping[str, Any]],
    theta: float,
    table: Mapping[str, Field],
    file: Path,
) -> tuple[float, RopeScaling | LinearScaling | None]:
    """Return base and scaling of rotary frequencies.

    Args:
      spelled: the objects of the file that may hold them, by name. theta: the base
        where none does. table: the fields of these objects. file: for messages.
    """
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    for name, fields in spelled.items():
        for key, value in _rope_of(fields, name, table, file).items():
            if key in found and found[key] != value:
                key = printable(key)
                raise ValueError(
                    f"{file} says {given[key]}.{key}={shown(found[key])} and "
                    f"{name}.{key}={shown(value)}; remove one of them"
                )
            found[key], given[key] = value, name
    theta = float(found.pop("rope_theta", theta))
    kind = found.pop("rope_type", "default")
    names, within = SCALINGS[kind], " or ".join(reversed(list(spelled)))
    if found.keys() != names.keys():
        raise ValueError(
            f"{file} says rope_type={kind!r} with {shown(sorted(found))}; it takes "
            f"exactly {sorted(names)}, in {within}"
        )
    values = {names[name]: found[name] for name in names}
    try:
        if kind == "default":
            return theta, None
        if kind == "linear":
            return theta, LinearScaling(**values)
        return theta, RopeScaling(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}, in {within}; mend the file") from error


def _rope_of(
    fields: Mapping[str, Any], name: str, table: Mapping[str, Field], file: Path
) -> dict[str, Any]:
    """Return the fields of an object of rotary parameters, without nulls."""
    found = checked(fields, table, file, f"{name}.")
    del found["partial_rotary_factor"]  # It is 1, or has been refused.
    kind, older = found["rope_type"], found.pop("type")
    if kind is not None and older not in (None, kind):
        raise refusal(file, f"{name}.type", older, f"rope_type={kind!r} again")
    found["rope_type"] = kind or older
    others = {key: fields[key] for key in fields.keys() - table.keys()}
    return {k: v for k, v in {**found, **others}.items() if v is not None}


def new_fields(c: DecoderConfig) -> dict[str, Any]:
    """Return a configuration for a decoder that was not loaded.

    Raises:
      ValueError: no supported architecture has these switches together.
    """
    family = _family_of(c)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        is_linear = isinstance(c.rope_scaling, LinearScaling)
        rope["rope_type"] = "linear" if is_linear else "llama3"
        for name, own in SCALINGS[rope["rope_type"]].items():
            rope[name] = getattr(c.rope_scaling, own)
    # Both spellings: older versions of transformers read rope_theta and rope_scaling.
    older = {k: v for k, v in rope.items() if k != "rope_theta"}
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        **{name: getattr(c, own) for name, own in OUR_NAMES.items()},
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
    if family not in ("qwen2", "mistral"):
        fields["attention_bias"] = c.qkv_bias
    if family == "llama":
        fields["mlp_bias"] = False
    if family == "mistral":
        fields["sliding_window"] = c.window
    if family == "qwen3_moe":
        fields |= {name: getattr(c, own) for name, own in EXPERT_NAMES.items()}
        fields["norm_topk_prob"] = c.scaled_routing
        fields["decoder_sparse_step"] = 1
        fields["mlp_only_layers"] = list(c.dense_layers)
    if family == "gemma3_text":
        del fields["hidden_act"]
        scalar = c.head_size if c.query_scalar is None else c.query_scalar
        theta = c.rope_theta if c.local_rope_theta is None else c.local_rope_theta
        fields |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": int(scalar) if scalar % 1 == 0 else scalar,
            "final_logit_softcapping": c.logit_cap,
            "sliding_window": c.window,
            "layer_types": [
                GLOBAL if c.window_of(layer) is None else LOCAL
                for layer in range(c.num_layers)
            ],
            "rope_local_base_freq": theta,
            "rope_parameters": {
                GLOBAL: rope,
                LOCAL: {"rope_type": "default", "rope_theta": theta},
            },
        }
    return fields


def _family_of(c: DecoderConfig) -> str:
    """Return the family that has a decoder's switches together."""
    gemma = (c.activation == "gelu", c.norm_offset, c.post_norms, c.scaled_embeddings)
    has_own_scale = c.query_scalar not in (None, c.head_size)
    is_linear = isinstance(c.rope_scaling, LinearScaling)
    switches = {
        "biases": (c.qkv_bias, c.o_bias),
        "qk_norm": c.qk_norm,
        "gemma": all(gemma) or (any(gemma) and None),
        "window": c.window is not None,
        "experts": c.num_experts > 0,
        # What only Gemma 3 can say in its configuration.
        "more": bool(
            c.global_layers
            or c.local_rope_theta
            or c.logit_cap
            or has_own_scale
            or is_linear
        ),
        # Local layers whose frequencies are scaled as those of global ones.
        "scaled window": None not in (c.window, c.rope_scaling)
        and c.local_rope_theta is None,
    }
    for family, wanted in SWITCHES_OF.items():
        if all(switches[name] in wanted.get(name, (False,)) for name in switches):
            return family
    names = (
        *("qkv_bias", "o_bias", "qk_norm", "activation", "norm_offset", "post_norms"),
        *("scaled_embeddings", "query_scalar", "logit_cap", "window", "global_layers"),
        *("local_rope_theta", "rope_scaling", "num_experts"),
    )
    given = ", ".join(f"{name}={getattr(c, name)}" for name in names)
    raise ValueError(
        f"{given}: no supported architecture ({', '.join(ARCHITECTURES)}) has these "
        "together"
    )


# Biases on q, k and v, and on the output of attention.
BIASES = ((False, False), (True, True))

# The switches of `_family_of` that a family can have; False where one is not named.
SWITCHES_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"biases": BIASES},
    "qwen2": {"biases": ((True, False),)},
    "qwen3": {"biases": BIASES, "qk_norm": (True,)},
    "qwen3_moe": {"biases": BIASES, "qk_norm": (True,), "experts": (True,)},
    "mistral": {
        "biases": ((False, False),), "window": (True,), "scaled window": (False, True),
    },
    "gemma3_text": {
        "biases": BIASES, "qk_norm": (True,), "gemma": (True,), "window": (True,),
        "more": (False, True),
    },
}  # fmt: skip
