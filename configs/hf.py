"""A Hugging Face checkpoint on your own data: values to begin from."""

from pathlib import Path

import tyro

from train.config import GRPOConfig, HFConfig

CONFIG = HFConfig(
    steps=100,  # GRPO steps
    save_every=10,  # GRPO steps; a checkpoint of a large policy takes a while
    eval_samples=1,  # completions of each held-out problem
    model=tyro.MISSING,
    data=tyro.MISSING,
    out=Path("runs/hf"),
    grpo=GRPOConfig(
        prompts_per_step=16,
        group_size=8,
        max_new_tokens=1_024,
        max_slots=64,
        learning_rate=1e-6,  # small enough for full fine-tuning of an instructed model
        kl_coef=0.0,
        bucket_lengths=(256, 512, 1_024),  # tokens of prompt and completion
        chunk_tokens=4_096,
    ),
)
