"""The built-in decoder against an independent one in NumPy, and against itself."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from er_jax.drafter import TiedEmbedding
from er_jax.types import Policy

pytestmark = pytest.mark.usefixtures("unoptimized_module")

BASE: dict[str, Any] = {
    "vocab_size": 29,
    "dim": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden_dim": 24,
    "dtype": "float64",
}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "one head per group": {"num_kv_heads": 4},
    "one key head": {"num_kv_heads": 1, "rope_theta": 500.0},
    "qwen2": {"qkv_bias": True, "tied_embeddings": True, "norm_eps": 1e-3},
    "qwen3": {"qk_norm": True, "head_dim": 6, "rope_theta": 1e6},
    "mistral": {"window": 5},
    "gemma 3": {
        "num_layers": 3,
        "qk_norm": True,
        "activation": "gelu",
        "norm_offset": True,
        "post_norms": True,
        "scaled_embeddings": True,
        "tied_embeddings": True,
        "query_scalar": 7.0,
        "logit_cap": 3.0,
        "window": 4,
        "global_layers": (1,),
        "rope_theta": 1e6,
        "rope_scaling": er_jax.LinearScaling(2.0),
        "local_rope_theta": 300.0,
    },
    "experts": {
        "num_layers": 3,
        "num_experts": 7,
        "experts_per_token": 3,
        "expert_dim": 10,
        "dense_layers": (1,),
    },
    "experts, not scaled": {
        "num_experts": 5,
        "experts_per_token": 2,
        "expert_dim": 12,
        "scaled_routing": False,
    },
}

NUM_TOKENS = 20


def make(variant: str, **changes: Any) -> tuple[er_jax.Decoder, Any]:
    """Return a decoder and parameters in which nothing is 0 or 1 by default."""
    settings = BASE | VARIANTS[variant] | changes
    policy = er_jax.Decoder(er_jax.DecoderConfig(**settings))
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    rng = np.random.default_rng(3)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = 0.3 if len(leaf.shape) > 1 else 0.5
        shift = 0.0 if len(leaf.shape) > 1 else 0.8
        return (shift + scale * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return policy, jax.tree.map(draw, shapes)


def oracle(config: er_jax.DecoderConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Return logits `[T, V]` of one sequence in float64, token by token.

    Written from the papers: RMSNorm (Zhang and Sennrich 2019), rotary positions in the
    half-split layout, grouped queries, gated layers, experts, Gemma 3's local layers
    and norms; no cache, no batch, no shared code.
    """
    size = config.head_dim or config.dim // config.num_heads
    group = config.num_heads // config.num_kv_heads

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        gain = 1 + weight if config.norm_offset else weight
        return x / np.sqrt(np.mean(x**2) + config.norm_eps) * gain

    def act(x: np.ndarray) -> np.ndarray:
        if config.activation == "silu":
            return x / (1 + np.exp(-x))
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def mlp(x: np.ndarray, gate: Any, up: Any, down: Any) -> np.ndarray:
        return (act(x @ gate) * (x @ up)) @ down

    def feed_forward(x: np.ndarray, layer: Any) -> np.ndarray:
        if "router" not in layer:
            return mlp(x, *(layer[f"{name}_proj"] for name in ("gate", "up", "down")))
        scores = np.exp(x @ layer["router"])
        chosen = np.argsort(scores)[-config.experts_per_token :]
        total = scores[chosen].sum() if config.scaled_routing else scores.sum()
        weights = [layer[f"{name}_experts"] for name in ("gate", "up", "down")]
        return np.sum(
            [scores[e] / total * mlp(x, *(w[e] for w in weights)) for e in chosen],
            axis=0,
        )

    def rotate(x: np.ndarray, position: int, is_local: bool) -> np.ndarray:
        out = np.empty_like(x)
        theta, factor = config.rope_theta, 1.0
        if is_local and config.local_rope_theta:
            theta = config.local_rope_theta
        elif config.rope_scaling is not None:
            factor = config.rope_scaling.factor
        for i in range(size // 2):
            angle = position / factor * theta ** (-2 * i / size)
            turn = np.exp(1j * angle) * complex(x[i], x[i + size // 2])
            out[i], out[i + size // 2] = turn.real, turn.imag
        return out

    def project(x: np.ndarray, layer: Any, name: str) -> list[np.ndarray]:
        y = x @ layer[f"{name}_proj"]
        if config.qkv_bias:
            y = y + layer[f"{name}_bias"]
        return np.split(y, len(y) // size)

    embed = params["embed"]
    table = embed.table if isinstance(embed, TiedEmbedding) else embed
    stream = [np.asarray(table, np.float64)[token] for token in tokens]
    if config.scaled_embeddings:
        stream = [x * np.sqrt(config.dim) for x in stream]
    for index, layer in enumerate(params["layers"]):
        is_local = bool(config.window) and index not in config.global_layers
        keys: list[list[np.ndarray]] = []
        values: list[list[np.ndarray]] = []
        for position, x in enumerate(stream):
            h = norm(x, layer["attn_norm"])
            queries = project(h, layer, "q")
            new_keys = project(h, layer, "k")
            if config.qk_norm:
                queries = [norm(q, layer["q_norm"]) for q in queries]
                new_keys = [norm(k, layer["k_norm"]) for k in new_keys]
            keys.append([rotate(k, position, is_local) for k in new_keys])
            values.append(project(h, layer, "v"))
            heads = []
            for head, query in enumerate(queries):
                query = rotate(query, position, is_local)
                query = query / np.sqrt(config.query_scalar or size)
                first = max(position + 1 - (config.window or 0), 0) if is_local else 0
                scores = np.array([query @ k[head // group] for k in keys[first:]])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                parts = zip(weights, values[first:], strict=True)
                heads.append(np.sum([w * v[head // group] for w, v in parts], axis=0))
            out = np.concatenate(heads) @ layer["o_proj"]
            x = x + (norm(out, layer["attn_out_norm"]) if config.post_norms else out)
            out = feed_forward(norm(x, layer["mlp_norm"]), layer)
            x = x + (norm(out, layer["mlp_out_norm"]) if config.post_norms else out)
            stream[position] = x
    last = table.T if config.tied_embeddings else params["lm_head"]
    logits = np.stack([norm(x, params["final_norm"]) @ last for x in stream])
    cap = config.logit_cap
    return logits if cap is None else cap * np.tanh(logits / cap)


@functools.partial(jax.jit, static_argnums=0)
def both(
    policy: er_jax.Decoder, params: Any, tokens: Any, positions: Any, cache: Any
) -> Any:
    hidden, cache = policy.forward(params, tokens, positions, cache)
    return policy.logits(params, hidden), cache


def run(
    policy: er_jax.Decoder, params: Any, tokens: Any, positions: Any, cache: Any
) -> tuple[np.ndarray, Any]:
    tokens, positions = (np.asarray(x, np.int32) for x in (tokens, positions))
    logits, cache = both(policy, params, tokens, positions, cache)
    return np.asarray(logits), cache


def some_tokens(rows: int) -> np.ndarray:
    return np.random.default_rng(4).integers(0, BASE["vocab_size"], (rows, NUM_TOKENS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_pass_equals_an_independent_decoder(x64: None, variant: str) -> None:
    policy, params = make(variant)
    tokens = some_tokens(2)
    positions = np.tile(np.arange(NUM_TOKENS), (2, 1))
    logits, _ = run(policy, params, tokens, positions, policy.init_cache(2, NUM_TOKENS))
    assert logits.dtype == np.float64
    for row in range(2):
        expected = oracle(policy.config, params, tokens[row])
        np.testing.assert_allclose(logits[row], expected, rtol=0, atol=1e-10)
    assert np.abs(expected).max() > 1  # a comparison of zeros would show nothing


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_tokens_at_a_time_equal_one_pass(x64: None, variant: str) -> None:
    policy, params = make(variant)
    tokens = some_tokens(2)
    everything = np.tile(np.arange(NUM_TOKENS), (2, 1))
    cache = policy.init_cache(2, NUM_TOKENS + 3)
    whole, whole_cache = run(policy, params, tokens, everything, cache)
    for step in (1, 4):
        cache = policy.init_cache(2, NUM_TOKENS + 3)
        parts = []
        for start in range(0, NUM_TOKENS, step):
            part = slice(start, start + step)
            logits, cache = run(
                policy, params, tokens[:, part], everything[:, part], cache
            )
            parts.append(logits)
        together = np.concatenate(parts, axis=1)
        np.testing.assert_allclose(together, whole, rtol=0, atol=1e-12)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
            cache,
            whole_cache,
        )


@pytest.fixture(scope="module")
def single() -> tuple[er_jax.Decoder, Any]:
    """One layer in float32, for the tests that compare bits."""
    return make("llama", num_layers=1, dtype="float32")


def test_padding_writes_nothing(single: tuple[er_jax.Decoder, Any]) -> None:
    policy, params = single
    tokens = some_tokens(2)[:, :5]
    cache = jax.tree.map(lambda x: x + 7, policy.init_cache(2, 8))
    positions = np.array([[0, 1, -1, -1, -1], [-1, -1, -1, -1, -1]])
    _, written = run(policy, params, tokens, positions, cache)
    for leaf in jax.tree.leaves(written):
        assert (leaf[0, :2] != 7).all()
        assert (leaf[0, 2:] == 7).all()
        assert (leaf[1] == 7).all()


def test_padding_changes_no_other_token(single: tuple[er_jax.Decoder, Any]) -> None:
    policy, params = single
    tokens = some_tokens(2)[:, :5]
    positions = np.array([[0, 1, 2, -1, -1], [3, 4, -1, -1, -1]])
    one, _ = run(policy, params, tokens, positions, policy.init_cache(2, 8))
    tokens[0, 3:], tokens[1, 2:] = 1, 2
    two, _ = run(policy, params, tokens, positions, policy.init_cache(2, 8))
    np.testing.assert_array_equal(one[0, :3], two[0, :3])
    np.testing.assert_array_equal(one[1, :2], two[1, :2])
    assert np.isfinite(one).all()


def test_positions_past_the_cache_are_dropped(
    single: tuple[er_jax.Decoder, Any],
) -> None:
    policy, params = single
    tokens = some_tokens(1)[:, :4]
    full, cache = run(policy, params, tokens, [[0, 1, 2, 3]], policy.init_cache(1, 4))
    short, kept = run(policy, params, tokens, [[0, 1, 2, 3]], policy.init_cache(1, 2))
    np.testing.assert_allclose(short[:, :2], full[:, :2], rtol=0, atol=1e-5)
    for whole, part in zip(jax.tree.leaves(cache), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(part, whole[:, :2], rtol=0, atol=1e-6)


def test_rows_are_independent(single: tuple[er_jax.Decoder, Any]) -> None:
    """A row's neighbours may be anything, not-a-number included."""
    policy, params = single
    tokens = some_tokens(3)[:, :4]
    positions = np.tile(np.arange(4) + 4, (3, 1))  # behind entries that are there
    cache = policy.init_cache(3, 8)
    clean, _ = run(policy, params, tokens, positions, cache)
    spoilt = jax.tree.map(lambda x: x.at[1].set(jnp.nan), cache)
    tokens[1] = 0
    dirty, _ = run(policy, params, tokens, positions, spoilt)
    np.testing.assert_array_equal(dirty[[0, 2]], clean[[0, 2]])
    assert np.isnan(dirty[1]).all()


def test_gradient_is_finite_and_right(x64: None) -> None:
    """Against a central difference along a random direction, padding included."""
    policy, params = make("qwen3", num_layers=1)
    tokens = jnp.asarray(some_tokens(2)[:, :6], jnp.int32)
    positions = jnp.array([[0, 1, 2, 3, 4, 5], [0, 1, -1, -1, -1, -1]], jnp.int32)

    @jax.jit
    def loss(params: Any) -> jax.Array:
        hidden, _ = policy.forward(params, tokens, positions, policy.init_cache(2, 6))
        logprobs = jax.nn.log_softmax(policy.logits(params, hidden))
        return jnp.sum(jnp.where(positions[..., None] >= 0, logprobs, 0.0)) / 100

    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    rng = np.random.default_rng(5)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    step = 1e-6

    def moved(sign: float) -> float:
        return float(
            loss(jax.tree.map(lambda x, d: x + sign * step * d, params, direction))
        )

    expected = (moved(1) - moved(-1)) / (2 * step)
    products = jax.tree.map(lambda g, d: float((g * d).sum()), gradient, direction)
    assert sum(jax.tree.leaves(products)) == pytest.approx(expected, rel=1e-6)


def test_bfloat16_stays_near_the_oracle() -> None:
    policy, params = make("llama", dtype="bfloat16")
    tokens = some_tokens(1)[:, :8]
    positions = np.arange(8)[None]
    cache = policy.init_cache(1, 8)
    logits, cache = run(policy, params, tokens, positions, cache)
    assert logits.dtype == np.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache)} == {"bfloat16"}
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    expected = oracle(policy.config, wide, tokens[0])
    spread = expected.std()
    assert np.abs(logits[0] - expected).max() < 0.15 * spread
    assert np.abs(logits[0] - expected).max() > 1e-4 * spread


def test_init_has_the_scale_that_keeps_signals(
    single: tuple[er_jax.Decoder, Any],
) -> None:
    policy = er_jax.Decoder(
        er_jax.DecoderConfig(
            **BASE | {"dim": 256, "hidden_dim": 512, "dtype": "float32"}
        )
    )
    params = policy.init(jax.random.key(0))
    for name, weight in params["layers"][0].items():
        if weight.ndim == 2:
            assert np.std(weight) * weight.shape[0] ** 0.5 == pytest.approx(1, rel=0.1)
        else:
            assert (weight == 1).all(), name
    first, second = params["layers"]
    assert not np.array_equal(first["q_proj"], second["q_proj"])


def test_it_is_a_policy() -> None:
    policy, _ = make("llama", dtype="float32")
    assert isinstance(policy, Policy)
    assert hash(policy) == hash(dataclasses.replace(policy))
    assert policy.vocab_size == BASE["vocab_size"]
    cache = jax.eval_shape(lambda: policy.init_cache(3, 7))
    assert {leaf.shape for leaf in jax.tree.leaves(cache)} == {(3, 7, 8)}
    assert len(jax.tree.leaves(cache)) == 4


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"vocab_size": 0}, ("vocab_size=0", "at least 1")),
        ({"num_layers": 0}, ("num_layers=0", "at least 1")),
        ({"num_kv_heads": 3}, ("num_kv_heads=3", "num_heads=4", "divisors")),
        ({"num_kv_heads": 0}, ("num_kv_heads=0", "num_heads=4", "divisors")),
        ({"dim": 18}, ("num_heads=4", "dim=18", "head_dim")),
        ({"head_dim": 5}, ("head_dim=5", "even")),
        ({"head_dim": 0}, ("head_dim=0", "at least 1")),
        ({"max_length": 0}, ("max_length=0", "at least 1")),
        ({"rope_theta": 0.0}, ("rope_theta=0.0", "from 1 to 1e+18")),
        ({"rope_theta": float("nan")}, ("rope_theta=nan", "from 1 to 1e+18")),
        ({"norm_eps": 0.0}, ("norm_eps=0.0", "from 1e-30 to 1")),
        ({"norm_eps": -1e-6}, ("norm_eps=-1e-06", "from 1e-30 to 1")),
        ({"dtype": "int8"}, ("dtype='int8'", "bfloat16")),
        ({"activation": "relu"}, ("activation='relu'", "'gelu'")),
        ({"window": 0}, ("window=0", "at least 1")),
        ({"window": 4, "global_layers": (2,)}, ("global_layers=(2,)", "from 0 to 1")),
        ({"window": 4, "global_layers": (1, 0)}, ("(1, 0)", "ascending")),
        ({"global_layers": (1,)}, ("global_layers=(1,)", "give a window")),
        ({"local_rope_theta": 9.0}, ("local_rope_theta=9.0", "give a window")),
        ({"window": 4, "local_rope_theta": 0.5}, ("local_rope_theta=0.5", "from 1")),
        ({"query_scalar": 0.0}, ("query_scalar=0.0", "from 1e-06")),
        ({"expert_dim": 8}, ("expert_dim=8", "give num_experts")),
        ({"num_experts": 4, "expert_dim": 8}, ("experts_per_token=0", "num_experts=4")),
        ({"num_experts": 4, "experts_per_token": 2}, ("expert_dim=0", "at least 1")),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        er_jax.DecoderConfig(**BASE | changes)
    for part in parts:
        assert part in str(error.value)


def test_float64_without_64_bit_mode() -> None:
    policy = er_jax.Decoder(er_jax.DecoderConfig(**BASE))
    with pytest.raises(ValueError, match=r"dtype='float64'.*jax_enable_x64"):
        policy.init(jax.random.key(0))
