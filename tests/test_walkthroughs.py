"""The walk-throughs of CONTRIBUTING.md, made as they stand there, do what they say."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from er_jax import acceptance, config, steps
from tests import test_acceptance, test_lossless
from tests.toy import Toy, settings, tables, toy_params

pytestmark = pytest.mark.usefixtures("unoptimized_module")

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
RULE: Any = "likely"


def section(title: str) -> str:
    """Return the text below a heading, up to the next one."""
    return re.split(r"^#+ ", PAGE.split(f"### {title}\n")[1], flags=re.M)[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def hunks(diff: str) -> Iterator[tuple[str, str, str]]:
    """Yield (path, old lines, new lines) for each `--- path` of a block."""
    for part in re.split(r"^--- ", diff, flags=re.M)[1:]:
        path, *lines = part.splitlines()
        assert all(line[:1] in " +-" for line in lines), lines
        old, new = (
            "".join(f"{line[1:]}\n" for line in lines if line[:1] in signs)
            for signs in (" -", " +")
        )
        yield path, old, new


@pytest.fixture(scope="module")
def changed() -> dict[str, str]:
    """Return the files of the first walk-through by path, changed as it says."""
    text = section("Another acceptance rule")
    (functions,), (diff,) = blocks(text, "python"), blocks(text, "diff")
    path = "er_jax/acceptance.py"
    texts = {path: f"{(ROOT / path).read_text('utf-8')}\n\n{functions}"}
    for path, old, new in hunks(diff):
        before = texts.get(path) or (ROOT / path).read_text("utf-8")
        assert before.count(old) == 1, f"{path} does not hold, once: {old}"
        texts[path] = before.replace(old, new)
    return texts


def module_of(path: str, text: str) -> Any:
    """Return a module made of a text, which is not imported under its name."""
    made = types.ModuleType(Path(path).stem)
    exec(compile(text, path, "exec", dont_inherit=True), vars(made))
    return made


@pytest.fixture
def with_rule(changed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the rule in the library, until it ends."""
    made = module_of("er_jax/acceptance.py", changed["er_jax/acceptance.py"])
    for name in ("likely_logprobs", "likely_accept_probs"):
        monkeypatch.setattr(acceptance, name, getattr(made, name), raising=False)
    for place in (acceptance, config):
        monkeypatch.setattr(place, "ACCEPT_RULES", made.ACCEPT_RULES)
    # What runs rounds, here and in the engine, looks this up when it is traced.
    made = module_of("er_jax/steps.py", changed["er_jax/steps.py"])
    monkeypatch.setattr(steps, "_accept", made._accept)


def test_the_rule_is_a_setting_while_it_is_there(with_rule: None) -> None:
    assert er_jax.RolloutConfig(max_new_tokens=1, accept=RULE).accept == RULE


def test_the_rule_is_gone_afterwards() -> None:
    with pytest.raises(ValueError, match="accept='likely' is unknown"):
        er_jax.RolloutConfig(max_new_tokens=1, accept=RULE)


def test_every_outcome_of_its_rounds(
    with_rule: None, x64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The enumeration that `token` and `block` pass, of whole rounds, in float64."""
    test_lossless.test_every_outcome_of_a_round(RULE, 2, None, None, monkeypatch)


def test_a_wrong_residual_is_noticed(
    changed: dict[str, str],
    with_rule: None,
    x64: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if the branch lacked its last line: p - q is drawn from instead of p - m."""
    line = "            draft = acceptance.likely_logprobs(target, draft)\n"
    text = changed["er_jax/steps.py"]
    assert text.count(line) == 1
    made = module_of("er_jax/steps.py", text.replace(line, ""))
    monkeypatch.setattr(steps, "_accept", made._accept)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_lossless.test_every_outcome_of_a_round(RULE, 2, None, None, monkeypatch)


@pytest.mark.parametrize("gamma", [1, 3])
def test_every_outcome_of_its_functions(
    gamma: int, with_rule: None, x64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of its functions apart from a round, at every kind of setting."""
    made: Any = acceptance
    real = acceptance.residual_logprobs

    def residual(target: jax.Array, draft: jax.Array, *rest: jax.Array) -> jax.Array:
        return real(target, made.likely_logprobs(target, draft), *rest)

    # In the place of `token`, as nothing else is different between the two.
    monkeypatch.setattr(acceptance, "token_accept_probs", made.likely_accept_probs)
    monkeypatch.setattr(acceptance, "residual_logprobs", residual)
    run = jax.jit(inspect.unwrap(test_acceptance.run_rule), static_argnames="rule")
    monkeypatch.setattr(test_acceptance, "run_rule", run)
    target, draft = tables(test_acceptance.V, dtype="float64")
    for setting in test_acceptance.SETTINGS:
        test_acceptance.check_exact("token", gamma, target, draft, settings(**setting))


def test_a_rollout_takes_it(with_rule: None) -> None:
    """Greedily there is one right answer, whatever was drafted."""
    policy = Toy(vocab_size=16)
    target, draft = (toy_params(policy, seed=seed) for seed in (0, 1))
    # What is drafted is sometimes the target's own choice, and mostly not.
    draft = jax.tree.map(lambda ours, other: ours + other / 4, target, draft)
    found = {}
    for control in ("ar", "fixed:3"):
        found[control] = er_jax.rollout(
            policy,
            er_jax.PolicyParams(target, draft),
            [[1, 2], [3, 4, 5]],
            key=jax.random.key(0),
            config=er_jax.RolloutConfig(
                max_new_tokens=20, temperature=0, accept=RULE, control=control
            ),
        )
    plain, drafted = found.values()
    np.testing.assert_array_equal(plain.completion_ids, drafted.completion_ids)
    assert 0 < drafted.stats.keep_rate(3) < 1


@pytest.mark.slow
def test_the_tests_that_the_page_names_pass(
    changed: dict[str, str], tmp_path: Path
) -> None:
    """In a copy of the project, by the page's own command."""
    for name in ("er_jax", "tests"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, text in changed.items():
        (tmp_path / path).write_text(text, "utf-8")
    said = re.search(r"`python -m (pytest .* -k likely)`", PAGE)
    assert said is not None
    arguments = [word.strip('"') for word in said[1].split()]
    done = subprocess.run(
        [sys.executable, "-m", *arguments, "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 20


def test_another_controller(capsys: pytest.CaptureFixture[str]) -> None:
    """Its tokens are those of plain decoding, and it drafts when it says it does."""
    (program,) = blocks(section("Another controller"), "python")
    names: dict[str, Any] = {"__name__": "walkthrough"}
    exec(compile(program, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    drafted, plain = names["drafted"], names["plain"]
    assert drafted.completion_ids.shape == plain.completion_ids.shape
    np.testing.assert_array_equal(drafted.completion_ids, plain.completion_ids)
    assert set(plain.stats.tokens) == {0}
    assert {moment.gamma for moment in drafted.stats.timeline} == {0, 4}
    for moment in drafted.stats.timeline:
        assert (moment.gamma == 4) == (moment.live <= 2)
    assert len(set(plain.lengths)) > 1
    assert capsys.readouterr().out
