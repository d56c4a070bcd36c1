"""Loading a Hugging Face checkpoint as a `Decoder` and its parameters.

Supported are Llama 2 and 3, Mistral, Qwen2, Qwen2.5, Qwen3 (dense and with experts) and
the text models of Gemma 3, from single or sharded safetensors.

The names, shapes and types of all tensors are checked before any is read. Tensors are
then read one by one, in slices, straight into arrays of the wanted type, so that memory
holds the result and at most one tensor more. Left out: configurations (`hf_config`),
saving (`hf_save`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from er_jax.decoder import Decoder, DecoderConfig
from er_jax.drafter import TiedEmbedding
from er_jax.io.hf_config import CONFIG, decoder_config
from er_jax.io.json_fields import (
    OBJECT,
    checked,
    is_file,
    printable,
    read_json,
    refusal,
    shown,
)
from er_jax.mesh.rules import param_spec
from er_jax.types import Params

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"

INDEX_FIELDS = {"weight_map": dataclasses.replace(OBJECT, is_null_missing=False)}
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Bytes that are read, transposed and converted at a time.
SLICE_BYTES = 4 << 20


def policy_of(directory: str | os.PathLike[str], dtype: Any = None) -> Decoder:
    """Return the policy of a checkpoint without its parameters; see `load_hf`."""
    file = Path(directory) / CONFIG
    fields = read_json(file)
    config = decoder_config(fields, _dtype_name(dtype), file)
    # Kept for `save_hf`, whatever happens to the directory and the working directory.
    source = os.path.abspath(directory)
    return Decoder(config, source=source, source_config=json.dumps(fields))


def _dtype_name(dtype: Any) -> str | None:
    if dtype is None:
        return None
    name = None
    with contextlib.suppress(TypeError):
        name = jnp.dtype(dtype).name
    if name not in ("float32", "bfloat16", "float64"):
        raise ValueError(
            f"dtype={dtype!r} is not supported; use 'float32', 'bfloat16' or 'float64'"
        )
    return name


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
      mesh: devices to shard the parameters over, by `mesh.rules`; None puts them on the
        default device.
      progress: show a progress bar of the parameters.
    Returns:
      The policy, which keeps configuration and directory for `save_hf`, and its
      parameters.
    Raises:
      ValueError: no such checkpoint; an architecture, field or value that is not
        supported; a damaged file, or an index that names files elsewhere; tensors that
        are missing, unknown, or of another shape or type; a mesh that does not divide
        them.
    """
    path = Path(directory)
    policy = policy_of(directory, dtype)
    config, target = policy.config, policy.parameter_dtype()
    files = _files(path)
    tensors = {tensor.name: tensor for tensor in tensors_of(config)}
    parts: dict[tuple[str | int, ...], list[Tensor]] = {}
    for tensor in tensors.values():
        parts.setdefault(tensor.path, []).append(tensor)
    leaves: dict[tuple[str | int, ...], jax.Array] = {}
    with contextlib.ExitStack() as stack:
        handles = {file: stack.enter_context(opened(path / file)) for file in files}
        file_of = _file_of_each(path, handles, files, tensors, config)
        total = sum(math.prod(tensor.shape) for tensor in tensors.values())
        bar = stack.enter_context(
            tqdm(total=total, unit="param", unit_scale=True, disable=not progress)
        )
        for place, group in parts.items():
            sources = [(handles[file_of[one.name]], one) for one in group]
            read = functools.partial(_read, sources, target)
            if mesh is None:
                leaves[place] = jax.device_put(read())
            else:
                leaves[place] = _read_sharded(read, group[0], config, mesh)
            bar.update(sum(math.prod(one.shape) for one in group))
    return policy, _assembled(leaves, config)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, and the leaf of `Params` that it becomes or is part of.

    name: in the checkpoint. path: of the leaf. shape: in the checkpoint; a matrix is
    `[out, in]` there, and `[in, out]` in the leaf if `is_transposed`. expert: its place
    in a leaf that stacks the matrices of experts, None in any other. num_experts: of
    such a leaf.
    """

    name: str
    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    is_transposed: bool = False
    expert: int | None = None
    num_experts: int = 0

    @property
    def leaf(self) -> str:
        """The path joined by slashes, for messages and sharding rules."""
        return "/".join(map(str, self.path))

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        shape = self.shape[::-1] if self.is_transposed else self.shape
        return shape if self.expert is None else (self.num_experts, *shape)


def tensors_of(c: DecoderConfig) -> Iterator[Tensor]:
    """Yield the tensors of a checkpoint of this decoder."""
    q_out, kv_out = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    attention = {
        "q_proj": (q_out, c.dim),
        "k_proj": (kv_out, c.dim),
        "v_proj": (kv_out, c.dim),
        "o_proj": (c.dim, q_out),
    }
    after_attention, after_mlp = "mlp_norm", None
    before_mlp = None
    if c.post_norms:
        after_attention, before_mlp, after_mlp = (
            "attn_out_norm", "mlp_norm", "mlp_out_norm",
        )  # fmt: skip
    norms = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": after_attention,
        "pre_feedforward_layernorm": before_mlp,
        "post_feedforward_layernorm": after_mlp,
    }
    yield Tensor(TABLE, ("embed",), (c.vocab_size, c.dim))
    for i in range(c.num_layers):
        prefix, at = f"model.layers.{i}", ("layers", i)
        for theirs, name in norms.items():
            if name is not None:
                yield Tensor(f"{prefix}.{theirs}.weight", (*at, name), (c.dim,))
        for name, shape in attention.items():
            theirs = f"{prefix}.self_attn.{name}"
            yield Tensor(f"{theirs}.weight", (*at, name), shape, is_transposed=True)
            if c.o_bias if name == "o_proj" else c.qkv_bias:
                bias = (*at, f"{name[0]}_bias")
                yield Tensor(f"{theirs}.bias", bias, shape[:1])
        if c.qk_norm:
            for name in ("q_norm", "k_norm"):
                theirs = f"{prefix}.self_attn.{name}.weight"
                yield Tensor(theirs, (*at, name), (c.head_size,))
        yield from _feed_forward_tensors(c, i)
    yield Tensor("model.norm.weight", ("final_norm",), (c.dim,))
    if not c.tied_embeddings:
        shape = (c.vocab_size, c.dim)
        yield Tensor(HEAD, ("lm_head",), shape, is_transposed=True)


def _feed_forward_tensors(c: DecoderConfig, layer: int) -> Iterator[Tensor]:
    """Yield the tensors of a layer's feed-forward part, dense or of experts."""
    prefix, at = f"model.layers.{layer}.mlp", ("layers", layer)
    width = c.expert_dim if c.has_experts(layer) else c.hidden_dim
    shapes = {"gate": (width, c.dim), "up": (width, c.dim), "down": (c.dim, width)}
    if not c.has_experts(layer):
        for name, shape in shapes.items():
            path = (*at, f"{name}_proj")
            yield Tensor(f"{prefix}.{name}_proj.weight", path, shape, True)
        return
    shape = (c.num_experts, c.dim)
    yield Tensor(f"{prefix}.gate.weight", (*at, "router"), shape, is_transposed=True)
    for expert in range(c.num_experts):
        for name, shape in shapes.items():
            yield Tensor(
                f"{prefix}.experts.{expert}.{name}_proj.weight",
                (*at, f"{name}_experts"),
                shape,
                is_transposed=True,
                expert=expert,
                num_experts=c.num_experts,
            )


def _files(path: Path) -> list[str]:
    """Return the names of the files with weights, after checking that they exist."""
    # A single file goes before an index, as in `transformers`.
    if is_file(path / WEIGHTS):
        return [WEIGHTS]
    index = path / INDEX
    if is_file(index):
        weight_map = checked(read_json(index), INDEX_FIELDS, index)["weight_map"]
        for tensor, name in weight_map.items():
            if not _is_plain(name):
                words = "a plain file name in the same directory"
                raise refusal(index, f"weight_map[{shown(tensor)}]", name, words)
        files = sorted(set(weight_map.values()))
        if not files:
            raise ValueError(f"{index} names no files in weight_map; copy it again")
        missing = [name for name in files if not is_file(path / name)]
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} of {len(files)} shards, "
                f"{printable(missing[0])} first; copy them again"
            )
        return files
    others = sorted(file.name for file in path.glob("*.bin"))
    raise ValueError(
        f"{path} holds neither {WEIGHTS} nor {INDEX}; "
        + (f"only {others[0]}; save it again as safetensors" if others else "copy them")
    )


def _is_plain(name: Any) -> bool:
    """Whether a value is the name of a file in the same directory, on any system.

    Only the name is checked: in the Hugging Face cache, it is a link to another place.
    """
    is_name = isinstance(name, str) and name not in ("", ".", "..")
    return is_name and not any(mark in name for mark in "/\\:\0")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file of tensors, as NumPy arrays; refuse a damaged one."""
    try:
        # NumPy knows bfloat16 once ml_dtypes is imported, as JAX does.
        handle = safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}); copy it again"
        ) from error
    with handle:
        yield handle


def _file_of_each(
    path: Path,
    handles: Mapping[str, Any],
    files: Sequence[str],
    tensors: Mapping[str, Tensor],
    config: DecoderConfig,
) -> dict[str, str]:
    """Return the file of every tensor, after checking names, shapes and types."""
    file_of: dict[str, str] = {}
    for file in files:
        for name in handles[file].keys():
            if name in file_of:
                raise ValueError(
                    f"{path}: {printable(name)} is in {file_of[name]} and in {file}; "
                    "remove the file of another checkpoint"
                )
            file_of[name] = file
    missing = [name for name in tensors if name not in file_of]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(tensors)} tensors, {missing[0]} "
            "first; copy the checkpoint again, or its own configuration"
        )

    def is_known(name: str) -> bool:
        # Older checkpoints hold the rotary frequencies, which follow from theta.
        if name.endswith("rotary_emb.inv_freq"):
            return config.rope_scaling is None
        return name in tensors

    known = dict(tensors)
    if config.tied_embeddings and HEAD in file_of:
        known[HEAD] = dataclasses.replace(tensors[TABLE], name=HEAD)
    extra = [name for name in file_of if not is_known(name) and name not in known]
    if extra:
        raise ValueError(
            f"{path} holds {len(extra)} tensors that the model of its configuration "
            f"does not have, {printable(min(extra))} first; copy its own configuration"
        )
    for name, tensor in known.items():
        found = handles[file_of[name]].get_slice(name)
        shape = tuple(found.get_shape())
        if shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {shape}, and by the configuration it has "
                f"{tensor.shape}; copy both from the same checkpoint"
            )
        if found.get_dtype() not in DTYPES:
            raise ValueError(
                f"{path}: {name} has type {found.get_dtype()}; only "
                f"{', '.join(DTYPES.values())} can be loaded"
            )
    if HEAD in known and HEAD not in tensors:
        _check_tied(path, handles, file_of)
    return file_of


def _check_tied(
    path: Path, handles: Mapping[str, Any], file_of: Mapping[str, str]
) -> None:
    """Refuse a projection that differs from the embedding it is tied to."""
    head, table = (handles[file_of[name]].get_slice(name) for name in (HEAD, TABLE))
    shape = table.get_shape()
    rows = max(1, SLICE_BYTES // (8 * shape[1]))
    is_same = all(
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
    sources: Sequence[tuple[Any, Tensor]],
    dtype: np.dtype,
    index: Index | None = None,
) -> np.ndarray:
    """Return a leaf, or a part of it, read slice by slice.

    sources: its tensors with the open files that hold them: one, or one per expert.
    index: part of the leaf; None is all of it.
    """
    tensor = sources[0][1]
    size = tensor.leaf_shape
    index = index or (slice(None),) * len(size)
    bounds = [range(*part.indices(n)) for part, n in zip(index, size, strict=True)]
    out = _aligned([len(bound) for bound in bounds], dtype)
    if tensor.expert is None:
        _fill(out, *sources[0], bounds)
        return out
    for view, expert in zip(out, bounds[0], strict=True):
        _fill(view, *sources[expert], bounds[1:])
    return out


def _fill(
    out: np.ndarray, handle: Any, tensor: Tensor, bounds: Sequence[range]
) -> None:
    """Read a tensor, or a part of it, into an array that is laid out as its leaf."""
    found = handle.get_slice(tensor.name)
    if out.ndim == 1:
        out[:] = found[bounds[0].start : bounds[0].stop]
        return
    view = out.T if tensor.is_transposed else out
    rows, columns = bounds[::-1] if tensor.is_transposed else bounds
    step = max(1, SLICE_BYTES // (8 * tensor.shape[1]))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        part = found[start:stop, columns.start : columns.stop]
        view[start - rows.start : stop - rows.start] = part


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Allocate an array so aligned that JAX uses it on a CPU without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(num_bytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)


def _read_sharded(
    read: Callable[[Index], np.ndarray],
    tensor: Tensor,
    config: DecoderConfig,
    mesh: Mesh,
) -> jax.Array:
    """Read a tensor onto a mesh, each distinct part once."""
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
