"""Which program next: draft length, batch size and cache length by measured speed.

Three ideas. *Acceptance* is estimated per depth and sampling setting from the histogram
of each window; what contradicts the estimate far enough replaces it at once.
*Speed* of a program is expected tokens per round over its seconds per round; gamma = 0
is one of the choices, so switching speculation off is nothing special. *Rent or buy*
decides about compiling: for every program that is not compiled, the time lost by
running the best compiled one instead is added up, and the program is compiled when its
sum reaches what its compilation takes. Nothing is known of drafts at first: they are
taken to be `UNKNOWN_SPEED_UP` times as fast, and when so much has been lost as it takes
to find out, one row is measured with drafts and without (`first_look`). Where one row
gains nothing, no batch does, and no program that drafts is compiled after that.

A controller is a host object, kept across RL steps. `PaperRule` is the published rule.
Rollouts in several threads may share one: they share what is learnt, and each has for
itself what belongs to one rollout.

Source: the expected tokens of a round, Leviathan et al. 2023 (arXiv 2211.17192),
equation 1, here with a chance per depth; rent or buy, Karlin et al. 1988
("Competitive snoopy caching").
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from er_jax.acceptance import expected_tokens
from er_jax.arguments import whole_numbers
from er_jax.costs import (
    DOUBT,
    LatencyTable,
    OwnLock,
    checked_programs,
    listed_programs,
)
from er_jax.pass_costs import (
    Kind,
    PassPredictor,
    Roofline,
    checked_list,
    checked_real,
    checked_seconds,
    checked_whole,
    seconds_of_passes,
)
from er_jax.types import Program

DEFAULT_GAMMAS = (0, 2, 4, 6, 8)

# Belief before anything was drafted: int8 drafts of trained policies are kept at well
# over nine in ten; the weight is small enough that a few dozen rounds outvote it.
PRIOR_KEEP = 0.95
PRIOR_ROUNDS = 20.0

# Evidence is forgotten at these rates, because the policy moves: half is left after
# about fourteen thousand row-rounds that drafted, and this share after every rollout.
KEEP_PER_ROLLOUT = 0.8
FORGET_PER_ROUND = 5e-5

# A histogram of so many drafts, this many standard deviations from the belief, replaces
# it. Windows differ by some DRIFT for reasons of their own, the text they are at say.
CHANGE_DEVIATIONS = 6.0
CHANGE_DRAFTS = 16
DRIFT = 0.05

# Kept at less than this share of what was expected, drafts are of a broken drafter.
DEAD_SHARE = 0.5

# While nothing is drafted nothing is learnt of drafts: this share of the seconds of
# plain decoding may be spent on finding out.
PROBE_SHARE = 0.01
PROBE_ROUNDS = 16

# A change of program must promise this much, so that noise does not move the batch; one
# of gamma alone moves nothing, and need only be more than rounding.
HYSTERESIS = 0.03
GAMMA_HYSTERESIS = 0.005


# What drafts are taken to gain before any were timed: a sixth of the time without them
# is lost. Then finding out costs at most a sixth of what has been spent so far.
# `benchmarks.cold` holds the first calls against an oracle.
UNKNOWN_SPEED_UP = 1.2

# What a sampling setting says, and the one of those who name none.
SETTING_NAMES = ("temperature", "top_k", "top_p", "min_p")
Setting: TypeAlias = tuple[float, ...]
NO_SETTING: Setting = ()

# Acceptance is remembered for so many sampling settings, those that were used last: a
# temperature that is lowered a little in every step makes as many as there are steps.
MAX_SETTINGS = 16


def parse_control(control: str, gammas: Sequence[int]) -> tuple[int, ...]:
    """Return the gammas a control string allows.

    Args:
      control: "best", "paper", "ar" or "fixed:g".
      gammas: what "best" may choose from.
    Returns:
      Sorted gammas; those of its ladder, and 0, for "paper".
    Raises:
      ValueError: an unknown control, a gamma below 0, or gammas without 0.
    """
    remedy = "use 'best', 'paper', 'ar' or 'fixed:g' with a whole number g >= 0"
    gammas = whole_numbers("gammas", gammas)
    if not isinstance(control, str):
        raise ValueError(f"control={control!r} is no word; {remedy}")
    if control == "ar":
        return (0,)
    if control == "paper":
        return (0, *PAPER_LADDER)
    if control.startswith("fixed:"):
        digits = control.removeprefix("fixed:")
        if not digits.isdecimal():
            raise ValueError(f"control={control!r} names no draft length; {remedy}")
        return (int(digits),)
    if control != "best":
        raise ValueError(f"control={control!r} is unknown; {remedy}")
    if any(gamma < 0 for gamma in gammas):
        raise ValueError(f"gammas={tuple(gammas)!r} must all be at least 0")
    if 0 not in gammas:
        raise ValueError(
            f"gammas={tuple(gammas)!r} must contain 0, plain decoding, or a batch for "
            "which speculation loses could not escape it; add 0, or force one length "
            "with control='fixed:g'"
        )
    return tuple(sorted(set(gammas)))


@dataclasses.dataclass
class AcceptanceEstimate:
    """Chance that the draft at each depth is used, given that all before it were.

    Used is kept and emitted: a draft behind a stop or a limit counts as lost like one
    that is rejected, so short completions make long drafts worth less.

    tested, kept: decayed counts of row-rounds that reached a depth and used its draft.
    """

    tested: np.ndarray
    kept: np.ndarray

    @classmethod
    def empty(cls, depth: int) -> AcceptanceEstimate:
        """Return an estimate that knows only the prior, for drafts up to `depth`."""
        return cls(tested=np.zeros(depth), kept=np.zeros(depth))

    def observe(self, used: np.ndarray) -> None:
        """Take in a histogram `[G + 1]` of row-rounds by the number of drafts used."""
        if len(used) == 1:
            return
        self.decay(math.exp(-FORGET_PER_ROUND * int(used.sum())))
        # at_least[k] counts the row-rounds that used k drafts or more.
        at_least = np.cumsum(used[::-1])[::-1].astype(float)
        depth = min(len(used) - 1, len(self.tested))
        self.tested[:depth] += at_least[:depth]
        self.kept[:depth] += at_least[1 : depth + 1]

    def decay(self, share: float) -> None:
        """Let evidence weigh this share of what it did."""
        self.tested *= share
        self.kept *= share

    def forget(self) -> None:
        """Let all evidence so far weigh no more than a prior."""
        most = float(self.tested.max(initial=0.0))
        self.decay(min(1.0, PRIOR_ROUNDS / max(most, 1e-9)))

    def contradiction(self, used: np.ndarray) -> tuple[float, float] | None:
        """Return the shares of drafts (expected, found) if a histogram contradicts.

        Args:
          used: `[G + 1]`, as in `observe`, and not yet observed.
        """
        at_least = np.cumsum(used[::-1])[::-1].astype(float)
        depth = min(len(used) - 1, len(self.tested))
        tested, found = at_least[:depth], at_least[1 : depth + 1].sum()
        total = tested.sum()
        if total < CHANGE_DRAFTS:
            return None
        chance = self.keep_probs(depth)
        expected = float(tested @ chance)
        variance = float(tested @ (chance * (1 - chance))) + (DRIFT * total) ** 2
        if abs(found - expected) <= CHANGE_DEVIATIONS * math.sqrt(variance):
            return None
        return expected / total, found / total

    def keep_errors(self, gamma: int) -> np.ndarray:
        """Return the standard deviations of `keep_probs`, as of beta distributions."""
        chance = self.keep_probs(gamma)
        return np.sqrt(chance * (1 - chance) / (self.tested[:gamma] + PRIOR_ROUNDS + 1))

    def keep_probs(self, gamma: int) -> np.ndarray:
        """Return the chances at depths 1 .. gamma, each drawn to the pooled one."""
        prior_kept, prior_tested = PRIOR_KEEP * PRIOR_ROUNDS, PRIOR_ROUNDS
        pooled = (self.kept.sum() + prior_kept) / (self.tested.sum() + prior_tested)
        kept = self.kept[:gamma] + pooled * PRIOR_ROUNDS
        return kept / (self.tested[:gamma] + PRIOR_ROUNDS)

    def tokens_per_round(self, gamma: int) -> float:
        """Return the expected tokens of a round of `gamma` drafts, 1 .. gamma + 1."""
        return expected_tokens(list(self.keep_probs(gamma)))


# The published switch and ladder, with the constants of the published code.
PAPER_SPEED_UP = 1.05
PAPER_RAMP_ROWS = 32
PAPER_LADDER = (5, 7, 9, 11)
PAPER_RAISE, PAPER_LOWER = 0.94, 0.85
PAPER_PERSISTENCE = 2


class PaperRule:
    """The published switch and draft length, as a baseline.

    Plain decoding until the batch has once held more than `PAPER_RAMP_ROWS` rows and a
    round is then predicted to be `PAPER_SPEED_UP` times as fast; from there on drafts,
    to the end of the rollout. The prediction takes the tokens per round of the rollout
    before. The draft length is one of a ladder for a whole rollout: a step up after
    `PAPER_PERSISTENCE` rollouts in a row that kept at least `PAPER_RAISE` of their
    drafts, a step down after as many that kept at most `PAPER_LOWER`. The cost model
    has no part in that.

    Args:
      costs: prices passes; the published rule uses a roofline.
      gamma: draft length to begin with, one of the ladder; held if `is_adaptive` is
        False.

    Source: EfficientRollout (arXiv 2606.18967) and its published code. Kept as it is
    there: the tokens per round after a change of length are those of the old one.
    """

    def __init__(
        self, costs: PassPredictor, *, gamma: int = 5, is_adaptive: bool = True
    ) -> None:
        if is_adaptive and gamma not in PAPER_LADDER:
            raise ValueError(
                f"gamma={gamma} is not on the ladder {PAPER_LADDER}; begin with one of "
                "these or give is_adaptive=False"
            )
        self.costs = costs
        self.gamma = gamma
        self.is_adaptive = is_adaptive
        self.tokens_per_round = float(gamma)
        self._num_high = self._num_low = 0
        self.start_rollout()

    def start_rollout(self) -> None:
        """Begin a rollout: speculation off, nothing counted."""
        self.is_on = False
        self._has_ramped = False
        self._num_rounds = self._num_kept = 0

    def choose(self, live: int, length: float) -> int:
        """Return the draft length of the next round, 0 while speculation is off.

        Args:
          live: rows that generate. length: their mean tokens, prompt included.
        """
        self._has_ramped |= live > PAPER_RAMP_ROWS
        if not self.is_on and self._has_ramped:
            plain = Program(live, round(length), 0)
            target = seconds_of_passes(self.costs, plain)
            cycle = seconds_of_passes(self.costs, plain._replace(gamma=self.gamma))
            self.is_on = self.tokens_per_round * target / cycle >= PAPER_SPEED_UP
        return self.gamma if self.is_on else 0

    def observe(self, kept: np.ndarray) -> None:
        """Count a histogram `[G + 1]` of row-rounds by the number of drafts kept."""
        self._num_rounds += int(kept.sum())
        self._num_kept += int(kept @ np.arange(len(kept)))

    def end_rollout(self) -> None:
        """Learn from the rollout for the next one."""
        if not self._num_rounds:
            return
        self.tokens_per_round = 1 + self._num_kept / self._num_rounds
        if not self.is_adaptive:
            return
        share = self._num_kept / (self._num_rounds * self.gamma)
        self._num_high = self._num_high + 1 if share >= PAPER_RAISE else 0
        self._num_low = self._num_low + 1 if share <= PAPER_LOWER else 0
        rung = PAPER_LADDER.index(self.gamma)
        if self._num_high >= PAPER_PERSISTENCE:
            rung = min(rung + 1, len(PAPER_LADDER) - 1)
        elif self._num_low >= PAPER_PERSISTENCE:
            rung = max(rung - 1, 0)
        else:
            return
        self._num_high = self._num_low = 0
        self.gamma = PAPER_LADDER[rung]

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept from rollout to rollout as JSON-ready values."""
        return {
            "gamma": int(self.gamma),
            "tokens_per_round": float(self.tokens_per_round),
            "_num_high": int(self._num_high),
            "_num_low": int(self._num_low),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another rule had learnt, between rollouts.

        Raises:
          ValueError: not what `state_dict` returns; it names what is wrong. Nothing is
            taken over then.
        """
        _check_names("rule", state, self.state_dict())
        gamma = checked_whole("rule's gamma", state["gamma"], least=1)
        if self.is_adaptive and gamma not in PAPER_LADDER:
            raise ValueError(
                f"rule's gamma is {gamma}, and must be on the ladder {PAPER_LADDER}"
            )
        tokens = checked_real(
            "rule's tokens_per_round", state["tokens_per_round"], least=1
        )
        high, low = (
            checked_whole(f"rule's {name}", state[name])
            for name in ("_num_high", "_num_low")
        )
        self.gamma, self.tokens_per_round = gamma, tokens
        self._num_high, self._num_low = high, low
        self.start_rollout()


@dataclasses.dataclass(eq=False)
class _Rollout:
    """What belongs to one rollout; its estimates are of its setting, and shared.

    used, kept: drafts used, as the choice needs them, and drafts kept, which say
      whether the drafter is sound. broken: shares of drafts (expected, found) that said
      it is not. wanted: programs for which lost time is booked.
    """

    setting: Setting
    used: AcceptanceEstimate
    kept: AcceptanceEstimate
    broken: tuple[float, float] | None = None
    is_probing: bool = False
    wanted: list[Program] = dataclasses.field(default_factory=list)


class _OfThread(threading.local):
    """The rollout that a thread is in or was in last; of copies there is none."""

    rollout: _Rollout | None = None

    def __reduce__(self) -> tuple[type[_OfThread], tuple[()]]:
        return _OfThread, ()


class _Running(set[_Rollout]):
    """The rollouts under way; in copies there are none."""

    def __reduce__(self) -> tuple[type[_Running], tuple[()]]:
        return _Running, ()


class Controller:
    """Chooses programs by expected tokens per second; learns from every window.

    Rollouts in several threads may share one. Costs, acceptance and the time lost are
    learnt together, under a lock; setting, probes and what is said of a broken drafter
    are of each thread's own rollout. With "paper" they share the rule's one switch too.

    Args:
      control: "best", "paper" (see `PaperRule`), "ar" or "fixed:g"; all but the first
        leave only batch size and cache length to choose by speed.
      gammas: draft lengths "best" may use; must contain 0.
      patience: compile a better program when the time lost without it exceeds this many
        times its compilation. 0 compiles at once.
    Raises:
      ValueError: as `parse_control`, or a negative patience.
    """

    def __init__(
        self,
        control: str = "best",
        gammas: Sequence[int] = DEFAULT_GAMMAS,
        *,
        patience: float = 1.0,
    ) -> None:
        self.gammas = parse_control(control, gammas)
        if not isinstance(patience, int | float) or not patience >= 0:
            raise ValueError(f"patience={patience!r} must be a number of at least 0")
        self.control = control
        self.patience = patience
        self.table = LatencyTable()
        self.measuring = OwnLock()
        """Held while first costs are measured: once, and nothing beside it."""
        self._lock = OwnLock()
        # By setting, the latest last.
        empty = AcceptanceEstimate.empty
        depth = max(self.gammas)
        self._estimates = {NO_SETTING: empty(depth)}
        self._drafters = {NO_SETTING: empty(depth)}
        # Of this thread, of those that have begun none, and those under way.
        self._own = _OfThread()
        self._latest = self._rollout_at(NO_SETTING)
        self._running = _Running()
        self._plain_s = self._probed_s = 0.0
        # By rows and gamma: row-rounds of live rows, and of rows live at the beginning.
        self._row_rounds: dict[tuple[int, int], tuple[float, float]] = {}
        self._lost_s: dict[Program, float] = {}
        # Of the smallest batch: one row, or one for each group of devices.
        self._least_rows = 1
        # Of plain decoding by rows, cache length, joint, while nothing is known of
        # drafts.
        self._plain_at: dict[tuple[int, int, bool], float] = {}
        self._rule = PaperRule(_TableRoofline(self)) if control == "paper" else None

    def __repr__(self) -> str:
        return f"Controller({self.control!r}, gammas={self.gammas})"

    def summary(self) -> str:
        """Return what was learnt of programs and drafts, as text for people."""
        lines = [f"{self!r}: {len(self.table.seconds)} programs timed"]
        with self._lock:
            estimates = list(self._estimates.items())
        for setting, estimate in estimates:
            if not estimate.tested.any():
                continue
            depth = int(np.flatnonzero(estimate.tested)[-1]) + 1
            pairs = zip(
                100 * estimate.keep_probs(depth),
                100 * estimate.keep_errors(depth),
                strict=True,
            )
            named = zip(SETTING_NAMES, setting, strict=False)
            label = ", ".join(f"{name} {value:g}" for name, value in named)
            lines.append(
                f"{label or 'drafts'}: used at each depth, if all before were: "
                + ", ".join(f"{chance:.1f} ± {error:.1f}" for chance, error in pairs)
                + " %"
            )
        return "\n".join(lines)

    @property
    def _rollout(self) -> _Rollout:
        """This thread's rollout; of one that has begun none, the latest."""
        return self._own.rollout or self._latest

    def _rollout_at(self, setting: Setting) -> _Rollout:
        return _Rollout(setting, self._estimates[setting], self._drafters[setting])

    @property
    def acceptance(self) -> AcceptanceEstimate:
        """Chances that drafts are used, at the setting of this rollout."""
        return self._rollout.used

    @property
    def broken_drafter(self) -> tuple[float, float] | None:
        """Shares of drafts (expected, found) that said so in this rollout, if any."""
        return self._rollout.broken

    def start_rollout(self, setting: Sequence[float] = NO_SETTING) -> None:
        """Begin a rollout of this thread.

        What is known of acceptance weighs less from here on, because the policy moves
        between rollouts; not if others of this setting are under way, which sample from
        the same one.

        Args:
          setting: what acceptance depends on beside the policy, as `SETTING_NAMES`.
            One never met begins with what is known of the last one. The last
            `MAX_SETTINGS` of them are remembered.
        """
        setting = tuple(float(value) for value in setting)
        with self._lock:
            last = self._rollout
            for known, before in (
                (self._estimates, last.used),
                (self._drafters, last.kept),
            ):
                estimate = known.pop(setting, None)
                if estimate is None:
                    estimate = AcceptanceEstimate(
                        tested=before.tested.copy(), kept=before.kept.copy()
                    )
                    estimate.forget()
                known[setting] = estimate
                for old in list(known)[:-MAX_SETTINGS]:
                    del known[old]
            if self._rule is not None and not self._running:
                self._rule.end_rollout()
                self._rule.start_rollout()
            self._latest = self._own.rollout = self._rollout_at(setting)
            if all(other.setting != setting for other in self._running):
                self._latest.used.decay(KEEP_PER_ROLLOUT)
                self._latest.kept.decay(KEEP_PER_ROLLOUT)

    @contextlib.contextmanager
    def sampling(self, setting: Sequence[float] = NO_SETTING) -> Iterator[None]:
        """Be in a rollout from its first choice to its last window.

        As `start_rollout`, and others know when it is over. One inside of another, from
        a callback of it for instance, leaves that one as it was.
        """
        with self._lock:
            outer = self._own.rollout
            is_inner = outer in self._running
            self.start_rollout(setting)
            own = self._rollout
            self._running.add(own)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(own)
            if is_inner:
                self._own.rollout = outer

    def speed(self, program: Program) -> float | None:
        """Return expected tokens per second of each live row; None if unknown."""
        return self._speeds([program])[program] or None

    def _speeds(self, programs: Sequence[Program]) -> dict[Program, float]:
        """Return the speed of each, 0 where it is unknown."""
        gammas = {program.gamma for program in programs}
        tokens = {gamma: self.acceptance.tokens_per_round(gamma) for gamma in gammas}
        speeds = {}
        for program in programs:
            round_s = self.table.round_seconds(program)
            emitted = tokens[program.gamma] * self._live_share(program)
            speeds[program] = emitted / round_s if round_s else 0.0
        return speeds

    def _live_share(self, program: Program) -> float:
        """Return the share of a window's rounds that its rows are live for.

        Rows that end idle until the window does. Long drafts make few rounds, and rows
        that would end together end rounds apart.
        """
        live, all_rounds = self._row_rounds.get((program.rows, program.gamma), (0, 0))
        return (live + PRIOR_ROUNDS) / (all_rounds + PRIOR_ROUNDS)

    def choose(
        self,
        options: Sequence[Program],
        current: Program | None,
        *,
        compile_s: Callable[[Program], float],
        live: int = 0,
        length: float = 0.0,
    ) -> Program:
        """Return the program to run next.

        Args:
          options: the programs that could run now; the last is the one to fall back on
            and may be compiled without asking.
          current: the program that ran last, kept unless another is clearly faster.
          compile_s: seconds a program must be compiled for first; 0 if it is ready.
          live: rows that generate. length: their mean tokens; for "paper".
        Returns:
          One of `options`.
        """
        with self._lock:
            return self._choose(options, current, compile_s, live, length)

    def _choose(
        self,
        options: Sequence[Program],
        current: Program | None,
        compile_s: Callable[[Program], float],
        live: int,
        length: float,
    ) -> Program:
        own = self._rollout
        if self._rule is not None:
            gamma = self._rule.choose(live, length)
            options = [p for p in options if p.gamma == gamma] or options
        speeds = self._speeds(options)
        # Reversed, so that the fall-back wins while nothing is known.
        ready = [p for p in reversed(options) if not compile_s(p)] or [options[-1]]
        for program in ready:
            if program not in self.table.seconds:
                # Compiled, by another controller say, and never timed: cheap to try.
                if program.gamma and not self.knows_drafts:
                    plain = speeds.get(program._replace(gamma=0), 0.0)
                    speeds[program] = UNKNOWN_SPEED_UP * plain
                speeds[program] /= 1 - DOUBT
        best_ready = max(ready, key=speeds.__getitem__)
        worthwhile = speeds[best_ready] * (1 + HYSTERESIS)
        own.wanted = [p for p in options if speeds[p] > worthwhile]
        if self._rule is None and 0 in self.gammas and self._drafts_lose():
            own.wanted = [p for p in own.wanted if not p.gamma]
        paid = [
            program
            for program in own.wanted
            if self._lost_s.get(program, 0.0) >= self.patience * compile_s(program)
        ]
        own.is_probing = False
        # The published rule never draws back, and has no use for probes.
        may_probe = self._rule is None
        if paid:
            own.wanted = []
            bought = max(paid, key=speeds.__getitem__)
            self._settle(bought, best_ready)
            return bought
        chosen = best_ready
        if current in ready:
            is_same_shape = best_ready.shape == current.shape
            margin = GAMMA_HYSTERESIS if is_same_shape else HYSTERESIS
            if speeds[best_ready] <= speeds[current] * (1 + margin):
                chosen = current
        may_probe &= chosen.gamma == 0
        probe = self._find_probe(chosen, ready) if may_probe else None
        own.is_probing = probe is not None
        return probe or chosen

    def _settle(self, bought: Program, before: Program) -> None:
        """Take off the others' accounts what a program that is compiled now saves.

        The same seconds were booked for all programs that would have been faster. Where
        another is no larger, what is left is what it gains beside the new one; where it
        has more rows or positions, the seconds in which the new one could not have run.

        Args:
          bought: the program. before: the fastest one that was compiled before.
        """
        lost_s = self._lost_s.pop(bought, 0.0)
        speeds = self._speeds([bought, before, *self._lost_s])
        for other, seconds in self._lost_s.items():
            if (
                other.rows > bought.rows
                or other.cache_length > bought.cache_length
                or other.joint != bought.joint
            ):
                self._lost_s[other] = max(seconds - lost_s, 0.0)
                continue
            slow, now, fast = (speeds[p] for p in (before, bought, other))
            share = 0.0
            if 0 < slow < now < fast:
                share = (1 / now - 1 / fast) / (1 / slow - 1 / fast)
            self._lost_s[other] = share * seconds

    def first_look(
        self, rows: int, cache_length: int, compile_s: Callable[[Program], float]
    ) -> tuple[Program, ...]:
        """Return programs to measure before anything else is known of drafts, or none.

        One row, where decoding is bound by memory most, without drafts and with about
        four. It is due when the time lost without drafts, were they
        `UNKNOWN_SPEED_UP` times as fast, reaches what it takes to compile them; for
        "paper", whose rule has to be told what passes cost, at once.

        Args:
          rows: of the smallest batch. cache_length: of the longest cache.
          compile_s: as in `choose`.
        """
        with self._lock:
            self._least_rows = rows
            drafting = [gamma for gamma in self.gammas if gamma]
            if not drafting or self.knows_drafts:
                return ()
            middle = min(drafting, key=lambda gamma: abs(gamma - 4))
            pair = tuple(Program(rows, cache_length, gamma) for gamma in (0, middle))
            if self._rule is None:
                lost_s = sum(self._plain_at.values()) * (1 - 1 / UNKNOWN_SPEED_UP)
                # A window that drafts holds two models' passes, and none was compiled.
                price_s = compile_s(pair[0]) + 2 * compile_s(pair[1])
                if lost_s < self.patience * price_s:
                    return ()
            return pair

    @property
    def knows_drafts(self) -> bool:
        """Whether costs of drafting were ever measured, here or elsewhere."""
        return self.table.passes is not None or any(p.gamma for p in self.table.seconds)

    def observe_first_look(self, seconds: dict[Program, float], rounds: int) -> None:
        """Learn what one row costs; the time lost so far is booked by it.

        Args:
          seconds: of a round of each program. rounds: that each is worth.
        """
        with self._lock:
            for program, round_s in seconds.items():
                self.table.observe(program, round_s * rounds, rounds)
            plain_at, self._plain_at = self._plain_at, {}
            for shape, plain_s in plain_at.items():
                programs = [Program(*shape[:2], g, shape[2]) for g in self.gammas]
                speeds = self._speeds(programs)
                plain = next(p for p in programs if not p.gamma)
                for program in programs:
                    if speeds[program] > speeds[plain]:
                        lost_s = plain_s * (1 - speeds[plain] / speeds[program])
                        self._lost_s[program] = lost_s

    def _drafts_lose(self) -> bool:
        """Whether one row was measured, and gains nothing by any draft that is kept.

        Kept as often as they are known to be, or as those of a good drafter. A survey
        has measured more than one row, and is believed.
        """
        one_row = [
            p
            for p in self.table.seconds
            if p.gamma and p.rows == self._least_rows and not p.joint
        ]
        if self.table.passes is not None or not one_row:
            return False
        is_compared = False
        for measured in one_row:
            plain_s = self.table.round_seconds(measured._replace(gamma=0))
            for gamma in self.gammas:
                round_s = self.table.round_seconds(measured._replace(gamma=gamma))
                if not gamma or not plain_s or not round_s:
                    continue
                chances = np.maximum(self.acceptance.keep_probs(gamma), PRIOR_KEEP)
                is_compared = True
                if expected_tokens(list(chances)) * plain_s > round_s:
                    return False
        return is_compared

    def _find_probe(self, plain: Program, ready: Sequence[Program]) -> Program | None:
        """Return what to run instead of plain decoding, to see if drafts would pay.

        The shortest draft at the same rows and cache length that would be faster if
        drafts were kept as a good drafter's are, once the time for it has been earned.
        """
        plain_s = self.table.round_seconds(plain)
        for program in sorted(p for p in ready if p.gamma and p.shape == plain.shape):
            round_s = self.table.round_seconds(program)
            if not round_s or not plain_s:
                continue
            known = self.acceptance.keep_probs(program.gamma)
            tokens = expected_tokens(list(np.maximum(known, PRIOR_KEEP)))
            cost_s = self._probed_s + PROBE_ROUNDS * round_s
            is_earned = cost_s <= PROBE_SHARE * self._plain_s
            if is_earned and tokens / round_s > (1 + HYSTERESIS) / plain_s:
                return program
        return None

    def observe(
        self,
        program: Program,
        num_rounds: int,
        emitted: np.ndarray,
        seconds: float,
        accepted: np.ndarray | None = None,
        live: int = 0,
    ) -> None:
        """Learn from a window, and book the time lost against programs not compiled.

        Args:
          program: what ran. num_rounds: its rounds; 0 where the seconds are no measure.
          emitted: histogram `[G + 1]` of row-rounds by tokens emitted, from 1 upwards.
          seconds: the window's time on the device, compilation not counted.
          accepted: histogram `[G + 1]` of row-rounds by drafts kept, used or not; None
            is `emitted`.
          live: rows that were live at its beginning; 0 if that is not known.
        """
        accepted = emitted if accepted is None else accepted
        with self._lock:
            self._observe(program, num_rounds, emitted, seconds, accepted, live)

    def _observe(
        self,
        program: Program,
        num_rounds: int,
        emitted: np.ndarray,
        seconds: float,
        accepted: np.ndarray,
        live: int,
    ) -> None:
        own = self._rollout
        if program.gamma == 0:
            self._plain_s += seconds
            if not self.knows_drafts:
                known_s = self._plain_at.get(program.shape, 0.0)
                self._plain_at[program.shape] = known_s + seconds
        elif own.is_probing:
            self._probed_s += seconds
        row_rounds = int(emitted.sum())
        if live:
            name = (program.rows, program.gamma)
            keep = math.exp(-FORGET_PER_ROUND * row_rounds)
            alive, in_all = self._row_rounds.get(name, (0.0, 0.0))
            self._row_rounds[name] = (
                keep * alive + row_rounds,
                keep * in_all + max(live * num_rounds, row_rounds),
            )
        self.table.observe(program, seconds, num_rounds)
        if self._rule is not None and program.gamma:
            self._rule.observe(accepted)
        shares = own.kept.contradiction(accepted)
        if shares is not None:
            own.kept.forget()
            own.used.forget()
            if shares[1] < DEAD_SHARE * shares[0]:
                own.broken = shares
        own.kept.observe(accepted)
        own.used.observe(emitted)
        if not own.wanted:
            return
        speeds = self._speeds([program, *own.wanted])
        for wanted in own.wanted:
            # `wanted` had a speed when it was chosen, and what has one keeps one.
            lost = seconds * max(0.0, 1 - speeds[program] / speeds[wanted])
            self._lost_s[wanted] = self._lost_s.get(wanted, 0.0) + lost

    def state_dict(self) -> dict[str, Any]:
        """Return all that was learnt as JSON-ready values."""
        with self._lock:
            return {
                "control": self.control,
                "gammas": [int(gamma) for gamma in self.gammas],
                "seconds": listed_programs(self.table.seconds),
                "rounds": [
                    [*p, int(n)] for *p, n in listed_programs(self.table.rounds)
                ],
                "pace": float(self.table.pace),
                "lost_s": listed_programs(self._lost_s),
                "setting": list(next(reversed(self._estimates))),
                "probing": [float(self._plain_s), float(self._probed_s)],
                "row_rounds": [
                    [int(rows), int(gamma), float(live), float(in_all)]
                    for (rows, gamma), (live, in_all) in self._row_rounds.items()
                ],
                "rule": self._rule.state_dict() if self._rule is not None else None,
                "acceptance": _listed(self._estimates),
                "drafters": _listed(self._drafters),
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another controller of the same kind had learnt.

        Raises:
          ValueError: the state is of another control or other gammas, or not what
            `state_dict` returns; it names what is wrong. Nothing is taken over then.
        """
        _check_names("state", state, self.state_dict())
        mine = (self.control, list(self.gammas))
        theirs = (state["control"], checked_list("gammas", state["gammas"]))
        if mine != theirs:
            raise ValueError(
                f"state is of control, gammas = {theirs}, this controller of {mine}; "
                "make the controller with the same settings"
            )
        table = LatencyTable(
            seconds=checked_programs("seconds", state["seconds"], checked_seconds),
            rounds=checked_programs("rounds", state["rounds"], checked_whole),
            passes=self.table.passes,
            pace=checked_real("pace", state["pace"], least=1e-9, most=1e9),
        )
        lost_s = checked_programs("lost_s", state["lost_s"], checked_real)
        probing = checked_list("probing", state["probing"], 2)
        plain_s, probed_s = (checked_real("probing", value) for value in probing)
        row_rounds = dict(
            _checked_row_rounds(f"row_rounds[{i}]", row)
            for i, row in enumerate(checked_list("row_rounds", state["row_rounds"]))
        )
        depth = max(self.gammas)
        estimates, drafters = (
            _unlisted(name, state[name], depth) for name in ("acceptance", "drafters")
        )
        setting = _checked_setting("setting", state["setting"])
        for name, known in (("acceptance", estimates), ("drafters", drafters)):
            if setting not in known:
                raise ValueError(f"{name} has no entry for the setting {setting}")
            # The latest goes last, and only so many are kept.
            known[setting] = known.pop(setting)
            for old in list(known)[:-MAX_SETTINGS]:
                del known[old]
        if self._rule is None and state["rule"] is not None:
            raise ValueError(f"rule must be null for control={self.control!r}")
        with self._lock:
            if self._rule is not None:
                self._rule.load_state_dict(state["rule"])
            self.table, self._lost_s, self._row_rounds = table, lost_s, row_rounds
            self._plain_s, self._probed_s = plain_s, probed_s
            self._estimates, self._drafters = estimates, drafters
            # Booked anew: processes that are told one state have to decide alike.
            self._plain_at = {}
            self._own, self._latest = _OfThread(), self._rollout_at(setting)


class _TableRoofline:
    """The roofline of what a controller's table has measured, fitted when asked."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._fitted: Roofline | None = None
        self._num_readings = 0

    def pass_seconds(self, kind: Kind, rows: int, length: int, gamma: int = 0) -> float:
        """Return the seconds of one pass."""
        readings = self._controller.table.readings()
        if self._fitted is None or len(readings) != self._num_readings:
            self._fitted, self._num_readings = Roofline.fit(readings), len(readings)
        return self._fitted.pass_seconds(kind, rows, length, gamma)


def _listed(estimates: dict[Setting, AcceptanceEstimate]) -> list[Any]:
    return [
        [list(setting), estimate.tested.tolist(), estimate.kept.tolist()]
        for setting, estimate in estimates.items()
    ]


def _unlisted(name: str, values: Any, depth: int) -> dict[Setting, AcceptanceEstimate]:
    """Return what `_listed` made a list of; `ValueError` for anything else."""
    found = {}
    for i, row in enumerate(checked_list(name, values)):
        setting, *counts = checked_list(f"{name}[{i}]", row, 3)
        tested, kept = (
            np.array([checked_real(f"{name}[{i}]", x) for x in checked], float)
            for checked in (checked_list(f"{name}[{i}]", c, depth) for c in counts)
        )
        # Both decay alike, each with roundings of its own.
        if (kept > tested * (1 + 1e-9)).any():
            raise ValueError(f"{name}[{i}] kept more drafts than it tested: {row}")
        found[_checked_setting(f"{name}[{i}]", setting)] = AcceptanceEstimate(
            tested=tested, kept=kept
        )
    return found


def _checked_setting(name: str, value: Any) -> Setting:
    return tuple(
        checked_real(f"the setting of {name}", x) for x in checked_list(name, value)
    )


def _checked_row_rounds(
    name: str, row: Any
) -> tuple[tuple[int, int], tuple[float, float]]:
    rows, gamma, live, in_all = checked_list(name, row, 4)
    size = checked_whole(f"rows of {name}", rows, least=1)
    lived, all_rounds = (checked_real(name, value) for value in (live, in_all))
    return (size, checked_whole(f"gamma of {name}", gamma)), (lived, all_rounds)


def _check_names(name: str, state: Any, known: dict[str, Any]) -> None:
    """Check that a state has just the names it is known to have."""
    if not isinstance(state, dict):
        raise ValueError(f"{name} is a {type(state).__name__}, and must be a dict")
    for key in known.keys() ^ state.keys():
        has = "holds" if key in state else "lacks"
        raise ValueError(f"{name} {has} {key!r}; give what state_dict returned")
