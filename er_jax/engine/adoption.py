"""What a framework that trains asks of the engine: taking its parameters.

`Adoption` turns the parameters of another framework into a policy's, and derives their
drafts, in one program on the device. `run_logits` shows whether both compute the same.

Left out: which parameter becomes which (`integrations`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from er_jax.drafter import DrafterConfig, PolicyParams, attach_draft
from er_jax.types import Params, Policy


class Adoption:
    """Parameters of another framework made a policy's, by one program.

    What the policy takes as it is stays the framework's own array and is stored once.
    All else is computed on the device; nothing goes through the host.

    Args:
      convert: maps arrays by their names to the policy's parameters; traced.
      kept: like these parameters, with the name of the array that a leaf is, unchanged;
        "" for a leaf that is computed.
      configs: how to quantize each draft.
      shardings: `PolicyParams` of the shardings of parameters and drafts; None leaves
        them to the compiler, for one device.
    """

    def __init__(
        self,
        convert: Callable[[Mapping[str, jax.Array]], Params],
        kept: Params,
        configs: Sequence[DrafterConfig],
        shardings: PolicyParams | None = None,
    ) -> None:
        self._kept, self._structure = jax.tree.flatten(kept)

        quantized = [config.quantization for config in configs]

        def run(
            arrays: Mapping[str, jax.Array],
        ) -> tuple[list[Any], tuple[Params, ...]]:
            params = attach_draft(convert(arrays), quantized)
            return self._computed(params.policy), params.drafts

        wanted = None
        if shardings is not None:
            wanted = (self._computed(shardings.policy), shardings.drafts)
        self._run = jax.jit(run, out_shardings=wanted)

    def _computed(self, tree: Params) -> list[Any]:
        leaves = jax.tree.leaves(tree)
        return [leaf for leaf, name in zip(leaves, self._kept, strict=True) if not name]

    def __call__(self, arrays: Mapping[str, jax.Array]) -> PolicyParams:
        """Return the policy's parameters and their drafts."""
        computed, (draft, *others) = self._run(arrays)
        rest = iter(computed)
        leaves = [arrays[name] if name else next(rest) for name in self._kept]
        policy = jax.tree.unflatten(self._structure, leaves)
        return PolicyParams(policy=policy, draft=draft, others=tuple(others))


@functools.partial(jax.jit, static_argnames=("policy",))
def run_logits(policy: Policy, params: Params, tokens: jax.Array) -> jax.Array:
    """Return the logits `[T, V]` of one text, int32 `[T]`."""
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    cache = policy.init_cache(1, len(tokens))
    hidden, _ = policy.forward(params, tokens[None], positions, cache)
    return policy.logits(params, hidden)[0]
