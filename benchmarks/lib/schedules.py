"""Random rollouts for the fuzzer: all that may be chosen about one, by a seed.

A schedule names policy, draft, acceptance rule, prompts, settings and slots. Policies
are small; some are poisoned, which means that a token or a position has entries that
overflow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import er_jax
from er_jax.acceptance import AcceptRule
from er_jax.config import LOGPROB_KINDS
from er_jax.types import Params, Policy
from tests.learned import Learned, poisoned
from tests.toy import Toy, toy_params

# Positions that a policy has: the longest prompt and completion together. Short ones
# fit in the smallest cache, long ones outgrow it and continue in a longer one.
MAX_LENGTH = {"short": 36, "long": 200}
LONGEST_PROMPT = 16
LEAST_LONG = 177
"""The fewest new tokens for which there are two cache lengths."""

LEARNED = "learned positions"
POISONED = ("poisoned token", "poisoned position", "poisoned prompt")
POLICIES = ("decoder", "toy", LEARNED, *POISONED)
DRAFTS = ("itself", "stale", "other seed", "NaN")

# Noise in the weights of a stale draft, in standard deviations of the weights.
STALE = 0.2


@dataclasses.dataclass(frozen=True)
class Family:
    """Schedules that share compiled programs, so that there are few of them.

    architecture: "decoder" or "toy"; "library" or "plain" have learned positions and
      the attention of that name. rule: of acceptance. dtype: of the policy.
    size: a key of `MAX_LENGTH`. rows, gammas: of programs, in all combinations; gammas
      contain 0. truncated: whether top-k or top-p is on; None is drawn.
    head, window: what drafts see; a window of None is all positions.
    """

    architecture: str
    rule: AcceptRule
    rows: tuple[int, ...]
    gammas: tuple[int, ...]
    dtype: str = "float64"
    size: str = "short"
    truncated: bool | None = None
    head: int = 0
    window: int | None = None


FAMILIES = (
    Family("decoder", "coupled", (1, 2, 8), (0, 1, 4)),
    Family("decoder", "coupled", (1, 4, 8), (0, 1, 4), head=3, window=5),
    Family("decoder", "token", (1, 4), (0, 2, 7)),
    Family("library", "coupled", (1, 2), (0, 2, 7), head=1, window=1),
    Family("toy", "block", (1, 8), (0, 2), window=3),
    Family("decoder", "block", (1, 8), (0, 1, 4)),
    Family("toy", "coupled", (1, 4, 8), (0, 2, 7)),
    Family("toy", "token", (1, 2, 8), (0, 1, 4)),
    Family("toy", "block", (1, 4, 8), (0, 2, 7)),
    Family("library", "coupled", (1, 2, 8), (0, 2, 7)),
    Family("library", "token", (1, 8), (0, 1, 4)),
    Family("library", "block", (1, 4), (0, 2, 7)),
    Family("plain", "coupled", (1, 4, 8), (0, 1, 4)),
    Family("plain", "token", (1, 4), (0, 2, 7)),
    Family("plain", "block", (1, 8), (0, 1, 4)),
    Family("decoder", "coupled", (1, 4), (0, 4), "float32"),
    Family("library", "coupled", (1, 4), (0, 4), "float32"),
    Family("plain", "block", (1, 4), (0, 2), "float32"),
    Family("decoder", "coupled", (1, 4), (0, 4), size="long"),
    Family("decoder", "coupled", (1, 4), (0, 4), size="long", head=8, window=20),
    Family("plain", "coupled", (1, 4), (0, 7), size="long"),
    Family("library", "token", (1, 4), (0, 2), size="long"),
)

# All policies and all rules, with few programs.
QUICK_FAMILIES = (
    Family("plain", "coupled", (1, 4), (0, 4)),
    Family("toy", "token", (4,), (0, 2), truncated=False, head=1, window=2),
    Family("plain", "coupled", (1, 4), (0, 4)),
    Family("library", "block", (4,), (0, 2), truncated=True, head=2, window=3),
    Family("plain", "coupled", (1, 4), (0, 4)),
    Family("decoder", "coupled", (4,), (0, 2), truncated=True),
)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """All that is chosen about one rollout.

    seed: of the schedule, its controller and the sampling key. family: what it shares
      with others. policy: one of `POLICIES`.
    poison: {"token": t}, {"position": p}, or empty. draft: one of `DRAFTS`.
    prompts, config: of the rollout; the latter by the names of `RolloutConfig`.
    sequence_ids: of its completions. rounds: of the longest window.
    alone: completions that are sampled once more, each in a rollout of its own.
    """

    seed: int
    family: Family
    policy: str
    poison: dict[str, int]
    draft: str
    prompts: tuple[tuple[int, ...], ...]
    config: dict[str, Any]
    sequence_ids: tuple[int, ...]
    rounds: int
    alone: tuple[int, ...]


def policy_of(family: Family) -> Policy:
    """Return the policy of a family."""
    max_length = MAX_LENGTH[family.size]
    if family.architecture == "toy":
        return Toy(vocab_size=5, dtype=family.dtype)
    if family.architecture == "decoder":
        return er_jax.Decoder(
            er_jax.DecoderConfig(
                vocab_size=13, dim=16, num_layers=1, num_heads=2, num_kv_heads=1,
                hidden_dim=32, max_length=max_length, dtype=family.dtype,
            )
        )  # fmt: skip
    return Learned(
        max_length=max_length, attention=family.architecture, dtype=family.dtype
    )


@functools.lru_cache
def healthy_params(family: Family, seed: int) -> Params:
    """Return parameters of a family's policy as NumPy arrays."""
    policy = policy_of(family)
    if isinstance(policy, Toy):
        return toy_params(policy, seed=seed)
    if isinstance(policy, Learned):
        return policy.init(seed)
    assert isinstance(policy, er_jax.Decoder)
    return jax.device_get(policy.init(jax.random.key(seed)))


def stale_params(params: Params, seed: int) -> Params:
    """Return parameters with a little noise, as if from some updates ago."""
    rng = np.random.default_rng(seed)

    def moved(leaf: np.ndarray) -> np.ndarray:
        noise = STALE * leaf.std() * rng.standard_normal(leaf.shape)
        return (leaf + noise).astype(leaf.dtype)

    return jax.tree.map(moved, params)


@functools.lru_cache
def decoder_draft(family: Family, draft: str) -> Params:
    """Return a quantized draft of a family's decoder."""
    params = healthy_params(family, int(draft == "other seed"))
    if draft == "stale":
        params = stale_params(params, 0)
    quantized = jax.device_get(er_jax.quantize(params, er_jax.DrafterConfig()))
    return _filled_with_nan(quantized) if draft == "NaN" else quantized


def _filled_with_nan(params: Params) -> Params:
    def fill(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        is_real = np.issubdtype(leaf.dtype, np.floating)
        return np.full_like(leaf, np.nan) if is_real else leaf

    return jax.tree.map(fill, params)


def params_of(schedule: Schedule) -> er_jax.PolicyParams:
    """Return target and draft of a schedule."""
    family = schedule.family
    params = healthy_params(family, 0)
    if schedule.poison:
        params = poisoned(params, **schedule.poison)
    if family.architecture == "decoder":
        draft = decoder_draft(family, schedule.draft)
    elif schedule.draft == "other seed":
        draft = healthy_params(family, 1)
    elif schedule.draft == "stale":
        draft = stale_params(healthy_params(family, 0), schedule.seed)
        draft = poisoned(draft, **schedule.poison) if schedule.poison else draft
    elif schedule.draft == "NaN":
        draft = _filled_with_nan(params)
    else:
        draft = params
    return er_jax.PolicyParams(policy=params, draft=draft)


def drawn(seed: int, families: Sequence[Family] = FAMILIES) -> Schedule:
    """Return the schedule of a seed."""
    rng = np.random.default_rng(seed)
    family = families[seed % len(families)]
    max_length = MAX_LENGTH[family.size]
    is_long = family.size == "long"
    vocab_size = policy_of(family).vocab_size

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    prompts = _drawn_prompts(rng, vocab_size)
    if is_long:
        prompts = prompts[:2]
    n = pick(1, 2, 3, 4)
    if len(prompts) * n < 3:  # too few to fill the smallest batch
        n = 4
    longest = max(map(len, prompts))
    room = max_length - longest
    # Often as many as the policy has positions for.
    least = min(LEAST_LONG if is_long else 1, room)
    max_new_tokens = pick(room, room, int(rng.integers(least, room + 1)))

    policy, poison = family.architecture, {}
    if policy in ("library", "plain"):
        # A poisoned token would end long completions soon.
        names = (LEARNED, *POISONED)
        policy = pick(LEARNED, "poisoned position") if is_long else pick(*names)
    token, position = int(rng.integers(vocab_size)), int(rng.integers(longest))
    if policy == "poisoned token":
        poison = {"token": token}
        # It shall occur in completions only.
        other = (token + 1) % vocab_size
        prompts = tuple(
            tuple(other if t == token else t for t in prompt) for prompt in prompts
        )
    elif policy == "poisoned position":
        poison = {"position": int(rng.integers(longest, longest + max_new_tokens))}
    elif policy == "poisoned prompt":
        poison = pick({"token": pick(*prompts[0])}, {"position": position})

    count = len(prompts) * n
    slots = [rows for rows in family.rows if rows < 2 * count] or [1]
    gammas = {0, *(gamma for gamma in family.gammas if rng.random() < 0.7)}
    control = "best"
    if rng.random() < 0.15:
        control = f"fixed:{pick(*family.gammas)}"
    num_stops = pick(0, 1) if is_long else pick(0, 0, 1, 2)
    config = {
        "max_new_tokens": max_new_tokens,
        "n": n,
        "temperature": pick(0.0, 0.3, 0.7, 1.0, 1.0, 1.6),
        "top_k": pick(0, 0, 2, 4),
        "top_p": pick(1.0, 1.0, 0.6, 0.9),
        "min_p": pick(0.0, 0.0, 0.05, 0.2),
        "stop_token_ids": tuple(rng.choice(vocab_size, num_stops, False).tolist()),
        "pad_id": pick(0, -1),
        "logprobs": pick(*LOGPROB_KINDS),
        "gammas": tuple(sorted(gammas)),
        "control": control,
        "max_slots": pick(slots[-1], *slots),
        "drafter": er_jax.DrafterConfig(head=family.head, window=family.window),
    }
    # Two programs serve the two cases.
    if family.truncated is True and (config["top_k"], config["top_p"]) == (0, 1.0):
        config["top_p"] = 0.8
    if family.truncated is False:
        config |= {"top_k": 0, "top_p": 1.0}
    alone: list[int] = []
    if 1 in family.rows and rng.random() < 0.3:
        alone = rng.choice(count, min(count, 2), False).tolist()
    return Schedule(
        seed=seed,
        family=family,
        policy=policy,
        poison=poison,
        draft=pick(*DRAFTS),
        prompts=prompts,
        config=config,
        sequence_ids=_drawn_ids(rng, count),
        rounds=int(rng.integers(1, 7)) * (4 if is_long else 1),
        alone=tuple(alone),
    )


def _drawn_prompts(
    rng: np.random.Generator, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """Return one to six prompts of equal or different lengths, some of them twice."""
    prompts: list[tuple[int, ...]] = []
    most = int(rng.integers(1, LONGEST_PROMPT + 1))
    is_ragged = rng.random() < 0.7
    for _ in range(rng.integers(1, 7)):
        length = int(rng.integers(1, most + 1)) if is_ragged else most
        prompt = tuple(rng.integers(0, vocab_size, length).tolist())
        if prompts and rng.random() < 0.3:
            prompt = prompts[rng.integers(len(prompts))]
        prompts.append(prompt)
    return tuple(prompts)


def _drawn_ids(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    """Return distinct sequence ids: small numbers in any order, or any int32."""
    most = 2 * count if rng.random() < 0.5 else 2**31 - 1
    ids: list[int] = []
    while len(ids) < count:
        new = int(rng.integers(most))
        ids += [new] if new not in ids else []
    return tuple(ids)
