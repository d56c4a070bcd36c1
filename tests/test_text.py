"""Tokenizers of checkpoints: prompts in their template, ends, text back."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest

from er_jax.io.text import load_tokenizer
from tests.test_hf_damage import pipe

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


BAD_ENDS: list[Any] = [
    True, -1, 2.0, 2**31, "x", "2", "", [], [None], [2, True], [2, "3"], [[2]], {},
    {"a": 2},
]  # fmt: skip


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_ends_that_are_no_ids_are_refused(name: str, tmp_path: Path) -> None:
    """None is turned into something else: the text "23" is not the ids 2 and 3."""
    make_tokenizer(tmp_path)
    for bad in BAD_ENDS:
        (tmp_path / name).write_text(json.dumps({"eos_token_id": bad}))
        with pytest.raises(ValueError) as caught:
            load_tokenizer(tmp_path)
        message = str(caught.value)
        assert f"{tmp_path / name} says eos_token_id=" in message, (bad, message)
        assert "only a token id" in message and "\n" not in message, (bad, message)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "[" * 100_000, "\0"])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_damaged_settings_are_refused(name: str, text: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="copy it again") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"3", b'"x"', b"\xff{}", b"{}"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_refused(name: str, data: bytes, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    if (name, data) == ("tokenizer_config.json", b"{}"):
        return  # all of it may be lacking
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="copy the tokenizer's files") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_only_files_are_read(tmp_path: Path) -> None:
    """A pipe would be waited on for ever."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        make_tokenizer(tmp_path)
        with pipe(tmp_path / name):
            with pytest.raises(ValueError, match=rf"{name} is not a regular file"):
                load_tokenizer(tmp_path)
        (tmp_path / name).unlink()


def test_code_that_a_checkpoint_brings_is_never_run(tmp_path: Path) -> None:
    """And nobody is asked on the terminal whether it may."""
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    fields["auto_map"] = {"AutoTokenizer": [None, "tokenization_x.Tokenizer"]}
    fields["tokenizer_class"] = "Tokenizer"
    path.write_text(json.dumps(fields))
    (tmp_path / "tokenization_x.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="copy the tokenizer's files"):
        load_tokenizer(tmp_path)
