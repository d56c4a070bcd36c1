"""Rotary positions of the built-in decoder: frequencies, their scalings, the rotation.

Pairs (i, i + D/2) of a head are turned by position times frequency i (half rotation).
Left out: partial rotation, scalings other than Llama 3's and the linear one.

Source: Su et al. 2021 (arXiv 2104.09864).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from er_jax.types import wide_dtype

# cos and sin `[B, T, 1, D/2]` of the rotary angles, float32 or wider.
Rotation: TypeAlias = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies scaled for longer contexts, as in Llama 3.1.

    Wavelengths above original_length / low_freq_factor become `factor` times as long;
    those below original_length / high_freq_factor stay. In between, the two frequencies
    are mixed linearly in the number of turns within `original_length`.

    Args:
      factor: >= 1.
      low_freq_factor: above 0.
      high_freq_factor: above `low_freq_factor`.
      original_length: context length of the model before the scaling, in tokens.
    Raises:
      ValueError: a number outside its range.

    Source: the Llama 3.1 release; "llama3" in Hugging Face configurations.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"factor={self.factor} must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be above 0 and below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.original_length < 1:
            raise ValueError(
                f"original_length={self.original_length} must be at least 1"
            )

    def scaled(self, frequency: np.ndarray) -> np.ndarray:
        """Return the scaled frequencies, in radians per position."""
        number = frequency.dtype.type
        wave = number(2 * math.pi) / frequency
        turns = number(self.original_length) / wave
        span = number(self.high_freq_factor - self.low_freq_factor)
        kept = np.clip((turns - number(self.low_freq_factor)) / span, 0, 1)
        # Exact at both ends, where `kept` is 0 or 1.
        return (1 - kept) * frequency / number(self.factor) + kept * frequency


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Rotary frequencies that are all divided by `factor`, as in the larger Gemma 3.

    Args:
      factor: >= 1.
    Raises:
      ValueError: a smaller one.

    Source: Chen et al. 2023 (arXiv 2306.15595); "linear" in Hugging Face
    configurations.
    """

    factor: float

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"factor={self.factor} must be at least 1")

    def scaled(self, frequency: np.ndarray) -> np.ndarray:
        """Return the scaled frequencies, in radians per position."""
        return frequency / frequency.dtype.type(self.factor)


def rotation(
    positions: jax.Array,
    size: int,
    theta: float,
    scaling: RopeScaling | LinearScaling | None,
    dtype: Any,
) -> Rotation:
    """Return cos and sin of the rotary angles.

    Args:
      positions: int32 `[B, T]`. size: D. theta: base of the frequencies.
      scaling: of the frequencies; None is none. dtype: of what will be rotated.
    """
    wide = jnp.dtype(wide_dtype(dtype))
    # Frequencies are computed on the host, each step rounded once: the angle multiplies
    # a frequency's error by the position, and accelerators approximate powers.
    exponent = (np.arange(0, size, 2) / size).astype(wide)
    power = (float(theta) ** exponent.astype(np.float64)).astype(wide)
    frequency = 1 / power
    if scaling is not None:
        frequency = scaling.scaled(frequency)
    angle = positions.astype(wide)[..., None] * jnp.asarray(frequency)[None, None]
    return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def rotate(x: jax.Array, turn: Rotation) -> jax.Array:
    """Rotate the pairs (i, i + D/2) of `[B, T, heads, D]` by their angles."""
    cos, sin = turn
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
