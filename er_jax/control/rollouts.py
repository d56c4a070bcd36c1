"""Records of rollouts: sampling setting, acceptance estimates, soundness of drafts.

Rollouts in several threads may share a controller. They share the estimates of their
sampling setting; probes and the verdict on the drafter belong to one rollout.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from er_jax.control.estimate import (
    KEEP_PER_ROLLOUT,
    AcceptanceEstimate,
    checked_counts,
)
from er_jax.costs.record import checked_list, checked_real, checked_whole
from er_jax.types import FIRST_DRAFT, Program, View

# The values of a sampling setting, and the setting of callers that name none.
SETTING_NAMES = ("temperature", "top_k", "top_p", "min_p")
Setting: TypeAlias = tuple[float, ...]
NO_SETTING: Setting = ()

# Acceptance is remembered for the last MAX_SETTINGS sampling settings: a temperature
# that is lowered in every step makes a new one every time.
MAX_SETTINGS = 16

# A drafter is broken if its acceptance rate is below this share of the expected one.
DEAD_SHARE = 0.5

# First drafts that must have been tested before a drop shows a broken drafter, of any
# but the first: with less, the expected rate is only that of other drafts.
EVIDENCE = 200.0


class Estimates(NamedTuple):
    """Estimates of one kind of drafts: used, and kept; see `RolloutRecord`."""

    used: AcceptanceEstimate
    kept: AcceptanceEstimate

    def copy(self) -> Estimates:
        """Return estimates with the same evidence."""
        return Estimates(self.used.copy(), self.kept.copy())

    def forget(self) -> None:
        """Reduce the weight of all evidence to that of the prior, at most."""
        self.used.forget()
        self.kept.forget()


@dataclasses.dataclass(eq=False)
class RolloutRecord:
    """The record of one rollout; its estimates are those of its setting, and shared.

    used: estimate of drafts used, for the choice of programs. kept: estimate of drafts
      kept, which tells whether the drafter is sound; both of the first draft over all
      positions. others: the same of other drafts, and of those that see a span.
    broken: acceptance rates (expected, found) that showed a broken drafter, or None.
    is_probing: whether drafts run only to see if they would pay. wanted: programs for
      which lost time is booked.
    """

    setting: Setting
    used: AcceptanceEstimate
    kept: AcceptanceEstimate
    others: dict[View, Estimates]
    broken: tuple[float, float] | None = None
    is_probing: bool = False
    wanted: list[Program] = dataclasses.field(default_factory=list)

    def of(self, view: View) -> Estimates:
        """Return the estimates of a draft and what it sees.

        Without evidence they are those of the same draft over all positions, or else of
        the first draft, at the weight of a prior, and are not kept.
        """
        if view == FIRST_DRAFT:
            return Estimates(self.used, self.kept)
        if view in self.others:
            return self.others[view]
        near = (view.seeing(None), FIRST_DRAFT.seeing(view.span))
        first = Estimates(self.used, self.kept)
        known = (self.others[other] for other in near if other in self.others)
        found = next(known, first).copy()
        found.forget()
        return found

    def observe(
        self, accepted: np.ndarray, emitted: np.ndarray, view: View = FIRST_DRAFT
    ) -> None:
        """Take in a window's histograms of drafts kept and of tokens emitted."""
        if len(accepted) == 1:
            return
        found, is_first = self.of(view), view == FIRST_DRAFT
        rates = found.kept.contradiction(accepted)
        if rates is not None:
            # A low rate alone says nothing of a drafter that has few bits or sees
            # little; a drop does.
            is_known = is_first or found.kept.tested[0] >= EVIDENCE
            found.forget()
            if is_first:
                for other in self.others.values():
                    other.forget()
            if is_known and rates[1] < DEAD_SHARE * rates[0]:
                self.broken = rates
        found.kept.observe(accepted)
        found.used.observe(emitted)
        if not is_first:
            self.others[view] = found


class _OfThread(threading.local):
    """The current or last rollout of each thread; a copy has none."""

    rollout: RolloutRecord | None = None

    def __reduce__(self) -> tuple[type[_OfThread], tuple[()]]:
        return _OfThread, ()


class _Running(set[RolloutRecord]):
    """The running rollouts; a copy has none."""

    def __reduce__(self) -> tuple[type[_Running], tuple[()]]:
        return _Running, ()


class Rollouts:
    """The rollouts of a controller, and acceptance estimates by sampling setting.

    Args:
      depth: the longest draft length.
    Attributes:
      used, kept, others: estimates by setting, the latest last; see `RolloutRecord`.
      running: the running rollouts.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.used = {NO_SETTING: AcceptanceEstimate.empty(depth)}
        self.kept = {NO_SETTING: AcceptanceEstimate.empty(depth)}
        self.others: dict[Setting, dict[View, Estimates]] = {NO_SETTING: {}}
        self.running = _Running()
        self._own = _OfThread()
        self._latest = self._record(NO_SETTING)

    def _record(self, setting: Setting) -> RolloutRecord:
        return RolloutRecord(
            setting, self.used[setting], self.kept[setting], self.others[setting]
        )

    @property
    def current(self) -> RolloutRecord:
        """This thread's rollout; if it has begun none, the latest of any thread."""
        return self._own.rollout or self._latest

    def start(self, setting: Sequence[float]) -> RolloutRecord:
        """Begin a rollout of this thread.

        Evidence about its setting loses weight, because the policy changes between
        rollouts. It keeps its weight if other rollouts of the setting are running,
        because they sample from the same policy. A new setting begins with the estimate
        of the last one, at the weight of a prior.
        """
        setting = tuple(float(value) for value in setting)
        last = self.current
        for known, before in ((self.used, last.used), (self.kept, last.kept)):
            estimate = known.pop(setting, None)
            if estimate is None:
                estimate = before.copy()
                estimate.forget()
            known[setting] = estimate
            _drop_oldest(known)
        others = self.others.pop(setting, None)
        if others is None:
            others = {view: found.copy() for view, found in last.others.items()}
            for estimates in others.values():
                estimates.forget()
        self.others[setting] = others
        _drop_oldest(self.others)
        own = self._latest = self._own.rollout = self._record(setting)
        if all(other.setting != setting for other in self.running):
            for estimates in (own.of(FIRST_DRAFT), *own.others.values()):
                estimates.used.decay(KEEP_PER_ROLLOUT)
                estimates.kept.decay(KEEP_PER_ROLLOUT)
        return own

    def enter(self, setting: Sequence[float]) -> tuple[RolloutRecord, Any]:
        """Begin a rollout that `leave` ends; return it, and an argument for `leave`."""
        outer = self._own.rollout
        is_inner = outer in self.running
        own = self.start(setting)
        self.running.add(own)
        return own, (outer, is_inner)

    def leave(self, own: RolloutRecord, before: Any) -> None:
        """End a rollout; if it is nested, the outer one is current again."""
        outer, is_inner = before
        self.running.discard(own)
        if is_inner:
            self._own.rollout = outer

    def described(self) -> list[str]:
        """Return the estimates as text, a line for each setting with any evidence."""
        lines = []
        of_views = [
            (setting, view, estimate)
            for setting, used in self.used.items()
            for view, estimate in [
                (FIRST_DRAFT, used),
                *((view, found.used) for view, found in self.others[setting].items()),
            ]
        ]
        for setting, view, estimate in of_views:
            if not estimate.tested.any():
                continue
            depth = int(np.flatnonzero(estimate.tested)[-1]) + 1
            percents = zip(
                100 * estimate.keep_probs(depth),
                100 * estimate.keep_errors(depth),
                strict=True,
            )
            named = zip(SETTING_NAMES, setting, strict=False)
            label = ", ".join(f"{name} {value:g}" for name, value in named)
            if view != FIRST_DRAFT:
                label += f", {view}"
            lines.append(
                f"{label or 'drafts'}: used at each depth, if all before were: "
                + ", ".join(f"{prob:.1f} ± {error:.1f}" for prob, error in percents)
                + " %"
            )
        return lines

    def state(self) -> dict[str, Any]:
        """Return the estimates of all settings as JSON-ready values."""
        return {
            "setting": list(next(reversed(self.used))),
            "acceptance": _listed(self.used),
            "drafters": _listed(self.kept),
            "spans": [
                [
                    *(list(setting), view.head, view.window),
                    *_counts(found.used),
                    *_counts(found.kept),
                    view.draft,
                ]
                for setting, others in self.others.items()
                for view, found in others.items()
            ],
        }

    @classmethod
    def of_state(cls, state: dict[str, Any], depth: int) -> Rollouts:
        """Return the rollouts that `state` described; `ValueError` for others."""
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
        found.others = {setting: {} for setting in found.used}
        for i, row in enumerate(checked_list("spans", state["spans"])):
            name = f"spans[{i}]"
            row = checked_list(name, row)
            # Earlier versions had one draft.
            row = checked_list(name, row if len(row) == 8 else [*row, 0], 8)
            setting_of, head, window, *counts, draft = row
            draft = checked_whole(f"draft of {name}", draft)
            least = 0 if draft else 1
            view = View(
                draft,
                checked_whole(f"head of {name}", head),
                checked_whole(f"window of {name}", window, least=least),
            )
            others = found.others.get(_checked_setting(name, setting_of))
            if others is None:
                raise ValueError(f"{name} is of a setting that acceptance lacks")
            others[view] = Estimates(
                used=checked_counts(name, counts[:2], depth),
                kept=checked_counts(name, counts[2:], depth),
            )
        found._latest = found._record(setting)
        return found


def _drop_oldest(known: dict[Setting, Any]) -> None:
    for old in list(known)[:-MAX_SETTINGS]:
        del known[old]


def _listed(estimates: dict[Setting, AcceptanceEstimate]) -> list[Any]:
    return [
        [list(setting), *_counts(estimate)] for setting, estimate in estimates.items()
    ]


def _counts(estimate: AcceptanceEstimate) -> tuple[list[float], list[float]]:
    return estimate.tested.tolist(), estimate.kept.tolist()


def _checked(name: str, values: Any, depth: int) -> dict[Setting, AcceptanceEstimate]:
    """Return the estimates that `_listed` listed; `ValueError` for anything else."""
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
