"""Rollouts with a useless draft, and on a machine that slows down.

    python -m benchmarks.disturbed
    python -m benchmarks.disturbed --quick

*noise*: random codes replace the draft. `best` with a controller that knew good drafts,
and with one that knows nothing of acceptance, are compared with plain decoding: how
much they lose, and whether a warning says so. *slowed*: when half of the completions
have ended, other processes take every core. The result is how many windows the
controller's table needs to follow. Both compare the tokens with those of plain
decoding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks.lib import measure, records, tables, workloads
from benchmarks.lib.agreement import completions_of
from benchmarks.lib.controllers import WatchedTable
from benchmarks.lib.runners import PATIENCE, Runner
from benchmarks.lib.tasks import SIZES, Task, planned_task
from er_jax import Controller, PolicyParams
from er_jax.engine.kept import forget_engines

# The table has followed when it has gone this share of the way to the new level.
FOLLOWED_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class Args:
    """What to disturb.

    Args:
      presets: decoders, by their names in benchmarks/lib/presets.py.
      gammas: draft lengths that `best` may choose from, beside 0.
      repeats: interleaved readings of the rollouts with a draft of noise.
      out: where to write. quick: a tiny decoder, to see that it runs.
    """

    presets: tuple[str, ...] = ("3M", "90M")
    gammas: tuple[int, ...] = (2, 4, 8)
    repeats: int = 5
    out: Path | None = None
    quick: bool = False


def noise_draft(draft: Any, seed: int = 0) -> Any:
    """Return a draft whose integer codes are random, and nothing else changed."""
    leaves, structure = jax.tree.flatten(draft)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [
        jax.random.randint(key, leaf.shape, -100, 100, jnp.int32).astype(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.integer)
        else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)


def copied(controller: Controller) -> Controller:
    """Return a controller that knows what another one knows."""
    copy = Controller(controller.control, controller.gammas, patience=PATIENCE)
    copy.load_state_dict(controller.state_dict())
    return copy


def with_noise(task: Task, runners: Mapping[str, Runner], args: Args) -> dict[str, Any]:
    """Return what a draft of noise costs, compared with plain decoding."""
    params = PolicyParams(task.params.policy, noise_draft(task.params.draft))
    noisy = dataclasses.replace(task, params=params)
    runner = Runner(noisy, "best", gammas=args.gammas)
    known = runners["best"].controller
    # Both know the costs of programs, as in all but a first rollout.
    new = Controller(known.control, known.gammas, patience=PATIENCE)
    new.table = copied(known).table
    found: dict[str, list[str]] = {"experienced": [], "new": []}

    def case(name: str, source: Controller) -> float:
        runner.controller = copied(source)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seconds = runner.run()
        found[name] += [str(w.message) for w in caught]
        return seconds

    seconds = measure.interleave(
        {
            "ar": runners["ar"].run,
            "experienced": lambda: case("experienced", known),
            "new": lambda: case("new", new),
        },
        args.repeats,
        desc=f"{task.name}: noise",
    )
    out = runner.outs[-1]
    return {
        "part": "noise",
        "ar_s": measure.spread(seconds["ar"]),
        "loss": {
            name: measure.paired_ratio(seconds[name], seconds["ar"]) for name in found
        },
        "warned": {name: len(texts) for name, texts in found.items()},
        "warning": next(iter(found["experienced"]), None),
        "repeats": args.repeats,
        "tokens_by_gamma": out.stats.tokens,
        "rounds_by_gamma": out.stats.rounds,
        "compiled": [name for each in runner.outs for name, _ in each.stats.compiled],
        "agreement": task.compared(runners["ar"].completions(), completions_of(out)),
    }


@contextlib.contextmanager
def busy_processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Yield a list for processes that the caller starts; they end with the context."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def slowed(task: Task, runners: Mapping[str, Runner], args: Args) -> dict[str, Any]:
    """Return how the table follows when every core gets other work half-way."""
    runner = Runner(task, "best", gammas=args.gammas)
    runner.controller = copied(runners["best"].controller)
    table = runner.controller.table
    before = {program: table.round_seconds(program) for program in table.seconds}
    runner.controller.table = watched = WatchedTable(
        table.seconds, table.rounds, table.passes, table.slowdown
    )
    onset, ended = 0, 0

    with busy_processes() as processes:

        def on_finish(sequence_id: int, completion: Any) -> None:
            nonlocal onset, ended
            ended += 1
            if not processes and 2 * ended >= len(task.prompts):
                command = [sys.executable, "-c", "while True: pass"]
                for _ in range(2 * (os.cpu_count() or 1)):
                    processes.append(subprocess.Popen(command))
                onset = len(watched.notes)

        out = runner.sample(on_finish=on_finish)
    # In units of what the round of each program took before.
    notes = [
        (reading / usual, known / usual)
        for program, reading, known in watched.notes
        if (usual := before.get(program))
    ]
    after = notes[onset:]
    seconds = [moment.duration_s for moment in out.stats.timeline[-len(after) :]]
    level = statistics.median(reading for reading, _ in after)
    wanted = 1 + FOLLOWED_SHARE * (level - 1)
    followed = [i for i, (_, known) in enumerate(after) if known >= wanted]
    return {
        "part": "slowed",
        "windows_before": onset,
        "windows_after": len(after),
        "slowed_to": level,
        "windows_to_follow": followed[0] + 1 if followed else None,
        "seconds_to_follow": sum(seconds[: followed[0] + 1]) if followed else None,
        "readings_after": [reading for reading, _ in after],
        "known_after": [known for _, known in after],
        "tokens_by_gamma": out.stats.tokens,
        "compiled": [name for name, _ in out.stats.compiled],
        "agreement": task.compared(runners["ar"].completions(), completions_of(out)),
    }


def points(args: Args) -> Iterator[dict[str, Any]]:
    """Yield a point for each preset and disturbance."""
    for preset in args.presets:
        forget_engines()
        size = SIZES[preset]
        lengths = workloads.tail_lengths(size.num, size.max_new_tokens).tolist()
        task = planned_task(
            preset, lengths, slots=size.slots, max_new_tokens=size.max_new_tokens
        )
        runners = {
            name: Runner(task, name, gammas=args.gammas) for name in ("ar", "best")
        }
        for runner in runners.values():
            runner.warm_up()
        runners["ar"].run()
        runners["best"].run()
        for disturb in (with_noise, slowed):
            yield {
                "preset": preset,
                "workload": "tail",
                "rows": size.slots,
                "dtype": task.dtype,
                "num_prompts": size.num,
                **disturb(task, runners, args),
            }


def lines(point: Mapping[str, Any]) -> str:
    """Return a point as text."""
    agreement = point["agreement"]
    tokens = (
        f"{agreement['num_ties']} ties, {len(agreement['unexplained'])} wrong tokens"
    )
    if point["part"] == "noise":
        losses = ", ".join(
            f"{name} {100 * (loss['median'] - 1):+.1f} % "
            f"(quartiles {100 * (loss['q1'] - 1):+.1f} to {100 * (loss['q3'] - 1):+.1f}"
            f" %), warned in {point['warned'][name]} of {point['repeats']}"
            for name, loss in point["loss"].items()
        )
        return f"{point['preset']}: a draft of noise, against ar: {losses}; {tokens}"
    return (
        f"{point['preset']}: slowed to {point['slowed_to']:.2f} times the usual "
        f"seconds; the table is {100 * FOLLOWED_SHARE:.0f} % of the way after "
        f"{point['windows_to_follow']} of {point['windows_after']} windows, "
        f"{point['seconds_to_follow'] or 0:.2f} s; {tokens}"
    )


def rows_of(found: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows, one per point."""
    rows: list[tuple[Any, ...]] = []
    for p in found:
        if p["part"] == "noise":
            experienced, new = (p["loss"][name] for name in ("experienced", "new"))
            said = (
                f"{100 * (experienced['median'] - 1):+.1f} % over ar; new "
                f"controller {100 * (new['median'] - 1):+.1f} %"
            )
        else:
            followed = "not followed"
            if p["windows_to_follow"] is not None:
                followed = (
                    f"followed after {p['windows_to_follow']} windows, "
                    f"{p['seconds_to_follow']:.2f} s"
                )
            said = f"rounds take {p['slowed_to']:.2f} times as long; {followed}"
        wrong = len(p["agreement"]["unexplained"])
        rows.append((p["preset"], p["rows"], p["part"], said, wrong))
    return ("decoder", "slots", "disturbance", "found", "wrong tokens"), rows


def main(args: Args) -> dict[str, Any]:
    """Disturb, print and write the record after every point; return it."""
    if args.quick:
        args = dataclasses.replace(args, presets=("tiny",), gammas=(2,), repeats=3)
    out = records.results_dir(args.out, args.quick)
    settings = {"gammas": args.gammas, "repeats": args.repeats}
    record = records.new_record("disturbed", settings)
    for point in points(args):
        record["points"].append(point)
        records.save(out / "disturbed.json", record)
        print(lines(point), flush=True)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.disturbed"))
