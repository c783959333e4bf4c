"""A run's messages: overlapping samples, an unneeded text, existing zeros, repeated training samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import coprune
from coprune.base.errors import BadInput
from coprune.base.precision import SLOW_IN_BFLOAT16
from support.pico_folder import pico_tokenizer, save_pico, write_words

SMALL: dict[str, Any] = dict(dataset="words.txt", seqlen=32, nsamples=2, evaluate=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("said")
    save_pico(folder / "model", num_hidden_layers=2)
    write_words(folder / "words.txt", 1500)
    return folder


@pytest.fixture
def said(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the printed lines."""
    lines: list[str] = []
    monkeypatch.chdir(place)
    monkeypatch.setattr("coprune.base.progress.Reporter.say", lambda self, line: lines.append(line))
    return lines


def test_overlapping_samples_are_reported(said: list[str], place: Path) -> None:
    tokens = len(pico_tokenizer()((place / "words.txt").read_text())["input_ids"])
    coprune.prune("model", "magnitude", **SMALL | {"nsamples": tokens // 32})
    assert not any("overlap" in line for line in said)
    coprune.prune("model", "wanda", **SMALL | {"nsamples": tokens // 32 + 1})
    wanted = f"{32 * (tokens // 32 + 1):,} tokens are drawn from a text of {tokens:,}"
    assert f"Samples overlap, since {wanted}: fewer samples would do as well, more text would do better." in said


def test_the_last_tenth_of_the_users_text_is_held_out_for_perplexity(said: list[str], place: Path) -> None:
    measured = {name: value for name, value in SMALL.items() if name != "evaluate"}
    report = coprune.prune("model", "magnitude", **measured, eval_tokens=100).report
    assert [(one.data, one.windows) for one in report.perplexity] == [("words.txt", 3)]
    assert "Perplexity is measured on the last tenth of words.txt, 100 tokens that are held out for it." in said
    texts = [(place / "words.txt").read_text()]
    handed = coprune.prune("model", "magnitude", **measured | {"dataset": texts}, eval_tokens=100).report
    assert handed.perplexity[0].pruned == report.perplexity[0].pruned
    assert handed.calibration.fingerprint == report.calibration.fingerprint
    write_words(place / "few.txt", count=300)
    assert not coprune.prune("model", "magnitude", **measured | {"dataset": "few.txt"}).report.perplexity
    [short] = [line for line in said if line.startswith("No perplexity")]
    assert short.startswith("No perplexity: the last tenth of few.txt does not fill a window of 32 tokens. Name")


@pytest.mark.parametrize("named", ["", " , "])
def test_an_empty_list_of_texts_is_refused_before_the_model_is_opened(named: Any) -> None:
    with pytest.raises(BadInput, match="eval_data is empty; name some, as in eval_data='embedded'"):
        coprune.prune("no/such/model", dataset="embedded", eval_data=named, quiet=True)


def test_an_unneeded_default_text_may_be_missing(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise BadInput("no network here")

    monkeypatch.setattr("coprune.evaluation.tasks.text_task.read_samples", refuse)
    unnamed = {name: value for name, value in SMALL.items() if name != "dataset"}
    report = coprune.prune("model", "magnitude", **unnamed).report
    assert "No layer errors, since there is no calibration data: no network here." in said
    assert {matrix.relative_layer_error for matrix in report.matrices} == {None}
    for settings in (SMALL, unnamed | {"method": "wanda"}):
        with pytest.raises(BadInput, match="no network here"):
            coprune.prune("model", **{"method": "magnitude", **settings})


def test_a_processor_slow_in_bfloat16_is_reported(
    said: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pico(place / "half", num_hidden_layers=2, dtype=torch.bfloat16)
    trained: dict[str, Any] = {"reconstruct": 1, "reconstruct_dtype": "bfloat16"}
    for module in ("coprune.stages.opening", "coprune.model.loaded_model"):
        monkeypatch.setattr(f"{module}.multiplies_bfloat16", lambda _: True)
    coprune.prune("half", "wanda", **SMALL, **trained)
    assert not any(SLOW_IN_BFLOAT16 in line for line in said)
    for module in ("coprune.stages.opening", "coprune.model.loaded_model"):
        monkeypatch.setattr(f"{module}.multiplies_bfloat16", lambda _: False)
    coprune.prune("half", "wanda", **SMALL, **trained)
    told = [line.removeprefix(SLOW_IN_BFLOAT16) for line in said if SLOW_IN_BFLOAT16 in line]
    assert told == [
        " dtype='float32' computes several times as fast, and saves float32.",
        " Blocks are trained in float32 instead.",
    ]


def test_evaluate_and_generate_warn_about_slow_bfloat16(
    said: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pico(place / "whole", num_hidden_layers=1, dtype=torch.bfloat16)
    slow = f"{SLOW_IN_BFLOAT16} dtype='float32' computes several times as fast."
    monkeypatch.setattr("coprune.model.loaded_model.multiplies_bfloat16", lambda _: False)
    coprune.evaluate("whole", "words.txt", against="model", seqlen=32)
    (place / "prompts.jsonl").write_text('{"prompt": "w20 w21"}\n')
    coprune.generate("whole", place / "written.jsonl", "prompts.jsonl", seqlen=4)
    assert said.count(slow) == 2, "once for each command, and not of a model in float32"
    in_memory = AutoModelForCausalLM.from_pretrained(place / "whole", dtype=torch.bfloat16)
    coprune.evaluate(in_memory, "words.txt", processor=pico_tokenizer(), seqlen=32)
    assert said[-1] == f"{SLOW_IN_BFLOAT16} float32 computes several times as fast."


def test_an_already_sparse_model_is_reported(said: list[str], place: Path) -> None:
    coprune.prune("model", "magnitude", **SMALL, save_model=place / "pruned")
    assert not any("was pruned before" in line for line in said)
    coprune.prune("pruned", "magnitude", sparsity=0.7, **SMALL)
    wanted = "pruned was pruned before: 50.00 % of the weights of model.layers.0 are zero. "
    assert f"{wanted}In the report, dense means the model as it was given." in said


def test_reconstruction_is_not_listed_as_a_numerical_event(said: list[str]) -> None:
    report = coprune.prune("model", "magnitude", reconstruct=2, **SMALL).report
    assert len(report.trainings) == 2
    assert report.events == []
    rows = {line.split()[0]: line for line in str(report).splitlines()}
    assert "events" not in rows
    assert rows["trained"].startswith("trained   2 blocks, the last: relative error ")


def test_samples_trained_on_many_times_are_reported(said: list[str]) -> None:
    trained: dict[str, Any] = {**SMALL, "nsamples": 8, "batch_size": 2, "reconstruct": 15}
    coprune.prune("model", "wanda", **trained)
    assert not any("on each sample" in line for line in said)
    coprune.prune("model", "wanda", **trained, reconstruct_tokens=18 * 2 * 32)  # trained on three of four batches
    wanted = "Every block is trained on each sample 6 times; a larger nsamples=… may do better."
    assert said.count(wanted) == 1


def test_trainings_without_gain_are_reported_with_advice(said: list[str], place: Path) -> None:
    trained: dict[str, Any] = {**SMALL, "nsamples": 8, "reconstruct": 6, "batch_size": 2}
    report = coprune.prune("model", "wanda", **trained).report
    assert not any("gained nothing" in line for line in said)
    assert not any(training.is_idle for training in report.trainings)
    report = coprune.prune("model", "wanda", **trained, reconstruct_lr=100.0).report
    assert all(training.is_idle for training in report.trainings)
    assert ", the last: nothing gained, relative error" in str(report)
    assert said[-1] == "The training of 2 of 2 blocks gained nothing. A smaller reconstruct_lr=… may."
    assert said[-1] in [f"{event.line()}." for event in report.events]
