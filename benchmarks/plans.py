"""Whether models fit on devices that are not here: the table of docs/plan.md.

    python -m benchmarks.plans                 # needs the extras tpu-plan and cuda-plan

Compiles the windows of each model for each device (`er_jax.plan`), one process each. No
speed is measured; the record holds what the compilers say. Cases that are not asked for
stay in it as they were.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from tqdm import tqdm

from benchmarks import measure
from er_jax import plan

DEVICES = ("v5e:2x4", "v5p:2x2x1", "v6e:2x2", "a100", "h100", "h200")


@dataclasses.dataclass(frozen=True)
class Args:
    """What to compile.

    Args:
      models: presets of `er_jax.plan`. devices: to compile for.
      slots: rows over all devices. length: positions of each. gamma: drafts of a round.
      out: where to write. one: for use by this script, print one plan as JSON.
    """

    models: tuple[str, ...] = ("qwen2.5-7b", "qwen2.5-14b")
    devices: tuple[str, ...] = DEVICES
    slots: int = 64
    length: int = 2048
    gamma: int = 4
    out: Path | None = None
    one: bool = False


def point_of(model: str, device: str, args: Args) -> dict[str, Any]:
    """Return what a plan says, ready for JSON."""
    jax.config.update("jax_platforms", "cpu")
    found = plan.plan(
        plan.PRESETS[model],
        plan.target_of(device),
        slots=args.slots,
        max_length=args.length,
        gammas=(0, args.gamma),
    )
    return {
        "preset": model,
        "rows": args.slots,
        "dtype": found.config.dtype,
        "device": device,
        "mesh": [found.data, found.model],
        "params_bytes": found.params_bytes,
        "draft_bytes": found.draft_bytes,
        "state_bytes": found.state_bytes,
        "peak_bytes": found.peak_bytes,
        "memory_bytes": found.target.memory_bytes,
        "fits": found.fits,
        "largest_slots": found.largest(args.length),
        "read_bytes": found.read_bytes,
        "speed_up": [
            found.speed_up(rows, args.length, args.gamma) for rows in (1, args.slots)
        ],
        "programs": [dataclasses.asdict(count) for count in found.programs],
    }


def rows_of(
    points: Sequence[Mapping[str, Any]],
) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    """Return header and rows of the table."""
    rows: list[tuple[Any, ...]] = []
    for p in points:
        step, speculative = p["programs"]
        counted = p["params_bytes"] + p["draft_bytes"] + p["state_bytes"]
        gathers = [
            one["largest_bytes"]
            for one in speculative["collectives"]
            if one["kind"] == "all-gather"
        ]
        rows.append(
            (
                p["preset"],
                p["device"],
                " x ".join(map(str, p["mesh"])),
                *(
                    p[f"{name}_bytes"] / 1e9
                    for name in ("params", "draft", "state", "peak", "memory")
                ),
                "yes" if p["fits"] else "no",
                p["largest_slots"],
                100 * (speculative["argument_bytes"] / counted - 1),
                *(count["compile_s"] for count in (step, speculative)),
                sum(len(count["weight_copies"]) for count in (step, speculative)),
                max(gathers, default=0) / 1e6,
                *p["speed_up"],
            )
        )
    slots = points[0]["rows"]
    header = (
        "model", "device", "data x model", "parameters GB", "draft GB", "state GB",
        "peak GB", "device GB", "fits", "most slots", "arguments: compiler / count %",
        "compile s, step", "compile s, round", "copies of weights",
        "largest all-gather MB", "roofline, 1 row", f"roofline, {slots} rows",
    )  # fmt: skip
    return header, rows


def main(args: Args) -> None:
    """Compile, and write the record; or print one plan."""
    if args.one:
        print(json.dumps(point_of(args.models[0], args.devices[0], args)))
        return
    settings = dataclasses.asdict(args)
    del settings["out"], settings["one"]
    record = measure.new_record("plans", settings)
    out = measure.results_dir(args.out, quick=False)
    cases = [(model, device) for model in args.models for device in args.devices]
    if (out / "plans.json").exists():
        known = json.loads((out / "plans.json").read_text())["points"]
        kept = [p for p in known if (p["preset"], p["device"]) not in cases]
        record["points"] += kept
    for model, device in tqdm(cases, unit="plan"):
        command = [sys.executable, "-m", "benchmarks.plans", "--one"]
        command += ["--models", model, "--devices", device]
        command += ["--slots", str(args.slots), "--length", str(args.length)]
        command += ["--gamma", str(args.gamma)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        record["points"].append(json.loads(done.stdout.splitlines()[-1]))
        record["points"].sort(key=lambda p: (p["device"], p["read_bytes"]))
        measure.save(out / "plans.json", record)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.plans"))
