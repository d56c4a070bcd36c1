"""Prompts whose cache entries are kept on the device from call to call.

`PromptCache` keeps them, by tokens and by the parameters that they were computed with,
within a limit in bytes: what was used longest ago goes first. `Reuse` is what a batch
asks: it puts found entries into free rows, which then hold these prompts as if they had
been prefilled there, and keeps those of new prompts.

Left out: meshes, where prompts are prefilled in every call.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from er_jax.devices import device_bytes
from er_jax.drafter import PolicyParams
from er_jax.engine.engine import Engine
from er_jax.request import MIN_PROMPT_BUCKET, Request, power_of_two
from er_jax.scheduler.admission import Rows, forget_replaced
from er_jax.stats import RolloutStats
from er_jax.types import RING_DRAFTS, Cache, DecodeState, Params


class Owner:
    """The parameters that entries were computed with: those very arrays.

    They are held by weak references, so that none is kept alive. Arrays of JAX never
    change; any other leaf may have, and is never the same again.

    Args:
      params: of a policy.
    Attributes:
      names: the kept prompts, as bytes, sorted.
    """

    def __init__(self, params: Params) -> None:
        leaves, structure = jax.tree.flatten(params)
        self._structure: Any = structure
        self._leaves = [
            weakref.ref(leaf) if isinstance(leaf, jax.Array) else None
            for leaf in leaves
        ]
        self.names: list[bytes] = []

    def has(self, params: Params) -> bool:
        """Whether these are its parameters."""
        leaves, structure = jax.tree.flatten(params)
        return self._structure == structure and all(
            known is not None and known() is leaf
            for known, leaf in zip(self._leaves, leaves, strict=True)
        )


class Found(NamedTuple):
    """Entries of a prompt, or of one that begins alike.

    entries: leaves `[1, length, ...]`. num_known: how many of them, from position 0 on,
    are the prompt's.
    """

    entries: Cache
    num_known: int


class PromptCache:
    """Cache entries of prompts, the least recently used dropped first.

    Several threads may use it.

    Args:
      limit_bytes: of all entries on the device.
    Attributes:
      num_bytes: of what is kept now. num_evicted: prompts dropped for lack of room.
      num_outdated: prompts dropped because the parameters are new.
      num_uses, num_used_tokens: prompts found, and their tokens that were known.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = self.num_evicted = self.num_outdated = 0
        self.num_uses = self.num_used_tokens = 0
        self._kept: collections.OrderedDict[tuple[Owner, bytes], Cache]
        self._kept = collections.OrderedDict()
        self._owners: weakref.WeakKeyDictionary[Any, Owner]
        self._owners = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of prompts that are kept."""
        return len(self._kept)

    def owner(self, engine: Any, params: Params) -> Owner:
        """Return the owner of entries that an engine computes with some parameters.

        Entries of the engine with any other parameters are dropped, and those of
        engines that are no more.
        """
        with self._lock:
            current = self._owners.get(engine)
            if current is None or not current.has(params):
                current = self._owners[engine] = Owner(params)
            valid = set(self._owners.values())
            outdated = [name for name in self._kept if name[0] not in valid]
            for name in outdated:
                self._drop(name)
            self.num_outdated += len(outdated)
            return current

    def find(self, owner: Owner, tokens: np.ndarray) -> Found | None:
        """Return entries of the longest beginning that is known; None of no token.

        A prompt has entries for all tokens but the last one.

        Args:
          tokens: int32 `[length]`, the prompt.
        """
        with self._lock:
            best, count = _nearest(owner.names, tokens)
            if not count:
                return None
            self._kept.move_to_end((owner, best))
            return Found(self._kept[owner, best], count)

    def has_room(self, owner: Owner, tokens: np.ndarray, num_bytes: float) -> bool:
        """Whether to keep a prompt; makes room for it by dropping others.

        Not if it is kept, or is the beginning of one that is.

        Args:
          num_bytes: of its entries, about.
        """
        with self._lock:
            if owner not in self._owners.values():
                return False  # Another call has brought new parameters.
            is_known = _nearest(owner.names, tokens)[1] == len(tokens) - 1
            if is_known or num_bytes > self.limit_bytes:
                return False
            self._shrink_to(self.limit_bytes - num_bytes)
            return True

    def keep(self, owner: Owner, tokens: np.ndarray, entries: Cache) -> None:
        """Keep the entries of a prompt for which there is room."""
        name = (owner, tokens.tobytes())
        with self._lock:
            # In the meantime another thread may have brought any of this about.
            if name in self._kept or owner not in self._owners.values():
                return
            self._kept[name] = entries
            self.num_bytes += device_bytes(entries)
            bisect.insort(owner.names, name[1])
            self._shrink_to(self.limit_bytes)

    def count(self, num_tokens: int) -> None:
        """Count one use of a prompt, for people."""
        with self._lock:
            self.num_uses += 1
            self.num_used_tokens += num_tokens

    def close(self) -> None:
        """Drop everything, and keep nothing any more."""
        with self._lock:
            self.limit_bytes = 0
            self._shrink_to(0)
            self._owners.clear()

    def _shrink_to(self, num_bytes: float) -> None:
        while self.num_bytes > num_bytes:
            self._drop(next(iter(self._kept)))
            self.num_evicted += 1

    def _drop(self, name: tuple[Owner, bytes]) -> None:
        self.num_bytes -= device_bytes(self._kept.pop(name))
        names = name[0].names
        del names[bisect.bisect_left(names, name[1])]


def _nearest(names: Sequence[bytes], tokens: np.ndarray) -> tuple[bytes, int]:
    """Return the name that shares most entries with a prompt, and their number.

    Args:
      names: prompts as bytes, sorted. tokens: int32 `[length]`.
    """
    # Whatever begins most like a prompt stands next to its place.
    place = bisect.bisect_left(names, tokens.tobytes())
    best, count = b"", 0
    for name in names[max(place - 1, 0) : place + 1]:
        alike = num_alike(np.frombuffer(name, np.int32)[:-1], tokens[:-1])
        if alike > count:
            best, count = name, alike
    return best, count


def num_alike(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many first tokens of two arrays are the same."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(np.argmax(differs)) if differs.any() else length


@dataclasses.dataclass(frozen=True)
class Reuse:
    """The kept prompts, as one rollout on one device uses them.

    cache: the prompts. owner: of `params`, by `PromptCache.owner`.
    engine: of the rollout. params: target and draft. stats: filled in.
    """

    cache: PromptCache
    owner: Owner
    engine: Engine
    params: PolicyParams
    stats: RolloutStats

    def found(
        self, request: Request, rows: Rows, starting: Sequence[int], free: np.ndarray
    ) -> list[tuple[int, int, Found]]:
        """Return what free rows can start from: prompts that no row holds.

        Of a prompt of which only the beginning is known, the rest is computed here.

        Args:
          request, rows: of the batch. starting: sequences. free: at least as many rows.
        Returns:
          Row, prompt and entries of each.
        """
        forget_replaced(request, rows)
        wanted = dict.fromkeys(int(request.prompt_of[s]) for s in starting)
        held = set(rows.resident.tolist())
        # Of each prompt to start from, one free row that holds it is left alone. As no
        # fewer rows are free than sequences start, there is a row for every other.
        spare, guarded = [], set()
        for row in free.tolist():
            prompt = int(rows.resident[row])
            if prompt in wanted and prompt not in guarded:
                guarded.add(prompt)
            else:
                spare.append(row)
        found = []
        for prompt in wanted:
            entries = None if prompt in held else self._entries(request, prompt)
            if entries is not None:
                found.append((spare.pop(0), prompt, entries))
        return found

    def _entries(self, request: Request, prompt: int) -> Found | None:
        """Return all entries of a prompt; None if it is better prefilled."""
        tokens = request.prompts[prompt]
        if not fits_rings(request, tokens):
            return None
        found, count = self.cache.find(self.owner, tokens), len(tokens) - 1
        if found is None:
            return None
        if found.num_known < count:
            return self._extended(request, tokens, found)
        self._count(count)
        return found._replace(num_known=count)

    def _extended(
        self, request: Request, tokens: np.ndarray, found: Found
    ) -> Found | None:
        """Return entries of a prompt whose beginning is known; None if not worth it."""
        start, count = found.num_known, len(tokens) - 1
        padded = power_of_two(count - start, MIN_PROMPT_BUCKET)
        # Short prompts are prefilled several at a time, for the price of one.
        if request.chunk > 1 or 2 * padded > request.prompt_bucket:
            return None
        rest = np.zeros((1, padded), np.int32)
        rest[0, : count - start] = tokens[start:count]
        length = kept_length(tokens)
        num_bytes = self.engine.row_bytes(length)
        is_kept = self.cache.has_room(self.owner, tokens, num_bytes)
        entries = self.engine.extend(
            self.params, found.entries, rest, start, count, length
        )
        if is_kept:
            self.cache.keep(self.owner, tokens, entries)
        self.stats.prefilled_tokens += count - start
        self._count(start)
        return Found(entries, count)

    def _count(self, num_tokens: int) -> None:
        self.cache.count(num_tokens)
        self.stats.num_reused += 1
        self.stats.num_reused_tokens += num_tokens

    def insert(
        self, state: DecodeState, rows: Rows, row: int, prompt: int, found: Found
    ) -> DecodeState:
        """Put a prompt's entries into a free row, which then holds it.

        Args:
          state: donated. rows: of the batch, updated.
          row, prompt, found: as `found` returns them.
        """
        state = self.engine.copy_in(state, found.entries, row, found.num_known)
        rows.resident[row], rows.length[row] = prompt, found.num_known + 1
        return state

    def keep(
        self, request: Request, rows: Rows, starting: Sequence[int], state: DecodeState
    ) -> None:
        """Keep the prompts of sequences that have just been started.

        Args:
          request, rows: of the batch. starting: the sequences.
          state: after their admission; it is copied from.
        """
        row_of = {sequence: row for row, sequence in enumerate(rows.sequence.tolist())}
        first = {int(request.prompt_of[s]): s for s in reversed(starting)}
        for prompt, sequence in first.items():
            tokens = request.prompts[prompt]
            if len(tokens) < 2 or not fits_rings(request, tokens):
                continue
            length = kept_length(tokens)
            num_bytes = self.engine.row_bytes(length)
            if self.cache.has_room(self.owner, tokens, num_bytes):
                entries = self.engine.copy_out(state, row_of[sequence], length)
                self.cache.keep(self.owner, tokens, entries)


def fits_rings(request: Request, tokens: np.ndarray) -> bool:
    """Whether a row's rings still hold all of a prompt when drafts were written."""
    slots = request.ring_slots
    return slots is None or len(tokens) + RING_DRAFTS <= slots


def kept_length(tokens: np.ndarray) -> int:
    """Return the positions that a prompt's entries are kept with."""
    return power_of_two(len(tokens), MIN_PROMPT_BUCKET)
