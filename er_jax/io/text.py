"""Text to token ids and back: tokenizer, chat template, end tokens of a checkpoint.

Needs the extra `hf`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from er_jax.io.hf_save import COMPANIONS
from er_jax.io.json_fields import is_file, read_json, refusal

Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """The tokenizer of a checkpoint, as rollouts need it.

    tokenizer: of `transformers`. stop_token_ids: end tokens of completions.
    """

    tokenizer: Any
    stop_token_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included; the model may have more."""
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the ids of a rollout's prompt.

        Args:
          prompt: a user's message, or a conversation of {"role", "content"}. The chat
            template formats it, up to the start of the model's answer; without a
            template, a text is encoded as it is.
        Raises:
          ValueError: a conversation without a template.
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
        """Return the text of ids; special tokens are dropped."""
        ids = [int(token) for token in tokens]
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load_tokenizer(directory: str | os.PathLike[str]) -> TextTokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
      directory: with the tokenizer's files. The end tokens come from
        generation_config.json, else from config.json, else from the tokenizer.
    Raises:
      ImportError: the extra `hf` is not installed.
      ValueError: no tokenizer, or damaged files; or no end token, or one that is not a
        token id.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            'tokenizers need transformers; install it with pip install "er-jax[hf]"'
        ) from error
    path = Path(directory)
    found = [name for name in COMPANIONS if is_file(path / name)]
    if "tokenizer_config.json" not in found:
        raise ValueError(
            f"{path} has no tokenizer (tokenizer_config.json); copy the tokenizer's "
            "files there"
        )
    stops = _stops(path)
    try:
        # With trust_remote_code unset, it would ask on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    # A damaged file can raise any exception of its reader.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{path}: the tokenizer cannot be loaded ({reason}); copy the tokenizer's "
            "files again"
        ) from error
    if not stops and tokenizer.eos_token_id is not None:
        stops = (tokenizer.eos_token_id,)
    if not stops:
        raise ValueError(
            f"{path} does not say where completions end; give eos_token_id in "
            "generation_config.json"
        )
    return TextTokenizer(tokenizer, stops)


def _stops(path: Path) -> tuple[int, ...]:
    """Return the end tokens that a checkpoint's settings name, if any."""
    for file in (path / "generation_config.json", path / "config.json"):
        found = read_json(file).get("eos_token_id") if is_file(file) else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        # Compared by type, because isinstance would take true for a number.
        if not ids or any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            words = "a token id, or a list of them,"
            raise refusal(file, "eos_token_id", found, words)
        return tuple(ids)
    return ()
