"""The command `er-jax calibrate`: where speculation pays on this device."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import jax

from er_jax.acceptance import AcceptRule, expected_tokens
from er_jax.arguments import check_chance, check_gammas, check_number, check_whole
from er_jax.config import DEFAULT_GAMMAS
from er_jax.control.estimate import PRIOR_KEEP
from er_jax.costs import store
from er_jax.costs.passes import Cell
from er_jax.costs.table import TRUSTED_POSITIONS, LatencyTable
from er_jax.costs.timing import measure_round
from er_jax.decoder import Decoder, DecoderConfig
from er_jax.devices import device_bytes, device_memory_bytes
from er_jax.drafter import DrafterConfig, PolicyParams
from er_jax.engine.engine import Engine
from er_jax.request import offered_spans
from er_jax.tools import plan, survey
from er_jax.tools.outputs import check_output, with_directory
from er_jax.types import Program, Span

# Length of the shortest cache that is surveyed, in positions.
SHORTEST = 64


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Measure on this device where speculation pays, for a decoder of given sizes.

    Costs depend on sizes and not on values, so the parameters are random. The costs are
    kept for rollouts of a policy and draft of these sizes, with the same acceptance
    rule.

    Args:
      decoder: sizes of the built-in decoder.
      drafter: how its draft is quantized.
      slots: largest batch, in rows.
      max_length: longest cache, in tokens; at least 64.
      gammas: draft lengths, one of them above 0.
      accept: acceptance rule.
      keep: chance that a draft is kept, for the speed-up.
      budget: seconds of measuring, without compilation.
      out: another file to save the readings in (JSON).
      plot: file to save a picture in.
    """

    decoder: DecoderConfig
    drafter: DrafterConfig = dataclasses.field(default_factory=DrafterConfig)
    slots: int = 64
    max_length: int = 1024
    gammas: tuple[int, ...] = DEFAULT_GAMMAS
    accept: AcceptRule = "coupled"
    keep: float = PRIOR_KEEP
    budget: float = 20.0
    out: Path | None = None
    plot: Path | None = None

    def run(self) -> None:
        """Measure, print a table, and save costs and picture."""
        check_whole("slots", self.slots)
        check_whole("max_length", self.max_length, SHORTEST)
        check_gammas(self.gammas, SHORTEST - 1)
        if not any(self.gammas):
            raise ValueError(
                f"gammas={self.gammas} has no draft to survey; give one above 0"
            )
        check_chance("keep", self.keep)
        check_number("budget", self.budget, 0, math.inf, "seconds")
        check_output("out", self.out)
        check_output("plot", self.plot, is_picture=True)
        policy = Decoder(self.decoder)
        shapes = plan.shapes_of(policy, self.drafter, self.slots, self.max_length)
        needed, available = device_bytes(shapes), device_memory_bytes() or math.inf
        if needed > available:
            raise ValueError(
                f"slots={self.slots}, max_length={self.max_length} and such a decoder "
                f"need {needed / 1e9:.3g} GB, and the device has "
                f"{available / 1e9:.3g}; choose smaller ones"
            )
        policy_params = policy.init(jax.random.key(0))
        engine = Engine(policy, self.accept)
        params = engine.attach_draft(policy_params, self.drafter)
        rows = [1 << i for i in range(self.slots.bit_length()) if 1 << i < self.slots]
        rows.append(self.slots)
        lengths = sorted({max(self.max_length >> i, SHORTEST) for i in range(3)})
        found = survey.survey_engine(
            engine,
            params,
            rows,
            lengths,
            self.gammas,
            keep_prob=self.keep,
            budget_s=self.budget,
            progress=sys.stderr.isatty(),
        )
        about = store.conditions(engine, params)
        print(
            f"{about['device']}, jax {about['jax']}: {len(found.costs.readings)} "
            f"readings in {found.spent_s:.1f} s, and {engine.compile_s:.1f} s of "
            f"compiling; {'complete' if found.is_complete else 'the time ran out'}"
        )
        gammas = ", ".join(str(gamma) for gamma in found.costs.gammas("round"))
        print(
            f"speed-up of drafts of {gammas} where {self.keep} are kept, by rows and "
            "cache length"
        )
        print("".join([f"{'':>8}", *(f"{length:>8}" for length in lengths)]))
        for r in rows:
            cells = [Cell(r, length) for length in lengths]
            ups = [survey.speed_up(found.costs, cell, self.keep) for cell in cells]
            print("".join([f"{r:>8}", *(f"{up:>8.2f}" for up in ups)]))
        table = LatencyTable(passes=found.costs)
        for span in self.drafter.spans:
            if span is not None:
                self._measure_span(engine, params, rows, span, table)
        kept = store.cache_path(about)
        for path in (kept, self.out):
            if path is not None:
                table.save(path, about)
        if kept is not None:
            print(f"kept for rollouts of such a policy in {kept}")
        if self.plot is not None:
            path = with_directory(self.plot)
            survey.plot_speed_up(found, rows, lengths, self.keep, path)

    def _measure_span(
        self,
        engine: Engine,
        params: PolicyParams,
        rows: list[int],
        span: Span,
        table: LatencyTable,
    ) -> None:
        """Measure rounds whose drafts see a span, at the longest cache, and print them.

        The fewest and the most rows are measured; the others are predicted.
        """
        gamma = min((g for g in self.gammas if g), key=lambda g: abs(g - 4))
        if span not in offered_spans(self.drafter.spans, self.max_length, gamma):
            return
        programs = [Program(r, self.max_length, gamma).seeing(span) for r in rows]
        for program in dict.fromkeys((programs[0], programs[-1])):
            seconds = measure_round(engine, params, program)
            table.observe(program, seconds * TRUSTED_POSITIONS, TRUSTED_POSITIONS)
        tokens = expected_tokens([self.keep] * gamma)
        print(
            f"speed-up of drafts of {gamma} that see {span.head} first and "
            f"{span.window} last positions of {self.max_length}, by rows"
        )
        for program in programs:
            plain_s = table.round_seconds(program.plain)
            round_s = table.round_seconds(program)
            assert plain_s and round_s
            print(f"{program.rows:>8}{tokens * plain_s / round_s:>8.2f}")
