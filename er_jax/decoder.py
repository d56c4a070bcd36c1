"""The built-in policy: a decoder of the Llama / Qwen2 / Qwen3 family.

RMSNorm, rotary positions (half rotation, Llama 3's scaling), grouped-query attention
with optional biases and q/k norm, SwiGLU, optionally tied embeddings. Every weight is
multiplied with `drafter.dot`, so the same `forward` runs target, draft and trainer.

Layers are separate leaves and the loop over them is unrolled: under a scan, a GPU would
first copy each layer's weights out of the stack, one more read and write of all weights
per step.

Left out: mixture of experts, sliding windows, partial rotary positions, other rotary
scalings, dropout.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from er_jax import kv_cache
from er_jax.drafter import TiedEmbedding, dot
from er_jax.types import Cache, Params, wide_dtype


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
class DecoderConfig:
    """Sizes and switches of a `Decoder`.

    Args:
      vocab_size: V, token ids.
      dim: width of the residual stream.
      num_layers: L.
      num_heads: H.
      num_kv_heads: K, divides H.
      head_dim: D, even; None is dim / num_heads.
      hidden_dim: width of the SwiGLU layer.
      rope_theta: base of the rotary frequencies.
      rope_scaling: scaling of these frequencies; None is no scaling.
      norm_eps: added to the mean square in RMSNorm.
      qkv_bias: biases on the q, k and v projections (Qwen2).
      o_bias: bias on the output projection of attention.
      qk_norm: RMSNorm over each head's q and k (Qwen3).
      tied_embeddings: the vocabulary projection is the embedding table.
      max_length: context length of the model in tokens; longer rollouts are refused.
        None is no limit.
      dtype: of parameters, activations and cache: "float32", "bfloat16" or "float64"
        (the last needs jax_enable_x64).
    Raises:
      ValueError: sizes that do not fit together.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_dim: int
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    max_length: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("head_dim", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least 1, or None"
                )
        # The bounds also refuse NaN and what float32 rounds to zero or infinity.
        for name, low, high in (("rope_theta", 1, 1e18), ("norm_eps", 1e-30, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be from {low:g} to {high:g}"
                )
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads="
                f"{self.num_heads}; use one of its divisors"
            )
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide dim={self.dim}; give "
                "head_dim explicitly"
            )
        if self.head_size % 2:
            raise ValueError(
                f"head_dim={self.head_size} must be even: rotary positions turn pairs"
            )
        if self.dtype not in ("float32", "bfloat16", "float64"):
            raise ValueError(
                f"dtype={self.dtype!r} is not supported; use 'float32', 'bfloat16' or "
                "'float64'"
            )

    @property
    def head_size(self) -> int:
        """D, with its default resolved."""
        return self.head_dim or self.dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A `Policy`: `DecoderConfig` plus the four functions of the protocol.

    Args:
      config: sizes and switches.
      source: directory of the checkpoint that the policy was read from, or None.
      source_config: text of the config.json there, or None. Neither is part of the
        policy's equality or hash.
    """

    config: DecoderConfig
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)
    source_config: str | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    @property
    def max_length(self) -> int | None:
        """Context length of the model in tokens; None is no limit."""
        return self.config.max_length

    def parameter_dtype(self) -> jnp.dtype:
        """Return the dtype of parameters.

        Raises:
          ValueError: float64 without 64-bit mode.
        """
        dtype = jnp.dtype(self.config.dtype)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"dtype={self.config.dtype!r} needs 64-bit mode; set jax.config.update("
                "'jax_enable_x64', True) first"
            )
        return dtype

    def init(self, key: jax.Array) -> Params:
        """Return random parameters: normal, scaled by 1 / sqrt(input size).

        Args:
          key: a JAX random key.
        Returns:
          A dict with `embed`, `layers` (a list of L dicts), `final_norm` and, unless
          tied, `lm_head`. Weights are `[in, out]` and named as in Hugging Face
          checkpoints.
        """
        c = self.config
        dtype = self.parameter_dtype()
        keys = iter(jax.random.split(key, 7 * c.num_layers + 2))

        def weight(num_in: int, num_out: int) -> jax.Array:
            draw = jax.random.normal(next(keys), (num_in, num_out), dtype)
            return draw * jnp.asarray(num_in**-0.5, dtype)

        def layer() -> Params:
            q_out, kv_out = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
            params: dict[str, Any] = {
                "attn_norm": jnp.ones(c.dim, dtype),
                "q_proj": weight(c.dim, q_out),
                "k_proj": weight(c.dim, kv_out),
                "v_proj": weight(c.dim, kv_out),
                "o_proj": weight(q_out, c.dim),
                "mlp_norm": jnp.ones(c.dim, dtype),
                "gate_proj": weight(c.dim, c.hidden_dim),
                "up_proj": weight(c.dim, c.hidden_dim),
                "down_proj": weight(c.hidden_dim, c.dim),
            }
            if c.qkv_bias:
                params["q_bias"] = jnp.zeros(q_out, dtype)
                params["k_bias"] = jnp.zeros(kv_out, dtype)
                params["v_bias"] = jnp.zeros(kv_out, dtype)
            if c.o_bias:
                params["o_bias"] = jnp.zeros(c.dim, dtype)
            if c.qk_norm:
                params["q_norm"] = jnp.ones(c.head_size, dtype)
                params["k_norm"] = jnp.ones(c.head_size, dtype)
            return params

        params: dict[str, Any] = {
            "layers": [layer() for _ in range(c.num_layers)],
            "final_norm": jnp.ones(c.dim, dtype),
        }
        if c.tied_embeddings:
            # The projection needs these small weights; the look-up has no scale.
            params["embed"] = TiedEmbedding(table=weight(c.dim, c.vocab_size).T)
        else:
            params["embed"] = jax.random.normal(
                next(keys), (c.vocab_size, c.dim), dtype
            )
            params["lm_head"] = weight(c.dim, c.vocab_size)
        return params

    def init_cache(self, rows: int, length: int) -> Cache:
        """Return zeroed keys and values: two leaves `[rows, length, K * D]` a layer."""
        c = self.config
        shape = (rows, length, c.num_kv_heads * c.head_size)
        dtype = jnp.dtype(c.dtype)
        return [
            {"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)}
            for _ in range(c.num_layers)
        ]

    def forward(
        self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Run T new tokens per row; see `Policy.forward`. Hidden is `[B, T, dim]`."""
        c = self.config
        embed = params["embed"]
        table = embed.table if isinstance(embed, TiedEmbedding) else embed
        x = jnp.take(table, tokens, axis=0)
        rotation = _rotation(positions, c, x.dtype)
        new_cache = []
        for layer, entries in zip(params["layers"], cache, strict=True):
            attended, entries = self._attention(
                layer,
                _rms_norm(x, layer["attn_norm"], c.norm_eps),
                rotation,
                positions,
                entries,
            )
            x = x + attended
            h = _rms_norm(x, layer["mlp_norm"], c.norm_eps)
            gate = jax.nn.silu(dot(h, layer["gate_proj"]))
            x = x + dot(gate * dot(h, layer["up_proj"]), layer["down_proj"])
            new_cache.append(entries)
        return _rms_norm(x, params["final_norm"], c.norm_eps), new_cache

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Project `[B, T, dim]` to logits `[B, T, V]`, float32 or wider."""
        head = params["embed"] if self.config.tied_embeddings else params["lm_head"]
        return dot(hidden, head, out_dtype=wide_dtype(hidden.dtype))

    def _attention(
        self,
        layer: Params,
        x: jax.Array,
        rotation: Any,
        positions: jax.Array,
        entries: dict[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.config
        q, k, v = (dot(x, layer[f"{name}_proj"]) for name in "qkv")
        if c.qkv_bias:
            # Biases are vectors; under strict rank promotion they are broadcast here.
            q, k, v = (
                y + layer[f"{name}_bias"][None, None]
                for y, name in ((q, "q"), (k, "k"), (v, "v"))
            )
        q = q.reshape(*q.shape[:2], c.num_heads, c.head_size)
        k = k.reshape(*k.shape[:2], c.num_kv_heads, c.head_size)
        if c.qk_norm:
            q = _rms_norm(q, layer["q_norm"], c.norm_eps)
            k = _rms_norm(k, layer["k_norm"], c.norm_eps)
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        keys = kv_cache.write(entries["keys"], k.reshape(v.shape), positions)
        values = kv_cache.write(entries["values"], v, positions)
        out = kv_cache.attend(q, keys, values, positions)
        out = dot(out, layer["o_proj"])
        if c.o_bias:
            out = out + layer["o_bias"][None, None]
        return out, {"keys": keys, "values": values}


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    wide = wide_dtype(x.dtype)
    y = x.astype(wide)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def _rotation(
    positions: jax.Array, config: DecoderConfig, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin `[B, T, 1, D/2]` of the rotary angles, float32 or wider."""
    wide, size = jnp.dtype(wide_dtype(dtype)), config.head_size
    # Frequencies are computed on the host, each step rounded once: the angle multiplies
    # a frequency's error by the position, and accelerators approximate powers.
    exponent = (np.arange(0, size, 2) / size).astype(wide)
    power = (float(config.rope_theta) ** exponent.astype(np.float64)).astype(wide)
    frequency = 1 / power
    if config.rope_scaling is not None:
        frequency = config.rope_scaling.scaled(frequency)
    angle = positions.astype(wide)[..., None] * jnp.asarray(frequency)[None, None]
    return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def _rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the pairs (i, i + D/2) of `[B, T, heads, D]` by their angles."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
