"""Rollouts whose process is killed, again and again, and gone on with elsewhere.

    python -m benchmarks.killed                        # 360 processes
    python -m benchmarks.killed --seed 17 --chains 1   # one chain of them again

A chain (`lib/chains.py`) is one rollout that several processes sample, one after
another, each with other slots, draft lengths, drafts and meshes. Each but the last gets
Ctrl-C, SIGTERM or SIGKILL, or ends by `until`: in a window, a prefill, a compaction, a
growth, a tool, `on_finish` or a write of the journal, or at any time. What it leaves is
held to what there was before and to a rollout that nothing disturbed
(`lib/survival.py`).

A difference is printed with the seed of its chain, and written into the record; the
exit code is 1. What a signal cuts off may depend on threads, so a seed repeats the
choices, and nearly always the rest.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from benchmarks.lib import life_process, records, survival, tables
from benchmarks.lib.chains import (
    ANY,
    AT_LIMIT,
    CTRL_C,
    KILL,
    KINDS,
    MOMENTS,
    TERM,
    Chain,
    Life,
    drawn,
    told,
)
from benchmarks.lib.known import Difference
from benchmarks.lib.life_process import ENDED, OUT, PROBLEM, SIGNALS, TOLD
from benchmarks.lib.survival import Kept, Survival
from er_jax import Rollout
from er_jax.costs.store import CACHE_VARIABLE

# A process that takes longer hangs. Compiling is slow where cores are shared.
HANGS_S = 240.0

WORKERS = 2

# Chains that are sampled undisturbed by one process, before they run.
AT_ONCE = 24

COLUMNS = (*MOMENTS, AT_LIMIT)


@dataclasses.dataclass(frozen=True)
class Args:
    """What to run.

    Args:
      lives: processes, at least. seed: of the first chain; every chain has the next
        one.
      chains: how many at most; None is as many as are needed.
      programs: folder that keeps compiled programs from run to run, of one commit; None
        is one of this run. To repeat a chain, most of the time is compilation.
      out: where to write. quick: at most 12 processes.
    """

    lives: int = 360
    seed: int = 0
    chains: int | None = None
    programs: Path | None = None
    out: Path | None = None
    quick: bool = False


@dataclasses.dataclass
class Outcome:
    """What became of a chain.

    counts: numbers by name, interrupts by (kind, moment) among them.
    worst: the largest difference of log-probabilities. problem: in words, None if all
    is well.
    """

    chain: Chain
    counts: collections.Counter[Any]
    worst: float
    problem: str | None


def processes() -> Any:
    """Return what starts processes: forks of one that has imported all, and run none.

    That one has no threads and no devices, whatever this process has.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.lib.life_process"])
    return context


class Runner:
    """Runs chains, several at a time.

    Args:
      folder: for all files. programs: folder of compiled ones; None is within that.
    """

    def __init__(self, folder: Path, programs: Path | None = None) -> None:
        self._processes = processes()
        self._folder, self._store = folder, programs or folder / "programs"
        self._store.mkdir(parents=True, exist_ok=True)

    def run(self, chains: Sequence[Chain]) -> Iterator[Outcome]:
        """Run chains; yield what became of each, in the order in which they end."""
        self._sample_undisturbed(chains)
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            running = [pool.submit(self._run_chain, chain) for chain in chains]
            for future in concurrent.futures.as_completed(running):
                yield future.result()

    def _sample_undisturbed(self, chains: Sequence[Chain]) -> None:
        """Sample what the chains will be held to."""
        for dtype in ("float64", "float32"):
            workloads = [c.workload for c in chains if c.workload.dtype == dtype]
            if workloads:
                self._do(life_process.undisturbed, self._folder, self._store, workloads)

    def _do(self, function: Any, *arguments: Any) -> None:
        process = self._processes.Process(target=function, args=arguments)
        process.start()
        process.join()
        self._raise_problem(self._folder)

    @staticmethod
    def _raise_problem(folder: Path) -> None:
        path = folder / PROBLEM
        if path.exists():
            raise Difference(f"a process failed:\n{path.read_text()}")

    def _run_chain(self, chain: Chain) -> Outcome:
        folder = self._folder / f"chain {chain.seed}"
        folder.mkdir()
        wanted = Rollout.load(self._folder / f"{chain.seed}.npz")
        is_exact = chain.workload.dtype == "float64"
        survived = Survival(survival.of_rollout(wanted), is_exact)
        counts: collections.Counter[Any] = collections.Counter(chains=1)
        problem = None
        try:
            self._run_lives(chain, folder, survived, counts)
        except Exception as error:
            # Any failure is a finding, and is told with its seed.
            problem = f"{type(error).__name__}: {error}"
        counts["differences"] = problem is not None
        return Outcome(chain, counts, survived.worst, problem)

    def _run_lives(
        self,
        chain: Chain,
        folder: Path,
        survived: Survival,
        counts: collections.Counter[Any],
    ) -> None:
        resumed, resume = survival.nothing(chain.workload.count), None
        journal = folder / "0.journal"
        returned: Path | None = None
        for life in chain.lives:
            if life.goes_on and returned is not None:
                resumed = survival.as_resumed(survived.known, chain.workload.limits)
                resume, survived.known = returned, resumed
                journal = folder / f"{life.number}.journal"
                counts["resumed from a file"] += 1
            own = folder / f"life {life.number}"
            own.mkdir()
            code = self._live(own, chain, life, resume, journal)
            returned = self._hold(
                own, life, code, survived, resumed, journal, counts
            )  # fmt: skip
            if survived.is_over and returned is not None:
                break
        counts["completions"] += chain.workload.count
        counts["tokens"] += survived.num_kept
        if not survived.is_same():
            counts["ties"] += self._proven_ties(chain, returned)

    def _live(
        self, folder: Path, chain: Chain, life: Life, resume: Path | None, journal: Path
    ) -> int:
        """Run a process, and return its exit code."""
        ours, theirs = self._processes.Pipe()
        process = self._processes.Process(
            target=life_process.live,
            args=(folder, self._store, chain.workload, life, resume, journal, theirs),
        )
        process.start()
        theirs.close()
        interrupt = life.interrupt
        if (
            interrupt is not None
            and interrupt.moment == ANY
            and interrupt.kind in SIGNALS
        ):
            with contextlib.suppress(EOFError, ProcessLookupError):
                ours.recv()
                time.sleep(interrupt.delay_s)
                os.kill(process.pid, SIGNALS[interrupt.kind])
        process.join(HANGS_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise Difference(f"life {life.number} hangs")
        ours.close()
        self._raise_problem(folder)
        return int(process.exitcode)

    def _hold(
        self,
        folder: Path,
        life: Life,
        code: int,
        survived: Survival,
        resumed: Sequence[Kept],
        journal: Path,
        counts: collections.Counter[Any],
    ) -> Path | None:
        """Hold what a life has left; return the file of what it returned, if it did."""
        interrupt, was = life.interrupt, survived.known
        ended = folder / ENDED
        is_dead = not ended.exists()
        if is_dead:
            # Ctrl-C may come before there is a batch, and then gives nothing.
            codes = {TERM: -SIGNALS[TERM], KILL: -SIGNALS[KILL], CTRL_C: 0}
            if interrupt is None or code != codes.get(interrupt.kind):
                raise Difference(f"life {life.number} ended with {code}")
        noted = survival.of_journal(journal, resumed)
        found, about = noted, dict[str, Any]()
        if not is_dead:
            found = survival.of_rollout(Rollout.load(folder / OUT))
            about = json.loads(ended.read_text())
        is_whole = not is_dead and all(kept.is_over for kept in found)
        is_broken = about.get("how") == "interrupted"
        survived.hold(found, life.number)
        lines = (folder / TOLD).read_text().splitlines()
        survival.hold_told(
            [json.loads(line) for line in lines],
            was,
            found,
            resumed,
            is_whole=is_whole and not is_broken,
        )
        if not is_dead:
            survival.hold_noted(noted, found)
            survival.hold_counts(about, was, found, life.number)
        if is_dead or is_broken or not is_whole:
            assert interrupt is not None
            counts[interrupt.kind, interrupt.moment] += 1
            counts["interrupts"] += 1
        counts["lives"] += 1
        mesh = life.way.mesh
        counts["one device" if mesh is None else f"{mesh[0]}x{mesh[1]}"] += 1
        counts["tokens of earlier lives"] += sum(map(len, was))
        counts["completions of earlier lives"] += sum(kept.is_over for kept in was)
        for name in ("drafts kept", "shapes"):
            counts[name] += about.get(name, 0)
        return None if is_dead else folder / OUT

    def _proven_ties(self, chain: Chain, found: Path | None) -> int:
        """Return how many completions differ, all from a tie on."""
        assert found is not None
        arguments = (self._folder, self._store, chain.workload, found)
        self._do(life_process.prove, *arguments)
        self._raise_problem(found.parent)
        proof = json.loads((found.parent / "proof").read_text())
        if proof["unexplained"]:
            raise Difference(f"completions {proof['unexplained']} differ, and no tie")
        return int(proof["ties"])


def run_all(
    lives: int, seed: int, *, chains: int | None = None, programs: Path | None = None
) -> list[Outcome]:
    """Run chains until there were enough processes; print each difference at once.

    Args:
      lives: at least so many processes. seed: of the first chain.
      chains: at most so many; None is no limit. programs: as for `Runner`.
    """
    os.environ[CACHE_VARIABLE] = ""
    outcomes: list[Outcome] = []
    with (
        tempfile.TemporaryDirectory(prefix="er_jax_killed_") as folder,
        tqdm(total=lives, unit="process") as bar,
    ):
        runner = Runner(Path(folder), programs)
        while bar.n < lives and (chains is None or len(outcomes) < chains):
            left = AT_ONCE if chains is None else min(AT_ONCE, chains - len(outcomes))
            own = [drawn(seed + len(outcomes) + i) for i in range(left)]
            for outcome in runner.run(own):
                outcomes.append(outcome)
                bar.update(outcome.counts["lives"])
                if outcome.problem is not None:
                    bar.write(told_of(outcome))
    return sorted(outcomes, key=lambda outcome: outcome.chain.seed)


def told_of(outcome: Outcome) -> str:
    """Return what was wrong with a chain, and what repeats it."""
    command = f"python -m benchmarks.killed --seed {outcome.chain.seed} --chains 1"
    return f"DIFFERENCE, again by: {command}\n{outcome.chain}\n{outcome.problem}"


def rows_of(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows: interrupts by moment and by kind."""
    rows: list[tuple[Any, ...]] = [
        (point["moment"], *(point[kind] for kind in KINDS), sum(_kinds(point)))
        for point in points
    ]
    totals = [sum(column) for column in zip(*map(_kinds, points), strict=True)]
    rows.append(("all", *totals, sum(totals)))
    return ("during", *KINDS, "all"), rows


def _kinds(point: Mapping[str, Any]) -> list[int]:
    return [point[kind] for kind in KINDS]


def main(args: Args) -> dict[str, Any]:
    """Run, print a table, write and return the record.

    Raises:
      SystemExit: something differed; the record says what.
    """
    if args.quick:
        args = dataclasses.replace(args, lives=min(args.lives, 12))
    start = time.perf_counter()
    num_known = 0 if args.programs is None else len(list(args.programs.glob("*.lock")))
    outcomes = run_all(
        args.lives, args.seed, chains=args.chains, programs=args.programs
    )
    seconds = time.perf_counter() - start
    record = records.new_record("killed", records.settings_of(args, "programs"))
    record["seconds"], record["programs known"] = seconds, num_known
    totals: collections.Counter[Any] = collections.Counter()
    for outcome in outcomes:
        totals.update(outcome.counts)
    ways = [life.way for outcome in outcomes for life in outcome.chain.lives]
    about = {
        "preset": "decoder of one layer",
        "rows": max(way.slots for way in ways),
        "dtype": "float64, float32",
    }
    record["points"] = [
        about | {"moment": moment} | {kind: totals[kind, moment] for kind in KINDS}
        for moment in COLUMNS
    ]
    record["totals"] = {name: totals[name] for name in NAMES} | {
        "worst": max(outcome.worst for outcome in outcomes)
    }
    record["differences"] = [
        {"problem": o.problem, "chain": told(o.chain)}
        for o in outcomes
        if o.problem is not None
    ]
    records.save(records.results_dir(args.out, args.quick) / "killed.json", record)
    print(tables.text(rows_of(record["points"])))
    print(summary(record))
    if record["differences"]:
        seeds = [found["chain"]["seed"] for found in record["differences"]]
        raise SystemExit(f"{len(seeds)} chains differ, seeds {seeds}; see above")
    return record


# Of the record's totals.
NAMES = (
    *("chains", "lives", "interrupts", "one device", "2x2", "4x2", "completions"),
    *("tokens", "tokens of earlier lives", "completions of earlier lives"),
    *("resumed from a file", "drafts kept", "shapes", "ties", "differences"),
)


def summary(record: Mapping[str, Any]) -> str:
    """Return sentences about the run."""
    found, seed = record["totals"], record["settings"]["seed"]
    return (
        f"Seeds {seed} to {seed + found['chains'] - 1}: {found['lives']} processes in "
        f"{record['seconds']:.0f} s ({record['programs known']} programs had been "
        f"compiled before), {found['interrupts']} of them interrupted; "
        f"{found['one device']} on one device, {found['2x2']} on a mesh of 2x2 and "
        f"{found['4x2']} of 4x2; {found['resumed from a file']} resumed what was "
        "returned, the others a journal. They found "
        f"{found['tokens of earlier lives']} tokens and "
        f"{found['completions of earlier lives']} whole completions of earlier ones, "
        f"and sampled none of them again. {found['completions']} completions of "
        f"{found['tokens']} tokens in the end: {found['differences']} chains differ, "
        f"{found['ties']} completions at a proven tie; log-probabilities by at most "
        f"{found['worst']:.1e}."
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.killed"))
