"""Meshes of rollouts, and the shardings of parameters on them.

A rollout uses parameters with the shardings that they have (`put_on_mesh`). Its
programs know a mesh with the axes `AXES` only (`rollout_mesh`). For few rows, all
devices can share the rows (`shared_rows_mesh`): every device then keeps a part of the
weights that it holds, and no weights are sent. Left out: compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from er_jax import attention
from er_jax.decoder import Decoder
from er_jax.drafter import PolicyParams
from er_jax.engine.protocol import ROWS, described
from er_jax.kernels import choice
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
      mesh: with any of the axes, in any order. axes: their names in `mesh`.
    Returns:
      The mesh that rollouts use; axes that `mesh` lacks have size 1.
    Raises:
      ValueError: `mesh` is not a mesh, or has an axis of another name.
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


def on_mesh(sharding: Any, mesh: Mesh) -> NamedSharding | None:
    """Return a sharding with the axes of a rollout's mesh; None if it is on another.

    Axes are matched in their order, without those of size 1.
    """
    if not isinstance(sharding, NamedSharding):
        return None
    old = sharding.mesh
    if isinstance(old, AbstractMesh) or old.devices.size != mesh.devices.size:
        return None
    old_names = [name for name in old.axis_names if old.shape[name] > 1]
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    if [old.shape[name] for name in old_names] != [mesh.shape[name] for name in names]:
        return None
    if list(old.devices.flat) != list(mesh.devices.flat):
        return None
    renamed = dict(zip(old_names, names, strict=True))

    def entry(axes: Any) -> Any:
        several = axes if isinstance(axes, tuple) else (axes,)
        kept = tuple(renamed[axis] for axis in several if axis in renamed)
        return kept if len(kept) > 1 else kept[0] if kept else None

    return NamedSharding(mesh, PartitionSpec(*(entry(axes) for axes in sharding.spec)))


def shared_rows_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh on which all of the same devices share the rows.

    Its axis `model` has the devices of `model` and `data`. Those that held the same
    part of a weight are adjacent, so that each of them gets a smaller part of it.

    Args:
      mesh: from `rollout_mesh`.
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
    """Return a sharding of `shared_rows_mesh(mesh)` with the axes of `mesh`.

    Both put the same parts on the same devices. With it, one program can take arrays in
    data shards and return arrays for shared rows.
    """
    named = {DATA_AXIS: None, MODEL_AXIS: (MODEL_AXIS, DATA_AXIS)}
    return NamedSharding(mesh, PartitionSpec(*(named.get(a, a) for a in sharding.spec)))


def relabelled(
    array: jax.Array,
    sharding: NamedSharding,
    devices: Collection[jax.Device] | None = None,
) -> jax.Array:
    """Return an array with another sharding of the same parts; nothing is copied.

    Args:
      array: with parts on devices of this process. sharding: the new one, which has the
        same parts on the same devices.
      devices: those whose parts to take; None is all.
    """
    parts = [
        shard.data
        for shard in array.addressable_shards
        if devices is None or shard.device in devices
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def shared_rows_shardings(policy: Policy, params: PolicyParams, mesh: Mesh) -> Any:
    """Return the shardings of parameters when all devices share the rows.

    Args:
      policy: of the parameters. params: policy and drafts (or None), or their shapes.
      mesh: from `shared_rows_mesh`.
    Returns:
      Shardings on that mesh; None if there are no rules for the policy, or an axis does
      not divide a dimension.
    """
    if not isinstance(policy, Decoder):
        return None
    try:
        policy_shardings: Any = param_shardings(params.policy, policy.config, mesh)
        found = _with_drafts(params, policy_shardings)
        jax.tree.map(lambda x, sharding: sharding.shard_shape(x.shape), params, found)
    except ValueError:
        return None
    return found


def put_on_mesh(policy: Policy, params: Any, mesh: Mesh) -> Any:
    """Return parameters on the mesh: as they are, or sharded by the rules.

    Args:
      policy: of the parameters. params: the policy's, or `PolicyParams`; arrays or
        their shapes. They are returned as they are if they are on the mesh.
      mesh: from `rollout_mesh`.
    Raises:
      ValueError: some are on the mesh and some are not, a weight is sharded over
        `data`, or none is on the mesh and there are no rules for this policy.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = [on_mesh(getattr(leaf, "sharding", None), mesh) for _, leaf in leaves]
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves
    ]
    if all(sharding is not None for sharding in found):
        for name, sharding in zip(names, found, strict=True):
            axes = jax.tree.leaves(tuple(sharding.spec))  # type: ignore[union-attr]
            if DATA_AXIS in axes:
                raise ValueError(
                    f"params: {name} is sharded over the axis {DATA_AXIS!r}, the axis "
                    "of rows, and would be gathered in every step; shard it over the "
                    "other axes, or call that axis 'fsdp'"
                )
        return params
    if any(sharding is not None for sharding in found):
        name = names[[sharding is None for sharding in found].index(True)]
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
    policy_params = params.policy if isinstance(params, PolicyParams) else params
    shardings: Any = param_shardings(policy_params, policy.config, mesh)
    if isinstance(params, PolicyParams):
        shardings = _with_drafts(params, shardings)
    return jax.tree.map(jax.device_put, params, shardings)


def _with_drafts(params: PolicyParams, shardings: Any) -> PolicyParams:
    """Return the shardings of the policy, and of every draft that there is."""
    draft, *others = (
        None if draft is None else draft_shardings(draft, shardings)
        for draft in params.drafts
    )
    return PolicyParams(policy=shardings, draft=draft, others=tuple(others))


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """How the arrays of a program lie on a mesh; see `engine.protocol.Layout`.

    mesh: from `rollout_mesh`. attention: the implementation that programs are traced
    with.
    """

    mesh: Mesh
    attention: str = choice.XLA

    @property
    def name(self) -> str:
        """The number of devices along each axis, as text."""
        return described(str(dict(self.mesh.shape)), self.attention)

    @property
    def num_shards(self) -> int:
        """The number of data shards: the size of the axis `data`."""
        return self.mesh.shape[DATA_AXIS]

    def over_rows(self, function: Any, in_marks: Any, out_marks: Any) -> Any:
        """Return a function that every data shard runs on its own rows.

        It is mapped over `data` explicitly and partitioned over the other axes by the
        compiler, except for attention, which is mapped over heads.
        """

        def spec(mark: str) -> PartitionSpec:
            return PartitionSpec(DATA_AXIS) if mark == ROWS else PartitionSpec()

        def run(*arguments: Any) -> Any:
            with attention.replaced(attend_by_heads), choice.using(self.attention):
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
        """Whether a flag is set, here or in a shard that this one waits for.

        Where devices send to each other within a pass, all data shards must run equally
        many passes.
        """
        found = jnp.any(rows)
        if self.mesh.size == self.num_shards:
            return found
        return self.sum(found.astype(jnp.int32)) > 0

    def all_rows(self, rows: jax.Array) -> jax.Array:
        """Return `[k, B]` with the rows of all data shards."""
        return lax.all_gather(rows, DATA_AXIS, axis=1, tiled=True)

    def lay_out(self, state: DecodeState, policy: Policy) -> DecodeState:
        """Constrain a state to the shardings of the rules."""
        shardings = state_shardings(state, policy, self.mesh)
        return lax.with_sharding_constraint(state, shardings)

    def replicate(self, tree: Any) -> Any:
        """Constrain arrays to be the same on every device."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return lax.with_sharding_constraint(tree, sharding)
