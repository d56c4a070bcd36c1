"""The fields of a config.json that are read, by family of models, and their ranges.

Every supported field has a type and a range here; what is not here is harmless, or is
refused by `hf_config`.
"""

from __future__ import annotations

import dataclasses

from er_jax.io.json_fields import (
    OBJECT,
    Field,
    is_texts,
    number_field,
    text_field,
    whole_field,
)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}

GLOBAL, LOCAL = "full_attention", "sliding_attention"

SIZE = whole_field(1, 2**31 - 1)
SWITCH = Field("true or false", lambda value: isinstance(value, bool), default=False)

# Share of each head that is rotated; partial rotary positions are not supported.
FULL_ROTATION = dataclasses.replace(number_field(1, 1), words="1.0", default=1.0)

# Fields of sizes and switches, beside model_type; `_read` takes each for its family.
FIELDS: dict[str, Field] = {
    "architectures": Field("a list of class names", is_texts, default=()),
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": whole_field(1, 10_000),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "hidden_act": text_field("silu", "swish", is_null_missing=False),
    "rms_norm_eps": number_field(1e-30, 1, default=1e-6, is_null_missing=False),
    "rope_theta": number_field(1, 1e18, default=10_000.0),
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "tie_word_embeddings": SWITCH,
    "attention_bias": SWITCH,
    "mlp_bias": Field("false", lambda value: value is False),
    "sliding_window": SIZE,
    "use_sliding_window": SWITCH,
    "layer_types": Field(
        "a list of 'full_attention'",
        lambda value: is_texts(value, "full_attention"),
    ),
    "max_position_embeddings": SIZE,
    "partial_rotary_factor": FULL_ROTATION,
    "quantization_config": Field(
        "a checkpoint that is not quantized (null)",
        lambda value: isinstance(value, dict) and not value,
    ),
    "torch_dtype": text_field(),
    "dtype": text_field(),
}

MISTRAL_FIELDS: dict[str, Field] = {
    # Null is no window; a missing one is that of the first models.
    "sliding_window": dataclasses.replace(SIZE, default=None),
}

QWEN3_MOE_FIELDS: dict[str, Field] = {
    "num_experts": SIZE,
    "num_local_experts": SIZE,
    "num_experts_per_tok": SIZE,
    "moe_intermediate_size": SIZE,
    "norm_topk_prob": SWITCH,
    "decoder_sparse_step": whole_field(1, 10_000),
    "mlp_only_layers": Field(
        "a list of numbers of layers",
        lambda value: isinstance(value, list) and all(type(x) is int for x in value),
        default=[],
    ),
}

GEMMA3_FIELDS: dict[str, Field] = {
    # Earlier Gemmas name the activation twice; this family's models read the second.
    "hidden_act": text_field("gelu_pytorch_tanh"),
    "hidden_activation": text_field(
        "gelu_pytorch_tanh", default="gelu_pytorch_tanh", is_null_missing=False
    ),
    "head_dim": dataclasses.replace(SIZE, default=256),
    "rope_theta": number_field(1, 1e18, default=1e6),
    "rope_local_base_freq": number_field(1, 1e18, default=1e4),
    "tie_word_embeddings": dataclasses.replace(SWITCH, default=True),
    "sliding_window": dataclasses.replace(SIZE, default=4096, is_null_missing=False),
    "sliding_window_pattern": dataclasses.replace(SIZE, default=6),
    "layer_types": Field(
        f"a list of {GLOBAL!r} and {LOCAL!r}, one for each layer",
        lambda value: is_texts(value, GLOBAL, LOCAL),
    ),
    "query_pre_attn_scalar": number_field(
        1e-6, 1e9, default=256, is_null_missing=False
    ),
    "final_logit_softcapping": number_field(1e-6, 1e9),
    "attn_logit_softcapping": Field("no cap (null)", lambda value: False),
    "use_bidirectional_attention": Field("false", lambda value: value is False),
}

# What the fields of a family have beside or instead of `FIELDS`.
FIELDS_OF: dict[str, dict[str, Field]] = {
    "mistral": MISTRAL_FIELDS,
    "qwen3_moe": QWEN3_MOE_FIELDS,
    "gemma3_text": GEMMA3_FIELDS,
}

READ_FIELDS = {"model_type"}.union(FIELDS, *FIELDS_OF.values())

# The fields of each scaling of rotary frequencies -> in its class.
SCALINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
}


def _rope_fields(*kinds: str) -> dict[str, Field]:
    """Return the fields of rotary parameters with one of some scalings."""
    return {
        "rope_type": text_field(*kinds),
        "type": text_field(*kinds),
        "rope_theta": dataclasses.replace(FIELDS["rope_theta"], default=None),
        "partial_rotary_factor": FULL_ROTATION,
        "factor": number_field(1, 1e6),
        "low_freq_factor": number_field(1e-6, 1e6),
        "high_freq_factor": number_field(1e-6, 1e6),
        "original_max_position_embeddings": SIZE,
    }


# Fields inside rope_scaling and rope_parameters.
ROPE_FIELDS = _rope_fields("default", "llama3")
GEMMA3_ROPE_FIELDS = _rope_fields("default", "linear", "llama3")
LOCAL_ROPE_FIELDS = _rope_fields("default")


# Names of sizes in the file -> in `DecoderConfig`.
OUR_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}


# The same of experts.
EXPERT_NAMES = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_dim",
}

# Fields that do not change the logits: training, generation, bookkeeping.
HARMLESS_FIELDS = frozenset(
    """
    transformers_version _name_or_path initializer_range use_cache bos_token_id
    eos_token_id pad_token_id attention_dropout hidden_dropout pretraining_tp
    max_window_layers output_attentions output_hidden_states return_dict id2label
    label2id problem_type is_encoder_decoder chunk_size_feed_forward unsloth_fixed
    unsloth_version task_specific_params finetuning_task _attn_implementation
    output_router_logits router_aux_loss_coef cache_implementation
    _sliding_window_pattern
    """.split()
)
