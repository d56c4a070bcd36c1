"""How many programs there are, and what they hold: no copies, no dequantized weights.

Counts come from what XLA reports as compiled, sizes from `memory_analysis()` of windows
for a decoder whose weights and cache are megabytes (compiled for shapes alone, nothing
that big is allocated), operand types from the text lowered for each platform.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from configs import arithmetic
from er_jax import steps
from er_jax.drafter import DrafterConfig, PolicyParams
from er_jax.engine import windows
from er_jax.products import CODES_FIRST_SIZE
from er_jax.types import DecodeState, Sampling
from tests.conftest import CompileCount
from tests.small import POLICY, small_policy

CompileCounter = Callable[[], AbstractContextManager[CompileCount]]


# How many.


def call(
    policy: er_jax.Decoder,
    params: Any,
    prompts: list[list[int]] | None = None,
    *,
    key: Any = None,
    controller: er_jax.Controller | None = None,
    **changes: Any,
) -> er_jax.Rollout:
    settings: dict[str, Any] = {"max_new_tokens": 12, "n": 2, "gammas": (0, 2)}
    return er_jax.rollout(
        policy,
        params,
        prompts or [[1, 2, 3], [4, 5]],
        key=jax.random.key(1) if key is None else key,
        config=er_jax.RolloutConfig(**(settings | changes)),
        controller=controller,
    )


VARIATIONS: list[dict[str, Any]] = [
    {"prompts": [[7] * 16, [8]]},
    {"prompts": [[9, 9, 9], [9, 9, 9]]},
    {"prompts": [[3]], "n": 4},
    {"prompts": [[3], [2], [3]], "n": 1},
    {"max_new_tokens": 40},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    {"stop_token_ids": (3, 4, 5)},
    {"stop_token_ids": tuple(range(8))},
    {"key": np.array([5, 6], np.uint32)},
    {"logprobs": "raw"},
    {"logprobs": "processed"},
    {"pad_id": 23},
]


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("control", ["ar", "fixed:2", "best"])
def test_warm_calls_compile_nothing(
    control: str, compile_counter: CompileCounter
) -> None:
    """Whatever the prompts, temperatures, thresholds, stops, keys and meanings."""
    policy = small_policy(f"warm {control}")
    params = policy.init(jax.random.key(0))
    controller = er_jax.Controller(control, (0, 2), patience=0)
    run = functools.partial(
        call, policy, params, control=control, controller=controller
    )
    first = run()
    # It buys nothing more: what `best` buys later is its own decision.
    controller.patience = 1e9
    kinds = [name.split("(")[0] for name, _ in first.stats.compiled]
    expected = {
        "ar": ["admit", "allocate", "finite", "window"],
        "fixed:2": ["admit", "allocate", "attach", "finite", "window"],
        # Two single-row windows are what `best` measures before it decides.
        "best": sorted(
            ["admit", "attach", "finite", *["allocate"] * 2, *["window"] * 3]
        ),
    }
    assert sorted(kinds) == expected[control]
    # The first with top-k or top-p has windows of its own, all others share them.
    truncated = run(top_k=3).stats.compiled
    assert {name.split("(")[0] for name, _ in truncated} == {"window"}
    other = jax.tree.map(lambda x: x + x, params)
    typed, raw = jax.random.key(2), jax.random.PRNGKey(3)
    with compile_counter() as compiled:
        for change in VARIATIONS:
            run(**change)
        run(key=typed)
        run(key=raw)
        last = call(policy, other, control=control, controller=controller)
    assert compiled.count == 0, compiled
    assert last.stats.compiled == []
    assert last.stats.seconds["compile"] == 0


@pytest.mark.usefixtures("unoptimized")
def test_truncation_is_one_more_window() -> None:
    """A program without it leaves thresholds out, and conditionals with them."""
    policy = small_policy("truncation")
    params = policy.init(jax.random.key(0))

    def run(**changes: Any) -> tuple[list[str], list[list[int]]]:
        out = call(policy, params, control="ar", **changes)
        kinds = [name.split("(")[0] for name, _ in out.stats.compiled]
        return kinds, out.completion_ids.tolist()

    _, free = run()
    for setting in ({"top_k": 1}, {"top_p": 1e-6}):
        kinds, greedy = run(**setting)
        assert greedy == run(temperature=0.0)[1] != free
        assert kinds == (["window"] if "top_k" in setting else [])
    assert run() == ([], free)


@pytest.mark.usefixtures("unoptimized")
def test_a_draft_of_another_kind_is_one_more_window() -> None:
    policy = small_policy("warm fixed:2")  # warm, if the test above has run
    params = policy.init(jax.random.key(0))
    call(policy, params, control="fixed:2")
    for draft in (params, er_jax.quantize(params, DrafterConfig(bits=4))):
        policy_and_draft = PolicyParams(policy=params, draft=draft)
        first = call(policy, policy_and_draft, control="fixed:2")
        assert [name.split("(")[0] for name, _ in first.stats.compiled] == ["window"]
        assert call(policy, policy_and_draft, control="fixed:2").stats.compiled == []


@pytest.mark.usefixtures("unoptimized")
def test_a_cold_call_compiles_nothing_beside_its_programs(
    compile_counter: CompileCounter,
) -> None:
    policy = small_policy("cold")
    params = policy.init(jax.random.key(0))
    jax.clear_caches()  # of single operations, too
    key = np.array([1, 2], np.uint32)
    with compile_counter() as compiled:
        out = call(policy, params, key=key, control="ar")
    assert compiled.count == len(out.stats.compiled) == 4, compiled
    with compile_counter() as compiled:
        longer = call(policy, params, [[1] * 17], key=key, control="ar")
        wider = call(policy, params, n=4, key=key, control="ar")
    # A bucket of prompts, and one of rows: a state, an admission and a window each.
    for out in (longer, wider):
        kinds = sorted(name.split("(")[0] for name, _ in out.stats.compiled)
        assert kinds == ["admit", "allocate", "window"]
    assert compiled.count == 6


@pytest.mark.usefixtures("unoptimized")
def test_more_stop_ids_than_before() -> None:
    """Nine do not fit where eight did; one more program, and no failure."""
    policy = small_policy("stop ids")
    params = policy.init(jax.random.key(0))
    call(policy, params, control="ar")
    out = call(policy, params, control="ar", stop_token_ids=tuple(range(9)))
    assert [name.split("(")[0] for name, _ in out.stats.compiled] == ["window"]
    again = call(policy, params, control="ar", stop_token_ids=(1,))
    assert again.stats.compiled == []


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("control", ["ar", "best"])
def test_what_is_compiled_ahead_is_not_compiled_again(control: str) -> None:
    """Windows are ready, as many as a rollout may want and no two alike."""
    policy = small_policy(f"ahead {control}")
    params = policy.init(jax.random.key(0))
    prompts = [[1, 2, 3], [4, 5]]
    config = er_jax.RolloutConfig(
        max_new_tokens=12, gammas=(0, 2), control=control, n=1
    )
    ready = er_jax.compile_ahead(policy, params, prompts, config=config, progress=True)
    gammas = (0,) if control == "ar" else (0, 2)
    assert sorted((p.rows, p.gamma) for p in ready) == sorted(
        (rows, gamma) for rows in (1, 2) for gamma in gammas
    )
    out = call(policy, params, prompts, control=control, n=1)
    assert not [name for name, _ in out.stats.compiled if name.startswith("window")]


# What they hold. Every size is its own number, so that shapes can be told apart.

B, S, V = 4, 1024, 4096
DIM, HIDDEN, HEADS, KV_HEADS, SIZE = 512, 1280, 8, 4, 72
GAMMA = 3
WEIGHTS = {  # [in, out] of everything that is quantized
    "q_proj": (DIM, HEADS * SIZE),
    "k_proj": (DIM, KV_HEADS * SIZE),
    "v_proj": (DIM, KV_HEADS * SIZE),
    "o_proj": (HEADS * SIZE, DIM),
    "gate_proj": (DIM, HIDDEN),
    "up_proj": (DIM, HIDDEN),
    "down_proj": (HIDDEN, DIM),
    "lm_head": (DIM, V),
}


def big_policy(dtype: str) -> er_jax.Decoder:
    return er_jax.Decoder(
        er_jax.DecoderConfig(
            vocab_size=V,
            dim=DIM,
            num_layers=1,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=SIZE,
            hidden_dim=HIDDEN,
            dtype=dtype,
        )
    )


def scalar(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype)


SETTINGS = Sampling(
    key=jax.ShapeDtypeStruct((2,), jnp.uint32),
    temperature=scalar(jnp.float32),
    top_k=scalar(jnp.int32),
    top_p=scalar(jnp.float32),
    min_p=scalar(jnp.float32),
    stop_ids=jax.ShapeDtypeStruct((8,), jnp.int32),
    logprob_kind=scalar(jnp.int32),
)


def traced_window(
    gamma: int, config: DrafterConfig | None = None, dtype: str = "float32"
) -> tuple[Any, PolicyParams, DecodeState]:
    policy = big_policy(dtype)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    policy_and_draft = PolicyParams(policy=params, draft=None)
    if config is not None:
        policy_and_draft = jax.eval_shape(
            lambda p: er_jax.attach_draft(p, config), params
        )
    state = jax.eval_shape(lambda: steps.empty_state(policy, B, S))
    traced = windows.run_window.trace(
        policy,
        policy_and_draft,
        state,
        SETTINGS,
        scalar(jnp.int32),
        scalar(jnp.int32),
        gamma=gamma,
        accept="coupled",
        rounds_per_test=1,
    )
    return traced, policy_and_draft, state


def num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module", params=[0, GAMMA], ids=["ar", "draft"])
def window(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any, Any]]:
    """A compiled window of the big decoder, with the shapes of what it runs on."""
    config = DrafterConfig() if request.param else None
    traced, params, state = traced_window(request.param, config)
    yield traced.lower().compile(), params, state


def test_a_window_gives_its_state_the_same_buffers(
    window: tuple[Any, Any, DecodeState],
) -> None:
    compiled, _, state = window
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= num_bytes(state)
    info = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Beside the text, which may be fetched while the next window runs on the state,
    # what comes back is small.
    assert info < num_bytes((state.tokens, state.logprobs)) + 1000


def test_a_window_needs_no_room_for_copies(
    window: tuple[Any, Any, DecodeState],
) -> None:
    """Less than a single leaf of the cache, or a single large weight in floats."""
    compiled, _, state = window
    temporary = compiled.memory_analysis().temp_size_in_bytes
    leaf = num_bytes(state.cache) // 2
    assert leaf == B * S * KV_HEADS * SIZE * 4 == 4_718_592
    large = {name: 4 * a * b for name, (a, b) in WEIGHTS.items() if a * b > 600_000}
    assert set(large) == {"gate_proj", "up_proj", "down_proj", "lm_head"}
    assert temporary < min(leaf, *large.values())
    # And, all in all, less than half of what the codes alone take.
    codes = sum(a * b for a, b in WEIGHTS.values())
    assert temporary < codes / 2


def unfused(hlo: str) -> Iterator[tuple[str, str, str]]:
    """Yield (type, opcode, line) of all that writes a buffer: not inside a fusion."""
    inside = set(re.findall(r"fusion\(.*calls=%([\w.-]+)", hlo))
    name = ""
    for line in hlo.splitlines():
        if start := re.match(r"(?:ENTRY )?%([\w.-]+) .*\{$", line):
            name = start[1]
        elif name not in inside:
            found = re.match(r"\s+(?:ROOT )?%\S+ = (\w+\[[\d,]*\])\S* ([\w-]+)\(", line)
            if found:
                yield found[1], found[2], line.strip()


def dims_of(kind: str) -> tuple[str, tuple[int, ...]]:
    """Split `f32[4,8]` into its parts."""
    dtype, sizes = kind.rstrip("]").split("[")
    return dtype, tuple(int(size) for size in sizes.split(",") if size)


def test_no_mask_per_head_and_no_copy_is_written(
    window: tuple[Any, Any, DecodeState],
) -> None:
    compiled, params, _ = window
    written = list(unfused(compiled.as_text()))
    assert len(written) > 100
    gamma = GAMMA if params.draft is not None else 0
    passed_on = {"parameter", "get-tuple-element", "bitcast"}
    weights = {shape for a, b in WEIGHTS.values() for shape in ((a, b), (b, a))}
    num_updates = 0
    for kind, opcode, line in written:
        dtype, dims = dims_of(kind)
        if opcode in passed_on:
            continue
        size = int(np.prod(dims))
        if dtype == "pred":
            assert size < B * HEADS * S, line
            assert size <= B * (gamma + 1) * max(S, V), line
        if dims in weights:
            raise AssertionError(f"a weight is written: {line}")
        if dims == (B, S, KV_HEADS * SIZE):
            num_updates += 1
            assert opcode != "copy", line
    assert num_updates  # the cache is updated, and we would have seen it


def admission_shapes(prompts: int, tokens: int, rows: int) -> er_jax.types.Admission:
    """Return the shapes of an admission of one chunk."""

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return er_jax.types.Admission(
        tokens=ints(prompts, tokens), length=ints(prompts), num_chunks=ints(),
        slot=ints(rows), prompt=ints(rows), sequence_id=ints(rows), limit=ints(rows),
        first_row=ints(1), num_rows=ints(1), num_clones=ints(), clone_from=ints(rows),
        clone_to=ints(rows), clone_length=ints(rows),
    )  # fmt: skip


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("program", ["admission", "gradient"])
def test_long_sequences_need_no_square_of_scores(program: str) -> None:
    """A square of float32 is 268 MB for each of two heads, at 8192 tokens."""
    length, policy = 8192, POLICY
    params = jax.eval_shape(policy.init, jax.random.key(0))
    given = jax.eval_shape(lambda: steps.empty_state(policy, 1, length + 64))
    if program == "admission":
        lowered = windows.run_admission.lower(
            policy, params, given, admission_shapes(1, length, 1)
        )
    else:

        def total(params: Any, tokens: jax.Array) -> jax.Array:
            cache = policy.init_cache(1, length)
            positions = jnp.arange(length, dtype=jnp.int32)[None]
            return jnp.sum(policy.forward(params, tokens, positions, cache)[0])

        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        lowered = jax.jit(jax.grad(total)).lower(params, tokens)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 60e6
    assert f"x{length}x{length}x" not in lowered.as_text()


@pytest.mark.slow
def test_a_long_prompt_takes_little_more_than_weights_and_caches() -> None:
    """16 384 tokens and 64 new ones of the demo's policy: the peak of admission.

    The caches are the batch's and that of the prefill, whose entries it gets.
    """
    policy = arithmetic.CONFIG.model.decoder(64, "float32")
    params = jax.eval_shape(policy.init, jax.random.key(0))
    prompt, new = 16_384, 64
    given = jax.eval_shape(lambda: steps.empty_state(policy, 1, prompt + new))
    prefix = jax.eval_shape(lambda: policy.init_cache(1, prompt))
    lowered = windows.run_admission.lower(
        policy, params, given, admission_shapes(1, prompt, 1)
    )
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= num_bytes(given)
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed = sum(map(num_bytes, (params, given.cache, prefix)))
    # 1.12; with a padded copy of the prefix 1.5, and with scores of all heads and
    # entries for 32 queries as much.
    assert peak < 1.25 * needed


@pytest.mark.parametrize("program", ["admission", "refresh"])
def test_other_programs_that_donate(program: str) -> None:
    policy = big_policy("float32")
    params = jax.eval_shape(policy.init, jax.random.key(0))
    if program == "refresh":
        config = DrafterConfig()
        draft = jax.eval_shape(lambda p: er_jax.attach_draft(p, config).draft, params)
        compiled = windows.run_refresh.lower(params, draft, config=config).compile()
        given = draft
    else:
        given = jax.eval_shape(lambda: steps.empty_state(policy, B, S))
        admission = admission_shapes(B, 16, B)
        compiled = windows.run_admission.lower(
            policy, params, given, admission
        ).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= num_bytes(given)
    if program == "admission":
        # Two rows of the cache, to be inserted or copied, and no more.
        assert memory.temp_size_in_bytes < num_bytes(given.cache)


def test_scopes_are_in_every_window(window: tuple[Any, Any, Any]) -> None:
    """What a profile calls the parts of a round."""
    compiled, params, _ = window
    names = re.findall(r'op_name="([^"]*)"', compiled.as_text())
    scopes = ["verify", "accept", "emit", "verify/sample"]
    if params.draft is None:
        scopes += ["verify/cache"]
    else:  # Drafts are a loop, and may be verified more than once.
        scopes += ["draft", "draft/.*/sample", "draft/.*/cache", "verify/.*/cache"]
    for scope in scopes:
        assert any(re.search(f"/{scope}/", name) for name in names), scope


# What is multiplied by what, on chips that are not here.


def operations(text: str) -> Iterator[tuple[str, str, list[str], str]]:
    """Yield (result, operation, operand types, result type) of StableHLO text."""
    for line in text.splitlines():
        found = re.match(r"\s*(%\w+)(?::\d+)? = \"?(?:stablehlo\.)?([\w.]+)", line)
        if not found or found[2] in ("while", "case"):
            continue
        _, _, types = line.rpartition(" : ")
        if " -> " in types:
            operands, _, result = types.partition(" -> ")
        else:  # one type for everything
            operands = result = types
        yield (
            line,
            found[2],
            re.findall(r"tensor<(\S+?)>", operands),
            "".join(re.findall(r"tensor<(\S+?)>", result)[:1]),
        )


def lowered(traced: Any, platform: str) -> str:
    return traced.lower(lowering_platforms=(platform,)).as_text()


def products(text: str, rank: int = 2) -> list[tuple[str, str, str]]:
    """Return (activation, weight, result) of the products with a weight of a rank."""
    found = []
    for _, name, operands, result in operations(text):
        if name == "dot_general" and operands[1].count("x") == rank:
            found.append((operands[0], operands[1], result))
    return found


def code_products(text: str, shapes: list[str]) -> list[tuple[str, str, str, int]]:
    """Return (activation, codes, result, which factor the codes are) of draft passes.

    The target's own weights lie the other way round, and meet more than one token.
    """
    found = []
    for _, name, operands, result in operations(text):
        if name != "dot_general":
            continue
        for at, codes in enumerate(operands):
            other = operands[1 - at]
            is_token = codes.count("x") == 3 or other.startswith(f"{B}x1x")
            if codes.rpartition("x")[0] in shapes and is_token:
                found.append((other, codes, result, at))
    return found


def codes_shape(name: str, group: int | None) -> str:
    num_in, num_out = WEIGHTS[name]
    if group is None:
        return f"{num_out}x{num_in}"
    return f"{num_out}x{num_in // group}x{group}"


FORMATS = [
    DrafterConfig(),
    DrafterConfig(bits=4),
    DrafterConfig(bits=4, group_size=32),
]


@pytest.mark.parametrize("config", FORMATS, ids=["int8", "int4", "int4 in groups"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_enter_the_products_as_they_are(
    config: DrafterConfig, dtype: str
) -> None:
    """By platform: int8 x int8 on the CPU, elsewhere a cast just before the product."""
    traced, _, _ = traced_window(GAMMA, config, dtype)
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    stored = f"i{config.bits}"
    shapes = [codes_shape(name, config.group_size) for name in WEIGHTS]
    for platform in ("cpu", "tpu", "cuda"):
        text = lowered(traced, platform)
        wanted = "i8" if platform == "cpu" else short
        total = "i32" if platform == "cpu" else "f32"
        factors = [*shapes]
        if platform == "cpu" and config.group_size is not None:
            # A product of every group, each with a slice of the codes.
            factors = [
                f"{num_out}x{config.group_size}"
                for num_in, num_out in WEIGHTS.values()
                for _ in range(num_in // config.group_size)
            ]
        drafts = code_products(text, factors)
        assert sorted(codes for _, codes, _, _ in drafts) == sorted(
            f"{shape}x{wanted}" for shape in factors
        ), platform
        for other, codes, result, at in drafts:
            assert other.endswith(f"x{wanted}"), (platform, other)
            assert result.endswith(f"x{total}"), (platform, result)
            # A CPU repacks the right factor, and large codes are spared that.
            size = math.prod(int(n) for n in codes.split("x")[:-1])
            is_large = size >= CODES_FIRST_SIZE and config.group_size is None
            assert at == (0 if platform == "cpu" and is_large else 1)
        # Whatever has a weight's shape comes out of a cast of the codes: nothing is
        # scaled, shifted or turned before it is multiplied. For CUDA the codes of 4
        # bits pass a barrier, which is gone when the program is compiled.
        made = [
            (name, operands, result)
            for _, name, operands, result in operations(text)
            if result.rpartition("x")[0] in shapes
            and name not in ("dot_general", "optimization_barrier")
        ]
        assert {name for name, _, _ in made} <= {"convert"}, platform
        casts = [(operands[0], result) for _, operands, result in made]
        if wanted == stored:
            assert casts == []
        else:
            assert sorted(casts) == sorted(
                (f"{shape}x{stored}", f"{shape}x{wanted}") for shape in shapes
            )


def test_plain_decoding_reads_no_codes() -> None:
    traced, _, _ = traced_window(0)
    for platform in ("cpu", "tpu", "cuda"):
        text = lowered(traced, platform)
        weights = [right for _, right, _ in products(text)]
        assert sorted(weights) == sorted(f"{a}x{b}xf32" for a, b in WEIGHTS.values())
        assert "xi8>" not in text


@pytest.mark.parametrize("gamma", [0, GAMMA])
def test_the_mask_is_shared_by_all_heads(gamma: int) -> None:
    """Compared once per row and position; only the choice itself runs over heads."""
    traced, _, _ = traced_window(gamma, DrafterConfig() if gamma else None)
    for platform in ("tpu", "cuda"):
        masks = [
            result
            for _, name, _, result in operations(lowered(traced, platform))
            if name == "compare" and f"x{S}x" in result
        ]
        positions = {1, gamma + 1}
        assert {f"{B}x{t}x{S}xi1" for t in positions} == set(masks)


def test_the_cache_is_read_as_it_lies() -> None:
    """Both products take `[B, S, K * D]` itself: it is not cast, nor turned."""
    for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
        traced, _, _ = traced_window(GAMMA, DrafterConfig(), dtype)
        whole = f"{B}x{S}x{KV_HEADS * SIZE}x{short}"
        for platform in ("tpu", "cuda"):
            text = lowered(traced, platform)
            assert len([1 for _, r, _ in products(text, 3) if r == whole]) == 4
            made = {
                name
                for _, name, _, result in operations(text)
                if result.rpartition("x")[0] == whole.rpartition("x")[0]
            }
            # Scatters end several lines further down, and are counted by name. Rows of
            # a cache are updated where entries of drafts have to be removed.
            assert made <= {"func.call", "call", "dynamic_update_slice"}, made
            assert text.count('"stablehlo.scatter"') >= 4
