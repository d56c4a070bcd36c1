"""What the command line says of mistakes: one line, an exit code, never a traceback.

0 is done, 1 refused or failed, 2 a usage error. What is refused is refused before
anything is compiled or written.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from er_jax.costs.passes import PassCosts, Reading
from er_jax.costs.record import save_record
from er_jax.costs.table import LatencyTable
from er_jax.tools import cli
from er_jax.tools.presets import PRESETS
from tests.conftest import CompileCount
from tests.test_pass_costs import ROOFLINE, passes
from tests.test_sweep import rows_of, write
from tests.test_text import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")

SIZES = er_jax.DecoderConfig(
    vocab_size=64, dim=16, num_layers=1, num_heads=1, num_kv_heads=1, hidden_dim=16
)
FLAGS = " ".join(
    f"--decoder.{field.name.replace('_', '-')} {getattr(SIZES, field.name)}"
    for field in dataclasses.fields(SIZES)
    if field.default is dataclasses.MISSING
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files, good ones and others."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "folder").mkdir()
    for name in ("empty.csv", "empty.json", "empty.jsonl"):
        (folder / name).touch()
    for name in ("binary.csv", "binary.json", "binary.jsonl"):
        (folder / name).write_bytes(b"\x00\xff\xfe\x89PNG\r\n" * 9)

    def sweep(name: str, **changes: object) -> None:
        rows = rows_of()
        rows[1].update(changes)
        write(folder / name, rows)

    sweep("sweep.csv")
    sweep("word.csv", median_ms="fast")
    sweep("nan.csv", median_ms="nan")
    sweep("zero.csv", median_ms=0)
    sweep("negative.csv", batch=-4)
    sweep("half.csv", seq=2.5)
    sweep("shape.csv", mode="target_verify", gamma=0)
    sweep("huge.csv", seq=10**30)
    rows = rows_of()
    write(folder / "columns.csv", [{"model": "m", "batch": 1}])
    write(folder / "targets.csv", [row for row in rows if row["gamma"] == 0])
    write(
        folder / "cell.csv", [r for r in rows if (r["batch"], r["seq"]) == (1, 256)]
    )  # one cell: nothing to judge it by
    lines = (folder / "sweep.csv").read_text().splitlines()
    (folder / "cut.csv").write_text("\n".join([*lines[:9], lines[9][:20]]))
    (folder / "header.csv").write_text(lines[0] + "\n")

    LatencyTable(passes=passes()).save(folder / "costs.json", {})
    longest = max(r.length for r in passes().readings)
    one_length = [r for r in passes().readings if r.length == longest]
    LatencyTable(passes=PassCosts(one_length)).save(folder / "length.json", {})
    targets = [r for r in passes().readings if r.kind == "target"]
    LatencyTable(passes=PassCosts(targets)).save(folder / "targets.json", {})
    ROOFLINE.save(folder / "roofline.json", {})
    (folder / "list.json").write_text("[1, 2]")
    (folder / "object.json").write_text('{"length": 3}')

    def table(name: str, values: object) -> None:
        save_record(folder / name, "latency table", {}, values)

    reading = list(Reading("target", 1, 512, 0, 1e-3))
    table("nothing.json", {})
    table("none.json", {"passes": [], "programs": []})
    table("short.json", {"passes": [reading[:2]], "programs": []})
    for name, at, value in [
        ("rows.json", 1, 0),
        ("length0.json", 2, -512),
        ("seconds.json", 4, float("nan")),
        ("free.json", 4, 0),
        ("text.json", 4, "soon"),
        ("kind.json", 0, "warp"),
    ]:
        wrong = [*reading[:at], value, *reading[at + 1 :]]
        table(name, {"passes": [reading, wrong], "programs": []})

    for name, line in [
        ("good", '{"length": 3}'),
        ("other", '{"tokens": 3}'),
        ("minus", '{"length": -3}'),
        ("float", '{"length": 3.5}'),
        ("notanumber", '{"length": NaN}'),
        ("immense", '{"length": 1e30}'),
        ("digits", f'{{"length": {10**30}}}'),
        ("long", f'{{"length": {2**40}}}'),
        ("prompt", '{"length": 3, "prompt_length": -1}'),
        ("words", "three"),
        ("array", "[3]"),
    ]:
        (folder / f"{name}.jsonl").write_text(f'{{"length": 4}}\n{line}\n')

    policy = er_jax.Decoder(SIZES)
    whole = folder / "checkpoint"
    er_jax.save_hf(whole, policy, policy.init(jax.random.key(0)))
    make_tokenizer(whole)
    (folder / "untold").mkdir()
    (folder / "untold" / "config.json").write_bytes(
        (whole / "config.json").read_bytes()
    )
    for name, text in [("emptied", ""), ("listed", "[]"), ("torn", '{"model_type": ')]:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    (folder / "bytes").mkdir()
    (folder / "bytes" / "config.json").write_bytes(b"\xff\xfe\x00\x89")
    return folder


@dataclasses.dataclass
class Said:
    """What a command said: exit code, standard output, standard error."""

    code: int
    out: str
    error: str


@pytest.fixture
def er(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Said]:
    monkeypatch.chdir(files)
    monkeypatch.setenv("COLUMNS", "200")  # of the boxes around usage errors

    def run(command: str) -> Said:
        capsys.readouterr()
        code, message = 0, ""
        try:
            cli.main(shlex.split(command))
        except SystemExit as end:
            # As the interpreter does: a text is printed, and the exit code 1.
            if isinstance(end.code, str):
                code, message = 1, end.code
            else:
                code = end.code or 0
        out, error = capsys.readouterr()
        boxless = " ".join(re.sub(r"[│╭╮╰╯─]", " ", error).split())
        return Said(code, out, message or boxless)

    return run


DRAWN = "--num 4 --cap 32 --seeds 1"
ON_CPU = "plan --model qwen3-0.6b --device cpu"
ASK = "rollout --model checkpoint --prompt 1+1"

# Command, exit code, and what the message has to name.
MISTAKES: list[tuple[str, int, str]] = [
    # Which command.
    ("", 2, "calibrate, sweep, replay, plan, rollout"),
    ("calibrat", 2, "calibrate, sweep, replay, plan, rollout"),
    ("--slots 3", 2, "--slots"),
    # Options that are missing, unknown, or of another type.
    ("calibrate", 2, "--decoder.dim"),
    ("replay", 2, "PATH"),
    ("plan", 2, "--model"),
    (f"{ON_CPU} --slot 3", 2, "--slot"),
    ("plan --model qwen3-0.6b", 2, "--device"),
    ("rollout --prompt 1", 2, "--model"),
    ("rollout --model checkpoint", 2, "--prompt"),
    ("replay sweep.csv other.csv", 2, "other.csv"),
    (f"calibrate {FLAGS} --slots many", 2, "--slots"),
    (f"calibrate {FLAGS} --slots 2.5", 2, "--slots"),
    (f"calibrate {FLAGS} --gammas 0 2.5", 2, "--gammas"),
    (f"calibrate {FLAGS} --accept maybe", 2, "--accept"),
    (f"calibrate {FLAGS} --keep often", 2, "--keep"),
    (f"calibrate {FLAGS} --budget soon", 2, "--budget"),
    (f"calibrate {FLAGS} --decoder.dim wide", 2, "--decoder.dim"),
    (f"calibrate {FLAGS} --decoder.dim 0", 2, "dim=0 must be at least 1"),
    (f"calibrate {FLAGS} --decoder.dim 15", 2, "head_dim=15 must be even"),
    (f"calibrate {FLAGS} --decoder.num-kv-heads 3", 2, "num_kv_heads=3 must divide"),
    (f"calibrate {FLAGS} --decoder.dtype int3", 2, "dtype='int3' is not supported"),
    (f"calibrate {FLAGS} --drafter.bits 3", 2, "bits=3 is not supported"),
    (f"calibrate {FLAGS} --drafter.group-size 0", 2, "group_size=0 must be"),
    (f"{ON_CPU} --dtype foo", 2, "--dtype"),
    (f"{ON_CPU} --drafter.act-bits 4", 2, "act_bits=4 is not supported"),
    (f"{ON_CPU} --model-parallel two", 2, "--model-parallel"),
    (f"replay sweep.csv {DRAWN} --seeds few", 2, "--seeds"),
    (f"{ASK} --num three", 2, "--num"),
    (f"{ASK} --temperature hot", 2, "--temperature"),
    (f"{ASK} --dtype int8", 2, "--dtype"),
    # calibrate
    (f"calibrate {FLAGS} --slots 0", 1, "slots=0"),
    (f"calibrate {FLAGS} --slots -4", 1, "slots=-4"),
    (f"calibrate {FLAGS} --slots {10**12}", 1, f"slots={10**12}"),
    (f"calibrate {FLAGS} --slots {2**30} --max-length {2**20}", 1, "slots=1073741824"),
    (f"calibrate {FLAGS} --max-length 63", 1, "max_length=63"),
    (f"calibrate {FLAGS} --max-length {10**30}", 1, f"max_length={10**30}"),
    (f"calibrate {FLAGS} --gammas", 1, "gammas is empty"),
    (f"calibrate {FLAGS} --gammas 0", 1, "gammas=(0,)"),
    (f"calibrate {FLAGS} --gammas -1 4", 1, "gammas=(-1, 4)"),
    (f"calibrate {FLAGS} --gammas 0 {10**9}", 1, f"gammas=(0, {10**9})"),
    (f"calibrate {FLAGS} --keep 5", 1, "keep=5"),
    (f"calibrate {FLAGS} --keep -0.1", 1, "keep=-0.1"),
    (f"calibrate {FLAGS} --keep nan", 1, "keep=nan"),
    (f"calibrate {FLAGS} --budget -1", 1, "budget=-1"),
    (f"calibrate {FLAGS} --budget nan", 1, "budget=nan"),
    (f"calibrate {FLAGS} --budget inf", 1, "budget=inf"),
    (f"calibrate {FLAGS} --out folder", 1, "out=folder is a directory"),
    (f"calibrate {FLAGS} --out sweep.csv/costs.json", 1, "out=sweep.csv/costs.json"),
    (f"calibrate {FLAGS} --plot folder", 1, "plot=folder is a directory"),
    (f"calibrate {FLAGS} --plot picture.foo", 1, "plot=picture.foo"),
    (f"calibrate {FLAGS} --drafter.group-size 7", 1, "group_size=7 does not divide"),
    (f"calibrate {FLAGS} --decoder.dim {2**30}", 1, "decoder"),
    (f"calibrate {FLAGS} --decoder.vocab-size {10**12}", 1, "decoder"),
    (f"calibrate {FLAGS} --decoder.dtype float64", 1, "float64"),
    # sweep
    ("sweep", 1, "files is empty"),
    ("sweep missing.csv", 1, "missing.csv"),
    ("sweep sweep.csv missing.csv", 1, "missing.csv"),
    ("sweep folder", 1, "folder"),
    ("sweep empty.csv", 1, "empty.csv has no column"),
    ("sweep header.csv", 1, "header.csv holds no target pass"),
    ("sweep binary.csv", 1, "binary.csv"),
    ("sweep costs.json", 1, "costs.json has no column"),
    ("sweep columns.csv", 1, "columns.csv has no column"),
    ("sweep targets.csv", 1, "targets.csv holds no draft pass"),
    ("sweep cell.csv", 1, "cell.csv has 1 cells"),
    ("sweep cut.csv", 1, "cut.csv, line 10"),
    ("sweep word.csv", 1, "word.csv, line 3: median_ms='fast'"),
    ("sweep nan.csv", 1, "nan.csv, line 3: median_ms='nan'"),
    ("sweep zero.csv", 1, "zero.csv, line 3: median_ms='0'"),
    ("sweep negative.csv", 1, "negative.csv, line 3: batch='-4'"),
    ("sweep half.csv", 1, "half.csv, line 3: seq='2.5'"),
    ("sweep shape.csv", 1, "shape.csv, line 3: gamma='0'"),
    ("sweep huge.csv", 1, f"huge.csv, line 3: seq='{10**30}'"),
    # replay: costs
    ("replay missing.csv", 1, "missing.csv"),
    ("replay missing.json", 1, "missing.json"),
    ("replay folder", 1, "folder"),
    ("replay empty.csv", 1, "empty.csv has no column"),
    ("replay empty.json", 1, "empty.json holds no costs"),
    ("replay binary.csv", 1, "binary.csv"),
    ("replay binary.json", 1, "binary.json holds no costs"),
    ("replay list.json", 1, "list.json holds no costs"),
    ("replay object.json", 1, "object.json holds no costs"),
    ("replay roofline.json", 1, "roofline.json holds roofline"),
    ("replay nan.csv", 1, "nan.csv, line 3: median_ms='nan'"),
    ("replay nothing.json", 1, "nothing.json"),
    ("replay none.json", 1, "none.json"),
    ("replay short.json", 1, "short.json"),
    ("replay rows.json", 1, "rows.json"),
    ("replay length0.json", 1, "length0.json"),
    ("replay seconds.json", 1, "seconds.json"),
    ("replay free.json", 1, "free.json"),
    ("replay text.json", 1, "text.json"),
    ("replay kind.json", 1, "kind.json"),
    ("replay targets.json", 1, "targets.json"),
    # replay: lengths
    ("replay sweep.csv --trace tial", 1, "trace=tial"),
    ("replay sweep.csv --trace missing.jsonl", 1, "trace=missing.jsonl"),
    ("replay sweep.csv --trace folder", 1, "folder"),
    ("replay sweep.csv --trace empty.jsonl", 1, "empty.jsonl"),
    ("replay sweep.csv --trace binary.jsonl", 1, "binary.jsonl"),
    ("replay sweep.csv --trace sweep.csv", 1, "sweep.csv, line 1"),
    ("replay sweep.csv --trace other.jsonl", 1, "other.jsonl, line 2"),
    ("replay sweep.csv --trace minus.jsonl", 1, "minus.jsonl, line 2"),
    ("replay sweep.csv --trace float.jsonl", 1, "float.jsonl, line 2"),
    ("replay sweep.csv --trace notanumber.jsonl", 1, "notanumber.jsonl, line 2"),
    ("replay sweep.csv --trace immense.jsonl", 1, "immense.jsonl, line 2"),
    ("replay sweep.csv --trace digits.jsonl", 1, "digits.jsonl, line 2"),
    ("replay sweep.csv --trace long.jsonl", 1, "long.jsonl, line 2"),
    ("replay sweep.csv --trace prompt.jsonl", 1, "prompt.jsonl, line 2"),
    ("replay sweep.csv --trace words.jsonl", 1, "words.jsonl, line 2"),
    ("replay sweep.csv --trace array.jsonl", 1, "array.jsonl, line 2"),
    # replay: numbers
    ("replay sweep.csv --num 0", 1, "num=0"),
    ("replay sweep.csv --num -1", 1, "num=-1"),
    (f"replay sweep.csv --num {10**15}", 1, f"num={10**15}"),
    ("replay sweep.csv --cap 0", 1, "cap=0"),
    (f"replay sweep.csv --cap {10**30}", 1, f"cap={10**30}"),
    (f"replay sweep.csv --trace capped --cap {2**31 - 1}", 1, "tokens"),
    (f"replay sweep.csv {DRAWN} --slots 0", 1, "slots=0"),
    (f"replay sweep.csv {DRAWN} --slots -2", 1, "slots=-2"),
    (f"replay sweep.csv {DRAWN} --keep 5", 1, "keep=5"),
    (f"replay sweep.csv {DRAWN} --keep -1", 1, "keep=-1"),
    (f"replay sweep.csv {DRAWN} --keep nan", 1, "keep=nan"),
    (f"replay sweep.csv {DRAWN} --seeds 0", 1, "seeds=0"),
    (f"replay sweep.csv --seeds {10**20}", 1, f"seeds={10**20}"),
    (f"replay sweep.csv {DRAWN} --gammas", 1, "gammas is empty"),
    (f"replay sweep.csv {DRAWN} --gammas -1", 1, "gammas=(-1,)"),
    (f"replay sweep.csv {DRAWN} --gammas 2 4", 1, "gammas=(2, 4) must contain 0"),
    (f"replay sweep.csv {DRAWN} --gammas 0 {10**12}", 1, f"gammas=(0, {10**12})"),
    (f"replay sweep.csv {DRAWN} --controls bset", 1, "control='bset'"),
    (f"replay sweep.csv {DRAWN} --controls fixed:-1", 1, "control='fixed:-1'"),
    (f"replay sweep.csv {DRAWN} --controls fixed:", 1, "control='fixed:'"),
    (f"replay sweep.csv {DRAWN} --controls fixed:{10**9}", 1, f"fixed:{10**9}"),
    (f"replay sweep.csv {DRAWN} --controls oracle --gammas -1 0", 1, "gammas=(-1, 0)"),
    (f"replay sweep.csv {DRAWN} --plot folder", 1, "plot=folder is a directory"),
    (f"replay sweep.csv {DRAWN} --plot picture.foo", 1, "plot=picture.foo"),
    (f"replay sweep.csv {DRAWN} --plot sweep.csv/a.png", 1, "plot=sweep.csv/a.png"),
    # plan
    ("plan --model missing --device cpu", 1, "model=missing is neither"),
    ("plan --model qwen3-0.6 --device cpu", 1, "model=qwen3-0.6 "),
    ("plan --model sweep.csv --device cpu", 1, "sweep.csv"),
    ("plan --model folder --device cpu", 1, "folder/config.json"),
    ("plan --model emptied --device cpu", 1, "config.json"),
    ("plan --model listed --device cpu", 1, "config.json"),
    ("plan --model torn --device cpu", 1, "config.json"),
    ("plan --model bytes --device cpu", 1, "config.json"),
    ("plan --model qwen3-0.6b --device gpu", 1, "device='gpu' is not known"),
    ("plan --model qwen3-0.6b --device ''", 1, "device='' is not known"),
    ("plan --model qwen3-0.6b --device v5e:", 1, "device='v5e:'"),
    ("plan --model qwen3-0.6b --device h100:-1", 1, "device='h100:-1'"),
    (f"{ON_CPU} --slots 0", 1, "slots=0"),
    (f"{ON_CPU} --slots -1", 1, "slots=-1"),
    (f"{ON_CPU} --slots {10**15}", 1, f"slots={10**15}"),
    (f"{ON_CPU} --max-length 0", 1, "max_length=0"),
    (f"{ON_CPU} --max-length {10**12}", 1, f"max_length={10**12}"),
    (f"{ON_CPU} --gammas", 1, "gammas is empty"),
    (f"{ON_CPU} --gammas -1", 1, "gammas=(-1,)"),
    (f"{ON_CPU} --gammas 0 {10**9}", 1, f"gammas=(0, {10**9})"),
    (f"{ON_CPU} --gammas 64 --max-length 64", 1, "gammas=(64,)"),
    (f"{ON_CPU} --keep 5", 1, "keep=5"),
    (f"{ON_CPU} --keep -1", 1, "keep=-1"),
    (f"{ON_CPU} --keep nan", 1, "keep=nan"),
    (f"{ON_CPU} --model-parallel 0", 1, "model_parallel=0"),
    (f"{ON_CPU} --model-parallel -1", 1, "model_parallel=-1"),
    (f"{ON_CPU} --model-parallel 3", 1, "model_parallel=3"),
    (f"{ON_CPU} --drafter.group-size 7", 1, "group_size=7 does not divide"),
    (f"{ON_CPU} --dtype float64", 1, "float64"),
    # rollout
    ("rollout --model missing --prompt 1", 1, "missing"),
    ("rollout --model folder --prompt 1", 1, "folder has no tokenizer"),
    ("rollout --model sweep.csv --prompt 1", 1, "sweep.csv"),
    ("rollout --model untold --prompt 1", 1, "untold has no tokenizer"),
    ("rollout --model checkpoint --prompt", 1, "prompt is empty"),
    (f"{ASK} --num 0", 1, "num=0"),
    (f"{ASK} --num {10**12}", 1, f"num={10**12}"),
    (f"{ASK} --num {2**31 - 1}", 1, f"num={2**31 - 1}"),
    (f"{ASK} --max-new-tokens 0", 1, "max_new_tokens=0"),
    (f"{ASK} --max-new-tokens {10**12}", 1, f"max_new_tokens={10**12}"),
    (f"{ASK} --temperature -1", 1, "temperature=-1"),
    (f"{ASK} --temperature nan", 1, "temperature=nan"),
    (f"{ASK} --temperature inf", 1, "temperature=inf"),
    (f"{ASK} --top-p 0", 1, "top_p=0"),
    (f"{ASK} --top-p 2", 1, "top_p=2"),
    (f"{ASK} --top-p nan", 1, "top_p=nan"),
    (f"{ASK} --control bset", 1, "control='bset'"),
    (f"{ASK} --control fixed:-1", 1, "control='fixed:-1'"),
    (f"{ASK} --control ''", 1, "control=''"),
    (f"{ASK} --seed -1", 1, "seed=-1"),
    (f"{ASK} --seed {10**30}", 1, f"seed={10**30}"),
    (f"{ASK} --dtype float64", 1, "float64"),
    (f"{ASK} --out folder", 1, "out=folder is a directory"),
    (f"{ASK} --out sweep.csv/out.jsonl", 1, "out=sweep.csv/out.jsonl"),
    (f"{ASK} --profile sweep.csv", 1, "profile=sweep.csv"),
]


@pytest.mark.parametrize(("command", "code", "named"), MISTAKES)
def test_a_mistake_is_one_line_and_an_exit_code(
    er: Callable[[str], Said],
    files: Path,
    compile_counter: Callable[[], AbstractContextManager[CompileCount]],
    command: str,
    code: int,
    named: str,
) -> None:
    there = sorted(files.rglob("*"))
    with compile_counter() as compiled:
        said = er(command)
    assert said.code == code, said
    assert named in said.error
    assert "Traceback" not in said.error
    if code == 1:
        assert re.fullmatch(r"er-jax: .+", said.error)
        assert len(said.error) < 600
    assert not said.out
    assert compiled.count == 0, compiled
    assert sorted(files.rglob("*")) == there


def test_as_a_process(files: Path) -> None:
    """The same of a whole process, as a shell sees it."""
    command = [sys.executable, "-m", "er_jax.tools.cli", "sweep", "missing.csv"]
    done = subprocess.run(command, cwd=files, capture_output=True, text=True)
    line = "er-jax: missing.csv: No such file or directory; give another path\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


@pytest.mark.parametrize(
    "name", ["", "calibrate", "sweep", "replay", "plan", "rollout"]
)
def test_help(er: Callable[[str], Said], name: str) -> None:
    said = er(f"{name} --help")
    assert said.code == 0
    assert said.out.startswith(f"usage: er-jax {name}".rstrip())
    assert not said.error


@pytest.mark.parametrize(
    "kind",
    [cli.Calibrate, cli.Sweep, cli.Replay, cli.Plan, cli.Sample, er_jax.DecoderConfig,
     er_jax.DrafterConfig, er_jax.RopeScaling],
)  # fmt: skip
def test_every_option_has_its_own_help(kind: type) -> None:
    """Of two arguments on one line of a docstring, --help says both of the first."""
    names = [field.name for field in dataclasses.fields(kind)]
    said = re.findall(r"^ {6}(\w+):", kind.__doc__ or "", re.M)
    assert [name for name in names if name not in said] == []
    crowded = re.findall(rf"\. ({'|'.join(names)}): ", kind.__doc__ or "")
    assert crowded == []


@pytest.mark.parametrize(
    "failure",
    [
        TypeError("a bug"),
        KeyError("a bug"),
        ZeroDivisionError("a bug"),
        AssertionError("a bug"),
        RuntimeError("a bug"),
        ModuleNotFoundError("No module named 'er_jax.typo'", name="er_jax.typo"),
    ],
)
def test_a_programming_error_keeps_its_traceback(
    er: Callable[[str], Said], monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def broken(self: cli.Sweep) -> None:
        raise failure

    monkeypatch.setattr(cli.Sweep, "run", broken)
    with pytest.raises(type(failure)):
        er("sweep sweep.csv")


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (
            ImportError("drawing needs matplotlib; install it with\npip install x"),
            "er-jax: drawing needs matplotlib; install it with pip install x",
        ),
        (ValueError("a\n  b"), "er-jax: a b"),
        (
            FileNotFoundError(2, "No such file or directory", "here"),
            "er-jax: here: No such file or directory; give another path",
        ),
        (OSError(28, "No space left on device", "here"), "No space left on device"),
        (OSError("nobody knows"), "er-jax: nobody knows"),
        (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate 9 GiB"),
        (MemoryError(), "er-jax: out of memory"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    er: Callable[[str], Said],
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    line: str,
) -> None:
    def failing(self: cli.Sweep) -> None:
        raise failure

    monkeypatch.setattr(cli.Sweep, "run", failing)
    said = er("sweep sweep.csv")
    assert said.code == 1
    assert line in said.error and "\n" not in said.error


# -- what must go on working -----------------------------------------------------------


@pytest.mark.parametrize("trace", ["good.jsonl", "tail"])
@pytest.mark.parametrize("costs", ["length.json", "costs.json", "sweep.csv"])
def test_a_replay_works(er: Callable[[str], Said], costs: str, trace: str) -> None:
    """Also of prompts without a length, on costs of a single cache length."""
    said = er(f"replay {costs} {DRAWN} --trace {trace} --slots 1")
    assert said.code == 0 and not said.error
    assert "\noracle " in said.out
    assert not re.search(r"\b(nan|inf)\b", said.out)


def test_a_misspelt_preset_is_told_the_right_ones(er: Callable[[str], Said]) -> None:
    said = er("plan --model qwen3-0.6 --device cpu")
    assert all(name in said.error for name in PRESETS)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, er_jax.RolloutError])
def test_what_had_finished_is_told_when_a_rollout_ends_early(
    failure: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Tokenizer:
        stop_token_ids = ()

        def encode_prompt(self, text: str) -> list[int]:
            return [1]

        def decode(self, ids: Any) -> str:
            return " ".join(map(str, ids))

    done = {
        1: er_jax.Completion(np.array([4, 5]), np.array([-1.0, -2.0]), "stop"),
    }

    def rollout(*_: Any, **__: Any) -> Any:
        if failure is KeyboardInterrupt:
            error: Any = KeyboardInterrupt()
            error.completions = done
            raise error
        raise er_jax.RolloutError("disk full", done)

    monkeypatch.setattr(cli, "load_tokenizer", lambda _: Tokenizer())
    monkeypatch.setattr(cli.hf_weights, "load_hf", lambda *_, **__: (None, None))
    monkeypatch.setattr(cli, "rollout", rollout)
    out = tmp_path / "out.jsonl"
    with pytest.raises(failure):
        cli.main(
            ["rollout", "--model", str(tmp_path), "--prompt", "one", "two", "--out",
             str(out)]
        )  # fmt: skip
    assert "> two\n4 5\n" in capsys.readouterr().out
    (line,) = map(json.loads, out.read_text().splitlines())
    assert (line["prompt"], line["completion"]) == ("two", "4 5")
