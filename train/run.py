"""A whole run: its directory, its steps, its checkpoints and what it leaves behind.

Nothing is written before everything that could refuse the run has been checked. A run
that was killed or interrupted at any moment goes on from its last whole checkpoint and
writes the numbers of a run that was never disturbed.

Left out: what a step does, which is `trainer`'s.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import er_jax
from er_jax.engine.digests import tree_digest
from er_jax.lora import has_lora, is_lora
from train import tasks
from train.checkpoints import (
    DIRECTORY,
    Checkpoints,
    NoRunError,
    check_same_config,
    set_aside_after,
)
from train.config import BaseConfig, HFConfig, to_json
from train.files import replace_text, writing
from train.placement import agreed, is_first, on_host
from train.report import write_report
from train.trained import trained_part
from train.trainer import Trainer

Say = Callable[[str], None]

# The journals of rollouts since the last checkpoint, in the run's directory.
JOURNALS = "journals"


def run(config: BaseConfig) -> list[dict[str, Any]]:
    """Run, or go on with, a whole run and return all records of its metrics.

    Effects: writes to `config.out`. An older run found there is moved aside, unless it
    is resumed.
    Raises:
      ValueError, FileNotFoundError: as `Trainer.of` and `resume`.
    """
    start = time.perf_counter()
    trainer = Trainer.of(config)
    is_resumed = config.resume and resume(trainer)
    say: Say = print if is_first() else lambda _: None
    agreed(0)  # Every process has read the directory before the first one changes it.
    if is_first():
        prepare(trainer, is_resumed, say)
    agreed(0)  # The first process has changed it before another one reads it again.
    shapes = trainer.shapes()[0]
    total, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
        for tree in (shapes, trained_part(shapes))
    )
    of_them = "" if total == trained else f", {trained:.2f} M of them trained"
    say(
        f"{total:.1f} M parameters{of_them}, {config.dtype}, "
        f"control {config.control}, {len(trainer.problems['train'])} problems, "
        f"writing to {config.out}"
    )
    with Checkpoints(config.out) as checkpoints:
        if is_resumed:
            say(f"resumed after step {int(trainer.state.step)}")
        else:
            begin(trainer, checkpoints)
        if agreed(all(r["kind"] != "eval" for r in trainer.log.read())):
            record = trainer.evaluate()
            say(f"held-out reward before the first step: {record['reward']:.3f}")
        rollout = take_steps(trainer, checkpoints)
    exported = export(trainer)
    records = trainer.log.read()
    if is_first():
        seconds = time.perf_counter() - start
        write_report(config.out, records, seconds, exported, rollout)
    return records


def prepare(trainer: Trainer, is_resumed: bool, say: Say) -> None:
    """Make the directory ready: older things out of the way, the inputs written."""
    config = trainer.config
    if not config.resume:
        move_aside(config.out)
    write_inputs(trainer)
    if is_resumed:
        step = int(trainer.state.step)
        aside = set_aside_after(config.out, step, trainer.log.path)
        if aside is not None:
            say(f"the checkpoints after step {step} are now in {aside}")
        trainer.log.cut_after(step)


def move_aside(out: Path) -> None:
    """Rename a directory that holds a run, so that a new one may take its place."""
    if not out.exists() or not any(out.iterdir()):
        return
    number = 1
    while (old := out.with_name(f"{out.name}.old{number}")).exists():
        number += 1
    out.rename(old)
    print(f"{out} held an older run, now in {old}; --resume would have gone on with it")


def write_inputs(trainer: Trainer) -> None:
    """Write the config and the problems of a run into its directory."""
    out = trainer.config.out
    with writing("config and data", out):
        text = json.dumps(to_json(trainer.config), indent=2)
        replace_text(out / "config.json", text + "\n")
        for name, lines in trainer.problems.items():
            tasks.write_jsonl(out / "data" / f"{name}.jsonl", lines)


def begin(trainer: Trainer, checkpoints: Checkpoints) -> None:
    """Make the first parameters and save them as step 0."""
    if is_first():
        trainer.log.path.unlink(missing_ok=True)
    trainer.start_from(trainer.first_params())
    save(trainer, checkpoints)


def take_steps(trainer: Trainer, checkpoints: Checkpoints) -> er_jax.Rollout | None:
    """Take the steps that are left, saving now and then, and evaluate at the end.

    Returns:
      The last step's rollout; None when no step was left.
    """
    config, rollout = trainer.config, None
    done = int(trainer.state.step)
    with tqdm(
        total=config.steps, initial=done, desc="GRPO", unit="step",
        file=sys.stderr, disable=not is_first(),
    ) as bar:  # fmt: skip
        for step in range(done + 1, config.steps + 1):
            # The second step of this process: the first one compiles.
            is_traced = config.profile is not None and step == done + 2
            with profiled(config.profile if is_traced else None):
                data = trainer.rollout_step(journal_of(trainer))
                record, rollout = trainer.learn(data), data.out
            bar.update()
            bar.set_postfix(
                reward=f"{record['reward']:.2f}", tokens=record["num_tokens"]
            )
            if step % config.save_every == 0 or step == config.steps:
                if step == config.steps:
                    trainer.evaluate()
                save(trainer, checkpoints)
    return rollout


def journal_of(trainer: Trainer) -> Path | None:
    """Return the file that the next rollout goes on from after a kill.

    It is named by its policy: after a resume that did not repeat a step bit for bit
    there is another one. Going on changes which sequences are batched together, which
    `reproducible` forbids in float32.
    """
    config = trainer.config
    is_bound = config.reproducible and config.dtype == "float32"
    if is_bound or config.mesh.replicas or jax.process_count() > 1:
        return None
    folder = config.out / JOURNALS
    with writing("a journal", folder):
        folder.mkdir(parents=True, exist_ok=True)
    step, params = int(trainer.state.step) + 1, trainer.state.params.policy
    return folder / f"{step}-{tree_digest(params)}"


def profiled(directory: Path | None) -> AbstractContextManager[Any]:
    """Write a trace of what runs inside; None writes nothing."""
    if directory is None:
        return contextlib.nullcontext()
    return jax.profiler.trace(str(directory))


def export(trainer: Trainer) -> Path | None:
    """Save a trained Hugging Face checkpoint in its own format.

    Low-rank pairs are saved twice: alone, as an adapter of PEFT, and merged.

    Returns:
      Its directory; None for the demo, whose checkpoints are Orbax's only.
    """
    config = trainer.config
    if not isinstance(config, HFConfig):
        return None
    step = int(trainer.state.step)
    trained, adapter = (
        config.out / f"{kind}-{step}" for kind in ("trained", "adapter")
    )
    params = trainer.state.params.policy
    if jax.process_count() > 1:
        params = on_host(params)  # Every process takes part: each holds a piece.
    if is_first() and has_lora(params) and not adapter.exists():
        with writing("the trained adapter", adapter):
            er_jax.save_peft_adapter(adapter, trainer.policy, params)
    if is_first() and not trained.exists():
        with writing("the trained checkpoint", trained):
            er_jax.save_hf(trained, trainer.policy, merged(params))
    return trained


def merged(params: Any) -> Any:
    """Return plain weights; those with a pair are merged one by one, to the host."""
    return jax.tree.map(
        lambda leaf: np.asarray(er_jax.merge_lora(leaf)) if is_lora(leaf) else leaf,
        params,
        is_leaf=is_lora,
    )


# -- checkpoints


def save(trainer: Trainer, checkpoints: Checkpoints) -> None:
    """Write a checkpoint of the present step."""
    state = trainer.state
    checkpoints.save(
        int(state.step),
        policy=state.params.policy,
        trainer={"opt_state": state.opt_state, "key": state.key},
        host={
            "config": to_json(trainer.config),
            "data_digest": trainer.data_digest,
            "position": int(state.position),
            "controller": trainer.controller.state_dict(),
            "reference_digest": trainer.reference_digest,
        },
        carried=trainer.carried,
    )
    if is_first():  # The rollouts before it are needed no more.
        shutil.rmtree(trainer.config.out / JOURNALS, ignore_errors=True)


def resume(trainer: Trainer) -> bool:
    """Restore the checkpoint that the config names; writes nothing.

    Returns:
      Whether there is one. A run that was killed before its first checkpoint has none,
      and begins anew.
    Raises:
      FileNotFoundError: there is no checkpoint of the step that is asked for.
      ValueError: the checkpoint was made with another config or other data, or it is
        damaged; or there is none although the metrics hold steps.
    """
    config = trainer.config
    out, step = config.out, config.resume_step
    try:
        with Checkpoints(out, read_only=True) as checkpoints:
            if checkpoints.latest_step is not None or step is not None:
                _restore(trainer, checkpoints, step)
                return True
    except NoRunError:
        if step is not None:
            raise
    if any(record["kind"] != "warmup" for record in trainer.log.read()):
        raise ValueError(
            f"resume: {trainer.log.path} tells of steps, and there is no "
            f"checkpoint in {out / DIRECTORY}; put it back, or begin anew, without "
            "--resume"
        )
    return False


def _restore(trainer: Trainer, checkpoints: Checkpoints, step: int | None) -> None:
    """Give a trainer the state of a checkpoint; None is the latest."""

    def check(host: dict[str, Any]) -> None:
        check_same_config(host["config"], to_json(trainer.config))
        if host["data_digest"] != trainer.data_digest:
            raise ValueError(
                "resume: the contents of data have changed since the checkpoint was "
                "made; give the same file, or another --out"
            )

    shapes, items = trainer.shapes()
    saved = checkpoints.restore(policy=shapes, trainer=items, step=step, check=check)
    trainer.set_state(
        saved.policy, **saved.trainer, step=saved.step, position=saved.host["position"]
    )
    trainer.carried = saved.carried
    trainer.controller.load_state_dict(saved.host["controller"])
    if trainer.config.grpo.kl_coef > 0 and not trainer.config.lora.rank:
        trainer.reference_digest = saved.host["reference_digest"]
        try:
            trainer.ref_params = checkpoints.restore_policy(
                shapes, step=0, digest=trainer.reference_digest
            )
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(
                f"{error}; grpo.kl_coef needs the policy of step 0: put it back or "
                "begin anew, without --resume"
            ) from error
