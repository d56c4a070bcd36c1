"""What a rollout did: seconds by phase, speculation by gamma, the batch over time.

`RolloutStats.summary` is text for people, `plot` a picture; the fields are for code.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from er_jax.figures import new_figure
from er_jax.types import FIRST_DRAFT, Program

PHASES = (
    "check",
    "draft refresh",
    "calibration",
    "prefill",
    "windows",
    "moves",
    "answers",
    "compile",
    "host",
)


class Moment(NamedTuple):
    """One window of the timeline.

    second: start of the window, in seconds since the rollout began.
    duration_s: seconds on the device, without compilation.
    live, num_live_after: live rows at its start and at its end.
    rows, cache_length, gamma, shared_rows, head, window, draft: its `Program`.
    num_rounds: rounds it ran.
    """

    second: float
    duration_s: float
    live: int
    num_live_after: int
    rows: int
    cache_length: int
    gamma: int
    num_rounds: int
    shared_rows: bool = False
    head: int = 0
    window: int = 0
    draft: int = 0


@dataclasses.dataclass
class RolloutStats:
    """Counts and times of one rollout.

    Attributes:
      seconds: phase -> seconds. Phases are check (the search for NaN in the
        parameters), draft refresh, calibration, prefill, windows (device time of the
        decoding loops), moves (compaction and growth), answers (nothing ran, because
        all sequences waited for `respond`), compile, and host (the rest of the wall
        time).
      rounds: gamma -> row-rounds of live rows.
      tokens: gamma -> tokens emitted.
      accepted: gamma -> int64 `[gamma + 1]`, row-rounds by number of drafts kept.
      timeline: windows in order.
      compiled: (program name, seconds) of everything this call compiled. The phase
        `compile` also has the time this call waited for another thread's compilation.
      num_prefilled: distinct prompts prefilled.
      prefilled_tokens: prefilled in all: of prompts, of completions that go on, and of
        what `respond` appended.
      num_cloned: completions that started from cache entries still in the batch.
      num_reused: prompts that started from entries a session has kept. For those of
        which it knew the beginning, the rest was computed.
      num_reused_tokens: tokens of theirs that were not prefilled.
      num_resumed: tokens that an earlier call had sampled.
      num_journalled: tokens that were given to the journal.
      num_answers: answers of `respond` that a completion went on with.
      num_kept: of these, those whose row was still there, so that only the answer was
        prefilled.
      failed_turns: sequence id -> what went wrong, of completions that ended as "tool".
      switch: why drafts ran or did not; see `control.explain`. Empty unless the
        controller is an `er_jax.Controller`.
      replica_s: wall seconds of each replica of `rollout_replicas`, in all processes;
        empty for other rollouts.
    """

    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(PHASES, 0.0)
    )
    rounds: dict[int, int] = dataclasses.field(default_factory=dict)
    tokens: dict[int, int] = dataclasses.field(default_factory=dict)
    accepted: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    timeline: list[Moment] = dataclasses.field(default_factory=list)
    compiled: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    num_prefilled: int = 0
    num_cloned: int = 0
    num_reused: int = 0
    num_reused_tokens: int = 0
    num_resumed: int = 0
    num_journalled: int = 0
    prefilled_tokens: int = 0
    num_answers: int = 0
    num_kept: int = 0
    failed_turns: dict[int, str] = dataclasses.field(default_factory=dict)
    switch: str = ""
    replica_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def idle_share(self) -> float:
        """Share of the replicas' time spent waiting for the slowest; 0 for only one."""
        longest = max(self.replica_s, default=0.0)
        if longest == 0:
            return 0.0
        return 1 - sum(self.replica_s) / (len(self.replica_s) * longest)

    @property
    def total_s(self) -> float:
        """Wall seconds of the call."""
        return sum(self.seconds.values())

    @property
    def programs(self) -> list[Program]:
        """The program of every window, in order."""
        return [
            Program(*(getattr(moment, name) for name in Program._fields))
            for moment in self.timeline
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens emitted."""
        return sum(self.tokens.values())

    @contextmanager
    def timed(self, phase: str, compile_s: Callable[[], float]) -> Iterator[None]:
        """Add the wall seconds of a block, without its compilation, to a phase.

        Args:
          phase: one of `PHASES`.
          compile_s: returns the seconds that this thread has spent compiling so far, as
            `Engine.compile_s` does.
        """
        start, compiled = time.perf_counter(), compile_s()
        yield
        seconds = time.perf_counter() - start - (compile_s() - compiled)
        self.seconds[phase] += max(seconds, 0.0)  # Only rounding makes it negative.

    def add_window(self, moment: Moment, num_tokens: int, accepted: np.ndarray) -> None:
        """Add a window: moment, tokens emitted, histogram `[G + 1]` of drafts kept."""
        gamma = moment.gamma
        self.timeline.append(moment)
        self.seconds["windows"] += moment.duration_s
        self.tokens[gamma] = self.tokens.get(gamma, 0) + num_tokens
        self.rounds[gamma] = self.rounds.get(gamma, 0) + int(accepted.sum())
        known = self.accepted.get(gamma, np.zeros(gamma + 1, np.int64))
        self.accepted[gamma] = known + accepted

    @classmethod
    def merged(cls, parts: Sequence[RolloutStats]) -> RolloutStats:
        """Return the merged stats of replicas that ran side by side in this process.

        Counts are summed. Seconds by phase, the timeline and `switch` are those of the
        slowest replica.
        """
        slowest = max(parts, key=lambda part: part.total_s)
        whole = cls(
            seconds=dict(slowest.seconds),
            timeline=list(slowest.timeline),
            switch=slowest.switch,
        )
        for part in parts:
            for gamma, histogram in part.accepted.items():
                known = whole.accepted.get(gamma, np.zeros(gamma + 1, np.int64))
                whole.accepted[gamma] = known + histogram
                for name in ("rounds", "tokens"):
                    counts = getattr(whole, name)
                    counts[gamma] = counts.get(gamma, 0) + getattr(part, name)[gamma]
            whole.compiled += part.compiled
            for name in (
                "num_prefilled", "num_cloned", "num_resumed", "prefilled_tokens",
                "num_answers", "num_kept",
            ):  # fmt: skip
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
            whole.failed_turns |= part.failed_turns
        return whole

    def keep_rate(self, gamma: int) -> float:
        """Return drafts kept / drafts proposed at this gamma, NaN where none were.

        It is lower than the acceptance rate, because drafts after a rejection count as
        proposed.
        """
        histogram = self.accepted.get(gamma)
        if gamma == 0 or histogram is None or not histogram.sum():
            return float("nan")
        kept = float(np.arange(gamma + 1) @ histogram)
        return kept / (gamma * float(histogram.sum()))

    @property
    def kept_share(self) -> float:
        """Drafts kept / drafts proposed in all rounds, NaN where none were."""
        kept = sum(np.arange(len(h)) @ h for h in self.accepted.values())
        proposed = sum((len(h) - 1) * h.sum() for h in self.accepted.values())
        return float(kept / proposed) if proposed else float("nan")

    def summary(self) -> str:
        """Return the rollout as text: time by phase, tokens by gamma, programs."""
        total = max(self.total_s, 1e-9)
        steady = max(total - self.seconds["compile"], 1e-9)
        lines = [
            f"{self.num_tokens} tokens in {total:.2f} s "
            f"({self.num_tokens / steady:.0f} tokens/s without compilation)"
        ]
        phases = (
            f"{phase} {seconds:.2f} s ({100 * seconds / total:.0f} %)"
            for phase, seconds in self.seconds.items()
            if seconds >= 0.005
        )
        lines.append("time: " + ", ".join(phases))
        for gamma in sorted(self.tokens):
            rounds = max(self.rounds[gamma], 1)
            line = (
                f"gamma {gamma}: {self.tokens[gamma]} tokens in {rounds} row-rounds, "
                f"{self.tokens[gamma] / rounds:.2f} tokens per round"
            )
            if gamma:
                line += f", {100 * self.keep_rate(gamma):.1f} % of drafts kept"
            lines.append(line)
        if self.switch:
            lines.append(self.switch)
        views = [program.view for program in self.programs]
        for view in sorted(set(views) - {FIRST_DRAFT}):
            timed = zip(self.timeline, views, strict=True)
            seconds = sum(moment.duration_s for moment, own in timed if own == view)
            lines.append(f"{view}: {seconds:.2f} s of decoding with such drafts")
        shared = [moment for moment in self.timeline if moment.shared_rows]
        if shared:
            lines.append(
                f"rows shared by all devices: {len(shared)} of {len(self.timeline)} "
                f"windows, from {shared[0].second:.2f} s on, "
                f"{sum(moment.duration_s for moment in shared):.2f} s"
            )
        lines.append(
            f"prompts: {self.num_prefilled} prefilled, {self.num_cloned} completions "
            "started from entries already there"
        )
        if self.num_reused:
            lines.append(
                f"session: {self.num_reused} prompts, {self.num_reused_tokens} tokens "
                "of them not prefilled"
            )
        if self.num_resumed:
            lines.append(f"resumed: {self.num_resumed} tokens of earlier calls")
        if self.num_journalled:
            lines.append(f"journal: {self.num_journalled} tokens written")
        if self.num_answers or self.failed_turns:
            lines.append(
                f"turns: {self.num_answers} answered, {len(self.failed_turns)} failed, "
                f"{self.num_kept} went on in their rows; {self.prefilled_tokens} "
                "tokens prefilled"
            )
        if self.replica_s:
            lines.append(
                f"replicas: {len(self.replica_s)}, from {min(self.replica_s):.2f} to "
                f"{max(self.replica_s):.2f} s, idle {100 * self.idle_share:.1f} %"
            )
        if self.compiled:
            names = ", ".join(
                f"{name} {seconds:.1f} s" for name, seconds in self.compiled
            )
            lines.append(f"compiled {len(self.compiled)} programs: {names}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw live rows over time, shaded by gamma, and save the picture.

        Args:
          path: where to; the ending picks the format (png, pdf, svg).
        Raises:
          ImportError: matplotlib is missing; install the extra `plot`.
        """
        figure = new_figure(8, 3.5)
        # Imported after `new_figure`, whose error says what to install.
        from matplotlib.patches import Patch

        axes = figure.subplots()
        gammas = sorted({moment.gamma for moment in self.timeline})
        shades = {g: 0.85 - 0.6 * i / max(len(gammas), 1) for i, g in enumerate(gammas)}
        for moment in self.timeline:
            span = (moment.second, moment.second + moment.duration_s)
            axes.fill_between(
                span, [moment.rows] * 2, color=str(shades[moment.gamma]), linewidth=0
            )
        seconds = [
            x for m in self.timeline for x in (m.second, m.second + m.duration_s)
        ]
        live = [x for m in self.timeline for x in (m.live, m.num_live_after)]
        axes.plot(seconds, live, color="tab:red", linewidth=1.5, label="live rows")
        handles, _ = axes.get_legend_handles_labels()
        handles += [
            Patch(color=str(shades[g]), label=f"gamma {g}" if g else "gamma 0 (AR)")
            for g in gammas
        ]
        axes.legend(handles=handles, loc="upper right", fontsize="small")
        axes.set(
            xlabel="seconds", ylabel="rows (shaded: compiled batch)", ylim=(0, None)
        )
        axes.set_title(
            f"{self.num_tokens} tokens, {self.total_s:.1f} s", fontsize="medium"
        )
        figure.savefig(path, dpi=130)
