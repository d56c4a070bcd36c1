"""Meshes of rollouts, and how parameters get there.

Rollouts follow the sharding that parameters have (`put_on_mesh`). Their programs know a
mesh by the names `AXES` only (`rollout_mesh`). For few rows all devices share the rows
(`shared_rows_mesh`): every device keeps a part of the weights it holds, and nothing of
them is sent. Left out: anything that compiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from er_jax.decoder import Decoder
from er_jax.drafter import PolicyParams
from er_jax.engine.protocol import ROWS
from er_jax.kv_cache import attention
from er_jax.mesh.attention import attend_by_heads
from er_jax.mesh.rules import (
    AXES,
    DATA_AXIS,
    MODEL_AXIS,
    MeshAxes,
    draft_shardings,
    param_shardings,
    state_shardings,
)
from er_jax.types import DecodeState, Policy


def rollout_mesh(mesh: Mesh, axes: MeshAxes | None = None) -> Mesh:
    """Return the same devices, in the same order, as a mesh with the axes `AXES`.

    Args:
      mesh: any of the axes, in any order. axes: what they are called there.
    Returns:
      The mesh that rollouts use; axes that were missing have one device.
    Raises:
      ValueError: it is no mesh, or has an axis of another name.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh={mesh!r} is no jax.sharding.Mesh; give one, or call rollout with "
            "None for the default device"
        )
    names = dataclasses.astuple(axes or MeshAxes())
    unknown = [name for name in mesh.axis_names if name not in names]
    if unknown:
        raise ValueError(
            f"mesh has an axis {unknown[0]!r}, which is none of {names}; give "
            "mesh=er_jax.mesh.rollout_mesh(mesh, er_jax.mesh.MeshAxes(...)) with its "
            "own names"
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


def shared_rows_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh of the same devices on which all of them share the rows.

    What `model` splits into parts, it splits into smaller ones: the devices that held
    the same part come one after the other.

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


def as_sharded(sharding: NamedSharding, mesh: Mesh) -> NamedSharding:
    """Return a sharding of `shared_rows_mesh(mesh)`, named by `mesh`: the same places.

    One program can then take what lies in data shards and return what all share.
    """
    named = {DATA_AXIS: None, MODEL_AXIS: (MODEL_AXIS, DATA_AXIS)}
    return NamedSharding(mesh, PartitionSpec(*(named.get(a, a) for a in sharding.spec)))


def relabelled(
    array: jax.Array,
    sharding: NamedSharding,
    devices: Collection[jax.Device] | None = None,
) -> jax.Array:
    """Return an array under another name of the places where it lies; nothing moves.

    Args:
      array: on devices of this process among others. sharding: its other name.
      devices: whose parts are taken; None is all.
    """
    parts = [
        shard.data
        for shard in array.addressable_shards
        if devices is None or shard.device in devices
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def shared_rows_shardings(policy: Policy, params: PolicyParams, mesh: Mesh) -> Any:
    """Return where parameters lie when all devices share the rows.

    Args:
      policy: theirs. params: policy and draft, or their shapes; no draft is None.
      mesh: of `shared_rows_mesh`.
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
        found = PolicyParams(policy=own, draft=draft)
        jax.tree.map(lambda x, sharding: sharding.shard_shape(x.shape), params, found)
    except ValueError:
        return None
    return found


def put_on_mesh(policy: Policy, params: Any, mesh: Mesh) -> Any:
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


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """How the arrays of a program lie on a mesh; see `engine.protocol.Layout`.

    mesh: of `rollout_mesh`.
    """

    mesh: Mesh

    @property
    def name(self) -> str:
        """Devices along each axis."""
        return str(dict(self.mesh.shape))

    @property
    def num_shards(self) -> int:
        """Data shards: places along `data`."""
        return self.mesh.shape[DATA_AXIS]

    def over_rows(self, function: Any, in_marks: Any, out_marks: Any) -> Any:
        """Return a function that every data shard runs on its own rows.

        Rows are an axis by hand, and the other axes are the compiler's; but attention
        is told which heads are a device's.
        """

        def spec(mark: str) -> PartitionSpec:
            return PartitionSpec(DATA_AXIS) if mark == ROWS else PartitionSpec()

        def run(*arguments: Any) -> Any:
            with attention(attend_by_heads):
                return function(*arguments)

        return jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=jax.tree.map(spec, in_marks),
            out_specs=jax.tree.map(spec, out_marks),
            axis_names={DATA_AXIS},
            check_vma=False,
        )

    def sum(self, x: jax.Array) -> jax.Array:
        """Return the sum over all data shards."""
        return lax.psum(x, DATA_AXIS)

    def is_any(self, rows: jax.Array) -> jax.Array:
        """Return whether a row is true that this shard has to wait for.

        Where devices send to each other within a pass, all data shards must run as
        many passes.
        """
        found = jnp.any(rows)
        if self.mesh.size == self.num_shards:
            return found
        return self.sum(found.astype(jnp.int32)) > 0

    def all_rows(self, rows: jax.Array) -> jax.Array:
        """Return `[k, B]` of the rows of all data shards."""
        return lax.all_gather(rows, DATA_AXIS, axis=1, tiled=True)

    def lay_out(self, state: DecodeState, policy: Policy) -> DecodeState:
        """Have the compiler lay out a state by the rules."""
        shardings = state_shardings(state, policy, self.mesh)
        return lax.with_sharding_constraint(state, shardings)

    def replicate(self, tree: Any) -> Any:
        """Have the compiler put the same on every device."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return lax.with_sharding_constraint(tree, sharding)
