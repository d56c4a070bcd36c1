"""The decoder that most tests sample from: small, and of one size.

Programs are named by a policy and by shapes. Policies of this size that are told apart
by a name alone have engines of their own and ask for programs of their own, which are
the same to XLA: what one test has compiled another one loads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import er_jax

SIZES = er_jax.DecoderConfig(
    vocab_size=24, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=32
)
POLICY = er_jax.Decoder(SIZES)


@dataclasses.dataclass(frozen=True)
class NamedDecoder(er_jax.Decoder):
    """A decoder that equals only those of its own name."""

    name: str = ""


def small_policy(name: str, **changes: Any) -> er_jax.Decoder:
    """Return a policy that no other test uses: its engine has compiled nothing.

    name: of the test. changes: of `SIZES`, none of which changes an array.
    """
    return NamedDecoder(dataclasses.replace(SIZES, **changes), name=name)
