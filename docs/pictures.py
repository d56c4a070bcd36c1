"""Draws one round, one window and one rollout: docs/figures/how-*.png.

    python -m docs.pictures

The round is an example whose kept drafts are counted by the library's own rule. The
window is worked out from a seed. The rollout is made by the library's scheduler and
controller on a simulated engine, with the published costs of a model on an A100: no
device is needed, and nothing depends on a clock. What is drawn stands in each picture
as text, so that a test can tell whether it still holds.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.lib import rooflines, workloads
from benchmarks.lib.simulated import (
    SimulatedEngine,
    SimulatedState,
    simulate,
)
from er_jax.acceptance import coupled_num_accepted
from er_jax.config import RolloutConfig
from er_jax.control.controller import Controller
from er_jax.figures import new_figure
from er_jax.request import request_of
from er_jax.types import Program

FOLDER = Path(__file__).resolve().parent / "figures"
NOTE = "Description"  # where a picture holds what is drawn, as text

KEPT, DRAWN, UNUSED, KNOWN = "#cfe8cf", "#f6d9a8", "#ececec", "#dce8f4"


# -- one round -------------------------------------------------------------------------

TEXT = ("The", "sky", "is")
DRAFTS = ("blue", "because", "air", "scatters")
# The target's draw behind the text, and behind each draft.
DRAWS = ("blue", "because", "air", "bends", "light")


def num_kept() -> int:
    """Return how many of the example's drafts the rule of the default keeps."""
    words = sorted({*DRAFTS, *DRAWS})
    drafts, draws = (
        jnp.array([[words.index(word) for word in line]]) for line in (DRAFTS, DRAWS)
    )
    return int(coupled_num_accepted(drafts, draws)[0])


def round_text() -> str:
    """Return the picture of a round as text."""
    kept = num_kept()
    return "\n".join(
        [
            f"text: {' '.join(TEXT)}",
            f"drafts: {' '.join(DRAFTS)}",
            f"draws of the target: {' '.join(DRAWS)}",
            f"kept: {kept}",
            f"emitted: {' '.join(DRAWS[: kept + 1])}",
        ]
    )


def draw_round(figure: Any) -> None:
    """Draw the example of a round: one line of boxes for each step of it."""
    from matplotlib.patches import FancyBboxPatch

    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9), ylim=(0, 4.1))
    axes.axis("off")
    kept = num_kept()

    def boxes(y: float, first: int, words: tuple[str, ...], colours: list[str]) -> None:
        for i, (word, colour) in enumerate(zip(words, colours, strict=True), first):
            axes.add_patch(
                FancyBboxPatch(
                    (1.42 + 0.93 * i, y - 0.2), 0.83, 0.4, facecolor=colour,
                    boxstyle="round,pad=0,rounding_size=0.05", edgecolor="0.35",
                )
            )  # fmt: skip
            axes.text(1.835 + 0.93 * i, y, word, ha="center", va="center", size=9)

    def line(y: float, name: str, note: str) -> None:
        axes.text(0.08, y, name, va="center", weight="bold", size=9.5)
        axes.text(1.42, y - 0.37, note, va="center", size=8, color="0.3")

    start, agreed = len(TEXT), kept * [KEPT]
    line(3.7, "text", "what the row holds; the last token is this round's first input")
    boxes(3.7, 0, TEXT, start * [KNOWN])
    line(
        2.75,
        "draft",
        f"{len(DRAFTS)} passes with the quantized weights, one token each",
    )
    boxes(2.75, start, DRAFTS, agreed + (len(DRAFTS) - kept) * [UNUSED])
    line(
        1.8,
        "verify",
        f"one pass with the full weights over {len(DRAWS)} positions: the target's own "
        "draws, with the same noise",
    )
    rest = len(DRAWS) - kept - 1
    boxes(1.8, start, DRAWS, [*agreed, DRAWN, *(rest * [UNUSED])])
    line(
        0.85,
        "emit",
        f"{kept} drafts that equal the draws, and the draw behind them: what plain "
        "decoding would have drawn",
    )
    boxes(0.85, start, DRAWS[: kept + 1], [*agreed, DRAWN])
    axes.text(
        1.42, 0.12, "grey: drawn behind a token that was not taken, and forgotten",
        va="center", size=8, color="0.3",
    )  # fmt: skip


# -- one window ------------------------------------------------------------------------

GAMMA, KEEP, EXIT_LIVE = 4, 0.9, 4
LEFT = (9, 31, 14, 40, 22, 17, 35, 12)  # tokens that each row has still to make


def emitted() -> list[list[int]]:
    """Return the tokens of each row in each round of the example, to its end."""
    random = np.random.default_rng(1)
    left = list(LEFT)
    found: list[list[int]] = [[] for _ in LEFT]
    while sum(tokens > 0 for tokens in left) > EXIT_LIVE:
        for row, tokens in enumerate(left):
            if tokens:
                is_kept = random.random(GAMMA) < KEEP
                kept = int(np.logical_and.accumulate(is_kept).sum())
                found[row].append(min(kept + 1, tokens))
                left[row] -= found[row][-1]
    return found


def window_text() -> str:
    """Return the picture of a window as text."""
    lines = [
        f"row {row}: {' '.join(map(str, rounds))}"
        for row, rounds in enumerate(emitted())
    ]
    head = f"gamma {GAMMA}, {KEEP:.0%} kept, ends at {EXIT_LIVE} live rows or fewer"
    return "\n".join([head, *lines])


def draw_window(figure: Any) -> None:
    """Draw the tokens that each row emits in each round of a window."""
    axes = figure.subplots()
    found = emitted()
    num_rounds = max(map(len, found))
    for row, rounds in enumerate(found):
        for i in range(num_rounds):
            live = i < len(rounds)
            axes.barh(
                row, 0.94, left=i + 0.03, height=0.86, edgecolor="0.6", linewidth=0.5,
                color=(KEPT if rounds[i] > 1 else DRAWN) if live else UNUSED,
            )  # fmt: skip
            if live:
                axes.text(
                    i + 0.5, row, str(rounds[i]), ha="center", va="center", size=9
                )
    axes.axvline(num_rounds, color="0.2", linewidth=1.5)
    axes.set(
        xlim=(0, num_rounds + 0.05),
        ylim=(len(found) - 0.4, -0.6),
        yticks=range(len(found)),
        xlabel=f"round (gamma {GAMMA}); numbers: tokens emitted, grey: rows have ended",
        ylabel="row",
    )
    axes.set_xticks([i + 0.5 for i in range(num_rounds)], range(1, num_rounds + 1))
    axes.set_title(
        f"the window ends when at most {EXIT_LIVE} of {len(found)} rows are live: "
        "a smaller batch would do now",
        fontsize="medium",
    )


# -- one rollout -----------------------------------------------------------------------

MODEL, SLOTS, COUNT, LONGEST = "Qwen2.5-7B", 64, 112, 640


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What ran in one window.

    start, end: simulated seconds. program: that ran. sequences: by row, -1 for none.
    """

    start: float
    end: float
    program: Program
    sequences: tuple[int, ...]


class RecordingEngine(SimulatedEngine):
    """A simulated engine that writes down which sequence is in which row."""

    def __init__(self, lengths: Mapping[int, int]) -> None:
        super().__init__(
            rooflines.PUBLISHED[MODEL].costs,
            lambda chunks: 0.005 * chunks,
            lengths,
            np.full(16, 0.95),
            rounds_per_test=4,
        )
        self.stretches: list[Stretch] = []

    def start_window(
        self, params: Any, state: SimulatedState, settings: Any, gamma: int, **rest: Any
    ) -> Any:
        """Run a window, and note it."""
        start = self.seconds
        inside = tuple(np.where(state.live, state.sequence_id, -1).tolist())
        found = super().start_window(params, state, settings, gamma, **rest)
        program = Program(len(state.length), state.cache_length, gamma)
        self.stretches.append(Stretch(start, self.seconds, program, inside))
        return found


def stretches() -> list[Stretch]:
    """Return the windows of a rollout by the library's scheduler and controller."""
    lengths = workloads.tail_lengths(COUNT, LONGEST)
    config = RolloutConfig(max_new_tokens=LONGEST, max_slots=SLOTS, gammas=(0, 4))
    prompts = [np.array([1 + i, 2, 3], np.int32) for i in range(COUNT)]
    engine = RecordingEngine(dict(enumerate(lengths.tolist())))
    controller = Controller("best", config.gammas, patience=0)
    costs = rooflines.PUBLISHED[MODEL].costs
    request = request_of(prompts, np.arange(COUNT), config)
    for rows in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        for length in request.cache_lengths:
            for gamma in config.gammas:
                program = Program(rows, length, gamma)
                controller.table.seconds[program] = costs.round_seconds(program)
    controller.acceptance.tested[:] = 1e6
    controller.acceptance.kept[:] = 0.95e6
    simulate(engine, request, controller)
    return engine.stretches


def rollout_text() -> str:
    """Return the picture of a rollout as text: a line for each window."""
    lines = [f"{MODEL} on an A100, {COUNT} completions in {SLOTS} slots"]
    for one in stretches():
        live = sum(sequence >= 0 for sequence in one.sequences)
        lines.append(
            f"{one.start:.2f} s to {one.end:.2f} s: {live} live of {one.program.rows} "
            f"rows, cache {one.program.cache_length}, gamma {one.program.gamma}"
        )
    return "\n".join(lines)


def draw_rollout(figure: Any) -> None:
    """Draw which sequence was in which row, and what ran."""
    from matplotlib.patches import Patch

    axes = figure.subplots()
    shades = {
        0: ("#5b84b1", "#86a8cc", "#41658d", "#a9c1db"),
        4: ("#d98a3d", "#e8ab70", "#b86d24", "#f0c79b"),
    }
    for one in stretches():
        width, rows = one.end - one.start, one.program.rows
        axes.barh(
            (rows - 1) / 2,
            width,
            left=one.start,
            height=rows,
            color="0.85",
            linewidth=0,
        )
        colours = shades[one.program.gamma]
        for row, sequence in enumerate(one.sequences):
            if sequence >= 0:
                colour = colours[sequence % len(colours)]
                axes.barh(row, width, left=one.start, height=0.8, color=colour)
    axes.set(
        xlabel="seconds (simulated)", ylabel="row", ylim=(SLOTS - 0.5, -0.5),
        xlim=(0, None),
    )  # fmt: skip
    names = {
        shades[0][0]: "completions, decoded plainly",
        shades[4][0]: "completions, four drafts a round",
        "0.85": "rows of the batch without one",
        "white": "prefill; and rows that the batch no longer has",
    }
    axes.legend(
        handles=[
            Patch(facecolor=colour, edgecolor="0.6", label=name)
            for colour, name in names.items()
        ],
        loc="lower right",
        fontsize="small",
    )
    axes.set_title(
        f"{COUNT} completions in {SLOTS} slots; a new shade is another completion",
        fontsize="medium",
    )


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture: its text, what draws it, and its size in inches."""

    text: Callable[[], str]
    draw: Callable[[Any], None]
    size: tuple[float, float]

    def save(self, path: Path) -> None:
        """Draw it and write it, with its text inside."""
        figure = new_figure(*self.size)
        self.draw(figure)
        note = {NOTE: self.text(), "Software": None}
        figure.savefig(path, dpi=110, metadata=note)


PICTURES = {
    "how-round": Picture(round_text, draw_round, (9, 4.1)),
    "how-window": Picture(window_text, draw_window, (8, 3.3)),
    "how-rollout": Picture(rollout_text, draw_rollout, (8.4, 4.4)),
}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, picture in PICTURES.items():
        picture.save(FOLDER / f"{name}.png")
        print(f"{name}\n{picture.text()}\n")
