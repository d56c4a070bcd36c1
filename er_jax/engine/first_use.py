"""The implementation of attention on a device: its kernel only if it computes right.

At its first use in a process a kernel is compared with the form of XLA, on the device
itself: a few rows, queries at the bounds of blocks, padding, an entry that is not
finite. If it fails or differs beyond rounding, the form of XLA is used, and one warning
says so. Programs compiled for devices that are not present are compared with nothing.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from er_jax import attention
from er_jax.kernels import choice

# Sizes of the comparison: B, H, K, D and S. No whole number of blocks, so that one is
# cut off; few enough that every entry weighs something.
ROWS, HEADS, KV_HEADS, SIZE, LENGTH = 4, 4, 2, 128, 1152

# Greatest difference beside the greatest number of a query's result. Both round the
# weights to 8 bits, and the result.
TOLERANCE = 2.0**-5

_found: dict[tuple[str, str], str | None] = {}
"""What is wrong with a kernel on a kind of device; None is nothing."""

_lock = threading.Lock()


def implementation(wanted: str, device: jax.Device) -> str:
    """Return the implementation for the programs of a device of this process.

    Args:
      wanted: a `choice.AttentionChoice`. device: runs the comparison, at the first call
        with a device of its kind.
    Raises:
      ValueError: a kernel was asked for, and there is none or it fails.
    Warns:
      RuntimeWarning: a kernel fails, the first time that it is found out.
    """
    name = choice.on_platform(wanted, choice.platform_of(device))
    if name == choice.XLA:
        return name
    kind = (name, device.device_kind)
    with _lock:
        is_new = kind not in _found
        if is_new:
            _found[kind] = _problem(name, device)
    problem = _found[kind]
    if problem is None:
        return name
    if wanted == "kernel":
        raise ValueError(
            f"attention='kernel', and the kernel for {name} fails on this "
            f"{device.device_kind}: {problem}; use 'auto' or 'xla'"
        )
    if is_new:
        warnings.warn(
            f"the attention kernel for {name} is not used on this "
            f"{device.device_kind}: {problem}. XLA's form is used instead, which is "
            "slower where caches are long; attention='xla' asks for it",
            RuntimeWarning,
            stacklevel=3,
        )
    return choice.XLA


def _problem(name: str, device: jax.Device) -> str | None:
    """Compare a kernel with the form of XLA; return what is wrong, None for nothing."""
    try:
        for num_queries in (5, 1):
            arrays = _case(num_queries)
            found = _attended(name, arrays, device)
            wanted = _attended(choice.XLA, arrays, device)
            if (problem := _difference(found, wanted)) is not None:
                return f"{problem} ({num_queries} queries a row)"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _case(num_queries: int) -> list[np.ndarray]:
    """Return queries, keys, values, positions; in row 2, an entry is not finite.

    Entries at the queries' positions and behind them are larger than all others: one
    too many or too few shows.
    """
    rng = np.random.default_rng(0)
    query = rng.normal(size=(ROWS, num_queries, HEADS, SIZE))
    keys, values = rng.normal(size=(2, ROWS, LENGTH, KV_HEADS * SIZE))
    # Up to the cache's end; across a bound of blocks; a short row with padding.
    ends = np.array([LENGTH - 1, 1024, 300, 40])
    positions = ends[:, None] - np.arange(num_queries)[::-1][None]
    positions[3, 1:] = -1
    for row in range(ROWS):
        at = positions[row, 0]
        values[row, max(at - 1, 0) : at + num_queries + 2] *= 32
    keys[2, 290, 7] = -np.inf
    arrays = [x.astype(jnp.bfloat16) for x in (query, keys, values)]
    return [*arrays, positions.astype(np.int32)]


def _attended(name: str, arrays: list[np.ndarray], device: jax.Device) -> np.ndarray:
    """Return attention by an implementation, float32; XLA's with float32 products."""
    if name == choice.XLA:
        arrays = [x.astype(np.float32) for x in arrays[:3]] + arrays[3:]

    def attend(*arrays: Any) -> jax.Array:
        with choice.using(name), jax.default_matmul_precision("highest"):
            return attention.attend_whole(*arrays)

    with jax.default_device(device):
        out = jax.jit(attend)(*arrays)
    return np.asarray(out, np.float32)


def _difference(found: np.ndarray, wanted: np.ndarray) -> str | None:
    """Return how results `[B, T, H * D]` differ beyond rounding, or None."""
    is_bad = np.arange(ROWS) == 2
    if np.isfinite(found[is_bad]).any():
        return "an entry that is not finite does not show in its result"
    found, wanted = found[~is_bad], wanted[~is_bad]
    if not np.isfinite(found).all():
        return "its result is not finite"
    scale = np.abs(wanted).max(axis=-1, keepdims=True)
    # Padding is zero, exactly.
    difference = np.abs(found - wanted) / np.where(scale == 0, 1e-30, scale)
    if difference.max() > TOLERANCE:
        return f"it differs from XLA's by {difference.max():.2g} of the largest number"
    return None
