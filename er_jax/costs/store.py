"""Costs kept on disk between processes, one file for each device, policy and draft.

A file is named by the conditions of its costs. The least recently used files are
deleted. Left out: the format (`record`), measuring (`timing`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from er_jax.costs.table import LatencyTable
from er_jax.drafter import PolicyParams
from er_jax.engine.engine import Engine
from er_jax.engine.programs import signature
from er_jax.types import Cache, Policy

# The environment variable that names the directory of costs; empty, none are kept.
CACHE_VARIABLE = "ER_JAX_CACHE"

# Files to keep, the most recently used; characters of a policy's text in a file; age in
# seconds from which an unfinished file counts as left by a killed process.
MAX_FILES = 128
MAX_DESCRIPTION = 1000
ABANDONED_S = 3600.0
OUR_FILES = re.compile(r"costs-[0-9a-f]{16}\.json(\.[\w.-]+\.part)?")


def conditions(engine: Engine, params: PolicyParams) -> dict[str, str]:
    """Return the conditions of measured costs: device, versions, policy, draft."""
    # Imported here: the package imports this module before it sets its version.
    from er_jax import __version__

    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "device": kind,
        "jax": jax.__version__,
        "er_jax": __version__,
        "policy": _described(engine.policy),
        "accept": engine.accept,
        "layout": engine.layout.name,
        "parameters": _digest(signature(params.policy)),
        "draft": _digest(signature(params.drafts if params.others else params.draft)),
        "cache": _digest(signature(_position(engine.policy))),
    }


def _position(policy: Policy) -> Cache:
    """Return the shapes of a policy's cache for one position of one row."""
    return jax.eval_shape(lambda: policy.init_cache(1, 1))


def _described(policy: Policy) -> str:
    """Return a policy as text, the same in every process; a long one is shortened."""
    kind = type(policy)
    text = f"{kind.__module__}.{kind.__qualname__}: {_text(policy)}"
    if len(text) <= MAX_DESCRIPTION:
        return text
    return f"{text[:MAX_DESCRIPTION]}... and more, {_digest(text)}"


def _text(value: Any) -> str:
    """Return the repr of a value without addresses, which differ between processes."""
    return re.sub(r"\bat 0x[0-9a-fA-F]+", "at an address", repr(value))


def _digest(value: Any) -> str:
    return hashlib.sha256(_text(value).encode()).hexdigest()[:16]


def cache_directory() -> Path | None:
    """Return the directory of costs kept between processes.

    It is the one named by `ER_JAX_CACHE`, by default one in the user's cache directory;
    None if the variable is empty.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = os.environ.get(CACHE_VARIABLE, str(Path(caches, "er_jax")))
    return Path(directory) if directory else None


def cache_path(about: Mapping[str, str]) -> Path | None:
    """Return the file for costs under these conditions, None if none are kept.

    Its name does not depend on versions, so costs of an older version are found,
    refused and replaced.
    """
    directory = cache_directory()
    named = [about[name] for name in about if name not in ("jax", "er_jax")]
    return directory / f"costs-{_digest(named)}.json" if directory else None


def load_costs(engine: Engine, params: PolicyParams) -> LatencyTable | None:
    """Return the costs kept on disk; with several processes, on the leader's disk.

    Args:
      engine, params: their conditions are those that the costs must have.
    Returns:
      The costs, None if there are none.
    Warns:
      RuntimeWarning: the costs are damaged or of other versions, and are not used.
    """
    found = text = None
    if engine.agreement.is_leader:
        about = conditions(engine, params)
        path = cache_path(about)
        if path is not None and path.is_file():
            try:
                found, text = LatencyTable.load(path, about), path.read_text("utf-8")
            except (ValueError, OSError) as error:
                warnings.warn(f"kept costs are not used: {error}", RuntimeWarning, 4)
            with contextlib.suppress(OSError):
                os.utime(path)  # Marks the file as used.
    text = engine.agreement.broadcast_text(text)
    if text is None or not engine.agreement.is_spread:
        return found
    # Every process reads this one text: the file may have been replaced meanwhile.
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "costs.json")
        copy.write_text(text, "utf-8")
        return LatencyTable.load(copy)


def save_costs(engine: Engine, params: PolicyParams, table: LatencyTable) -> None:
    """Keep costs on disk for the next process, if they have changed enough.

    The least recently used files beyond `MAX_FILES` are deleted.

    Args:
      engine, params: the conditions of the costs. table: the costs.
    Warns:
      RuntimeWarning: they cannot be written.
    """
    # Called after every rollout, so the conditions are found only if they are needed.
    if cache_directory() is None or not engine.agreement.is_leader:
        return
    if not table.is_dirty:
        return
    about = conditions(engine, params)
    path = cache_path(about)
    assert path is not None
    try:
        table.save(path, about)
        _prune(path)
    except OSError as error:
        warnings.warn(
            f"costs cannot be kept for the next process: {error}; name a directory "
            f"that can be written in {CACHE_VARIABLE}, or set it to nothing",
            RuntimeWarning,
            stacklevel=4,
        )


def _prune(latest: Path) -> None:
    """Delete the least recently used costs, and abandoned unfinished files.

    Only files with names of this module are touched; two processes may do so at once.
    """
    used_s: dict[Path, float] = {}
    for path in latest.parent.iterdir():
        if path != latest and OUR_FILES.fullmatch(path.name):
            with contextlib.suppress(OSError):
                used_s[path] = path.stat().st_mtime
    finished = [path for path in used_s if path.suffix == ".json"]
    finished.sort(key=used_s.__getitem__, reverse=True)
    unfinished = used_s.keys() - set(finished)
    abandoned = [p for p in unfinished if used_s[p] < time.time() - ABANDONED_S]
    for path in [*finished[MAX_FILES - 1 :], *abandoned]:
        with contextlib.suppress(OSError):
            path.unlink()
