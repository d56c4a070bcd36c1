"""What every test runs under, and the fixtures that any of them may ask for.

Tests run on the CPU with strict dtype promotion, ranks never promoted silently and, by
pyproject.toml, warnings as errors. The persistent compilation cache is off, unless its
directory is named, as by the planted bugs and the slow part of `.ci/run`, which name an
empty one: a program that another version left on a disk proves nothing about this one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

# Read when jax and matplotlib are imported, and inherited by the processes tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# No test begins with costs that an earlier run has kept, or leaves any behind.
os.environ["ER_JAX_CACHE"] = ""

import jax
import pytest

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_enable_compilation_cache", False)
# Meshes are made of the CPU, eight times; all else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def x64() -> Iterator[None]:
    """Run the test with float64 enabled."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """Run the test with JAX's usual dtype promotion, which optax relies on."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class CompileCount:
    """The programs that XLA compiled while they were being counted.

    names: what was compiled, in order; for reading when a count is not as expected.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def count(self) -> int:
        """Programs compiled, those of single operations outside any jit included."""
        return len(self.names)

    def __repr__(self) -> str:
        return f"CompileCount({self.count}: {self.names})"


@contextlib.contextmanager
def count_compilations() -> Iterator[CompileCount]:
    """Count the compilations of this process, in whatever thread, inside the block."""
    compiled = CompileCount()

    def on_duration(event: str, duration_secs: float, **metadata: str | int) -> None:
        if event == COMPILE_EVENT:
            compiled.names.append(str(metadata.get("fun_name", "unnamed")))

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)


@pytest.fixture
def compile_counter() -> Callable[[], AbstractContextManager[CompileCount]]:
    """`with compile_counter() as compiled: ...`, then `compiled.count` programs."""
    # A JAX that reports compilations otherwise must not make every count a happy zero.
    with count_compilations() as probe:
        jax.jit(lambda x: x + 1).lower(1).compile()
    assert probe.count == 1, f"this JAX does not report {COMPILE_EVENT}"
    return count_compilations
