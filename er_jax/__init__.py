"""Lossless, replayable, fast rollouts for reinforcement learning of language models."""

import os as _os

from er_jax.config import RolloutConfig
from er_jax.control.controller import Controller
from er_jax.decoder import Decoder, DecoderConfig, LinearScaling, RopeScaling
from er_jax.drafter import (
    DrafterConfig,
    PolicyParams,
    QuantizedWeight,
    TiedEmbedding,
    attach_draft,
    dot,
    quantize,
)
from er_jax.engine.windows import refresh_draft
from er_jax.io.hf_save import save_hf
from er_jax.io.hf_weights import load_hf
from er_jax.io.peft import load_peft_adapter, save_peft_adapter
from er_jax.lora import (
    LoRAWeight,
    add_lora,
    lora_pairs,
    merge_lora,
    with_lora_pairs,
    without_lora,
)
from er_jax.mesh.prompts import gather_prompts
from er_jax.mesh.replicas import ExpectedLengths, rollout_replicas
from er_jax.respond import Respond, Turn
from er_jax.result import Completion, Rollout, RolloutError
from er_jax.rollout import compile_ahead, rollout
from er_jax.score import Scores, score
from er_jax.session import Session
from er_jax.stats import RolloutStats
from er_jax.stream import Stream, stream
from er_jax.types import Policy
from er_jax.until import Stop, Until

__version__ = "0.1.0"

# Modules can also be imported by their earlier names.
__path__.append(_os.path.join(_os.path.dirname(__file__), "earlier"))

__all__ = [
    "Completion",
    "Controller",
    "Decoder",
    "DecoderConfig",
    "DrafterConfig",
    "ExpectedLengths",
    "LinearScaling",
    "LoRAWeight",
    "Policy",
    "PolicyParams",
    "QuantizedWeight",
    "Respond",
    "Rollout",
    "RolloutConfig",
    "RolloutError",
    "RolloutStats",
    "RopeScaling",
    "Scores",
    "Session",
    "Stop",
    "Stream",
    "TiedEmbedding",
    "Turn",
    "Until",
    "add_lora",
    "attach_draft",
    "compile_ahead",
    "dot",
    "gather_prompts",
    "load_hf",
    "load_peft_adapter",
    "lora_pairs",
    "merge_lora",
    "quantize",
    "refresh_draft",
    "rollout",
    "rollout_replicas",
    "save_hf",
    "save_peft_adapter",
    "score",
    "stream",
    "with_lora_pairs",
    "without_lora",
]
