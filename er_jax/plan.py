"""Will it run there, and what is speculation worth: answered without the device.

The real windows are compiled ahead of time for the device's own compiler, from shapes
alone: no weights, no hardware. What the compiler says of memory and of collectives is
counted; what a pass has to read and to compute, and the speed-up that follows from the
published roofline, is arithmetic on the data sheet. Speed is not measured here, nor can
it be: `er-jax calibrate` does that on the device.

TPUs need the extra `tpu-plan`, NVIDIA GPUs `cuda-plan`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from er_jax import sharding, steps
from er_jax.acceptance import ACCEPT_RULES, AcceptRule, expected_tokens
from er_jax.arguments import MOST_DRAFTS, check_chance, check_gammas, check_whole
from er_jax.calibrate import neutral_sampling
from er_jax.control import PRIOR_KEEP
from er_jax.decoder import Decoder, DecoderConfig, RopeScaling
from er_jax.drafter import DrafterConfig, PolicyParams, attach_draft
from er_jax.engine import device_bytes, device_memory_bytes, run_window
from er_jax.figures import text_table
from er_jax.pass_costs import Roofline
from er_jax.types import Program

# Of a device's memory, what programs themselves and the runtime may need.
RESERVED_SHARE = 0.06

GAMMA = 4


def _qwen2(
    dim: int, layers: int, heads: int, kv_heads: int, hidden: int
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=152_064,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_dim=hidden,
        rope_theta=1e6,
        qkv_bias=True,
        max_length=32_768,
        dtype="bfloat16",
    )


def _qwen3(
    dim: int, layers: int, heads: int, hidden: int, *, tied: bool = False
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=151_936,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        hidden_dim=hidden,
        head_dim=128,
        rope_theta=1e6,
        qk_norm=True,
        tied_embeddings=tied,
        max_length=40_960,
        dtype="bfloat16",
    )


# Sizes as their publishers give them in config.json.
PRESETS: dict[str, DecoderConfig] = {
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18_944),
    "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 13_824),
    "llama-3.1-8b": DecoderConfig(
        vocab_size=128_256,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=14_336,
        rope_theta=5e5,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        max_length=131_072,
        dtype="bfloat16",
    ),
    "llama-3.1-70b": DecoderConfig(
        vocab_size=128_256,
        dim=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        hidden_dim=28_672,
        rope_theta=5e5,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        max_length=131_072,
        dtype="bfloat16",
    ),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17_408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600),
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device's data sheet.

    memory_bytes: of its own. bytes_per_s: of that memory. ops_per_s: dense, bfloat16.
    """

    memory_bytes: float
    bytes_per_s: float
    ops_per_s: float


# Google Cloud's and NVIDIA's product pages (SXM boards). Peaks, reached by nobody.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(16 * 2**30, 819e9, 197e12),
    "v5p": Chip(95 * 2**30, 2765e9, 459e12),
    "v6e": Chip(32 * 2**30, 1640e9, 918e12),
    "a100": Chip(80e9, 2039e9, 312e12),
    "h100": Chip(80e9, 3350e9, 989e12),
    "h200": Chip(141e9, 4800e9, 989e12),
}

# What XLA wants to know of a GPU that is not there, in its own text format.
GPU_SPECS: dict[str, dict[str, Any]] = {
    "a100": dict(
        major=8, minor=0, cores=108, fpus=64, shared=166_912, l2=41_943_040, ghz=1.41
    ),
    "h100": dict(
        major=9, minor=0, cores=132, fpus=128, shared=232_448, l2=52_428_800, ghz=1.98
    ),
    "h200": dict(
        major=9, minor=0, cores=132, fpus=128, shared=232_448, l2=62_914_560, ghz=1.98
    ),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for.

    name: as it was asked for. kind: its platform. chip: its data sheet, None for this
    machine's CPU. devices: that XLA compiles for.
    """

    name: str
    kind: str
    chip: Chip | None
    devices: tuple[Any, ...]

    @property
    def memory_bytes(self) -> float:
        """Of one device."""
        if self.chip is not None:
            return self.chip.memory_bytes
        return device_memory_bytes() or math.inf


def target_of(name: str) -> Target:
    """Find a device's compiler.

    Args:
      name: a TPU slice as type:topology ("v5e:2x4", "v5p:2x2x1", "v6e:2x2"), "a100",
        "h100", "h200", several of them on one host ("h100:8"), or "cpu".
    Raises:
      ValueError: no such device, or its compiler is not installed.
    """
    kind, _, topology = name.partition(":")
    if name == "cpu":
        return Target(name, "cpu", None, (jax.devices("cpu")[0],))
    is_gpu = kind in GPU_SPECS
    is_named = (topology.isdecimal() and int(topology) > 0) or not topology
    if kind not in CHIPS or not (is_named if is_gpu else topology):
        raise ValueError(
            f"device={name!r} is not known; give a TPU slice such as v5e:2x4, "
            f"v5p:2x2x1 or v6e:2x2, one of {', '.join(GPU_SPECS)}, several of these "
            "such as h100:8, or cpu"
        )
    module, extra = (
        ("jax_cuda12_plugin", "cuda-plan") if is_gpu else ("libtpu", "tpu-plan")
    )
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"device={name!r} needs its compiler, which is not installed; "
            f'pip install "er-jax[{extra}]"'
        )
    # There is neither a driver to ask nor a server that knows this host.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Several plans at once are no conflict: none has a device.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        if is_gpu:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=kind,
                topology=f"1x1x{topology or 1}",
                target_config=_gpu_config(kind),
            )
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        raise ValueError(
            f"device={name!r} is not one that its compiler knows ({error}); give a "
            "slice that exists"
        ) from error
    platform = "cuda" if is_gpu else "tpu"
    return Target(name, platform, CHIPS[kind], tuple(found.devices))


def _gpu_config(kind: str) -> str:
    """Return XLA's description of a GPU (its GpuTargetConfigProto as text)."""
    spec, chip = GPU_SPECS[kind], CHIPS[kind]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": spec["shared"] + 1024,
        "threads_per_core_limit": 2048,
        "core_count": spec["cores"],
        "fpus_per_core": spec["fpus"],
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(chip.bytes_per_s),
        "l2_cache_size": spec["l2"],
        "clock_rate_ghz": spec["ghz"],
        "device_memory_size": int(chip.memory_bytes),
        "shared_memory_per_block_optin": spec["shared"],
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    capability = f"major: {spec['major']} minor: {spec['minor']}"
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ {capability} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } '
        f"runtime_version {{ major: 12 minor: 8 }} device_description_str: "
        f'"{kind.upper()}"'
    )


@dataclasses.dataclass(frozen=True)
class Collective:
    """A kind of collective in a round.

    count: how many; a draft's are counted gamma times. num_bytes: of their results, on
    each device. largest_bytes: of the largest one.
    """

    kind: str
    count: int
    num_bytes: int
    largest_bytes: int


@dataclasses.dataclass(frozen=True)
class ProgramCount:
    """What the compiler says of one window, bytes on each device.

    program: its name. compile_s: seconds here. argument_bytes: parameters, draft and
    state. temp_bytes: beside them. alias_bytes: of the state, given back in place.
    collectives: of one round. weight_copies: kernels that write an array of the shape
    of a weight: transposed, widened or gathered copies, of which there should be none.
    refusal: why the compiler made no program, or empty; then `argument_bytes` is by
    shapes, and what only a program tells is 0.
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
        """At once: arguments, temporaries, results that take no argument's place."""
        results = self.output_bytes - self.alias_bytes
        return self.argument_bytes + self.temp_bytes + results


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a policy needs on a target; bytes on each device.

    slots: rows of all devices. max_length: positions of each.
    data, model: sizes of the mesh. params_bytes, draft_bytes, state_bytes: by shapes.
    programs: as compiled. read_bytes: of weights, by a target pass and by a draft's.
    cache_bytes: of one position of one row. keep: chance of a draft, for the speed-up.
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
        """Of one device, without what is reserved."""
        return self.target.memory_bytes * (1 - RESERVED_SHARE)

    @property
    def peak_bytes(self) -> int:
        """Of the hungriest program. Plain steps run with the draft kept beside them."""
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
        """Return the most slots of this length that fit: all but weights is scaled."""
        per_slot = (self.peak_bytes - self.params_bytes - self.draft_bytes) / self.slots
        per_slot *= length / self.max_length
        free = self.limit_bytes - self.params_bytes - self.draft_bytes
        rows = int(max(free, 0) / per_slot)
        return rows // self.data * self.data

    @property
    def roofline(self) -> Roofline | None:
        """The published model with the data sheet's numbers; None without a sheet.

        Of one device: rows of its data group, its part of weights, heads and sums.
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
        """Return the speed-up over plain decoding; rows are those of all devices."""
        costs = self.roofline
        assert costs is not None
        here = max(rows // self.data, 1)
        step = costs.round_seconds(Program(here, length, 0))
        tokens = expected_tokens([self.keep] * gamma)
        return tokens * step / costs.round_seconds(Program(here, length, gamma))

    def summary(self) -> str:
        """Return what people read."""
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
                f"state given back in place {100 * aliased:.0f} %, collectives per "
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
    """Compile a policy's windows for a target and count.

    Args:
      config: the decoder. target: where. slots: rows of the whole mesh. max_length:
        cache positions of each. gammas: programs to compile, each once.
      drafter: how the draft is quantized. accept: acceptance rule.
      model_parallel: devices that share one copy of the weights; None is the fewest
        that hold parameters, draft and state.
      keep: chance of a draft, for the speed-up.
    Raises:
      ValueError: no such number, or sizes that do not fit the mesh.
    """
    policy, drafter = Decoder(config), drafter or DrafterConfig()
    check_whole("slots", slots)
    check_whole("max_length", max_length)
    # A round's positions are entries of the cache.
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
            "devices, and the number of groups that makes must divide the slots; "
            "choose others"
        )
    data = chips // model
    devices = np.array(target.devices).reshape(data, model)
    mesh = sharding.rollout_mesh(Mesh(devices, ("data", "model")))
    pair, state = _placed(shapes, policy, mesh)
    settings = jax.tree.map(
        lambda x: _shaped(x, NamedSharding(mesh, PartitionSpec())),
        (neutral_sampling(), np.int32(0), np.int32(0)),
    )
    weights = {
        tuple(sorted(leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(pair)
        if min(leaf.shape) > 1 and len(leaf.shape) > 1
    }
    programs = []
    for gamma in dict.fromkeys(gammas):
        params = pair if gamma else PolicyParams(policy=pair.policy, draft=None)
        program = Program(slots, max_length, gamma)
        start = time.perf_counter()
        lowered = run_window.lower(
            policy, params, state, *settings, gamma=gamma, accept=accept,
            rounds_per_test=1 if target.kind == "cpu" else 4,
            mesh=mesh if chips > 1 else None,
        )  # fmt: skip
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            counted = device_bytes((params, state))
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
    params_bytes, draft_bytes = device_bytes(pair.policy), device_bytes(pair.draft)
    # A table that is only looked up is not read; what is not quantized is shared.
    looked_up = 0 if config.tied_embeddings else device_bytes(pair.policy["embed"])
    vectors = [x for x in jax.tree.leaves(pair.policy) if len(x.shape) < 2]
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
      ValueError: a draft that cannot be made of these parameters, or a dtype that is
        not enabled.
    """
    pair = jax.eval_shape(lambda: attach_draft(policy.init(jax.random.key(0)), drafter))
    return pair, jax.eval_shape(lambda: steps.empty_state(policy, slots, length))


def _shaped(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where)


def _placed(shapes: Any, policy: Decoder, mesh: Mesh) -> Any:
    """Return the shapes with their shardings."""
    pair, state = shapes
    params = sharding.param_shardings(pair.policy, policy.config, mesh)
    where = PolicyParams(
        policy=params, draft=sharding.draft_shardings(pair.draft, params)
    )
    placed = jax.tree.map(_shaped, pair, where)
    cut = sharding.state_shardings(state, policy, mesh)
    return placed, jax.tree.map(_shaped, state, cut)


def _fewest(
    target: Target, shapes: Any, policy: Decoder, chips: int, slots: int
) -> int:
    """Return how many devices must share a copy of the weights."""
    for model in range(1, chips + 1):
        if chips % model or slots % (chips // model):
            continue
        devices = np.array(target.devices).reshape(chips // model, model)
        mesh = Mesh(devices, ("data", "model"))
        try:
            placed = _placed(shapes, policy, mesh)
        except ValueError:
            continue
        if device_bytes(placed) <= target.memory_bytes * (1 - 2 * RESERVED_SHARE):
            return model
    return chips


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all",
               "collective-permute")  # fmt: skip
# Instructions that write nothing: they hand on what is there.
HANDED_ON = ("parameter", "get-tuple-element", "bitcast", "copy-done")

# An instruction: its shape (or tuple of shapes), its kind, and where it comes from.
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
    """Count the collectives of one round in a compiled window's text.

    Those inside of the draft's loop run gamma times.
    """
    found: dict[str, tuple[int, int, int]] = {}
    for line in text.splitlines():
        match = INSTRUCTION.search(line)
        if match is None:
            continue
        times = gamma if "/draft/" in match["rest"] else 1
        shapes = SHAPE.findall(match["shape"])
        if match["start"] and match["kind"] != "all-reduce":
            shapes = shapes[len(shapes) // 2 :]  # operands stand before results
        size = sum(_shape_bytes(*shape) for shape in shapes)
        count, total, largest = found.get(match["kind"], (0, 0, 0))
        total, largest = total + times * size, max(largest, size)
        found[match["kind"]] = count + times, total, largest
    return tuple(Collective(kind, *found[kind]) for kind in sorted(found))


def weight_copies(text: str, shapes: set[tuple[int, ...]]) -> tuple[str, ...]:
    """Return the kernels of a compiled program that write an array of these shapes.

    Args:
      text: of the compiled module. shapes: with their dimensions sorted: a transposed
        copy is one.
    """
    inside = set(re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", text))
    found, name = [], ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = head[1]
        made = RESULT.match(line)
        if name in inside or made is None or made["kind"] in HANDED_ON:
            continue
        dims = tuple(sorted(int(size) for size in made["dims"].split(",")))
        # S(1) is memory on a TPU's chip: weights on their way into a product.
        if dims in shapes and "S(1)" not in made["layout"]:
            found.append(f"{made['kind']} {made['type']}[{made['dims']}]")
    return tuple(found)


def _shape_bytes(name: str, dims: str) -> int:
    bits = 8 if name == "pred" else int(re.sub(r"\D", "", name))
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8
