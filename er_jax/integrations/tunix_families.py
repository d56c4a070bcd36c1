"""Where Tunix's families of models keep what the built-in decoder needs.

A `Family` says which array of theirs becomes which leaf of ours, as a list of `Leaf`s,
and what their configuration means in `DecoderConfig`. Their attention weights keep the
heads apart, and may be stacked; ours are matrices, `[d, H * D]`.

Arrays are known by their paths, joined by slashes; neither Tunix nor Flax NNX is
imported.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from er_jax.rotary import LinearScaling


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of ours and the array of theirs that it is made from.

    ours: its name. theirs: the path of the array, within a layer for leaves of layers.
    merged: for each axis of ours, inputs first, the axes of theirs that it merges; None
      is as it is. An axis that is not named stacks several weights.
    part: the number of ours among those stacked.
    is_whole: whether every device holds all of it. The norms of a step would otherwise
      be gathered one by one; they are small.
    """

    ours: str
    theirs: str
    merged: tuple[tuple[int, ...], ...] | None = None
    part: int = 0
    is_whole: bool = False

    def groups(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Return `merged`, for an array of some rank."""
        return self.merged or tuple((axis,) for axis in range(rank))

    def shape(self, theirs: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the leaf, given that of the array."""
        groups = self.groups(len(theirs))
        return tuple(math.prod(theirs[axis] for axis in group) for group in groups)

    def made_from(self, array: jax.Array) -> jax.Array:
        """Return the leaf."""
        if self.merged is None:
            return array
        order = [*itertools.chain(*self.merged)]
        stack = [axis for axis in range(array.ndim) if axis not in order]
        x = array.transpose(*stack, *order)
        return x.reshape(-1, *self.shape(array.shape))[self.part]

    def inputs_first(self, rank: int) -> list[int]:
        """Return the axes of theirs in the order of a product of LoRA parameters.

        A has the axes of the input, B all others, each in their order.
        """
        inputs = self.groups(rank)[0]
        return [*inputs, *(axis for axis in range(rank) if axis not in inputs)]


HEADS_OUT = ((0,), (1, 2))  # [d, H, D] -> [d, H * D]
HEADS_IN = ((0, 1), (2,))  # [H, D, d] -> [H * D, d]
HEADS_FIRST = ((1,), (0, 2))  # [H, d, D] -> [d, H * D]
STACKED = ((2,), (1, 3))  # one of [2 or 3, H, d, D] -> [d, H * D]

MLP = tuple(Leaf(f"{x}_proj", f"mlp/{x}_proj/kernel") for x in ("gate", "up", "down"))
LAYER = (
    Leaf("attn_norm", "input_layernorm/w", is_whole=True),
    Leaf("q_proj", "attn/q_proj/w", HEADS_OUT),
    Leaf("k_proj", "attn/k_proj/w", HEADS_OUT),
    Leaf("v_proj", "attn/v_proj/w", HEADS_OUT),
    Leaf("o_proj", "attn/o_proj/w", HEADS_IN),
    Leaf("mlp_norm", "post_attention_layernorm/w", is_whole=True),
    *MLP,
)
BIASES = tuple(Leaf(f"{x}_bias", f"attn/{x}_bias") for x in "qkv")
HEAD_NORMS = tuple(Leaf(f"{x}_norm", f"attn/{x}_norm/w", is_whole=True) for x in "qk")
EMBED = Leaf("embed", "embedder/input_embedding")
TOP = (EMBED, Leaf("final_norm", "final_norm/w", is_whole=True))
PROJECTION = Leaf("lm_head", "lm_head/w")

GEMMA3_LAYER = (
    *(
        Leaf(ours, f"{theirs}/scale", is_whole=True)
        for ours, theirs in (
            ("attn_norm", "pre_attention_norm"),
            ("attn_out_norm", "post_attention_norm"),
            ("mlp_norm", "pre_ffw_norm"),
            ("mlp_out_norm", "post_ffw_norm"),
            ("q_norm", "attn/_query_norm"),
            ("k_norm", "attn/_key_norm"),
        )
    ),
    Leaf("o_proj", "attn/attn_vec_einsum/w", HEADS_IN),
    *MLP,
)
# Queries apart from keys and values, and, with as many heads of each, all in one.
GEMMA3_APART = (
    Leaf("q_proj", "attn/q_einsum/w", HEADS_FIRST),
    Leaf("k_proj", "attn/kv_einsum/w", STACKED, 0),
    Leaf("v_proj", "attn/kv_einsum/w", STACKED, 1),
)
GEMMA3_IN_ONE = tuple(
    Leaf(f"{x}_proj", "attn/qkv_einsum/w", STACKED, i) for i, x in enumerate("qkv")
)
GEMMA3_TOP = (EMBED, Leaf("final_norm", "final_norm/scale", is_whole=True))

# Constants of Tunix's Gemma 3.
GEMMA3_EPS, GEMMA3_PATTERN = 1e-6, 6


def _fields(config: Any, num_layers: int) -> dict[str, Any]:
    del num_layers
    return dict(rope_theta=float(config.rope_theta), norm_eps=float(config.norm_eps))


def _gemma3_fields(config: Any, num_layers: int) -> dict[str, Any]:
    if config.local_scale_factor != 1:
        raise ValueError(
            f"rollout_actor: local_scale_factor={config.local_scale_factor} is not "
            "supported, er_jax's decoder scales the positions of global layers only; "
            "use 1, or rollout_engine='vanilla'"
        )
    scale = float(config.global_scale_factor)
    by_width = config.query_pre_attn_norm.name.endswith("EMBED_DIM_DIV_NUM_HEADS")
    return dict(
        rope_theta=float(config.global_base_frequency),
        rope_scaling=None if scale == 1 else LinearScaling(scale),
        local_rope_theta=float(config.local_base_frequency),
        window=config.sliding_window_size,
        global_layers=tuple(range(GEMMA3_PATTERN - 1, num_layers, GEMMA3_PATTERN)),
        query_scalar=config.embed_dim // config.num_heads if by_width else None,
        norm_eps=GEMMA3_EPS,
        activation="gelu",
        norm_offset=True,
        post_norms=True,
        scaled_embeddings=True,
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of a class of Tunix's are made.

    layers: the leaves of a layer; of several lists, a model has the first of which it
      has all arrays. top: the leaves outside of layers, but for `PROJECTION`.
    fields: those of `DecoderConfig` that no array shows, from Tunix's configuration and
      the number of layers.
    """

    layers: tuple[tuple[Leaf, ...], ...]
    top: tuple[Leaf, ...] = TOP
    fields: Callable[[Any, int], dict[str, Any]] = _fields

    def layer(self, arrays: Collection[str]) -> tuple[Leaf, ...]:
        """Return the leaves of a layer of the model that has these arrays."""
        for leaves in self.layers:
            if all(f"layers/0/{leaf.theirs}" in arrays for leaf in leaves):
                return leaves
        return self.layers[0]


# By the name of Tunix's class. A family that the decoder learns to run is added here.
FAMILIES: dict[str, Family] = {
    "Llama3": Family((LAYER,)),
    "Qwen2": Family(((*LAYER, *BIASES),)),
    "Qwen3": Family(((*LAYER, *HEAD_NORMS),)),
    "Gemma3": Family(
        ((*GEMMA3_LAYER, *GEMMA3_APART), (*GEMMA3_LAYER, *GEMMA3_IN_ONE)),
        GEMMA3_TOP,
        _gemma3_fields,
    ),
}


def family_of(names: Sequence[str]) -> str:
    """Return the family of a model.

    Args:
      names: of its class and of the classes that it derives from.
    Raises:
      ValueError: it is of no family that can be sampled.
    """
    found = next((name for name in names if name in FAMILIES), None)
    if found is None:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"rollout_actor is a {names[0]}; of Tunix's models, er_jax samples {known} "
            "and those derived from them. Use rollout_engine='vanilla' for others, "
            "Gemma 1, 2 and 4 among them"
        )
    return found
