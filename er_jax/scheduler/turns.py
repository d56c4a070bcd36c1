"""Conversations: sequences whose turn has ended, and that wait for an answer.

A row whose turn has ended is free, like any that has ended. When its answer is there,
the sequence goes back into the queue with all tokens so far. If nothing else has taken
the row, it goes on there, and only what is new is prefilled; else all behind its prompt
is. Noise depends on key, sequence id and position alone, so the tokens are those of a
rollout of the whole text so far in any case.

Of several processes the first asks, and tells the others what was answered.

Left out: threads (`respond`), the queue (`conversations`), how processes tell each
other (`exchange`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from er_jax.engine.protocol import Agreement
from er_jax.request import Request
from er_jax.respond import Calls, Respond, Turn, checked_answer
from er_jax.result import Completion
from er_jax.resume import LENGTH, STOP, UNFINISHED, turn_of
from er_jax.scheduler.exchange import Told, answers_of_leader
from er_jax.stats import RolloutStats
from er_jax.types import FINISH_NAMES, Finish

TOOL = FINISH_NAMES[Finish.TOOL]


class Turns:
    """The turns of a rollout that have ended and are not answered.

    Args:
      respond: what answers, and the limits. vocab_size: of the policy.
      stats: is told of answers, and of failures to answer.
      agreement: of the processes, which have the same turns; the leader alone asks.
    Attributes:
      open: sequence -> completion so far, "unfinished", of those that wait.
      is_closed: whether answers are no longer taken.
    """

    def __init__(
        self,
        respond: Respond,
        vocab_size: int,
        stats: RolloutStats,
        agreement: Agreement,
    ) -> None:
        self.open: dict[int, Completion] = {}
        self.agreement, self.is_closed = agreement, False
        self._respond, self._vocab_size, self._stats = respond, vocab_size, stats
        self._calls = Calls(respond) if agreement.is_leader else None
        self._room: dict[int, int] = {}
        self._reason: dict[int, str] = {}
        self._length: dict[int, int] = {}

    def takes(self, request: Request, sequence: int, completion: Completion) -> bool:
        """Whether a row that has ended waits for an answer now; if so, it is asked for.

        Args:
          request: of the sequence. completion: that has ended.
        """
        if sequence in self.open:
            return True  # An interrupted fetch is repeated.
        length = len(completion.token_ids)
        room = request.most_tokens(sequence) - length
        spans, most = completion.turns, self._respond.max_turns
        is_last = most is not None and len(spans) >= most
        if completion.finish_reason not in (STOP, LENGTH) or room < 1 or is_last:
            return False
        open_ = dataclasses.replace(completion, finish_reason=UNFINISHED)
        self._room[sequence] = room
        self._reason[sequence] = completion.finish_reason
        self._length[sequence] = request.begin(sequence) + length
        self.open[sequence] = open_
        if self._calls is None:
            return True
        turn = Turn(
            index=len(spans) - 1,
            token_ids=completion.token_ids[turn_of(completion) :].copy(),
            prompt_ids=request.prompt(sequence).copy(),
            completion_ids=completion.token_ids.copy(),
            finish_reason=completion.finish_reason,
            room=room,
        )
        self._calls.ask(sequence, int(request.sequence_ids[sequence]), turn)
        return True

    def answered(
        self, request: Request, wait_s: float, failure: Exception | None = None
    ) -> dict[int, Completion]:
        """Return completions that go on ("unfinished"), and those that have ended.

        They stay open until `forget`, so that an interruption loses none. Several
        processes meet here while a turn is open, and only then.

        Args:
          request: of the sequences. wait_s: how long to wait for a first answer.
          failure: of this process; raised in all, if they meet.
        """
        if self.is_closed or not self.open:
            return {}
        answers: list[tuple[int, Told]] = []
        if self._calls is not None:
            for sequence, answer in self._calls.answers(wait_s):
                answers.append((sequence, self._told(sequence, answer)))
        answers = answers_of_leader(self.agreement, answers, failure)
        return {
            sequence: self._ended_or_gone_on(request, sequence, told)
            for sequence, told in answers
        }

    def _told(self, sequence: int, answer: Any) -> Told:
        """Return what an answer means, in a form that can be sent."""
        if answer is None:
            return None
        try:
            if isinstance(answer, BaseException):
                raise ValueError(f"{type(answer).__name__}: {answer}")
            room = self._room[sequence]
            return checked_answer(answer, self._vocab_size, room).tolist()
        except ValueError as error:
            return str(error)

    def _ended_or_gone_on(
        self, request: Request, sequence: int, told: Told
    ) -> Completion:
        completion = self.open[sequence]
        if told is None:
            reason = self._reason[sequence]
            return dataclasses.replace(completion, finish_reason=reason)
        if isinstance(told, str):
            name = int(request.sequence_ids[sequence])
            turn = len(completion.turns) - 1
            self._stats.failed_turns[name] = f"turn {turn}: {told}"
            return dataclasses.replace(completion, finish_reason=TOOL)
        self._stats.num_answers += 1
        reason = UNFINISHED if len(told) < self._room[sequence] else LENGTH
        whole = completion.answered(np.array(told, np.int32))
        return dataclasses.replace(whole, finish_reason=reason)

    @property
    def lengths(self) -> list[int]:
        """Tokens of the open conversations, prompts included."""
        return list(self._length.values())

    def forget(self, sequences: Mapping[int, Any]) -> None:
        """Take sequences for no longer open."""
        for sequence in sequences:
            del self.open[sequence], self._room[sequence], self._reason[sequence]
            del self._length[sequence]

    def close(self) -> None:
        """Ask for nothing more, and take no more answers; what is open stays so."""
        if self._calls is not None:
            self._calls.close()
        self._calls, self.is_closed = None, True
