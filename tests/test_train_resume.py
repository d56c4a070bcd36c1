"""Resumed runs: a refused `--resume` changes nothing, an accepted one loses nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from configs import tiny
from tests.test_train_damage import contents, files_of, flip
from train.checkpoints import DIRECTORY, Checkpoints, load_policy, set_aside_after
from train.config import MeshConfig
from train.metrics import MetricsFile
from train.run import resume, run, save
from train.trainer import Trainer

ROOT = Path(__file__).parents[1]
CONFIG = dataclasses.replace(tiny.CONFIG, reproducible=True)

# Two prompts of which one is held out.
LINES = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(6)]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints whose policy is not warmed up, and with nothing sampled.

    Its record of what was run is another's, so that a change of it shows.
    """
    out = tmp_path_factory.mktemp("begun") / "run"
    config = dataclasses.replace(CONFIG, out=out)
    trainer = Trainer.of(config)
    trainer.start_from(trainer.policy.init(trainer.keys["init"]))
    with Checkpoints(out) as checkpoints:
        save(trainer, checkpoints)
        trainer.state = trainer.state.replace(step=np.int32(1), position=np.int32(4))
        save(trainer, checkpoints)
    shutil.rmtree(out / "data", ignore_errors=True)
    (out / "data").mkdir()
    (out / "data" / "train.jsonl").write_text("as it was\n")
    (out / "config.json").write_text("{}\n")
    log = MetricsFile(out / "metrics.jsonl")
    for record in ({"kind": "eval", "step": 0}, {"kind": "step", "step": 1}):
        log.append(record)
    return out


@pytest.fixture
def out(begun: Path, tmp_path: Path) -> Path:
    """The same, to be resumed."""
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


@contextlib.contextmanager
def nothing_changes(out: Path) -> Iterator[None]:
    before = files_of(out.parent)
    yield
    assert files_of(out.parent) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"resume: .*other settings \(seed: 0 -> 1\)"),
        ({"task": dataclasses.replace(CONFIG.task, num_train=32)}, "num_train: 64"),
        ({"data": Path("missing.jsonl")}, r"data='missing.jsonl' cannot be read"),
        ({"resume_step": 7}, r"no checkpoint of step 7 in .*there are \[0, 1\]"),
        ({"mesh": MeshConfig(data=3)}, "mesh='3 x 1 x 1'"),
    ],
)
def test_a_refused_resume_changes_nothing(
    out: Path, changes: dict[str, Any], message: str
) -> None:
    config = dataclasses.replace(CONFIG, out=out, resume=True, **changes)
    with (
        nothing_changes(out),
        pytest.raises((ValueError, FileNotFoundError), match=message),
    ):
        run(config)


def test_other_problems_are_refused_and_nothing_changes(
    begun: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "sums.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    config = dataclasses.replace(CONFIG, out=out, data=data)
    trainer = Trainer.of(config)
    assert not out.exists()
    trainer.start_from(trainer.policy.init(trainer.keys["init"]))
    with Checkpoints(out) as checkpoints:
        save(trainer, checkpoints)
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES[1:]))
    with (
        nothing_changes(out),
        pytest.raises(ValueError, match="contents of data have changed"),
    ):
        run(dataclasses.replace(config, resume=True))


def test_a_damaged_run_is_refused_and_nothing_changes(out: Path) -> None:
    flip(out / DIRECTORY / "1" / "host" / "metadata", 0.9)
    config = dataclasses.replace(CONFIG, out=out, resume=True)
    with (
        nothing_changes(out),
        pytest.raises(ValueError, match=r"checkpoints/1 is damaged.*--resume-step 0"),
    ):
        run(config)


def test_the_reference_is_the_one_that_was_saved(out: Path) -> None:
    """Step 0 of another run would be another reference, with nothing to show for it."""
    shutil.rmtree(out / DIRECTORY / "0")
    other = contents(seed=5)
    with Checkpoints(out) as checkpoints:
        checkpoints.save(0, policy=other["policy"], trainer=other["trainer"], host={})
    config = dataclasses.replace(CONFIG, out=out, resume=True)
    with pytest.raises(ValueError, match=r"checkpoints/0 is damaged: 'policy'.*put it"):
        run(config)


def test_metrics_without_a_checkpoint_are_not_begun_anew(out: Path) -> None:
    shutil.rmtree(out / DIRECTORY)
    config = dataclasses.replace(CONFIG, out=out, resume=True)
    with (
        nothing_changes(out),
        pytest.raises(ValueError, match=r"metrics.jsonl tells of steps, and there is"),
    ):
        run(config)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        run(dataclasses.replace(config, resume_step=1))


@pytest.mark.parametrize(
    "text", [b"\xff\xfe1\x00", b'{"prompt": "\xe9", "answer": ""}']
)
def test_a_run_is_not_moved_aside_for_one_that_cannot_begin(
    out: Path, tmp_path: Path, text: bytes
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_bytes(b"\n" + text)
    with nothing_changes(out), pytest.raises(ValueError, match=r"bad.jsonl, line 2"):
        run(dataclasses.replace(CONFIG, out=out, data=data))


def test_a_step_before_is_taken_and_the_later_ones_are_kept(out: Path) -> None:
    shutil.rmtree(out / DIRECTORY / "1" / "policy")
    config = dataclasses.replace(CONFIG, out=out, resume=True, resume_step=0)
    trainer = Trainer.of(config)
    with nothing_changes(out):
        assert resume(trainer)
    assert (int(trainer.state.step), int(trainer.state.position)) == (0, 0)
    kept = files_of(out / DIRECTORY / "1")

    log = out / "metrics.jsonl"
    aside = set_aside_after(out, 0, log)
    assert aside == out / f"{DIRECTORY}.old1"
    assert files_of(aside / "1") == kept
    assert (aside / "metrics.jsonl").read_bytes() == log.read_bytes()
    assert set_aside_after(out, 0, log) is None
    with Checkpoints(out) as checkpoints:
        assert checkpoints.latest_step == 0


# -------------------------------------------------------------------- whole processes


def start(out: Path, *args: str) -> subprocess.Popen[str]:
    """Start a run of its own; those of one test compile their programs once."""
    command = [
        sys.executable, "-m", "train.grpo", "tiny", "--out", str(out), "--reproducible",
        "--steps", "6", "--save-every", "2", *args,
    ]  # fmt: skip
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def records_of(out: Path) -> list[dict[str, Any]]:
    """Return what a run has logged, but for the clock's part."""
    records = MetricsFile(out / "metrics.jsonl").read()
    return [{k: v for k, v in r.items() if k != "timing"} for r in records]


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return errors


@pytest.mark.slow
def test_interrupted_a_run_goes_on_as_after_a_kill(tmp_path: Path) -> None:
    """Ctrl-C while the first step is sampled, while a checkpoint is written, and in a
    later step; the numbers are those of a run that nobody disturbed.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(whole))

    def saving() -> bool:
        return any("tmp" in path.name for path in (cut / DIRECTORY).glob("*"))

    moments: list[Callable[[], bool]] = [
        lambda: any(r["kind"] == "eval" for r in records_of(cut)),
        saving,
        lambda: any(r["step"] >= 3 for r in records_of(cut) if r["kind"] == "step"),
    ]
    for moment in moments:
        process = start(cut, *(["--resume"] if cut.exists() else []))
        while not moment():
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT, errors
        assert "goes on from the last checkpoint" in errors
        # All that was written is whole, but perhaps for the last line.
        for line in (cut / "metrics.jsonl").read_bytes().split(b"\n")[:-1]:
            json.loads(line)
        steps = [path for path in (cut / DIRECTORY).iterdir() if path.name.isdecimal()]
        assert steps
        for path in steps:
            load_policy(cut, step=int(path.name))
    finish(start(cut, "--resume"))
    assert records_of(cut) == records_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_killed_in_the_middle_of_a_rollout_it_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Steps since the checkpoint are not sampled again; the numbers are the same."""
    grpo = dataclasses.replace(tiny.CONFIG.grpo, stream=stream)
    config = dataclasses.replace(
        tiny.CONFIG, dtype="float64", steps=3, save_every=3, grpo=grpo
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    name = "stream" if stream else "rollout"
    sample, steps = getattr(er_jax, name), list[Any]()

    def sample_until_the_second(*args: Any, **named: Any) -> Any:
        if "journal" in named:
            steps.append(None)
        if len(steps) == 2:
            found = sample(*args, **named, until=er_jax.Until(tokens=40))
            list(found if stream else ())
            raise KeyboardInterrupt
        return sample(*args, **named)

    with jax.enable_x64(True):
        run(dataclasses.replace(config, out=whole))
        monkeypatch.setattr(er_jax, name, sample_until_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(dataclasses.replace(config, out=cut))
        monkeypatch.undo()
        assert [r["step"] for r in records_of(cut) if r["kind"] == "step"] == [1]
        assert len(list((cut / "journals").iterdir())) == 2
        run(dataclasses.replace(config, out=cut, resume=True))
    assert records_of(cut) == records_of(whole)
    sampled = [
        sum(r["timing"]["tokens_by_gamma"].values())
        for r in MetricsFile(cut / "metrics.jsonl").read()
        if r["kind"] == "step"
    ]
    tokens = [r["num_tokens"] for r in records_of(cut) if r["kind"] == "step"]
    assert sampled[0] == 0
    assert 0 < sampled[1] <= tokens[1] - 40
    assert sampled[2] == tokens[2]
    assert not (cut / "journals").exists()


@pytest.mark.slow
def test_bad_input_ends_in_one_line(tmp_path: Path) -> None:
    """On the command line nobody has use for a traceback."""
    data = tmp_path / "bad.jsonl"
    data.write_bytes(b"\xff\n")
    process = start(tmp_path / "run", "--data", str(data))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and not (tmp_path / "run").exists()
    last = errors.strip().splitlines()
    assert last == [f"train.grpo: {data}, line 1: byte 0xff is not UTF-8; save the "
                    "file in that encoding"]  # fmt: skip


@pytest.mark.slow
def test_a_damaged_run_goes_on_from_the_step_that_is_named(tmp_path: Path) -> None:
    """To the numbers of the run that was not damaged, torn metrics among them."""
    out = tmp_path / "run"
    config = dataclasses.replace(CONFIG, out=out, steps=3)
    run(config)
    wanted = records_of(out)
    flip(out / DIRECTORY / "3" / "host" / "metadata")
    with (out / "metrics.jsonl").open("ab") as log:
        log.write(b'{"kind": "st\n\xff\n')
    with pytest.raises(ValueError, match="go on from it with --resume --resume-step 2"):
        run(dataclasses.replace(config, resume=True))
    run(dataclasses.replace(config, resume=True, resume_step=2))
    assert records_of(out) == wanted
    aside = out / f"{DIRECTORY}.old1"
    assert {path.name for path in aside.iterdir()} == {"3", "metrics.jsonl"}
    before = records_of(out)
    run(dataclasses.replace(config, resume=True))
    assert records_of(out) == before
