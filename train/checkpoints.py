"""Checkpoints: everything that a run needs to go on with the same numbers.

One Orbax step is one GRPO step. Step 0 is the policy that GRPO starts from and is never
deleted. A step holds three items: `policy` (parameters), `trainer` (optimizer state and
random key) and `host` (JSON: config, data position, controller, digest of the data, and
the digests of all items). The draft is not saved, because it is computed from the
parameters. With partial rollouts there is one item more, `carried`: the completions
that the next step goes on with. Of a policy with low-rank pairs `policy` is the pairs,
and step 0 holds one item more, `frozen`: all that is never trained.

Orbax writes a step into a temporary directory and renames it, so a step is either whole
or missing: a run that was killed while saving goes on from the step before. Damage that
a disk does to a step later is found by the digests. What is restored is therefore
exactly what was saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import er_jax
from er_jax.engine.digests import tree_digest
from er_jax.lora import has_lora, is_lora
from train.config import LoRAConfig, ModelConfig, differences
from train.digests import text_digest
from train.files import writing
from train.placement import Placement
from train.tasks import Tokenizer
from train.trained import trained_part, with_trained_part

DIRECTORY = "checkpoints"

# Orbax never deletes a step divisible by this number; the only such step is 0.
KEEP_PERIOD = 10**9


class NoRunError(FileNotFoundError):
    """A directory holds no run."""


class DamagedError(ValueError):
    """A checkpoint does not hold what was saved."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a checkpoint holds, as it was given to `Checkpoints.save`.

    Attributes:
      step: GRPO steps done.
      policy: parameters, without the draft.
      trainer: optimizer state and random key.
      host: the JSON values.
      carried: completions that the next step goes on with; None if there are none.
    """

    step: int
    policy: Any
    trainer: Any
    host: dict[str, Any]
    carried: er_jax.Rollout | None = None


class Checkpoints:
    """The checkpoints of one run.

    Args:
      out: the run's directory; checkpoints are in `out/checkpoints`.
      keep: number of latest steps to keep, besides step 0.
      read_only: change nothing on the disk, so that a run can be read while it writes.
    Raises:
      NoRunError: `out` has no checkpoints, and `read_only` forbids making them.
    """

    def __init__(self, out: Path, *, keep: int = 2, read_only: bool = False) -> None:
        if read_only and not (out / DIRECTORY).is_dir():
            raise NoRunError(
                f"{out} holds no run; make one with `python -m train.grpo --out {out}`"
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            keep_period=None if read_only else KEEP_PERIOD,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(
            (out / DIRECTORY).absolute(),
            options=options,
            item_names=("policy", "trainer", "host", "frozen", "carried"),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The GRPO step of the last checkpoint; None when there is none."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        *,
        policy: Any,
        trainer: Any,
        host: dict[str, Any],
        carried: er_jax.Rollout | None = None,
    ) -> None:
        """Write one checkpoint; returns when all of it is on the disk.

        Args:
          step: GRPO steps done. policy: parameters, without the draft.
          trainer: pytree of arrays. host: values that JSON can hold.
          carried: completions that the next step goes on with, if there are any.
        Raises:
          OSError: the checkpoint could not be written; names it and the remedy.
        """
        items = {"policy": trained_part(policy), "trainer": trainer}
        if has_lora(policy) and step == 0:
            items["frozen"] = er_jax.without_lora(policy)
        if carried is not None:
            items["carried"] = arrays = _arrays_of(carried)
            shapes = {name: [*x.shape, x.dtype.name] for name, x in arrays.items()}
            host = {**host, "carried": shapes}
        digests = {name: tree_digest(item) for name, item in items.items()}
        digests["host"] = text_digest([step, host])
        path = Path(self._manager.directory) / str(step)
        with writing(f"the checkpoint of step {step}", path):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(x) for name, x in items.items()},
                    host=ocp.args.JsonSave({**host, "digests": digests}),
                ),
                force=True,
            )

    def restore_host(self, step: int | None = None) -> dict[str, Any]:
        """Return the JSON values of a checkpoint; None is the latest.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          DamagedError: it does not hold what was saved.
        """
        return self._host(self._existing(step))[0]

    def restore_policy(
        self, like: Any, step: int | None = None, *, digest: str | None = None
    ) -> Any:
        """Return the parameters of a checkpoint.

        Args:
          like: parameters, or their shapes, of the same structure.
          step: GRPO step; None is the latest.
          digest: that the parameters must have; None is the one the checkpoint holds.
        Raises: as `restore_host`.
        """
        step = self._existing(step)
        if digest is None:
            digest = self._host(step)[1]["policy"]
        return self._policy(step, like, digest)

    def restore(
        self,
        *,
        policy: Any,
        trainer: Any,
        step: int | None = None,
        check: Callable[[dict[str, Any]], None] = lambda host: None,
    ) -> Saved:
        """Return a whole checkpoint.

        Args:
          policy, trainer: pytrees, or their shapes, of the saved structures.
          step: GRPO step; None is the latest.
          check: is given the JSON values before any array is read, and raises what
            is wrong with them.
        Raises:
          FileNotFoundError: there is no such checkpoint.
          DamagedError: it does not hold what was saved. The message names the latest
            earlier checkpoint that does.
        """
        step = self._existing(step)
        try:
            return self._whole(step, policy, trainer, check)
        except DamagedError as error:
            whole = self._whole_before(step, policy, trainer, check)
            remedy = "no checkpoint before it is whole; begin anew, without --resume"
            if whole is not None:
                remedy = (
                    f"the checkpoint of step {whole} is whole; go on from it with "
                    f"--resume --resume-step {whole}"
                )
            raise DamagedError(f"{error}; {remedy}") from error

    def _whole(
        self,
        step: int,
        policy: Any,
        trainer: Any,
        check: Callable[[dict[str, Any]], None],
    ) -> Saved:
        host, digests = self._host(step)
        check(host)
        return Saved(
            step=step,
            policy=self._policy(step, policy, digests["policy"]),
            trainer=self._arrays(step, "trainer", trainer, digests["trainer"]),
            host=host,
            carried=self._carried(step, host, digests),
        )

    def _carried(
        self, step: int, host: dict[str, Any], digests: dict[str, str]
    ) -> er_jax.Rollout | None:
        """Return the completions that the step after this one goes on with."""
        if "carried" not in host:
            return None
        like = {
            name: jax.ShapeDtypeStruct(tuple(shape), dtype)
            for name, (*shape, dtype) in host["carried"].items()
        }
        arrays = self._arrays(step, "carried", like, digests.get("carried"))
        return er_jax.Rollout(**jax.tree.map(np.asarray, arrays))

    def _whole_before(self, step: int, *like: Any) -> int | None:
        """Return the latest earlier step that is whole and that the run may use."""
        for earlier in sorted(self._manager.all_steps(), reverse=True):
            if earlier < step:
                try:
                    return self._whole(earlier, *like).step
                except ValueError:
                    continue
        return None

    def _existing(self, step: int | None) -> int:
        found = step is None or step in self._manager.all_steps()
        step = self.latest_step if step is None else step
        if step is None or not found:
            raise FileNotFoundError(
                f"no checkpoint {'' if step is None else f'of step {step} '}in "
                f"{self._manager.directory}; there are {self._manager.all_steps()}"
            )
        return step

    def _host(self, step: int) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the JSON values of a step, and the digests of its items."""
        host = self._read(step, "host", ocp.args.JsonRestore())
        digests = host.pop("digests", None) if isinstance(host, dict) else None
        if not isinstance(digests, dict):
            raise self._damaged(
                step, "host", "it holds no digests, or an older version made it"
            )
        if digests.get("host") != text_digest([step, host]):
            raise self._damaged(step, "host", "its digest is another")
        return host, digests

    def _policy(self, step: int, like: Any, wanted: str | None) -> Any:
        """Return the parameters of a step, with what only step 0 holds."""
        part = self._arrays(step, "policy", trained_part(like), wanted)
        if not has_lora(like):
            return part
        digest = self._host(self._existing(0))[1].get("frozen")
        frozen = self._arrays(0, "frozen", er_jax.without_lora(like), digest)
        whole = jax.tree.map(
            lambda leaf, base: leaf.replace(base=base) if is_lora(leaf) else base,
            *(like, frozen),
            is_leaf=is_lora,
        )
        return with_trained_part(whole, part)

    def _arrays(self, step: int, item: str, like: Any, wanted: str | None) -> Any:
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found = self._read(step, item, ocp.args.StandardRestore(shapes))
        if tree_digest(found) != wanted:
            raise self._damaged(step, item, "its digest is another")
        return found

    def _read(self, step: int, item: str, how: Any) -> Any:
        args = ocp.args.Composite(**{item: how})
        try:
            with patient_loops():
                return self._manager.restore(step, args=args)[item]
        except Exception as error:  # Orbax raises whatever its layers do
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise self._damaged(step, item, reason[:300]) from error

    def _damaged(self, step: int, item: str, reason: str) -> DamagedError:
        return DamagedError(
            f"{self._manager.directory / str(step)} is damaged: {item!r} is not what "
            f"was saved ({reason})"
        )


def _arrays_of(rollout: er_jax.Rollout) -> dict[str, np.ndarray]:
    return {
        field.name: np.asarray(getattr(rollout, field.name))
        for field in dataclasses.fields(rollout)
        if field.name != "stats"
    }


class PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that waits for all its tasks when it is closed."""

    def close(self) -> None:
        """Wait for the tasks that still run, then close."""
        if not self.is_closed() and not self.is_running():
            left = asyncio.all_tasks(self)
            if left:
                self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        super().close()


@contextlib.contextmanager
def patient_loops() -> Iterator[None]:
    """Make `PatientLoop` the kind of event loop that is created inside.

    Orbax closes its event loop at the first error. TensorStore is still reading the
    other arrays then, and would print a traceback for each of them before the error.
    """
    usual = asyncio.new_event_loop
    asyncio.new_event_loop = PatientLoop
    try:
        yield
    finally:
        asyncio.new_event_loop = usual


def set_aside_after(out: Path, step: int, *files: Path) -> Path | None:
    """Move the checkpoints after a step away, so that the run can write them anew.

    Args:
      out: the run's directory. step: GRPO step.
      files: copied to the same place as the checkpoints.
    Returns:
      The directory in `out` that they were moved to; None when there were none.
    """
    later = [
        path
        for path in (out / DIRECTORY).iterdir()
        if path.name.isdecimal() and int(path.name) > step
    ]
    if not later:
        return None
    number = 1
    while (aside := out / f"{DIRECTORY}.old{number}").exists():
        number += 1
    aside.mkdir()
    for path in files:
        if path.exists():
            shutil.copy2(path, aside)
    for path in sorted(later):
        path.rename(aside / path.name)
    return aside


def check_same_config(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise ValueError naming the fields that changed and may not when resuming."""
    changed = differences(saved, current)
    if changed:
        raise ValueError(
            "resume: the checkpoint was made with other settings "
            f"({'; '.join(changed)}); give the same ones, or another --out"
        )


def load_policy(
    out: Path | str, *, step: int | None = None
) -> tuple[er_jax.Decoder, Any, Tokenizer]:
    """Load the policy of a run of the demo, to sample from it or to measure it.

    A run that trains a Hugging Face checkpoint saves its policy in that format, for
    `er_jax.load_hf`.

    Args:
      out: directory of the run, as given to `python -m train.grpo --out`.
      step: 0 is the warmed-up policy; None the latest checkpoint.
    Returns:
      The policy, its parameters, and the tokenizer. The run's problems are in
      `out/data/{warmup,train,eval}.jsonl`.
    Raises:
      FileNotFoundError: no such checkpoint.
      ValueError: the run trains a Hugging Face checkpoint, or this one is damaged.
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
        settings = LoRAConfig(**config.get("lora", {}))
        shapes = jax.eval_shape(
            lambda key: settings.added(policy.init(key), key), jax.random.key(0)
        )
        like = Placement().shaped(policy, shapes)
        return policy, checkpoints.restore_policy(like, step), tokenizer
