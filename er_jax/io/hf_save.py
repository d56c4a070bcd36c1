"""Saving a `Decoder` as a Hugging Face checkpoint that `transformers` loads.

A save does not need the checkpoint that was loaded. It becomes loadable in one step at
its end, so that every checkpoint that can be loaded is complete.
"""

from __future__ import annotations

import contextlib
import json
import math
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
from er_jax.io.hf_config import CONFIG, decoder_config, new_fields
from er_jax.io.hf_weights import DTYPES, INDEX, WEIGHTS, Tensor, tensors_of
from er_jax.io.json_fields import is_file
from er_jax.lora import has_lora
from er_jax.types import Params

# Files beside configuration and weights, copied from the checkpoint that was loaded.
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

# Names of the files with weights that a save writes.
WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
SHARD_BYTES = 4 << 30


def save_hf(directory: str | os.PathLike[str], policy: Decoder, params: Params) -> None:
    """Save parameters as a checkpoint that `transformers` loads.

    The configuration is that of the checkpoint that the policy was loaded from, or a
    new one. Tokenizer and generation settings are copied from there, if they can still
    be read.

    Args:
      directory: must not exist, or be empty. Until the save is complete it has no
        configuration and cannot be loaded; leftovers of a killed save are removed.
      policy: the policy.
      params: its parameters, without a draft.
    Raises:
      ValueError: the directory holds something; the parameters are not the policy's; or
        no supported architecture has this policy's switches.
      OSError: it cannot be written; nothing of it is left.
    """
    # Links are resolved, because renaming would replace the link, not its target.
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
    """Yield the name and leaf of every tensor, after checking that they fit."""
    remedy = "give the policy's own parameters, without a draft"
    if has_lora(params):
        raise ValueError(
            "params has low-rank pairs; save er_jax.merge_lora of them, or the pairs "
            "alone with er_jax.save_peft_adapter"
        )
    leaves = jax.tree.leaves(params)
    count = len({tensor.path for tensor in tensors})
    if len(leaves) != count:
        raise ValueError(
            f"params has {len(leaves)} leaves, and the policy {count}; {remedy}"
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
        num_bytes = math.prod(tensor.shape) * arrays[tensor.name].dtype.itemsize
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
            leaf = arrays[tensor.name]
            array = np.asarray(leaf if tensor.expert is None else leaf[tensor.expert])
            found[tensor.name] = np.ascontiguousarray(
                array.T if tensor.is_transposed else array
            )
            weight_map[tensor.name] = file
            total += array.nbytes
        save_file(found, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _copy_companions(source: Path, directory: Path) -> None:
    """Copy tokenizer and settings; skip files that are missing or unreadable."""
    for name in COMPANIONS:
        try:
            if not is_file(source / name):
                continue
            data = (source / name).read_bytes()
        except (OSError, ValueError):  # must not fail the save of trained weights
            continue
        (directory / name).write_bytes(data)


def _is_part(target: Path, name: str) -> bool:
    """Whether a directory of this name is an unfinished save to `target`."""
    return bool(re.fullmatch(rf"\.{re.escape(target.name)}\.\w+\.part", name))


def _new_part(target: Path) -> Path:
    """Return a new path for an unfinished save: inside `target` if that exists.

    An existing `target` stays the same directory: it may be a mount, or somebody's
    working directory. Otherwise the save is beside it, and is renamed to `target`.
    """
    home = target if target.is_dir() else target.parent
    return home / f".{target.name}.{secrets.token_hex(4)}.part"


def _check_free(target: Path, given: str | os.PathLike[str]) -> None:
    """Refuse a target with anything in it but leftovers of killed saves."""
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
    """Return the files in `target` of a save that was killed while it moved them.

    A save moves weights first and the configuration last (`_finish`). Files without
    weights, with a configuration, or without an unfinished save beside them were put
    there by somebody else.
    """
    names = {file.name for file in target.iterdir()}
    weights = {name for name in names if WEIGHT_FILE.fullmatch(name)}
    if CONFIG in names or not weights or not any(_is_part(target, n) for n in names):
        return set()
    return weights | (names & set(COMPANIONS))


def _begun(target: Path) -> Path:
    """Make the directory of an unfinished save; remove leftovers of killed ones."""
    part = _new_part(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        # Weights last: they show that the other files are leftovers too.
        for name in sorted(_half_moved(target), key=_order, reverse=True):
            (target / name).unlink()
    for left in list(part.parent.iterdir()):
        if _is_part(target, left.name):
            # Renamed first, so that a process that still writes there fails.
            with contextlib.suppress(OSError):  # not permitted, say: it may stay
                shutil.rmtree(left.rename(_new_part(target)), ignore_errors=True)
    part.mkdir()
    return part


def _order(name: str) -> int:
    """Return the rank of a file: weights, copied files, then the configuration."""
    return 0 if WEIGHT_FILE.fullmatch(name) else 1 + (name == CONFIG)


def _finish(part: Path, target: Path) -> None:
    """Move the files of a save to `target`, all of them or none."""
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
    """Return the configuration to save: that of the source if it still holds."""
    config = policy.config
    if policy.source_config is not None:
        fields = json.loads(policy.source_config)
        if decoder_config(fields, config.dtype, Path(CONFIG)) == config:
            for name in ("dtype", "torch_dtype"):
                if name in fields:
                    fields[name] = config.dtype
            return fields
    return new_fields(config)
