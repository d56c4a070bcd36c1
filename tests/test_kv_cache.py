"""The cache: what is written where, attention against a float64 oracle, moving rows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from er_jax import attention, kv_cache
from er_jax.types import NONE

S = 24


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def attend_oracle(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """One query, one head at a time: softmax over the entries up to its position."""
    batch, num_queries, heads, size = query.shape
    group = heads // (keys.shape[2] // size)
    out = np.zeros(query.shape)
    for b, t, h in np.ndindex(batch, num_queries, heads):
        seen = positions[b, t] + 1
        part = slice(h // group * size, (h // group + 1) * size)
        if seen:
            scores = keys[b, :seen, part] @ query[b, t, h] / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ values[b, :seen, part]
    return out.reshape(batch, num_queries, heads * size)


attend = jax.jit(kv_cache.attend)
write = jax.jit(kv_cache.write)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("num_queries", [1, 5, 20])
def test_attention_by_either_path_equals_the_oracle(
    x64: None, num_queries: int, kv_heads: int
) -> None:
    assert 5 <= attention.MERGED_QUERIES < 20  # both paths are met
    query = normal(2, num_queries, 4, 6)
    keys, values = normal(2, S, kv_heads * 6, seed=1), normal(2, S, kv_heads * 6)
    positions = np.random.default_rng(2).integers(-1, S, (2, num_queries))
    positions[0, 0], positions[1, 0] = S - 1, -1
    positions = positions.astype(np.int32)
    out = attend(query, keys, values, positions)
    expected = attend_oracle(query, keys, values, positions)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
    assert (np.asarray(out)[1, 0] == 0).all()  # padding sees nothing


@pytest.mark.parametrize(
    ("constant", "num_queries", "heads"),
    [("MERGED_QUERIES", 8, 6), ("KEYS_FIRST_QUERIES", 2, 4)],
)
def test_the_two_paths_agree(
    x64: None,
    monkeypatch: pytest.MonkeyPatch,
    constant: str,
    num_queries: int,
    heads: int,
) -> None:
    """Eight queries, merged over heads or not: at the limit, and one above it."""
    query = normal(3, num_queries, heads, 4)
    keys = normal(3, S, heads // 2 * 4, seed=1)
    values = normal(3, S, heads // 2 * 4, seed=2)
    positions = np.tile(np.arange(num_queries, dtype=np.int32) + 9, (3, 1))
    results, programs = [], []
    for most in (8, 7):
        monkeypatch.setattr(attention, constant, most)
        # A new function each time, or the first trace would be used again.
        one_path = jax.jit(lambda *arrays: kv_cache.attend(*arrays))
        traced = one_path.trace(query, keys, values, positions)
        programs.append(str(traced.jaxpr))
        results.append(traced.lower().compile()(query, keys, values, positions))
    assert programs[0] != programs[1]
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-13)


def test_many_queries_are_taken_in_blocks(
    x64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven of twenty at a time: results, gradients, and no square of scores."""
    query = normal(2, 20, 4, 6)
    keys, values = normal(2, S, 12, seed=1), normal(2, S, 12, seed=2)
    values[1, 5] = np.nan
    positions = np.tile(np.arange(20, dtype=np.int32) - 1, (2, 1))
    positions[1] = np.minimum(positions[1], 11)

    def both(query: Any, keys: Any, values: Any) -> tuple[Any, Any]:
        out = attention.attend(query, keys, values, jnp.asarray(positions))
        return jnp.sum(jnp.sin(out[0])), out

    def run() -> tuple[Any, str]:
        function = jax.value_and_grad(lambda *x: both(*x), (0, 1, 2), has_aux=True)
        lowered = jax.jit(function).lower(query, keys, values)
        return lowered.compile()(query, keys, values), lowered.as_text()

    whole, text = run()
    monkeypatch.setattr(attention, "BLOCK_SCORES", 7 * S)
    monkeypatch.setattr(attention, "LEAST_BLOCK", 1)
    found, in_blocks = run()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), found, whole
    )
    square, part = (f"tensor<2x2x2x{count}x{S}xf64>" for count in (20, 7))
    assert square in text and square not in in_blocks
    assert part in in_blocks


@pytest.fixture
def long_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take caches of 24 for long: three blocks, the last of which overlaps."""
    monkeypatch.setattr(attention, "LONG_CACHE", S)
    monkeypatch.setattr(attention, "BLOCK_ENTRIES", 1)
    monkeypatch.setattr(attention, "LEAST_ENTRIES", 10)
    monkeypatch.setattr(attention, "LIVE_QUERIES", 7)


def fresh_attend(request: pytest.FixtureRequest, is_long: bool) -> Any:
    """Return a jitted `attend` for short caches, or for those of `long_caches`."""
    if not is_long:
        return attend
    request.getfixturevalue("long_caches")
    return jax.jit(lambda *arrays: kv_cache.attend(*arrays))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("num_queries", [1, 5, 20])
def test_attention_to_a_long_cache_equals_the_oracle(
    request: pytest.FixtureRequest, x64: None, num_queries: int, kv_heads: int
) -> None:
    """Heads merged and apart; one block of queries and several; padding."""
    query = normal(2, num_queries, 4, 6)
    keys, values = normal(2, S, kv_heads * 6, seed=1), normal(2, S, kv_heads * 6)
    attend = fresh_attend(request, is_long=True)
    for last in (S - 1, 10):  # of the cache, and the first one of a block
        positions = np.random.default_rng(2).integers(-1, last + 1, (2, num_queries))
        positions[0, 0], positions[1, 0] = last, -1
        positions = positions.astype(np.int32)
        out = attend(query, keys, values, positions)
        expected = attend_oracle(query, keys, values, positions)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
        assert (np.asarray(out)[1, 0] == 0).all()  # padding sees nothing


def test_a_key_of_minus_infinity_hides_nowhere(
    request: pytest.FixtureRequest,
) -> None:
    """Its score may be -inf, which has no weight; five queries meet heads apart."""
    query = normal(2, 5, 4, 6).astype(np.float32)
    query[..., 2] = 1
    keys = normal(2, S, 12, seed=1).astype(np.float32)
    values = normal(2, S, 12, seed=2).astype(np.float32)
    positions = np.tile(np.arange(5, dtype=np.int32) + 9, (2, 1))
    attend = fresh_attend(request, is_long=True)
    clean = np.asarray(attend(query, keys, values, positions))
    keys[0, 12, [2, 8]] = -np.inf  # of both key heads
    out = np.asarray(attend(query, keys, values, positions))
    assert np.isnan(out[0, 3:]).all()
    np.testing.assert_array_equal(out[0, :3], clean[0, :3])
    np.testing.assert_array_equal(out[1], clean[1])


@pytest.mark.parametrize("num_queries", [1, 5, 20])
def test_blocks_behind_the_last_live_entry_are_not_read(
    x64: None, long_caches: None, num_queries: int
) -> None:
    """Values there that are not finite spoil nothing, though nothing is cleaned."""
    query = normal(2, num_queries, 4, 6)
    keys, values = normal(2, S, 12, seed=1), normal(2, S, 12, seed=2)
    positions = np.full((2, num_queries), 9, np.int32)  # all of the first block
    positions[1] = 3

    def run(query: Any, keys: Any, values: Any) -> Any:
        out = attention._attend_entries(
            query, keys, values, jnp.asarray(positions), 10, None
        )
        return out[0]

    clean = jax.jit(run)(query, keys, values)
    values[:, 10:] = np.nan  # would be NaN times zero
    np.testing.assert_array_equal(jax.jit(run)(query, keys, values), clean)
    values[:, 9] = np.nan
    assert np.isnan(jax.jit(run)(query, keys, values)).all()


def test_gradients_through_a_long_cache(x64: None, long_caches: None) -> None:
    """Those of the whole form; scores of all blocks are not kept for them."""
    query = normal(2, 20, 4, 6)
    keys, values = normal(2, S, 12, seed=1), normal(2, S, 12, seed=2)
    values[1, 5] = np.nan
    positions = np.tile(np.arange(20, dtype=np.int32) - 1, (2, 1))
    positions[1] = np.minimum(positions[1], 11)

    def gradients(attend: Any) -> Any:
        def total(query: Any, keys: Any, values: Any) -> Any:
            out = attend(query, keys, values, jnp.asarray(positions))
            return jnp.sum(jnp.sin(out[0]))

        lowered = jax.jit(jax.grad(total, (0, 1, 2))).lower(query, keys, values)
        return lowered.compile()(query, keys, values), lowered.as_text()

    found, text = gradients(lambda *x: kv_cache.attend(*x))
    expected, _ = gradients(functools.partial(attention._attend_many, span=None))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
        found,
        expected,
    )
    assert "2x14x10xf64" in text  # scores of one block, of seven queries of two heads
    assert "3x2x14x10xf64" not in text


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("junk", [1e30, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("num_queries", [3, 20])
def test_entries_that_are_not_visible_change_nothing(
    request: pytest.FixtureRequest, num_queries: int, junk: float, is_long: bool
) -> None:
    """Bit for bit, whatever they hold, and by either path."""
    attend = fresh_attend(request, is_long)
    query = normal(2, num_queries, 4, 6).astype(np.float32)
    keys = normal(2, S, 12, seed=1).astype(np.float32)
    values = normal(2, S, 12, seed=2).astype(np.float32)
    positions = np.minimum(np.arange(num_queries), 9).astype(np.int32)
    positions = np.stack([positions, np.minimum(positions, 4)])
    clean = attend(query, keys, values, positions)
    dirty_keys, dirty_values = keys.copy(), values.copy()
    dirty_keys[0, 10:], dirty_values[0, 10:] = junk, -junk
    dirty_keys[1, 5:], dirty_values[1, 5:] = -junk, junk
    dirty = attend(query, dirty_keys, dirty_values, positions)
    np.testing.assert_array_equal(dirty, clean)
    # The last visible one does count.
    values[1, positions[1].max()] += 1
    assert not np.array_equal(attend(query, keys, values, positions)[1], clean[1])


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("junk", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("num_queries", [1, 3, 20])
def test_a_query_that_sees_a_non_finite_entry_is_nan_and_no_other(
    request: pytest.FixtureRequest,
    num_queries: int,
    junk: float,
    where: str,
    is_long: bool,
) -> None:
    """As the entry of a token that was only drafted is seen by those behind it."""
    attend = fresh_attend(request, is_long)
    query = normal(2, num_queries, 4, 6).astype(np.float32)
    keys = normal(2, S, 12, seed=1).astype(np.float32)
    values = normal(2, S, 12, seed=2).astype(np.float32)
    positions = np.tile(np.arange(num_queries, dtype=np.int32), (2, 1))
    positions[1, -1] = NONE  # padding sees nothing
    clean = np.asarray(attend(query, keys, values, positions))
    at = num_queries // 2
    (keys if where == "keys" else values)[:, at, 7] = junk  # one number of one head
    out = np.asarray(attend(query, keys, values, positions))
    sees = positions >= at
    np.testing.assert_array_equal(out[~sees], clean[~sees])
    assert np.isnan(out[sees]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_bad_entry_of_one_row_changes_no_bit_of_another(dtype: Any) -> None:
    """In caches longer than what is cleaned at once."""
    size = 2 * attention.CAREFUL_ENTRIES + 64
    arrays = [normal(3, n, d, seed=n) for n, d in ((2, 24), (size, 12), (size, 12))]
    query, keys, values = (jnp.asarray(x, dtype) for x in arrays)
    query = query.reshape(3, 2, 4, 6)
    positions = np.array([[250, 251], [310, 311], [3, 4]], np.int32)
    clean = np.asarray(attend(query, keys, values, positions), np.float32)
    values = values.at[1, 311].set(jnp.nan).at[2, 200].set(jnp.inf)
    out = np.asarray(attend(query, keys, values, positions), np.float32)
    np.testing.assert_array_equal(out[0], clean[0])
    assert np.isnan(out[1, 1]).all()
    np.testing.assert_allclose(out[1, 0], clean[1, 0], rtol=0, atol=0.02)
    np.testing.assert_allclose(out[2], clean[2], rtol=0, atol=0.02)


def test_bfloat16_attention_has_float32_sums() -> None:
    query, keys = normal(1, 1, 2, 8), normal(1, 256, 8, seed=1)
    values = 1 + normal(1, 256, 8, seed=2)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (query, keys, values)]
    positions = np.full((1, 1), 255, np.int32)
    out = attend(*low, positions)
    assert out.dtype == jnp.bfloat16
    wide = [np.asarray(x, np.float64) for x in low]
    exact = attend_oracle(wide[0], wide[1], wide[2], positions)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
def test_write_puts_entries_at_their_positions(trailing: tuple[int, ...]) -> None:
    entries, new = normal(3, 6, *trailing), normal(3, 4, *trailing, seed=1)
    entries, new = entries.astype(np.float32), new.astype(np.float32)
    # In order, out of order, padding, at and past the end, far below zero.
    positions = np.array([[0, 1, 2, 3], [5, 2, -1, 6], [-1, -6, 100, 4]], np.int32)
    expected = entries.copy()
    for row, column in np.ndindex(positions.shape):
        if 0 <= positions[row, column] < 6:
            expected[row, positions[row, column]] = new[row, column]
    np.testing.assert_array_equal(write(entries, new, positions), expected)


def test_write_keeps_the_dtype_of_the_cache() -> None:
    entries = jnp.zeros((1, 2, 3), jnp.bfloat16)
    out = write(entries, jnp.ones((1, 1, 3), jnp.float32), np.zeros((1, 1), np.int32))
    assert out.dtype == jnp.bfloat16
    assert out[0, 0, 0] == 1


def test_take_rows() -> None:
    cache = [normal(4, 5, 2).astype(np.float32), normal(4, 5).astype(np.float32)]
    taken = kv_cache.take_rows(cache, jnp.array([3, 0, 0]))
    for old, new in zip(cache, taken, strict=True):
        np.testing.assert_array_equal(new, old[[3, 0, 0]])


@pytest.mark.parametrize("length", [2, 5, 9])
def test_resize(length: int) -> None:
    cache = [jnp.asarray(normal(2, 5, 3)), jnp.asarray(normal(2, 5))]
    for old, new in zip(cache, kv_cache.resize(cache, length), strict=True):
        assert new.shape == (2, length, *old.shape[2:])
        kept = min(length, 5)
        np.testing.assert_array_equal(new[:, :kept], old[:, :kept])
        assert (new[:, kept:] == 0).all()


def test_insert_row_clears_what_lies_behind() -> None:
    cache = [jnp.full((3, 6, 2), jnp.nan)]
    prefix = [jnp.asarray(normal(2, 4, 2), jnp.float32)]
    one = jnp.int32(1)
    out = kv_cache.insert_row(cache, prefix, one, one, jnp.int32(4))[0]
    np.testing.assert_array_equal(out[1, :4], prefix[0][1])
    assert (out[1, 4:] == 0).all()
    assert np.isnan(out[jnp.array([0, 2])]).all()  # other rows are left alone
