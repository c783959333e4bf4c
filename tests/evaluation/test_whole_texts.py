"""Encoders of whole texts: their metrics against the model's own forwards, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import coprune
from coprune.base.errors import BadInput
from coprune.data.marks import Marks
from support.pico_folder import words_of, write_words
from support.pico_readers import FIRST, LAST, MASK, add_sentence_modules, marking_tokenizer, save_reader

LENGTH = 16
SETTINGS: dict[str, Any] = dict(seqlen=LENGTH, quiet=True)
PRUNING: dict[str, Any] = dict(nsamples=8, seqlen=LENGTH, sparsity=0.6, quiet=True, layer_error=False, overwrite=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readers")
    write_words(folder / "words.txt", 600)
    return folder


def windows(place: Path) -> Tensor:
    """Return the text's windows as the model reads them, with special tokens around them."""
    ids = marking_tokenizer()((place / "words.txt").read_text(), verbose=False)["input_ids"]
    found = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    found[:, 0], found[:, -1] = FIRST, LAST
    return found


def pruned(model: Path, place: Path, stream: bool, data: Path | None = None, **settings: Any) -> Any:
    out = place / f"{model.name}-{stream}"
    return coprune.prune(
        model,
        "wanda",
        eval_data=data or place / "words.txt",
        stream=stream,
        save=out / "run",
        save_model=out / "model",
        **PRUNING | {"dataset": place / "words.txt"} | settings,
    )


def test_windows_have_the_tokenizers_special_tokens_around_them() -> None:
    marks = Marks.of(marking_tokenizer())
    assert marks == Marks((FIRST,), (LAST,))
    assert marks.around(torch.tensor([[5, 6, 7, 8]])).tolist() == [[FIRST, 6, 7, LAST]]
    assert marks.around(torch.tensor([[5, 6]])).tolist() == [[5, 6]]


@torch.no_grad()
def masked_loss(folder: Path, place: Path) -> float:
    """Return the mean loss per token, each masked once together with every seventh."""
    model, total, count = AutoModelForMaskedLM.from_pretrained(folder), 0.0, 0
    for window in windows(place):
        for turn in range(7):
            where = [i for i in range(1, LENGTH - 1) if i % 7 == turn]
            tokens = window.clone()
            tokens[where] = MASK
            logits = model(input_ids=tokens[None]).logits[0]
            total += float(functional.cross_entropy(logits[where], window[where], reduction="sum"))
            count += len(where)
    return total / count


def test_pseudo_perplexity_equals_masked_forwards_streamed_and_in_memory(place: Path) -> None:
    model = save_reader(place / "masked", "BertForMaskedLM")
    expected = torch.tensor(masked_loss(model, place)).exp().item()
    (found,) = coprune.evaluate(model, place / "words.txt", **SETTINGS).perplexity
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.masked
    required = "perplexity<=dense*1.0001,perplexity>1"
    reports = [pruned(model, place, stream, require=required).report for stream in (True, False)]
    for report in reports:
        assert [one.holds for one in report.required] == [report.perplexity[0].pruned <= 1.0001 * expected, True]
        (facts,) = report.perplexity
        after = torch.tensor(masked_loss(report.saved_model, place)).exp().item()
        assert (facts.title, facts.dense) == ("pseudo-perplexity", pytest.approx(expected, rel=1e-5))
        assert facts.pruned == pytest.approx(after, rel=1e-5)
        assert report.model.task == "masked"


@torch.no_grad()
def vectors(folder: Path, place: Path, pooling: str) -> Tensor:
    hidden = AutoModel.from_pretrained(folder)(input_ids=windows(place)).last_hidden_state
    return functional.normalize(hidden[:, 0] if pooling == "cls" else hidden.mean(dim=1), dim=-1)


@pytest.mark.parametrize(("name", "stream"), [("BertModel", True), ("Qwen3Model", False)])
def test_embeddings_are_compared_with_the_dense_models_and_saved_complete(name: str, stream: bool, place: Path) -> None:
    model = save_reader(place / f"{name}-{stream}", name)
    pooling = {"pooling_mode_cls_token": True} if name == "BertModel" else {"pooling_mode": "mean"}
    add_sentence_modules(model, pooling)
    result = pruned(model, place, stream)
    (found,) = result.report.embeddings
    kind = "cls" if name == "BertModel" else "mean"
    before, after = (vectors(folder, place, kind) for folder in (model, result.report.saved_model))
    assert found.cosine == pytest.approx((before * after).sum(dim=1).mean().item(), abs=1e-3)
    near = []
    for side in (before, after):
        near.append((side @ side.T).fill_diagonal_(-2).topk(10).indices.tolist())
    same = [len(set(a) & set(b)) / 10 for a, b in zip(*near, strict=True)]
    assert found.overlap == pytest.approx(sum(same) / len(same), abs=0.02)
    saved = result.report.saved_model
    for file in (
        "modules.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
    ):
        assert (saved / file).read_bytes() == (model / file).read_bytes()
    assert json.loads((saved / "config.json").read_text())["architectures"] == [name]
    required = f"cosine>={found.cosine - 0.01},overlap>0.999"
    beside = coprune.evaluate(saved, place / "words.txt", against=model, require=required, **SETTINGS)
    assert [one.holds for one in beside.required] == [True, False]
    assert beside.near[0].cosine == pytest.approx(found.cosine, abs=1e-3)
    assert "vectors" not in beside.model_dump_json()
    (row,) = coprune.compare([model, saved], place / "words.txt", fresh=True, **SETTINGS).rows[1:]
    assert row.evaluation.near == beside.near


def labelled(place: Path, pairs: bool) -> tuple[Path, list[Any]]:
    texts = [words_of(5 + number % 3, number) for number in range(16)]
    lines = [
        {"text": text, "label": f"LABEL_{n % 2}"} | ({"text_pair": "w9 w10"} if pairs else {})
        for n, text in enumerate(texts)
    ]
    file = place / f"labelled-{pairs}.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file, lines


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("labels", [2, 1])
def test_accuracy_of_a_classifier_and_of_a_reranker(labels: int, pairs: bool, place: Path) -> None:
    model = save_reader(place / f"labels-{labels}", "BertForSequenceClassification", num_labels=labels)
    file, lines = labelled(place, pairs)
    if labels == 1:
        file.write_text("\n".join(json.dumps(line | {"label": n % 2}) for n, line in enumerate(lines)))
    right = []
    classifier, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
    )
    for number, line in enumerate(lines):
        texts = [line["text"], line["text_pair"]] if pairs else [line["text"]]
        with torch.no_grad():
            logits = classifier(**tokenizer(*texts, return_tensors="pt")).logits[0]
        right.append((int(logits[0] > 0) if labels == 1 else int(logits.argmax())) == number % 2)
    (found,) = coprune.evaluate(model, file, **SETTINGS).accuracy
    assert found.top1 == sum(right) / len(right)
    assert found.unit == "texts"
    report = pruned(model, place, True, file, require="accuracy>=dense-1,accuracy>1").report
    assert report.accuracy[0].dense_top1 == found.top1
    assert [one.holds for one in report.required] == [True, False]
    again = coprune.evaluate(model, file, against=model, require="accuracy>=dense", **SETTINGS)
    assert again.required[0].holds
    assert "text-classification" in (report.saved_model / "README.md").read_text()


def test_accuracy_of_a_token_classifier_counts_words(place: Path) -> None:
    model = save_reader(place / "words", "BertForTokenClassification")
    file = place / "words.jsonl"
    file.write_text(json.dumps({"tokens": ["w5", "w6", "w7"], "labels": [0, "LABEL_1", 1]}))
    with torch.no_grad():
        logits = coprune.model.checkpoint.load.load_model(coprune.model.checkpoint.locate.locate(model))[0](
            input_ids=torch.tensor([[FIRST, 5, 6, 7, LAST]])
        ).logits[0, 1:-1]
    (found,) = coprune.evaluate(model, file, **SETTINGS).accuracy
    assert found.predicted == tuple(logits.argmax(dim=-1).tolist())
    assert (found.labels, found.unit) == ((0, 1, 1), "words")


LINES = {
    '{"text": "w5"}': "line 1 of .* has no 'label'",
    '{"text": "w5", "label": "good"}': "the model has no label 'good'",
    "w5 w6": "line 1 of .* is not a JSON object",
    "": "holds no labelled text",
    '{"text": 5, "label": 1}': "its text is not a string",
}


@pytest.mark.parametrize("line", LINES)
def test_texts_without_proper_labels_are_refused(line: str, place: Path) -> None:
    model = save_reader(place / "bad-labels", "BertForSequenceClassification")
    (file := place / "bad.jsonl").write_text(line)
    with pytest.raises(BadInput, match=LINES[line]):
        pruned(model, place, False, file)


def test_metrics_that_do_not_apply_to_a_model_are_refused(place: Path) -> None:
    embedding = save_reader(place / "embedding", "BertModel")
    masked = save_reader(place / "masked-too", "BertForMaskedLM")
    text = place / "words.txt"
    with pytest.raises(BadInput, match="embeds texts instead of predicting tokens, so it has no perplexity"):
        coprune.evaluate(embedding, text, **SETTINGS)
    with pytest.raises(BadInput, match="embeds texts, and perplexity is not measured of it; require cosine or overlap"):
        coprune.prune(embedding, "wanda", require="perplexity<30", dataset=text, **SETTINGS)
    classifier = save_reader(place / "without-labels", "BertForSequenceClassification")
    with pytest.raises(BadInput, match="classifies texts, so it cannot be measured on plain text; give data"):
        coprune.evaluate(classifier, **SETTINGS)
    with pytest.raises(BadInput, match="fills in masked tokens, and generates no text"):
        coprune.evaluate(masked, text, generate="builtin", **SETTINGS)
    with pytest.raises(BadInput, match="closeness compares next-token distributions"):
        coprune.evaluate(masked, text, against=masked, **SETTINGS)
    with pytest.raises(BadInput, match=r"fills in masked tokens and .* embeds texts, so they cannot be compared"):
        coprune.compare([masked, embedding], text, fresh=True, **SETTINGS)
    with pytest.raises(BadInput, match="so it cannot generate calibration text"):
        pruned(embedding, place, False, dataset="self")
    with pytest.raises(BadInput, match=r"cosine>=0\.9 is about the dense model's measurements"):
        coprune.evaluate(embedding, text, require="cosine>=0.9", **SETTINGS)
