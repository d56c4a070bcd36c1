"""Modules are found under the names that they had before they were put in rooms."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import er_jax

EARLIER = {
    "calibrate": ("measure_round", "survey", "conditions"),
    "cli": ("main",),
    "control": ("Controller", "PaperRule", "parse_control", "AcceptanceEstimate"),
    "costs": ("LatencyTable",),
    "engine": ("Engine", "engine_for", "forget_engines", "run_window"),
    "hf": ("load_hf", "save_hf", "policy_of"),
    "hf_config": ("decoder_config", "new_fields", "read_json"),
    "pass_costs": ("PassCosts", "Roofline", "Reading", "save_record"),
    "plan": ("plan", "PRESETS", "target_of", "collectives"),
    "replay": ("replay", "compare", "Trace", "TRACES", "Oracle", "make_decider"),
    "replicas": ("rollout_replicas", "ExpectedLengths", "deal"),
    "rollout": ("rollout", "compile_ahead", "Rollout", "RolloutConfig"),
    "scheduler": ("run", "Batch", "Completion", "Request", "RolloutError"),
    "sharding": ("MeshAxes", "rollout_mesh", "param_shardings", "state_shardings"),
    "sweep": ("read_sweep", "judge"),
    "text": ("load_tokenizer",),
}


@pytest.mark.parametrize("name", EARLIER)
def test_earlier_names_are_found(name: str) -> None:
    module = importlib.import_module(f"er_jax.{name}")
    assert [one for one in EARLIER[name] if not hasattr(module, one)] == []


def test_all_of_them_are_known_here() -> None:
    folder = Path(er_jax.__file__).parent / "earlier"
    assert {path.stem for path in folder.glob("*.py")} <= EARLIER.keys()


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    program = "import sys, er_jax; print([n for n in sys.modules if 'earlier' in n])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
