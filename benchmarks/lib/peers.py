"""The baseline of another library: `transformers.generate` on the same task.

It samples the same weights, prompts and lengths by its own loop with its own dynamic
cache, in batches of as many prompts as there are slots, in order. A batch runs until
its last row ends. Its noise is another, so tokens differ, but every row ends at the
length that the library's completion of the prompt had.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import er_jax


class TransformersRunner:
    """`transformers.generate` on a task, on the CPU.

    Args:
      policy, params: the decoder, saved by `er_jax.save_hf` and loaded from there.
      prompts: token ids. lengths: tokens to sample after each. slots: rows of a batch.
    """

    def __init__(
        self,
        policy: er_jax.Decoder,
        params: Any,
        prompts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        slots: int,
    ) -> None:
        import transformers

        self.prompts, self.lengths, self.slots = prompts, lengths, slots
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch, "policy")
            er_jax.save_hf(directory, policy, params)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=policy.config.dtype
            ).eval()
        self.num_tokens: list[int] = []

    def run(self) -> float:
        """Sample every prompt's completion and return the seconds."""
        self.num_tokens = []
        start = time.perf_counter()
        for first in range(0, len(self.prompts), self.slots):
            batch = slice(first, first + self.slots)
            self._generate(self.prompts[batch], self.lengths[batch])
        return time.perf_counter() - start

    def _generate(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> None:
        import torch

        width = max(map(len, prompts))
        ids = np.zeros((len(prompts), width), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        ends = torch.tensor(lengths) + width

        def is_over(tokens: Any, scores: Any, **unused: Any) -> Any:
            del scores, unused
            return tokens.shape[1] >= ends

        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(lengths),
                pad_token_id=0,
                eos_token_id=None,
                stopping_criteria=[is_over],
            )
        assert out.shape[1] == width + max(lengths)
        self.num_tokens += lengths
