"""What becomes of a rollout when something goes wrong while it runs.

    python -m benchmarks.disturbed
    python -m benchmarks.disturbed --quick

*noise*: the draft is replaced by random codes. `best`, which knew good drafts, and
`best` that knows nothing, against plain decoding: what is lost, and whether a warning
says so. *slowed*: when half of the completions have ended, another process takes every
core. How many windows it takes the controller's table to follow. Both demand the tokens
of plain decoding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
import numpy as np
import tyro

import er_jax
from benchmarks import measure, workloads
from benchmarks.rollout import SIZES, Runner, Task, planned_task
from benchmarks.rollout import Args as RolloutArgs
from er_jax import Controller, PolicyParams, Rollout
from er_jax.costs.table import LatencyTable
from er_jax.engine import kept
from er_jax.types import Program

# Followed, when the table has gone this share of the way to the new level.
FOLLOWED_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class Args:
    """What to disturb.

    Args:
      presets: decoders, by their names in benchmarks/presets.py.
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


def differences(out: Rollout, expected: Rollout, task: Task) -> dict[str, Any]:
    """Return how tokens compare with those of plain decoding, ties told apart."""

    def texts(found: Rollout) -> list[np.ndarray]:
        pairs = zip(found.completion_ids, found.lengths, strict=True)
        return [ids[:length] for ids, length in pairs]

    compared = workloads.compare(
        task.policy,
        task.params.policy,
        task.prompts,
        texts(expected),
        texts(out),
        workloads.sampling_settings(task.key, task.stop_ids),
        workloads.TIE_GAP[task.dtype],
    )
    return dataclasses.asdict(compared)


def copied(controller: Controller, patience: float) -> Controller:
    """Return a controller that knows what another one does."""
    copy = Controller(controller.control, controller.gammas, patience=patience)
    copy.load_state_dict(controller.state_dict())
    return copy


def with_noise(
    task: Task, runners: Mapping[str, Runner], args: Args, patience: float
) -> dict[str, Any]:
    """Return what a draft of noise costs, against plain decoding."""
    params = PolicyParams(task.params.policy, noise_draft(task.params.draft))
    noisy = dataclasses.replace(task, params=params)
    runner = Runner(noisy, "best", RolloutArgs(gammas=args.gammas))
    known = runners["best"].controller
    # The cost of programs is known to both, as it is in all but a first rollout.
    new = Controller(known.control, known.gammas, patience=patience)
    new.table = copied(known, patience).table
    found: dict[str, list[str]] = {"experienced": [], "new": []}

    def case(name: str, source: Controller) -> float:
        runner.controller = copied(source, patience)
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
        "agreement": differences(out, runners["ar"].outs[-1], task),
    }


class WatchedTable(LatencyTable):
    """A table that notes what every window took, and what it says itself then."""

    def observe(self, program: Program, seconds: float, num_rounds: int) -> None:
        """Learn, and note: program, seconds per round, the table's of them."""
        super().observe(program, seconds, num_rounds)
        known_s = self.round_seconds(program)
        if num_rounds and known_s is not None:
            self.notes.append((program, seconds / num_rounds, known_s))

    @functools.cached_property
    def notes(self) -> list[tuple[Program, float, float]]:
        """All notes, in order."""
        return []


@contextlib.contextmanager
def busy_processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Hold processes that keep a core busy each; the caller starts them."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def slowed(
    task: Task, runners: Mapping[str, Runner], args: Args, patience: float
) -> dict[str, Any]:
    """Return how the table follows when every core gets other work half-way."""
    runner = Runner(task, "best", RolloutArgs(gammas=args.gammas))
    controller = copied(runners["best"].controller, patience)
    table = controller.table
    before = {program: table.round_seconds(program) for program in table.seconds}
    controller.table = watched = WatchedTable(
        table.seconds, table.rounds, table.passes, table.pace
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

        out = er_jax.rollout(
            task.policy,
            task.params,
            task.prompts,
            key=task.key,
            config=runner.config,
            controller=controller,
            on_finish=on_finish,
        )
    # In units of what each program took before.
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
        "agreement": differences(out, runners["ar"].outs[-1], task),
    }


def points(args: Args) -> Iterator[dict[str, Any]]:
    """Yield a point for each preset and disturbance."""
    settings = RolloutArgs(gammas=args.gammas)
    for preset in args.presets:
        kept.forget_engines()
        size = SIZES[preset]
        lengths = workloads.tail_lengths(size.num, size.max_new_tokens).tolist()
        task = planned_task(preset, settings, lengths, size.slots, size.max_new_tokens)
        runners = {name: Runner(task, name, settings) for name in ("ar", "best")}
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
                **disturb(task, runners, args, settings.patience),
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


def rows_of(
    found: Sequence[Mapping[str, Any]],
) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
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
    out = measure.results_dir(args.out, args.quick)
    settings = {"gammas": args.gammas, "repeats": args.repeats}
    record = measure.new_record("disturbed", settings)
    for point in points(args):
        record["points"].append(point)
        measure.save(out / "disturbed.json", record)
        print(lines(point), flush=True)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.disturbed"))
