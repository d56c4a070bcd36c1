"""Plans: whether a model fits a device, and what speculation is worth there.

The windows of rollouts are compiled ahead of time with the device's own compiler, from
shapes alone, without weights or hardware. Memory and collectives are those that the
compiler reports. The bytes and operations of a pass, and the speed-up by the published
roofline, are computed from the data sheet. Speed is not measured: `er-jax calibrate`
does that on the device.

TPUs need the extra `tpu-plan`, NVIDIA GPUs `cuda-plan`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from er_jax import steps
from er_jax.acceptance import ACCEPT_RULES, AcceptRule, expected_tokens
from er_jax.arguments import MOST_DRAFTS, check_chance, check_gammas, check_whole
from er_jax.control.estimate import PRIOR_KEEP
from er_jax.costs.roofline import Roofline
from er_jax.costs.timing import neutral_sampling
from er_jax.decoder import Decoder, DecoderConfig
from er_jax.devices import device_bytes
from er_jax.drafter import DrafterConfig, PolicyParams, attach_draft
from er_jax.engine.windows import ONE_DEVICE, run_window
from er_jax.figures import text_table
from er_jax.mesh import layout, rules
from er_jax.tools.hlo import Collective, collectives, weight_copies
from er_jax.tools.presets import Target
from er_jax.types import Program

# Share of a device's memory that is reserved for programs and the runtime.
RESERVED_SHARE = 0.06
GAMMA = 4


@dataclasses.dataclass(frozen=True)
class ProgramCount:
    """The compiler's report on one window, in bytes on each device.

    program: the window. compile_s: seconds on this machine. argument_bytes: parameters,
    draft and state. output_bytes: results. temp_bytes: temporaries. alias_bytes:
    results that reuse arguments (the donated state). collectives: of one round.
    weight_copies: kernels that write an array of the shape of a weight (a transposed,
    cast or gathered copy); there should be none. refusal: why the compiler made no
    program, or empty; if not, `argument_bytes` comes from shapes and other numbers are
    0.
    """

    program: Program
    compile_s: float
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int
    collectives: tuple[Collective, ...]
    weight_copies: tuple[str, ...]
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
    a draft pass. cache_bytes: of one position of one row. keep: chance that a draft is
    kept, for the speed-up.
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

    @property
    def roofline(self) -> Roofline | None:
        """The published model with numbers of the data sheet; None without a sheet.

        It is that of one device: rows of its data shard, its part of the weights, heads
        and sums.
        """
        chip, c = self.target.chip, self.config
        if chip is None:
            return None
        target, draft = self.read_bytes
        matrices = target / jnp.dtype(c.dtype).itemsize
        return Roofline(
            target_weights_s=target / chip.bytes_per_s,
            draft_weights_s=draft / chip.bytes_per_s,
            cache_s=self.cache_bytes / chip.bytes_per_s,
            dense_s=2 * matrices / chip.ops_per_s,
            attention_s=4 * c.num_layers * c.num_heads * c.head_size
            / self.model / chip.ops_per_s,
            target_overhead_s=0.0,
            draft_overhead_s=0.0,
            verify_overhead_s=0.0,
        )  # fmt: skip

    def speed_up(self, rows: int, length: int, gamma: int) -> float:
        """Return the speed-up over plain decoding; `rows` are those of all devices."""
        costs = self.roofline
        assert costs is not None
        own = max(rows // self.data, 1)
        step = costs.round_seconds(Program(own, length, 0))
        tokens = expected_tokens([self.keep] * gamma)
        return tokens * step / costs.round_seconds(Program(own, length, gamma))

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
        if self.roofline is not None:
            lines += ["", self._speed_table()]
        return "\n".join(lines)

    def _speed_table(self) -> str:
        gamma = max(count.program.gamma for count in self.programs)
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
            f"speed-up of {gamma} drafts over plain decoding by the roofline, each "
            f"kept with chance {self.keep} (no overheads, peaks of the data sheet)\n"
            + text_table(body, header)
        )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f}"


def plan(
    config: DecoderConfig,
    target: Target,
    *,
    slots: int,
    max_length: int,
    gammas: Sequence[int] = (0, GAMMA),
    drafter: DrafterConfig | None = None,
    accept: AcceptRule = "coupled",
    model_parallel: int | None = None,
    keep: float = PRIOR_KEEP,
) -> Plan:
    """Compile a policy's windows for a target, and return what they need.

    Args:
      config: the decoder. target: the device. slots: rows on the whole mesh.
        max_length: cache positions of each row. gammas: programs to compile.
      drafter: how the draft is quantized. accept: acceptance rule.
      model_parallel: devices that share one copy of the weights; None is the fewest
        that hold parameters, draft and state.
      keep: chance that a draft is kept, for the speed-up.
    Raises:
      ValueError: a number outside its range, or sizes that do not fit the mesh.
    """
    policy, drafter = Decoder(config), drafter or DrafterConfig()
    check_whole("slots", slots)
    check_whole("max_length", max_length)
    # All positions of a round are entries of the cache.
    check_gammas(gammas, min(max_length - 1, MOST_DRAFTS))
    check_chance("keep", keep)
    if accept not in ACCEPT_RULES:
        raise ValueError(
            f"accept={accept!r} is unknown; use one of {', '.join(ACCEPT_RULES)}"
        )
    chips = len(target.devices)
    if model_parallel is not None:
        check_whole("model_parallel", model_parallel, 1, chips)
    shapes = shapes_of(policy, drafter, slots, max_length)
    model = model_parallel or _fewest(target, shapes, policy, chips, slots)
    if chips % model or slots % (chips // model):
        raise ValueError(
            f"model_parallel={model} with slots={slots}: it must divide the {chips} "
            "devices, and the number of data shards that makes must divide the slots; "
            "choose others"
        )
    data = chips // model
    devices = np.array(target.devices).reshape(data, model)
    mesh = layout.rollout_mesh(Mesh(devices, ("data", "model")))
    params, state = _with_shardings(shapes, policy, mesh)
    settings = jax.tree.map(
        lambda x: _shaped(x, NamedSharding(mesh, PartitionSpec())),
        (neutral_sampling(), np.int32(0), np.int32(0)),
    )
    weights = {
        tuple(sorted(leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(params)
        if min(leaf.shape) > 1 and len(leaf.shape) > 1
    }
    programs = []
    for gamma in dict.fromkeys(gammas):
        used = params if gamma else PolicyParams(policy=params.policy, draft=None)
        program = Program(slots, max_length, gamma)
        start = time.perf_counter()
        lowered = run_window.lower(
            policy, used, state, *settings, gamma=gamma, accept=accept,
            rounds_per_test=1 if target.kind == "cpu" else 4,
            layout=layout.MeshLayout(mesh) if chips > 1 else ONE_DEVICE,
        )  # fmt: skip
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            counted = device_bytes((used, state))
            seconds = time.perf_counter() - start
            reason = f"the compiler refuses it: {str(error).splitlines()[0]}"
            programs.append(
                ProgramCount(program, seconds, counted, 0, 0, 0, (), (), refusal=reason)
            )
            continue
        seconds = time.perf_counter() - start
        memory: Any = compiled.memory_analysis()
        text = compiled.as_text() or ""
        programs.append(
            ProgramCount(
                program=program,
                compile_s=seconds,
                argument_bytes=memory.argument_size_in_bytes,
                output_bytes=memory.output_size_in_bytes,
                temp_bytes=memory.temp_size_in_bytes,
                alias_bytes=memory.alias_size_in_bytes,
                collectives=collectives(text, gamma),
                weight_copies=weight_copies(text, weights),
            )
        )
    params_bytes, draft_bytes = device_bytes(params.policy), device_bytes(params.draft)
    # An embedding table without a projection is not read as a whole. A draft pass also
    # reads the policy's vectors, which are not quantized.
    looked_up = 0 if config.tied_embeddings else device_bytes(params.policy["embed"])
    vectors = [x for x in jax.tree.leaves(params.policy) if len(x.shape) < 2]
    return Plan(
        config=config,
        target=target,
        slots=slots,
        max_length=max_length,
        data=data,
        model=model,
        params_bytes=params_bytes,
        draft_bytes=draft_bytes,
        state_bytes=device_bytes(state),
        programs=tuple(programs),
        read_bytes=(params_bytes - looked_up, draft_bytes + device_bytes(vectors)),
        cache_bytes=device_bytes(state.cache) // (slots // data) // max_length,
        keep=keep,
    )


def shapes_of(policy: Decoder, drafter: DrafterConfig, slots: int, length: int) -> Any:
    """Return the shapes of parameters with their draft, and of a state.

    Raises:
      ValueError: no draft can be made of these parameters, or the dtype is not enabled.
    """

    def with_draft() -> PolicyParams:
        return attach_draft(policy.init(jax.random.key(0)), drafter)

    params = jax.eval_shape(with_draft)
    return params, jax.eval_shape(lambda: steps.empty_state(policy, slots, length))


def _shaped(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)


def _with_shardings(shapes: Any, policy: Decoder, mesh: Mesh) -> Any:
    """Return the shapes of `shapes_of` with their shardings on a mesh."""
    params, state = shapes
    of_policy = rules.param_shardings(params.policy, policy.config, mesh)
    of_draft = rules.draft_shardings(params.draft, of_policy)
    of_params = PolicyParams(policy=of_policy, draft=of_draft)
    of_state = rules.state_shardings(state, policy, mesh)
    return (
        jax.tree.map(_shaped, params, of_params),
        jax.tree.map(_shaped, state, of_state),
    )


def _fewest(
    target: Target, shapes: Any, policy: Decoder, chips: int, slots: int
) -> int:
    """Return the fewest devices that can share a copy of the weights."""
    for model in range(1, chips + 1):
        if chips % model or slots % (chips // model):
            continue
        devices = np.array(target.devices).reshape(chips // model, model)
        mesh = Mesh(devices, ("data", "model"))
        try:
            sharded = _with_shardings(shapes, policy, mesh)
        except ValueError:
            continue
        if device_bytes(sharded) <= target.memory_bytes * (1 - 2 * RESERVED_SHARE):
            return model
    return chips
