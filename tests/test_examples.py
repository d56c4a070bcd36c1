"""The notebooks of examples/: their cells run, and say again what they said.

What must not change from machine to machine is in cells with the tag `same`; the rest,
such as seconds, is not compared. Jupyter need not be installed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples import execute

NOTEBOOKS = sorted(execute.FOLDER.glob("*.ipynb"))

# Runs cells as the command does, but prints the outputs instead of keeping them.
PROGRAM = """
import json, sys
from pathlib import Path
from examples.execute import executed
notebook = json.loads(Path(sys.argv[1]).read_text("utf-8"))
print(json.dumps(list(executed(notebook))))
"""


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(outputs: list[dict[str, Any]]) -> str:
    return "".join(line for one in outputs for line in one.get("text", ()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_there_and_of_no_machine(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert sum(bool(cell["outputs"]) for cell in cells) > len(cells) / 2
    same = [cell for cell in cells if "same" in cell["metadata"].get("tags", ())]
    assert len(same) > 2 and all(printed(cell["outputs"]) for cell in same)
    assert any("image/png" in one.get("data", {}) for one in cells[-1]["outputs"])
    for cell in cells:
        for one in cell["outputs"]:
            shown = printed([one]) + "".join(one.get("data", {}).get("text/plain", ""))
            assert not re.search(r"(?<![\w ])/\w+/|0x[0-9a-f]{6}|File \"", shown), shown
            assert one["output_type"] != "error"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_and_say_the_same(path: Path, tmp_path: Path) -> None:
    root = str(execute.FOLDER.parent)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout)
    cells = code_cells(path)
    assert len(made) == len(cells)
    for cell, outputs in zip(cells, made, strict=True):
        if "same" in cell["metadata"].get("tags", ()):
            assert printed(outputs) == printed(cell["outputs"])
        kinds = [one["output_type"] for one in cell["outputs"]]
        assert [one["output_type"] for one in outputs] == kinds


class Drawing:
    """What a picture of Pillow offers to a notebook."""

    def _repr_png_(self) -> bytes:
        return b"\x89PNG"


def test_outputs_are_kept_as_jupyter_keeps_them() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["x = "]},
        {"cell_type": "code", "source": ["x = 1\n", "print(x)\n", "x + 1"]},
        {"cell_type": "code", "source": ["x = 2"]},
    ]
    both, nothing = execute.executed({"cells": cells})
    assert nothing == []
    assert both[0] == {"name": "stdout", "output_type": "stream", "text": ["1\n"]}
    assert both[1]["data"] == {"text/plain": ["2"]}
    (picture,) = execute.outputs("", Drawing())
    assert picture["data"] == {"image/png": "iVBORw==", "text/plain": ["<Drawing>"]}
