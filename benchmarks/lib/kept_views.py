"""How often drafts are kept that read a part of the cache, or a copy of fewer bits.

A policy samples texts by plain decoding at temperature 1. At every position of their
completions, the target and every draft then say what comes next (`whole_texts`):

* *expected*: the chance that the draft is kept, by the closed forms of the coupled and
  of the token rule (`kept_chances`). Its error is the standard error over texts.
* *drawn*: the share of positions at which it is kept, with the noise that a rollout
  draws with. The target's own draw is the text, but for rounding.

Both are of first drafts of rounds that begin at every position. For some drafts the
chance by depth follows, in rounds of several drafts that begin at every such position.

*Measured* are rollouts of the library itself on the same prompts with the same noise,
for drafts that it has: the whole cache, every round drafting.

Left out: temperatures other than 1, and truncation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import er_jax
from benchmarks.lib import kept_chances, whole_texts
from benchmarks.lib.agreement import completions_of, sampling_settings
from benchmarks.lib.kept_formats import texts_of
from benchmarks.lib.views import CONFIGS, View, draft_params_of, views
from er_jax import Decoder, RolloutConfig, sampling
from er_jax.drafter import PolicyParams, draft_params
from er_jax.types import Purpose, Sampling
from train.controllers import RuleController

SEED = 11

RULES = tuple(kept_chances.RULES)

# Tokens of the texts that pass through a policy together.
CHUNK_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to look at.

    drafts: names in `views.CONFIGS`. windows, heads, bits: of `views.views`.
    edges: positions in completions are told from each to the next.
    num_tokens: limit of a completion. gamma: drafts per round of measured rollouts,
      whose completions have at most `rollout_tokens`.
    deep: views whose drafts are told by depth, in rounds of `gammas` drafts.
    """

    drafts: tuple[str, ...] = tuple(CONFIGS)
    windows: tuple[int, ...] = (1024, 512, 256, 128, 64)
    heads: tuple[int | str, ...] = (0, 16, 64, "prompt")
    bits: tuple[int, ...] = (8, 4)
    edges: tuple[int, ...] = (0, 128, 256, 512, 1024)
    num_tokens: int = 1536
    rollout_tokens: int = 512
    gamma: int = 4
    deep: tuple[View, ...] = (View(), View(256, 64), View(64, "prompt"), View(bits=4))
    gammas: tuple[int, ...] = (4, 8)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Texts that a policy has sampled.

    prompts: token ids. key, stop_ids: as sampled with.
    tokens: `[N, T]` int32, 0 behind the end. index: `[N, T]`, see
    `kept_formats.texts_of`. completions: N of their tokens.
    """

    policy: Decoder
    params: Any
    prompts: Sequence[Sequence[int]]
    key: jax.Array
    stop_ids: tuple[int, ...]
    tokens: np.ndarray
    index: np.ndarray
    completions: list[np.ndarray]

    @property
    def prompt_lengths(self) -> np.ndarray:
        """`[N]`."""
        return np.array([len(prompt) for prompt in self.prompts])

    @property
    def lengths(self) -> np.ndarray:
        """`[N]`, of completions."""
        return np.array([len(tokens) for tokens in self.completions])


def run_rollout(
    policy: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    stop_ids: tuple[int, ...],
    num_tokens: int,
    **options: Any,
) -> er_jax.Rollout:
    """Sample one completion per prompt under a fixed control; all rows at once."""
    config = RolloutConfig(
        max_new_tokens=num_tokens,
        stop_token_ids=stop_ids,
        max_slots=len(prompts),
        **options,
    )
    return er_jax.rollout(
        policy, params, prompts, key=key, config=config,
        controller=RuleController(config.control),
    )  # fmt: skip


def sample(
    policy: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: tuple[int, ...],
    num_tokens: int,
) -> Sampled:
    """Sample one completion per prompt by plain decoding."""
    key = jax.random.key(SEED)
    out = run_rollout(policy, params, prompts, key, stop_ids, num_tokens, control="ar")
    tokens, index = texts_of(out)
    return Sampled(
        policy=policy,
        params=params,
        prompts=prompts,
        key=key,
        stop_ids=stop_ids,
        tokens=np.maximum(tokens, 0),
        index=index,
        completions=completions_of(out),
    )


@functools.partial(jax.jit, static_argnames="vocab_size")
def noise_of(
    settings: Sampling, rows: jax.Array, places: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the noise of tokens at `places` of texts `rows`, all `[M]`.

    Returns:
      Gumbel noise `[M, V]` of tokens, and of drafts by the token rule; uniform numbers
      `[M]` of its tests. The last two are those of a round that begins there.
    """
    kind = jnp.float32
    token = sampling.gumbel(settings, rows, places, vocab_size, kind)
    draft = sampling.gumbel(
        settings, rows, places, vocab_size, kind, purpose=Purpose.DRAFT, start=places
    )
    test = sampling.uniform(
        settings, rows, places, kind, purpose=Purpose.ACCEPT, start=places
    )
    return token, draft, test


class Study:
    """The target's side of texts, beside which drafts are studied.

    Args:
      texts: to study. plan: what to look at.
    Attributes:
      rows, places: `[M]`, text and position of every input that predicts a token of a
        completion. drawn: `[M]`, these tokens. target: `[M, V]` log-probabilities.
    """

    def __init__(self, texts: Sampled, plan: Plan) -> None:
        self.texts, self.plan = texts, plan
        count, length = texts.tokens.shape
        num_chunks = -(-count * length // CHUNK_TOKENS)
        chunks = np.array_split(np.arange(count), min(num_chunks, count))
        self.chunks = [(rows, texts.tokens[rows]) for rows in chunks]
        self.rows, self.places = np.nonzero(texts.index >= 0)
        self.drawn = texts.tokens[self.rows, self.places + 1]
        found, self.caches = [], []
        for rows, tokens in self.chunks:
            logprobs, cache = whole_texts.target_logprobs(
                texts.policy, texts.params, tokens
            )
            found.append(self._chosen(rows, logprobs))
            self.caches.append(cache)
        self.target = np.concatenate(found)
        noise = noise_of(
            sampling_settings(texts.key, texts.stop_ids),
            self.rows.astype(np.int32),
            (self.places + 1).astype(np.int32),
            texts.policy.vocab_size,
        )
        self.token_noise, self.draft_noise, self.uniforms = map(np.asarray, noise)

    def _chosen(self, rows: np.ndarray, values: jax.Array) -> np.ndarray:
        """Return values `[B, T, ...]` of texts `rows` where tokens are predicted."""
        return np.asarray(values)[self.texts.index[rows] >= 0]

    def draft(self, pair: PolicyParams, view: View, gamma: int = 1) -> np.ndarray:
        """Return what a draft says, log-probabilities `[M, V]`; see `draft_logprobs`.

        Args:
          pair: parameters with the draft. view: what it reads. gamma: of its rounds.
        """
        texts = self.texts
        heads = view.heads(texts.prompt_lengths)
        window = view.window_of(texts.tokens.shape[1])
        found = []
        for (rows, tokens), cache in zip(self.chunks, self.caches, strict=True):
            if view.bits is not None:
                size = texts.policy.config.head_size
                cache = whole_texts.copied(cache, view.bits, size)
            logprobs = whole_texts.draft_logprobs(
                texts.policy, draft_params(pair), tokens, cache, window, heads[rows],
                gamma,
            )  # fmt: skip
            found.append(self._chosen(rows, logprobs))
        return np.concatenate(found)

    def same_draws(self) -> float:
        """Return the share of tokens that the target draws here as in the rollout."""
        draws = np.argmax(self.target + self.token_noise, axis=-1)
        return float(np.mean(draws == self.drawn))

    def kept(self, rule: str, draft: np.ndarray) -> np.ndarray:
        """Return whether drafts are kept with the noise of a rollout, bool `[M]`.

        draft: `[M, V]`, by `draft`.
        """
        if rule == "coupled":
            return np.argmax(draft + self.token_noise, axis=-1) == self.drawn
        tokens = np.argmax(draft + self.draft_noise, axis=-1)[:, None]
        ratio = np.take_along_axis(self.target - draft, tokens, -1)[:, 0]
        return self.uniforms < np.exp(np.minimum(ratio, 0))

    def first_drafts(self, pair: PolicyParams, view: View) -> dict[str, Any]:
        """Return how often first drafts are kept, by rule; see the module."""
        draft = self.draft(pair, view)
        index = self.texts.index[self.rows, self.places]
        bucket = np.searchsorted(self.plan.edges, index, side="right") - 1
        heads = view.heads(self.texts.prompt_lengths)[self.rows]
        seen = view.entries(self.places, heads)
        found: dict[str, Any] = {"entries_share": seen.sum() / (self.places + 1).sum()}
        for rule, chances in kept_chances.RULES.items():
            mean = chances(self.target, draft, self.drawn).mean
            kept = self.kept(rule, draft)
            found[rule] = {
                "expected": mean.mean(),
                "error": standard_error(mean, self.rows),
                "drawn": kept.mean(),
                "expected_by_position": means(mean, bucket, len(self.plan.edges)),
                "drawn_by_position": means(kept, bucket, len(self.plan.edges)),
            }
        return found

    def by_depth(
        self, pair: PolicyParams, view: View, gamma: int
    ) -> dict[str, list[float]]:
        """Return the expected chances by depth in rounds of gamma drafts, by rule."""
        draft = self.draft(pair, view, gamma)
        starts = np.flatnonzero(self.places % gamma == 0)
        starts = starts[starts + gamma <= len(self.rows)]
        rounds = starts[:, None] + np.arange(gamma)
        # A round that goes on in the next text is not whole.
        is_whole = self.rows[rounds[:, 0]] == self.rows[rounds[:, -1]]
        found = {}
        for rule, chances in kept_chances.RULES.items():
            kept = chances(self.target, draft, self.drawn)
            part = kept_chances.Kept(kept.mean[rounds], kept.given[rounds])
            found[rule] = kept_chances.by_depth(part, is_whole)
        return found


def standard_error(values: np.ndarray, texts: np.ndarray) -> float:
    """Return the standard error of the mean of values `[M]` in texts `[M]`."""
    count = np.bincount(texts)
    apart = np.bincount(texts, values - values.mean())[count > 0]
    num = len(apart)
    if num < 2:
        return float("nan")
    return float(np.sqrt((apart**2).sum() * num / (num - 1)) / len(values))


def means(values: np.ndarray, bucket: np.ndarray, count: int) -> list[float | None]:
    """Return the mean of values `[M]` in each bucket; None where there are none."""
    found = [values[bucket == number] for number in range(count)]
    return [float(part.mean()) if part.size else None for part in found]


def measured(texts: Sampled, pair: PolicyParams, plan: Plan) -> dict[str, Any]:
    """Return what the library's own rollouts keep when every round drafts, by rule."""
    found: dict[str, Any] = {}
    for rule in RULES:
        out = run_rollout(
            texts.policy, pair, texts.prompts, texts.key, texts.stop_ids,
            plan.rollout_tokens, accept=rule, control=f"fixed:{plan.gamma}",
        )  # fmt: skip
        accepted = out.stats.accepted[plan.gamma]
        reached = np.cumsum(accepted[::-1])[::-1]
        plain = [tokens[: plan.rollout_tokens] for tokens in texts.completions]
        pairs = zip(plain, completions_of(out), strict=True)
        found[rule] = {
            "by_depth": (reached[1:] / np.maximum(reached[:-1], 1)).tolist(),
            "rounds": int(accepted.sum()),
            "tokens": int(out.lengths.sum()),
            "tokens_per_round": float(out.lengths.sum() / accepted.sum()),
            "same_as_plain_decoding": float(
                np.mean([np.array_equal(a, b) for a, b in pairs])
            ),
        }
    return found


def study(texts: Sampled, plan: Plan, common: dict[str, Any]) -> Iterator[dict]:
    """Yield the points of every draft: its views, its rollouts, its views by depth.

    Args:
      texts: of one policy. plan: what to look at. common: fields of every point.
    """
    beside = Study(texts, plan)
    common = {
        **common,
        "rows": len(texts.prompts),
        "dtype": texts.policy.config.dtype,
        "num_tokens": len(beside.rows),
        "longest": int(np.max(texts.prompt_lengths + texts.lengths)),
        "same_draws": beside.same_draws(),
        "edges": plan.edges,
    }
    longest = common["longest"]
    windows = [window for window in plan.windows if window < longest]
    chosen = views(windows, plan.heads, plan.bits)
    for name in tqdm(plan.drafts, desc="drafts", unit="draft"):
        pair = draft_params_of(texts.params, name)
        is_float = name == "float"
        # One that sees all and is the policy itself says what the policy does.
        cases = [view for view in chosen if not is_float or view != View()]
        for view in tqdm(cases, desc=name, unit="view"):
            told = {"part": "views", "draft": name, **dataclasses.asdict(view)}
            yield {**common, **told, **beside.first_drafts(pair, view)}
        if is_float:
            continue
        told = {"part": "rollouts", "draft": name, "gamma": plan.gamma}
        yield {**common, **told, **measured(texts, pair, plan)}
        for view, gamma in itertools.product(plan.deep, plan.gammas):
            if view in chosen:
                told = {"part": "depths", "draft": name, **dataclasses.asdict(view)}
                found = beside.by_depth(pair, view, gamma)
                yield {**common, **told, "gamma": gamma, **found}
