"""Tests must bite: every deliberate mistake is caught by the test it names."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import planting
from tests.planted_bugs import BUGS
from tests.planting import NotFoundError, PlantedBug, planted

ROOT = Path(__file__).resolve().parents[1]
needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs processes that fork"
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_what_is_replaced_is_found_once(bug: PlantedBug) -> None:
    changed = planted(bug)
    compile(changed.tree, changed.path, "exec")
    before = ast.parse(changed.path.read_text("utf-8"))
    assert ast.dump(changed.tree) != ast.dump(before)
    for test in bug.tests:
        file, name = re.fullmatch(r"([\w/]+\.py)::(\w+)(?:\[.*\])?", test).groups()  # type: ignore[union-attr]
        assert f"def {name}(" in (ROOT / file).read_text("utf-8")


def test_names_are_different() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 14


# -- how they are found ----------------------------------------------------------------

PROJECT = {
    "library/rounds.py": """
        SIZES = {"short": 1 + 2}

        def outer(x):
            y = (x  # over two lines
                 + 1)

            def inner(z):
                z += 1
                return z - 1

            return inner(y)

        class Rows:
            size: int = 3

            def count(self):
                return self.size * 2 + self.size

            def clear(self):
                self.size = 0
        """,
    "library/inner/sizes.py": """
        def measured(): return 1

        class Columns:
            def count(self): return measured() - 1
        """,
    "library/other.py": "def measured(): return 2",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a small project, where bugs are planted in the test."""
    for name, text in PROJECT.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), "utf-8")
    monkeypatch.setattr(planting, "ROOT", tmp_path)
    return tmp_path


def bug(where: str, old: str, new: str = "0") -> PlantedBug:
    return PlantedBug("a bug", where, old, new, ())


@pytest.mark.parametrize(
    ("where", "old", "new", "said"),
    [
        ("library::outer", "x + 1", "x + 2", "y = x + 2"),
        ("library::outer", "(x +\n 1)  # as it is laid out here", "x", "y = x"),
        ("library::outer", "z - 1", "z", "return z"),
        ("library::outer.inner", "z - 1", "z", "return z"),
        (
            "library::outer",
            "z",
            "9",
            "z += 1\n        return 9 - 1",
        ),  # where it is read
        ("library::outer", "z += 1\nreturn z - 1", "return 5", "return 5"),
        ("library::outer", "y = x + 1", "a = x\ny = a", "    a = x\n    y = a"),
        ("library::outer.inner", "z += 1", "", "def inner(z):\n        return z - 1"),
        ("library::Rows.clear", "self.size = 0", "", "(self):\n        pass"),
        ("library::Rows.count", "self.size * 2", "7", "return 7 + self.size"),
        ("library::Rows", "3", "4", "size: int = 4"),
        ("library::Rows.size", "3", "4", "size: int = 4"),
        ("library::SIZES", "1 + 2", "1 - 2", "SIZES = {'short': 1 - 2}"),
        ("library/other::measured", "2", "3", "return 3"),
        ("library/inner::measured", "1", "3", "return 3"),
        ("library::Columns.count", "1", "0", "measured() - 0"),
    ],
)
def test_syntax_is_replaced(
    where: str, old: str, new: str, said: str, project: Path
) -> None:
    assert said in ast.unparse(planted(bug(where, old, new)).tree)


@pytest.mark.parametrize(
    ("where", "old", "reason"),
    [
        (
            "library::wide",
            "1",
            "library::wide is defined nowhere.* nothing with a name",
        ),
        (
            "library::count",
            "1",
            "There is Columns.count in library/inner/sizes.py, Row",
        ),
        ("library::Row.count", "1", "There is .*Rows.count in library/rounds.py"),
        ("library::outr", "1", "There is outer in library/rounds.py"),
        ("library/other::outer", "1", "There is outer in library/rounds.py"),
        ("no_such::outer", "1", "no_such::outer is defined nowhere"),
        (
            "library::measured",
            "1",
            "defined 2 times: library/inner/sizes.py:2, library/other.py:1; add a word "
            "of the module's path, as in library/sizes::measured",
        ),
        (
            "library::Rows.count",
            "self.size",
            r"occurs 2 times in library::Rows.count \(library/rounds.py:17\), not "
            "once:.*It is on lines 18, 18: name more of what surrounds it",
        ),
        (
            "library::Rows.clear",
            "self.size * 2",
            "occurs 0 times .*It occurs in Rows.count in library/rounds.py",
        ),
        ("library::outer", "x - 1", "occurs 0 times .*It occurs nowhere in the"),
        ("library::outer", "x +", "must both be one expression, or both be whole"),
    ],
)
def test_what_is_not_found_once_is_refused(
    where: str, old: str, reason: str, project: Path
) -> None:
    with pytest.raises(NotFoundError, match=f"(?s)a bug: .*{reason}"):
        planted(bug(where, old))


def test_a_module_that_moves_is_found(project: Path) -> None:
    (project / "library" / "other.py").rename(project / "library" / "inner" / "x.py")
    changed = planted(bug("library/inner/x::measured", "2", "3"))
    assert changed.path == project / "library" / "inner" / "x.py"


def test_an_import_gives_what_is_planted(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(project)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    changed = planted(bug("library/inner::measured", "1", "3"))
    planting.plant_in_imports(changed)
    assert importlib.import_module("library.inner.sizes").Columns().count() == 2
    assert importlib.import_module("library.other").measured() == 2
    assert "return 1" in changed.path.read_text("utf-8")


# -- whether they are caught -----------------------------------------------------------


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, one that has not started JAX."""
    command = [sys.executable, "-m", "tests.planted_bugs", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# The suite itself runs the named tests without a bug; what this one adds is that they
# pass where bugs are planted, too, so that no bug is caught by how it is planted.
@needs_fork
@pytest.mark.long
def test_named_tests_pass_without_a_bug() -> None:
    done = run("--without")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_fork
@pytest.mark.slow
def test_every_bug_is_caught() -> None:
    done = run()
    assert f"{len(BUGS)} bugs, 0 not caught" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
