"""Sampling settings of rows: which differ between rows, which make another program.

Temperature, top-k, top-p, min-p and the bounds of stops are one number for all rows, or
one for each. On the host, those of a request are one for each sequence; `of_rows` picks
those of the rows of a batch before a window runs. So a state knows nothing of settings,
and whatever moves rows need not move these.

Left out: what the settings do to logits (`sampling`) and to completions (`stops`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from er_jax.types import Array, Sampling

# Fields with a number for each row in every batch that has them, and fields that may.
BOUNDS = ("begin", "min_new_tokens")
PER_ROW = ("temperature", "top_k", "top_p", "min_p", *BOUNDS)


def of_rows(settings: Sampling, sequence: np.ndarray) -> Sampling:
    """Return the settings of the rows of a batch, on the host.

    Args:
      settings: of a request. sequence: int `[B]`, the sequence in each row, `NONE` in
        an empty one, whose settings mean nothing.
    """
    index = np.maximum(sequence, 0)
    own = {name: value[index] for name, value in rows_own(settings).items()}
    for name in BOUNDS:
        value = getattr(settings, name)
        if value is not None and name not in own:
            own[name] = np.full(len(index), value)
    return dataclasses.replace(settings, **own) if own else settings


def rows_own(settings: Sampling) -> dict[str, Array]:
    """Return the fields that have a number for each row, by name."""
    fields = {name: getattr(settings, name) for name in PER_ROW}
    return {name: value for name, value in fields.items() if np.ndim(value)}


def marked(settings: Sampling, of_row: Any, same: Any) -> Any:
    """Return `of_row` in place of what differs between rows, `same` for all else."""
    own = dict.fromkeys(rows_own(settings), of_row)
    return dataclasses.replace(jax.tree.map(lambda _: same, settings), **own)


def without_bounds(settings: Sampling) -> Sampling:
    """Return the settings without bias and bounds of stops."""
    return dataclasses.replace(
        settings, bias=None, stop_sequences=None, begin=None, min_new_tokens=None
    )


def kinds(settings: Sampling) -> tuple[Hashable, ...]:
    """Return what is asked for beyond plain settings, as a part of a program's name.

    Nothing of it is in the program of a request that asks for none of it.
    """
    found: list[Hashable] = []
    if np.ndim(settings.temperature):
        found.append("settings of rows")
    if settings.bias is not None:
        found.append("bias")
    if settings.stop_sequences is not None:
        found.append(("stop sequences", *settings.stop_sequences.shape))
    return tuple(found)


def beside(setting: Array, values: jax.Array) -> Array:
    """Return a setting with as many axes as values `[B, ...]` have, if it has one."""
    if not np.ndim(setting):
        return setting
    return setting.reshape(setting.shape + (1,) * (values.ndim - 1))
