"""The architecture, held by reading the files: who may import whom, and what is public.

Rules are functions from the project's texts to the list of their violations. Each is
applied to the project, and to a planted violation that it has to find.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import inspect
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import er_jax

ROOT = Path(__file__).resolve().parents[1]

# Imports in er_jax run downwards: a module may import only those before it.
ORDER = (
    *("arguments", "until", "types", "figures", "devices", "thread_settings"),
    *("settings", "bias", "stops"),
    *("sampling", "acceptance"),
    *("products", "lora", "drafter"),
    *("kernels.tpu", "kernels.cuda", "kernels.choice", "kernels"),
    *("attention", "kv_cache", "rotary", "experts", "decoder_config", "decoder"),
    *("prefill", "steps"),
    *("config", "request", "stats", "respond"),
    *("engine.protocol", "engine.programs", "engine.lowering", "engine.windows"),
    *("engine.scores", "engine.digests", "engine.adoption", "engine.first_use"),
    *("engine.engine", "engine.kept", "engine"),
    *("costs.record", "costs.passes", "costs.roofline"),
    *("costs.neighbours", "costs.table"),
    *("costs.timing", "costs.store", "costs"),
    *("control.protocol", "control.estimate", "control.rollouts", "control.accounts"),
    "control.guesses",
    *(
        "control.probes",
        "control.paper",
        "control.controller",
        "control.explain",
        "control",
    ),
    *("result", "resume", "journal_format", "journal", "checks", "score"),
    *("scheduler.topology", "scheduler.admission", "scheduler.prompts"),
    *("scheduler.options", "scheduler.exchange", "scheduler.turns", "scheduler.batch"),
    *("scheduler.conversations", "scheduler.monitor", "scheduler.loop", "scheduler"),
    *(
        "mesh.rules",
        "mesh.attention",
        "mesh.experts",
        "mesh.layout",
        "mesh.moves",
        "mesh.processes",
    ),
    *("mesh.engine", "mesh.topology", "mesh.prompts", "mesh"),
    *("session", "call", "rollout", "stream", "mesh.replicas"),
    *(
        "io.json_fields",
        "io.hf_fields",
        "io.hf_config",
        "io.hf_weights",
        "io.hf_save",
        "io.peft",
        "io.text",
    ),
    "io",
    *("tools.sweep", "tools.traces", "tools.deciders", "tools.replay", "tools.survey"),
    *("tools.hlo", "tools.module", "tools.traffic", "tools.presets", "tools.needs"),
    *("tools.plan", "tools.outputs", "tools.calibrate"),
    *("tools.cli", "tools"),
    *("integrations", "earlier"),
)

# Who may know of meshes; whoever reads for one device meets them nowhere else.
MESH_ROOMS = (
    *("mesh", "call", "rollout", "stream", "io", "tools", "integrations", "earlier"),
)

# Beside the engine: what only several devices or processes need.
COMPILING_MESH = ("er_jax/mesh/engine.py", "er_jax/mesh/processes.py")

OWN = ("er_jax", "train", "configs", "benchmarks", "tests")

# Where the name to import is not the name to install.
IMPORT_NAMES = {
    "aqtp": "aqt",
    "google-tunix": "tunix",
    "orbax-checkpoint": "orbax",
}

CHECKS = ("ruff check", "ruff format --check", "mypy")

# Places that exist on one machine only; a temporary place is asked for, not named.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:home|mnt|root|tmp|Users|work|workspace)/")
UPWARD_PATH = re.compile(r"(?<![\w./])(?:\.\./)+[\w./-]*")

Texts = dict[str, str]  # path from the root -> content


def project_texts() -> Texts:
    """Read every text file of the project: whatever git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, text=True
        )
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        made = re.compile(r"/(?:\.git|\.venv[^/]*|\.\w+_cache|runs|__pycache__)/")
        found = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")]
        paths = [ROOT / name for name in found if not made.search(f"/{name}")]
    texts = {}
    for path in paths:
        if not path.is_file():  # deleted, but still in git's index
            continue
        try:
            texts[path.relative_to(ROOT).as_posix()] = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
    return texts


# Rules read the same files again and again, of which a planted text changes one.
@functools.cache
def parsed(path: str, text: str) -> ast.Module:
    return ast.parse(text, path)


def sources(texts: Texts, *packages: str) -> Iterator[tuple[str, ast.Module]]:
    """Parse the Python files below the given top-level folders."""
    for path, text in sorted(texts.items()):
        if path.endswith(".py") and path.split("/")[0] in packages:
            yield path, parsed(path, text)


def walk(tree: ast.AST, *, lazy: bool) -> Iterator[ast.AST]:
    """Visit all nodes; with `lazy` false, only those that run on import."""
    yield tree
    if lazy or not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in ast.iter_child_nodes(tree):
            yield from walk(child, lazy=lazy)


@functools.cache
def imported(path: str, tree: ast.AST, *, lazy: bool = True) -> frozenset[str]:
    """Return the dotted name of everything that is imported, `a.b.c` for `from a.b`."""
    names = set()
    for node in walk(tree, lazy=lazy):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.split("/")[: -node.level] if node.level else []
            base = [*package, *([node.module] if node.module else [])]
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return frozenset(names)


def is_below(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def module_of(path: str) -> str:
    """Return `steps` for er_jax/steps.py, `costs.table` for er_jax/costs/table.py.

    Of a package that is one entry of ORDER, the package for all that lies in there.
    """
    name = path.split("/", 1)[1].removesuffix(".py").replace("/", ".")
    return entry_of(name.removesuffix(".__init__"))


def entry_of(name: str) -> str:
    """Return the entry of ORDER that a dotted name lies in, or the name."""
    parts = name.split(".")
    heads = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((head for head in heads if head in ORDER), name)


def imports_not_downwards(texts: Texts) -> list[str]:
    bad = []
    for path, tree in sources(texts, "er_jax"):
        module = module_of(path)
        if module == "__init__":
            continue
        if module not in ORDER:
            bad.append(f"{path} has no place in ORDER")
            continue
        for name in sorted(imported(path, tree)):
            if not is_below(name, "er_jax"):
                continue
            target = entry_of(name.removeprefix("er_jax").removeprefix("."))
            if target == "__version__":  # the package's own, where the build reads it
                continue
            if target not in ORDER:
                bad.append(f"{path} imports {name}: name the module it comes from")
            elif target == module and module in ("integrations", "earlier"):
                continue
            elif ORDER.index(target) >= ORDER.index(module):
                bad.append(f"{path} imports {name}, which is not below it")
    return bad


def meshes_outside_their_rooms(texts: Texts) -> list[str]:
    """Imports of what is about many devices, by modules for one."""
    bad = []
    for path, tree in sources(texts, "er_jax"):
        if module_of(path).split(".")[0] in (*MESH_ROOMS, "__init__"):
            continue
        for name in sorted(imported(path, tree)):
            if is_below(name, "er_jax.mesh") or is_below(name, "jax.sharding"):
                bad.append(f"{path} imports {name}: it is for one device")
    return bad


def aqt_outside_the_drafter(texts: Texts) -> list[str]:
    return [
        f"{path} imports {name}"
        for path, tree in sources(texts, *OWN)
        for name in sorted(imported(path, tree))
        if is_below(name, "aqt") and path != "er_jax/drafter.py"
    ]


def compiling_outside_the_engine(texts: Texts) -> list[str]:
    bad = []
    for path, tree in sources(texts, "er_jax"):
        if path.startswith("er_jax/engine/") or path in COMPILING_MESH:
            continue
        for node in ast.walk(tree):
            words = []
            if isinstance(node, ast.Attribute):
                words = [node.attr]
            elif isinstance(node, ast.Name):
                words = [node.id]
            elif isinstance(node, ast.keyword):
                words = [node.arg or ""]
            elif isinstance(node, ast.ImportFrom):
                words = [alias.name for alias in node.names]
            for word in words:
                if word in ("jit", "pjit", "pmap") or word.startswith("donate_arg"):
                    bad.append(f"{path}:{getattr(node, 'lineno', '')} says {word}")
    return bad


def decoder_in_the_steps(texts: Texts) -> list[str]:
    return [
        f"{path} imports {name}: the policy is an argument"
        for path, tree in sources(texts, "er_jax")
        for name in sorted(imported(path, tree))
        if path == "er_jax/steps.py" and is_below(name, "er_jax.decoder")
    ]


def library_uses_its_users(texts: Texts) -> list[str]:
    return [
        f"{path} imports {name}"
        for path, tree in sources(texts, "er_jax")
        for name in sorted(imported(path, tree))
        if any(is_below(name, user) for user in OWN if user != "er_jax")
    ]


# Who may import Flax NNX, and the tests of integrations.
NNX_HOMES = (
    "er_jax/integrations/nnx.py",
    "er_jax/integrations/tunix.py",
    "tests/test_integrations.py",
    "tests/test_tunix_installed.py",
)
INTEGRATION_TESTS = (*NNX_HOMES[2:], "tests/test_tunix.py")


def nnx_anywhere(texts: Texts) -> list[str]:
    """But in its integrations, which only each other and their tests import."""

    def is_away(path: str, name: str) -> bool:
        if is_below(name, "flax.nnx"):
            return path not in NNX_HOMES
        is_at_home = (
            path.startswith("er_jax/integrations/") or path in INTEGRATION_TESTS
        )
        return is_below(name, "er_jax.integrations") and not is_at_home

    return [
        f"{path} imports {name}"
        for path, tree in sources(texts, *OWN)
        for name in sorted(imported(path, tree))
        if is_away(path, name)
    ]


# Imports in train run downwards as well: a module may import only those before it.
TRAIN_ORDER = (
    "settings",
    "files",
    "digests",
    "controllers",
    "tasks",
    "rewards",
    "batching",
    "losses",
    "sft",
    "config",
    "tools",
    "metrics",
    "trained",
    "placement",
    "checkpoints",
    "subjects",
    "completions",
    "partial",
    "update",
    "trainer",
    "report",
    "run",
    "grpo",
    "compare",
)


def imports_of_train_not_downwards(texts: Texts) -> list[str]:
    bad = []
    for path, tree in sources(texts, "train"):
        module = module_of(path)
        if module != "__init__" and module not in TRAIN_ORDER:
            bad.append(f"{path} has no place in TRAIN_ORDER")
            continue
        below = (
            TRAIN_ORDER[: TRAIN_ORDER.index(module)] if module in TRAIN_ORDER else ()
        )
        for name in sorted(imported(path, tree)):
            if is_below(name, "train") and (*name.split("."), "")[1] not in below:
                bad.append(f"{path} imports {name}, which is not below it")
    return bad


def installed(requirements: list[str]) -> set[str]:
    """Return the names to import of some requirements."""
    found = {re.split(r"[^\w.-]", line)[0] for line in requirements}
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in found}


def undeclared_dependencies(texts: Texts) -> list[str]:
    """Imports that an install does not bring.

    Of the library, a plain install is asked for; of what trains, the extra `train`.
    Other extras are imported inside functions only, but for an integration that is
    named for the extra.
    """
    project = tomllib.loads(texts["pyproject.toml"])["project"]
    extras = {k: installed(v) for k, v in project["optional-dependencies"].items()}
    needed = installed(project["dependencies"]) | set(OWN) | sys.stdlib_module_names
    apart = ("docs", "test", "train")
    optional = [extras[key] for key in extras if key not in apart]
    bad = []
    for packages, always in (
        (("er_jax",), needed),
        (("train", "configs"), needed | extras["train"]),
    ):
        for path, tree in sources(texts, *packages):
            here = always
            if path.startswith("er_jax/integrations/"):
                here = always | extras.get(Path(path).stem, set())
            for lazy, allowed in ((False, here), (True, here.union(*optional))):
                used = {name.split(".")[0] for name in imported(path, tree, lazy=lazy)}
                bad += [f"{path} imports {name}" for name in sorted(used - allowed)]
    return bad


def dependencies_without_use(texts: Texts) -> list[str]:
    """What an install brings and nothing of its package imports."""
    project = tomllib.loads(texts["pyproject.toml"])["project"]
    bad = []
    for requirements, packages in (
        (project["dependencies"], ("er_jax",)),
        (project["optional-dependencies"]["train"], ("train", "configs")),
    ):
        used = {
            name.split(".")[0]
            for path, tree in sources(texts, *packages)
            for name in imported(path, tree)
        }
        bad += [
            f"pyproject.toml requires {name}, which {packages[0]} does not import"
            for name in sorted(installed(requirements) - used)
        ]
    return bad


def needs_to_be_installed(texts: Texts) -> list[str]:
    """A source tree on the path works as it is: er_jax.__version__ is its version."""
    return [
        f"{path} imports {name}"
        for path, tree in sources(texts, "er_jax", "train", "configs")
        for name in sorted(imported(path, tree))
        if is_below(name, "importlib.metadata") or is_below(name, "pkg_resources")
    ]


def paths_of_one_machine(texts: Texts) -> list[str]:
    """Absolute paths, and relative ones that lead to nothing in the project."""
    bad = []
    for path, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line):
                bad.append(f"{path}:{number} names a place on one machine: {line}")
            for match in UPWARD_PATH.findall(line):
                target = (ROOT / path).parent.joinpath(match).resolve()
                if not (target.is_relative_to(ROOT) and target.exists()):
                    bad.append(f"{path}:{number} leads nowhere: {match}")
    return bad


def checks_not_the_same(texts: Texts) -> list[str]:
    """The three check commands, as they stand in each place that names them."""
    found = {
        ".ci/run": re.findall(
            r"^(?:run|beside \w+) ((?:ruff|mypy).*)$", texts[".ci/run"], re.M
        ),
        ".pre-commit-config.yaml": re.findall(
            r"entry: (.*)", texts[".pre-commit-config.yaml"]
        ),
        "CONTRIBUTING.md": re.findall(
            r"^((?:ruff|mypy)\b[^#\n]*?)\s*(?:#.*)?$", texts["CONTRIBUTING.md"], re.M
        ),
    }
    return [
        f"{path} runs {commands}, not {list(CHECKS)}"
        for path, commands in found.items()
        if tuple(commands) != CHECKS
    ]


def commands(texts: Texts) -> Iterator[tuple[str, str]]:
    """Yield (path, line) of all that tells a person or a machine what to run.

    Lines that a backslash continues are one.
    """
    for path, text in sorted(texts.items()):
        if path.endswith(".md") or path.split("/")[0] in (".ci", ".github"):
            for line in text.replace("\\\n", " ").splitlines():
                yield path, line


# What follows -m: a quoted expression or one word.
AFTER_M = re.compile(r"""(?<!\S)-m\s+(?:\\?"(.*?)"|'(.*?)'|([\w.]+))""")
PYTHON = re.compile(r"python[\d.]*\s+(?:-(?!m\b)\w+\s+(?:\w\S*\s+)?)*$")


def modules_run(texts: Texts) -> Iterator[tuple[str, str]]:
    """Yield (path, module) of every `python -m module` that is written down."""
    for path, line in commands(texts):
        for match in AFTER_M.finditer(line):
            if PYTHON.search(line[: match.start()]):
                yield path, "".join(filter(None, match.groups()))


def markers_run(texts: Texts) -> Iterator[tuple[str, str]]:
    """Yield (path, expression) of every `pytest -m expression` that is written down.

    `$tests` is what .ci/run takes out of the README.
    """
    for path, line in commands(texts):
        for match in AFTER_M.finditer(line):
            before = line[: match.start()]
            if re.search(r"pytest|\$tests", before) and not PYTHON.search(before):
                yield path, "".join(filter(None, match.groups()))
    options = pytest_options(texts)["addopts"]
    for option, value in itertools.pairwise(options):
        if option == "-m":
            yield "pyproject.toml", value


def pytest_options(texts: Texts) -> dict[str, Any]:
    return tomllib.loads(texts["pyproject.toml"])["tool"]["pytest"]["ini_options"]


def markers(texts: Texts) -> dict[str, str]:
    """Return the project's markers and what is said of each."""
    lines = pytest_options(texts)["markers"]
    return dict(re.split(r":\s*", line, maxsplit=1) for line in lines)


def unknown_markers(texts: Texts) -> list[str]:
    """pytest runs nothing for a marker that does not exist, and says nothing of it."""
    bad = []
    for path, expression in markers_run(texts):
        names = set(re.findall(r"\w+", expression)) - {"and", "or", "not"}
        for name in sorted(names - markers(texts).keys()):
            bad.append(f"{path} runs tests marked {name}, and no test may be")
    return bad


def markers_that_no_machine_runs(texts: Texts) -> list[str]:
    """A test that is left out by default and run nowhere else holds nothing."""
    machines = [
        expression
        for path, expression in markers_run(texts)
        if path.split("/")[0] in (".ci", ".github")
    ]
    return [
        f"pyproject.toml has a marker {name}, and neither .ci nor .github/workflows "
        "runs it"
        for name in markers(texts)
        if name not in machines
    ]


def modules_that_cannot_be_run(texts: Texts) -> list[str]:
    """`python -m` of something that is not there, or does nothing when it is run."""
    project = tomllib.loads(texts["pyproject.toml"])["project"]
    extras = project["optional-dependencies"].values()
    installed = itertools.chain(project["dependencies"], ["pip"], *extras)
    known = {re.split(r"[^\w-]", line)[0] for line in installed}
    known |= sys.stdlib_module_names
    bad = []
    for path, module in modules_run(texts):
        if module.split(".")[0] not in (*OWN, "docs"):
            if module.split(".")[0] not in known:
                bad.append(f"{path} runs {module}, which nothing installs")
            continue
        file = module.replace(".", "/")
        text = texts.get(f"{file}.py") or texts.get(f"{file}/__main__.py")
        if text is None:
            bad.append(f"{path} runs {module}, which does not exist")
        elif "__main__" not in text:
            bad.append(f"{path} runs {module}, which does nothing when it is run")
    return bad


Rule = Callable[[Texts], list[str]]

# Each rule with texts that break it, every one of which it has to notice.
RULES: list[tuple[Rule, list[Texts]]] = [
    (
        imports_not_downwards,
        [
            {"er_jax/steps.py": "from er_jax.engine import run"},
            {"er_jax/steps.py": "from er_jax import engine"},
            {"er_jax/steps.py": "from . import engine"},
            {"er_jax/steps.py": "from .engine import run"},
            {"er_jax/steps.py": "def f():\n    import er_jax.engine as e"},
            {"er_jax/steps.py": "import er_jax"},
            {"er_jax/steps.py": "from er_jax import quantize"},
            {"er_jax/steps.py": "from er_jax.steps import f"},
            {"er_jax/io/text.py": "from er_jax.integrations.other import f"},
            {"er_jax/costs/table.py": "from er_jax.costs import timing"},
            {"er_jax/engine/windows.py": "from er_jax.engine import Engine"},
            {"er_jax/mesh/engine.py": "from er_jax.mesh.replicas import deal"},
            {"er_jax/utils.py": ""},
        ],
    ),
    (
        meshes_outside_their_rooms,
        [
            {"er_jax/steps.py": "from er_jax.mesh import rules"},
            {"er_jax/kv_cache.py": "from jax.sharding import PartitionSpec"},
            {"er_jax/scheduler/batch.py": "def f():\n    import er_jax.mesh.engine"},
        ],
    ),
    (
        aqt_outside_the_drafter,
        [
            {"er_jax/decoder.py": "from aqt.jax.v2 import aqt_tensor"},
            {"train/grpo.py": "def f():\n    import aqt"},
        ],
    ),
    (
        compiling_outside_the_engine,
        [
            {"er_jax/steps.py": "import jax\n@jax.jit\ndef f(): pass"},
            {"er_jax/steps.py": "from jax import jit as compiled"},
            {"er_jax/steps.py": "f(g, donate_argnums=0)"},
            {"er_jax/steps.py": "import functools, jax\nfunctools.partial(jax.jit)"},
        ],
    ),
    (decoder_in_the_steps, [{"er_jax/steps.py": "from er_jax.decoder import Decoder"}]),
    (
        library_uses_its_users,
        [
            {"er_jax/rollout.py": "from train import tasks"},
            {"er_jax/rollout.py": "def f():\n    import configs.tiny"},
        ],
    ),
    (
        nnx_anywhere,
        [
            {"tests/test_x.py": "from flax import nnx"},
            {"er_jax/integrations/linen.py": "from flax import nnx"},
            {"er_jax/rollout.py": "from er_jax.integrations import batching"},
        ],
    ),
    (
        undeclared_dependencies,
        [
            {"er_jax/costs.py": "import pandas"},
            {"er_jax/costs.py": "import matplotlib.pyplot as plt"},
            {"er_jax/costs.py": "import optax"},
            {"er_jax/costs.py": "def f():\n    import orbax.checkpoint"},
            {"er_jax/io/hf_save.py": "import tunix"},
            {"train/grpo.py": "import transformers"},
            {"train/grpo.py": "def f():\n    import chex"},
        ],
    ),
    (
        dependencies_without_use,
        [
            {
                "pyproject.toml": '[project]\ndependencies = ["optax"]\n'
                '[project.optional-dependencies]\ntrain = ["optax"]'
            },
            {
                "pyproject.toml": '[project]\ndependencies = ["jax"]\n'
                '[project.optional-dependencies]\ntrain = ["tyro", "pandas>=2"]'
            },
        ],
    ),
    (
        imports_of_train_not_downwards,
        [
            {"train/update.py": "from train.trainer import Trainer"},
            {"train/update.py": "from train import trainer"},
            {"train/update.py": "def f():\n    import train.grpo"},
            {"train/update.py": "from . import update"},
            {"train/update.py": "import train"},
            {"train/utils.py": ""},
        ],
    ),
    (
        needs_to_be_installed,
        [
            {"er_jax/costs.py": "import importlib.metadata"},
            {"train/grpo.py": "def f():\n    from importlib.metadata import version"},
        ],
    ),
    (
        paths_of_one_machine,
        [
            {"README.md": "cd /" + "home/me/er_jax"},
            {"docs/guide.md": "see (" + "../" * 2 + "elsewhere/design.md)"},
            {"docs/guide.md": "see " + "../" + "no_such_file.md"},
        ],
    ),
    (
        checks_not_the_same,
        [
            {".ci/run": "run ruff check --fix\nrun ruff format --check\nrun mypy\n"},
            {"CONTRIBUTING.md": "ruff check\nruff format\nmypy\n"},
            {".pre-commit-config.yaml": ""},
        ],
    ),
    (
        unknown_markers,
        [
            {".github/workflows/ci.yml": "      - run: python -m pytest -m pods"},
            {".ci/run": 'run "$tests -m slwo"'},
            {".ci/run": "run \"$tests -m 'slow and not gpu'\""},
            {"docs/guide.md": 'see `python -m pytest -m "slow or pods"`, or not'},
            {"CONTRIBUTING.md": "python -m pytest \\\n    -x -m nightly"},
            {"README.md": ".venv/bin/python3 -m pytest -m quick tests/test_x.py"},
        ],
    ),
    (
        modules_that_cannot_be_run,
        [
            {"docs/guide.md": "`python -m benchmarks.no_such_script`"},
            {"docs/guide.md": "python -m train.losses"},
            {"docs/guide.md": "python -m docs.hooks"},
            {"README.md": "python3 -m venev .venv && .venv/bin/python -m pytset"},
            {".github/workflows/ci.yml": "      - run: python -X dev -m ptest"},
        ],
    ),
]


@pytest.fixture(scope="module")
def texts() -> Texts:
    return project_texts()


@pytest.fixture(scope="module")
def found_in_project(texts: Texts) -> Callable[[Rule], list[str]]:
    """Apply a rule to the project, once."""
    return functools.cache(lambda rule: rule(texts))


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES])
def test_project_keeps_the_rule(
    rule: Rule, found_in_project: Callable[[Rule], list[str]]
) -> None:
    assert found_in_project(rule) == []


@pytest.mark.parametrize(
    ("rule", "planted"), [(rule, text) for rule, broken in RULES for text in broken]
)
def test_rule_finds_what_is_planted(
    rule: Rule,
    planted: Texts,
    texts: Texts,
    found_in_project: Callable[[Rule], list[str]],
) -> None:
    found = set(rule({**texts, **planted})) - set(found_in_project(rule))
    assert found
    assert all(next(iter(planted)) in violation for violation in found)


def test_every_marker_is_run_by_a_machine(texts: Texts) -> None:
    assert markers_that_no_machine_runs(texts) == []
    planted = {".github/workflows/ci.yml": "run: python -m pytest -m slow"}
    (found,) = markers_that_no_machine_runs({**texts, **planted})
    assert "a marker long" in found


def test_commands_are_found(texts: Texts) -> None:
    """A rule over no commands would always hold."""
    assert len(list(modules_run(texts))) > 50
    paths = {path for path, _ in markers_run(texts)}
    assert paths >= {".ci/run", ".github/workflows/ci.yml", "CONTRIBUTING.md"}


def test_all_modules_are_read(texts: Texts) -> None:
    """A rule over no files would always hold."""
    for package in OWN:
        on_disk = {
            p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py")
        }
        assert on_disk <= {path for path, _ in sources(texts, package)}
    assert "er_jax/types.py" in texts


def test_importing_changes_nothing() -> None:
    """No configuration, no thread, no device, no output: importing only defines."""
    program = """
import threading, jax
before, threads = dict(jax.config.values), threading.enumerate()
import er_jax
after = dict(jax.config.values)
assert after == before, {k: v for k, v in after.items() if before.get(k) != v}
assert threading.enumerate() == threads, threading.enumerate()
# JAX refuses this once any device has been touched.
jax.config.update("jax_num_cpu_devices", 2)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_are_sorted_and_exist() -> None:
    assert list(er_jax.__all__) == sorted(set(er_jax.__all__))
    assert [name for name in er_jax.__all__ if not hasattr(er_jax, name)] == []


def arguments(thing: Any) -> list[str]:
    """Return what a caller gives: parameters, or the fields of a constructor."""
    if isinstance(thing, type) and issubclass(thing, enum.Enum | Exception):
        return []
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(thing).parameters.values()
    return [p.name for p in parameters if p.kind not in fixed]


def undocumented(name: str, thing: Any) -> list[str]:
    """List what a public name's docstring owes its reader."""
    if not callable(thing):
        return []
    doc = thing.__doc__ or ""
    if not doc or (dataclasses.is_dataclass(thing) and doc.startswith(f"{name}(")):
        return [f"{name} has no docstring"]  # a dataclass writes its signature there
    bad = [
        f"{name} does not say what {argument} is"
        for argument in arguments(thing)
        if not re.search(rf"\b{argument}\b", doc)
    ]
    if inspect.isclass(thing):
        bad += [
            f"{name}.{key} has no docstring"
            for key, member in vars(thing).items()
            if not key.startswith("_")
            and isinstance(member, FunctionType | property | classmethod)
            and not member.__doc__
        ]
    elif inspect.signature(thing).return_annotation not in (None, "None"):
        if not re.search(r"\breturns?\b", doc, re.I):
            bad.append(f"{name} does not say what it returns")
    return bad


def test_public_names_are_documented() -> None:
    public = {name: getattr(er_jax, name) for name in er_jax.__all__}
    assert [line for name in public for line in undocumented(name, public[name])] == []


def test_missing_documentation_is_found() -> None:
    def silent(x: int) -> int:
        return x

    def vague(x: int, rows: int) -> int:
        """Return x."""
        return x + rows

    def mute(x: int) -> int:
        """Double x."""
        return 2 * x

    @dataclasses.dataclass
    class Generated:
        x: int

    @dataclasses.dataclass
    class Partial:
        """Holds x."""

        x: int
        rows: int

        def method(self) -> None: ...

    assert undocumented("silent", silent) == ["silent has no docstring"]
    assert undocumented("vague", vague) == ["vague does not say what rows is"]
    assert undocumented("mute", mute) == ["mute does not say what it returns"]
    assert undocumented("Generated", Generated) == ["Generated has no docstring"]
    assert undocumented("Partial", Partial) == [
        "Partial does not say what rows is",
        "Partial.method has no docstring",
    ]
