"""One to eight devices, imitated on one CPU, with the same work for each.

    python -m benchmarks.imitation

The devices share the cores, so twice as many need twice the time at best. The results
are the seconds per place on the mesh's axis `data`, which should stay the same, and the
share of the time outside of compiled windows. One rollout over all devices and replicas
(`rollout_replicas`) are measured in turn, in one process. All completions are as long
as they may be, and nothing is drafted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

import er_jax
from benchmarks.lib import measure, presets, records, tables
from er_jax.engine.kept import forget_engines
from er_jax.mesh import layout

MODES = ("one rollout", "replicas")


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure.

    Args:
      preset: decoder, by its name in benchmarks/lib/presets.py.
      places: on the axis data, in turn. rows: at each place. sequences: at each place,
        with prompts of 32 tokens. length: of every completion, tokens.
      repeats: of every case, interleaved, after two that are not counted.
      out: where to write. quick: a tiny model, up to two places, one repeat.
    """

    preset: str = "3M"
    places: tuple[int, ...] = (1, 2, 4, 8)
    rows: int = 8
    sequences: int = 16
    length: int = 256
    repeats: int = 7
    out: Path | None = None
    quick: bool = False


def sampler(places: int, mode: str, args: Args) -> Any:
    """Return a function that samples once.

    It returns the seconds, and those of them outside of windows; compilation is not
    counted.
    """
    policy = presets.decoder(args.preset, dtype="float32")
    mesh = Mesh(np.array(jax.devices()[:places]), ("data",))
    mesh = layout.rollout_mesh(mesh)
    params = layout.put_on_mesh(policy, policy.init(jax.random.key(0)), mesh)
    count = places * args.sequences
    prompts = np.random.default_rng(0).integers(0, policy.vocab_size, (count, 32))
    is_one = mode == MODES[0]
    config = er_jax.RolloutConfig(
        max_new_tokens=args.length,
        control="ar",
        max_slots=args.rows * (places if is_one else 1),
    )
    run: Any = er_jax.rollout_replicas
    if is_one:
        # With so much patience it compiles no other program than the first.
        controller = er_jax.Controller("ar", patience=1e9)
        run = functools.partial(er_jax.rollout, controller=controller)

    def once() -> tuple[float, float]:
        stats = run(
            policy,
            params,
            prompts.tolist(),
            key=jax.random.key(1),
            config=config,
            mesh=mesh,
        ).stats
        assert stats.num_tokens == count * args.length
        seconds = stats.total_s - stats.seconds["compile"]
        if not is_one:
            # The seconds by phase are those of the replica that took longest.
            seconds = max(stats.replica_s) - stats.seconds["compile"]
        return seconds, seconds - stats.seconds["windows"]

    return once


def points_of(places: int, args: Args) -> list[dict[str, Any]]:
    """Measure both modes in turn."""
    forget_engines()
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}

    def reading(mode: str, once: Any) -> float:
        found[mode].append(once())
        return found[mode][-1][0]

    cases = {}
    for mode in MODES:
        once = sampler(places, mode, args)
        once(), once()
        cases[mode] = functools.partial(reading, mode, once)
    measure.interleave(cases, args.repeats, desc=f"{places} places")
    return [
        {
            "preset": args.preset,
            "rows": args.rows * places,
            "dtype": "float32",
            "places": places,
            "mode": mode,
            "seconds": measure.spread(s for s, _ in readings),
            "outside_share": measure.spread(outside / s for s, outside in readings),
        }
        for mode, readings in found.items()
    ]


def rows_of(points: Sequence[Any]) -> tables.Table:
    """Return header and rows of the table."""
    header = (
        "mode", "places", "rows", "s", "IQR %", "s a place", "beside one place",
        "outside windows %",
    )  # fmt: skip
    alone = {
        p["mode"]: p["seconds"]["median"] / p["places"]
        for p in points
        if p["places"] == min(q["places"] for q in points)
    }
    rows = []
    for p in sorted(points, key=lambda p: (MODES.index(p["mode"]), p["places"])):
        spread = p["seconds"]
        each = spread["median"] / p["places"]
        iqr = measure.iqr_percent(spread)
        outside = 100 * p["outside_share"]["median"]
        rows.append(
            (
                p["mode"],
                p["places"],
                p["rows"],
                round(spread["median"], 3),
                round(iqr, 1),
                round(each, 3),
                round(each / alone[p["mode"]], 2),
                round(outside, 1),
            )
        )
    return header, rows


def main(args: Args) -> dict[str, Any]:
    """Measure, print a table, write and return the record."""
    if args.quick:
        args = dataclasses.replace(
            args, preset="tiny", places=(1, 2), length=16, repeats=1
        )
    jax.config.update("jax_platforms", "cpu")
    if args.places and len(jax.devices()) < max(args.places):
        raise SystemExit(
            f"there are {len(jax.devices())} devices and places={args.places}; give "
            "fewer, or set jax_num_cpu_devices"
        )
    record = records.new_record("imitation", records.settings_of(args))
    out = records.results_dir(args.out, quick=args.quick)
    for places in args.places:
        record["points"] += points_of(places, args)
        records.save(out / "imitation.json", record)
    print(tables.text(rows_of(record["points"])))
    return record


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.imitation"))
