"""`score`: log-probabilities of a rollout's tokens under given parameters.

The trainer's side of a rollout: the same meanings, by the same functions, for any
parameters, and differentiable. It may be called inside `jax.jit` and `jax.grad`.

Left out: losses and advantages, and how the memory is bounded (`engine.scores`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from er_jax import checks, sampling
from er_jax.arguments import check_whole
from er_jax.config import RolloutConfig
from er_jax.drafter import PolicyParams
from er_jax.engine.scores import scored
from er_jax.request import sampling_of
from er_jax.settings import rows_own, without_bounds
from er_jax.types import Array, Params, Policy, Sampling


class Completions(Protocol):
    """What `score` reads: the arrays of a `Rollout` that say which tokens are scored.

    Anything that has them will do.
    """

    @property
    def prompt_ids(self) -> Array:
        """Whole numbers `[N, P]`, left-padded, P >= 1."""

    @property
    def prompt_mask(self) -> Array:
        """`[N, P]`, true on tokens."""

    @property
    def completion_ids(self) -> Array:
        """Whole numbers `[N, C]`, right-padded."""

    @property
    def completion_mask(self) -> Array:
        """`[N, C]`, true on the tokens to score; the others are context."""

    @property
    def lengths(self) -> Array:
        """Whole numbers `[N]`, tokens of each completion."""


@struct.dataclass
class Scores:
    """What `score` returns, shaped like `Rollout.logprobs`, in float32 or wider.

    Attributes:
      logprobs: `[N, C]`, of the completions' tokens, natural logarithms; 0 where
        masked.
      entropy: `[N, C]`, of the distributions that these tokens' log-probabilities are
        taken from, in nats; 0 where masked. None if it was not asked for.
    """

    logprobs: Array
    entropy: Array | None = None


def score(
    policy: Policy,
    params: Params | PolicyParams,
    rollout: Completions,
    *,
    config: RolloutConfig,
    entropy: bool = False,
    chunk_tokens: int = 2048,
) -> Scores:
    """Return the log-probabilities of a rollout's tokens under given parameters.

    Under the parameters that sampled them they are `rollout.logprobs`, up to rounding.
    They are differentiable by `params`, and the whole rollout may be scored at once:
    neither `[N, C, V]` logits nor the activations of all rows ever exist, in the
    backward pass neither, which computes chunks of rows again.

    `config.logprobs` says which distribution they are taken from, as for `rollout`:

    * "raw": the model's own.
    * "temperature": after the temperature; temperature 0 counts as 1.
    * "processed": what is sampled, biased and truncated by the same functions. A token
      that these parameters would leave out, because they have moved or because a bound
      was met within rounding, counts as kept beside the others: its log-probability is
      finite, with a gradient. At temperature 0 all are 0, and so are all gradients. A
      banned token has -1e30.

    Args:
      policy: the model; see `Policy`.
      params: its parameters; of `PolicyParams`, the policy's.
      rollout: a `Rollout`, a part of one made by `jax.tree.map`, or whatever has its
        arrays prompt_ids, prompt_mask, completion_ids, completion_mask and lengths. On
        the host, on devices, or traced.
      config: the settings of the rollout. Only logprobs, temperature, top_k, top_p,
        min_p and what is added to logits are read. Where these differ between prompts,
        give the whole rollout, or `config.of_prompts(...)` with those of a part.
      entropy: whether to return entropies.
      chunk_tokens: bounds the memory. Rows are taken in chunks of at most this many
        tokens, padding included, but no less than one row; logits exist for a fourth of
        these at a time (4 MB are always allowed). Less than one chunk is not computed
        again. On a mesh it counts the tokens of all devices together.
    Returns:
      `Scores`.
    Raises:
      ValueError: a wrong argument, before anything is compiled.
    Example:
      >>> import jax, er_jax
      >>> policy = er_jax.Decoder(er_jax.DecoderConfig(
      ...     vocab_size=32, dim=32, num_layers=1, num_heads=2, num_kv_heads=1,
      ...     hidden_dim=64))
      >>> params = policy.init(jax.random.key(0))
      >>> config = er_jax.RolloutConfig(max_new_tokens=4, n=2, control="ar")
      >>> out = er_jax.rollout(
      ...     policy, params, [[1, 2, 3]], key=jax.random.key(1), config=config)
      >>> def loss(params, part):
      ...     return -er_jax.score(policy, params, part, config=config).logprobs.sum()
      >>> grads = jax.jit(jax.grad(loss))(params, jax.tree.map(lambda a: a[:1], out))
    """
    checks.check_policy(policy)
    if not isinstance(config, RolloutConfig):
        raise ValueError(
            f"config={config!r} is no RolloutConfig; give that of the rollout"
        )
    check_whole("chunk_tokens", chunk_tokens)
    if isinstance(params, PolicyParams):
        params = params.policy
    if config.is_biased:
        checks.check_token_ids(config, policy.vocab_size)
    completions = _checked(rollout)
    settings = sampling_of(config, np.zeros(2, np.uint32), policy.vocab_size)
    if config.logprobs != "processed" or settings.bias is None:
        settings = without_bounds(settings)
    settings = dataclasses.replace(settings, stop_sequences=None)
    _check_rows(config, settings, len(completions[0]))
    is_truncated = config.logprobs == "processed" and sampling.is_truncated(settings)
    found = scored(
        policy,
        params,
        completions,
        settings,
        truncated=is_truncated,
        entropy=bool(entropy),
        chunk_tokens=int(chunk_tokens),
    )
    return Scores(*found)


def _check_rows(config: RolloutConfig, settings: Sampling, num_rows: int) -> None:
    """Refuse settings of single prompts for another number of completions."""
    wanted = {len(own) for own in rows_own(settings).values()} - {num_rows}
    if wanted:
        raise ValueError(
            f"config has settings of {config.num_prompts} prompts, which with n="
            f"{config.n} are {wanted.pop()} completions, and rollout has {num_rows}; "
            "give the whole rollout, or config.of_prompts(...) of these prompts"
        )


_ARRAYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "lengths")


def _checked(rollout: Any) -> tuple[Array, ...]:
    """Return the arrays of completions; refuse any that do not fit."""
    arrays: dict[str, Any] = {n: getattr(rollout, n, None) for n in _ARRAYS}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray | np.generic | jax.Array):
            raise ValueError(
                f"rollout.{name}={array!r} is no array; give a Rollout, a part of one, "
                f"or an object with its arrays {', '.join(_ARRAYS)}"
            )
    shapes = {name: array.shape for name, array in arrays.items()}
    for ids, mask in (_ARRAYS[:2], _ARRAYS[2:4]):
        if len(shapes[ids]) != 2 or 0 in shapes[ids]:
            raise ValueError(
                f"rollout.{ids} has shape {shapes[ids]}; give rows of token ids, at "
                "least one of each (take parts of a rollout along its rows)"
            )
        if shapes[mask] != shapes[ids] or shapes[ids][0] != shapes["prompt_ids"][0]:
            raise ValueError(
                f"rollout.{ids} has shape {shapes[ids]} and rollout.{mask} "
                f"{shapes[mask]}, for prompts of shape {shapes['prompt_ids']}; take "
                "the same rows of all arrays"
            )
        if not jnp.issubdtype(arrays[ids].dtype, jnp.integer):
            raise ValueError(
                f"rollout.{ids} is {arrays[ids].dtype}; token ids are whole numbers"
            )
    if shapes["lengths"] != shapes["prompt_ids"][:1]:
        raise ValueError(
            f"rollout.lengths has shape {shapes['lengths']}, for prompts of shape "
            f"{shapes['prompt_ids']}; take the same rows of all arrays"
        )
    filled = arrays["prompt_mask"]
    if isinstance(filled, np.ndarray) and (filled[:, 1:] < filled[:, :-1]).any():
        row = int(np.argmax((filled[:, 1:] < filled[:, :-1]).any(axis=1)))
        raise ValueError(
            f"rollout.prompt_mask is not left-padded in row {row}: a completion "
            "follows the last column; move padding to the front"
        )
    return tuple(arrays.values())
