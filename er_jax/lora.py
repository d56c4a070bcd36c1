"""Low-rank adaptation: weights that stay as they are, and pairs that are trained.

A `LoRAWeight` stands in the place of a weight of the policy. `drafter.dot` multiplies
with it without ever making the sum of base and change. Gradients do not reach the base,
so that only pairs need an optimizer (`lora_pairs`, `with_lora_pairs`), and a draft,
which is made of bases, stays current without being made again.

Left out: dropout, weights of experts, embeddings, magnitudes (DoRA).

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from er_jax.arguments import check_whole, is_number
from er_jax.types import Params, TiedEmbedding, wide_dtype

# The projections of the built-in decoder but that of the vocabulary.
TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)


@struct.dataclass
class LoRAWeight:
    """A frozen weight and a low-rank change of it: base + scale * (a @ b).

    Attributes:
      base: `[in, out]`, frozen; in a draft the `QuantizedWeight` of it; None in the
        result of `lora_pairs`.
      a: `[in, r]`, floating-point; multiplied in the type of the activations. None in
        a draft whose pair is the policy's own.
      b: `[r, out]`, or None as `a`.
      scale: static.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False)


def is_lora(leaf: Any) -> bool:
    """Whether a node of a parameter tree is a `LoRAWeight`."""
    return isinstance(leaf, LoRAWeight)


def has_lora(params: Params) -> bool:
    """Whether parameters hold any `LoRAWeight`."""
    return any(map(is_lora, jax.tree.leaves(params, is_leaf=is_lora)))


def _check_has_lora(params: Params) -> None:
    if not has_lora(params):
        raise ValueError("params has no low-rank pairs; add them with er_jax.add_lora")


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def add_lora(
    params: Params,
    *,
    rank: int,
    key: jax.Array,
    alpha: float | None = None,
    targets: Sequence[str] = TARGETS,
    dtype: Any = None,
) -> Params:
    """Give weights of a policy a low-rank pair each, which changes nothing yet.

    `a` is uniform between -1/sqrt(in) and 1/sqrt(in), and `b` is zero. Pure and
    jittable.

    Args:
      params: the policy's parameters, without drafts.
      rank: r, of every pair; >= 1.
      key: a JAX random key.
      alpha: changes are scaled by alpha / rank; > 0. None is `rank`.
      targets: words; a matrix whose path contains one of them gets a pair. Vectors
        never do. The policy must multiply these matrices with `er_jax.dot`.
      dtype: of pairs; None is that of each weight. With bfloat16 weights, float32 keeps
        the small steps of an optimizer.
    Returns:
      The same tree, with a `LoRAWeight` for each of these matrices.
    Raises:
      ValueError: a wrong argument; parameters that have pairs already; targets that
        name nothing, or a weight that is no floating-point matrix, as of experts.
    """
    check_whole("rank", rank)
    alpha = rank if alpha is None else alpha
    if not is_number(alpha) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha!r} must be a number above 0, or None for rank")
    if isinstance(targets, str) or not all(
        isinstance(word, str) and word for word in targets
    ):
        raise ValueError(
            f"targets={targets!r} must be several words, none of them empty; give a "
            "tuple, as targets=('q_proj', 'v_proj')"
        )
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype!r} must be a floating-point type, or None")
    if has_lora(params):
        raise ValueError(
            "params has low-rank pairs already; train these, or take er_jax.merge_lora "
            "of them first"
        )
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, TiedEmbedding)
    )
    chosen = [
        index
        for index, (path, leaf) in enumerate(leaves)
        if any(word in _name(path) for word in targets) and _can_have_pair(path, leaf)
    ]
    if not chosen:
        matrices = [
            _name(path) for path, leaf in leaves if getattr(leaf, "ndim", 0) == 2
        ]
        raise ValueError(
            f"targets={tuple(targets)} name no matrix of params; give words of paths "
            f"such as {', '.join(matrices[:8])}"
        )
    scale = float(alpha) / rank
    made = [leaf for _, leaf in leaves]
    keys = jax.random.split(key, len(chosen))
    for index, own in zip(chosen, keys, strict=True):
        base = made[index]
        num_in, num_out = base.shape
        kind = jnp.dtype(dtype or base.dtype)
        bound = num_in**-0.5
        a = jax.random.uniform(own, (num_in, rank), kind, -bound, bound)
        made[index] = LoRAWeight(base, a, jnp.zeros((rank, num_out), kind), scale)
    return jax.tree.unflatten(structure, made)


def _can_have_pair(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a target is a matrix; refuse what is neither that nor a vector."""
    kind = None
    if isinstance(leaf, TiedEmbedding):
        kind = "is an embedding that is the projection as well"
    elif leaf.ndim > 2:
        kind = f"has shape {leaf.shape}, a stack of matrices as of experts"
    elif not jnp.issubdtype(leaf.dtype, jnp.floating):
        kind = f"has dtype {leaf.dtype}"
    if kind is not None:
        raise ValueError(
            f"targets: {_name(path)} {kind}; only floating-point matrices [in, out] "
            "can have a low-rank pair: leave it out of targets"
        )
    return leaf.ndim == 2


def lora_pairs(params: Params) -> Params:
    """Return what is trained: the pairs, with None in the place of all else.

    An optimizer's state is made of these alone, and gradients are taken by them:
    `jax.grad(lambda pairs: loss(with_lora_pairs(params, pairs)))`.

    Args:
      params: with `LoRAWeight`s; arrays, or their shapes.
    Returns:
      A tree of the same structure, whose leaves are the `a` and `b` of all pairs.
    Raises:
      ValueError: there are no pairs.
    """
    _check_has_lora(params)

    def pair(leaf: Any) -> Any:
        return leaf.replace(base=None) if is_lora(leaf) else None

    return jax.tree.map(pair, params, is_leaf=is_lora)


def with_lora_pairs(params: Params, pairs: Params) -> Params:
    """Return the parameters with other pairs.

    Args:
      params: with `LoRAWeight`s.
      pairs: as `lora_pairs` returns them.
    Returns:
      The same tree; bases and all other leaves are those of `params`.
    Raises:
      ValueError: no pairs in `params`; `pairs` of another structure or shape.
    """

    remedy = "make pairs with er_jax.lora_pairs(params)"
    wanted: Any = lora_pairs(params)
    structure: Any = jax.tree.structure(wanted)
    if jax.tree.structure(pairs) != structure:
        raise ValueError(f"pairs has another structure than those of params; {remedy}")
    of_params = jax.tree_util.tree_leaves_with_path(wanted)
    for (path, leaf), found in zip(of_params, jax.tree.leaves(pairs), strict=True):
        if found.shape != leaf.shape:
            raise ValueError(
                f"pairs has shape {found.shape} at {_name(path)}, where params has "
                f"{leaf.shape}; {remedy}"
            )

    def join(leaf: Any, pair: Any) -> Any:
        return leaf.replace(a=pair.a, b=pair.b) if is_lora(leaf) else leaf

    return jax.tree.map(join, params, pairs, is_leaf=is_lora)


def without_lora(params: Params) -> Params:
    """Return the parameters before any change: the bases, without their pairs.

    Args:
      params: with `LoRAWeight`s.
    Returns:
      The same tree, with the base in the place of each of them.
    Raises:
      ValueError: there are no pairs.
    """
    _check_has_lora(params)
    return jax.tree.map(
        lambda leaf: leaf.base if is_lora(leaf) else leaf, params, is_leaf=is_lora
    )


def merge_lora(params: Params) -> Params:
    """Return plain weights: every base with its change added, in the base's type.

    Sums are float32 or wider; rounded to bfloat16, a small change may leave a weight as
    it was.

    Args:
      params: with `LoRAWeight`s.
    Returns:
      The same tree, with an array in the place of each of them.
    Raises:
      ValueError: there are no pairs, or a base is quantized, as in a draft.
    """
    _check_has_lora(params)

    def merged(path: tuple[Any, ...], leaf: Any) -> Any:
        if not is_lora(leaf):
            return leaf
        if not hasattr(leaf.base, "dtype"):
            raise ValueError(
                f"params: {_name(path)} has a quantized base; merge the policy's "
                "parameters, not those of its draft"
            )
        wide = wide_dtype(leaf.base.dtype)
        a, b = leaf.a.astype(wide), leaf.b.astype(wide)
        change = jnp.dot(a, b, precision=lax.Precision.HIGHEST)
        return (leaf.base.astype(wide) + leaf.scale * change).astype(leaf.base.dtype)

    return jax.tree_util.tree_map_with_path(merged, params, is_leaf=is_lora)
