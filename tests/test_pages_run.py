"""Code on pages runs: every block of Python, in the order of its page.

A page's blocks share their names. What a page takes for granted stands in `world`:
`policy`, `params`, `prompts`, `key` and `config` of a small model, a few modules, and
files of the names that it loads. Settings of the process are checked and not set.
Blocks that another test runs are named in `ELSEWHERE`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from configs import tiny
from er_jax.types import Params
from tests.test_docs import PAGES
from tests.test_integrations import LinenModel, NnxModel, nnx
from tests.test_text import make_tokenizer

pytestmark = [
    pytest.mark.usefixtures("unoptimized_module"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ROOT = Path(__file__).resolve().parents[1]

# Pages whose code other tests run, as it stands there.
ELSEWHERE = {
    "README.md": "test_readme.py",
    "CONTRIBUTING.md": "test_walkthroughs.py",
    "docs/tunix.md": "test_tunix_installed.py",
}

# These compile more than a few programs.
SLOW = (
    "docs/any-policy.md",
    "docs/huggingface.md",
    "docs/index.md",
    "docs/lora.md",
    "docs/pods.md",
    "docs/profiling.md",
    "docs/training.md",
)

SIZES = er_jax.DecoderConfig(
    vocab_size=256, dim=128, num_layers=1, num_heads=8, num_kv_heads=8, hidden_dim=128
)


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


WITH_CODE = sorted(
    page for page, text in PAGES.items() if blocks(text) and page not in ELSEWHERE
)


def test_code_that_others_run_is_run() -> None:
    for page, file in ELSEWHERE.items():
        assert f'"{page}"' in (ROOT / "tests" / file).read_text("utf-8")
        assert blocks(PAGES[page])


def test_no_block_of_python_is_called_otherwise() -> None:
    """Words behind a fence that no test would look for."""
    known = {"", "bash", "diff", "python", "text"}
    for page, text in PAGES.items():
        fences = re.findall(r"^ *```(.*)$", text, re.M)
        assert set(fences[::2]) <= known, page
        assert set(fences[1::2]) <= {""}, page


def checked_update(name: str, value: Any) -> None:
    """Stand in for `jax.config.update`: look the option up and leave it."""
    assert name in jax.config.values
    current = jax.config.values[name]
    assert current is None or isinstance(value, type(current))


def checked_initialize(real: Callable[..., None]) -> Callable[..., None]:
    """Return what stands in for `jax.distributed.initialize`: checks arguments."""

    def initialize(*args: Any, **kwargs: Any) -> None:
        inspect.signature(real).bind(*args, **kwargs)

    return initialize


def make_checkpoint(directory: Path, policy: er_jax.Decoder, params: Params) -> None:
    er_jax.save_hf(directory, policy, params)
    make_tokenizer(directory)


@pytest.fixture(scope="module")
def small() -> tuple[er_jax.Decoder, Params]:
    policy = er_jax.Decoder(SIZES)
    return policy, policy.init(jax.random.key(0))


def world(policy: er_jax.Decoder, params: Params) -> dict[str, Any]:
    """Return the names that pages use and do not define."""
    return {
        "__name__": "page",
        "RANK": 1,
        "LinenModel": LinenModel,
        "NnxModel": NnxModel,
        "config": er_jax.RolloutConfig(
            max_new_tokens=8, n=2, max_slots=8, gammas=(0, 2), stop_token_ids=(0, 1)
        ),
        "dataclasses": dataclasses,
        "er_jax": er_jax,
        "jax": jax,
        "jnp": jnp,
        "key": jax.random.key(0),
        "np": np,
        "params": params,
        "policy": policy,
        "policy_params": params,
        "prompts": [[1, 2, 3], [4, 5], [6], [7, 8]],
        "rngs": nnx.Rngs(0),
        "step": 3,
    }


def train_once(directory: Path) -> None:
    """Leave a run of one step where docs/training.md loads one from."""
    from train.run import run

    run(dataclasses.replace(tiny.CONFIG, out=directory, steps=1))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page in SLOW else ())
        for page in WITH_CODE
    ],
)
def test_code_on_pages_runs(
    page: str,
    small: tuple[er_jax.Decoder, Params],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax.config, "update", checked_update)
    monkeypatch.setattr(
        jax.distributed, "initialize", checked_initialize(jax.distributed.initialize)
    )
    for directory in re.findall(r'load_hf\(\s*"([^"]*)"', PAGES[page]):
        make_checkpoint(tmp_path / directory, *small)
    for directory in set(re.findall(r'load_policy\("([^"]*)"', PAGES[page])):
        train_once(tmp_path / directory)
    names = world(*small)
    for block in blocks(PAGES[page]):
        code = compile(block, page, "exec", dont_inherit=True)
        # As it is outside of tests.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            exec(code, names)
        # A class that a page only sketches; the real one is in test_integrations.py.
        names.update(LinenModel=LinenModel, NnxModel=NnxModel)
