"""Every public name says what its reader needs, in sections that the site shows.

A docstring's sections are lists: `Args:` or `Attributes:`, `Returns:`, `Raises:`. Each
entry is `name: text` in a line of its own, and longer text is indented below it. The
arguments there are those of the signature, arrays have a shape, and a name that can
raise says so. `tests/test_layout.py` holds that there is a docstring at all.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import er_jax
from tests.test_layout import arguments

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {name: getattr(er_jax, name) for name in er_jax.__all__}

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Warns", "Example")
ARRAY = re.compile(r"\b(?:jax\.Array|np\.ndarray)\b")
SHAPE = re.compile(r"`\[[^`]*\]`|random key")


def sections(doc: str | None) -> dict[str, list[str]]:
    """Return the entries of each section of a docstring, one text each."""
    found: dict[str, list[str]] = {}
    entries: list[str] | None = None
    for line in inspect.cleandoc(doc or "").splitlines():
        head = re.fullmatch(rf"({'|'.join(SECTIONS)}):", line)
        if head is not None:
            entries = found.setdefault(head[1], [])
        elif line and not line.startswith(" "):
            entries = None
        elif entries is not None and line.startswith("  ") and line[2] != " ":
            entries.append(line.strip())
        elif entries and line.strip():
            entries[-1] += f" {line.strip()}"
    return found


def split(entries: list[str]) -> dict[str, str]:
    """Return the texts of a section's entries by their names."""
    return {
        name: text for name, _, text in (entry.partition(": ") for entry in entries)
    }


def kinds_of(thing: Any) -> dict[str, str]:
    """Return the annotations of what a caller gives, as they are written."""
    parameters = inspect.signature(thing).parameters
    return {name: str(parameters[name].annotation) for name in arguments(thing)}


def raises_at_once(kind: type) -> bool:
    """Whether making one of a class can raise: its own constructor says `raise`."""
    makers = [vars(kind).get(name) for name in ("__init__", "__post_init__")]
    return any(
        re.search(
            r"^\s+raise\b|_check\w*\(|\bcheck\w*\(", inspect.getsource(maker), re.M
        )
        for maker in makers
        if inspect.isfunction(maker) and maker.__code__.co_filename.endswith(".py")
    )


def owed(name: str, thing: Any) -> Iterator[str]:
    """Yield what the docstring of a public name does not say as it should."""
    found = sections(thing.__doc__)
    if getattr(thing, "_is_protocol", False):
        return  # what an implementation offers; members have docstrings of their own
    is_class = inspect.isclass(thing)
    if is_class and issubclass(thing, Exception):
        if "Attributes" not in found:
            yield f"{name} does not list its attributes"
        return
    said = split(found.get("Args", found.get("Attributes", []) if is_class else []))
    kinds = kinds_of(thing)
    yield from (f"{name} does not list {each}" for each in kinds if each not in said)
    yield from (
        f"{name} lists {each}, not its own" for each in said if each not in kinds
    )
    for each, kind in kinds.items():
        text = said.get(each, "")
        if ARRAY.search(kind) and text and not SHAPE.search(text):
            yield f"{name} does not give the shape of {each}"
    if not is_class and "Raises" not in found:
        yield f"{name} does not say what it raises"
    if not is_class and "Returns" not in found:
        if inspect.signature(thing).return_annotation not in (None, "None"):
            yield f"{name} does not say what it returns"
    if is_class and raises_at_once(thing) and "Raises" not in found:
        yield f"{name} does not say what it raises"
    yield from unlisted(name, found)


def unlisted(name: str, found: dict[str, list[str]]) -> Iterator[str]:
    """Yield entries that are no list: without a name, or with another one inside."""
    for entry in found.get("Raises", []):
        if not re.match(r"[A-Z]\w+: \S", entry):
            yield f"{name} does not say when {entry} is raised"
        if re.search(r"[.;] [A-Z]\w+(?:Error|Interrupt): ", entry):
            yield f"{name} lists two errors in one line"
    for section in ("Args", "Attributes"):
        for entry in found.get(section, []):
            if not re.match(r"\w+: \S", entry) or re.search(r"[.;] [a-z_]\w*: ", entry):
                yield f"{name} lists {entry.split(':')[0]} with others, or says nothing"


def members(kind: Any) -> Iterator[tuple[str, Any]]:
    """Yield the public methods of a class."""
    for key, member in vars(kind).items() if inspect.isclass(kind) else ():
        made = getattr(member, "__func__", member)
        if not key.startswith("_") and inspect.isfunction(made) and made.__doc__:
            yield f"{kind.__name__}.{key}", made


def owed_of_members(kind: Any) -> Iterator[str]:
    """Yield what methods list wrongly: their sections, where they have them."""
    for name, member in members(kind):
        found = sections(member.__doc__)
        yield from unlisted(name, found)
        if "Args" in found:
            said, own = split(found["Args"]), [*kinds_of(member)]
            yield from (
                f"{name} lists {each}, not its own" for each in said if each not in own
            )


@pytest.mark.parametrize("name", PUBLIC)
def test_its_docstring_lists_arguments_shapes_and_errors(name: str) -> None:
    assert list(owed(name, PUBLIC[name])) == []
    assert list(owed_of_members(PUBLIC[name])) == []


def silent(x: jax.Array, rows: int) -> jax.Array:
    """Return x.

    Args:
      x: what is returned. rows: of a batch.
      length: of nothing.
    """
    return x


class Checked:
    """Checks its rows.

    Args:
      rows: of a batch.
    """

    def __init__(self, rows: int) -> None:
        if rows < 1:
            raise ValueError(f"rows={rows}")


PLANTED: list[tuple[Callable[..., Any], list[str]]] = [
    (
        silent,
        [
            "silent does not list rows",
            "silent lists length, not its own",
            "silent does not give the shape of x",
            "silent does not say what it raises",
            "silent does not say what it returns",
            "silent lists x with others, or says nothing",
        ],
    ),
    (Checked, ["Checked does not say what it raises"]),
]


@pytest.mark.parametrize(("thing", "found"), PLANTED)
def test_what_a_docstring_owes_is_found(thing: Any, found: list[str]) -> None:
    assert list(owed(thing.__name__, thing)) == found


def test_sections_are_read_as_lists() -> None:
    doc = """Return x.

    Args:
      x: `[B]`,
        or more.
      rows: 1.
    Raises:
      ValueError: never.

    Source: none.
    """
    assert sections(doc) == {
        "Args": ["x: `[B]`, or more.", "rows: 1."],
        "Raises": ["ValueError: never."],
    }
