"""A byte-level policy of 5.6 million parameters, trained on `corpus` on any machine.

The recipe: AdamW on pieces from random places, a short context at first and a long one
for the rest of the time. The learning rate ramps up, stays until half of the time is
over, and falls as a cosine to nearly nothing. Time is what is limited: a machine that
is busy with other work takes fewer steps. A run that was cut off goes on from its last
checkpoint.

Left out: evaluation while training. Its checkpoint is not part of the project.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks.lib.corpus import VOCAB_SIZE, pieces
from benchmarks.lib.whole_texts import attend_causally
from er_jax import Decoder, DecoderConfig, attention
from train.checkpoints import Checkpoints

MODEL = DecoderConfig(
    vocab_size=VOCAB_SIZE,
    dim=256,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    hidden_dim=640,
    qk_norm=True,
    max_length=4096,
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training.

    share: of the whole time. context: bytes of a piece. rows: pieces of a step.
    """

    share: float
    context: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the model is trained.

    Args:
      minutes: of training, by the clock.
      stages: one after the other; their shares add up to 1.
      peak_rate: largest learning rate. floor_rate: the last.
      ramp_steps: optimizer steps in which the rate grows from 0.
      flat_share: of the time before the rate begins to fall.
      weight_decay: of matrices. clip_norm: largest global norm of a gradient.
      save_minutes: between two checkpoints. seed: of parameters and pieces.
    Raises:
      ValueError: shares that do not add up to 1.
    """

    minutes: float = 60
    stages: tuple[Stage, ...] = (Stage(0.65, 512, 4), Stage(0.35, 2304, 1))
    peak_rate: float = 2e-3
    floor_rate: float = 2e-5
    ramp_steps: int = 100
    flat_share: float = 0.3
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    save_minutes: float = 4
    seed: int = 0

    def __post_init__(self) -> None:
        total = math.fsum(stage.share for stage in self.stages)
        if abs(total - 1) > 1e-9:
            raise ValueError(f"stages have shares that add up to {total}, not to 1")

    def stage(self, progress: float) -> Stage:
        """Return the stage at a share of the whole time."""
        for stage in self.stages[:-1]:
            if progress < stage.share:
                return stage
            progress -= stage.share
        return self.stages[-1]

    def rate(self, progress: float, step: int) -> float:
        """Return the learning rate at a share of the whole time and a step from 0."""
        past = min(1.0, max(0.0, progress - self.flat_share) / (1 - self.flat_share))
        fall = 0.5 + 0.5 * math.cos(math.pi * past)
        rate = self.floor_rate + (self.peak_rate - self.floor_rate) * fall
        return rate * min(1.0, (step + 1) / self.ramp_steps)

    def optimizer(self) -> optax.GradientTransformation:
        """Return AdamW without its learning rate, after a clip of the gradient."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(b1=0.9, b2=0.98),
            optax.add_decayed_weights(
                self.weight_decay,
                lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
            ),
        )


def losses(policy: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Return the loss of every token but the first, in nats.

    Args:
      tokens: `[B, T + 1]` int32.
    Returns:
      `[B, T]` float32.
    """
    count, length = tokens.shape[0], tokens.shape[1] - 1
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(positions, (count, length))
    with attention.replaced(attend_causally):
        hidden, _ = policy.forward(
            params, tokens[:, :-1], positions, policy.init_cache(count, length)
        )
    return optax.softmax_cross_entropy_with_integer_labels(
        policy.logits(params, hidden), tokens[:, 1:]
    )


held_out_losses = jax.jit(losses, static_argnames="policy")


@functools.partial(
    jax.jit, static_argnames=("policy", "recipe"), donate_argnames=("params", "state")
)
def train_step(
    policy: Decoder,
    recipe: Recipe,
    params: Any,
    state: optax.OptState,
    tokens: jax.Array,
    rate: jax.Array,
) -> tuple[Any, optax.OptState, jax.Array]:
    """Take one step on pieces `[B, T + 1]`; return parameters, state, mean loss."""
    loss, grads = jax.value_and_grad(
        lambda params: jnp.mean(losses(policy, params, tokens))
    )(params)
    with jax.numpy_dtype_promotion("standard"):  # Adam computes float ** int
        updates, state = recipe.optimizer().update(grads, state, params)
    updates = jax.tree.map(lambda update: -rate * update, updates)
    return optax.apply_updates(params, updates), state, loss


@dataclasses.dataclass
class Progress:
    """How far a training is.

    params, state: of model and optimizer. step: steps taken. seconds: spent on them.
    tokens: bytes predicted. loss: mean of the last steps, in nats a byte.
    """

    params: Any
    state: Any
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    loss: float = 0.0

    def host(self) -> dict[str, Any]:
        """Return what is no array."""
        names = ("step", "seconds", "tokens", "loss")
        return {name: getattr(self, name) for name in names}


def first_progress(policy: Decoder, recipe: Recipe) -> Progress:
    """Return the start of a training."""
    params = policy.init(jax.random.key(recipe.seed))
    return Progress(params, recipe.optimizer().init(params))


def steps(
    policy: Decoder, recipe: Recipe, progress: Progress, tokens: np.ndarray
) -> Iterator[Progress]:
    """Train until the time is over; yield after every step.

    Compilation is not part of the time.

    Args:
      progress: where to begin; it is changed.
      tokens: `[N]`, what is trained on.
    """
    compiled: dict[Stage, Any] = {}
    while progress.seconds < 60 * recipe.minutes:
        share = progress.seconds / (60 * recipe.minutes)
        stage = recipe.stage(share)
        rng = np.random.default_rng((recipe.seed, progress.step))
        batch = pieces(tokens, stage.rows, stage.context, rng)
        rate = np.float32(recipe.rate(share, progress.step))
        given = (progress.params, progress.state, batch, rate)
        if stage not in compiled:
            compiled[stage] = train_step.lower(policy, recipe, *given).compile()
        began = time.perf_counter()
        progress.params, progress.state, loss = compiled[stage](*given)
        weight = max(1 / (progress.step + 1), 0.02)
        progress.loss += weight * (float(loss) - progress.loss)
        progress.step += 1
        progress.tokens += stage.rows * stage.context
        progress.seconds += time.perf_counter() - began
        yield progress


def train(
    directory: Path,
    tokens: np.ndarray,
    *,
    policy: Decoder,
    recipe: Recipe,
    on_save: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Train, or go on with a training, and save it every few minutes and at the end.

    Args:
      directory: of its checkpoints. tokens: `[N]`, what is trained on.
      policy: the model. recipe: how it is trained.
      on_save: called after every checkpoint.
    Returns:
      The end of the training.
    """
    progress = first_progress(policy, recipe)
    with Checkpoints(directory, keep=2) as checkpoints:
        if checkpoints.latest_step is not None:
            saved = checkpoints.restore(policy=progress.params, trainer=progress.state)
            progress = Progress(saved.policy, saved.trainer, **saved.host["progress"])

        def save() -> None:
            checkpoints.save(
                progress.step,
                policy=progress.params,
                trainer=progress.state,
                host={
                    "progress": progress.host(),
                    "recipe": dataclasses.asdict(recipe),
                    "model": dataclasses.asdict(policy.config),
                },
            )
            on_save(progress)

        saved_s = progress.seconds
        with tqdm(total=round(60 * recipe.minutes), unit="s", desc="training") as bar:
            for _ in steps(policy, recipe, progress, tokens):
                bits = progress.loss / math.log(2)
                told = f"step {progress.step}, {bits:.3f} bits/byte"
                bar.set_postfix_str(told, refresh=False)
                bar.update(round(progress.seconds) - bar.n)
                if progress.seconds - saved_s > 60 * recipe.save_minutes:
                    save()
                    saved_s = progress.seconds
        if checkpoints.latest_step != progress.step:
            save()
    return progress


def load_text_model(directory: Path) -> tuple[Decoder, Any, dict[str, Any]]:
    """Load the latest checkpoint of a training.

    Returns:
      The policy, its parameters, and what is known of the training: "step", "seconds",
      "tokens" and "loss".
    Raises:
      FileNotFoundError: there is none.
    """
    with Checkpoints(directory, read_only=True) as checkpoints:
        host = checkpoints.restore_host()
        policy = Decoder(DecoderConfig(**host["model"]))
        like = jax.eval_shape(policy.init, jax.random.key(0))
        return policy, checkpoints.restore_policy(like), host["progress"]
