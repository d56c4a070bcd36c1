"""The config.json of Hugging Face checkpoints: read as a `DecoderConfig`, and written.

A field is either understood, or known to change nothing, or refused by name: none is
ignored. Each that is understood has a type and a range in `FIELDS`, the one place where
values are checked. Left out: tensors, which are in `hf`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from er_jax.decoder import DecoderConfig, RopeScaling

CONFIG = "config.json"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field of a JSON file may hold.

    words: what is allowed, for people. allows: tells whether a value is. unsaid: what
    the field is where the file lacks it. is_null_unsaid: null is the same as lacking.
    """

    words: str
    allows: Callable[[Any], bool]
    unsaid: Any = None
    is_null_unsaid: bool = True


def _whole(low: int, high: int) -> Field:
    # By type and not isinstance: true is no number.
    return Field(
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def _number(low: float, high: float, **rest: Any) -> Field:
    # NaN is in no range; whole numbers too long for a float compare all the same.
    return Field(
        f"a number from {low:g} to {high:g}",
        lambda value: type(value) in (int, float) and low <= value <= high,
        **rest,
    )


def _text(*allowed: str, **rest: Any) -> Field:
    return Field(
        " or ".join(map(repr, allowed)) or "a text",
        lambda value: isinstance(value, str) and value in (allowed or (value,)),
        **rest,
    )


def _is_texts(value: Any, *allowed: str) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, str) and item in (allowed or (item,)) for item in value
    )


SIZE = _whole(1, 2**31 - 1)
SWITCH = Field("true or false", lambda value: isinstance(value, bool), unsaid=False)

# The part of each head that rotary positions turn.
ALL_OF_IT = dataclasses.replace(_number(1, 1), words="1.0", unsaid=1.0)
OBJECT = Field("an object", lambda value: isinstance(value, dict), unsaid={})

# Fields that say sizes and switches, beside model_type; each is read below.
FIELDS: dict[str, Field] = {
    "architectures": Field("a list of class names", _is_texts, unsaid=()),
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": _whole(1, 10_000),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "hidden_act": _text("silu", "swish", is_null_unsaid=False),
    "rms_norm_eps": _number(1e-30, 1, unsaid=1e-6, is_null_unsaid=False),
    "rope_theta": _number(1, 1e18, unsaid=10_000.0),
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "tie_word_embeddings": SWITCH,
    "attention_bias": SWITCH,
    "mlp_bias": Field("false", lambda value: value is False),
    "sliding_window": SIZE,
    "use_sliding_window": SWITCH,
    "layer_types": Field(
        "a list of 'full_attention'",
        lambda value: _is_texts(value, "full_attention"),
    ),
    "max_position_embeddings": SIZE,
    "partial_rotary_factor": ALL_OF_IT,
    "quantization_config": Field(
        "a checkpoint that is not quantized (null)",
        lambda value: isinstance(value, dict) and not value,
    ),
    "torch_dtype": _text(),
    "dtype": _text(),
}

READ_FIELDS = FIELDS.keys() | {"model_type"}

# Fields within rope_scaling and rope_parameters.
ROPE_FIELDS: dict[str, Field] = {
    "rope_type": _text("default", "llama3"),
    "type": _text("default", "llama3"),
    "rope_theta": dataclasses.replace(FIELDS["rope_theta"], unsaid=None),
    "partial_rotary_factor": ALL_OF_IT,
    "factor": _number(1, 1e6),
    "low_freq_factor": _number(1e-6, 1e6),
    "high_freq_factor": _number(1e-6, 1e6),
    "original_max_position_embeddings": SIZE,
}


# Sizes by the names that `DecoderConfig` has for them.
OWN_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}


# Fields that change nothing that is computed here: training, generation, bookkeeping.
HARMLESS_FIELDS = frozenset(
    """
    transformers_version _name_or_path initializer_range use_cache bos_token_id
    eos_token_id pad_token_id attention_dropout hidden_dropout pretraining_tp
    max_window_layers output_attentions output_hidden_states return_dict id2label
    label2id problem_type is_encoder_decoder chunk_size_feed_forward unsloth_fixed
    unsloth_version task_specific_params finetuning_task _attn_implementation
    """.split()
)


# Lists within lists that a field may have; far below what Python's stack bears.
MOST_NESTED = 32


_SHORT = reprlib.Repr()


_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 2, 8, 80, 80


def shown(value: Any) -> str:
    """Return a value from a file as a message shows it: in one line, and short."""
    return _SHORT.repr(value)


def said(name: str) -> str:
    """Return a name from a file, as it is unless it would break the line."""
    return name if name.isprintable() else shown(name)


def refusal(file: Path, name: str, value: Any, words: str) -> ValueError:
    """Return the error for a value of a field of a file; only `words` is allowed."""
    return ValueError(
        f"{file} says {name}={shown(value)}, which is not supported; only {words} is: "
        "mend the file, or load another checkpoint"
    )


def checked(
    fields: Mapping[str, Any], table: Mapping[str, Field], file: Path, within: str = ""
) -> dict[str, Any]:
    """Return the values of all fields of a table, having checked each.

    fields: of the file, or of the object `within` it, whose name ends in a dot.
    """
    found = {}
    for name, field in table.items():
        value = fields.get(name)
        if value is None and (field.is_null_unsaid or name not in fields):
            found[name] = field.unsaid
        elif field.allows(value):
            found[name] = value
        else:
            raise refusal(file, within + name, value, field.words)
    return found


def is_file(path: Path) -> bool:
    """Tell whether a file is there.

    Raises:
      ValueError: there is something else, a pipe for instance, on which a reader waits.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # the second for names that none can have
        raise ValueError(
            f"{path} cannot be read ({error}); give the directory of a checkpoint"
        ) from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a regular file; copy the checkpoint again")
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
      ValueError: no such file; or damaged, no object, a name given twice, or nested
        deeper than anything here is.
    """
    if not is_file(path):
        raise ValueError(
            f"{path} cannot be read (no such file); give the directory of a "
            "checkpoint as save_pretrained writes it"
        )
    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); mend its permissions or copy "
            "it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again")
    level: list[tuple[str, Any]] = list(found.items())
    for _ in range(MOST_NESTED):
        level = [inner for name, value in level for inner in _inner(name, value)]
    for name, value in level:
        words = f"a value nested at most {MOST_NESTED} deep"
        raise refusal(path, said(name), value, words)
    return found


def _inner(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Return the values within a value, by their names."""
    if isinstance(value, dict):
        return [(f"{name}.{key}", inner) for key, inner in value.items()]
    return [(name, inner) for inner in value] if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, which JSON would let name a field twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice")
        found[name] = value
    return found


def decoder_config(
    fields: Mapping[str, Any], dtype: str | None, file: Path
) -> DecoderConfig:
    """Return the decoder that a configuration describes.

    Args:
      fields: of config.json. dtype: as for `load_hf`, by name. file: for messages.
    Raises:
      ValueError: something that is not supported, by its name.
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
                f"{file} says {said(name)}={shown(fields[name])}, which is not known "
                "here and may change what the model computes; if it does not, remove "
                "it from the file"
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
    sizes = {own: read[name] for name, own in OWN_NAMES.items()}
    if family == "llama" and sizes["num_kv_heads"] is None:
        sizes["num_kv_heads"] = sizes["num_heads"]
    for name, own in OWN_NAMES.items():
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
        # Each size is one by itself; together they are none, by another's names.
        theirs = {own: name for name, own in OWN_NAMES.items()}
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
    """Return theta and scaling, from the old fields or the new one."""
    old, new = (
        _rope_of(read, name, file) for name in ("rope_scaling", "rope_parameters")
    )
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            raise ValueError(
                f"{file} says rope_scaling.{said(name)}={shown(old[name])} and "
                f"rope_parameters.{said(name)}={shown(new[name])}; remove one of them"
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
    """Return what rope_scaling or rope_parameters say, less what is null or usual."""
    found = checked(read[name], ROPE_FIELDS, file, f"{name}.")
    del found["partial_rotary_factor"]  # 1, or refused
    kind, older = found["rope_type"], found.pop("type")
    if kind is not None and older not in (None, kind):
        raise refusal(file, f"{name}.type", older, f"rope_type={kind!r} again")
    found["rope_type"] = kind or older
    others = {key: read[name][key] for key in read[name].keys() - ROPE_FIELDS.keys()}
    return {k: v for k, v in {**found, **others}.items() if v is not None}


def new_fields(c: DecoderConfig) -> dict[str, Any]:
    """Return a configuration for a decoder that came from nowhere."""
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
    # Both spellings: older versions of transformers read the fields behind.
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
