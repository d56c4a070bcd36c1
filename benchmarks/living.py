"""Rollouts that are interrupted, resumed, answered and shared, in any order.

    python -m benchmarks.living                          # a million steps
    python -m benchmarks.living --seed 17 --steps 1      # one life of them again

A step is one event of a life (`lib/living.py`): a window of a program that can run, an
answer to a turn, an interrupt, a failure, a call that goes on elsewhere, other
parameters, a session with less room, a torn journal. They are drawn at random. After
each, whatever can be seen is held to a reference that samples every sequence alone,
token by token, from parameters, text, key, sequence id and position; in float64, so
that nothing is forgiven.

A difference is printed with the seed of its life and written into the record, with the
events that led to it, and the exit code is 1. Nothing depends on the clock.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from benchmarks.lib import events, living, records, tables
from benchmarks.lib.known import TOOL, VOCAB_SIZE, Answer, answer_of

LIFE_STEPS = 500


@dataclasses.dataclass(frozen=True)
class Args:
    """What to run.

    Args:
      steps: how many, in lives of 500. seed: of the first life; every life has the next
        one.
      out: where to write. quick: at most 2000 steps.
    """

    steps: int = 1_000_000
    seed: int = 0
    out: Path | None = None
    quick: bool = False


class Drawn:
    """Draws what happens in a life.

    Args:
      seed: of the draws. steps: after which the life ends.
    """

    def __init__(self, seed: int, steps: int = LIFE_STEPS) -> None:
        self._random, self._left = random.Random(seed), steps

    def __call__(self, point: events.Point) -> events.Event:
        """Return what happens at a point."""
        self._left -= 1
        if self._left < 0:
            return events.End()
        return self._between(point) if point.kind == "between" else self._within(point)

    def _chance(self, share: float) -> bool:
        return self._random.random() < share

    def _pick(self, *values: Any) -> Any:
        return self._random.choice(values)

    def _within(self, point: events.Point) -> events.Event:
        if point.rooms and self._chance(0.45):
            turn = self._random.randrange(len(point.rooms))
            return events.Give(turn, self._answer(point.rooms[turn]))
        if point.can_halt and self._chance(0.03):
            return events.Halt()
        if self._chance(0.02):
            return events.Break(self._chance(0.4), self._chance(0.5))
        if point.kind == "waiting":
            return events.Wait()
        return events.Window(self._random.randrange(24), self._pick(1, 1, 1, 2, 3))

    def _answer(self, room: int) -> Answer:
        if self._chance(0.15):
            return self._pick(None, None, None, TOOL)
        return answer_of([self._random.randrange(VOCAB_SIZE) for _ in range(3)], room)

    def _between(self, point: events.Point) -> events.Event:
        if point.has_journal and self._chance(0.1):
            return events.Tear(self._random.random())
        if self._chance(0.12):
            return events.Learn(self._random.randrange(events.NUM_PARAMS))
        if self._chance(0.08):
            return events.Share(self._pick(None, *events.PROMPT_BYTES))
        if not point.can_go_on or self._chance(0.8 if point.is_over else 0.15):
            return self._begin()
        return events.GoOn(
            raised=self._pick(0, 0, 0, 2),
            is_answered=self._pick(None, None, None, True, False),
            has_journal=self._pick(None, None, None, True, False),
            style=self._style(),
        )

    def _begin(self) -> events.Begin:
        return events.Begin(
            prompts=tuple(
                self._random.randrange(events.NUM_PROMPTS)
                for _ in range(self._random.randint(1, 3))
            ),
            n=self._pick(1, 2),
            key=self._random.randrange(events.NUM_KEYS),
            temperature=self._pick(0, 0, 1, 2),
            stops=self._pick(0, 0, 1, 2),
            limit=self._random.randint(2, events.MOST_NEW),
            is_answered=self._chance(0.6),
            turn_tokens=self._pick(None, 2, 4),
            max_turns=self._pick(None, None, 1, 3),
            carried=self._pick(0, 0, 1, 2),
            has_journal=self._chance(0.4),
            style=self._style(),
        )

    def _style(self) -> events.Style:
        return events.Style(
            slots=self._pick(*events.SLOTS),
            gammas=self._pick(0, 1, 1),
            draft=self._random.randrange(events.NUM_PARAMS),
            is_stoppable=self._chance(0.7),
            finished=self._pick(*[None] * 6, 1, 3),
            groups=self._pick(*[None] * 6, 1, 2),
            tokens=self._pick(*[None] * 6, 5, 15),
            from_file=self._chance(0.1),
            is_noted=self._chance(0.5),
        )


@dataclasses.dataclass
class Outcome:
    """What a life did, and what was wrong with it.

    counts: numbers by name. problem: in words; None if all is well. log: its events.
    """

    seed: int
    counts: collections.Counter[str]
    problem: str | None
    log: list[events.Event]


def run(seed: int, steps: int = LIFE_STEPS) -> Outcome:
    """Run a life of a seed."""
    with tempfile.TemporaryDirectory(prefix="er_jax_living_") as folder:
        life = living.Life(Drawn(seed, steps), Path(folder), seed)
        problem = None
        try:
            life.live()
        except Exception as error:
            # Any failure is a finding, and is told with its seed.
            problem = f"{type(error).__name__}: {error}"
    life.counts["lives"] = 1
    life.counts["differences"] = problem is not None
    return Outcome(seed, life.counts, problem, life.log)


def told(outcome: Outcome) -> str:
    """Return what was wrong with a life, its last events, and what repeats it."""
    command = f"python -m benchmarks.living --seed {outcome.seed} --steps 1"
    last = [str(event) for event in outcome.log[-10:]]
    lines = [f"DIFFERENCE after {len(outcome.log)} events, again by: {command}"]
    return "\n".join([*lines, *last, str(outcome.problem)])


def run_all(steps: int, seed: int) -> list[Outcome]:
    """Run lives until there were enough steps; print each difference at once.

    Args:
      steps: at least so many. seed: of the first life.
    """
    outcomes: list[Outcome] = []
    with tqdm(total=steps, unit="step") as bar:
        while bar.n < steps:
            outcome = run(seed + len(outcomes))
            outcomes.append(outcome)
            bar.update(max(outcome.counts["steps"], 1))
            if outcome.problem is not None:
                bar.write(told(outcome))
            else:
                outcome.log.clear()
    return outcomes


# Rows of the table: what they say, and the counts that they add up.
ROWS = {
    "lives": "lives",
    "steps": "steps",
    "windows": "window",
    "turns answered, refused or failed at": "give",
    "waits while all sequences wait for answers": "wait",
    "calls told to end early": "halt",
    "interrupts and failures decided upon": "break",
    "requests begun": "begin",
    "calls that go on": "goon",
    "new parameters, or old ones again": "learn",
    "sessions begun or left": "share",
    "journals torn": "tear",
    "came of it: calls that returned": "calls returned",
    "calls interrupted": "calls interrupted",
    "calls that failed": "calls failed",
    "completions begun": "completions",
    "completions told of as finished": "completions finished",
    "completions carried over to other requests": "completions carried over",
    "tokens sampled": "tokens",
    "tokens resumed": "tokens resumed",
    "drafts kept": "drafts kept",
    "prompts prefilled": "prompts prefilled",
    "completions started from entries in the batch": "prompts cloned",
    "prompts found in a session": "prompts reused",
    "prompts evicted": "prompts evicted",
    "prompts dropped for new parameters": "prompts outdated",
    "turns asked about": "turns asked about",
    "of them, refused": "refusals",
    "of them, failed at": "tool failures",
    "answers put behind a row": "answers put behind a row",
    "calls that went on with a journal": "journals gone on with",
    "differences": "differences",
}


def rows_of(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows: how often each event was, and what came of them."""
    (point,) = points
    return ("what", "number"), [(name, point[key]) for name, key in ROWS.items()]


def main(args: Args) -> dict[str, Any]:
    """Run, print a table, write and return the record.

    Raises:
      SystemExit: something differed; the record says what.
    """
    if args.quick:
        args = dataclasses.replace(args, steps=min(args.steps, 2000))
    record = records.new_record("living", records.settings_of(args))
    start, cpu_s = time.perf_counter(), time.process_time()
    outcomes = run_all(args.steps, args.seed)
    record["seconds"] = time.perf_counter() - start
    record["cpu_s"] = time.process_time() - cpu_s
    totals: collections.Counter[str] = collections.Counter(
        dict.fromkeys(ROWS.values(), 0)
    )
    for outcome in outcomes:
        totals.update(outcome.counts)
    about = {"preset": "sum over a text", "rows": max(events.SLOTS), "dtype": "float64"}
    record["points"] = [about | dict(totals)]
    record["differences"] = [
        {"seed": o.seed, "problem": o.problem, "events": [str(e) for e in o.log]}
        for o in outcomes
        if o.problem is not None
    ]
    records.save(records.results_dir(args.out, args.quick) / "living.json", record)
    print(tables.text(rows_of(record["points"])))
    print(summary(record))
    if record["differences"]:
        seeds = [found["seed"] for found in record["differences"]]
        raise SystemExit(f"{len(seeds)} lives differ, seeds {seeds}; see above")
    return record


def summary(record: Mapping[str, Any]) -> str:
    """Return a sentence about the run."""
    (point,), settings = record["points"], record["settings"]
    last = settings["seed"] + point["lives"] - 1
    return (
        f"Seeds {settings['seed']} to {last}: {point['steps']} steps in "
        f"{record['seconds']:.0f} s, {record['cpu_s']:.0f} s of a core, compilation "
        f"included; {point['differences']} lives differ."
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.living"))
