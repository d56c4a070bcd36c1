"""Flax NNX modules as policies; their layers need not know `er_jax.dot`.

A module has to offer

    __call__(tokens, positions, cache) -> hidden, cache
    logits(hidden) -> logits
    init_cache(rows, length) -> cache

as `types.Policy` describes them, and may use `kv_cache.write` and `kv_cache.attend`.
Its `nnx.Linear` layers can draft: in a draft pass they are layers that multiply with
the quantized kernel, which is never dequantized. So are those whose kernel has a
low-rank pair (`lora`), in every pass. Any other layer with such a parameter is refused
by name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from er_jax.drafter import QuantizedWeight, dot
from er_jax.lora import LoRAWeight
from er_jax.types import Cache, Params, wide_dtype


class _QuantizedLinear(nnx.Linear):
    """An `nnx.Linear` whose kernel is quantized or has a low-rank pair."""

    def __call__(self, inputs: jax.Array, *unused: Any, **also: Any) -> jax.Array:
        y = dot(inputs.astype(self.dtype or inputs.dtype), self.kernel.get_value())
        if self.bias is not None:
            bias = self.bias.get_value().astype(y.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y


@dataclasses.dataclass(frozen=True)
class NnxPolicy:
    """A `Policy` made of an NNX module; `of` makes it, together with its parameters.

    Args:
      graphdef: the module without its parameters.
      entry: its cache for one position of one row: tree, (shape, dtype) of leaves.
      vocab_size: V. max_length: its context length in tokens.
    Example: docs/any-policy.md.
    """

    graphdef: nnx.GraphDef[Any]
    entry: tuple[Any, tuple[tuple[tuple[int, ...], Any], ...]]
    vocab_size: int
    max_length: int | None = None

    @classmethod
    def of(
        cls, module: Any, vocab_size: int, max_length: int | None = None
    ) -> tuple[NnxPolicy, Params]:
        """Split a module into policy and parameters, nested dicts of arrays.

        Args:
          module: an `nnx.Module`; see above. vocab_size, max_length: of the policy.
        Raises:
          ValueError: it has state beside its parameters, such as a random stream.
        """
        found: Any = nnx.split(module, nnx.Param, ...)
        graphdef, params, rest = found
        others = nnx.to_flat_state(rest)
        if others:
            name = "/".join(map(str, others[0][0]))
            raise ValueError(
                f"module holds state beside its parameters, {name} first; make it "
                "without (a rollout has no use for dropout and batch statistics)"
            )
        leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: module.init_cache(1, 1)))
        entry = (tree, tuple((leaf.shape[2:], leaf.dtype) for leaf in leaves))
        return cls(graphdef, entry, vocab_size, max_length), nnx.to_pure_dict(params)

    def module(self, params: Params) -> Any:
        """Return the module with these parameters, or with those of a draft.

        Raises:
          ValueError: a layer that cannot multiply with its quantized parameter, or with
            the low-rank pair of it.
        """
        module = nnx.merge(self.graphdef, nnx.State(params))
        for path, node in nnx.iter_graph(module):
            if not isinstance(node, nnx.Variable):
                continue
            weight = node.get_value()
            if not isinstance(weight, QuantizedWeight | LoRAWeight):
                continue
            owner = module
            for part in path[:-1]:
                is_index = isinstance(part, int)
                owner = owner[part] if is_index else getattr(owner, str(part))
            if type(owner) is nnx.Linear:
                owner.__class__ = _QuantizedLinear
            elif not isinstance(owner, _QuantizedLinear):
                name = "/".join(map(str, path))
                if isinstance(weight, LoRAWeight):
                    raise ValueError(
                        f"{name} has a low-rank pair, but a {type(owner).__name__} "
                        "cannot multiply with it; leave it out of the targets of "
                        "er_jax.add_lora"
                    )
                raise ValueError(
                    f"{name} is quantized, but a {type(owner).__name__} cannot "
                    "multiply with it; name it in DrafterConfig.skip: "
                    f"skip=('embed', 'norm', {name!r})"
                )
        return module

    def init_cache(self, rows: int, length: int) -> Cache:
        """Return the module's empty cache."""
        tree, leaves = self.entry
        return jax.tree.unflatten(
            tree, [jnp.zeros((rows, length, *tail), dtype) for tail, dtype in leaves]
        )

    def forward(
        self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Run T new tokens per row; see `Policy.forward`."""
        return self.module(params)(tokens, positions, cache)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Project hidden states to logits, float32 or wider."""
        found = self.module(params).logits(hidden)
        return found.astype(wide_dtype(found.dtype))
