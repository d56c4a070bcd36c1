"""Reinforcement learning on top of `er_jax`: a small, complete example to copy from.

`er_jax` samples completions; this package scores them and trains the policy. It is run
from a checkout and is not part of the installed distribution.
"""
