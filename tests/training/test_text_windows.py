"""Training text: packed without padding, held out at its end, sampled by a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coprune.base.errors import BadInput
from coprune.recipe.views import training_recipe
from coprune.training.training_data import read_training_text
from support.pruned import settings_for
from support.word_tokenizers import word_tokenizer, words


def read(tmp_path: Path, path: Path, **changes: Any) -> Any:
    return read_training_text(
        training_recipe(settings_for(tmp_path / "run", tmp_path, path, **changes)), word_tokenizer(), 8
    )


def test_windows_are_the_text_in_order_and_its_end_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(words(0, 805))
    text = read(tmp_path, path, held_out=0.1)
    assert torch.equal(text.train.tokens.flatten(), torch.arange(720))
    assert torch.equal(text.held_out.tokens.flatten(), torch.arange(720, 800))
    item = text.train[3]
    assert torch.equal(item["input_ids"], torch.arange(24, 32))
    assert torch.equal(item["labels"], item["input_ids"])
    assert read(tmp_path, path).held_out is None


@pytest.mark.parametrize(("tokens", "held_out"), [(None, 5), (8 * 125, 5), (8 * 50, 2), (8 * 3, 1)])
def test_a_short_training_holds_out_little(tmp_path: Path, tokens: int | None, held_out: int) -> None:
    path = tmp_path / "text.txt"
    path.write_text(words(0, 805))
    text = read(tmp_path, path, held_out=0.05, tokens=tokens, max_steps=None)
    assert len(text.held_out) == held_out
    assert len(text.train) == 100 - held_out


def test_a_text_of_less_than_two_windows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(words(0, 15))
    with pytest.raises(BadInput, match=r"too short.*15 tokens.*two windows of 8"):
        read(tmp_path, path)


def test_invalid_training_settings_are_refused(tmp_path: Path) -> None:
    good = settings_for(tmp_path, tmp_path, tmp_path)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"mode": "distill"}, "teacher=…"),
        ({"rank": 0}, "rank cannot be 0"),
        ({"save_model": tmp_path}, "the same"),
        ({"learning_rte": 1.0}, "did you mean 'learning_rate'"),
    ]
    for changes, message in refused:
        with pytest.raises(BadInput, match=message):
            training_recipe({**good, **changes})
    assert json.loads(training_recipe(good).model_dump_json())["finetune"] == "lora"
    assert training_recipe({**good, "learning_rate": None}).train.rate == 1e-4


def test_text_held_out_for_perplexity_is_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(words(0, 805))
    text = read(tmp_path, path, evaluate=True)
    assert int(text.train.tokens.max()) == 719  # the held-out last tenth is 80 of 805 tokens, with windows of 8
    other = read(tmp_path, path, evaluate=True, eval_data=str(path))
    assert int(other.train.tokens.max()) == 799
