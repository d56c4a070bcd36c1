"""Which sequence starts in which row: pure NumPy, no device.

`Rows` is the host's record of the batch. `plan_admission` assigns free rows: a prompt
whose entries lie in the batch is cloned, any other is prefilled once and copied to all
of its sequences.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from er_jax.request import Request
from er_jax.types import NONE, Admission


@dataclasses.dataclass
class Rows:
    """The host's record of the rows of a batch.

    sequence: int `[rows]`, the sequence in each slot, `NONE` when free.
    resident: int `[rows]`, the prompt whose entries lie in each slot, `NONE` if none.
    length, limit: int `[rows]`, as in the state.
    """

    sequence: np.ndarray
    resident: np.ndarray
    length: np.ndarray
    limit: np.ndarray

    @classmethod
    def empty(cls, count: int) -> Rows:
        """Return so many free rows."""
        return cls(
            sequence=np.full(count, NONE),
            resident=np.full(count, NONE),
            length=np.zeros(count, int),
            limit=np.zeros(count, int),
        )

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def is_live(self) -> np.ndarray:
        """Rows that still generate, bool `[rows]`."""
        return self.sequence != NONE

    @property
    def num_live(self) -> int:
        """How many rows still generate."""
        return int(self.is_live.sum())

    @property
    def mean_length(self) -> float:
        """Mean tokens of the live rows, prompt included."""
        return float(self.length @ self.is_live) / max(self.num_live, 1)

    def needed_length(self, reach: int) -> int:
        """Return the positions that live rows need to grow by `reach` tokens each."""
        needed = np.minimum(self.length + reach, self.limit)
        return max(int((needed * self.is_live).max()), 1)

    def moved(self, index: np.ndarray) -> Rows:
        """Return the rows in another order: `index` says which, `NONE` a free one."""

        def take(values: np.ndarray, empty: int) -> np.ndarray:
            return np.where(index >= 0, values[np.maximum(index, 0)], empty)

        return Rows(
            sequence=take(self.sequence, NONE),
            resident=take(self.resident, NONE),
            length=take(self.length, 0),
            limit=take(self.limit, 0),
        )


@dataclasses.dataclass(frozen=True)
class Start:
    """A sequence that starts. row: where; prompt: which of the admission's prompts."""

    sequence: int
    row: int
    prompt: int


def plan_admission(
    request: Request,
    rows: Rows,
    cache_length: int,
    starting: list[int],
    free: list[int],
    part: slice,
) -> tuple[Admission, int]:
    """Assign free rows of a part of the batch: clones first, then prefills.

    Args:
      request: the sequences. rows: the whole batch; what starts is noted there.
      cache_length: of the state. starting: sequences. free: at least as many rows,
        ascending. part: rows of the part, within which the admission counts.
    Returns:
      What the device is told; how many prompts it prefills.
    """
    places = Places(rows.resident, part, free)
    clones: list[tuple[int, int, int]] = []  # sequence, from, to
    fresh: dict[int, list[int]] = {}
    for sequence in starting:
        prompt = int(request.prompt_of[sequence])
        source = places.holder(prompt)
        if source is None:
            fresh.setdefault(prompt, []).append(sequence)
        else:
            clones.append((sequence, source, places.take(prompt)))
    # A clone may have overwritten the last copy of a prompt that a later one was
    # promised; clones run in this order, so what was found was there.

    count, chunk = part.stop - part.start, request.chunk
    num_prompts = -(-count // chunk) * chunk
    starts: list[Start] = []
    index_of = {prompt: index for index, prompt in enumerate(fresh)}
    first_row, num_rows = np.zeros((2, num_prompts // chunk), np.int32)
    for prompt, index in index_of.items():
        if index % chunk == 0:
            first_row[index // chunk] = len(starts)
        for sequence in fresh[prompt]:
            starts.append(Start(sequence, places.take(prompt), index))
            num_rows[index // chunk] += 1
    for sequence, _, row in clones:
        prompt = int(request.prompt_of[sequence])
        index = index_of.setdefault(prompt, len(index_of))
        starts.append(Start(sequence, row, index))

    tokens = np.zeros((num_prompts, request.prompt_bucket), np.int32)
    length = np.zeros(num_prompts, np.int32)
    for prompt, index in index_of.items():
        ids = request.prompts[prompt]
        tokens[index, : len(ids)] = ids
        length[index] = len(ids)
    for start in starts:
        rows.sequence[start.row] = start.sequence
        rows.length[start.row] = length[start.prompt]
        rows.limit[start.row] = request.limit(start.sequence)

    slot, prompt_index, sequence_id, limit = np.zeros((4, count), np.int32)
    slot[:], sequence_id[:] = count, NONE
    for i, start in enumerate(starts):
        slot[i], prompt_index[i] = start.row - part.start, start.prompt
        sequence_id[i] = request.sequence_ids[start.sequence]
        limit[i] = rows.limit[start.row]
    clone_from, clone_to, clone_length = np.zeros((3, count), np.int32)
    # Where another part has more clones, this one copies a row onto itself.
    clone_length[:] = cache_length + 1
    for i, (_, source, row) in enumerate(clones):
        clone_from[i], clone_to[i] = source - part.start, row - part.start
        clone_length[i] = rows.length[row]
    admission = Admission(
        tokens=tokens,
        length=length,
        num_chunks=np.int32(-(-len(fresh) // chunk)),
        slot=slot,
        prompt=prompt_index,
        sequence_id=sequence_id,
        limit=limit,
        first_row=first_row,
        num_rows=num_rows,
        num_clones=np.int32(len(clones)),
        clone_from=clone_from,
        clone_to=clone_to,
        clone_length=clone_length,
    )
    return admission, len(fresh)


class Places:
    """Which rows of a part of the batch hold which prompt, and which of them are free.

    Every answer takes the same time however many rows there are: lists are used up from
    their ends, and what is no longer true of a row is dropped when it is met.

    Args:
      resident: int `[rows]`, the prompt in each row of the batch; kept up to date.
      part: rows of the part. free: its free rows, ascending.
    """

    def __init__(self, resident: np.ndarray, part: slice, free: list[int]) -> None:
        self._resident = resident
        self._free = free[::-1]
        self._is_free = set(free)
        self._holders: dict[int, list[int]] = collections.defaultdict(list)
        self._free_holders: dict[int, list[int]] = collections.defaultdict(list)
        for row, prompt in enumerate(resident[part].tolist(), part.start):
            self._holders[prompt].append(row)
        for row in self._free:
            self._free_holders[int(resident[row])].append(row)

    def holder(self, prompt: int) -> int | None:
        """Return a row that holds a prompt, None if there is none."""
        rows = self._holders[prompt]
        while rows and self._resident[rows[-1]] != prompt:
            rows.pop()
        return rows[-1] if rows else None

    def take(self, prompt: int) -> int:
        """Take a free row for a prompt, if possible one that holds it already."""
        own = self._free_holders[prompt] or self._free
        while own[-1] not in self._is_free:
            own.pop()
            own = own or self._free
        row = own.pop()
        self._is_free.remove(row)
        if self._resident[row] != prompt:
            self._resident[row] = prompt
            self._holders[prompt].append(row)
        return row
