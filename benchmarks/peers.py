"""Samplers side by side: er_jax, Tunix's vanilla sampler and transformers.generate.

    pip install -e ".[tunix,test]"
    python -m benchmarks.peers

All load the same checkpoint, in float32, and sample the same prompts at temperature 1,
each with its own noise. Each has a process of its own, is warmed up, and then runs in
turn with the others. In the long tail a thirtieth of the vocabulary ends a completion,
so lengths are geometric, of equal means for all; in the flat workload all completions
have the same length.

Told are useful tokens per second without compilation; the share of row-steps that gave
no token, because a batch runs until its longest row ends; and the most memory that the
process ever had, weights, compiler and all. Drafts by lookup are for one row at a time
in transformers, so that engine samples rows one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

import er_jax
from benchmarks.lib import measure, presets, records, tables
from benchmarks.lib.peer_worker import ENGINES

WORKER = Path(__file__).parent / "lib" / "peer_worker.py"

PROMPT_LENGTH = 32

# A completion of the long tail ends at one token in so many; its mean length.
STOP_SHARE = 30

# Rollouts before the first reading: they compile, and choose programs.
WARM_UPS = {"er_jax, best": 6, "er_jax, ar": 2}

WARM_UP_SEED = 1000  # and those behind it; readings begin with 0

# What an engine needs beside er_jax; without it, it is left out.
NEEDS = {"Tunix": ("tunix",), "transformers": ("torch", "transformers")}


class Size(NamedTuple):
    """How much of a model is sampled.

    completions: of a run. groups: completions of each prompt, for each task. engines:
    those that sample.
    """

    completions: int
    groups: tuple[int, ...]
    engines: tuple[str, ...]


# The large model would take hours with the engines that are far behind with the small
# one: a static cache, and lookup row by row.
SIZES = {
    "tiny": Size(4, (2,), tuple(ENGINES)),
    "3M": Size(256, (8, 1), tuple(ENGINES)),
    "90M": Size(
        128, (8,), ("er_jax, best", "er_jax, ar", "Tunix", "transformers")
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """What to compare.

    Args:
      models: names of presets; see `SIZES`. workloads: "tail" and "flat".
      slots: rows of a batch. limit: most tokens of a completion, and the tokens of each
        in the flat workload as a third of it.
      repeats: readings of each engine, interleaved.
      quick: a tiny model, to check the script. out: directory of the record; None is
        benchmarks/results.
    """

    models: tuple[str, ...] = ("3M", "90M")
    workloads: tuple[str, ...] = ("tail", "flat")
    slots: int = 16
    limit: int = 144
    repeats: int = 5
    quick: bool = False
    out: Path | None = None


class Peer:
    """An engine's process, which has the task and waits for seeds."""

    def __init__(self, engine: str, task: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), engine, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, seed: int) -> dict[str, Any]:
        """Sample all completions with a seed; return what the worker tells."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{seed}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of an engine ended: {process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()  # Closes the pipes, too.


def is_installed(engine: str) -> bool:
    """Whether the packages that an engine needs are there."""
    needed = [name for start, name in NEEDS.items() if engine.startswith(start)]
    return all(importlib.util.find_spec(name) for names in needed for name in names)


def checkpoint(preset: str, directory: str) -> er_jax.DecoderConfig:
    """Save a preset's shape with random parameters, as a Qwen3; return its shape."""
    shape = presets.PRESETS[preset]
    shape = dataclasses.replace(shape, qk_norm=True, rope_theta=1e6)
    policy = er_jax.Decoder(shape)
    er_jax.save_hf(directory, policy, policy.init(jax.random.key(0)))
    return shape


def task_of(
    directory: str,
    vocab_size: int,
    workload: str,
    group: int,
    completions: int,
    args: Args,
) -> dict[str, Any]:
    """Return what the workers are told."""
    # 0 is padding for some engines. No prompt has it, or a token that ends.
    stops = list(range(1, vocab_size, STOP_SHARE)) if workload == "tail" else []
    rng = np.random.default_rng(0)
    usual = np.setdiff1d(np.arange(1, vocab_size), stops)
    prompts = rng.choice(usual, (completions // group, PROMPT_LENGTH)).tolist()
    limit = args.limit if workload == "tail" else args.limit // 3
    return {
        "checkpoint": directory,
        "prompts": prompts,
        "group": group,
        "slots": args.slots,
        "max_new_tokens": limit,
        "stops": stops,
    }


def points_of(
    task: dict[str, Any], engines: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    """Run the engines on one task in turn; return a point for each."""
    outs: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    first_s = {}
    with ExitStack() as stack:
        peers = {}
        for name in engines:
            peers[name] = Peer(name, task)
            stack.callback(peers[name].close)
        for name, peer in peers.items():
            out = peer.run(WARM_UP_SEED)
            first_s[name] = out["seconds"] + out["compile_s"]
            for number in range(1, WARM_UPS.get(name, 2)):
                peer.run(WARM_UP_SEED + number)

        def reading(name: str) -> float:
            # The same seeds for all: lengths vary from one to the next.
            outs[name].append(peers[name].run(len(outs[name])))
            return outs[name][-1]["tokens"] / outs[name][-1]["seconds"]

        cases = {name: functools.partial(reading, name) for name in engines}
        speeds = measure.interleave(cases, repeats, desc="peers")
    return [
        {
            "engine": name,
            "tokens_per_s": measure.spread(speeds[name]),
            "ahead": measure.paired_ratio(speeds[engines[0]], speeds[name]),
            "tokens": float(np.median([out["tokens"] for out in outs[name]])),
            "unused_share": 1
            - sum(out["tokens"] for out in outs[name])
            / sum(out["row_steps"] for out in outs[name]),
            "first_run_s": first_s[name],
            "peak_mb": outs[name][-1]["peak_mb"],
        }
        for name in engines
    ]


def rows_of(found: Sequence[Any]) -> tables.Table:
    """Return header and rows, one per point."""
    header = (
        *("model", "workload", "group", "completions", "rows", "engine"),
        "useful tokens / s",
        *("quartiles", "er_jax, best over it", "row-steps without a token"),
        *("first run, s", "peak MB"),
    )
    rows = [
        (
            *(p["preset"], p["workload"], p["group"], p["completions"], p["rows"]),
            p["engine"],
            round(p["tokens_per_s"]["median"]),
            f"{p['tokens_per_s']['q1']:.0f} to {p['tokens_per_s']['q3']:.0f}",
            f"{p['ahead']['median']:.2f}",
            f"{100 * p['unused_share']:.0f} %",
            round(p["first_run_s"], 1),
            round(p["peak_mb"]),
        )
        for p in found
    ]
    return header, rows


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw useful tokens per second: a panel for each model and workload."""
    found = record["points"]
    names = list(dict.fromkeys((p["preset"], p["workload"]) for p in found))
    picture, axes = records.figure(len(names), width=5.2)
    for ax, (preset, workload) in zip(axes[0], names, strict=True):
        own = [p for p in found if (p["preset"], p["workload"]) == (preset, workload)]
        engines = list(dict.fromkeys(p["engine"] for p in own))
        groups = list(dict.fromkeys(p["group"] for p in own))
        for place, group in enumerate(groups):
            of_group = [p["tokens_per_s"] for p in own if p["group"] == group]
            medians = np.array([s["median"] for s in of_group])
            sides = [
                medians - [s["q1"] for s in of_group],
                [s["q3"] for s in of_group] - medians,
            ]
            ax.barh(
                np.arange(len(engines)) + 0.4 * place,
                medians,
                0.38,
                xerr=sides,
                label=f"{group} completions of a prompt",
            )
        ax.set_yticks(np.arange(len(engines)) + 0.2 * (len(groups) - 1), engines)
        ax.invert_yaxis()
        ax.set_title(f"{preset}, {workload}, {own[0]['rows']} rows")
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel("useful tokens per second")
    axes[0][0].legend()
    records.save_figure(picture, record, path)


def main(args: Args) -> dict[str, Any]:
    """Compare, print a table, write and return the record."""
    if args.quick:
        args = dataclasses.replace(args, models=("tiny",), slots=2, limit=12, repeats=2)
    record = records.new_record("peers", records.settings_of(args))
    out = records.results_dir(args.out, args.quick)
    for preset in args.models:
        size = SIZES[preset]
        engines = [name for name in size.engines if is_installed(name)]
        with tempfile.TemporaryDirectory() as directory:
            vocab_size = checkpoint(preset, directory).vocab_size
            for workload in args.workloads:
                for group in size.groups:
                    task = task_of(
                        *(directory, vocab_size, workload, group, size.completions),
                        args,
                    )
                    about = {
                        "preset": preset,
                        "workload": workload,
                        "group": group,
                        "rows": args.slots,
                        "completions": size.completions,
                        "dtype": "float32",
                        "limit": task["max_new_tokens"],
                    }
                    found = points_of(task, engines, args.repeats)
                    record["points"] += [about | p for p in found]
                    records.save(out / "peers.json", record)
    print(tables.text(rows_of(record["points"])))
    draw(record, out / "peers.png")
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.peers"))
