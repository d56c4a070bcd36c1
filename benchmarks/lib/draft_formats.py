"""Drafts by quantization format, the vocabulary projection apart from the rest."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

import er_jax
from er_jax import DrafterConfig, PolicyParams

HEAD = "lm_head"


@dataclasses.dataclass(frozen=True)
class Format:
    """How a draft is quantized.

    head: the vocabulary projection. body: all other weights.
    """

    name: str
    body: DrafterConfig
    head: DrafterConfig


def formats() -> list[Format]:
    """Return 8 and 4 bits, several groups, and both with a head of 8 and of 4 bits."""
    bodies = {
        "W8A8": DrafterConfig(bits=8, act_bits=8),
        "W8A16": DrafterConfig(bits=8, act_bits=16),
        "W4A16": DrafterConfig(bits=4, act_bits=16),
        **{
            f"W4A16 g{size}": DrafterConfig(bits=4, act_bits=16, group_size=size)
            for size in (128, 64, 32)
        },
    }
    found = []
    for name, body in bodies.items():
        for bits in (8, 4):
            head = dataclasses.replace(
                body, bits=bits, group_size=None if bits == 8 else body.group_size
            )
            found.append(Format(f"{name}, head {bits}", body, head))
    return found


def draft_of(params: Any, form: Format) -> PolicyParams:
    """Return the parameters with a draft of this format.

    Where the groups' size does not divide an input, it is the next smaller one that
    does.
    """

    def leaf(path: tuple[Any, ...], weight: jax.Array) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        config = form.head if name == HEAD else form.body
        if config.group_size is not None and weight.ndim > 1:
            size = weight.shape[-2]
            group = next(g for g in range(config.group_size, 0, -1) if size % g == 0)
            config = dataclasses.replace(config, group_size=group)
        return er_jax.attach_draft({name: weight}, config).draft[name]

    return PolicyParams(params, jax.tree_util.tree_map_with_path(leaf, params))
