"""Files that a command writes: checks before the work, directories made after it."""

from __future__ import annotations

import os
from pathlib import Path

from er_jax.figures import check_picture


def check_output(name: str, path: Path | None, *, is_picture: bool = False) -> None:
    """Refuse a file that cannot be written, before there is anything to write.

    Args:
      name: the argument that gives the path. path: where to write; None is nowhere.
      is_picture: whether matplotlib draws it.
    Raises:
      ValueError: a directory, a path that cannot be written, or not a picture's format.
      ImportError: matplotlib is missing; install the extra `plot`.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{name}={path} is a directory; give a file in it")
    existing = path.parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"{name}={path} cannot be written in {existing}; give a path in a "
            "directory that can be"
        )
    if is_picture:
        check_picture(name, path)


def with_directory(path: Path) -> Path:
    """Make the directory of a path and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
