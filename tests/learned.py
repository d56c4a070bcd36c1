"""A policy with learned positions, whose entries a test can make non-finite.

One layer of attention over embedded tokens plus embedded positions, and nothing that
would tame large numbers: a token or a position whose embedding is huge has keys and
values that overflow. Positions are looked up in a table, which fills in NaN behind its
end: feeding a position that the policy was not made for is seen at once.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import er_jax
from er_jax import kv_cache
from er_jax.types import Cache, Params

# Of the largest number there is: finite, and its sums with weights of order 1 are not.
HUGE = 0.88


@dataclasses.dataclass(frozen=True)
class Learned:
    """A `Policy` for at most `max_length` positions.

    attention: "library" is `kv_cache.attend`; "plain" is a masked softmax times all
      values, as anybody would write it: there a non-finite entry reaches every query of
      its row, with weight 0.
    dtype: of parameters and cache, "float32" or "float64".
    """

    vocab_size: int = 12
    max_length: int = 20
    dim: int = 8
    attention: str = "library"
    dtype: str = "float32"

    def init_cache(self, rows: int, length: int) -> Cache:
        shape = (rows, length, self.dim)
        return [jnp.zeros(shape, jnp.dtype(self.dtype)) for _ in "kv"]

    def init(self, seed: int) -> Params:
        rng = np.random.default_rng(seed)

        def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
            return rng.normal(0, scale, shape).astype(self.dtype)

        dim = self.dim
        weights = {name: normal(dim, dim, scale=dim**-0.5) for name in "qkvo"}
        return {
            "embed": normal(self.vocab_size, dim),
            "position_embed": normal(self.max_length, dim, scale=0.5),
            "head": normal(dim, self.vocab_size),
            **weights,
        }

    def forward(
        self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        x = jnp.take(params["embed"], tokens, axis=0)
        x = x + jnp.take(params["position_embed"], positions, axis=0)
        q, k, v = (er_jax.dot(x, params[name]) for name in "qkv")
        keys, values = (
            kv_cache.write(old, new, positions)
            for old, new in zip(cache, (k, v), strict=True)
        )
        if self.attention == "library":
            out = kv_cache.attend(q[:, :, None], keys, values, positions)
        else:
            slots = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, None]
            scores = jnp.einsum("btf,bsf->bts", q, keys)
            scores = jnp.where(slots <= positions[..., None], scores, -1e30)
            out = jnp.einsum("bts,bsf->btf", jax.nn.softmax(scores), values)
        return x + er_jax.dot(out, params["o"]), [keys, values]

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        return er_jax.dot(hidden, params["head"])


def poisoned(
    params: Params, *, token: int | None = None, position: int | None = None
) -> Params:
    """Return parameters whose entries overflow for a token, or at a position.

    What follows from them is decided: a row whose input is that token, or stands there,
    has no next token, and no other row is touched.
    """
    params = dict(params)
    for name, at in (("embed", token), ("position_embed", position)):
        if at is not None:
            params[name] = params[name].copy()
            params[name][at] = HUGE * np.finfo(params[name].dtype).max
    return params
