"""Text in, text out: tokenizer, chat template and end tokens of a checkpoint.

Needs the extra `hf`. Left out: any model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from er_jax.io.hf_config import is_file, read_json, refusal
from er_jax.io.hf_save import COMPANIONS

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
      ValueError: no tokenizer there, or damaged files; or nothing says where
        completions end, or something that is no token id.
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
        # False, or it would ask on the terminal whether to run a checkpoint's code.
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    # Damaged files end in whatever their reader meets first.
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
    """Return the end tokens that a checkpoint's settings name; none if they do not."""
    for file in (path / "generation_config.json", path / "config.json"):
        found = read_json(file).get("eos_token_id") if is_file(file) else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        # By type: true is no id.
        if not ids or any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            words = "a token id, or a list of them,"
            raise refusal(file, "eos_token_id", found, words)
        return tuple(ids)
    return ()
