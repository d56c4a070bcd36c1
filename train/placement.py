"""Where a training run's arrays lie: on one device, or on a mesh.

Three axes, of any size: rows of an update are spread over `data` and `fsdp`; weights,
gradients and the optimizer's state are cut over `fsdp` and `model`. Rollouts use the
same devices otherwise: weights are whole along `fsdp`, whose devices hold rows of their
own, because a decoding step has too few rows to be worth gathering weights for. So the
end of every update gathers them once, in the same program that derives the draft.

Several processes run the same program on the same numbers. The first one writes files
and speaks; what only it knows is told to the others (`agreed`).

Left out: pipelines, several meshes.
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
from train.config import MeshConfig
from train.settings import require


def join(config: MeshConfig) -> None:
    """Meet the other processes of a run, if there are any; before JAX is used."""
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
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def agreed(values: Any) -> np.ndarray:
    """Return the first process's numbers, in every process; waits for all of them.

    Args:
      values: numbers, of one shape and dtype in all processes; kept to the bit.
    """
    own = np.asarray(values)
    # As bytes, for JAX would make 32 bits of 64.
    data = np.frombuffer(own.tobytes(), np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(data))
    return np.frombuffer(told.tobytes(), own.dtype).reshape(own.shape)


def on_host(tree: Any) -> Any:
    """Return arrays as NumPy's, whole, in every process."""

    def leaf(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        # A copy: a NumPy view that JAX caches would keep the buffer from being donated.
        return np.asarray(jnp.array(x)) if isinstance(x, jax.Array) else x

    return jax.tree.map(leaf, tree)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A run's devices; on a mesh for decoders only, and one device is left alone.

    Attributes:
      mesh: with the axes data, fsdp and model; None is the default device.
    """

    mesh: Mesh | None = None

    @classmethod
    def of(cls, config: MeshConfig) -> Placement:
        """Lay all devices of all processes out.

        Raises:
          ValueError: sizes whose product is not their number.
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
        """The same devices, in the same order, for rollouts: fsdp's are rows'."""
        if self.mesh is None:
            return None
        data, fsdp, model = self.mesh.devices.shape
        devices = self.mesh.devices.reshape(data * fsdp, 1, model)
        return Mesh(devices, rules.AXES, axis_types=self.mesh.axis_types)

    @property
    def num_row_groups(self) -> int:
        """Parts that the rows of an update are cut into."""
        if self.mesh is None:
            return 1
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def params(self, policy: er_jax.Policy, params: Any) -> Any:
        """Return the sharding of every parameter in an update on a mesh."""
        assert self.mesh is not None and isinstance(policy, er_jax.Decoder)
        return rules.param_shardings(params, policy.config, self.mesh)

    def put(self, policy: er_jax.Policy, params: Any) -> Any:
        """Lay parameters out for updates; of several processes, the first one's."""
        if self.mesh is None:
            return params
        if jax.process_count() > 1 and jax.tree.leaves(params)[0].is_fully_addressable:
            params = multihost_utils.broadcast_one_to_all(params)
        return jax.tree.map(jax.device_put, params, self.params(policy, params))

    def shaped(self, policy: er_jax.Policy, params: Any) -> Any:
        """Return shapes of parameters with the shardings a restore gives them."""
        if self.mesh is None:
            return self.shaped_whole(params)
        return jax.tree.map(_shaped, params, self.params(policy, params))

    def shaped_whole(self, tree: Any) -> Any:
        """The same for what lies whole on every device.

        Said of one device as well: the checkpoint of a larger mesh says otherwise.
        """
        where: Any = SingleDeviceSharding(jax.devices()[0])
        if self.mesh is not None:
            where = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: _shaped(x, where), tree)

    def trained(self, policy: er_jax.Policy, params: Any) -> Any:
        """Hold parameters where updates have them; inside a jit."""
        if self.mesh is None:
            return params
        return lax.with_sharding_constraint(params, self.params(policy, params))

    def optimized(
        self, policy: er_jax.Policy, optimizer: Any, opt_state: Any, params: Any
    ) -> Any:
        """Hold an optimizer's state where its parameters are; inside a jit."""
        if self.mesh is None:
            return opt_state
        cuts = self._of_optimizer(policy, optimizer, opt_state, params)
        return jax.tree.map(lax.with_sharding_constraint, opt_state, cuts)

    def shaped_optimizer(
        self, policy: er_jax.Policy, optimizer: Any, opt_state: Any, params: Any
    ) -> Any:
        """The same for an optimizer's state."""
        if self.mesh is None:
            return self.shaped_whole(opt_state)
        cuts = self._of_optimizer(policy, optimizer, opt_state, params)
        return jax.tree.map(_shaped, opt_state, cuts)

    def _of_optimizer(
        self, policy: er_jax.Policy, optimizer: Any, opt_state: Any, params: Any
    ) -> Any:
        assert self.mesh is not None
        whole = NamedSharding(self.mesh, PartitionSpec())
        return optax.tree_map_params(
            optimizer,
            lambda _, cut: cut,
            opt_state,
            self.params(policy, params),
            transform_non_params=lambda _: whole,
        )

    def rows(self, batch: Any) -> Any:
        """Spread the rows, the first axis, of a batch; inside a jit."""
        if self.mesh is None:
            return batch
        cut = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, cut), batch)

    def drafted(
        self, policy: er_jax.Policy, params: Any, config: er_jax.DrafterConfig
    ) -> tuple[er_jax.PolicyParams, Any]:
        """Derive what rollouts sample from; inside a jit.

        Returns:
          The parameters with their draft, and the parameters gathered along fsdp, from
          which the draft was made; None where there is nothing to gather.
        """
        if self.mesh is None:
            return er_jax.attach_draft(params, config), None
        cuts = jax.tree.map(self._gathered, self.params(policy, params))
        gathered = lax.with_sharding_constraint(params, cuts)
        draft = er_jax.attach_draft(gathered, config).draft
        draft = lax.with_sharding_constraint(draft, rules.draft_shardings(draft, cuts))
        pair = er_jax.PolicyParams(policy=params, draft=draft)
        return pair, gathered if self.mesh.shape["fsdp"] > 1 else None

    def sampler(
        self, params: er_jax.PolicyParams, gathered: Any
    ) -> er_jax.PolicyParams:
        """Return what `drafted` made as it lies on the mesh of rollouts; no copy."""
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

        pair = er_jax.PolicyParams(policy=gathered, draft=params.draft)
        return jax.tree.map(leaf, pair)

    @staticmethod
    def _gathered(cut: NamedSharding) -> NamedSharding:
        whole = (None if axis == "fsdp" else axis for axis in cut.spec)
        return NamedSharding(cut.mesh, PartitionSpec(*whole))


def _shaped(x: Any, cut: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut)
