"""Some types of models, each of a structure of its own, judged as `make families` judges all; and the page of all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from families.build import all_types
from families.judge import judge
from families.table import PAGE, RESULTS, Results, page

SAMPLE = {
    "zamba2": "two kinds of blocks that are called in two ways",
    "gemma4_text": "blocks are handed what none of them reads",
    "longcat_flash": "a router that may choose experts which do nothing",
    "emu3": "a class that no Auto class loads again",
    "bart": "the decoder of a model that has an encoder too",
    "rwkv": "no attention",
}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_works(model_type: str, tmp_path: Path) -> None:
    verdict = judge(model_type, all_types("text")[model_type], "text", tmp_path)
    assert (verdict.result, verdict.reason) == ("works", "")
    assert verdict.matrices


def test_the_classifier_works(tmp_path: Path) -> None:
    verdict = judge("vit", all_types("images")["vit"], "images", tmp_path)
    assert (verdict.result, verdict.reason) == ("works", "")


def test_what_shares_between_its_blocks_is_refused_by_name(tmp_path: Path) -> None:
    verdict = judge("gemma3n_text", all_types("text")["gemma3n_text"], "text", tmp_path)
    assert verdict.result == "refused"
    assert "model.layers.2 is given something that depends on what earlier blocks computed" in verdict.reason


@pytest.mark.skipif(not RESULTS.exists(), reason="make families was not run")
def test_the_page_says_what_the_results_say() -> None:
    results = Results.read()
    assert PAGE.read_text(encoding="utf-8") == page(results)
    counts = Counter(verdict.result for verdict in results.verdicts)
    assert counts["works"] >= 150
    assert counts["wrong"] == 0
