"""The record of a benchmark's run: what it holds, where it is written, its figure.

A record is JSON. It says under which settings and on what its points were measured:
device, versions, commit, whether files differed from the commit.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import er_jax
from er_jax.costs.store import CACHE_VARIABLE
from er_jax.figures import new_figure

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "runs" / "benchmarks"

SCHEMA = 1

# A number cannot be quoted without these: `save` refuses points that lack one.
CONDITIONS = ("preset", "rows", "dtype")


def results_dir(out: Path | None, quick: bool) -> Path:
    """Return where results go: quick runs never overwrite those that are quoted."""
    return out or (QUICK_RESULTS if quick else RESULTS)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def is_dirty() -> bool | None:
    """Whether files other than results differ from the commit; None outside git."""
    status = _git("status", "--porcelain")
    if status is None:
        return None
    paths = [line[3:] for line in status.splitlines()]
    return any(not path.startswith("benchmarks/results/") for path in paths)


def _processor() -> str:
    """Return the processor's name and the vector units that decide int8 speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in lines)
    }
    units = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "amx_bf16")
    flags = set(found.get("flags", "").split())
    words = [found.get("model name", platform.machine())]
    return " ".join(words + [unit for unit in units if unit in flags])


def environment() -> dict[str, Any]:
    """Return what the numbers of this process depend on."""
    device = jax.devices()[0]
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "numpy", "flax", "aqtp")
    }
    versions["er-jax"] = er_jax.__version__  # known even where it is not installed
    try:
        load = round(os.getloadavg()[0], 2)
    except OSError:
        load = None
    return {
        "device_kind": device.device_kind,
        "platform": device.platform,
        "num_devices": jax.device_count(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_before": load,
        "python": platform.python_version(),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": is_dirty(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def settings_of(args: Any, *left_out: str) -> dict[str, Any]:
    """Return a script's arguments for its record, without `out` and those left out.

    Args:
      args: a dataclass with a field `out`. left_out: names of other fields.
    """
    found = dataclasses.asdict(args)
    for name in ("out", *left_out):
        del found[name]
    return found


def new_record(benchmark: str, settings: Any) -> dict[str, Any]:
    """Return a record with no points yet.

    From here on this process, and those that it starts, neither read nor write the
    library's cache of costs, so earlier processes have no influence on the results.

    Args:
      benchmark: name of the script.
      settings: JSON-ready values the script ran under.
    """
    os.environ[CACHE_VARIABLE] = ""
    return {
        "benchmark": benchmark,
        "schema": SCHEMA,
        "environment": environment(),
        "settings": settings,
        "points": [],
    }


def problems(record: Mapping[str, Any]) -> list[str]:
    """Return what a record lacks to be quoted, in words."""
    bad = [
        f"the record has no {key!r}"
        for key in ("benchmark", "schema", "environment", "settings", "points")
        if key not in record
    ]
    for key in ("device_kind", "versions", "commit", "dirty"):
        if key not in record.get("environment", {}):
            bad.append(f"the environment has no {key!r}")
    for index, point in enumerate(record.get("points", [])):
        bad += [
            f"point {index} has no {key!r}" for key in CONDITIONS if key not in point
        ]
    return bad


def save(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, whole or not at all.

    Raises:
      ValueError: it lacks something that a number may not be quoted without.
    """
    bad = problems(record)
    if bad:
        raise ValueError(f"{path.name} cannot be written: {'; '.join(bad)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_rounded(record), indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def _rounded(value: Any) -> Any:
    """Round floats to five digits; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value


def conditions(record: Mapping[str, Any]) -> str:
    """Return the line under a table or figure: device, versions, commit."""
    found = record["environment"]
    commit = (found["commit"] or "no commit")[:10] + ("+" if found["dirty"] else "")
    device = found["device_kind"]
    if found["platform"] == "cpu":
        device = f"{found['cores']} cores, {found['processor']}"
    return f"{device}; jax {found['versions']['jax']}; {commit}"


def figure(columns: int, rows: int = 1, *, width: float = 4.6) -> tuple[Any, Any]:
    """Return a matplotlib figure that needs no display, and its axes `[rows, columns]`.

    Args:
      columns, rows: of axes. width: of each, in inches.
    Raises:
      ImportError: matplotlib is missing; install the extra `plot`.
    """
    picture = new_figure(width * columns, 3.6 * rows)
    return picture, picture.subplots(rows, columns, squeeze=False)


def save_figure(picture: Any, record: Mapping[str, Any], path: Path) -> None:
    """Put the conditions of a record over its figure, and save it."""
    picture.suptitle(conditions(record), fontsize="small")
    picture.savefig(path, dpi=110)
