"""The proof that speculation changes nothing but time: train twice and compare.

    python -m train.compare arithmetic --policy runs/arithmetic
    python -m train.compare arithmetic --policy runs/arithmetic --dtype float32

One run samples without speculation, the other with it. Both start from the same
warmed-up policy and take the same few GRPO steps. In float64 every token, every reward
and every parameter must be the same, bit for bit. In float32 the two runs use programs
that round differently, so they are compared up to the first token that differs. That
token must be a rounding tie: a draw whose two best candidates are closer together than
float32 can tell.

Left out: speed, which the benchmarks measure.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import er_jax
from configs import arithmetic, tiny
from er_jax import sampling
from er_jax.costs import timing
from train.checkpoints import load_policy
from train.completions import StepData
from train.config import RunConfig
from train.run import move_aside
from train.settings import require
from train.trainer import Trainer

# Nats. Noised log-probabilities are of order 10, so float32 keeps them to about 1e-6;
# the logits they are made of carry the rounding errors of a whole forward pass.
TIE = 1e-4


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What to compare.

    Attributes:
      run: steps, dtype and everything else; its `control` is not used.
      policy: directory of a run of the demo, from whose warmed-up policy both start;
        None warms a policy up in float32, as `run` says.
      speculation: the control of the second run; the first is "ar".
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    policy: Path | None = None
    speculation: str = "fixed:4"

    def __post_init__(self) -> None:
        partial = self.run.grpo.partial
        require(
            not partial.is_on,
            "grpo.partial.over",
            partial.over,
            "rollouts would end by the clock, and no two alike; leave it out",
        )


@dataclasses.dataclass(frozen=True)
class Tie:
    """The first token in which two rollouts of the same prompts differ.

    Attributes:
      sequence: row of the rollout.
      position: of the token, counted from the start of the prompt.
      tokens: the first run's draw and the second run's.
      gap: noised log-probability of the first draw minus that of the second, both under
        the first run's parameters, in nats.
    """

    sequence: int
    position: int
    tokens: tuple[int, int]
    gap: float

    @property
    def is_rounding(self) -> bool:
        """Whether rounding in float32 may have decided between the two draws."""
        return abs(self.gap) <= TIE


def differing_rows(first: er_jax.Rollout, second: er_jax.Rollout) -> np.ndarray:
    """Return the rows whose completions differ in any token."""
    same = (first.completion_ids == second.completion_ids).all(axis=1)
    return np.flatnonzero(~(same & (first.lengths == second.lengths)))


def find_tie(trainer: Trainer, first: StepData, second: StepData, row: int) -> Tie:
    """Measure the first token of a row in which two rollouts differ.

    Args:
      trainer: of the first run; its parameters are still those that sampled `first`.
      first, second: what the two runs sampled. row: one in which they differ.
    """
    ids = (first.out.completion_ids[row], second.out.completion_ids[row])
    index = int(np.flatnonzero(ids[0] != ids[1])[0])
    prompt = first.out.prompt_ids[row][first.out.prompt_mask[row]]
    before = np.concatenate([prompt, ids[0][:index]])[None]
    position = before.shape[1]
    policy, params = trainer.policy, trainer.state.params.policy
    hidden, _ = policy.forward(
        params,
        jnp.asarray(before, jnp.int32),
        jnp.arange(position, dtype=jnp.int32)[None],
        policy.init_cache(1, position),
    )
    settings = dataclasses.replace(
        timing.neutral_sampling(),
        key=np.asarray(trainer.state.key),
        temperature=np.float32(trainer.config.grpo.temperature),
    )
    scores = np.asarray(
        sampling.noised_logprobs(
            policy.logits(params, hidden[:, -1:])[0, 0],
            settings,
            jnp.int32(int(first.out.sequence_ids[row])),
            jnp.int32(position),
        )
    )
    tokens = int(ids[0][index]), int(ids[1][index])
    return Tie(
        sequence=row,
        position=position,
        tokens=tokens,
        gap=float(scores[tokens[0]] - scores[tokens[1]]),
    )


def same_start(config: CompareConfig) -> tuple[Trainer, Trainer]:
    """Return two trainers that differ in their control only.

    Raises:
      ValueError: `config.policy` has other model sizes than the run.
    """
    run = config.run
    if config.policy is not None:
        policy, params, _ = load_policy(config.policy, step=0)
        wanted = run.model.decoder(policy.vocab_size, policy.config.dtype)
        if policy != wanted:
            raise ValueError(
                f"policy={str(config.policy)!r} holds {policy.config}, and the run is "
                f"of {wanted.config}; give the run's own model sizes"
            )
    else:
        warm = dataclasses.replace(run, dtype="float32", out=run.out / "warm-up")
        params = Trainer.of(warm).first_params()
    dtype = jnp.dtype(run.dtype)
    trainers = []
    for control in ("ar", config.speculation):
        out = run.out / control.replace(":", "-")
        trainer = Trainer.of(dataclasses.replace(run, control=control, out=out))
        trainer.start_from(jax.tree.map(lambda leaf: jnp.array(leaf, dtype), params))
        trainers.append(trainer)
    return trainers[0], trainers[1]


def farthest(one: Any, other: Any) -> float:
    """Return the largest absolute difference between two pytrees of arrays."""
    gaps = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), one, other)
    return max(jax.tree.leaves(gaps))


def report_ties(step: int, ties: Sequence[Tie], num_tokens: int) -> None:
    """Print the first differing tokens of two runs.

    Args:
      step: in which they differ. ties: one for each row that does.
      num_tokens: equal tokens in the steps before.
    """
    print(
        f"step {step}: {len(ties)} sequences differ, after {num_tokens} equal tokens "
        "in the steps before; the first differing token of each:"
    )
    for tie in ties[:10]:
        verdict = "a rounding tie" if tie.is_rounding else "NOT A TIE"
        print(
            f"  sequence {tie.sequence}, position {tie.position}: drew {tie.tokens[0]} "
            f"and {tie.tokens[1]}, {abs(tie.gap):.1e} nats apart: {verdict}"
        )


def compare(config: CompareConfig) -> bool:
    """Run both and print the comparison of each step.

    Returns:
      Whether everything was equal, in float32 up to the first rounding tie.
    """
    run = config.run
    move_aside(run.out)
    plain, speculative = same_start(config)
    print(f"{run.dtype}, ar against {config.speculation}, {run.steps} GRPO steps")
    exact = run.dtype == "float64"
    num_tokens = 0
    for step in range(1, run.steps + 1):
        pair = plain.rollout_step(), speculative.rollout_step()
        first, second = (data.out for data in pair)
        rows = differing_rows(first, second)
        if len(rows):
            ties = [find_tie(plain, *pair, row) for row in rows]
            report_ties(step, ties, num_tokens)
            return not exact and all(tie.is_rounding for tie in ties)
        num_tokens += int(first.lengths.sum())
        gap = float(np.max(np.abs(first.logprobs - second.logprobs)))
        kept = second.stats.keep_rate(max(second.stats.tokens))
        one, other = plain.learn(pair[0]), speculative.learn(pair[1])
        distance = farthest(plain.state.params.policy, speculative.state.params.policy)
        print(
            f"step {step}: {int(first.lengths.sum())} tokens the same, "
            f"{100 * kept:.1f} % of drafts kept, log-probabilities to {gap:.1e}, "
            f"reward {one['reward']:.4f} {other['reward']:.4f}, parameters "
            f"{one['params_digest']} {other['params_digest']} to {distance:.1e}"
        )
        same = one["reward"] == other["reward"]
        if exact:
            same = same and one["params_digest"] == other["params_digest"]
        if not same:
            print("DIFFERENT: equal tokens must give equal rewards and updates")
            return False
    what = "tokens, rewards and parameters" if exact else "tokens and rewards"
    print(f"identical {what} over {run.steps} steps and {num_tokens} tokens")
    return True


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line, compare, and exit with 1 when the runs differ."""

    def of(run: RunConfig) -> CompareConfig:
        out = Path("runs") / f"compare-{run.out.name}"
        return CompareConfig(
            run=dataclasses.replace(run, steps=4, dtype="float64", out=out)
        )

    config = tyro.extras.overridable_config_cli(
        {
            "arithmetic": ("The reported demo.", of(arithmetic.CONFIG)),
            "tiny": ("The same in seconds.", of(tiny.CONFIG)),
        },
        args=args,
    )
    if config.run.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if not compare(config):
        sys.exit(1)


if __name__ == "__main__":
    main()
