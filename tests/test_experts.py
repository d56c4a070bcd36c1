"""Layers of experts: the loop over those that are chosen, and what it reads."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from er_jax import experts

pytestmark = pytest.mark.usefixtures("unoptimized_module")

DIM, WIDTH, COUNT, CHOSEN = 12, 10, 6, 2
silu = jax.nn.silu


def layer_of(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, jnp.float32)

    return {
        "router": weight(DIM, COUNT),
        "gate_experts": weight(COUNT, DIM, WIDTH),
        "up_experts": weight(COUNT, DIM, WIDTH),
        "down_experts": weight(COUNT, WIDTH, DIM),
    }


def tokens_of(*shape: int) -> jax.Array:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(*shape, DIM)), jnp.float32)


def dense(x: jax.Array, shares: jax.Array, weights: Any) -> jax.Array:
    """Return the weighted sum of all experts, each on all tokens."""
    gate, up, down = weights
    hidden = silu(jnp.einsum("nd,edf->enf", x, gate))
    hidden = hidden * jnp.einsum("nd,edf->enf", x, up)
    return jnp.einsum("ne,enf,efd->nd", shares, hidden, down)


def parts(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array, Any]:
    shares = experts.routed(x @ layer["router"], CHOSEN, True)
    return x, shares, tuple(layer[name] for name in experts.NAMES)


def test_a_token_is_given_to_its_experts() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.1, 0.3]]))
    scaled = experts.routed(logits, 2, True)
    np.testing.assert_allclose(scaled, [[0, 0.625, 0, 0.375]], rtol=1e-6)
    plain = experts.routed(logits, 2, False)
    np.testing.assert_allclose(plain, [[0, 0.5, 0, 0.3]], rtol=1e-6)


def test_the_loop_is_the_sum_over_the_chosen() -> None:
    x, shares, weights = parts(tokens_of(5), layer_of())
    assert ((shares != 0).sum(axis=1) == CHOSEN).all()
    found = experts._looped(x, shares, weights, silu)
    np.testing.assert_allclose(found, dense(x, shares, weights), atol=1e-5)


def test_tokens_sorted_by_expert_give_the_same() -> None:
    x, shares, weights = parts(tokens_of(9), layer_of())
    shares = shares.at[3].set(0)  # padding
    ragged = functools.partial(experts._ragged, act=silu, num_chosen=CHOSEN)
    wanted = dense(x, shares, weights)
    np.testing.assert_allclose(ragged(x, shares, weights), wanted, atol=1e-5)
    # Its gradient, which training on a TPU takes.
    of_ragged, of_dense = (
        jax.grad(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), argnums=(0, 1, 2))(
            x, shares, weights
        )
        for f in (ragged, dense)
    )
    chosen = shares != 0
    np.testing.assert_allclose(of_ragged[0], of_dense[0], atol=1e-5)
    np.testing.assert_allclose(
        jnp.where(chosen, of_ragged[1], 0), jnp.where(chosen, of_dense[1], 0), atol=1e-5
    )
    for one, other in zip(of_ragged[2], of_dense[2], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_gradient_is_that_of_the_sum() -> None:
    x, shares, weights = parts(tokens_of(7), layer_of())

    def loss(function: Any) -> Any:
        return lambda x, w: jnp.sum(jnp.sin(function(x, shares, w)))

    found = jax.grad(
        loss(lambda *args: experts._one_by_one(silu, *args)), argnums=(0, 1)
    )(x, weights)
    wanted = jax.grad(loss(dense), argnums=(0, 1))(x, weights)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_the_router_learns() -> None:
    """The whole layer's gradient reaches it, and that of finite differences is it."""
    layer, x = layer_of(), tokens_of(1, 4)
    real = jnp.ones((1, 4), jnp.bool_)

    def loss(router: jax.Array) -> jax.Array:
        out = experts.feed_forward(
            x, layer | {"router": router}, real, silu, CHOSEN, True
        )
        return jnp.sum(jnp.sin(out))

    router = layer["router"]
    slope = jax.grad(loss)(router)
    step = 1e-2 * jnp.ones_like(router).at[:, 1::2].set(-1.0) * 1e-1
    change = loss(router + step) - loss(router - step)
    assert float(jnp.abs(slope).max()) > 1e-2
    np.testing.assert_allclose(change, 2 * jnp.sum(slope * step), rtol=2e-2)


def test_padding_chooses_no_expert() -> None:
    """Its output is zero, and experts that only it would choose are not run."""
    layer, x = layer_of(), tokens_of(2, 3)
    is_real = jnp.array([[True, False, False], [False] * 3])
    out = experts.feed_forward(x, layer, is_real, silu, CHOSEN, True)
    assert (out[0, 1:] == 0).all() and (out[1] == 0).all()
    chosen = experts.routed(x[0, :1] @ layer["router"], CHOSEN, True)[0] != 0
    broken = {
        name: jnp.where(chosen[:, None, None], weight, jnp.nan)
        if name != "router" else weight
        for name, weight in layer.items()
    }  # fmt: skip
    again = experts.feed_forward(x, broken, is_real, silu, CHOSEN, True)
    np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_experts_are_quantized_one_by_one(bits: int, group_size: int | None) -> None:
    """A stacked weight's codes and scales are those of each expert alone."""
    layer = layer_of()
    config = er_jax.DrafterConfig(bits=bits, group_size=group_size)
    whole = er_jax.quantize(layer, config)
    for name in experts.NAMES:
        for index in range(COUNT):
            alone = er_jax.quantize({name: layer[name][index]}, config)[name]
            one = jax.tree.map(lambda leaf, i=index: leaf[i], whole[name])
            np.testing.assert_array_equal(one.codes, alone.codes)
            np.testing.assert_array_equal(one.scale, alone.scale)
    x, is_real = tokens_of(2, 3), jnp.ones((2, 3), jnp.bool_)
    close = experts.feed_forward(
        x, whole | {"router": layer["router"]}, is_real, silu, CHOSEN, True
    )
    wanted = experts.feed_forward(x, layer, is_real, silu, CHOSEN, True)
    spread = float(jnp.std(wanted))
    assert float(jnp.abs(close - wanted).max()) < spread * (0.1 if bits == 8 else 1)


def test_experts_that_tokens_are_expected_to_choose() -> None:
    assert experts.expected_touched(128, 8, 1) == pytest.approx(8)
    assert experts.expected_touched(4, 2, 2) == pytest.approx(3)
    rng = np.random.default_rng(0)
    drawn = [
        len({e for _ in range(5) for e in rng.permutation(16)[:3]}) for _ in range(4000)
    ]
    wanted = experts.expected_touched(16, 3, 5)
    # The standard error of the mean is 0.02: one false alarm in ten thousand.
    assert np.mean(drawn) == pytest.approx(wanted, abs=4 * np.std(drawn) / 4000**0.5)
