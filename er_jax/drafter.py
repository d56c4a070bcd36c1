"""The drafter: a quantized view of the live policy parameters, and its dot product.

The draft is a pure function of the policy: a sibling pytree, never optimised and never
saved. AQT's quantizer makes the codes (symmetric, absolute maximum, one scale per
output channel or per group of input channels). The multiplication is this project's own
(`products`), because the fast and small form differs by platform.

A stale or broken draft costs acceptance, never correctness.

This is the only module that imports AQT. Left out: calibration data, outlier handling,
quantized caches.

Source: AQT (github.com/google/aqt); EfficientRollout (arXiv 2606.18967) for drafting
with the quantized policy itself; the format here is another (see docs/design.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from aqt.jax.v2 import aqt_quantizer, aqt_tensor
from flax import struct
from jax import lax

from er_jax import products
from er_jax.arguments import MOST, is_whole
from er_jax.lora import LoRAWeight
from er_jax.types import Params, Span, wide_dtype
from er_jax.types import TiedEmbedding as TiedEmbedding

# The window of drafts that "auto" chooses from, beside all positions.
AUTO_WINDOW = 512

# A weight whose path contains this word is the vocabulary projection.
PROJECTION = "lm_head"


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """How the draft is made from the policy.

    Args:
      bits: 8 or 4, of every quantized weight.
      projection_bits: 8 or 4, of the vocabulary projection: a `TiedEmbedding`, or a
        weight whose path contains "lm_head". None is `bits`.
      group_size: input channels that share a scale; None is one scale per output
        channel. Must divide the input size of every quantized weight.
      act_bits: 8 quantizes activations per token, 16 leaves them alone, "auto" is 8 on
        CPU and 16 elsewhere.
      skip: words; a weight whose path contains one of them is not quantized. Vectors
        never are.
      window: the last positions that drafts see, beside the first `head`; >= 1. Drafts
        then read that much of the cache, however long it is. None is all positions.
        "auto" has the controller choose between all and `AUTO_WINDOW`; with a control
        other than "best" it is all.
      head: the first positions that drafts see where they see a window; >= 0.
    Raises:
      ValueError: any other value.
    """

    bits: int = 8
    projection_bits: int | None = None
    group_size: int | None = None
    act_bits: int | Literal["auto"] = "auto"
    skip: tuple[str, ...] = ("embed", "norm")
    window: int | Literal["auto"] | None = "auto"
    head: int = 64

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise ValueError(f"bits={self.bits!r} is not supported; use 8 or 4")
        bits = self.projection_bits
        if bits is not None and (type(bits) is not int or bits not in (4, 8)):
            raise ValueError(
                f"projection_bits={bits!r} is not supported; use 8, 4 or None, which "
                "is the value of bits"
            )
        size = self.group_size
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(
                f"group_size={size!r} must be a whole number of at least 1; use None "
                "for one scale per output channel"
            )
        if isinstance(self.skip, str) or not all(
            isinstance(word, str) and word for word in self.skip
        ):
            raise ValueError(
                f"skip={self.skip!r} must be several words, none of them empty (an "
                "empty word occurs in every path); give a tuple, as skip=('norm',)"
            )
        # A list, as read from a file, is accepted; a tuple can be hashed.
        object.__setattr__(self, "skip", tuple(self.skip))
        if type(self.act_bits) is float or self.act_bits not in (8, 16, "auto"):
            raise ValueError(
                f"act_bits={self.act_bits!r} is not supported; use 8, 16 or 'auto'"
            )
        if self.window not in (None, "auto") and not is_whole(self.window, 1, MOST):
            raise ValueError(
                f"window={self.window!r} must be a whole number of at least 1, the "
                "positions that drafts see; use None for all of them, or 'auto'"
            )
        if not is_whole(self.head, 0, MOST):
            raise ValueError(
                f"head={self.head!r} must be a whole number of at least 0, the first "
                "positions that drafts see"
            )

    @property
    def quantization(self) -> DrafterConfig:
        """The same without what drafts see, for programs that depend on the rest."""
        return dataclasses.replace(self, window=None, head=0)

    @property
    def spans(self) -> tuple[Span | None, ...]:
        """What drafts may see, the choices of the controller; None is all positions."""
        if self.window is None:
            return (None,)
        if self.window == "auto":
            return (None, Span(self.head, AUTO_WINDOW))
        return (Span(self.head, self.window),)


@struct.dataclass
class QuantizedWeight:
    """An integer weight and its scales, in the place of the float weight.

    Attributes:
      tensor: AQT's container. Codes int8 or int4, `[out, in]`, or `[out, in/g, g]` with
        groups of g; scales float32 `[out, 1]`, or `[out, in/g, 1]`. Leading axes, as of
        stacked layers, come before these.
      is_grouped: static; whether the layout is the grouped one.
      act_bits: static; see `DrafterConfig`.
      scales_inside: static; see `with_scales_inside`.
    """

    tensor: aqt_tensor.QTensor
    is_grouped: bool = struct.field(pytree_node=False)
    act_bits: int | str = struct.field(pytree_node=False)
    scales_inside: bool = struct.field(pytree_node=False, default=False)

    @property
    def codes(self) -> jax.Array:
        """Integer codes."""
        return self.tensor.qvalue

    @property
    def scale(self) -> jax.Array:
        """float32 scales; weight = codes * scale."""
        return self.tensor.scale[0]


@struct.dataclass
class PolicyParams:
    """The policy and its draft in one pytree: two siblings.

    Gradients, optimizer and checkpoints touch `policy` only.

    Attributes:
      policy: the live parameters.
      draft: their quantized view, with the same structure. A leaf that is not quantized
        may be None and is then the policy's own; `attach_draft` leaves all of these
        None, so that no embedding table is stored twice. So is the pair of a
        `LoRAWeight`, of which the draft has the quantized base.
      others: further drafts, such as one of 4 bits beside one of 8. With "best" the
        controller chooses among all of them; other controls use `draft`.
    """

    policy: Params
    draft: Params
    others: tuple[Params, ...] = ()

    @property
    def drafts(self) -> tuple[Params, ...]:
        """All drafts, `draft` first."""
        return (self.draft, *self.others)

    def only(self, draft: int) -> PolicyParams:
        """Return the policy with one of its drafts, by number."""
        return PolicyParams(policy=self.policy, draft=self.drafts[draft])


def is_weight(leaf: Any) -> bool:
    """Whether a node of a parameter tree is one weight: `is_leaf` of `jax.tree.map`."""
    return isinstance(leaf, QuantizedWeight | TiedEmbedding | LoRAWeight)


def _quantize_weight(
    weight: jax.Array, path: str, config: DrafterConfig, bits: int
) -> Any:
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"parameter {path} has dtype {weight.dtype}; only floating-point weights "
            "can be quantized: name it in DrafterConfig.skip"
        )
    axis = weight.ndim - 1
    # Output channels first: an integer product on CPU or GPU reads this layout as it
    # is, and would copy `[in, out]` into it at every call; so would a GPU that unpacks
    # int4, which wants to find neighbours of a sum in one byte.
    weight = jnp.swapaxes(weight, axis - 1, axis)
    if config.group_size is not None:
        size = weight.shape[axis]
        if size % config.group_size:
            raise ValueError(
                f"group_size={config.group_size} does not divide the input size {size} "
                f"of {path}; use a divisor of it, or name {path} in DrafterConfig.skip"
            )
        groups = (size // config.group_size, config.group_size)
        weight = weight.reshape(weight.shape[:axis] + groups)
        axis += 1
    quantizer = aqt_quantizer.quantizer_make(
        bits, preserve_max_val=True, scale_dtype=jnp.float32
    )
    # Quantized in float32: bfloat16 would round the scale, its inverse and the product
    # before the codes are rounded.
    tensor, _ = quantizer.quant(weight.astype(jnp.float32), calibration_axes=(axis,))
    return QuantizedWeight(
        tensor=tensor.astype(jnp.dtype(jnp.float32)),
        is_grouped=config.group_size is not None,
        act_bits=config.act_bits,
    )


def _quantized_leaves(
    params: Params, config: DrafterConfig, previous: PolicyParams | None = None
) -> Params:
    """Map every quantized leaf to its codes and every other leaf to None.

    previous: an earlier policy with its draft. What is the same array as there keeps
    its codes.
    """
    projection_bits = config.projection_bits or config.bits

    def leaf(
        path: tuple[Any, ...], value: Any, before: Any = None, draft: Any = None
    ) -> Any:
        if isinstance(value, LoRAWeight):
            base = leaf(path, value.base, before, draft)
            pairless = value.replace(base=base, a=None, b=None)  # type: ignore[attr-defined]
            return None if base is None else pairless
        if before is not None and _array(value) is _array(_base(before)):
            return _base(draft)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(value, TiedEmbedding):
            return TiedEmbedding(
                table=None,  # type: ignore[arg-type]
                projection=_quantize_weight(
                    value.table.T, name, config, projection_bits
                ),
            )
        if value.ndim < 2 or any(word in name for word in config.skip):
            return None
        bits = projection_bits if PROJECTION in name else config.bits
        return _quantize_weight(value, name, config, bits)

    earlier = () if previous is None else (previous.policy, previous.draft)
    return jax.tree_util.tree_map_with_path(leaf, params, *earlier, is_leaf=is_weight)


def _base(leaf: Any) -> Any:
    """Return the frozen part of a `LoRAWeight`, and anything else as it is."""
    return leaf.base if isinstance(leaf, LoRAWeight) else leaf


def _array(leaf: Any) -> Any:
    """Return the array that a weight of the policy is quantized from."""
    return leaf.table if isinstance(leaf, TiedEmbedding) else leaf


def draft_params(params: PolicyParams) -> Params:
    """Return the draft with every shared (None) leaf taken from the policy."""

    def fill(policy: Any, draft: Any) -> Any:
        if draft is None:
            return policy
        if isinstance(draft, LoRAWeight) and draft.a is None:
            if not isinstance(policy, LoRAWeight):
                raise ValueError("the draft is of a policy with low-rank pairs")
            return policy.replace(base=draft.base)  # type: ignore[attr-defined]
        if isinstance(draft, TiedEmbedding) and draft.table is None:
            return draft.replace(table=policy.table)  # type: ignore[attr-defined]
        return draft

    return jax.tree.map(fill, params.policy, params.draft, is_leaf=is_weight)


def with_scales_inside(params: PolicyParams) -> PolicyParams:
    """Have a program for NVIDIA GPUs scale the groups of a draft inside its products.

    Codes are then scaled one by one on their way into the product, in float32, and
    rounded once to the type of the activations. That moves the codes and scales only,
    where sums per group would be written to memory. But XLA does so only when told to
    (`engine.lowering`); else it would write the whole scaled weight. Programs for other
    devices are as before.
    """

    def inside(leaf: Any) -> Any:
        if isinstance(leaf, TiedEmbedding):
            return leaf.replace(  # type: ignore[attr-defined]
                projection=inside(leaf.projection)
            )
        if isinstance(leaf, LoRAWeight):
            return leaf.replace(base=inside(leaf.base))  # type: ignore[attr-defined]
        if isinstance(leaf, QuantizedWeight):
            return leaf.replace(scales_inside=True)  # type: ignore[attr-defined]
        return leaf

    draft = jax.tree.map(inside, params.draft, is_leaf=is_weight)
    return PolicyParams(policy=params.policy, draft=draft)


def drafter_configs(
    config: DrafterConfig | Sequence[DrafterConfig],
) -> tuple[DrafterConfig, ...]:
    """Return one config, or several, as a tuple.

    Raises:
      ValueError: neither; or none at all.
    """
    found = (config,) if isinstance(config, DrafterConfig) else config
    is_several = isinstance(found, tuple | list) and len(found) > 0
    if not is_several or not all(isinstance(one, DrafterConfig) for one in found):
        raise ValueError(
            f"drafter={config!r} is no DrafterConfig, nor several of them; give "
            "er_jax.DrafterConfig(...), or a tuple with one for each draft"
        )
    return tuple(found)


def attach_draft(
    params: Params,
    config: DrafterConfig | Sequence[DrafterConfig],
    *,
    previous: PolicyParams | None = None,
) -> PolicyParams:
    """Derive the draft of `params`, or several, and return all as one pytree.

    Pure and jittable. At the end of the jitted parameter update a draft costs one more
    pass over the weights that have changed. It holds the quantized leaves only.

    Args:
      params: the policy's parameters.
      config: how to quantize them; a sequence makes a draft for each entry.
      previous: earlier parameters with drafts by the same config. A weight, or base of
        a `LoRAWeight`, that is the very array it was there keeps its codes and is not
        read. Inside `jax.jit` that is the same traced array.
    Returns:
      `PolicyParams`; `policy` is `params` itself.
    Raises:
      ValueError: as `drafter_configs` and `quantize`; `previous` with another number of
        drafts.
    """
    configs = drafter_configs(config)
    if previous is not None:
        check_number(previous, configs)
    first, *others = (
        _quantized_leaves(params, one, previous and previous.only(number))
        for number, one in enumerate(configs)
    )
    return PolicyParams(policy=params, draft=first, others=tuple(others))


def quantize(params: Params, config: DrafterConfig) -> Params:
    """Return draft parameters: `params` with its weight matrices quantized.

    Every leaf of rank 2 or more whose path contains no word of `config.skip` is
    quantized over its last-but-one axis, the input of `[..., in, out]`. All other
    leaves are returned as they are. Codes keep the sharding of their weight.

    Args:
      params: pytree of floating-point arrays.
      config: bits, groups, activation bits, names to skip.
    Returns:
      A tree of the same structure with a `QuantizedWeight` for every quantized array;
      usable wherever the policy's parameters are.
    Raises:
      ValueError: a group size that does not divide an input size, or an integer weight.
    Accuracy: the codes are weight / (absmax / 127) rounded to nearest (absmax / 7 for 4
      bits); tests/test_drafter.py compares bit for bit.
    """
    return draft_params(attach_draft(params, config))


def check_draft(params: PolicyParams) -> None:
    """Check on the host that drafts have the structure and shapes of their policy.

    Args:
      params: policy and drafts, of arrays or of `jax.ShapeDtypeStruct`.
    Raises:
      ValueError: another structure or another shape; it names the first such weight.
    """
    for number in range(len(params.drafts)):
        name = f"params.others[{number - 1}]" if number else "params.draft"
        _check_draft(params.only(number), name)


def check_number(params: PolicyParams, configs: Sequence[DrafterConfig]) -> None:
    """Check that there is a config for every draft; `ValueError` otherwise."""
    if len(params.drafts) != len(configs):
        raise ValueError(
            f"params has {len(params.drafts)} drafts, and drafter {len(configs)} "
            "configs; give one DrafterConfig for each draft, in their order"
        )


def _check_draft(params: PolicyParams, of: str) -> None:
    """Check one draft, named `of` in messages."""
    remedy = "make the draft with er_jax.attach_draft(params, config)"
    try:
        merged = draft_params(params)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{of} has another structure than params.policy; {remedy}"
        ) from error

    def weight_shape(leaf: Any) -> tuple[int, ...]:
        leaf = _base(leaf)
        if isinstance(leaf, TiedEmbedding):
            return tuple(leaf.table.shape)
        if isinstance(leaf, QuantizedWeight) and leaf.is_grouped:
            *stack, out, groups, size = leaf.codes.shape
            return (*stack, groups * size, out)
        if isinstance(leaf, QuantizedWeight):
            *stack, out, size = leaf.codes.shape
            return (*stack, size, out)
        return tuple(leaf.shape)

    def compare(path: tuple[Any, ...], policy: Any, draft: Any) -> None:
        wanted, found = weight_shape(policy), weight_shape(draft)
        if isinstance(draft, TiedEmbedding) and draft.projection is not None:
            found = weight_shape(draft.projection)[::-1]
        if wanted != found:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{of} has shape {found} at {name}, where params.policy has "
                f"{wanted}; {remedy}"
            )

    jax.tree_util.tree_map_with_path(compare, params.policy, merged, is_leaf=is_weight)


def dot(x: jax.Array, w: Any, *, out_dtype: Any = None) -> jax.Array:
    """Multiply activations by a weight of any kind: the one product of a policy.

    Args:
      x: `[..., in]`.
      w: an array `[in, out]`, a `QuantizedWeight` of one, a `TiedEmbedding`, or a
        `LoRAWeight`, whose base gets no gradient.
      out_dtype: dtype of the result; None is the dtype of `x`. Sums are always float32
        or wider.
    Returns:
      `[..., out]`.
    Raises:
      TypeError: while tracing; the last axis of `x` is not the input of `w`.
    """
    if x.ndim == 1:
        return dot(x[None], w, out_dtype=out_dtype)[0]
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if isinstance(w, LoRAWeight):
        wide = wide_dtype(x.dtype)
        whole = dot(x, lax.stop_gradient(w.base), out_dtype=wide)
        change = dot(dot(x, w.a.astype(x.dtype)), w.b.astype(x.dtype), out_dtype=wide)
        return (whole + w.scale * change).astype(out_dtype)
    if isinstance(w, TiedEmbedding):
        if w.projection is not None:
            return dot(x, w.projection, out_dtype=out_dtype)
        return products.of_floats(x, w.table, 1, out_dtype)
    if isinstance(w, QuantizedWeight):
        product = products.of_codes(
            x, w.codes, w.scale, act_bits=w.act_bits, scales_inside=w.scales_inside
        )
        return product.astype(out_dtype)
    return products.of_floats(x, w, 0, out_dtype)
