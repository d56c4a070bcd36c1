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

A controller is a host object, kept across RL steps. Rollouts in several threads may
share one (`rollouts`). Left out: estimates of acceptance (`estimate`), the accounts
(`accounts`), the published rule (`paper`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from er_jax.config import DEFAULT_GAMMAS, parse_control
from er_jax.control.accounts import UNKNOWN_SPEED_UP, Accounts
from er_jax.control.estimate import AcceptanceEstimate, LiveShares
from er_jax.control.paper import PaperRule, check_names
from er_jax.control.probes import (
    HYSTERESIS,
    PROBE_SHARE,
    drafts_lose,
    find_probe,
)
from er_jax.control.rollouts import (
    NO_SETTING,
    SETTING_NAMES,
    Rollouts,
)
from er_jax.costs.passes import Kind
from er_jax.costs.record import (
    checked_list,
    checked_programs,
    checked_real,
    checked_seconds,
    checked_whole,
    listed_programs,
)
from er_jax.costs.roofline import Roofline
from er_jax.costs.table import DOUBT, LatencyTable, OwnLock
from er_jax.types import Program

# A change of gamma alone moves nothing, and need only gain more than rounding.
GAMMA_HYSTERESIS = 0.005


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
        self._rollouts = Rollouts(max(self.gammas))
        self._live_shares = LiveShares()
        self._accounts = Accounts()
        self._plain_s = self._probed_s = 0.0
        self.least_rows = 1
        """Of the smallest batch: one row, or one for each data shard."""
        self._rule = PaperRule(_TableRoofline(self)) if control == "paper" else None

    def __repr__(self) -> str:
        return f"Controller({self.control!r}, gammas={self.gammas})"

    def summary(self) -> str:
        """Return what was learnt of programs and drafts, as text for people."""
        lines = [f"{self!r}: {len(self.table.seconds)} programs timed"]
        with self._lock:
            estimates = list(self._rollouts.used.items())
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
    def acceptance(self) -> AcceptanceEstimate:
        """Chances that drafts are used, at the setting of this rollout."""
        return self._rollouts.current.used

    @property
    def broken_drafter(self) -> tuple[float, float] | None:
        """Shares of drafts (expected, found) that said so in this rollout, if any."""
        return self._rollouts.current.broken

    def start_rollout(self, setting: Sequence[float] = NO_SETTING) -> None:
        """Begin a rollout of this thread; see `Rollouts.start`.

        Args:
          setting: what acceptance depends on beside the policy, as `SETTING_NAMES`.
        """
        with self._lock:
            self._start_rule()
            self._rollouts.start(setting)

    def _start_rule(self) -> None:
        if self._rule is not None and not self._rollouts.running:
            self._rule.end_rollout()
            self._rule.start_rollout()

    @contextlib.contextmanager
    def sampling(self, setting: Sequence[float] = NO_SETTING) -> Iterator[None]:
        """Be in a rollout from its first choice to its last window.

        As `start_rollout`, and others know when it is over. One inside of another, from
        a callback of it for instance, leaves that one as it was.
        """
        with self._lock:
            self._start_rule()
            own, before = self._rollouts.enter(setting)
        try:
            yield
        finally:
            with self._lock:
                self._rollouts.leave(own, before)

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
            emitted = tokens[program.gamma] * self._live_shares.share(
                program.rows, program.gamma
            )
            speeds[program] = emitted / round_s if round_s else 0.0
        return speeds

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
        own = self._rollouts.current
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
        if self._rule is None and 0 in self.gammas and self._do_drafts_lose():
            own.wanted = [p for p in own.wanted if not p.gamma]
        paid = self._accounts.paid(own.wanted, self.patience, compile_s)
        own.is_probing = False
        # The published rule never draws back, and has no use for probes.
        may_probe = self._rule is None
        if paid:
            own.wanted = []
            bought = max(paid, key=speeds.__getitem__)
            self._accounts.settle(bought, best_ready, self._speeds)
            return bought
        chosen = best_ready
        if current in ready:
            is_same_shape = best_ready.shape == current.shape
            margin = GAMMA_HYSTERESIS if is_same_shape else HYSTERESIS
            if speeds[best_ready] <= speeds[current] * (1 + margin):
                chosen = current
        may_probe &= chosen.gamma == 0
        probe = None
        if may_probe:
            earned_s = PROBE_SHARE * self._plain_s - self._probed_s
            probe = find_probe(self.table, own.used, chosen, ready, earned_s)
        own.is_probing = probe is not None
        return probe or chosen

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
            self.least_rows = rows
            drafting = [gamma for gamma in self.gammas if gamma]
            if not drafting or self.knows_drafts:
                return ()
            middle = min(drafting, key=lambda gamma: abs(gamma - 4))
            pair = tuple(Program(rows, cache_length, gamma) for gamma in (0, middle))
            # A window that drafts holds two models' passes, and none was compiled.
            price_s = compile_s(pair[0]) + 2 * compile_s(pair[1])
            is_paid = self._accounts.is_look_paid(self.patience * price_s)
            return pair if is_paid or self._rule is not None else ()

    @property
    def knows_drafts(self) -> bool:
        """Whether costs of drafting were ever measured, here or elsewhere."""
        return self.table.passes is not None or any(p.gamma for p in self.table.seconds)

    def observe_first_look(
        self, seconds: Mapping[Program, float], num_rounds: int
    ) -> None:
        """Learn what one row costs; the time lost so far is booked by it.

        Args:
          seconds: of a round of each program. num_rounds: that each is worth.
        """
        with self._lock:
            for program, round_s in seconds.items():
                self.table.observe(program, round_s * num_rounds, num_rounds)
            self._accounts.book_look(self.gammas, self._speeds)

    def _do_drafts_lose(self) -> bool:
        return drafts_lose(self.table, self.acceptance, self.gammas, self.least_rows)

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
        own = self._rollouts.current
        if program.gamma == 0:
            self._plain_s += seconds
            if not self.knows_drafts:
                self._accounts.book_plain(program, seconds)
        elif own.is_probing:
            self._probed_s += seconds
        if live:
            self._live_shares.observe(
                program.rows, program.gamma, live, num_rounds, int(emitted.sum())
            )
        self.table.observe(program, seconds, num_rounds)
        if self._rule is not None and program.gamma:
            self._rule.observe(accepted)
        own.observe(accepted, emitted)
        self._accounts.book(program, seconds, own.wanted, self._speeds)

    def state_dict(self) -> dict[str, Any]:
        """Return all that was learnt as JSON-ready values."""
        table, rule = self.table, self._rule
        with self._lock:
            rounds = listed_programs(table.rounds)
            return {
                "control": self.control,
                "gammas": [int(gamma) for gamma in self.gammas],
                "seconds": listed_programs(table.seconds),
                "rounds": [[*program, int(count)] for *program, count in rounds],
                "slowdown": float(table.slowdown),
                "lost_s": listed_programs(self._accounts.lost_s),
                "probing": [float(self._plain_s), float(self._probed_s)],
                "row_rounds": self._live_shares.state(),
                "rule": None if rule is None else rule.state_dict(),
                **self._rollouts.state(),
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another controller of the same kind had learnt.

        Raises:
          ValueError: the state is of another control or other gammas, or not what
            `state_dict` returns; it names what is wrong. Nothing is taken over then.
        """
        check_names("state", state, self.state_dict())
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
            slowdown=checked_real("slowdown", state["slowdown"], least=1e-9, most=1e9),
        )
        lost_s = checked_programs("lost_s", state["lost_s"], checked_real)
        probing = checked_list("probing", state["probing"], 2)
        plain_s, probed_s = (checked_real("probing", value) for value in probing)
        live_shares = LiveShares.of_state("row_rounds", state["row_rounds"])
        rollouts = Rollouts.of_state(state, max(self.gammas))
        if self._rule is None and state["rule"] is not None:
            raise ValueError(f"rule must be null for control={self.control!r}")
        with self._lock:
            if self._rule is not None:
                self._rule.load_state_dict(state["rule"])
            self.table, self._live_shares = table, live_shares
            self._plain_s, self._probed_s = plain_s, probed_s
            # Plain decoding is booked anew: processes that are told one state have to
            # decide alike.
            self._accounts = Accounts(lost_s)
            # What runs goes on being known as such.
            rollouts.running = self._rollouts.running
            self._rollouts = rollouts


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
