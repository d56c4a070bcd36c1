"""What a draw costs at a large vocabulary, noise included: time, memory, bytes.

    python -m benchmarks.sampling
    python -m benchmarks.sampling --devices h100 a100      # needs the extra cuda-plan

*Measured* on this device: one draw for every row, from logits to token and
log-probability, with truncation off, with top-p, and with top-k and top-p. Beside it
stands a matrix product of the size of the vocabulary projection, which every pass
needs.

*Counted* for GPUs that are not here: the bytes that the kernels of the compiled draw
read and write, in units of the logits, and their share of a round of a 7B model. All of
them count as if no cache held them. (A TPU's compiler keeps logits of this size on the
chip.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import SingleDeviceSharding

from benchmarks.lib import measure, records, tables
from er_jax import sampling
from er_jax.costs.timing import neutral_sampling
from er_jax.tools import presets
from er_jax.types import Sampling

VOCAB = 152_064
MODEL = "qwen2.5-7b"

SETTINGS: dict[str, dict[str, Any]] = {
    "off": {},
    "top-p": {"top_p": np.float32(0.9)},
    "top-k, top-p": {"top_p": np.float32(0.9), "top_k": np.int32(50)},
}


@functools.partial(jax.jit, static_argnames=("truncated",))
def draw(
    logits: jax.Array,
    ids: jax.Array,
    position: jax.Array,
    settings: Sampling,
    *,
    truncated: bool,
) -> tuple[jax.Array, jax.Array]:
    """Draw from logits `[B, V]` as a round does.

    Args:
      ids, position: int32 `[B]`, which sequence and position the noise is of.
      truncated: whether top-k or top-p is on.
    Returns:
      Tokens and their log-probabilities, `[B]`.
    """
    is_finite = sampling.is_distribution(logits)[..., None]
    logits = jnp.where(is_finite, logits, jnp.zeros((), logits.dtype))
    noise = sampling.gumbel(settings, ids, position, logits.shape[-1], logits.dtype)
    tokens = sampling.draw(logits, settings, noise, truncated=truncated)
    logprobs = sampling.drawn_logprobs(logits, tokens, settings, truncated=truncated)
    return tokens, logprobs


def timed(function: Any, *arguments: Any) -> float:
    """Return the seconds of one call, result included."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


# In the text of compiled programs: shapes, and operations that move no bytes.
SHAPE = re.compile(r"(pred|[su]\d+|bf16|f\d+)\[([\d,]*)\]")
FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all")


def _num_bytes(shape: str) -> int:
    total = 0
    for name, dims in SHAPE.findall(shape):
        bits = 8 if name == "pred" else int(re.sub(r"\D", "", name))
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def traffic(text: str, branches: Sequence[int]) -> int:
    """Return the bytes that a compiled program's kernels read and write.

    Args:
      text: of the compiled module. branches: which branch each of its conditionals
        takes, in the order in which they are met from the entry on.
    """
    computations: dict[str, list[tuple[str, str, str, str]]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := re.match(
            r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$", line
        ):
            lines.append((found[1], found[2], found[3], found[4]))
    taken = iter(branches)

    def cost(name: str) -> int:
        shapes = {result: shape for result, shape, _, _ in computations[name]}
        total = 0
        for _, shape, kind, rest in computations[name]:
            if kind in FREE:
                continue
            if kind == "while":
                body = re.search(r"body=%?([\w.-]+)", rest)
                times = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                assert body and times
                total += int(times[1]) * cost(body[1])
            elif kind == "conditional":
                names = re.search(r"branch_computations=\{([^}]*)\}", rest)
                if names:
                    ways = [way.strip(" %") for way in names[1].split(",")]
                else:
                    ways = re.findall(r"(?:false|true)_computation=%?([\w.-]+)", rest)[
                        ::-1
                    ]
                total += cost(ways[next(taken)])
            else:
                operands = rest.split(")")[0].split(",")
                given = (name.split()[-1].strip("%") for name in operands if name)
                total += _num_bytes(shape)
                total += sum(_num_bytes(shapes.get(name, "")) for name in given)
        return total

    return cost(entry)


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure.

    Args:
      rows: batch sizes. vocab: V. gamma: drafts of a round. length: positions of the
        cache, for the bytes of a round.
      devices: GPUs to compile for and to count.
      out: where to write. quick: a small vocabulary, to see that it runs.
    """

    rows: tuple[int, ...] = (1, 8, 32)
    vocab: int = VOCAB
    gamma: int = 4
    length: int = 2048
    devices: tuple[str, ...] = ()
    out: Path | None = None
    quick: bool = False


def measured(args: Args, rows: int) -> dict[str, Any]:
    """Return the seconds of draws on this device, and of the projection."""
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(rows, args.vocab)), jnp.float32)
    ids = jnp.arange(rows, dtype=jnp.int32)
    position = jnp.full(rows, 100, jnp.int32)
    width = presets.PRESETS[MODEL].dim
    hidden = jnp.ones((rows, width), jnp.float32)
    head = jnp.ones((width, args.vocab), jnp.float32)
    project = jax.jit(jnp.matmul)
    cases: dict[str, Any] = {"projection": lambda: timed(project, hidden, head)}
    temp_bytes = {}
    for name, changes in SETTINGS.items():
        settings = dataclasses.replace(neutral_sampling(), **changes)
        run = functools.partial(draw, truncated=bool(changes))
        memory: Any = draw.lower(
            logits, ids, position, settings, truncated=bool(changes)
        ).compile()
        temp_bytes[name] = memory.memory_analysis().temp_size_in_bytes
        cases[name] = functools.partial(timed, run, logits, ids, position, settings)
    for case in cases.values():
        case()
    seconds = measure.interleave(cases, 5, desc=f"{rows} rows")
    return {
        "part": "measured",
        "preset": f"V = {args.vocab}",
        "rows": rows,
        "dtype": "float32",
        "seconds": {name: measure.spread(values) for name, values in seconds.items()},
        "temp_bytes": temp_bytes,
    }


def counted(args: Args, device: str, rows: int) -> dict[str, Any]:
    """Return the bytes of draws on a device that is not here, and of a round's passes.

    Raises:
      ValueError: the device is not a GPU.
    """
    target = presets.target_of(device)
    if target.kind != "cuda":
        raise ValueError(f"devices holds {device!r}; only GPUs can be counted")
    where = SingleDeviceSharding(target.devices[0])

    def shaped(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where)

    given = (
        np.empty((rows, args.vocab), np.float32),
        np.empty(rows, np.int32),
        np.empty(rows, np.int32),
        neutral_sampling(),
    )
    arguments = jax.tree.map(shaped, given)
    compiled = {
        truncated: draw.lower(*arguments, truncated=truncated).compile()
        for truncated in (False, True)
    }
    memory: Any = compiled[True].memory_analysis()
    ways = {"off": (), "top-p": (0, 1), "top-k, top-p": (1, 1)}
    logits = given[0].nbytes
    found = {
        name: traffic(compiled[bool(branches)].as_text() or "", branches)
        for name, branches in ways.items()
    }
    config = presets.PRESETS[MODEL]
    layer = config.dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = layer * config.head_size + 3 * config.dim * config.hidden_dim
    weights = config.num_layers * layer + config.dim * args.vocab
    entry = 2 * config.num_layers * 2 * config.num_kv_heads * config.head_size
    passes = (args.gamma + 1) * rows * args.length * entry
    passes += (2 + args.gamma) * weights  # bfloat16 once, int8 codes gamma times
    draws = 2 * args.gamma + 1
    return {
        "part": "counted",
        "preset": f"V = {args.vocab}",
        "rows": rows,
        "dtype": "float32",
        "device": device,
        "logits_bytes": logits,
        "temp_bytes": memory.temp_size_in_bytes,
        "traffic_bytes": found,
        "round_bytes": passes,
        "share_of_round": {
            name: draws * value / (passes + draws * value)
            for name, value in found.items()
        },
    }


def rows_of(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows of the table."""
    rows: list[tuple[Any, ...]] = []
    for p in points:
        for name in SETTINGS:
            if p["part"] == "measured":
                median = p["seconds"][name]["median"]
                share = median / p["seconds"]["projection"]["median"]
                temp = p["temp_bytes"][name]
                said = (1e3 * median, 100 * share, "", "")
                where = "here"
            else:
                temp, where = p["temp_bytes"], p["device"]
                passes = p["traffic_bytes"][name] / p["logits_bytes"]
                said = ("", "", passes, 100 * p["share_of_round"][name])
            rows.append((where, p["rows"], name, *said, temp / 1e6))
    header = (
        "device", "rows", "truncation", "ms", "of the projection %",
        "times the logits", "of a 7B round %", "temporary MB",
    )  # fmt: skip
    return header, rows


def main(args: Args) -> dict[str, Any]:
    """Measure, count, print, and write the record; return it."""
    if args.quick:
        args = dataclasses.replace(args, vocab=1024, rows=(1, 4))
    out = records.results_dir(args.out, args.quick)
    record = records.new_record("sampling", records.settings_of(args))
    record["points"] = [measured(args, rows) for rows in args.rows]
    for device in args.devices:
        record["points"] += [counted(args, device, rows) for rows in args.rows]
    records.save(out / "sampling.json", record)
    print(tables.text(rows_of(record["points"])))
    print(f"written: sampling.json in {out.name}", file=sys.stderr)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.sampling"))
