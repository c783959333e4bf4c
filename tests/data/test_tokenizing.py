"""Damaged or malicious tokenizers give one message, where Rust would panic or produce endless text."""

from __future__ import annotations

import base64
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from coprune.base.errors import BadInput
from coprune.data.tokenizing import encode
from coprune.model.checkpoint.foreign_tokenizer import check_tokenizer
from coprune.model.checkpoint.load import load_tokenizer
from coprune.model.checkpoint.locate import ModelFolder
from support.pico_folder import pico_tokenizer

Change = Callable[[dict[str, Any]], object]


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def normalizers(*steps: dict[str, Any]) -> Change:
    return lambda made: made.update(normalizer={"type": "Sequence", "normalizers": list(steps)})


def changed(folder: Path, change: Change) -> Path:
    pico_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def panic(made: dict[str, Any]) -> None:
    made["model"] = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"], "unk_token": None}


def garbage(made: dict[str, Any]) -> None:
    garbled = base64.b64encode(b"\xff" * 64).decode()
    made["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": garbled}


@pytest.mark.parametrize(
    "change", [panic, garbage, lambda made: made.pop("model"), lambda made: made.update(version="9")]
)
def test_a_damaged_tokenizer_is_one_message(change: Change, tmp_path: Path) -> None:
    folder = changed(tmp_path, change)
    with pytest.raises(BadInput, match=r"cannot be loaded by transformers|cannot encode 'w5'"):
        encode(load_tokenizer(ModelFolder(folder, "mine")), "w5")


def test_a_text_that_a_tokenizer_cannot_encode_is_one_message() -> None:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="[UNK]")))
    with pytest.raises(BadInput, match="the tokenizer cannot encode 'bbbb"):
        encode(made, "b" * 1000)


@pytest.mark.parametrize(
    "change",
    [
        normalizers(*[replace({"String": "e"}, "ee")] * 20),
        normalizers(*[replace({"Regex": "."}, "xy")] * 20),
        normalizers(*[replace({"Regex": r"\p{L}*"}, "x")] * 20),
        normalizers({"type": "Prepend", "prepend": "x" * 100}),
        lambda made: made.update(decoder={"type": "Sequence", "decoders": [replace({"String": "a"}, "b" * 9)] * 9}),
    ],
)
def test_endless_replacements_are_refused_before_any_is_made(change: Change, tmp_path: Path) -> None:
    folder = changed(tmp_path, change)
    with pytest.raises(BadInput, match=r"tokenizer\.json lengthens a text up to [\d,]+ times"):
        load_tokenizer(ModelFolder(folder, "mine"))


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("(?:(?:(?:(?:a?){999}){999}){999}){999}", "cannot be loaded by transformers"),
        ("(a+)+$", "holds a pattern that takes too many steps"),
        (r".*.*.*.*.*.*.*\d", "holds a pattern that takes too many steps"),
    ],
)
def test_an_endless_pattern_is_refused_within_seconds_and_little_memory(
    pattern: str, told: str, tmp_path: Path
) -> None:
    folder = changed(tmp_path, normalizers(replace({"Regex": pattern}, "x")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadInput, match=told):
        load_tokenizer(ModelFolder(folder, "mine"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 300_000  # kilobytes


def test_usual_normalizers_are_accepted(tmp_path: Path) -> None:
    usual = [
        replace({"String": " "}, "▁"),
        replace({"Regex": " {2,}"}, " "),
        {"type": "Prepend", "prepend": "▁"},
        {"type": "NFKC"},
    ]
    check_tokenizer(
        changed(tmp_path, normalizers(*usual, *[replace({"Regex": "(?:ab){2}"}, "d")] * 40)) / "tokenizer.json"
    )
