"""What the first calls cost that know nothing, beside an oracle that knows the costs.

    python -m benchmarks.cold

Every program has to be compiled before it runs, and whether that pays depends on what
rounds cost, on how long rows turn out, and on how many calls will come. Here the
scheduler and a new `Controller` sample on a simulated engine whose clock counts rounds
and compilations, twenty calls in a row, for three policies. The oracle knows all of it,
the number of calls included: for each it has the best set of programs, compiled at
once. What is reported is the ratio of the totals of the first N calls.

Costs are round numbers in the shape of what was measured or counted: a decoder that
fits in a core's cache, where drafts never pay; one that does not; 7 billion parameters
on an H100 by the data sheet's bandwidth.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks import measure, scaling
from benchmarks.predicted import SimulatedEngine, SimulatedState
from er_jax import Controller, PolicyParams, RolloutConfig
from er_jax.config import DEFAULT_GAMMAS
from er_jax.costs import timing
from er_jax.costs.timing import neutral_sampling
from er_jax.figures import text_table
from er_jax.request import request_of
from er_jax.scheduler.loop import run
from er_jax.stats import RolloutStats
from er_jax.types import Program

LIMIT = 1.3
"""How many times the oracle's seconds the first calls may take."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of rounds and compilations of one policy.

    round_s: of a program's round. window_s: to compile an autoregressive window;
    drafting_s: one that drafts. other_s: to compile a move of rows, or anything small.
    start_s: what every first call compiles beside windows. slots, count: of each call.
    mean, longest: tokens of its completions, which end with equal chance at any token.
    keep: chance that a draft is kept.
    """

    round_s: Callable[[Program], float]
    window_s: float
    drafting_s: float
    other_s: float
    start_s: float
    slots: int
    count: int
    mean: int
    longest: int
    keep: float = 0.95

    def round_seconds(self, program: Program) -> float:
        """Return the seconds of a round."""
        return self.round_s(program)

    def compile_s(self, name: tuple[Any, ...]) -> float:
        """Return the seconds that a program takes to compile."""
        if name[0] != "window":
            return self.other_s
        return self.drafting_s if name[1].gamma else self.window_s


def _of_shares(
    step_s: Callable[[int], float], draft: float, verify: Callable[[int, int], float]
) -> Callable[[Program], float]:
    """Return seconds of rounds; drafts and verifications are given in steps."""

    def round_s(program: Program) -> float:
        rows, _, gamma, _ = program
        drafts = gamma * draft * step_s(rows)
        return drafts + step_s(rows) * (verify(rows, gamma) if gamma else 1.0)

    return round_s


POLICIES: dict[str, Costs] = {
    # 3M on two cores: a draft costs a step, a verification of five two or three.
    "in the cache": Costs(
        round_s=_of_shares(
            lambda rows: 0.0008 + 0.00012 * rows,
            0.95,
            lambda rows, gamma: 1 + gamma * (0.3 + 0.01 * min(rows, 32)),
        ),
        window_s=1.6,
        drafting_s=2.4,
        other_s=0.15,
        start_s=1.8,
        slots=32,
        count=32,
        mean=70,
        longest=256,
    ),
    # 90M on two cores: drafts cost less than half a step.
    "out of the cache": Costs(
        round_s=_of_shares(
            lambda rows: 0.03 + 0.003 * rows,
            0.42,
            lambda rows, gamma: 1 + gamma * (0.15 + 0.006 * min(rows, 32)),
        ),
        window_s=4.0,
        drafting_s=6.5,
        other_s=0.5,
        start_s=5.0,
        slots=16,
        count=48,
        mean=50,
        longest=160,
    ),
    "7B on an H100": Costs(
        round_s=scaling.roofline().round_seconds,
        window_s=25.0,
        drafting_s=45.0,
        other_s=2.0,
        start_s=30.0,
        slots=64,
        count=128,
        mean=600,
        longest=2048,
    ),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to simulate.

    Args:
      policies: of `POLICIES`. calls: in a row. gammas: to choose from.
      out: where to write. quick: fewer calls, a coarser oracle.
    """

    policies: tuple[str, ...] = tuple(POLICIES)
    calls: int = 20
    gammas: tuple[int, ...] = DEFAULT_GAMMAS
    out: Path | None = None
    quick: bool = False


class CompilingEngine(SimulatedEngine):
    """A simulated engine that has to compile first, on the same simulated clock."""

    num_groups = 1

    def __init__(self, costs: Costs, lengths: np.ndarray) -> None:
        super().__init__(
            costs,  # type: ignore[arg-type]
            lambda chunks: chunks * 4 * costs.round_s(Program(16, 256, 0)),
            dict(enumerate(lengths.tolist())),
            np.full(16, costs.keep),
            rounds_per_test=4,
        )
        self.costs = costs
        self.compiled: dict[tuple[Any, ...], float] = {}
        self.compile_s = costs.start_s
        self._slowest: dict[str, float] = {}

    @property
    def total_s(self) -> float:
        """Seconds of everything so far."""
        return self.seconds + self.compile_s

    def compile(self, *name: Any) -> None:
        """Have a program."""
        if name not in self.compiled:
            seconds = self.compiled[name] = self.costs.compile_s(name)
            self.compile_s += seconds
            self._slowest[name[0]] = max(seconds, self._slowest.get(name[0], 0.0))

    def has_window(self, program: Program, draft_kind: str, num_stop_ids: int) -> bool:
        """Whether this window is compiled."""
        return ("window", program) in self.compiled

    def has_take(self, old: tuple[int, int], new: tuple[int, int]) -> bool:
        """Whether a state of a size can be given another without compiling anything."""
        return old == new or ("take", old, new) in self.compiled

    def expected_compile_s(self, kind: str) -> float:
        """Return the seconds one more program should take to compile."""
        first_s = 0.1 * self._slowest["window"] if "window" in self._slowest else 1.0
        return self._slowest.get(kind, first_s)

    def take(
        self, state: SimulatedState, rows: np.ndarray, length: int
    ) -> SimulatedState:
        """Move rows; compiled when it is first wanted."""
        self.compile(
            "take", (len(state.length), state.cache_length), (len(rows), length)
        )
        return super().take(state, rows, length)

    def start_window(
        self, params: PolicyParams, state: SimulatedState, settings: Any, gamma: int,
        **rest: Any,
    ) -> Any:  # fmt: skip
        """Run rounds; compiled when they are first wanted."""
        program = Program(len(state.length), state.cache_length, gamma)
        self.compile("window", program)
        return super().start_window(params, state, settings, gamma, **rest)


def measured(
    engine: Any, params: Any, program: Program, *args: Any, **options: Any
) -> float:
    """Time a program as `calibrate.measure_round` does, on the simulated clock."""
    engine.compile("window", program)
    seconds = engine.costs.round_s(program)
    rounds = timing.NUM_READINGS * max(int(timing.READING_S / seconds), 1)
    engine.seconds += rounds * seconds
    return seconds


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an oracle compiles.

    shapes: rows and gamma of each program. is_short: caches shorter than the longest,
    too.
    """

    shapes: frozenset[tuple[int, int]]
    is_short: bool


class Oracle(Controller):
    """Runs the fastest of a set of programs, of which it knows what they cost."""

    def __init__(self, costs: Costs, plan: Plan) -> None:
        super().__init__("best", tuple({0, *(gamma for _, gamma in plan.shapes)}))
        self._costs, self._plan = costs, plan
        self._longest = 0

    def choose(
        self, options: Sequence[Program], current: Program | None, **about: Any
    ) -> Program:
        """Return the fastest that the plan allows."""
        self._longest = max([self._longest, *(p.cache_length for p in options)])
        allowed = [
            p
            for p in options
            if (p.rows, p.gamma) in self._plan.shapes
            and (self._plan.is_short or p.cache_length == self._longest)
        ]

        def speed(program: Program) -> float:
            chances = [self._costs.keep**depth for depth in range(program.gamma + 1)]
            return sum(chances) / self._costs.round_s(program)

        return max(allowed, key=speed)

    def observe(self, *args: Any, **options: Any) -> None:
        """Learn nothing."""


def calls(
    costs: Costs, controller: Controller, num: int, gammas: tuple[int, ...]
) -> list[float]:
    """Return the seconds, compilation included, after each of several calls."""
    drawn = np.random.default_rng(0).geometric(1 / costs.mean, costs.count)
    lengths = np.minimum(drawn, costs.longest)
    prompts = [np.full(32, i, np.int32) for i in range(costs.count)]
    config = RolloutConfig(
        max_new_tokens=costs.longest, max_slots=costs.slots, gammas=gammas
    )
    engine: Any = CompilingEngine(costs, lengths)
    ids = np.arange(costs.count)
    totals = []
    for _ in range(num):
        request = request_of(prompts, ids, config)
        params, stats = PolicyParams(policy=None, draft=None), RolloutStats()
        with controller.sampling():
            run(engine, params, request, neutral_sampling(), controller, stats)
        totals.append(engine.total_s)
    return totals


def plans(costs: Costs, args: Args) -> Iterator[Plan]:
    """Yield what an oracle may compile, each once."""
    shapes = list(dict.fromkeys(_shapes(costs, args)))
    for is_short in (False, True):
        yield from (Plan(found, is_short) for found in shapes)


def _shapes(costs: Costs, args: Args) -> Iterator[frozenset[tuple[int, int]]]:
    """Yield sets of (rows, gamma): the full batch without drafts, and more."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size < costs.slots]
    if args.quick:
        sizes = sizes[::2]
    drafting = [gamma for gamma in args.gammas if gamma]
    for count in range(len(sizes) + 1):
        for smaller in itertools.combinations(sizes, count):
            rows = (*smaller, costs.slots)
            plain = {(size, 0) for size in rows}
            yield frozenset(plain)
            for gamma in drafting[1:2] if args.quick else drafting[1::2]:
                for few in range(1, len(rows) + 1):
                    drafts = {(size, gamma) for size in rows[:few]}
                    yield frozenset(plain | drafts)
                    # Where it drafts, it need not be able not to.
                    kept = {(size, 0) for size in rows[few:]}
                    yield frozenset(drafts | kept | {(costs.slots, 0)})


def oracle(costs: Costs, args: Args) -> list[float]:
    """Return the oracle's seconds for N = 1 .. calls, the best plan for each N."""
    best = np.full(args.calls, np.inf)
    for plan in tqdm(list(plans(costs, args)), unit="plan"):
        # Once everything is compiled, calls are alike.
        first, second = calls(costs, Oracle(costs, plan), 2, args.gammas)
        totals = first + (second - first) * np.arange(args.calls)
        best = np.minimum(best, totals)
    return best.tolist()


def point(name: str, args: Args) -> dict[str, Any]:
    """Simulate one policy."""
    costs = POLICIES[name]
    found = calls(costs, Controller("best", args.gammas), args.calls, args.gammas)
    wanted = oracle(costs, args)
    ratios = [ours / best for ours, best in zip(found, wanted, strict=True)]
    return {
        "preset": name,
        "rows": costs.slots,
        "dtype": "simulated",
        "seconds": found,
        "oracle_s": wanted,
        "ratios": ratios,
        "worst": max(ratios),
    }


def rows_of(found: Sequence[Any]) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    """Return header and rows, one per policy."""
    shown = [n for n in (1, 2, 3, 5, 10, 20) if n <= len(found[0]["ratios"])]
    rows = [
        (
            p["preset"],
            p["rows"],
            *(round(p["ratios"][n - 1], 2) for n in shown),
            round(p["worst"], 2),
        )
        for p in found
    ]
    return ("policy", "slots", *(f"{n} calls" for n in shown), "worst"), rows


def main(args: Args) -> dict[str, Any]:
    """Simulate, print a table, write and return the record."""
    if args.quick:
        args = dataclasses.replace(args, calls=min(args.calls, 5))
    timing.measure_round = measured  # type: ignore[assignment]
    settings = dataclasses.asdict(args) | {"limit": LIMIT}
    del settings["out"]
    record = measure.new_record("cold", settings)
    for name in args.policies:
        record["points"].append(point(name, args))
        measure.save(measure.results_dir(args.out, args.quick) / "cold.json", record)
    header, rows = rows_of(record["points"])
    print(text_table(rows, header))
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.cold"))
