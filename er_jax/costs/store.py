"""Costs kept on disk between processes, one file for each device, policy and draft.

A file is named by what its seconds hold for. Files used longest ago are dropped. Left
out: the format (`record`), measuring (`timing`).
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

# Names the directory in which costs are kept between processes; nothing keeps none.
CACHE_VARIABLE = "ER_JAX_CACHE"

# So many files are kept there, those that were used last, and the text of a policy in
# one is cut at so many characters. A file that was not finished after so many seconds
# is of a process that was killed.
MAX_FILES = 128
MAX_DESCRIPTION = 1000
ABANDONED_S = 3600.0
OUR_FILES = re.compile(r"costs-[0-9a-f]{16}\.json(\.[\w.-]+\.part)?")


def conditions(engine: Engine, params: PolicyParams) -> dict[str, str]:
    """Return what measured costs hold for: device, versions, policy, draft."""
    # Not above: the package imports this module before it knows its version.
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
        "draft": _digest(signature(params.draft)),
        "cache": _digest(signature(_position(engine.policy))),
    }


def _position(policy: Policy) -> Cache:
    """Return the shapes of a policy's cache, for one position of one row."""
    return jax.eval_shape(lambda: policy.init_cache(1, 1))


def _described(policy: Policy) -> str:
    """Return what a policy is, the same in every process; of a long text the start."""
    kind = type(policy)
    text = f"{kind.__module__}.{kind.__qualname__}: {_text(policy)}"
    if len(text) <= MAX_DESCRIPTION:
        return text
    return f"{text[:MAX_DESCRIPTION]}... and more, {_digest(text)}"


def _text(value: Any) -> str:
    """Return a value's text without addresses, which are others in every process."""
    return re.sub(r"\bat 0x[0-9a-fA-F]+", "at an address", repr(value))


def _digest(value: Any) -> str:
    return hashlib.sha256(_text(value).encode()).hexdigest()[:16]


def cache_directory() -> Path | None:
    """Return where costs are kept between processes.

    In the directory named by `ER_JAX_CACHE`, else in the user's cache directory; None
    where that variable is set to nothing.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    place = os.environ.get(CACHE_VARIABLE, str(Path(caches, "er_jax")))
    return Path(place) if place else None


def cache_path(about: Mapping[str, str]) -> Path | None:
    """Return the file for costs of such a device and policy, None if none are kept.

    Versions are not part of its name, so what an older one measured is found, refused
    and replaced.
    """
    directory = cache_directory()
    named = [about[name] for name in about if name not in ("jax", "er_jax")]
    return directory / f"costs-{_digest(named)}.json" if directory else None


def load_costs(engine: Engine, params: PolicyParams) -> LatencyTable | None:
    """Return the costs kept on disk; of several processes, on the leader's disk.

    Args:
      engine, params: what they must hold for.
    Returns:
      The costs, None if there are none.
    Warns:
      RuntimeWarning: what was kept is of other versions or damaged; measured again.
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
                os.utime(path)  # It was used: others are dropped before it.
    text = engine.agreement.broadcast_text(text)
    if text is None or not engine.agreement.is_spread:
        return found
    # All of them from one text: the file may have been replaced meanwhile.
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "costs.json")
        copy.write_text(text, "utf-8")
        return LatencyTable.load(copy)


def save_costs(engine: Engine, params: PolicyParams, table: LatencyTable) -> None:
    """Keep costs on disk for the next process, if they have changed enough.

    Of the files kept there, those that were not used for longest are dropped; see
    `MAX_FILES`.

    Args:
      engine, params: what they hold for. table: the costs.
    Warns:
      RuntimeWarning: they cannot be written.
    """
    # Asked after every rollout: what names the file is only found if there is one.
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
    """Drop the costs that were used longest ago, and what was never finished.

    Only files whose names are ours; two processes may do so at once.
    """
    used_s: dict[Path, float] = {}
    for path in latest.parent.iterdir():
        if path != latest and OUR_FILES.fullmatch(path.name):
            with contextlib.suppress(OSError):
                used_s[path] = path.stat().st_mtime
    whole = [path for path in used_s if path.suffix == ".json"]
    whole.sort(key=used_s.__getitem__, reverse=True)
    parts = used_s.keys() - set(whole)
    old = [path for path in parts if used_s[path] < time.time() - ABANDONED_S]
    for path in [*whole[MAX_FILES - 1 :], *old]:
        with contextlib.suppress(OSError):
            path.unlink()
