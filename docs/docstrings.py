"""Shows the sections of docstrings on the site: an extension of griffe, their reader.

griffe looks for sections behind empty lines, and calls examples `Examples`. Here a
docstring's sections follow each other without, so they are set apart before it looks.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Warns|Example):$", re.M)


def set_apart(text: str) -> str:
    """Return a docstring with an empty line above each of its sections."""
    return SECTION.sub(r"\n\g<0>", text).replace("\nExample:\n", "\nExamples:\n")


class Sections(griffe.Extension):
    """Sets the sections of all docstrings apart."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = set_apart(obj.docstring.value)
