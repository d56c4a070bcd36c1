"""Damaged files of a run: what is not whole is named and never used.

Damage is done to the files of a run as a disk, a kill or a person does it: cut off,
emptied, a byte flipped, deleted.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from er_jax.engine.digests import tree_digest
from tests import test_checkpoints
from tests.test_checkpoints import assert_same
from train.checkpoints import DIRECTORY, Checkpoints, load_policy
from train.metrics import MetricsFile
from train.report import write_report

STEPS = (0, 3, 4)


def files_of(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory with its contents."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def flip(path: Path, fraction: float = 0.5) -> None:
    """Change one bit, at this share of a file."""
    data = bytearray(path.read_bytes())
    data[int(fraction * len(data))] ^= 0x10
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
    for fraction in np.linspace(0, 0.999, 12):
        path.write_bytes(data)
        flip(path, float(fraction))
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
        wanted = tree_digest(contents(3)["policy"])
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
    found = [
        tree_digest({"x": x}) for x in (values, swapped, turned, -values, values * 2)
    ]
    assert len(set(found)) == 5
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    for spec in (("a", None), ("b", "a"), (("a", "b"), None)):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert tree_digest({"x": jax.device_put(values, sharding)}) == found[0]


def test_digests_of_wide_and_narrow_numbers(x64: None) -> None:
    wide = np.linspace(0, 1, 6)
    nudged = np.nextafter(wide, 9)
    whole = np.array([1, 2**40], np.int64)
    narrow = np.array([True, False, True])
    arrays = (wide, nudged, whole, whole + (1 << 35), narrow, ~narrow)
    assert len({tree_digest([x]) for x in arrays}) == len(arrays)
    for x in arrays:
        assert tree_digest([x]) == tree_digest([jax.numpy.asarray(x)])
    with jax.enable_x64(False):  # NumPy's numbers are never narrowed
        assert tree_digest([wide]) != tree_digest([nudged])
    nothing = np.zeros((0, 3), np.float32)
    assert tree_digest([nothing]) != tree_digest([nothing.T])


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
    write_report(tmp_path, records, 1.0, None, None)
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
