"""Where arrays lie on a mesh: from the names of parameters to `PartitionSpec`s.

A mesh may have any of three axes. Rows of the state are spread over `data`. Weights are
sharded over `model` along heads and features, so that a layer needs one sum over the
axis behind attention and one behind the feed-forward part; and over `fsdp` along the
other side, for training. A quantized weight lies as the weight it was made from.

Nothing is replicated in silence: a dimension that an axis does not divide is refused.
There is one exception, because models have few of them: key/value heads that `model`
does not divide lie whole on every device of the axis, and so does their cache.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from er_jax.decoder import Decoder, DecoderConfig
from er_jax.drafter import QuantizedWeight, TiedEmbedding, is_weight
from er_jax.types import Params, Policy

AnyMesh = Mesh | AbstractMesh


# Axes of a rollout's mesh: rows, and heads and features.
DATA_AXIS, MODEL_AXIS = "data", "model"
AXES = (DATA_AXIS, "fsdp", MODEL_AXIS)


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """What the axes of a mesh are called; a mesh may lack any of them.

    data: rows. fsdp: weights, for training. model: heads and features.
    """

    data: str = DATA_AXIS
    fsdp: str = "fsdp"
    model: str = MODEL_AXIS


# By the last part of a parameter's path: the axis of each dimension, by field name.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(q|k|v|gate|up)_proj|lm_head", ("fsdp", "model")),
    (r"(o|down)_proj", ("model", "fsdp")),
    (r"embed|table", ("model", "fsdp")),
    (r"[qkv]_bias", ("model",)),
    (r"\w*norm|o_bias", ()),
)

KV_WEIGHTS = re.compile(r"[kv]_(proj|bias)")


def param_spec(
    path: str,
    shape: tuple[int, ...],
    config: DecoderConfig,
    mesh: AnyMesh,
    axes: MeshAxes | None = None,
) -> PartitionSpec:
    """Return how a parameter of the built-in decoder is cut.

    Args:
      path: with its parts between slashes, such as "layers/0/q_proj".
      shape: as in `Params`, matrices `[in, out]`.
      config: the decoder's. mesh: the mesh. axes: names of its axes.
    Raises:
      ValueError: no rule for this path, or an axis does not divide a dimension.
    """
    axes = axes or MeshAxes()
    name = path.split("/")[-1]
    rule = next((dims for made, dims in RULES if re.fullmatch(made, name)), None)
    if rule is None:
        raise ValueError(
            f"no rule says how {path} is cut over a mesh; give its sharding, or load "
            "it without a mesh"
        )
    entries: list[str | None] = []
    for size, field in zip(shape, rule, strict=False):
        axis = getattr(axes, field)
        is_whole = KV_WEIGHTS.fullmatch(name) and not cuts_kv(config, mesh, axes)
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


def cuts_kv(config: DecoderConfig, mesh: Any, axes: MeshAxes) -> bool:
    """Whether key/value heads are cut over the mesh, or lie whole on every device."""
    return config.num_kv_heads % mesh.shape.get(axes.model, 1) == 0


def param_shardings(
    params: Params, config: DecoderConfig, mesh: AnyMesh, axes: MeshAxes | None = None
) -> Params:
    """Return the sharding of every leaf of the decoder's parameters, or their shapes.

    Raises:
      ValueError: as for `param_spec`.
    """

    def leaf(path: tuple[Any, ...], x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, param_spec(name, x.shape, config, mesh, axes))

    return jax.tree_util.tree_map_with_path(leaf, params)


def draft_shardings(draft: Params, params: Params) -> Params:
    """Return the sharding of every leaf of a draft: that of the weight it is made from.

    Args:
      draft: as `attach_draft` makes it, or its shapes.
      params: shardings of the policy, as `param_shardings` returns them.
    """

    def quantized(weight: QuantizedWeight, cut: NamedSharding) -> Any:
        ins, outs = (*cut.spec, None, None)[:2]
        codes = (ins, None, outs) if weight.is_grouped else (outs, ins)
        scale = (ins, None, outs) if weight.is_grouped else (outs, None)

        def leaf(x: Any) -> NamedSharding:
            spec = codes if x.shape == weight.codes.shape else scale
            return NamedSharding(cut.mesh, PartitionSpec(*spec))

        return jax.tree.map(leaf, weight)

    def of_parent(cut: Any, leaf: Any) -> Any:
        if leaf is None:
            return None
        if isinstance(leaf, TiedEmbedding):
            turned = NamedSharding(
                cut.table.mesh, PartitionSpec(*(*cut.table.spec, None, None)[1::-1])
            )
            return leaf.replace(  # type: ignore[attr-defined]
                projection=quantized(leaf.projection, turned)
            )
        return quantized(leaf, cut)

    return jax.tree.map(of_parent, params, draft, is_leaf=is_weight)


def state_shardings(
    state: Any, policy: Policy, mesh: AnyMesh, axes: MeshAxes | None = None
) -> Any:
    """Return the sharding of every leaf of a `DecodeState`, or of its shapes.

    Rows lie over `data`. The cache of a `Decoder` has its heads over `model` where that
    divides them; the cache of another policy is cut by rows only.

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
    if not isinstance(policy, Decoder) or not cuts_kv(policy.config, mesh, axes):
        heads = None

    def leaf(x: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(rows, *[None] * (x.ndim - 1)))

    def cached(x: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(rows, None, heads))

    return dataclasses.replace(
        jax.tree.map(leaf, state), cache=jax.tree.map(cached, state.cache)
    )
