"""The batch of a rollout whose completions are conversations; see `turns`.

A row whose turn has ended is kept as it is until something else needs it. The batch
keeps as many rows as there are sequences that are live or wait for an answer: moving to
fewer and back costs more than idle rows do.

Of several processes each has all conversations. What has ended is returned by the one
that held its row, or by the leader where an answer has ended it.

Left out: what is asked, and what an answer means (`turns`, `respond`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from er_jax.request import bucket_of
from er_jax.result import Completion
from er_jax.resume import UNFINISHED
from er_jax.scheduler.admission import Rows
from er_jax.scheduler.batch import Batch
from er_jax.scheduler.exchange import FetchedRows, rows_of_all
from er_jax.scheduler.turns import Turns
from er_jax.types import NONE, Finish, WindowInfo

# Longest wait for answers before other reasons to end are looked at.
ANSWER_WAIT_S = 0.05


class Conversations(Batch):
    """A batch whose sequences go on when the turns that have ended are answered.

    Args:
      turns: those that are open.
      turned: why turns have ended, by sequence, of those not answered yet.
      arguments, named: of the batch.
    """

    def __init__(
        self, turns: Turns, turned: Mapping[int, str], *arguments: Any, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self.turns, self._turned = turns, turned
        self.queue = collections.deque(s for s in self.queue if s not in turned)
        self._num_undecided = 0

    @property
    def waiting(self) -> list[int]:
        """The sequences that wait for a row or for an answer."""
        return [*self.queue, *self.turns.open]

    @property
    def num_open(self) -> int:
        """Sequences that wait for an answer, and rows that ended and may do so."""
        return len(self.turns.open) + self._num_undecided

    def _start_bucket(self) -> int:
        held = self.rows.length[self.rows.held != NONE].tolist()
        lengths = map(self.request.start_length, self.queue)
        return self.request.bucket([*lengths, *self.turns.lengths, *held])

    def _free_rows(self, count: int) -> np.ndarray:
        return np.sort(self.rows.free[:count])

    def refill(self) -> None:
        """Have sequences go on where they are, and start others in free slots."""
        self._make_room()
        self._go_on_in_place()
        if self.queue and self.num_live < len(self.rows):
            super().refill()
        self.rows.held[self.rows.is_live] = NONE
        self._release(self.rows.sequence[self.rows.is_live].tolist())

    def _make_room(self) -> None:
        """Lengthen the cache if it is too short for what waits.

        It was shortened, or never so long, while longer conversations were answered.
        """
        needed = self._start_bucket()
        if needed > self._shape[1]:
            length = bucket_of(needed, self.request.cache_lengths)
            self._move((self._shape[0], length, self._shape[2]))

    def _go_on_in_place(self) -> None:
        held = self.rows.held.tolist()
        row_of = {sequence: row for row, sequence in enumerate(held)}
        on = {s: row_of[s] for s in self.queue if s in row_of}
        self._go_on(on)
        self.stats.num_kept += len(on)
        # Last, so that an interruption loses none of them.
        self.queue = collections.deque(s for s in self.queue if s not in on)

    def _with_held(self, rows: Rows, info: WindowInfo) -> Rows:
        has_ended = self.rows.is_live & ~rows.is_live
        has_ended &= info.finish_reason != Finish.NONFINITE
        self._num_undecided = int(has_ended.sum())
        if not self.topology.keeps_rows or self.request.ring_slots is not None:
            # A ring has no room for an answer beside what its tokens see.
            return rows
        held = np.where(has_ended, self.rows.sequence, rows.held)
        return dataclasses.replace(rows, held=held)

    def _of_all(
        self, rows: FetchedRows, ended: np.ndarray, length: np.ndarray
    ) -> FetchedRows:
        agreement = self.turns.agreement
        if not agreement.is_spread or self.turns.is_closed or not len(ended):
            return rows
        return rows | rows_of_all(agreement, rows, ended, length[ended])

    def _still_ended(self, ended: set[int], found: dict[int, Completion]) -> set[int]:
        on = {s for s in ended if self.turns.takes(self.request, s, found[s])}
        found.update({s: self.turns.open[s] for s in on})
        self._release(ended - on)
        self._num_undecided = 0
        return ended - on

    def _release(self, sequences: Collection[int]) -> None:
        """Hold no rows any more for sequences that need none."""
        self.rows.held[np.isin(self.rows.held, list(sequences))] = NONE

    def ask_again(self) -> list[int]:
        """Ask for what was not answered before; return sequences that have ended."""
        for sequence, reason in self._turned.items():
            whole = dataclasses.replace(self.begun[sequence], finish_reason=reason)
            if self.turns.takes(self.request, sequence, whole):
                continue
            if self.turns.agreement.is_leader:
                self.completions[sequence] = whole
        return list(self.completions)

    def take_answers(
        self, failure: Exception | None = None, wait_s: float = 0.0
    ) -> list[int]:
        """Queue the sequences that were answered; return those that have ended.

        Args:
          failure: as for `Turns.answered`. wait_s: how long to wait for a first answer.
        """
        found = self.turns.answered(self.request, wait_s, failure)
        if not found:
            return []
        on = {s: c for s, c in found.items() if c.finish_reason == UNFINISHED}
        ended = {s: c for s, c in found.items() if s not in on}
        is_mine = self.turns.agreement.is_leader
        if is_mine:
            self.completions |= ended
        if on:
            known = {s: completion.token_ids for s, completion in on.items()}
            self.request = self.request.going_on(known)
            self.settings = self.request.with_begins(self.settings)
            self.begun = {**self.begun, **on}
            # In front: who has begun ends first.
            self.queue.extendleft(reversed(on))
        self.turns.forget(found)
        self._release(ended)
        if self.journal is not None and is_mine:
            # Last: what an interruption returns is never less than the journal has.
            self.journal.note(found, sync=False)
        return list(ended) if is_mine else []

    def wait_for_answers(self, failure: Exception | None = None) -> list[int]:
        """Wait a moment for an answer, while nothing can run; as `take_answers`."""
        if not self.turns.open:
            return []
        with self.stats.timed("answers", lambda: 0.0):
            return self.take_answers(failure, ANSWER_WAIT_S)

    def close(self) -> None:
        """Ask for nothing more, and take no more answers."""
        self.turns.close()

    def unfinished(self) -> dict[int, Completion]:
        """Return what `Batch.unfinished` does, and what waits for an answer."""
        is_mine = self.turns.agreement.is_leader
        return {**(self.turns.open if is_mine else {}), **super().unfinished()}
