"""Real text that every machine has: the running Python's own library, as bytes.

Its sources and the few plain texts beside them, its licence among them. A token is a
byte; one more token ends a file. Which files are held out follows from their names, so
it is the same on every machine that has the same Python.

Left out: installed packages, and files that are no UTF-8.
"""

from __future__ import annotations

import dataclasses
import sysconfig
import zlib
from pathlib import Path

import numpy as np

STOP_ID = 256
"""The token after the last byte of a file."""

VOCAB_SIZE = 257

SUFFIXES = (".py", ".txt", ".rst")

INSTALLED = ("site-packages", "dist-packages")

# One file in so many is held out.
HELD_OUT_SHARE = 16


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens of all files, each with its `STOP_ID`, in the order of their paths.

    train: uint16 `[N]`, files one after the other, so that a long piece is one file, or
      neighbours in a package.
    held_out: the tokens of each file that is not trained on.
    num_files: that are trained on.
    """

    train: np.ndarray
    held_out: list[np.ndarray]
    num_files: int


def is_held_out(name: str) -> bool:
    """Whether the file of this path, relative to the library, is not trained on."""
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def load_corpus(root: Path | None = None) -> Corpus:
    """Read all text below a directory.

    Args:
      root: where to look; None is the running Python's own library.
    Raises:
      FileNotFoundError: there are no files to train on, or none to hold out.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    train: list[np.ndarray] = []
    held_out: list[np.ndarray] = []
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*"))
    for name in names:
        path = root / name
        is_installed = any(part in INSTALLED for part in path.parts)
        if path.suffix not in SUFFIXES or is_installed or not path.is_file():
            continue
        content = path.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        tokens = np.append(np.frombuffer(content, np.uint8).astype(np.uint16), STOP_ID)
        (held_out if is_held_out(name) else train).append(tokens.astype(np.uint16))
    if not train or not held_out:
        raise FileNotFoundError(
            f"{root} holds {len(train)} files to train on and {len(held_out)} to hold "
            "out; give the directory of a Python library with its sources"
        )
    return Corpus(np.concatenate(train), held_out, len(train))


def pieces(
    tokens: np.ndarray, count: int, length: int, rng: np.random.Generator
) -> np.ndarray:
    """Return pieces `[count, length + 1]` int32 from random places of `[N]` tokens."""
    starts = rng.integers(0, len(tokens) - length, count)
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def held_out_pieces(corpus: Corpus, count: int, length: int) -> np.ndarray:
    """Return pieces `[count, length + 1]` int32 of held-out files, the same always.

    Each begins at a random line and lies within one file.

    Raises:
      ValueError: no held-out file is that long.
    """
    rng = np.random.default_rng(length)
    files = [tokens for tokens in corpus.held_out if len(tokens) > length + 1]
    if not files:
        raise ValueError(
            f"length={length}: no held-out file has that many bytes; give less"
        )
    room = np.array([len(tokens) - length - 1 for tokens in files], float)
    found: list[np.ndarray] = []
    while len(found) < count:
        tokens = files[rng.choice(len(files), p=room / room.sum())]
        lines = np.flatnonzero(tokens[: len(tokens) - length - 1] == ord("\n")) + 1
        start = rng.choice(np.append(lines, 0))
        found.append(tokens[start : start + length + 1])
    return np.stack(found).astype(np.int32)
