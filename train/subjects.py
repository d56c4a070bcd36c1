"""Subjects: what a run trains, and on what.

A subject is everything that is fixed before the first step: tokenizer, problems,
policy, reward, and the source of the first parameters. There are two: the demo, and a
Hugging Face checkpoint with a file of problems.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any, Protocol

import jax
from tqdm import tqdm

import er_jax
from er_jax.io.hf_weights import policy_of
from er_jax.io.text import load_tokenizer
from train import rewards, sft, tasks
from train.batching import Buckets
from train.config import BaseConfig, HFConfig, RunConfig
from train.metrics import MetricsFile
from train.placement import Placement
from train.settings import require
from train.tasks import EOS, AnyTokenizer, Problem


class Subject(Protocol):
    """What a run trains, and on what.

    Attributes:
      tokenizer: of the policy.
      problems: by the names "train" and "eval", of which neither is empty; there may be
        more.
      policy: the model.
      stop_token_ids: token ids that end a completion.
      reward: the function that scores completions.
    """

    tokenizer: AnyTokenizer
    problems: dict[str, list[Problem]]
    policy: er_jax.Decoder
    stop_token_ids: tuple[int, ...]
    reward: rewards.Reward

    def first_params(self, key: jax.Array, buckets: Buckets, log: MetricsFile) -> Any:
        """Return the parameters of step 0.

        Args:
          key: of what is random. buckets: shapes of an update. log: for records of how
            they were made.
        """
        ...


class Demo:
    """A small decoder that learns arithmetic, warmed up on written-out solutions."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.characters = tasks.Tokenizer()
        self.tokenizer: AnyTokenizer = self.characters
        self.problems = self._load_problems()
        self.policy = config.model.decoder(self.characters.vocab_size, config.dtype)
        self.stop_token_ids: tuple[int, ...] = (EOS,)
        self.reward: rewards.Reward = functools.partial(
            tasks.reward, format_bonus=config.grpo.format_bonus
        )

    def _load_problems(self) -> dict[str, list[Problem]]:
        config = self.config
        made = tasks.make_arithmetic(config.task, config.seed)
        if config.data is None:
            return made
        problems = tasks.read_jsonl(config.data, self.tokenizer)
        train, held_out = split(
            problems, config.data, config.task.num_eval, config.seed
        )
        warmup = [p for p in train if p.solution is not None] or made["warmup"]
        return {"warmup": warmup, "train": train, "eval": held_out}

    def first_params(self, key: jax.Array, buckets: Buckets, log: MetricsFile) -> Any:
        """Return parameters trained on the written-out solutions."""
        held_out = sft.examples_of(self.problems["eval"], self.characters)
        train = sft.examples_of(self.problems["warmup"], self.characters)
        # Without solutions in the data file, generated ones decide when to stop.
        held_out = held_out or train[: self.config.task.num_eval]
        config = self.config.sft
        with tqdm(total=config.max_steps, desc="warm-up", unit="step") as bar:

            def on_check(record: dict[str, Any]) -> None:
                bar.update(record["step"] - bar.n)
                chance = record["solution_chance"]
                bar.set_postfix(loss=f"{record['loss']:.3f}", solved=f"{chance:.2f}")
                timing = {"seconds": record.pop("seconds")}
                log.append({"kind": "warmup", **record, "timing": timing})

            params, _ = sft.warm_up(
                self.policy,
                self.policy.init(key),
                train,
                held_out,
                config=config,
                buckets=buckets.up_to(max(e.length for e in (*train, *held_out))),
                seed=self.config.seed,
                on_check=on_check,
            )
        return params


class Checkpoint:
    """A Hugging Face checkpoint, and a file of problems."""

    def __init__(self, config: HFConfig) -> None:
        self.directory = config.model
        self.mesh = Placement.of(config.mesh).mesh
        self.policy = policy_of(config.model, config.dtype)
        tokenizer = load_tokenizer(config.model)
        require(
            tokenizer.vocab_size <= self.policy.vocab_size,
            "model",
            str(config.model),
            f"its tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{self.policy.vocab_size}; give the model its own tokenizer",
        )
        self.tokenizer: AnyTokenizer = tokenizer
        self.stop_token_ids = tokenizer.stop_token_ids
        self.reward = rewards.reward_of(config.reward)
        room, max_new = self.policy.max_length, config.grpo.max_new_tokens
        if room is not None:
            room -= max_new
            require(
                room > 0,
                "max_new_tokens",
                max_new,
                f"the model has {self.policy.max_length} positions; leave some of them "
                "for prompts",
            )
        problems = tasks.read_jsonl(config.data, tokenizer, max_prompt=room)
        train, held_out = split(problems, config.data, config.num_eval, config.seed)
        self.problems = {"train": train, "eval": held_out}

    def first_params(self, key: jax.Array, buckets: Buckets, log: MetricsFile) -> Any:
        """Return the checkpoint's parameters."""
        del key, buckets, log
        dtype = self.policy.config.dtype
        return er_jax.load_hf(
            self.directory, dtype=dtype, mesh=self.mesh, progress=True
        )[1]


def subject_of(config: BaseConfig) -> Subject:
    """Load the subject of a run.

    Raises:
      ValueError: bad data, a checkpoint that is not supported, or a reward that does
        not exist.
    """
    if isinstance(config, HFConfig):
        return Checkpoint(config)
    assert isinstance(config, RunConfig)
    return Demo(config)


def split(
    problems: list[Problem], path: Path, most: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Hold out a random tenth of the different prompts, and at most `most` of them.

    Args:
      problems: all of a data file. path: that file, for the error.
      most: prompts held out. seed: of the choice.
    Returns:
      The problems to train on, and one problem for each held-out prompt.
    Raises:
      ValueError: there are fewer than two different prompts.
    """
    prompts = list(dict.fromkeys(problem.prompt for problem in problems))
    if len(prompts) < 2:
        raise ValueError(
            f"data={str(path)!r} has one prompt only; one is held out and one trained "
            "on, so give at least two"
        )
    random.Random(f"held out {seed}").shuffle(prompts)
    held_out = set(prompts[: min(most, -(-len(prompts) // 10))])
    train = [p for p in problems if p.prompt not in held_out]
    evals = {p.prompt: p for p in problems if p.prompt in held_out}
    return train, list(evals.values())
