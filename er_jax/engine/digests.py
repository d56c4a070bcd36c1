"""Digests: 16 hex digits that tell whether two sets of arrays are the same.

Journals are refused by digest where the parameters are others, checkpoints of training
are checked by it. A leaf is read once, where it lies; one program per shape.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def tree_digest(tree: Any) -> str:
    """Return 16 hex digits that change when any bit of any array of `tree` does.

    Each array is read once, on the devices that hold it. The digest does not depend on
    how an array is sharded: it is made of integer sums, whose order does not matter.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    total = hashlib.sha256()
    for (path, leaf), sums in zip(
        leaves,
        jax.device_get([_hashed(_bits(leaf)) for _, leaf in leaves]),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        total.update(f"{name} {leaf.dtype} {leaf.shape} {sums[0]} {sums[1]}".encode())
    return total.hexdigest()[:16]


def _bits(leaf: Any) -> Any:
    """Return a NumPy array as integers of at most 32 bits; a JAX array as it is.

    JAX would convert a 64-bit NumPy array to 32 bits unless x64 is enabled.
    """
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.ascontiguousarray(leaf)
    is_wide = array.dtype.itemsize == 8
    return array[..., None].view(np.uint32) if is_wide else array


@jax.jit
def _hashed(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return two sums, uint32 `[]`, of the array's words, each mixed with its index.

    Source: the mixing is the 32-bit finalizer of Appleby's MurmurHash3, a bijection.
    """
    if leaf.dtype in (jnp.bool_, jnp.int4, jnp.uint4):  # not of whole bytes
        leaf = leaf.astype(jnp.uint8)
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
    words = lax.bitcast_convert_type(leaf, kinds[leaf.dtype.itemsize])
    words = words.astype(jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        along = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += along * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]

    def mixed(x: jax.Array) -> jax.Array:
        x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> jnp.uint32(16))

    first = mixed(words ^ mixed(index))
    second = mixed(first + jnp.uint32(0x9E3779B9))
    return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)
