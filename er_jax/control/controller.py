"""Which program next: draft length, batch size and cache length by measured speed.

The controller rests on three ideas. *Acceptance* is estimated per depth and sampling
setting from the histograms of windows; a histogram that contradicts the estimate far
enough replaces it at once. The *speed* of a program is its expected tokens per round
over its seconds per round. gamma = 0 is one of the choices, so turning drafts off needs
no rule of its own. *Rent or buy* decides what to compile: for every program that is not
compiled, the time lost by running the fastest compiled one instead is added up, and the
program is compiled when the sum reaches its compile time.

At first nothing is known of drafts. Where plain steps promise a gain for the batch that
runs (`guesses`), the same account is kept for its drafts. Otherwise they are assumed to
be `UNKNOWN_SPEED_UP` times as fast as plain decoding, and when the time lost by that
assumption reaches the price of a measurement, one row is measured with and without
drafts (`first_look`). If one row gains nothing, no batch does, and no drafting program
is compiled from then on.

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
from er_jax.control.guesses import guessed_seconds
from er_jax.control.paper import PaperRule, check_names
from er_jax.control.probes import (
    HYSTERESIS,
    PROBE_SHARE,
    drafts_lose,
    find_probe,
)
from er_jax.control.rollouts import NO_SETTING, Rollouts
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
from er_jax.costs.table import UNCERTAINTY_DISCOUNT, LatencyTable, OwnLock
from er_jax.types import FIRST_DRAFT, Program, View

# A change of gamma alone moves no rows; its gain need only exceed rounding.
GAMMA_HYSTERESIS = 0.005


class Controller:
    """Chooses programs by expected tokens per second; learns from every window.

    Rollouts in several threads may share a controller. They share costs, acceptance and
    lost time, under a lock; setting, probes and the verdict on the drafter belong to
    each rollout. With "paper" they also share the rule's one switch. The methods of
    `ControllerProtocol` are documented there.

    Args:
      control: "best", "paper" (see `PaperRule`), "ar" or "fixed:g"; all but the first
        leave only batch size and cache length to choose by speed.
      gammas: draft lengths "best" may use; must contain 0.
      patience: compile a faster program when the time lost without it reaches this many
        times its compile time; 0 compiles at once.
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
        """Held while first costs are read or measured, by one thread at a time."""
        self._lock = OwnLock()
        self._rollouts = Rollouts(max(self.gammas))
        self._live_shares = LiveShares()
        self._accounts = Accounts()
        self._plain_s = self._probed_s = 0.0
        self._views: set[View] = set()
        self.least_rows = 1
        """Rows of the smallest batch: 1, or one per data shard."""
        self._rule = PaperRule(_TableRoofline(self)) if control == "paper" else None

    def __repr__(self) -> str:
        return f"Controller({self.control!r}, gammas={self.gammas})"

    def summary(self) -> str:
        """Return what was learnt of programs and drafts, as text for people."""
        timed = f"{self!r}: {len(self.table.seconds)} programs timed"
        with self._lock:
            return "\n".join([timed, *self._rollouts.described()])

    @property
    def acceptance(self) -> AcceptanceEstimate:
        """Estimate of drafts used, at the setting of this thread's rollout."""
        return self._rollouts.current.used

    @property
    def views(self) -> tuple[View, ...]:
        """The drafts that it could choose so far, and what they see."""
        return tuple(sorted(self._views)) or (FIRST_DRAFT,)

    def acceptance_of(self, view: View) -> AcceptanceEstimate:
        """Return the estimate of drafts used, of a draft and what it sees."""
        return self._rollouts.current.of(view).used

    @property
    def broken_drafter(self) -> tuple[float, float] | None:
        """Acceptance rates (expected, found) that show one in this rollout."""
        return self._rollouts.current.broken

    def start_rollout(self, setting: Sequence[float] = NO_SETTING) -> None:
        """Begin a rollout of this thread; see `Rollouts.start`.

        Args:
          setting: (temperature, top-k, top-p, min-p).
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
        """Return the context of one rollout; see `ControllerProtocol.sampling`.

        A rollout may be nested in another of the same thread, in a callback for
        instance; the outer one then goes on as before.
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
        return self._speeds([program], may_guess=False)[program] or None

    def _speeds(
        self, programs: Sequence[Program], *, may_guess: bool = True
    ) -> dict[Program, float]:
        """Return the speed of each program, 0 where it is unknown.

        Args:
          may_guess: whether drafts have guessed costs before any were timed.
        """
        may_guess &= self._rule is None
        used = {view: self.acceptance_of(view) for view in {p.view for p in programs}}
        tokens = {
            (gamma, view): used[view].tokens_per_round(gamma)
            for gamma, view in {(p.gamma, p.view) for p in programs}
        }
        speeds = {}
        for program in programs:
            round_s = self.table.round_seconds(program)
            if round_s is None and may_guess and not program.shared_rows:
                round_s = guessed_seconds(self.table, program)
            emitted = tokens[program.gamma, program.view] * self._live_shares.share(
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
        """Return the program to run next: the current one unless another is faster.

        Only "paper" uses `live` and `length`. See `ControllerProtocol.choose`.
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
        self._views |= {program.view for program in options if program.gamma}
        if self._rule is not None:
            gamma = self._rule.choose(live, length)
            options = [p for p in options if p.gamma == gamma] or options
        speeds = self._speeds(options)
        # Reversed, so that the fallback wins while nothing is known.
        ready = [p for p in reversed(options) if not compile_s(p)] or [options[-1]]
        for program in ready:
            if program not in self.table.seconds:
                # Compiled but never timed (another controller ran it): cheap to try.
                if program.gamma and not self.knows_drafts:
                    plain = speeds.get(program.plain, 0.0)
                    speeds[program] = UNKNOWN_SPEED_UP * plain
                speeds[program] /= 1 - UNCERTAINTY_DISCOUNT
        best_ready = max(ready, key=speeds.__getitem__)
        worthwhile = speeds[best_ready] * (1 + HYSTERESIS)
        own.wanted = [p for p in options if speeds[p] > worthwhile]
        if self._rule is None and 0 in self.gammas and self._do_drafts_lose():
            own.wanted = [p for p in own.wanted if not p.gamma]
        paid = self._accounts.paid(own.wanted, self.patience, compile_s)
        own.is_probing = False
        # The published rule never turns drafts off, so it needs no probes.
        may_probe = self._rule is None
        if paid:
            own.wanted = []
            bought = max(paid, key=speeds.__getitem__)
            self._accounts.settle(bought, best_ready, self._speeds)
            if bought.gamma:
                self._accounts.plain_s.pop(bought.shape, None)
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
            probe = find_probe(self.table, self.acceptance_of, chosen, ready, earned_s)
        own.is_probing = probe is not None
        return probe or chosen

    def first_look(
        self, rows: int, cache_length: int, compile_s: Callable[[Program], float]
    ) -> tuple[Program, ...]:
        """Return programs to measure, or none; see `ControllerProtocol.first_look`.

        They decode one row, where decoding is most bound by memory, without drafts and
        with about four. They are due when the assumed loss of plain decoding reaches
        their compile time; for "paper", which needs the costs of passes, at once.
        """
        with self._lock:
            self.least_rows = rows
            drafting = [gamma for gamma in self.gammas if gamma]
            if not drafting or self._has_looked:
                return ()
            middle = min(drafting, key=lambda gamma: abs(gamma - 4))
            plain = Program(rows, cache_length, 0)
            drafted = plain._replace(gamma=middle)
            # A drafting window has passes of two models: twice the compile time.
            price_s = compile_s(plain) + 2 * compile_s(drafted)
            is_paid = self._accounts.is_look_paid(self.patience * price_s)
            is_due = is_paid or self._rule is not None
            return (plain, drafted) if is_due else ()

    @property
    def knows_drafts(self) -> bool:
        """Whether costs of drafts were ever measured, in this process or before."""
        return self.table.has_drafts

    @property
    def _has_looked(self) -> bool:
        """Whether drafts of the smallest batch were measured, or single passes."""
        return self.table.passes is not None or any(
            p.gamma and p.rows == self.least_rows for p in self.table.seconds
        )

    def observe_first_look(
        self, seconds: Mapping[Program, float], num_rounds: int
    ) -> None:
        """Learn what one row costs, and book the time lost so far accordingly."""
        with self._lock:
            for program, round_s in seconds.items():
                self.table.observe(program, round_s * num_rounds, num_rounds)
            self._accounts.book_look(self.gammas, self.views, self._speeds)

    def _do_drafts_lose(self) -> bool:
        return drafts_lose(
            self.table, self.acceptance, self.gammas, self.least_rows, self.views
        )

    def observe(
        self,
        program: Program,
        num_rounds: int,
        emitted: np.ndarray,
        seconds: float,
        accepted: np.ndarray | None = None,
        live: int = 0,
    ) -> None:
        """Learn from a window, and book the time lost without faster programs.

        See `ControllerProtocol.observe`.
        """
        accepted = emitted if accepted is None else accepted
        with self._lock:
            own = self._rollouts.current
            if program.gamma == 0:
                self._plain_s += seconds
                if not self._has_looked:
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
            own.observe(accepted, emitted, program.view)
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
        """Replace what was learnt by the state of another controller of this kind.

        Raises:
          ValueError: the state is of another control or other gammas, or not what
            `state_dict` returns; it names what is wrong. Nothing is replaced then.
        """
        if isinstance(state, dict):
            state = {"spans": [], **state}  # Earlier versions had none.
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
            # Seconds of plain decoding are dropped, so that processes with the same
            # state decide alike.
            self._accounts = Accounts(lost_s)
            # Running rollouts stay registered.
            rollouts.running = self._rollouts.running
            self._rollouts = rollouts


class _TableRoofline:
    """A roofline fitted to the readings of a controller's table, when first needed."""

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
