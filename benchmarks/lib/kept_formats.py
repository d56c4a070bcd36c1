"""How often drafts are kept: by quantization, acceptance rule, depth and position.

The policy after its warm-up and the trained one sample a run's own held-out prompts at
temperature 1.

*Measured*: every round drafts, under each rule, from a completion's first token to its
last. The result is the chance that a draft is kept, given that all drafts before it
were kept. Drafts behind a completion's last token are counted apart, because the policy
never meets such text.

*Expected*: the chances follow from the distributions of target and draft at every
position of texts that the policy has sampled, by the closed forms of the coupled and
the token rule. Those of deeper drafts are products of neighbouring ones. Drafts that
are kept are what the policy would have sampled, so both meet the same texts.

Left out: measured rounds begin where the last one ended, expected ones anywhere.

The result is how a draft's format changes the acceptance of this small policy. Other
policies differ.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

import er_jax
from benchmarks.lib import presets, records, tables, trained
from benchmarks.lib.agreement import sampling_settings
from benchmarks.lib.draft_formats import draft_of, formats
from er_jax import PolicyParams, RolloutConfig, acceptance, sampling, steps
from er_jax.acceptance import ACCEPT_RULES, AcceptRule
from er_jax.costs.timing import neutral_sampling
from er_jax.drafter import draft_params
from er_jax.types import NONE, DecodeState, Policy, Sampling
from train.controllers import RuleController

# Positions in completions are told by these ranges: from each to the next.
POSITIONS = (0, 8, 16, 32, 64, 128)

MAX_NEW_TOKENS = 256

# Rows sampled together.
BATCH = 64

SEED = 5

# Policies of a run: the label of each, and its checkpoint (None is the latest).
STEPS = {"after the warm-up": 0, "trained": None}


@functools.partial(jax.jit, static_argnames=("policy",))
def distributions(policy: Policy, params: Any, tokens: jax.Array) -> jax.Array:
    """Return log-probabilities `[N, T, V]` of the next token, at temperature 1."""
    count, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    positions = jnp.where(tokens >= 0, positions, NONE)
    cache = policy.init_cache(count, length)
    hidden, _ = policy.forward(params, jnp.maximum(tokens, 0), positions, cache)
    logits = policy.logits(params, hidden)
    return sampling.target_logprobs(logits, neutral_sampling())


@jax.jit
def agreements(target: jax.Array, draft: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the chances `[N, T]` that a draft is kept: coupled, and token."""
    coupled = jax.lax.map(
        lambda pair: acceptance.expected_coupled_prob(*pair), (target, draft)
    )
    return coupled, acceptance.expected_accept_prob(target, draft)


@functools.partial(jax.jit, static_argnames=("policy", "cache_length"))
def started(
    policy: Policy, params: Any, prompts: jax.Array, ids: jax.Array, cache_length: int
) -> DecodeState:
    """Return live rows of prompts `[B, T]` (padding at the end is `NONE`)."""
    state = steps.empty_state(policy, len(prompts), cache_length)
    length = jnp.sum(prompts >= 0, axis=1, dtype=jnp.int32)
    places = jnp.arange(prompts.shape[1], dtype=jnp.int32)[None]
    # The last token is left to the first round.
    positions = jnp.where(places < length[:, None] - 1, places, NONE)
    tokens = jnp.maximum(prompts, 0)
    _, cache = policy.forward(params, tokens, positions, state.cache)
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[:, : prompts.shape[1]].set(tokens),
        length=length,
        prompt_length=length,
        limit=length + MAX_NEW_TOKENS,
        sequence_id=ids,
        live=jnp.ones_like(state.live),
        cache=cache,
    )


@functools.partial(jax.jit, static_argnames=("policy", "gamma", "accept"))
def watch_rounds(
    policy: Policy,
    pair: PolicyParams,
    state: DecodeState,
    settings: Sampling,
    gamma: int,
    accept: AcceptRule,
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Run rounds until no row is live, and count drafts by where they were made.

    Returns:
      The state after them.
      Drafts, int32 `[2, 2, gamma, len(POSITIONS)]`: inside of completions or behind
      their ends; reached (all drafts before them were kept) or kept; by depth; by
      position.
      Row-rounds and tokens, int32 `[2]`.
    """
    depths = jnp.arange(gamma, dtype=jnp.int32)[None]
    edges = jnp.asarray(POSITIONS[1:], jnp.int32)

    def one_round(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state, counts, totals = carry
        position = (state.length - state.prompt_length)[:, None] + depths
        state, info = steps.decode_round(
            policy, pair, state, settings, gamma=gamma, accept=accept
        )
        is_live = info.is_live[:, None]
        kept = (depths < info.num_accepted[:, None]) & is_live
        reached = (depths <= info.num_accepted[:, None]) & is_live
        inside = depths < info.num_emitted[:, None]
        bucket = jnp.searchsorted(edges, position, side="right")
        where = jax.nn.one_hot(bucket, len(POSITIONS), dtype=jnp.int32)
        counted = jnp.stack([reached, kept])
        chosen = jnp.stack([inside, ~inside])[:, None] & counted[None]
        found = jnp.einsum("iabg,bgp->iagp", chosen.astype(jnp.int32), where)
        sums = jnp.stack([jnp.sum(info.is_live), jnp.sum(info.num_emitted)])
        return state, counts + found, totals + sums.astype(jnp.int32)

    counts = jnp.zeros((2, 2, gamma, len(POSITIONS)), jnp.int32)
    start = (state, counts, jnp.zeros(2, jnp.int32))
    return lax.while_loop(lambda carry: jnp.any(carry[0].live), one_round, start)


def shares(counts: np.ndarray) -> list[float | None]:
    """Return kept over reached of counts `[2, N]`; None where nothing was reached."""
    reached, kept = counts.tolist()
    return [k / r if r else None for r, k in zip(reached, kept, strict=True)]


def texts_of(out: er_jax.Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts with completions, and where completions are predicted.

    Returns:
      tokens: `[N, T]`, `NONE` behind the end. index: `[N, T]`, which token of the
      completion (from 0) is predicted at this position, `NONE` if none is.
    """
    count = len(out.lengths)
    prompt_lengths = out.prompt_mask.sum(axis=1)
    width = int((prompt_lengths + out.lengths).max())
    tokens = np.full((count, width), NONE, np.int32)
    index = np.full((count, width), NONE, np.int32)
    for row in range(count):
        start, length = int(prompt_lengths[row]), int(out.lengths[row])
        tokens[row, :start] = out.prompt_ids[row][out.prompt_mask[row]]
        tokens[row, start : start + length] = out.completion_ids[row, :length]
        index[row, start - 1 : start + length - 1] = np.arange(length)
    return tokens, index


def chain_by_depth(chance: np.ndarray, index: np.ndarray, gamma: int) -> list[float]:
    """Return expected chances by depth, for rounds that begin anywhere in completions.

    Args:
      chance: `[N, T]`, of a draft at each position. index: `[N, T]`, place in the
        completion, `NONE` outside. gamma: depths.
    """
    is_inside = index >= 0
    width = chance.shape[1]
    # Rounds whose every draft lies inside of the completion.
    starts = np.zeros_like(is_inside)
    starts[:, : width - gamma] = is_inside[:, : width - gamma] & is_inside[:, gamma:]
    reached = starts.astype(float)
    found = []
    for depth in range(gamma):
        here = np.zeros_like(chance)
        here[:, : width - depth] = chance[:, depth:]
        kept = reached * here
        found.append(float(kept.sum() / max(reached.sum(), 1e-9)))
        reached = kept
    return found


def by_position(chance: np.ndarray, index: np.ndarray) -> list[float | None]:
    """Return mean chances from each of `POSITIONS` to the next; None where none are."""
    ends = [*POSITIONS[1:], MAX_NEW_TOKENS]
    found: list[float | None] = []
    for first, end in zip(POSITIONS, ends, strict=True):
        chosen = chance[(index >= first) & (index < end)]
        found.append(float(chosen.mean()) if chosen.size else None)
    return found


@dataclasses.dataclass(frozen=True)
class Texts:
    """What one policy has sampled by plain decoding, and its distributions there.

    tokens, index: `[N, T]`, see `texts_of`. target: `[N, T, V]` log-probabilities.
    batches: rows sampled together, of like length. settings: what they were sampled by.
    """

    policy: Policy
    params: Any
    tokens: np.ndarray
    index: np.ndarray
    target: jax.Array
    batches: list[np.ndarray]
    settings: Sampling


def sample_texts(
    policy: Policy, params: Any, prompts: list[Any], num_samples: int
) -> Texts:
    """Sample completions of every prompt."""
    key = jax.random.key(SEED)
    config = RolloutConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        n=num_samples,
        stop_token_ids=(trained.STOP_ID,),
        max_slots=BATCH,
        control="ar",
    )
    plain = er_jax.rollout(
        policy, params, prompts, key=key, config=config, controller=RuleController("ar")
    )
    tokens, index = texts_of(plain)
    order = np.argsort(plain.lengths, kind="stable")
    count = -(-len(order) // BATCH)
    return Texts(
        policy=policy,
        params=params,
        tokens=tokens,
        index=index,
        target=distributions(policy, params, tokens),
        batches=np.array_split(order, count),
        settings=sampling_settings(key, (trained.STOP_ID,)),
    )


def study(
    directory: Path, *, gamma: int, samples: int, quick: bool
) -> Iterator[dict[str, Any]]:
    """Yield one point per policy and format.

    Args:
      directory: a run of train.grpo. gamma: drafts per round.
      samples: completions of each held-out prompt.
      quick: two formats and few prompts, to see that it runs.
    """
    forms = formats()[::7] if quick else formats()
    for label, step in STEPS.items():
        run = trained.load_run(directory, step=step)
        prompts = run.prompts[: 8 if quick else None]
        texts = sample_texts(run.policy, run.params, prompts, samples)
        for form in tqdm(forms, desc=label, unit="format"):
            pair = draft_of(run.params, form)
            yield {
                "preset": directory.name,
                "rows": len(texts.batches[0]),
                "dtype": run.policy.config.dtype,
                "policy": label,
                "format": form.name,
                "num_params": presets.num_params(run.params),
                "num_tokens": int((texts.index >= 0).sum()),
                "measured": {
                    rule: measured(texts, pair, gamma, rule) for rule in ACCEPT_RULES
                },
                "expected": expected(texts, pair, gamma),
            }


def measured(
    texts: Texts, pair: PolicyParams, gamma: int, rule: AcceptRule
) -> dict[str, Any]:
    """Return how often drafts are kept when every round drafts."""
    tokens, places = texts.tokens, np.arange(texts.tokens.shape[1])
    prompt_lengths = (texts.index == 0).argmax(axis=1) + 1
    prompts = np.where(places < prompt_lengths[:, None], tokens, NONE)
    prompts = prompts[:, : prompt_lengths.max()]
    inside = behind = np.zeros((2, gamma, len(POSITIONS)), int)
    num_rounds = num_tokens = num_same = 0
    for rows in texts.batches:
        state = started(
            texts.policy,
            texts.params,
            prompts[rows],
            rows.astype(np.int32),
            prompts.shape[1] + MAX_NEW_TOKENS,
        )
        state, counts, totals = watch_rounds(
            texts.policy, pair, state, texts.settings, gamma, rule
        )
        inside, behind = np.stack([inside, behind]) + np.asarray(counts)
        num_rounds += int(totals[0])
        num_tokens += int(totals[1])
        sampled = np.asarray(state.tokens)[:, : len(places)]
        known = places < np.asarray(state.length)[:, None]
        same = np.where(known, sampled, NONE) == tokens[rows]
        num_same += int(same.all(axis=1).sum())
    return {
        "by_depth": shares(inside.sum(axis=-1)),
        "by_depth_behind_the_end": shares(behind.sum(axis=-1)),
        "by_position": shares(inside.sum(axis=-2)),
        "behind_the_end": int(behind[0].sum()),
        "reached": int(inside[0].sum()),
        "kept": int((inside + behind)[1].sum()),
        "rounds": num_rounds,
        "tokens_per_round": num_tokens / num_rounds,
        "same_as_plain_decoding": num_same / len(tokens),
    }


def expected(texts: Texts, pair: PolicyParams, gamma: int) -> dict[str, Any]:
    """Return how often drafts should be kept by the rules with closed forms."""
    draft = distributions(texts.policy, draft_params(pair), texts.tokens)
    chances = (np.asarray(x, float) for x in agreements(texts.target, draft))
    found = {}
    for rule, chance in zip(("coupled", "token"), chances, strict=True):
        by_depth = chain_by_depth(chance, texts.index, gamma)
        found[rule] = {
            "by_depth": by_depth,
            "by_position": by_position(chance, texts.index),
            "mean": float(chance[texts.index >= 0].mean()),
            "tokens_per_round": acceptance.expected_tokens(by_depth),
        }
    return found


def rows_of(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows: chances in per cent, tokens per round."""
    rows: list[tuple[Any, ...]] = []
    for p in points:
        found, expected = p["measured"], p["expected"]
        rows.append(
            (
                p["policy"],
                p["format"],
                *(100 * expected[rule]["mean"] for rule in ("coupled", "token")),
                *(100 * found[rule]["by_depth"][0] for rule in ACCEPT_RULES),
                *(found[rule]["tokens_per_round"] for rule in ACCEPT_RULES),
            )
        )
    header = (
        "policy",
        "draft",
        "coupled, expected %",
        "token, expected %",
        *(f"{rule}, first kept %" for rule in ACCEPT_RULES),
        *(f"{rule}, tokens/round" for rule in ACCEPT_RULES),
    )
    return header, rows


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw chances by depth and by position, measured and expected, and save it."""
    points = record["points"]
    labels = list(dict.fromkeys(p["policy"] for p in points))
    picture, axes = records.figure(2, len(labels))
    for line, label in zip(axes, labels, strict=True):
        for number, p in enumerate(p for p in points if p["policy"] == label):
            color = f"C{number}"
            found, awaited = p["measured"]["coupled"], p["expected"]["coupled"]
            depths = range(1, len(found["by_depth"]) + 1)
            line[0].plot(depths, found["by_depth"], color=color, label=p["format"])
            line[0].plot(depths, awaited["by_depth"], ":", color=color)
            positions = [x + 1 for x in POSITIONS]
            for values, style in ((found, "-"), (awaited, ":")):
                known = [np.nan if x is None else x for x in values["by_position"]]
                line[1].plot(positions, known, style, color=color)
        line[0].set(title=f"{label}: kept at depth, coupled", xlabel="depth")
        line[0].legend(fontsize="xx-small", title="dotted: expected")
        line[1].set(title="kept from this token on, coupled", xlabel="token")
        line[1].set_xscale("log", base=2)
    records.save_figure(picture, record, path)
