"""How often drafts are kept: by quantization, acceptance rule, depth and position.

    python -m train.grpo arithmetic                        # a policy to study
    python -m benchmarks.acceptance runs/arithmetic
    python -m benchmarks.acceptance runs/arithmetic --quick

For the policy after its warm-up and the trained one, at temperature 1, on the run's own
held-out prompts.

*Measured*: rollouts that draft in every round, under each rule; the chance that a draft
is kept given that all before it were, by depth. *Expected*: on texts that the policy
itself sampled, from the two distributions at every position: the closed forms of the
coupled and the token rule, and the product of neighbours for deeper drafts. What is
kept up to some depth is what the policy would have sampled, so these meet the same
prefixes; rounds begin where the last one ended, and not everywhere alike, which is left
out.

Says how a drafter's format changes acceptance of this small policy. Others differ.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

import er_jax
from benchmarks import measure
from er_jax import DrafterConfig, PolicyParams, RolloutConfig, acceptance, sampling
from er_jax.acceptance import ACCEPT_RULES
from er_jax.calibrate import neutral_sampling
from er_jax.drafter import draft_params
from er_jax.types import NONE, Policy
from train import checkpoints, tasks
from train.controllers import RuleController

HEAD = "lm_head"

# Positions in the completion: from each of these on.
POSITIONS = (0, 8, 16, 32, 64, 128)

MAX_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Format:
    """How a draft is quantized: the vocabulary projection may differ from the rest."""

    name: str
    body: DrafterConfig
    head: DrafterConfig


def formats() -> list[Format]:
    """Return the formats of the study."""
    bodies = {
        "W8A8": DrafterConfig(bits=8, act_bits=8),
        "W8A16": DrafterConfig(bits=8, act_bits=16),
        "W4A16": DrafterConfig(bits=4, act_bits=16),
        **{
            f"W4A16 g{size}": DrafterConfig(bits=4, act_bits=16, group_size=size)
            for size in (128, 64, 32)
        },
    }
    found = []
    for name, body in bodies.items():
        for bits in (8, 4):
            head = dataclasses.replace(
                body, bits=bits, group_size=None if bits == 8 else body.group_size
            )
            found.append(Format(f"{name}, head {bits}", body, head))
    return found


def draft_of(params: Any, form: Format) -> PolicyParams:
    """Return the parameters with a draft of this format.

    Groups that do not divide an input are as large as they can be below that.
    """

    def leaf(path: tuple[Any, ...], weight: jax.Array) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        config = form.head if name == HEAD else form.body
        if config.group_size is not None and weight.ndim > 1:
            size = weight.shape[-2]
            group = next(g for g in range(config.group_size, 0, -1) if size % g == 0)
            config = dataclasses.replace(config, group_size=group)
        return er_jax.attach_draft({name: weight}, config).draft[name]

    return PolicyParams(params, jax.tree_util.tree_map_with_path(leaf, params))


def keep_by_depth(histogram: np.ndarray) -> list[float]:
    """Return the chance at each depth that a draft is kept, given all before it were.

    Args:
      histogram: `[G + 1]`, row-rounds by the number of drafts kept.
    """
    at_least = np.cumsum(histogram[::-1])[::-1].astype(float)
    with np.errstate(invalid="ignore"):
        return (at_least[1:] / at_least[:-1]).tolist()


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


def texts_of(out: er_jax.Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts and completions as `[N, T]` tokens, and which were sampled.

    Sampled are marked where they are predicted from: one position earlier. Padding, at
    the end, is `NONE`.
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
    """Return expected chances by depth, of rounds that begin anywhere in completions.

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
class Args:
    """What to study.

    Args:
      run: directory of a run of train.grpo.
      gamma: drafts per round. samples: completions of each held-out prompt.
      out: where to write. quick: two formats and few prompts, to see that it runs.
    """

    run: tyro.conf.Positional[Path]
    gamma: int = 8
    samples: int = 2
    out: Path | None = None
    quick: bool = False


def study(args: Args) -> Iterator[dict[str, Any]]:
    """Yield one point per policy and format."""
    problems_of: Sequence[Any] | None = None
    forms = formats()[::7] if args.quick else formats()
    for label, step in (("after the warm-up", 0), ("trained", None)):
        policy, params, tokenizer = checkpoints.load_policy(args.run, step=step)
        if problems_of is None:
            path = args.run / "data" / "eval.jsonl"
            problems_of = tasks.read_jsonl(path, tokenizer)[: 8 if args.quick else None]
        prompts = [tokenizer.encode_prompt(p.prompt) for p in problems_of]
        sample = functools.partial(
            er_jax.rollout, policy, prompts=prompts, key=jax.random.key(5)
        )
        settings: dict[str, Any] = dict(
            max_new_tokens=MAX_NEW_TOKENS,
            n=args.samples,
            stop_token_ids=(tasks.EOS,),
            max_slots=32,
        )
        plain = sample(
            params,
            config=RolloutConfig(control="ar", **settings),
            controller=RuleController("ar"),
        )
        tokens, index = texts_of(plain)
        target = distributions(policy, params, tokens)
        for form in tqdm(forms, desc=label, unit="format"):
            yield {
                "preset": args.run.name,
                "rows": settings["max_slots"],
                "dtype": policy.config.dtype,
                "policy": label,
                "format": form.name,
                "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
                "num_tokens": int(plain.lengths.sum()),
                **study_format(
                    sample, settings, policy, params, form, target, tokens, index, args
                ),
            }


def study_format(
    sample: Any,
    settings: dict[str, Any],
    policy: Policy,
    params: Any,
    form: Format,
    target: jax.Array,
    tokens: np.ndarray,
    index: np.ndarray,
    args: Args,
) -> dict[str, Any]:
    """Return what is measured and expected of one format."""
    pair = draft_of(params, form)
    draft = distributions(policy, draft_params(pair), tokens)
    coupled, token = (np.asarray(x, float) for x in agreements(target, draft))
    measured = {}
    for rule in ACCEPT_RULES:
        made = sample(
            pair,
            config=RolloutConfig(
                control=f"fixed:{args.gamma}",
                accept=rule,  # type: ignore[arg-type]
                **settings,
            ),
            controller=RuleController(f"fixed:{args.gamma}"),
        )
        histogram = made.stats.accepted[args.gamma]
        rounds = int(histogram.sum())
        measured[rule] = {
            "by_depth": keep_by_depth(histogram),
            "rounds": rounds,
            "tokens_per_round": float(
                1 + histogram @ np.arange(args.gamma + 1) / rounds
            ),
        }
    expected = {
        rule: {
            "by_depth": chain_by_depth(chance, index, args.gamma),
            "by_position": by_position(chance, index),
            "mean": float(chance[index >= 0].mean()),
        }
        for rule, chance in (("coupled", coupled), ("token", token))
    }
    for values in expected.values():
        chances = values["by_depth"]
        assert isinstance(chances, list)
        values["tokens_per_round"] = acceptance.expected_tokens(chances)
    return {"measured": measured, "expected": expected}


def rows_of(
    points: Sequence[Mapping[str, Any]],
) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
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
    """Draw chances by depth, measured and expected, and by position, and save it."""
    points = record["points"]
    labels = list(dict.fromkeys(p["policy"] for p in points))
    picture, axes = measure.figure(2, len(labels))
    for line, label in zip(axes, labels, strict=True):
        for number, p in enumerate(p for p in points if p["policy"] == label):
            color = f"C{number}"
            measured = p["measured"]["coupled"]["by_depth"]
            depths = range(1, len(measured) + 1)
            line[0].plot(depths, measured, color=color, label=p["format"])
            expected = p["expected"]["coupled"]
            line[0].plot(depths, expected["by_depth"], ":", color=color)
            positions = [x + 1 for x in POSITIONS]
            line[1].plot(positions, expected["by_position"], color=color)
        line[0].set(title=f"{label}: kept at depth, coupled", xlabel="depth")
        line[0].legend(fontsize="xx-small")
        line[1].set(title="expected by position", xlabel="from this token on")
        line[1].set_xscale("log", base=2)
    picture.suptitle(measure.conditions(record), fontsize="small")
    picture.savefig(path, dpi=110)


def main(args: Args) -> dict[str, Any]:
    """Study, print, and write the record and a picture; return the record."""
    out = measure.results_dir(args.out, args.quick)
    settings = {"run": args.run.name, "gamma": args.gamma, "samples": args.samples}
    record = measure.new_record("acceptance", settings)
    for point in study(args):
        record["points"].append(point)
        measure.save(out / "acceptance.json", record)
    header, rows = rows_of(record["points"])
    print(measure.table(rows, header))
    plot(record, out / "acceptance.png")
    print(f"written: acceptance.json and .png in {out.name}", file=sys.stderr)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.acceptance"))
