"""Hugging Face checkpoints: loaded as a `Decoder`, and a `Decoder` saved as one.

Llama 2 and 3, Mistral without a sliding window, Qwen2, Qwen2.5 and Qwen3 (dense), from
single or sharded safetensors. `hf_config` reads and writes their configuration.

*Loading* checks names, shapes and types of all tensors before it reads any, then reads
them one by one, in slices, straight into arrays of the wanted type: beside the result
there is never more than one tensor. *Saving* needs nothing of the checkpoint that was
loaded, and is done in one step at the end: what can be loaded is whole.
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
from er_jax.io.hf_config import (
    CONFIG,
    OBJECT,
    checked,
    decoder_config,
    is_file,
    read_json,
    refusal,
    said,
    shown,
)
from er_jax.mesh.rules import param_spec
from er_jax.types import Params

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"

INDEX_FIELDS = {"weight_map": dataclasses.replace(OBJECT, is_null_unsaid=False)}
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Bytes read, turned and converted at once.
SLICE_BYTES = 4 << 20


def policy_of(directory: str | os.PathLike[str], dtype: Any = None) -> Decoder:
    """Return the policy of a checkpoint without its parameters; see `load_hf`."""
    file = Path(directory) / CONFIG
    fields = read_json(file)
    config = decoder_config(fields, _dtype_name(dtype), file)
    # Whatever becomes of directory and working directory, it can be saved.
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
      mesh: devices to cut the parameters over, by the rules of `sharding`; None puts
        them on the default device.
      progress: show a progress bar of the bytes.
    Returns:
      The policy, which keeps configuration and directory for `save_hf`, and its
      parameters.
    Raises:
      ValueError: no such checkpoint; an architecture, or a field or its value, that is
        not supported; a damaged file, or an index that names files elsewhere; tensors
        that are missing, left over, or of another shape or type; a mesh that does not
        divide them.
    """
    path = Path(directory)
    policy = policy_of(directory, dtype)
    config, target = policy.config, policy.parameter_dtype()
    files = _files(path)
    tensors = {tensor.name: tensor for tensor in tensors_of(config)}
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


def tensors_of(c: DecoderConfig) -> Iterator[Tensor]:
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
    yield Tensor(TABLE, ("embed",), (c.vocab_size, c.dim))
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
        yield Tensor(HEAD, ("lm_head",), shape, is_turned=True)


def _files(path: Path) -> list[str]:
    """Return the names of the files with weights, all of which are in the directory."""
    # Where both are there, as in `transformers`.
    if is_file(path / WEIGHTS):
        return [WEIGHTS]
    index = path / INDEX
    if is_file(index):
        placed = checked(read_json(index), INDEX_FIELDS, index)["weight_map"]
        for tensor, name in placed.items():
            if not _is_plain(name):
                words = "a plain file name in the same directory"
                raise refusal(index, f"weight_map[{shown(tensor)}]", name, words)
        files = sorted(set(placed.values()))
        if not files:
            raise ValueError(f"{index} names no files in weight_map; copy it again")
        missing = [name for name in files if not is_file(path / name)]
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} of {len(files)} shards, "
                f"{said(missing[0])} first; copy them again"
            )
        return files
    others = sorted(file.name for file in path.glob("*.bin"))
    raise ValueError(
        f"{path} holds neither {WEIGHTS} nor {INDEX}; "
        + (f"only {others[0]}; save it again as safetensors" if others else "copy them")
    )


def _is_plain(name: Any) -> bool:
    """Tell whether something names a file right here, on any system.

    Of the name only: in the Hugging Face cache it is a link to a file elsewhere.
    """
    is_name = isinstance(name, str) and name not in ("", ".", "..")
    return is_name and not any(mark in name for mark in "/\\:\0")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        # NumPy knows bfloat16 once ml_dtypes is imported, as JAX does.
        handle = safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}); copy it again"
        ) from error
    with handle:
        yield handle


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
                raise ValueError(
                    f"{path}: {said(name)} is in {place[name]} and in {file}; remove "
                    "the file that is another checkpoint's"
                )
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

    known = dict(tensors)
    if config.tied_embeddings and HEAD in place:
        known[HEAD] = dataclasses.replace(tensors[TABLE], name=HEAD)
    extra = [name for name in place if not is_known(name) and name not in known]
    if extra:
        raise ValueError(
            f"{path} holds {len(extra)} tensors that the model its configuration "
            f"describes does not have, {said(min(extra))} first; its configuration is "
            "another's"
        )
    for name, tensor in known.items():
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
    if HEAD in known and HEAD not in tensors:
        _check_tied(path, handles, place)
    return place


def _check_tied(
    path: Path, handles: Mapping[str, Any], place: Mapping[str, str]
) -> None:
    """Refuse a projection that is not the embedding it should be tied to."""
    head, table = (handles[place[name]].get_slice(name) for name in (HEAD, TABLE))
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
