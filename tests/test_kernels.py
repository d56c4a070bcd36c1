"""Kernels of attention: interpreted against a float64 oracle, compiled for devices that
are not here where their compilers are installed, and refused where they are wrong.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import er_jax
from er_jax import attention
from er_jax.engine import first_use
from er_jax.engine.engine import Engine
from er_jax.engine.kept import engine_for
from er_jax.engine.protocol import OneDevice
from er_jax.kernels import choice, cuda, tpu
from er_jax.mesh import engine as mesh_engine
from er_jax.mesh import layout
from er_jax.tools import plan, presets
from tests.test_kv_cache import attend_oracle, normal

# Entries of a block, and of a cache that ends within its third block.
BLOCK, S = 128, 272


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, unoptimized: None) -> Iterator[None]:
    """Make the kernel for TPUs that of the CPU, interpreted, with small blocks.

    What interprets it runs without XLA's optimizer: no device runs the kernel so.
    """
    kernel = types.SimpleNamespace(
        refusal=tpu.refusal, attend=functools.partial(tpu.attend, interpret=True)
    )
    monkeypatch.setitem(choice.KERNELS, "cpu", kernel)
    monkeypatch.setattr(tpu, "BLOCK_BYTES", 1)
    monkeypatch.setattr(first_use, "_found", {})
    yield


def attend(*arrays: Any) -> np.ndarray:
    """Attend as a program does that uses the interpreted kernel."""
    out = jax.jit(choice.traced_with("cpu", attention.attend))(*arrays)
    return np.asarray(out, np.float32)


def case(
    queries: int, heads: int, kv_heads: int, size: int, dtype: Any = np.float32
) -> list[Any]:
    """Return queries, keys, values of four rows, rounded to a dtype, and positions."""
    arrays = [
        normal(4, queries, heads, size),
        *(normal(4, S, kv_heads * size, seed=seed) for seed in (1, 2)),
    ]
    positions = np.random.default_rng(3).integers(-1, S, (4, queries))
    # Bounds of blocks, the ends of the cache, and rows of padding or little else.
    edges = [BLOCK - 1, BLOCK, BLOCK + 1, 0, S - 1, 2 * BLOCK - 1, 2 * BLOCK]
    positions[0] = np.resize(edges, queries)
    positions[1] = np.resize(edges[1:], queries)
    positions[2] = -1
    positions[3] = np.where(np.arange(queries) == 0, BLOCK - 1, positions[3])
    return [*(jnp.asarray(x, dtype) for x in arrays), positions.astype(np.int32)]


def in_float64(arrays: list[Any]) -> np.ndarray:
    wide = [np.asarray(x, np.float64) for x in arrays[:3]]
    return attend_oracle(wide[0], wide[1], wide[2], arrays[3])


@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads", "size"),
    [
        (1, 4, 2, 128), (5, 7, 1, 128), (16, 4, 4, 128), (3, 2, 1, 256),
        (1, 8, 4, 64), (5, 4, 2, 64), (9, 8, 8, 32), (2, 6, 2, 128),
    ],
)  # fmt: skip
def test_the_kernel_equals_the_oracle(
    queries: int, heads: int, kv_heads: int, size: int, interpreted: None
) -> None:
    arrays = case(queries, heads, kv_heads, size)
    assert tpu.refusal(*arrays) is None
    out = attend(*arrays)
    np.testing.assert_allclose(out, in_float64(arrays), rtol=0, atol=3e-6)
    assert (out[arrays[3] < 0] == 0).all()  # padding sees nothing


def test_the_kernel_rounds_weights_of_bfloat16_only(interpreted: None) -> None:
    arrays = case(5, 4, 2, 128, jnp.bfloat16)
    out = attend(*arrays)
    np.testing.assert_allclose(out, in_float64(arrays), rtol=0, atol=0.02)


def test_blocks_behind_the_last_seen_entry_are_not_met(interpreted: None) -> None:
    """Not even where they hold what is no number: they are not fetched."""
    arrays = case(3, 4, 2, 128)
    arrays[3] = np.array([[3, 9, -1]] * 2 + [[BLOCK - 1] * 3] * 2, np.int32)
    clean = attend(*arrays)
    dirty = [x.at[:, BLOCK:].set(jnp.nan) for x in arrays[1:3]]
    np.testing.assert_array_equal(attend(arrays[0], *dirty, arrays[3]), clean)


@pytest.mark.parametrize(
    ("size", "junk", "where"),
    [(128, -np.inf, 1), (128, np.nan, 2), (64, np.inf, 2), (64, np.nan, 1)],
)
def test_what_is_not_finite_makes_no_wrong_number(
    size: int, junk: float, where: int, interpreted: None
) -> None:
    """Who sees it is NaN; who does not is right, or NaN; other rows do not change."""
    arrays = case(4, 4, 2, size)
    arrays[3] = np.array(
        [[200, 201, 202, -1], [200, 199, 20, 270], [5, 6, 7, 8], [-1, -1, 3, 4]],
        np.int32,
    )
    # Scores of a key with -inf are -inf, those with +inf greater than all others.
    arrays[0] = jnp.abs(arrays[0])
    clean = attend(*arrays)
    # One number of one head: seen by some of row 1, and in row 2 by none.
    arrays[where] = arrays[where].at[1, 200, 7].set(junk).at[2, 9, 7].set(junk)
    out, positions = attend(*arrays), arrays[3]
    np.testing.assert_array_equal(out[[0, 3]], clean[[0, 3]])
    sees = positions[1] >= 200
    assert np.isnan(out[1][sees]).all()
    others = np.concatenate([out[1][~sees], out[2]])
    wanted = np.concatenate([clean[1][~sees], clean[2]])
    is_nan = np.isnan(others)
    np.testing.assert_array_equal(others[~is_nan], wanted[~is_nan])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "length", "dtype", "reason"),
    [
        (4, 2, 128, 272, np.float16, "float16 is not bfloat16"),
        (4, 2, 96, 272, np.float32, "do not fill lines"),
        (4, 1, 64, 272, np.float32, "do not fill lines"),
        (4, 2, 128, 270, np.float32, "not whole tiles"),
        (64, 64, 256, 272, np.float32, "on chip"),
    ],
)
def test_the_kernel_for_tpus_refuses_what_it_does_not_take(
    heads: int, kv_heads: int, size: int, length: int, dtype: Any, reason: str
) -> None:
    refused = tpu.refusal(*shapes(3, 16, heads, kv_heads, size, length, dtype))
    assert refused is not None and reason in refused


def shapes(
    rows: int,
    queries: int,
    heads: int,
    kv_heads: int,
    size: int,
    length: int,
    dtype: Any,
    shardings: Any = (None,) * 4,
) -> list[Any]:
    entries = (rows, length, kv_heads * size)
    sizes = ((rows, queries, heads, size), entries, entries, (rows, queries))
    dtypes = (dtype, dtype, dtype, jnp.int32)
    return [
        jax.ShapeDtypeStruct(shape, kind, sharding=sharding)
        for shape, kind, sharding in zip(sizes, dtypes, shardings, strict=True)
    ]


def test_the_kernel_for_gpus_refuses_what_it_does_not_take() -> None:
    for size, dtype, reason in (
        (128, np.float32, "16 bits"),
        (256, jnp.bfloat16, "heads of 256"),
        (100, jnp.bfloat16, "heads of 100"),
    ):
        refused = cuda.refusal(*shapes(3, 5, 4, 2, size, 256, dtype))
        assert refused is not None and reason in refused


@pytest.mark.parametrize("queries", [1, 5])
def test_the_kernel_for_gpus_asks_for_attention(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it asks of cuDNN, answered by XLA, is attention; -inf in a key shows."""
    asked = jax.nn.dot_product_attention

    def answered(*arrays: Any, implementation: str, **settings: Any) -> jax.Array:
        assert implementation == "cudnn"
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return asked(*arrays, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answered)
    arrays = case(queries, 8, 2, 64)
    arrays[3] = np.maximum(arrays[3], 3)
    arrays[3][3, 1:] = -1
    monkeypatch.setattr(cuda, "refusal", lambda *arrays: None)
    run = jax.jit(choice.traced_with("cuda", attention.attend))
    out = np.asarray(run(*arrays))
    np.testing.assert_allclose(out, in_float64(arrays), rtol=0, atol=3e-6)
    # A key against which all queries of its head have a negative product.
    at = int(arrays[3][1].min())
    arrays[1] = arrays[1].at[1, at, 0].set(-jnp.inf)
    arrays[0] = jnp.abs(arrays[0])
    out = np.asarray(run(*arrays))
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2, 3]]).all()


# -- the choice ------------------------------------------------------------------------


def test_nothing_changes_where_there_is_no_kernel() -> None:
    device = jax.devices("cpu")[0]
    for wanted in ("auto", "xla"):
        assert first_use.implementation(wanted, device) == choice.XLA
    assert choice.on_platform("auto", "rocm") == choice.XLA
    assert choice.on_platform("auto", "cuda") == "cuda"
    with pytest.raises(ValueError, match=r"attention='kernel' .* cpu has none"):
        first_use.implementation("kernel", device)

    def function() -> None:
        """Nothing."""

    assert OneDevice().over_rows(function, (), ()) is function
    assert OneDevice().name == "one device"
    assert OneDevice("tpu").name == "one device, kernel for tpu"


POLICY = er_jax.Decoder(
    er_jax.DecoderConfig(
        vocab_size=64, dim=64, num_layers=1, num_heads=2, num_kv_heads=1,
        head_dim=128, hidden_dim=64,
    )
)  # fmt: skip


@pytest.mark.slow
def test_a_rollout_with_a_kernel(interpreted: None) -> None:
    """The same tokens; other programs, and other costs."""
    params = POLICY.init(jax.random.key(0))

    def sampled(wanted: Any) -> Any:
        config = er_jax.RolloutConfig(
            max_new_tokens=6, control="fixed:2", attention=wanted
        )
        return er_jax.rollout(
            POLICY, params, [[1, 2], [3]], key=jax.random.key(1), config=config
        )

    plain, found = sampled("xla"), sampled("kernel")
    np.testing.assert_array_equal(found.completion_ids, plain.completion_ids)
    np.testing.assert_allclose(found.logprobs, plain.logprobs, rtol=0, atol=1e-4)
    one, other = (engine_for(POLICY, params, "coupled", w) for w in ("xla", "kernel"))
    assert one is not other
    assert (one.layout.name, other.layout.name) == (
        "one device", "one device, kernel for cpu",
    )  # fmt: skip


def test_what_a_kernel_does_not_take_is_logged_once(
    interpreted: None, caplog: pytest.LogCaptureFixture
) -> None:
    choice._explain.cache_clear()
    arrays = case(3, 4, 2, 64)
    arrays[1:3] = [x[:, :200] for x in arrays[1:3]]
    arrays[3] = np.minimum(arrays[3], 199)
    with caplog.at_level(logging.INFO, "er_jax"):
        out = [attend(*arrays) for _ in range(2)]
    np.testing.assert_allclose(out[0], in_float64(arrays), rtol=0, atol=3e-6)
    (line,) = caplog.messages
    assert "not by the kernel for cpu: 200 entries are not whole tiles" in line


def broken(attend: Callable[..., Any], how: str) -> Callable[..., Any]:
    """Return a kernel with a mistake."""

    def run(query: Any, keys: Any, values: Any, positions: Any) -> Any:
        if how == "raises":
            raise NotImplementedError("no such instruction")
        if how == "sees one entry more":
            positions = jnp.where(positions < 0, positions, positions + 1)
        if how == "sees one entry less":
            positions = positions - 1
        if how == "hides what is not finite":
            return jnp.nan_to_num(attend(query, keys, values, positions))
        if how == "mixes heads":
            query = query[:, :, ::-1]
        return attend(query, keys, values, positions)

    return run


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "NotImplementedError: no such instruction"),
        ("sees one entry more", "it differs from XLA's by"),
        ("sees one entry less", "it differs from XLA's by"),
        ("mixes heads", "it differs from XLA's by"),
        ("hides what is not finite", "does not show in its result"),
    ],
)
def test_a_kernel_that_is_wrong_is_not_used(
    how: str, said: str, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = choice.KERNELS["cpu"]
    kernel.attend = broken(kernel.attend, how)
    device = jax.devices("cpu")[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = first_use.implementation("auto", device)
    assert found == choice.XLA
    (warned,) = caught
    assert warned.category is RuntimeWarning and said in str(warned.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once in a process
        assert Engine(POLICY, "coupled").layout.attention == choice.XLA
    with pytest.raises(ValueError, match=r"attention='kernel', and .* fails on this"):
        first_use.implementation("kernel", device)


def test_a_kernel_is_compared_once(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def problem(name: str, device: jax.Device) -> None:
        asked.append(name)

    monkeypatch.setattr(first_use, "_problem", problem)
    device = jax.devices("cpu")[0]
    for _ in range(2):
        assert first_use.implementation("auto", device) == "cpu"
    assert asked == ["cpu"]


def test_a_right_kernel_passes_at_its_real_block(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tpu, "BLOCK_BYTES", 2**19)
    device = jax.devices("cpu")[0]
    assert first_use.implementation("kernel", device) == "cpu"


# -- on a mesh, and for devices that are not here --------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "axes"),
    [
        (4, 2, {"data": 2, "model": 2}),  # sharded alike
        (4, 1, {"data": 1, "model": 2}),  # replicated entries
        (3, 1, {"data": 1, "model": 2}),  # not sharded
        (4, 2, {"data": 2, "fsdp": 2, "model": 1}),
    ],
)
def test_a_kernel_on_a_mesh(
    heads: int, kv_heads: int, axes: dict[str, int], interpreted: None
) -> None:
    arrays = case(3, heads, kv_heads, 128)
    devices = np.array(jax.devices()[: np.prod([*axes.values()])])
    mesh = layout.rollout_mesh(Mesh(devices.reshape(*axes.values()), tuple(axes)))
    run = layout.MeshLayout(mesh, "cpu").over_rows(
        attention.attend, ("rows",) * 4, "rows"
    )
    found = np.asarray(jax.jit(run)(*arrays))
    np.testing.assert_allclose(found, in_float64(arrays), rtol=0, atol=3e-6)


class Told:
    """An agreement in which other processes refuse a kernel, or fail."""

    def __init__(self, refusals: int, failure: Exception | None = None) -> None:
        self.refusals, self.failure = refusals, failure

    def sync_or_raise(self, values: Any, failure: Any = None) -> tuple[Any, Any]:
        return values, failure or self.failure

    def sum(self, own: np.ndarray) -> np.ndarray:
        return own + self.refusals


def test_a_kernel_that_one_process_refuses_none_uses(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = layout.rollout_mesh(Mesh(np.array(jax.devices()[:2]), ("data",)))
    kind = jax.devices()[0].device_kind

    def used(wanted: str, told: Any) -> str:
        return mesh_engine._implementation(wanted, mesh, told)

    monkeypatch.setattr(first_use, "_found", {("cpu", kind): None})
    assert used("auto", Told(0)) == "cpu"
    assert used("auto", Told(1)) == used("xla", Told(0)) == choice.XLA
    assert mesh_engine.MeshEngine(POLICY, "coupled", mesh).layout.attention == "cpu"
    with pytest.raises(RuntimeError, match="another process"):
        used("auto", Told(0, RuntimeError("another process has failed")))
    monkeypatch.setattr(first_use, "_found", {("cpu", kind): "it differs"})
    with pytest.raises(ValueError, match="fails on this"):
        used("kernel", Told(0))


def needs(device: str) -> presets.Target:
    """Return a device to compile for; skip the test without its compiler."""
    module = "libtpu" if ":" in device else "jax_cuda12_plugin"
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"the compiler for {device} is not installed")
    return presets.target_of(device)


def scores_in_memory(text: str, rows: int, length: int) -> list[str]:
    """Return the float32 arrays that have rows, entries and a third axis."""
    arrays = re.findall(r"f32\[([\d,]+)\]", text)
    return [dims for dims in arrays if {str(rows), str(length)} < {*dims.split(",")}]


@pytest.mark.parametrize("device", ["v5p:2x2x1", "v5e:2x2", "v6e:2x2", "h100"])
@pytest.mark.parametrize(("queries", "size"), [(1, 128), (9, 64)])
def test_compiled_kernels_write_no_scores(device: str, queries: int, size: int) -> None:
    target = needs(device)
    sharding = SingleDeviceSharding(target.devices[0])
    arrays = shapes(6, queries, 8, 2, size, 1088, jnp.bfloat16, (sharding,) * 4)

    def run(*arrays: Any) -> jax.Array:
        with choice.using(target.kind):
            if choice.kernel_for(*arrays) is None:
                pytest.skip(f"no kernel here: {cuda.refusal(*arrays)}")
            return attention.attend(*arrays)

    text = jax.jit(run).lower(*arrays).compile().as_text() or ""
    assert "custom-call" in text
    assert scores_in_memory(text, 6, 1088) == []
    plain = jax.jit(attention.attend).lower(*arrays).compile().as_text() or ""
    assert scores_in_memory(plain, 6, 1088) or queries == 1


@pytest.mark.parametrize("device", ["v5p:2x2x1", "h100:4"])
def test_a_kernel_compiles_on_a_mesh(device: str) -> None:
    """All axes are mapped around it, by a mesh of two times two devices."""
    target = needs(device)
    mesh = layout.rollout_mesh(
        Mesh(np.array(target.devices[:4]).reshape(2, 2), ("data", "model"))
    )
    spread = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    arrays = shapes(4, 5, 8, 2, 128, 1088, jnp.bfloat16, (spread, spread, spread, rows))
    run = layout.MeshLayout(mesh, target.kind).over_rows(
        attention.attend, ("rows",) * 4, "rows"
    )
    text = jax.jit(run).lower(*arrays).compile().as_text() or ""
    assert "custom-call" in text and "all-gather" not in text


def test_a_window_for_a_mesh_of_tpus_has_the_kernel() -> None:
    config = er_jax.DecoderConfig(
        vocab_size=512, dim=256, num_layers=1, num_heads=4, num_kv_heads=2,
        head_dim=128, hidden_dim=256, dtype="bfloat16",
    )  # fmt: skip
    target, counts = needs("v5p:2x2x1"), {}
    for wanted in ("xla", "auto"):
        found = plan.plan(
            config, target, slots=64, max_length=8192, gammas=(4,), model_parallel=2,
            attention=wanted,
        )  # fmt: skip
        assert found.programs[0].traffic is not None
        counts[wanted] = found.programs[0].traffic.target.num_bytes
    assert counts["auto"].get("scores", 0) < counts["xla"]["scores"] / 10
