"""How everything here is measured and recorded.

Cases are run in turn within one process, warmed up and waited for, compilation apart;
what is reported is the median with its quartiles. Every record says on what it was
measured: device, versions, commit, whether the tree was dirty.

Left out: what is measured (`passes`, `workloads`).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

import er_jax
from er_jax.costs.store import CACHE_VARIABLE
from er_jax.figures import new_figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "runs" / "benchmarks"

SCHEMA = 1

# Peak memory bandwidth in GB/s by device kind, from vendors' sheets; first match wins.
PEAK_GB_PER_S: tuple[tuple[str, float], ...] = (
    ("A100-SXM4-40GB", 1555),
    ("A100-PCIE-40GB", 1555),
    ("A100", 2039),
    ("H100 PCIe", 2000),
    ("H100 NVL", 3900),
    ("H100", 3350),
    ("GH200", 4000),
    ("H200", 4800),
    ("B200", 8000),
    ("L40S", 864),
    ("L4", 300),
    ("A10", 600),
    ("V100", 900),
    ("T4", 320),
    ("TPU v4", 1228),
    ("TPU v5 lite", 819),
    ("TPU v5e", 819),
    ("TPU v5", 2765),
    ("TPU v6", 1638),
    ("TPU7x", 7380),
)

# What a number is worth nothing without; `save` refuses points that lack one.
CONDITIONS = ("preset", "rows", "dtype")


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median, quartiles, extremes and count of repeated readings."""
    array = np.asarray(list(values), float)
    q1, median, q3 = np.percentile(array, (25, 50, 75))
    return {
        "median": float(median),
        "q1": float(q1),
        "q3": float(q3),
        "min": float(array.min()),
        "max": float(array.max()),
        "num": int(array.size),
    }


def interleave(
    cases: Mapping[str, Callable[[], float]],
    repeats: int,
    *,
    seed: int = 0,
    desc: str | None = None,
) -> dict[str, list[float]]:
    """Run every case once per repeat, in a new order each time.

    Whatever else the machine does then falls on all cases alike, and none always runs
    behind the same other.

    Args:
      cases: name -> a function that returns its reading.
      repeats: readings of each case. seed: of the orders.
      desc: label of a progress bar; None shows none.
    Returns:
      name -> readings, in the order of repeats.
    """
    order = random.Random(seed)
    readings: dict[str, list[float]] = {name: [] for name in cases}
    with tqdm(total=repeats * len(cases), desc=desc, disable=desc is None) as bar:
        for _ in range(repeats):
            names = list(cases)
            order.shuffle(names)
            for name in names:
                bar.set_postfix_str(name, refresh=False)
                readings[name].append(cases[name]())
                bar.update()
    return readings


def paired_ratio(top: Sequence[float], bottom: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios of readings taken in the same repeat.

    A machine that slows down for a while slows both, so this is steadier than a ratio
    of medians.
    """
    return spread(a / b for a, b in zip(top, bottom, strict=True))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def is_dirty() -> bool | None:
    """Whether files differ from the commit, results apart; None outside git."""
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
    versions["er-jax"] = er_jax.__version__  # also of a tree that is not installed
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


def new_record(benchmark: str, settings: Any) -> dict[str, Any]:
    """Return a record with no points yet.

    Nothing kept by earlier processes has a part in it: from here on this process, and
    those it starts, neither take costs from the disk nor keep any there.

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
    """Round floats to five digits, NaN and infinity to null: what JSON can say."""
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value


def peak_bytes_per_s(device_kind: str) -> float | None:
    """Return the peak memory bandwidth of a device kind, None where it is unknown."""
    for name, gigabytes in PEAK_GB_PER_S:
        if name.lower() in device_kind.lower():
            return gigabytes * 1e9
    return None


def copy_bytes_per_s(num_bytes: int, *, repeats: int = 5, passes: int = 8) -> float:
    """Return the best bandwidth of reading and writing a large array, in bytes/s.

    Args:
      num_bytes: size of the array; should be far above every cache.
      repeats: readings, of which the fastest counts. passes: over the array, in one.
    """

    def run(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, passes, lambda _, x: x + 1, x)

    x = jnp.zeros(num_bytes // 4, jnp.float32)
    call = jax.jit(run, donate_argnums=0).lower(x).compile()
    x = jax.block_until_ready(call(x))
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        x = jax.block_until_ready(call(x))
        best = min(best, time.perf_counter() - start)
    return 2 * x.nbytes * passes / best


def figure(columns: int, rows: int = 1, *, width: float = 4.6) -> tuple[Any, Any]:
    """Return a matplotlib figure that needs no display, and its axes `[rows, columns]`.

    Raises:
      ImportError: matplotlib is missing; install the extra `plot`.
    """
    picture = new_figure(width * columns, 3.6 * rows)
    return picture, picture.subplots(rows, columns, squeeze=False)


def conditions(record: Mapping[str, Any]) -> str:
    """Return the line under a plot: device, versions, commit."""
    found = record["environment"]
    commit = (found["commit"] or "no commit")[:10] + ("+" if found["dirty"] else "")
    device = found["device_kind"]
    if found["platform"] == "cpu":
        device = f"{found['cores']} cores, {found['processor']}"
    return f"{device}; jax {found['versions']['jax']}; {commit}"


def results_dir(out: Path | None, quick: bool) -> Path:
    """Return where results go: quick runs never overwrite those that are quoted."""
    return out or (QUICK_RESULTS if quick else RESULTS)
