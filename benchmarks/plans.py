"""Whether models fit on devices that are not here: the table of docs/plan.md.

    python -m benchmarks.plans                 # needs the extras tpu-plan and cuda-plan

Compiles the windows of each model for each device (`er_jax.tools.plan`), in one process
per case. No speed is measured; the record holds what the compilers say. Cases that are
in the record already and not asked for stay as they are.
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

from benchmarks.lib import records, tables
from er_jax.tools import plan, presets

SMALL = ("v5e:2x4", "v5p:2x2x1", "v6e:2x2", "a100", "h100", "h200")
LARGE = ("v5e:4x4", "v5p:2x2x4", "h100:8")
CASES = {
    "qwen2.5-7b": SMALL,
    "qwen2.5-14b": (*SMALL, *LARGE),
    "llama-3.1-70b": LARGE,
}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to compile.

    Args:
      models: of `er_jax.tools.presets`. devices: to compile for; without any, those of
        the table.
      slots: rows over all devices. length: positions of each. gamma: drafts of a round.
      model_parallel: devices that share the weights; 0 is the fewest that hold them.
      out: where to write. one: for the script's own use: print one plan as JSON.
    """

    models: tuple[str, ...] = tuple(CASES)
    devices: tuple[str, ...] = ()
    slots: int = 64
    length: int = 2048
    gamma: int = 4
    model_parallel: int = 0
    out: Path | None = None
    one: bool = False


def point_of(model: str, device: str, args: Args) -> dict[str, Any]:
    """Return what a plan says, ready for JSON."""
    jax.config.update("jax_platforms", "cpu")
    found = plan.plan(
        presets.PRESETS[model],
        presets.target_of(device),
        slots=args.slots,
        max_length=args.length,
        gammas=(0, args.gamma),
        model_parallel=args.model_parallel or None,
    )
    return {
        "preset": model,
        "rows": args.slots,
        "dtype": found.config.dtype,
        "device": device,
        "model_parallel": args.model_parallel,
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


def rows_of(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows of the table."""
    rows: list[tuple[Any, ...]] = []
    for p in points:
        step, speculative = p["programs"]
        refused = any(count.get("refusal") for count in p["programs"])
        counted = p["params_bytes"] + p["draft_bytes"] + p["state_bytes"]
        gathers = [
            one["largest_bytes"]
            for one in speculative["collectives"]
            if one["kind"] == "all-gather"
        ]
        collectives = [
            f"{sum(one['count'] for one in count['collectives'])} "
            f"({sum(one['num_bytes'] for one in count['collectives']) / 1e6:.3g} MB)"
            for count in (step, speculative)
        ]
        compiled = [
            100 * (speculative["argument_bytes"] / counted - 1),
            *(count["compile_s"] for count in (step, speculative)),
            sum(len(count["weight_copies"]) for count in (step, speculative)),
            *collectives,
            max(gathers, default=0) / 1e6,
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
                "yes" if p["fits"] else "no: refused" if refused else "no",
                p["largest_slots"],
                *(["–"] * 7 if refused else compiled),
                *p["speed_up"],
            )
        )
    slots = points[0]["rows"]
    header = (
        "model", "device", "data x model", "parameters GB", "draft GB", "state GB",
        "peak GB", "device GB", "fits", "most slots", "arguments: compiler / count %",
        "compile s, step", "compile s, round", "copies of weights",
        "collectives of a step", "of a round", "largest all-gather MB",
        "roofline, 1 row", f"roofline, {slots} rows",
    )  # fmt: skip
    return header, rows


def main(args: Args) -> None:
    """Compile, and write the record; or print one plan."""
    if args.one:
        print(json.dumps(point_of(args.models[0], args.devices[0], args)))
        return
    record = records.new_record("plans", records.settings_of(args, "one"))
    out = records.results_dir(args.out, quick=False)
    cases = [
        (model, device)
        for model in args.models
        for device in args.devices or CASES[model]
    ]
    if (out / "plans.json").exists():
        known = json.loads((out / "plans.json").read_text())["points"]
        is_new = {(model, device, args.model_parallel) for model, device in cases}
        record["points"] += [
            point
            for point in known
            if (point["preset"], point["device"], point.get("model_parallel", 0))
            not in is_new
        ]
    for model, device in tqdm(cases, unit="plan"):
        command = [sys.executable, "-m", "benchmarks.plans", "--one"]
        command += ["--models", model, "--devices", device]
        command += ["--slots", str(args.slots), "--length", str(args.length)]
        command += ["--gamma", str(args.gamma)]
        command += ["--model-parallel", str(args.model_parallel)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        record["points"].append(json.loads(done.stdout.splitlines()[-1]))
        record["points"].sort(key=lambda p: (p["device"], p["params_bytes"]))
        records.save(out / "plans.json", record)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.plans"))
