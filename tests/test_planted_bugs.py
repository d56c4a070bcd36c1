"""Tests must bite: every deliberate mistake is caught by the test it names."""

from __future__ import annotations

import re

import pytest

from tests.planted_bugs import BUGS, ROOT, PlantedBug, try_bug, try_bugs


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_text_to_replace_is_found_once(bug: PlantedBug) -> None:
    assert (ROOT / bug.file).read_text("utf-8").count(bug.old) == 1
    assert bug.old != bug.new
    for test in bug.tests:
        file, name = re.fullmatch(r"([\w/]+\.py)::(\w+)(?:\[.*\])?", test).groups()  # type: ignore[union-attr]
        assert f"def {name}(" in (ROOT / file).read_text("utf-8")


def test_names_are_different() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 14


# The suite itself runs the named tests without a bug; what this one adds is that they
# pass in the copy, too, so that no bug is caught by the copying.
@pytest.mark.long
def test_named_tests_pass_without_a_bug() -> None:
    outcome = try_bug(None)
    assert outcome.status == 0, outcome.output


@pytest.mark.slow
def test_every_bug_is_caught() -> None:
    missed = {
        bug.name: outcome.output[-1500:]
        for bug, outcome in try_bugs(BUGS)
        if outcome.failed_assertion is None
    }
    assert not missed, "\n".join(f"{name}\n{text}" for name, text in missed.items())
