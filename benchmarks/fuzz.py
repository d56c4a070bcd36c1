"""Random rollouts; every completion is compared with an independent reference.

    python -m benchmarks.fuzz                            # 2 400 schedules
    python -m benchmarks.fuzz --seed 17 --schedules 1    # one of them again

A schedule (`lib/schedules.py`) says all that may be chosen about a rollout. Its
controller takes any program at any window, so that the batch is compacted, grown and
refilled all the time. Some of its completions are then sampled once more, each in a
rollout of its own under the same sequence id.

With `coupled`, and at temperature 0 with any rule, tokens have to be those of
`lib/reference.py`, in float32 up to ties. With the other rules every token must have
been possible. Log-probabilities, finish reasons and the arrays around the completions
are always checked.

A difference is printed with its seed and written into the record, and the exit code is
1. Nothing depends on the clock or on what was compiled before, so a seed repeats it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import tyro
from tqdm import tqdm

import er_jax
from benchmarks.lib import records, tables
from benchmarks.lib.controllers import Restless
from benchmarks.lib.reference import Found, Reference, settings_of
from benchmarks.lib.schedules import (
    FAMILIES,
    MAX_LENGTH,
    POLICIES,
    QUICK_FAMILIES,
    Family,
    Schedule,
    drawn,
    params_of,
    policy_of,
)
from er_jax.acceptance import ACCEPT_RULES
from er_jax.engine.kept import forget_engines
from er_jax.scheduler import batch
from er_jax.scheduler.options import Options


@dataclasses.dataclass(frozen=True)
class Args:
    """What to run.

    Args:
      schedules: how many. seed: of the first; every schedule has the next one.
      out: where to write. quick: few programs, and at most 60 schedules.
    """

    schedules: int = 2400
    seed: int = 0
    out: Path | None = None
    quick: bool = False


@dataclasses.dataclass
class Outcome:
    """What a schedule did, and what was wrong with it.

    counts: numbers by name, to be added up over schedules. compile_s: seconds of
      compiling the rollouts' programs. problems: in words; none if all is well.
    """

    schedule: Schedule
    counts: collections.Counter[str] = dataclasses.field(
        default_factory=lambda: collections.Counter(schedules=1)
    )
    compile_s: float = 0.0
    problems: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def _short_windows(rounds: int) -> Iterator[None]:
    """Have windows end after so many rounds, whatever the clock says.

    The first window of a program that is not compiled would have one round, and a
    schedule would depend on those before it. So all programs count as compiled.
    """
    with (
        mock.patch.multiple(batch, WINDOW_S=0.0, MIN_ROUNDS=rounds),
        mock.patch.object(Options, "is_compiled", lambda self, program: True),
        warnings.catch_warnings(),
    ):
        # Poison and broken drafts are intended here.
        warnings.filterwarnings("ignore", ".*non-finite logit", RuntimeWarning)
        warnings.filterwarnings("ignore", "drafts were kept", RuntimeWarning)
        yield


def run(schedule: Schedule) -> Outcome:
    """Run a schedule and compare all that it returns."""
    with jax.enable_x64(schedule.family.dtype == "float64"):
        return _run(schedule)


def _run(schedule: Schedule) -> Outcome:
    family = schedule.family
    policy = policy_of(family)
    params = jax.tree.map(jax.numpy.asarray, params_of(schedule))
    key = jax.random.key(schedule.seed)
    config = er_jax.RolloutConfig(accept=family.rule, **schedule.config)
    reference = Reference(
        policy,
        params.policy,
        settings_of(config, key),
        max_new_tokens=config.max_new_tokens,
        length=MAX_LENGTH[family.size],
        dtype=family.dtype,
    )
    outcome = Outcome(schedule)
    everything = list(range(len(schedule.sequence_ids)))
    for rows in (everything, *([row] for row in schedule.alone)):
        if rows == everything:
            own, prompts = config, list(schedule.prompts)
        else:
            own = dataclasses.replace(config, n=1)
            prompts = [schedule.prompts[row // config.n] for row in rows]
        ids = [schedule.sequence_ids[row] for row in rows]
        controller = Restless(
            config.control, config.gammas, family.rows, schedule.seed + rows[0]
        )
        try:
            with _short_windows(schedule.rounds):
                out = er_jax.rollout(
                    policy, params, prompts, key=key, config=own, sequence_ids=ids,
                    controller=controller,
                )  # fmt: skip
        except Exception as error:
            # Any failure is a finding, and is told with its seed.
            outcome.problems.append(f"raised {type(error).__name__}: {error}")
            continue
        bad, compared = compare(reference, prompts, own, ids, out)
        is_alone = len(rows) < len(everything)
        outcome.problems += [f"alone, {line}" if is_alone else line for line in bad]
        outcome.counts.update(compared + counts_of(out))
        outcome.counts["alone"] += is_alone
        outcome.compile_s += out.stats.seconds["compile"]
    outcome.counts["differences"] = len(outcome.problems)
    return outcome


def compare(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    config: er_jax.RolloutConfig,
    ids: Sequence[int],
    out: er_jax.Rollout,
) -> tuple[list[str], collections.Counter[str]]:
    """Return what is wrong with a rollout, and counts of what was compared."""
    counts: collections.Counter[str] = collections.Counter()
    bad = misplaced(prompts, config, ids, out)
    is_decided = config.accept == "coupled" or config.temperature == 0
    for row, sequence_id in enumerate(ids):
        prompt = prompts[row // config.n]
        length = int(out.lengths[row])
        found = Found(
            tuple(out.completion_ids[row, :length].tolist()),
            tuple(out.logprobs[row, :length].tolist()),
            str(out.finish_reason[row]),
        )
        wrong = reference.problems(prompt, found)
        if is_decided:
            expected = reference.completion(prompt, sequence_id, found.tokens)
            counts["ties"] += expected.num_ties
            if (found.tokens, found.reason) != (expected.tokens, expected.reason):
                wrong.append(f"{found.tokens}, {found.reason!r}, is not {expected}")
        bad += [f"completion {row}, sequence {sequence_id}: {line}" for line in wrong]
        counts["completions"] += 1
        counts["decided"] += is_decided
        counts["tokens"] += length
        counts[f"ended by {found.reason}"] += 1
        counts["at the limit"] += len(prompt) + length == reference.length
    return bad, counts


def misplaced(
    prompts: Sequence[Sequence[int]],
    config: er_jax.RolloutConfig,
    ids: Sequence[int],
    out: er_jax.Rollout,
) -> list[str]:
    """Return what is wrong with the arrays around the completions."""
    bad = []
    if out.sequence_ids.tolist() != list(ids):
        bad.append(f"sequence_ids are {out.sequence_ids.tolist()}, not {list(ids)}")
    for row in range(len(ids)):
        kept = out.prompt_ids[row][out.prompt_mask[row]]
        if kept.tolist() != list(prompts[row // config.n]):
            bad.append(f"prompt_ids[{row}] holds {kept.tolist()}")
    places = np.arange(config.max_new_tokens)[None]
    is_sampled = places < out.lengths[:, None]
    if not np.array_equal(out.completion_mask, is_sampled):
        bad.append("completion_mask is not that of the lengths")
    if (out.completion_ids[~is_sampled] != config.pad_id).any():
        bad.append("completion_ids hold more than pad_id behind a completion")
    if (out.logprobs[~is_sampled] != 0).any():
        bad.append("logprobs are not 0 behind a completion")
    if out.stats.num_tokens != out.lengths.sum():
        bad.append(f"stats count {out.stats.num_tokens} tokens of {out.lengths.sum()}")
    return bad


def counts_of(out: er_jax.Rollout) -> collections.Counter[str]:
    """Return counts of windows, and of changes of the batch between them."""
    moments = out.stats.timeline
    counts: collections.Counter[str] = collections.Counter(
        windows=len(moments), cloned=out.stats.num_cloned
    )
    for old, new in itertools.pairwise(moments):
        counts["switches"] += old[4:7] != new[4:7]  # rows, cache length, gamma
        counts["fewer rows"] += new.rows < old.rows
        counts["more rows"] += new.rows > old.rows
        counts["longer cache"] += new.cache_length > old.cache_length
        counts["shorter cache"] += new.cache_length < old.cache_length
        counts["refills"] += new.live > old.num_live_after
    for gamma, histogram in out.stats.accepted.items():
        counts["drafted"] += gamma * int(histogram.sum())
        counts["kept"] += int(np.arange(gamma + 1) @ histogram)
    return counts


def fuzz(schedules: Sequence[Schedule], again: str = "") -> list[Outcome]:
    """Run schedules, those of a family together; print each difference at once.

    Args:
      schedules: in any order.
      again: further options of the command that runs one of them again.
    """
    ordered = sorted(schedules, key=lambda s: (_name(s.family), s.seed))
    outcomes = []
    with tqdm(total=len(ordered), unit="schedule") as bar:
        for family, own in itertools.groupby(ordered, key=lambda s: s.family):
            bar.set_postfix_str(_name(family), refresh=False)
            for schedule in own:
                outcome = run(schedule)
                outcomes.append(outcome)
                bar.update()
                if outcome.problems:
                    bar.write(told(outcome, again))
            # A process on Linux has room for some hundred programs.
            forget_engines()
    return outcomes


def _name(family: Family) -> str:
    return f"{family.architecture} {family.rule} {family.dtype} {family.size}"


def told(outcome: Outcome, again: str = "") -> str:
    """Return what was wrong with a schedule, and the command that shows it again."""
    command = f"python -m benchmarks.fuzz --seed {outcome.schedule.seed} --schedules 1"
    lines = [f"DIFFERENCE, again by: {command}{again}", str(outcome.schedule)]
    return "\n".join(lines + outcome.problems)


def points_of(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a point for each policy, attention, rule and dtype: sums of the counts."""
    Name = tuple[str, str, str, str]
    sums: dict[Name, collections.Counter[str]] = {}
    rows: dict[Name, int] = {}
    for outcome in outcomes:
        schedule, family = outcome.schedule, outcome.schedule.family
        attention = "plain" if family.architecture == "plain" else "library"
        if schedule.policy == "toy":
            attention = "none"
        name = (schedule.policy, attention, family.rule, family.dtype)
        sums.setdefault(name, collections.Counter()).update(outcome.counts)
        rows[name] = max(rows.get(name, 0), *family.rows)
    order = sorted(sums, key=lambda name: (POLICIES.index(name[0]), *name[1:]))
    return [
        {
            "preset": name[0],
            "attention": name[1],
            "rule": name[2],
            "dtype": name[3],
            "rows": rows[name],
            **dict(sorted(sums[name].items())),
        }
        for name in order
    ]


# Columns of the table, and the counts that they add up.
COLUMNS = {
    "completions": "completions",
    "token for token": "decided",
    "again alone": "alone",
    "tokens": "tokens",
    "ended non-finite": "ended by nonfinite",
    "at the last position": "at the limit",
    "windows": "windows",
    "switches of program": "switches",
    "refills": "refills",
    "ties": "ties",
    "differences": "differences",
}


def total(points: Sequence[Mapping[str, Any]], name: str, **of: str) -> int:
    """Return the sum of a count over the points that have the values `of`."""
    chosen = [p for p in points if all(p[key] == of[key] for key in of)]
    return sum(point.get(name, 0) for point in chosen)


def rows_of(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows: one for each policy and attention, and one for all."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault((point["preset"], point["attention"]), []).append(point)
    groups["all", ""] = list(points)
    rows = [
        (
            *name,
            *(total(own, "schedules", rule=rule) for rule in ACCEPT_RULES),
            *(total(own, key) for key in COLUMNS.values()),
        )
        for name, own in groups.items()
    ]
    schedules = [f"schedules, {rule}" for rule in ACCEPT_RULES]
    return ("policy", "attention", *schedules, *COLUMNS), rows


def summary(record: Mapping[str, Any]) -> str:
    """Return two sentences about the run."""
    settings, points = record["settings"], record["points"]
    count = functools.partial(total, points)
    last = settings["seed"] + settings["schedules"] - 1
    return (
        f"Seeds {settings['seed']} to {last}, {count('schedules', dtype='float32')} "
        f"of them in float32: {count('kept')} of {count('drafted')} drafts kept; rows "
        f"became fewer {count('fewer rows')} times and more {count('more rows')} "
        f"times, the cache longer {count('longer cache')} and shorter "
        f"{count('shorter cache')} times; {count('cloned')} completions started from "
        f"entries already there. {record['seconds']:.0f} s, of them "
        f"{record['compile_s']:.0f} s compiling."
    )


def main(args: Args) -> dict[str, Any]:
    """Run, print a table, write and return the record.

    Raises:
      SystemExit: something differed; the record says what.
    """
    if args.quick:
        args = dataclasses.replace(args, schedules=min(args.schedules, 60))
    record = records.new_record("fuzz", records.settings_of(args))
    families = QUICK_FAMILIES if args.quick else FAMILIES
    start = time.perf_counter()
    outcomes = fuzz(
        [drawn(args.seed + i, families) for i in range(args.schedules)],
        " --quick" if args.quick else "",
    )
    record["seconds"] = time.perf_counter() - start
    record["compile_s"] = sum(outcome.compile_s for outcome in outcomes)
    record["points"] = points_of(outcomes)
    record["differences"] = [
        {"schedule": dataclasses.asdict(o.schedule), "problems": o.problems}
        for o in outcomes
        if o.problems
    ]
    records.save(records.results_dir(args.out, args.quick) / "fuzz.json", record)
    print(tables.text(rows_of(record["points"])))
    print(summary(record))
    if record["differences"]:
        seeds = [found["schedule"]["seed"] for found in record["differences"]]
        raise SystemExit(f"{len(seeds)} schedules differ, seeds {seeds}; see above")
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.fuzz"))
