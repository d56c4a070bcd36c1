"""What of the target's cache a draft reads: all, the first and last positions, a copy.

Drafts are float (the policy's own weights, so that only what it reads is another), int8
and int4, with one scale per output channel or per group, the vocabulary projection
included. Activations keep their type, as on accelerators.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.lib.draft_formats import Format, draft_of
from er_jax import DrafterConfig
from er_jax.drafter import PolicyParams

CONFIGS: dict[str, DrafterConfig | None] = {
    "int8": DrafterConfig(bits=8, act_bits=16),
    "int4": DrafterConfig(bits=4, act_bits=16),
    "int4 g128": DrafterConfig(bits=4, act_bits=16, group_size=128),
    "float": None,
}

PROMPT = "prompt"
"""The head that is as long as a text's prompt."""


@dataclasses.dataclass(frozen=True)
class View:
    """What a draft reads; see `whole_texts.visible`.

    window: last positions; None is all.
    head: first positions, at most those of the prompt; or `PROMPT`.
    bits: of the copy of the cache that is read; None is the cache itself.
    """

    window: int | None = None
    head: int | str = 0
    bits: int | None = None

    def heads(self, prompt_lengths: np.ndarray) -> np.ndarray:
        """Return the head of each text, `[N]` int32."""
        if self.head == PROMPT:
            return prompt_lengths.astype(np.int32)
        return np.minimum(self.head, prompt_lengths).astype(np.int32)

    def window_of(self, length: int) -> np.int32:
        """Return the window in texts of `length` tokens."""
        return np.int32(length if self.window is None else self.window)

    def entries(self, positions: np.ndarray, heads: np.ndarray) -> np.ndarray:
        """Return how many entries are read at positions; both `[M]`."""
        num = positions + 1
        if self.window is None:
            return num
        near = np.minimum(num, self.window)
        return near + np.clip(heads, 0, num - near)


def views(
    windows: Sequence[int], heads: Sequence[int | str], bits: Sequence[int]
) -> list[View]:
    """Return the whole cache, every window with every head, and the copies."""
    return [
        View(),
        *(View(window, head) for window in windows for head in heads),
        *(View(bits=number) for number in bits),
    ]


def draft_params_of(params: Any, name: str) -> PolicyParams:
    """Return parameters with the draft of this name in `CONFIGS`."""
    config = CONFIGS[name]
    if config is None:
        return PolicyParams(params, params)
    return draft_of(params, Format(name, config, config))
