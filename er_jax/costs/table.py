"""Costs of rounds: measured seconds per program, and predictions for the others.

Plain Python floats on the host. A program that never ran is predicted from the costs of
its passes, where single passes were timed (`passes`). Otherwise it is predicted from
the programs that did run, by power laws in rows and cache length and by the costs of
drafts and verifications in autoregressive steps.

A program that ran for long is taken as measured. One that ran for few rounds is taken
to be faster than measured, because a first window may be slow by chance, and a program
that looks slow would not run again. Errors both ways are corrected: a program that
looks too fast runs and is measured, and one that looks too slow gets another try.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Mapping, Sequence

from er_jax.costs.neighbours import Neighbours, distance, power_law
from er_jax.costs.passes import (
    LENGTH_EXPONENT,
    ROWS_EXPONENT,
    Kind,
    PassCosts,
    Reading,
    checked_pass_costs,
    seconds_with_span,
)
from er_jax.costs.record import (
    checked_list,
    checked_programs,
    checked_seconds,
    damaged,
    listed_programs,
    load_record,
    save_record,
)
from er_jax.types import FIRST_DRAFT, Program

# Assumed seconds of a round with shared rows, relative to the same rows in data shards,
# where none was measured: a device reads half the weights or less, and sums are sent.
SHARED_ROWS_SHARE = 0.5

# Assumed seconds of a draft pass, relative to an autoregressive step, where none was
# measured: int8 weights against 16-bit ones.
DRAFT_SHARE = 0.5

# Time constant of a program's average: after windows of this many seconds, 1 / e of the
# old value is left. It counts seconds, not rounds, because stalls last seconds.
MEMORY_S = 1.0

# Where a trusted program becomes DRIFT_RATIO times slower or faster, the machine has
# changed, for all programs. Each window then moves the slowdown by SLOWDOWN_SHARE of
# the change (in logarithms), until readings are within SETTLED_RATIO. The slowdown is
# the same for all programs, so a wrong one does not change the choice between them.
# OWN_SHARE of the change counts as the program's own.
DRIFT_RATIO, SETTLED_RATIO = 1.25, 1.05
SLOWDOWN_SHARE = 0.5
OWN_SHARE = 0.2

# Predictions are kept until a measured program has changed by more than this share:
# dozens are needed before every window, and they are no more exact than that.
STALE = 0.03

# A program that ran for this many positions (rounds times gamma + 1) is trusted: taken
# as measured. Before that, its uncertainty makes it faster by up to this share.
TRUSTED_POSITIONS = 50
UNCERTAINTY_DISCOUNT = 0.2

# Most that one measured round of another kind of drafts changes predictions by.
MOST_CORRECTION = 2.0

# Most programs in a file: no rollout has so many, and every prediction looks at all.
MAX_PROGRAMS = 10_000

# Positions that a program from a file counts for: half of the trusted number, because
# the machine may have been busy, and a program that looks slow is never run.
SAVED_POSITIONS = 25


class OwnLock:
    """A re-entrant lock for `with`; a deep copy or pickle of its owner has a new one.

    Shallow copies share it, as they share what it guards.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[OwnLock], tuple[()]]:
        return OwnLock, ()


@dataclasses.dataclass
class LatencyTable:
    """Seconds per round of each program, from windows that ran.

    Several threads may call the methods of one table at once.

    seconds: program -> seconds per round at slowdown 1: at first the mean over rounds,
      later an exponential average.
    rounds: program -> rounds measured; a program without an entry is trusted.
    passes: costs of single passes; None where none were timed.
    slowdown: ratio of all seconds now to the usual ones, on a machine that is throttled
      or shared.
    """

    seconds: dict[Program, float] = dataclasses.field(default_factory=dict)
    rounds: dict[Program, int] = dataclasses.field(default_factory=dict)
    passes: PassCosts | None = None
    slowdown: float = 1.0
    _draft_shares: tuple[float, ...] = dataclasses.field(
        default=(), init=False, repr=False, compare=False
    )
    _lock: OwnLock = dataclasses.field(
        default_factory=OwnLock, init=False, repr=False, compare=False
    )
    _is_changing: bool = dataclasses.field(
        default=False, init=False, repr=False, compare=False
    )
    _kept_rounds: int = dataclasses.field(
        default=0, init=False, repr=False, compare=False
    )
    _found: Neighbours = dataclasses.field(
        default_factory=lambda: Neighbours(()), init=False, repr=False, compare=False
    )
    _steps: dict[Program, float | None] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _predictions: dict[Program, float | None] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _predicted_from: dict[Program, float] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def observe(self, program: Program, seconds: float, num_rounds: int) -> None:
        """Take in a window of `seconds` in total over `num_rounds` rounds.

        A reading counts as at most twice the known seconds, so that a single stall does
        not outweigh the rest; a lasting change still shows within a few windows.
        """
        if num_rounds < 1:
            return
        with self._lock:
            self._observe(program, seconds, num_rounds)

    def _observe(self, program: Program, seconds: float, num_rounds: int) -> None:
        reading = seconds / num_rounds / self.slowdown
        known = self.seconds.get(program)
        if known is None:
            self.seconds[program], self.rounds[program] = reading, num_rounds
            self._kept_rounds = 0
            return
        # Weighted by expected seconds, so that a stall does not weigh by its length.
        weight = 1 - math.exp(-num_rounds * known * self.slowdown / MEMORY_S)
        is_trusted = self._uncertainty(program) <= 0
        if program in self.rounds:
            self.rounds[program] += num_rounds
            weight = max(weight, num_rounds / self.rounds[program])
        reading = min(reading, 2 * known)
        if is_trusted:
            limit = SETTLED_RATIO if self._is_changing else DRIFT_RATIO
            self._is_changing = not 1 / limit <= reading / known <= limit
        if is_trusted and self._is_changing:
            self.slowdown *= (reading / known) ** SLOWDOWN_SHARE
            weight *= OWN_SHARE
        now = known + weight * (reading - known)
        self.seconds[program] = now
        before = self._predicted_from.setdefault(program, known)
        if abs(now - before) > STALE * before:
            self._forget_predictions()

    def weigh_drafts(self, num_bytes: Sequence[float]) -> None:
        """Say how many bytes the weights of each draft have.

        Rounds of a draft that never ran are predicted from those of the first, as if
        its passes took seconds in proportion to these bytes. That is less than they
        take, so such a draft is tried where it could pay.
        """
        with self._lock:
            shares = tuple(own / num_bytes[0] for own in num_bytes)
            if shares != self._draft_shares:
                self._draft_shares = shares
                self._forget_predictions()

    def save(self, path: str | os.PathLike[str], about: Mapping[str, str]) -> None:
        """Write all readings as JSON, with their conditions; see `save_record`."""
        passes = self.passes
        with self._lock:
            values = {
                "passes": [] if passes is None else [*map(list, passes.readings)],
                "programs": listed_programs(self.seconds),
            }
            num_rounds = sum(self.rounds.values())
        save_record(path, "latency table", about, values)
        self._kept_rounds = num_rounds

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], about: Mapping[str, str] | None = None
    ) -> LatencyTable:
        """Return the table that `save` wrote.

        Its programs are trusted less than programs that ran in this process.

        Args:
          path: the file. about: conditions it must have; None takes any.
        Raises:
          ValueError: not a latency table, or of another device, version or policy, or
            damaged; it names the file and what is wrong in it.
          OSError: the file cannot be read.
        """
        values = load_record(path, "latency table", about)
        with damaged(path):
            names = {"programs", "passes"}
            if not isinstance(values, dict) or not names <= values.keys():
                raise ValueError("it has no lists of programs and passes")
            rows = checked_list("programs", values["programs"])
            if len(rows) > MAX_PROGRAMS:
                raise ValueError(f"it holds {len(rows)} programs, over {MAX_PROGRAMS}")
            seconds = checked_programs("programs", rows, checked_seconds)
            passes = checked_pass_costs("passes", values["passes"])
        rounds = {p: max(SAVED_POSITIONS // (p.gamma + 1), 1) for p in seconds}
        table = cls(seconds, rounds, passes)
        table._kept_rounds = sum(rounds.values())
        return table

    @property
    def is_dirty(self) -> bool:
        """Whether, since it was saved, a program was added or rounds have doubled."""
        with self._lock:
            return sum(self.rounds.values()) > 2 * self._kept_rounds

    def readings(self) -> list[Reading]:
        """Return all measured passes and rounds, except rounds with shared rows."""
        found = [] if self.passes is None else list(self.passes.readings)
        with self._lock:
            measured = list(self.seconds.items())
        for program, seconds in measured:
            kind: Kind = "round" if program.gamma else "target"
            if not program.shared_rows and program.view == FIRST_DRAFT:
                found.append(Reading(kind, *program[:3], seconds))
        return found

    @property
    def has_drafts(self) -> bool:
        """Whether costs of drafting were measured, by rounds or by passes."""
        with self._lock:
            return self.passes is not None or any(p.gamma for p in self.seconds)

    def round_seconds(self, program: Program) -> float | None:
        """Return measured or predicted seconds per round; None if nothing is known."""
        with self._lock:
            return self._round_seconds(program)

    def _round_seconds(self, program: Program) -> float | None:
        measured = self.seconds.get(program)
        if measured is None:
            predicted = self._predicted(program)
            return None if predicted is None else predicted * self.slowdown
        uncertainty = self._uncertainty(program)
        if uncertainty <= 0:
            return measured * self.slowdown
        predicted = min(measured, self._predicted(program) or measured)
        believed = measured + uncertainty * (predicted - measured)
        return believed * (1 - UNCERTAINTY_DISCOUNT * uncertainty) * self.slowdown

    def _uncertainty(self, program: Program) -> float:
        """Return the uncertainty of a measured program: 1 at first, <= 0 if trusted."""
        rounds = self.rounds.get(program, TRUSTED_POSITIONS)
        return 1 - rounds * (program.gamma + 1) / TRUSTED_POSITIONS

    def _predicted(self, program: Program) -> float | None:
        """Return the prediction of a program, kept until programs have changed."""
        self._neighbours()
        if program not in self._predictions:
            self._predictions[program] = self._prediction(program)
        return self._predictions[program]

    def _prediction(self, program: Program) -> float | None:
        """Predict a program from passes, or from the other programs.

        From passes: their sum, times the ratio of measured to summed seconds of the
        nearest program that ran, which shows a slower machine than that of the passes.

        From programs: a round with drafts costs a step (gamma = 0), plus the costs of
        drafts in the nearest round that ran, in proportion to `_extra`.

        With shared rows: the seconds of the same program in data shards, times the
        ratio of these two for the nearest program with shared rows that ran.

        With drafts that see a span, and with another draft than the first: see
        `_of_kind`.
        """
        if program.window:
            return self._of_kind(program, seconds_with_span(self._known, program))
        if program.draft:
            return self._of_kind(program, self._of_draft(program))
        if program.shared_rows:
            in_shards_s = self._in_data_shards(program)
            others = [p for p in self.seconds if p.shared_rows]
            others = [p for p in others if p.view == FIRST_DRAFT and p != program]
            near = min(others, key=lambda p: distance(p, program), default=None)
            if in_shards_s is None or near is None:
                return None if in_shards_s is None else SHARED_ROWS_SHARE * in_shards_s
            near_in_shards_s = self._in_data_shards(near) or in_shards_s
            return in_shards_s * self.seconds[near] / near_in_shards_s
        if self.passes is not None and self.passes.has_rounds(program.gamma):
            expected = self.passes.round_seconds(program)
            others = self._neighbours().in_data_shards
            others = [
                p for p in others if p != program and self.passes.has_rounds(p.gamma)
            ]
            near = min(others, key=lambda p: distance(p, program), default=None)
            if near is None:
                return expected
            return expected * self.seconds[near] / self.passes.round_seconds(near)
        if program.gamma == 0:
            curve, line = self._curve(program), self._neighbours().line(program)
            if curve is None or line[-1].rows >= program.rows:
                return curve
            # Extrapolated in rows. A round that drafts holds its drafts, of about half
            # a step each, and a step of gamma + 1 times the rows: a step that looks
            # slower than so found would never be tried.
            bounds = [
                self.seconds[other]
                / ((1 + other.gamma) ** ROWS_EXPONENT + DRAFT_SHARE * other.gamma)
                * (program.cache_length / other.cache_length) ** LENGTH_EXPONENT
                for other in self._neighbours().rounds_of_more(program)
            ]
            return min([curve, *bounds])
        nearest = self._neighbours().speculative(program)
        if self._step(program) is None or nearest is None:
            return self._curve(program)
        return self._like(nearest, program)

    def _like(self, near: Program, program: Program) -> float:
        """Return a step, and what drafts cost in `near`, in proportion to `_extra`."""
        drafts_s = self.seconds[near] - (self._step(near) or 0.0)
        ratio = max(drafts_s / self._extra(near), 0.0)
        return (self._step(program) or 0.0) + ratio * self._extra(program)

    def _of_kind(self, program: Program, expected_s: float | None) -> float | None:
        """Predict a round whose drafts see a span, or are not the first ones.

        It is what is expected from rounds of the first draft over all positions, times
        the ratio of measured to so expected seconds of the nearest program of the kind
        that ran. Where no such rounds of the first draft ran, it is predicted from that
        program alone, like them.

        Args:
          program: to predict. expected_s: from other rounds, None if unknown.
        """
        others = [p for p in self.seconds if p != program]
        if program.window:
            others = [p for p in others if p.window]
        else:
            others = [p for p in others if p.draft == program.draft and not p.window]
        near = min(others, key=lambda p: distance(p, program), default=None)
        if near is None:
            return expected_s
        if near.window:
            near_s = seconds_with_span(self._known, near)
        else:
            near_s = self._of_draft(near)
        if expected_s is not None and near_s:
            ratio = self.seconds[near] / near_s
            return expected_s * min(max(ratio, 1 / MOST_CORRECTION), MOST_CORRECTION)
        is_known = self._step(program) and self._step(near)
        return self._like(near, program) if is_known else None

    def _of_draft(self, program: Program) -> float | None:
        """Return the seconds of a round expected from the first draft's.

        Of what the first draft's round takes beyond a step, as much as that many draft
        passes are assumed to take changes with the bytes of the weights.
        """
        first_s = self._known(program._replace(draft=0))
        step_s = self._known(program.plain)
        if first_s is None or step_s is None:
            return first_s
        drafts_s = min(program.gamma * DRAFT_SHARE * step_s, max(first_s - step_s, 0.0))
        shares = self._draft_shares
        share = shares[program.draft] if program.draft < len(shares) else 1.0
        return first_s - (1 - share) * drafts_s

    def _known(self, program: Program) -> float | None:
        """Return the measured or predicted seconds of a program."""
        return self.seconds.get(program) or self._predicted(program)

    def _in_data_shards(self, program: Program) -> float | None:
        """Return the seconds of a program's round with rows in data shards."""
        return self._known(program._replace(shared_rows=False))

    def _extra(self, program: Program) -> float:
        """Return the expected seconds that drafts and verification add to a step.

        gamma drafts cost a share of a step each. The verification costs as much as a
        step of rows x (gamma + 1) rows: little more than a step where steps are bound
        by weights, gamma + 1 steps where they are bound by arithmetic.
        """
        gamma = program.gamma
        step = self._step(program) or 0.0
        wide = program._replace(rows=program.rows * (gamma + 1))
        verification = self._step(wide) or 0.0
        return gamma * DRAFT_SHARE * step + verification - step

    def _step(self, program: Program) -> float | None:
        """Return the seconds of its autoregressive step, kept like predictions."""
        program = program.plain
        if program not in self._steps:
            known = self.seconds.get(program)
            self._steps[program] = self._curve(program) if known is None else known
        return self._steps[program]

    def _curve(self, program: Program) -> float | None:
        """Interpolate the other programs of its gamma by power laws in rows."""
        line = self._neighbours().line(program)
        if not line:
            return None
        points = [(other.rows, self.seconds[other]) for other in line]
        ratio = program.cache_length / line[0].cache_length
        return power_law(points, program.rows) * ratio**LENGTH_EXPONENT

    def _neighbours(self) -> Neighbours:
        """Return the neighbours among measured programs, which are never removed."""
        if len(self._found.measured) != len(self.seconds):
            self._found = Neighbours(tuple(self.seconds))
            self._forget_predictions()
        return self._found

    def _forget_predictions(self) -> None:
        self._steps.clear()
        self._predictions.clear()
        self._predicted_from.clear()
