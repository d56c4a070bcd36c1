"""Plants a mistake in a module as it is imported, and runs the tests that must fail.

A mistake is found by parsing: by the definition that it is in, wherever in its package
that lies, and by an expression or statements of it. So neither the place of a module
nor layout or comments matter.

No file is changed. One process imports what is slow to import and is not ours, touches
no device, and forks a child for every run; the child's imports compile the changed
syntax tree instead of the module's text. Processes that a test starts do the same: they
find `sitecustomize.py`, written for the run, on their path.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import pickle
import re
import signal
import sys
import tempfile
import textwrap
import time
import traceback
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300  # of one run of the named tests; a planted endless loop is not caught
WORKERS = 2
CRASHED = 70  # the exit status of a child that does not reach pytest's

# Imported once, before the first fork. None of it may start a thread or a device.
PRELOADED = (
    "aqt.jax.v2.aqt_quantizer", "aqt.jax.v2.aqt_tensor", "chex", "flax.linen",
    "flax.nnx", "hypothesis.stateful", "jax", "jax.experimental.mesh_utils",
    "jax.experimental.pallas.tpu", "jax.experimental.topologies", "matplotlib.pyplot",
    "optax", "orbax.checkpoint", "pytest", "safetensors.numpy", "scipy.stats", "torch",
    "tqdm", "transformers", "tyro",
)  # fmt: skip

STARTUP = """\
import pathlib, pickle
from tests import planting
folder = pathlib.Path(__file__).parent
planting.plant_in_imports(pickle.loads((folder / "planted").read_bytes()))
"""


@dataclasses.dataclass(frozen=True)
class PlantedBug:
    """A mistake as a change of what a definition says.

    name: what is wrong, in a few words.
    where: `package::name` of a function, a class, `Class.method` or the target of an
      assignment outside functions. Where several definitions have that name, words of
      the module's path are added: `package/word::name`.
    old: an expression or statements that occur in the definition exactly once, compared
      as syntax trees. new: instead; of statements it may be nothing.
    tests: pytest node ids, at least one of which has to fail.
    """

    name: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]


# -- finding ---------------------------------------------------------------------------


class NotFoundError(ValueError):
    """An entry names what is not there exactly once."""


@functools.cache
def _modules(folder: Path) -> dict[Path, ast.Module]:
    paths = sorted(folder.rglob("*.py"))
    return {path: ast.parse(path.read_text("utf-8"), path) for path in paths}


def _definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Yield the qualified name and the node of all that a module defines."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            yield name, node
            yield from _definitions(node, f"{name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            if not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
                targets = (
                    node.targets if isinstance(node, ast.Assign) else [node.target]
                )
                for target in targets:
                    if isinstance(target, ast.Name):
                        yield f"{prefix}{target.id}", node
        elif isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _definitions(node, prefix)


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def find_definition(bug: PlantedBug) -> tuple[Path, ast.stmt]:
    """Return the file and the node of the one definition that a bug names."""
    where, _, wanted = bug.where.partition("::")
    package, *words = where.split("/")
    known = [
        (path, name, node)
        for path, tree in _modules(ROOT / package).items()
        for name, node in _definitions(tree)
    ]
    found = [
        (path, node)
        for path, name, node in known
        if name == wanted
        and {*words} <= {*path.relative_to(ROOT).with_suffix("").parts}
    ]
    if len(found) == 1:
        return found[0]
    if found:
        at = ", ".join(f"{_shown(path)}:{node.lineno}" for path, node in found)
        raise NotFoundError(
            f"{bug.name}: {bug.where} is defined {len(found)} times: {at}; add a word "
            f"of the module's path, as in {package}/{found[0][0].stem}::{wanted}"
        )
    last = wanted.split(".")[-1]
    others = [(path, n) for path, n, _ in known if n.split(".")[-1] == last]
    if not others:
        close = difflib.get_close_matches(wanted, {name for _, name, _ in known})
        others = [(path, n) for path, n, _ in known if n in close]
    hint = ", ".join(sorted({f"{n} in {_shown(path)}" for path, n in others}))
    raise NotFoundError(
        f"{bug.name}: {bug.where} is defined nowhere; bring the entry up to date. "
        f"There is {hint or 'nothing with a name like it'}"
    )


Nodes = list[ast.expr] | list[ast.stmt]


def _parsed(bug: PlantedBug) -> tuple[Nodes, Nodes]:
    """Return what to replace and what to put there: one expression or statements."""
    texts = [textwrap.dedent(text).strip() for text in (bug.old, bug.new)]
    try:
        old, new = (ast.parse(text, mode="eval").body for text in texts)
        return [old], [new]
    except SyntaxError:  # then both are statements
        pass
    try:
        before, after = (ast.parse(text).body for text in texts)
    except SyntaxError as error:
        raise NotFoundError(
            f"{bug.name}: old and new must both be one expression, or both be whole "
            f"statements: {error}"
        ) from error
    return before, after


@dataclasses.dataclass(frozen=True)
class _Site:
    """Where nodes stand: `count` from `index` on in a list of `parent`, or a field."""

    parent: ast.AST
    field: str
    index: int | None
    nodes: Nodes

    def replace(self, new: Nodes) -> None:
        if self.index is None:
            setattr(self.parent, self.field, new[0])
            return
        held = getattr(self.parent, self.field)
        held[self.index : self.index + len(self.nodes)] = new
        if not held and isinstance(self.nodes[0], ast.stmt):
            held.append(ast.copy_location(ast.Pass(), self.nodes[0]))


def _sites(root: ast.AST, old: Nodes) -> list[_Site]:
    """Return all places below `root` with the same syntax as `old`."""
    kinds, dumps = [type(node) for node in old], [ast.dump(node) for node in old]

    def is_same(nodes: Sequence[object]) -> bool:
        if [type(node) for node in nodes] != kinds:
            return False
        return [ast.dump(node) for node in nodes if isinstance(node, ast.AST)] == dumps

    found = []
    for parent in ast.walk(root):
        for field, value in ast.iter_fields(parent):
            if isinstance(value, list):
                for i in range(len(value) - len(old) + 1):
                    if is_same(value[i : i + len(old)]):
                        site = _Site(parent, field, i, value[i : i + len(old)])
                        found.append(site)
            elif is_same([value]):
                found.append(_Site(parent, field, None, [value]))
    return found


@dataclasses.dataclass(frozen=True)
class Planted:
    """A file of the project, and what it says with a bug."""

    path: Path
    tree: ast.Module


def planted(bug: PlantedBug) -> Planted:
    """Return the file that a bug changes, with the bug."""
    old, new = _parsed(bug)
    path, definition = find_definition(bug)
    tree = ast.parse(path.read_text("utf-8"), path)
    at = (definition.lineno, definition.col_offset)
    here = next(n for _, n in _definitions(tree) if (n.lineno, n.col_offset) == at)
    sites = _sites(here, old)
    if len(sites) != 1:
        raise NotFoundError(
            f"{bug.name}: this occurs {len(sites)} times in {bug.where} "
            f"({_shown(path)}:{here.lineno}), not once:\n{bug.old}\n"
            f"{_advice(bug, old, sites)}"
        )
    for node in new:
        for part in ast.walk(node):
            ast.copy_location(part, sites[0].nodes[0])
    sites[0].replace(new)
    return Planted(path, tree)


def _advice(bug: PlantedBug, old: Nodes, sites: Sequence[_Site]) -> str:
    """Say what would make an entry right."""
    if sites:
        lines = ", ".join(str(site.nodes[0].lineno) for site in sites)
        return f"It is on lines {lines}: name more of what surrounds it"
    package = re.split("::|/", bug.where)[0]
    others = [
        f"{name} in {_shown(path)}"
        for path, tree in _modules(ROOT / package).items()
        for name, node in _definitions(tree)
        if not isinstance(node, ast.ClassDef) and _sites(node, old)
    ]
    if others:
        return f"It occurs in {', '.join(others)}"
    return "It occurs nowhere in the package: bring the entry up to date"


# -- planting --------------------------------------------------------------------------


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from a syntax tree."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self.tree = tree

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self.tree, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one file with another content; all else is left to the finders behind."""

    def __init__(self, planted: Planted) -> None:
        self.path, self.tree = str(planted.path), planted.tree

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin != self.path:
            return None
        spec.loader = _Loader(fullname, self.path, self.tree)
        return spec


def plant_in_imports(changed: Planted) -> None:
    """Let this process import a file as it was changed, from now on."""
    sys.meta_path.insert(0, _Finder(changed))


# -- running ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run of tests ended.

    status: pytest's exit status; negative, the signal that ended it.
    failed_assertion: the first test that failed on an assertion, and not on another
      error.
    output: what was printed. seconds: how long it took. cpu_s: of which on a core.
    """

    status: int
    failed_assertion: str | None
    output: str
    seconds: float
    cpu_s: float


class _Watch:
    """A pytest plugin that notes the first test to fail on an assertion."""

    def __init__(self) -> None:
        self.failed_assertion: str | None = None

    def pytest_exception_interact(
        self, call: pytest.CallInfo[object], report: pytest.TestReport
    ) -> None:
        is_assertion = call.excinfo and call.excinfo.errisinstance(AssertionError)
        if is_assertion and call.when == "call" and self.failed_assertion is None:
            self.failed_assertion = report.nodeid


def _run_in_child(changed: Planted | None, tests: Sequence[str], folder: Path) -> int:
    """Run the tests with a bug or without one in this process, which ends with it.

    Returns pytest's exit status and leaves the failed assertion in the folder.
    """
    output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(TIMEOUT_S)
    os.chdir(ROOT)
    path = [str(ROOT)]  # before any installed er_jax
    sys.path.insert(0, path[0])
    if changed:
        plant_in_imports(changed)
        (folder / "sitecustomize.py").write_text(STARTUP, "utf-8")
        (folder / "planted").write_bytes(pickle.dumps(changed))
        path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    import pytest

    watch = _Watch()
    options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="]
    status = pytest.main([*options, *tests], [watch])
    (folder / "assertion").write_text(json.dumps(watch.failed_assertion), "utf-8")
    return int(status)


def _preload(programs: str) -> None:
    """Import what runs share; `programs` is where they share what XLA compiles."""
    # A bug changes few programs, and those are other ones.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", programs)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ.setdefault("XLA_FLAGS", "")  # or every child would look for quick ones
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # or NumPy starts threads
    os.environ.pop("PYTEST_ADDOPTS", None)
    # Plugins that are installed by chance are not needed, and some imported by now.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # what is there by now is garbage in no child


Run = tuple[PlantedBug | None, Sequence[str]]


def run_tests(runs: Iterable[Run]) -> Iterator[tuple[Run, Outcome]]:
    """Run tests with a bug or without one, a few processes at a time.

    The process must not have imported JAX, or modules of the project but this one and
    the list of bugs. Yields in the order in which the runs end.
    """
    with tempfile.TemporaryDirectory(prefix="planted_bugs_") as root:
        waiting = [(run, planted(run[0]) if run[0] else None) for run in runs][::-1]
        _preload(f"{root}/programs")
        running: dict[int, tuple[Run, Path, float]] = {}
        while waiting or running:
            while waiting and len(running) < WORKERS:
                run, changed = waiting.pop()
                folder = Path(tempfile.mkdtemp(dir=root))
                sys.stdout.flush()
                start, pid = time.perf_counter(), os.fork()
                if pid == 0:
                    _end_with(changed, run[1], folder)
                running[pid] = run, folder, start
            pid, status, usage = os.wait4(-1, 0)
            run, folder, start = running.pop(pid)
            seconds = time.perf_counter() - start
            note = folder / "assertion"
            outcome = Outcome(
                status=os.waitstatus_to_exitcode(status),
                failed_assertion=json.loads(note.read_text())
                if note.exists()
                else None,
                output=(folder / "output").read_text("utf-8", "replace"),
                seconds=seconds,
                cpu_s=usage.ru_utime + usage.ru_stime,
            )
            yield run, outcome


def _end_with(changed: Planted | None, tests: Sequence[str], folder: Path) -> NoReturn:
    """Run the tests of a child, which reaches no line behind its fork."""
    status = CRASHED
    try:
        status = _run_in_child(changed, tests, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
