"""Attention over a cache whose heads are sharded over `model`.

Every device attends with its own heads. The compiler alone would split the merged
product of `attention.attend` within heads, and sum the scores over the axis.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from er_jax.attention import MERGED_QUERIES, attend_whole
from er_jax.kernels import choice
from er_jax.mesh.rules import AXES, DATA_AXIS, MODEL_AXIS
from er_jax.types import Span


def attend_by_heads(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    span: Span | None,
) -> jax.Array:
    """Attend with the heads sharded over `model`; see `attention.attend_whole`.

    It runs inside `MeshLayout.over_rows`, which has mapped the program over `data`.
    """
    parts = jax.sharding.get_abstract_mesh().shape[MODEL_AXIS]
    # The compiler cannot partition a kernel: around it, all axes are mapped.
    is_few = span is None and query.shape[1] <= MERGED_QUERIES
    is_kernel = is_few and choice.used() != choice.XLA
    mapped = {axis for axis in AXES if axis != DATA_AXIS} if is_kernel else {MODEL_AXIS}
    if parts == 1 and not is_kernel:
        return attend_whole(query, keys, values, positions, span)
    heads, size = query.shape[2:]
    kv_heads = keys.shape[2] // size
    split, replicated = PartitionSpec(None, None, MODEL_AXIS), PartitionSpec()
    if heads % parts:
        # The heads cannot be divided: every device computes all of them.
        function, queries, entries = attend_whole, replicated, replicated
    elif kv_heads % parts:
        # Key/value heads are replicated; a device uses those of its query heads.
        function = functools.partial(_attend_some, group=heads // kv_heads)
        queries, entries = split, replicated
    else:
        function, queries, entries = attend_whole, split, split
    return jax.shard_map(
        functools.partial(function, span=span),
        in_specs=(queries, entries, entries, replicated),
        out_specs=queries,
        axis_names=mapped,
        check_vma=False,
    )(query, keys, values, positions)


def _attend_some(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    group: int,
    span: Span | None,
) -> jax.Array:
    """Attend with this device's query heads and replicated key/value heads.

    The key/value heads of its queries are picked from the cache first, which costs one
    more read. group: query heads per key/value head.
    """
    batch, length, _ = keys.shape
    heads, size = query.shape[2:]
    # If the query heads do not align with key/value heads, each gets its own copy.
    is_aligned = heads % group == 0 or group % heads == 0
    count = max(heads // group, 1) if is_aligned else heads
    first = lax.axis_index(MODEL_AXIS) * heads
    own = (first + jnp.arange(count, dtype=jnp.int32) * (heads // count)) // group

    def pick(entries: jax.Array) -> jax.Array:
        split = entries.reshape(batch, length, -1, size)
        return jnp.take(split, own, axis=2).reshape(batch, length, count * size)

    return attend_whole(query, pick(keys), pick(values), positions, span)
