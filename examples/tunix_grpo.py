"""Trains a small Qwen3 of Tunix by GRPO, with Tunix's own sampler, er_jax's, or both.

    pip install -e ".[tunix]"
    python examples/tunix_grpo.py --engine er_jax
    python examples/tunix_grpo.py --engine both

The task is to add digits, writing every running total: "3+4+5=" wants "7,12.". The
model first sees some solved problems, then learns from rewards alone. With `both`, two
learners begin with the same weights and take turns, step by step, so that the seconds
of their rollouts can be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from er_jax.integrations.tunix import ErJaxRollout

LETTERS = "0123456789+=,"
PAD, STOP = 0, 1


class Letters:
    """A tokenizer of one id a letter; "." is the id that ends a completion."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return [STOP if letter == "." else 2 + LETTERS.index(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return "".join(LETTERS[i - 2] if i > 1 else "" for i in ids)

    def bos_id(self) -> int:
        """Return 0: there is no id that begins a text."""
        return 0

    def eos_id(self) -> int:
        """Return the id that ends a completion."""
        return STOP

    def pad_id(self) -> int:
        """Return the id of padding."""
        return PAD


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the run: the task, the model, and the training."""

    most_digits: int = 10
    warm_up_steps: int = 250
    warm_up_batch: int = 32
    steps: int = 20
    prompts: int = 16
    generations: int = 8
    new_tokens: int = 40
    learning_rate: float = 1e-3
    dim: int = 96
    layers: int = 2
    seed: int = 0


def problem(rng: np.random.Generator, most_digits: int) -> tuple[str, str]:
    """Return a problem and its solution; most problems are short, some are long."""
    count = 2 + min(int(rng.geometric(0.3)) - 1, most_digits - 2)
    digits = rng.integers(0, 10, count)
    totals = np.cumsum(digits)[1:]
    return "+".join(map(str, digits)) + "=", ",".join(map(str, totals)) + "."


def rewards_of(
    prompts: list[str], completions: list[str], **unused: Any
) -> list[float]:
    """Return the share of the running totals that are right, up to the first wrong."""
    del unused
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        digits = np.array([int(x) for x in re.findall(r"\d", prompt)])
        wanted = [str(x) for x in np.cumsum(digits)[1:]]
        given = completion.split(",")
        right = 0
        while right < min(len(wanted), len(given)) and given[right] == wanted[right]:
            right += 1
        found.append(right / max(len(wanted), len(given)))
    return found


def new_model(settings: Settings) -> qwen3.Qwen3:
    """Return a model with random weights."""
    config = qwen3.ModelConfig(
        num_layers=settings.layers,
        vocab_size=len(LETTERS) + 2,
        embed_dim=settings.dim,
        hidden_dim=3 * settings.dim,
        num_heads=4,
        head_dim=32,
        num_kv_heads=2,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=False,
    )
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(settings.seed))
    # Tunix's kernels begin at zero, for checkpoints to be loaded into.
    rng = np.random.default_rng(settings.seed)

    def drawn(x: jax.Array) -> jax.Array:
        if x.ndim < 2:
            return x
        scale = np.prod(x.shape[:1] if x.shape[0] == settings.dim else x.shape[:-1])
        return jnp.asarray(rng.standard_normal(x.shape) * scale**-0.5, x.dtype)

    nnx.update(model, jax.tree.map(drawn, nnx.state(model, nnx.Param)))
    return model


def warm_up(model: qwen3.Qwen3, settings: Settings) -> None:
    """Show solved problems to the model, for some steps of supervised training."""
    graphdef, state = nnx.split(model)
    optimizer = optax.adam(2e-3)
    rng, letters = np.random.default_rng(settings.seed), Letters()
    width = 2 * settings.most_digits + settings.new_tokens

    def batch() -> tuple[np.ndarray, np.ndarray]:
        tokens = np.full((settings.warm_up_batch, width), PAD, np.int32)
        is_solution = np.zeros((settings.warm_up_batch, width), bool)
        for row in range(settings.warm_up_batch):
            question, answer = problem(rng, settings.most_digits)
            ids = letters.encode(question + answer)
            tokens[row, : len(ids)] = ids
            is_solution[row, len(question) : len(ids)] = True
        return tokens, is_solution

    @jax.jit
    def step(
        state: Any, moments: Any, tokens: jax.Array, mask: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        def loss(state: Any) -> jax.Array:
            places = jnp.broadcast_to(jnp.arange(width - 1), tokens[:, 1:].shape)
            causal = jnp.tril(jnp.ones((width - 1, width - 1), bool))[None]
            logits, _ = nnx.merge(graphdef, state)(tokens[:, :-1], places, None, causal)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            )
            return jnp.sum(losses * mask[:, 1:]) / jnp.sum(mask[:, 1:])

        value, gradient = jax.value_and_grad(loss)(state)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(state, updates), moments, value

    moments = optimizer.init(state)
    bar = tqdm(range(settings.warm_up_steps), desc="warm-up")
    for _ in bar:
        state, moments, value = step(state, moments, *batch())
        bar.set_postfix(loss=f"{float(value):.3f}")
    nnx.update(model, state)


class Turns:
    """Lets several learners take turns: each pulls its next step in its turn only."""

    def __init__(self, count: int) -> None:
        self._turn, self._active = 0, set(range(count))
        self._changed = threading.Condition()

    def steps(self, index: int, steps: list[Any]) -> Iterator[Any]:
        """Yield the steps of a learner, each when it is its turn."""
        try:
            for step in steps:
                with self._changed:
                    self._changed.wait_for(lambda: self._turn == index)
                yield step
                self._pass_on(index)
        finally:
            self._active.discard(index)
            self._pass_on(index)

    def _pass_on(self, index: int) -> None:
        with self._changed:
            later = sorted(i for i in self._active if i > index)
            if self._turn == index:
                self._turn = (later + sorted(self._active) + [index])[0]
            self._changed.notify_all()


def train(
    name: str,
    engine: Any,
    model: qwen3.Qwen3,
    steps: Iterator[dict[str, Any]],
    settings: Settings,
) -> dict[str, Any]:
    """Train a copy of the model with a rollout engine; return what happened.

    Returns:
      The mean reward and the seconds of the rollout of every step.
    """
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=nnx.clone(model),
        reference=nnx.clone(model),
        tokenizer=Letters(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine=engine,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adam(settings.learning_rate),
                eval_every_n_steps=settings.steps + 1,
                max_steps=settings.steps,
                mini_batch_size=settings.prompts,
                train_micro_batch_size=settings.prompts,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=settings.new_tokens,
                max_prompt_length=2 * settings.most_digits,
                kv_cache_size=2 * settings.most_digits + settings.new_tokens,
                temperature=1.0,
            ),
        ),
    )
    record: dict[str, Any] = {"reward": [], "rollout_s": [], "tokens": []}
    bar = tqdm(total=settings.steps, desc=name)
    cluster.rollout.generate = timed(cluster.rollout.generate, record)

    def reward(prompts: list[str], completions: list[str], **also: Any) -> list[float]:
        found = rewards_of(prompts, completions, **also)
        record["reward"].append(float(np.mean(found)))
        bar.update()
        bar.set_postfix(reward=f"{np.mean(found):.3f}")
        return found

    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        reward_fns=reward,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=settings.generations, beta=0.0
        ),
    )
    learner.train(steps)
    bar.close()
    return record


def timed(generate: Callable[..., Any], record: dict[str, Any]) -> Callable[..., Any]:
    """Return `generate` with its seconds and tokens noted down."""

    def run(prompts: list[str], *arguments: Any, **also: Any) -> Any:
        start = time.perf_counter()
        out = generate(prompts, *arguments, **also)
        record["rollout_s"].append(time.perf_counter() - start)
        record["tokens"].append(int(sum(len(tokens) for tokens in out.tokens)))
        return out

    return run


def engines() -> dict[str, Any]:
    """Return what `rollout_engine` may be, by name."""
    return {
        "vanilla": "vanilla",
        "er_jax": functools.partial(ErJaxRollout, max_slots=128),
    }


def run(chosen: dict[str, Any], settings: Settings) -> dict[str, dict[str, Any]]:
    """Train with every engine, taking turns; return their records by name."""
    model = new_model(settings)
    warm_up(model, settings)
    rng = np.random.default_rng(settings.seed + 1)
    # The same problems in every step, so that rewards of steps can be compared.
    texts = [problem(rng, settings.most_digits)[0] for _ in range(settings.prompts)]
    steps = [{"prompts": np.array(texts)} for _ in range(settings.steps)]
    turns = Turns(len(chosen))
    records: dict[str, dict[str, Any]] = {}

    def one(index: int, name: str) -> None:
        own = turns.steps(index, steps)
        records[name] = train(name, chosen[name], model, own, settings)

    threads = [
        threading.Thread(target=one, args=(index, name))
        for index, name in enumerate(chosen)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: records[name] for name in chosen}


def summary(records: dict[str, dict[str, Any]]) -> str:
    """Return the comparison as a table.

    Compilation is what all rollouts took beyond as many times their median.
    """
    lines = [
        "engine     reward, first 5 and last 5 steps   median rollout   compilation   "
        "tokens/s"
    ]
    for name, record in records.items():
        reward, seconds = record["reward"], record["rollout_s"]
        median = statistics.median(seconds)
        lines.append(
            f"{name:<10} {np.mean(reward[:5]):>15.3f} {np.mean(reward[-5:]):>15.3f}"
            f"{median:>17.3f} s{sum(seconds) - median * len(seconds):>12.1f} s"
            f"{statistics.median(record['tokens']) / median:>11.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, show progress, print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--engine", choices=["vanilla", "er_jax", "both"], default="er_jax"
    )
    for field in dataclasses.fields(Settings):
        kind = type(field.default)
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=field.default)
    args = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(args, name) for name in names})
    known = engines()
    chosen = known if args.engine == "both" else {args.engine: known[args.engine]}
    print(summary(run(chosen, settings)))


if __name__ == "__main__":
    main()
