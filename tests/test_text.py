"""Tokenizers of checkpoints: prompts in their template, ends, text back."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest

from er_jax.text import load_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<model>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


def make_tokenizer(directory: Path, *, template: bool = True) -> None:
    """Write a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = string.digits + string.ascii_lowercase + "+-*/=;: ?."
    vocab = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens=SPECIAL[3:],
    )  # fmt: skip
    if template:
        fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


def test_a_prompt_is_put_into_the_template(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("1+") == [6, 41]
    wanted = [3, 6, 41, 6, 2, 4]  # <user>1+1</s><model>
    assert tokenizer.encode_prompt("1+1") == wanted
    said = [{"role": "user", "content": "1+1"}]
    assert tokenizer.encode_prompt(said) == wanted
    assert tokenizer.decode([6, 41, 6, 2]) == "1+1"


def test_without_a_template_text_is_taken_as_it_is(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, template=False)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_prompt("1+1") == [6, 41, 6]
    with pytest.raises(ValueError, match="has no chat template; give it as one text"):
        tokenizer.encode_prompt([{"role": "user", "content": "1+1"}])


def test_ends_come_from_the_generation_settings(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).stop_token_ids == (2,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert load_tokenizer(tmp_path).stop_token_ids == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    assert load_tokenizer(tmp_path).stop_token_ids == (2, 4)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer \(tokenizer_config.json\)"):
        load_tokenizer(tmp_path)
