"""Compiled programs on a disk, so that a new process need not trace them.

JAX's own cache saves the compilation. Tracing and lowering, most of what is left, are
done again for every program; of many short processes that is nearly all of their time.

The names that engines give to their programs say all that an engine knows; a store is
for one policy, and is told what else decides the programs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from er_jax.engine.engine import Engine
from er_jax.engine.programs import CompiledProgram

# What a program that was loaded is said to have taken to compile.
LOADED_S = 0.01

# What takes longer to compile is kept in JAX's cache; nothing takes so long.
LEAST_S = "jax_persistent_cache_min_compile_time_secs"
NEVER_S = 1e9

Compile = Callable[[Engine, tuple[Any, ...], Any, Callable[[Any], Any]], Any]


def use(folder: Path, about: str) -> None:
    """Have all engines of this process load programs from a folder, and add to it.

    Not to be undone: for a process of its own. What is compiled outside of engines is
    in JAX's cache there; what it loads could not be stored, so engines do not use it.

    Args:
      folder: that exists. about: what decides the programs and is in no name: the
        policy, its arrays, and the mesh.
    """
    jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update(LEAST_S, 0)
    compile_: Compile = Engine._program

    def program(
        engine: Engine, name: tuple[Any, ...], function: Any, lower: Any
    ) -> CompiledProgram:
        key = engine._key(*name)
        found = engine.compiled.get(key)
        if found is not None:
            return found
        digest = hashlib.sha256(repr((about, key)).encode()).hexdigest()
        path = folder / digest
        with path.with_suffix(".lock").open("w") as lock:
            # Only one process compiles it; a lock ends with its process.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                loaded = CompiledProgram(_loaded(path), LOADED_S)
                return engine._executables.program(key, lambda: (loaded, LOADED_S))
            jax.config.update(LEAST_S, NEVER_S)
            try:
                found = compile_(engine, name, function, lower)
            finally:
                jax.config.update(LEAST_S, 0)
            _store(path, found.call)
            return found

    Engine._program = program  # type: ignore[method-assign, assignment]


def _store(path: Path, call: Any) -> None:
    """Write a program, whole or not at all; it names its devices in their order."""
    devices = [device.id for device in call.runtime_executable().local_devices()]
    data = pickle.dumps((devices, serialize_executable.serialize(call)))
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(data)
    part.replace(path)


def _loaded(path: Path) -> Any:
    devices, (data, arguments, results) = pickle.loads(path.read_bytes())
    by_id = {device.id: device for device in jax.devices()}
    used = [by_id[number] for number in devices]
    return serialize_executable.deserialize_and_load(
        data, arguments, results, execution_devices=used
    )
