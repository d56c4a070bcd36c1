"""Tables of records: as text for a terminal, as Markdown for a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from er_jax.figures import text_table

Table = tuple[Sequence[str], list[tuple[Any, ...]]]
"""Header and rows."""


def text(table: Table) -> str:
    """Return a table as aligned text."""
    header, rows = table
    return text_table(rows, header)


def number(value: Any) -> str:
    """Return a number to three digits, a dash for nothing."""
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def markdown(table: Table) -> str:
    """Return a Markdown table."""
    header, rows = table
    lines = [header, ["---"] * len(header), *([number(v) for v in r] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
