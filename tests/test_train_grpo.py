"""Whole runs: the tiny config end to end, killed and resumed, and compared."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from train import compare, tasks, update
from train.checkpoints import load_policy
from train.metrics import MetricsFile
from train.run import move_aside, run
from train.subjects import subject_of

ROOT = Path(__file__).parents[1]


def numbers(out, kinds=("eval", "step")):
    """The metrics of a run without what the clock decides."""
    records = MetricsFile(out / "metrics.jsonl").read()
    return [
        {name: value for name, value in record.items() if name != "timing"}
        for record in records
        if record["kind"] in kinds
    ]


@pytest.mark.slow
def test_tiny_run_and_its_files(tmp_path, capsys):
    out = tmp_path / "run"
    config = dataclasses.replace(tiny.CONFIG, out=out)
    records = run(config)

    assert [r["kind"] for r in records[-4:]] == ["eval", "step", "step", "eval"]
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps] == [1, 2]
    assert steps[0]["params_digest"] != steps[1]["params_digest"]
    for record in steps:
        assert record["logprob_gap"] < 1e-4
        assert record["position"] == 4 * record["step"]
        assert record["num_tokens"] == sum(record["timing"]["tokens_by_gamma"].values())
        assert record["kl"] >= 0
    assert steps[1]["kl"] > 0
    text = capsys.readouterr().out
    assert "held-out reward" in text and "2 GRPO steps" in text
    for name in ("config.json", "summary.txt", "metrics.png", "rollout.png"):
        assert (out / name).stat().st_size > 0
    problems = tasks.read_jsonl(out / "data" / "eval.jsonl", tasks.Tokenizer())
    assert len(problems) == config.task.num_eval

    # It goes on as the longer run would have, and leaves a finished one alone.
    run(dataclasses.replace(config, resume=True, steps=3))
    assert [r["step"] for r in numbers(out, kinds=("step",))] == [1, 2, 3]
    before = numbers(out)
    run(dataclasses.replace(config, resume=True, steps=3))
    assert numbers(out) == before
    with pytest.raises(ValueError, match=r"resume: .*other settings \(seed: 0 -> 1\)"):
        run(dataclasses.replace(config, resume=True, seed=1))

    # A new run in its place moves it aside.
    (tmp_path / "other" / "data").mkdir(parents=True)
    move_aside(tmp_path / "other")
    assert (tmp_path / "other.old1" / "data").is_dir()
    assert load_policy(out)[1].keys() == load_policy(out, step=0)[1].keys()


@pytest.mark.slow
def test_scored_while_the_rest_decodes_the_numbers_are_the_same(tmp_path):
    """And a run may begin without a stream and go on with one."""
    config = dataclasses.replace(tiny.CONFIG, reproducible=True, steps=2, save_every=1)
    streamed = dataclasses.replace(
        config, grpo=dataclasses.replace(config.grpo, stream=True)
    )
    run(dataclasses.replace(config, out=tmp_path / "whole"))
    run(dataclasses.replace(streamed, out=tmp_path / "streamed"))
    assert numbers(tmp_path / "streamed") == numbers(tmp_path / "whole")
    run(dataclasses.replace(config, out=tmp_path / "mixed", steps=1))
    run(dataclasses.replace(streamed, out=tmp_path / "mixed", resume=True))
    steps = [numbers(tmp_path / name, ("step",)) for name in ("mixed", "whole")]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_any_file_of_problems(tmp_path):
    data = tmp_path / "sums.jsonl"
    sums = [(a, b) for a in range(5) for b in (1, 2)]
    lines = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = dataclasses.replace(tiny.CONFIG, out=tmp_path / "run", data=data, steps=1)
    run(config)
    read = {
        name: tasks.read_jsonl(config.out / "data" / f"{name}.jsonl", tasks.Tokenizer())
        for name in ("warmup", "train", "eval")
    }
    assert (len(read["train"]), len(read["eval"])) == (9, 1)
    assert all(p.solution for p in read["warmup"])  # generated: the file has none
    assert read["eval"][0] not in read["train"]

    data.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match="has one prompt only"):
        subject_of(config)
    data.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    with pytest.raises(ValueError, match=r"contents of data have changed"):
        run(dataclasses.replace(config, resume=True))


def start(out, *args):
    """Start a run; those of one test compile their programs once between them."""
    command = [sys.executable, "-m", "train.grpo", "tiny", "--out", str(out)]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [*command, "--steps", "40", "--save-every", "4", *args],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ("--dtype", "float64", "--control", "best"),
        ("--dtype", "float32", "--control", "fixed:2", "--reproducible"),
    ],
)
def test_killed_and_resumed_is_as_if_never_killed(tmp_path, args):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, *args))

    process = start(killed, *args)
    while not any(r["step"] >= 10 for r in numbers(killed, kinds=("step",))):
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    cut = len(numbers(killed, kinds=("step",)))
    assert 10 <= cut < 40

    finish(start(killed, *args, "--resume"))
    assert len(numbers(whole, kinds=("step",))) == 40
    assert numbers(killed) == numbers(whole)
    policies = [jax.tree.leaves(load_policy_x64(out)) for out in (whole, killed)]
    for one, other in zip(*policies, strict=True):
        np.testing.assert_array_equal(one, other)


def load_policy_x64(out):
    with jax.enable_x64(True):
        return jax.tree.map(np.array, load_policy(out)[1])


@pytest.mark.slow
def test_speculation_changes_nothing_in_float64(x64, tmp_path, capsys):
    run = dataclasses.replace(tiny.CONFIG, out=tmp_path, dtype="float64", steps=3)
    assert compare.compare(compare.CompareConfig(run=run))
    assert "identical tokens, rewards and parameters" in capsys.readouterr().out


@pytest.mark.slow
def test_speculation_changes_nothing_but_ties_in_float32(tmp_path, capsys):
    run = dataclasses.replace(tiny.CONFIG, out=tmp_path, steps=3)
    assert compare.compare(compare.CompareConfig(run=run))
    assert "float32, ar against fixed:4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gap", "verdict"), [(9e-5, "a rounding tie"), (2e-4, "NOT A TIE")]
)
def test_where_rounding_ends(gap, verdict, capsys):
    ties = [compare.Tie(sequence=7, position=31, tokens=(4, 5), gap=gap)]
    compare.report_ties(3, ties, 1000)
    text = capsys.readouterr().out
    assert "step 3: 1 sequences differ" in text
    assert (
        f"sequence 7, position 31: drew 4 and 5, {gap:.1e} nats apart: {verdict}"
        in (text)
    )


@pytest.mark.slow
def test_a_near_tie_is_found_and_measured(tmp_path):
    # Rounding alone would take millions of tokens to part two float32 runs, so it is
    # exaggerated: every weight of the second run is nudged by about 3e-4 of itself.
    settings = dataclasses.replace(
        tiny.CONFIG.grpo, prompts_per_step=128, group_size=16, max_slots=256
    )
    run = dataclasses.replace(tiny.CONFIG, out=tmp_path, grpo=settings)
    plain, nudged = compare.same_start(compare.CompareConfig(run=run))
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x * (1 + 3e-4 * noise.standard_normal(x.shape)).astype(x.dtype),
        plain.state.params.policy,
    )
    policy_and_draft, _ = update.derive(nudged.policy, params, drafter=nudged.drafter)
    nudged.state = nudged.state.replace(params=policy_and_draft)
    first, second = plain.rollout_step(), nudged.rollout_step()
    rows = compare.differing_rows(first.out, second.out)
    assert 0 < len(rows) < 20  # of 2048
    gaps = [compare.find_tie(plain, first, second, row).gap for row in rows]
    # The first run drew what is best under its parameters, and the second's draw is
    # behind by no more than the nudge can have moved: of other draws it is about 1.
    assert 0 < min(gaps) and max(gaps) < 1e-2


@pytest.mark.slow
def test_a_difference_that_is_no_tie_is_found(x64, tmp_path, capsys):
    run = dataclasses.replace(tiny.CONFIG, out=tmp_path, dtype="float64", steps=1)
    config = compare.CompareConfig(run=run)
    plain, other = compare.same_start(config)
    other.state = other.state.replace(key=other.state.key + np.uint32(1))
    first, second = plain.rollout_step(), other.rollout_step()
    rows = compare.differing_rows(first.out, second.out)
    assert len(rows)
    ties = [compare.find_tie(plain, first, second, row) for row in rows]
    assert all(tie.gap > 0 for tie in ties)  # what was drawn is the best under its key
    assert not all(tie.is_rounding for tie in ties)
    compare.report_ties(1, ties, 0)
    assert "NOT A TIE" in capsys.readouterr().out
