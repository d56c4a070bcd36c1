"""Damaged runs: what is not whole is named and never used, and nothing is lost.

Damage is done to the files of a run as a disk, a kill or a person does it: cut off,
emptied, a byte flipped, deleted. What a refused `--resume` was given is left as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import er_jax
from configs import tiny
from tests import test_checkpoints
from tests.test_checkpoints import assert_same
from train import grpo, tasks
from train.batching import Example, stack_chunks
from train.checkpoints import DIRECTORY, Checkpoints, load_policy
from train.config import GRPOConfig, MeshConfig, ModelConfig, RunConfig, to_json
from train.metrics import MetricsFile, digest
from train.sft import SFTConfig
from train.tasks import ArithmeticConfig

ROOT = Path(__file__).parents[1]
CONFIG = dataclasses.replace(tiny.CONFIG, reproducible=True)
STEPS = (0, 3, 4)

# Two prompts of which one is held out.
LINES = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(6)]


def files_of(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory with its contents."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def flip(path: Path, place: float = 0.5) -> None:
    """Change one bit, at this share of a file."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x10
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "flipped": flip,
    "deleted": lambda path: path.unlink(),
}


def largest(directory: Path) -> Path:
    """Return the file with the most bytes: most of an item's arrays."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: (path.stat().st_size, path.name))


# -------------------------------------------------------------------- checkpoints


def contents(seed: int = 0) -> dict[str, Any]:
    """A policy and its trainer items, all of numbers that no file can shorten."""
    items = test_checkpoints.contents(seed)
    noise = np.random.default_rng(seed)

    def noisy(leaf: jax.Array) -> jax.Array:
        return leaf + jax.numpy.asarray(noise.normal(size=leaf.shape), leaf.dtype)

    state = jax.tree.map(noisy, items["trainer"]["opt_state"])
    return items | {"trainer": items["trainer"] | {"opt_state": state}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of the tiny policy; what they hold is `contents(step)`."""
    out = tmp_path_factory.mktemp("saved") / "run"
    with Checkpoints(out) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, **contents(step), host={"position": step})
    return out


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def assert_whole_or_named(out: Path, step: int, older: int | None) -> bool:
    """Restore a step: exactly what was saved, or named with the older one.

    Returns:
      Whether it was whole.
    """
    before = files_of(out)
    remedy = "no checkpoint before it is whole"
    if older is not None:
        remedy = f"the checkpoint of step {older} is whole.*--resume-step {older}$"
    try:
        with Checkpoints(out, read_only=True) as checkpoints:
            found = checkpoints.restore(**contents())
    except ValueError as error:
        named = pytest.RaisesExc(
            ValueError, match=rf"checkpoints/{step} is damaged: '\w+' .*{remedy}"
        )
        assert named.matches(error), f"{named.fail_reason}: {error}"
        assert files_of(out) == before
        return False
    assert_same(found.policy, contents(step)["policy"])
    assert_same(found.trainer, contents(step)["trainer"])
    assert (found.step, found.host) == (step, {"position": step})
    return True


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name",
    [
        "_CHECKPOINT_METADATA",
        "host/metadata",
        "policy/_METADATA",
        "policy/_sharding",
        "policy/array_metadatas/process_0",
        "policy/manifest.ocdbt",
        "policy",
        "trainer/_METADATA",
        "trainer/manifest.ocdbt",
        "trainer",
    ],
)
def test_a_damaged_file_is_named_or_did_not_matter(
    run: Path, name: str, damage: str
) -> None:
    path = run / DIRECTORY / "4" / name
    DAMAGE[damage](largest(path) if path.is_dir() else path)
    whole = assert_whole_or_named(run, 4, older=3)
    if damage != "flipped" and name in ("host/metadata", "policy", "trainer"):
        assert not whole


@pytest.mark.parametrize("name", ["host", "policy", "trainer", "policy/d"])
def test_a_checkpoint_that_lacks_an_item_is_named(run: Path, name: str) -> None:
    shutil.rmtree(run / DIRECTORY / "4" / name)
    assert not assert_whole_or_named(run, 4, older=3)


def test_an_empty_checkpoint_is_named(run: Path) -> None:
    shutil.rmtree(run / DIRECTORY / "4")
    (run / DIRECTORY / "4").mkdir()
    assert not assert_whole_or_named(run, 4, older=3)


def test_a_checkpoint_under_another_number_is_named(run: Path) -> None:
    shutil.copytree(run / DIRECTORY / "3", run / DIRECTORY / "9")
    assert not assert_whole_or_named(run, 9, older=4)


def test_the_one_before_is_looked_at_as_well(run: Path) -> None:
    shutil.rmtree(run / DIRECTORY / "4" / "host")
    flip(run / DIRECTORY / "3" / "host" / "metadata")
    assert not assert_whole_or_named(run, 4, older=0)
    shutil.rmtree(run / DIRECTORY / "0" / "policy")
    assert not assert_whole_or_named(run, 4, older=None)


@pytest.mark.parametrize("item", ["policy", "trainer"])
def test_a_flipped_byte_of_an_array_is_never_given_back(run: Path, item: str) -> None:
    """A bit anywhere in the largest file: of the numbers, or of what orders them."""
    path = largest(run / DIRECTORY / "4" / item)
    data, found = path.read_bytes(), 0
    for place in np.linspace(0, 0.999, 12):
        path.write_bytes(data)
        flip(path, float(place))
        found += not assert_whole_or_named(run, 4, older=3)
    assert found >= 6


@pytest.mark.parametrize(
    "change",
    [
        lambda host: host | {"position": 5},
        lambda host: {name: host[name] for name in host if name != "digests"},
        lambda host: host | {"digests": host["digests"] | {"policy": "0" * 16}},
        lambda host: host | {"digests": "none"},
        lambda host: [host],
    ],
)
def test_other_values_on_the_host_are_named(
    run: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    path = run / DIRECTORY / "4" / "host" / "metadata"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert not assert_whole_or_named(run, 4, older=3)


def test_a_policy_of_its_own_is_checked_as_well(run: Path) -> None:
    """As other programs load it, without optimizer."""
    like = contents()["policy"]
    with Checkpoints(run, read_only=True) as checkpoints:
        assert_same(checkpoints.restore_policy(like, 0), contents(0)["policy"])
        wanted = digest(contents(3)["policy"])
        checkpoints.restore_policy(like, 3, digest=wanted)
        with pytest.raises(ValueError, match=r"checkpoints/4 is damaged: 'policy'"):
            checkpoints.restore_policy(like, 4, digest=wanted)
    shutil.rmtree(run / DIRECTORY / "4" / "host")
    with pytest.raises(ValueError, match=r"checkpoints/4 is damaged: 'host'"):
        load_policy(run)


def test_digests_see_places_and_nothing_of_the_layout() -> None:
    """Equal entries elsewhere are another array; an array cut up is the same one."""
    values = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    swapped = values.copy()
    swapped[[0, 5]] = swapped[[5, 0]]
    turned = values.reshape(2, 8).T.reshape(8, 2).copy()
    found = [digest({"x": x}) for x in (values, swapped, turned, -values, values * 2)]
    assert len(set(found)) == 5
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    for spec in (("a", None), ("b", "a"), (("a", "b"), None)):
        cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert digest({"x": jax.device_put(values, cut)}) == found[0]


def test_digests_of_wide_and_narrow_numbers(x64: None) -> None:
    wide = np.linspace(0, 1, 6)
    nudged = np.nextafter(wide, 9)
    whole = np.array([1, 2**40], np.int64)
    narrow = np.array([True, False, True])
    arrays = (wide, nudged, whole, whole + (1 << 35), narrow, ~narrow)
    assert len({digest([x]) for x in arrays}) == len(arrays)
    for x in arrays:
        assert digest([x]) == digest([jax.numpy.asarray(x)])
    with jax.enable_x64(False):  # NumPy's numbers are never narrowed
        assert digest([wide]) != digest([nudged])
    nothing = np.zeros((0, 3), np.float32)
    assert digest([nothing]) != digest([nothing.T])


# ------------------------------------------------------------------------ resuming


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints whose policy is not warmed up, and with nothing sampled.

    Its record of what was run is another's, so that a change of it shows.
    """
    out = tmp_path_factory.mktemp("begun") / "run"
    config = dataclasses.replace(CONFIG, out=out)
    trainer = grpo.Trainer.of(config)
    trainer.start_from(trainer.policy.init(trainer.keys["init"]))
    with Checkpoints(out) as checkpoints:
        trainer.save(checkpoints)
        trainer.state = trainer.state.replace(step=np.int32(1), position=np.int32(4))
        trainer.save(checkpoints)
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
        grpo.run(config)


def test_other_problems_are_refused_and_nothing_changes(
    begun: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "sums.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    config = dataclasses.replace(CONFIG, out=out, data=data)
    trainer = grpo.Trainer.of(config)
    assert not out.exists()
    trainer.start_from(trainer.policy.init(trainer.keys["init"]))
    with Checkpoints(out) as checkpoints:
        trainer.save(checkpoints)
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES[1:]))
    with (
        nothing_changes(out),
        pytest.raises(ValueError, match="contents of data have changed"),
    ):
        grpo.run(dataclasses.replace(config, resume=True))


def test_a_damaged_run_is_refused_and_nothing_changes(out: Path) -> None:
    flip(out / DIRECTORY / "1" / "host" / "metadata", 0.9)
    config = dataclasses.replace(CONFIG, out=out, resume=True)
    with (
        nothing_changes(out),
        pytest.raises(ValueError, match=r"checkpoints/1 is damaged.*--resume-step 0"),
    ):
        grpo.run(config)


def test_the_reference_is_the_one_that_was_saved(out: Path) -> None:
    """Step 0 of another run would be another reference, with nothing to show for it."""
    shutil.rmtree(out / DIRECTORY / "0")
    other = contents(seed=5)
    with Checkpoints(out) as checkpoints:
        checkpoints.save(0, policy=other["policy"], trainer=other["trainer"], host={})
    config = dataclasses.replace(CONFIG, out=out, resume=True)
    with pytest.raises(ValueError, match=r"checkpoints/0 is damaged: 'policy'.*put it"):
        grpo.run(config)


def test_metrics_without_a_checkpoint_are_not_begun_anew(out: Path) -> None:
    shutil.rmtree(out / DIRECTORY)
    config = dataclasses.replace(CONFIG, out=out, resume=True)
    with (
        nothing_changes(out),
        pytest.raises(ValueError, match=r"metrics.jsonl tells of steps, and there is"),
    ):
        grpo.run(config)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        grpo.run(dataclasses.replace(config, resume_step=1))


@pytest.mark.parametrize(
    "text", [b"\xff\xfe1\x00", b'{"prompt": "\xe9", "answer": ""}']
)
def test_a_run_is_not_moved_aside_for_one_that_cannot_begin(
    out: Path, tmp_path: Path, text: bytes
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_bytes(b"\n" + text)
    with nothing_changes(out), pytest.raises(ValueError, match=r"bad.jsonl, line 2"):
        grpo.run(dataclasses.replace(CONFIG, out=out, data=data))


def test_a_step_before_is_taken_and_the_later_ones_are_kept(out: Path) -> None:
    shutil.rmtree(out / DIRECTORY / "1" / "policy")
    config = dataclasses.replace(CONFIG, out=out, resume=True, resume_step=0)
    trainer = grpo.Trainer.of(config)
    with nothing_changes(out):
        assert trainer.resume()
    assert (int(trainer.state.step), int(trainer.state.position)) == (0, 0)
    kept = files_of(out / DIRECTORY / "1")

    log = out / "metrics.jsonl"
    aside = grpo.set_aside_after(out, 0, log)
    assert aside == out / f"{DIRECTORY}.old1"
    assert files_of(aside / "1") == kept
    assert (aside / "metrics.jsonl").read_bytes() == log.read_bytes()
    assert grpo.set_aside_after(out, 0, log) is None
    with Checkpoints(out) as checkpoints:
        assert checkpoints.latest_step == 0


# ------------------------------------------------------------------------- metrics

FOREIGN = [
    b'{"kind": "step", "st',
    b"\xff\xfe\x00garbage",
    b"[1, 2]",
    b"7",
    b"",
    b'{"kind": "step"}',
    b'{"kind": 3, "step": 1}',
    b'{"kind": "step", "step": "2"}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", FOREIGN, ids=lambda line: repr(line[:20]))
def test_a_line_of_something_else_costs_only_itself(
    tmp_path: Path, line: bytes
) -> None:
    log = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        log.append({"kind": "step", "step": step, "text": "a\u2028b\x85c"})
    whole = log.path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    log.path.write_bytes(first + line + b"\n" + second + line)
    assert [record["step"] for record in log.read()] == [1, 2]
    assert [record["step"] for record in log.cut_after(2)] == [1, 2]
    assert log.path.read_bytes() == whole


def test_a_report_leaves_incomplete_records_out(tmp_path: Path) -> None:
    timing = {"rollout_s": 1.0, "rollout_compile_s": 0.0, "update_s": 1.0}
    step: dict[str, Any] = {
        "kind": "step", "step": 1, "reward": 0.25, "logprob_gap": 1e-6,
        "length": {"p50": 1.0, "p90": 2.0, "max": 3.0},
        "timing": timing | {"tokens_by_gamma": {"0": 3}},
    }  # fmt: skip
    records = [
        step,
        step | {"timing": timing},
        step | {"length": 3},
        {"kind": "step", "step": 3},
        {"kind": "eval", "step": 3},
        {"kind": "warmup", "step": 3, "timing": None},
        {"kind": "other", "step": 3},
    ]
    config = dataclasses.replace(CONFIG, out=tmp_path)
    grpo.report(config, records, 1.0, None, None)
    text = (tmp_path / "summary.txt").read_text()
    assert "1 GRPO steps" in text and "held-out" not in text


# ----------------------------------------------------------------------- full disks


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    log = MetricsFile(tmp_path / "metrics.jsonl")
    log.path.symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"a line of metrics could not.*--resume"
    ) as found:
        log.append({"kind": "step", "step": 1})
    assert found.value.errno == errno.ENOSPC
    assert found.value.filename == str(log.path)


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (ValueError("RESOURCE_EXHAUSTED: x: No space left on device"), errno.ENOSPC),
        (ValueError("RESOURCE_EXHAUSTED: x: Disk quota exceeded"), errno.EDQUOT),
        (PermissionError(errno.EACCES, "Permission denied"), errno.EACCES),
        (ValueError("something else"), None),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    number: int | None,
) -> None:
    """As Orbax and TensorStore raise it; one of them in words only."""

    def fail(*args: Any, **kwargs: Any) -> None:
        try:
            raise raised
        except Exception as error:
            raise RuntimeError("while writing") from error

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, **contents(), host={})
        monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
        with pytest.raises((OSError, RuntimeError)) as found:
            checkpoints.save(5, **contents(), host={})
    if number is None:
        assert found.type is RuntimeError
        return
    assert isinstance(found.value, OSError) and found.value.errno == number
    assert "the checkpoint of step 5 could not be written" in str(found.value)
    assert "go on with --resume" in str(found.value)
    assert found.value.filename == str(tmp_path / DIRECTORY / "5")


# ---------------------------------------------------------------------------- data


@pytest.mark.parametrize("text", ["", "\ufeff"], ids=["plain", "marked"])
def test_data_is_utf_8_whatever_the_locale(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(line, ensure_ascii=False) for line in LINES]
    path.write_bytes("\r\n".join([text + lines[0], *lines[1:]]).encode())
    assert len(tasks.read_jsonl(path, tasks.Tokenizer())) == len(LINES)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "1", "answer": "\xe9"}', "line 3: byte 0xe9 is not UTF-8; save"),
        (b"\x00\x00\x00", "line 3: not JSON"),
        (b"[" * 100_000, "line 3: not JSON"),
        (b"9" * 5_000, "line 3: not JSON"),
        (
            b'{"prompt": "1+1+1", "answer": "3"}',
            'line 3: "prompt" has 6 tokens, and .* leave 5 beside grpo.max_new_tokens',
        ),
    ],
    ids=["latin 1", "zeros", "nested", "digits", "long"],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    good = [json.dumps(fields).encode() for fields in LINES[:2]]
    path.write_bytes(b"\n".join([*good, line, good[0]]))
    with pytest.raises(ValueError, match=rf"data.jsonl, {message}"):
        tasks.read_jsonl(path, tasks.Tokenizer(), max_prompt=5)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_data_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ValueError, match=r"data='.*' cannot be read \(.*; give a JSONL"
    ):
        tasks.read_jsonl(tmp_path / name, tasks.Tokenizer())


@dataclasses.dataclass(frozen=True)
class Template(tasks.Tokenizer):
    """A tokenizer whose chat template refuses one prompt, and has no word for another.

    A checkpoint's template is a program, which may raise whatever it likes.
    """

    def encode_prompt(self, prompt: str) -> list[int]:
        if prompt == "1+1=":
            raise RuntimeError("roles must alternate")
        return []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINES[0], r'line 1: "prompt" has no tokens'),
        (LINES[1], r"line 1: .* be turned into tokens \(RuntimeError: roles must"),
    ],
)
def test_prompts_that_cannot_be_tokens_are_named(
    tmp_path: Path, line: dict[str, str], message: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=message):
        tasks.read_jsonl(path, Template())


def test_a_long_line_is_paid_for_where_it_is_sampled(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    long = {"prompt": "1+" * 10_000 + "1=", "answer": "3"}
    data.write_text("".join(json.dumps(line) + "\n" for line in [*LINES, long]))
    buckets = grpo.Trainer.of(dataclasses.replace(CONFIG, data=data, seed=3)).buckets
    assert buckets.lengths[-1] > 20_000

    def shapes(prompt: int) -> list[int]:
        examples = [Example([1] * 5, [2] * 20), Example([1] * prompt, [2] * 4)]
        chunks = stack_chunks(examples, buckets, capacity=4)
        return [bucket.batch.tokens.shape[-1] for bucket in chunks]

    # Of all steps with short prompts there is one program.
    assert shapes(5) == shapes(100) == [16, 256]
    assert shapes(300) == [16, 256, 512]
    assert shapes(20_001) == list(buckets.lengths)


def test_a_round_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffles: list[int] = []

    class Counted(tasks.random.Random):
        def shuffle(self, x: Any) -> None:
            shuffles.append(len(x))
            super().shuffle(x)

    problems = [tasks.Problem(str(i), str(i)) for i in range(500)]
    monkeypatch.setattr(tasks.random, "Random", Counted)
    taken = [tasks.problem_at(problems, i, seed=12) for i in range(400, 1400)]
    assert shuffles == [500] * 3
    assert {p.prompt for p in taken[100:600]} == {p.prompt for p in problems}


# -------------------------------------------------------------------------- rewards


def sampled(problems: int, n: int) -> Any:
    """A rollout of which every completion is "42", as far as rewards look at it."""
    ids = np.array([tasks.Tokenizer().encode_completion("42")] * problems * n)
    size = problems * n
    return types.SimpleNamespace(
        completion_ids=ids,
        lengths=np.full(size, ids.shape[1]),
        finish_reason=np.full(size, "stop"),
    )


def broken(completion: str, answer: str, *, finished: bool) -> float:
    raise KeyError(answer)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (broken, r"the reward raised KeyError: .*test_train_damage.py, line \d+\)"),
        (lambda *args, **kwargs: None, "the reward returned None; let it return a"),
        (lambda *args, **kwargs: float("nan"), "the reward returned nan"),
        (lambda *args, **kwargs: float("inf"), "the reward returned inf"),
        (lambda *args, **kwargs: "1.0", "the reward returned '1.0'"),
        (lambda *args, **kwargs: [1.0], r"the reward returned \[1.0\]"),
        (lambda *args, **kwargs: np.ones(1), r"the reward returned array\(\[1.\]\)"),
        (lambda *args, **kwargs: 1j, "the reward returned 1j"),
        (lambda completion: 1.0, "the reward raised TypeError"),
    ],
)
def test_a_bad_reward_is_named_with_problem_and_completion(
    monkeypatch: pytest.MonkeyPatch, reward: Any, message: str
) -> None:
    trainer = grpo.Trainer.of(CONFIG)
    trainer.state = types.SimpleNamespace(params=None, gathered=None)
    problems = trainer.problems["train"][:2]
    calls: list[str] = []

    def second(completion: str, answer: str, *, finished: bool) -> Any:
        calls.append(completion)
        if len(calls) < 6:
            return len(calls) / 2
        return reward(completion, answer, finished=finished)

    trainer.subject.reward = second if reward is not broken else reward
    monkeypatch.setattr(er_jax, "rollout", lambda *args, **kwargs: sampled(2, 4))
    which = "1 of 4" if reward is broken else "2 of 4"
    prompt = problems[0 if reward is broken else 1].prompt
    where = re.escape(f"completion {which}, '42', of the problem '{prompt}'")
    with pytest.raises(ValueError, match=f"{message}.*{where}"):
        trainer.sample(problems, n=4, key=jax.random.key(0), first_sequence_id=0)


@pytest.mark.parametrize(
    "value", [True, 1, np.float32(1), np.ones(()), jax.numpy.ones(())]
)
def test_any_number_is_a_reward(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    trainer = grpo.Trainer.of(CONFIG)
    trainer.state = types.SimpleNamespace(params=None, gathered=None)
    trainer.subject.reward = lambda *args, **kwargs: value
    monkeypatch.setattr(er_jax, "rollout", lambda *args, **kwargs: sampled(1, 3))
    problems = trainer.problems["train"][:1]
    _, found = trainer.sample(problems, n=3, key=jax.random.key(0), first_sequence_id=0)
    assert found.dtype == np.float64 and found.tolist() == [[1.0] * 3]


def test_a_step_derives_its_draft_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the program of the update, and nowhere else."""
    trainer = grpo.Trainer.of(CONFIG)
    params = trainer.policy.init(jax.random.key(0))
    trainer.start_from(params)
    info = dict.fromkeys(("loss", "kl", "clip_fraction", "grad_norm", "logprob_gap"), 0)
    monkeypatch.setattr(grpo, "update", lambda *args, **kwargs: (trainer.state, info))
    monkeypatch.setattr(trainer.metrics, "append", lambda record: None)
    derived: list[str] = []
    refresh = grpo.refresh

    def counted(*args: Any, **kwargs: Any) -> Any:
        derived.append("draft")
        return refresh(*args, **kwargs)

    monkeypatch.setattr(grpo, "refresh", counted)
    out = sampled(4, 4)
    out.logprobs = np.zeros(out.completion_ids.shape, np.float32)
    out.stats = er_jax.RolloutStats()
    problems = trainer.problems["train"][:4]
    rewards = np.arange(16.0).reshape(4, 4)
    record = trainer.learn(grpo.StepData(problems, out, rewards, seconds=1.0))
    assert derived == []
    assert record["step"] == 1 and "refresh_s" not in record["timing"]


# ------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (GRPOConfig, {"group_size": "8"}, "group_size='8': give a whole number"),
        (GRPOConfig, {"group_size": 4.0}, "group_size=4.0: give a whole number"),
        (GRPOConfig, {"group_size": True}, "group_size=True: give a whole number"),
        (GRPOConfig, {"temperature": "1"}, "temperature='1': give a finite number"),
        (GRPOConfig, {"temperature": math.nan}, "temperature=nan: give a finite"),
        (GRPOConfig, {"learning_rate": math.inf}, "learning_rate=inf: give a finite"),
        (GRPOConfig, {"scale_advantages": 1}, "scale_advantages=1: give True or"),
        (GRPOConfig, {"bucket_lengths": 16}, "bucket_lengths=16: give several"),
        (GRPOConfig, {"bucket_lengths": "16"}, "bucket_lengths='16': give several"),
        (GRPOConfig, {"bucket_lengths": (16, None)}, "bucket_lengths=None: give a wh"),
        (MeshConfig, {"data": None}, "data=None: give a whole number"),
        (SFTConfig, {"max_steps": 2.5}, "max_steps=2.5: give a whole number"),
        (ArithmeticConfig, {"slip_rate": None}, "slip_rate=None: give a finite"),
        (ModelConfig, {"dim": np.ones(2)}, r"dim=array\(.*: give a whole number"),
        (RunConfig, {"control": None}, "control=None: give a text"),
        (RunConfig, {"out": 3}, "out=3: give a path"),
        (RunConfig, {"grpo": {}}, "grpo={}: give a GRPOConfig"),
        (RunConfig, {"resume_step": 3}, "resume_step=3: it goes with --resume"),
        (
            RunConfig,
            {"resume": True, "resume_step": -1},
            "resume_step=-1: it goes with --resume, and names a checkpoint",
        ),
    ],
)
def test_settings_of_another_type_are_named(
    kind: type, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_settings_of_numpy_are_those_of_python() -> None:
    plain = dataclasses.replace(
        CONFIG, seed=3, out=Path("runs/x"), profile=None,
        grpo=dataclasses.replace(CONFIG.grpo, kl_coef=0.5, bucket_lengths=(16, 32)),
    )  # fmt: skip
    settings: dict[str, Any] = {
        "kl_coef": np.float32(0.5), "group_size": np.int32(4), "max_slots": np.array(8),
        "bucket_lengths": np.array([16, 32]),
    }  # fmt: skip
    fields: dict[str, Any] = {
        "seed": np.int64(3), "out": "runs/x", "reproducible": np.bool_(True),
        "grpo": dataclasses.replace(CONFIG.grpo, **settings),
    }  # fmt: skip
    numpy = dataclasses.replace(CONFIG, **fields)
    assert numpy == plain and hash(numpy.grpo) == hash(plain.grpo)
    assert json.dumps(to_json(numpy)) == json.dumps(to_json(plain))


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
    grpo.run(config)
    wanted = records_of(out)
    flip(out / DIRECTORY / "3" / "host" / "metadata")
    with (out / "metrics.jsonl").open("ab") as log:
        log.write(b'{"kind": "st\n\xff\n')
    with pytest.raises(ValueError, match="go on from it with --resume --resume-step 2"):
        grpo.run(dataclasses.replace(config, resume=True))
    grpo.run(dataclasses.replace(config, resume=True, resume_step=2))
    assert records_of(out) == wanted
    aside = out / f"{DIRECTORY}.old1"
    assert {path.name for path in aside.iterdir()} == {"3", "metrics.jsonl"}
    before = records_of(out)
    grpo.run(dataclasses.replace(config, resume=True))
    assert records_of(out) == before
