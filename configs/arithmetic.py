"""The reported demo: a 1.6 M decoder learns arithmetic in a few minutes on 2 cores."""

from pathlib import Path

from train.config import GRPOConfig, ModelConfig, RunConfig
from train.sft import SFTConfig
from train.tasks import ArithmeticConfig

CONFIG = RunConfig(
    seed=0,
    steps=30,  # GRPO steps; the reward has flattened by then
    dtype="float32",  # float64 costs twice the time and changes no conclusion
    control="best",
    save_every=5,  # GRPO steps; a save takes about a quarter of a second
    eval_samples=2,  # 128 completions: the mean reward is known to about 0.04
    out=Path("runs/arithmetic"),
    task=ArithmeticConfig(
        more_operations=0.65,  # three quarters of the completions have 10 to 40 tokens
        long_share=0.05,  # one in twenty has 120 to 240 tokens
        max_operations=24,
        max_total=9,  # one digit: a hundred facts are learnt in a short warm-up
        slip_rate=0.15,  # costs the warmed-up policy a third of its answers
        num_warmup=20_000,  # more than the warm-up gets to see
        num_train=2_000,  # 480 of them are met in 30 steps
        num_eval=64,
    ),
    model=ModelConfig(
        dim=192,  # with 4 layers, the smallest that surely learns to copy in 200 steps
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,  # three query heads share each, as larger models do
        head_dim=32,
        hidden_dim=512,
        qk_norm=True,  # learns a little faster at this learning rate
    ),
    sft=SFTConfig(
        max_steps=400,  # only a limit: `stop_at` ends the warm-up earlier
        stop_at=0.5,  # the slips in the solutions allow at most about 0.6
        check_every=10,  # steps, in which the chance rises by about 0.05
        learning_rate=2e-3,  # 4e-3 is too much, 1.5e-3 no slower
        schedule="constant",
        ramp_steps=50,
        batch_tokens=2_304,  # half as many tokens need 1.5 times as many steps
        clip_norm=1.0,
    ),
    grpo=GRPOConfig(
        prompts_per_step=16,
        group_size=8,  # with a reward of one half, 99 in 100 groups are mixed
        max_new_tokens=256,  # the longest solution has 241 tokens
        max_slots=64,  # half a step's completions, so that slots are refilled
        temperature=1.0,
        updates_per_step=1,
        learning_rate=3e-4,
        clip_norm=1.0,
        clip_low=0.2,
        clip_high=0.2,
        kl_coef=0.0,  # rewards are verified: the policy may move far from its start
        scale_advantages=True,
        format_bonus=0.0,  # the reward is the share of right answers, no more
        bucket_lengths=(48, 128),  # tokens of prompt and completion
        chunk_tokens=1_152,  # smaller ones hold less padding
    ),
)
