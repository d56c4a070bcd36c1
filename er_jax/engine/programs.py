"""Executables: compiled once each, by whichever thread wants one first."""

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
    """An executable, and what its compilation took here."""

    call: Callable[..., Any]
    compile_s: float


class ThreadCosts(threading.local):
    """What compilation has cost one thread.

    seconds: of compiling, and of waiting for others that did. compiled: name and
      seconds of all that this thread compiled, in order.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.compiled: list[tuple[tuple[Any, ...], float]] = []


class ExecutableCache:
    """What an engine has compiled, and how long that took."""

    def __init__(self) -> None:
        self.compiled: dict[tuple[Any, ...], CompiledProgram] = {}
        self.slowest_s: dict[str, float] = {}
        self.own = ThreadCosts()
        self.lock = threading.Lock()
        self._under_way: dict[tuple[Any, ...], threading.Lock] = {}

    def program(
        self, key: tuple[Any, ...], make: Callable[[], tuple[CompiledProgram, float]]
    ) -> CompiledProgram:
        """Return an executable, made first if it is not there.

        A thread that asks while another makes it waits; if that one fails it makes it
        itself. Other programs are made meanwhile.

        Args:
          key: its name. make: returns it, and the seconds that the next one of its
            kind is expected to take.
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
    """Return shapes and dtypes, with the sharding given for each leaf, if any is."""

    def leaf(x: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

    if shardings is None:
        return jax.tree.map(leaf, tree)
    return jax.tree.map(leaf, tree, shardings)


def signature(tree: Any) -> Hashable:
    """Return a hashable description of a pytree: structure, shapes, dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, x.dtype) for x in leaves)
