"""Random schedules beside the reference, few of them, and that both would notice.

    python -m benchmarks.fuzz    # thousands

Programs are compiled without XLA's optimizer, which is most of the time: what is shown
here holds at either level, and the long run is with it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import fuzz
from benchmarks.lib import records, schedules
from benchmarks.lib.reference import Expected, Found, Reference
from er_jax import acceptance, kv_cache, request, sampling, steps
from er_jax.acceptance import ACCEPT_RULES
from er_jax.engine.kept import forget_engines
from tests.toy import Toy, settings, toy_params

SEEDS = range(48)


pytestmark = pytest.mark.usefixtures("unoptimized_module")


def made_here(architecture: str | None = None) -> list[schedules.Schedule]:
    """Return those that run here, or the ones of a policy."""
    made = [schedules.drawn(seed, schedules.QUICK_FAMILIES) for seed in SEEDS]
    return [s for s in made if architecture in (None, s.family.architecture)]


def test_schedules_equal_the_reference() -> None:
    outcomes = fuzz.fuzz(made_here())
    assert [fuzz.told(o, " --quick") for o in outcomes if o.problems] == []
    assert {o.schedule.policy for o in outcomes} == set(schedules.POLICIES)
    assert {o.schedule.draft for o in outcomes} == set(schedules.DRAFTS)
    assert {o.schedule.family.rule for o in outcomes} == set(ACCEPT_RULES)
    points = fuzz.points_of(outcomes)
    assert fuzz.total(points, "schedules") == len(SEEDS)
    # Everything that a schedule is made for did happen.
    for name in (
        "decided", "alone", "cloned", "refills", "switches", "fewer rows", "more rows",
        "kept", "ended by stop", "ended by length", "ended by nonfinite",
        "at the limit",
    ):  # fmt: skip
        assert fuzz.total(points, name) > 0, name
    for policy in schedules.POISONED:
        assert fuzz.total(points, "ended by nonfinite", preset=policy) > 0, policy


def test_the_long_run_draws_everything() -> None:
    """Two thousand seeds: every combination that a difference could hide in."""
    made = [schedules.drawn(seed) for seed in range(2000)]
    learned = {(s.policy, s.family.architecture, s.family.rule) for s in made}
    for policy in (schedules.LEARNED, *schedules.POISONED):
        for attention in ("library", "plain"):
            assert {(policy, attention, rule) for rule in ACCEPT_RULES} <= learned
    for name in ("decoder", "toy"):
        assert {(name, name, rule) for rule in ACCEPT_RULES} <= learned
    assert {g for s in made for g in s.config["gammas"]} == {0, 1, 2, 4, 7}
    assert {s.family.dtype for s in made} == {"float64", "float32"}
    whole = [
        max(map(len, s.prompts)) + s.config["max_new_tokens"]
        == schedules.MAX_LENGTH[s.family.size]
        for s in made
    ]
    assert 0.3 < np.mean(whole) < 0.9
    assert all(len(set(s.sequence_ids)) == len(s.sequence_ids) for s in made)
    assert schedules.drawn(17) == schedules.drawn(17)


@pytest.mark.slow
def test_a_seed_says_all() -> None:
    """The same windows, compiled before or not, and whatever ran in between."""
    made = made_here("decoder")
    (first, *_) = [s for s in made if len(s.config["gammas"]) > 1]
    before = fuzz.run(first)
    for other in made[:3]:
        fuzz.run(other)
    again = fuzz.run(first)
    assert before.counts == again.counts
    assert before.compile_s > 0 == again.compile_s
    assert before.counts["switches"] > 1


# -- that a mistake is noticed ---------------------------------------------------------


def feeding_past_the_limit(patch: pytest.MonkeyPatch) -> None:
    """As it was before positions ended at the limit, and drafts were verified again."""

    def positions(state: Any, offsets: jax.Array) -> jax.Array:
        fed = state.length[:, None] - 1 + offsets
        return jnp.where(state.live[:, None], fed, -1)

    patch.setattr(steps, "_positions", positions)
    verifying_once(patch)


def verifying_once(patch: pytest.MonkeyPatch) -> None:
    """A row ends at what was only drafted."""

    def verify(
        policy: Any, params: Any, state: Any, tokens: Any, positions: Any, is_any: Any
    ) -> Any:
        hidden, cache = policy.forward(params, tokens, positions, state.cache)
        return hidden, cache, jnp.zeros(state.rows, jnp.bool_)

    patch.setattr(steps, "_verify", verify)


def noise_of_the_row(patch: pytest.MonkeyPatch) -> None:
    """Noise is named by where a sequence happens to lie."""

    def noise(state: Any, config: Any, logprobs: jax.Array, at: jax.Array) -> jax.Array:
        rows = jnp.arange(state.rows, dtype=jnp.int32)
        rows = rows.reshape((-1,) + (1,) * (at.ndim - 1))
        return sampling.gumbel(config, rows, at, logprobs.shape[-1], logprobs.dtype)

    patch.setattr(steps, "_token_noise", noise)


def one_draft_too_many(patch: pytest.MonkeyPatch) -> None:
    """A row is advanced by a token that the target did not draw after its text."""
    real = acceptance.coupled_num_accepted

    def count(drafted: jax.Array, draws: jax.Array) -> jax.Array:
        return jnp.minimum(real(drafted, draws) + 1, drafted.shape[1])

    patch.setattr(acceptance, "coupled_num_accepted", count)


def rows_that_move_lose_entries(patch: pytest.MonkeyPatch) -> None:
    """Compaction and growth leave the cache behind."""
    real = steps.take

    def take(state: Any, rows: jax.Array, cache_length: int) -> Any:
        taken = real(state, rows, cache_length)
        return dataclasses.replace(
            taken, cache=jax.tree.map(jnp.zeros_like, taken.cache)
        )

    patch.setattr(steps, "take", take)


def clones_of_one_entry_less(patch: pytest.MonkeyPatch) -> None:
    """What a refill copies from a row that holds the prompt is too short."""
    real = kv_cache.copy_row
    patch.setattr(
        kv_cache, "copy_row", lambda cache, s, to, count: real(cache, s, to, count - 1)
    )


def no_truncation_after_a_rejection(patch: pytest.MonkeyPatch) -> None:
    """Any token may follow, also those of probability 0."""
    patch.setattr(
        acceptance,
        "residual_logprobs",
        lambda target, draft, num_accepted, weight: jnp.zeros_like(target[:, 0]),
    )


def log_probability_of_the_best(patch: pytest.MonkeyPatch) -> None:
    """Not of the token that was emitted."""
    drawn, of_token = sampling.drawn_logprobs, sampling.token_logprobs

    def best_of(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    patch.setattr(
        sampling,
        "drawn_logprobs",
        lambda logits, tokens, *rest: drawn(logits, best_of(logits), *rest),
    )
    patch.setattr(
        sampling,
        "token_logprobs",
        lambda logits, target, tokens, *rest: of_token(
            logits, target, best_of(target), *rest
        ),
    )


def a_limit_too_far(patch: pytest.MonkeyPatch) -> None:
    """Prompts of one token end a token late, if a stop does not come first."""
    real = request.Request.limit

    def limit(self: request.Request, sequence: int) -> int:
        return real(self, sequence) - (len(self.prompts) > 1)

    patch.setattr(request.Request, "limit", limit)


slow = pytest.mark.slow
FAULTS: list[Any] = [
    pytest.param(feeding_past_the_limit, "plain", "'nonfinite'"),
    pytest.param(verifying_once, "plain", "'nonfinite'", marks=slow),
    pytest.param(noise_of_the_row, "plain", "is not Expected", marks=slow),
    pytest.param(one_draft_too_many, "plain", "is not Expected", marks=slow),
    pytest.param(rows_that_move_lose_entries, "plain", "is not Expected", marks=slow),
    pytest.param(clones_of_one_entry_less, "plain", "log-probability", marks=slow),
    pytest.param(no_truncation_after_a_rejection, "toy", "probability 0"),
    pytest.param(log_probability_of_the_best, "toy", "log-probability", marks=slow),
    pytest.param(a_limit_too_far, "toy", "has to be 'goes on'", marks=slow),
]


@pytest.mark.parametrize(("plant", "architecture", "words"), FAULTS)
def test_a_planted_fault_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    architecture: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In schedules that show no difference without it."""
    forget_engines()  # what they compiled is without the fault
    plant(monkeypatch)
    try:
        found: list[str] = []
        for schedule in made_here(architecture):
            found = fuzz.run(schedule).problems
            if found:
                break
        print(f"seed {schedule.seed}: {found}")
        assert any(words in line for line in found)
    finally:
        forget_engines()


def test_a_difference_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(schedule: schedules.Schedule) -> fuzz.Outcome:
        problems = ["completion 0: bad"] if schedule.seed == 5 else []
        outcome = fuzz.Outcome(schedule, problems=problems)
        outcome.counts["differences"] = len(problems)
        return outcome

    monkeypatch.setattr(fuzz, "run", run)
    with pytest.raises(SystemExit, match=r"1 schedules differ, seeds \[5\]"):
        fuzz.main(fuzz.Args(schedules=8, seed=3, out=tmp_path, quick=True))
    told = capsys.readouterr().out
    assert "python -m benchmarks.fuzz --seed 5 --schedules 1 --quick" in told
    record = json.loads((tmp_path / "fuzz.json").read_text())
    assert records.problems(record) == []
    (found,) = record["differences"]
    assert found["problems"] == ["completion 0: bad"]
    assert found["schedule"]["seed"] == 5
    header, rows = fuzz.rows_of(record["points"])
    assert rows[-1][0] == "all"
    assert rows[-1][header.index("differences")] == 1


# -- the reference itself --------------------------------------------------------------


def reference(dtype: str, **changes: Any) -> Reference:
    policy = Toy(vocab_size=4, dtype=dtype)
    return Reference(
        policy,
        toy_params(policy),
        settings(stop_ids=(3,), **changes),
        max_new_tokens=5,
        length=8,
        dtype=dtype,
    )


def test_ties_are_proven(x64: None) -> None:
    """Two best candidates nearer than rounding reaches; never in float64."""
    noise = np.zeros(4)
    near, far = np.array([0.0, 1.0, 1.00003, 0.5]), np.array([0.0, 1.0, 1.001, 0.5])
    for temperature in (0.0, 1.0):
        found = reference("float32", temperature=temperature)
        assert found.is_tie(near, noise, 2, 1)
        assert not found.is_tie(far, noise, 2, 1)
        assert not reference("float64", temperature=temperature).is_tie(
            near, noise, 2, 1
        )
    # The best draw lies on the edge of what is kept: in or out by rounding.
    edge = reference("float32", min_p=0.5)
    half = np.log(np.array([1.0, 0.50001, 0.1, 0.1]))
    assert edge.is_tie(half, np.array([0.0, 5.0, 0.0, 0.0]), 1, 0)
    assert not edge.is_tie(half, np.array([0.0, 5.0, 0.0, 0.0]), 1, 2)


def test_what_cannot_be_is_told(x64: None) -> None:
    found = reference("float64", top_k=2)
    prompt = (0, 1)
    made: Expected = found.completion(prompt, 7)
    logits = np.asarray(toy_params(Toy(4, "float64"))["pages"])[0, 1]
    logits = logits + np.asarray(toy_params(Toy(4, "float64"))["lines"])[1]
    scaled = logits - logits.max()
    logprobs = scaled - np.log(np.exp(scaled).sum())
    first = Found(made.tokens[:1], (float(logprobs[made.tokens[0]]),), made.reason)
    assert len(made.tokens) == 5 or made.tokens[-1] == 3
    assert (3 in made.tokens) == (made.reason == "stop")
    # Alone, the first token can be, but for where it ends.
    (problem,) = found.problems(prompt, first) or [""]
    assert "has to be 'goes on'" in problem or made.tokens[0] == 3
    least = int(np.argmin(logits))
    bad = dataclasses.replace(first, tokens=(least,))
    assert any("has probability 0" in line for line in found.problems(prompt, bad))
    bad = dataclasses.replace(first, logprobs=(first.logprobs[0] + 1e-4,))
    assert any("has log-probability" in line for line in found.problems(prompt, bad))
    bad = dataclasses.replace(first, tokens=(3, 3), logprobs=(0.0, 0.0))
    assert any("goes on after the stop" in line for line in found.problems(prompt, bad))
