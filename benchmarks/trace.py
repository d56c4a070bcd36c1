"""Where a window's time goes by scope: a trace of a real rollout, read and drawn.

    python -m benchmarks.trace

Samples a preset on this device, warmed up, with `rollout(..., profile=DIR)`, and reads
the trace. Every operation of the windows has a name in the compiled program, and the
program's text says in which scope it was written. Prints the seconds of the device's
threads by scope, and draws a few rounds.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

import er_jax
from benchmarks.lib import presets, records
from er_jax.engine.kept import engine_for
from er_jax.figures import new_figure, text_table

FIGURE = records.ROOT / "docs" / "figures" / "trace.png"

# Scopes of `er_jax.steps`, and those inside of them.
SCOPES = ("draft", "verify", "accept", "emit")
PARTS = ("sample", "cache")


class Event(NamedTuple):
    """One operation: thread, scope, when it began, how long it took."""

    thread: str
    scope: str
    begin_s: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Args:
    """What to trace.

    Args:
      preset: decoder, by its name in benchmarks/lib/presets.py.
      rows: prompts, and slots. gamma: drafts per round. tokens: of each completion.
      span: seconds to draw, from the middle of the trace.
      out: where the picture goes.
    """

    preset: str = "90M"
    rows: int = 4
    gamma: int = 4
    tokens: int = 64
    span: float = 0.12
    out: Path | None = None


def scope_of(op_name: str) -> str:
    """Return the scope of an operation from its name in the compiled program.

    Example:
      >>> scope_of("jit(run_window)/while/body/draft/while/body/sample/reduce_max")
      'draft/sample'
    """
    parts = op_name.split("/")
    found = next((part for part in parts if part in SCOPES), "window")
    inner = next((part for part in reversed(parts) if part in PARTS), None)
    return f"{found}/{inner}" if inner else found


def scopes_in(texts: Iterable[str]) -> dict[str, str]:
    """Return the scope of every instruction of compiled programs, by its name."""
    found = {}
    for text in texts:
        for line in text.splitlines():
            named = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = ", line)
            origin = re.search(r'op_name="([^"]*)"', line)
            if named and origin:
                found[named[1]] = scope_of(origin[1])
    return found


def read(directory: Path, scopes: dict[str, str]) -> list[Event]:
    """Return the operations of the windows in a trace."""
    path = max(directory.rglob("*.xplane.pb"))
    data: Any = jax.profiler.ProfileData.from_file(str(path))
    events = []
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                name = event.name.split(" ")[0].lstrip("%")
                if name in scopes:
                    begin_s, seconds = event.start_ns / 1e9, event.duration_ns / 1e9
                    events.append(Event(line.name, scopes[name], begin_s, seconds))
    return events


def traced(args: Args) -> list[Event]:
    """Warm up, run once with a trace, and return the operations."""
    policy = presets.decoder(args.preset, dtype="float32")
    params = presets.random_params(policy)
    pair = er_jax.attach_draft(params, er_jax.DrafterConfig())
    config = er_jax.RolloutConfig(
        max_new_tokens=args.tokens,
        max_slots=args.rows,
        control=f"fixed:{args.gamma}",
    )
    prompts = [[7 + row, 3, 5, 11] for row in range(args.rows)]
    with tempfile.TemporaryDirectory() as scratch:
        for profile in (None, None, Path(scratch)):
            er_jax.rollout(
                policy,
                pair,
                prompts,
                key=jax.random.key(0),
                config=config,
                profile=profile,
            )
        programs = engine_for(policy, params, "coupled").compiled
        texts = [
            program.call.as_text()  # type: ignore[attr-defined]
            for name, program in programs.items()
            if name[0] == "window"
        ]
        return read(Path(scratch), scopes_in(texts))


def plot(events: list[Event], args: Args, path: Path) -> None:
    """Draw the operations of a few rounds, one line a thread, and save it."""
    figure = new_figure(9, 3)
    axes = figure.subplots()
    begin_s = min(event.begin_s for event in events)
    end_s = max(event.begin_s + event.seconds for event in events)
    first_s = (begin_s + end_s - args.span) / 2
    shown = [e for e in events if first_s <= e.begin_s < first_s + args.span]
    threads = sorted({event.thread for event in shown})
    scopes = sorted({event.scope for event in shown})
    for number, scope in enumerate(scopes):
        for line, thread in enumerate(threads):
            spans = [
                (1e3 * (e.begin_s - first_s), 1e3 * e.seconds)
                for e in shown
                if (e.scope, e.thread) == (scope, thread)
            ]
            label = scope if line == 0 else None
            axes.broken_barh(spans, (line - 0.4, 0.8), color=f"C{number}", label=label)
    axes.set(
        xlabel="milliseconds",
        yticks=range(len(threads)),
        yticklabels=[thread[:24] for thread in threads],
        title=f"{args.preset}, {args.rows} rows, rounds of {args.gamma} drafts",
    )
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    """Trace, print seconds by scope, and draw."""
    events = traced(args)
    sums: dict[str, float] = collections.defaultdict(float)
    for event in events:
        sums[event.scope] += event.seconds
    total = sum(sums.values())
    rows = [
        (scope, 1e3 * seconds, 100 * seconds / total)
        for scope, seconds in sorted(sums.items(), key=lambda pair: -pair[1])
    ]
    print(text_table(rows, ("scope", "ms of all threads", "%")))
    path = args.out or FIGURE
    plot(events, args, path)
    print(f"written: {path.name}", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.trace"))
