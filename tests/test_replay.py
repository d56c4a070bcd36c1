"""The same tokens whatever ran them: controls, slots, orders, groups, neighbours.

A small decoder is trained for a moment on a made-up language, so that its draft is good
and lengths differ widely. In float64 completions have to be equal token for token. In
float32 programs of other shapes round otherwise, so a difference is forgiven where the
two best noised log-probabilities lie within 1e-4, computed from a pass of their own; it
is counted, and rarer than one in a hundred thousand tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from er_jax import sampling
from er_jax.costs.table import LatencyTable
from er_jax.request import row_buckets
from er_jax.scheduler import batch
from er_jax.types import NONE, LogprobKind, Program, Sampling

V, STOP, CLASSES = 32, 0, 4
pytestmark = pytest.mark.usefixtures("as_users_compile")

SIZES = er_jax.DecoderConfig(
    vocab_size=V, dim=32, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=64
)
TIE = 1e-4
MOST_TIES = 1e-5  # of all tokens


# A language, and a policy that speaks it.


def sentences(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Return `[count, length]` tokens: a class first, then steps of its own size.

    From one token to the next 7 times it plus the class, modulo 27, plus 5; one in
    eight is any token; and after each the sentence may end, in class 1 soon and in
    class 4 hardly ever. After the end there is nothing but ends.
    """
    kind = rng.integers(1, CLASSES + 1, count)
    tokens = np.zeros((count, length), np.int32)
    tokens[:, 0] = kind
    tokens[:, 1] = rng.integers(5, V, count)
    ended = np.zeros(count, bool)
    for i in range(2, length):
        follow = (7 * tokens[:, i - 1] + kind) % 27 + 5
        other = rng.integers(5, V, count)
        token = np.where(rng.random(count) < 1 / 8, other, follow)
        ended |= rng.random(count) < 0.1 / 2.5 ** (kind - 1)
        tokens[:, i] = np.where(ended, STOP, token)
    return tokens


@functools.partial(jax.jit, static_argnums=0)
def train_step(
    policy: er_jax.Decoder, params: Any, moments: Any, tokens: jax.Array
) -> tuple[Any, Any, jax.Array]:
    """One step of a plain Adam on the next-token loss."""

    def loss(params: Any) -> jax.Array:
        offsets = jnp.arange(tokens.shape[1] - 1, dtype=jnp.int32)
        positions = jnp.broadcast_to(offsets, (tokens.shape[0], offsets.shape[0]))
        cache = policy.init_cache(*positions.shape)
        hidden, _ = policy.forward(params, tokens[:, :-1], positions, cache)
        logprobs = jax.nn.log_softmax(policy.logits(params, hidden))
        return -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))

    value, gradient = jax.value_and_grad(loss)(params)
    mean, square = moments
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradient)
    square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, square, gradient)
    params = jax.tree.map(
        lambda p, m, s: p - 0.01 * m / (jnp.sqrt(s) + 1e-8), params, mean, square
    )
    return params, (mean, square), value


@pytest.fixture(scope="module")
def trained() -> Any:
    """Float32 parameters after 300 steps, as NumPy arrays."""
    policy = er_jax.Decoder(SIZES)
    params = policy.init(jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    moments = (zeros, zeros)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(300):
        params, moments, loss = train_step(
            policy, params, moments, sentences(rng, 64, 24)
        )
        losses.append(float(loss))
    assert np.mean(losses[-20:]) < 0.5 * losses[0]
    return jax.device_get(params)


# What is run, and how it may be run.


@dataclasses.dataclass(frozen=True)
class Work:
    """Prompts, completions of each, and the settings they share.

    gammas: what may be drafted. rows: batch sizes that may be used.
    """

    prompts: tuple[tuple[int, ...], ...]
    per_prompt: int
    max_new_tokens: int
    gammas: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.prompts) * self.per_prompt


SMALL = Work(
    prompts=((1, 9, 11), (4, 6)),
    per_prompt=4,
    max_new_tokens=40,
    gammas=(0, 2),
    rows=(2, 8),
)
LARGE = Work(
    prompts=((4, 9), (2, 14, 6, 8, 22), (3, 30, 17), (4, 5, 31, 7, 8, 9, 10, 11, 6)),
    per_prompt=4,
    max_new_tokens=200,
    gammas=(0, 1, 4),
    rows=(1, 3, 8, 16),
)


class FrozenTable(LatencyTable):
    """Seconds that stay, so that what is chosen does not depend on the machine."""

    def observe(self, program: Program, seconds: float, num_rounds: int) -> None:
        pass


def pretended_table(work: Work, gammas: Sequence[int]) -> FrozenTable:
    """Small batches and short caches are faster; the fewer rows, the longer drafts."""
    seconds = {}
    for rows, length, gamma in itertools.product(
        row_buckets(max(work.rows)), (64, 128, 256), gammas
    ):
        step = max(1.0, rows * (gamma + 1) / 12) * rows**0.3 * (length / 64) ** 0.3
        cost = step + 0.2 * gamma if rows in work.rows else 1e6
        seconds[Program(rows, length, gamma)] = 0.001 * cost
    return FrozenTable(seconds)


class Restless(er_jax.Controller):
    """Takes any program that can run, at random, at every window."""

    def __init__(self, work: Work, seed: int) -> None:
        super().__init__("best", work.gammas)
        self.work = work
        self.rng = np.random.default_rng(seed)

    def choose(
        self, options: Sequence[Program], current: Program | None, **unused: Any
    ) -> Program:
        allowed = [p for p in options if p.rows in self.work.rows]
        return allowed[self.rng.integers(len(allowed))]


def make_controller(work: Work, control: str, seed: int) -> er_jax.Controller:
    """A controller that compiles at once, and moves by pretended seconds."""
    if control == "restless":
        controller: er_jax.Controller = Restless(work, seed)
    else:
        controller = er_jax.Controller(control, work.gammas, patience=0.0)
    controller.table = pretended_table(work, controller.gammas)
    return controller


Key = tuple[int, int]  # prompt, sequence id


@dataclasses.dataclass
class Outcome:
    """Tokens and log-probabilities by prompt and sequence id, and what was done."""

    tokens: dict[Key, np.ndarray]
    logprobs: dict[Key, np.ndarray]
    stats: er_jax.RolloutStats


def run(
    work: Work,
    params: Any,
    *,
    control: str,
    slots: int,
    order: str = "given",
    group: int | None = None,
    seed: int = 0,
    only: Key | None = None,
    **changes: Any,
) -> Outcome:
    """Sample all of the work: `group` completions per prompt of the request.

    With smaller groups a prompt stands in the request several times. Whatever the
    order, a completion keeps its sequence id: that is what names it.
    """
    group = group or work.per_prompt
    pairs = [
        (prompt, [prompt * work.per_prompt + first + i for i in range(group)])
        for prompt in range(len(work.prompts))
        for first in range(0, work.per_prompt, group)
    ]
    if order == "reversed":
        pairs = [(prompt, ids[::-1]) for prompt, ids in pairs[::-1]]
    elif order == "shuffled":
        pairs = [pairs[i] for i in np.random.default_rng(1).permutation(len(pairs))]
    if only is not None:
        group, pairs = 1, [(only[0], [only[1]])]
    is_wide = jax.tree.leaves(params)[0].dtype == np.float64
    policy = er_jax.Decoder(
        dataclasses.replace(SIZES, dtype="float64" if is_wide else "float32")
    )
    controller = make_controller(work, control, seed)
    out = er_jax.rollout(
        policy,
        params,
        [work.prompts[prompt] for prompt, _ in pairs],
        key=jax.random.key(100 + seed),
        config=er_jax.RolloutConfig(
            max_new_tokens=work.max_new_tokens,
            n=group,
            stop_token_ids=(STOP,),
            gammas=work.gammas,
            control="best" if control == "restless" else control,
            max_slots=slots,
            **changes,
        ),
        sequence_ids=[i for _, ids in pairs for i in ids],
        controller=controller,
    )
    names = [(prompt, i) for prompt, ids in pairs for i in ids]
    lengths = zip(names, out.lengths, strict=True)
    return Outcome(
        tokens={
            name: out.completion_ids[row, :length]
            for row, (name, length) in enumerate(lengths)
        },
        logprobs={
            name: out.logprobs[row, :length]
            for row, (name, length) in enumerate(zip(names, out.lengths, strict=True))
        },
        stats=out.stats,
    )


@functools.partial(jax.jit, static_argnums=0)
def forced_logits(policy: er_jax.Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Return the logits `[B, T, V]` after each token, in one pass."""
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.broadcast_to(offsets, tokens.shape)
    hidden, _ = policy.forward(
        params, tokens, positions, policy.init_cache(*tokens.shape)
    )
    return policy.logits(params, hidden)


def noised(work: Work, params: Any, made: Outcome, seed: int) -> dict[Key, np.ndarray]:
    """Return the noised log-probabilities `[length, V]` behind every completion.

    The way a trainer would look at it: whole sequences, no cache, rounds or slots.
    """
    is_wide = jax.tree.leaves(params)[0].dtype == np.float64
    policy = er_jax.Decoder(
        dataclasses.replace(SIZES, dtype="float64" if is_wide else "float32")
    )
    names = list(made.tokens)
    longest = max(map(len, work.prompts)) + work.max_new_tokens
    tokens = np.zeros((len(names), longest), np.int32)
    for row, name in enumerate(names):
        whole = [*work.prompts[name[0]], *made.tokens[name]]
        tokens[row, : len(whole)] = whole
    settings = Sampling(
        key=np.asarray(jax.random.key_data(jax.random.key(100 + seed))),
        temperature=np.float32(1),
        top_k=np.int32(0),
        top_p=np.float32(1),
        min_p=np.float32(0),
        stop_ids=np.full(8, NONE, np.int32),
        logprob_kind=np.int32(LogprobKind.RAW),
    )
    logits = forced_logits(policy, params, tokens)
    position = np.tile(np.arange(1, longest + 1, dtype=np.int32), (len(names), 1))
    ids = np.array([[i] for _, i in names], np.int32)
    scores = np.asarray(
        sampling.noised_logprobs(
            logits, settings, jnp.asarray(ids), jnp.asarray(position)
        )
    )
    starts = {name: len(work.prompts[name[0]]) - 1 for name in names}
    return {
        name: scores[row, starts[name] : starts[name] + len(made.tokens[name])]
        for row, name in enumerate(names)
    }


@dataclasses.dataclass
class Comparison:
    """Counts over all pairs of runs that were compared."""

    num_runs: int = 0
    num_tokens: int = 0
    ties: list[tuple[str, Key, int, float]] = dataclasses.field(default_factory=list)
    max_logprob_gap: float = 0.0

    def add(
        self,
        label: str,
        made: Outcome,
        reference: Outcome,
        scores: dict[Key, np.ndarray] | None,
    ) -> None:
        """Compare a run with the reference; ties by `scores` are forgiven, if given."""
        assert set(made.tokens) == set(reference.tokens)
        self.num_runs += 1
        for name, wanted in reference.tokens.items():
            found = made.tokens[name]
            shared = min(len(found), len(wanted))
            differ = np.flatnonzero(found[:shared] != wanted[:shared])
            same = int(differ[0]) if len(differ) else shared
            if same < max(len(found), len(wanted)):
                assert scores is not None, f"{label}: {name} differs at {same}"
                assert same < shared, f"{label}: {name} ends elsewhere"
                best = np.sort(scores[name][same])[::-1]
                gap = float(best[0] - best[1])
                assert gap < TIE, f"{label}: {name} differs at {same}, gap {gap}"
                self.ties.append((label, name, same, gap))
            self.num_tokens += same
            gaps = np.abs(made.logprobs[name][:same] - reference.logprobs[name][:same])
            self.max_logprob_gap = max(self.max_logprob_gap, gaps.max(initial=0.0))

    def __str__(self) -> str:
        return (
            f"{self.num_runs} runs, {self.num_tokens} tokens compared, "
            f"{len(self.ties)} ties {self.ties}, log-probabilities within "
            f"{self.max_logprob_gap:.1e}"
        )


def assert_own_draws(made: Outcome, scores: dict[Key, np.ndarray]) -> None:
    """The reference itself is right: each token is the best noised one of its place."""
    for name, tokens in made.tokens.items():
        best = scores[name].argmax(axis=-1)
        order = np.sort(scores[name], axis=-1)
        is_tie = order[:, -1] - order[:, -2] < TIE
        assert ((best == tokens) | is_tie).all()


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let windows end after a few rounds, so that there is much to decide."""
    monkeypatch.setattr(batch, "WINDOW_S", 0.0)
    monkeypatch.setattr(batch, "MIN_ROUNDS", 6)
    yield


def as_dtype(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)


# Small, and often.


@pytest.mark.parametrize(
    "dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)]
)
def test_speculation_and_scheduling_change_no_token(
    trained: Any, dtype: str, short_windows: None
) -> None:
    with jax.enable_x64(dtype == "float64"):
        params = as_dtype(trained, dtype)
        reference = run(SMALL, params, control="ar", slots=8)
        scores = noised(SMALL, params, reference, seed=0)
        assert_own_draws(reference, scores)
        forgiven = None if dtype == "float64" else scores
        compared = Comparison()
        switched = []
        for slots, order, group in (
            (8, "given", 4),
            (2, "reversed", 4),
            (2, "shuffled", 1),
        ):
            for control in ("restless", "ar", "fixed:2"):
                made = run(
                    SMALL,
                    params,
                    control=control,
                    slots=slots,
                    order=order,
                    group=group,
                )
                label = f"{control}, {slots} slots, {order}, groups of {group}"
                compared.add(label, made, reference, forgiven)
                if control == "restless":
                    switched.append(made.stats)
        alone = run(SMALL, params, control="fixed:2", slots=2, only=(1, 6))
        assert len(alone.tokens) == 1
        (name,) = alone.tokens
        compared.add(
            "alone",
            alone,
            Outcome(
                {name: reference.tokens[name]},
                {name: reference.logprobs[name]},
                reference.stats,
            ),
            forgiven,
        )
    assert compared.num_runs == 10
    assert compared.num_tokens > 1000
    assert len(compared.ties) <= MOST_TIES * compared.num_tokens, str(compared)
    assert compared.max_logprob_gap <= (1e-6 if dtype == "float64" else 1e-4)
    # The comparison meant something: rows and gammas did change on the way.
    timeline = [(m.rows, m.gamma) for stats in switched for m in stats.timeline]
    assert {rows for rows, _ in timeline} == {2, 8}
    assert {gamma for _, gamma in timeline} == {0, 2}
    lengths = [len(tokens) for tokens in reference.tokens.values()]
    assert min(lengths) < 10 < 20 < max(lengths)


def test_a_difference_is_found(trained: Any) -> None:
    """The comparison above can fail: another key, another length, a near miss."""
    reference = run(SMALL, trained, control="ar", slots=8)
    scores = noised(SMALL, trained, reference, seed=0)
    with pytest.raises(AssertionError, match="differs at"):
        Comparison().add(
            "key", run(SMALL, trained, control="ar", slots=8, seed=1), reference, scores
        )
    name = max(reference.tokens, key=lambda n: len(reference.tokens[n]))
    cut = dataclasses.replace(
        reference, tokens=reference.tokens | {name: reference.tokens[name][:-1]}
    )
    with pytest.raises(AssertionError, match="ends elsewhere"):
        Comparison().add("cut", cut, reference, scores)
    wrong = reference.tokens[name].copy()
    wrong[3] = (wrong[3] + 1) % V
    made = dataclasses.replace(reference, tokens=reference.tokens | {name: wrong})
    with pytest.raises(AssertionError, match="differs at 3"):
        Comparison().add("wrong", made, reference, scores)
    # At a tie it is forgiven, and counted; in float64 it is not.
    tied = {n: s.copy() for n, s in scores.items()}
    tied[name][3] = 0
    compared = Comparison()
    compared.add("tied", made, reference, tied)
    assert len(compared.ties) == 1
    with pytest.raises(AssertionError, match="differs at 3"):
        Comparison().add("float64", made, reference, None)


# Everything with everything.

CONTROLS = ("ar", "fixed:1", "fixed:4", "best", "restless")
ORDERS = ("given", "reversed", "shuffled")
GROUPS = (1, 2, 4)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param("float64", marks=pytest.mark.slow),
        # What float64 shows to the bit, with roundings and ties as well.
        pytest.param("float32", marks=pytest.mark.long),
    ],
)
def test_every_combination_replays(
    trained: Any,
    dtype: str,
    short_windows: None,
    record_property: Callable[[str, object], None],
) -> None:
    """5 controls x 4 numbers of slots x 3 orders x 3 group sizes, nine keys."""
    compared = Comparison()
    gammas: dict[str, set[int]] = {control: set() for control in CONTROLS}
    rows: set[int] = set()
    lengths: set[int] = set()
    with jax.enable_x64(dtype == "float64"):
        params = as_dtype(trained, dtype)
        for seed, (order, group) in enumerate(itertools.product(ORDERS, GROUPS)):
            reference = run(LARGE, params, control="ar", slots=16, seed=seed)
            scores = noised(LARGE, params, reference, seed)
            assert_own_draws(reference, scores)
            for control, slots in itertools.product(CONTROLS, (1, 3, 8, 16)):
                made = run(
                    LARGE,
                    params,
                    control=control,
                    slots=slots,
                    order=order,
                    group=group,
                    seed=seed,
                )
                label = f"{control}, {slots} slots, {order}, groups of {group}"
                forgiven = None if dtype == "float64" else scores
                compared.add(label, made, reference, forgiven)
                gammas[control] |= set(made.stats.tokens)
                rows |= {m.rows for m in made.stats.timeline}
                lengths |= {m.cache_length for m in made.stats.timeline}
            for name in itertools.islice(reference.tokens, seed % 5, None, 5):
                alone = run(
                    LARGE, params, control="fixed:4", slots=1, seed=seed, only=name
                )
                np.testing.assert_array_equal(
                    alone.tokens[name], reference.tokens[name]
                )
    record_property(f"replay {dtype}", str(compared))
    print(f"{dtype}: {compared}")
    assert compared.num_runs == 180
    assert compared.num_tokens > 100_000
    assert len(compared.ties) <= MOST_TIES * compared.num_tokens, str(compared)
    assert compared.max_logprob_gap <= (1e-6 if dtype == "float64" else 1e-4)
    assert rows == set(LARGE.rows)
    assert len(lengths) == 2
    for control, used in (
        ("ar", {0}),
        ("fixed:1", {1}),
        ("fixed:4", {4}),
        ("best", {0, 1, 4}),
        ("restless", {0, 1, 4}),
    ):
        assert gammas[control] == used, control


@pytest.mark.slow
def test_truncation_replays_too(trained: Any, short_windows: None) -> None:
    with jax.enable_x64(True):
        params = as_dtype(trained, "float64")
        settings: list[dict[str, Any]] = [
            {"temperature": 0.7, "top_k": 5},
            {"temperature": 1.3, "top_p": 0.9, "min_p": 0.02},
            {"temperature": 0.0},
        ]
        for changes in settings:
            reference = run(SMALL, params, control="ar", slots=8, **changes)
            for slots, control in itertools.product((2, 8), ("restless", "fixed:2")):
                made = run(SMALL, params, control=control, slots=slots, **changes)
                compared = Comparison()
                compared.add(f"{changes}", made, reference, None)
