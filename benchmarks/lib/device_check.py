"""Tokens and logits of an accelerator against those of a CPU, on a small rollout.

The CPU samples in a process of its own while the accelerator is in use. A difference of
tokens is accepted where it begins at a tie of the two best candidates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import er_jax
from benchmarks.lib import agreement, presets, records
from er_jax import Decoder, RolloutConfig
from er_jax.types import Params

# By dtype: the largest difference of two logits, of size about one, that rounding may
# explain.
LOGIT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}

# Seconds to wait for the process on the CPU.
PATIENCE_S = 240


def check_params(policy: Decoder) -> Params:
    """Return parameters that are the same on every device, because NumPy draws them."""
    random = np.random.default_rng(0)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            values = np.ones(shape.shape)
        else:
            size = 1 if "embed" in name else shape.shape[0] ** -0.5
            values = random.standard_normal(shape.shape) * size
        return jnp.asarray(values.astype(np.float32), shape.dtype)

    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


@dataclasses.dataclass(frozen=True)
class Check:
    """A small rollout that is run on the CPU and on the device.

    preset, dtype: of the decoder.
    """

    preset: str
    dtype: str

    @property
    def policy(self) -> Decoder:
        """The decoder."""
        return presets.decoder(self.preset, dtype=self.dtype)

    @property
    def prompts(self) -> list[list[int]]:
        """Eight prompts of different lengths."""
        random = np.random.default_rng(1)
        top = self.policy.vocab_size
        return [list(map(int, random.integers(0, top, 3 + 2 * i))) for i in range(8)]

    def sample(self, control: str) -> er_jax.Rollout:
        """Sample the prompts' completions on the default device."""
        params = check_params(self.policy)
        return er_jax.rollout(
            self.policy,
            params,
            self.prompts,
            key=jax.random.key(3),
            config=RolloutConfig(max_new_tokens=48, control=control),
        )

    def logits(self, sequences: np.ndarray) -> np.ndarray:
        """Return the logits `[N, S, V]` along given sequences `[N, S]`."""
        policy, params = self.policy, check_params(self.policy)
        rows, length = sequences.shape
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), sequences.shape)

        def run(params: Params, tokens: jax.Array) -> jax.Array:
            cache = policy.init_cache(rows, length)
            hidden, _ = policy.forward(params, tokens, jnp.asarray(positions), cache)
            return policy.logits(params, hidden)

        return np.asarray(jax.jit(run)(params, sequences), np.float32)

    def reference(self) -> dict[str, np.ndarray]:
        """Return what this process's device samples and computes.

        Returns:
          tokens: of the completions. sequences: `[N, S]` prompts and completions.
          logits: `[N, S, V]` along them. gaps: `[N, S]`, see `agreement.noised_gaps`.
        """
        out = self.sample("ar")
        longest = max(map(len, self.prompts)) + out.completion_ids.shape[1]
        sequences = np.zeros((len(self.prompts), longest), np.int32)
        for row, prompt in enumerate(self.prompts):
            known = [*prompt, *out.completion_ids[row]]
            sequences[row, : len(known)] = known
        settings = agreement.sampling_settings(jax.random.key(3), ())
        params = check_params(self.policy)
        gaps = [
            agreement.noised_gaps(self.policy, params, tokens, np.int32(i), settings)
            for i, tokens in enumerate(sequences)
        ]
        return {
            "tokens": out.completion_ids,
            "sequences": sequences,
            "logits": self.logits(sequences),
            "gaps": np.stack([np.asarray(gap) for gap in gaps]),
        }

    def compare(self, expected: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return how this process's device agrees with a reference."""
        logits = self.logits(expected["sequences"])
        difference = float(np.abs(logits - expected["logits"]).max())
        found: dict[str, Any] = {
            "preset": self.preset,
            "dtype": self.dtype,
            "rows": len(self.prompts),
            "max_logit_difference": difference,
            "controls": {},
        }
        correct = difference <= LOGIT_TOLERANCE[self.dtype]
        for control in ("ar", "fixed:4"):
            tokens = self.sample(control).completion_ids
            ties, others, num_tokens = 0, [], 0
            for row, prompt in enumerate(self.prompts):
                apart = np.flatnonzero(tokens[row] != expected["tokens"][row])
                num_tokens += int(apart[0]) if len(apart) else tokens.shape[1]
                if not len(apart):
                    continue
                # A gap is closed by two logits that each differ by this much, or by a
                # program of another shape on the same device.
                gap = expected["gaps"][row, len(prompt) + int(apart[0]) - 1]
                if gap <= max(2 * difference, agreement.TIE_GAP[self.dtype]):
                    ties += 1
                else:
                    others.append(row)
            correct = correct and not others
            found["controls"][control] = {
                "num_tokens": num_tokens,
                "num_ties": ties,
                "unexplained": others,
            }
        return {**found, "correct": correct}


def write_reference(preset: str, path: Path) -> None:
    """Write what this process samples in every precision."""
    arrays = {}
    for dtype in LOGIT_TOLERANCE:
        for name, array in Check(preset, dtype).reference().items():
            arrays[f"{dtype} {name}"] = array
    np.savez(path, **arrays)  # type: ignore[arg-type]


@contextlib.contextmanager
def reference_process(
    command: Sequence[str],
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a Python module that calls `write_reference`, on the CPU, in a new process.

    Args:
      command: module and arguments; the path to write to is added as the last one.
    Returns:
      The process, which is ended with the context, and the path.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "reference.npz"
        process = subprocess.Popen(
            [sys.executable, "-m", *command, str(path)],
            cwd=records.ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        try:
            yield process, path
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()


def check_against_cpu(
    preset: str, process: subprocess.Popen[bytes], path: Path
) -> list[dict[str, Any]]:
    """Return the comparisons with the CPU, one for each precision.

    Args:
      preset: of the decoder. process, path: of `reference_process`.
    Raises:
      RuntimeError: the process failed.
    """
    if process.wait(timeout=PATIENCE_S):
        raise RuntimeError("the process that samples on the CPU failed; see above")
    arrays = dict(np.load(path))
    found = []
    for dtype in LOGIT_TOLERANCE:
        own = {
            key.removeprefix(f"{dtype} "): value
            for key, value in arrays.items()
            if key.startswith(f"{dtype} ")
        }
        # Accelerators round float32 products to fewer bits by default.
        precision = "highest" if dtype == "float32" else "default"
        with jax.default_matmul_precision(precision):
            found.append(Check(preset, dtype).compare(own))
    return found
