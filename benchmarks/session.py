"""What prompts that a session keeps cost, and what they save.

    python -m benchmarks.session
    python -m benchmarks.session --quick

Calls of one new token a prompt, which are prefill almost alone, are timed in turn:
without a session; in a session that knows none of the prompts, because the parameters
are new; in one that knows the first three quarters of each; and in one that knows all.
Processor seconds tell more than seconds where other work is on the same cores.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import er_jax
from benchmarks.lib import measure, presets, records, tables

KINDS = ("alone", "new", "begun", "known")
QUARTILES = ("q1", "median", "q3")


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure.

    Args:
      preset: the decoder.
      lengths: of the prompts in tokens, in turn. count: prompts of a call.
      repeats: of every case, interleaved.
      out: where to write. quick: a few tokens, to see that it runs.
    """

    preset: str = "3M"
    lengths: tuple[int, ...] = (128, 512, 2048)
    count: int = 16
    repeats: int = 7
    out: Path | None = None
    quick: bool = False


class Caller:
    """Calls of one kind, in a session of its own.

    Args:
      kind: one of `KINDS`. policy: the model. params: of it, twice; equal values.
      prompts: of every call.
    """

    def __init__(
        self,
        kind: str,
        policy: er_jax.Decoder,
        params: Sequence[Any],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self.kind, self.policy, self.prompts = kind, policy, prompts
        self.session = None if kind == "alone" else er_jax.Session(prompt_bytes=2**34)
        # Arrays that were not used last are new ones.
        self.params = itertools.cycle(params[:1] if kind == "known" else params)
        self.outs: list[er_jax.Rollout] = []
        self.cpu_s: list[float] = []

    def sample(self, params: Any, prompts: Sequence[Sequence[int]]) -> er_jax.Rollout:
        """Return a rollout of one token a prompt."""
        return er_jax.rollout(
            self.policy, params, prompts, key=jax.random.key(0), session=self.session,
            config=er_jax.RolloutConfig(
                max_new_tokens=1, control="ar", max_slots=len(prompts)
            ),
        )  # fmt: skip

    def __call__(self) -> float:
        """Return the seconds of a call."""
        params = next(self.params)
        if self.kind == "begun":
            self.sample(params, [p[: 3 * len(p) // 4] for p in self.prompts])
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        self.outs.append(self.sample(params, self.prompts))
        self.cpu_s.append(time.process_time() - start_cpu_s)
        return time.perf_counter() - start_s


def points(args: Args) -> Iterator[dict[str, Any]]:
    """Yield a point for each length of prompts."""
    policy = presets.decoder(args.preset)
    params = [presets.random_params(policy) for _ in range(2)]
    for length in args.lengths:
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, policy.vocab_size, (args.count, length)).tolist()
        callers = {kind: Caller(kind, policy, params, prompts) for kind in KINDS}
        for caller in callers.values():
            for _ in range(3):
                caller()
            assert not caller.outs[-1].stats.compiled
            caller.cpu_s.clear()
        cases: dict[str, Callable[[], float]] = {**callers}
        found = measure.interleave(cases, args.repeats, desc=f"prompts of {length}")
        wanted = callers["alone"].outs[0].completion_ids
        known = callers["known"].session
        assert known is not None
        yield {
            "preset": args.preset,
            "rows": args.count,
            "dtype": policy.config.dtype,
            "prompt_tokens": length,
            "alone_s": measure.spread(found["alone"]),
            "over_alone": {
                kind: measure.paired_ratio(found[kind], found["alone"])
                for kind in KINDS[1:]
            },
            "cpu_over_alone": {
                kind: measure.paired_ratio(callers[kind].cpu_s, callers["alone"].cpu_s)
                for kind in KINDS[1:]
            },
            "bytes_per_prompt": known.prompts.num_bytes // args.count,
            "num_prefilled": {
                kind: caller.outs[-1].stats.num_prefilled
                for kind, caller in callers.items()
            },
            "same_tokens": all(
                np.array_equal(wanted, out.completion_ids)
                for caller in callers.values()
                for out in caller.outs
            ),
        }
        for caller in callers.values():
            if caller.session is not None:
                caller.session.close()


def rows_of(found: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows, one per point."""
    header = (
        "decoder", "prompts x tokens", "without, ms", "unknown, of that",
        "three quarters known", "known", "processor time: unknown",
        "three quarters known", "known", "kept kB a prompt", "same tokens",
    )  # fmt: skip
    rows = []
    for p in found:
        ratios = []
        for name, kind in itertools.product(
            ("over_alone", "cpu_over_alone"), KINDS[1:]
        ):
            low, middle, high = (p[name][kind][q] for q in QUARTILES)
            ratios.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        rows.append(
            (
                p["preset"],
                f"{p['rows']} x {p['prompt_tokens']}",
                f"{1e3 * p['alone_s']['median']:.3g}",
                *ratios,
                f"{p['bytes_per_prompt'] / 1e3:.0f}",
                "yes" if p["same_tokens"] else "NO",
            )
        )
    return header, rows


def main(args: Args) -> dict[str, Any]:
    """Measure, print a table, write and return the record."""
    if args.quick:
        args = dataclasses.replace(
            args, preset="tiny", lengths=(128,), count=2, repeats=1
        )
    out = records.results_dir(args.out, args.quick)
    record = records.new_record("session", records.settings_of(args))
    for point in points(args):
        record["points"].append(point)
        records.save(out / "session.json", record)
    print(tables.text(rows_of(record["points"])))
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.session"))
