"""A run's files: written whole or not at all, and a disk that refuses is named."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

# As TensorStore and safetensors put it, whose errors are no OSError.
IN_WORDS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
}


@contextlib.contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Say what could not be written, where, and how the run goes on.

    Args:
      what: for the message, such as "the checkpoint of step 5". path: where it goes.
    Raises:
      OSError: of the same number, where what runs inside fails by the disk.
    """
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        remedy = "mend that"
        if number in IN_WORDS.values():
            remedy = "free some space"
        raise OSError(
            number,
            f"{os.strerror(number)}: {what} could not be written; {remedy} and go on "
            "with --resume, from the last checkpoint that is whole",
            str(path),
        ) from error


def _error_number(error: BaseException) -> int | None:
    """Return the system's number of what caused an error, None if it was no system."""
    if isinstance(error, OSError):
        return error.errno
    for words, number in IN_WORDS.items():
        if words in str(error):
            return number
    cause = error.__cause__ or error.__context__
    return None if cause is None else _error_number(cause)


def replace_text(path: Path, text: str) -> None:
    """Give a file, and the directory it is in, new contents in one atomic move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(text, "utf-8")
    os.replace(draft, path)
