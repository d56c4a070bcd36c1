"""GRPO on verifiable rewards: sample, score, update, again.

    python -m train.grpo arithmetic      # the reported demo, a few minutes on 2 cores
    python -m train.grpo tiny            # the same in seconds, for trying things out
    python -m train.grpo hf --model DIR --data FILE.jsonl    # a checkpoint, your data

One step samples n completions of each of P prompts with `er_jax.rollout`, scores them,
turns scores into group-relative advantages, and takes clipped policy-gradient steps
against the log-probabilities the rollout itself reports. The draft is requantized
inside the jit of the update, so the next rollout speculates with the newest weights.
Nothing here knows about speculation: its effect is the rollout's time and nothing else.

Left out: value functions. Where arrays lie, on one device or many, is `placement`'s.

Source: Shao et al. 2024 (arXiv 2402.03300); see `losses` for the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import struct
from tqdm import tqdm

import er_jax
from train import losses, metrics, rewards, tasks
from train.batching import Buckets, Chunks, Example, stack_chunks
from train.checkpoints import (
    DIRECTORY,
    Checkpoints,
    NoRunError,
    check_same_config,
    set_aside_after,
)
from train.config import BaseConfig, GRPOConfig, HFConfig, to_json
from train.controllers import RuleController
from train.files import replace_text, writing
from train.losses import PolicyLoss
from train.placement import Placement, agreed, is_first, join, on_host
from train.subjects import Subject, subject_of
from train.tasks import Problem


@struct.dataclass
class TrainState:
    """What one step hands to the next.

    Attributes:
      params: the policy and its draft; optimizer and checkpoints see `.policy` only.
      opt_state: of the optimizer, for `params.policy`.
      key: uint32 `[2]`, key data of the run's noise. Never split: completions are told
        apart by sequence id, which no other completion of the run shares.
      step: int32 `[]`, GRPO steps done.
      position: int32 `[]`, problems taken from the data stream.
      gathered: the policy as rollouts have it on a mesh, where that is another
        sharding; else None.
    """

    params: er_jax.PolicyParams
    opt_state: optax.OptState
    key: Any
    step: Any
    position: Any
    gathered: Any = None


ONE_DEVICE = Placement()

# Characters of a prompt or a completion in a message.
MOST_SHOWN = 200


@functools.lru_cache
def make_optimizer(config: GRPOConfig) -> optax.GradientTransformation:
    """Return clipped Adam; one object per config: jit compares it by identity."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm), optax.adam(config.learning_rate)
    )


# keep_unused: the old draft is not read, but its buffers are where the new one goes.
@functools.partial(
    jax.jit,
    static_argnames=("policy", "optimizer", "options", "drafter", "placement"),
    donate_argnames="state",
    keep_unused=True,
)
def update(
    policy: er_jax.Policy,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    ref_params: Any,
    chunks: tuple[Chunks, ...],
    temperature: jax.Array,
    num_completions: jax.Array,
    *,
    options: PolicyLoss,
    drafter: er_jax.DrafterConfig,
    placement: Placement = ONE_DEVICE,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one optimizer step on the mean loss of the completions; refresh the draft.

    Args:
      policy, optimizer: what to update and how.
      state: donated, the old draft included. `step` and `position` are left alone.
      ref_params: the reference policy; None when `options.kl_coef` is 0.
      chunks: all completions of the step, by bucket.
      temperature: float32 `[]`, of the rollout.
      num_completions: float32 `[]`, N.
      options: the loss. drafter: how the draft is made. placement: where arrays lie.
    Returns:
      state: with new parameters, optimizer state and draft.
      info: "loss" and "kl" in nats per token, "clip_fraction" of tokens, "grad_norm"
        before clipping, and "logprob_gap", the largest difference between the
        rollout's log-probabilities and those of this update's forward pass.
    """

    def loss_fn(params: Any, batch: Any) -> Any:
        return losses.policy_loss(
            policy, params, ref_params, batch, temperature, options
        )

    params = state.params.policy
    first = jax.tree.map(lambda leaf: leaf[0], chunks[0].batch)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(jax.value_and_grad(loss_fn, has_aux=True), params, first),
    )

    def add_chunk(index: jax.Array, total: Any, *, batch: Any) -> Any:
        one = placement.rows(jax.tree.map(lambda leaf: leaf[index], batch))
        (loss, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, one)
        (total_loss, total_info), total_grads = total
        gap = jnp.maximum(info["logprob_gap"], total_info["logprob_gap"])
        info = jax.tree.map(jnp.add, info, total_info) | {"logprob_gap": gap}
        grads = placement.trained(policy, jax.tree.map(jnp.add, grads, total_grads))
        return (loss + total_loss, info), grads

    total = zeros
    for bucket in chunks:
        body = functools.partial(add_chunk, batch=bucket.batch)
        total = jax.lax.fori_loop(0, bucket.num_chunks, body, total)
    (loss, sums), grads = total

    def mean(value: jax.Array) -> jax.Array:
        return value / num_completions.astype(value.dtype)

    grads = jax.tree.map(mean, grads)
    with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to an int count
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
    params = placement.trained(policy, optax.apply_updates(params, updates))
    opt_state = placement.optimized(policy, optimizer, opt_state, params)
    pair, gathered = placement.drafted(policy, params, drafter)
    info = {
        "loss": mean(loss),
        "kl": mean(sums["kl"]),
        "clip_fraction": mean(sums["clipped"]),
        "grad_norm": optax.tree.norm(grads),
        "logprob_gap": sums["logprob_gap"],
    }
    state = dataclasses.replace(
        state, params=pair, opt_state=opt_state, gathered=gathered
    )
    return state, info


# The same refresh on its own, for the first step.
refresh = jax.jit(er_jax.attach_draft, static_argnames="config")


@dataclasses.dataclass(frozen=True)
class StepData:
    """What one step sampled.

    Attributes:
      problems: P of them. out: the rollout, N = P * n completions.
      rewards: `[P, n]` float64. seconds: sampling and scoring took.
    """

    problems: Sequence[Problem]
    out: er_jax.Rollout
    rewards: np.ndarray
    seconds: float


@dataclasses.dataclass
class Trainer:
    """A run in progress: what is fixed, and the two that change, state and controller.

    Attributes:
      config: of the run. subject: what it trains, on what.
      placement: where its arrays lie. buckets: shapes of the update.
      controller: of the rollouts, kept from step to step.
      metrics: the file everything is logged to.
      state: None until `begin` or `resume`.
      ref_params: the policy of step 0; None when no KL is asked for.
      reference_digest: of `ref_params`.
    """

    config: BaseConfig
    subject: Subject
    placement: Placement
    buckets: Buckets
    controller: er_jax.Controller
    metrics: metrics.MetricsFile
    state: Any = None
    ref_params: Any = None
    reference_digest: str | None = None

    @classmethod
    def of(cls, config: BaseConfig) -> Trainer:
        """Set a run up: data, policy, shapes, controller. Writes nothing.

        Raises:
          ValueError: as `subject_of`, or buckets or a mesh that cannot be.
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
        kind = RuleController if config.reproducible else er_jax.Controller
        return cls(
            config=config,
            subject=subject,
            placement=placement,
            buckets=buckets,
            controller=kind(config.control, config.rollout_config(group_size=2).gammas),
            metrics=metrics.MetricsFile(
                config.out / "metrics.jsonl", writes=is_first()
            ),
        )

    @property
    def policy(self) -> er_jax.Decoder:
        """What is trained."""
        return self.subject.policy

    @property
    def problems(self) -> dict[str, list[Problem]]:
        """The "train" and "eval" problems; the demo's "warmup" too."""
        return self.subject.problems

    @functools.cached_property
    def drafter(self) -> er_jax.DrafterConfig:
        """How the draft is made: the rollout's default."""
        return self.config.rollout_config(group_size=2).drafter

    @functools.cached_property
    def keys(self) -> dict[str, jax.Array]:
        """The run's random keys by purpose."""
        names = ("init", "rollout", "eval")
        split = jax.random.split(jax.random.key(self.config.seed), len(names))
        return dict(zip(names, split, strict=True))

    @property
    def rollout_key(self) -> np.ndarray:
        """Key data of the run's noise, `TrainState.key`."""
        return np.asarray(jax.random.key_data(self.keys["rollout"]))

    def new_state(self, params: Any) -> TrainState:
        """Return the state of step 0 for these parameters."""
        pair, gathered = self._drafted(params)
        return TrainState(
            params=pair,
            opt_state=self._optimized(params),
            key=self.rollout_key,
            step=np.int32(0),
            position=np.int32(0),
            gathered=gathered,
        )

    @functools.cached_property
    def _drafted(self) -> Any:
        """`Placement.drafted` as one program: what an update does at its end."""
        if self.placement.mesh is None:
            return lambda params: (refresh(params, config=self.drafter), None)
        return jax.jit(
            functools.partial(self.placement.drafted, self.policy, config=self.drafter)
        )

    def _optimized(self, params: Any) -> optax.OptState:
        """The optimizer's first state."""
        optimizer = make_optimizer(self.config.grpo)

        def make(params: Any) -> optax.OptState:
            state = optimizer.init(params)
            return self.placement.optimized(self.policy, optimizer, state, params)

        return make(params) if self.placement.mesh is None else jax.jit(make)(params)

    def first_params(self) -> Any:
        """Return the parameters of step 0."""
        return self.subject.first_params(self.keys["init"], self.buckets, self.metrics)

    def sample(
        self,
        problems: Sequence[Problem],
        *,
        n: int,
        key: jax.Array,
        first_sequence_id: int,
    ) -> tuple[er_jax.Rollout, np.ndarray]:
        """Sample n completions of every problem and score them.

        Of several processes the first one scores: a reward need not be a function.

        Returns:
          The rollout, and rewards `[P, n]` float64.
        """
        tokenizer = self.subject.tokenizer
        sampler = self.placement.sampler(self.state.params, self.state.gathered)
        sample: Any = er_jax.rollout
        if self.config.mesh.replicas:
            sample = er_jax.rollout_replicas
        out = sample(
            self.policy,
            sampler,
            [tokenizer.encode_prompt(problem.prompt) for problem in problems],
            key=key,
            config=self.config.rollout_config(
                group_size=n, stop_token_ids=self.subject.stop_token_ids
            ),
            sequence_ids=range(
                first_sequence_id, first_sequence_id + len(problems) * n
            ),
            controller=self.controller,
            mesh=self.placement.sampling,
        )
        scores, failure = np.zeros(len(out.lengths)), None
        if is_first():
            try:
                scores = self._scores(problems, out, n)
            except ValueError as error:
                failure = error
        # The others are told of a failure, or they would wait for the scores.
        told = agreed(np.append(scores, failure is not None))
        if told[-1]:
            raise failure or ValueError("the first process could not score; see there")
        return out, told[:-1].reshape(len(problems), n)

    def _scores(
        self, problems: Sequence[Problem], out: er_jax.Rollout, n: int
    ) -> np.ndarray:
        """Return the reward of every row; ValueError naming the first without one."""
        scores = np.zeros(len(out.lengths))
        for row, length in enumerate(out.lengths):
            problem = problems[row // n]
            text = self.subject.tokenizer.decode(out.completion_ids[row, :length])
            finished = bool(out.finish_reason[row] == "stop")
            try:
                scores[row] = rewards.score(
                    self.subject.reward, text, problem.answer, finished=finished
                )
            except ValueError as error:
                raise ValueError(
                    f"{error}; completion {row % n + 1} of {n}, {text[:MOST_SHOWN]!r}, "
                    f"of the problem {problem.prompt[:MOST_SHOWN]!r}"
                ) from error
        return scores

    def evaluate(self) -> dict[str, Any]:
        """Sample the held-out problems, log and return the mean reward.

        The noise is the same at every call, so two policies meet the same luck.
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
            "length": metrics.quantiles(out.lengths),
            "timing": {"seconds": time.perf_counter() - start},
        }
        self.metrics.append(record)
        return record

    def rollout_step(self) -> StepData:
        """Sample and score the next prompts; changes the controller only."""
        config, grpo = self.config, self.config.grpo
        position = int(self.state.position)
        taken = range(position, position + grpo.prompts_per_step)
        train = self.problems["train"]
        problems = [tasks.problem_at(train, i, config.seed) for i in taken]
        start = time.perf_counter()
        out, rewards = self.sample(
            problems,
            n=grpo.group_size,
            key=self.state.key,
            first_sequence_id=position * grpo.group_size,
        )
        seconds = time.perf_counter() - start
        return StepData(problems=problems, out=out, rewards=rewards, seconds=seconds)

    def learn(self, data: StepData) -> dict[str, Any]:
        """Update the policy with a step's completions; log and return the record.

        Raises:
          FloatingPointError: the loss is not finite.
        """
        grpo, out, rewards = self.config.grpo, data.out, data.rewards
        advantages = losses.group_advantages(rewards, scale=grpo.scale_advantages)
        encode = self.subject.tokenizer.encode_prompt
        prompts = [encode(problem.prompt) for problem in data.problems]
        examples = [
            Example(
                prompt=prompts[row // grpo.group_size],
                completion=out.completion_ids[row, :length],
                behavior_logprobs=out.logprobs[row, :length],
                advantage=float(advantages.flat[row]),
            )
            for row, length in enumerate(out.lengths)
            # Without a KL, a group of equal rewards has no gradient: half the work
            # saved. Length 0 is a first logit that was not finite.
            if length > 0 and (grpo.kl_coef > 0 or advantages.flat[row] != 0)
        ]

        start = time.perf_counter()
        infos = self._update(examples)
        update_s = time.perf_counter() - start
        self.state = self.state.replace(
            step=np.int32(int(self.state.step) + 1),
            position=np.int32(int(self.state.position) + grpo.prompts_per_step),
        )
        stats = out.stats
        record = {
            "kind": "step",
            "step": int(self.state.step),
            "reward": float(rewards.mean()),
            "mixed_groups": float(np.mean(np.ptp(rewards, axis=1) > 0)),
            "loss": infos[-1]["loss"],
            "kl": infos[-1]["kl"],
            "clip_fraction": infos[-1]["clip_fraction"],
            "grad_norm": infos[-1]["grad_norm"],
            "logprob_gap": infos[0]["logprob_gap"],
            "length": metrics.quantiles(out.lengths),
            "num_tokens": int(out.lengths.sum()),
            "position": int(self.state.position),
            "params_digest": metrics.digest(self.state.params.policy),
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
        if not math.isfinite(infos[-1]["loss"]):
            raise FloatingPointError(
                f"the loss of step {record['step']} is {record['loss']}; lower "
                "grpo.learning_rate and --resume from the last checkpoint"
            )
        self.metrics.append(record)
        return record

    def _update(self, examples: Sequence[Example]) -> list[dict[str, float]]:
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
                np.float32(grpo.temperature),
                np.float32(grpo.num_completions),
                options=grpo.loss,
                drafter=self.drafter,
                placement=self.placement,
            )
            infos.append({name: float(value) for name, value in info.items()})
        return infos

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint of the present step."""
        checkpoints.save(
            int(self.state.step),
            policy=self.state.params.policy,
            trainer=self._trainer_items(self.state),
            host={
                "config": to_json(self.config),
                "data_digest": self.data_digest,
                "position": int(self.state.position),
                "controller": self.controller.state_dict(),
                "reference_digest": self.reference_digest,
            },
        )

    def resume(self) -> bool:
        """Take over the checkpoint that the config names; writes nothing.

        Returns:
          Whether there is one; a run that was killed before its first is to begin.
        Raises:
          FileNotFoundError: there is none of the step that is asked for.
          ValueError: it was made with another config or other data, or it is damaged;
            or there is none, and the metrics tell of one.
        """
        out, step = self.config.out, self.config.resume_step
        try:
            with Checkpoints(out, read_only=True) as checkpoints:
                if checkpoints.latest_step is not None or step is not None:
                    self._take_over(checkpoints, step)
                    return True
        except NoRunError:
            if step is not None:
                raise
        if any(record["kind"] != "warmup" for record in self.metrics.read()):
            raise ValueError(
                f"resume: {self.metrics.path} tells of steps, and there is no "
                f"checkpoint in {out / DIRECTORY}; put it back, or begin anew, without "
                "--resume"
            )
        return False

    def _check_host(self, host: dict[str, Any]) -> None:
        """Raise ValueError where a checkpoint is of another run."""
        check_same_config(host["config"], to_json(self.config))
        if host["data_digest"] != self.data_digest:
            raise ValueError(
                "resume: the contents of data have changed since the checkpoint was "
                "made; give the same file, or another --out"
            )

    def _take_over(self, checkpoints: Checkpoints, step: int | None) -> None:
        shapes = jax.eval_shape(self.policy.init, self.keys["init"])
        place, optimizer = self.placement, make_optimizer(self.config.grpo)
        opt_state = place.shaped_optimizer(
            self.policy, optimizer, jax.eval_shape(self._optimized, shapes), shapes
        )
        shapes = place.shaped(self.policy, shapes)
        saved = checkpoints.restore(
            policy=shapes,
            trainer={
                "opt_state": opt_state,
                "key": place.shaped_whole(self.rollout_key),
            },
            step=step,
            check=self._check_host,
        )
        pair, gathered = self._drafted(saved.policy)
        self.state = TrainState(
            params=pair,
            opt_state=saved.trainer["opt_state"],
            key=saved.trainer["key"],
            step=np.int32(saved.step),
            position=np.int32(saved.host["position"]),
            gathered=gathered,
        )
        self.controller.load_state_dict(saved.host["controller"])
        if self.config.grpo.kl_coef > 0:
            self.reference_digest = saved.host["reference_digest"]
            try:
                self.ref_params = checkpoints.restore_policy(
                    shapes, step=0, digest=self.reference_digest
                )
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(
                    f"{error}; grpo.kl_coef needs the policy of step 0: put it back or "
                    "begin anew, without --resume"
                ) from error

    def write_inputs(self) -> None:
        """Write to `out` what is run, on what."""
        out = self.config.out
        with writing("config and data", out):
            text = json.dumps(to_json(self.config), indent=2)
            replace_text(out / "config.json", text + "\n")
            for name, lines in self.problems.items():
                tasks.write_jsonl(out / "data" / f"{name}.jsonl", lines)

    def begin(self, checkpoints: Checkpoints) -> None:
        """Make the first parameters and save them as step 0."""
        if is_first():
            self.metrics.path.unlink(missing_ok=True)
        self.start_from(self.first_params())
        self.save(checkpoints)

    def start_from(self, params: Any) -> None:
        """Make the state of step 0 from parameters, which it takes over."""
        params = self.placement.put(self.policy, params)
        if self.config.grpo.kl_coef > 0:
            self.ref_params = jax.tree.map(jnp.copy, params)  # `update` donates params
            self.reference_digest = metrics.digest(params)
        self.state = self.new_state(params)

    @staticmethod
    def _trainer_items(state: TrainState) -> dict[str, Any]:
        return {"opt_state": state.opt_state, "key": state.key}

    @functools.cached_property
    def data_digest(self) -> str:
        """Changes when any problem does."""
        lines = [
            dataclasses.astuple(p) for name in self.problems.values() for p in name
        ]
        return metrics.text_digest(lines)


def run(config: BaseConfig) -> list[dict[str, Any]]:
    """Run, or go on with, a whole run and return all lines of its metrics.

    Effects: writes `config.out`, once nothing is left that could be refused. An older
    run found there is moved aside, unless it is resumed.
    Raises:
      ValueError, FileNotFoundError: as `Trainer.of` and `Trainer.resume`.
    """
    start = time.perf_counter()
    trainer = Trainer.of(config)
    is_resumed = config.resume and trainer.resume()
    say: Callable[[str], None] = print if is_first() else lambda _: None
    agreed(0)  # All processes have read what they are about to change.
    if is_first():
        if not config.resume:
            move_aside(config.out)
        trainer.write_inputs()
        if is_resumed:
            step, log = int(trainer.state.step), trainer.metrics
            aside = set_aside_after(config.out, step, log.path)
            if aside is not None:
                say(f"the checkpoints after step {step} are now in {aside}")
            log.cut_after(step)
    agreed(0)  # No other process looks into the directory before.
    sizes = [
        leaf.size
        for leaf in jax.tree.leaves(
            jax.eval_shape(trainer.policy.init, trainer.keys["init"])
        )
    ]
    say(
        f"{sum(sizes) / 1e6:.1f} M parameters, {config.dtype}, "
        f"control {config.control}, {len(trainer.problems['train'])} problems, "
        f"writing to {config.out}"
    )
    rollout = None
    with Checkpoints(config.out) as checkpoints:
        if is_resumed:
            say(f"resumed after step {int(trainer.state.step)}")
        else:
            trainer.begin(checkpoints)
        done = int(trainer.state.step)
        if agreed(all(r["kind"] != "eval" for r in trainer.metrics.read())):
            record = trainer.evaluate()
            say(f"held-out reward before the first step: {record['reward']:.3f}")
        with tqdm(
            total=config.steps, initial=done, desc="GRPO", unit="step",
            file=sys.stderr, disable=not is_first(),
        ) as bar:  # fmt: skip
            for step in range(done + 1, config.steps + 1):
                # The first step compiles.
                is_traced = config.profile is not None and step == done + 2
                with profiled(config.profile if is_traced else None):
                    data = trainer.rollout_step()
                    record, rollout = trainer.learn(data), data.out
                bar.update()
                bar.set_postfix(
                    reward=f"{record['reward']:.2f}", tokens=record["num_tokens"]
                )
                if step % config.save_every == 0 or step == config.steps:
                    if step == config.steps:
                        trainer.evaluate()
                    trainer.save(checkpoints)
    trained = None
    if isinstance(config, HFConfig):
        trained = config.out / f"trained-{int(trainer.state.step)}"
        params = trainer.state.params.policy
        if jax.process_count() > 1:
            params = on_host(params)  # By all: each holds a part.
        if is_first() and not trained.exists():
            with writing("the trained checkpoint", trained):
                er_jax.save_hf(trained, trainer.policy, params)
    records = trainer.metrics.read()
    if is_first():
        report(config, records, time.perf_counter() - start, trained, rollout)
    return records


def report(
    config: BaseConfig,
    records: Sequence[dict[str, Any]],
    seconds: float,
    trained: Path | None,
    rollout: er_jax.Rollout | None,
) -> None:
    """Print and write the summary of a run, and draw its pictures.

    Args:
      config, records: of the run. seconds: that this process took.
      trained: the checkpoint it made for others. rollout: the last one.
    """
    records = [record for record in records if metrics.is_complete(record)]
    text = summary(records, seconds)
    if trained is not None:
        text += f"\nthe trained checkpoint is in {trained}"
    if rollout is not None:
        text += "\nlast rollout: " + rollout.stats.summary()
    print("\n" + text)
    with writing("the summary", config.out):
        replace_text(config.out / "summary.txt", text + "\n")
        try:
            metrics.plot(records, config.out / "metrics.png")
            if rollout is not None:
                rollout.stats.plot(config.out / "rollout.png")
        except ImportError as error:
            print(f"no pictures: {error}")


def profiled(directory: Path | None) -> AbstractContextManager[Any]:
    """Write a trace of what runs inside; None writes nothing."""
    if directory is None:
        return contextlib.nullcontext()
    return jax.profiler.trace(str(directory))


def move_aside(out: Path) -> None:
    """Rename a directory that holds a run, so that a new one may take its place."""
    if not out.exists() or not any(out.iterdir()):
        return
    number = 1
    while (old := out.with_name(f"{out.name}.old{number}")).exists():
        number += 1
    out.rename(old)
    print(f"{out} held an older run, now in {old}; --resume would have gone on with it")


def summary(records: Sequence[dict[str, Any]], seconds: float) -> str:
    """Return what a person wants to know about a finished run."""
    steps = [r for r in records if r["kind"] == "step"]
    evals = [r for r in records if r["kind"] == "eval"]
    warm = [r for r in records if r["kind"] == "warmup"]
    lines = []
    if warm:
        lines.append(
            f"warm-up: {warm[-1]['step']} steps in "
            f"{warm[-1]['timing']['seconds']:.0f} s, chance of a written-out solution "
            f"{warm[-1]['solution_chance']:.2f}"
        )
    if evals:
        text = " -> ".join(f"{r['reward']:.3f} (step {r['step']})" for r in evals)
        lines.append(f"held-out reward, {evals[0]['num_completions']} samples: {text}")
    if steps:
        few = steps[:3], steps[-3:]
        first, last = (np.mean([r["reward"] for r in part]) for part in few)
        lines.append(f"training reward, mean of 3 steps: {first:.3f} -> {last:.3f}")
        times = [r["timing"] for r in steps]
        total = {
            name: sum(t[name] for t in times)
            for name in ("rollout_s", "rollout_compile_s", "update_s")
        }
        lines.append(
            f"{len(steps)} GRPO steps: rollouts {total['rollout_s']:.1f} s (of it "
            f"compiling {total['rollout_compile_s']:.1f} s), updates "
            f"{total['update_s']:.1f} s"
        )
        gammas: dict[str, int] = {}
        for one in times:
            for gamma, count in one["tokens_by_gamma"].items():
                gammas[gamma] = gammas.get(gamma, 0) + count
        shares = ", ".join(f"gamma {g}: {n}" for g, n in sorted(gammas.items()))
        lines.append(f"tokens sampled by draft length: {shares}")
        gap = max(r["logprob_gap"] for r in steps)
        lines.append(f"largest rollout-trainer log-probability difference: {gap:.1e}")
    lines.append(f"this process took {seconds:.0f} s")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    from configs import arithmetic, hf, tiny

    config = tyro.extras.overridable_config_cli(
        {
            "arithmetic": ("The reported demo.", arithmetic.CONFIG),
            "tiny": ("The same in seconds.", tiny.CONFIG),
            "hf": ("A checkpoint and data of yours.", hf.CONFIG),
        },
        args=args,
    )
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    join(config.mesh)
    try:
        run(config)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; --resume --out {config.out} goes on from the last "
            "checkpoint",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"train.grpo: {error}") from error


if __name__ == "__main__":
    main()
