"""Experts of which every device of the axis `model` holds a part.

Every device runs its part of each chosen expert, and one sum over the axis follows. The
compiler alone would sum inside the loop, once for each expert.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from er_jax.drafter import QuantizedWeight
from er_jax.experts import Act, Weights, mix_whole
from er_jax.mesh.rules import MODEL_AXIS


def mix_by_parts(
    x: jax.Array, shares: jax.Array, weights: Weights, act: Act, num_chosen: int
) -> jax.Array:
    """Return the sum of the experts' outputs; see `experts.mix_whole`.

    It runs inside `MeshLayout.over_rows`, which has mapped the program over `data`.
    """
    if jax.sharding.get_abstract_mesh().shape[MODEL_AXIS] == 1:
        return mix_whole(x, shares, weights, act, num_chosen)

    def run(x: jax.Array, shares: jax.Array, weights: Weights) -> jax.Array:
        return lax.psum(mix_whole(x, shares, weights, act, num_chosen), MODEL_AXIS)

    gate, up, down = weights
    replicated = PartitionSpec()
    return jax.shard_map(
        run,
        in_specs=(
            replicated,
            replicated,
            (_spec(gate, 2), _spec(up, 2), _spec(down, 1)),
        ),
        out_specs=replicated,
        axis_names={MODEL_AXIS},
        check_vma=False,
    )(x, shares, weights)


def _spec(weight: Any, axis: int) -> Any:
    """Return the partition of a weight `[E, in, out]` with this axis in parts."""
    if not isinstance(weight, QuantizedWeight):
        return PartitionSpec(*(MODEL_AXIS if i == axis else None for i in range(3)))
    # Codes are `[E, out, in]`, or `[E, out, in/g, g]`; one scale for all of `in` is
    # the same on all devices.
    own = 3 - axis

    def leaf(x: jax.Array) -> PartitionSpec:
        is_split = x.shape[own] > 1
        names = (MODEL_AXIS if i == own and is_split else None for i in range(x.ndim))
        return PartitionSpec(*names)

    return jax.tree.map(leaf, weight)
