"""The bytes that a pass must read, counted from shapes.

A program with static shapes reads every weight that it multiplies with once (a
quantized one as its codes and scales), and every cache entry of every row once.

Left out: the embedding table, of which a pass looks up a few rows, the activations, and
the logits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.lib.passes import Pass
from er_jax import QuantizedWeight, TiedEmbedding
from er_jax.types import Params, Policy


def weight_bytes(params: Params) -> int:
    """Return the bytes of weights that one pass multiplies with.

    Args:
      params: of a policy or a draft, arrays or shapes. A table below a key with "embed"
        in it is not counted, unless it is the projection as well.
    """

    def is_weight(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedWeight | TiedEmbedding)

    total = 0
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
    for path, leaf in leaves:
        if isinstance(leaf, TiedEmbedding):
            total += size_of(leaf.table if leaf.projection is None else leaf.projection)
        elif "embed" not in jax.tree_util.keystr(path):
            total += size_of(leaf)
    return total


def size_of(tree: Any) -> int:
    """Return the bytes of a pytree of arrays or shapes; int4 counts half a byte."""
    return sum(-(-leaf.size * _bits(leaf.dtype) // 8) for leaf in jax.tree.leaves(tree))


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.dtype(dtype).itemsize * 8


def cache_bytes(policy: Policy, rows: int, cache_length: int) -> int:
    """Return the bytes of a cache."""
    return size_of(jax.eval_shape(lambda: policy.init_cache(rows, cache_length)))


def pass_bytes(pass_: Pass, target: int, draft: int, cache: int) -> int:
    """Return the bytes a pass must read.

    Args:
      pass_: what runs. target, draft: bytes of the weights of each. cache: bytes of the
        cache.
    """
    if pass_.kind == "draft":
        return draft + cache
    drafts = pass_.gamma if pass_.kind == "round" else 0
    return target + cache + drafts * (draft + cache)
