"""Text in, text out: tokenizer, chat template and end tokens of a checkpoint.

Needs the extra `hf`. Left out: any model.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A checkpoint's tokenizer as rollouts need it.

    tokenizer: of `transformers`. stop_token_ids: where completions end, from the
    generation settings. vocab_size: ids that it knows; a model may have more.
    """

    tokenizer: Any
    stop_token_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """Ids, added tokens included."""
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with nothing added to it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return what a rollout is given.

        Args:
          prompt: what a user says, or a whole conversation of {"role", "content"}. It
            is put into the chat template, up to where the model answers; a checkpoint
            without a template takes text only, and as it is.
        Raises:
          ValueError: a conversation, and no template.
        """
        if self.tokenizer.chat_template is None:
            if not isinstance(prompt, str):
                raise ValueError(
                    "prompt is a conversation, but the checkpoint has no chat "
                    "template; give it as one text"
                )
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            list(prompt), tokenize=False, add_generation_prompt=True
        )
        return self.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ids, without special tokens."""
        ids = [int(token) for token in tokens]
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load_tokenizer(directory: str | os.PathLike[str]) -> TextTokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
      directory: with the tokenizer's files. Completions end where
        generation_config.json says, else config.json, else the tokenizer itself.
    Raises:
      ImportError: the extra `hf` is not installed.
      ValueError: no tokenizer there, or nothing says where completions end.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            'tokenizers need transformers; install it with pip install "er-jax[hf]"'
        ) from error
    path = Path(directory)
    if not (path / "tokenizer_config.json").exists():
        raise ValueError(
            f"{path} has no tokenizer (tokenizer_config.json); copy the tokenizer's "
            "files there"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    found: Any = None
    for name in ("generation_config.json", "config.json"):
        if found is None and (path / name).exists():
            found = json.loads((path / name).read_text("utf-8")).get("eos_token_id")
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise ValueError(
            f"{path} does not say where completions end; give eos_token_id in "
            "generation_config.json"
        )
    stops = tuple(found) if isinstance(found, Sequence) else (found,)
    return TextTokenizer(tokenizer, stops)
