"""Text and token ids passed from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import coprune
from coprune.base.errors import BadInput
from coprune.data.in_memory import given_data, given_samples, handed_over
from coprune.data.windows import calibration_windows, evaluation_tokens, fingerprint
from coprune.run.read_call import read_call
from support.pico_folder import save_pico

TEXTS = [f"Sentence {i} tells of {i * i} trees, and of nothing else." for i in range(120)]
SETTINGS: dict[str, Any] = {"method": "wanda", "seqlen": 16, "quiet": True}


def named(value: Any, **others: Any) -> dict[str, Any]:
    with handed_over({"dataset": value, **others}, "dataset", "eval_data") as found:
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("given") / "llama")


def test_given_texts_are_named_by_content_and_names_are_kept() -> None:
    first, second, third = (named(value)["dataset"] for value in (TEXTS, list(TEXTS), TEXTS[1:]))
    assert first == second != third
    assert first.startswith("given:")
    assert named("c4") == {"dataset": "c4"}
    assert named("c4", eval_data=["ptb", "wikitext2"]) == {"dataset": "c4", "eval_data": ["ptb", "wikitext2"]}


def test_passed_data_exists_during_the_call() -> None:
    with handed_over({"dataset": TEXTS}, "dataset", "eval_data") as found:
        assert given_data(found["dataset"]) is not None
    with pytest.raises(BadInput, match="is data from an earlier Python call"):
        given_data(found["dataset"])
    assert given_data("c4") is None


def test_token_ids_set_the_default_number_of_samples() -> None:
    ids = torch.arange(32).view(4, 8)
    with handed_over({"dataset": ids}, "dataset", "eval_data") as found:
        assert given_samples(found["dataset"]) == {"nsamples": 4, "seqlen": 8}
        recipe, _ = read_call("model", None, "balanced", None, found)
        assert (recipe.calibrate.samples, recipe.calibrate.seqlen) == (4, 8)
        recipe, _ = read_call("model", None, None, None, found | {"nsamples": 2})
        assert recipe.calibrate.samples == 2
    assert given_samples("c4") == {}
    assert named(ids)["dataset"] != named(ids.view(8, 4))["dataset"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "not of type int"),
        ([1, 2], "not of type list"),
        (datasets.DatasetDict(), "take one split"),
        (torch.rand(2, 8), r"this tensor is \(2, 8\) float32"),
        (torch.zeros(0, 8, dtype=torch.int64), r"this tensor is \(0, 8\) int64"),
        (torch.tensor([[-1, 2]]), "whole numbers from 0"),
        (["", "  "], "holds no text"),
        (datasets.Dataset.from_dict({"number": [1, 2]}), "no column named 'text'"),
        (datasets.Dataset.from_dict({"input_ids": [[1, 2], [1]]}), "have 2 lengths"),
    ],
)
def test_unusable_values_are_refused_as_data(value: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        named(value)


def test_strings_a_dataset_and_a_file_give_the_same_samples(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.to_parquet(file)
    prints = set()
    kinds: list[Any] = [TEXTS, rows, str(file)]
    for data in kinds:
        report = coprune.prune(folder, dataset=data, nsamples=4, evaluate=False, **SETTINGS).report
        assert report.calibration is not None
        prints.add(report.calibration.fingerprint)
    assert len(prints) == 1


def test_token_ids_are_the_samples_and_need_no_tokenizer(folder: Path) -> None:
    model = coprune.prune(folder, dataset=TEXTS, nsamples=4, evaluate=False, **SETTINGS).model
    assert model is not None
    ids = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    held_out = torch.randint(64, (160,), generator=torch.Generator().manual_seed(1))
    report = coprune.prune(model, dataset=ids, eval_data={"mine": held_out}, **SETTINGS).report
    assert report.calibration is not None
    assert (report.calibration.nsamples, report.calibration.fingerprint) == (6, fingerprint(ids))
    [entry] = report.perplexity
    assert entry.data.startswith("given:mine:")
    assert (entry.windows, entry.pruned_bits_per_byte) == (10, None)
    assert entry.pruned == pytest.approx(coprune.perplexity(model, held_out, 16).value)


def test_samples_of_other_sizes_and_unknown_tokens_are_refused(folder: Path) -> None:
    ids = torch.randint(64, (6, 16))
    with pytest.raises(BadInput, match="there are 6 samples, fewer than 7"):
        coprune.prune(folder, dataset=ids, nsamples=7, **SETTINGS)
    with pytest.raises(BadInput, match="the samples have 16 tokens, not 8"):
        coprune.prune(folder, dataset=ids, **SETTINGS | {"seqlen": 8})
    with pytest.raises(BadInput, match="the token id 1000000"):
        coprune.prune(folder, dataset=ids.clone().fill_(1_000_000), **SETTINGS)


def test_passed_text_is_measured_like_the_same_text_in_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(TEXTS), encoding="utf-8")
    [one] = coprune.evaluate(folder, {"mine": TEXTS}, seqlen=16, quiet=True).perplexity
    [other] = coprune.evaluate(folder, str(file), seqlen=16, quiet=True).perplexity
    assert (one.value, one.fingerprint, one.bits_per_byte) == (other.value, other.fingerprint, other.bits_per_byte)
    estimate = coprune.estimate(folder, dataset=TEXTS, nsamples=4, eval_data={"mine": TEXTS}, **SETTINGS)
    assert estimate.peak_bytes > 0


def test_token_ids_serve_as_calibration_windows_and_evaluation_stream() -> None:
    ids = torch.arange(40).view(5, 8)
    with handed_over({"dataset": ids, "data": ids}, "dataset", "data") as found:
        assert calibration_windows(found["dataset"], None, 3, 8, 0).tokens.equal(ids[:3])
        assert evaluation_tokens(found["data"], None, 10, limit_tokens=20).tokens.equal(ids.flatten()[:20])
