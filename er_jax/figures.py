"""Pictures without a display: the one place that knows matplotlib may be missing."""

from __future__ import annotations

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
