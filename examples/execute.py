"""Runs a notebook's cells in order, and writes what they printed and drew into it.

    python examples/execute.py first_rollout

What Jupyter would show is kept: printed text, the value of a last line, and pictures.
It needs no Jupyter. `tests/test_examples.py` runs the notebooks in the same way.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def executed(notebook: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Run the code cells in one namespace and yield the outputs of each.

    Args:
      notebook: as read from JSON, format 4. Files are written where the process is.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body[-1] if isinstance(tree.body[-1], ast.Expr) else None
        if last is not None:
            tree.body.pop()
        place = f"cell {number}"
        printed, value = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, place, "exec", dont_inherit=True), names)
            if last is not None:
                expression = ast.Expression(last.value)
                value = eval(compile(expression, place, "eval"), names)
        yield outputs(printed.getvalue(), value)


def outputs(printed: str, value: Any) -> list[dict[str, Any]]:
    """Return what a cell printed, and its last line's value, as Jupyter keeps them."""
    found: list[dict[str, Any]] = []
    if printed:
        lines = printed.splitlines(keepends=True)
        found.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_png_"):
            code = base64.b64encode(value._repr_png_()).decode()
            # Without its address in memory, which is another one every time.
            data = {"image/png": code, "text/plain": [f"<{type(value).__name__}>"]}
        found.append(
            {"data": data, "execution_count": None, "metadata": {},
             "output_type": "execute_result"}
        )  # fmt: skip
    return found


def main(name: str) -> None:
    """Run a notebook in an empty directory and write its outputs.

    Args:
      name: of a notebook in examples/, without the ending.
    """
    path = FOLDER / f"{name}.ipynb"
    notebook = json.loads(path.read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        try:
            made = list(executed(notebook))
        finally:
            os.chdir(before)
    for number, (cell, found) in enumerate(zip(cells, made, strict=True), 1):
        cell["execution_count"], cell["outputs"] = number, found
        for one in found:
            if one["output_type"] == "execute_result":
                one["execution_count"] = number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of a notebook beside this file")
    main(parser.parse_args().name)
