"""Figures without a display, and tables as text.

No other module has to handle a missing matplotlib.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """Return a matplotlib figure that needs no display.

    Args:
      width, height: inches.
    Raises:
      ImportError: matplotlib is missing; install the extra `plot`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib; install it with pip install 'er-jax[plot]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_picture(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse a path that no picture can be saved to, before one is drawn.

    Args:
      name: the argument that gives the path. path: where to save; the ending is its
        format.
    Raises:
      ValueError: matplotlib does not write this format.
      ImportError: as `new_figure`.
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    if kind and kind not in known:
        raise ValueError(
            f"{name}={os.fspath(path)} ends in .{kind}; a picture is one of "
            f"{', '.join(sorted(known))}"
        )


def text_table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Return the rows as aligned columns, floats with three significant digits."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return str(value)

    cells = [list(header), *([text(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )
