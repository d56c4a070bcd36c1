"""Draws the rooms of er_jax and what they import: docs/figures/rooms.png.

    python docs/rooms.py

A room is a package, some modules of `TOGETHER`, or a module by itself. Imports are read
from the files. An arrow leads from a room to one that it imports; where others lead
there as well, it is left out. What is drawn stands in the picture as text, so that a
test can tell whether it still holds.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "figures" / "rooms.png"
NOTE = "Description"  # where the picture holds what is drawn, as text

# Modules outside of packages that are one room.
TOGETHER = {
    "words": (
        *("types", "arguments", "devices", "figures", "until", "thread_settings"),
    ),
    "the policy": ("decoder", "drafter", "kv_cache", "products"),
    "a round": ("acceptance", "sampling", "steps"),
    "what is asked": ("bias", "settings", "stops"),
    "a request": ("config", "request", "stats", "respond"),
    "checks and result": (
        *("checks", "result", "resume", "journal", "journal_format"),
    ),
}

# What stands above all rooms: the public names, and the earlier ones.
LEFT_OUT = ("__init__", "earlier")

WIDTH, LAYER_HEIGHT, BOX_HEIGHT = 8.4, 0.86, 0.54  # inches

Arrows = dict[str, set[str]]
"""What each name imports."""


def modules() -> dict[str, Path]:
    """Return the modules by their names within er_jax, `costs.table` for instance."""
    found = {}
    for path in sorted((ROOT / "er_jax").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "er_jax").with_suffix("").parts)
        name = name.removesuffix(".__init__")
        if name.split(".")[0] not in LEFT_OUT:
            found[name] = path
    return found


def imported(path: Path, known: Iterable[str]) -> set[str]:
    """Return the modules that a file imports, at its top or inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.removeprefix("er_jax.").split(".")
            heads = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
            if name.startswith("er_jax."):
                found |= set([head for head in heads if head in known][:1])
    return found


def rooms_of(imports: Arrows) -> dict[str, str]:
    """Return the room of each module.

    A module that imports what imports its package is a room by itself: otherwise
    arrows would lead in a circle.
    """
    together = {name: room for room, names in TOGETHER.items() for name in names}
    room_of = {name: together.get(name, name.split(".")[0]) for name in imports}
    while True:
        arrows = between(imports, room_of)
        for name, targets in imports.items():
            own = room_of[name]
            above = {room_of[target] for target in targets} - {own}
            if own != name and any(own in reached(arrows, room) for room in above):
                room_of[name] = name
                break
        else:
            return room_of


def between(imports: Arrows, room_of: dict[str, str]) -> Arrows:
    """Return what each room imports of other rooms."""
    arrows: Arrows = {room: set() for room in room_of.values()}
    for name, targets in imports.items():
        own = room_of[name]
        arrows[own] |= {room_of[target] for target in targets} - {own}
    return arrows


def reached(arrows: Arrows, start: str) -> set[str]:
    """Return all that arrows lead to from a room, not counting where they begin."""
    found: set[str] = set()
    ahead = list(arrows[start])
    while ahead:
        room = ahead.pop()
        if room not in found:
            found.add(room)
            ahead += arrows[room]
    return found


def reduced(arrows: Arrows) -> Arrows:
    """Return the arrows to rooms that no longer way leads to."""
    return {
        room: targets - set().union(*(reached(arrows, target) for target in targets))
        for room, targets in arrows.items()
    }


def layers(arrows: Arrows) -> dict[str, int]:
    """Return the layer of each room: 0, or one above the highest that it imports."""
    found: dict[str, int] = {}

    def layer(room: str) -> int:
        if room not in found:
            found[room] = max((layer(below) + 1 for below in arrows[room]), default=0)
        return found[room]

    for room in arrows:
        layer(room)
    return found


def rooms() -> tuple[dict[str, list[str]], Arrows]:
    """Return the modules of each room, and the arrows between rooms."""
    paths = modules()
    imports = {name: imported(path, paths) for name, path in paths.items()}
    room_of = rooms_of(imports)
    inside: dict[str, list[str]] = {room: [] for room in room_of.values()}
    for name, room in room_of.items():
        if name != room:
            inside[room].append(name.removeprefix(f"{room}."))
    return inside, reduced(between(imports, room_of))


def described(inside: dict[str, list[str]], arrows: Arrows) -> str:
    """Return what is drawn as text: a line for each room, the highest first."""
    height = layers(arrows)
    return "\n".join(
        f"{room} ({', '.join(inside[room])}) -> {', '.join(sorted(arrows[room]))}"
        for room in sorted(inside, key=lambda room: (-height[room], room))
    )


def ways(arrows: Arrows) -> Iterator[list[str]]:
    """Yield arrows as lists of places, one in each layer that they cross.

    Places between the two rooms have names of their own.
    """
    height = layers(arrows)
    for room, targets in arrows.items():
        for target in sorted(targets):
            crossed = range(height[room] - 1, height[target], -1)
            yield [room, *(f"{room} > {target} {i}" for i in crossed), target]


def places(arrows: Arrows) -> dict[str, tuple[float, float]]:
    """Return the middle of every place, in inches; rooms stand above what they need."""
    height = layers(arrows)
    rows: dict[int, list[str]] = {}
    below: dict[str, list[str]] = {}
    for room in arrows:
        rows.setdefault(height[room], []).append(room)
    for way in ways(arrows):
        for i, (upper, lower) in enumerate(itertools.pairwise(way)):
            below.setdefault(upper, []).append(lower)
            if i:
                rows[height[way[0]] - i].append(upper)
    found: dict[str, tuple[float, float]] = {}
    for layer, names in sorted(rows.items()):

        def wish(name: str) -> float:
            ends = [found[lower][0] for lower in below.get(name, ())]
            return sum(ends) / len(ends) if ends else 0.0

        for i, name in enumerate(sorted(names, key=lambda name: (wish(name), name))):
            x = WIDTH * (2 * i + 1) / (2 * len(names))
            found[name] = (x, LAYER_HEIGHT * (layer + 0.5))
    return found


def draw(inside: dict[str, list[str]], arrows: Arrows) -> None:
    """Draw the picture and write it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    height = LAYER_HEIGHT * (1 + max(layers(arrows).values()))
    figure = Figure((WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.axis("off")
    at = places(arrows)
    for way in ways(arrows):
        for upper, lower in itertools.pairwise(way):
            (start_x, start_y), (end_x, end_y) = at[upper], at[lower]
            # Arrows to one box end a little apart.
            lean = max(-0.3, min((end_x - start_x) / 8, 0.3))
            if upper == way[0]:
                start_x, start_y = start_x + lean, start_y - BOX_HEIGHT / 2
            if lower == way[-1]:
                end_x, end_y = end_x - lean, end_y + BOX_HEIGHT / 2 + 0.03
            axes.annotate(
                "",
                (end_x, end_y),
                (start_x, start_y),
                arrowprops={
                    "arrowstyle": "-|>" if lower == way[-1] else "-",
                    "color": "0.35",
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )
    for room, names in inside.items():
        x, y = at[room]
        lines = "  ".join(names)
        wide = max(0.098 * len(room), 0.068 * len(lines)) + 0.3
        is_package = (ROOT / "er_jax" / room).is_dir()
        axes.add_patch(
            FancyBboxPatch(
                (x - wide / 2, y - BOX_HEIGHT / 2),
                wide,
                BOX_HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.06",
                facecolor="#dce8f4" if is_package else "#f3eee0",
                edgecolor="0.35",
            )
        )
        title = f"{room}/" if is_package else room
        shift = 0.11 if lines else 0
        axes.text(x, y + shift, title, ha="center", va="center", weight="bold", size=10)
        axes.text(x, y - 0.12, lines, ha="center", va="center", size=7.5)
    text = described(inside, arrows)
    figure.savefig(PICTURE, dpi=120, metadata={NOTE: text, "Software": None})


if __name__ == "__main__":
    found = rooms()
    draw(*found)
    print(described(*found))
