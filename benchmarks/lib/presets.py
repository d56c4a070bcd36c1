"""Decoders that are measured: shapes of real families, with random parameters.

Left out: trained policies (`trained`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

import er_jax
from er_jax import Decoder, DecoderConfig, DrafterConfig

PRESETS: dict[str, DecoderConfig] = {
    # For checking the scripts; too small to say anything about speed.
    "tiny": DecoderConfig(
        vocab_size=128,
        dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        hidden_dim=128,
    ),
    # A little wider than what `python -m train.grpo` trains; fits in a core's cache.
    "3M": DecoderConfig(
        vocab_size=512,
        dim=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        hidden_dim=704,
    ),
    # Does not fit in a core's cache: every token's weights come from memory.
    "90M": DecoderConfig(
        vocab_size=8192,
        dim=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        hidden_dim=2048,
    ),
    # Qwen2.5-7B.
    "7B": DecoderConfig(
        vocab_size=152_064,
        dim=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        hidden_dim=18_944,
        head_dim=128,
        rope_theta=1_000_000.0,
        qkv_bias=True,
        dtype="bfloat16",
    ),
}

DRAFTERS: dict[str, DrafterConfig] = {
    "int8": DrafterConfig(bits=8),
    "int4": DrafterConfig(bits=4),
    "int4g128": DrafterConfig(bits=4, group_size=128),
    "int4g32": DrafterConfig(bits=4, group_size=32),
}


def decoder(
    name: str, *, dtype: str | None = None, num_layers: int | None = None
) -> Decoder:
    """Return a preset's decoder, in another precision or of another depth if given.

    Raises:
      ValueError: there is no preset of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; use one of {', '.join(PRESETS)}")
    config = PRESETS[name]
    return Decoder(
        dataclasses.replace(
            config,
            dtype=dtype or config.dtype,
            num_layers=num_layers or config.num_layers,
        )
    )


def drafter(name: str) -> DrafterConfig:
    """Return how the draft of this name is quantized.

    Raises:
      ValueError: there is no draft of this name.
    """
    if name not in DRAFTERS:
        raise ValueError(f"draft {name!r} is unknown; use one of {', '.join(DRAFTERS)}")
    return DRAFTERS[name]


def random_params(policy: Decoder, seed: int = 0) -> Any:
    """Return random parameters of a decoder."""
    return policy.init(jax.random.key(seed))


@functools.partial(jax.jit, static_argnames=("config",))
def _draft_of(params: Any, *, config: DrafterConfig) -> Any:
    return er_jax.attach_draft(params, config).draft


def drafts(params: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the drafts of a decoder's parameters by name, shared leaves left out.

    They are made layer by layer: layers are alike, so one small program serves all.
    """
    found = {}
    for name in names:
        derive = functools.partial(_draft_of, config=drafter(name))
        rest = {key: value for key, value in params.items() if key != "layers"}
        layers = [derive(layer) for layer in params["layers"]]
        found[name] = {**derive(rest), "layers": layers}
    return found


def num_params(params: Any) -> int:
    """Return how many numbers the parameters hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
