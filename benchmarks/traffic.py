"""Bytes that passes move beside those that they must move, on devices not present.

    python -m benchmarks.traffic               # needs the extras tpu-plan and cuda-plan

Compiles windows for one device of each kind and counts in the compiled programs
(`er_jax.tools.traffic`). The layers of a model are alike: models of few layers are
compiled, and their counts continued in a straight line to the real number
(`--whole` compiles all layers). Nothing is timed. Cases that are in the record already
and not asked for stay as they are; each names the commit that it was counted at.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from tqdm import tqdm

from benchmarks.lib import records, tables
from er_jax import DrafterConfig
from er_jax.kernels.choice import AttentionChoice
from er_jax.tools import plan, presets
from er_jax.tools.needs import PASS_NAMES
from er_jax.tools.traffic import PARTS, Count, Sizes, Traffic

WINDOW, HEAD = 512, 64
DRAFTS = {
    "int8": DrafterConfig(window=None),
    "int4": DrafterConfig(bits=4, window=None),
    "int4 g128": DrafterConfig(bits=4, group_size=128, window=None),
    "int4, head 8": DrafterConfig(bits=4, projection_bits=8, window=None),
    "int4 g128, head 8": DrafterConfig(
        bits=4, projection_bits=8, group_size=128, window=None
    ),
    "int8, window": DrafterConfig(window=WINDOW, head=HEAD),
    "int4, window": DrafterConfig(bits=4, window=WINDOW, head=HEAD),
}
SHAPES = ((1, 1024), (8, 2048), (32, 2048), (32, 8192), (64, 2048))
# Passes in the order of the table.
PASSES = ("step", "draft", "verify")
# What names a case in the record.
CASE = ("preset", "device", "rows", "length", "gamma", "draft")


@dataclasses.dataclass(frozen=True)
class Args:
    """What to compile.

    Args:
      models: of `er_jax.tools.presets`. devices: one of each is compiled for.
      shapes: rows and positions of the cache. gammas: drafts of a round.
      drafts: kinds of drafts, keys of `DRAFTS`.
      attention: "auto" (the kernels of the devices) or "xla".
      layers: two numbers of layers that are compiled. whole: compile all layers.
      out: where to write.
    """

    models: tuple[str, ...] = ("qwen2.5-7b", "llama-3.1-8b")
    devices: tuple[str, ...] = ("h100", "v5p:2x2x1", "v5e:2x2", "v6e:2x2")
    shapes: tuple[tuple[int, int], ...] = SHAPES
    gammas: tuple[int, ...] = (4, 8)
    drafts: tuple[str, ...] = tuple(DRAFTS)
    attention: AttentionChoice = "auto"
    layers: tuple[int, int] = (2, 4)
    whole: bool = False
    out: Path | None = None


def counted(
    model: str,
    device: str,
    rows: int,
    length: int,
    gamma: int,
    draft: str,
    layers: int,
    attention: str = "auto",
) -> Traffic:
    """Return the traffic of a window of a model with so many layers."""
    target = presets.target_of(device)
    found = plan.plan(
        dataclasses.replace(presets.PRESETS[model], num_layers=layers),
        dataclasses.replace(target, devices=target.devices[:1]),
        slots=rows,
        max_length=length,
        gammas=(gamma,),
        drafter=DRAFTS[draft],
        attention=attention,
    )
    (program,) = found.programs
    if program.traffic is None:
        raise ValueError(f"{model} on {device}: {program.refusal}")
    return program.traffic


def continued(low: Traffic, high: Traffic, layers: tuple[int, int], to: int) -> Traffic:
    """Return the traffic at `to` layers, in a straight line through two counts."""
    share = (to - layers[0]) / (layers[1] - layers[0])

    def line(a: int, b: int) -> int:
        return round(a + (b - a) * share)

    def count(a: Count, b: Count) -> Count:
        parts = a.num_bytes.keys() | b.num_bytes.keys()
        return Count(
            num_bytes={
                part: line(a.num_bytes.get(part, 0), b.num_bytes.get(part, 0))
                for part in sorted(parts)
            },
            kernels=line(a.kernels, b.kernels),
            branches=line(a.branches, b.branches),
        )

    a, b = low.sizes, high.sizes
    sizes = Sizes(
        vocab_sizes=a.vocab_sizes,
        cache_length=a.cache_length,
        weights=(line(a.weights[0], b.weights[0]), line(a.weights[1], b.weights[1])),
        cache=(line(a.cache[0], b.cache[0]), line(a.cache[1], b.cache[1])),
        entry=line(a.entry, b.entry),
        logits=a.logits,
        gamma=a.gamma,
        ring_length=a.ring_length,
    )
    return Traffic(count(low.target, high.target), count(low.draft, high.draft), sizes)


def traffic_of(
    model: str, device: str, shape: tuple[int, int], gamma: int, draft: str, args: Args
) -> Traffic:
    """Return the traffic of a whole model."""
    num_layers = presets.PRESETS[model].num_layers
    if args.whole:
        return counted(model, device, *shape, gamma, draft, num_layers, args.attention)
    low, high = (
        counted(model, device, *shape, gamma, draft, n, args.attention)
        for n in args.layers
    )
    return continued(low, high, args.layers, num_layers)


def point_of(
    case: Mapping[str, Any], found: Traffic, args: Args, environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a case and its counts, ready for JSON."""
    config = presets.PRESETS[case["preset"]]
    passes = [
        {
            "kind": PASS_NAMES[kind] if case["gamma"] else "step",
            "minimum_bytes": found.sizes.minimum(kind),
            "moved_bytes": count.total,
            "ratio": found.ratios[kind],
            **dataclasses.asdict(count),
        }
        for kind, count in found.passes.items()
    ]
    layers = [config.num_layers] if args.whole else list(args.layers)
    when = {name: environment[name] for name in ("commit", "date")}
    return {**case, "dtype": config.dtype, "layers": layers, **when, "passes": passes}


def newest_first(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the cases, those that were counted last first."""
    return sorted(points, key=lambda p: p.get("date", ""), reverse=True)


def cases_of(args: Args) -> list[dict[str, Any]]:
    """Return the cases: the step once for every shape, rounds with every draft."""
    return [
        dict(zip(CASE, (model, device, *shape, gamma, draft), strict=True))
        for model in args.models
        for device in args.devices
        for shape in args.shapes
        for gamma, draft in [
            (0, ""),
            *((g, d) for g in args.gammas for d in args.drafts),
        ]
    ]


def rows_of(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows of the table: a line for every pass, as counted last."""
    # A draft of other rounds, or a verification of other drafts, moves the same.
    known: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for p in newest_first(points):
        for one in p["passes"]:
            name = one["kind"]
            if name == "verify":
                name = f"verify of {p['gamma'] + 1}"
            if name == "draft":
                name = f"draft, {p['draft']}"
            parts = one["num_bytes"]
            case = (p["preset"], p["device"], p["rows"], p["length"])
            row = (
                p["preset"], p["device"].split(":")[0],
                f"{p['rows']} x {p['length']}",
                name, one["minimum_bytes"] / 1e9, f"{one['ratio']:.2f}",
                *(parts.get(part, 0) / 1e9 for part in PARTS),
                one["kernels"], one["branches"], p.get("commit", "")[:7],
            )  # fmt: skip
            known.setdefault((*case, PASSES.index(one["kind"]), name), row)
    header = (
        "model", "device", "rows x positions", "pass", "least GB", "moved / least",
        *(f"{part} GB" for part in PARTS), "kernels", "branches", "commit",
    )  # fmt: skip
    return header, [known[key] for key in sorted(known)]


def main(args: Args) -> None:
    """Compile, count, and write the record."""
    jax.config.update("jax_platforms", "cpu")
    record = records.new_record("traffic", records.settings_of(args))
    path = records.results_dir(args.out, quick=False) / "traffic.json"
    cases = cases_of(args)
    if path.exists():
        known = json.loads(path.read_text())["points"]
        record["points"] += [
            p for p in known if {name: p[name] for name in CASE} not in cases
        ]
    for case in tqdm(cases, unit="case"):
        model, device, rows, length, gamma, draft = case.values()
        draft = draft or args.drafts[0]
        found = traffic_of(model, device, (rows, length), gamma, draft, args)
        record["points"].append(point_of(case, found, args, record["environment"]))
        record["points"].sort(key=lambda p: tuple(p[name] for name in CASE))
        records.save(path, record)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.traffic"))
