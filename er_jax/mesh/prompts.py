"""The prompts of all processes, gathered in every process."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from er_jax.checks import checked_arrays
from er_jax.mesh.processes import Processes
from er_jax.types import NONE


def gather_prompts(
    prompts: Sequence[Sequence[int]], n: int = 1
) -> tuple[list[list[int]], slice]:
    """Gather the prompts of all processes; every process must call it.

        everything, rows = er_jax.gather_prompts(prompts, config.n)
        out = er_jax.rollout(policy, params, everything, ..., mesh=mesh)
        own = out.completion_ids[rows]

    Args:
      prompts: token ids, those of this process; may be empty.
      n: completions of each, as in the config.
    Returns:
      The prompts of all processes in their order, the same in every process; and the
      rows of this process's completions in a `Rollout` of them.
    Raises:
      ValueError: in any process, a prompt is empty or not a flat sequence of integers.
    """
    failure: ValueError | None = None
    try:
        arrays = checked_arrays(prompts)
    except ValueError as error:
        # Raised after the exchange below, or the others would wait for this process.
        failure, arrays = error, []
    lengths = np.array([len(array) for array in arrays], np.int32)
    tokens = np.concatenate([np.zeros(0, np.int32), *arrays])
    # Clipped ids are in no vocabulary: `rollout` refuses them and names the prompt.
    tokens = np.clip(tokens, NONE, np.iinfo(np.int32).max).astype(np.int32)
    processes = Processes.of_all()

    def gather(own: np.ndarray) -> np.ndarray:
        """Return the arrays of all processes, `[processes, ...]`."""
        parts = np.zeros((jax.process_count(), *own.shape), np.int32)
        parts[jax.process_index()] = own
        return processes.sum(parts)

    own = [len(lengths), len(tokens), failure is not None]
    sizes = gather(np.array(own, np.int32))
    bad = np.flatnonzero(sizes[:, 2])
    if len(bad):
        raise failure or ValueError(
            f"prompts of process {bad[0]} cannot be sampled; its own error says why"
        )
    sizes = sizes[:, :2]
    largest = sizes.max(axis=0)
    lengths = np.pad(lengths, (0, largest[0] - len(lengths)))
    tokens = np.pad(tokens, (0, largest[1] - len(tokens)))
    everything: list[list[int]] = []
    for (count, _), of_one, flat in zip(
        sizes, gather(lengths), gather(tokens), strict=True
    ):
        ends = np.cumsum(of_one[:count])
        everything += [part.tolist() for part in np.split(flat, ends)[:count]]
    before = int(sizes[: jax.process_index(), 0].sum())
    return everything, slice(before * n, (before + len(prompts)) * n)
