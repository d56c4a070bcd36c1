"""Drafts that see a span of the positions: rings, what is kept, who may use them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from benchmarks.lib.simulated import NO_PARAMS, SimulatedEngine
from er_jax import attention, kv_cache, steps
from er_jax.control.controller import Controller
from er_jax.control.estimate import AcceptanceEstimate
from er_jax.control.explain import explain
from er_jax.control.probes import drafts_lose
from er_jax.costs.passes import Kind, PassCosts, Reading
from er_jax.costs.table import LatencyTable
from er_jax.engine import windows
from er_jax.request import Request, request_of
from er_jax.scheduler.admission import Rows
from er_jax.scheduler.options import Options
from er_jax.scheduler.topology import OneDevice
from er_jax.tools import cli
from er_jax.tools.deciders import SpanCosts
from er_jax.types import FIRST_DRAFT, NONE, DecodeState, Program, Ring, Span, View
from tests.learned import Learned
from tests.small import SIZES, small_policy
from tests.test_control import FREE, compiled_are, made
from tests.test_pass_costs import ROOFLINE
from tests.toy import Toy, settings

GAMMA = 3

SPANS = [Span(*sizes) for sizes in ((0, 1), (0, 5), (2, 3), (5, 1), (7, 13), (20, 9))]


def named(span: Span) -> str:
    return f"{span.head}+{span.window}"


# -- rings


def seen_by(position: int, span: Span) -> list[int]:
    """Return the positions that a token sees, by the definition."""
    return [
        s for s in range(position + 1) if s < span.head or s > position - span.window
    ]


@pytest.mark.parametrize("span", SPANS, ids=named)
def test_a_ring_shows_the_span_and_nothing_else(span: Span) -> None:
    """Over many rounds of any outcome: the newest entry of every position in sight.

    An entry is its position and the number of the write that made it.
    """
    rng = np.random.default_rng(0)
    length, count = 70, 4
    cache = np.full((1, length, 2), -7)
    start = int(rng.integers(1, 12))
    cache[0, : start - 1] = [(s, 0) for s in range(start - 1)]
    newest = {s: 0 for s in range(start - 1)}
    at = jnp.array([start], jnp.int32)
    ring = kv_cache.rings(jnp.asarray(cache), span, at, GAMMA)
    assert ring.entries.shape[1] == span.ring_length(GAMMA)
    written, writes = int(start), 0
    visible = jax.jit(attention.visible, static_argnums=(1, 2))
    write = jax.jit(kv_cache.write)

    def put(position: int) -> None:
        nonlocal ring, writes
        writes += 1
        newest[position] = writes
        entry = jnp.array([[[position, writes]]], jnp.int32)
        ring = write(ring, entry, jnp.array([[position]], jnp.int32))

    while written + GAMMA < length:
        for i in range(GAMMA):  # drafts: each one writes, then looks
            position = written - 1 + i
            put(position)
            mask = visible(
                jnp.array([[position]], jnp.int32), ring.entries.shape[1], span
            )
            found = np.asarray(ring.entries)[0, np.asarray(mask)[0, 0]]
            wanted = [(s, newest[s]) for s in seen_by(position, span)]
            assert sorted(map(tuple, found.tolist())) == wanted
        for i in range(GAMMA + 1):  # the verification writes all anew
            put(written - 1 + i)
        written += int(rng.integers(1, count + 1))
        for s in [s for s in newest if s >= written - 1]:
            del newest[s]  # rejected: written again before they may be seen


def test_padding_is_neither_written_nor_seen() -> None:
    span = Span(2, 3)
    ring = Ring(entries=jnp.zeros((1, span.ring_length(1), 1)), span=span)
    padding = jnp.full((1, 1), NONE, jnp.int32)
    written = kv_cache.write(ring, jnp.ones((1, 1, 1)), padding)
    assert not np.asarray(written.entries).any()
    assert not np.asarray(attention.visible(padding, 16, span)).any()


def test_rings_are_made_of_what_is_known() -> None:
    """Entries from the last token on, left by rejected drafts, are not copied."""
    span = Span(1, 2)
    cache = jnp.arange(1, 41).reshape(1, 40, 1)
    ring = kv_cache.rings(cache, span, jnp.array([21], jnp.int32), 1)
    held = sorted(set(np.asarray(ring.entries).ravel().tolist()) - {0})
    assert held == [1, *range(21 - 15, 21)]  # position 0, and the last fifteen
    positions = jnp.array([[0, 19, NONE]], jnp.int32)
    entries = kv_cache.read(ring, positions)
    np.testing.assert_array_equal(np.asarray(entries)[0, :, 0], [1, 20, 0])


# -- rounds


B, S = 3, 96
POLICY = er_jax.Decoder(dataclasses.replace(SIZES, dtype="float64"))
LIMITS = (90, 96, 61)


@functools.cache
def decoded(gamma: int, span: Span | None, accept: Any = "coupled") -> Any:
    """Return state and info after a window of three rows to their limits."""
    with jax.enable_x64(True):
        params = er_jax.attach_draft(
            POLICY.init(jax.random.key(0)), er_jax.DrafterConfig(bits=4, window=None)
        )
        rng = np.random.default_rng(0)
        known = np.array([5, 19, 2], np.int32)
        tokens = rng.integers(0, POLICY.vocab_size, (B, S)).astype(np.int32)
        state = steps.empty_state(POLICY, B, S)
        state = dataclasses.replace(
            state,
            tokens=jnp.asarray(tokens),
            length=known,
            prompt_length=known,
            limit=np.array(LIMITS, np.int32),
            sequence_id=np.arange(B, dtype=np.int32),
            live=np.ones(B, np.bool_),
            cache=prefilled(params.policy, tokens, known),
        )
        run = jax.jit(
            functools.partial(
                windows._window, POLICY, gamma=gamma, accept=accept, truncated=False,
                span=span, rounds_per_test=1, layout=windows.ONE_DEVICE,
            )
        )  # fmt: skip
        state, info, _ = run(params, state, settings(), jnp.int32(0), jnp.int32(1000))
        return jax.device_get(state), jax.device_get(info)


def prefilled(params: Any, tokens: np.ndarray, known: np.ndarray) -> Any:
    offsets = jnp.arange(S, dtype=jnp.int32)[None]
    positions = jnp.where(offsets < known[:, None] - 1, offsets, NONE)
    forward = jax.jit(POLICY.forward)
    return forward(params, jnp.asarray(tokens), positions, POLICY.init_cache(B, S))[1]


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("span", [Span(2, 3), Span(0, 1), Span(16, 20)], ids=named)
def test_a_span_changes_no_token(span: Span) -> None:
    plain, _ = decoded(0, None)
    state, info = decoded(GAMMA, span)
    assert state.draft_cache is None
    np.testing.assert_array_equal(state.tokens, plain.tokens)
    np.testing.assert_array_equal(state.length, plain.length)
    np.testing.assert_allclose(state.logprobs, plain.logprobs, rtol=0, atol=1e-12)
    assert info.accepted[0] and info.accepted[GAMMA], "all outcomes should be met"
    # The cache holds what plain decoding has written, and no draft's entry: that is
    # what the target's computed from the same tokens.
    for row, length in enumerate(plain.length):
        for found, wanted in zip(
            jax.tree.leaves(state.cache), jax.tree.leaves(plain.cache), strict=True
        ):
            np.testing.assert_allclose(
                found[row, : length - 1], wanted[row, : length - 1], atol=1e-12
            )


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("span", [Span(0, 96), Span(96, 1), Span(40, 70)], ids=named)
def test_a_span_that_hides_nothing_keeps_the_same_drafts(span: Span) -> None:
    _, wanted = decoded(GAMMA, None)
    _, found = decoded(GAMMA, span)
    np.testing.assert_array_equal(found.accepted, wanted.accepted)


def masked(span: Span) -> attention.Attention:
    """Attention over the whole cache in which a draft sees a span, by the definition.

    Drafts have one query, verifications have several.
    """

    def attend(query: Any, keys: Any, values: Any, positions: Any, none: Any) -> Any:
        assert none is None
        if query.shape[1] > 1:
            return attention.attend_whole(query, keys, values, positions)
        at = positions[:, 0, None]
        slots = jnp.arange(keys.shape[1], dtype=jnp.int32)[None]
        is_seen = (slots < span.head) | (slots > at - span.window)
        # Few entries in a plain softmax, so that nothing is shared with the library.
        kv_heads = keys.shape[2] // query.shape[3]
        shape = (*keys.shape[:2], kv_heads, query.shape[3])
        k, v = (
            jnp.repeat(x.reshape(shape), query.shape[2] // kv_heads, axis=2)
            for x in (keys, values)
        )
        scores = jnp.einsum("bhd,bshd->bhs", query[:, 0], k) / np.sqrt(query.shape[3])
        is_seen &= slots <= at
        scores = jnp.where(is_seen[:, None], scores, -1e30)
        out = jnp.einsum("bhs,bshd->bhd", jax.nn.softmax(scores), v)
        return out.reshape(len(out), 1, -1)

    return attend


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("span", [Span(2, 3), Span(16, 20)], ids=named)
def test_drafts_are_those_of_masked_attention(span: Span) -> None:
    """The same drafts are kept as where a mask hides all but the span."""
    _, found = decoded(GAMMA, span)
    with attention.replaced(masked(span)):
        _, wanted = decoded.__wrapped__(GAMMA, None)
    np.testing.assert_array_equal(found.accepted, wanted.accepted)
    _, whole = decoded(GAMMA, None)
    assert (found.accepted != whole.accepted).any(), "the span should hide something"


# -- policies


@dataclasses.dataclass(frozen=True)
class ByHand(Learned):
    """Writes to the arrays of its cache itself, whatever they are."""

    def forward(self, params: Any, tokens: Any, positions: Any, cache: Any) -> Any:
        cache = jax.tree.map(lambda leaf: leaf.at[:, positions[0]].add(1.0), cache)
        return super().forward(params, tokens, positions, cache)


def test_who_takes_rings() -> None:
    decoder = er_jax.Decoder(SIZES)
    params = jax.eval_shape(decoder.init, jax.random.key(0))
    assert kv_cache.takes_rings(decoder, params)
    for policy, wanted in (
        (Learned(), True),
        (Learned(attention="plain"), False),
        (ByHand(), False),
    ):
        assert kv_cache.takes_rings(policy, policy.init(0)) is wanted, policy


def sample(policy: Any, params: Any, control: str, **drafter: Any) -> er_jax.Rollout:
    return er_jax.rollout(
        policy, params, [[1, 2, 3], [4, 5]], key=jax.random.key(0),
        config=er_jax.RolloutConfig(
            max_new_tokens=17, n=2, control=control,
            drafter=er_jax.DrafterConfig(**drafter),
        ),
    )  # fmt: skip


@pytest.mark.usefixtures("unoptimized")
def test_a_policy_of_arrays_drafts_over_all_positions() -> None:
    policy = Learned(attention="plain")
    params = policy.init(0)
    with pytest.warns(RuntimeWarning, match="drafter.window=4 is not used"):
        out = sample(policy, params, "fixed:2", window=4, head=1)
    assert {moment.window for moment in out.stats.timeline} == {0}
    whole = sample(policy, params, "fixed:2", window=None)
    np.testing.assert_array_equal(out.stats.accepted[2], whole.stats.accepted[2])


@pytest.mark.usefixtures("unoptimized")
def test_a_stated_window_is_used_and_told() -> None:
    policy = small_policy("a stated window")
    params = policy.init(jax.random.key(0))
    out = sample(policy, params, "fixed:2", window=4, head=1)
    assert {(m.head, m.window) for m in out.stats.timeline} == {(1, 4)}
    assert "seeing 1 + 4 positions" in out.stats.summary()
    plain = sample(policy, params, "ar")
    np.testing.assert_array_equal(out.completion_ids, plain.completion_ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window=0 must be a whole number of at least 1"),
        ({"window": "all"}, "use None for all of them, or 'auto'"),
        ({"window": 2.5}, "window=2.5"),
        ({"head": -1}, "head=-1 must be a whole number of at least 0"),
    ],
)
def test_wrong_windows_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        er_jax.DrafterConfig(**changes)


# -- requests and choices


def request(length: int, control: str = "best", **drafter: Any) -> Request:
    config = er_jax.RolloutConfig(
        max_new_tokens=length,
        control=control,
        drafter=er_jax.DrafterConfig(**drafter),
    )
    return request_of([np.ones(3, np.int32)], np.arange(1), config)


def test_what_drafts_may_see_by_length() -> None:
    auto = request(4096)
    assert auto.views_at(4096, 4) == [View(0, 64, 512), FIRST_DRAFT]
    assert auto.views_at(1024, 4) == [FIRST_DRAFT]  # more than half would be seen
    assert auto.views_at(4096, 0) == [FIRST_DRAFT]
    stated = request(4096, window=100, head=28)
    assert stated.views_at(256, 4) == [View(0, 28, 100)]
    assert stated.views_at(128, 4) == [FIRST_DRAFT]  # it would hide nothing
    assert request(4096, window=None).views_at(4096, 4) == [FIRST_DRAFT]


LONG = Program(4, 4096, 0)
WHOLE, SPANNED = (LONG._replace(gamma=4).seeing(span) for span in (None, Span(64, 512)))
OPTIONS = (SPANNED, WHOLE, LONG)


def test_the_controller_takes_the_faster_kind() -> None:
    costs = {LONG: 0.010, WHOLE: 0.030, SPANNED: 0.020}
    controller = made(costs)
    assert controller.choose(OPTIONS, LONG, compile_s=FREE) == SPANNED
    # What a span keeps is learnt apart, and at once.
    for _ in range(3):
        emitted = np.array([500, 5, 0, 0, 0])
        controller.observe(SPANNED, 100, emitted, 2.0)
    assert controller.choose(OPTIONS, SPANNED, compile_s=FREE) == WHOLE
    assert controller.broken_drafter is None
    assert controller.acceptance.tokens_per_round(4) > 4


def test_other_controls_see_all_unless_told() -> None:
    for control in ("fixed:4", "paper", "ar"):
        assert request(4096, control=control).views == (FIRST_DRAFT,)
        stated = request(4096, control=control, window=100)
        assert stated.views == (View(0, 64, 100),)
    assert request(4096).views == (FIRST_DRAFT, View(0, 64, 512))


def test_what_was_learnt_of_spans_is_saved() -> None:
    controller = made({LONG: 0.010, WHOLE: 0.030, SPANNED: 0.020})
    controller.observe(SPANNED, 10, np.array([10, 5, 3, 2, 40]), 0.2)
    other = Controller("best", controller.gammas)
    other.load_state_dict(controller.state_dict())
    assert other.table.seconds == controller.table.seconds
    mine, theirs = (c.acceptance_of(SPANNED.view) for c in (controller, other))
    np.testing.assert_array_equal(mine.tested, theirs.tested)
    assert "seeing 64 + 512 positions" in other.summary()
    # A new sampling setting begins with it, and a later rollout with less of it.
    controller.start_rollout((0.7, 0, 1.0, 0.0))
    begun = controller._rollouts.current.others[SPANNED.view].used
    assert 0 < begun.tested[0] <= mine.tested[0]
    good = [[], 0, 5, *[[0.0] * 8] * 4]
    for change in ([[1.0], *good[1:]], [[], 0, 0, *good[3:]], good[:-1]):
        state = controller.state_dict() | {"spans": [change]}
        with pytest.raises(ValueError, match=r"spans\[0\]"):
            other.load_state_dict(state)


@pytest.mark.parametrize("how", ["programs", "passes"])
def test_a_span_is_predicted_from_what_a_step_saves(how: str) -> None:
    """A step reads 0.1 ms of weights, and 1 us for each position of its four rows."""

    def step_s(length: int) -> float:
        return 1e-4 + 1e-6 * length

    def round_s(length: int, seen: int) -> float:
        draft_s = 0.5e-4 + 1e-6 * seen
        return 4 * draft_s + 1.2 * step_s(length)

    controller = Controller("best", (0, 4))
    table = controller.table
    ring = Span(64, 512).ring_length(4)
    for length in (ring, 2048, 4096):
        program = Program(4, length, 4)
        table.seconds[program] = round_s(length, length)
        table.seconds[program._replace(gamma=0)] = step_s(length)
    if how == "passes":
        table.passes = PassCosts(table.readings())
        table.seconds = {}
    wanted = round_s(4096, ring)
    assert table.round_seconds(SPANNED) == pytest.approx(wanted, rel=1e-6)
    # One that was measured corrects the others.
    table.seconds[SPANNED] = 1.25 * wanted
    other = SPANNED._replace(cache_length=2048)
    wanted = 1.25 * round_s(2048, ring)
    assert table.round_seconds(other) == pytest.approx(wanted, rel=0.03)
    # Plain decoding and whole drafts are predicted as before.
    assert table.round_seconds(LONG) == pytest.approx(step_s(4096))


@pytest.mark.usefixtures("unoptimized")
def test_a_program_of_spans_is_another_one() -> None:
    policy = small_policy("spans are named")
    params = policy.init(jax.random.key(0))
    first = sample(policy, params, "fixed:2", window=4, head=1)
    windows_of = [name for name, _ in first.stats.compiled if "window" in name]
    assert len(windows_of) == 1
    again = sample(policy, params, "fixed:2", window=4, head=1)
    assert not again.stats.compiled
    other = sample(policy, params, "fixed:2", window=5, head=1)
    assert len([n for n, _ in other.stats.compiled if "window" in n]) == 1


@pytest.mark.slow
def test_a_window_holds_rings_and_no_second_cache() -> None:
    sizes = dataclasses.replace(SIZES, head_dim=64)
    policy = er_jax.Decoder(sizes)
    rows, length, span = 4, 2048, Span(16, 40)
    params = jax.eval_shape(
        lambda: er_jax.attach_draft(
            policy.init(jax.random.key(0)), er_jax.DrafterConfig()
        )
    )
    state = jax.eval_shape(lambda: steps.empty_state(policy, rows, length))
    temporary = {}
    for seen in (None, span):
        compiled = windows.run_window.lower(
            policy, params, state, settings(), np.int32(0), np.int32(9), gamma=2,
            accept="coupled", rounds_per_test=1, truncated=False, span=seen,
        ).compile()  # fmt: skip
        found: Any = compiled.memory_analysis()
        temporary[seen] = found.temp_size_in_bytes
        assert found.alias_size_in_bytes >= rows * length * 2 * 64 * 4
    entry = 2 * sizes.num_kv_heads * sizes.head_size * 4
    rings = rows * span.ring_length(2) * entry
    # Buffers of scores may be shared less well.
    scores = rows * 3 * sizes.num_heads * length * 4
    assert temporary[span] <= temporary[None] + 2 * rings + 2 * scores
    assert 2 * rings + 2 * scores < rows * length * entry / 4


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_all_windows_may_be_chosen(x64: None) -> None:
    """Switching between all positions and a span, in mid-rollout, changes no token."""

    class Restless(Controller):
        def choose(self, options: Any, current: Any, **known: Any) -> Program:
            self.turn = getattr(self, "turn", 0) + 1
            kinds = sorted({p.window for p in options if p.gamma})
            wanted = kinds[self.turn % len(kinds)]
            found = [p for p in options if p.gamma and p.window == wanted]
            return found[self.turn % len(found)]

    policy = er_jax.Decoder(dataclasses.replace(SIZES, dtype="float64"))
    params = policy.init(jax.random.key(1))
    config = er_jax.RolloutConfig(max_new_tokens=224, n=3, gammas=(0, 2), max_slots=4)
    arguments: dict[str, Any] = {"key": jax.random.key(2)}
    prompts = [[1, 2, 3], list(range(20))]
    plain = er_jax.rollout(
        policy, params, prompts, **arguments,
        config=dataclasses.replace(config, control="ar"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("er_jax.drafter.AUTO_WINDOW", 10)
        patch.setattr("er_jax.scheduler.batch.WINDOW_S", 0.0)
        drafter = er_jax.DrafterConfig(head=3)
        out = er_jax.rollout(
            policy, params, prompts, **arguments,
            config=dataclasses.replace(config, drafter=drafter),
            controller=Restless("best", (0, 2)),
        )  # fmt: skip
    np.testing.assert_array_equal(out.completion_ids, plain.completion_ids)
    kinds = [m.window for m in out.stats.timeline]
    assert {(0, 10), (10, 0)} <= set(itertools.pairwise(kinds))
    assert len({m.rows for m in out.stats.timeline}) > 1, "nothing was compacted"
    assert len({m.cache_length for m in out.stats.timeline}) > 1, "it never grew"


def test_the_toy_takes_rings() -> None:
    """So that enumerations and fuzzing reach them."""
    policy = Toy()
    params = {
        "pages": np.zeros((3, 3, 3), np.float32),
        "lines": np.zeros((3, 3), np.float32),
    }
    assert kv_cache.takes_rings(policy, params)


def test_a_state_between_windows_has_no_rings() -> None:
    state = steps.empty_state(er_jax.Decoder(SIZES), 2, 64)
    begun = steps.begin_window(state, Span(1, 2), 2)
    assert isinstance(begun.draft_cache, list)
    ended: DecodeState = steps.end_window(begun)
    assert ended.draft_cache is None
    assert len(jax.tree.leaves(ended)) == len(jax.tree.leaves(state))


def test_a_replay_prices_drafts_by_what_they_see(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long cache costs drafts nothing more; short ones are seen as a whole."""
    costs = SpanCosts(ROOFLINE, Span(64, 512))
    for length in (256, 4096):
        program = Program(8, length, 4)
        seen = program.seeing(Span(64, 512)) if length > 576 else program
        assert costs.round_seconds(program) == ROOFLINE.round_seconds(seen)
    short, long_ = (costs.round_seconds(Program(8, n, 4)) for n in (4096, 8192))
    verify = [ROOFLINE.pass_seconds("verify", 8, n, 4) for n in (4096, 8192)]
    assert long_ - short == pytest.approx(verify[1] - verify[0])
    table = LatencyTable(
        passes=PassCosts(
            [
                Reading(cast(Kind, kind), rows, length, gamma, seconds)
                for rows, length in itertools.product((1, 8, 32), (512, 8192))
                for kind, gamma, seconds in (
                    ("target", 0, ROOFLINE.pass_seconds("target", rows, length)),
                    ("draft", 4, ROOFLINE.pass_seconds("draft", rows, length, 4)),
                    ("verify", 4, ROOFLINE.pass_seconds("verify", rows, length, 4)),
                )
            ]
        )
    )
    path = tmp_path / "costs.json"
    table.save(path, {})
    saved = {}
    for window in ([], ["--window", "512"]):
        cli.main(
            ["replay", str(path), "--trace", "capped", "--num", "32", "--seeds", "2",
             "--controls", "best", "--keep", "0.9", *window]
        )  # fmt: skip
        text = capsys.readouterr().out
        (line,) = [one for one in text.splitlines() if one.startswith("best")]
        saved[bool(window)] = float(line.split()[3])
    assert "drafts see 64 + 512" in text
    assert saved[True] > saved[False] + 1


# -- decisions


def test_what_is_looked_up_follows_what_drafts_of_all_positions_do() -> None:
    """No kind that never ran keeps a good opinion of a drafter found broken."""
    controller = Controller("best", (0, 4))
    controller.table.seconds = {LONG: 0.010, WHOLE: 0.030}
    controller.choose(OPTIONS, LONG, compile_s=FREE)
    before = controller.acceptance_of(SPANNED.view).keep_probs(4)[0]
    controller.observe(WHOLE, 100, np.array([900, 100, 0, 0, 0]), 1.0)
    assert controller.broken_drafter is not None
    assert controller.acceptance_of(SPANNED.view).keep_probs(4)[0] < before - 0.3
    assert controller.state_dict()["spans"] == []


def test_a_drop_shows_a_broken_drafter_with_a_stated_window_too() -> None:
    controller = Controller("fixed:4", (0, 4))
    low = np.array([50, 20, 10, 10, 10])
    controller.observe(SPANNED, 100, low, 1.0)
    controller.observe(SPANNED, 500, 5 * low, 5.0)
    assert controller.broken_drafter is None, "seeing little is no defect"
    controller.observe(SPANNED, 100, np.array([200, 0, 0, 0, 0]), 1.0)
    assert controller.broken_drafter is not None


def test_compiled_drafts_with_a_window_are_tried_without_a_look() -> None:
    controller = Controller("best", (0, 4))
    controller.table.seconds = {LONG: 0.010}
    assert controller.choose((SPANNED, LONG), LONG, compile_s=FREE) == SPANNED


def test_the_first_look_is_booked_for_what_drafts_may_see() -> None:
    controller = Controller("best", (0, 4))
    one = Program(1, 4096, 0)
    controller.table.seconds = {LONG: 0.010, LONG._replace(cache_length=1024): 0.004}
    price = compiled_are([LONG], cost=2.0)
    controller.choose(OPTIONS, LONG, compile_s=price)
    for _ in range(60):
        controller.observe(LONG, 100, np.zeros(1), 1.0)
    look = controller.first_look(1, 4096, price)
    assert look == (one, one._replace(gamma=4))
    controller.observe_first_look({look[0]: 0.006, look[1]: 0.012}, 50)
    lost = controller.state_dict()["lost_s"]
    assert {row[5] for row in lost if row[1] == 4096} == {0, 512}
    assert controller.choose(OPTIONS, LONG, compile_s=price).gamma == 4


def test_a_stated_window_is_predicted_from_itself() -> None:
    """Where drafts never see all positions, no such round is ever measured."""
    table = LatencyTable()
    for rows in (1, 4):
        table.seconds[Program(rows, 4096, 0)] = 0.010 * rows**0.5
    one = Program(1, 4096, 4).seeing(SPANNED.span)
    table.seconds[one] = 0.015
    found = table.round_seconds(one._replace(rows=4))
    assert found is not None
    assert 0.020 < found < 0.060
    assert not drafts_lose(table, AcceptanceEstimate.empty(4), (0, 4), 1)
    table.seconds[one] = 0.060
    assert drafts_lose(table, AcceptanceEstimate.empty(4), (0, 4), 1)


def test_a_step_of_many_rows_is_bounded_by_rounds_at_each_length() -> None:
    table = LatencyTable(
        {Program(1, 4096, 0): 0.010, Program(1, 4096, 4): 0.030,
         Program(32, 4096, 4): 0.040}
    )  # fmt: skip
    found = [table.round_seconds(Program(32, n, 0)) or 0.0 for n in (512, 1024, 4096)]
    assert found == sorted(set(found))
    # Four drafts of half a step, and a verification of five times the rows.
    assert found[-1] == pytest.approx(0.040 / (5**0.5 + 4 * 0.5))


def test_one_bad_reading_changes_other_windows_by_a_bounded_factor() -> None:
    costs = {LONG: 0.010, WHOLE: 0.030, LONG._replace(cache_length=512): 0.004}
    table = LatencyTable(dict(costs))
    wanted = table.round_seconds(SPANNED)
    table.observe(SPANNED._replace(gamma=2), 5.0, 1)
    found = table.round_seconds(SPANNED)
    assert wanted is not None
    assert found is not None
    assert found <= 2 * wanted


def test_where_rings_have_no_room_drafts_see_all() -> None:
    """The batch is never left without a program."""
    wanted = dataclasses.replace(
        request(2000, control="fixed:4", window=1000), state_limit_bytes=2_600_000
    )
    engine: Any = SimulatedEngine(
        ROOFLINE, lambda count: 0.0, {}, np.ones(4), rounds_per_test=1
    )
    engine.position_bytes = 1200.0
    options = Options(OneDevice(engine, NO_PARAMS, wanted), wanted, settings())
    length = wanted.cache_lengths[-1]
    rows = dataclasses.replace(
        Rows.empty(1),
        sequence=np.zeros(1, int),
        length=np.array([1500]),
        limit=np.array([length]),
    )
    found = options.programs(rows, (1, length, False), False, (4,))
    assert [(p.cache_length, p.window) for p in found] == [(length, 0)]
    roomy = dataclasses.replace(wanted, state_limit_bytes=None)
    options = Options(OneDevice(engine, NO_PARAMS, roomy), roomy, settings())
    found = options.programs(rows, (1, length, False), False, (4,))
    assert found[-1].window == 1000


def test_the_switch_is_explained_by_what_was_offered() -> None:
    controller = made({LONG: 0.010, WHOLE: 0.030, SPANNED: 0.020})
    short = Program(4, 256, 0)
    controller.table.seconds |= {short: 0.004, short._replace(gamma=4): 0.016}
    controller.choose(OPTIONS, LONG, compile_s=FREE)
    text = explain(controller, [SPANNED, LONG])
    assert "seeing 64 + 512 positions: a round of 4 drafts costs" in text
    assert "seeing 64 + 512" in text.splitlines()[-1]
    assert "seeing" not in explain(controller, [short]).splitlines()[-1]


def test_states_of_earlier_versions_are_read() -> None:
    controller = made({LONG: 0.010, WHOLE: 0.030})
    state = controller.state_dict()
    del state["spans"]
    state["seconds"] = [[*row[:4], row[-1]] for row in state["seconds"]]
    other = Controller("best", controller.gammas)
    other.load_state_dict(state)
    assert other.table.seconds == controller.table.seconds
