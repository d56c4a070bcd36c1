"""Executables, each compiled once by the first thread that needs it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class CompiledProgram:
    """An executable, and the seconds that this process took to compile it."""

    call: Callable[..., Any]
    compile_s: float


class ThreadCosts(threading.local):
    """The costs of compilation in one thread.

    seconds: spent compiling, and waiting for other threads that compiled.
    compiled: name and seconds of every program this thread compiled, in order.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.compiled: list[tuple[tuple[Any, ...], float]] = []


class ExecutableCache:
    """The executables of an engine, shared by threads.

    compiled: executables by name, in the order of compilation.
    slowest_s: expected seconds to compile one more program, by kind.
    own: costs of the calling thread.
    lock: guards the dictionaries.
    """

    def __init__(self) -> None:
        self.compiled: dict[tuple[Any, ...], CompiledProgram] = {}
        self.slowest_s: dict[str, float] = {}
        self.own = ThreadCosts()
        self.lock = threading.Lock()
        self._under_way: dict[tuple[Any, ...], threading.Lock] = {}

    def program(
        self, key: tuple[Any, ...], make: Callable[[], tuple[CompiledProgram, float]]
    ) -> CompiledProgram:
        """Return an executable, compiled first if necessary.

        A thread that asks while another compiles it waits; if that compilation fails,
        it compiles the program itself. Other programs can be compiled at the same time.

        Args:
          key: its name. make: compiles it; returns the executable, and the seconds that
            the next program of its kind is expected to take.
        """
        start = time.perf_counter()
        with self.lock:
            under_way = self._under_way.setdefault(key, threading.Lock())
        with under_way:
            found = self.compiled.get(key)
            if found is not None:
                self.own.seconds += time.perf_counter() - start
                return found
            found, expected_s = make()
            kind = key[0]
            with self.lock:
                self.compiled[key] = found
                self.slowest_s[kind] = max(expected_s, self.slowest_s.get(kind, 0.0))
                del self._under_way[key]
        self.own.seconds += found.compile_s
        self.own.compiled.append((key, found.compile_s))
        return found


def abstract(tree: Any, shardings: Any = None) -> Any:
    """Return shapes and dtypes, with a sharding for each leaf if they are given."""

    def leaf(x: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

    if shardings is None:
        return jax.tree.map(leaf, tree)
    return jax.tree.map(leaf, tree, shardings)


def signature(tree: Any) -> Hashable:
    """Return a hashable description of a pytree: structure, shapes, dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, x.dtype) for x in leaves)
