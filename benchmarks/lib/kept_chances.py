"""The chance that a draft is kept, from the distributions of target and draft.

*token*: the sum over tokens of min(target, draft) (Leviathan et al. 2023, arXiv
2211.17192, corollary 3.6).

*coupled*: both draw the argmax of log-probability + the same Gumbel noise g. With
E = exp(-g), which is exponential of rate 1, that is the argmin of E / probability. Both
draw i if, for all j, E_j >= E_i max(target_j / target_i, draft_j / draft_i). Given E_i,
the chance of this is the exponential of -E_i times the sum of these maxima over j other
than i; integrated over E_i it is 1 over their sum over all j, where j = i adds 1. The
sum over i is the chance that the draft is kept (Daliri, Musco, Suresh 2024, arXiv
2408.07978). `er_jax.acceptance.expected_coupled_prob` computes it in time quadratic in
the vocabulary; here tokens are sorted by draft / target, so that the maximum is the
target's ratio for those before i and the draft's for those behind.

Both in float64 on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Kept(NamedTuple):
    """Chances that a draft is kept.

    mean: `[N]`, whatever token is drawn.
    given: `[N]`, given that the target's token is the text's next.
    """

    mean: np.ndarray
    given: np.ndarray


def token_rule(target: np.ndarray, draft: np.ndarray, tokens: np.ndarray) -> Kept:
    """Return the chances of the token rule.

    Args:
      target, draft: `[N, V]` log-probabilities. tokens: `[N]`, drawn from the target.
    """
    smaller = np.exp(np.minimum(target, draft).astype(np.float64))
    drawn = tokens[:, None]
    excess = np.take_along_axis(draft, drawn, 1) - np.take_along_axis(target, drawn, 1)
    return Kept(smaller.sum(-1), np.exp(np.minimum(excess[:, 0], 0.0)))


def coupled_rule(target: np.ndarray, draft: np.ndarray, tokens: np.ndarray) -> Kept:
    """Return the chances of the coupled rule; arguments as of `token_rule`."""
    order = np.argsort(draft - target, axis=-1)
    p, q = (
        np.exp(np.take_along_axis(x, order, -1).astype(np.float64))
        for x in (target, draft)
    )
    before = np.cumsum(p, axis=-1)
    behind = np.cumsum(q[:, ::-1], axis=-1)[:, ::-1] - q
    # Of a token that one of the two cannot draw, the chance is 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        both = 1 / (before / p + behind / q)
    both = np.where((p > 0) & (q > 0), both, 0.0)
    place = np.argmax(order == tokens[:, None], axis=-1)[:, None]
    drawn = np.take_along_axis(both, place, 1) / np.take_along_axis(p, place, 1)
    return Kept(both.sum(-1), drawn[:, 0])


RULES = {"coupled": coupled_rule, "token": token_rule}


def by_depth(kept: Kept, is_whole: np.ndarray) -> list[float]:
    """Return the chance at each depth that a draft is kept if all before it were.

    Texts are drawn from the target, while drafts are met only behind drafts that were
    kept; each round is therefore weighted by the chance that its earlier drafts were
    kept, given the text's tokens.

    Args:
      kept: of rounds, `[R, gamma]` each.
      is_whole: `[R]`, whether all drafts of the round lie within a completion.
    """
    weight, found = is_whole.astype(np.float64), []
    for mean, given in zip(kept.mean.T, kept.given.T, strict=True):
        found.append(float((weight * mean).sum() / max(weight.sum(), 1e-9)))
        weight = weight * given
    return found
