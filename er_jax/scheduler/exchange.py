"""What the processes of one rollout tell each other about conversations.

A turn that goes on is prefilled, and every process starts the same program with the
same tokens. So all are told the tokens of rows that have ended, which only the process
that holds a row can fetch; and what was answered, which the leader alone has asked for.
One process has nothing to tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from er_jax.engine.protocol import Agreement
from er_jax.request import power_of_two

# What an answer means: tokens to append, None to end, or why there is no answer.
Told: TypeAlias = list[int] | str | None

# Arrays are padded to a power of two of words, so that few reductions are compiled.
LEAST_WORDS = 1 << 10

FetchedRows: TypeAlias = dict[int, tuple[np.ndarray, np.ndarray]]


def rows_of_all(
    agreement: Agreement,
    own: Mapping[int, tuple[np.ndarray, np.ndarray]],
    rows: np.ndarray,
    lengths: np.ndarray,
) -> FetchedRows:
    """Return tokens and log-probabilities of rows, in every process.

    Args:
      agreement: of the processes; all call this together.
      own: tokens int32 and log-probabilities float32, `[length]` or longer, of the rows
        that this process gives; each row is given by one.
      rows: int, the rows wanted. lengths: int, the tokens of each; both are the same in
        all processes.
    """
    ends = np.cumsum(lengths)
    count = int(ends[-1])
    words = np.zeros((2, power_of_two(count, LEAST_WORDS)), np.int32)
    places = {
        int(row): slice(int(end - length), int(end))
        for row, length, end in zip(rows, lengths, ends, strict=True)
    }
    for row, place in places.items():
        if row in own:
            tokens, logprobs = (x[: place.stop - place.start] for x in own[row])
            words[0, place] = tokens
            words[1, place] = np.ascontiguousarray(logprobs, np.float32).view(np.int32)
    words = agreement.sum(words)
    return {
        row: (words[0, place], words[1, place].view(np.float32))
        for row, place in places.items()
    }


def answers_of_leader(
    agreement: Agreement,
    answers: list[tuple[int, Told]],
    failure: Exception | None = None,
) -> list[tuple[int, Told]]:
    """Return the leader's answers by sequence, in every process.

    One small reduction, and the broadcast of a text where something was answered.

    Args:
      agreement: of the processes; all call this together.
      answers: of the leader; others give none.
      failure: of this process, which all raise.
    Raises:
      Exception: `failure`, or an error that names the process which has failed.
    """
    (count,), failure = agreement.sync_or_raise([len(answers)], failure)
    if failure is not None:
        raise failure
    if not (count and agreement.is_spread):
        return answers
    text = agreement.broadcast_text(json.dumps(answers))
    assert text is not None, "the leader has answers"
    return [(sequence, told) for sequence, told in json.loads(text)]
