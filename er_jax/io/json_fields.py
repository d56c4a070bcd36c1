"""JSON files of a checkpoint: reading them, and checking their fields.

Every error is a `ValueError` of one line that names the file, the field, its value and
what is allowed. Left out: which fields there are (`hf_config`).
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Field:
    """The values that a field of a JSON file may have.

    words: allowed values, for people. allows: whether a value is allowed. default: the
    value of a missing field. is_null_missing: whether null counts as missing.
    """

    words: str
    allows: Callable[[Any], bool]
    default: Any = None
    is_null_missing: bool = True


def whole_field(low: int, high: int) -> Field:
    """Return a field of a whole number from `low` to `high`."""
    # Compared by type, because isinstance would take true for a number.
    return Field(
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def number_field(low: float, high: float, **rest: Any) -> Field:
    """Return a field of a real number from `low` to `high`."""
    # NaN is in no range; whole numbers too large for a float can still be compared.
    return Field(
        f"a number from {low:g} to {high:g}",
        lambda value: type(value) in (int, float) and low <= value <= high,
        **rest,
    )


def text_field(*allowed: str, **rest: Any) -> Field:
    """Return a field of one of the allowed texts, or of any text if none is given."""
    return Field(
        " or ".join(map(repr, allowed)) or "a text",
        lambda value: isinstance(value, str) and value in (allowed or (value,)),
        **rest,
    )


def is_texts(value: Any, *allowed: str) -> bool:
    """Whether a value is a list of allowed texts, or of any if none is given."""
    return isinstance(value, list) and all(
        isinstance(item, str) and item in (allowed or (item,)) for item in value
    )


# Any JSON object.
OBJECT = Field("an object", lambda value: isinstance(value, dict), default={})


# Deepest nesting of a field's value, far below the limit of Python's stack.
MOST_NESTED = 32


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 2, 8, 80, 80


def shown(value: Any) -> str:
    """Return a value from a file for a message: short, and in one line."""
    return _SHORT.repr(value)


def printable(name: str) -> str:
    """Return a name from a file for a message, quoted if it would break the line."""
    return name if name.isprintable() else shown(name)


def refusal(file: Path, name: str, value: Any, words: str) -> ValueError:
    """Return the error for a field's value that is not among the allowed `words`."""
    return ValueError(
        f"{file} says {name}={shown(value)}, which is not supported; only {words} is: "
        "mend the file, or load another checkpoint"
    )


def checked(
    fields: Mapping[str, Any], table: Mapping[str, Field], file: Path, within: str = ""
) -> dict[str, Any]:
    """Return the values of all fields in a table, after checking each.

    Args:
      fields: of the file, or of an object in it. table: the fields to read. file: for
        messages. within: the object's name with a dot at its end, if it is one.
    """
    found = {}
    for name, field in table.items():
        value = fields.get(name)
        if value is None and (field.is_null_missing or name not in fields):
            found[name] = field.default
        elif field.allows(value):
            found[name] = value
        else:
            raise refusal(file, within + name, value, field.words)
    return found


def is_file(path: Path) -> bool:
    """Whether a file exists.

    Raises:
      ValueError: it is not a regular file; the reader of a pipe, for instance, waits.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: an impossible name
        raise ValueError(
            f"{path} cannot be read ({error}); give the directory of a checkpoint"
        ) from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a regular file; copy the checkpoint again")
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
      ValueError: the file is missing or damaged, is not an object, has a name twice, or
        is nested deeper than `MOST_NESTED`.
    """
    if not is_file(path):
        raise ValueError(
            f"{path} cannot be read (no such file); give the directory of a "
            "checkpoint as save_pretrained writes it"
        )
    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); mend its permissions or copy "
            "it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again")
    level: list[tuple[str, Any]] = list(found.items())
    for _ in range(MOST_NESTED):
        level = [inner for name, value in level for inner in _inner(name, value)]
    for name, value in level:
        words = f"a value nested at most {MOST_NESTED} deep"
        raise refusal(path, printable(name), value, words)
    return found


def _inner(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Return the names and values one level inside a value."""
    if isinstance(value, dict):
        return [(f"{name}.{key}", inner) for key, inner in value.items()]
    return [(name, inner) for inner in value] if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; refuse one that names a field twice, as JSON allows."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice")
        found[name] = value
    return found
