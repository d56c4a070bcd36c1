"""Type checks of settings: every field holds what its annotation says.

NumPy numbers, which sweeps over settings are made of, become Python numbers, so that a
config can be written as JSON and compared with one that was read back. A value of any
other wrong type is refused by name when the config is made.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import numbers
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro


def require(holds: bool, name: str, value: object, remedy: str) -> None:
    """Raise ValueError naming argument, value and remedy, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}={value!r}: {remedy}")


def import_function(argument: str, name: str, example: str) -> Callable[..., Any]:
    """Import a function that a setting names.

    Args:
      argument: the setting. name: "module:function". example: of such a name.
    Raises:
      ValueError: there is no such function.
    """
    module, _, attribute = name.partition(":")
    remedy = f"give module:function, such as {example}"
    if not attribute:
        raise ValueError(f"{argument}={name!r} names no function; {remedy}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{argument}={name!r} cannot be imported ({error}); {remedy}"
        ) from error
    if not callable(found):
        raise ValueError(f"{argument}={name!r} is no function; {remedy}")
    return found


def check_types(settings: Any) -> None:
    """Convert the fields of a frozen dataclass to the types of their annotations.

    Args:
      settings: its annotations are bool, int, float, str, Path, a dataclass, or a
        tuple of any number of one of these, each with or without `| None`. A field that
        the command line has yet to fill in (`tyro.MISSING`) is left alone.
    Raises:
      ValueError: naming the first field of another type, or a number that is not
        finite.
    """
    wanted = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is not tyro.MISSING:
            value = _typed(field.name, value, wanted[field.name])
            object.__setattr__(settings, field.name, value)


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """Return a value converted to the wanted type; ValueError if it has another."""
    if isinstance(wanted, types.UnionType):
        (wanted,) = (kind for kind in typing.get_args(wanted) if kind is not type(None))
        return None if value is None else _typed(name, value, wanted)
    if typing.get_origin(wanted) is tuple:
        is_many = isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1
        require(is_many, name, value, "give several values, as a tuple")
        return tuple(_typed(name, one, typing.get_args(wanted)[0]) for one in value)
    given = value
    if isinstance(value, np.generic) or getattr(value, "shape", None) == ():
        value = value.item()
    is_bool = isinstance(value, bool)
    if wanted is bool:
        require(is_bool, name, given, "give True or False")
    elif wanted is int:
        is_whole = isinstance(value, numbers.Integral) and not is_bool
        require(is_whole, name, given, "give a whole number")
    elif wanted is float:
        is_number = isinstance(value, numbers.Real) and not is_bool
        require(is_number and math.isfinite(value), name, given, "give a finite number")
        value = float(value)
    elif wanted is str:
        require(isinstance(value, str), name, given, "give a text")
    elif wanted is Path:
        require(isinstance(value, str | os.PathLike), name, given, "give a path")
        value = Path(value)
    else:
        remedy = f"give a {wanted.__name__}"
        require(isinstance(value, wanted), name, given, remedy)
    return value
