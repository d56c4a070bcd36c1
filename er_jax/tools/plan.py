"""Plans: whether a model fits a device, and what speculation is worth there.

The windows of rollouts are compiled ahead of time with the device's own compiler, from
shapes alone, without weights or hardware. Memory and collectives are those that the
compiler reports; the bytes that passes move are counted in the compiled programs
(`traffic`). Speed is not measured: `er-jax calibrate` does that on the device.

TPUs need the extra `tpu-plan`, NVIDIA GPUs `cuda-plan`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from er_jax import kv_cache, steps
from er_jax.acceptance import ACCEPT_RULES, AcceptRule
from er_jax.arguments import MOST_DRAFTS, check_chance, check_gammas, check_whole
from er_jax.control.estimate import PRIOR_KEEP
from er_jax.costs.timing import neutral_sampling
from er_jax.decoder import Decoder, DecoderConfig
from er_jax.devices import device_bytes
from er_jax.drafter import DrafterConfig, PolicyParams, attach_draft
from er_jax.engine.lowering import Lowering
from er_jax.engine.protocol import OneDevice
from er_jax.engine.windows import run_window
from er_jax.experts import NAMES, expected_touched
from er_jax.kernels import choice
from er_jax.mesh import layout, rules
from er_jax.tools.hlo import collectives, weight_copies
from er_jax.tools.needs import RESERVED_SHARE, Plan, ProgramCount, untouched_share
from er_jax.tools.presets import Target
from er_jax.tools.traffic import Sizes, count_window
from er_jax.types import Program, Span

GAMMA = 4


def plan(
    config: DecoderConfig,
    target: Target,
    *,
    slots: int,
    max_length: int,
    gammas: Sequence[int] = (0, GAMMA),
    drafter: DrafterConfig | None = None,
    accept: AcceptRule = "coupled",
    attention: str = "auto",
    model_parallel: int | None = None,
    keep: float = PRIOR_KEEP,
) -> Plan:
    """Compile a policy's windows for a target, and return what they need.

    Args:
      config: the decoder. target: the device. slots: rows on the whole mesh.
        max_length: cache positions of each row. gammas: programs to compile.
      drafter: how the draft is quantized, and the window that drafts see if it states
        one. accept: acceptance rule.
      attention: a `choice.AttentionChoice`. A kernel is taken for right: it cannot be
        run here.
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
    attending = choice.on_platform(attention, target.kind)
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
    params_bytes, draft_bytes = device_bytes(params.policy), device_bytes(params.draft)
    # An embedding table without a projection is not read as a whole. A draft pass also
    # reads the policy's vectors, which are not quantized.
    looked_up = 0 if config.tied_embeddings else device_bytes(params.policy["embed"])
    vectors = [x for x in jax.tree.leaves(params.policy) if len(x.shape) < 2]
    weight_bytes = (params_bytes - looked_up, draft_bytes + device_bytes(vectors))
    expert_bytes = _expert_bytes(params.policy), _expert_bytes(params.draft)
    rows = slots // data

    def read(which: int, positions: int) -> int:
        """Return the bytes of weights that a pass over a batch's tokens reads."""
        unread = untouched_share(config, rows * positions) * expert_bytes[which]
        return weight_bytes[which] - round(unread)

    cache_bytes = device_bytes(state.cache)
    # A window that the controller may choose is not planned for: it leaves it out where
    # there is no room for rings.
    span = None if None in drafter.spans else drafter.spans[0]
    if span is not None and span.head + span.window >= max_length:
        span = None
    vocab = config.vocab_size // (model if config.vocab_size % model == 0 else 1)
    programs = []
    for gamma in dict.fromkeys(gammas):
        used = params if gamma else PolicyParams(policy=params.policy, draft=None)
        lower = functools.partial(
            run_window.lower,
            policy, used, state, *settings, gamma=gamma, accept=accept, truncated=False,
            rounds_per_test=1 if target.kind == "cpu" else 4,
            span=span if gamma else None,
            layout=(
                layout.MeshLayout(mesh, attending)
                if chips > 1
                else OneDevice(attending)
            ),
        )  # fmt: skip
        lowering = Lowering(lower, used.draft, is_cuda=target.kind == "cuda")
        sizes = Sizes(
            vocab_sizes=(config.vocab_size, vocab),
            cache_length=max_length,
            weights=(read(0, gamma + 1), read(1, 1)),
            cache=(cache_bytes, _seen_bytes(state.cache, span)),
            entry=round(_seen_bytes(state.cache, Span(0, 1))),
            logits=rows * vocab * 4,
            gamma=gamma,
            ring_length=span.ring_length(gamma) if span and gamma else 0,
            slots=_ring_lengths(state.cache, span if gamma else None, gamma),
            touched=(_touched(config, rows * (gamma + 1)), _touched(config, rows)),
        )
        program = Program(slots, max_length, gamma).seeing(span if gamma else None)
        arguments = device_bytes((used, state))
        programs.append(_counted(program, lowering, arguments, weights, sizes))
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
        read_bytes=(read(0, 1), read(1, 1)),
        expert_bytes=expert_bytes,
        cache_bytes=cache_bytes // rows // max_length,
        keep=keep,
    )


def _counted(
    program: Program,
    lowering: Lowering,
    arguments: int,
    weights: set[tuple[int, ...]],
    sizes: Sizes,
) -> ProgramCount:
    """Compile a window and read what came out.

    Args:
      lowering: of the window. arguments: bytes of its arguments by their shapes.
      weights: shapes of the weights. sizes: what its passes must move.
    """
    start = time.perf_counter()
    try:
        compiled = lowering.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - start
        reason = f"the compiler refuses it: {str(error).splitlines()[0]}"
        return ProgramCount(
            program, seconds, arguments, 0, 0, 0, (), (), refusal=reason
        )
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    return ProgramCount(
        program=program,
        compile_s=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        collectives=collectives(text, program.gamma),
        weight_copies=weight_copies(text, weights),
        traffic=count_window(text, sizes),
    )


def _expert_bytes(params: Any) -> int:
    """Return the bytes on each device of the weights of experts, or of their draft."""
    layers = params["layers"]
    return device_bytes([[layer.get(name) for name in NAMES] for layer in layers])


def _touched(config: DecoderConfig, tokens: int) -> float:
    """Return how many experts of a layer a pass is expected to read."""
    if not config.num_experts:
        return 0
    return expected_touched(config.num_experts, config.experts_per_token, tokens)


def _seen_bytes(cache: Any, span: Span | None) -> int:
    """Return the bytes of the entries that queries of a span see; None is all of them.

    Of a layer with a window they see no more than that.
    """
    total = 0.0
    for leaf in jax.tree.leaves(cache, is_leaf=kv_cache.is_ring):
        slots = jax.tree.leaves(leaf)[0].shape[1]
        seen = slots
        if span is not None:
            seen = min(slots, span.head + span.window)
            if kv_cache.is_ring(leaf):
                seen = min(slots, leaf.span.window, span.window)
        total += device_bytes(leaf) / slots * seen
    return round(total)


def _ring_lengths(cache: Any, span: Span | None, gamma: int) -> frozenset[int]:
    """Return the slots of all rings: those of the state, and those of its drafts."""
    windows = {
        (leaf.span.window, leaf.entries.shape[1])
        for leaf in jax.tree.leaves(cache, is_leaf=kv_cache.is_ring)
        if kv_cache.is_ring(leaf)
    }
    found = {slots for _, slots in windows}
    if span is not None:
        found.add(span.ring_length(gamma))
        found |= {
            Span(0, min(window, span.window)).ring_length(gamma)
            for window, _ in windows
        }
    return frozenset(found)


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
