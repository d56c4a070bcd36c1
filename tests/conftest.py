"""What every test runs under, and the fixtures that any of them may ask for.

Tests run on the CPU with strict dtype promotion, ranks never promoted silently and, by
pyproject.toml, warnings as errors. What XLA compiles is kept in a directory that is
empty at first, shared by all processes of the run (those of pytest-xdist and those that
tests start) and removed at its end: a program that another version left on a disk
proves nothing about this one. `compile_counter` counts what is asked of the compiler,
be it found there or not.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

# Read when jax and matplotlib are imported, and inherited by the processes tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# No test begins with costs that an earlier run has kept, or leaves any behind.
os.environ["ER_JAX_CACHE"] = ""
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="er_jax_programs_")
    atexit.register(_programs.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Most of the time is XLA's. With its older emitters, and code in one part, it needs
# half of it: many parts are for idle cores. Where XLA_FLAGS is set, be it to nothing,
# it stays as it is. XLA ends a process for a flag that it does not know.
QUICK_FLAGS = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
if "XLA_FLAGS" not in os.environ:
    _known = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "XLA_FLAGS": QUICK_FLAGS},
        capture_output=True,
    )
    os.environ["XLA_FLAGS"] = "" if _known.returncode else QUICK_FLAGS

import jax  # noqa: E402
import pytest  # noqa: E402

# Meshes are made of the CPU, eight times; all else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of the garbage collections to come.

    And collect less often: tracing makes many objects, few of which are garbage.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


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


@contextlib.contextmanager
def without_optimizer() -> Iterator[None]:
    """Compile without XLA's optimizer, which is most of the time.

    For tests of what holds at either level, such as how many programs there are; what
    programs compute, other tests show at the level that is XLA's default.
    """
    from er_jax.engine.kept import forget_engines

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    forget_engines()
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
        forget_engines()


@pytest.fixture(scope="module")
def as_users_compile() -> Iterator[None]:
    """Have the module's engines compile as without `QUICK_FLAGS`, if these are set.

    But for a run without the optimizer, which is to be quick.
    """
    from er_jax.engine.kept import forget_engines

    is_optimized = not jax.config.read("jax_disable_most_optimizations")
    if not is_optimized or os.environ["XLA_FLAGS"] != QUICK_FLAGS:
        yield
        return
    compile_ = jax.stages.Lowered.compile

    def compile_so(
        lowered: jax.stages.Lowered, compiler_options: Any = None, **rest: Any
    ) -> jax.stages.Compiled:
        options = {"xla_cpu_use_fusion_emitters": True, **(compiler_options or {})}
        return compile_(lowered, options, **rest)

    forget_engines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", compile_so)
        yield
    forget_engines()


@pytest.fixture
def unoptimized() -> Iterator[None]:
    """Run the test `without_optimizer`."""
    with without_optimizer():
        yield


@pytest.fixture(scope="module")
def unoptimized_module() -> Iterator[None]:
    """Run the module's tests `without_optimizer`; they share engines as others do."""
    with without_optimizer():
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
