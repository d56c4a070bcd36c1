"""Flax Linen modules as policies; their layers need not know `er_jax.dot`.

A module has to offer

    __call__(tokens, positions, cache) -> hidden, cache
    logits(hidden) -> logits
    init_cache(rows, length) -> cache

as `types.Policy` describes them, and may use `kv_cache.write` and `kv_cache.attend`.
Its `nn.Dense` layers can draft: in a draft pass their calls are intercepted, and
multiply with the quantized kernel, which is never dequantized. So do those whose kernel
has a low-rank pair (`lora`), in every pass. Any other layer with such a parameter is
refused by name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from er_jax.drafter import QuantizedWeight, dot
from er_jax.lora import LoRAWeight
from er_jax.types import Cache, Params, wide_dtype


@dataclasses.dataclass(frozen=True)
class LinenPolicy:
    """A `Policy` made of a Linen module.

    Args:
      module: see above. vocab_size: V. max_length: its context length in tokens.
    Example: docs/any-policy.md.
    """

    module: nn.Module
    vocab_size: int
    max_length: int | None = None

    def init(self, key: jax.Array) -> Params:
        """Return random parameters, the module's collection "params"."""

        def one_token(module: Any, tokens: jax.Array) -> jax.Array:
            hidden, _ = module(tokens, tokens, module.init_cache(1, 1))
            return module.logits(hidden)

        tokens = jnp.zeros((1, 1), jnp.int32)
        return nn.init(one_token, self.module)(key, tokens)["params"]

    def init_cache(self, rows: int, length: int) -> Cache:
        """Return the module's empty cache."""
        return self.module.init_cache(rows, length)  # type: ignore[attr-defined]

    def forward(
        self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Run T new tokens per row; see `Policy.forward`."""
        with nn.intercept_methods(_quantized_layers):
            return self.module.apply({"params": params}, tokens, positions, cache)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Project hidden states to logits, float32 or wider."""
        with nn.intercept_methods(_quantized_layers):
            found: Any = self.module.apply({"params": params}, hidden, method="logits")
        return found.astype(wide_dtype(found.dtype))


def _quantized_layers(
    call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Compute layers with a quantized kernel or a pair; call others as they are."""
    module = context.module
    own = module.variables.get("params", {}) if module.scope is not None else {}
    kinds = QuantizedWeight | LoRAWeight
    names = [name for name, leaf in own.items() if isinstance(leaf, kinds)]
    if not names or context.method_name == "setup":
        return call(*args, **kwargs)
    if type(module) is not nn.Dense or context.method_name != "__call__":
        path = "/".join([*module.path, names[0]])
        if isinstance(own[names[0]], LoRAWeight):
            raise ValueError(
                f"{path} has a low-rank pair, but a {type(module).__name__} cannot "
                "multiply with it; leave it out of the targets of er_jax.add_lora"
            )
        raise ValueError(
            f"{path} is quantized, but a {type(module).__name__} cannot multiply with "
            f"it; name it in DrafterConfig.skip: skip=('embed', 'norm', {path!r})"
        )
    (x,) = args
    y = dot(x.astype(module.dtype or x.dtype), own["kernel"])
    if module.use_bias:
        y = y + own["bias"].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y
