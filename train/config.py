"""The settings of a run: frozen dataclasses that check their values.

Here are the fields, their units and their limits. The values of each reported run are
in a file of its own in `configs/`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

import er_jax
from er_jax.lora import TARGETS, has_lora
from train.losses import PolicyLoss
from train.settings import check_types, require
from train.sft import SFTConfig
from train.tasks import ArithmeticConfig

DTYPES = ("float32", "float64")

# The settings that a resumed run may change. None of them changes its numbers, except
# that another mesh rounds differently.
FREE_ON_RESUME = (
    "steps", "out", "resume", "resume_step", "save_every", "profile", "mesh",
    "grpo.stream",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the built-in decoder.

    Args:
      dim: width of the residual stream, features.
      num_layers: layers.
      num_heads: query heads.
      num_kv_heads: key/value heads, a divisor of num_heads.
      head_dim: features of a head; a multiple of 16 suits the vector units.
      hidden_dim: width of the SwiGLU layer, features.
      qk_norm: RMSNorm over each head's query and key, as in Qwen3.
    """

    dim: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    hidden_dim: int = 512
    qk_norm: bool = False

    def __post_init__(self) -> None:
        check_types(self)

    def decoder(self, vocab_size: int, dtype: str) -> er_jax.Decoder:
        """Return the policy; `er_jax.DecoderConfig` checks the sizes."""
        return er_jax.Decoder(
            er_jax.DecoderConfig(
                vocab_size=vocab_size, dtype=dtype, **dataclasses.asdict(self)
            )
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The mesh of devices and the processes; all sizes 1 is the default device alone.

    Args:
      data: parts that the rows are spread over, each with a copy of the weights.
      fsdp: devices that the weights are sharded over for updates; so are the rows.
      model: devices that attention heads and features are sharded over.
      replicas: let every copy of the weights sample by itself; see docs/pods.md.
      coordinator: where several processes meet: HOST:PORT of the first, or "auto" on
        clusters that JAX knows. None is one process.
      num_processes: processes in all; goes with HOST:PORT.
      process_id: number of this process, from 0; goes with HOST:PORT.
      heartbeat_s: seconds without a sign of life from one process after which the
        others are ended.
    """

    data: int = 1
    fsdp: int = 1
    model: int = 1
    replicas: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_s: int = 100

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("data", "fsdp", "model", "heartbeat_s"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give >= 1")
        is_named = self.coordinator is not None and self.coordinator != "auto"
        for name in ("num_processes", "process_id"):
            value = getattr(self, name)
            require(
                (value is not None) == is_named,
                name,
                value,
                "it goes with a coordinator of the form HOST:PORT, and only with that",
            )


@dataclasses.dataclass(frozen=True)
class PartialConfig:
    """Partial rollouts: a step ends when enough groups are complete.

    Args:
      over: groups that are in work at once, over those of a step; in [1, 2]. 1 is off:
        a step waits for its longest completion. Above 1 it ends when
        `prompts_per_step` groups are complete, and the others go on in the next step,
        under its parameters. 1.25 is a good first choice.
      max_age: no token is learnt from more than so many steps after the one that
        sampled it, >= 1: a group that would become older is waited for.
    """

    over: float = 1.0
    max_age: int = 4

    def __post_init__(self) -> None:
        check_types(self)
        # Beyond 2, more groups than a step learns from could come of age at once.
        require(1 <= self.over <= 2, "over", self.over, "give one in [1, 2]")
        require(self.max_age >= 1, "max_age", self.max_age, "give >= 1")

    @property
    def is_on(self) -> bool:
        """Whether rollouts end before their last completion."""
        return self.over > 1


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """One step of reinforcement learning.

    Args:
      prompts_per_step: P, distinct positions of the data stream.
      group_size: n, completions per prompt; advantages are relative to these. >= 2.
      max_new_tokens: limit of a completion, tokens.
      max_slots: rows decoded at once.
      temperature: of sampling, > 0; the loss uses the same.
      updates_per_step: optimizer steps on the completions of a step. In the first one
        the ratio is 1 up to rounding and nothing is clipped.
      learning_rate: Adam's.
      clip_norm: largest global gradient norm.
      clip_low: the ratio is clipped from below at 1 - clip_low, in (0, 1).
      clip_high: the ratio is clipped from above at 1 + clip_high, > 0.
      kl_coef: weight of the KL divergence from the policy of step 0; 0 is off.
      scale_advantages: divide by the group's standard deviation.
      format_bonus: reward for ending in a whole number, right or wrong; 0 is off.
      bucket_lengths: tokens of prompt and completion that the update's batches are
        padded to, ascending. A bucket for the longest is added.
      chunk_tokens: tokens, padding included, in one forward and backward pass of the
        update.
      stream: score each completion as it finishes, while the others decode; the same
        numbers, sooner where a reward takes long. For one process, without replicas.
      partial: end rollouts when enough groups are complete; off by default. For one
        process, without replicas or `stream`.
    """

    prompts_per_step: int = 16
    group_size: int = 8
    max_new_tokens: int = 256
    max_slots: int = 64
    temperature: float = 1.0
    updates_per_step: int = 1
    learning_rate: float = 2e-4
    clip_norm: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    scale_advantages: bool = True
    format_bonus: float = 0.0
    bucket_lengths: tuple[int, ...] = (48, 128)
    chunk_tokens: int = 1_152
    stream: bool = False
    partial: PartialConfig = dataclasses.field(default_factory=PartialConfig)

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "prompts_per_step",
            "max_new_tokens",
            "max_slots",
            "updates_per_step",
            "chunk_tokens",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give >= 1")
        require(
            self.group_size >= 2,
            "group_size",
            self.group_size,
            "a completion is compared with its group, so give >= 2",
        )
        for name in ("temperature", "learning_rate", "clip_norm", "clip_high"):
            require(getattr(self, name) > 0, name, getattr(self, name), "give > 0")
        require(0 < self.clip_low < 1, "clip_low", self.clip_low, "give one in (0, 1)")
        for name in ("kl_coef", "format_bonus"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give >= 0")
        require(
            not self.partial.is_on or self.prompts_in_work > self.prompts_per_step,
            "partial.over",
            self.partial.over,
            f"of {self.prompts_per_step} prompts that is no prompt more; give more",
        )
        require(
            not (self.partial.is_on and self.stream),
            "partial.over",
            self.partial.over,
            "partial rollouts score whole groups, so leave out stream",
        )

    @property
    def prompts_in_work(self) -> int:
        """Q, prompts that a rollout samples, those that go on included; >= P."""
        return round(self.prompts_per_step * self.partial.over)

    @property
    def num_completions(self) -> int:
        """N, completions of one step."""
        return self.prompts_per_step * self.group_size

    @property
    def loss(self) -> PolicyLoss:
        """The options of the loss."""
        return PolicyLoss(
            clip_low=self.clip_low, clip_high=self.clip_high, kl_coef=self.kl_coef
        )


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank pairs that are trained in the place of the policy's weights.

    Args:
      rank: of every pair; 0 trains all weights.
      alpha: changes are scaled by alpha / rank; None is rank.
      targets: words; a matrix whose path contains one of them gets a pair.
    """

    rank: int = 0
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        check_types(self)
        require(self.rank >= 0, "rank", self.rank, "give >= 0")
        require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "give > 0")

    def added(self, params: Any, key: jax.Array) -> Any:
        """Return parameters with new pairs, if there are to be any and are none yet.

        Raises:
          ValueError: as `er_jax.add_lora`.
        """
        if not self.rank or has_lora(params):
            return params
        return er_jax.add_lora(
            params, rank=self.rank, alpha=self.alpha, targets=self.targets, key=key
        )


@dataclasses.dataclass(frozen=True)
class ToolConfig:
    """A tool that the policy calls in the middle of its completions.

    Args:
      function: module:function, called with the text of the completion so far; returns
        the text to append, or None to end the completion; see `train.tools`. None is no
        tool. For one process, without replicas.
      called_by: the text that calls it; a token of the policy ends with it.
      max_calls: of a completion, >= 1.
      timeout_s: seconds that a call may take, > 0.
    """

    function: str | None = None
    called_by: str = "="
    max_calls: int = 64
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_types(self)
        require(self.called_by != "", "called_by", self.called_by, "give a text")
        require(self.max_calls >= 1, "max_calls", self.max_calls, "give >= 1")
        require(self.timeout_s > 0, "timeout_s", self.timeout_s, "give > 0")


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The settings of any run.

    Args:
      seed: of parameters, data and sampling.
      steps: GRPO steps in all; a resumed run goes on to this number.
      dtype: "float32", or "float64", in which tokens do not depend on how sequences
        were batched.
      control: how draft lengths are chosen: "best", "paper", "ar" or "fixed:g".
      reproducible: choose batch shapes by a rule and not by the clock, so that float32
        runs repeat bit for bit; slower, and needs the control "ar" or "fixed:g".
      out: directory for everything the run writes.
      resume: go on from the last checkpoint in `out`.
      resume_step: go on from this checkpoint instead; later ones are set aside.
      save_every: GRPO steps between two checkpoints.
      eval_samples: completions per held-out problem when evaluating.
      profile: directory for a trace of one step, the second of this process.
      mesh: the devices; a resumed run may have others.
      grpo: the reinforcement learning.
      lora: low-rank pairs in the place of whole weights.
      tool: what the policy may call.
    """

    seed: int = 0
    steps: int = 30
    dtype: str = "float32"
    control: str = "best"
    reproducible: bool = False
    out: Path = Path("runs/run")
    resume: bool = False
    resume_step: int | None = None
    save_every: int = 5
    eval_samples: int = 2
    profile: Path | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    grpo: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    tool: ToolConfig = dataclasses.field(default_factory=ToolConfig)

    def __post_init__(self) -> None:
        check_types(self)
        require(self.steps >= 0, "steps", self.steps, "give >= 0")
        step = self.resume_step
        require(
            step is None or (self.resume and step >= 0),
            "resume_step",
            step,
            "it goes with --resume, and names a checkpoint, >= 0",
        )
        for name in ("save_every", "eval_samples"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give >= 1")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"choose from {DTYPES}")
        require(
            not (self.reproducible and self.control in ("best", "paper")),
            "reproducible",
            self.reproducible,
            f"control={self.control!r} follows the clock; use 'ar' or 'fixed:g'",
        )
        spread = self.mesh.replicas or self.mesh.coordinator is not None
        partial = self.grpo.partial
        for name, value, is_on in (
            ("grpo.stream", self.grpo.stream, self.grpo.stream),
            ("grpo.partial.over", partial.over, partial.is_on),
            ("tool.function", self.tool.function, self.tool.function is not None),
        ):
            require(
                not (is_on and spread),
                name,
                value,
                "it is for one process without replicas; leave it out",
            )
        require(
            not (self.reproducible and partial.is_on),
            "reproducible",
            self.reproducible,
            f"grpo.partial.over={partial.over} ends rollouts by the clock; leave one "
            "of them out",
        )
        self.rollout_config(group_size=2)  # checks `control`

    def rollout_config(
        self, *, group_size: int, stop_token_ids: tuple[int, ...] = ()
    ) -> er_jax.RolloutConfig:
        """Return the settings of a rollout."""
        return er_jax.RolloutConfig(
            max_new_tokens=self.grpo.max_new_tokens,
            n=group_size,
            temperature=self.grpo.temperature,
            stop_token_ids=stop_token_ids,
            control=self.control,
            logprobs="temperature",
            max_slots=self.grpo.max_slots,
        )


@dataclasses.dataclass(frozen=True)
class RunConfig(BaseConfig):
    """A run of the demo: a small decoder, warmed up and then trained by GRPO.

    Args:
      data: JSONL of problems to train on; None generates them (see `task`). The warm-up
        imitates its lines with a "solution", or generated problems if it has none.
      task: the generated problems.
      model: the decoder's sizes.
      sft: the warm-up.
    The others are those of `BaseConfig`.
    """

    data: Path | None = None
    out: Path = Path("runs/arithmetic")
    task: ArithmeticConfig = dataclasses.field(default_factory=ArithmeticConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    sft: SFTConfig = dataclasses.field(default_factory=SFTConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            require(
                self.task.longest_solution < self.grpo.max_new_tokens,
                "max_new_tokens",
                self.grpo.max_new_tokens,
                f"the longest solution has {self.task.longest_solution} tokens and an "
                "end token; allow for that, or lower task.max_operations",
            )


@dataclasses.dataclass(frozen=True)
class HFConfig(BaseConfig):
    """A run that trains a Hugging Face checkpoint on a file of problems.

    Args:
      model: directory of the checkpoint, its tokenizer included.
      data: JSONL of {"prompt": str, "answer": str}.
      reward: the function that scores completions, as module:function; see
        `train.rewards`.
      num_eval: problems held out: a tenth of the prompts, and at most this many.
    The others are those of `BaseConfig`.
    """

    model: Path = Path()
    data: Path = Path()
    reward: str = "train.rewards:numeric_answer"
    num_eval: int = 64
    out: Path = Path("runs/hf")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_eval >= 1, "num_eval", self.num_eval, "give >= 1")
        require(
            self.grpo.format_bonus == 0,
            "format_bonus",
            self.grpo.format_bonus,
            "it belongs to the demo's reward; write it into a reward of your own",
        )


def to_json(config: Any) -> dict[str, Any]:
    """Return a config as JSON values, equal to what is read back from JSON."""

    def path(value: object) -> str:
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"{value!r} has no place in a config")

    return json.loads(json.dumps(dataclasses.asdict(config), default=path))


# What settings that a later version added were before, by their place.
ADDED: dict[tuple[str, ...], Any] = {
    ("lora",): LoRAConfig(),
    ("grpo", "partial"): PartialConfig(),
    ("tool",): ToolConfig(),
}


def _with_added(old: dict[str, Any]) -> dict[str, Any]:
    """Return a config of any version with all settings of this one."""
    old = json.loads(json.dumps(old))
    for (*groups, name), before in ADDED.items():
        inside: Any = old
        for group in groups:
            inside = inside.get(group) if isinstance(inside, dict) else None
        if isinstance(inside, dict):
            inside.setdefault(name, to_json(before))
    return old


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> list[str]:
    """Return the fields that differ between two configs, as "name: old -> new".

    Fields that a resumed run may change are left out.
    """
    found = []
    old = old if prefix else _with_added(old)
    for name in sorted({*old, *new}):
        before, after, full = old.get(name), new.get(name), f"{prefix}{name}"
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after and not {prefix.split(".")[0], full} & {*FREE_ON_RESUME}:
            found.append(f"{full}: {before!r} -> {after!r}")
    return found
