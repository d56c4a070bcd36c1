"""Lossless, replayable, fast rollouts for reinforcement learning of language models."""

from er_jax.control import Controller
from er_jax.decoder import Decoder, DecoderConfig, RopeScaling
from er_jax.drafter import (
    DrafterConfig,
    PolicyParams,
    QuantizedWeight,
    TiedEmbedding,
    attach_draft,
    dot,
    quantize,
)
from er_jax.engine import refresh_draft
from er_jax.hf import load_hf, save_hf
from er_jax.replicas import ExpectedLengths, rollout_replicas
from er_jax.rollout import (
    Rollout,
    RolloutConfig,
    compile_ahead,
    gather_prompts,
    rollout,
)
from er_jax.scheduler import Completion, RolloutError
from er_jax.stats import RolloutStats
from er_jax.types import Policy

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "Controller",
    "Decoder",
    "DecoderConfig",
    "DrafterConfig",
    "ExpectedLengths",
    "Policy",
    "PolicyParams",
    "QuantizedWeight",
    "Rollout",
    "RolloutConfig",
    "RolloutError",
    "RolloutStats",
    "RopeScaling",
    "TiedEmbedding",
    "attach_draft",
    "compile_ahead",
    "dot",
    "gather_prompts",
    "load_hf",
    "quantize",
    "refresh_draft",
    "rollout",
    "rollout_replicas",
    "save_hf",
]
