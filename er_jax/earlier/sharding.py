"""The earlier name of `er_jax.mesh.layout` and `er_jax.mesh.rules`."""

from er_jax.mesh.layout import *  # noqa: F403
from er_jax.mesh.rules import *  # noqa: F403
