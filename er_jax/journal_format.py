"""The bytes of a journal: records of the request and of pieces of completions.

    file    = MAGIC, record of the request, records of pieces
    record  = MARK, kind, length of the body in bytes, CRC32 of kind, length and body
    request = JSON: what decides which tokens are sampled, by name
    piece   = row, first token, version, finish; tokens int32, log-probabilities float32

A piece is what is new in one completion, so a file is as long as its tokens, 8 bytes
each and some 30 a piece. All numbers are little-endian.

Left out: the file itself, which is `journal`'s.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from er_jax.result import Completion
from er_jax.types import FINISH_NAMES, NONE, Finish

MAGIC = b"er_jax journal 1\n"
MARK = b"\xe5\x9eRJ"
HEAD = struct.Struct("<4sBII")  # mark, kind, bytes of the body, checksum
REQUEST, PIECE = 0, 1
PIECE_HEAD = struct.Struct("<IIiB")  # row, first token, version, finish


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new in one completion.

    row: of the rollout. start: tokens of the completion before it.
    version: of the call that sampled it; `NONE` if it was appended.
    finish: a `types.Finish`; UNFINISHED, or why the completion ended with this piece.
    token_ids, logprobs: int32 and float32 `[length]`.
    """

    row: int
    start: int
    version: int
    finish: int
    token_ids: np.ndarray
    logprobs: np.ndarray

    @property
    def end(self) -> int:
        """Tokens of the completion with it."""
        return self.start + len(self.token_ids)

    def to_bytes(self) -> bytes:
        """Return its record."""
        head = PIECE_HEAD.pack(self.row, self.start, self.version, self.finish)
        tokens = np.asarray(self.token_ids, "<i4").tobytes()
        return record(PIECE, head + tokens + np.asarray(self.logprobs, "<f4").tobytes())

    @classmethod
    def of(cls, body: bytes) -> Piece:
        """Return the piece that a record's body holds."""
        values = np.frombuffer(body, np.uint8, offset=PIECE_HEAD.size)
        tokens, logprobs = values.reshape(2, -1)
        row, start, version, finish = PIECE_HEAD.unpack_from(body)
        return cls(
            row=row,
            start=start,
            version=version,
            finish=finish,
            token_ids=tokens.view("<i4").astype(np.int32),
            logprobs=logprobs.view("<f4").astype(np.float32),
        )


def record(kind: int, body: bytes) -> bytes:
    """Return a record with this body."""
    head = HEAD.pack(MARK, kind, len(body), _checksum(kind, body))
    return head + body


def _checksum(kind: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(struct.pack("<BI", kind, len(body))))


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a journal's bytes hold.

    request: None where there is none yet. pieces: in the order of the file.
    end: bytes up to the end of the last whole record. damaged: where records are whole
    by their length, or are followed by others, and do not hold what was written.
    """

    request: dict[str, Any] | None
    pieces: list[Piece]
    end: int
    damaged: list[int]


def contents_of(data: bytes) -> Contents:
    """Return the contents of a journal's bytes; see `Contents`.

    Raises:
      ValueError: they are no journal, or it has lost its request.
    """
    if not (data.startswith(MAGIC) or MAGIC.startswith(data)):
        raise ValueError("it is no journal of er_jax")
    found: list[tuple[int, bytes]] = []
    end, damaged = len(MAGIC) if data.startswith(MAGIC) else 0, []
    for start, read in _records(data, end):
        if read is None:
            damaged.append(start)
        else:
            found.append(read)
            end = start + HEAD.size + len(read[1])
    if not found:
        return Contents(None, [], len(MAGIC) if damaged else end, [])
    (kind, body), *rest = found
    if kind != REQUEST:
        raise ValueError("it is damaged at its beginning")
    pieces = [Piece.of(body) for kind, body in rest if kind == PIECE]
    return Contents(json.loads(body), pieces, end, damaged)


def _records(data: bytes, start: int) -> Iterator[tuple[int, tuple[int, bytes] | None]]:
    """Yield where each record begins with its kind and body; None for a damaged one.

    What cannot be read at the end is torn, unless its length says that it is whole.
    """
    while start < len(data):
        read = _record_at(data, start)
        if read is not None:
            yield start, read
            start += HEAD.size + len(read[1])
            continue
        after = data.find(MARK, start + 1)
        while after >= 0 and _record_at(data, after) is None:
            after = data.find(MARK, after + 1)
        if after >= 0 or _is_whole(data, start):
            yield start, None
        if after < 0:
            return
        start = after


def _is_whole(data: bytes, start: int) -> bool:
    """Whether there are as many bytes as the record at a place says it has."""
    if start + HEAD.size > len(data):
        return False
    mark, _, length, _ = HEAD.unpack_from(data, start)
    return mark == MARK and start + HEAD.size + length <= len(data)


def _record_at(data: bytes, start: int) -> tuple[int, bytes] | None:
    """Return kind and body of the record at a place; None if it is not whole."""
    if not _is_whole(data, start):
        return None
    _, kind, length, checksum = HEAD.unpack_from(data, start)
    begin = start + HEAD.size
    body = data[begin : begin + length]
    return (kind, body) if _checksum(kind, body) == checksum else None


def pieces_in(data: bytes) -> list[Piece]:
    """Return the pieces of records that `Piece.to_bytes` made."""
    return [Piece.of(read[1]) for _, read in _records(data, 0) if read is not None]


def pieces_of(
    row: int, completion: Completion, start: int, version: int
) -> list[Piece]:
    """Return the pieces of a completion from a token on, those appended by themselves.

    Args:
      row: of the rollout. start: index of the first token.
      version: of the call that sampled the tokens.
    """
    return pieces_with(row, completion, start, np.where(completion.mask, version, NONE))


def pieces_with(
    row: int, completion: Completion, start: int, versions: np.ndarray
) -> list[Piece]:
    """Return the pieces of a completion from a token on, one for each run of a version.

    Args:
      row: of the rollout. start: index of the first token.
      versions: int `[length]`, of all tokens; `NONE` where they were appended.
    """
    changes = np.flatnonzero(versions[start:][1:] != versions[start:][:-1]) + start + 1
    cuts = [start, *changes.tolist(), len(versions)]
    last = FINISH_NAMES.index(completion.finish_reason)
    return [
        Piece(
            row=row,
            start=begin,
            version=int(versions[begin]) if end > begin else NONE,
            finish=last if end == len(versions) else Finish.UNFINISHED,
            token_ids=completion.token_ids[begin:end],
            logprobs=completion.logprobs[begin:end],
        )
        for begin, end in itertools.pairwise(cuts)
    ]


def joined(
    known: Completion, versions: np.ndarray, pieces: Sequence[Piece]
) -> tuple[Completion, np.ndarray]:
    """Return a completion with its pieces, and the versions of its tokens.

    A piece counts where it begins within the completion before it, or at its end, and
    has the same tokens as far as both go. So one that was written before another was
    lost is never put behind tokens sampled since.

    Args:
      known: the completion before all pieces. versions: int32, of its tokens.
      pieces: of this completion, in the order of the file.
    """
    ended = False
    for piece in pieces:
        overlap = len(known.token_ids) - piece.start
        if ended or not 0 <= overlap <= len(piece.token_ids):
            continue
        if not np.array_equal(
            piece.token_ids[:overlap], known.token_ids[piece.start :]
        ):
            continue
        ended = piece.finish != Finish.UNFINISHED
        later = Completion(
            token_ids=piece.token_ids[overlap:],
            logprobs=piece.logprobs[overlap:],
            finish_reason=FINISH_NAMES[piece.finish],
            mask=np.full(len(piece.token_ids) - overlap, piece.version != NONE),
        )
        known = known.followed_by(later)
        added = np.full(len(later.token_ids), piece.version, np.int32)
        versions = np.concatenate([versions, added])
    return known, versions
