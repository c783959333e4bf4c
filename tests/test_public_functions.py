"""The functions of the public face do what the commands do, and return what can be looked at."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

import coprune
from support.pico_folder import save_pico, write_words

SMALL = {"nsamples": 4, "seqlen": 32, "quiet": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pico model, a text to calibrate on and one to measure on."""
    folder = tmp_path_factory.mktemp("place")
    save_pico(folder / "model", num_hidden_layers=2)
    write_words(folder / "words.txt")
    write_words(folder / "test.txt", count=200, seed=1)
    return folder


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def pruned(place):
    """The pico model pruned to 2:4 in memory."""
    texts = {"dataset": str(place / "words.txt"), "eval_data": str(place / "test.txt")}
    return coprune.prune(place / "model", pattern="2:4", **texts, **SMALL)


def test_a_result_holds_what_the_model_reads_with(pruned):
    assert isinstance(pruned.processor, PreTrainedTokenizerBase)
    assert pruned.tokenizer is pruned.processor
    assert pruned.model is not None


def test_a_streamed_result_has_the_tokenizer_too(inside, tmp_path):
    found = coprune.prune(
        "model", dataset="words.txt", stream=True, save_model=tmp_path / "out", evaluate=False, **SMALL
    )
    assert found.model is None
    assert isinstance(found.tokenizer, PreTrainedTokenizerBase)


def test_a_result_shows_itself_in_one_line(pruned, place):
    figures = pruned.report.perplexity[0]
    headline = (
        f"model: wanda 2:4, 50.00% zeros, perplexity {figures.dense:.2f} → {figures.pruned:.2f} on {place}/test.txt"
    )
    assert repr(pruned) == f"<Result of {headline}>"
    assert repr(pruned.report) == f"<Report of {headline}>"


def test_a_result_prints_and_renders_its_figures(pruned, place):
    lines = str(pruned).splitlines()
    assert lines[0] == f"model     {place}/model, 94,528 parameters, float32"
    assert lines[2].startswith("sparsity  50.0000% of the 14 pruned matrices")
    assert [line.split()[0] for line in lines] == ["model", "method", "sparsity", "perplexity", "took"]
    html = pruned._repr_html_()
    assert html.count("<tr>") == len(lines)
    assert f"<td>{place}/model, 94,528 parameters, float32</td>" in html
