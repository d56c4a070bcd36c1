"""Sessions: programs and prompts that calls share, freed when the session is closed."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import er_jax
from benchmarks.lib.controllers import Restless
from er_jax import Rollout, Session, call, devices, prefill
from er_jax.devices import device_bytes
from er_jax.engine import kept
from er_jax.engine.engine import Engine
from er_jax.scheduler import batch
from er_jax.scheduler.prompts import PromptCache
from tests import test_turns
from tests.small import small_policy
from tests.test_threads import together

pytestmark = pytest.mark.usefixtures("unoptimized_module")

POLICY = small_policy("session")
PROMPTS = [[1, 2, 3], [4, 5]]
CONFIG = er_jax.RolloutConfig(max_new_tokens=6, n=2, control="fixed:2", max_slots=4)


def sample(session: Session | None, seed: int = 0, **named: Any) -> Rollout:
    params = POLICY.init(jax.random.key(seed))
    given: Any = {"params": params, "prompts": PROMPTS, "key": jax.random.key(1)}
    return er_jax.rollout(POLICY, session=session, config=CONFIG, **given | named)


def assert_same(found: Rollout, wanted: Rollout) -> None:
    """To the bit; log-probabilities as far as programs of other sizes round alike."""
    for name in ("completion_ids", "lengths", "finish"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)


# What a session owns.


def test_calls_of_a_session_share_programs_with_nothing_else() -> None:
    kept.forget_engines()
    with Session() as session:
        first, again = sample(session), sample(session, seed=3)
        assert first.stats.compiled != [] and again.stats.compiled == []
        assert kept._kept.all() == []
        (engine,) = session.engines.all()
        assert session.controller in engine.defaults.values()
        assert f"{len(engine.compiled)} programs" in session.summary()
        with er_jax.stream(
            POLICY, POLICY.init(jax.random.key(0)), PROMPTS, key=jax.random.key(1),
            config=CONFIG, session=session,
        ) as items:  # fmt: skip
            assert len(list(items)) == 4
        assert items.rollout.stats.compiled == []
        found = together(*(lambda: sample(session) for _ in range(2)))
        assert all(out.stats.compiled == [] for out in found)
    plain = sample(None)
    assert len(kept._kept.all()) == 1
    for out in (first, items.rollout, *found):
        assert_same(out, plain)


@pytest.mark.slow
def test_a_closed_session_has_freed_everything() -> None:
    client = jax.devices()[0].client

    def living() -> tuple[int, int]:
        gc.collect()
        return len(client.live_executables()), len(jax.live_arrays())

    params = POLICY.init(jax.random.key(0))
    with Session() as session:  # what JAX keeps of any call
        sample(session, params=params)
    del session
    before = living()
    session = Session()
    sample(session, params=params)
    engine = weakref.ref(session.engines.all()[0])
    controller = weakref.ref(session.controller)
    during = living()
    assert during[0] > before[0] and during[1] > before[1]
    weights = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
    del params
    gc.collect()
    assert not any(weight() for weight in weights), "kept alive by their prompts"
    session.close()
    session.close()
    after = living()
    assert after[0] <= before[0] and after[1] <= before[1] - len(weights)
    assert engine() is None and controller() is None
    assert "closed" in session.summary()


def test_a_session_that_is_none_or_closed_is_refused() -> None:
    with Session() as session:
        pass
    with pytest.raises(ValueError, match="session is closed"):
        sample(session)
    with pytest.raises(ValueError, match=r"must be an er_jax\.Session"):
        sample("session")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="session is closed"):
        er_jax.compile_ahead(
            POLICY, POLICY.init(jax.random.key(0)), PROMPTS, config=CONFIG,
            session=session,
        )  # fmt: skip


# Prompts that are kept.

PLAIN64 = small_policy("session float64", dtype="float64")
# Of its two layers, one keeps a window of 5 positions in a ring of 48 slots.
RINGS64 = small_policy(
    "session rings", dtype="float64", num_layers=2, window=5, global_layers=(1,)
)
LONG = list(range(1, 24)) * 2
MANY = er_jax.RolloutConfig(
    max_new_tokens=24, n=2, max_slots=4, stop_token_ids=(11, 17), gammas=(0, 3),
    drafter=er_jax.DrafterConfig(window=None),
)  # fmt: skip


class Calls:
    """Calls of one policy, in a session and without one.

    Programs are chosen at random, among some numbers of rows: batches grow and shrink.
    """

    def __init__(
        self, policy: er_jax.Decoder, session: Session, rows: tuple[int, ...] = (4,)
    ) -> None:
        self.policy, self.session, self.rows = policy, session, rows
        self.params = policy.init(jax.random.key(0))
        self.config, self.number, self.used = MANY, 0, set[tuple[int, ...]]()

    def __call__(self, prompts: Sequence[Sequence[int]], **named: Any) -> Rollout:
        """Sample in the session; the tokens are those without it."""
        self.number += 1
        config: Any = {"config": self.config, "key": jax.random.key(self.number)}
        found, wanted = (
            er_jax.rollout(
                self.policy, self.params, prompts, session=session,
                controller=Restless("best", (0, 3), self.rows, self.number),
                **config | named,
            )
            for session in (self.session, None)
        )  # fmt: skip
        self.used |= {program[1:3] for program in found.stats.programs}
        assert_same(found, wanted)
        assert wanted.stats.num_reused == wanted.stats.num_reused_tokens == 0
        return found


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MIN_ROUNDS", 3)
    monkeypatch.setattr(batch, "WINDOW_S", 0.0)


def counts(out: Rollout) -> tuple[int, int, int]:
    stats = out.stats
    return stats.num_prefilled, stats.num_reused, stats.num_reused_tokens


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(POLICY, id="32"),
        pytest.param(PLAIN64, id="64", marks=pytest.mark.slow),
        pytest.param(RINGS64, id="ring", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("x64", "short_windows")
def test_known_prompts_are_not_prefilled_again(policy: er_jax.Decoder) -> None:
    prompts = [[1, 2, 3], [3, 2, 1], [4], [5, 6, 7, 8]]
    with Session() as session:
        calls = Calls(policy, session, (4,) if policy is POLICY else (2, 4))
        if policy is PLAIN64:  # with caches of two lengths
            calls.config = dataclasses.replace(MANY, max_new_tokens=200)
        assert counts(calls(prompts))[0] >= 4
        assert len(session.prompts) == 3, "a single token has no entries to keep"
        again = calls(prompts[::-1])
        # That of one token has nothing to be reused.
        assert counts(again)[0] == 1
        assert counts(again)[1:] >= (3, 2 + 2 + 3)
        # Beginnings of a known one, and one that ends otherwise, are known; one that
        # only begins alike is short, and prefilled.
        other = calls([[5, 6], [5, 6, 7, 9], [1, 2, 9, 9]])
        assert counts(other) == (1, 2, 1 + 3)
        assert f"{len(session.prompts)} kept" in session.summary()
        assert "session: 2 prompts, 4 tokens" in other.stats.summary()
        assert session.prompts.num_uses == again.stats.num_reused + 2
        # All is of other parameters now, which differ in one leaf.
        calls.params = calls.params | {"final_norm": calls.params["final_norm"] * 2}
        assert counts(calls(prompts))[:2] == (4, 0)
        assert session.prompts.num_outdated == 4
        # The same arrays in another tree are the same parameters.
        calls.params = jax.tree.map(lambda x: x, calls.params)
        assert counts(calls(prompts))[0] == 1
        # NumPy arrays could have changed.
        calls.params = jax.tree.map(np.asarray, calls.params)
        assert counts(calls(prompts))[:2] == (4, 0)
        assert counts(calls(prompts))[:2] == (4, 0)
        lengths = (128, 256) if policy is PLAIN64 else (64,)
        assert calls.used == set(itertools.product(lengths, (0, 3)))
        if policy is RINGS64:
            # A ring does not hold all of it when drafts have been written.
            calls.params = policy.init(jax.random.key(0))
            assert counts(calls([LONG, [1, 2, 3]])) == (2, 0, 0)
            assert counts(calls([LONG, [1, 2, 3]])) == (1, 1, 2)


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(POLICY, id="32"),
        pytest.param(PLAIN64, id="64", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("x64", "short_windows")
def test_of_a_prompt_that_begins_alike_the_rest_is_prefilled(
    policy: er_jax.Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "PIECE", 8)  # two of them
    with Session() as session:
        calls = Calls(policy, session)
        calls([LONG])
        longer = [*LONG, 2, 3, 5, 7, 1, 1, 3, 7, 1, 9, 9, 2]
        assert counts(calls([longer, LONG[:20]])) == (0, 2, 45 + 19)
        assert counts(calls([longer])) == (0, 1, len(longer) - 1), "not kept"
        # The rest is more than a half.
        assert counts(calls([[*LONG[:20], *LONG[:40]]])) == (1, 0, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_conversations_start_from_known_prompts() -> None:
    """Of eight in three rows; those whose row was needed start again."""
    wanted = test_turns.sample()
    with Session() as session:
        found = [test_turns.sample(session=session) for _ in range(2)]
    for out in found:
        assert_same(out, wanted)
        np.testing.assert_array_equal(out.completion_mask, wanted.completion_mask)
    assert found[1].stats.num_reused >= 3
    assert found[1].stats.prefilled_tokens < found[0].stats.prefilled_tokens


@pytest.mark.usefixtures("short_windows")
def test_prompts_used_longest_ago_are_dropped_first() -> None:
    one_prompt = 16 * 2 * 8 * 4  # positions, keys and values, their size, bytes
    with Session(prompt_bytes=2 * one_prompt + 300) as session:
        calls = Calls(POLICY, session)
        first, second, third = [1, 2, 3], [4, 5, 6], [7, 8, 9]
        for prompt in (first, second, first, third):
            calls([prompt])
        assert (len(session.prompts), session.prompts.num_evicted) == (2, 1)
        assert session.prompts.num_bytes == 2 * one_prompt
        assert counts(calls([first])) == (0, 1, 2)
        assert counts(calls([third])) == (0, 1, 2)
        assert counts(calls([second])) == (1, 0, 0)
        calls([first, second, third])
        assert session.prompts.num_bytes == 2 * one_prompt
    assert len(session.prompts) == session.prompts.num_bytes == 0
    with Session(prompt_bytes=0) as session:
        for _ in range(2):
            assert counts(sample(session)) == (2, 0, 0)
        assert len(session.prompts) == 0
    with pytest.raises(ValueError, match="prompt_bytes=-1"):
        Session(prompt_bytes=-1)


class Model:
    """What parameters are of: an engine, as far as the cache is concerned."""


def entries(size: int) -> np.ndarray:
    return np.zeros((1, size), np.int8)


def num_shared(name: bytes, tokens: np.ndarray) -> int:
    """Return how many entries two prompts share: of all tokens but their last."""
    shared = 0
    known = np.frombuffer(name, np.int32)
    for one, other in zip(known[:-1], tokens[:-1], strict=False):
        if one != other:
            break
        shared += 1
    return shared


def test_what_is_found_is_the_longest_beginning() -> None:
    """Against a search through all prompts, of two tokens and of random bytes."""
    rng = np.random.default_rng(0)
    cache, model = PromptCache(300), Model()
    params = [jnp.zeros(1)]
    owner = cache.owner(model, params)
    recent: list[tuple[bytes, int]] = []  # the least recently used first
    for _ in range(2000):
        tokens = rng.integers(0, 2, rng.integers(1, 9)).astype(np.int32)
        tokens *= rng.choice(np.array([1, 257, 65536], np.int32))
        alike = {name: num_shared(name, tokens) for name, _ in recent}
        found, most = cache.find(owner, tokens), max(alike.values(), default=0)
        assert (found.num_known if found else 0) == most
        if found is not None:
            (name,) = (n for n, kept in cache._kept.items() if kept is found.entries)
            assert alike[name[1]] == most
            recent.sort(key=lambda one: one[0] == name[1])
        size = int(rng.integers(1, 80))
        is_new = most < len(tokens) - 1
        assert cache.has_room(owner, tokens, size) == is_new
        if is_new:
            cache.keep(owner, tokens, entries(size))
            recent.append((tokens.tobytes(), size))
            while sum(size for _, size in recent) > 300:
                del recent[0]
        assert [name for _, name in cache._kept] == [name for name, _ in recent]
        assert cache.num_bytes == sum(size for _, size in recent) <= 300
        assert owner.names == sorted(name for name, _ in recent)
    assert cache.num_evicted > 50
    # Of other parameters, and of an engine that is no more, nothing is found.
    other = Model()
    cache.keep(cache.owner(other, params), np.arange(3, dtype=np.int32), entries(1))
    assert cache.owner(model, params) is owner and len(cache) == len(recent) + 1
    assert cache.owner(model, [jnp.zeros(1)]) is not owner and len(cache) == 1
    assert not cache.has_room(owner, np.arange(9, dtype=np.int32), 1)
    del other
    cache.owner(model, params)
    assert len(cache) == cache.num_bytes == 0


# What it costs.


def test_copies_are_bit_for_bit_and_of_one_row() -> None:
    """Bytes: a prompt's entries out; a row in, in place; nothing else."""
    engine, rng = Engine(POLICY, "coupled"), np.random.default_rng(0)
    state = engine.allocate(4, 128)
    cache = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), state.cache
    )
    bad = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), cache)
    full, empty = (
        dataclasses.replace(state, cache=jax.tree.map(jnp.asarray, x))
        for x in (cache, bad)
    )
    kept_entries = engine.copy_out(full, 1, 16)
    after = engine.copy_in(empty, kept_entries, 2, 5)
    for known, short, found in zip(
        *map(jax.tree.leaves, (cache, kept_entries, after.cache)), strict=True
    ):
        assert short.shape[:2] == (1, 16)
        np.testing.assert_array_equal(short[0], known[1, :16])
        np.testing.assert_array_equal(found[2, :5], known[1, :5])
        assert (found[2, 5:] == 0).all()
        assert np.isnan(np.delete(found, 2, axis=0)).all()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(empty.cache))
    # Of a longer prompt, in a shorter cache.
    longer = Engine(POLICY, "coupled")
    after = longer.copy_in(longer.allocate(2, 64), longer.copy_out(full, 3, 128), 1, 9)
    for known, found in zip(*map(jax.tree.leaves, (cache, after.cache)), strict=True):
        np.testing.assert_array_equal(found[1, :9], known[3, :9])
        assert (found[1, 9:] == 0).all() and (found[0] == 0).all()
    programs: dict[str, Any] = {
        name[0]: program.call for name, program in engine.compiled.items()
    }
    memory = {kind: program.memory_analysis() for kind, program in programs.items()}
    size, whole = device_bytes(kept_entries), device_bytes(state)
    out, into = memory["copy out"], memory["copy in"]
    assert out.output_size_in_bytes <= size + 64 and out.temp_size_in_bytes <= size
    assert into.alias_size_in_bytes >= whole and into.temp_size_in_bytes <= 4 * size


def test_calls_without_a_session_and_on_meshes_keep_no_prompts() -> None:
    kept.forget_engines()
    out = sample(None)
    (engine,) = kept._kept.all()
    kinds = {name[0] for name in engine.compiled}
    assert kinds.isdisjoint({"copy out", "copy in", "extend"})
    assert counts(out) == (2, 0, 0)
    params = POLICY.init(jax.random.key(0))
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    with Session() as session:
        made = call.prepare(
            POLICY, params, PROMPTS, CONFIG, None, None, mesh, session=session
        )
        assert session.engines.all() == [made.engine]
        with_draft = er_jax.attach_draft(params, CONFIG.drafter)
        assert call.reuse_of(session, made, with_draft, out.stats) is None


def test_room_for_kept_prompts_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device_memory_bytes", lambda: 10**9)
    with Session(prompt_bytes=10**9) as session:
        with pytest.raises(ValueError, match=r"kept prompts 1\.0\).*prompt_bytes"):
            sample(session)
