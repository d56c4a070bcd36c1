"""The built-in policy: a decoder of the Llama, Mistral, Qwen and Gemma 3 families.

RMSNorm, rotary positions, grouped-query attention with optional biases and q/k norm, a
gated feed-forward layer or experts, optionally tied embeddings. Local layers see a
window of the positions and may have rotary frequencies of their own. Every weight is
multiplied with `drafter.dot`, so the same `forward` runs target, draft and trainer.

Layers are separate leaves and the loop over them is unrolled: under a scan, a GPU would
first copy each layer's weights out of the stack, one more read and write of all weights
per step.

Left out: caps on attention scores (Gemma 2), partial rotary positions, dropout. Sizes
and switches are in `decoder_config`, rotations in `rotary`, experts in `experts`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from er_jax import experts, kv_cache
from er_jax.decoder_config import DecoderConfig as DecoderConfig
from er_jax.drafter import TiedEmbedding, dot
from er_jax.rotary import LinearScaling as LinearScaling
from er_jax.rotary import RopeScaling as RopeScaling
from er_jax.rotary import Rotation, rotate, rotation
from er_jax.types import Cache, Params, Ring, Span, wide_dtype


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
          checkpoints; those of experts are stacked, `[E, in, out]`.
        """
        c = self.config
        dtype = self.parameter_dtype()
        per_layer = 8 if c.num_experts else 7
        keys = iter(jax.random.split(key, per_layer * c.num_layers + 2))

        def weight(num_in: int, num_out: int, *stack: int) -> jax.Array:
            draw = jax.random.normal(next(keys), (*stack, num_in, num_out), dtype)
            return draw * jnp.asarray(num_in**-0.5, dtype)

        def norm(size: int) -> jax.Array:
            return jnp.full(size, 0 if c.norm_offset else 1, dtype)

        def layer(index: int) -> Params:
            q_out, kv_out = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
            params: dict[str, Any] = {
                "attn_norm": norm(c.dim),
                "q_proj": weight(c.dim, q_out),
                "k_proj": weight(c.dim, kv_out),
                "v_proj": weight(c.dim, kv_out),
                "o_proj": weight(q_out, c.dim),
                "mlp_norm": norm(c.dim),
            }
            if c.has_experts(index):
                count, size = c.num_experts, c.expert_dim
                params["router"] = weight(c.dim, count)
                params["gate_experts"] = weight(c.dim, size, count)
                params["up_experts"] = weight(c.dim, size, count)
                params["down_experts"] = weight(size, c.dim, count)
            else:
                params["gate_proj"] = weight(c.dim, c.hidden_dim)
                params["up_proj"] = weight(c.dim, c.hidden_dim)
                params["down_proj"] = weight(c.hidden_dim, c.dim)
            if c.qkv_bias:
                params["q_bias"] = jnp.zeros(q_out, dtype)
                params["k_bias"] = jnp.zeros(kv_out, dtype)
                params["v_bias"] = jnp.zeros(kv_out, dtype)
            if c.o_bias:
                params["o_bias"] = jnp.zeros(c.dim, dtype)
            if c.qk_norm:
                params["q_norm"] = norm(c.head_size)
                params["k_norm"] = norm(c.head_size)
            if c.post_norms:
                params["attn_out_norm"] = norm(c.dim)
                params["mlp_out_norm"] = norm(c.dim)
            return params

        params: dict[str, Any] = {
            "layers": [layer(index) for index in range(c.num_layers)],
            "final_norm": norm(c.dim),
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
        """Return zeroed keys and values: two leaves `[rows, length, K * D]` a layer.

        Those of local layers are rings that hold every position; a rollout's state has
        shorter ones (`kv_cache.resize`).
        """
        c = self.config
        shape = (rows, length, c.num_kv_heads * c.head_size)
        dtype = jnp.dtype(c.dtype)

        def entries(layer: int) -> jax.Array | Ring:
            zeros, window = jnp.zeros(shape, dtype), c.window_of(layer)
            return zeros if window is None else Ring(zeros, Span(0, window))

        return [
            {"keys": entries(layer), "values": entries(layer)}
            for layer in range(c.num_layers)
        ]

    def forward(
        self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Run T new tokens per row; see `Policy.forward`. Hidden is `[B, T, dim]`."""
        c = self.config
        embed = params["embed"]
        table = embed.table if isinstance(embed, TiedEmbedding) else embed
        x = jnp.take(table, tokens, axis=0)
        if c.scaled_embeddings:
            # Rounded to the type of the embeddings, as the models were trained.
            x = x * jnp.asarray(c.dim**0.5, x.dtype)
        whole = rotation(positions, c.head_size, c.rope_theta, c.rope_scaling, x.dtype)
        local = whole
        if c.local_rope_theta is not None:
            theta = c.local_rope_theta
            local = rotation(positions, c.head_size, theta, None, x.dtype)
        new_cache = []
        for index, entries in enumerate(cache):
            layer = params["layers"][index]
            turn = whole if c.window_of(index) is None else local
            h = self._norm(x, layer["attn_norm"])
            out, entries = self._attention(layer, h, turn, positions, entries)
            x = x + (self._norm(out, layer["attn_out_norm"]) if c.post_norms else out)
            h = self._norm(x, layer["mlp_norm"])
            out = self._feed_forward(layer, h, positions)
            x = x + (self._norm(out, layer["mlp_out_norm"]) if c.post_norms else out)
            new_cache.append(entries)
        return self._norm(x, params["final_norm"]), new_cache

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Project `[B, T, dim]` to logits `[B, T, V]`, float32 or wider."""
        c = self.config
        head = params["embed"] if c.tied_embeddings else params["lm_head"]
        logits = dot(hidden, head, out_dtype=wide_dtype(hidden.dtype))
        if c.logit_cap is None:
            return logits
        cap = jnp.asarray(c.logit_cap, logits.dtype)
        return cap * jnp.tanh(logits / cap)

    def _norm(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """Return the root-mean-square norm over the last axis, times the weight."""
        c, wide = self.config, wide_dtype(x.dtype)
        y = x.astype(wide)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + c.norm_eps)
        weight = weight.reshape((1,) * (x.ndim - 1) + (-1,))
        if c.norm_offset:
            # Rounded after the product, and Llama's before, as the models were trained.
            return (y * (1 + weight.astype(wide))).astype(x.dtype)
        return y.astype(x.dtype) * weight

    def _feed_forward(
        self, layer: Params, x: jax.Array, positions: jax.Array
    ) -> jax.Array:
        c = self.config
        act = jax.nn.silu if c.activation == "silu" else _gelu
        if "router" not in layer:
            gate = act(dot(x, layer["gate_proj"]))
            return dot(gate * dot(x, layer["up_proj"]), layer["down_proj"])
        return experts.feed_forward(
            x, layer, positions >= 0, act, c.experts_per_token, c.scaled_routing
        )

    def _attention(
        self,
        layer: Params,
        x: jax.Array,
        turn: Rotation,
        positions: jax.Array,
        entries: dict[str, Any],
    ) -> tuple[jax.Array, dict[str, Any]]:
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
            q, k = self._norm(q, layer["q_norm"]), self._norm(k, layer["k_norm"])
        if c.query_scalar not in (None, c.head_size):
            # `attend` divides by sqrt(D).
            q = q * jnp.asarray((c.head_size / c.query_scalar) ** 0.5, q.dtype)
        q, k = rotate(q, turn), rotate(k, turn)
        keys = kv_cache.write(entries["keys"], k.reshape(v.shape), positions)
        values = kv_cache.write(entries["values"], v, positions)
        out = kv_cache.attend(q, keys, values, positions)
        out = dot(out, layer["o_proj"])
        if c.o_bias:
            out = out + layer["o_bias"][None, None]
        return out, {"keys": keys, "values": values}


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)
