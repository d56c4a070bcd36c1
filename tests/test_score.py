"""`score`: the trainer's log-probabilities of a rollout, and a rollout as a pytree."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from er_jax import sampling
from er_jax.engine.scores import num_pieces
from er_jax.mesh import layout
from tests import toy
from tests.conftest import CompileCount
from tests.small import POLICY, SIZES

pytestmark = pytest.mark.usefixtures("unoptimized_module")

PROMPTS = [[3, 1, 4], [7], [2, 7, 1, 8, 2, 8, 1, 8], [5, 6]]
CONFIG = er_jax.RolloutConfig(
    max_new_tokens=24, n=2, temperature=0.7, stop_token_ids=(0, 9), control="ar"
)

# Names of settings, and how they differ from CONFIG.
SETTINGS: dict[str, dict[str, Any]] = {
    "raw": dict(logprobs="raw"),
    "temperature": {},
    "temperature, truncated": dict(top_k=3),
    "top-k and top-p": dict(logprobs="processed", top_k=9, top_p=0.8),
    "top-p": dict(logprobs="processed", top_p=0.6),
    "min-p": dict(logprobs="processed", min_p=0.2),
    "greedy, raw": dict(logprobs="raw", temperature=0.0),
    "greedy, temperature": dict(temperature=0.0),
    "greedy, processed": dict(logprobs="processed", temperature=0.0),
}


def config_of(name: str) -> er_jax.RolloutConfig:
    return dataclasses.replace(CONFIG, **SETTINGS[name])


@functools.cache
def params_of(seed: int = 0) -> Any:
    return POLICY.init(jax.random.key(seed))


@functools.cache
def sampled(name: str = "temperature") -> er_jax.Rollout:
    key, config = jax.random.key(1), config_of(name)
    return er_jax.rollout(POLICY, params_of(), PROMPTS, key=key, config=config)


def part(out: Any, rows: slice) -> Any:
    return jax.tree.map(lambda a: a[rows], out)


# ------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_the_rollouts_own(name: str) -> None:
    out, config = sampled(name), config_of(name)
    if name == "temperature":
        assert len(set(out.lengths.tolist())) > 2  # ragged behind as in front
    if name == "greedy, processed":
        assert not out.logprobs.any()
    # All rows in one piece; rows one by one, the logits of one token at a time.
    for chunk_tokens in (2048, 1):
        found = er_jax.score(
            POLICY, params_of(), out, config=config, chunk_tokens=chunk_tokens
        )
        assert found.entropy is None and found.logprobs.dtype == jnp.float32
        np.testing.assert_allclose(found.logprobs, out.logprobs, atol=2e-5)
        assert not np.asarray(found.logprobs)[~out.completion_mask].any()


@pytest.fixture
def one_token_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let even few logits be made in pieces."""
    monkeypatch.setattr("er_jax.engine.scores.LEAST_LOGITS", 1)


@pytest.mark.usefixtures("one_token_pieces")
def test_parts_of_a_rollout_and_pieces_of_any_size() -> None:
    out = sampled()
    for rows, chunk_tokens in ((slice(1, 4), 63), (slice(0, 8), 95)):
        few = part(out, rows)
        found = er_jax.score(
            POLICY, params_of(), few, config=CONFIG, chunk_tokens=chunk_tokens
        )
        np.testing.assert_allclose(found.logprobs, out.logprobs[rows], atol=2e-5)


def test_pieces_are_even_where_they_can_be() -> None:
    assert [num_pieces(128, most) for most in (200, 128, 100, 20, 1)] == [
        1,
        1,
        2,
        8,
        128,
    ]
    assert num_pieces(13, 5) == 3  # 13 is prime: two rows are made up


def test_a_policy_of_ones_own(x64: None) -> None:
    policy = toy.Toy(vocab_size=5, dtype="float64")
    params = toy.toy_params(policy)
    config = dataclasses.replace(config_of("top-p"), stop_token_ids=())
    prompts = [[1, 2], [4, 4, 3]]
    out = er_jax.rollout(policy, params, prompts, key=jax.random.key(0), config=config)
    found = er_jax.score(policy, params, out, config=config).logprobs
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, out.logprobs, atol=1e-6)


def test_tokens_that_were_not_sampled_are_context() -> None:
    """As the answers of a tool would be: read, and not scored."""
    out = sampled()
    mask = out.completion_mask.copy()
    mask[:, 2:5] = False
    found = er_jax.score(
        POLICY, params_of(), dataclasses.replace(out, completion_mask=mask),
        config=CONFIG,
    )  # fmt: skip
    expected = np.where(mask, out.logprobs, 0)
    np.testing.assert_allclose(found.logprobs, expected, atol=2e-5)


def test_padding_may_be_any_id() -> None:
    out = sampled()
    other = dataclasses.replace(
        out,
        prompt_ids=np.where(out.prompt_mask, out.prompt_ids, -7),
        completion_ids=np.where(out.completion_mask, out.completion_ids, 10**6),
    )
    found = [
        er_jax.score(POLICY, params_of(), one, config=CONFIG) for one in (out, other)
    ]
    np.testing.assert_array_equal(found[0].logprobs, found[1].logprobs)


def test_a_draft_beside_the_policy_is_left_out() -> None:
    both = er_jax.PolicyParams(policy=params_of(), draft=None)
    found = er_jax.score(POLICY, both, sampled(), config=CONFIG)
    np.testing.assert_allclose(found.logprobs, sampled().logprobs, atol=2e-5)


def test_a_row_that_ended_at_a_bad_logit_spoils_nothing() -> None:
    policy = toy.Toy(vocab_size=4)
    params = jax.tree.map(np.copy, toy.toy_params(policy))
    params["lines"][2] = params["pages"][:, 2] = 3e38  # what follows a 2 overflows
    config = er_jax.RolloutConfig(max_new_tokens=12, n=4, control="ar")
    with pytest.warns(RuntimeWarning, match="non-finite"):
        out = er_jax.rollout(
            policy, params, [[1], [0, 3]], key=jax.random.key(0), config=config
        )
    assert (out.finish_reason == "nonfinite").any()

    def total(params: Any) -> jax.Array:
        return er_jax.score(policy, params, out, config=config).logprobs.sum()

    found = er_jax.score(policy, params, out, config=config)
    np.testing.assert_allclose(found.logprobs, out.logprobs, atol=2e-5)
    assert np.isfinite(jax.tree.leaves(jax.grad(total)(params))[0]).all()


# ----------------------------------------------------------------------- derivatives


def plain_logits(
    policy: er_jax.Decoder, params: Any, out: er_jax.Rollout
) -> tuple[jax.Array, np.ndarray]:
    """Return the logits before every sampled token, `[K, V]`, and the K tokens.

    Rows begin at position 0, and no logit is left out.
    """
    width = out.prompt_ids.shape[1] + out.completion_ids.shape[1]
    tokens = np.zeros((len(out.lengths), width), np.int32)
    rows: list[int] = []
    columns: list[int] = []
    for row, length in enumerate(out.lengths):
        prompt = out.prompt_ids[row][out.prompt_mask[row]]
        end = len(prompt) + length
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : end] = out.completion_ids[row, :length]
        rows += [row] * length
        columns += range(len(prompt), end)
    at = np.array(rows), np.array(columns)
    positions = jnp.tile(jnp.arange(width, dtype=jnp.int32), (len(tokens), 1))
    cache = policy.init_cache(*tokens.shape)
    hidden, _ = policy.forward(params, jnp.asarray(tokens), positions, cache)
    return policy.logits(params, hidden)[at[0], at[1] - 1], tokens[at]


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion", "one_token_pieces")
@pytest.mark.parametrize(
    ("name", "chunk_tokens"),
    # All at once; two rows at a time, of them eight tokens' logits.
    [("temperature", 2048), ("temperature", 64), ("top-k and top-p", 64)],
)
def test_gradients_are_those_of_the_plain_formula(
    x64: None, name: str, chunk_tokens: int
) -> None:
    policy = er_jax.Decoder(dataclasses.replace(SIZES, dtype="float64"))
    params = jax.tree.map(lambda x: x.astype(np.float64), params_of())
    out, config = part(sampled(name), slice(0, 5)), config_of(name)
    temperature = float(np.float32(config.temperature))
    weights = np.random.default_rng(0).normal(size=(2, int(out.lengths.sum())))
    logits, _ = jax.jit(lambda params: plain_logits(policy, params, out))(params)
    is_kept = np.ones(logits.shape, np.bool_)
    if config.logprobs == "processed":
        settings = toy.settings(temperature=temperature, top_k=9, top_p=0.8)
        drawn = [toy.oracle_logprobs(line, settings) for line in np.asarray(logits)]
        is_kept = np.isfinite(drawn)

    def plain_loss(params: Any) -> Any:
        logits, tokens = plain_logits(policy, params, out)
        logprobs = jax.nn.log_softmax(jnp.where(is_kept, logits / temperature, -1e300))
        own = logprobs[np.arange(len(tokens)), tokens]
        entropy = -jnp.sum(jnp.where(is_kept, jnp.exp(logprobs) * logprobs, 0), -1)
        return jnp.sum(weights[0] * own) + jnp.sum(weights[1] * entropy)

    def loss(params: Any) -> jax.Array:
        found = er_jax.score(
            policy, params, out, config=config, entropy=True, chunk_tokens=chunk_tokens
        )
        assert found.entropy is not None
        own, entropy = found.logprobs[out.completion_mask], found.entropy
        entropy = entropy[out.completion_mask]
        return jnp.sum(weights[0] * own) + jnp.sum(weights[1] * entropy)

    expected = jax.jit(jax.value_and_grad(plain_loss))(params)
    found = jax.jit(jax.value_and_grad(loss))(params)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


@pytest.mark.parametrize(
    "kind", [pytest.param("temperature", marks=pytest.mark.slow), "processed"]
)
def test_tokens_that_truncation_leaves_out_count_as_kept(x64: None, kind: str) -> None:
    logits = jnp.array([[2.0, 1.0, 0.5, -1.0], [0.0, 3.0, 2.5, -jnp.inf]])
    settings = toy.settings(
        temperature=0.5, top_k=2, logprob_kind=sampling.LogprobKind[kind.upper()]
    )
    tokens = jnp.array([2, 1])

    def by_hand(logits: jax.Array) -> jax.Array:
        kept = np.array(
            [[1, 1, 1, 0], [0, 1, 1, 0]] if kind == "processed" else [1] * 4
        )
        scores = jnp.where(kept == 1, logits / 0.5, -jnp.inf)
        return jax.nn.log_softmax(scores)[np.arange(2), tokens]

    def found(logits: jax.Array) -> jax.Array:
        return sampling.scored_logprobs(logits, tokens, settings)[0]

    np.testing.assert_allclose(found(logits), by_hand(logits), rtol=1e-12)
    # Forwards and backwards; a masked logit has no gradient.
    for jacobian in (jax.jacrev, jax.jacfwd):
        np.testing.assert_allclose(
            jacobian(found)(logits), jax.jacrev(by_hand)(logits), atol=1e-12
        )


def test_entropies_are_those_of_what_is_sampled(x64: None) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (6, 11))
    for temperature in (0.0, 0.6):
        settings = toy.settings(
            temperature=temperature, top_p=0.8, min_p=0.05,
            logprob_kind=sampling.LogprobKind.PROCESSED,
        )  # fmt: skip
        probs = toy.oracle_table(logits, settings)
        expected = -np.sum(probs * np.log(np.where(probs > 0, probs, 1)), axis=-1)
        _, found = sampling.scored_logprobs(
            jnp.asarray(logits), jnp.argmax(logits, -1), settings
        )
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.slow
def test_gradients_of_many_pieces_are_summed_wide() -> None:
    """In bfloat16 a sum of 64 equal gradients would be off by several per cent."""
    policy = er_jax.Decoder(dataclasses.replace(SIZES, dtype="bfloat16"))
    params = policy.init(jax.random.key(0))

    def grad(rows: int) -> Any:
        out = jax.tree.map(lambda a: np.repeat(a[:1], rows, axis=0), sampled())

        def loss(params: Any) -> jax.Array:
            return er_jax.score(
                policy, params, out, config=CONFIG, chunk_tokens=32
            ).logprobs.sum()

        grads = jax.jit(jax.grad(loss))(params)
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {
            jnp.dtype("bfloat16")
        }
        return jax.tree.map(lambda x: np.asarray(x, np.float32), grads)

    # Both in a loop over chunks: one chunk alone is compiled, and rounded, otherwise.
    two, many = grad(2), grad(64)
    for few, rows in zip(*map(jax.tree.leaves, (two, many)), strict=True):
        np.testing.assert_allclose(rows, 32 * few, atol=0.01 * 32 * np.abs(few).max())


# ------------------------------------------------------------------ memory, programs


def lowered(rows: int, vocab_size: int, *, is_gradient: bool) -> Any:
    """Return the program of a loss over `rows` rows of 16 + 48 tokens, compiled."""
    policy = er_jax.Decoder(dataclasses.replace(SIZES, vocab_size=vocab_size))
    params = jax.eval_shape(policy.init, jax.random.key(0))
    shapes: dict[str, Any] = dict(
        prompt_ids=((rows, 16), np.int32), prompt_mask=((rows, 16), np.bool_),
        completion_ids=((rows, 48), np.int32), completion_mask=((rows, 48), np.bool_),
        logprobs=((rows, 48), np.float32), lengths=((rows,), np.int32),
        finish=((rows,), np.int32), version=((rows, 48), np.int32),
        sequence_ids=((rows,), np.int32),
    )  # fmt: skip
    made: Any = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
    out = er_jax.Rollout(**made)

    def loss(params: Any, out: er_jax.Rollout) -> jax.Array:
        return er_jax.score(
            policy, params, out, config=CONFIG, chunk_tokens=512
        ).logprobs.sum()

    function = jax.grad(loss) if is_gradient else loss
    return jax.jit(function).lower(params, out).compile().memory_analysis()


@pytest.mark.parametrize(
    "is_gradient", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_no_logits_of_all_tokens_exist(is_gradient: bool) -> None:
    vocab_size = 4096
    most = 512 // 4 * vocab_size * 4  # bytes of the logits of a piece, float32
    few, many = (
        lowered(rows, vocab_size, is_gradient=is_gradient) for rows in (16, 128)
    )
    all_logits = 128 * 48 * vocab_size * 4
    weights = SIZES.dim * vocab_size * 4
    # A few arrays of a piece: XLA may write what it reduces, for its own library.
    assert many.temp_size_in_bytes < 6 * most + 4 * weights
    assert many.temp_size_in_bytes < all_logits / 4
    # Eight times the rows take no more than the integers of the rows.
    assert many.temp_size_in_bytes < few.temp_size_in_bytes + 128 * 64 * 64


def test_other_settings_compile_nothing(
    compile_counter: Callable[[], AbstractContextManager[CompileCount]],
) -> None:
    out = sampled()
    er_jax.score(POLICY, params_of(), out, config=CONFIG)
    er_jax.score(POLICY, params_of(), out, config=config_of("top-p"))
    with compile_counter() as compiled:
        for name in SETTINGS:
            er_jax.score(POLICY, params_of(3), out, config=config_of(name))
    assert compiled.count == 0, compiled


@pytest.mark.slow
def test_rows_and_weights_over_a_mesh(one_token_pieces: None) -> None:
    policy = er_jax.Decoder(dataclasses.replace(SIZES, num_kv_heads=2))
    params = policy.init(jax.random.key(0))
    out = sampled()
    mesh = layout.rollout_mesh(
        jax.sharding.Mesh(
            np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "model")
        )
    )
    placed = layout.put_on_mesh(policy, params, mesh)
    rows = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(("data", "fsdp"))
    )
    spread = jax.device_put(out, rows)

    @functools.partial(jax.jit, static_argnames="chunk_tokens")
    def loss(params: Any, out: Any, chunk_tokens: int) -> Any:
        def total(params: Any) -> Any:
            found = er_jax.score(
                policy, params, out, config=CONFIG, chunk_tokens=chunk_tokens
            ).logprobs
            return found.sum(), found

        return jax.grad(total, has_aux=True)(params)

    expected, logprobs = loss(params, out, 2048)
    for chunk_tokens in (2048, 4 * 31):
        grads, found = loss(placed, spread, chunk_tokens)
        np.testing.assert_allclose(found, logprobs, atol=2e-5)
        for one, other in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4)


# ---------------------------------------------------------------- a rollout is a tree


def test_a_rollout_is_a_pytree_of_its_arrays() -> None:
    out = sampled()
    leaves = jax.tree.leaves(out)
    assert len(leaves) == len(dataclasses.fields(out)) - 1
    assert {len(leaf) for leaf in leaves} == {len(PROMPTS) * CONFIG.n}
    few = part(out, slice(2, 5))
    np.testing.assert_array_equal(few.completion_ids, out.completion_ids[2:5])
    np.testing.assert_array_equal(few.finish_reason, out.finish_reason[2:5])
    assert few.stats is None and out.stats is not None
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(out)}
    assert ".completion_ids" in names and ".stats" not in names


def test_rollouts_go_through_jit_and_onto_devices() -> None:
    out, traced = sampled(), []

    @jax.jit
    def longest_first(out: er_jax.Rollout) -> er_jax.Rollout:
        traced.append(out)
        order = jnp.argsort(-out.lengths)
        return jax.tree.map(lambda a: a[order], out)

    found = longest_first(out)
    assert isinstance(found, er_jax.Rollout) and isinstance(found.lengths, jax.Array)
    order = np.argsort(-out.lengths, kind="stable")
    np.testing.assert_array_equal(found.lengths, out.lengths[order])
    np.testing.assert_array_equal(found.finish_reason, out.finish_reason[order])
    longest_first(sampled("raw"))  # other stats, the same program
    assert len(traced) == 1
    placed = jax.device_put(out)
    assert isinstance(placed.completion_mask, jax.Array)
    np.testing.assert_array_equal(placed.finish_reason, out.finish_reason)
    back = jax.device_get(placed)
    assert isinstance(back.lengths, np.ndarray)
    both = jax.tree.map(lambda *a: np.concatenate(a), out, sampled("raw"))
    assert both.completion_ids.shape == (16, 24)


# ----------------------------------------------------------------------- wrong calls


def replaced(**arrays: Any) -> er_jax.Rollout:
    return dataclasses.replace(sampled(), **arrays)


BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no rollout": (
        lambda: dict(rollout=[[1, 2]]),
        "rollout.prompt_ids=None is no array; give a Rollout",
    ),
    "other rows": (
        lambda: dict(rollout=replaced(completion_ids=np.zeros((3, 24), np.int32))),
        r"completion_ids has shape \(3, 24\) and .* take the same rows",
    ),
    "other lengths": (
        lambda: dict(rollout=replaced(lengths=np.zeros(3, np.int32))),
        r"lengths has shape \(3,\), .*take the same rows",
    ),
    "one row": (
        lambda: dict(rollout=jax.tree.map(lambda a: a[0], sampled())),
        r"prompt_ids has shape \(8,\); give rows",
    ),
    "no rows": (
        lambda: dict(rollout=part(sampled(), slice(0, 0))),
        r"prompt_ids has shape \(0, 8\); give rows of token ids, at least one",
    ),
    "no ids": (
        lambda: dict(rollout=replaced(prompt_ids=np.zeros((8, 8), np.float32))),
        "prompt_ids is float32; token ids are whole numbers",
    ),
    "prompts padded behind": (
        lambda: dict(rollout=replaced(prompt_mask=sampled().prompt_mask[:, ::-1])),
        "prompt_mask is not left-padded in row 0: .*move padding to the front",
    ),
    "no config": (lambda: dict(config=0.7), "config=0.7 is no RolloutConfig"),
    "no chunks": (
        lambda: dict(chunk_tokens=0),
        "chunk_tokens=0 must be a whole number from 1",
    ),
    "no policy": (lambda: dict(policy=3), "policy=3 has no vocab_size"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name: str) -> None:
    make, message = BAD[name]
    call: dict[str, Any] = dict(
        policy=POLICY, params=params_of(), rollout=sampled(), config=CONFIG
    )
    with pytest.raises(ValueError, match=message):
        er_jax.score(**(call | make()))


@dataclasses.dataclass(frozen=True)
class Narrow(er_jax.Decoder):
    """A policy that rounds its logits, which the contract forbids."""

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        return super().logits(params, hidden).astype(jnp.bfloat16)


def test_rounded_logits_are_refused() -> None:
    message = re.escape(
        "policy.logits returns bfloat16[8, 24, 24]; it must return float32"
    )
    with pytest.raises(ValueError, match=message):
        er_jax.score(Narrow(SIZES), params_of(), sampled(), config=CONFIG)
