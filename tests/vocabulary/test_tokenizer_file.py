"""A damaged `tokenizer.json` is refused in one line, before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coprune
from coprune.base.errors import BadInput, UnsupportedModel
from coprune.vocabulary.kinds import Vocabulary, kind_of
from support.commands import run_command
from support.vocabularies import KINDS, content_of, save_with_tokens


def template(content: dict[str, Any], number: Any) -> None:
    content["post_processor"]["special_tokens"]["<s>"]["ids"] = [number]


def first_merge(content: dict[str, Any], merge: Any) -> None:
    content["model"]["merges"][0] = merge


def first_word(content: dict[str, Any], number: Any) -> None:
    vocab = content["model"]["vocab"]
    vocab[next(iter(vocab))] = number


def bert(content: dict[str, Any], number: Any) -> None:
    processor = {"type": "BertProcessing", "sep": ["</s>", number], "cls": ["<s>", 1]}
    content["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, processor]}


DAMAGED: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "template beyond": ("bytes", lambda content: template(content, 5000), "name the token 5000"),
    "template negative": ("bytes", lambda content: template(content, -1), "special_tokens.<s>.ids.0 cannot be -1"),
    "template of text": ("bytes", lambda content: template(content, "2"), "special_tokens.<s>.ids.0 cannot be '2'"),
    "bert beyond": ("wordpiece", lambda content: bert(content, 10**12), "name the token 1000000000000"),
    "padding beyond": ("bytes", lambda content: content.update(padding={"pad_id": 2048}), "name the token 2048"),
    "unknown beyond": ("unigram", lambda content: content["model"].update(unk_id=4096), "name the token 4096"),
    "no scores": ("unigram", lambda content: content["model"].update(vocab=[["a"]]), "vocab.0"),
    "no words": ("unigram", lambda content: content["model"].update(vocab=[]), "vocab"),
    "merge of three": ("bytes", lambda content: first_merge(content, "a b c"), "merges.0"),
    "merge of one": ("bytes", lambda content: first_merge(content, ["a"]), "merges.0"),
    "no merges": ("bytes", lambda content: content["model"].pop("merges"), "merges is missing"),
    "twice": ("bytes", lambda content: first_word(content, 7), "two tokens have the same id"),
    "half an id": ("wordpiece", lambda content: first_word(content, 0.5), "cannot be 0.5"),
    "no model": ("bytes", lambda content: content.pop("model"), "model is missing"),
    "added without id": ("bytes", lambda content: content["added_tokens"][0].pop("id"), "added_tokens.0.id is missing"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_tokenizer_is_refused_in_one_line(case: str) -> None:
    kind, damage, said = DAMAGED[case]
    content = json.loads(content_of(kind))
    damage(content)
    with pytest.raises(BadInput, match=r"tokenizer\.json is damaged") as caught:
        Vocabulary.of(content)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_valid_tokenizers_are_accepted(kind: str) -> None:
    assert len(Vocabulary.of(json.loads(content_of(kind))).tokens) > 900


@pytest.mark.parametrize("kind", ["WordLevel", None])
def test_unsupported_tokenizer_models_are_refused_by_name(kind: str | None) -> None:
    with pytest.raises(UnsupportedModel, match=str(kind)):
        kind_of({"model": {"type": kind, "vocab": {"a": 0}}})


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    folder = save_with_tokens(tmp_path / "dense")
    content = json.loads((folder / "tokenizer.json").read_text())
    template(content, 5000)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_the_command_prints_one_line_and_writes_nothing(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "run"
    ended = run_command(
        ["prune", str(damaged), "--remove", "vocabulary=704", "--dataset", "embedded", "--save", str(save)],
        monkeypatch,
        capsys,
    )
    assert ended.code == 2
    assert "name the token 5000" in ended.err
    assert "Traceback" not in ended.err
    assert not save.exists()


def test_an_initial_token_without_a_row_is_refused(tmp_path: Path) -> None:
    folder = save_with_tokens(tmp_path / "dense", vocab_size=1023)
    content = json.loads((folder / "tokenizer.json").read_text())
    template(content, 1023)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match="no row for it"):
        coprune.prune(folder, remove="vocabulary=704", evaluate=False, quiet=True)
