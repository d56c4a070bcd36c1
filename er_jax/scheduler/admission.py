"""Which sequence starts in which row, in NumPy on the host.

`Rows` is the host's record of the batch. `plan_admission` assigns free rows: a prompt
whose cache entries are still in the batch is cloned; any other is prefilled once and
copied to all of its sequences. `plan_going_on` appends to rows what their sequences
have beyond it: tokens of completions that go on, and answers. Where the policy keeps a
window in rings, a row that has gone past one no longer holds its prompt.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping

import numpy as np

from er_jax.request import Request, append_sizes
from er_jax.types import NONE, RING_DRAFTS, Admission, Continuation


@dataclasses.dataclass
class Rows:
    """The host's record of the rows of a batch.

    sequence: int `[rows]`, the sequence in each slot, `NONE` when free.
    resident: int `[rows]`, the prompt whose entries are in each slot, `NONE` if none.
    held: int `[rows]`, the sequence in each free slot that may go on there, `NONE` if
      none: its turn has ended, and its entries are all there.
    length, limit: int `[rows]`, as in the state.
    """

    sequence: np.ndarray
    resident: np.ndarray
    held: np.ndarray
    length: np.ndarray
    limit: np.ndarray

    @classmethod
    def empty(cls, count: int) -> Rows:
        """Return `count` free rows."""
        return cls(
            sequence=np.full(count, NONE),
            resident=np.full(count, NONE),
            held=np.full(count, NONE),
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
        """The number of rows that still generate."""
        return int(self.is_live.sum())

    @property
    def free(self) -> np.ndarray:
        """The free rows, those that hold no conversation first, int."""
        free = np.flatnonzero(~self.is_live)
        return free[np.argsort(self.held[free] != NONE, kind="stable")]

    @property
    def to_keep(self) -> np.ndarray:
        """The rows that are live, then those that hold a conversation, int."""
        is_held = ~self.is_live & (self.held != NONE)
        return np.concatenate([np.flatnonzero(self.is_live), np.flatnonzero(is_held)])

    @property
    def mean_length(self) -> float:
        """Mean length of the live rows in tokens, prompt included."""
        return float(self.length @ self.is_live) / max(self.num_live, 1)

    def needed_length(self, reach: int) -> int:
        """Return the cache length with which live rows can grow by `reach` tokens."""
        needed = np.minimum(self.length + reach, self.limit)
        return max(int((needed * self.is_live).max()), 1)

    def moved(self, index: np.ndarray) -> Rows:
        """Return the rows after a move.

        Args:
          index: int, the old row of each new row, `NONE` for a free one.
        """

        def take(values: np.ndarray, empty: int) -> np.ndarray:
            return np.where(index >= 0, values[np.maximum(index, 0)], empty)

        return Rows(
            sequence=take(self.sequence, NONE),
            resident=take(self.resident, NONE),
            held=take(self.held, NONE),
            length=take(self.length, 0),
            limit=take(self.limit, 0),
        )


@dataclasses.dataclass(frozen=True)
class Start:
    """A sequence to start, in `row` of the batch, from `prompt` of the admission."""

    sequence: int
    row: int
    prompt: int


def plan_admission(
    request: Request,
    rows: Rows,
    cache_length: int,
    starting: list[int],
    free: list[int],
    shard_rows: slice,
) -> tuple[Admission, int]:
    """Assign free rows of one data shard to sequences: clones first, then prefills.

    Args:
      request: the sequences. rows: the whole batch; updated with what starts.
      cache_length: of the state. starting: sequences. free: at least as many rows,
        ascending. shard_rows: rows of the shard; the admission counts from its first.
    Returns:
      The admission; the number of prompts that it prefills.
    """
    forget_replaced(request, rows)
    # Rows that hold one of these prompts are taken for another prompt last.
    wanted = {int(request.prompt_of[sequence]) for sequence in starting}
    free = sorted(free, key=lambda row: int(rows.resident[row]) in wanted)
    free_rows = FreeRows(rows.resident, shard_rows, free)
    clones: list[tuple[int, int, int]] = []  # sequence, from, to
    fresh: dict[int, list[int]] = {}
    for sequence in starting:
        prompt = int(request.prompt_of[sequence])
        source = free_rows.holder(prompt)
        if source is None:
            fresh.setdefault(prompt, []).append(sequence)
        else:
            clones.append((sequence, source, free_rows.take(prompt)))
    # A clone may overwrite the last copy of a prompt that an earlier clone reads. They
    # run in this order, before any prefill, so every source is intact when it is read.

    count, chunk = shard_rows.stop - shard_rows.start, request.chunk
    num_prompts = -(-count // chunk) * chunk
    starts: list[Start] = []
    index_of = {prompt: index for index, prompt in enumerate(fresh)}
    first_row, num_rows = np.zeros((2, num_prompts // chunk), np.int32)
    for prompt, index in index_of.items():
        if index % chunk == 0:
            first_row[index // chunk] = len(starts)
        for sequence in fresh[prompt]:
            starts.append(Start(sequence, free_rows.take(prompt), index))
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
        slot[i], prompt_index[i] = start.row - shard_rows.start, start.prompt
        sequence_id[i] = request.sequence_ids[start.sequence]
        limit[i] = rows.limit[start.row]
    clone_from, clone_to, clone_length = np.zeros((3, count), np.int32)
    # Where another shard has more clones, this one copies a row onto itself.
    clone_length[:] = cache_length + 1
    for i, (_, source, row) in enumerate(clones):
        clone_from[i] = source - shard_rows.start
        clone_to[i] = row - shard_rows.start
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


def plan_going_on(
    request: Request, rows: Rows, row_of: Mapping[int, int]
) -> tuple[Continuation, int, int]:
    """Have sequences go on in rows that hold their first tokens.

    Args:
      request: of the sequences. rows: the batch; updated with those that go on.
      row_of: row of each sequence; its length is that of what it holds.
    Returns:
      The rows and tokens to append; rows of a chunk; tokens of a piece.
    """
    new = {
        sequence: request.prompts[request.prompt_of[sequence]][rows.length[row] :]
        for sequence, row in row_of.items()
    }
    width, chunk, piece = append_sizes(
        max(map(len, new.values())), request.cache_lengths[-1]
    )
    size = -(-len(rows) // chunk) * chunk
    tokens = np.zeros((size, width), np.int32)
    slot, count, limit = np.zeros((3, size), np.int32)
    slot[:] = len(rows)
    for i, (sequence, appended) in enumerate(new.items()):
        row = row_of[sequence]
        slot[i], count[i] = row, len(appended)
        tokens[i, : len(appended)] = appended
        limit[i] = request.limit(sequence)
        rows.sequence[row], rows.held[row] = sequence, NONE
        rows.length[row] += len(appended)
        rows.limit[row] = limit[i]
    continuation = Continuation(
        slot=slot,
        tokens=tokens,
        count=count,
        limit=limit,
        num_chunks=np.int32(-(-len(new) // chunk)),
    )
    return continuation, chunk, piece


def forget_replaced(request: Request, rows: Rows) -> None:
    """Note that rows which have gone past a ring hold their prompt no more."""
    if request.ring_slots is not None:
        # Drafts replace entries as well.
        is_past = rows.length + RING_DRAFTS > request.ring_slots
        rows.resident[is_past] = NONE


class FreeRows:
    """The free rows of a data shard, and the rows of it that hold a prompt.

    A call takes the same time however many rows there are: lists are used up from their
    ends, and outdated entries are dropped when they are met.

    Args:
      resident: int `[rows]`, the prompt in each row of the batch; kept up to date.
      shard_rows: rows of the shard. free: its free rows, the first to be
        taken first.
    """

    def __init__(
        self, resident: np.ndarray, shard_rows: slice, free: list[int]
    ) -> None:
        self._resident = resident
        self._free = free[::-1]
        self._is_free = set(free)
        self._holders: dict[int, list[int]] = collections.defaultdict(list)
        self._free_holders: dict[int, list[int]] = collections.defaultdict(list)
        for row, prompt in enumerate(resident[shard_rows].tolist(), shard_rows.start):
            self._holders[prompt].append(row)
        for row in self._free:
            self._free_holders[int(resident[row])].append(row)

    def holder(self, prompt: int) -> int | None:
        """Return a row that holds a prompt, None if no row does."""
        rows = self._holders[prompt]
        while rows and self._resident[rows[-1]] != prompt:
            rows.pop()
        return rows[-1] if rows else None

    def take(self, prompt: int) -> int:
        """Take a free row for a prompt, one that already holds it if possible."""
        rows = self._free_holders[prompt] or self._free
        while rows[-1] not in self._is_free:
            rows.pop()
            rows = rows or self._free
        row = rows.pop()
        self._is_free.remove(row)
        if self._resident[row] != prompt:
            self._resident[row] = prompt
            self._holders[prompt].append(row)
        return row
