"""The text of an optimized HLO module as computations, instructions and buffers.

It reads what `compiled.as_text()` prints for a TPU, a GPU or a CPU. Shapes keep what
decides the bytes of a buffer: tiles and memory space.

Left out: what instructions compute; everything about time.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

# One array: its type, its dimensions and, in braces, its layout.
_ARRAY = re.compile(
    r"(pred|token|opaque|[suf]\d+\w*|bf16|c\d+)\[([\d,]*)\](\{[^}]*\})?"
)
_HEAD = re.compile(r"(?:ENTRY )?%?(?P<name>[\w.-]+) (?P<args>\(.*)\{$")
_LINE = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)$")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation|"
    r"branch_computations)=(\{[^}]*\}|%?[\w.-]+)"
)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array in memory.

    dtype: as HLO writes it ("bf16"). dims: sizes, major to minor as the program has
    them. order: dimensions from the most minor in memory. tile: sizes to which the
    minor dimensions are padded, as on a TPU; empty for none. space: 0 is the device's
    memory; others are on chip.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, padding to tiles included."""
        sizes = list(self.dims)
        if self.tile:
            # Minor first; a tile of higher rank than the array is met by ones.
            order = self.order or tuple(reversed(range(len(sizes))))
            sizes = [self.dims[axis] for axis in order]
            sizes += [1] * (len(self.tile) - len(sizes))
            for axis, unit in enumerate(reversed(self.tile)):
                sizes[axis] = -(-sizes[axis] // unit) * unit
        return -(-math.prod(sizes) * self.bits // 8)

    @property
    def bits(self) -> int:
        """Bits of one number."""
        if self.dtype in ("token", "opaque"):
            return 0
        if self.dtype == "pred":
            return 8
        found = re.search(r"\d+", self.dtype)
        assert found is not None
        return int(found[0])


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    buffers: its results; several for a tuple. operands: names of instructions of the
    same computation. attributes: the rest of its line. called: computations by role.
    """

    name: str
    opcode: str
    buffers: tuple[Buffer, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def scope(self) -> str:
        """The names of the functions and scopes that it comes from, or nothing."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Computations that it runs, by role: "calls", "body", "condition", ..."""
        return {
            role: tuple(re.findall(r"[\w.-]+", names))
            for role, names in _CALLED.findall(self.attributes)
        }

    @property
    def index(self) -> int:
        """The number of a parameter, or of a tuple's element."""
        if self.opcode == "parameter":
            return int(self.arguments)
        found = re.search(r"index=(\d+)", self.attributes)
        assert found is not None, self
        return int(found[1])


@dataclasses.dataclass
class Computation:
    """A computation: its instructions in order of execution, by name."""

    name: str
    instructions: dict[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(one for one in self if one.is_root)

    def parameter(self, index: int) -> Instruction:
        """Return a parameter by number."""
        return next(
            one for one in self if one.opcode == "parameter" and one.index == index
        )

    def users(self, name: str) -> list[Instruction]:
        """Return the instructions that read this one."""
        if not self._users:
            for one in self:
                for operand in dict.fromkeys(one.operands):
                    self._users.setdefault(operand, []).append(one)
        return self._users.get(name, [])

    _users: dict[str, list[Instruction]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: its computations by name, and the one that runs first."""

    computations: dict[str, Computation]
    entry: Computation

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]


def parse(text: str) -> Module:
    """Return the module that `compiled.as_text()` has printed.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    current, entry = None, None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line.startswith("}"):
            current = None
        elif current is None:
            head = _HEAD.match(line)
            if head is not None and "->" in line:
                current = Computation(head["name"], {})
                computations[head["name"]] = current
                if line.startswith("ENTRY"):
                    entry = current
        elif (found := _LINE.match(line)) is not None:
            one = _instruction(found["name"], found["rest"], bool(found["root"]))
            current.instructions[one.name] = one
    if entry is None:
        raise ValueError("text holds no HLO module: it has no line that starts ENTRY")
    return Module(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=rest[:opening],
        buffers=buffers_of(shape),
        operands=tuple(re.findall(r"%([\w.-]+)", arguments)),
        arguments=arguments,
        attributes=rest[closing + 1 :],
        is_root=is_root,
    )


def buffers_of(shape: str) -> tuple[Buffer, ...]:
    """Return the arrays of a shape as HLO writes it, nested tuples flattened."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        order, _, tiling = layout.strip("{}").partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiling)
        space = re.search(r"S\((\d+)\)", tiling)
        found.append(
            Buffer(
                dtype=dtype,
                dims=_numbers(dims),
                order=_numbers(order),
                tile=_numbers(tile[1]) if tile else (),
                space=int(space[1]) if space else 0,
            )
        )
    return tuple(found)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _closing(text: str, opening: int) -> int:
    """Return where the parenthesis at `opening` closes."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"text holds an unclosed parenthesis: {text[:80]}")
