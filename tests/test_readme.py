"""The README's own code and commands."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_quick_start_is_the_file_that_is_run() -> None:
    (quick_start,) = blocks("python")
    assert quick_start == (ROOT / "docs" / "quickstart.py").read_text()
    assert len([line for line in quick_start.splitlines() if line.strip()]) <= 12


@pytest.mark.slow
def test_quick_start_prints_a_summary_and_a_completion() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "quickstart.py")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=ROOT,
    )
    assert re.search(r"^\d+ tokens in [\d.]+ s", done.stdout)
    assert re.search(r"^b['\"].*['\"] (stop|length)$", done.stdout, re.MULTILINE)


def test_there_are_exactly_two_set_up_lines() -> None:
    section = README.split("## Set-up")[1].split("\n## ")[0]
    commands = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    assert [command.count("\n") for command in commands] == [1, 1]
    for command in commands:
        assert command.startswith("python3 -m venv ")


def test_every_file_the_readme_names_exists() -> None:
    names = re.findall(r"\]\(([^)#:]+)\)", README)
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing
