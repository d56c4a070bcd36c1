"""What the site adds to the pages in docs/: files outside that these link to.

mkdocs knows the files below docs/. Pages link to others as well, as
`../er_jax/types.py` or `../CONTRIBUTING.md`, which is right where a repository is read.
On the site each of these becomes a page of its own: Markdown as it is, notebooks as
their cells and what they printed, code in a frame, pictures as they are. Links lead
there. So no link leaves the site without need, and `mkdocs build --strict` follows all.

mkdocs calls the functions whose names begin with `on_`. Left out: links inside of code.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
ELSEWHERE = "repository/"  # where files from outside of docs/ are on the site

LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#:\s]+)(#[^)\s]*)?(\))")
PICTURES = (".png", ".svg")
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".json": "json"}

# Files of the repository with a place of their own in the navigation.
PLACES = {"examples/first_rollout.ipynb": "examples/first_rollout.md"}


def page_of(path: str) -> str:
    """Return where a file is on the site.

    Args:
      path: from the root of the repository, `docs/limits.md` for instance.
    """
    if path in PLACES:
        return PLACES[path]
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    if path.endswith((".md", *PICTURES)):
        return ELSEWHERE + path
    return f"{ELSEWHERE}{path}.md"


def linked(text: str, path: str) -> Iterator[str]:
    """Yield the files of the repository that a page links to.

    Args:
      text: Markdown. path: of the page, from the root of the repository.
    """
    for match in LINK.finditer(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        if not target.startswith("..") and (ROOT / target).is_file():
            yield target


def relinked(text: str, path: str) -> str:
    """Return a page with its links as they are on the site.

    Args:
      text: Markdown. path: of the page, from the root of the repository.
    """
    here = posixpath.dirname(page_of(path)) or "."

    def link(match: re.Match[str]) -> str:
        for target in linked(match[0], path):
            found = posixpath.relpath(page_of(target), here)
            return f"{match[1]}{found}{match[3] or ''}{match[4]}"
        return match[0]

    return LINK.sub(link, text)


def fenced(text: str, language: str = "") -> str:
    """Return text in a frame that nothing inside of it ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def notebook(text: str) -> str:
    """Return the cells of a notebook, and what they printed and drew, as Markdown."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(
            source if cell["cell_type"] == "markdown" else fenced(source, "python")
        )
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            printed = "".join(output.get("text", data.get("text/plain", "")))
            if "image/png" in data:
                code = "".join(data["image/png"].split())
                parts.append(
                    f"![What the cell above draws](data:image/png;base64,{code})"
                )
            elif printed:
                parts.append(fenced(printed, "text"))
    return "\n\n".join(parts)


def rendered(path: str) -> str | bytes:
    """Return what the site holds of a file from outside of docs/."""
    if path.endswith(PICTURES):
        return (ROOT / path).read_bytes()
    text = (ROOT / path).read_text("utf-8")
    if path.endswith(".md"):
        return relinked(text, path)
    if path.endswith(".ipynb"):
        return relinked(notebook(text), path)
    language = LANGUAGES.get(posixpath.splitext(path)[1], "")
    return f"# `{path}`\n\n{fenced(text, language)}"


def needed(pages: Iterable[str], read: Callable[[str], str]) -> list[str]:
    """Return all files outside of docs/ that pages lead to, one by way of another.

    Args:
      pages: paths of Markdown files from the root. read: returns the text of one.
    """
    waiting = [*pages, *PLACES]
    found: dict[str, None] = dict.fromkeys(PLACES)
    while waiting:
        path = waiting.pop()
        if not path.endswith(".md"):
            continue
        for target in linked(read(path), path):
            if not target.startswith(DOCS) and target not in found:
                found[target] = None
                waiting.append(target)
    return sorted(found)


# -- what mkdocs calls -----------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the files that pages lead to."""
    from mkdocs.structure.files import File, InclusionLevel

    pages = [DOCS + file.src_uri for file in files.documentation_pages()]
    for path in needed(pages, lambda path: (ROOT / path).read_text("utf-8")):
        level = InclusionLevel.INCLUDED if path in PLACES else InclusionLevel.NOT_IN_NAV
        files.append(
            File.generated(
                config, page_of(path), content=rendered(path), inclusion=level
            )
        )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page in docs/ into those of the site."""
    if page.file.generated_by is None:
        return relinked(markdown, DOCS + page.file.src_uri)
    return markdown
