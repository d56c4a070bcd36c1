"""Where arrays lie on a mesh: from the names of parameters to `PartitionSpec`s.

A mesh may have any of three axes. Rows of the state are spread over `data`. Weights are
cut over `model` along heads and features, so that a layer needs one sum over the axis
behind attention and one behind the feed-forward part; and over `fsdp` along the other
side, for training. A quantized weight lies as the weight it was made from.

Nothing is replicated in silence: a dimension that an axis does not divide is refused.
There is one exception, because models have few of them: key/value heads that `model`
does not divide lie whole on every device of the axis, and so does their cache.

Rollouts follow the sharding that parameters have (`place`), and lay out their state by
`state_shardings`. Their programs know a mesh by the names `AXES` only (`rollout_mesh`).
For few rows all groups of devices work as one (`joint_mesh`): every device keeps a part
of the weights it holds, and nothing of them is sent.

Left out: anything that compiles.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from er_jax.decoder import Decoder, DecoderConfig
from er_jax.drafter import PolicyParams, QuantizedWeight, TiedEmbedding, is_weight
from er_jax.types import DATA_AXIS, MODEL_AXIS, Params, Policy

AnyMesh = Mesh | AbstractMesh

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
        is_whole = KV_WEIGHTS.fullmatch(name) and not _cuts_kv(config, mesh, axes)
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


def _cuts_kv(config: DecoderConfig, mesh: Any, axes: MeshAxes) -> bool:
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
    if not isinstance(policy, Decoder) or not _cuts_kv(policy.config, mesh, axes):
        heads = None

    def leaf(x: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(rows, *[None] * (x.ndim - 1)))

    def cached(x: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(rows, None, heads))

    return dataclasses.replace(
        jax.tree.map(leaf, state), cache=jax.tree.map(cached, state.cache)
    )


def rollout_mesh(mesh: Mesh, axes: MeshAxes | None = None) -> Mesh:
    """Return the same devices, in the same order, as a mesh with the axes `AXES`.

    Args:
      mesh: any of the axes, in any order. axes: what they are called there.
    Returns:
      The mesh that rollouts use; axes that were missing have one device.
    Raises:
      ValueError: it has an axis of another name.
    """
    names = dataclasses.astuple(axes or MeshAxes())
    unknown = [name for name in mesh.axis_names if name not in names]
    if unknown:
        raise ValueError(
            f"mesh has an axis {unknown[0]!r}, which is none of {names}; give "
            "mesh=sharding.rollout_mesh(mesh, sharding.MeshAxes(...)) with its own "
            "names"
        )
    found = [AXES[names.index(name)] for name in mesh.axis_names]
    missing = [name for name in AXES if name not in found]
    return Mesh(
        mesh.devices.reshape(mesh.devices.shape + (1,) * len(missing)),
        (*found, *missing),
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def on_mesh(cut: Any, mesh: Mesh) -> NamedSharding | None:
    """Return a sharding in the words of a rollout's mesh; None if it lies elsewhere.

    Axes correspond by their order; those of one device do not count.
    """
    if not isinstance(cut, NamedSharding):
        return None
    own = cut.mesh
    if isinstance(own, AbstractMesh) or own.devices.size != mesh.devices.size:
        return None
    theirs = [name for name in own.axis_names if own.shape[name] > 1]
    ours = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    sizes = [own.shape[name] for name in theirs], [mesh.shape[name] for name in ours]
    if sizes[0] != sizes[1] or list(own.devices.flat) != list(mesh.devices.flat):
        return None
    named = dict(zip(theirs, ours, strict=True))

    def entry(axes: Any) -> Any:
        several = axes if isinstance(axes, tuple) else (axes,)
        kept = tuple(named[axis] for axis in several if axis in named)
        return kept if len(kept) > 1 else kept[0] if kept else None

    return NamedSharding(mesh, PartitionSpec(*(entry(axes) for axes in cut.spec)))


def joint_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh on which all groups of devices are one.

    What `model` cut into parts, it cuts into smaller ones: the devices that held the
    same part come one after the other.

    Args:
      mesh: of `rollout_mesh`.
    """
    fsdp = AXES[1]
    order = [mesh.axis_names.index(name) for name in (fsdp, MODEL_AXIS, DATA_AXIS)]
    devices = mesh.devices.transpose(order)
    return Mesh(
        devices.reshape(1, len(devices), -1),
        (DATA_AXIS, fsdp, MODEL_AXIS),
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def as_parted(cut: NamedSharding, mesh: Mesh) -> NamedSharding:
    """Return a sharding of `joint_mesh(mesh)` in the words of `mesh`: the same places.

    One program can then take what lies by groups, and return what lies joint.
    """
    named = {DATA_AXIS: None, MODEL_AXIS: (MODEL_AXIS, DATA_AXIS)}
    return NamedSharding(mesh, PartitionSpec(*(named.get(a, a) for a in cut.spec)))


def relabelled(array: jax.Array, cut: NamedSharding) -> jax.Array:
    """Return an array under another name of the places where it lies; nothing moves."""
    parts = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, cut, parts)


def joint_shardings(policy: Policy, params: PolicyParams, mesh: Mesh) -> Any:
    """Return where parameters lie when all groups of devices are one.

    Args:
      policy: theirs. params: policy and draft, or their shapes; no draft is None.
      mesh: of `joint_mesh`.
    Returns:
      Shardings on that mesh; None where there are no rules for the policy, or some
      dimension is not divided into so many parts.
    """
    if not isinstance(policy, Decoder):
        return None
    try:
        own: Any = param_shardings(params.policy, policy.config, mesh)
        draft = None
        if params.draft is not None:
            draft = draft_shardings(params.draft, own)
        where = PolicyParams(policy=own, draft=draft)
        jax.tree.map(lambda x, cut: cut.shard_shape(x.shape), params, where)
    except ValueError:
        return None
    return where


def place(policy: Policy, params: Any, mesh: Mesh) -> Any:
    """Return parameters as they are if they lie on the mesh, else laid out on it.

    Args:
      policy: theirs. params: the policy's, or `PolicyParams`; arrays or their shapes.
      mesh: of `rollout_mesh`.
    Raises:
      ValueError: some lie on the mesh and some elsewhere, weights are cut over `data`,
        or they lie elsewhere and no rules say how this policy is cut.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    cuts = [on_mesh(getattr(leaf, "sharding", None), mesh) for _, leaf in leaves]
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves
    ]
    if all(cut is not None for cut in cuts):
        for name, cut in zip(names, cuts, strict=True):
            axes = jax.tree.leaves(tuple(cut.spec))  # type: ignore[union-attr]
            if DATA_AXIS in axes:
                raise ValueError(
                    f"params: {name} is cut over the axis {DATA_AXIS!r}, over which "
                    "rows are spread, and would be gathered in every step; lay it out "
                    "over the other axes, or call that axis 'fsdp'"
                )
        return params
    if any(cut is not None for cut in cuts):
        name = names[[cut is None for cut in cuts].index(True)]
        raise ValueError(
            f"params: {name} does not lie on the mesh, and others do; put all of them "
            "there with jax.device_put (a draft: er_jax.attach_draft inside jax.jit)"
        )
    if not isinstance(policy, Decoder):
        raise ValueError(
            f"params do not lie on the mesh, and for a {type(policy).__name__} no "
            "rules say how they should; put them there with jax.device_put and "
            "shardings of your own"
        )
    bare = params.policy if isinstance(params, PolicyParams) else params
    where: Any = param_shardings(bare, policy.config, mesh)
    if isinstance(params, PolicyParams):
        draft = draft_shardings(params.draft, where)
        where = PolicyParams(policy=where, draft=draft)
    return jax.tree.map(jax.device_put, params, where)
