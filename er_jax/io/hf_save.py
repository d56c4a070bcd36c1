"""Saving a `Decoder` as a Hugging Face checkpoint that `transformers` loads.

Nothing is needed of the checkpoint that was loaded. What is written becomes loadable in
one step at the end: what can be loaded is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from er_jax.decoder import Decoder
from er_jax.drafter import TiedEmbedding
from er_jax.io.hf_config import (
    CONFIG,
    decoder_config,
    is_file,
    new_fields,
)
from er_jax.io.hf_weights import DTYPES, INDEX, WEIGHTS, Tensor, tensors_of
from er_jax.types import Params

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
SHARD_BYTES = 4 << 30


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
    tensors = list(tensors_of(policy.config))
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
