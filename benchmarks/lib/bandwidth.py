"""Memory bandwidth of the device: what its data sheet says, what a copy reaches."""

from __future__ import annotations

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
from jax import lax

from er_jax import devices

# Peak memory bandwidth in GB/s by device kind, from vendors' data sheets. The first
# name that the device kind contains counts.
PEAK_GB_PER_S: tuple[tuple[str, float], ...] = (
    ("A100-SXM4-40GB", 1555),
    ("A100-PCIE-40GB", 1555),
    ("A100", 2039),
    ("H100 PCIe", 2000),
    ("H100 NVL", 3900),
    ("H100", 3350),
    ("GH200", 4000),
    ("H200", 4800),
    ("B200", 8000),
    ("L40S", 864),
    ("L4", 300),
    ("A10", 600),
    ("V100", 900),
    ("T4", 320),
    ("TPU v4", 1228),
    ("TPU v5 lite", 819),
    ("TPU v5e", 819),
    ("TPU v5", 2765),
    ("TPU v6", 1638),
    ("TPU7x", 7380),
)


def peak_bytes_per_s(device_kind: str) -> float | None:
    """Return the peak memory bandwidth of a device kind, None where it is unknown."""
    for name, gigabytes in PEAK_GB_PER_S:
        if name.lower() in device_kind.lower():
            return gigabytes * 1e9
    return None


def copy_bytes_per_s(num_bytes: int, *, repeats: int = 5, passes: int = 8) -> float:
    """Return the best bandwidth of reading and writing a large array, in bytes/s.

    Args:
      num_bytes: size of the array; should be far above the size of every cache.
      repeats: readings, of which the fastest counts. passes: over the array, in one.
    """

    def run(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, passes, lambda _, x: x + 1, x)

    x = jnp.zeros(num_bytes // 4, jnp.float32)
    call = jax.jit(run, donate_argnums=0).lower(x).compile()
    x = jax.block_until_ready(call(x))
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        x = jax.block_until_ready(call(x))
        best = min(best, time.perf_counter() - start)
    return 2 * x.nbytes * passes / best


@dataclasses.dataclass(frozen=True)
class Device:
    """The best that the default device can do.

    peak_bytes_per_s: from the data sheet, None if unknown. copy_bytes_per_s: what a
      plain copy reaches. memory_bytes: None if unknown.
    """

    peak_bytes_per_s: float | None
    copy_bytes_per_s: float
    memory_bytes: int | None

    @classmethod
    def measured(cls, num_bytes: int) -> Device:
        """Measure the default device.

        Args:
          num_bytes: of the array that is copied; at most an eighth of the memory.
        """
        memory = devices.device_memory_bytes()
        return cls(
            peak_bytes_per_s=peak_bytes_per_s(jax.devices()[0].device_kind),
            copy_bytes_per_s=copy_bytes_per_s(min(num_bytes, (memory or 2**34) // 8)),
            memory_bytes=memory,
        )
