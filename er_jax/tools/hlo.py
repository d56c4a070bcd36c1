"""Reading the text of a compiled program: its collectives, its copies of weights."""

from __future__ import annotations

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind in a round.

    count: their number; one in a draft pass counts gamma times. num_bytes: of their
    results, on each device. largest_bytes: of the largest result.
    """

    kind: str
    count: int
    num_bytes: int
    largest_bytes: int


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all",
               "collective-permute")  # fmt: skip


# Instructions that write nothing, because they return an existing buffer.
ALIASING = ("parameter", "get-tuple-element", "bitcast", "copy-done")

# A collective: its shape (or tuple of shapes), its kind, and its metadata.
INSTRUCTION = re.compile(
    rf"= (?P<shape>\(.*?\)|\S+) (?P<kind>{'|'.join(COLLECTIVES)})(?P<start>-start)?\("
    r"(?P<rest>.*)"
)

RESULT = re.compile(
    r"\s+(?:ROOT )?%?[\w.-]+ = (?P<type>\w+)\[(?P<dims>[\d,]+)\](?P<layout>\S*) "
    r"(?P<kind>[\w-]+)\("
)

SHAPE = re.compile(r"(pred|[su]\d+|bf16|f\d+)\[([\d,]*)\]")


def collectives(text: str, gamma: int) -> tuple[Collective, ...]:
    """Count the collectives of one round in the text of a compiled window.

    Those inside the loop over draft passes run gamma times.
    """
    found: dict[str, tuple[int, int, int]] = {}
    for line in text.splitlines():
        match = INSTRUCTION.search(line)
        if match is None:
            continue
        times = gamma if "/draft/" in match["rest"] else 1
        shapes = SHAPE.findall(match["shape"])
        if match["start"] and match["kind"] != "all-reduce":
            shapes = shapes[len(shapes) // 2 :]  # operands come before results
        size = sum(_shape_bytes(*shape) for shape in shapes)
        count, total, largest = found.get(match["kind"], (0, 0, 0))
        total, largest = total + times * size, max(largest, size)
        found[match["kind"]] = count + times, total, largest
    return tuple(Collective(kind, *found[kind]) for kind in sorted(found))


def weight_copies(text: str, shapes: set[tuple[int, ...]]) -> tuple[str, ...]:
    """Return the kernels of a compiled program that write an array of these shapes.

    Args:
      text: of the compiled module. shapes: with sorted dimensions, so that transposed
        copies are found.
    """
    inside = set(re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", text))
    found, name = [], ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = head[1]
        made = RESULT.match(line)
        if name in inside or made is None or made["kind"] in ALIASING:
            continue
        dims = tuple(sorted(int(size) for size in made["dims"].split(",")))
        # S(1) is on-chip memory of a TPU, for weights that a product is about to use.
        if dims in shapes and "S(1)" not in made["layout"]:
            found.append(f"{made['kind']} {made['type']}[{made['dims']}]")
    return tuple(found)


def _shape_bytes(name: str, dims: str) -> int:
    bits = 8 if name == "pred" else int(re.sub(r"\D", "", name))
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8
