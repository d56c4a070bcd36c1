"""The sharding rules: from names of parameters to `PartitionSpec`s.

A mesh may have any of three axes. Rows of the state are sharded over `data`. Weights
are sharded over `model` along heads and features, so that a layer needs one sum over
that axis after attention and one after the feed-forward part, and over `fsdp` along the
other dimension, for training. A quantized weight is sharded like the weight it was made
from, and a low-rank pair like the dimensions that it shares with its base.

A dimension that its axis does not divide is refused, not replicated. The only exception
is key/value heads, of which models have few: if `model` does not divide them, they are
replicated over it, and so is their cache.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from er_jax.decoder import Decoder, DecoderConfig
from er_jax.drafter import QuantizedWeight, TiedEmbedding, is_weight
from er_jax.lora import LoRAWeight
from er_jax.types import Params, Policy

AnyMesh = Mesh | AbstractMesh


# Axes of a rollout's mesh: for rows, and for heads and features.
DATA_AXIS, MODEL_AXIS = "data", "model"
AXES = (DATA_AXIS, "fsdp", MODEL_AXIS)


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """The names of a mesh's axes; a mesh may lack any of them.

    data: of rows. fsdp: of weights, for training. model: of heads and features.
    """

    data: str = DATA_AXIS
    fsdp: str = "fsdp"
    model: str = MODEL_AXIS


# Pattern of the last part of a parameter's path -> axis of each dimension, as the name
# of a field of `MeshAxes`; empty where a dimension is whole on every device.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(q|k|v|gate|up)_proj|lm_head", ("fsdp", "model")),
    (r"(o|down)_proj", ("model", "fsdp")),
    (r"embed|table", ("model", "fsdp")),
    (r"[qkv]_bias", ("model",)),
    (r"\w*norm|o_bias", ()),
    # Every device holds a part of each expert: whichever are chosen, all work alike.
    (r"(gate|up)_experts", ("", "fsdp", "model")),
    (r"down_experts", ("", "model", "fsdp")),
    (r"router", ("fsdp", "")),
)

# Of a weight with a low-rank pair: which of its dimensions each part has. The rank is
# whole on every device.
LORA_PARTS = {"base": (0, 1), "a": (0, None), "b": (None, 1)}

KV_WEIGHTS = re.compile(r"[kv]_(proj|bias)")


def param_spec(
    path: str,
    shape: tuple[int, ...],
    config: DecoderConfig,
    mesh: AnyMesh,
    axes: MeshAxes | None = None,
) -> PartitionSpec:
    """Return the partition of a parameter of the built-in decoder.

    Args:
      path: its parts joined by slashes, such as "layers/0/q_proj".
      shape: as in `Params`, matrices `[in, out]`.
      config: of the decoder. mesh: the mesh. axes: names of its axes.
    Raises:
      ValueError: no rule for this path, or an axis does not divide a dimension.
    """
    axes = axes or MeshAxes()
    *above, name = path.split("/")
    part = LORA_PARTS.get(name)
    if part is not None and above:
        name = above[-1]
    rule = next((dims for words, dims in RULES if re.fullmatch(words, name)), None)
    if rule is not None and part is not None:
        rule = tuple("" if dim is None else rule[dim] for dim in part)
    if rule is None:
        raise ValueError(
            f"no rule says how {path} is sharded over a mesh; give its sharding, or "
            "load it without a mesh"
        )
    entries: list[str | None] = []
    for size, field in zip(shape, rule, strict=False):
        axis = getattr(axes, field) if field else None
        is_whole = KV_WEIGHTS.fullmatch(name) and not shards_kv(config, mesh, axes)
        if axis not in mesh.shape or (field == "model" and is_whole):
            entries.append(None)
            continue
        if size % mesh.shape[axis]:
            raise ValueError(
                f"mesh: its axis {axis!r} of {mesh.shape[axis]} devices does not "
                f"divide {path}, of shape {shape}; use a size that divides {size}"
            )
        entries.append(axis)
    return PartitionSpec(*entries)


def shards_kv(config: DecoderConfig, mesh: Any, axes: MeshAxes) -> bool:
    """Whether key/value heads are sharded over the mesh, and not replicated."""
    return config.num_kv_heads % mesh.shape.get(axes.model, 1) == 0


def param_shardings(
    params: Params, config: DecoderConfig, mesh: AnyMesh, axes: MeshAxes | None = None
) -> Params:
    """Return the sharding of every leaf of a decoder's parameters, or of their shapes.

    Raises:
      ValueError: as `param_spec`.
    """

    def leaf(path: tuple[Any, ...], x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, param_spec(name, x.shape, config, mesh, axes))

    return jax.tree_util.tree_map_with_path(leaf, params)


def draft_shardings(draft: Params, params: Params) -> Params:
    """Return the sharding of every leaf of a draft: that of the weight it came from.

    Args:
      draft: from `attach_draft`, or its shapes.
      params: shardings of the policy, from `param_shardings`.
    """

    def quantized(weight: QuantizedWeight, sharding: NamedSharding) -> Any:
        # Leading dimensions are those of a stack, as of experts.
        rank = weight.codes.ndim - weight.is_grouped
        *stack, ins, outs = (*sharding.spec, *[None] * rank)[:rank]
        codes = (*stack, outs, ins, *[None] * weight.is_grouped)
        scale = (*stack, outs, *([ins] * weight.is_grouped), None)

        def leaf(x: Any) -> NamedSharding:
            spec = codes if x.shape == weight.codes.shape else scale
            return NamedSharding(sharding.mesh, PartitionSpec(*spec))

        return jax.tree.map(leaf, weight)

    def of_parent(sharding: Any, leaf: Any) -> Any:
        if leaf is None:
            return None
        if isinstance(leaf, TiedEmbedding):
            table = sharding.table
            spec = PartitionSpec(*(*table.spec, None, None)[1::-1])
            return leaf.replace(  # type: ignore[attr-defined]
                projection=quantized(leaf.projection, NamedSharding(table.mesh, spec))
            )
        if isinstance(leaf, LoRAWeight):
            base = quantized(leaf.base, sharding.base)
            return leaf.replace(base=base)  # type: ignore[attr-defined]
        return quantized(leaf, sharding)

    return jax.tree.map(of_parent, params, draft, is_leaf=is_weight)


def state_shardings(
    state: Any, policy: Policy, mesh: AnyMesh, axes: MeshAxes | None = None
) -> Any:
    """Return the sharding of every leaf of a `DecodeState`, or of its shapes.

    Rows are sharded over `data`, and the heads of a `Decoder`'s cache over `model` if
    that divides them. The cache of another policy is sharded by rows only.

    Raises:
      ValueError: `data` does not divide the rows.
    """
    axes = axes or MeshAxes()
    rows = axes.data if axes.data in mesh.shape else None
    heads = axes.model if axes.model in mesh.shape else None
    if rows is not None and state.rows % mesh.shape[rows]:
        raise ValueError(
            f"rows={state.rows} are not divided by the mesh's axis {rows!r} of "
            f"{mesh.shape[rows]} devices; use a multiple of it"
        )
    if not isinstance(policy, Decoder) or not shards_kv(policy.config, mesh, axes):
        heads = None

    def leaf(x: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(rows, *[None] * (x.ndim - 1)))

    def cached(x: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(rows, None, heads))

    return dataclasses.replace(
        jax.tree.map(leaf, state), cache=jax.tree.map(cached, state.cache)
    )
