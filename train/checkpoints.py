"""Checkpoints that hold everything a run needs to go on exactly, and nothing else.

One Orbax step is one GRPO step; step 0 is the warmed-up policy and is never deleted.
A step holds three items: `policy` (parameters), `trainer` (optimizer and random key)
and `host` (JSON: config, data position, controller, digest of the data). The draft is
not among them: it is computed from the parameters.

Orbax writes into a temporary directory and renames it, so a step is either there and
whole or not there; a run killed while saving finds the one before.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

import er_jax
from train.config import ModelConfig, differences
from train.placement import Placement
from train.tasks import Tokenizer

DIRECTORY = "checkpoints"

# Steps divisible by this are kept for ever: of them there is only step 0.
NEVER = 10**9


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a checkpoint gives back.

    step: GRPO steps done. policy: parameters. trainer: optimizer state and key, as they
    were given to `save`. host: the JSON values.
    """

    step: int
    policy: Any
    trainer: Any
    host: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      out: the run's directory; checkpoints lie in `out/checkpoints`.
      keep: latest steps to keep, besides step 0.
      read_only: change nothing on the disk, so that a run may be read while it writes.
    """

    def __init__(self, out: Path, *, keep: int = 2, read_only: bool = False) -> None:
        if read_only and not (out / DIRECTORY).is_dir():
            raise FileNotFoundError(
                f"{out} holds no run; make one with `python -m train.grpo --out {out}`"
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            keep_period=None if read_only else NEVER,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(
            (out / DIRECTORY).absolute(),
            options=options,
            item_names=("policy", "trainer", "host"),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The last whole checkpoint's GRPO step; None when there is none."""
        return self._manager.latest_step()

    def save(
        self, step: int, *, policy: Any, trainer: Any, host: dict[str, Any]
    ) -> None:
        """Write one checkpoint; returns when it is whole on the disk.

        Args:
          step: GRPO steps done. policy: parameters, without the draft.
          trainer: pytree of arrays. host: values JSON can hold.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                policy=ocp.args.StandardSave(policy),
                trainer=ocp.args.StandardSave(trainer),
                host=ocp.args.JsonSave(host),
            ),
            force=True,
        )

    def restore_host(self, step: int | None = None) -> dict[str, Any]:
        """Return the JSON values of a checkpoint; None is the latest."""
        return self._restore(step, host=ocp.args.JsonRestore())["host"]

    def restore_policy(self, like: Any, step: int | None = None) -> Any:
        """Return the parameters of a checkpoint.

        Args:
          like: parameters, or their shapes, of the same structure.
          step: GRPO step; None is the latest.
        """
        return self._restore(step, policy=_standard(like))["policy"]

    def restore(self, *, policy: Any, trainer: Any) -> Saved:
        """Return the latest checkpoint.

        Args:
          policy, trainer: pytrees, or their shapes, of the saved structures.
        Raises:
          FileNotFoundError: there is no checkpoint.
        """
        items = self._restore(
            None,
            policy=_standard(policy),
            trainer=_standard(trainer),
            host=ocp.args.JsonRestore(),
        )
        return Saved(
            step=items["step"],
            policy=items["policy"],
            trainer=items["trainer"],
            host=items["host"],
        )

    def _restore(self, step: int | None, **items: Any) -> dict[str, Any]:
        step = self.latest_step if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise FileNotFoundError(
                f"no checkpoint {'' if step is None else f'of step {step} '}in "
                f"{self._manager.directory}; there are {self._manager.all_steps()}"
            )
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {"step": step, **{name: found[name] for name in items}}


def _standard(like: Any) -> Any:
    return ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))


def check_same_config(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise ValueError naming every field that a resumed run may not change."""
    changed = differences(saved, current)
    if changed:
        raise ValueError(
            "resume: the checkpoint was made with other settings "
            f"({'; '.join(changed)}); give the same ones, or another --out"
        )


def load_policy(
    out: Path | str, *, step: int | None = None
) -> tuple[er_jax.Decoder, Any, Tokenizer]:
    """Load the policy of a run of the demo, to sample it or to measure it.

    A run that trains a Hugging Face checkpoint saves one; `er_jax.load_hf` loads that.

    Args:
      out: directory of the run, as given to `python -m train.grpo --out`.
      step: 0 is the warmed-up policy; None the latest checkpoint.
    Returns:
      policy, its parameters, and the tokenizer. The run's problems are in
      `out/data/{warmup,train,eval}.jsonl`.
    Raises:
      FileNotFoundError: no such checkpoint.
      ValueError: the run trains a Hugging Face checkpoint.
    """
    with Checkpoints(Path(out), read_only=True) as checkpoints:
        config = checkpoints.restore_host(step)["config"]
        if isinstance(config["model"], str):
            raise ValueError(
                f"out={str(out)!r} trains a checkpoint; load what it saved with "
                "er_jax.load_hf"
            )
        tokenizer = Tokenizer()
        model = ModelConfig(**config["model"])
        policy = model.decoder(tokenizer.vocab_size, config["dtype"])
        shapes = jax.eval_shape(policy.init, jax.random.key(0))
        like = Placement().shaped(policy, shapes)
        return policy, checkpoints.restore_policy(like, step), tokenizer
