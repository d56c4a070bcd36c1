"""What XLA is told about windows for NVIDIA GPUs, and what it makes of it.

The last test compiles for a GPU that is not here, where the compiler is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from er_jax import drafter
from er_jax.costs.timing import neutral_sampling
from er_jax.devices import is_cuda
from er_jax.drafter import DrafterConfig, PolicyParams
from er_jax.engine import lowering, windows
from er_jax.engine.engine import Engine
from er_jax.engine.lowering import SCALES_INSIDE, WHOLE_SUMS, Lowering
from er_jax.tools import plan, presets
from tests.small import POLICY, SIZES, small_policy

DRAFTS = {
    "int8": DrafterConfig(),
    "int4": DrafterConfig(bits=4),
    "int4 in groups": DrafterConfig(bits=4, group_size=128),
    "int4 in groups, head of 8": DrafterConfig(
        bits=4, group_size=128, projection_bits=8
    ),
}


class Compiler:
    """Lowers and compiles nothing; remembers what it was asked, and may refuse it."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.asked: list[tuple[bool, dict[str, Any] | None]] = []

    def lower(self, *, scales_inside: bool) -> Any:
        def compiled(compiler_options: dict[str, Any] | None = None) -> str:
            self.asked.append((scales_inside, compiler_options))
            if self.refuses and compiler_options:
                raise jax.errors.JaxRuntimeError("no such option\nand a long story")
            return "program"

        return SimpleNamespace(compile=compiled)


def draft_of(config: DrafterConfig) -> Any:
    shapes = jax.eval_shape(POLICY.init, jax.random.key(0))
    return jax.eval_shape(lambda p: er_jax.attach_draft(p, config).draft, shapes)


@pytest.mark.parametrize("group", [None, 8])
def test_only_nvidia_has_options_and_only_groups_are_scaled_inside(
    group: int | None,
) -> None:
    draft = draft_of(DrafterConfig(bits=4, group_size=group))
    compiler = Compiler()
    assert Lowering(compiler.lower, draft, is_cuda=False).compile() == "program"
    assert Lowering(compiler.lower, draft, is_cuda=True).compile() == "program"
    assert Lowering(compiler.lower, None, is_cuda=True).compile() == "program"
    groups = {**WHOLE_SUMS, **SCALES_INSIDE}
    assert compiler.asked == [
        (False, None),
        (True, groups) if group else (False, WHOLE_SUMS),
        (False, WHOLE_SUMS),
    ]


def test_a_tied_projection_in_groups_is_found() -> None:
    shape: Any = jax.ShapeDtypeStruct((16, 8), np.float32)
    table = drafter.TiedEmbedding(table=shape)
    draft = jax.eval_shape(
        lambda p: er_jax.attach_draft(p, DrafterConfig(group_size=4)).draft, [table]
    )
    compiler = Compiler()
    Lowering(compiler.lower, draft, is_cuda=True).compile()
    assert compiler.asked == [(True, {**WHOLE_SUMS, **SCALES_INSIDE})]
    inside = drafter.with_scales_inside(PolicyParams(policy=[table], draft=draft))
    assert inside.draft[0].projection.scales_inside


def test_what_fails_with_options_is_compiled_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiler = Compiler(refuses=True)
    draft = draft_of(DrafterConfig(group_size=8))
    with caplog.at_level(logging.WARNING, logger=lowering.__name__):
        assert Lowering(compiler.lower, draft, is_cuda=True).compile() == "program"
    # Without the options, scales inside would be scaled weights in memory.
    assert [inside for inside, _ in compiler.asked] == [True, False]
    assert compiler.asked[1] == (False, None)
    (said,) = caplog.messages
    assert "no such option" in said
    assert "long story" not in said
    assert all(name in said for name in (*WHOLE_SUMS, *SCALES_INSIDE))


@pytest.mark.usefixtures("unoptimized")
def test_an_engine_survives_an_option_that_its_compiler_does_not_know(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the real compiler, on whatever runs this test."""
    monkeypatch.setattr(lowering, "WHOLE_SUMS", {"xla_no_such_option_of_any": 1})
    monkeypatch.setattr("er_jax.engine.engine.is_cuda", lambda device: True)
    policy = small_policy("unknown option")
    engine = Engine(policy, "coupled")
    params = engine.attach_draft(
        policy.init(jax.random.key(0)), DrafterConfig(bits=4, group_size=8)
    )
    state = engine.allocate(2, 16)
    settings = neutral_sampling()
    with caplog.at_level(logging.WARNING, logger=lowering.__name__):
        _, window = engine.start_window(
            params, state, settings, 2, exit_live=0, max_rounds=1
        )
    info, _, _ = window.wait()
    assert info.num_rounds == 0  # no row is live
    assert "xla_no_such_option_of_any" in caplog.text


def test_scales_inside_is_a_program_of_its_own() -> None:
    """The option reaches the products, and only those for NVIDIA."""
    policy = er_jax.Decoder(dataclasses.replace(SIZES, dtype="bfloat16"))
    config = DrafterConfig(bits=4, group_size=8)
    shapes = plan.shapes_of(policy, config, 2, 16)
    texts = {}
    for inside in (False, True):
        traced = windows.run_window.trace(
            policy, *shapes, neutral_sampling(), np.int32(0), np.int32(0), gamma=1,
            accept="coupled", rounds_per_test=1, scales_inside=inside,
        )  # fmt: skip
        for platform in ("cuda", "tpu"):
            lowered = traced.lower(lowering_platforms=(platform,))
            texts[platform, inside] = lowered.as_text()
    assert "BF16_BF16_F32" not in texts["cuda", False]
    assert "algorithm" not in texts["cuda", False]
    # Seven weights of every layer, and the vocabulary projection.
    products = 7 * policy.config.num_layers + 1
    assert texts["cuda", True].count("algorithm = ") == products
    assert texts["tpu", True] == texts["tpu", False]


def test_products_on_nvidia_round_to_what_is_asked() -> None:
    """Joined products are written as what they are rounded to, and logits are wide."""
    x, w = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((3, 8), (8, 5)))
    for platform, out, inside in (
        ("cuda", "bf16", "bf16"),
        ("cuda", "f32", "f32"),
        ("tpu", "bf16", "f32"),
    ):
        dtype = np.float32 if out == "f32" else None
        traced = jax.jit(functools.partial(er_jax.dot, out_dtype=dtype)).trace(x, w)
        assert traced.out_info.dtype == (dtype or "bfloat16")
        (product,) = [
            line
            for line in traced.lower(lowering_platforms=(platform,))
            .as_text()
            .splitlines()
            if "dot_general" in line
        ]
        assert product.rpartition("-> ")[2] == f"tensor<3x5x{inside}>", platform


@pytest.mark.parametrize(
    ("platform", "version", "is_one"),
    [
        ("gpu", "PJRT C API\ncuda 12080", True),
        ("gpu", "rocm 60000", False),
        ("cpu", "cpu", False),
        ("tpu", "PJRT C API\nTFRT TPU v5p", False),
    ],
)
def test_nvidia_is_told_from_others(platform: str, version: str, is_one: bool) -> None:
    client = SimpleNamespace(platform_version=version)
    device: Any = SimpleNamespace(platform=platform, client=client)
    assert is_cuda(device) == is_one


# Weights large enough that XLA would unpack, merge and split them. A million of them
# in the vocabulary projection, which is of a size of its own.
CONFIG = er_jax.DecoderConfig(
    vocab_size=16_384, dim=1024, num_layers=2, num_heads=8, num_kv_heads=2,
    head_dim=128, hidden_dim=4096, dtype="bfloat16",
)  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs the compiler for NVIDIA GPUs, the extra cuda-plan",
)
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("config", DRAFTS.values(), ids=DRAFTS)
def test_a_draft_on_an_h100_moves_its_codes_and_scales(
    config: DrafterConfig, rows: int
) -> None:
    found = plan.plan(
        CONFIG, presets.target_of("h100"), slots=rows, max_length=128, gammas=(4,),
        drafter=config,
    )  # fmt: skip
    (program,) = found.programs
    assert program.weight_copies == ()
    assert program.traffic is not None
    count, sizes = program.traffic.draft, program.traffic.sizes
    least = sizes.weights[1]
    assert least <= count.num_bytes["weights"] <= 1.03 * least
    # Beside the logits of a round, nothing of the size of the weights is kept.
    assert program.temp_bytes < 4 * 5 * sizes.logits + least / 4
    # Activations of a layer are read and written a few times; sums of parts or of
    # groups would be several times that.
    c = CONFIG
    widths = 6 * c.dim + 3 * c.hidden_dim + 4 * c.num_heads * c.head_size
    activations = rows * c.num_layers * widths * 4
    assert count.num_bytes["other"] <= 2 * activations + 2**20
    # A verification reads its logits for the highest one, and once more. With a single
    # row XLA cuts the reductions differently, and they are small.
    verify = program.traffic.target
    assert rows == 1 or verify.num_bytes["sampling"] <= 2.1 * 5 * sizes.logits


def test_drafts_differ_in_what_they_must_move() -> None:
    """So that the test above is about different numbers."""
    bytes_of = {
        name: plan.device_bytes(
            plan.shapes_of(er_jax.Decoder(CONFIG), config, 1, 8)[0].draft
        )
        for name, config in DRAFTS.items()
    }
    matrices = 16_384 * 1024 + 2 * 1024 * (2 * 1024 + 2 * 256 + 3 * 4096)
    outputs = 16_384 + 2 * (1024 + 2 * 256 + 1024 + 2 * 4096 + 1024)
    assert bytes_of["int8"] == matrices + 4 * outputs
    assert bytes_of["int4"] == matrices // 2 + 4 * outputs
    assert bytes_of["int4 in groups"] == matrices // 2 + 4 * matrices // 128
    head = 16_384 * 1024
    assert bytes_of["int4 in groups, head of 8"] == (
        bytes_of["int4 in groups"] + head // 2
    )
