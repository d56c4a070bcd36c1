"""What belongs to a rollout: its sampling setting, and what is known of its drafts.

Rollouts in several threads may share a controller. Estimates are by sampling setting
and shared; probes, and what is said of a broken drafter, are of each thread's rollout.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from er_jax.control.estimate import (
    KEEP_PER_ROLLOUT,
    AcceptanceEstimate,
    checked_counts,
)
from er_jax.costs.record import checked_list, checked_real
from er_jax.types import Program

# What a sampling setting says, and the one of those who name none.
SETTING_NAMES = ("temperature", "top_k", "top_p", "min_p")
Setting: TypeAlias = tuple[float, ...]
NO_SETTING: Setting = ()

# Acceptance is remembered for so many sampling settings, those that were used last: a
# temperature that is lowered a little in every step makes as many as there are steps.
MAX_SETTINGS = 16

# Kept at less than this share of what was expected, drafts are of a broken drafter.
DEAD_SHARE = 0.5


@dataclasses.dataclass(eq=False)
class RolloutRecord:
    """What belongs to one rollout; its estimates are of its setting, and shared.

    used: drafts used, as the choice needs them. kept: drafts kept, which say whether
      the drafter is sound. broken: shares of drafts (expected, found) that said it is
      not. is_probing: whether drafts run only to see if they would pay. wanted:
      programs for which lost time is booked.
    """

    setting: Setting
    used: AcceptanceEstimate
    kept: AcceptanceEstimate
    broken: tuple[float, float] | None = None
    is_probing: bool = False
    wanted: list[Program] = dataclasses.field(default_factory=list)

    def observe(self, accepted: np.ndarray, emitted: np.ndarray) -> None:
        """Take in a window's histograms of drafts kept and of tokens emitted."""
        shares = self.kept.contradiction(accepted)
        if shares is not None:
            self.kept.forget()
            self.used.forget()
            if shares[1] < DEAD_SHARE * shares[0]:
                self.broken = shares
        self.kept.observe(accepted)
        self.used.observe(emitted)


class _OfThread(threading.local):
    """The rollout that a thread is in or was in last; of copies there is none."""

    rollout: RolloutRecord | None = None

    def __reduce__(self) -> tuple[type[_OfThread], tuple[()]]:
        return _OfThread, ()


class _Running(set[RolloutRecord]):
    """The rollouts under way; in copies there are none."""

    def __reduce__(self) -> tuple[type[_Running], tuple[()]]:
        return _Running, ()


class Rollouts:
    """The rollouts of a controller, and what is known of drafts by sampling setting.

    Args:
      depth: of the longest draft.
    Attributes:
      used, kept: estimates by setting, the latest last; see `RolloutRecord`.
      running: the rollouts under way.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.used = {NO_SETTING: AcceptanceEstimate.empty(depth)}
        self.kept = {NO_SETTING: AcceptanceEstimate.empty(depth)}
        self.running = _Running()
        self._own = _OfThread()
        self._latest = self._record(NO_SETTING)

    def _record(self, setting: Setting) -> RolloutRecord:
        return RolloutRecord(setting, self.used[setting], self.kept[setting])

    @property
    def current(self) -> RolloutRecord:
        """This thread's rollout; of one that has begun none, the latest."""
        return self._own.rollout or self._latest

    def start(self, setting: Sequence[float]) -> RolloutRecord:
        """Begin a rollout of this thread.

        What is known of acceptance weighs less from here on, because the policy moves
        between rollouts; not if others of this setting are under way, which sample from
        the same one. A setting never met begins with what is known of the last one.
        """
        setting = tuple(float(value) for value in setting)
        last = self.current
        for known, before in ((self.used, last.used), (self.kept, last.kept)):
            estimate = known.pop(setting, None)
            if estimate is None:
                estimate = AcceptanceEstimate(
                    tested=before.tested.copy(), kept=before.kept.copy()
                )
                estimate.forget()
            known[setting] = estimate
            _drop_oldest(known)
        own = self._latest = self._own.rollout = self._record(setting)
        if all(other.setting != setting for other in self.running):
            own.used.decay(KEEP_PER_ROLLOUT)
            own.kept.decay(KEEP_PER_ROLLOUT)
        return own

    def enter(self, setting: Sequence[float]) -> tuple[RolloutRecord, Any]:
        """Begin a rollout that `leave` ends; return it, and what to give back there."""
        outer = self._own.rollout
        is_inner = outer in self.running
        own = self.start(setting)
        self.running.add(own)
        return own, (outer, is_inner)

    def leave(self, own: RolloutRecord, before: Any) -> None:
        """End a rollout; one inside of another leaves that one as it was."""
        outer, is_inner = before
        self.running.discard(own)
        if is_inner:
            self._own.rollout = outer

    def state(self) -> dict[str, Any]:
        """Return what is known by setting, ready for JSON."""
        return {
            "setting": list(next(reversed(self.used))),
            "acceptance": _listed(self.used),
            "drafters": _listed(self.kept),
        }

    @classmethod
    def of_state(cls, state: dict[str, Any], depth: int) -> Rollouts:
        """Return what `state` described; `ValueError` for anything else."""
        found = cls(depth)
        setting = _checked_setting("setting", state["setting"])
        for name in ("acceptance", "drafters"):
            known = _checked(name, state[name], depth)
            if setting not in known:
                raise ValueError(f"{name} has no entry for the setting {setting}")
            known[setting] = known.pop(setting)  # The latest goes last.
            _drop_oldest(known)
            if name == "acceptance":
                found.used = known
            else:
                found.kept = known
        found._latest = found._record(setting)
        return found


def _drop_oldest(known: dict[Setting, AcceptanceEstimate]) -> None:
    for old in list(known)[:-MAX_SETTINGS]:
        del known[old]


def _listed(estimates: dict[Setting, AcceptanceEstimate]) -> list[Any]:
    return [
        [list(setting), estimate.tested.tolist(), estimate.kept.tolist()]
        for setting, estimate in estimates.items()
    ]


def _checked(name: str, values: Any, depth: int) -> dict[Setting, AcceptanceEstimate]:
    """Return what `_listed` made a list of; `ValueError` for anything else."""
    found = {}
    for i, row in enumerate(checked_list(name, values)):
        setting, *counts = checked_list(f"{name}[{i}]", row, 3)
        estimate = checked_counts(f"{name}[{i}]", counts, depth)
        found[_checked_setting(f"{name}[{i}]", setting)] = estimate
    return found


def _checked_setting(name: str, value: Any) -> Setting:
    return tuple(
        checked_real(f"the setting of {name}", x) for x in checked_list(name, value)
    )
