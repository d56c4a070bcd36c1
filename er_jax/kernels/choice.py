"""Which implementation of attention a program uses where its queries are few.

`XLA` is the form of `attention`, which runs everywhere. A platform may have a kernel
beside it. A program names one when it is traced (`using`); for arrays that a kernel
does not take the program has the form of XLA, and the log says why.

Left out: whether a kernel does on a device what it should (`engine.first_use`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp

from er_jax.devices import is_cuda
from er_jax.kernels import cuda, tpu

# What a caller may ask for: the kernel of the platform where there is one and it
# passes its check; never; or always, and an error where that cannot be.
AttentionChoice = Literal["auto", "xla", "kernel"]
ATTENTION_CHOICES: tuple[str, ...] = get_args(AttentionChoice)

XLA = "xla"


class Kernel(Protocol):
    """A module with a kernel.

    refusal: returns why it does not take these arrays, None if it does.
    attend: as `attention.attend`, but that queries are over the square root of D
      already, and that the results of padding mean nothing.
    """

    refusal: Callable[..., str | None]
    attend: Callable[..., jax.Array]


# By the platform whose name the implementation has.
KERNELS: dict[str, Kernel] = {"tpu": tpu, "cuda": cuda}

_log = logging.getLogger(__name__)
_used: contextvars.ContextVar[str] = contextvars.ContextVar("kernel", default=XLA)


def platform_of(device: jax.Device) -> str:
    """Return the platform of a device, as kernels are named by it."""
    if device.platform == "gpu":
        return "cuda" if is_cuda(device) else "rocm"
    return device.platform


def on_platform(choice: str, platform: str) -> str:
    """Return the implementation for a platform, `XLA` or a name in `KERNELS`.

    Args:
      choice: an `AttentionChoice`. platform: "tpu", "cuda" or another.
    Raises:
      ValueError: a kernel was asked for, and the platform has none.
    """
    if choice == "xla" or (choice == "auto" and platform not in KERNELS):
        return XLA
    if platform not in KERNELS:
        raise ValueError(
            f"attention='kernel' asks for a kernel, and {platform} has none; use "
            "'auto' or 'xla'"
        )
    return platform


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Use an implementation in what is traced meanwhile; `XLA` without it."""
    token = _used.set(name)
    try:
        yield
    finally:
        _used.reset(token)


def used() -> str:
    """Return the implementation of the program that is being traced."""
    return _used.get()


def traced_with(name: str, function: Any) -> Any:
    """Return a function that is traced with an implementation."""
    if name == XLA:
        return function

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with using(name):
            return function(*arguments)

    return run


def kernel_for(*arrays: jax.Array) -> Callable[..., jax.Array] | None:
    """Return the kernel that the program being traced uses for these arrays.

    Args:
      arrays: queries, keys, values and positions, as for `attention.attend`.
    Returns:
      A function of such arrays, the queries over the square root of D; or None, where
      the form of XLA is to be used.
    """
    name = used()
    if name == XLA:
        return None
    reason = KERNELS[name].refusal(*arrays)
    if reason is None:
        return functools.partial(_attend, name)
    _explain(name, reason)
    return None


def _attend(
    name: str,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """Attend by a kernel; padding returns zeros."""
    out = KERNELS[name].attend(query, keys, values, positions)
    return jnp.where((positions >= 0)[..., None], out, jnp.zeros((), out.dtype))


@functools.cache
def _explain(name: str, reason: str) -> None:
    """Log once why a kernel is not used; a program asks for every layer."""
    _log.info("attention by XLA, not by the kernel for %s: %s", name, reason)
