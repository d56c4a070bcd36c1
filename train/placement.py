"""Placement: where a training run's arrays lie, on one device or on a mesh.

A mesh has three axes of any size. In an update, rows are spread over `data` and `fsdp`;
weights, gradients and the optimizer's state are sharded over `fsdp` and `model`. A
rollout uses the same devices in another way: every device along `fsdp` has rows of its
own and whole weights, because a decoding step has too few rows to be worth gathering
weights for. An update therefore ends by gathering the weights along `fsdp` once, in the
program that also derives the draft.

Several processes run the same program on the same numbers. The first one writes files,
prints, and broadcasts to the others what only it knows (`agreed`).

Left out: pipeline parallelism, more than one mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

import er_jax
from er_jax.mesh import rules
from er_jax.mesh.processes import Processes
from train.config import MeshConfig
from train.settings import require


def join(config: MeshConfig) -> None:
    """Connect to the other processes of a run, if there are any.

    Must be called before JAX touches a device.
    """
    if config.coordinator is None:
        return
    found = config.coordinator == "auto"
    jax.distributed.initialize(
        None if found else config.coordinator,
        config.num_processes,
        config.process_id,
        heartbeat_timeout_seconds=config.heartbeat_s,
    )


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def agreed(values: Any) -> np.ndarray:
    """Return the first process's values in every process, bit for bit.

    Every process waits here for all others.

    Args:
      values: numbers of the same shape and dtype in all processes.
    """
    own = np.asarray(values)
    # As bytes, because JAX would convert 64 bits to 32.
    told = Processes.of_all().broadcast_bytes(own.tobytes())
    assert told is not None, "every process has values"
    return np.frombuffer(told, own.dtype).reshape(own.shape)


def on_host(tree: Any) -> Any:
    """Return a pytree with its JAX arrays gathered as whole NumPy arrays.

    All processes must call it, and each gets everything.
    """

    def leaf(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        # Convert a copy: JAX caches the NumPy view of an array, and that would keep the
        # original buffer from being donated.
        return np.asarray(jnp.array(x)) if isinstance(x, jax.Array) else x

    return jax.tree.map(leaf, tree)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices of a run, and which part of an array each of them holds.

    Without a mesh every method leaves arrays as they are. A mesh is for the built-in
    decoder only.

    Attributes:
      mesh: with the axes data, fsdp and model; None is the default device alone.
    """

    mesh: Mesh | None = None

    @classmethod
    def of(cls, config: MeshConfig) -> Placement:
        """Arrange all devices of all processes as a mesh.

        Raises:
          ValueError: the product of the sizes is not the number of devices.
        """
        sizes = (config.data, config.fsdp, config.model)
        if sizes == (1, 1, 1):
            return cls()
        devices = jax.devices()
        require(
            int(np.prod(sizes)) == len(devices),
            "mesh",
            " x ".join(map(str, sizes)),
            f"there are {len(devices)} devices; give sizes with that product",
        )
        shaped = np.array(devices).reshape(sizes)
        return cls(Mesh(shaped, rules.AXES, axis_types=(AxisType.Auto,) * 3))

    @functools.cached_property
    def sampling(self) -> Mesh | None:
        """The mesh of rollouts: the same devices, with `fsdp` folded into `data`."""
        if self.mesh is None:
            return None
        data, fsdp, model = self.mesh.devices.shape
        devices = self.mesh.devices.reshape(data * fsdp, 1, model)
        return Mesh(devices, rules.AXES, axis_types=self.mesh.axis_types)

    @property
    def num_row_groups(self) -> int:
        """Parts that the rows of an update are spread over."""
        if self.mesh is None:
            return 1
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def params(self, policy: er_jax.Policy, params: Any) -> Any:
        """Return the sharding that every parameter has in an update; needs a mesh."""
        assert self.mesh is not None and isinstance(policy, er_jax.Decoder)
        return rules.param_shardings(params, policy.config, self.mesh)

    def put(self, policy: er_jax.Policy, params: Any) -> Any:
        """Return parameters with the sharding of an update.

        Of parameters that every process has made for itself, the first process's are
        taken.
        """
        if self.mesh is None:
            return params
        if jax.process_count() > 1 and jax.tree.leaves(params)[0].is_fully_addressable:
            params = multihost_utils.broadcast_one_to_all(params)
        return jax.tree.map(jax.device_put, params, self.params(policy, params))

    def shaped(self, policy: er_jax.Policy, params: Any) -> Any:
        """Return the shapes and update shardings of parameters, for a restore."""
        if self.mesh is None:
            return self.shaped_whole(params)
        return jax.tree.map(_shaped, params, self.params(policy, params))

    def shaped_whole(self, tree: Any) -> Any:
        """Return shapes, and the sharding of arrays that are whole on every device.

        Without a mesh that sharding is one device. It has to be named, because a
        restore otherwise uses the mesh that the checkpoint was made on.
        """
        where: Any = SingleDeviceSharding(jax.devices()[0])
        if self.mesh is not None:
            where = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: _shaped(x, where), tree)

    def trained(self, policy: er_jax.Policy, params: Any) -> Any:
        """Constrain parameters or gradients to an update's sharding, inside a jit."""
        if self.mesh is None:
            return params
        return lax.with_sharding_constraint(params, self.params(policy, params))

    def optimized(
        self, policy: er_jax.Policy, optimizer: Any, opt_state: Any, params: Any
    ) -> Any:
        """Constrain an optimizer's state to its parameters' sharding, inside a jit."""
        if self.mesh is None:
            return opt_state
        shardings = self._of_optimizer(policy, optimizer, opt_state, params)
        return jax.tree.map(lax.with_sharding_constraint, opt_state, shardings)

    def shaped_optimizer(
        self, policy: er_jax.Policy, optimizer: Any, opt_state: Any, params: Any
    ) -> Any:
        """Return the shapes and shardings of an optimizer's state, for a restore."""
        if self.mesh is None:
            return self.shaped_whole(opt_state)
        shardings = self._of_optimizer(policy, optimizer, opt_state, params)
        return jax.tree.map(_shaped, opt_state, shardings)

    def _of_optimizer(
        self, policy: er_jax.Policy, optimizer: Any, opt_state: Any, params: Any
    ) -> Any:
        assert self.mesh is not None
        whole = NamedSharding(self.mesh, PartitionSpec())
        return optax.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            opt_state,
            self.params(policy, params),
            transform_non_params=lambda _: whole,
        )

    def rows(self, batch: Any) -> Any:
        """Spread a batch's rows, its first axis, over the mesh, inside a jit."""
        if self.mesh is None:
            return batch
        sharding = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, sharding), batch)

    def drafted(
        self,
        policy: er_jax.Policy,
        params: Any,
        config: er_jax.DrafterConfig,
        previous: er_jax.PolicyParams | None = None,
        gathered: Any = None,
    ) -> tuple[er_jax.PolicyParams, Any]:
        """Derive what a rollout samples from, inside a jit.

        Args:
          policy, params, config: of the draft.
          previous, gathered: the results before an update. Arrays of `params` that are
            the same as there are neither gathered nor quantized again.
        Returns:
          The parameters with their draft; and the parameters gathered along `fsdp`,
          which the draft was made from, or None when there is nothing to gather.
        """
        if self.mesh is None:
            return er_jax.attach_draft(params, config, previous=previous), None
        shardings = jax.tree.map(self._gathered, self.params(policy, params))
        if previous is None:
            gathered = lax.with_sharding_constraint(params, shardings)
        else:
            whole = previous.policy if gathered is None else gathered
            gathered = jax.tree.map(
                lambda new, old, whole, sharding: (
                    whole if new is old else lax.with_sharding_constraint(new, sharding)
                ),
                *(params, previous.policy, whole, shardings),
            )
            previous = er_jax.PolicyParams(policy=whole, draft=previous.draft)
        draft = er_jax.attach_draft(gathered, config, previous=previous).draft
        draft = lax.with_sharding_constraint(
            draft, rules.draft_shardings(draft, shardings)
        )
        policy_and_draft = er_jax.PolicyParams(policy=params, draft=draft)
        return policy_and_draft, gathered if self.mesh.shape["fsdp"] > 1 else None

    def sampler(
        self, params: er_jax.PolicyParams, gathered: Any
    ) -> er_jax.PolicyParams:
        """Return the results of `drafted` as arrays on the mesh of rollouts.

        Nothing is copied: the devices hold the same parts under another mesh.
        """
        if gathered is None:
            return params
        mesh = self.sampling
        assert mesh is not None

        def leaf(x: jax.Array) -> jax.Array:
            assert isinstance(x.sharding, NamedSharding)
            return jax.make_array_from_single_device_arrays(
                x.shape,
                NamedSharding(mesh, x.sharding.spec),
                [shard.data for shard in x.addressable_shards],
            )

        policy_and_draft = er_jax.PolicyParams(policy=gathered, draft=params.draft)
        return jax.tree.map(leaf, policy_and_draft)

    @staticmethod
    def _gathered(sharding: NamedSharding) -> NamedSharding:
        whole = (None if axis == "fsdp" else axis for axis in sharding.spec)
        return NamedSharding(sharding.mesh, PartitionSpec(*whole))


def _shaped(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
