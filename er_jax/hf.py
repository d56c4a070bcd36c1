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
import re
import secrets
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

from er_jax.decoder import Decoder, DecoderConfig
from er_jax.drafter import TiedEmbedding
from er_jax.hf_config import (
    CONFIG,
    OBJECT,
    checked,
    decoder_config,
    is_file,
    new_fields,
    read_json,
    refusal,
    said,
    shown,
)
from er_jax.sharding import param_spec
from er_jax.types import Params

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"

INDEX_FIELDS = {"weight_map": dataclasses.replace(OBJECT, is_null_unsaid=False)}

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

# What a save writes beside these and the configuration.
WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Bytes read, turned and converted at once.
SLICE_BYTES = 4 << 20
SHARD_BYTES = 4 << 30


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

    The configuration is that of the checkpoint that the policy was loaded from, which
    it keeps; else it is written anew. Tokenizer and generation settings are copied
    from there as far as they still can be read.

    Args:
      directory: must not exist, or be empty. Until all is written, no configuration is
        there and nothing can be loaded; what a killed save left is removed.
      policy: the policy. params: its parameters, bare: no draft.
    Raises:
      ValueError: the directory holds something; the parameters are not the policy's; or
        no supported architecture has this policy's switches.
      OSError: it cannot be written; nothing of it is left.
    """
    # A link is followed: renaming would replace it, not what it points to.
    target = Path(os.path.realpath(directory))
    _check_free(target, directory)
    tensors = list(_tensors(policy.config))
    arrays = dict(_disassembled(params, tensors))
    fields = _fields_of(policy)
    try:
        part = _begun(target)
        try:
            _write_tensors(part, tensors, arrays)
            if policy.source is not None:
                _copy_companions(Path(policy.source), part)
            (part / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
            _finish(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{target} cannot be written ({error}); make room, or give another "
            "directory, and save again"
        ) from error


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
        if leaf.dtype.name not in DTYPES.values():
            raise ValueError(
                f"params: {tensor.leaf} has dtype {leaf.dtype.name}; only "
                f"{', '.join(DTYPES.values())} can be loaded again: {remedy}"
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
    """Copy tokenizer and settings, without what is gone or cannot be read."""
    for name in COMPANIONS:
        try:
            if not is_file(source / name):
                continue
            data = (source / name).read_bytes()
        except (OSError, ValueError):  # no reason to lose what was trained
            continue
        (directory / name).write_bytes(data)


def _is_part(target: Path, name: str) -> bool:
    """Tell whether a name is that of a directory in which a save to `target` writes."""
    return bool(re.fullmatch(rf"\.{re.escape(target.name)}\.\w+\.part", name))


def _new_part(target: Path) -> Path:
    """Name a directory to write in: within `target` if that is there, else beside it.

    One that is there stays the same: it may be a mount, or somebody's working
    directory. One that is not appears by renaming.
    """
    home = target if target.is_dir() else target.parent
    return home / f".{target.name}.{secrets.token_hex(4)}.part"


def _check_free(target: Path, given: str | os.PathLike[str]) -> None:
    """Refuse a target that holds more than what killed saves left there."""
    if target.is_dir():
        names = {file.name for file in target.iterdir()}
        parts = {name for name in names if _is_part(target, name)}
        is_taken = bool(names - parts - _half_moved(target))
    else:
        is_taken = os.path.lexists(target)
    if is_taken:
        raise ValueError(
            f"directory={os.fspath(given)!r} already holds something; give a new "
            "one, so that nothing is lost"
        )


def _half_moved(target: Path) -> set[str]:
    """Return the files that a save left which was killed while it moved them there.

    Weights go first and the configuration last (`_finish`), which tells them from
    files that were put beside a save that was killed before.
    """
    names = {file.name for file in target.iterdir()}
    weights = {name for name in names if WEIGHT_FILE.fullmatch(name)}
    if CONFIG in names or not weights or not any(_is_part(target, n) for n in names):
        return set()
    return weights | (names & set(COMPANIONS))


def _begun(target: Path) -> Path:
    """Make a directory to write in, having removed what killed saves left."""
    part = _new_part(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        # Weights last: while they are there, the others are known to be a save's.
        for name in sorted(_half_moved(target), key=_order, reverse=True):
            (target / name).unlink()
    for left in list(part.parent.iterdir()):
        if _is_part(target, left.name):
            # Renamed first: another process that writes there fails; it does not mix.
            with contextlib.suppress(OSError):  # another's, say; it may stay
                shutil.rmtree(left.rename(_new_part(target)), ignore_errors=True)
    part.mkdir()
    return part


def _order(name: str) -> int:
    """Weights, then what is copied, then the configuration, which makes it loadable."""
    return 0 if WEIGHT_FILE.fullmatch(name) else 1 + (name == CONFIG)


def _finish(part: Path, target: Path) -> None:
    """Put what was written where it belongs, all of it or nothing."""
    if part.parent != target:
        part.rename(target)
        return
    names = sorted((file.name for file in part.iterdir()), key=_order)
    try:
        for name in names:
            (part / name).replace(target / name)
    except BaseException:
        if not (target / CONFIG).exists():
            for name in names:
                (target / name).unlink(missing_ok=True)
        raise
    part.rmdir()


def _fields_of(policy: Decoder) -> dict[str, Any]:
    """Return the configuration to save: the source's own where it still holds."""
    config = policy.config
    if policy.source_config is not None:
        fields = json.loads(policy.source_config)
        if decoder_config(fields, config.dtype, Path(CONFIG)) == config:
            for name in ("dtype", "torch_dtype"):
                if name in fields:
                    fields[name] = config.dtype
            return fields
    return new_fields(config)
