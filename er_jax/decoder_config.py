"""Sizes and switches of the built-in decoder.

Every family of models that `decoder.Decoder` runs is a set of these values;
`io.hf_config` reads them from the config.json of a checkpoint.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from er_jax.rotary import LinearScaling, RopeScaling

Activation = Literal["silu", "gelu"]


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
      hidden_dim: width of the gated feed-forward layer.
      rope_theta: base of the rotary frequencies.
      rope_scaling: scaling of these frequencies; None is no scaling.
      norm_eps: added to the mean square in RMSNorm.
      qkv_bias: biases on the q, k and v projections (Qwen2).
      o_bias: bias on the output projection of attention.
      qk_norm: RMSNorm over each head's q and k (Qwen3, Gemma 3).
      tied_embeddings: the vocabulary projection is the embedding table.
      max_length: context length of the model in tokens; longer rollouts are refused.
        None is no limit.
      dtype: of parameters, activations and cache: "float32", "bfloat16" or "float64"
        (the last needs jax_enable_x64).
      activation: of the feed-forward layer: "silu", or "gelu" in its tanh form (Gemma).
      norm_offset: RMSNorm multiplies by 1 + weight (Gemma).
      post_norms: RMSNorm also after attention and after the feed-forward layer, before
        either is added to the residual stream (Gemma 3).
      scaled_embeddings: looked-up embeddings are multiplied by sqrt(dim) (Gemma).
      query_scalar: attention scores are divided by its square root; None is D.
      logit_cap: logits x become cap * tanh(x / cap); None leaves them alone.
      window: positions that a token sees in a local layer, its own included; None makes
        all layers global.
      global_layers: the layers that see all positions although there is a window,
        ascending; the others are local.
      local_rope_theta: base of the rotary frequencies of local layers, which are not
        scaled; None gives them base and scaling of global ones.
      num_experts: E, experts of a sparse feed-forward layer; 0 makes all layers dense.
      experts_per_token: experts that a token is given to.
      expert_dim: width of an expert.
      scaled_routing: a token's weights of its experts are scaled to add up to 1.
      dense_layers: layers without experts, ascending; `hidden_dim` is their width.
    Raises:
      ValueError: values that do not fit together.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_dim: int
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | LinearScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    max_length: int | None = None
    dtype: str = "float32"
    activation: Activation = "silu"
    norm_offset: bool = False
    post_norms: bool = False
    scaled_embeddings: bool = False
    query_scalar: float | None = None
    logit_cap: float | None = None
    window: int | None = None
    global_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_dim: int = 0
    scaled_routing: bool = True
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("global_layers", "dense_layers"):
            if isinstance(getattr(self, name), list):
                # As read from a file; a tuple can be hashed.
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("head_dim", "max_length", "window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least 1, or None"
                )
        # The bounds also refuse NaN and what float32 rounds to zero or infinity.
        for name, low, high in (
            ("rope_theta", 1, 1e18),
            ("norm_eps", 1e-30, 1),
            ("local_rope_theta", 1, 1e18),
            ("query_scalar", 1e-6, 1e9),
            ("logit_cap", 1e-6, 1e9),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value} must be from {low:g} to {high:g}")
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
        if self.activation not in get_args(Activation):
            raise ValueError(
                f"activation={self.activation!r} is not supported; use 'silu' or 'gelu'"
            )
        self._check_experts()
        self._check_layers("dense_layers")
        self._check_layers("global_layers")
        if self.window is None:
            for name, empty in (("global_layers", ()), ("local_rope_theta", None)):
                if getattr(self, name) != empty:
                    raise ValueError(
                        f"{name}={getattr(self, name)} means nothing where all layers "
                        f"are global; give a window, or {name}={empty}"
                    )

    def _check_experts(self) -> None:
        """Refuse sizes of experts that do not fit together."""
        if not self.num_experts:
            for name, empty in (
                ("experts_per_token", 0), ("expert_dim", 0), ("dense_layers", ()),
            ):  # fmt: skip
                if getattr(self, name) != empty:
                    raise ValueError(
                        f"{name}={getattr(self, name)} means nothing without experts; "
                        f"give num_experts, or {name}={empty}"
                    )
            return
        for name in ("num_experts", "expert_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must be from 1 to "
                f"num_experts={self.num_experts}"
            )

    def _check_layers(self, name: str) -> None:
        """Refuse anything but ascending numbers of layers; keep them as a tuple."""
        layers = tuple(getattr(self, name))
        if list(layers) != sorted({*layers} & {*range(self.num_layers)}):
            raise ValueError(
                f"{name}={layers} must be ascending numbers of layers, from 0 to "
                f"{self.num_layers - 1}, none of them twice"
            )
        object.__setattr__(self, name, layers)

    @property
    def head_size(self) -> int:
        """D, with its default resolved."""
        return self.head_dim or self.dim // self.num_heads

    def window_of(self, layer: int) -> int | None:
        """Return the positions that a token sees in a layer; None is all of them."""
        return None if layer in self.global_layers else self.window

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's feed-forward part is made of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers
