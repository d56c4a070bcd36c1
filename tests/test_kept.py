"""Chances that drafts are kept, and what drafts see: against loops and the library."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import acceptance, text
from benchmarks.lib import corpus, kept_chances, text_model, whole_texts
from benchmarks.lib.agreement import sampling_settings
from benchmarks.lib.kept_chances import Kept
from benchmarks.lib.kept_formats import started
from benchmarks.lib.kept_views import Plan, Sampled, Study, sample, standard_error
from benchmarks.lib.views import View, draft_params_of
from er_jax import Decoder, DecoderConfig, attention, sampling, steps
from er_jax import acceptance as rules
from er_jax.acceptance import AcceptRule
from er_jax.costs.timing import neutral_sampling
from er_jax.drafter import draft_params

pytestmark = pytest.mark.usefixtures("unoptimized_module")

CONFIG = DecoderConfig(
    vocab_size=19, dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    hidden_dim=32, qk_norm=True,
)  # fmt: skip

PLAN = Plan(drafts=("int4",), num_tokens=11, edges=(0, 4), gamma=2)


def distributions(count: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities of a target, and of a draft that differs from it."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(count, vocab_size)) * 2
    changed = logits + rng.normal(size=logits.shape)
    first, second = (np.array(jax.nn.log_softmax(x)) for x in (logits, changed))
    return first, second


def test_chances_are_those_of_the_library() -> None:
    target, draft = distributions(40, 11)
    draft[0] = target[0]
    tokens = np.zeros(40, int)
    for rule, closed in (
        (kept_chances.coupled_rule, rules.expected_coupled_prob),
        (kept_chances.token_rule, rules.expected_accept_prob),
    ):
        found = rule(target, draft, tokens).mean
        wanted = closed(jnp.asarray(target), jnp.asarray(draft))
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        assert found[0] == pytest.approx(1, abs=1e-6)
        assert found[1:].max() < 0.99


@pytest.mark.parametrize("rule", kept_chances.RULES)
def test_chances_given_the_token_add_up(rule: str) -> None:
    """The sum over tokens of target x chance given the token is the chance."""
    target, draft = distributions(5, 11)
    total = np.zeros(5)
    for token in range(11):
        found = kept_chances.RULES[rule](target, draft, np.full(5, token))
        total += np.exp(target[:, token]) * found.given
        assert (found.given <= 1 + 1e-6).all()
    np.testing.assert_allclose(total, found.mean, rtol=1e-6)


def test_coupled_chance_is_that_of_draws() -> None:
    """100 000 draws with one noise: within 4 standard errors, for each drawn token."""
    count = 100_000
    target, draft = (x[0] for x in distributions(1, 5))
    noise = np.random.default_rng(0).gumbel(size=(count, 5))
    drawn, drafted = ((x + noise).argmax(-1) for x in (target, draft))
    found = kept_chances.coupled_rule(
        np.tile(target, (5, 1)), np.tile(draft, (5, 1)), np.arange(5)
    )
    share = np.mean(drawn == drafted)
    assert abs(share - found.mean[0]) < 4 * np.sqrt(share * (1 - share) / count)
    for token in range(5):
        kept = (drafted == token)[drawn == token]
        error = np.sqrt(0.25 / len(kept))
        assert abs(kept.mean() - found.given[token]) < 4 * error
    # One that cannot be drawn is never kept, and makes no number of none.
    draft = np.where(np.arange(5) == 2, sampling.NEVER, draft)
    again = kept_chances.coupled_rule(target[None], draft[None], np.array([2]))
    assert again.given[0] == 0 and 0 < again.mean[0] < 1


def test_chances_by_depth_are_weighted_by_what_came_before() -> None:
    mean = np.array([[0.5, 0.4], [0.9, 0.8], [0.1, 0.1]])
    given = np.array([[0.25, 1.0], [1.0, 1.0], [1.0, 1.0]])
    found = kept_chances.by_depth(Kept(mean, given), np.array([True, True, False]))
    assert found == pytest.approx([0.7, (0.25 * 0.4 + 0.8) / 1.25])


def test_a_mean_over_texts_has_the_spread_of_texts() -> None:
    values = np.array([1.0, 1.0, 0.0, 0.0])
    assert standard_error(values, np.array([0, 0, 3, 3])) == pytest.approx(0.5)
    assert np.isnan(standard_error(values, np.zeros(4, int)))


@pytest.mark.parametrize(("window", "head"), [(1, 0), (3, 2), (3, 0), (20, 5)])
def test_visible_entries_are_those_of_a_loop(window: int, head: int) -> None:
    queries, heads = np.arange(2, 9), np.array([head, 0])
    found = whole_texts.visible(
        jnp.asarray(queries), jnp.arange(9), jnp.int32(window), jnp.asarray(heads)
    )
    view = View(window=window, head=head)
    for row, first in enumerate(heads):
        for p in queries:
            seen = []
            for s in range(p + 1):
                if s < first or s in range(p - window + 1, p + 1):
                    seen.append(s)
            assert np.flatnonzero(found[row, p - 2]).tolist() == seen
            assert view.entries(np.array([p]), np.array([first])) == len(seen)


def test_heads_are_no_longer_than_prompts() -> None:
    lengths = np.array([3, 20])
    assert View(4, 16).heads(lengths).tolist() == [3, 16]
    assert View(4, "prompt").heads(lengths).tolist() == [3, 20]
    assert View().entries(np.array([6]), np.array([2])) == 7


@pytest.fixture(scope="module")
def texts() -> Sampled:
    policy = Decoder(CONFIG)
    params = jax.tree.map(
        lambda leaf: leaf * jnp.asarray(3 if leaf.ndim > 1 else 1, leaf.dtype),
        policy.init(jax.random.key(0)),
    )
    prompts = [[3, 4, 5, 6, 7], [6, 7], [8, 9, 10, 11, 1, 2, 3]]
    return sample(policy, params, prompts, (18,), PLAN.num_tokens)


@functools.partial(jax.jit, static_argnames="policy")
def masked_step(
    policy: Decoder,
    draft: Any,
    token: jax.Array,
    place: jax.Array,
    cache: Any,
    seen: jax.Array,
) -> tuple[jax.Array, Any]:
    """Run a draft over one token `[]` whose query sees the entries `seen`, bool `[S]`.

    Returns:
      Log-probabilities `[V]`, and the cache with the token's own entries.
    """  # fmt: skip

    def masked(
        query: jax.Array, keys: Any, values: Any, positions: Any, span: Any
    ) -> jax.Array:
        size, kv_heads = CONFIG.head_size, CONFIG.num_kv_heads
        k, v = (x.reshape(-1, kv_heads, size) for x in (keys[0], values[0]))
        out = []
        for number in range(CONFIG.num_heads):
            kv = number // (CONFIG.num_heads // kv_heads)
            scores = k[:, kv] @ query[0, 0, number] / jnp.float32(np.sqrt(size))
            probs = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
            out.append(probs @ v[:, kv])
        return jnp.concatenate(out)[None, None]

    with attention.replaced(masked):
        at = place[None, None]
        hidden, cache = policy.forward(draft, token[None, None], at, cache)
    logits = policy.logits(draft, hidden)[0, 0]
    return sampling.target_logprobs(logits, neutral_sampling()), cache


@functools.partial(jax.jit, static_argnames="policy")
def entries_before(
    policy: Decoder, params: Any, tokens: jax.Array, start: jax.Array
) -> Any:
    """Return the cache that the target writes for the first `start` of `[1, T]`."""
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    places = jnp.where(places < start, places, -1)
    return policy.forward(params, tokens, places, policy.init_cache(*tokens.shape))[1]


def one_by_one(texts: Sampled, row: int, start: int, view: View, gamma: int) -> Any:
    """Return what the drafts of one round say, `[gamma, V]`, one pass after the other.

    The round begins at position `start`. The target has written the entries before;
    those that are not seen are kept from the drafts by a mask written out in a loop.
    """
    draft = draft_params(draft_params_of(texts.params, "int4"))
    tokens = jnp.asarray(texts.tokens[row : row + 1])
    length = tokens.shape[1]
    head = int(view.heads(texts.prompt_lengths)[row])
    window = int(view.window_of(length))
    cache = entries_before(texts.policy, texts.params, tokens, jnp.int32(start))
    said = []
    for place in range(start, start + gamma):
        seen = np.zeros(length, bool)
        for s in range(place + 1):
            seen[s] = s < head or s > place - window
        logprobs, cache = masked_step(
            texts.policy, draft, tokens[0, place], jnp.int32(place), cache, seen
        )
        said.append(logprobs)
    return np.stack(said)


@pytest.mark.parametrize(
    ("view", "gamma"),
    [
        pytest.param(View(), 1, marks=pytest.mark.slow),
        (View(), 3),
        (View(4, 0), 1),
        (View(4, 2), 3),
        (View(2, "prompt"), 3),
        (View(64), 2),
    ],
)
def test_drafts_say_what_they_do_one_by_one(
    texts: Sampled, view: View, gamma: int
) -> None:
    study = Study(texts, PLAN)
    pair = draft_params_of(texts.params, "int4")
    found = study.draft(pair, view, gamma)
    for row in range(len(texts.prompts)):
        first = int((texts.index[row] == 0).argmax())
        last = first + int(texts.lengths[row])
        for start in range(-(-first // gamma) * gamma, last - gamma + 1, gamma):
            wanted = one_by_one(texts, row, start, view, gamma)
            at = np.flatnonzero((study.rows == row) & (study.places == start))[0]
            np.testing.assert_allclose(
                np.exp(found[at : at + gamma]), np.exp(wanted), atol=2e-5
            )


@pytest.mark.parametrize("rule", kept_chances.RULES)
def test_drafts_are_kept_where_the_library_keeps_them(
    texts: Sampled, rule: AcceptRule
) -> None:
    """A round of one draft that begins at every position of the texts."""
    study = Study(texts, PLAN)
    assert study.same_draws() == 1
    pair = draft_params_of(texts.params, "int4")
    places = np.arange(texts.tokens.shape[1])
    prompts = np.where(
        places <= study.places[:, None], texts.tokens[study.rows], -1
    ).astype(np.int32)
    state = started(
        texts.policy, texts.params, prompts, study.rows.astype(np.int32),
        texts.tokens.shape[1] + 2,
    )  # fmt: skip
    settings = sampling_settings(texts.key, texts.stop_ids)
    state = dataclasses.replace(state, limit=state.length + 2)
    _, info = jax.jit(
        steps.decode_round, static_argnames=("policy", "gamma", "accept")
    )(texts.policy, pair, state, settings, gamma=1, accept=rule)
    kept = study.kept(rule, study.draft(pair, View()))
    assert 0.2 < kept.mean() < 0.99
    assert kept.tolist() == (np.asarray(info.num_accepted) == 1).tolist()


def test_means_and_expectations_are_near(texts: Sampled) -> None:
    found = Study(texts, PLAN).first_drafts(
        draft_params_of(texts.params, "int4"), View(4, 2)
    )
    for rule in kept_chances.RULES:
        told = found[rule]
        count = len(texts.index[texts.index >= 0])
        assert abs(told["drawn"] - told["expected"]) < 4 * np.sqrt(0.25 / count)
        first, rest = told["expected_by_position"]
        assert first != rest
    assert 0 < found["entries_share"] < 1


@pytest.mark.parametrize("bits", [8, 4])
def test_copies_are_within_half_a_step(bits: int) -> None:
    entries = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    entries[0, 0] = 0
    found = whole_texts.copied([entries], bits, 8)[0]
    apart = entries.reshape(2, 3, 2, 8)
    step = np.ptp(apart, axis=-1, keepdims=True) / (2**bits - 1)
    error = np.abs(np.asarray(found).reshape(apart.shape) - apart)
    assert (error <= 0.51 * step + 1e-6).all()
    assert error.max() > 0.3 * step.max()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A directory like a Python library: files of some lines, an installed one."""
    root = tmp_path / "library"
    (root / "site-packages").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(60):
        lines = ["x = " + "ab" * n for n in rng.integers(1, 9, 30)]
        (root / f"module_{number}.py").write_text("\n".join(lines))
    (root / "site-packages" / "other.py").write_text("installed\n" * 99)
    (root / "latin.py").write_bytes(b"\xe9" * 99)
    (root / "data.bin").write_bytes(b"binary" * 99)
    return root


def test_corpus_is_text_with_files_held_out(library: Path) -> None:
    found = corpus.load_corpus(library)
    assert found.num_files + len(found.held_out) == 60
    assert 1 <= len(found.held_out) < 20
    assert (found.train == corpus.STOP_ID).sum() == found.num_files
    pieces = corpus.held_out_pieces(found, 5, 40)
    again = corpus.held_out_pieces(corpus.load_corpus(library), 5, 40)
    assert pieces.shape == (5, 41) and (pieces == again).all()
    whole = [bytes(x[:-1].astype(np.uint8)) for x in found.held_out]
    for piece in pieces:
        assert any(bytes(piece.astype(np.uint8)) in content for content in whole)
    trained = corpus.pieces(found.train, 3, 20, np.random.default_rng(0))
    assert trained.shape == (3, 21) and trained.max() <= corpus.STOP_ID
    with pytest.raises(ValueError, match="no held-out file"):
        corpus.held_out_pieces(found, 1, 10**6)
    with pytest.raises(FileNotFoundError, match="files to train on"):
        corpus.load_corpus(library / "site-packages")


def test_the_recipe_follows_the_clock() -> None:
    recipe = text_model.Recipe()
    assert [recipe.stage(x).context for x in (0, 0.6, 0.7, 1.1)] == [512] * 2 + [
        2304
    ] * 2
    assert recipe.rate(0, 0) == recipe.peak_rate / recipe.ramp_steps
    assert recipe.rate(0.2, 1000) == recipe.peak_rate
    assert recipe.rate(1.0, 9999) == pytest.approx(recipe.floor_rate)
    with pytest.raises(ValueError, match="add up to"):
        text_model.Recipe(stages=(text_model.Stage(0.5, 8, 1),))


def test_attention_of_training_is_the_librarys() -> None:
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 150, 4, 8)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, 150, 16)).astype(np.float32)
    positions = np.broadcast_to(np.arange(150, dtype=np.int32), (2, 150))
    given = tuple(map(jnp.asarray, (query, keys, values, positions)))
    found, wanted = (
        jax.jit(lambda *arrays, attend=attend: attend(*arrays, None))(*given)
        for attend in (whole_texts.attend_causally, attention.attend_whole)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_text_model_is_trained_and_studied(library: Path, tmp_path: Path) -> None:
    """Trained, evaluated, trained no further once its time is over, and studied."""
    run, out = tmp_path / "run", tmp_path / "results"
    args = text.Args(run=run, library=library, out=out, quick=True)
    record = text.main(args)
    short, long = record["points"]
    assert (short["context"], long["context"]) == (32, 64)
    assert short["steps"] > 2 and 0 < short["bits"] < 12
    assert text.main(args)["points"] == record["points"]
    study = acceptance.Args(run=run, model="text", library=library, out=out, quick=True)
    (record,) = acceptance.main(study)
    parts = [point["part"] for point in record["points"]]
    assert parts == ["views"] * 4 + ["rollouts", "depths"]
    for point in record["points"][:4]:
        assert 0 < point["coupled"]["expected"] <= point["token"]["expected"] + 1e-6
    assert record["points"][4]["coupled"]["same_as_plain_decoding"] == 1
    assert "By depth:" in acceptance.page_tables(record["points"])
    assert (out / "acceptance_text.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="leave nothing"):
        acceptance.main(dataclasses.replace(study, studies=("formats",)))
