"""Files of costs: written atomically, checked field by field when they are read.

Every check raises a `ValueError` that names the field, its value and what it must be.
Left out: the meaning of the numbers (`passes`, `table`), the place of files (`store`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from er_jax.arguments import MOST, is_number, is_whole
from er_jax.types import Program

Number = TypeVar("Number", int, float)


def listed_programs(values: Mapping[Program, float]) -> list[list[Any]]:
    """Return rows of program fields and number, as JSON-ready Python values."""
    return [
        [
            int(p.rows),
            int(p.cache_length),
            int(p.gamma),
            bool(p.shared_rows),
            int(p.head),
            int(p.window),
            int(p.draft),
            float(value),
        ]
        for p, value in values.items()
    ]


def checked_programs(
    name: str, value: Any, checked: Callable[[str, Any], Number]
) -> dict[Program, Number]:
    """Return the numbers by program that `listed_programs` listed.

    Args:
      name: of the list in its file. value: the list. checked: checks each number.
    Raises:
      ValueError: as `checked_whole`.
    """
    found: dict[Program, Number] = {}
    for i, row in enumerate(checked_list(name, value)):
        *program, number = checked_list(f"{name}[{i}]", row) or [None]
        found[checked_program(f"{name}[{i}]", program)] = checked(
            f"the number of {name}[{i}]", number
        )
    return found


# Largest file of costs; `save_record` wrote nothing that is larger.
MAX_RECORD_BYTES = 1 << 24

# Bounds of the seconds of a pass or round.
LEAST_SECONDS, MOST_SECONDS = 1e-9, 1e6


def checked_whole(name: str, value: Any, *, least: int = 0, most: int = MOST) -> int:
    """Return a number of a file as an int.

    Raises:
      ValueError: not a whole number from `least` to `most`; the message has `name`.
    """
    if not is_whole(value, least, most):
        raise ValueError(
            f"{name} is {shortened(value)}, and must be a whole number from {least} to "
            f"{most}"
        )
    return int(value)


def checked_real(
    name: str, value: Any, *, least: float = 0.0, most: float = math.inf
) -> float:
    """Return a finite number of a file as a float; errors as in `checked_whole`."""
    if (
        not is_number(value)
        or not least <= value <= most
        or abs(value) > 1e300  # inf, and whole numbers that no float holds
    ):
        above = f" to {most:g}" if most < math.inf else ""
        raise ValueError(
            f"{name} is {shortened(value)}, and must be a finite number from {least:g}"
            f"{above}"
        )
    return float(value)


def checked_seconds(name: str, value: Any) -> float:
    """Return the seconds of a pass or round; errors as in `checked_whole`."""
    return checked_real(name, value, least=LEAST_SECONDS, most=MOST_SECONDS)


def checked_list(name: str, value: Any, length: int | None = None) -> list[Any]:
    """Return a list of a file, of the given length; errors as in `checked_whole`."""
    is_list = isinstance(value, list | tuple)
    if not is_list or (length is not None and len(value) != length):
        of = "" if length is None else f" of {length}"
        raise ValueError(f"{name} is {shortened(value)}, and must be a list{of}")
    return list(value)


def checked_program(name: str, value: Any) -> Program:
    """Return the program with these fields; errors as in `checked_whole`."""
    fields = checked_list(name, value)
    if len(fields) not in (3, 4, 6, 7) or not isinstance(fields[-1], bool | int):
        raise ValueError(
            f"{name} is {shortened(value)}, and must be rows, cache length, gamma, "
            "whether its rows are shared, the head and window that drafts see, and the "
            "number of the draft"
        )
    # The last fields may be missing, as in files of earlier versions.
    defaults = [0, 0, 0, False, 0, 0, 0]
    fields += defaults[len(fields) :]
    rows, cache_length, gamma, shared_rows, head, window, draft = fields
    if not isinstance(shared_rows, bool):
        raise ValueError(
            f"shared rows of {name} are {shortened(shared_rows)}, and must be true or "
            "false"
        )
    found = Program(
        rows=checked_whole(f"rows of {name}", rows, least=1),
        cache_length=checked_whole(f"cache length of {name}", cache_length, least=1),
        gamma=checked_whole(f"gamma of {name}", gamma),
        shared_rows=shared_rows,
        head=checked_whole(f"head of {name}", head),
        window=checked_whole(f"window of {name}", window),
        draft=checked_whole(f"draft of {name}", draft),
    )
    needs_drafts = found.window or found.draft
    if (found.head and not found.window) or (needs_drafts and not found.gamma):
        raise ValueError(
            f"{name} is {shortened(value)}: a head needs a window; a window, and the "
            "number of a draft, need drafts"
        )
    return found


def shortened(value: Any) -> str:
    """Return the repr of a value, shortened to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextlib.contextmanager
def damaged(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the name of the file to a `ValueError` about its contents."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; measure them again") from error


def save_record(
    path: str | os.PathLike[str], kind: str, about: Mapping[str, str], values: Any
) -> None:
    """Write costs as JSON.

    Args:
      path: the file; its directory is made. kind: of costs, "roofline" for instance.
      about: conditions of the costs: device, versions, policy, ...
      values: JSON-ready.
    """
    record = {"kind": kind, "about": dict(about), "values": values}
    # Written under a name of this thread alone, then renamed into place, so that no
    # reader meets half a file.
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    part = final.with_name(f"{final.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        part.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        part.replace(final)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load_record(
    path: str | os.PathLike[str], kind: str, about: Mapping[str, str] | None
) -> Any:
    """Return the values that `save_record` wrote.

    Args:
      path: the file. kind: of costs. about: conditions it must have; None takes any.
    Raises:
      ValueError: not such a record, or one of another device, version or policy.
      OSError: the file cannot be read.
    """
    size = Path(path).stat().st_size
    if size > MAX_RECORD_BYTES:
        raise ValueError(
            f"{path} holds no costs: it has {size} bytes, more than "
            f"{MAX_RECORD_BYTES}; measure them again"
        )
    try:
        record = json.loads(Path(path).read_text("utf-8"))
        found, values = dict(record["about"]), record["values"]
        found_kind = record["kind"]
    # Deeply nested brackets raise RecursionError.
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no costs; measure them again") from error
    if found_kind != kind:
        raise ValueError(
            f"{path} holds {str(found_kind)[:80]}, not {kind}; give another file"
        )
    for name, wanted in (about or {}).items():
        if found.get(name) != wanted:
            raise ValueError(
                f"{path} was measured with {name} {found.get(name)!r}, and this is "
                f"{wanted!r}: costs do not carry over; measure them again"
            )
    return values
