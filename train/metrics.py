"""What a run writes down: one JSON object a line, and the pictures made from them.

Every line has a "kind": "warmup", "eval" or "step", and a "step". Whatever the clock
decides (times, and the draft lengths chosen by time) is under "timing"; everything else
repeats.

Left out: deciding anything. The numbers come from `grpo`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from er_jax.figures import new_figure
from train.files import replace_text, writing

# What summaries and pictures show of a line of each kind.
SHOWN = {
    "warmup": ("solution_chance", "timing.seconds"),
    "eval": ("reward", "num_completions"),
    "step": (
        "reward",
        "logprob_gap",
        "length.p50",
        "length.p90",
        "length.max",
        "timing.rollout_s",
        "timing.rollout_compile_s",
        "timing.update_s",
        "timing.tokens_by_gamma",
    ),
}

QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)


class MetricsFile:
    """`metrics.jsonl`: appended to line by line, cut back when a run is resumed.

    Args:
      path: the file; made when first written to.
      writes: whether this process is the one that writes it.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def append(self, record: dict[str, Any]) -> None:
        """Write one line and hand it to the operating system."""
        if not self.writes:
            return
        with writing("a line of metrics", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return all records; lines that are torn, or of something else, are not."""
        if not self.path.exists():
            return []
        found = map(_record, self.path.read_bytes().split(b"\n"))
        return [record for record in found if record is not None]

    def cut_after(self, step: int) -> list[dict[str, Any]]:
        """Drop, in one atomic move, what came after a GRPO step; return what is left.

        A run killed between two checkpoints has written lines that the resumed run
        will write again.
        """
        if not self.writes:
            return []
        kept = [r for r in self.read() if r["kind"] == "warmup" or r["step"] <= step]
        with writing("the metrics", self.path):
            replace_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        return kept


def _record(line: bytes) -> dict[str, Any] | None:
    """Return what `append` wrote, None for any other line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # JSON's errors, and those of UTF-8
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if isinstance(record.get("step"), int) else None


def is_complete(record: dict[str, Any]) -> bool:
    """Return whether a record holds all that is shown of its kind."""

    def holds(values: Any, names: Sequence[str]) -> bool:
        for name in names:
            if not isinstance(values, dict) or name not in values:
                return False
            values = values[name]
        return True

    names = SHOWN.get(record["kind"])
    return names is not None and all(holds(record, n.split(".")) for n in names)


def digest(tree: Any) -> str:
    """Return 16 hex digits that change when any bit of any array of `tree` does.

    Arrays are read once, where they lie, by integer sums that do not depend on how they
    are cut over devices.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    total = hashlib.sha256()
    for (path, leaf), sums in zip(
        leaves,
        jax.device_get([_hashed(_bits(leaf)) for _, leaf in leaves]),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        total.update(f"{name} {leaf.dtype} {leaf.shape} {sums[0]} {sums[1]}".encode())
    return total.hexdigest()[:16]


def text_digest(values: Any) -> str:
    """Return 16 hex digits of what JSON makes of some values."""
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bits(leaf: Any) -> Any:
    """Return a NumPy array as its bits, or JAX would make 32 of 64; JAX's as it is."""
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.ascontiguousarray(leaf)
    is_wide = array.dtype.itemsize == 8
    return array[..., None].view(np.uint32) if is_wide else array


@jax.jit
def _hashed(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return two sums, uint32 `[]`, over the words of an array mixed with their places.

    Source: the mixing, Appleby's MurmurHash3 (its 32-bit finalizer, a bijection).
    """
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
    words = lax.bitcast_convert_type(leaf, kinds[leaf.dtype.itemsize])
    words = words.astype(jnp.uint32)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        along = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place += along * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]

    def mixed(x: jax.Array) -> jax.Array:
        x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> jnp.uint32(16))

    first = mixed(words ^ mixed(place))
    second = mixed(first + jnp.uint32(0x9E3779B9))
    return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)


def quantiles(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return the 10th, 50th, 90th, 99th percentile and the maximum."""
    found = np.quantile(np.asarray(values, float), QUANTILES)
    names = ("p10", "p50", "p90", "p99", "max")
    return {name: round(float(v), 1) for name, v in zip(names, found, strict=True)}


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw reward, lengths, seconds and the log-probability gap over the GRPO steps.

    Args:
      records: the lines of `metrics.jsonl`.
      path: the picture to write.
    Raises:
      ImportError: matplotlib is missing; install the extra `plot`.
    """
    steps = [record for record in records if record["kind"] == "step"]
    evals = [record for record in records if record["kind"] == "eval"]
    x = [record["step"] for record in steps]
    figure = new_figure(9, 6)
    reward, length, seconds, gap = figure.subplots(2, 2).flat

    reward.plot(x, [r["reward"] for r in steps], label="training prompts")
    reward.plot(
        [r["step"] for r in evals],
        [r["reward"] for r in evals],
        "o",
        label="held-out prompts",
    )
    reward.set(title="mean reward", ylim=(0, 1.02))
    reward.legend()
    for name in ("p50", "p90", "max"):
        length.plot(x, [r["length"][name] for r in steps], label=name)
    length.set(title="completion length, tokens", yscale="log")
    length.legend()
    phases = ("rollout_s", "update_s")
    columns = [[r["timing"][phase] for r in steps] for phase in phases]
    seconds.stackplot(x, *columns, labels=[p.removesuffix("_s") for p in phases])
    seconds.set(title="seconds per step, compilation included", ylim=(0, None))
    seconds.legend(loc="upper right")
    gap.plot(x, [r["logprob_gap"] for r in steps])
    gap.set(title="largest |rollout - trainer| log-probability, nats", yscale="log")
    for axes in (reward, length, seconds, gap):
        axes.set(xlabel="GRPO step")
    figure.savefig(path, dpi=130)
