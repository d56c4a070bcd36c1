"""Hugging Face checkpoints: loaded as a `Decoder`, and a `Decoder` saved as one.

Llama 2 and 3, Mistral without a sliding window, Qwen2, Qwen2.5 and Qwen3 (dense), from
single or sharded safetensors. A field of a configuration is either understood, or known
to change nothing, or refused by name: none is ignored.

*Loading* checks names, shapes and types of all tensors before it reads any, then reads
them one by one, in slices, straight into arrays of the wanted type: beside the result
there is never more than one tensor. *Saving* writes beside the directory and renames at
the end: a directory that is there is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from er_jax.decoder import Decoder, DecoderConfig, RopeScaling
from er_jax.drafter import TiedEmbedding
from er_jax.sharding import param_spec
from er_jax.types import Params

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Fields that say sizes and switches; each is read below.
READ_FIELDS = frozenset(
    """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim hidden_act rms_norm_eps rope_theta
    rope_scaling rope_parameters tie_word_embeddings attention_bias mlp_bias
    sliding_window use_sliding_window layer_types max_position_embeddings
    partial_rotary_factor quantization_config torch_dtype dtype
    """.split()
)

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

# Files of a checkpoint beside configuration and weights that a trained one needs too.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Bytes read, turned and converted at once.
SLICE_BYTES = 4 << 20
SHARD_BYTES = 4 << 30


def policy_of(directory: str | os.PathLike[str], dtype: Any = None) -> Decoder:
    """Return the policy of a checkpoint without its parameters; see `load_hf`."""
    path = Path(directory)
    named = None if dtype is None else jnp.dtype(dtype).name
    config = decoder_config(_read_json(path / CONFIG), named)
    return Decoder(config, source=str(path))


def load_hf(
    directory: str | os.PathLike[str],
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> tuple[Decoder, Params]:
    """Load a checkpoint as a policy and its parameters.

    Args:
      directory: with config.json and safetensors, as `save_pretrained` writes it.
      dtype: of parameters, activations and cache: float32, bfloat16 or float64, as a
        name or a dtype; None is that of the checkpoint (float32 for one in float16).
      mesh: devices to cut the parameters over, by the rules of `sharding`; None puts
        them on the default device.
      progress: show a progress bar of the bytes.
    Returns:
      The policy, which remembers the directory for `save_hf`, and its parameters.
    Raises:
      ValueError: no such checkpoint; an architecture or a field that is not supported;
        tensors that are missing, left over, damaged, or of another shape or type; a
        mesh that does not divide them.
    """
    path = Path(directory)
    policy = policy_of(directory, dtype)
    config, target = policy.config, policy.parameter_dtype()
    files = _files(path)
    tensors = {tensor.name: tensor for tensor in _tensors(config)}
    leaves: dict[tuple[str | int, ...], jax.Array] = {}
    with contextlib.ExitStack() as stack:
        handles = {file: stack.enter_context(_opened(path / file)) for file in files}
        place = _placed(path, handles, files, tensors, config)
        total = sum(math.prod(tensor.shape) for tensor in tensors.values())
        bar = stack.enter_context(
            tqdm(total=total, unit="param", unit_scale=True, disable=not progress)
        )
        for name, tensor in tensors.items():
            read = functools.partial(_read, handles[place[name]], tensor, target)
            if mesh is None:
                leaves[tensor.path] = jax.device_put(read())
            else:
                leaves[tensor.path] = _cut(read, tensor, config, mesh)
            bar.update(math.prod(tensor.shape))
    return policy, _assembled(leaves, config)


def save_hf(directory: str | os.PathLike[str], policy: Decoder, params: Params) -> None:
    """Save parameters as a checkpoint that `transformers` loads.

    Configuration, tokenizer and generation settings come from the checkpoint that the
    policy was loaded from, if it was; else the configuration is written anew.

    Args:
      directory: must not exist, or be empty; written whole or not at all.
      policy: the policy. params: its parameters, bare: no draft.
    Raises:
      ValueError: the directory holds something; the parameters are not the policy's; or
        no supported architecture has this policy's switches.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"directory={os.fspath(directory)!r} already holds something; give a new "
            "one, so that nothing is lost"
        )
    config = policy.config
    tensors = list(_tensors(config))
    arrays = dict(_disassembled(params, tensors))
    source = None if policy.source is None else Path(policy.source)
    fields = _fields_of(policy, source)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        _write_tensors(part, tensors, arrays)
        if source is not None:
            _copy_companions(source, part)
        (part / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def decoder_config(fields: Mapping[str, Any], dtype: str | None) -> DecoderConfig:
    """Return the decoder that a configuration describes.

    Args:
      fields: of config.json. dtype: as for `load_hf`.
    Raises:
      ValueError: something that is not supported, by its name.
    """
    family = fields.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(
            f"model_type={family!r} is not supported; load a checkpoint of one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    for name in sorted(fields.keys() - READ_FIELDS - HARMLESS_FIELDS):
        if fields[name] not in (None, False, [], {}):
            raise ValueError(
                f"{CONFIG} says {name}={fields[name]!r}, which is not known here and "
                "may change what the model computes; if it does not, remove it from "
                f"{CONFIG}"
            )

    def refuse(name: str, wanted: str) -> None:
        raise ValueError(
            f"{CONFIG} says {name}={fields.get(name)!r}, which is not supported; only "
            f"{wanted} is"
        )

    def required(name: str) -> Any:
        if fields.get(name) is None:
            raise ValueError(f"{CONFIG} has no {name}; the checkpoint is incomplete")
        return fields[name]

    architectures = fields.get("architectures")
    if architectures and ARCHITECTURES[family] not in architectures:
        refuse("architectures", f"{ARCHITECTURES[family]}, a language model,")
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "'silu'")
    if fields.get("mlp_bias"):
        refuse("mlp_bias", "False")
    if fields.get("quantization_config"):
        refuse("quantization_config", "a checkpoint that is not quantized")
    if fields.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial_rotary_factor", "1.0")
    if set(fields.get("layer_types") or ()) - {"full_attention"}:
        refuse("layer_types", "'full_attention'")
    # Qwen names a window even where it does not use one; Mistral's is on by default.
    if family in ("qwen2", "qwen3"):
        has_window = bool(fields.get("use_sliding_window"))
    else:
        unsaid = 4096 if family == "mistral" else None
        has_window = fields.get("sliding_window", unsaid) is not None
    if has_window:
        refuse("sliding_window", "a model without one (null)")
    heads = required("num_attention_heads")
    kv_heads = fields.get("num_key_value_heads")
    if kv_heads is None:
        kv_heads = heads if family == "llama" else required("num_key_value_heads")
    head_dim = fields.get("head_dim")
    if head_dim is None and family == "qwen3":
        head_dim = 128
    if head_dim is not None and head_dim * heads == required("hidden_size"):
        head_dim = None
    has_bias = bool(fields.get("attention_bias"))
    theta, scaling = _rope(fields)
    return DecoderConfig(
        vocab_size=required("vocab_size"),
        dim=required("hidden_size"),
        num_layers=required("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_dim=required("intermediate_size"),
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        qkv_bias=has_bias or family == "qwen2",
        o_bias=has_bias,
        qk_norm=family == "qwen3",
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        max_length=fields.get("max_position_embeddings"),
        dtype=dtype or _default_dtype(fields),
    )


def _default_dtype(fields: Mapping[str, Any]) -> str:
    named = str(fields.get("dtype") or fields.get("torch_dtype") or "float32")
    known = {"float16": "float32", "float32": "float32", "bfloat16": "bfloat16"}
    if named not in known:
        raise ValueError(
            f"{CONFIG} says dtype={named!r}, which no policy here has; choose one with "
            "dtype='float32' or dtype='bfloat16'"
        )
    return known[named]


def _rope(fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return theta and scaling, from the old fields or the new one."""
    new, old = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    found = {**old, **new}
    theta = float(found.pop("rope_theta", fields.get("rope_theta") or 10_000.0))
    if found.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{CONFIG} says partial_rotary_factor other than 1.0, which is not "
            "supported"
        )
    kinds = {found.pop(name) for name in ("rope_type", "type") if name in found}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in ("default", "llama3"):
        raise ValueError(
            f"{CONFIG} says rope_type={kind!r}, which is not supported; only 'default' "
            "and 'llama3' are"
        )
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
            f"{CONFIG} says rope_type={kind!r} with {sorted(found)}; it takes exactly "
            f"{sorted(names)}"
        )
    if kind == "default":
        return theta, None
    return theta, RopeScaling(**{names[name]: found[name] for name in names})


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and the leaf of `Params` that it is.

    name: in the checkpoint. path: of the leaf. shape: in the checkpoint; a matrix is
    `[out, in]` there, and `[in, out]` here if `is_turned`.
    """

    name: str
    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    is_turned: bool = False

    @property
    def leaf(self) -> str:
        """The path with slashes, for people and rules."""
        return "/".join(map(str, self.path))

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        return self.shape[::-1] if self.is_turned else self.shape


def _tensors(c: DecoderConfig) -> Iterator[Tensor]:
    """Yield the tensors of a checkpoint of this decoder."""
    q_out, kv_out = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    attention = {
        "q_proj": (q_out, c.dim),
        "k_proj": (kv_out, c.dim),
        "v_proj": (kv_out, c.dim),
        "o_proj": (c.dim, q_out),
    }
    feed_forward = {
        "gate_proj": (c.hidden_dim, c.dim),
        "up_proj": (c.hidden_dim, c.dim),
        "down_proj": (c.dim, c.hidden_dim),
    }
    yield Tensor("model.embed_tokens.weight", ("embed",), (c.vocab_size, c.dim))
    for i in range(c.num_layers):
        prefix, at = f"model.layers.{i}", ("layers", i)
        yield Tensor(f"{prefix}.input_layernorm.weight", (*at, "attn_norm"), (c.dim,))
        for name, shape in attention.items():
            whole = f"{prefix}.self_attn.{name}"
            yield Tensor(f"{whole}.weight", (*at, name), shape, is_turned=True)
            if c.o_bias if name == "o_proj" else c.qkv_bias:
                bias = (*at, f"{name[0]}_bias")
                yield Tensor(f"{whole}.bias", bias, shape[:1])
        if c.qk_norm:
            for name in ("q_norm", "k_norm"):
                whole = f"{prefix}.self_attn.{name}.weight"
                yield Tensor(whole, (*at, name), (c.head_size,))
        whole = f"{prefix}.post_attention_layernorm.weight"
        yield Tensor(whole, (*at, "mlp_norm"), (c.dim,))
        for name, shape in feed_forward.items():
            whole = f"{prefix}.mlp.{name}.weight"
            yield Tensor(whole, (*at, name), shape, is_turned=True)
    yield Tensor("model.norm.weight", ("final_norm",), (c.dim,))
    if not c.tied_embeddings:
        shape = (c.vocab_size, c.dim)
        yield Tensor("lm_head.weight", ("lm_head",), shape, is_turned=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give the directory of a "
            "checkpoint as save_pretrained writes it"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again")
    return found


def _files(path: Path) -> list[str]:
    """Return the names of the files with weights."""
    if (path / INDEX).exists():
        index = _read_json(path / INDEX)
        files = sorted(set(index.get("weight_map", {}).values()))
        if not files:
            raise ValueError(f"{path / INDEX} names no files; copy it again")
        missing = [name for name in files if not (path / name).exists()]
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} of {len(files)} shards, "
                f"{missing[0]} first; copy them again"
            )
        return files
    if (path / WEIGHTS).exists():
        return [WEIGHTS]
    others = sorted(file.name for file in path.glob("*.bin"))
    raise ValueError(
        f"{path} holds neither {WEIGHTS} nor {INDEX}"
        + (f", only {others[0]}; save it again as safetensors" if others else "")
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        # NumPy knows bfloat16 once ml_dtypes is imported, as JAX does.
        with safe_open(path, framework="np") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}); copy it again"
        ) from error


def _placed(
    path: Path,
    handles: Mapping[str, Any],
    files: Sequence[str],
    tensors: Mapping[str, Tensor],
    config: DecoderConfig,
) -> dict[str, str]:
    """Return the file of every tensor, having checked names, shapes and types."""
    place: dict[str, str] = {}
    for file in files:
        for name in handles[file].keys():
            if name in place:
                raise ValueError(f"{path}: {name} is in {place[name]} and in {file}")
            place[name] = file
    missing = [name for name in tensors if name not in place]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(tensors)} tensors, {missing[0]} "
            "first; copy the checkpoint again, or its configuration is another's"
        )

    def is_known(name: str) -> bool:
        # Older checkpoints keep the frequencies, which follow from theta.
        if name.endswith("rotary_emb.inv_freq"):
            return config.rope_scaling is None
        return name in tensors

    extra = [name for name in place if not is_known(name)]
    if config.tied_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        _check_tied(path, handles, place)
    if extra:
        raise ValueError(
            f"{path} holds {len(extra)} tensors that the model its configuration "
            f"describes does not have, {sorted(extra)[0]} first; its configuration is "
            "another's"
        )
    for name, tensor in tensors.items():
        found = handles[place[name]].get_slice(name)
        shape = tuple(found.get_shape())
        if shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {shape}, and by the configuration it has "
                f"{tensor.shape}; one of them is another checkpoint's"
            )
        if found.get_dtype() not in DTYPES:
            raise ValueError(
                f"{path}: {name} has type {found.get_dtype()}; only "
                f"{', '.join(DTYPES.values())} can be loaded"
            )
    return place


def _check_tied(
    path: Path, handles: Mapping[str, Any], place: Mapping[str, str]
) -> None:
    """Refuse a projection that is not the embedding it should be tied to."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    head, table = (handles[place[name]].get_slice(name) for name in names)
    shape = tuple(table.get_shape())
    rows = max(1, SLICE_BYTES // (8 * shape[1]))
    is_same = tuple(head.get_shape()) == shape and all(
        np.array_equal(
            head[i : min(i + rows, shape[0])], table[i : min(i + rows, shape[0])]
        )
        for i in range(0, shape[0], rows)
    )
    if not is_same:
        raise ValueError(
            f"{path} says tie_word_embeddings=true and holds an lm_head.weight that "
            "differs from the embedding; set it to false to load both"
        )


Index = tuple[slice, ...]


def _read(
    handle: Any, tensor: Tensor, dtype: np.dtype, index: Index | None = None
) -> np.ndarray:
    """Return a tensor as its leaf, or a part of it, read and turned slice by slice.

    index: of the leaf; None is all of it.
    """
    found = handle.get_slice(tensor.name)
    size = tensor.leaf_shape
    index = index or (slice(None),) * len(size)
    bounds = [part.indices(n) for part, n in zip(index, size, strict=True)]
    out = _aligned([stop - start for start, stop, _ in bounds], dtype)
    if out.ndim == 1:
        out[:] = found[bounds[0][0] : bounds[0][1]]
        return out
    turned = out.T if tensor.is_turned else out
    (first, last, _), (left, right, _) = bounds[::-1] if tensor.is_turned else bounds
    rows = max(1, SLICE_BYTES // (8 * tensor.shape[1]))
    for start in range(first, last, rows):
        part = found[start : min(start + rows, last), left:right]
        turned[start - first : start - first + len(part)] = part
    return out


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Allocate an array that JAX takes over on a CPU; others it copies."""
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(num_bytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)


def _cut(
    read: Callable[[Index], np.ndarray],
    tensor: Tensor,
    config: DecoderConfig,
    mesh: Mesh,
) -> jax.Array:
    """Read a tensor onto a mesh; every part of it once."""
    spec = param_spec(tensor.leaf, tensor.leaf_shape, config, mesh)
    parts: dict[str, np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        name = repr(index)
        if name not in parts:
            parts[name] = read(index or ())
        return parts[name]

    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(tensor.leaf_shape, sharding, part)


def _assembled(
    leaves: Mapping[tuple[str | int, ...], jax.Array], config: DecoderConfig
) -> Params:
    params: dict[str, Any] = {"layers": [{} for _ in range(config.num_layers)]}
    for path, leaf in leaves.items():
        if path[0] == "layers":
            params["layers"][path[1]][path[2]] = leaf
        else:
            params[str(path[0])] = leaf
    if config.tied_embeddings:
        params["embed"] = TiedEmbedding(table=params["embed"])
    return params


def _disassembled(
    params: Params, tensors: Sequence[Tensor]
) -> Iterator[tuple[str, Any]]:
    """Yield names and leaves, having checked that all are there and fit."""
    remedy = "give the policy's own parameters, without a draft"
    leaves = jax.tree.leaves(params)
    if len(leaves) != len(tensors):
        raise ValueError(
            f"params has {len(leaves)} leaves, and the policy {len(tensors)}; {remedy}"
        )
    for tensor in tensors:
        leaf = params
        try:
            for key in tensor.path:
                leaf = leaf[key]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"params has no {tensor.leaf}; {remedy}") from error
        if isinstance(leaf, TiedEmbedding):
            leaf = leaf.table
        shape = getattr(leaf, "shape", None)
        if shape != tensor.leaf_shape:
            raise ValueError(
                f"params: {tensor.leaf} has shape {shape}, and the policy's has "
                f"{tensor.leaf_shape}; {remedy}"
            )
        yield tensor.name, leaf


def _write_tensors(
    directory: Path, tensors: Sequence[Tensor], arrays: Mapping[str, Any]
) -> None:
    """Write all tensors, in one file or in shards with their index."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        array = arrays[tensor.name]
        num_bytes = array.size * array.dtype.itemsize
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += num_bytes
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        found = {}
        for tensor in shard:
            array = np.asarray(arrays[tensor.name])
            found[tensor.name] = np.ascontiguousarray(
                array.T if tensor.is_turned else array
            )
            weight_map[tensor.name] = file
            total += array.nbytes
        save_file(found, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _copy_companions(source: Path, directory: Path) -> None:
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)


def _fields_of(policy: Decoder, source: Path | None) -> dict[str, Any]:
    """Return the configuration to save: the source's own where it still holds."""
    config = policy.config
    if source is not None:
        fields = _read_json(source / CONFIG)
        if decoder_config(fields, config.dtype) == config:
            for name in ("dtype", "torch_dtype"):
                if name in fields:
                    fields[name] = config.dtype
            return fields
    return _new_fields(config)


def _new_fields(c: DecoderConfig) -> dict[str, Any]:
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
