"""Which drafts are kept and what is emitted: coupled, token and block acceptance.

All three rules emit tokens that follow the target distribution exactly, whatever the
draft. The functions take probabilities and noise and return counts and tokens; without
model, loop or random state, tests can enumerate every outcome.

* coupled: draft and target draw with the same Gumbel noise. A draft is kept while it
  equals the target's own draw, and the target's draws are emitted. The rule needs no
  draft probabilities, and the output does not depend on the draft at all.
* token: keep draft x with probability min(1, target(x) / draft(x)); after the first
  rejection draw from the normalised positive part of target - draft.
* block: decide on the whole block at once; in expectation it keeps at least as many
  drafts as `token`.

With B rows, G = gamma drafts, V vocabulary. Log-probabilities are those of
`sampling.target_logprobs` for the target and for the draft.

Source: coupled, Daliri, Musco, Suresh 2024 (arXiv 2408.07978); token, Leviathan et al.
2023 (arXiv 2211.17192), which calls the target p and the draft q, and Chen et al. 2023
(arXiv 2302.01318), which swaps the letters; block, Sun et al. 2024 (arXiv 2403.10444).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from er_jax.sampling import NEVER

AcceptRule = Literal["coupled", "token", "block"]
ACCEPT_RULES: tuple[AcceptRule, ...] = get_args(AcceptRule)


def count_leading(keep: jax.Array) -> jax.Array:
    """Return how many leading True values each row of `[B, G]` has, int32 `[B]`."""
    leading = jnp.cumprod(keep.astype(jnp.int32), axis=-1, dtype=jnp.int32)
    return jnp.sum(leading, axis=-1, dtype=jnp.int32)


def coupled_num_accepted(draft_tokens: jax.Array, draws: jax.Array) -> jax.Array:
    """Count the drafts that equal the target's own draws.

    Args:
      draft_tokens: `[B, G]` int32. draws: `[B, G+1]` int32, the target's noised argmax
        at each position; the round emits `draws[:, : num_accepted + 1]`.
    Returns:
      `[B]` int32, 0 .. G.
    """
    return count_leading(draft_tokens == draws[:, :-1])


def _at_tokens(logprobs: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]


def token_accept_probs(
    target: jax.Array, draft: jax.Array, draft_tokens: jax.Array
) -> jax.Array:
    """Return min(1, target(x) / draft(x)) for each drafted token.

    Args:
      target: `[B, G, V]` or longer along the second axis. draft: `[B, G, V]`.
      draft_tokens: `[B, G]` int32.
    Returns:
      `[B, G]`.
    """
    target = target[:, : draft_tokens.shape[1]]
    log_ratio = _at_tokens(target, draft_tokens) - _at_tokens(draft, draft_tokens)
    return jnp.exp(jnp.minimum(log_ratio, jnp.zeros((), log_ratio.dtype)))


def token_num_accepted(accept_probs: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Count the drafts before the first rejection: `[B, G]`, `[B, G]` -> `[B]`."""
    return count_leading(uniforms < accept_probs)


def block_accept_probs(
    target: jax.Array, draft: jax.Array, draft_tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return block verification's acceptance probabilities and prefix weights.

    The weights are w_0 = 1, w_i = min(1, w_(i-1) target(x_i) / draft(x_i)). The
    probability to stop no earlier than at i < G is r_i / (r_i + 1 - w_i), where r_i is
    the mass of the positive part of w_i target - draft after the prefix; at i = G it is
    w_G.

    Args:
      target: `[B, G+1, V]`, the last distribution after all drafts.
      draft: `[B, G, V]`.
      draft_tokens: `[B, G]` int32.
    Returns:
      chances `[B, G]` for prefixes of 1 .. G drafts; weights `[B, G+1]` for 0 .. G.
    """
    num_drafts = draft_tokens.shape[1]
    ratio = jnp.exp(
        _at_tokens(target[:, :num_drafts], draft_tokens)
        - _at_tokens(draft, draft_tokens)
    )
    one = jnp.ones((), ratio.dtype)
    weights = [jnp.ones_like(ratio[:, 0])]
    for i in range(num_drafts):
        weights.append(jnp.minimum(one, weights[-1] * ratio[:, i]))
    weight = jnp.stack(weights, axis=1)
    chances = []
    for i in range(1, num_drafts):
        excess = _positive_part(weight[:, i], target[:, i], draft[:, i])
        mass = jnp.sum(excess, axis=-1)
        # Both terms vanish only when the prefix is certain; it is then kept.
        total = mass + (one - weight[:, i])
        chances.append(
            jnp.where(total > 0, mass / jnp.where(total > 0, total, one), one)
        )
    chances.append(weight[:, num_drafts])
    return jnp.stack(chances, axis=1), weight


def block_num_accepted(chances: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Return the longest prefix that passes its own test: `[B, G]` twice -> `[B]`."""
    length = jnp.arange(1, chances.shape[1] + 1, dtype=jnp.int32)
    passed = uniforms < chances
    return jnp.max(jnp.where(passed, length[None], 0), axis=-1)


def _positive_part(weight: jax.Array, target: jax.Array, draft: jax.Array) -> jax.Array:
    excess = weight[:, None] * jnp.exp(target) - jnp.exp(draft)
    return jnp.maximum(excess, jnp.zeros((), excess.dtype))


def residual_logprobs(
    target: jax.Array, draft: jax.Array, num_accepted: jax.Array, weight: jax.Array
) -> jax.Array:
    """Return the distribution of the token after the kept drafts.

    After a rejection it is the normalised positive part of weight x target - draft;
    after G kept drafts it is the target itself (the bonus token).

    Args:
      target: `[B, G+1, V]`. draft: `[B, G, V]`. num_accepted: `[B]` int32.
      weight: `[B]`, 1 for the token rule, the kept prefix's weight for the block rule.
    Returns:
      `[B, V]` log-probabilities up to a constant per row, `NEVER` where 0.
    """
    num_drafts = draft.shape[1]
    at = num_accepted[:, None, None]
    own = jnp.take_along_axis(target, at, axis=1)[:, 0]
    if num_drafts == 0:
        return own
    proposed = jnp.take_along_axis(draft, jnp.minimum(at, num_drafts - 1), axis=1)[:, 0]
    excess = _positive_part(weight, own, proposed)
    # A rejection has positive residual mass. Rounding can lose it only where draft and
    # target are equal, and there the target is the right distribution.
    is_bonus = (num_accepted == num_drafts) | (jnp.sum(excess, axis=-1) <= 0)
    tiny = jnp.asarray(jnp.finfo(excess.dtype).tiny, excess.dtype)
    never = jnp.asarray(NEVER, excess.dtype)
    residual = jnp.where(excess > 0, jnp.log(jnp.maximum(excess, tiny)), never)
    return jnp.where(is_bonus[:, None], own, residual)


def expected_accept_prob(target: jax.Array, draft: jax.Array) -> jax.Array:
    """Return the probability that the token rule keeps one draft: sum of min.

    Args:
      target, draft: `[..., V]` log-probabilities after the same prefix.
    Returns:
      `[...]`: 1 - total variation distance.
    """
    return jnp.sum(jnp.exp(jnp.minimum(target, draft)), axis=-1)


def expected_coupled_prob(target: jax.Array, draft: jax.Array) -> jax.Array:
    """Return the probability that two draws with the same Gumbel noise are equal.

    It is the sum over i of 1 / sum over j of max(target_j / target_i, draft_j /
    draft_i), over tokens that both can draw. The cost is quadratic in V: for tests and
    studies.

    Args:
      target, draft: `[..., V]` log-probabilities after the same prefix.
    Returns:
      `[...]`, at least (1 - d) / (1 + d) with d the total variation distance.
    """

    def ratios(logprobs: jax.Array) -> jax.Array:
        return jnp.exp(logprobs[..., None, :] - logprobs[..., :, None])

    both = (target > NEVER / 2) & (draft > NEVER / 2)
    worst = jnp.maximum(ratios(target), ratios(draft))
    zero = jnp.zeros((), worst.dtype)
    return jnp.sum(jnp.where(both, 1 / jnp.sum(worst, axis=-1), zero), axis=-1)


def expected_tokens(keep_probs: Sequence[float]) -> float:
    """Return the expected tokens of a round: 1 + the sum of leading products.

    Args:
      keep_probs: for each depth, the probability that its draft is kept, given that
        all drafts before it were; the length is gamma.
    Returns:
      Tokens per round, the extra token included; (1 - a^(G+1)) / (1 - a) for equal a.
    """
    survival, total = 1.0, 1.0
    for prob in keep_probs:
        survival *= prob
        total += survival
    return total
