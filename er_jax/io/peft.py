"""Low-rank adapters in PEFT's format: loaded beside a checkpoint, and saved.

A directory holds `adapter_config.json` and `adapter_model.safetensors`, whose tensors
are named `base_model.model.<module>.lora_A.weight` and `lora_B.weight`. Every field of
the configuration is read, or known to change nothing that is computed, or refused by
name. Left out: adapters of experts and embeddings, ranks that differ between modules.

Source: PEFT (github.com/huggingface/peft), Apache-2.0; the scale alpha / sqrt(r) is
Kalajdzievski 2023 (arXiv 2312.03732).
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import save_file

from er_jax.decoder import Decoder
from er_jax.io.hf_fields import SWITCH
from er_jax.io.hf_weights import DTYPES, Tensor, opened, tensors_of
from er_jax.io.json_fields import (
    Field,
    checked,
    is_file,
    is_texts,
    number_field,
    printable,
    read_json,
    refusal,
    shown,
    text_field,
    whole_field,
)
from er_jax.lora import LoRAWeight, has_lora, is_lora
from er_jax.mesh.rules import param_spec
from er_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")

# Ways to begin that leave the base weights as the checkpoint has them.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")

FIELDS: dict[str, Field] = {
    "peft_type": text_field("LORA", is_null_missing=False),
    "task_type": text_field("CAUSAL_LM"),
    "r": whole_field(1, 2**20),
    "lora_alpha": number_field(1e-9, 1e9),
    "use_rslora": SWITCH,
    "target_modules": Field(
        "a text or a list of texts",
        lambda value: isinstance(value, str) or is_texts(value),
    ),
    "bias": text_field("none"),
    "init_lora_weights": Field(
        f"one of {', '.join(map(repr, PLAIN_STARTS))}",
        lambda value: value in PLAIN_STARTS,
    ),
}

# They say where an adapter comes from, or how it was begun and trained.
HARMLESS_FIELDS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config"),
        *("exclude_modules", "ensure_weight_tying", "inference_mode", "loftq_config"),
        *("lora_dropout", "lora_ga_config", "megatron_core", "peft_version"),
        *("qalora_group_size", "revision", "runtime_config"),
    }
)


def load_peft_adapter(
    directory: str | os.PathLike[str],
    policy: Decoder,
    params: Params,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> Params:
    """Load an adapter of PEFT's format as the low-rank pairs of a policy.

    Args:
      directory: with adapter_config.json and adapter_model.safetensors.
      policy: the policy of the checkpoint that the adapter was trained on.
      params: its parameters, without pairs.
      dtype: of pairs; None is that of each weight.
      mesh: devices to shard the pairs over, by `mesh.rules`, as `load_hf` has sharded
        the parameters; None puts them on the default device.
    Returns:
      The same tree, with a `LoRAWeight` for each weight that the adapter changes.
    Raises:
      ValueError: no such adapter; a field or a value that is not supported, as DoRA or
        trained biases; tensors that are missing, unknown, or of another shape or type;
        parameters that have pairs already.
    """
    if has_lora(params):
        raise ValueError(
            "params has low-rank pairs already; load an adapter beside the parameters "
            "that er_jax.load_hf returns"
        )
    path = Path(directory)
    fields = _checked_fields(path / CONFIG)
    rank = fields["r"]
    scale = fields["lora_alpha"] / (math.sqrt(rank) if fields["use_rslora"] else rank)
    modules = _modules(policy)
    found: dict[tuple[str | int, ...], dict[str, jax.Array]] = {}
    with opened(_weights_of(path)) as handle:
        _check_tensors(path, handle, modules, rank, fields["target_modules"])
        for name in handle.keys():
            module, part = TENSOR.fullmatch(name).groups()  # type: ignore[union-attr]
            tensor = modules[module]
            base = _leaf(params, tensor.path)
            if getattr(base, "shape", None) != tensor.leaf_shape:
                raise ValueError(
                    f"params: {tensor.leaf} has shape {getattr(base, 'shape', None)}, "
                    f"and the policy's has {tensor.leaf_shape}; give its own parameters"
                )
            array = np.ascontiguousarray(handle.get_tensor(name).T)
            array = array.astype(jnp.dtype(dtype or base.dtype))
            key = part.lower()
            if mesh is None:
                placed = jax.device_put(array)
            else:
                spec = param_spec(
                    f"{tensor.leaf}/{key}", array.shape, policy.config, mesh
                )
                placed = jax.device_put(array, NamedSharding(mesh, spec))
            found.setdefault(tensor.path, {})[key] = placed

    def joined(at: tuple[Any, ...], leaf: Any) -> Any:
        pair = found.get(tuple(getattr(k, "key", getattr(k, "idx", k)) for k in at))
        return leaf if pair is None else LoRAWeight(leaf, scale=scale, **pair)

    return jax.tree_util.tree_map_with_path(joined, params)


def save_peft_adapter(
    directory: str | os.PathLike[str], policy: Decoder, params: Params
) -> None:
    """Save the low-rank pairs of a policy as an adapter that PEFT loads.

    Args:
      directory: must not exist, or be empty. It appears when the save is complete.
      policy: the policy.
      params: its parameters, with `LoRAWeight`s and without a draft.
    Raises:
      ValueError: the directory holds something; there are no pairs; they are not all of
        one rank and scale; or a weight has one that PEFT could not.
      OSError: it cannot be written; nothing of it is left.
    """
    target = Path(os.path.realpath(directory))
    is_empty = target.is_dir() and not any(target.iterdir())
    if os.path.lexists(target) and not is_empty:
        raise ValueError(
            f"directory={os.fspath(directory)!r} already holds something; give a new "
            "one, so that nothing is lost"
        )
    modules = _modules(policy)
    weights = {
        module: leaf
        for module, tensor in modules.items()
        if is_lora(leaf := _leaf(params, tensor.path))
    }
    number = sum(map(is_lora, jax.tree.leaves(params, is_leaf=is_lora)))
    if not weights or len(weights) != number:
        raise ValueError(
            f"params has {number} low-rank pairs, {len(weights)} of them in matrices "
            "of the policy; give the policy's own parameters, with pairs by "
            "er_jax.add_lora"
        )
    kinds = {(leaf.a.shape[1], leaf.scale) for leaf in weights.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"params has pairs of several ranks and scales, {sorted(kinds)}; save "
            "er_jax.merge_lora of them with er_jax.save_hf"
        )
    ((rank, scale),) = kinds
    alpha = scale * rank
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": policy.source,
        "r": rank,
        "lora_alpha": round(alpha) if alpha == round(alpha) else alpha,
        "use_rslora": False,
        "target_modules": _targets(weights, modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
    }
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            part.mkdir(parents=True)
            arrays = {
                f"base_model.model.{module}.lora_{name}.weight": np.ascontiguousarray(
                    np.asarray(array).T
                )
                for module, leaf in weights.items()
                for name, array in (("A", leaf.a), ("B", leaf.b))
            }
            save_file(arrays, part / WEIGHTS, metadata={"format": "pt"})
            (part / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
            part.replace(target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{target} cannot be written ({error}); make room, or give another "
            "directory, and save again"
        ) from error


def _modules(policy: Decoder) -> dict[str, Tensor]:
    """Return the matrices that may have a pair, by the names of their modules."""
    return {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in tensors_of(policy.config)
        if tensor.is_transposed and tensor.expert is None
    }


def _leaf(params: Params, path: Sequence[str | int]) -> Any:
    leaf = params
    try:
        for key in path:
            leaf = leaf[key]
    except (KeyError, IndexError, TypeError) as error:
        name = "/".join(map(str, path))
        raise ValueError(
            f"params has no {name}; give the policy's own parameters"
        ) from error
    return leaf


def _checked_fields(file: Path) -> dict[str, Any]:
    """Return the fields of an adapter's configuration; refuse what is not supported."""
    fields = read_json(file)
    for name in sorted(fields.keys() - FIELDS.keys() - HARMLESS_FIELDS):
        if fields[name] not in (None, False, [], {}):
            raise ValueError(
                f"{file} says {printable(name)}={shown(fields[name])}, which is not "
                "supported and may change what the adapter computes; merge it into its "
                "checkpoint with PEFT, and load that with er_jax.load_hf"
            )
    read = checked(fields, FIELDS, file)
    for name in ("r", "lora_alpha", "target_modules"):
        if read[name] is None:
            raise ValueError(f"{file} has no {name}; copy the adapter again")
    if fields.get("peft_type") is None:
        raise refusal(file, "peft_type", None, FIELDS["peft_type"].words)
    return read


def _weights_of(path: Path) -> Path:
    """Return the file with an adapter's tensors."""
    if is_file(path / WEIGHTS):
        return path / WEIGHTS
    others = sorted(file.name for file in path.glob("*.bin"))
    raise ValueError(
        f"{path} does not hold {WEIGHTS}; "
        + (f"only {others[0]}; save it again as safetensors" if others else "copy it")
    )


def _check_tensors(
    path: Path,
    handle: Any,
    modules: Mapping[str, Tensor],
    rank: int,
    targets: str | Sequence[str],
) -> None:
    """Refuse tensors that are missing, unknown, or of another shape or type."""
    found = set()
    for name in sorted(handle.keys()):
        match = TENSOR.fullmatch(name)
        if name.endswith((".base_layer.weight", ".embed_tokens.weight")):
            raise ValueError(
                f"{path} holds {printable(name)}, a weight of the checkpoint; save the "
                "adapter again with save_embedding_layers=False"
            )
        if match is None or match[1] not in modules:
            raise ValueError(
                f"{path} holds {printable(name)}, which is no low-rank pair of a "
                "matrix of the policy; embeddings, experts and other kinds of adapters "
                "are not supported: merge it into its checkpoint with PEFT"
            )
        rows, columns = modules[match[1]].shape
        wanted = (rank, columns) if match[2] == "A" else (rows, rank)
        tensor = handle.get_slice(name)
        if tuple(tensor.get_shape()) != wanted:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.get_shape())}, and by the "
                f"configuration and the policy it has {wanted}; load the adapter "
                "beside the checkpoint that it was trained on"
            )
        if tensor.get_dtype() not in DTYPES:
            raise ValueError(
                f"{path}: {name} has type {tensor.get_dtype()}; only "
                f"{', '.join(DTYPES.values())} can be loaded"
            )
        found.add((match[1], match[2]))
    expected = {module for module, _ in found}
    if not isinstance(targets, str):
        expected |= {module for module in modules if _is_target(module, targets)}
    for module in sorted(expected):
        for part in "AB":
            if (module, part) not in found:
                raise ValueError(
                    f"{path} lacks base_model.model.{module}.lora_{part}.weight; copy "
                    "the adapter again"
                )
    if not expected:
        raise ValueError(f"{path} holds no tensors; copy the adapter again")


def _is_target(module: str, targets: Sequence[str]) -> bool:
    """Whether PEFT would give a module a pair, by names of modules or their ends."""
    return any(module == name or module.endswith(f".{name}") for name in targets)


def _targets(weights: Mapping[str, Any], modules: Mapping[str, Tensor]) -> list[str]:
    """Return names for `target_modules`: short ones if these name no other module."""
    short = sorted({module.rpartition(".")[2] for module in weights})
    named = {module for module in modules if _is_target(module, short)}
    return short if named == weights.keys() else sorted(weights)
