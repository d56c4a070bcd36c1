"""Rollouts on meshes of eight devices, which are eight times this CPU.

Everything that one device does is done: refill, compaction, growth, drafts; the tokens
have to be the same. The compiled windows are read for what they must not do.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import er_jax
from er_jax import devices, experts, kv_cache, steps
from er_jax.costs.timing import neutral_sampling
from er_jax.mesh import layout, rules
from er_jax.mesh.engine import MeshEngine
from er_jax.mesh.experts import mix_by_parts
from er_jax.mesh.topology import DataShards, rows_of_shards
from er_jax.request import request_of
from er_jax.scheduler.batch import Batch
from er_jax.tools import hlo
from er_jax.types import NONE, Program

pytestmark = pytest.mark.usefixtures("unoptimized_module")

CONFIG = er_jax.DecoderConfig(
    vocab_size=512, dim=64, num_layers=1, num_heads=8, num_kv_heads=4, hidden_dim=128,
    qkv_bias=True,
)  # fmt: skip
POLICY = er_jax.Decoder(CONFIG)
STOP = tuple(range(12))

SHAPES: dict[str, dict[str, int]] = {
    "8x1": dict(data=8, model=1),
    "4x2": dict(data=4, model=2),
    "2x4": dict(data=2, model=4),
    # Four key/value heads over eight devices: they lie whole.
    "1x8": dict(data=1, model=8),
    "fsdp 8": dict(fsdp=8),
    "fsdp 2x2x2": dict(data=2, fsdp=2, model=2),
}
# One mesh with all that may happen; the others are the same programs, sharded
# otherwise.
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name == "4x2" else pytest.mark.long)
    for name in SHAPES
]


def mesh_of(**sizes: int) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(*sizes.values()), tuple(sizes))


@functools.cache
def parameters() -> Any:
    return POLICY.init(jax.random.key(0))


def prompts(count: int = 9) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(12, 512, rng.integers(2, 60)).tolist() for _ in range(count)]


def config_of(**changes: Any) -> er_jax.RolloutConfig:
    """27 completions of up to 192 tokens in 16 rows: all that there is happens."""
    config = er_jax.RolloutConfig(
        max_new_tokens=192, n=3, max_slots=16, stop_token_ids=STOP,
        gammas=(0, 4), control="fixed:4",
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


class Moving(er_jax.Controller):
    """Takes the smallest programs, whatever they cost, so that everything happens.

    Args:
      is_shared: have all devices share the rows where they may, but for every fourth
        decision.
    """

    def __init__(self, control: str, gammas: Any, is_shared: bool = False) -> None:
        super().__init__(control, gammas)
        self.is_shared, self.count = is_shared, 0

    def choose(self, options: Any, current: Any, **known: Any) -> Program:
        if any(p.shared_rows for p in options):
            self.count += 1
        is_shared = self.is_shared and self.count % 4 > 0
        options = [p for p in options if p.shared_rows == is_shared] or options
        fewest = min(p.rows for p in options)
        # Rows go by halves: every size is a program to compile.
        kept = [p for p in options if current and p.rows == current.rows < 2 * fewest]
        smallest = kept or [p for p in options if p.rows == fewest]
        return min(smallest, key=lambda p: p.cache_length)


class Switching(Moving):
    """Drafts and does not by turns as well, in 16 rows and 8, joint or not."""

    def __init__(self, control: str, gammas: Any) -> None:
        super().__init__(control, gammas, is_shared=True)
        self.turn = 0

    def choose(self, options: Any, current: Any, **known: Any) -> Program:
        self.turn += 1
        gamma = self.gammas[self.turn % len(self.gammas)]
        options = [p for p in options if p.gamma == gamma and p.rows >= 8]
        return super().choose(options, current, **known)


def sample(
    mesh: Mesh | None, config: er_jax.RolloutConfig, controller: Any = None
) -> er_jax.Rollout:
    return er_jax.rollout(
        POLICY, parameters(), prompts(), key=jax.random.key(3), config=config,
        controller=controller or er_jax.Controller(config.control, config.gammas),
        mesh=mesh,
    )  # fmt: skip


@functools.cache
def on_one_device(control: str = "fixed:4") -> er_jax.Rollout:
    return sample(None, config_of(control=control))


def assert_same(found: er_jax.Rollout, wanted: er_jax.Rollout) -> None:
    np.testing.assert_array_equal(found.completion_ids, wanted.completion_ids)
    np.testing.assert_array_equal(found.finish_reason, wanted.finish_reason)
    np.testing.assert_array_equal(found.lengths, wanted.lengths)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_one_device(name: str) -> None:
    found = sample(mesh_of(**SHAPES[name]), config_of(), Moving("fixed:4", (0, 4)))
    assert_same(found, on_one_device())
    num_shards = SHAPES[name].get("data", 1)
    moments = found.stats.timeline
    assert {m.rows % num_shards for m in moments} == {0}
    rows, lengths = ([getattr(m, n) for m in moments] for n in ("rows", "cache_length"))
    assert num_shards == 8 or min(rows) < 16, "nothing was compacted"
    assert any(a < b for a, b in itertools.pairwise(lengths)), "the cache never grew"
    assert found.stats.num_prefilled >= 9


@pytest.mark.parametrize("name", NAMES)
def test_drafts_that_see_a_span_change_no_token(name: str) -> None:
    config = config_of(drafter=er_jax.DrafterConfig(window=40, head=5))
    found = sample(mesh_of(**SHAPES[name]), config, Moving("fixed:4", (0, 4)))
    assert_same(found, on_one_device())
    assert {moment.window for moment in found.stats.timeline} == {40}
    whole = on_one_device().stats.accepted[4]
    assert (found.stats.accepted[4] != whole).any(), "the span should hide something"


@pytest.mark.parametrize("name", [name for name in NAMES if "4x2" in name.values])
def test_what_ended_early_goes_on(name: str) -> None:
    """On a mesh, and what ended there on one device."""
    common: dict[str, Any] = {"key": jax.random.key(3), "config": config_of()}
    mesh = mesh_of(**SHAPES[name])
    part = er_jax.rollout(
        POLICY, parameters(), prompts(), mesh=mesh, **common,
        controller=Moving("fixed:4", (0, 4)), until=er_jax.Until(tokens=400),
    )  # fmt: skip
    assert {"unfinished", "stop"} <= set(part.finish_reason.tolist())
    found = er_jax.rollout(
        POLICY, parameters(), prompts(), mesh=mesh, resume=part, **common,
        controller=Moving("fixed:4", (0, 4)),
    )  # fmt: skip
    assert_same(found, on_one_device())
    found = er_jax.rollout(POLICY, parameters(), prompts(), resume=part, **common)
    assert_same(found, on_one_device())


class SecondDraft(Moving):
    """Runs the second of several drafts wherever it may."""

    def choose(self, options: Any, current: Any, **known: Any) -> Program:
        second = [program for program in options if program.draft == 1]
        return super().choose(second or options, current, **known)


@pytest.mark.parametrize("name", [name for name in NAMES if "4x2" in name.values])
def test_a_second_draft_changes_no_token(name: str) -> None:
    # JAX gives no CPU array the layout of 4-bit codes that a mesh demands.
    drafters = (er_jax.DrafterConfig(), er_jax.DrafterConfig(group_size=16))
    config = config_of(control="best", gammas=(0, 4), drafter=drafters)
    found = sample(mesh_of(**SHAPES[name]), config, SecondDraft("best", (0, 4)))
    assert_same(found, on_one_device())
    assert 1 in {moment.draft for moment in found.stats.timeline}


@pytest.mark.parametrize(
    "name",
    [
        # Most of CI's time would go to compiling all of them.
        pytest.param("8x1", marks=pytest.mark.long),
        pytest.param("4x2", marks=pytest.mark.slow),
        pytest.param("2x4", marks=pytest.mark.long),
        pytest.param("fsdp 2x2x2", marks=pytest.mark.long),
    ],
)
def test_data_shards_become_one_for_the_last_rows(name: str) -> None:
    controller = Moving("fixed:4", (0, 4), is_shared=True)
    found = sample(mesh_of(**SHAPES[name]), config_of(), controller)
    assert_same(found, on_one_device())
    is_shared = [moment.shared_rows for moment in found.stats.timeline]
    assert (True, False) in itertools.pairwise(is_shared), "never went apart again"
    assert any(m.shared_rows and m.rows < 8 for m in found.stats.timeline)
    assert "rows shared by all devices" in found.stats.summary()


@pytest.mark.slow
def test_short_completions_are_those_of_one_device() -> None:
    config = config_of(max_new_tokens=20)
    mesh = mesh_of(data=4, model=2)
    wanted = sample(None, config)
    assert_same(sample(mesh, config), wanted)


@pytest.mark.slow
def test_windows_and_experts_on_a_mesh() -> None:
    """Rings go past their ends; each device has a part of every expert."""
    config = dataclasses.replace(
        CONFIG, num_layers=2, window=6, global_layers=(1,), num_experts=4,
        experts_per_token=2, expert_dim=32,
    )  # fmt: skip
    policy = er_jax.Decoder(config)
    params = policy.init(jax.random.key(0))
    settings = config_of(max_new_tokens=80, max_slots=8, n=2)
    wanted, found = (
        er_jax.rollout(
            policy, params, prompts(), key=jax.random.key(3), config=settings, mesh=mesh
        )
        for mesh in (None, mesh_of(data=2, model=4))
    )
    assert wanted.lengths.max() > 60
    assert_same(found, wanted)


@pytest.mark.parametrize("group_size", [None, 4])
def test_experts_in_parts_are_summed_once(group_size: int | None) -> None:
    """The result is that of one device, and no sum stands in the loop."""
    rng = np.random.default_rng(0)
    shapes = [(6, 16, 32), (6, 16, 32), (6, 32, 16)]
    floats = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    config = er_jax.DrafterConfig(group_size=group_size, act_bits=16)
    quantized = er_jax.quantize(dict(zip("abc", floats, strict=True)), config)
    x = jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)
    shares = jnp.asarray(rng.random((5, 6)) * (rng.random((5, 6)) < 0.4), jnp.float32)
    mesh = layout.rollout_mesh(mesh_of(data=1, model=8))
    weights: Any
    for weights in (floats, tuple(quantized.values())):

        def run(weights: Any) -> jax.Array:
            return mix_by_parts(x, shares, weights, jax.nn.silu, 2)

        with jax.set_mesh(mesh):
            compiled = jax.jit(run).lower(weights).compile()
            found = compiled(weights)
        wanted = experts.mix_whole(x, shares, weights, jax.nn.silu, 2)
        np.testing.assert_allclose(found, wanted, atol=2e-4)
        text = compiled.as_text() or ""
        assert text.count(" all-reduce(") == 1
        (line,) = [one for one in text.splitlines() if " all-reduce(" in one]
        assert "while/body" not in line


@functools.cache
def window_text(name: str, gamma: int) -> tuple[str, Any, int]:
    """The compiled window of 16 rows; its memory; the bytes of its state."""
    mesh = layout.rollout_mesh(mesh_of(**SHAPES[name]))
    engine = MeshEngine(POLICY, "coupled", mesh)
    sharded = layout.put_on_mesh(POLICY, parameters(), mesh)
    params = engine.attach_draft(sharded, er_jax.DrafterConfig())
    state = engine.allocate(16, 256)
    num_bytes = devices.device_bytes(state)
    state, window = engine.start_window(
        params, state, neutral_sampling(), gamma, exit_live=0, max_rounds=1
    )
    window.wait()
    (compiled,) = (p for name, p in engine.compiled.items() if name[0] == "window")
    call: Any = compiled.call
    return call.as_text(), call.memory_analysis(), num_bytes


@pytest.mark.parametrize("gamma", [pytest.param(0, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", ["2x4"])
def test_windows_gather_neither_weights_nor_cache(name: str, gamma: int) -> None:
    check_window(name, gamma)


@pytest.mark.parametrize("name", NAMES)
def test_no_window_gathers_weights_or_cache(name: str) -> None:
    check_window(name, 4)  # drafts and verification: both kinds of pass


def check_window(name: str, gamma: int) -> None:
    text, memory, state_bytes = window_text(name, gamma)
    sizes = {"data": 1, "model": 1, **SHAPES[name]}
    rows = 16 // sizes["data"]
    found = {c.kind: c for c in hlo.collectives(text, gamma)}
    # What may be gathered: a number of every row and position from each device.
    assert "all-gather" in found, "the host is told of all rows"
    numbers = max(rows * (gamma + 1) * 8, 3 * 16)
    assert found["all-gather"].largest_bytes <= 4 * numbers
    assert not re.search(r"= s[48]\[\S+ all-gather", text), "codes are gathered"
    # Sums are of activations, over the vocabulary at most: never of scores or entries.
    widest = 2 * max(CONFIG.vocab_size, CONFIG.hidden_dim) * rows * (gamma + 1) * 4
    for collective in found.values():
        assert collective.largest_bytes <= widest
    assert not {"all-to-all", "collective-permute"} & set(found)
    assert memory.alias_size_in_bytes == state_bytes, "the state is not given in place"


def test_sharded_heads_are_not_summed() -> None:
    """Left alone, a merged query over sharded heads costs a sum of all scores."""
    text, _, _ = window_text("2x4", 0)
    found = {c.kind: c for c in hlo.collectives(text, 0)}
    scores = 16 // 2 * CONFIG.num_heads * 256 * 4
    assert found["all-reduce"].largest_bytes < scores


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "model"),
    # Sharded alike; one head each; groups wider than a shard; not aligned; not sharded.
    [(8, 4, 4), (8, 4, 8), (8, 2, 4), (12, 4, 6), (6, 2, 4)],
)
def test_attention_over_sharded_heads(
    heads: int, kv_heads: int, model: int, queries: int
) -> None:
    rng = np.random.default_rng(0)
    size, length = 8, 32
    query = rng.normal(size=(2, queries, heads, size)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, length, kv_heads * size)).astype(np.float32)
    positions = np.tile(np.arange(queries, dtype=np.int32), (2, 1))
    positions[1] = np.where(positions[1] > 5, -1, positions[1] + 7)
    devices = np.array(jax.devices()[:model]).reshape(1, model)
    mesh = layout.rollout_mesh(Mesh(devices, ("data", "model")))
    run = layout.MeshLayout(mesh).over_rows(kv_cache.attend, ("rows",) * 4, "rows")
    wanted = jax.jit(kv_cache.attend)(query, keys, values, positions)
    found = jax.jit(run)(query, keys, values, positions)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("moved", [False, True], ids=["resized", "moved"])
def test_rows_move_between_data_shards(moved: bool) -> None:
    """Every entry of a row arrives, whatever data shard it goes to."""
    mesh = layout.rollout_mesh(mesh_of(data=4, model=2))
    engine = MeshEngine(POLICY, "coupled", mesh)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: steps.empty_state(POLICY, 16, 32))

    def random(x: Any) -> np.ndarray:
        if x.dtype == bool:
            return rng.random(x.shape) < 0.5
        return rng.integers(0, 99, x.shape).astype(x.dtype)

    state = jax.tree.map(random, shapes)
    rows = np.array(
        [5, 1, NONE, 2, 15, NONE, 0, 9] if moved else [0, 1, 4, 7, 8, 9, 13, NONE]
    )
    found = engine.take(state, rows, 64)
    is_some = rows != NONE

    def check(old: np.ndarray, new: jax.Array) -> None:
        array = np.asarray(new)
        part = array[:, :32] if array.ndim > 1 else array
        np.testing.assert_array_equal(part[is_some], old[rows[is_some]])
        if array.ndim > 1:
            assert not array[is_some, 32:].any()

    jax.tree.map(check, state, found)
    assert not np.asarray(found.live)[~is_some].any()
    assert (np.asarray(found.sequence_id)[~is_some] == NONE).all()
    assert found.cache[0]["keys"].sharding.spec == PartitionSpec("data", None, "model")


@pytest.mark.parametrize("name", ["4x2", "fsdp 2x2x2"])
def test_data_shards_become_one_without_sending_weights(name: str) -> None:
    mesh = layout.rollout_mesh(mesh_of(**SHAPES[name]))
    policy = er_jax.Decoder(dataclasses.replace(CONFIG, num_kv_heads=8))
    engine = MeshEngine(policy, "coupled", mesh)
    sharded = layout.put_on_mesh(policy, policy.init(jax.random.key(0)), mesh)
    params = engine.attach_draft(sharded, er_jax.DrafterConfig())
    joint = engine.params_to_shared_rows(params)
    assert devices.device_bytes(joint) < 0.6 * devices.device_bytes(params)
    jax.tree.map(np.testing.assert_array_equal, joint, params)
    (found,) = (
        p for n, p in engine.compiled.items() if n[0] == "params to shared rows"
    )
    call: Any = found.call
    assert not hlo.collectives(call.as_text(), 0)
    # Every device had its part before.
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(joint), strict=True):
        held = old.sharding.devices_indices_map(old.shape)
        for device, part in new.sharding.devices_indices_map(new.shape).items():
            for mine, his in zip(part, held[device], strict=True):
                inner, outer = (range(1 << 20)[x] for x in (mine, his))
                assert inner[0] >= outer[0] and inner[-1] <= outer[-1]


def test_a_state_is_the_same_in_data_shards_and_shared() -> None:
    mesh = layout.rollout_mesh(mesh_of(data=2, model=4))
    policy = er_jax.Decoder(dataclasses.replace(CONFIG, num_kv_heads=8))
    engine = MeshEngine(policy, "coupled", mesh)
    state = jax.tree.map(
        lambda x: np.arange(x.size).reshape(x.shape).astype(x.dtype),
        jax.eval_shape(lambda: steps.empty_state(policy, 4, 16)),
    )
    joint = engine.to_shared_rows(state)
    jax.tree.map(np.testing.assert_array_equal, joint, state)
    keys = joint.cache[0]["keys"]
    assert keys.sharding.spec == PartitionSpec("data", None, "model")
    assert keys.sharding.shard_shape(keys.shape) == (4, 16, 8), "one head a device"
    again = engine.to_data_shards(
        engine.for_shared_rows.take(joint, np.array([2, NONE]), 32)
    )
    np.testing.assert_array_equal(again.cache[0]["keys"][0, :16], keys[2])
    assert again.tokens.sharding.shard_shape(again.tokens.shape) == (1, 32)


@pytest.mark.parametrize("is_room", [False, True])
def test_data_shards_become_one_where_there_is_memory(is_room: bool) -> None:
    """A part of the weights is held twice then."""
    mesh = layout.rollout_mesh(mesh_of(data=2, model=4))
    engine = MeshEngine(POLICY, "coupled", mesh)
    sharded = layout.put_on_mesh(POLICY, parameters(), mesh)
    params = er_jax.PolicyParams(policy=sharded, draft=None)
    ids = np.arange(4)
    request = request_of([np.array([1, 2])] * 4, ids, config_of(n=1), num_shards=2)
    weights = devices.device_bytes(engine.shared_rows_params(params))
    assert weights < 0.7 * devices.device_bytes(sharded)
    # The least is one row, all its heads on every device, as short as can be and then
    # grown.
    lengths = (request.cache_lengths[0], request.cache_lengths[-1])
    least = weights + sum(map(engine.for_shared_rows.row_bytes, lengths))
    limit = int(least) + (1 if is_room else -1)
    request = dataclasses.replace(request, state_limit_bytes=limit)
    stats = er_jax.RolloutStats()
    topology = DataShards(engine, params, request)
    batch = Batch(topology, request, stats, neutral_sampling())
    batch.queue.clear()
    batch.rows.sequence[:1] = 0
    batch.rows.limit[:1] = batch.rows.length[:1] = 8
    found = {program.shared_rows for program in batch.options((0,))}
    assert found == ({False, True} if is_room else {False})


def test_rows_stay_where_there_is_room() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        num_shards = int(rng.choice([1, 2, 4]))
        old, new = (
            num_shards * int(rng.integers(1, 9)),
            num_shards * int(rng.integers(1, 9)),
        )
        count = int(rng.integers(0, min(old, new) + 1))
        keep = np.sort(rng.choice(old, count, replace=False))
        index = rows_of_shards(keep, old, new, num_shards)
        assert index.shape == (new,)
        assert sorted(index[index != NONE]) == keep.tolist()
        shard = np.arange(new) // (new // num_shards)
        stays = [
            k // (old // num_shards) == g for k, g in zip(index, shard, strict=True)
        ]
        # A row leaves its shard only if that has more of them than it may keep.
        own = np.bincount(keep // (old // num_shards), minlength=num_shards)
        wanted = int(np.minimum(own, new // num_shards).sum())
        assert sum(s for s, k in zip(stays, index, strict=True) if k != NONE) == wanted


def test_a_mesh_may_have_other_names() -> None:
    other = Mesh(np.array(jax.devices()).reshape(4, 2), ("replica", "tensor"))
    axes = rules.MeshAxes(data="replica", model="tensor")
    with pytest.raises(ValueError, match=r"'replica'.*mesh\.rollout_mesh"):
        layout.rollout_mesh(other)
    mesh = layout.rollout_mesh(other, axes)
    assert dict(mesh.shape) == {"data": 4, "model": 2, "fsdp": 1}
    assert layout.rollout_mesh(mesh) == mesh
    where = rules.param_shardings(parameters(), CONFIG, other, axes)
    sharded = jax.device_put(parameters(), where)
    assert layout.put_on_mesh(POLICY, sharded, mesh) is sharded
    config = config_of(max_new_tokens=4, control="ar")
    out = er_jax.rollout(
        POLICY, sharded, prompts(), key=jax.random.key(3), config=config, mesh=mesh
    )
    assert_same(out, sample(None, config))


def test_wrong_places_are_refused() -> None:
    mesh = layout.rollout_mesh(mesh_of(data=4, model=2))
    sharded = layout.put_on_mesh(POLICY, parameters(), mesh)
    half = {**sharded, "final_norm": parameters()["final_norm"]}
    with pytest.raises(ValueError, match="final_norm does not lie on the mesh"):
        layout.put_on_mesh(POLICY, half, mesh)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spread = {**sharded, "embed": jax.device_put(sharded["embed"], rows)}
    with pytest.raises(ValueError, match="embed is sharded over the axis 'data'"):
        layout.put_on_mesh(POLICY, spread, mesh)

    class Other:
        vocab_size = 8

    with pytest.raises(ValueError, match="for a Other no rules"):
        layout.put_on_mesh(Other(), parameters(), mesh)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not divide layers/0/down_proj"):
        policy = er_jax.Decoder(dataclasses.replace(CONFIG, hidden_dim=129))
        layout.put_on_mesh(policy, policy.init(jax.random.key(0)), mesh)


def test_a_draft_lies_as_its_policy() -> None:
    mesh = layout.rollout_mesh(mesh_of(data=2, fsdp=2, model=2))
    engine = MeshEngine(POLICY, "coupled", mesh)
    sharded = layout.put_on_mesh(POLICY, parameters(), mesh)
    params = engine.attach_draft(sharded, er_jax.DrafterConfig(bits=4, group_size=16))
    codes = params.draft["layers"][0]["down_proj"].codes
    assert codes.sharding.spec == PartitionSpec("fsdp", "model", None)
    params = engine.attach_draft(sharded, er_jax.DrafterConfig())
    codes = params.draft["layers"][0]["down_proj"].codes
    assert codes.sharding.spec == PartitionSpec("fsdp", "model")
    assert layout.put_on_mesh(POLICY, params, mesh) is params
