"""The site: its navigation, its pages, its pictures. mkdocs need not be installed.

`mkdocs build --strict`, a job of CI, follows every link. Here is what can be read off
the files: that no page and no public name is left out, that what mkdocs.yml calls from
docs/hooks.py does its part, and that numbers and pictures are those of the code.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml

import er_jax
from benchmarks import report
from benchmarks.lib import expectations
from benchmarks.lib.expectations import Gain
from docs import hooks, pictures

ROOT = Path(__file__).resolve().parents[1]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
PAGES = {
    path.relative_to(ROOT / "docs").as_posix(): path.read_text("utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md"))
}


# -- the navigation --------------------------------------------------------------------


def leaves(nav: Any) -> Iterator[str]:
    """Yield the pages of a navigation, in order."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(part)


def wrong_in_navigation(nav: Any, pages: list[str]) -> list[str]:
    """Return pages that are left out, named twice, or not there."""
    named = list(leaves(nav))
    twice = {page for page in named if named.count(page) > 1}
    return sorted({*twice, *(set(named) ^ set(pages))})


def test_every_page_has_one_place_in_the_navigation() -> None:
    pages = [*PAGES, *hooks.PLACES.values()]
    assert wrong_in_navigation(CONFIG["nav"], pages) == []
    assert next(leaves(CONFIG["nav"])) == "index.md"


def test_what_is_wrong_in_a_navigation_is_found() -> None:
    nav = ["a.md", {"B": ["b.md", {"C": "c.md"}]}, "a.md"]
    assert wrong_in_navigation(nav, ["a.md", "b.md", "d.md"]) == [
        "a.md",
        "c.md",
        "d.md",
    ]


def test_the_site_is_built_by_a_machine_with_bounded_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert all("<" in line for line in project["optional-dependencies"]["docs"])
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    jobs = yaml.safe_load(workflow)["jobs"].values()
    ran = [step.get("run", "") for job in jobs for step in job["steps"]]
    assert 'pip install -e ".[docs]"' in ran and "mkdocs build --strict" in ran
    assert CONFIG["strict"] is True
    told = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert 'pip install -e ".[docs]" && mkdocs build --strict' in told


# -- the reference ---------------------------------------------------------------------


def test_every_public_name_has_one_place_in_the_reference() -> None:
    shown = [
        name
        for page, text in PAGES.items()
        for name in re.findall(r"^::: (\S+)$", text, re.M)
        if page.startswith("reference/")
    ]
    things = []
    for name in shown:
        module, _, last = name.rpartition(".")
        things.append(getattr(importlib.import_module(module), last))
    assert sorted(name.split(".")[-1] for name in shown) == sorted(er_jax.__all__)
    assert all(
        thing is getattr(er_jax, name.split(".")[-1])
        for thing, name in zip(things, shown, strict=True)
    )


def defaults_on_the_page() -> dict[str, str]:
    """Return what docs/settings.md says is the default of each setting."""
    found: dict[str, str] = {}
    for names, values in re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \|([^|]*)\|", PAGES["settings.md"], re.M
    ):
        said = re.findall(r"`([^`]*)`", values) or [""]
        own = dict(zip(re.findall(r"`(\w+)`", names), said, strict=False))
        found = own | found  # what comes first is the table of the settings
    return found


def test_the_settings_page_has_all_settings_with_their_defaults() -> None:
    wanted = {}
    for kind in (er_jax.RolloutConfig, er_jax.DrafterConfig):
        for field in dataclasses.fields(kind):
            value = repr(field.default).replace("'", '"')
            if field.default is dataclasses.MISSING:
                value = ""
            if isinstance(field.default_factory, type):
                value = f"{field.default_factory.__name__}()"
            wanted[field.name] = value
    assert defaults_on_the_page() == wanted


# -- pages as they are read ------------------------------------------------------------


def lists_without_a_line_above(text: str) -> list[str]:
    """Return first items of lists that Markdown takes for part of a paragraph.

    GitHub begins a list in the middle of a paragraph, and Python-Markdown does not.
    """
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return re.findall(r"^(?![*\-|#\s]|\d+\. ).+\n((?:[*-]|\d+\.) .+)$", prose, re.M)


@pytest.mark.parametrize("page", PAGES)
def test_lists_are_lists_on_the_site_as_well(page: str) -> None:
    assert lists_without_a_line_above(PAGES[page]) == []


def test_a_list_without_a_line_above_is_found() -> None:
    assert lists_without_a_line_above("so:\n* one\n* two\n") == ["* one"]
    assert lists_without_a_line_above("so:\n\n* one\n  more\n* two\n") == []


def test_links_lead_to_the_files_as_they_are_on_the_site() -> None:
    text = (
        "[a](../er_jax/types.py) ![b](../benchmarks/results/rollout.png) [c](plan.md#x)"
    )
    assert hooks.relinked(text, "docs/limits.md") == (
        "[a](repository/er_jax/types.py.md) "
        "![b](repository/benchmarks/results/rollout.png) [c](plan.md#x)"
    )
    back = "[a](docs/plan.md#x) [b](no/such.md) [c](https://example.com)"
    assert hooks.relinked(back, "README.md") == back.replace("docs/", "../", 1)
    up = "../"  # in parts: from here such a path leads nowhere
    deep = f"[run]({up}{up}examples/first_rollout.ipynb)"
    there = hooks.relinked(deep, "docs/reference/index.md")
    assert there == f"[run]({up}examples/first_rollout.md)"


def test_what_pages_lead_to_is_found_by_way_of_others() -> None:
    texts = {
        "docs/index.md": "[a](../README.md)",
        "README.md": "[b](er_jax/types.py) [c](docs/plan.md)",
    }
    found = hooks.needed(["docs/index.md"], texts.__getitem__)
    assert found == sorted(["README.md", "er_jax/types.py", *hooks.PLACES])


def test_a_notebook_becomes_a_page() -> None:
    def cell(kind: str, source: str, *outputs: dict[str, Any]) -> dict[str, Any]:
        return {"cell_type": kind, "source": [source], "outputs": list(outputs)}

    shown = hooks.notebook(
        json.dumps(
            {
                "cells": [
                    cell("markdown", "# One"),
                    cell("code", "print(1)\n1", {"text": ["1\n"]}),
                    cell("code", "f()", {"data": {"text/plain": ["2"]}}),
                    cell(
                        "code",
                        "g()",
                        {"data": {"image/png": "AB\nC=", "text/plain": "3"}},
                    ),
                ]
            }
        )
    )
    assert shown.startswith("# One\n\n```python\nprint(1)\n1\n```\n\n\n```text\n1\n```")
    assert "```text\n2\n```" in shown
    assert "(data:image/png;base64,ABC=)" in shown and "3" not in shown


def test_a_frame_is_longer_than_what_it_holds() -> None:
    assert hooks.fenced("a ```` b", "text") == "`````text\na ```` b\n`````\n"


# -- pictures and numbers --------------------------------------------------------------


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_those_of_the_code(name: str) -> None:
    with PIL.Image.open(pictures.FOLDER / f"{name}.png") as picture:
        drawn = picture.info[pictures.NOTE]
    assert drawn == pictures.PICTURES[name].text(), "run python -m docs.pictures"
    assert f"(figures/{name}.png)" in PAGES["how-it-works.md"]


COMMAND = re.compile(r"python (?:-m )?[\w./]+|er-jax \w+")


@pytest.mark.parametrize("page", ["../README.md", *PAGES])
def test_every_picture_has_its_command_in_its_section(page: str) -> None:
    text = (ROOT / "docs" / page).read_text("utf-8")
    for section in re.split(r"^#+ ", text, flags=re.M):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", section):
            drawn_together = Path(picture).stem in pictures.PICTURES
            where = text if drawn_together else section
            assert COMMAND.search(where), picture


def test_the_page_says_what_the_pictures_show() -> None:
    page = " ".join(PAGES["how-it-works.md"].split())
    shown = pictures.stretches()
    rows = [one.program.rows for one in shown]
    first = next(one for one in shown if one.program.gamma)
    assert f"The batch has {rows[0]} rows, then 48, and at the end one." in page
    assert 48 in rows and rows[-1] == 1
    assert f"{rows[0]} rows decode plainly" in page and not shown[0].program.gamma
    assert f"from {first.program.rows} rows on each round drafts four" in page
    assert {one.program.gamma for one in shown} == {0, 4}
    sequences = {sequence for one in shown for sequence in one.sequences} - {-1}
    assert sequences == set(range(pictures.COUNT))


def test_the_decision_table_is_that_of_the_records() -> None:
    page = PAGES["expect.md"]
    assert page == report.decided(page), "run python -m benchmarks.report"
    with pytest.raises(ValueError, match="has no line"):
        report.decided("no marker")


def test_the_decision_table_quotes_the_limits() -> None:
    """What it derives from the counted bytes is what the record of limits holds."""
    points = json.loads((report.records.RESULTS / "limits.json").read_text())["points"]
    traffic = json.loads((report.records.RESULTS / "traffic.json").read_text())[
        "points"
    ]
    batches = [p for p in points if p["part"] == "batch"]
    shapes = {(p["rows"], p["length"]) for p in batches}
    assert len(shapes) > 3
    for shape in shapes:
        gains = expectations.counted_gains(traffic, "qwen2.5-7b", "h100", shape)
        for bits, drafts in expectations.COUNTED.items():
            ends = {0.85: gains[bits].low, 0.95: gains[bits].high}
            for keep, found in ends.items():
                known = [
                    p["speed_up"]
                    for p in batches
                    if (p["rows"], p["length"], p["keep"]) == (*shape, keep)
                    and p["draft"] in drafts
                ]
                assert found == pytest.approx(max(known), abs=1e-4)


def gain(low: float, high: float) -> Gain:
    return Gain(low, high, (2, 4))


ADVICE = [
    ({8: gain(1.1, 1.3), 4: gain(1.4, 1.6)}, "4 bits"),
    ({8: gain(1.1, 1.5), 4: gain(1.4, 1.6)}, "both"),
    ({8: gain(1.1, 1.5), 4: gain(1.0, 1.4)}, "8 bits"),
    ({8: gain(1.0, 1.04), 4: gain(0.9, 1.0)}, "none"),
    ({4: gain(1.0, 1.2)}, "4 bits"),
]


@pytest.mark.parametrize(("gains", "attach"), ADVICE)
def test_advice_follows_from_the_gains(gains: dict[int, Gain], attach: str) -> None:
    assert expectations.advice(gains) == attach


def test_gains_are_written_as_ranges() -> None:
    assert str(gain(1.1, 1.234)) == "1.10 to 1.23 (2 to 4)"
    assert str(Gain(1.0, 1.0, (0, 0))) == "1.00 (0)"
