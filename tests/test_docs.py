"""What the documents say of the code: names, files, options and numbers that exist.

README.md, CONTRIBUTING.md and the pages in docs/ and benchmarks/ are read as they are.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
import pytest

import er_jax
from benchmarks.lib import rooflines
from docs import rooms
from er_jax import config, products
from er_jax.control import accounts, controller, estimate, paper, probes, rollouts
from er_jax.control.explain import explain
from er_jax.control.protocol import ControllerProtocol
from er_jax.costs import store, table, timing
from er_jax.costs.passes import seconds_of_passes
from er_jax.scheduler import batch
from er_jax.tools import cli, plan
from er_jax.types import Program
from tests.small import small_policy
from tests.test_layout import ORDER, OWN

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}

# Files of whoever reads the pages.
THEIRS = ("first.py", "train.py")

# Names that stand for a thing in the pages' code, and what kind of thing it is.
THINGS: dict[str, Any] = {
    "out": er_jax.Rollout,
    "stats": er_jax.RolloutStats,
    "config": er_jax.RolloutConfig,
}


def spans(text: str) -> list[str]:
    """Return what stands in backticks, and the lines of blocks of code."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    indented = re.findall(r"^    (.+)$", prose, re.M)
    lines = [line for block in blocks for line in block.splitlines()]
    return [*re.findall(r"`([^`]+)`", prose), *indented, *lines]


def files_that_are_missing(page: str, text: str) -> Iterator[str]:
    """Yield links that lead nowhere, and files of code that do not exist."""
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#:\s]*)(#[^)\s]*)?\)", re.sub(r"`[^`]*`", "", text))
    for target, anchor in links:
        path = folder / target if target else ROOT / page
        if not path.exists():
            yield f"{page} links to {target}"
        elif anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
            known = [re.sub(r"[^\w -]", "", head).lower() for head in heads]
            if anchor[1:] not in [head.replace(" ", "-") for head in known]:
                yield f"{page} links to {target}{anchor}"
    for span in spans(text):
        for name in re.findall(r"(?<![\w<*./-])[\w./-]+\.(?:py|md|toml|yml)\b", span):
            places = [ROOT, folder, *(ROOT / own for own in OWN)]
            is_there = any((place / name).exists() for place in places)
            if not is_there and name not in THEIRS:
                yield f"{page} names {name}"
        for name, test in re.findall(r"(tests/\w+\.py)::(\w+)", span):
            if f"def {test}(" not in (ROOT / name).read_text("utf-8"):
                yield f"{page} names {name}::{test}"


def is_earlier(thing: Any) -> bool:
    """Whether this is a module's earlier name, which no page should spread."""
    return Path(getattr(thing, "__file__", None) or "").parent.name == "earlier"


def attribute(root: Any, names: list[str]) -> bool:
    """Whether a dotted name leads from a module or a class to something."""
    here = root
    for name in names:
        fields = getattr(here, "__annotations__", {})
        if hasattr(here, name):
            here = getattr(here, name)
        elif name in fields:
            # What a dataclass holds; of which kind, only its annotation says.
            here = THINGS.get(name)
            if here is None:
                return True
        elif inspect.ismodule(here):
            try:
                here = importlib.import_module(f"{here.__name__}.{name}")
            except ModuleNotFoundError:
                return False
            except ImportError as error:  # it says which extra is not installed
                return "er-jax[" in str(error)
        else:
            return False
        if is_earlier(here):
            return False
    return True


def names_that_are_missing(page: str, text: str) -> Iterator[str]:
    """Yield dotted names that begin with a package, a module or a thing, and fail.

    What the page's own code defines is a name there.
    """
    defined = re.findall(r"^\+?\s*(?:def|class) (\w+)", text, re.M)
    for span in spans(text):
        for dotted in re.findall(r"(?<![\w./\"'-])[a-z_]+(?:\.\w+)+(?![\w/])", span):
            first, *rest = dotted.split(".")
            if rest[-1] in ("py", "md", "json", "jsonl", "png", "toml", *defined):
                continue
            roots: list[Any] = []
            if first in OWN:
                roots.append(importlib.import_module(first))
            if first in ORDER:
                roots.append(importlib.import_module(f"er_jax.{first}"))
            if first in THINGS:
                roots.append(THINGS[first])
            if roots and not any(attribute(root, rest) for root in roots):
                yield f"{page} names {dotted}"


def calls_that_fail(page: str, text: str) -> Iterator[str]:
    """Yield calls of the library, in Python, with arguments that it does not take."""
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        try:
            tree = ast.parse(block)
        except SyntaxError:
            continue  # a signature, not a program
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if not name.startswith("er_jax."):
                continue
            thing: Any = er_jax
            for part in name.split(".")[1:]:
                thing = getattr(thing, part)
            known = inspect.signature(thing).parameters
            for word in node.keywords:
                if word.arg is not None and word.arg not in known:
                    yield f"{page} calls {name} with {word.arg}"


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every `er-jax ...` and `python -m OWN ...` on a page."""
    joined = text.replace("\\\n", " ")
    for span in spans(joined):
        for line in re.split(r"\s+(?:&&|#|\|)\s", span):
            found = re.search(r"(?<!\S)(er-jax \w+.*|python3? -m [a-z]+\.\w+.*)", line)
            if found is not None and not line.startswith("er-jax:"):
                try:
                    yield shlex.split(found[1])
                except ValueError:
                    yield found[1].split()


def options(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if re.match(r"--[a-z]", word)]


def own_options(name: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the options of a subcommand of er-jax."""
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    return set(re.findall(r"--[\w.-]+", capsys.readouterr().out))


Check = Callable[[str, str], Iterator[str]]
CHECKS: dict[Check, list[str]] = {
    files_that_are_missing: [
        "[a](no/such/file.md)",
        "[a](README.md#no-such-heading)",
        "`er_jax/no_such.py`",
        "`tests/test_docs.py::test_no_such`",
    ],
    names_that_are_missing: [
        "`er_jax.no_such`",
        "`er_jax.Rollout.no_such`",
        "`er_jax.mesh.layout.no_such(1)`",
        "`control.rollouts.no_such`",
        "`er_jax.sharding.put_on_mesh`",
        "`er_jax.hf`",
        "`scheduler.Batch.no_such`",
        "`train.grpo.no_such`",
        "```python\nprint(out.no_such)\n```",
        "`out.stats.no_such`",
    ],
    calls_that_fail: ["```python\ner_jax.rollout(policy, no_such=1)\n```"],
}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("check", CHECKS)
def test_pages_name_what_exists(check: Check, page: str) -> None:
    assert list(check(page, PAGES[page])) == []


@pytest.mark.parametrize(
    ("check", "planted"), [(c, text) for c, texts in CHECKS.items() for text in texts]
)
def test_what_does_not_exist_is_found(check: Check, planted: str) -> None:
    assert len(list(check("README.md", planted))) == 1


def test_options_of_the_command_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = {
        name: own_options(name, capsys)
        for name in ("calibrate", "sweep", "replay", "plan", "rollout")
    }
    found = [
        (page, words)
        for page, text in PAGES.items()
        for words in commands(text)
        if words[0] == "er-jax"
    ]
    assert len(found) > 10
    for page, words in found:
        assert words[1] in known, (page, words)
        assert set(options(words)) <= known[words[1]], (page, words)


@pytest.mark.slow
def test_options_of_modules_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Each module's --help is asked once.

    What a page shows with a command is an option of that command; what it names by
    itself is one of some command on the page.
    """
    helps: dict[tuple[str, ...], set[str]] = {}

    def known(words: list[str]) -> set[str]:
        if words[0] == "er-jax":
            command: tuple[str, ...] = ("er-jax", words[1])
        else:
            # Of the trainer, settings stand behind the name of a run.
            has_runs = words[2] in ("train.grpo", "train.compare")
            command = (words[2], *(words[3:4] or ["arithmetic"])[:has_runs])
        if command not in helps:
            helps[command] = (
                own_options(command[1], capsys)
                if command[0] == "er-jax"
                else options_of_module(command, capsys)
            )
        return helps[command]

    for page, text in PAGES.items():
        shown = list(commands(text))
        for words in shown:
            assert set(options(words)) <= known(words), (page, words)
        anywhere = set().union(*map(known, shown))
        named = {span.split()[0] for span in spans(text) if re.match("--[a-z]", span)}
        assert named <= anywhere, page
    assert len(helps) > 20


def options_of_module(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> set[str]:
    """Return the options that `python -m` shows, run here: imports take seconds."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [*command, "--help"])
        # That a module which runs was imported before.
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    assert ended.value.code == 0, command
    return set(re.findall(r"--[\w.-]+", capsys.readouterr().out)) | {"--help"}


# -- the picture of the rooms ----------------------------------------------------------


def test_the_picture_shows_the_imports_as_they_are() -> None:
    with PIL.Image.open(rooms.PICTURE) as picture:
        drawn = picture.info[rooms.NOTE]
    assert drawn == rooms.described(*rooms.rooms()), "run python docs/rooms.py"
    parts = "admission, batch, conversations, exchange, loop, monitor, options, prompts"
    assert f"scheduler ({parts}, topology, turns) -> " in drawn


def test_arrows_that_others_imply_are_left_out() -> None:
    """By hand: a needs b, c and d; b needs c; c and d need e."""
    arrows = {"a": set("bcde"), "b": set("ce"), "c": {"e"}, "d": {"e"}, "e": set()}
    reduced = {"a": set("bd"), "b": {"c"}, "c": {"e"}, "d": {"e"}, "e": set()}
    assert rooms.reduced(arrows) == reduced
    assert rooms.layers(reduced) == {"a": 3, "b": 2, "c": 1, "d": 1, "e": 0}
    # A long arrow goes by places of its own, in the layers that it crosses.
    assert ["a", "a > d 2", "d"] in list(rooms.ways(reduced))


def test_what_needs_the_users_of_its_package_is_a_room_by_itself() -> None:
    imports = {
        "mesh.rules": {"types"}, "mesh.replicas": {"rollout", "mesh.rules"},
        "rollout": {"mesh.rules"}, "types": set(),
    }  # fmt: skip
    found = rooms.rooms_of(imports)
    assert found == {
        "mesh.rules": "mesh", "mesh.replicas": "mesh.replicas",
        "rollout": "rollout", "types": "words",
    }  # fmt: skip


# -- what a controller must offer ------------------------------------------------------


# Who has a controller of its own, whatever others must offer.
OWN_CONTROLLER = ("control.", "tools.")

# Members of the protocol that some calls do without, as it says of each.
TWO_GAMMAS = {"first_look", "observe_first_look"}
SOME_CALLS = {"speed", "state_dict", "load_state_dict"}


def asked_of_controllers() -> set[str]:
    """Return what the library asks of a controller, by reading its modules."""
    asked = set()
    for path in sorted((ROOT / "er_jax").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "er_jax").with_suffix("").parts)
        if module.startswith(OWN_CONTROLLER):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "controller":
                    asked.add(node.attr)
    return asked


def members(kind: type) -> set[str]:
    """Return what a class has to itself and shows, or says that it has."""
    own = {*vars(kind), *vars(kind).get("__annotations__", {})}
    return {name for name in own if not name.startswith("_")}


def test_the_protocol_is_what_is_asked_of_a_controller() -> None:
    """And design.md leaves it to the protocol."""
    assert members(ControllerProtocol) == asked_of_controllers()
    section = PAGES["docs/design.md"].split("**One controller for every control.**")[1]
    section = section.split("\n\n**")[0]
    assert "`ControllerProtocol`" in section and "control/protocol.py" in section
    assert named(section) & members(ControllerProtocol) == {"choose", "observe"}
    looks = inspect.getdoc(ControllerProtocol.first_look)
    assert looks is not None and "two gammas or more" in looks
    for name in ("speed", "state_dict"):
        said = inspect.getdoc(getattr(ControllerProtocol, name))
        assert said is not None and "called by" in said.lower()


def named(text: str) -> set[str]:
    return set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))


def named_in_table(text: str) -> set[str]:
    """Return the names in the first column of the first table."""
    table = re.search(r"(?:^\|.*\n)+", text, re.M)
    assert table is not None
    cells = re.findall(r"^\| (`.*?) \|", table[0], re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)", cell)}


def test_the_page_lists_what_a_step_of_training_records() -> None:
    lines = PAGES["docs/training.md"].split("A line of kind `step` holds")[1]
    listed = named_in_table(lines)
    recorded = [
        {key.value for key in node.keys if isinstance(key, ast.Constant)}
        for node in ast.walk(
            ast.parse((ROOT / "train" / "trainer.py").read_text("utf-8"))
        )
        if isinstance(node, ast.Dict)
        and any(isinstance(v, ast.Constant) and v.value == "step" for v in node.values)
    ]
    assert [names - {"kind", "step"} for names in recorded] == [listed]


def test_the_version_is_where_the_page_says() -> None:
    page = " ".join(PAGES["CONTRIBUTING.md"].split())
    assert "once, as `er_jax.__version__` in `er_jax/__init__.py`" in page
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["tool"]["hatch"]["version"] == {"path": "er_jax/__init__.py"}
    assert project["project"]["dynamic"] == ["version"]


class Plain:
    """The least that a call asks of a controller with one gamma."""

    gammas: tuple[int, ...] = (0,)
    broken_drafter = None
    measuring = contextlib.nullcontext()
    table: table.LatencyTable

    def __init__(self) -> None:
        self.table = table.LatencyTable()
        self._settings: list[tuple[float, ...]] = []
        self._num_emitted = 0

    @contextlib.contextmanager
    def sampling(self, setting: tuple[float, ...]) -> Iterator[None]:
        self._settings.append(setting)
        yield

    def choose(
        self,
        options: Sequence[Program],
        current: Program | None,
        *,
        compile_s: Callable[[Program], float],
        live: int,
        length: float,
    ) -> Program:
        assert current is None or compile_s(current) == 0
        assert live >= 1 and length >= 1
        return options[-1]

    def observe(
        self,
        program: Program,
        num_rounds: int,
        emitted: np.ndarray,
        seconds: float,
        accepted: np.ndarray,
        live: int,
    ) -> None:
        assert emitted.shape == accepted.shape == (program.gamma + 1,)
        assert num_rounds >= 0 and seconds > 0 and live >= 0
        self._num_emitted += int(emitted @ np.arange(1, program.gamma + 2))


class PlainWithTwo(Plain):
    """And of one with two, which looks once and then drafts."""

    gammas = (0, 2)

    def __init__(self) -> None:
        super().__init__()
        self._found: set[Program] = set()

    def first_look(
        self, rows: int, cache_length: int, compile_s: Callable[[Program], float]
    ) -> tuple[Program, ...]:
        pair = tuple(Program(rows, cache_length, gamma) for gamma in self.gammas)
        return () if self._found else pair

    def observe_first_look(
        self, seconds: Mapping[Program, float], num_rounds: int
    ) -> None:
        assert num_rounds > 0 and min(seconds.values()) > 0
        self._found |= set(seconds)

    def choose(self, options: Sequence[Program], *args: Any, **kwargs: Any) -> Program:
        assert self._found
        assert super().choose(options, *args, **kwargs).gamma == 0
        return next(program for program in options if program.gamma)


@pytest.mark.parametrize("kind", [Plain, PlainWithTwo])
@pytest.mark.usefixtures("unoptimized")
def test_an_object_with_what_is_asked_is_a_controller(kind: type[Plain]) -> None:
    has = members(Plain) | members(kind)
    spared = SOME_CALLS if len(kind.gammas) > 1 else SOME_CALLS | TWO_GAMMAS
    assert has == members(ControllerProtocol) - spared
    policy = small_policy("any controller")
    plain = kind()
    control = "ar" if kind.gammas == (0,) else "best"
    out = er_jax.rollout(
        policy,
        policy.init(jax.random.key(0)),
        [[1, 2]],
        key=jax.random.key(1),
        config=er_jax.RolloutConfig(
            max_new_tokens=5, control=control, gammas=(0, 2), top_k=3
        ),
        controller=plain,  # type: ignore[arg-type]
    )
    assert plain._num_emitted == out.lengths.sum() == 5
    assert plain._settings == [(1.0, 3, 1.0, 0.0)]
    assert set(out.stats.tokens) == {max(kind.gammas)}


# -- text that the library writes ------------------------------------------------------


def test_the_summary_on_the_page_is_that_of_the_pages_example() -> None:
    """The table above it as well: speeds over plain decoding."""
    page = PAGES["docs/system-aware.md"]
    gammas = (0, 2, 4, 6, 8, 10, 12)
    knowing = er_jax.Controller("best", gammas)
    cells = re.findall(r"^\| (\d+) \|(( [\d.]+ \|){6}) ", page, re.M)
    chosen = re.findall(r"\| ([\w ]+) \|$", page.split("| chosen |")[1], re.M)
    for rows, *_ in cells:
        for gamma in gammas:
            program = Program(int(rows), 1024, gamma)
            costs = rooflines.PUBLISHED["Qwen2.5-7B"].costs
            knowing.table.seconds[program] = seconds_of_passes(costs, program)
    knowing.acceptance.tested[:] = 1e6
    knowing.acceptance.kept[:] = 0.95e6
    ran = []
    for (rows, speeds, _), word in zip(cells, chosen, strict=False):
        plain = Program(int(rows), 1024, 0)
        own = knowing.speed(plain)
        assert own is not None
        for gamma, said in zip(gammas[1:], speeds.split(" | "), strict=True):
            speed = knowing.speed(plain._replace(gamma=gamma))
            assert speed is not None
            assert float(said.strip(" |")) == pytest.approx(speed / own, abs=0.0051)
        best = [int(number) for number in re.findall(r"\d+", word)]
        ran.append(plain._replace(gamma=max(best, default=0)))
    assert len(ran) == 6
    assert f"```\n{explain(knowing, ran)}\n```" in page


# -- numbers ---------------------------------------------------------------------------

# Page, words of it (spaces may be line ends) and the number that they stand for.
NUMBERS: list[tuple[str, str, float, float]] = [
    ("plan.md", "6 % of a device are kept free", 0.06, plan.RESERVED_SHARE),
    ("design.md", "Until a program has run 50 positions", 50, table.TRUSTED_POSITIONS),
    ("design.md", "up to a fifth lower", 1 / 5, table.UNCERTAINTY_DISCOUNT),
    ("design.md", "moves by three hundredths", 0.03, table.STALE),
    ("design.md", "half a million entries or more", 2**19, products.CODES_FIRST_SIZE),
    ("design.md", "ladder 5, 7, 9, 11", 11, config.PAPER_LADDER[-1]),
    ("design.md", ">= 1.05, one way", 1.05, paper.PAPER_SPEED_UP),
    ("system-aware.md", "another gamma at the same shape costs nothing and must "
     "promise half a per cent", 0.005, controller.GAMMA_HYSTERESIS),
    ("system-aware.md", "must promise 3 %", 0.03, probes.HYSTERESIS),
    ("system-aware.md", "the 128 files that were used last", 128,
     store.MAX_FILES),
    ("system-aware.md", "in at most 20 seconds", 20, timing.FIRST_BUDGET_S),
    ("system-aware.md", "six times as long", 6,
     1 / (1 - 1 / accounts.UNKNOWN_SPEED_UP)),
    ("design.md", "drafts are taken to be 1.2 times as fast", 1.2,
     accounts.UNKNOWN_SPEED_UP),
    ("system-aware.md", "trusted half as much", 1 / 2,
     table.SAVED_POSITIONS / table.TRUSTED_POSITIONS),
    ("system-aware.md", "forgets in about a second of windows", 1, table.MEMORY_S),
    ("system-aware.md", "takes a quarter more or less", 1.25, table.DRIFT_RATIO),
    ("system-aware.md", "loses a fifth of its weight with every rollout", 4 / 5,
     estimate.KEEP_PER_ROLLOUT),
    ("system-aware.md", "(six standard deviations", 6, estimate.CHANGE_DEVIATIONS),
    ("system-aware.md", "a drift of five points", 0.05, estimate.DRIFT),
    ("system-aware.md", "less than half of the expected drafts", 1 / 2,
     rollouts.DEAD_SHARE),
    ("system-aware.md", "one per cent of its time", 0.01, probes.PROBE_SHARE),
    ("system-aware.md", "after a quarter of a second", 0.25, batch.WINDOW_S),
]  # fmt: skip


@pytest.mark.parametrize(("page", "words", "said", "is_so"), NUMBERS)
def test_numbers_are_those_of_the_code(
    page: str, words: str, said: float, is_so: float
) -> None:
    assert words in " ".join(PAGES[f"docs/{page}"].split())
    assert is_so == pytest.approx(said)
