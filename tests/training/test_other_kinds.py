"""Training encoders, embedding models and encoder-decoders, toward the dense model or on targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.io import wavfile
from torch import Tensor
from torch.nn import functional
from transformers import WhisperFeatureExtractor

import coprune
from coprune.base.errors import BadInput
from coprune.data.pairs import Pairs
from coprune.data.text import NOTHING
from coprune.training.distill import Batch, Distillation, divergence, target_loss
from coprune.training.finetune_report import FinetuneReport
from coprune.training.training_data import PairSamples
from support.pico_folder import words_of, write_words
from support.pico_pairs import pico_pair_model, save_pair_model
from support.pico_readers import add_sentence_modules, save_reader

pytest.importorskip("peft")
PRUNING: dict[str, Any] = dict(
    method="magnitude", sparsity=0.5, nsamples=4, seqlen=16, evaluate=False, quiet=True, layer_error=False
)
TRAINING: dict[str, Any] = dict(max_steps=10, learning_rate=3e-3, batch_size=4, device="cpu", quiet=True)
KINDS = {
    "embeddings": ("BertModel", "distill"),
    "embeddings-lora": ("Qwen3Model", "lora-distill"),
    "masked": ("BertForMaskedLM", "dense"),
    "labels": ("BertForSequenceClassification", "distill"),
    "rerank": ("BertForSequenceClassification", "distill"),
    "pairs": ("T5", "distill"),
    "targets": ("Bart", "lora"),
    "speech": ("Whisper", "distill"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    write_words(folder / "words.txt", 1200)
    rows = [{"source": words_of(9, n), "target": words_of(4 + n % 3, n)} for n in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labels = [{"text": words_of(7, n), "label": n % 2} for n in range(20)]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    (folder / "heard").mkdir()
    generator = np.random.default_rng(0)
    for number in range(6):
        wavfile.write(folder / "heard" / f"{number}.wav", 16000, generator.normal(size=8000).astype(np.float32))
        (folder / "heard" / f"{number}.txt").write_text(words_of(3, number))
    return folder


def dense_model(place: Path, kind: str) -> Path:
    name = KINDS[kind][0]
    if not name.startswith(("Bert", "Qwen")):
        model = save_pair_model(place / kind, name)
        if kind == "speech":
            WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=400).save_pretrained(model)
        return model
    model = save_reader(place / kind, name, **({"num_labels": 1} if kind == "rerank" else {}))
    if kind.startswith("embeddings"):
        add_sentence_modules(model, {"pooling_mode": "mean"})
    return model


def data_of(place: Path, kind: str) -> dict[str, Any]:
    if kind in ("labels", "rerank"):
        return {"dataset": place / "words.txt", "eval_data": place / "labels.jsonl"}
    if kind == "speech":
        return {"dataset": place / "heard", "eval_data": place / "heard"}
    return {"dataset": place / ("pairs.jsonl" if kind in ("pairs", "targets") else "words.txt")}


QUICK = ("embeddings", "masked", "pairs")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_training_keeps_zeros_and_lowers_its_loss(kind: str, place: Path, tmp_path: Path) -> None:
    dense, mode, data = dense_model(place, kind), KINDS[kind][1], data_of(place, kind)
    pruned = tmp_path / "pruned"
    coprune.prune(dense, dataset=data["dataset"], save_model=pruned, **PRUNING)
    teacher = {"teacher": dense} if "distill" in mode else {}
    length = {} if kind in ("pairs", "targets", "speech") else {"seqlen": 16}
    settings = TRAINING | data | teacher | length
    report = coprune.finetune(pruned, mode, save=tmp_path / "run", held_out=0, **settings)  # type: ignore[arg-type]
    assert isinstance(report, FinetuneReport)
    assert report.saved_model is not None
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, report.saved_model))
    assert all(not bool(after[name][tensor == 0].any()) for name, tensor in before.items() if tensor.ndim == 2)
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert sum(one.loss for one in report.curve[-3:]) < sum(one.loss for one in report.curve[:3])
    if kind.startswith("embeddings"):
        (found,) = report.embeddings
        assert found.after.cosine > found.before.cosine
        assert "→" in found.line()
    elif kind == "speech":
        assert report.transcripts[0].recordings == 6
        assert report.unit == "pairs"
    else:
        assert (report.accuracy if kind in ("labels", "rerank") else report.perplexity)[0].line()


@pytest.mark.parametrize("kind", ["masked", "embeddings"])
def test_a_step_takes_one_batch_unless_the_settings_say_otherwise(kind: str, place: Path, tmp_path: Path) -> None:
    dense, pruned = dense_model(place, kind), tmp_path / "pruned"
    coprune.prune(dense, dataset=place / "words.txt", save_model=pruned, **PRUNING)
    teacher = {"teacher": dense} if kind == "embeddings" else {}
    length: dict[str, Any] = {"tokens": 3 * 4 * 16, "max_steps": None, "seqlen": 16, "held_out": 0, "evaluate": False}
    settings = TRAINING | length | teacher | {"dataset": place / "words.txt"}
    report = coprune.finetune(pruned, KINDS[kind][1], save=tmp_path / "run", **settings)  # type: ignore[arg-type]
    assert isinstance(report, FinetuneReport)
    assert report.curve[-1].step == 3


def test_other_models_are_pruned_and_trained_toward_the_source_in_one_run(place: Path, tmp_path: Path) -> None:
    dense, text = dense_model(place, "embeddings"), place / "words.txt"
    training = {"finetune": "distill", "finetune_max_steps": 3, "finetune_lr": 3e-3, "finetune_batch_size": 4}
    settings = {**PRUNING, "evaluate": True, **training}
    report = coprune.prune(dense, dataset=text, save=tmp_path / "run", save_model=tmp_path / "model", **settings).report
    assert report.finetuned is not None
    (data,) = report.finetuned.near
    assert report.finetuned.near[data].startswith("cosine")
    assert "→ fine-tuned cosine" in str(report)
    assert (tmp_path / "model" / "1_Pooling" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["embeddings", "labels"])
def test_models_of_vectors_and_labels_cannot_train_on_text_alone(kind: str, place: Path, tmp_path: Path) -> None:
    model = dense_model(place, kind)
    with pytest.raises(BadInput, match="for which plain text has no targets; train it toward the dense model"):
        coprune.finetune(model, "dense", dataset=place / "words.txt", save=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match="with finetune='distill'"):
        coprune.prune(model, dataset=place / "words.txt", finetune="lora", save=tmp_path / "run", **PRUNING)


def one_by_one(family: str, pairs: Pairs) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Return a model's inputs for every pair without padding, and its targets."""
    found = []
    for source, written in zip(pairs.source, pairs.written, strict=True):
        taken = {
            "input_ids": source[source != NOTHING][None],
            "decoder_input_ids": written[written != NOTHING][None, :-1],
        }
        found.append((taken, written[written != NOTHING][1:]))
    return found


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_pairs_of_different_lengths_count_by_their_tokens(family: str) -> None:
    student, teacher = pico_pair_model(family), pico_pair_model(family)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    generator = torch.Generator().manual_seed(0)
    source, written = (torch.randint(5, 250, (3, length), generator=generator) for length in (9, 7))
    source[0, 6:], written[1, 4:] = NOTHING, NOTHING
    pairs = Pairs.of(source, written)
    samples = PairSamples(pairs, "input_ids")
    inputs = {name: torch.stack([samples[n][name] for n in range(3)]) for name in samples[0]}
    mine, theirs, targets = [], [], []
    for taken, own in one_by_one(family, pairs):
        mine.append(student(**taken).logits[0])
        theirs.append(teacher(**taken).logits[0])
        targets.append(own)
    expected = functional.cross_entropy(torch.cat(mine), torch.cat(targets))
    assert float(target_loss(student, inputs)) == pytest.approx(float(expected), rel=1e-4)
    expected = divergence(torch.cat(mine), torch.cat(theirs), 1.0)
    assert float(Distillation(teacher, 1.0, hidden=False)(student, inputs)) == pytest.approx(float(expected), rel=1e-3)
    with_states = Distillation(teacher, 1.0, hidden=True)
    more = {name: torch.nn.functional.pad(tensor, (0, 3), value=NOTHING) for name, tensor in inputs.items()}
    assert float(with_states(student, more)) == pytest.approx(float(with_states(student, inputs)), rel=1e-4)
    assert Batch.of(more).taken["decoder_input_ids"].shape == (3, 6)
