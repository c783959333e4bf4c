"""Zero-shot tasks and a text sample in a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from coprune.base.errors import BadInput
from coprune.evaluation.extra_measurements import continue_text, zero_shot_settings
from coprune.evaluation.zero_shot import PAPER_TASKS, compare_zero_shot
from coprune.recipe.recipe import make_recipe
from coprune.report.schema import Report
from support.commands import run_command
from support.pico import pico_model
from support.pico_folder import pico_tokenizer, save_pico, write_words
from support.task_items import DEFINITIONS, word_items

pytest.importorskip("lm_eval")

from coprune.evaluation.harness import zero_shot


def test_a_run_reports_what_the_harness_gives_for_the_models_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TASK_DATA", str(word_items(tmp_path / "data")))
    model = save_pico(tmp_path / "model")
    text = str(write_words(tmp_path / "text.txt"))
    run = tmp_path / "run"
    command = ["prune", str(model), "-m", "magnitude", "--dataset", text, "--eval-data", text, "--seqlen", "32", "-q"]
    command += ["--nsamples", "4", "--tasks", "piqa,arc_easy", "--limit", "6", "--include-path", str(DEFINITIONS)]
    command += ["--save", str(run), "--save-model", str(tmp_path / "pruned")]
    ended = run_command(command, monkeypatch, capsys)
    assert ended.code == 0, ended.err
    report = Report.read(run / "report.json")
    settings = zero_shot_settings(report.recipe)
    assert settings.tasks == ("piqa", "arc_easy")
    dense, pruned = (
        zero_shot(AutoModelForCausalLM.from_pretrained(folder), pico_tokenizer(), settings)
        for folder in (model, tmp_path / "pruned")
    )
    assert report.zero_shot == compare_zero_shot(dense, pruned)
    assert report.sample is not None
    assert report.sample.prompt == "The city of Paris is"
    assert [phase.name for phase in report.phases] == [
        "load and prepare",
        "measure the dense model",
        "prune",
        "measure the pruned model",
        "save, reload and compare",
    ]
    assert all(phase.seconds >= 0 for phase in report.phases)


def test_a_continuation_is_the_likeliest_one() -> None:
    model, tokenizer = pico_model("llama"), pico_tokenizer()
    inputs = tokenizer("w5 w6 w7", return_tensors="pt")
    expected = model.generate(  # type: ignore[operator]
        inputs["input_ids"], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    found = continue_text(model, tokenizer, "w5 w6 w7", new_tokens=6)
    assert found.split() == [f"w{token}" for token in expected[0, 3:].tolist() if token != 3]
    assert continue_text(model, tokenizer, "") == ""


def test_default_tasks_are_those_of_the_papers() -> None:
    assert not make_recipe({"model": "m"}).evaluate.runs_tasks
    assert zero_shot_settings(make_recipe({"model": "m", "eval_zero_shot": True})).tasks == PAPER_TASKS
    assert make_recipe({"model": "m", "tasks": "piqa"}).evaluate.runs_tasks
    assert zero_shot_settings(make_recipe({"model": "m", "tasks": "piqa, rte"})).tasks == ("piqa", "rte")


def test_zero_shot_tasks_refuse_a_streamed_model() -> None:
    with pytest.raises(BadInput, match="need the whole model in memory"):
        make_recipe({"model": "m", "stream": True, "eval_zero_shot": True})
