"""Supervised warm-up: the policy learns to write solutions, but not to perfection.

Reinforcement learning needs a policy that is right some of the time. The warm-up
imitates written-out solutions until the mean chance of writing a held-out solution
reaches `stop_at`. That chance is the exponential of the solution's log-probability, so
it is measured with one forward pass and without sampling.

Left out: sampling and checkpoints.
"""

import dataclasses
import functools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import er_jax
from train import losses
from train.batching import Batch, Buckets, Example, make_batches
from train.settings import check_types, require
from train.tasks import Problem, Tokenizer


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """The warm-up.

    Attributes:
      max_steps: most optimizer steps, >= 0; 0 leaves the policy as initialised.
      stop_at: mean chance, in (0, 1], of writing a held-out solution at temperature 1;
        the warm-up stops when it is reached.
      check_every: optimizer steps between two measurements of that chance.
      learning_rate: Adam's, reached after `ramp_steps`.
      schedule: of the learning rate after the ramp: "constant", which suits a warm-up
        that `stop_at` ends, or "cosine", which falls to 0 at `max_steps`.
      ramp_steps: optimizer steps in which the learning rate grows linearly from 0.
      batch_tokens: tokens of one step, padding included.
      clip_norm: largest global gradient norm.
    """

    max_steps: int = 1_000
    stop_at: float = 0.45
    check_every: int = 25
    learning_rate: float = 2e-3
    schedule: str = "constant"
    ramp_steps: int = 50
    batch_tokens: int = 2_304
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        require(self.max_steps >= 0, "max_steps", self.max_steps, "give >= 0")
        require(
            0 < self.stop_at <= 1, "stop_at", self.stop_at, "a chance must be in (0, 1]"
        )
        require(self.check_every >= 1, "check_every", self.check_every, "give >= 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "give > 0")
        schedules = ("constant", "cosine")
        require(
            self.schedule in schedules,
            "schedule",
            self.schedule,
            f"choose from {schedules}",
        )
        require(self.ramp_steps >= 1, "ramp_steps", self.ramp_steps, "give >= 1")
        require(self.batch_tokens >= 1, "batch_tokens", self.batch_tokens, "give >= 1")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "give > 0")


def make_optimizer(config: SFTConfig) -> optax.GradientTransformation:
    """Return Adam with the configured schedule, after a clip of the gradient's norm."""
    ramp = optax.linear_schedule(0.0, config.learning_rate, config.ramp_steps)
    after = (
        optax.constant_schedule(config.learning_rate)
        if config.schedule == "constant"
        else optax.cosine_decay_schedule(
            config.learning_rate, max(1, config.max_steps - config.ramp_steps)
        )
    )
    schedule = optax.join_schedules([ramp, after], [config.ramp_steps])
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm), optax.adam(schedule)
    )


@functools.partial(
    jax.jit,
    static_argnames=("policy", "optimizer"),
    donate_argnames=("params", "opt_state"),
)
def train_step(
    policy: er_jax.Policy,
    optimizer: optax.GradientTransformation,
    params: Any,
    opt_state: optax.OptState,
    batch: Batch,
) -> tuple[Any, optax.OptState, jax.Array]:
    """Take one optimizer step on the mean loss per completion token.

    Args:
      policy, optimizer: what to update and how.
      params, opt_state: donated.
      batch: of solutions.
    Returns:
      The new `params` and `opt_state`, and the loss in nats per token.
    """
    num_tokens = jnp.sum(batch.mask)

    def loss_fn(params: Any) -> jax.Array:
        loss = losses.supervised_loss(policy, params, batch)
        return loss / num_tokens.astype(loss.dtype)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    with jax.numpy_dtype_promotion("standard"):  # Adam computes float ** int
        updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


solution_logprobs = jax.jit(losses.solution_logprobs, static_argnames="policy")


def examples_of(problems: Sequence[Problem], tokenizer: Tokenizer) -> list[Example]:
    """Return the problems that have a solution, as token ids."""
    return [
        Example(
            tokenizer.encode_prompt(p.prompt), tokenizer.encode_completion(p.solution)
        )
        for p in problems
        if p.solution is not None
    ]


def solution_chance(
    policy: er_jax.Policy, params: Any, batches: Sequence[Batch]
) -> float:
    """Return the mean chance of sampling exactly the solution at temperature 1."""
    chances: list[float] = []
    for batch in batches:
        logprobs = np.asarray(solution_logprobs(policy, params, batch), np.float64)
        chances += list(np.exp(logprobs[np.asarray(batch.mask).any(axis=1)]))
    return float(np.mean(chances))


def warm_up(
    policy: er_jax.Policy,
    params: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    *,
    config: SFTConfig,
    buckets: Buckets,
    seed: int,
    on_check: Callable[[dict[str, Any]], None] = lambda record: None,
) -> tuple[Any, dict[str, Any]]:
    """Train on `train` until the solutions of `held_out` are likely enough.

    Args:
      policy: the model. params: its initial parameters; donated.
      train: examples to imitate, in a new random order every epoch.
      held_out: examples whose chance decides when to stop.
      config: see `SFTConfig`.
      buckets: lengths of the batches; `config.batch_tokens` is their size.
      seed: of the random order.
      on_check: called every `check_every` steps with a dict of "step", "loss" (mean
        since the last call, nats per token), "solution_chance" and "seconds".
    Returns:
      The trained parameters, and the last such dict.
    """
    buckets = dataclasses.replace(buckets, tokens=config.batch_tokens)
    held_out_batches = make_batches(held_out, buckets)
    optimizer = make_optimizer(config)
    opt_state = optimizer.init(params)
    rng = random.Random(f"warm-up {seed}")
    queue: list[Batch] = []
    recent: list[jax.Array] = []
    start = time.perf_counter()
    record = {"step": 0, "loss": float("nan"), "solution_chance": 0.0, "seconds": 0.0}
    for step in range(1, config.max_steps + 1):
        if not queue:
            order = list(train)
            rng.shuffle(order)
            queue = make_batches(order, buckets)
            rng.shuffle(queue)
        params, opt_state, loss = train_step(
            policy, optimizer, params, opt_state, queue.pop()
        )
        recent.append(loss)
        if step % config.check_every == 0 or step == config.max_steps:
            chance = solution_chance(policy, params, held_out_batches)
            record = {
                "step": step,
                "loss": float(np.mean([float(value) for value in recent])),
                "solution_chance": chance,
                "seconds": time.perf_counter() - start,
            }
            recent = []
            on_check(record)
            if chance >= config.stop_at:
                break
    return params, record
