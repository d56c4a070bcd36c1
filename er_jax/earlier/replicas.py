"""The earlier name of `er_jax.mesh.replicas`."""

from er_jax.mesh.replicas import *  # noqa: F403
