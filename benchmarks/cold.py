"""The seconds of the first calls, beside those of an oracle that knows all costs.

    python -m benchmarks.cold

A new controller knows no costs, and every program has to be compiled before it runs.
Whether that pays depends on what rounds cost, on how long rows turn out to be, and on
how many calls will come. Here the scheduler and a new `Controller` sample twenty calls
in a row on a simulated engine, whose clock counts rounds and compilations. The oracle
knows all costs and the number of calls: for each number it compiles the best set of
programs at once. The result is the ratio of the total seconds of the first N calls.

Costs are round numbers in the shape of what was measured or counted. There are a
decoder that fits in a core's cache, where drafts never pay; one that does not; and 7
billion parameters on an H100, by the bandwidth on its data sheet, with drafts that see
all positions and with those that may see a window.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.lib import records, rooflines, tables
from benchmarks.lib.controllers import Oracle, Plan
from benchmarks.lib.simulated import CompilingEngine, SimulatedPolicy, simulate
from er_jax import Controller, DrafterConfig, RolloutConfig
from er_jax.config import DEFAULT_GAMMAS
from er_jax.request import request_of
from er_jax.types import Program

LIMITS = collections.defaultdict(lambda: 1.3, {"7B on an H100, windows": 1.5})
"""The first calls may take this many times the oracle's seconds.

With windows the oracle never compiles plain decoding. Whoever does not know that pays
for both: at whatever call drafts are bought, some total is then more than 1.3 times the
oracle's (`tests/test_benchmarks.py`)."""


def _of_shares(
    step_s: Callable[[int], float], draft: float, verify: Callable[[int, int], float]
) -> Callable[[Program], float]:
    """Return the seconds of rounds from the costs of passes.

    Args:
      step_s: seconds of an autoregressive pass, by rows. draft: steps of a draft pass.
      verify: steps of a verification, by rows and gamma.
    """

    def round_s(program: Program) -> float:
        rows, _, gamma = program[:3]
        drafts = gamma * draft * step_s(rows)
        return drafts + step_s(rows) * (verify(rows, gamma) if gamma else 1.0)

    return round_s


_H100 = SimulatedPolicy(
    round_seconds=rooflines.h100_roofline().round_seconds,
    window_s=25.0,
    drafting_s=45.0,
    other_s=2.0,
    start_s=30.0,
    slots=64,
    count=128,
    mean=600,
    longest=2048,
)
POLICIES: dict[str, SimulatedPolicy] = {
    # 3M on two cores: a draft costs a step, a verification of five two or three.
    "in the cache": SimulatedPolicy(
        round_seconds=_of_shares(
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
    "out of the cache": SimulatedPolicy(
        round_seconds=_of_shares(
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
    "7B on an H100": _H100,
    "7B on an H100, windows": dataclasses.replace(_H100, window="auto"),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to simulate.

    Args:
      policies: names in `POLICIES`. calls: in a row. gammas: to choose from.
      out: where to write. quick: fewer calls, and an oracle with fewer plans.
    """

    policies: tuple[str, ...] = tuple(POLICIES)
    calls: int = 20
    gammas: tuple[int, ...] = DEFAULT_GAMMAS
    out: Path | None = None
    quick: bool = False


def calls(
    policy: SimulatedPolicy, controller: Controller, num: int, gammas: tuple[int, ...]
) -> tuple[CompilingEngine, list[float]]:
    """Sample several calls in a row on a new engine.

    Args:
      policy: what is simulated. controller: of all calls. num: calls.
      gammas: draft lengths to choose from.
    Returns:
      The engine, and the simulated seconds after each call, compilation included.
    """
    drawn = np.random.default_rng(0).geometric(1 / policy.mean, policy.count)
    lengths = np.minimum(drawn, policy.longest)
    prompts = [np.full(32, i, np.int32) for i in range(policy.count)]
    config = RolloutConfig(
        max_new_tokens=policy.longest,
        max_slots=policy.slots,
        gammas=gammas,
        drafter=DrafterConfig(window=policy.window),
    )
    request = request_of(prompts, np.arange(policy.count), config)
    engine = CompilingEngine(policy, lengths)
    totals = []
    for _ in range(num):
        simulate(engine, request, controller)
        totals.append(engine.total_s)
    return engine, totals


def plans(policy: SimulatedPolicy, args: Args) -> Iterator[Plan]:
    """Yield the plans that the oracle chooses from, each once."""
    shapes = list(dict.fromkeys(_shapes(policy, args)))
    for is_short in (False, True):
        yield from (Plan(found, is_short) for found in shapes)


def _shapes(
    policy: SimulatedPolicy, args: Args
) -> Iterator[frozenset[tuple[int, int]]]:
    """Yield sets of (rows, gamma); all contain the full batch without drafts."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size < policy.slots]
    if args.quick:
        sizes = sizes[::2]
    drafting = [gamma for gamma in args.gammas if gamma]
    for count in range(len(sizes) + 1):
        for smaller in itertools.combinations(sizes, count):
            rows = (*smaller, policy.slots)
            plain = {(size, 0) for size in rows}
            yield frozenset(plain)
            for gamma in drafting[1:2] if args.quick else drafting[1::2]:
                for few in range(1, len(rows) + 1):
                    drafts = {(size, gamma) for size in rows[:few]}
                    yield frozenset(plain | drafts)
                    # The sizes that draft need no program that does not.
                    kept = {(size, 0) for size in rows[few:]}
                    yield frozenset(drafts | kept | {(policy.slots, 0)})


def oracle(policy: SimulatedPolicy, args: Args) -> list[float]:
    """Return the oracle's seconds for N = 1 .. calls, by the best plan for each N."""
    best = np.full(args.calls, np.inf)
    for plan in tqdm(list(plans(policy, args)), unit="plan"):
        # After the first call everything is compiled, and calls are alike.
        _, (first, second) = calls(policy, Oracle(policy, plan), 2, args.gammas)
        totals = first + (second - first) * np.arange(args.calls)
        best = np.minimum(best, totals)
    return best.tolist()


def point(name: str, args: Args) -> dict[str, Any]:
    """Simulate one policy."""
    policy, controller = POLICIES[name], Controller("best", args.gammas)
    _, found = calls(policy, controller, args.calls, args.gammas)
    wanted = oracle(policy, args)
    ratios = [ours / best for ours, best in zip(found, wanted, strict=True)]
    return {
        "preset": name,
        "rows": policy.slots,
        "dtype": "simulated",
        "seconds": found,
        "oracle_s": wanted,
        "ratios": ratios,
        "worst": max(ratios),
    }


def rows_of(found: Sequence[Any]) -> tables.Table:
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
    record = records.new_record(
        "cold", records.settings_of(args) | {"limits": dict(LIMITS)}
    )
    out = records.results_dir(args.out, args.quick)
    for name in args.policies:
        record["points"].append(point(name, args))
        records.save(out / "cold.json", record)
    print(tables.text(rows_of(record["points"])))
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.cold"))
