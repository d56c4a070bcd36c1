"""The journal of a rollout: a file from which the same call goes on after a kill.

Completions are appended as they finish, and every `EVERY_S` seconds the tokens so far
of those that run. A thread writes and syncs, so no window waits for a disk.

What a kill has torn at the end is cut when the file is next opened. Damage elsewhere is
found by checksums, and costs the tokens of its piece and of what follows it in the same
completion: they are sampled again. The bytes are those of `journal_format`.

Several processes write one each, of the rows that each holds. When a call begins they
tell each other what they have read. For every completion all take what one of the files
holds, the furthest, and each writes its file anew with that before it goes on: so the
files may have been cut in different places.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from er_jax.config import RolloutConfig
from er_jax.engine.protocol import Agreement, OneProcess
from er_jax.journal_format import (
    MAGIC,
    REQUEST,
    Piece,
    contents_of,
    joined,
    pieces_in,
    pieces_of,
    pieces_with,
    record,
)
from er_jax.result import NOTHING, Completion, Rollout, assemble
from er_jax.stats import RolloutStats
from er_jax.types import FINISH_NAMES, Finish

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on this system; two writers are not noticed then
    fcntl = None

EVERY_S = 5.0
"""Seconds between two notes of what runs; a kill or a power cut costs no more."""

FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)


LENGTH, UNFINISHED = FINISH_NAMES[Finish.LENGTH], FINISH_NAMES[Finish.UNFINISHED]


def array_digest(*arrays: np.ndarray) -> str:
    """Return 16 hex digits that change when an array or a length does."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype} {array.shape};".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


class Journal:
    """A journal that a call reads and goes on with; a context manager.

    Entering opens the file, or makes it, and locks it. Then, in this order: `begin`,
    `gone_on`, `confirm`, `note` as often as there is news, and `end`.

    Args:
      path: of the file. version: of the tokens that this call samples.
      agreement: of the processes that write one each, at paths of their own. What one
        refuses all do. None is one process.
    Raises:
      ValueError: on entering: another rollout writes the file, or it is no journal.
      OSError: on entering: it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        version: int,
        agreement: Agreement | None = None,
    ) -> None:
        self.path = Path(path)
        self._agreement = OneProcess() if agreement is None else agreement
        self._agreed: list[Piece] = []
        self._descriptor: int | None = None
        self.finished: dict[int, Completion] = {}
        """Completions that the file holds whole, by row."""
        self._version = version
        self._noted: dict[int, int] = {}
        self._ended: set[int] = set()
        self._request: dict[str, Any] = {}
        self._noted_s = time.monotonic()
        self._writer: _Writer | None = None
        self._has_warned = self._is_new = False

    def __enter__(self) -> Journal:
        """Open, lock and read the file."""
        try:
            self._together(self._open)
            if self._found.damaged:
                warnings.warn(
                    f"journal={self.path} is damaged at bytes {self._found.damaged}: "
                    "what it has lost there is sampled again",
                    RuntimeWarning,
                    stacklevel=2,
                )
        except BaseException:
            self._close()
            raise
        return self

    def _together(self, work: Callable[[], None]) -> None:
        """Do what may be refused, and refuse in all processes what one refuses."""
        failure: Exception | None = None
        try:
            work()
        except (ValueError, OSError) as error:
            failure = error
        # The kind of an error is its first letter.
        own = "" if failure is None else f"{type(failure).__name__[0]}{failure}"
        told = self._agreement.gather_bytes(own.encode(errors="replace"))
        if failure is not None:
            raise failure
        for rank, text in enumerate(told):
            if text:
                kind = ValueError if text.startswith(b"V") else OSError
                raise kind(f"process {rank} of the mesh: {text[1:].decode()}")

    def _open(self) -> None:
        descriptor = os.open(self.path, FLAGS, 0o666)
        self._descriptor = descriptor
        self._lock(descriptor)
        data = _read(descriptor, os.fstat(descriptor).st_size)
        try:
            self._found = contents_of(data)
        except ValueError as error:
            raise ValueError(
                f"journal={self.path}: {error}; give another path, or delete it to "
                "begin anew"
            ) from error
        if self._found.request is None:
            # Now, so that a full disk is told before anything is compiled.
            os.ftruncate(descriptor, 0)
            _write(descriptor, MAGIC)
            self._is_new = True

    def _lock(self, descriptor: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_taken = False
        except OSError as error:
            # Any other error is of a file system without locks.
            is_taken = isinstance(error, BlockingIOError)
        # Another call may also have begun it, been refused, and removed it.
        if is_taken or not os.fstat(descriptor).st_nlink:
            raise ValueError(
                f"journal={self.path} is being written by another rollout; wait for "
                "it, or give another path"
            )

    def begin(self, request: dict[str, Any]) -> None:
        """Take what decides the tokens, and refuse a journal of anything else.

        Args:
          request: JSON values by name.
        Raises:
          ValueError: the file is of another request; it says what differs.
        """
        self._request = json.loads(json.dumps(request, default=lambda x: x.item()))
        self._together(lambda: self._compare(self._request))

    def _compare(self, request: Mapping[str, Any]) -> None:
        found = self._found.request
        differing = [
            f"{name}: {found.get(name)!r} -> {value!r}"
            for name, value in request.items()
            if found is not None and found.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"journal={self.path} is of another request ({'; '.join(differing)}); "
                "make the same call, or give another path"
            )

    def gone_on(
        self,
        prompts: list[np.ndarray],
        sequence_ids: np.ndarray,
        config: RolloutConfig,
        earlier: Rollout | None,
    ) -> Rollout | None:
        """Return how far the request has got: `earlier`, and what the files hold.

        Args:
          prompts, sequence_ids, config: of the request.
          earlier: what the call resumes, if anything.
        """
        held = self._pieces_of_all()
        count, width = len(sequence_ids), config.most_new_tokens
        limits = config.of_sequences("max_new_tokens", len(prompts))
        completions: dict[int, Completion] = {}
        versions = np.full((count, width), -1, np.int32)
        for row in range(count):
            known, own = NOTHING, np.zeros(0, np.int32)
            if earlier is not None:
                length = int(earlier.lengths[row])
                own = earlier.version[row, :length]
                known = Completion(
                    token_ids=earlier.completion_ids[row, :length],
                    logprobs=earlier.logprobs[row, :length],
                    finish_reason=str(earlier.finish_reason[row]),
                    mask=earlier.completion_mask[row, :length],
                )
            before = known
            # Of one file all of it: no tokens of one stand behind those of another.
            known, own = max(
                (joined(before, own, pieces.get(row, [])) for pieces in held),
                key=lambda found: (
                    found[0].finish_reason != UNFINISHED,
                    len(found[0].token_ids),
                ),
            )
            is_longer = known is not before
            if is_longer:
                start = len(before.token_ids)
                self._agreed += pieces_with(row, known, start, own)
            completions[row] = known
            versions[row, : len(own)] = own
            self._noted[row] = len(own)
            if known.finish_reason == UNFINISHED:
                continue
            if is_longer:
                # At the limits of this very request, or at a turn without an answer.
                self.finished[row] = known
            elif known.finish_reason == LENGTH and len(own) < limits[row]:
                continue  # What ended by length goes on where the limit is higher now.
            self._ended.add(row)
        if earlier is None and not any(held):
            return None
        found = assemble(
            prompts, completions, sequence_ids, config, RolloutStats(), OneProcess()
        )
        return dataclasses.replace(found, version=versions)

    def _pieces_of_all(self) -> list[dict[int, list[Piece]]]:
        """Return the pieces of each process's file, by row."""
        own = self._found.pieces
        files = [own]
        if self._agreement.is_spread:
            data = b"".join(piece.to_bytes() for piece in own)
            files = [pieces_in(found) for found in self._agreement.gather_bytes(data)]
        by_row: list[dict[int, list[Piece]]] = []
        for file in files:
            by_row.append({})
            for piece in file:
                by_row[-1].setdefault(piece.row, []).append(piece)
        return by_row

    def confirm(self, params_digest: str) -> None:
        """Refuse a journal of other parameters; else make ready to write.

        Args:
          params_digest: changes when any parameter does.
        Raises:
          ValueError: as `begin`.
          OSError: the file cannot be written.
        """
        self._request["params"] = params_digest
        # Apart, so that no file is begun where another one is of other parameters.
        self._together(lambda: self._compare({"params": params_digest}))
        self._together(self._begin_file)

    def _begin_file(self) -> None:
        """Make ready to write behind what was agreed on."""
        descriptor, end = self._descriptor, self._found.end
        assert descriptor is not None, "it was entered"
        data = record(REQUEST, json.dumps(self._request).encode())
        if self._agreement.is_spread and self._agreed:
            data = MAGIC + data + b"".join(piece.to_bytes() for piece in self._agreed)
            descriptor, end = self._replace(data), len(data)
        elif self._found.request is None:
            _write(descriptor, data)
            end = len(MAGIC) + len(data)
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
        with contextlib.suppress(OSError):  # not on every system
            _sync_folder(self.path.parent)
        self._is_new = False
        self._noted_s = time.monotonic()
        self._writer = _Writer(descriptor, end)

    def _replace(self, data: bytes) -> int:
        """Put a file of these bytes in the place of this one, at once; return it."""
        beside = self.path.with_name(f"{self.path.name}.new")
        new = os.open(beside, FLAGS | os.O_TRUNC, 0o666)
        try:
            self._lock(new)
            _write(new, data)
            os.fsync(new)
            os.replace(beside, self.path)
        except BaseException:
            os.close(new)
            raise
        assert self._descriptor is not None, "it was entered"
        os.close(self._descriptor)
        self._descriptor = new
        return new

    def is_due(self) -> bool:
        """Whether it is time to note those that run."""
        return time.monotonic() - self._noted_s >= EVERY_S

    def note(self, completions: Mapping[int, Completion], *, sync: bool) -> int:
        """Hand what is new in completions to the thread that writes.

        Args:
          completions: by row; those that have ended are noted once.
          sync: whether they include those that run; these then reach the disk at once.
        Returns:
          How many tokens were new.
        Warns:
          RuntimeWarning: once, if the file could not be written. Nothing is written any
            more then, and the rollout goes on.
        """
        pieces = [
            piece
            for row, completion in completions.items()
            if row not in self._ended
            for piece in pieces_of(
                row, completion, self._noted.get(row, 0), self._version
            )
            if len(piece.token_ids) or piece.finish != Finish.UNFINISHED
        ]
        assert self._writer is not None, "`confirm` comes first"
        if pieces:
            self._writer.items.put((pieces, sync))
        # Last: an interruption may have a piece noted twice, and none is missing.
        for piece in pieces:
            self._noted[piece.row] = piece.end
            if piece.finish != Finish.UNFINISHED:
                self._ended.add(piece.row)
        if sync:
            self._noted_s = time.monotonic()
        self._warn_of_failure()
        return sum(len(piece.token_ids) for piece in pieces)

    def _warn_of_failure(self) -> None:
        failure = None if self._writer is None else self._writer.failure
        if failure is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"journal={self.path} could not be written ({failure}); the rollout "
                "goes on without it, and what the file holds so far is whole",
                RuntimeWarning,
                stacklevel=2,
            )

    def end(self) -> None:
        """Write what is left, and sync; nothing can be noted any more."""
        if self._writer is not None:
            self._writer.end()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is left, sync and close."""
        try:
            self.end()
        finally:
            self._close()
        if error is None:
            self._warn_of_failure()

    def _close(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            if self._is_new:
                self.path.unlink()  # A call that was refused leaves nothing.
            if fcntl is not None:
                # A process that was forked meanwhile would keep the lock.
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


class _Writer:
    """The thread that appends pieces to a file.

    Args:
      descriptor: of the file. end: its length in bytes.
    Attributes:
      items: what to write: pieces, and whether to sync at once; None ends the thread.
      failure: why nothing is written any more.
    """

    def __init__(self, descriptor: int, end: int) -> None:
        self.items: queue.SimpleQueue[tuple[list[Piece], bool] | None]
        self.items = queue.SimpleQueue()
        self.failure: OSError | None = None
        self._descriptor, self._end = descriptor, end
        self._is_synced = True
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="er_jax.journal", daemon=True
        )
        self._thread.start()

    def end(self) -> None:
        """Write what is left, and end the thread; after an interruption, again."""
        self.items.put(None)
        # Not `join` alone: interrupted, it takes the thread for ended (Python 3.11).
        self._is_over.wait()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                item = self.items.get(timeout=None if self._is_synced else EVERY_S)
            except queue.Empty:
                self._sync()
                continue
            if item is None:
                self._sync()
                self._is_over.set()
                return
            pieces, sync = item
            self._append(b"".join(piece.to_bytes() for piece in pieces))
            if sync:
                self._sync()

    def _append(self, data: bytes) -> None:
        if self.failure is not None:
            return
        self._is_synced = False
        try:
            _write(self._descriptor, data)
            self._end += len(data)
        except OSError as error:
            self.failure = error
            # No record behind a torn one.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)

    def _sync(self) -> None:
        if self._is_synced:
            return
        self._is_synced = True
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self.failure = self.failure or error


def _read(descriptor: int, size: int) -> bytes:
    """Return the first bytes of a file."""
    parts = []
    while size > 0 and (part := os.read(descriptor, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _sync_folder(folder: Path) -> None:
    """Let the name of a new file outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    """Write all of the data; one call may write a part of it."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
