"""The target distribution, the noise and the meanings of a log-probability.

Distributions are compared with a float64 oracle that sorts (tests/toy.py), the noise
generator bit for bit with published vectors and with JAX's own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from er_jax import sampling
from er_jax.types import LogprobKind, Purpose, Sampling
from tests.toy import (
    assert_rate,
    assert_same_distribution,
    oracle_logprobs,
    oracle_probs,
    settings,
)

TEMPERATURES = (0.0, 1e-6, 0.7, 1.0, 1.3)
TRUNCATIONS: tuple[dict[str, Any], ...] = tuple(
    {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    for top_k in (0, 1, 5, 1000)
    for top_p in (1.0, 0.9, 0.35)
    for min_p in (0.0, 0.1)
)

target_logprobs = jax.jit(sampling.target_logprobs)


def random_logits(rows: int, vocab_size: int, *, seed: int = 3) -> np.ndarray:
    """Rows of different widths; the first has a tie for the best token."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.uniform(0.3, 6, (rows, 1)), (rows, vocab_size))
    logits[0, 2] = logits[0, 6] = logits[0].max() + 0.25
    return logits


def check_target(logits: np.ndarray, config: Sampling, *, tolerance: float) -> None:
    """Compare with the oracle: which tokens are possible exactly, and how likely."""
    found = np.asarray(target_logprobs(logits, config))
    wanted = np.stack([oracle_logprobs(line, config) for line in logits])
    assert found.dtype == logits.dtype
    possible = np.isfinite(wanted)
    never = np.asarray(sampling.NEVER, found.dtype)
    np.testing.assert_array_equal(found != never, possible)
    np.testing.assert_allclose(
        found[possible], wanted[possible], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_target_equals_the_oracle(temperature: float, x64: None) -> None:
    logits = random_logits(12, 37)
    for truncation in TRUNCATIONS:
        config = settings(temperature=temperature, **truncation)
        check_target(logits, config, tolerance=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_target_equals_the_oracle_in_float32(temperature: float) -> None:
    logits = random_logits(12, 37).astype(np.float32)
    for truncation in TRUNCATIONS:
        config = settings(temperature=temperature, **truncation)
        check_target(logits, config, tolerance=2e-6)


def test_truncation_keeps_ties(x64: None) -> None:
    """Probabilities .4 .2 .2 .1 .1: what each rule keeps, worked out by hand."""
    logits = np.log(np.array([[0.1, 0.2, 0.4, 0.2, 0.1]]))

    def kept(**truncation: Any) -> list[int]:
        logprobs = target_logprobs(logits, settings(**truncation))
        return np.flatnonzero(np.asarray(logprobs)[0] > sampling.NEVER).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == [2]
    assert kept(top_k=2) == [1, 2, 3]  # the second and third best are equal
    assert kept(top_k=3) == [1, 2, 3]
    assert kept(top_k=4) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.39) == [2]
    assert kept(top_p=0.41) == [1, 2, 3]  # one of .2 is enough, the other equals it
    assert kept(top_p=0.79) == [1, 2, 3]
    assert kept(top_p=0.81) == [0, 1, 2, 3, 4]
    assert kept(top_p=1e-6) == [2]
    assert kept(min_p=0.49) == [1, 2, 3]
    assert kept(min_p=0.51) == [2]
    assert kept(min_p=1.0) == [2]
    # Top-p is of what top-k left: .5 .25 .25, of which .5 is the best token alone.
    assert kept(top_k=3, top_p=0.49) == [2]
    assert kept(top_k=3, top_p=0.51) == [1, 2, 3]
    # Temperature comes first: at 2 the best has .27 and min-p compares square roots.
    assert kept(temperature=2.0, top_p=0.39) == [1, 2, 3]
    assert kept(temperature=2.0, min_p=0.49) == [0, 1, 2, 3, 4]
    assert kept(temperature=0.5, top_p=0.6) == [2]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_digits_of_other_devices_find_the_same_thresholds(
    bits: int, dtype: str, x64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several bits in one pass, whether or not they divide the key's."""
    logits = random_logits(9, 37).astype(dtype)
    logits[0, 5:] = -np.inf
    logits[1] = 0.0
    logits[2, ::3] = logits[2, 0]
    truncations: list[dict[str, Any]] = [
        *({"top_k": k} for k in (1, 2, 7, 36, 37, 1000)),
        *({"top_p": p} for p in (1e-6, 0.3, 0.9, 0.999999)),
        {"top_k": 9, "top_p": 0.5},
    ]
    found = []
    for number in (1, bits):
        monkeypatch.setattr(sampling, "CPU_BITS", number)
        found.append([target_logprobs(logits, settings(**t)) for t in truncations])
    np.testing.assert_array_equal(found[0], found[1])
    assert len({int((x > sampling.NEVER).sum()) for x in found[0]}) > 6


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.7, 1.3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_masked_but_one(temperature: float, dtype: str, x64: None) -> None:
    logits = np.full((1, 6), -np.inf, dtype)
    logits[0, 4] = -3.0
    wanted = np.full((1, 6), sampling.NEVER, dtype)
    wanted[0, 4] = 0
    for truncation in TRUNCATIONS:
        config = settings(temperature=temperature, **truncation)
        np.testing.assert_array_equal(target_logprobs(logits, config), wanted)


def test_masked_tokens_are_never_kept(x64: None) -> None:
    """Even where top-k asks for more tokens than there are."""
    logits = random_logits(4, 20)
    logits[:, ::2] = -np.inf
    for truncation in TRUNCATIONS:
        check_target(logits, settings(**truncation), tolerance=1e-11)
    logprobs = np.asarray(target_logprobs(logits, settings(top_k=15)))
    assert (logprobs[:, ::2] == sampling.NEVER).all()


def test_greedy_takes_the_first_of_equals() -> None:
    logits = np.array([[1.0, 3.0, 3.0, 2.0]], np.float32)
    logprobs = np.asarray(target_logprobs(logits, settings(temperature=0)))
    never = np.float32(sampling.NEVER)
    np.testing.assert_array_equal(logprobs, [[never, 0, never, never]])


def test_target_of_a_row_does_not_depend_on_other_rows() -> None:
    logits = random_logits(8, 33).astype(np.float32)
    changed = logits.copy()
    changed[[0, 3, 5]] = np.nan
    config = settings(temperature=0.7, top_k=9, top_p=0.8, min_p=0.01)
    same = [1, 2, 4, 6, 7]
    np.testing.assert_array_equal(
        np.asarray(target_logprobs(logits, config))[same],
        np.asarray(target_logprobs(changed, config))[same],
    )


def test_rows_with_settings_of_their_own() -> None:
    """Each row gets what it gets alone, with numbers; the tail is below rounding."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (6, 3, 300)).astype(np.float32)
    logits[..., 100:] -= 18
    own: dict[str, list[Any]] = {
        "temperature": [1.0, 0.0, 0.7, 1.4, 1.0, 2.0],
        "top_k": [0, 0, 7, 0, 250, 1000],
        "top_p": [1.0, 1.0, 1.0, 0.8, 0.5, 1.0],
        "min_p": [0.0, 0.0, 0.1, 0.0, 0.0, 0.0],
    }
    plain = settings(logprob_kind=LogprobKind.PROCESSED)
    columns = {k: np.array(v, getattr(plain, k).dtype) for k, v in own.items()}
    rows = dataclasses.replace(plain, **columns)
    found = np.asarray(target_logprobs(logits, rows))
    noise = rng.gumbel(size=logits.shape).astype(np.float32)
    draw = jax.jit(sampling.draw)
    tokens = draw(logits, rows, noise)
    drawn = jax.jit(sampling.drawn_logprobs)(logits, tokens, rows)
    scored, entropy = jax.jit(sampling.scored_logprobs)(logits, tokens, rows)
    assert sampling.is_truncated(rows)
    for row in range(6):
        one = settings(**{name: values[row] for name, values in own.items()})
        wanted = np.asarray(target_logprobs(logits[row], one))
        np.testing.assert_array_equal(found[row] == sampling.NEVER, wanted < -1e29)
        np.testing.assert_allclose(found[row], wanted, rtol=1e-6, atol=1e-6)
        best = draw(logits[row], one, noise[row])
        np.testing.assert_array_equal(tokens[row], best)
        probs = np.exp(wanted.astype(np.float64))
        at = np.take_along_axis(wanted, np.asarray(best)[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(drawn[row], at, atol=1e-5)
        np.testing.assert_allclose(scored[row], at, atol=1e-5)
        bits = -np.sum(probs * np.where(probs > 0, wanted, 0), axis=-1)
        np.testing.assert_allclose(entropy[row], bits, atol=1e-4)


def test_is_distribution() -> None:
    inf, nan = np.inf, np.nan
    lines = [
        ([0.0, 1.0, 2.0], True),
        ([-inf, 5.0, -inf], True),
        ([3e38, -3e38, 0.0], True),
        ([0.0, nan, 2.0], False),
        ([-inf, nan, -inf], False),
        ([0.0, inf, 2.0], False),
        ([inf, inf, inf], False),
        ([inf, -inf, -inf], False),
        ([-inf, -inf, -inf], False),
    ]
    logits = jnp.array([line for line, _ in lines], jnp.float32)
    wanted = [good for _, good in lines]
    np.testing.assert_array_equal(sampling.is_distribution(logits), wanted)


def test_token_logprobs_by_each_meaning(x64: None) -> None:
    logits = random_logits(9, 21)
    tokens = np.random.default_rng(0).integers(0, 21, 9).astype(np.int32)
    tokens[0] = np.argmax(logits[0])
    token_logprobs = jax.jit(sampling.token_logprobs)
    truncations: list[dict[str, Any]]
    truncations = [{}, {"top_k": 4}, {"top_p": 0.8, "min_p": 0.02}]
    for temperature, truncation in itertools.product((0.0, 0.7, 1.0, 1.3), truncations):
        for kind in LogprobKind:
            config = settings(temperature=temperature, logprob_kind=kind, **truncation)
            plain = {
                LogprobKind.RAW: settings(),
                LogprobKind.TEMPERATURE: settings(temperature=temperature or 1.0),
                LogprobKind.PROCESSED: config,
            }[kind]
            rows = [oracle_logprobs(line, plain) for line in logits]
            wanted = np.stack(rows)[np.arange(9), tokens]
            wanted = np.maximum(wanted, sampling.NEVER)
            target = target_logprobs(logits, config)
            found = token_logprobs(logits, target, tokens, config)
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, wanted, rtol=2e-7, atol=2e-7)


def test_draws_are_the_best_of_logprobs_plus_noise(x64: None) -> None:
    """And their log-probabilities are those of any token."""
    logits = random_logits(9, 21)
    ids = np.arange(9, dtype=np.int32)
    draw = jax.jit(sampling.draw, static_argnames="truncated")
    drawn_logprobs = jax.jit(sampling.drawn_logprobs, static_argnames="truncated")
    for temperature, truncation in itertools.product(TEMPERATURES, TRUNCATIONS):
        for kind in LogprobKind:
            config = settings(temperature=temperature, logprob_kind=kind, **truncation)
            target = target_logprobs(logits, config)
            noise = gumbel(config, ids, ids + 2, 21, "float64")
            wanted = np.argmax(np.asarray(target) + noise, axis=-1)
            is_truncated = sampling.is_truncated(config)
            assert is_truncated == (config.top_k > 0 or config.top_p < 1)
            # The program for truncation is right for all settings.
            for truncated in {is_truncated, True}:
                tokens = draw(logits, config, noise, truncated=truncated)
                np.testing.assert_array_equal(tokens, wanted)
                found = drawn_logprobs(logits, tokens, config, truncated=truncated)
                np.testing.assert_allclose(
                    found,
                    sampling.token_logprobs(
                        jnp.asarray(logits), target, tokens, config
                    ),
                    rtol=2e-7, atol=2e-7,
                )  # fmt: skip


# -- noise -----------------------------------------------------------------------------


def test_threefry_equals_the_published_vectors() -> None:
    """The known answers for Threefry-2x32 with 20 rounds, from Random123."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for words, key, wanted in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
        (pi[:2], pi[2:], (0xC4923A9C, 0x483DF7A0)),
    ):
        found = sampling.threefry(
            (jnp.uint32(key[0]), jnp.uint32(key[1])),
            (jnp.uint32(words[0]), jnp.uint32(words[1])),
        )
        assert tuple(int(word) for word in found) == wanted


def test_threefry_equals_that_of_jax() -> None:
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**32, (2, 512), dtype=np.uint32)
    key = rng.integers(0, 2**32, 2, dtype=np.uint32)
    ours = sampling.threefry((key[0], key[1]), (words[0], words[1]))
    theirs = jax.extend.random.threefry_2x32(jnp.asarray(key), words.reshape(-1))
    np.testing.assert_array_equal(np.concatenate(ours), theirs)


def test_noise_is_the_documented_function(x64: None) -> None:
    """Composed here from JAX's generator, so that old completions can be replayed."""

    def encrypt(key: Any, *words: int) -> Any:
        return jax.extend.random.threefry_2x32(
            jnp.asarray(key, jnp.uint32), jnp.array(words, jnp.uint32)
        )

    stream = encrypt((17, 42), 5, 6 * 4 + Purpose.DRAFT)
    with_start = encrypt(stream, 9, 0)
    for key, start in ((stream, None), (with_start, np.int32(9))):
        unit = np.array([(int(encrypt(key, v, 0)[0]) + 0.5) / 2**32 for v in range(3)])
        noise = gumbel(
            settings(), np.int32(5), np.int32(6), 3, "float64", Purpose.DRAFT, start
        )
        np.testing.assert_allclose(noise, -np.log(-np.log1p(-unit)), rtol=1e-12)
        chance = uniform(
            settings(), np.int32(5), np.int32(6), "float64", Purpose.DRAFT, start
        )
        assert chance == (int(key[0]) + 0.5) / 2**32


@functools.partial(jax.jit, static_argnames=("vocab_size", "dtype", "purpose"))
def gumbel(
    config: Sampling,
    sequence_id: Any,
    position: Any,
    vocab_size: int,
    dtype: str = "float32",
    purpose: Purpose = Purpose.TOKEN,
    start: Any = None,
) -> jax.Array:
    return sampling.gumbel(
        config, sequence_id, position, vocab_size, dtype, purpose=purpose, start=start
    )


@functools.partial(jax.jit, static_argnames=("dtype", "purpose"))
def uniform(
    config: Sampling,
    sequence_id: Any,
    position: Any,
    dtype: str = "float32",
    purpose: Purpose = Purpose.ACCEPT,
    start: Any = None,
) -> jax.Array:
    return sampling.uniform(
        config, sequence_id, position, dtype, purpose=purpose, start=start
    )


def grid(rows: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequence ids `[rows, 1]` and positions `[1, positions]`."""
    ids, offsets = np.arange(rows, dtype=np.int32), np.arange(positions, dtype=np.int32)
    return ids[:, None], offsets[None]


def test_gumbel_follows_its_distribution() -> None:
    """262 144 numbers; a correct generator fails with chance 1e-4 (KS), 7e-6 (rest)."""
    noise = np.asarray(gumbel(settings(), *grid(128, 64), 32), np.float64).ravel()
    assert scipy.stats.kstest(noise, scipy.stats.gumbel_r.cdf).pvalue > 1e-4
    sd = np.pi / np.sqrt(6)
    assert abs(noise.mean() - np.euler_gamma) < 4.5 * sd / np.sqrt(noise.size)
    # The fourth central moment of a Gumbel variable is 5.4 variances squared.
    error = sd**2 * np.sqrt((5.4 - 1) / noise.size)
    assert abs(noise.var() - sd**2) < 4.5 * error
    for level in (4.0, 6.0, 8.0):
        prob = -np.expm1(-np.exp(-level))
        assert_rate(int((noise > level).sum()), noise.size, prob)


def test_gumbel_neighbours_are_independent() -> None:
    """Along each counter; a correlation of 4.5 / sqrt(n) has chance 7e-6."""
    noise = np.asarray(gumbel(settings(), *grid(128, 64), 32), np.float64)
    noise = np.exp(-np.exp(-noise)) - 0.5  # uniform, so that no tail dominates
    for axis in range(3):
        here, there = np.moveaxis(noise, axis, 0)[:-1], np.moveaxis(noise, axis, 0)[1:]
        correlation = np.corrcoef(here.ravel(), there.ravel())[0, 1]
        assert abs(correlation) < 4.5 / np.sqrt(here.size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rare_noise_has_all_32_bits(
    dtype: str, x64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words straight from the generator, the rarest included, told apart and right."""
    bits = np.array([0, 1, 2, 3, 7, 1000, 2**24, 2**31, 2**32 - 129, 2**32 - 1])
    words = jnp.asarray(bits, jnp.uint32)
    monkeypatch.setattr(
        sampling,
        "threefry",
        # A stream's own words (shape []) are used up by nothing but the next call.
        lambda key, counters: (words, words) if counters[0].ndim else counters,
    )
    noise = np.asarray(
        sampling.gumbel(settings(), jnp.int32(0), jnp.int32(0), len(bits), dtype)
    )
    # P(noise > x) = 1 - exp(-exp(-x)) has to be the unit number itself.
    unit = np.minimum((bits + 0.5) / 2**32, 1 - 2**-24)
    np.testing.assert_allclose(
        noise, -np.log(-np.log1p(-unit)), rtol=3e-6 if dtype == "float32" else 1e-12
    )
    assert noise[0] == pytest.approx(33 * np.log(2), abs=1e-5)
    assert (np.diff(noise[:8]) < -1e-3).all() and (np.diff(noise) <= 0).all()
    assert np.isfinite(noise).all()
    ids = jnp.arange(len(bits), dtype=jnp.int32)
    chance = np.asarray(
        sampling.uniform(settings(), ids, ids, dtype, purpose=Purpose.ACCEPT)
    )
    np.testing.assert_allclose(chance, unit, rtol=1e-7)
    assert (chance > 0).all() and (chance < 1).all()


def test_noise_does_not_depend_on_the_batch() -> None:
    """Permuted rows, single numbers, other shapes, other vocabulary: the same bits."""
    config = settings()
    whole = np.asarray(gumbel(config, *grid(16, 12), 10))
    assert whole.shape == (16, 12, 10)
    order = np.random.default_rng(0).permutation(16).astype(np.int32)
    positions = np.arange(12, dtype=np.int32)[None]
    permuted = gumbel(config, order[:, None], positions, 10)
    np.testing.assert_array_equal(permuted, whole[order])
    one = gumbel(config, np.int32(5), np.int32(7), 10)
    np.testing.assert_array_equal(one, whole[5, 7])
    column = gumbel(config, np.arange(16, dtype=np.int32), np.int32(7), 10)
    np.testing.assert_array_equal(column, whole[:, 7])
    wider = gumbel(config, *grid(16, 12), 13)
    np.testing.assert_array_equal(np.asarray(wider)[..., :10], whole)


def test_uniform_does_not_depend_on_the_batch() -> None:
    ids, positions = grid(6, 5)
    starts = np.arange(6, dtype=np.int32)[:, None] * 2
    whole = np.asarray(uniform(settings(), ids, positions, start=starts))
    assert whole.shape == (6, 5)
    assert len(np.unique(whole)) == whole.size
    one = uniform(settings(), ids[4, 0], positions[0, 2], start=starts[4, 0])
    assert one == whole[4, 2]


def test_no_two_counters_share_noise(x64: None) -> None:
    """9216 streams of key, sequence, position, purpose and start; 64 bits of each.

    Two of so many equal by accident with chance 2e-12.
    """
    ids, positions = grid(8, 32)
    positions = np.concatenate(
        [positions[:, :24], positions[:, 24:] * 1000 + 77], axis=1
    )
    seen = []
    for key in ((0, 0), (0, 1), (1, 0)):
        config = settings(key=key)
        for purpose in Purpose:
            for start in (None, 0, 1):
                at = None if start is None else np.full_like(ids, start)
                noise = gumbel(config, ids, positions, 2, "float64", purpose, at)
                seen.append(np.asarray(noise).reshape(-1, 2))
    pairs = np.concatenate(seen)
    assert len(pairs) == 3 * 4 * 3 * 8 * 32
    assert len(np.unique(pairs, axis=0)) == len(pairs)
    # Nor do the two tokens of a stream share a number with any other token.
    assert len(np.unique(pairs)) > 2 * len(pairs) - 5


def test_every_counter_matters() -> None:
    """Each argument changed alone changes the noise, to something uncorrelated."""
    base: dict[str, Any] = {"key": (3, 4), "id": 5, "position": 6, "start": 2}

    def draw(**change: Any) -> np.ndarray:
        at = base | {"purpose": Purpose.DRAFT} | change
        return np.asarray(
            gumbel(
                settings(key=at["key"]), np.int32(at["id"]), np.int32(at["position"]),
                4096, "float32", at["purpose"], np.int32(at["start"]),
            )
        )  # fmt: skip

    reference = draw()
    np.testing.assert_array_equal(draw(), reference)
    for change in (
        {"key": (4, 4)}, {"key": (3, 5)}, {"key": (4, 3)}, {"id": 6}, {"id": -1},
        {"position": 7}, {"purpose": Purpose.TOKEN}, {"purpose": Purpose.RESIDUAL},
        {"start": 3}, {"id": 6, "position": 5},
    ):  # fmt: skip
        assert abs(np.corrcoef(reference, draw(**change))[0, 1]) < 4.5 / 64, change


def test_noised_logprobs_are_logprobs_plus_noise() -> None:
    logits = random_logits(3, 11).astype(np.float32)
    config = settings(temperature=0.7, top_k=4)
    ids = np.array([9, 1, 4], np.int32)
    found = jax.jit(sampling.noised_logprobs)(logits, config, ids, ids + 2)
    noise = gumbel(config, ids, ids + 2, 11)
    wanted = np.asarray(target_logprobs(logits, config)) + np.asarray(noise)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_draws_follow_the_target() -> None:
    """The argmax of 65 536 noised rows; a right one fails with chance 1e-4."""
    logits = random_logits(2, 8)[1].astype(np.float32)
    config = settings(temperature=1.3, top_k=6, min_p=0.001)
    ids = np.arange(65536, dtype=np.int32)
    noised = jax.jit(sampling.noised_logprobs)(
        jnp.broadcast_to(logits, (len(ids), 8)), config, ids, np.full_like(ids, 3)
    )
    counts = np.bincount(np.argmax(noised, axis=-1), minlength=8)
    assert_same_distribution(counts, oracle_probs(logits, config))
