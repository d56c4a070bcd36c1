"""Reinforcement learning on top of `er_jax`: a small, complete example to copy from.

`er_jax` samples; this package decides what to do with the samples. Nothing in `er_jax`
imports it.
"""
