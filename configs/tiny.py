"""The demo in seconds, for trying things out and for tests; it learns little."""

from pathlib import Path

from train.config import GRPOConfig, ModelConfig, RunConfig
from train.sft import SFTConfig
from train.tasks import ArithmeticConfig

CONFIG = RunConfig(
    seed=0,
    steps=2,  # GRPO steps
    dtype="float32",
    control="fixed:2",  # one draft length: few programs to compile
    save_every=1,  # GRPO steps
    eval_samples=1,  # completions of each of 4 held-out problems
    out=Path("runs/tiny"),
    task=ArithmeticConfig(
        more_operations=0.3,
        long_share=0.0,
        max_operations=2,  # at most 20 completion tokens
        max_total=9,
        num_warmup=256,
        num_train=64,
        num_eval=4,
    ),
    model=ModelConfig(
        dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, hidden_dim=64
    ),
    sft=SFTConfig(
        max_steps=20,  # enough for completions to end by themselves now and then
        stop_at=0.4,
        check_every=10,  # optimizer steps
        learning_rate=1e-2,
        ramp_steps=5,
        batch_tokens=256,
    ),
    grpo=GRPOConfig(
        prompts_per_step=4,
        group_size=4,
        max_new_tokens=24,
        max_slots=8,  # half of a step's completions: slots are refilled
        updates_per_step=2,  # the second update has ratios to clip
        learning_rate=1e-3,
        kl_coef=0.01,  # so that the reference is exercised
        format_bonus=0.1,  # an untrained policy is never right, but may end in a number
        bucket_lengths=(16,),
        chunk_tokens=256,
    ),
)
