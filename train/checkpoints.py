"""Checkpoints that hold everything a run needs to go on exactly, and nothing else.

One Orbax step is one GRPO step; step 0 is the warmed-up policy and is never deleted.
A step holds three items: `policy` (parameters), `trainer` (optimizer and random key)
and `host` (JSON: config, data position, controller, digest of the data, and the digests
of all three items). The draft is not among them: it is computed from the parameters.

Orbax writes into a temporary directory and renames it, so a step is either there and
whole or not there; a run killed while saving finds the one before. What a disk does to
a step afterwards is found by the digests: nothing is given back that was not saved.
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
import orbax.checkpoint as ocp

import er_jax
from train import metrics
from train.config import ModelConfig, differences
from train.files import writing
from train.placement import Placement
from train.tasks import Tokenizer

DIRECTORY = "checkpoints"

# Steps divisible by this are kept for ever: of them there is only step 0.
NEVER = 10**9


class NoRunError(FileNotFoundError):
    """A directory holds no run."""


class DamagedError(ValueError):
    """A checkpoint is not what was saved."""


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
            raise NoRunError(
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
        digests = {
            "policy": metrics.digest(policy),
            "trainer": metrics.digest(trainer),
            "host": metrics.text_digest([step, host]),
        }
        path = Path(self._manager.directory) / str(step)
        with writing(f"the checkpoint of step {step}", path):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    policy=ocp.args.StandardSave(policy),
                    trainer=ocp.args.StandardSave(trainer),
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
          digest: of these parameters; None is what the checkpoint itself says.
        Raises: as `restore_host`.
        """
        step = self._existing(step)
        if digest is None:
            digest = self._host(step)[1]["policy"]
        return self._arrays(step, "policy", like, digest)

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
          check: raises what there is to say against the JSON values, before arrays are
            read.
        Raises:
          FileNotFoundError: there is no such checkpoint.
          DamagedError: it does not hold what was saved; names one before it that does.
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
            policy=self._arrays(step, "policy", policy, digests["policy"]),
            trainer=self._arrays(step, "trainer", trainer, digests["trainer"]),
            host=host,
        )

    def _whole_before(self, step: int, *like: Any) -> int | None:
        """Return the latest step before one that is whole and fits the run."""
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
        if digests.get("host") != metrics.text_digest([step, host]):
            raise self._damaged(step, "host", "its digest is another")
        return host, digests

    def _arrays(self, step: int, item: str, like: Any, wanted: str | None) -> Any:
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found = self._read(step, item, ocp.args.StandardRestore(shapes))
        if metrics.digest(found) != wanted:
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


class PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that ends after all its tasks, also when one of them fails."""

    def close(self) -> None:
        """Wait for what is still running, and close."""
        if not self.is_closed() and not self.is_running():
            left = asyncio.all_tasks(self)
            if left:
                self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        super().close()


@contextlib.contextmanager
def patient_loops() -> Iterator[None]:
    """Let event loops that are made inside be patient.

    Orbax closes its own at the first error, and TensorStore, which is still reading the
    other arrays, then writes a traceback for each of them in front of the error itself.
    """
    usual = asyncio.new_event_loop
    asyncio.new_event_loop = PatientLoop
    try:
        yield
    finally:
        asyncio.new_event_loop = usual


def set_aside_after(out: Path, step: int, *files: Path) -> Path | None:
    """Move the checkpoints after a step out of the way of those that are to come.

    Args:
      out: the run's directory. step: GRPO step. files: to be kept beside them, copied.
    Returns:
      The directory in `out` that they were moved to; None where there were none.
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
        shapes = jax.eval_shape(policy.init, jax.random.key(0))
        like = Placement().shaped(policy, shapes)
        return policy, checkpoints.restore_policy(like, step), tokenizer
