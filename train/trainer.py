"""GRPO step by step: sample completions, score them, update the policy, log.

One step samples n completions of each of P prompts with `er_jax.rollout`, scores them,
turns scores into group-relative advantages, and takes clipped policy-gradient steps
against the log-probabilities that the rollout itself reports. Nothing here knows about
speculation: it changes the time a rollout takes and nothing else.

Left out: value functions; files and checkpoints, which are `run`'s.

Source: Shao et al. 2024 (arXiv 2402.03300); see `losses` for the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import er_jax
from er_jax.engine.digests import tree_digest
from train import completions, losses, partial, tasks, tools
from train.batching import Buckets, Example, stack_chunks
from train.completions import StepData
from train.config import BaseConfig
from train.controllers import RuleController
from train.digests import text_digest
from train.metrics import MetricsFile, quantiles
from train.placement import Placement, is_first
from train.subjects import Subject, subject_of
from train.tasks import Problem
from train.trained import trained_part
from train.update import TrainState, derive, first_opt_state, make_optimizer, update


@dataclasses.dataclass
class Trainer:
    """A policy in training. Steps change its state and its controller, nothing else.

    Attributes:
      config: of the run.
      subject: the policy, its data and its reward.
      placement: where arrays lie.
      buckets: shapes of the update.
      controller: of the rollouts, kept from step to step.
      tool: what the policy may call; None if nothing.
      log: the file that records go to.
      state: None until `start_from` or `set_state`.
      ref_params: the policy of step 0; None when the loss has no KL term, or if the
        policy has low-rank pairs.
      reference_digest: of `ref_params`.
      carried: with partial rollouts, the completions that the next step goes on with;
        None before the first step.
    """

    config: BaseConfig
    subject: Subject
    placement: Placement
    buckets: Buckets
    controller: er_jax.Controller
    log: MetricsFile
    state: Any = None
    ref_params: Any = None
    reference_digest: str | None = None
    carried: er_jax.Rollout | None = None
    tool: tools.Use | None = None

    @classmethod
    def of(cls, config: BaseConfig) -> Trainer:
        """Load the data and decide shapes and devices. Writes nothing.

        Raises:
          ValueError: bad data, as `subject_of`; no such tool; impossible buckets or an
            impossible mesh.
        """
        subject = subject_of(config)
        longest = max(
            len(subject.tokenizer.encode_prompt(problem.prompt))
            for name in ("train", "eval")
            for problem in subject.problems[name]
        )
        grpo = config.grpo
        placement = Placement.of(config.mesh)
        buckets = Buckets(
            grpo.bucket_lengths, grpo.chunk_tokens, placement.num_row_groups
        ).up_to(longest + grpo.max_new_tokens - 1)
        _shapes(subject.policy, config)  # checks the targets of low-rank pairs
        kind = RuleController if config.reproducible else er_jax.Controller
        return cls(
            config=config,
            subject=subject,
            placement=placement,
            buckets=buckets,
            controller=kind(config.control, config.rollout_config(group_size=2).gammas),
            log=MetricsFile(config.out / "metrics.jsonl", writes=is_first()),
            tool=tools.use_of(config.tool, subject.tokenizer),
        )

    @property
    def policy(self) -> er_jax.Decoder:
        """The model that is trained."""
        return self.subject.policy

    @property
    def problems(self) -> dict[str, list[Problem]]:
        """The "train" and "eval" problems; the demo's "warmup" too."""
        return self.subject.problems

    @functools.cached_property
    def data_digest(self) -> str:
        """Hex digits that change when any problem does."""
        lines = [
            dataclasses.astuple(p) for name in self.problems.values() for p in name
        ]
        return text_digest(lines)

    @functools.cached_property
    def drafter(self) -> er_jax.DrafterConfig:
        """How the draft is made: the rollout's default."""
        return self.config.rollout_config(group_size=2).drafters[0]

    @functools.cached_property
    def keys(self) -> dict[str, jax.Array]:
        """The run's random keys by purpose: "init", "rollout" and "eval"."""
        names = ("init", "rollout", "eval")
        split = jax.random.split(jax.random.key(self.config.seed), len(names))
        return dict(zip(names, split, strict=True))

    # -- where the state comes from

    def first_params(self) -> Any:
        """Return the parameters of step 0, as the subject makes or loads them."""
        return self.subject.first_params(self.keys["init"], self.buckets, self.log)

    def start_from(self, params: Any) -> None:
        """Begin at step 0 with these parameters, which the trainer takes over.

        They get low-rank pairs, if the config says so.
        """
        params = self.config.lora.added(params, self._lora_key)
        params = self.placement.put(self.policy, params)
        if self.config.grpo.kl_coef > 0 and not self.config.lora.rank:
            self.ref_params = jax.tree.map(jnp.copy, params)  # `update` donates params
            self.reference_digest = tree_digest(params)
        self.set_state(
            params,
            opt_state=self._first_opt_state(params),
            key=self._rollout_key,
            step=0,
            position=0,
        )

    def set_state(
        self, params: Any, *, opt_state: Any, key: Any, step: int, position: int
    ) -> None:
        """Begin at any step: the draft is derived, all else is given.

        Args: as the fields of `TrainState`; `params` without a draft.
        """
        policy_and_draft, gathered = derive(
            self.policy, params, drafter=self.drafter, placement=self.placement
        )
        self.state = TrainState(
            params=policy_and_draft,
            opt_state=opt_state,
            key=key,
            step=np.int32(step),
            position=np.int32(position),
            gathered=gathered,
        )

    def shapes(self) -> tuple[Any, dict[str, Any]]:
        """Return shapes and shardings of `set_state`'s arrays, which a restore needs.

        Returns:
          Those of `params`, and those of "opt_state" and "key" by name.
        """
        placement = self.placement
        params = _shapes(self.policy, self.config)
        opt_state = placement.shaped_optimizer(
            self.policy,
            make_optimizer(self.config.grpo),
            jax.eval_shape(self._first_opt_state, params),
            trained_part(params),
        )
        items = {
            "opt_state": opt_state,
            "key": placement.shaped_whole(self._rollout_key),
        }
        return placement.shaped(self.policy, params), items

    @property
    def _lora_key(self) -> jax.Array:
        # Not one more of `keys`, which would change all of these.
        return jax.random.fold_in(self.keys["init"], 1)

    @property
    def _rollout_key(self) -> np.ndarray:
        return np.asarray(jax.random.key_data(self.keys["rollout"]))

    def _first_opt_state(self, params: Any) -> Any:
        return first_opt_state(self.policy, params, self.config.grpo, self.placement)

    # -- steps

    def sample(
        self,
        problems: Sequence[Problem],
        *,
        n: int,
        key: jax.Array,
        first_sequence_id: int,
        journal: Path | None = None,
    ) -> tuple[er_jax.Rollout, np.ndarray]:
        """Sample n completions of every problem and score them.

        Args:
          problems: P of them. n: completions of each. key: of the sampling.
          first_sequence_id: of the first completion; the others follow.
          journal: a file that the sampling goes on from after a kill.
        Returns:
          The rollout, and rewards `[P, n]` float64.
        """
        sample: Any = er_jax.rollout
        if self.config.mesh.replicas:
            sample = er_jax.rollout_replicas
        elif self.config.grpo.stream:
            sample = er_jax.stream
        if journal is not None:
            sample = functools.partial(sample, journal=journal)
        ids = range(first_sequence_id, first_sequence_id + len(problems) * n)
        found = _called(self, sample, problems, n=n, key=key, sequence_ids=ids)
        if isinstance(found, er_jax.Stream):
            return completions.score_stream(
                self.subject, problems, found, n=n, first_sequence_id=first_sequence_id
            )
        return found, completions.score(self.subject, problems, found)

    def evaluate(self) -> dict[str, Any]:
        """Sample the held-out problems, log the mean reward and return the record.

        Every evaluation uses the same noise, so that the rewards of two policies differ
        by less chance.
        """
        start = time.perf_counter()
        out, rewards = self.sample(
            self.problems["eval"],
            n=self.config.eval_samples,
            key=self.keys["eval"],
            first_sequence_id=0,
        )
        record = {
            "kind": "eval",
            "step": int(self.state.step),
            "reward": float(rewards.mean()),
            "num_completions": int(rewards.size),
            "length": quantiles(out.lengths),
            "timing": {"seconds": time.perf_counter() - start},
        }
        self.log.append(record)
        return record

    def rollout_step(self, journal: Path | None = None) -> StepData:
        """Sample and score the next prompts; changes the controller only.

        Args:
          journal: a file that the sampling goes on from after a kill.
        """
        grpo, position = self.config.grpo, int(self.state.position)
        start = time.perf_counter()
        if grpo.partial.is_on:
            data = self._partial_step(journal)
            return dataclasses.replace(data, seconds=time.perf_counter() - start)
        problems = self._problems(range(position, position + grpo.prompts_per_step))
        out, rewards = self.sample(
            problems,
            n=grpo.group_size,
            key=self.state.key,
            first_sequence_id=position * grpo.group_size,
            journal=journal,
        )
        seconds = time.perf_counter() - start
        return StepData(problems=problems, out=out, rewards=rewards, seconds=seconds)

    def _partial_step(self, journal: Path | None) -> StepData:
        """Go on with what is carried and begin new prompts, until enough is complete.

        Returns:
          The step's data, without its seconds.
        """
        grpo, n = self.config.grpo, self.config.grpo.group_size
        step, position = int(self.state.step), int(self.state.position)
        carried, named = self.carried, {}
        places = [] if carried is None else partial.positions_of(carried, n)
        num_new = grpo.prompts_in_work - len(places)
        places += range(position, position + num_new)
        problems = self._problems(places)
        ids = [place * n + number for place in places for number in range(n)]
        if carried is not None:
            encode = self.subject.tokenizer.encode_prompt
            prompts = [encode(problem.prompt) for problem in problems]
            named["resume"] = carried.for_request(prompts, ids)
        out = _called(
            self,
            er_jax.rollout,
            problems,
            n=n,
            key=self.state.key,
            sequence_ids=ids,
            version=step,
            journal=journal,
            **partial.Ending(carried, step, grpo).arguments,
            **named,
        )
        learnt, own, others = partial.divided(out, grpo)
        problems = [problems[group] for group in learnt]
        rewards = completions.score(self.subject, problems, own)
        return StepData(problems, own, rewards, seconds=0.0, carried=others)

    def _problems(self, places: Iterable[int]) -> list[Problem]:
        """Return the problems at some places of the data stream."""
        train, seed = self.problems["train"], self.config.seed
        return [tasks.problem_at(train, place, seed) for place in places]

    def learn(self, data: StepData) -> dict[str, Any]:
        """Update the policy with a step's completions; log and return the record.

        Raises:
          FloatingPointError: the loss is not finite.
        """
        grpo = self.config.grpo
        encode = self.subject.tokenizer.encode_prompt
        examples = completions.examples_of(
            data.out,
            [encode(problem.prompt) for problem in data.problems],
            losses.group_advantages(data.rewards, scale=grpo.scale_advantages),
            keep_equal_groups=grpo.kl_coef > 0,
            step=None if data.carried is None else int(self.state.step),
        )
        start = time.perf_counter()
        infos = self._update(examples)
        update_s = time.perf_counter() - start
        # What is taken from the stream is learnt from or carried.
        num_taken = grpo.prompts_per_step
        for out, sign in ((data.carried, 1), (self.carried, -1)):
            if out is not None:
                num_taken += sign * len(out.lengths) // grpo.group_size
        self.carried = data.carried
        self.state = self.state.replace(
            step=np.int32(int(self.state.step) + 1),
            position=np.int32(int(self.state.position) + num_taken),
        )
        record = step_record(self.state, data, infos, update_s)
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(
                f"the loss of step {record['step']} is {record['loss']}; lower "
                "grpo.learning_rate and --resume from the last checkpoint"
            )
        self.log.append(record)
        return record

    def _update(self, examples: Sequence[Example]) -> list[dict[str, float]]:
        """Take the updates of one step; return the info of each, as numbers."""
        grpo = self.config.grpo
        chunks = stack_chunks(examples, self.buckets, grpo.num_completions)
        infos = []
        for _ in range(grpo.updates_per_step):
            self.state, info = update(
                self.policy,
                make_optimizer(grpo),
                self.state,
                self.ref_params,
                chunks,
                np.float32(grpo.num_completions),
                config=self.config.rollout_config(group_size=grpo.group_size),
                options=grpo.loss,
                drafter=self.drafter,
                placement=self.placement,
            )
            infos.append({name: float(value) for name, value in info.items()})
        return infos


def _called(
    trainer: Trainer,
    sample: Callable[..., Any],
    problems: Sequence[Problem],
    *,
    n: int,
    **named: Any,
) -> Any:
    """Call a function like `er_jax.rollout` with the policy of now; return its result.

    Args:
      trainer: has the policy. sample: what to call.
      problems: P of them. n: completions of each. named: further arguments.
    """
    encode = trainer.subject.tokenizer.encode_prompt
    stops = trainer.subject.stop_token_ids
    if trainer.tool is not None:
        stops += trainer.tool.call_ids
        named["respond"] = trainer.tool.respond
    return sample(
        trainer.policy,
        trainer.placement.sampler(trainer.state.params, trainer.state.gathered),
        [encode(problem.prompt) for problem in problems],
        config=trainer.config.rollout_config(group_size=n, stop_token_ids=stops),
        controller=trainer.controller,
        mesh=trainer.placement.sampling,
        **named,
    )


def _shapes(policy: er_jax.Decoder, config: BaseConfig) -> Any:
    """Return the shapes of the parameters that a run trains."""
    return jax.eval_shape(
        lambda key: config.lora.added(policy.init(key), key), jax.random.key(0)
    )


def step_record(
    state: TrainState,
    data: StepData,
    infos: Sequence[dict[str, float]],
    update_s: float,
) -> dict[str, Any]:
    """Return what is logged of a step; docs/training.md explains the fields.

    Args:
      state: after the step. data: what it sampled.
      infos: of each of its updates, as `update` returns them.
      update_s: seconds that the updates took.
    """
    stats = data.out.stats
    found = {
        "kind": "step",
        "step": int(state.step),
        "reward": float(data.rewards.mean()),
        "mixed_groups": float(np.mean(np.ptp(data.rewards, axis=1) > 0)),
        "loss": infos[-1]["loss"],
        "kl": infos[-1]["kl"],
        "clip_fraction": infos[-1]["clip_fraction"],
        "grad_norm": infos[-1]["grad_norm"],
        # Of the first update: the later ones no longer have the rollout's parameters.
        "logprob_gap": infos[0]["logprob_gap"],
        "mean_logprob_gap": infos[0]["mean_logprob_gap"],
        "disagreed": infos[0]["disagreed"],
        "length": quantiles(data.out.lengths),
        "num_tokens": int(data.out.lengths.sum()),
        "position": int(state.position),
        "params_digest": tree_digest(trained_part(state.params.policy)),
        "timing": {
            "rollout_s": data.seconds,
            "update_s": update_s,
            "rollout_compile_s": stats.seconds["compile"],
            "tokens_by_gamma": {str(g): n for g, n in sorted(stats.tokens.items())},
            "kept_by_gamma": {
                str(gamma): round(stats.keep_rate(gamma), 4)
                for gamma in sorted(stats.tokens)
                if gamma
            },
        },
    }
    if data.carried is not None:
        found |= partial.record_of(data.out, data.carried, int(state.step) - 1)
    return found
