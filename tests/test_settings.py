"""What a request may say: settings of single prompts, in rollouts and in scores.

A completion has to be that of a rollout with its prompt alone and plain numbers: token
for token in float64, however rows are packed and whether drafts run or not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from benchmarks.lib.controllers import Restless
from er_jax import Controller, Rollout
from er_jax.request import sampling_of
from er_jax.sampling import gumbel
from er_jax.scheduler import batch
from tests.conftest import CompileCount
from tests.small import SIZES, small_policy
from tests.test_mesh import Moving
from tests.test_resume import Ending, assert_same
from tests.toy import Toy, full_table, oracle_logprobs, settings, toy_params

# What rollouts compute, the tests of their promises show at the default level.
pytestmark = pytest.mark.usefixtures("unoptimized_module")

CompileCounter = Callable[[], AbstractContextManager[CompileCount]]

POLICY = er_jax.Decoder(dataclasses.replace(SIZES, dtype="float64"))
PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [2, 1]]
CONFIG = er_jax.RolloutConfig(
    max_new_tokens=24, n=2, max_slots=4, stop_token_ids=(11, 17), gammas=(0, 3),
    drafter=er_jax.DrafterConfig(window=None), logprobs="processed",
)  # fmt: skip
KEY = jax.random.key(5)

PLAIN: dict[str, Any] = {
    "max_new_tokens": (24, 7, 16, 12, 1),
    "temperature": (1.0, 0.0, 0.6, 1.4, 1.0),
    "min_p": [0.0, 0.0, 0.0, 0.1, 0.0],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "not truncated": PLAIN,
    "truncated": {
        **PLAIN,
        "top_k": np.array([0, 0, 3, 9, 0]),
        "top_p": np.array([1.0, 1.0, 0.8, 1.0, 0.5]),
    },
}


@functools.cache
def params(seed: int = 0) -> Any:
    with jax.enable_x64(True):
        return POLICY.init(jax.random.key(seed))


def sample(
    config: er_jax.RolloutConfig = CONFIG, prompts: Any = None, **named: Any
) -> Rollout:
    named = {"key": KEY, "policy": POLICY, "params": params()} | named
    return er_jax.rollout(prompts=prompts or PROMPTS, config=config, **named)


def config_of(name: str, **changes: Any) -> er_jax.RolloutConfig:
    return dataclasses.replace(CONFIG, **SETTINGS[name], **changes)


@functools.cache
def one_by_one(name: str) -> tuple[list[list[int]], list[str], np.ndarray]:
    """Return tokens, reasons and log-probabilities of every prompt by itself."""
    tokens, reasons, logprobs = [], [], []
    for index, prompt in enumerate(PROMPTS):
        own: dict[str, Any] = {k: v[index] for k, v in SETTINGS[name].items()}
        config = dataclasses.replace(CONFIG, **own, control="ar")
        with jax.enable_x64(True):
            ids = [2 * index, 2 * index + 1]
            out = sample(config, [prompt], sequence_ids=ids)
        tokens += rows(out)
        reasons += out.finish_reason.tolist()
        logprobs += [out.logprobs[out.completion_mask]]
    return tokens, reasons, np.concatenate(logprobs)


def rows(out: Rollout) -> list[list[int]]:
    pairs = zip(out.completion_ids, out.completion_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def assert_each_is_its_own(out: Rollout, name: str) -> None:
    tokens, reasons, logprobs = one_by_one(name)
    assert rows(out) == tokens
    assert out.finish_reason.tolist() == reasons
    np.testing.assert_allclose(out.logprobs[out.completion_mask], logprobs, atol=1e-5)


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MIN_ROUNDS", 3)


# -- settings of single prompts --------------------------------------------------------


def controllers() -> dict[str, Any]:
    return {
        "ar": None,
        "fixed:3": None,
        # Any program at any time: rows move, the batch shrinks and the cache grows.
        "best": Restless("best", (0, 3), (1, 2, 4), 1),
    }


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize("control", controllers())
@pytest.mark.parametrize("name", SETTINGS)
def test_each_prompt_has_its_own(name: str, control: str, x64: None) -> None:
    config = config_of(name, control=control)
    out = sample(config, controller=controllers()[control])
    assert out.completion_ids.shape == (10, 24)
    assert_each_is_its_own(out, name)
    if control == "best":
        assert len({moment.rows for moment in out.stats.timeline}) > 1


def test_other_values_compile_nothing(compile_counter: CompileCounter) -> None:
    policy = small_policy("settings of prompts")
    own_params = policy.init(jax.random.key(0))
    run = functools.partial(sample, policy=policy, params=own_params)
    plain = dataclasses.replace(CONFIG, control="ar")
    run(plain, PROMPTS[:2])
    first = run(dataclasses.replace(plain, temperature=(1.0, 0.5)), PROMPTS[:2])
    kinds = {name.split("(")[0] for name, _ in first.stats.compiled}
    assert kinds == {"window"}, "settings of rows should be known to windows alone"
    run(dataclasses.replace(plain, top_k=(0, 4)), PROMPTS[:2])
    with compile_counter() as compiled:
        for change in (
            {"temperature": (0.2, 1.0)},
            {"min_p": (0.2, 0.0)},
            {"max_new_tokens": (3, 24)},
            {"top_p": (1.0, 1.0)},
            {"top_p": (0.5, 0.7), "temperature": 0.5},
            {"top_k": (0, 2), "top_p": 0.9, "max_new_tokens": [24, 24]},
        ):
            run(dataclasses.replace(plain, **change), PROMPTS[:2])
        run(dataclasses.replace(plain, temperature=(1, 2, 3)), PROMPTS[:3])
    assert compiled.count == 0, compiled


@pytest.mark.slow
def test_best_measures_the_programs_that_run() -> None:
    policy = small_policy("settings measured")
    config = dataclasses.replace(CONFIG, temperature=np.linspace(0.5, 1, 5))
    out = sample(config, policy=policy, params=policy.init(jax.random.key(0)))
    sizes = [name for name, _ in out.stats.compiled if name.startswith("window")]
    assert len(sizes) == len(set(sizes)), "a program was measured that does not run"


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_runs() -> None:
    policy = small_policy("settings ahead")
    own_params = policy.init(jax.random.key(0))
    config = config_of("truncated", control="ar", max_slots=1)
    er_jax.compile_ahead(policy, own_params, PROMPTS, config=config)
    out = sample(config, policy=policy, params=own_params)
    assert not [n for n, _ in out.stats.compiled if n.startswith("window")]


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize(
    "name", ["not truncated", pytest.param("truncated", marks=pytest.mark.slow)]
)
def test_going_on(name: str, x64: None) -> None:
    """Ended early, then gone on, with limits that differ."""
    stop = er_jax.Stop()
    config = config_of(name)
    part = sample(config, controller=Ending(3, stop), until=er_jax.Until(stop=stop))
    assert "unfinished" in part.finish_reason
    assert_each_is_its_own(sample(config, resume=part), name)
    lower = dataclasses.replace(config, max_new_tokens=(2, 2, 16, 2, 1), control="ar")
    whole = sample(config, resume=sample(lower))
    assert_each_is_its_own(whole, name)
    with pytest.raises(ValueError, match=r"max_new_tokens=2 counts .* holds one of"):
        sample(lower, resume=whole)


@pytest.mark.parametrize("kind", ["raw", "temperature", "processed"])
def test_scores_are_the_rollouts_own(kind: str, x64: None) -> None:
    config = config_of("truncated", logprobs=kind, control="ar")
    out = sample(config)
    for chunk_tokens in (2048, 1):
        found = er_jax.score(
            POLICY, params(), out, config=config, chunk_tokens=chunk_tokens
        )
        np.testing.assert_allclose(found.logprobs, out.logprobs, atol=1e-5)
    few = jax.tree.map(lambda x: x[[2, 3, 6, 7]], out)
    part = er_jax.score(POLICY, params(), few, config=config.of_prompts([1, 3]))
    np.testing.assert_allclose(part.logprobs, few.logprobs, atol=1e-5)
    if kind != "raw":
        with pytest.raises(ValueError, match=r"5 prompts.* 10 completions.* has 4"):
            er_jax.score(POLICY, params(), few, config=config)


@pytest.mark.slow
def test_gradients_are_those_of_plain_settings(x64: None) -> None:
    config = config_of("truncated", control="ar")
    out = sample(config)

    def loss(params: Any, part: Any, config: Any, chunk_tokens: int = 64) -> Any:
        found = er_jax.score(
            POLICY, params, part, config=config, chunk_tokens=chunk_tokens, entropy=True
        )
        return (found.logprobs + found.entropy).sum()

    whole = jax.grad(loss)(params(1), out, config, 1)
    parts = []
    for index in (0, 2, 3):  # the others are greedy, or of one token
        own = {k: v[index] for k, v in SETTINGS["truncated"].items()}
        part = jax.tree.map(lambda x, i=2 * index: x[i : i + 2], out)
        plain = dataclasses.replace(config, **own)
        parts.append(jax.grad(loss)(params(1), part, plain))
    last = jax.tree.map(lambda x: x[8:], out)
    parts.append(jax.grad(loss)(params(1), last, config.of_prompts([4])))
    wanted = jax.tree.map(lambda *x: sum(x), *parts)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-8), whole, wanted
    )


def test_acceptance_is_learnt_at_the_mean(x64: None) -> None:
    controller = Controller("fixed:3", (0, 3))
    config = config_of("truncated", control="fixed:3")
    sample(config, controller=controller)
    assert controller.state_dict()["setting"] == [0.8, 2.4, 0.86, 0.02]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"data": 2}, {"data": 2, "model": 2}])
def test_on_a_mesh(shape: dict[str, int], x64: None) -> None:
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape))
    policy = er_jax.Decoder(
        dataclasses.replace(POLICY.config, num_kv_heads=2, num_heads=2)
    )
    own_params = policy.init(jax.random.key(0))
    config = config_of(
        "truncated", control="fixed:3", min_new_tokens=(0, 7, 3, 9, 1),
        stop_sequences=sequences(), logit_bias={11: 2.0}, banned_ids=(4,),
    )  # fmt: skip
    run = functools.partial(sample, config, policy=policy, params=own_params)
    out = run()
    controller = Moving("fixed:3", (3,), is_shared=True) if "model" in shape else None
    found = run(mesh=mesh, controller=controller)
    assert_same(found, out)
    assert ("model" in shape) == any(m.shared_rows for m in found.stats.timeline)
    assert set(out.finish_reason.tolist()) == {"stop", "length"}


def test_replicas_get_the_settings_of_their_prompts(x64: None) -> None:
    config = config_of("truncated", control="ar", max_slots=2)
    mesh = jax.make_mesh((2,), ("data",))
    out = er_jax.rollout_replicas(
        POLICY, params(), PROMPTS, key=KEY, config=config, mesh=mesh,
        expected_lengths=(1, 9, 1, 1, 9),
    )  # fmt: skip
    assert_each_is_its_own(out, "truncated")
    with pytest.raises(ValueError, match=r"of 5 prompts, and there are 4"):
        er_jax.rollout_replicas(
            POLICY, params(), PROMPTS[:4], key=KEY, config=config, mesh=mesh
        )


# -- bias, banned tokens, least lengths ------------------------------------------------

BOUNDED: dict[str, Any] = {
    "min_new_tokens": (0, 3, 20, 11, 24), "banned_ids": (5, 9),
    "logit_bias": {11: 2.5, 17: 1.0, 3: -0.5},
}  # fmt: skip


def in_front(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return texts as an array, padded behind with 0, and where they have tokens."""
    width = max(map(len, texts))
    mask = np.arange(width)[None] < np.array([len(text) for text in texts])[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate(texts)
    return ids, mask


def check_by_hand(out: Rollout, config: er_jax.RolloutConfig, n: int = 2) -> None:
    """Find every token again as the best of oracle and noise, from whole texts."""
    texts = [PROMPTS[row // n] + tokens for row, tokens in enumerate(rows(out))]
    ids, mask = in_front(texts)
    positions = jnp.where(mask, jnp.arange(ids.shape[1], dtype=jnp.int32)[None], -1)
    logits = np.asarray(logits_of(params(), jnp.asarray(ids), positions))
    plain = sampling_of(dataclasses.replace(config, min_new_tokens=0), KEY, 24)
    sequence_ids = jnp.arange(len(texts), dtype=jnp.int32)[:, None]
    noise = np.asarray(gumbel(plain, sequence_ids, positions, 24, jnp.float64))
    bias = np.zeros(24)
    for token, value in dict(config.logit_bias).items():
        bias[token] = value
    bias[list(config.banned_ids)] = -np.inf
    least = np.broadcast_to(config.min_new_tokens, len(PROMPTS))
    for row, text in enumerate(texts):
        begin = len(PROMPTS[row // n])
        for at in range(begin, len(text)):
            own = logits[row, at - 1] + bias
            if at - begin < least[row // n]:
                own[list(config.stop_token_ids)] = -np.inf
            wanted = oracle_logprobs(own, plain)
            assert text[at] == np.argmax(wanted + noise[row, at]), (row, at)
            np.testing.assert_allclose(
                out.logprobs[row, at - begin], wanted[text[at]], atol=1e-5
            )
            is_stop = text[at] in config.stop_token_ids
            assert not is_stop or at == len(text) - 1
        is_stop = text[-1] in config.stop_token_ids
        assert is_stop or len(text) == begin + config.max_new_tokens
        assert out.finish_reason[row] == ("stop" if is_stop else "length")


@jax.jit
def logits_of(params: Any, ids: jax.Array, positions: jax.Array) -> jax.Array:
    cache = POLICY.init_cache(*ids.shape)
    return POLICY.logits(params, POLICY.forward(params, ids, positions, cache)[0])


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize("control", controllers())
def test_bias_bans_and_least_lengths(control: str, x64: None) -> None:
    config = dataclasses.replace(CONFIG, **BOUNDED, control=control)
    out = sample(config, controller=controllers()[control])
    check_by_hand(out, config)
    assert "stop" in out.finish_reason and "length" in out.finish_reason
    assert (out.lengths[4:6] > 20).all() and (out.lengths[8:] == 24).all()
    found = er_jax.score(POLICY, params(), out, config=config)
    np.testing.assert_allclose(found.logprobs, out.logprobs, atol=1e-5)
    found = er_jax.score(POLICY, params(), out, config=config, chunk_tokens=1)
    np.testing.assert_allclose(found.logprobs, out.logprobs, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_of_what_is_sampled(x64: None) -> None:
    config = dataclasses.replace(CONFIG, **BOUNDED, temperature=0.7, control="ar")
    out = sample(config)
    texts = [PROMPTS[row // 2] + tokens for row, tokens in enumerate(rows(out))]
    ids, mask = in_front(texts)
    positions = jnp.where(mask, jnp.arange(ids.shape[1], dtype=jnp.int32)[None], -1)
    begin = np.array([len(PROMPTS[row // 2]) for row in range(10)])[:, None]
    made = np.arange(1, ids.shape[1])[None] - begin
    early = made < np.repeat(BOUNDED["min_new_tokens"], 2)[:, None]
    bias = np.zeros((*early.shape, 24))
    for token, value in BOUNDED["logit_bias"].items():
        bias[..., token] = value
    bias[..., list(BOUNDED["banned_ids"])] = -np.inf
    bias[..., list(CONFIG.stop_token_ids)] += np.where(early, -np.inf, 0)[..., None]

    def by_hand(params: Any) -> jax.Array:
        scores = (logits_of(params, jnp.asarray(ids), positions)[:, :-1] + bias) / 0.7
        best = jnp.max(scores, axis=-1, keepdims=True)
        total = jnp.log(jnp.sum(jnp.exp(scores - best), axis=-1)) + best[..., 0]
        own = jnp.take_along_axis(scores, jnp.asarray(ids)[:, 1:, None], axis=-1)
        is_made = mask[:, 1:] & (made >= 0)
        return jnp.sum(jnp.where(is_made, own[..., 0] - total, 0))

    def scored(params: Any) -> jax.Array:
        return er_jax.score(POLICY, params, out, config=config).logprobs.sum()

    found, wanted = jax.grad(scored)(params(1)), jax.grad(by_hand)(params(1))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6), found, wanted
    )


@pytest.mark.usefixtures("short_windows")
def test_least_lengths_count_from_the_prompt_when_going_on(x64: None) -> None:
    config = dataclasses.replace(CONFIG, **BOUNDED)
    stop = er_jax.Stop()
    part = sample(config, controller=Ending(2, stop), until=er_jax.Until(stop=stop))
    assert (part.lengths[part.finish_reason == "unfinished"] > 0).any()
    check_by_hand(sample(config, resume=part), config)


@pytest.mark.parametrize("kind", ["raw", "temperature"])
def test_other_kinds_of_logprobs_know_no_bias(kind: str, x64: None) -> None:
    config = dataclasses.replace(
        CONFIG, **BOUNDED, control="ar", logprobs=kind, temperature=0.7
    )
    out = sample(config)
    plain = er_jax.RolloutConfig(max_new_tokens=24, logprobs=kind, temperature=0.7)
    for own in (config, plain):
        found = er_jax.score(POLICY, params(), out, config=own)
        np.testing.assert_allclose(found.logprobs, out.logprobs, atol=1e-5)


def test_other_biases_compile_nothing(compile_counter: CompileCounter) -> None:
    policy = small_policy("biases")
    own_params = policy.init(jax.random.key(0))
    run = functools.partial(sample, policy=policy, params=own_params)
    plain = dataclasses.replace(CONFIG, control="ar")
    run(plain)
    first = run(dataclasses.replace(plain, banned_ids=(3,)))
    assert [name.split("(")[0] for name, _ in first.stats.compiled] == ["window"]
    with compile_counter() as compiled:
        for change in (
            {"banned_ids": range(20)},
            {"logit_bias": {4: 1}},
            {"min_new_tokens": 3},
            {"min_new_tokens": (1, 2, 3, 4, 5), "logit_bias": {1: 0.5, 2: -3.0}},
        ):
            run(dataclasses.replace(plain, **change))
        # Without a stop id there is nothing to hold back.
        run(dataclasses.replace(plain, min_new_tokens=3, stop_token_ids=()))
    assert compiled.count == 0, compiled


# -- stop sequences --------------------------------------------------------------------


ENDLESS = dataclasses.replace(
    CONFIG, stop_token_ids=(), max_new_tokens=(24, 9, *[24] * 3)
)


@functools.cache
def unstopped() -> tuple[list[list[int]], list[str]]:
    """Return tokens and reasons of completions that only the limit ends."""
    with jax.enable_x64(True):
        out = sample(dataclasses.replace(ENDLESS, control="ar"))
    return rows(out), out.finish_reason.tolist()


def sequences() -> tuple[tuple[int, ...], ...]:
    """Return parts of completions, of several lengths, and one that never occurs."""
    texts = unstopped()[0]
    ends = ((0, 5, 8), (1, 0, 2), (5, 9, 15), (6, 22, 24), (9, 14, 19))
    parts = [tuple(texts[row][start:stop]) for row, start, stop in ends]
    return (*parts, (5,) * 7)


def cut(least: Any = 0) -> tuple[list[list[int]], list[str]]:
    """Return what has to be left of the completions, and why."""
    texts, reasons = list(unstopped()[0]), list(unstopped()[1])
    least = np.repeat(np.broadcast_to(least, len(PROMPTS)), 2)
    for row, text in enumerate(texts):
        for end in range(1, len(text) + 1):
            found = [s for s in sequences() if tuple(text[:end][-len(s) :]) == tuple(s)]
            if found and end > least[row]:
                texts[row], reasons[row] = text[:end], "stop"
                break
    return texts, reasons


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize("control", controllers())
def test_the_first_stop_sequence_ends_a_completion(control: str, x64: None) -> None:
    config = dataclasses.replace(ENDLESS, control=control, stop_sequences=sequences())
    out = sample(config, controller=controllers()[control])
    texts, reasons = cut()
    assert rows(out) == texts
    assert out.finish_reason.tolist() == reasons
    # Several rows should end by one, and some not.
    shorter = [len(a) < len(b) for a, b in zip(texts, unstopped()[0], strict=True)]
    assert 4 <= sum(shorter) < len(shorter)


@pytest.mark.usefixtures("short_windows")
def test_stop_sequences_and_least_lengths_when_going_on(x64: None) -> None:
    """A sequence that the interruption cuts, and one that ends too early to count."""
    least = (5, 0, 15, 24, 18)
    config = dataclasses.replace(
        ENDLESS, stop_sequences=sequences(), min_new_tokens=least
    )
    whole = sample(dataclasses.replace(config, control="ar"))
    texts, reasons = cut(least)
    assert rows(whole) == texts
    assert whole.finish_reason.tolist() == reasons
    assert texts != cut()[0]
    for decisions in (1, 2, 3):
        stop = er_jax.Stop()
        part = sample(
            config, controller=Ending(decisions, stop), until=er_jax.Until(stop=stop)
        )
        assert_same(sample(config, resume=part), whole)


def test_tokens_of_the_prompt_do_not_count(x64: None) -> None:
    texts, _ = unstopped()
    across = (*PROMPTS[0][-2:], *texts[0][:2])
    config = dataclasses.replace(ENDLESS, control="ar", stop_sequences=(across,))
    assert rows(sample(config)) == texts


def test_a_sequence_of_one_token_is_a_stop_id(x64: None) -> None:
    ids = dataclasses.replace(CONFIG, control="ar", min_new_tokens=3)
    one = dataclasses.replace(ids, stop_token_ids=(17,), stop_sequences=[[11]])
    assert_same(sample(one), sample(ids))


def test_other_stop_sequences_compile_nothing(compile_counter: CompileCounter) -> None:
    policy = small_policy("stop sequences")
    own_params = policy.init(jax.random.key(0))
    run = functools.partial(sample, policy=policy, params=own_params)
    plain = dataclasses.replace(CONFIG, control="ar")
    run(plain)
    first = run(dataclasses.replace(plain, stop_sequences=((1, 2),)))
    assert [name.split("(")[0] for name, _ in first.stats.compiled] == ["window"]
    with compile_counter() as compiled:
        for found in ([[3, 4, 5, 6]], [(1, 2), (2, 3), (4, 5, 6), (7, 7)]):
            run(dataclasses.replace(plain, stop_sequences=found))
    assert compiled.count == 0, compiled


# -- all of it together, at random -----------------------------------------------------

TOY = Toy(vocab_size=5, dtype="float64")


def asked(seed: int, num_prompts: int) -> dict[str, Any]:
    """Return random settings, each of them for single prompts, for all, or absent."""
    rng = np.random.default_rng(seed)
    ranges: dict[str, Any] = {
        "max_new_tokens": range(1, 25), "min_new_tokens": (0, 0, 1, 2, 5, 9),
        "temperature": (0.0, 0.5, 1.0, 1.6), "top_k": (0, 0, 2, 3),
        "top_p": (1.0, 0.9, 0.6), "min_p": (0.0, 0.0, 0.1),
    }  # fmt: skip
    found: dict[str, Any] = {"max_new_tokens": 24}
    for name, values in ranges.items():
        how = rng.integers(3)
        own = [values[i] for i in rng.integers(0, len(values), num_prompts)]
        if how:
            found[name] = own[0] if how == 1 else own
    limits = np.broadcast_to(found["max_new_tokens"], num_prompts)
    least = np.minimum(found.get("min_new_tokens", 0), limits)
    found["min_new_tokens"] = least.tolist() if rng.integers(2) else int(least.min())
    if rng.integers(2):
        found["banned_ids"] = (int(rng.integers(5)),)
    if rng.integers(2):
        found["logit_bias"] = {int(rng.integers(5)): float(rng.normal())}
    if rng.integers(3):
        found["stop_token_ids"] = (int(rng.integers(5)),)
    if rng.integers(3):
        lengths = rng.integers(1, 5, rng.integers(1, 4))
        found["stop_sequences"] = [rng.integers(0, 5, k).tolist() for k in lengths]
    return found


def drawn_by_hand(
    table: np.ndarray, prompt: list[int], index: int, config: Any, noise: np.ndarray
) -> tuple[list[int], str, list[float]]:
    """Return the completion of a prompt, one token at a time."""
    own = config.of_prompts([index])

    def value(name: str) -> Any:
        return np.ravel(getattr(own, name))[0]

    plain = settings(
        **{name: value(name) for name in ("temperature", "top_k", "top_p", "min_p")}
    )
    text, logprobs = [prompt[0], *prompt], []
    begin = len(text)
    while True:
        made = len(text) - begin
        logits = table[text[-2], text[-1]].copy()
        for token, extra in dict(config.logit_bias).items():
            logits[token] += np.float32(extra)
        logits[list(config.banned_ids)] = -np.inf
        if made < value("min_new_tokens"):
            logits[list(config.stop_ids)] = -np.inf
        line = oracle_logprobs(logits, plain)
        text.append(int(np.argmax(line + noise[len(prompt) + made])))
        logprobs.append(line[text[-1]])
        tokens = text[begin:]
        ends = [s for s in config.stop_sequences if tokens[-len(s) :] == list(s)]
        if text[-1] in config.stop_token_ids or ends:
            if len(tokens) > value("min_new_tokens"):
                return tokens, "stop", logprobs
        if len(tokens) == value("max_new_tokens"):
            return tokens, "length", logprobs


@pytest.mark.slow
@pytest.mark.usefixtures("short_windows")
@pytest.mark.filterwarnings("ignore:drafts were kept")  # The draft is a far one.
def test_random_requests_equal_what_is_done_by_hand(x64: None) -> None:
    target, draft = toy_params(TOY, seed=0), toy_params(TOY, seed=1)
    pair = er_jax.PolicyParams(policy=target, draft=draft)
    prompts, n = [[1], [2, 3, 4], [0, 1], [4, 4]], 2
    ids, places = (jnp.arange(count, dtype=jnp.int32) for count in (8, 32))
    reasons = []
    for seed in range(40):
        config = er_jax.RolloutConfig(
            **asked(seed, len(prompts)), n=n, max_slots=4, gammas=(0, 2),
            drafter=er_jax.DrafterConfig(window=None), logprobs="processed",
        )  # fmt: skip
        if {*config.banned_ids, *config.stop_ids} >= {*range(5)}:
            continue
        key = jax.random.key(seed)
        controller = Restless("best", (0, 2), (2, 4), seed)
        out = er_jax.rollout(
            TOY, pair, prompts, key=key, config=config, controller=controller
        )
        words = sampling_of(config, key, 5)
        noise = np.asarray(gumbel(words, ids[:, None], places[None], 5, jnp.float64))
        for row, tokens in enumerate(rows(out)):
            index = row // n
            wanted, reason, logprobs = drawn_by_hand(
                full_table(target), prompts[index], index, config, noise[row]
            )
            assert (tokens, out.finish_reason[row]) == (wanted, reason), (seed, row)
            at = out.logprobs[row, : len(tokens)]
            np.testing.assert_allclose(at, logprobs, atol=1e-5, err_msg=f"{seed} {row}")
            reasons.append(reason)
    assert 60 < reasons.count("stop") < len(reasons) - 60


def test_arrays_of_any_kind_become_tuples() -> None:
    config = er_jax.RolloutConfig(
        max_new_tokens=np.array([3, 4]),
        temperature=jax.numpy.array([1.0, 0.5]),
        top_k=range(2),
    )
    assert config.max_new_tokens == (3, 4)
    assert config.temperature == (1.0, 0.5)
    assert config.top_k == (0, 1)
    assert config.most_new_tokens == 4
    assert hash(config) == hash(dataclasses.replace(config))
    assert config.of_prompts([1]).temperature == (0.5,)
    assert CONFIG.of_prompts([1]) == CONFIG
    for wrong in (2, -1, 0.5):
        with pytest.raises(ValueError, match=rf"{wrong}.* of 2 prompts; .* 0 to 1"):
            config.of_prompts([wrong])  # type: ignore[list-item]
