"""The command `er-jax`: what the library can say without a training run.

er-jax sweep FILE.csv ...        how well costs are predicted, on a latency sweep
er-jax replay FILE.csv           controllers on a trace of lengths, without a device
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from er_jax import replay, sweep
from er_jax.pass_costs import PassCosts, Roofline


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Judge the cost table and the roofline on latency sweeps.

    Fits both to all cells of each sweep, and to each half of a checkerboard to be
    judged on the other, and prints their errors and what they get wrong.

    Args:
      files: CSV files of single passes, in the format that EfficientRollout publishes.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]

    def run(self) -> None:
        """Print a report for each file."""
        if not self.files:
            raise ValueError("files is empty; give at least one latency sweep (CSV)")
        for file in self.files:
            print(sweep.report(sweep.read_sweep(file)))


@dataclasses.dataclass(frozen=True)
class Replay:
    """Replay controllers on traces of lengths and a cost table; no device is needed.

    Args:
      costs: a latency sweep (CSV); the table is fitted to it, and the roofline by which
        the published rule decides.
      trace: kind of generated lengths, or a JSONL file of {"length": ...}.
      num: completions of a generated trace. cap: their limit, tokens.
      slots: rows decoded at once; all if not given.
      keep: chance that a draft is kept.
      controls: any of fixed:N, paper, best, oracle; ar is always there.
      gammas: what best and oracle may choose from.
      seeds: generated traces, or repeats of a file's with other luck.
      plot: where to save a picture of the first rollout.
    """

    costs: tyro.conf.Positional[Path]
    trace: Literal["tail", "capped", "mixture"] | Path = "tail"
    num: int = 128
    cap: int = 8192
    slots: int | None = None
    keep: float = 0.95
    controls: tuple[str, ...] = ("paper", "best", "oracle")
    gammas: tuple[int, ...] = tuple(range(13))
    seeds: int = 20
    plot: Path | None = None

    def run(self) -> None:
        """Print the comparison and save the picture."""
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be a chance, from 0 to 1")
        if min(self.num, self.cap, self.seeds) < 1:
            raise ValueError(
                f"num={self.num}, cap={self.cap} and seeds={self.seeds} must be at "
                "least 1"
            )
        measured = sweep.read_sweep(self.costs).fitted()
        if isinstance(self.trace, Path):
            traces = [replay.Trace.load(self.trace)] * self.seeds
        else:
            make = replay.TRACES[self.trace]
            traces = [make(self.num, cap=self.cap, seed=i) for i in range(self.seeds)]
        comparison = replay.compare(
            traces,
            PassCosts(measured),
            Roofline.fit(measured),
            self.controls,
            gammas=self.gammas,
            keep_prob=self.keep,
            slots=self.slots,
            progress=sys.stderr.isatty(),
        )
        print(
            f"{self.trace}: {len(traces)} rollouts of {len(traces[0].lengths)} "
            f"completions, mean length {traces[0].lengths.mean():.0f}, longest "
            f"{traces[0].lengths.max()}; keep {self.keep}"
        )
        print(comparison.summary())
        if self.plot is not None:
            comparison.plot(self.plot)


Command = (
    Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
)


def main() -> None:
    """Run the command line."""
    command: Sweep | Replay = tyro.cli(Command, prog="er-jax")  # type: ignore[arg-type]
    try:
        command.run()
    except ValueError as error:
        raise SystemExit(f"er-jax: {error}") from error


if __name__ == "__main__":
    main()
