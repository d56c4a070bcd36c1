"""What is installed: the wheel that pyproject.toml describes, read without installing.

`.ci/wheel` installs it, with its dependencies, and runs the quick start from there.
"""

from __future__ import annotations

import configparser
import email
import pkgutil
import re
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import er_jax
import er_jax.tools.cli

pytest.importorskip("hatchling")  # of the extra `test`

ROOT = Path(__file__).resolve().parents[1]
INFO = f"er_jax-{er_jax.__version__}.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = directory.iterdir()
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(f"{INFO}/METADATA"))


def test_the_wheel_holds_the_library_only(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names} == {"er_jax", INFO}
    package = ROOT / "er_jax"
    modules = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    library = {name for name in names if name.startswith("er_jax/")}
    assert library == modules | {"er_jax/py.typed"}


def test_the_wheel_requires_what_training_needs_in_the_extra_only(
    wheel: zipfile.ZipFile,
) -> None:
    requires = metadata(wheel).get_all("Requires-Dist") or []
    training = {"optax", "orbax-checkpoint"}
    found = {name: line for line in requires if (name := name_of(line)) in training}
    assert found.keys() == training
    for line in found.values():
        assert re.search(r"; extra == ['\"]train['\"]$", line)
    assert any(line == "jax>=0.10" for line in requires)


def name_of(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement)[0]


def test_the_wheel_has_the_command_and_the_version(wheel: zipfile.ZipFile) -> None:
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(f"{INFO}/entry_points.txt").decode())
    assert scripts.sections() == ["console_scripts"]
    assert scripts.options("console_scripts") == ["er-jax"]
    command = scripts.get("console_scripts", "er-jax")
    assert pkgutil.resolve_name(command) is er_jax.tools.cli.main
    assert metadata(wheel)["Version"] == er_jax.__version__
