"""The bytes that passes of a compiled window move, beside those that they must move.

The count follows the optimized HLO of a real program. Every scheduled instruction that
computes reads its operands from the device's memory and writes its results there; a
buffer in on-chip memory (a TPU's S(1)) is free. An instruction that reads a slice, or
writes into an existing buffer, moves the slice. A round is the body of the window's
inner loop: the loop of drafts runs gamma times, the verification's loop once, a loop
over experts once for each that is touched (`experts.expected_touched`), the loops that
mend rows with non-finite logits never; a conditional takes its cheapest branch. A
custom call, such as a kernel of attention, reads its operands once and writes its
results; cuDNN's attention also writes its workspace.

The minimum of a pass: its weights once (in a draft their codes and scales), the cache
once at its padded length (in a draft that sees a span, the entries of the span), the
new entries, the logits once.

Left out: time, what caches between memory and cores save, and what kernels skip because
it is not live: they count as if they read entries at the cache's padded length, as the
minimum does. `Count.bytes_at` scales both to a live length.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from er_jax.tools.module import Buffer, Computation, Instruction, Module, parse

Part = Literal["weights", "cache", "cache write", "scores", "logits", "sampling",
               "other"]  # fmt: skip
PARTS: tuple[Part, ...] = get_args(Part)
Kind = Literal["target", "draft"]

# Instructions that move nothing: they name, group or reserve buffers.
# So does the end of what another instruction has started ("copy-done").
FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all",
    "partition-id", "replica-id", "opt-barrier", "optimization-barrier",
    "add-dependency",
}  # fmt: skip
# What is read of an operand is what comes out.
SLICES = {"slice", "dynamic-slice", "gather", "slice-start", "dynamic-slice-start"}
# Instructions inside of a fusion whose input is read as far as their output is.
ELEMENTWISE = {"bitcast", "convert", "copy", "reshape", "transpose"}
# Custom calls that do not touch memory.
ALLOCATIONS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding")
# What the custom calls of cuDNN's attention are named.
ATTENTION = 'custom_call_target="__cudnn$fmha'
# Numbers of a vocabulary's width that a pass writes once: the projection does.
PROJECTION = re.compile(r"dot_general|convolution|custom_call")


@dataclasses.dataclass
class Count:
    """What one pass, or a part of the program, does.

    num_bytes: moved, by part of the model. kernels: launched. branches: tests of loops
    and conditionals that data decides; with a GPU the host waits for each of them.
    """

    num_bytes: dict[Part, int] = dataclasses.field(default_factory=dict)
    kernels: int = 0
    branches: int = 0

    @property
    def total(self) -> int:
        """Bytes moved in all."""
        return sum(self.num_bytes.values())

    def add_bytes(self, part: Part, size: int) -> None:
        """Add bytes of one part."""
        self.num_bytes[part] = self.num_bytes.get(part, 0) + size

    def bytes_at(self, rows: float, length: float) -> float:
        """Return the bytes with fewer rows or a shorter cache, as shares of those here.

        Weights stay; cache and scores shrink with both; all else with the rows.
        """
        sizes = self.num_bytes
        weights = sizes.get("weights", 0)
        attended = sizes.get("cache", 0) + sizes.get("scores", 0)
        rest = self.total - weights - attended
        return weights + rows * (length * attended + rest)

    def add(self, other: Count, times: float = 1) -> None:
        """Add what another part does, several times: a mean number."""
        for part, size in other.num_bytes.items():
            self.add_bytes(part, round(times * size))
        self.kernels += round(times * other.kernels)
        self.branches += round(times * other.branches)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What tells the parts of a model apart, and what a pass must move.

    vocab_sizes: V, whole and on one device. cache_length: S. weights: bytes that a
    target pass and a draft pass must read. cache: bytes of the cache that each must.
    entry: bytes of one position of all rows. logits: bytes of the logits of one
    position of all rows. gamma: drafts of a round. ring_length: slots of the rings that
    drafts read; 0 where they read the cache. slots: of all rings, those of layers with
    a window included. touched: experts of a layer that a target pass and a draft pass
    read, 0 without experts.
    """

    vocab_sizes: tuple[int, ...]
    cache_length: int
    weights: tuple[int, int]
    cache: tuple[int, int]
    entry: int
    logits: int
    gamma: int
    ring_length: int = 0
    slots: frozenset[int] = frozenset()
    touched: tuple[float, float] = (0, 0)

    def minimum(self, kind: Kind) -> int:
        """Return the bytes that a pass must move; a target pass verifies a round."""
        which = 0 if kind == "target" else 1
        positions = self.gamma + 1 if kind == "target" else 1
        new = positions * (self.entry + self.logits)
        return self.weights[which] + self.cache[which] + new


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The count of a window's round.

    target: the verification, or the autoregressive step, with acceptance and what ends
    the round. draft: one draft pass; all zero where there is none.
    """

    target: Count
    draft: Count
    sizes: Sizes

    @property
    def passes(self) -> dict[Kind, Count]:
        """The counts of the passes that there are, by kind."""
        found: dict[Kind, Count] = {"draft": self.draft} if self.sizes.gamma else {}
        return {"target": self.target, **found}

    @property
    def ratios(self) -> dict[Kind, float]:
        """Bytes moved over bytes that must be moved, by kind of pass."""
        return {
            kind: count.total / self.sizes.minimum(kind)
            for kind, count in self.passes.items()
        }


def count_window(text: str, sizes: Sizes) -> Traffic:
    """Count the round of a compiled window.

    Args:
      text: `compiled.as_text()` of `engine.windows.run_window`. sizes: of its model.
    Raises:
      ValueError: the text holds no window.
    """
    counter = _Counter(parse(text), sizes)
    return Traffic(target=counter.target(), draft=counter.draft, sizes=sizes)


# What is known of each array of an instruction's result: "weights", "cache" or nothing.
Labels = tuple[str, ...]


class _Counter:
    """Walks a module from its entry; `draft` fills while it does."""

    def __init__(self, module: Module, sizes: Sizes) -> None:
        self.module, self.sizes = module, sizes
        self.draft = Count()
        # Names of instructions are those of the whole module.
        self.buffers = {
            one.name: one.buffers
            for computation in module.computations.values()
            for one in computation
        }

    def target(self) -> Count:
        """Return the count of a round without its drafts."""
        entry = self.module.entry
        labels = self._labels(entry, {})
        # A loop before it, of the scope "cache", makes the rings of drafts.
        window = [
            one for one in entry if one.opcode == "while" and "/cache/" not in one.scope
        ]
        if len(window) != 1 or not window[0].scope.endswith("/while"):
            raise ValueError(
                "text is not that of a window: its entry computation has "
                f"{len(window)} loops; it must have the one over rounds"
            )
        body, at = self._body(window[0], labels)
        # With several rounds between two exit tests the rounds are a loop themselves.
        inner = [
            one
            for one in body
            if one.opcode == "while" and one.scope.endswith("while/body/while")
        ]
        if inner:
            body, at = self._body(inner[0], at)
        return self._count(body, at)

    def _body(
        self, loop: Instruction, labels: Mapping[str, Labels]
    ) -> tuple[Computation, dict[str, Labels]]:
        (name,) = loop.called["body"]
        body = self.module[name]
        return body, self._labels(body, {0: labels[loop.operands[0]]})

    def _labels(
        self, computation: Computation, given: Mapping[int, Labels]
    ) -> dict[str, Labels]:
        """Return the labels of every instruction's results."""
        found: dict[str, Labels] = {}
        for one in computation:
            operands = [found.get(name, ("",)) for name in one.operands]
            if one.opcode == "parameter" and given:
                labels = given[one.index]
            elif one.opcode == "parameter":
                labels = (_label_of(one.scope),)
            elif one.opcode == "tuple":
                labels = tuple(label for labels in operands for label in labels)
            elif one.opcode == "get-tuple-element":
                labels = operands[0][one.index : one.index + 1]
            elif one.opcode == "while" and "/cache/" in one.scope:
                # It makes the rings of drafts.
                labels = tuple(
                    "cache" if self.sizes.slots & {*buffer.dims} else ""
                    for buffer in one.buffers
                )
            elif one.opcode in ("while", "bitcast", "copy", "convert"):
                labels = operands[0]
            elif one.opcode.endswith("-done"):
                labels = operands[0][:1]
            elif one.opcode in ("copy-start", *SLICES):
                labels = (operands[0][0],) * len(one.buffers)
            elif one.opcode in ("fusion", "scatter", "dynamic-update-slice"):
                labels = self._updated(one, operands)
            else:
                labels = ("",) * len(one.buffers)
            found[one.name] = labels or ("",) * len(one.buffers)
        return found

    def _updated(self, one: Instruction, operands: Sequence[Labels]) -> Labels:
        """Label the results that are an operand, changed in place."""
        kept = {
            (buffer.dtype, buffer.dims): label
            for name, labels in zip(one.operands, operands, strict=True)
            for label, buffer in zip(labels, self.buffers.get(name, ()), strict=False)
            if label == "cache"
        }
        return tuple(kept.get((b.dtype, b.dims), "") for b in one.buffers)

    def _count(self, computation: Computation, labels: Mapping[str, Labels]) -> Count:
        """Count one run of a computation; drafts go to `self.draft`."""
        total = Count()
        for one in computation:
            if one.opcode in FREE or one.opcode.endswith("-done"):
                continue
            if one.opcode == "while":
                self._add_loop(one, labels, total)
            elif one.opcode == "conditional":
                total.add(self._cheapest(one, labels))
                total.branches += 1
            elif one.opcode == "call":
                callee = self.module[one.called["to_apply"][0]]
                given = {i: labels[name] for i, name in enumerate(one.operands)}
                total.add(self._count(callee, self._labels(callee, given)))
            else:
                # The compiler has no loop for a single draft.
                is_draft = self.sizes.gamma == 1 and "/draft/" in one.scope
                into = self.draft if is_draft else total
                into.add(self._moved(one, computation, labels))
        return total

    def _add_loop(
        self, loop: Instruction, labels: Mapping[str, Labels], total: Count
    ) -> None:
        body, at = self._body(loop, labels)
        if loop.scope.endswith("/draft/while"):
            self.draft.add(self._count(body, at))
        elif loop.scope.endswith("/verify/while"):
            total.add(self._count(body, at))
            total.branches += 2  # tested before its only turn and after
        elif loop.scope.endswith("/experts/while"):
            is_draft = "/draft/" in loop.scope
            times = self.sizes.touched[is_draft]
            # The compiler has no loop for a single draft.
            into = self.draft if is_draft and self.sizes.gamma == 1 else total
            into.add(self._count(body, at), times)
            into.branches += 1 + round(times)
        elif "known_trip_count" in loop.attributes:
            found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
            assert found is not None
            total.add(self._count(body, at), int(found[1]))
        else:
            total.branches += 1  # tested, and not entered

    def _cheapest(self, one: Instruction, labels: Mapping[str, Labels]) -> Count:
        called = one.called
        names = called.get("branch_computations") or (
            called["true_computation"] + called["false_computation"]
        )
        branches = []
        for name, operand in zip(names, one.operands[1:], strict=True):
            branch = self.module[name]
            branches.append(
                self._count(branch, self._labels(branch, {0: labels[operand]}))
            )
        return min(branches, key=lambda count: count.total)

    def _moved(
        self, one: Instruction, computation: Computation, labels: Mapping[str, Labels]
    ) -> Count:
        """Count one instruction that computes."""
        count = Count(kernels=1)
        if one.opcode == "custom-call" and any(
            f'custom_call_target="{name}"' in one.attributes for name in ALLOCATIONS
        ):
            return Count()
        for index, name in enumerate(one.operands):
            source = computation.instructions[name]
            label = labels[name][0] if labels[name] else ""
            if len(source.buffers) != 1 or source.opcode == "constant":
                continue  # of a tuple the elements count, where they are read
            (buffer,) = source.buffers
            if buffer.space == 0:
                size = self._read(one, index, buffer)
                count.add_bytes(self._part(buffer, label, one, written=False), size)
        for buffer, size, is_update in self._written(one):
            if buffer.space == 0:
                label = "cache" if is_update and self._is_cache(one, labels) else ""
                count.add_bytes(self._part(buffer, label, one, written=True), size)
        return count

    def _is_cache(self, one: Instruction, labels: Mapping[str, Labels]) -> bool:
        return any("cache" in labels[name] for name in one.operands)

    def _part(
        self, buffer: Buffer, label: str, one: Instruction, *, written: bool
    ) -> Part:
        if label == "cache":
            return "cache write" if written else "cache"
        if label == "weights":
            return "weights"
        if any(size in buffer.dims for size in self.sizes.vocab_sizes):
            is_logits = written and PROJECTION.search(one.scope.rsplit("/", 1)[-1])
            return "logits" if is_logits else "sampling"
        lengths = self.sizes.slots | {self.sizes.cache_length}
        if lengths & {*buffer.dims} and len(buffer.dims) > 2:
            return "scores"
        return "other"

    def _read(self, one: Instruction, index: int, buffer: Buffer) -> int:
        """Return the bytes that an instruction reads of an operand."""
        if one.opcode in SLICES and index == 0:
            return self._result(one).num_bytes
        if one.opcode in ("dynamic-update-slice", "scatter") and index == 0:
            return 0
        if one.opcode == "fusion":
            fused = self.module[one.called["calls"][0]]
            return min(self._read_inside(fused, index, buffer), buffer.num_bytes)
        return buffer.num_bytes

    def _read_inside(self, fused: Computation, index: int, buffer: Buffer) -> int:
        """Return the bytes that a fusion reads of its parameter, at most all."""

        def used(name: str) -> int:
            size = 0
            for user in fused.users(name):
                place = user.operands.index(name)
                if user.opcode in ELEMENTWISE and not user.is_root:
                    size += used(user.name)
                elif user.opcode in SLICES and place == 0:
                    size += _share(user.buffers[0], buffer)
                elif user.opcode in ("dynamic-update-slice", "scatter") and place == 0:
                    continue  # changed in place: what is written counts
                elif "output_to_operand_aliasing" in user.attributes:
                    size += used(user.name)  # the same bytes by another name
                elif user.opcode == "fusion":
                    inner = self.module[user.called["calls"][0]]
                    size += self._read_inside(inner, place, buffer)
                elif user.opcode == "tuple":
                    continue  # handed through
                else:
                    size += buffer.num_bytes
            return size

        return used(fused.parameter(index).name)

    def _written(self, one: Instruction) -> list[tuple[Buffer, int, bool]]:
        """Return each result's buffer, bytes written, whether it was there before."""
        if one.opcode.endswith("-start"):
            result = self._result(one)
            return [(result, result.num_bytes, False)]
        if one.opcode in ("dynamic-update-slice", "scatter"):
            return [(one.buffers[0], self.buffers[one.operands[-1]][0].num_bytes, True)]
        if one.opcode == "custom-call":
            # Scratch memory of a library's kernel is not a result; but attention keeps
            # parts of its sums there.
            is_attention = ATTENTION in one.attributes
            results = [
                b for b in one.buffers if is_attention or b.dtype not in ("s8", "u8")
            ]
            return [(b, b.num_bytes, False) for b in results or one.buffers[:1]]
        if one.opcode != "fusion":
            return [(b, b.num_bytes, False) for b in one.buffers]
        fused = self.module[one.called["calls"][0]]
        roots = self._roots(fused)
        found = []
        for buffer, (inside, root) in zip(one.buffers, roots, strict=True):
            if root.opcode in ("dynamic-update-slice", "scatter"):
                place = 1 if root.opcode == "dynamic-update-slice" else -1
                update = inside.instructions[root.operands[place]].buffers[0]
                found.append((buffer, _share(update, buffer), True))
            else:
                found.append((buffer, buffer.num_bytes, False))
        return found

    def _result(self, one: Instruction) -> Buffer:
        """Return what an instruction makes; where it only starts, its operand is by."""
        is_second = one.opcode.endswith("-start") and one.opcode != "copy-start"
        return one.buffers[min(is_second, len(one.buffers) - 1)]

    def _roots(self, fused: Computation) -> list[tuple[Computation, Instruction]]:
        """Return what makes each result of a fusion, seen through bitcasts."""
        root = fused.root
        names = root.operands if root.opcode == "tuple" else (root.name,)
        found = []
        for name in names:
            one = fused.instructions[name]
            while one.opcode == "bitcast":
                one = fused.instructions[one.operands[0]]
            if one.opcode == "fusion":
                found += self._roots(self.module[one.called["calls"][0]])
            else:
                found += [(fused, one)] * len(one.buffers)
        return found


def _share(part: Buffer, whole: Buffer) -> int:
    """Return the bytes of a part of an array, in the type in which memory holds it."""
    return -(-part.num_bytes * whole.bits // max(part.bits, 1))


def _label_of(scope: str) -> str:
    if scope.startswith("params"):
        return "weights"
    return "cache" if scope.startswith("state.cache") else ""
