"""What a policy needs on a target: the numbers of a plan, and its summary as text.

`plan.plan` makes them. Speed is not measured: seconds come from the bytes that were
counted in the compiled programs, and from the data sheet.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from er_jax.acceptance import expected_tokens
from er_jax.decoder import DecoderConfig
from er_jax.experts import expected_touched
from er_jax.figures import text_table
from er_jax.tools.hlo import Collective
from er_jax.tools.presets import Target
from er_jax.tools.traffic import PARTS, Count, Traffic
from er_jax.types import Program

# Share of a device's memory that is reserved for programs and the runtime.
RESERVED_SHARE = 0.06
PASS_NAMES = {"target": "verify", "draft": "draft"}


@dataclasses.dataclass(frozen=True)
class ProgramCount:
    """The compiler's report on one window, in bytes on each device.

    program: the window. compile_s: seconds on this machine. argument_bytes: parameters,
    draft and state. output_bytes: results. temp_bytes: temporaries. alias_bytes:
    results that reuse arguments (the donated state). collectives: of one round.
    weight_copies: kernels that write an array of the shape of a weight (a transposed,
    cast or gathered copy); there should be none. traffic: bytes that its passes move,
    None where there is no program. refusal: why the compiler made no program, or empty;
    if not, `argument_bytes` comes from shapes and other numbers are 0.
    """

    program: Program
    compile_s: float
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int
    collectives: tuple[Collective, ...]
    weight_copies: tuple[str, ...]
    traffic: Traffic | None = None
    refusal: str = ""

    @property
    def peak_bytes(self) -> int:
        """Peak memory: arguments, temporaries, results that do not reuse arguments."""
        new_results = self.output_bytes - self.alias_bytes
        return self.argument_bytes + self.temp_bytes + new_results


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of a policy on a target, in bytes on each device.

    slots: rows on all devices. max_length: positions of each row.
    data, model: sizes of the mesh. params_bytes, draft_bytes, state_bytes: from shapes.
    programs: reports of the compiler. read_bytes: weights read by a target pass and by
    a draft pass of one position a row, of experts those that are expected to be
    touched. expert_bytes: of all experts, of the target and of the draft. cache_bytes:
    of one position of one row, the mean over a row. keep: chance that a draft is kept,
    for the speed-up.
    """

    config: DecoderConfig
    target: Target
    slots: int
    max_length: int
    data: int
    model: int
    params_bytes: int
    draft_bytes: int
    state_bytes: int
    programs: tuple[ProgramCount, ...]
    read_bytes: tuple[int, int]
    cache_bytes: int
    keep: float
    expert_bytes: tuple[int, int] = (0, 0)

    @property
    def limit_bytes(self) -> float:
        """Memory of one device without the reserved share."""
        return self.target.memory_bytes * (1 - RESERVED_SHARE)

    @property
    def peak_bytes(self) -> int:
        """Peak of the largest program; the draft stays in memory in plain decoding."""
        return max(
            count.peak_bytes + (0 if count.program.gamma else self.draft_bytes)
            for count in self.programs
        )

    @property
    def fits(self) -> bool:
        """Whether every program fits in a device's memory."""
        refused = any(count.refusal for count in self.programs)
        return not refused and self.peak_bytes <= self.limit_bytes

    def largest(self, length: int) -> int:
        """Return the most slots that fit, at this length; all but weights scales."""
        per_slot = (self.peak_bytes - self.params_bytes - self.draft_bytes) / self.slots
        per_slot *= length / self.max_length
        free = self.limit_bytes - self.params_bytes - self.draft_bytes
        rows = int(max(free, 0) / per_slot)
        return rows // self.data * self.data

    def _traffic(self, gamma: int) -> Traffic | None:
        """Return the traffic of the program with these drafts, None without one."""
        found = [
            count.traffic for count in self.programs if count.program.gamma == gamma
        ]
        return found[0] if found else None

    def pass_seconds(
        self,
        count: Count,
        rows: int,
        length: int,
        positions: int = 1,
        *,
        is_draft: bool = False,
        is_spanned: bool = False,
    ) -> float:
        """Return the seconds of a pass by the data sheet: bytes counted, or arithmetic.

        It is that of one device: rows of its data shard, its part of the weights, heads
        and sums.

        Args:
          count: of the pass. rows: of all devices. length: of the cache.
          positions: of each row. is_draft: whether it is a draft. is_spanned: whether
            it is one that sees a span, which reads as much of the cache at any length.
        """
        chip, c = self.target.chip, self.config
        assert chip is not None
        own = max(rows // self.data, 1)
        share = 1.0 if is_spanned else length / self.max_length
        moved = count.bytes_at(own * self.data / self.slots, share)
        # Fewer rows touch fewer experts.
        left = untouched_share(c, own * positions)
        fewer = left - untouched_share(c, self.slots // self.data * positions)
        moved -= fewer * self.expert_bytes[is_draft]
        weights = self.read_bytes[0] + self.expert_bytes[0] * (
            untouched_share(c, self.slots // self.data) - left
        )
        matrices = weights / jnp.dtype(c.dtype).itemsize
        seen = sum(
            min(length, c.window_of(layer) or length) for layer in range(c.num_layers)
        )
        attention = 4 * seen * c.num_heads * c.head_size / self.model
        operations = positions * own * (2 * matrices + attention)
        return max(moved / chip.bytes_per_s, operations / chip.ops_per_s)

    def speed_up(self, rows: int, length: int, gamma: int) -> float | None:
        """Return the speed-up over plain decoding; `rows` are those of all devices.

        None where a program has not been compiled, or the device has no data sheet.
        """
        plain, drafting = self._traffic(0), self._traffic(gamma)
        if self.target.chip is None or plain is None or drafting is None:
            return None
        step = self.pass_seconds(plain.target, rows, length)
        is_spanned = drafting.sizes.ring_length > 0
        draft = self.pass_seconds(
            drafting.draft, rows, length, is_draft=True, is_spanned=is_spanned
        )
        verify = self.pass_seconds(drafting.target, rows, length, gamma + 1)
        tokens = expected_tokens([self.keep] * gamma)
        return float(tokens * step / (gamma * draft + verify))

    def summary(self) -> str:
        """Return the plan as text."""
        mesh = f"{self.data} x {self.model}" if self.data * self.model > 1 else "1"
        lengths = [self.max_length * part // 4 for part in (1, 2, 4, 8)]
        lines = [
            f"{self.target.name}: {mesh} devices (data x model), {self.slots} slots of "
            f"{self.max_length} positions, {self.config.dtype}",
            "",
            text_table(
                [
                    ("parameters", _gb(self.params_bytes)),
                    ("draft", _gb(self.draft_bytes)),
                    ("state, cache included", _gb(self.state_bytes)),
                    *(
                        (
                            f"temporaries, gamma {count.program.gamma}",
                            _gb(count.temp_bytes),
                        )
                        for count in self.programs
                    ),
                    ("peak", _gb(self.peak_bytes)),
                    ("device", _gb(self.target.memory_bytes)),
                ],
                ("bytes of each device", "GB"),
            ),
            "",
            "fits" if self.fits else "does NOT fit",
            "most slots that fit: "
            + ", ".join(f"{self.largest(length)} of {length}" for length in lengths),
            "",
            "each pass reads, on each device: weights "
            f"{_gb(self.read_bytes[0])} GB (draft {_gb(self.read_bytes[1])} GB), and "
            f"{self.cache_bytes / 1e3:.1f} kB of cache for every position of its rows",
        ]
        for count in self.programs:
            if count.refusal:
                lines.append(f"gamma {count.program.gamma}: {count.refusal}")
                continue
            found = "; ".join(
                f"{c.count} {c.kind}, {c.num_bytes / 1e6:.2f} MB"
                for c in count.collectives
            )
            aliased = count.alias_bytes / max(self.state_bytes, 1)
            lines.append(
                f"gamma {count.program.gamma}: compiled in {count.compile_s:.0f} s, "
                f"state updated in place {100 * aliased:.0f} %, collectives per "
                f"round: {found or 'none'}"
            )
            if count.weight_copies:
                lines.append(f"  copies of weights: {', '.join(count.weight_copies)}")
        lines += ["", self._traffic_table()]
        gamma = max(count.program.gamma for count in self.programs)
        if self.speed_up(1, self.max_length, gamma) is not None:
            lines += ["", self._speed_table(gamma)]
        return "\n".join(lines)

    def _traffic_table(self) -> str:
        """Return the table of bytes that passes move, by part of the model."""
        body = []
        for count in self.programs:
            found = count.traffic
            if found is None:
                continue
            for kind, one in found.passes.items():
                minimum = found.sizes.minimum(kind)
                name = "step" if not count.program.gamma else PASS_NAMES[kind]
                parts = [_gb(one.num_bytes.get(part, 0)) for part in PARTS]
                ratio = f"{one.total / minimum:.2f}"
                body.append(
                    (name, _gb(minimum), _gb(one.total), ratio, *parts,
                     one.kernels, one.branches)
                )  # fmt: skip
        seeing = "".join(
            f"; drafts see {span.head} first and {span.window} last positions"
            for span in {count.program.span for count in self.programs}
            if span is not None
        )
        header = (
            "pass",
            "least GB",
            "moved GB",
            "ratio",
            *PARTS,
            "kernels",
            "branches",
        )
        return (
            f"bytes of one pass on each device, {self.slots} rows of "
            f"{self.max_length} positions, counted in the compiled program{seeing}\n"
            + text_table(body, header)
        )

    def _speed_table(self, gamma: int) -> str:
        lengths = [self.max_length // 4, self.max_length]
        rows = [r for r in (1, 4, 16, 64, 256, 1024) if r <= self.slots]
        if self.slots not in rows:
            rows.append(self.slots)
        body = [
            (r, *(f"{self.speed_up(r, length, gamma):.2f}" for length in lengths))
            for r in rows
        ]
        header = ("live rows", *(f"length {length}" for length in lengths))
        return (
            f"speed-up of {gamma} drafts over plain decoding by these bytes, each "
            f"kept with chance {self.keep} (no overheads, peaks of the data sheet)\n"
            + text_table(body, header)
        )


def untouched_share(config: DecoderConfig, tokens: int) -> float:
    """Return the share of the experts that a pass over some tokens does not read."""
    if not config.num_experts:
        return 0.0
    count, chosen = config.num_experts, config.experts_per_token
    return 1 - expected_touched(count, chosen, tokens) / count


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g}"
