"""Empty answers: which count as empty, and where they are reported."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import coprune
from coprune.evaluation.answers.answer_facts import AnswerFacts, Asked, facts_of, judge
from coprune.evaluation.answers.answer_records import Answered, Answers, is_empty
from coprune.recipe.answers import read_conditions
from coprune.report.answers_section import answers_markdown, answers_section
from coprune.report.view import Page
from support.pico_folder import save_pico

ASKED = Asked(prompts="builtin", fingerprint="f", chat=False, new_tokens=64, temperature=0.8, seed=0)
LOOP = "no " * 24
SPOKEN = "It is the capital of France and lies on the Seine ."


@pytest.mark.parametrize("text", ["", " \n\t", "...", "“ ”", "```\n```", "\u200b", "。", "- \n-"])
def test_white_space_and_punctuation_count_as_empty(text: str) -> None:
    assert is_empty(text)


@pytest.mark.parametrize("text", ["I", " 4.", "√", "😀", "你", "$", "…no"])
def test_an_answer_with_a_letter_digit_or_symbol_is_not_empty(text: str) -> None:
    assert not is_empty(text)


def said(*texts: str) -> tuple[Answered, ...]:
    """Return answers with a token per word and an end token, which loops never reach."""
    found = []
    for text in texts:
        tokens = [sum(word.encode()) + 10 for word in text.split()] + ([] if text == LOOP else [2])
        found.append(Answered(text=text, tokens=tuple(tokens), ended=text != LOOP))
    return tuple(found)


def facts(dense: tuple[str, ...] | None, *texts: str, sampled: tuple[str, ...] = ()) -> AnswerFacts:
    other = None if dense is None else Answers(greedy=said(*dense), sampled=said(*(SPOKEN for _ in sampled)))
    model = Answers(greedy=said(*texts), sampled=said(*sampled))
    return facts_of(ASKED, ["?"] * len(texts), (other, model))


@pytest.mark.parametrize(
    ("dense", "texts", "verdict", "ill"),
    [
        ((SPOKEN,) * 3, (SPOKEN,) * 3, "none of 3 answers loops or is empty; dense 0", False),
        (None, (SPOKEN,) * 3, "none of 3 answers loops or is empty", False),
        (None, (".", "", SPOKEN), "2 of 3 answers are empty", True),
        ((SPOKEN, SPOKEN, ""), ("", SPOKEN, SPOKEN), "1 of 3 answers is empty; dense 1", False),
        ((SPOKEN,) * 3, (SPOKEN, SPOKEN, "."), "1 of 3 answers is empty; dense 0", True),
        ((SPOKEN,) * 3, (LOOP, LOOP, SPOKEN), "2 of 3 answers loop; dense 0", True),
        ((SPOKEN,) * 4, (LOOP, LOOP, "", ""), "2 of 4 answers loop and 2 are empty; dense 0 and 0", True),
        ((SPOKEN, ""), (LOOP, SPOKEN), "1 of 2 answers loops and none is empty; dense 0 and 1", True),
        ((LOOP, SPOKEN), (SPOKEN, ""), "none of 2 answers loops and 1 is empty; dense 1 and 0", True),
        # An answer that ends after one word is too short, but not empty.
        (
            (SPOKEN,) * 2,
            ("The", "The"),
            "none of 2 answers loops or is empty; dense 0; 2.0 tokens an answer, dense 13.0",
            True,
        ),
        (
            (SPOKEN,) * 2,
            ("", "."),
            "2 of 2 answers are empty; dense 0; 1.5 tokens an answer, dense 13.0",
            True,
        ),
    ],
)
def test_the_verdict_counts_empty_answers(
    dense: tuple[str, ...] | None, texts: tuple[str, ...], verdict: str, ill: bool
) -> None:
    found = facts(dense, *texts)
    assert found.verdict() == verdict
    assert found.degenerates == ill


def test_conditions_on_empty_answers_cover_greedy_and_sampled_ones() -> None:
    found = facts((SPOKEN, ""), "", ".", sampled=(SPOKEN, ""))
    conditions = read_conditions("empty<=dense+1,empty<=dense,sampled.empty<=dense,sampled.empty<2,loops<1")
    judged = judge(conditions, found)
    assert [one.holds for one in judged] == [True, False, False, True, True]
    assert judged[1].line() == "empty<=dense does not hold (2, dense 1, difference -1.3 to +1.9)"


@pytest.mark.parametrize(
    ("dense", "text", "failed"),
    [
        ((SPOKEN, SPOKEN), "loops<1", ["empty<=dense"]),
        (None, "loops<1", ["empty<=0"]),
        (("", ""), "loops<1", []),
        ((SPOKEN, SPOKEN), "loops<1,empty<=2", []),
        ((SPOKEN, SPOKEN), "sampled.loops<1,empty<=2", ["sampled.empty<=dense"]),
        ((SPOKEN, SPOKEN), "sampled.loops<1,sampled.empty<=2", []),
    ],
)
def test_empty_answers_fail_the_gate_unless_a_condition_allows_them(
    dense: tuple[str, ...] | None, text: str, failed: list[str]
) -> None:
    found = facts(dense, "", ".", sampled=("", SPOKEN))
    judged = judge(read_conditions(text), found)
    assert [one.condition for one in judged if not one.holds] == failed


def test_lines_card_and_page_report_empty_greedy_and_sampled_answers() -> None:
    found = facts((SPOKEN,) * 13, *(SPOKEN,) * 2, *("",) * 11, sampled=(SPOKEN, *("",) * 12))
    lines = dict(found.lines())
    assert "empty 11 of 13 (dense 0 of 13)" in lines["greedy"]
    assert "empty 12 of 13 (dense 0 of 13)" in lines["T = 0.8"]
    card = answers_markdown(found, ())
    assert "**11 of 13 answers are empty; dense 0" in card
    assert "| answers that are empty | 0 of 13 | 11 of 13 | 0 of 13 | 12 of 13 |" in card
    page = Page("", "", [], [answers_section(found, ())]).html()
    assert '<p class="warn">11 of 13 answers are empty' in page
    # Empty samples are shown first.
    assert page.count("pruned, empty") == 11
    assert page.rindex("pruned, empty") < page.rindex('pruned">pruned<')


def test_a_model_that_ends_at_once_fails_every_requirement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_pico(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Blocks that add nothing, and a head that only predicts the end token.
            parameter.fill_(float("embed" in name or "norm" in name))
        model.lm_head.weight[2] = 1
    model.save_pretrained(tmp_path / "mute")
    for file in (tmp_path / "dense").glob("*token*"):
        shutil.copy(file, tmp_path / "mute")
    asked: dict[str, Any] = {"generate": "builtin", "generate_prompts": 2, "generate_tokens": 2, "quiet": True}
    found = coprune.evaluate(tmp_path / "mute", against=tmp_path / "dense", **asked).answers
    assert found is not None
    assert found.verdict() == "2 of 2 answers are empty; dense 0"
    assert [one.holds for one in judge(read_conditions("loops<=dense+1,empty<=dense+1"), found)] == [True, False]
    unsaid = coprune.evaluate(tmp_path / "mute", against=tmp_path / "dense", require="loops<=dense", **asked).required
    assert [one.line() for one in unsaid if not one.holds] == [
        "empty<=dense does not hold (2, dense 0, difference -1.2 to +2)"
    ]
    assert found.sampled is not None
    assert found.sampled.figures.empty == 2
