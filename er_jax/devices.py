"""The device of programs without a mesh, bytes of arrays, memory of devices."""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import jax.numpy as jnp


def default_device() -> jax.Device:
    """Return the device that programs without a mesh run on."""
    config: Any = jax.config
    device = config.jax_default_device
    if isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device or jax.local_devices()[0]


def is_cuda(device: jax.Device) -> bool:
    """Whether a device is an NVIDIA GPU; those of AMD have the same platform."""
    return device.platform == "gpu" and "cuda" in device.client.platform_version


def device_bytes(tree: Any) -> int:
    """Return the bytes of arrays, or of their shapes and shardings, on one device."""

    def size(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        entries = math.prod(shape)
        return entries // 2 if x.dtype == jnp.int4 else entries * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def device_memory_bytes() -> int | None:
    """Return the memory of the default device in bytes, None where it is unknown."""
    device = default_device()
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return host_memory_bytes() if device.platform == "cpu" else None


def host_memory_bytes() -> int | None:
    """Return the memory of this host in bytes, None where it is unknown."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
