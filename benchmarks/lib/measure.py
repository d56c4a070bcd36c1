"""Repeated readings of several cases, taken in turn, and their medians and quartiles.

Cases are run one after another within one process. They have been warmed up before,
and their compilation is not part of a reading.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from tqdm import tqdm


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median, quartiles, extremes and count of repeated readings."""
    array = np.asarray(list(values), float)
    q1, median, q3 = np.percentile(array, (25, 50, 75))
    return {
        "median": float(median),
        "q1": float(q1),
        "q3": float(q3),
        "min": float(array.min()),
        "max": float(array.max()),
        "num": int(array.size),
    }


def iqr_percent(found: Mapping[str, float]) -> float:
    """Return the distance between the quartiles of a `spread`, in percent of it."""
    return 100 * (found["q3"] - found["q1"]) / found["median"]


def interleave(
    cases: Mapping[str, Callable[[], float]],
    repeats: int,
    *,
    seed: int = 0,
    desc: str | None = None,
) -> dict[str, list[float]]:
    """Run every case once per repeat, in a new random order each time.

    So a disturbance of the machine falls on all cases alike, and no case always follows
    the same other case.

    Args:
      cases: name -> a function that runs the case and returns its reading.
      repeats: readings of each case. seed: of the orders.
      desc: label of a progress bar; None shows none.
    Returns:
      name -> readings, in the order of repeats.
    """
    order = random.Random(seed)
    readings: dict[str, list[float]] = {name: [] for name in cases}
    with tqdm(total=repeats * len(cases), desc=desc, disable=desc is None) as bar:
        for _ in range(repeats):
            names = list(cases)
            order.shuffle(names)
            for name in names:
                bar.set_postfix_str(name, refresh=False)
                readings[name].append(cases[name]())
                bar.update()
    return readings


def paired_ratio(top: Sequence[float], bottom: Sequence[float]) -> dict[str, float]:
    """Return the `spread` of top / bottom, each ratio within one repeat.

    A machine that slows down for a while slows both readings of a repeat, so this is
    steadier than a ratio of medians.
    """
    return spread(a / b for a, b in zip(top, bottom, strict=True))
