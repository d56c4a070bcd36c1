"""Files of a run: written in one atomic move, and with errors that name the file."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

# How the errors of TensorStore and safetensors, which are no OSError, put it in words.
IN_WORDS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
}


@contextlib.contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Name the file and the remedy when what runs inside cannot write it.

    Args:
      what: for the message, such as "the checkpoint of step 5". path: the file.
    Raises:
      OSError: with the errno of the system's error, which may have been wrapped in
        others. Any other error passes unchanged.
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
    """Return the errno at the root of an error; None if the system did not cause it."""
    if isinstance(error, OSError):
        return error.errno
    for words, number in IN_WORDS.items():
        if words in str(error):
            return number
    cause = error.__cause__ or error.__context__
    return None if cause is None else _error_number(cause)


def replace_text(path: Path, text: str) -> None:
    """Replace a file's contents in one atomic move; make its directory if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(text, "utf-8")
    os.replace(draft, path)
