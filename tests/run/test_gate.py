"""Answers of saved models: their check, its report, and requirements on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

import coprune
from coprune.base.errors import UnsupportedModel
from coprune.base.progress import Reporter
from coprune.evaluation.answers import answer_generation, run_answers
from coprune.evaluation.answers.answer_records import Answers
from coprune.evaluation.answers.questions import plan_of
from coprune.evaluation.answers.run_answers import Look
from coprune.evaluation.measurement import Measured
from coprune.model.checkpoint.weights import InMemory
from coprune.model.loaded_model import Loaded
from coprune.recipe.answers import AnswersPart
from coprune.report.schema import Report
from coprune.run.context import Run
from coprune.stages import run_stages
from support.commands import Ended, run_command
from support.pico import pico_model
from support.pico_folder import pico_tokenizer, save_pico, write_words

pytestmark = pytest.mark.usefixtures("whole_answers")

SETTINGS: dict[str, Any] = {"seqlen": 16, "nsamples": 4, "evaluate": False, "layer_error": False, "quiet": True}


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let float32 models answer in float32, as `eval` lets them."""
    monkeypatch.setattr(run_answers, "multiplies_bfloat16", lambda device: False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a text, and a prompt."""
    folder = tmp_path_factory.mktemp("place")
    save_pico(folder / "model")
    write_words(folder / "words.txt", count=400)
    (folder / "prompts.jsonl").write_text('{"prompt": "w5 w6"}\n{"prompt": "w7"}\n')
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return place


@pytest.fixture
def prune(inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Prune nearly everything and save the rest; return how the command ended, and the report."""

    def run(*more: str) -> tuple[Ended, Report]:
        command = ["prune", "model", "-m", "magnitude", "-s", "0.98", "--dataset", "words.txt", "--seqlen", "16"]
        command += ["--nsamples", "4", "--no-eval", "--no-layer-error", "--save", str(tmp_path / "run")]
        ended = run_command([*command, "--save-model", str(tmp_path / "out"), *more], monkeypatch, capsys)
        return ended, Report.read(tmp_path / "run" / "report.json")

    return run


def test_looping_answers_are_in_the_last_lines_report_page_and_card(prune: Any, tmp_path: Path) -> None:
    ended, report = prune("--no-stream", "--require", "loops<=dense+1,tokens>1")
    facts = report.answers
    assert facts.greedy.figures.answers == 16
    assert facts.greedy.figures.loops > facts.greedy.dense.loops + 1
    verdict = f"{facts.greedy.figures.loops} of 16 answers loop; dense {facts.greedy.dense.loops}"
    last = ended.out.splitlines()[-9:]
    assert last[0].startswith(f"answers   {verdict} (greedy, at most 64 tokens")
    assert last[1].startswith("required  loops<=dense+1 does not hold (")
    assert last[2].startswith("required  tokens>1 holds (")
    assert last[-2] == f"verdict   it writes worse than the dense model does ({verdict})"
    assert last[-1].startswith(
        "next      recover more while pruning with --preset balanced, or train the result: coprune "
    )
    assert ended.code == 3, ended.err
    # Everything is there nevertheless.
    assert (tmp_path / "out" / "config.json").is_file()
    assert verdict in (tmp_path / "out" / "README.md").read_text()
    assert [one.holds for one in report.required] == [False, True]
    assert f"{verdict}." in (tmp_path / "run" / "report.html").read_text()


def test_a_model_that_meets_its_requirements_exits_with_0(prune: Any) -> None:
    ended, report = prune("--require", "loops<=16,tokens>=0")
    assert ended.code == 0, ended.err
    assert report.required[1].figure == report.answers.greedy.figures.tokens
    assert report.answers.along is None


def test_a_streamed_model_answers_as_one_in_memory(prune: Any, tmp_path: Path) -> None:
    ended, streamed = prune()
    assert ended.code == 0, ended.err
    assert streamed.answers.greedy.dense is not None
    assert f"answers   {streamed.answers.verdict()}" in ended.out
    assert streamed.answers.verdict() in (tmp_path / "out" / "README.md").read_text()
    _, whole = prune("--no-stream", "--overwrite")
    assert streamed.answers.samples == whole.answers.samples


def test_a_streamed_model_too_large_for_memory_skips_generation_and_says_so(
    prune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coprune.model.loaded_model.room_on", lambda device: (1 << 10, "of memory"))
    ended, report = prune()
    assert ended.code == 0, ended.err
    assert report.answers is None
    assert "answers   not checked: the whole model takes 0.0 GiB of memory, too much of the 0.0" in ended.out
    assert "No answers are generated" in ended.err


@pytest.mark.parametrize("below", [96, 97], ids=["once it is cut", "dense"])
def test_a_model_that_transformers_cannot_generate_with_is_reported(
    below: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as hybrids without any attention left."""

    whole = GenerationMixin.generate

    def fail_if_cut(model: Any, *arguments: Any, **options: Any) -> Any:
        if model.config.intermediate_size < below:
            raise ValueError("no cache")
        return whole(model, *arguments, **options)

    monkeypatch.chdir(place)
    settings = SETTINGS | {"dataset": "words.txt", "align": 16, "remove": "channels=0.5"}
    with monkeypatch.context() as patched:
        patched.setattr(GenerationMixin, "generate", fail_if_cut)
        patched.setattr("coprune.evaluation.answers.questions.SHORT_ANSWER", 4)
        report = coprune.prune("model", save_model=tmp_path / "out", **settings).report
        assert report.answers is None
        assert report.no_answers == "transformers cannot generate text with LlamaForCausalLM: no cache"
        with pytest.raises(UnsupportedModel, match="cannot generate text with LlamaForCausalLM"):
            coprune.prune(
                "model", save_model=tmp_path / "other", generate="prompts.jsonl", generate_tokens=4, **settings
            )


def test_without_the_check_no_answers_are_generated(prune: Any) -> None:
    ended, report = prune("--no-stream", "--no-gate")
    assert report.answers is report.no_answers is None
    assert "answers" not in ended.out


def test_a_run_and_an_evaluation_of_its_model_find_the_same_answers(inside: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"generate": "prompts.jsonl", "generate_tokens": 20}
    report = coprune.prune(
        "model", "magnitude", dataset="words.txt", save_model=tmp_path / "out", **SETTINGS, **asked
    ).report
    found = coprune.evaluate(tmp_path / "out", against="model", quiet=True, **asked).answers
    assert report.answers.along.kl == pytest.approx(found.along.kl, rel=1e-5)
    assert report.answers.samples == found.samples
    for way in ("greedy", "sampled"):
        mine, other = getattr(report.answers, way), getattr(found, way)
        assert mine.dense == other.dense  # stored by the run, including its seconds
        assert mine.figures == other.figures


def test_a_model_without_a_tokenizer_gives_no_answers(tmp_path: Path) -> None:
    tokens = torch.randint(3, 256, (4, 16))
    report = coprune.prune(
        pico_model("llama"), "magnitude", dataset=tokens, save_model=tmp_path / "out", **SETTINGS
    ).report
    assert report.no_answers == "the model has no tokenizer"
    with pytest.raises(coprune.BadInput, match="the model has no tokenizer"):
        coprune.prune(pico_model("llama"), "magnitude", dataset=tokens, require="loops<3", **SETTINGS)


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_without_some_blocks_answers_as_saved(inside: Path, tmp_path: Path, stream: bool) -> None:
    report = coprune.prune(
        "model", remove="blocks=0.34", stream=stream, dataset="words.txt", save_model=tmp_path / "small", **SETTINGS
    ).report
    saved = coprune.evaluate(tmp_path / "small", generate="builtin", generate_tokens=64, quiet=True).answers
    expected = {sample.prompt: sample.answer for sample in saved.samples}
    assert all(sample.answer == expected[sample.prompt] for sample in report.answers.samples)


def test_a_run_that_removes_and_prunes_compares_with_the_dense_model(inside: Path, tmp_path: Path) -> None:
    zeros: dict[str, Any] = {
        "remove": "blocks=0.34",
        "sparsity": 0.5,
        "save": tmp_path / "run",
        "require": "loops<=dense+16",
    }
    report = coprune.prune(
        "model", "magnitude", dataset="words.txt", save_model=tmp_path / "o", **SETTINGS, **zeros
    ).report
    dense = coprune.evaluate("model", generate="builtin", generate_tokens=64, quiet=True).answers
    expected = {sample.prompt: sample.answer for sample in dense.samples}
    assert all(sample.dense == expected[sample.prompt] for sample in report.answers.samples)
    assert [one.holds for one in report.required] == [True]


def test_fine_tuning_checks_answers_before_and_after(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    pruned: dict[str, Any] = {"dataset": "words.txt", "gate": False, "save_model": tmp_path / "pruned", **SETTINGS}
    coprune.prune("model", "magnitude", **pruned)
    command = ["finetune", str(tmp_path / "pruned"), "--mode", "lora", "--dataset", "words.txt", "--seqlen", "16"]
    command += ["--max-steps", "1", "--held-out", "0", "--no-eval", "--quiet", "--save"]
    ended = run_command([*command, str(tmp_path / "a"), "--require", "loops<0"], monkeypatch, capsys)
    assert ended.code == 3, ended.err
    report = json.loads((tmp_path / "a" / "finetune.json").read_text())
    assert report["answers"]["reference"] == "before"
    assert "answers loop" in (tmp_path / "a" / "model" / "README.md").read_text()
    dense = ["--generate", "prompts.jsonl", "--generate-tokens", "8", "--teacher", "model", "--require", "kl<1000"]
    ended = run_command([*command, str(tmp_path / "b"), *dense], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "b" / "finetune.json").read_text())
    expected = coprune.evaluate("model", generate="prompts.jsonl", generate_tokens=8, quiet=True).answers
    assert [one["dense"] for one in report["answers"]["samples"]] == [one.answer for one in expected.samples]
    assert report["answers"]["along"]["kl"] > 0


@pytest.fixture
def tuned(inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Prune and fine-tune in one run; return how the command ended, and the report."""
    pytest.importorskip("peft")

    def run(*more: str) -> tuple[Ended, Report]:
        command = ["prune", "model", "-m", "magnitude", "-s", "0.9", "--dataset", "words.txt", "--seqlen", "16"]
        command += [
            "--nsamples",
            "4",
            "--no-eval",
            "--no-layer-error",
            "--finetune",
            "dense",
            "--finetune-minutes",
            "0.004",
        ]
        command += ["--save", str(tmp_path / "run"), "--save-model", str(tmp_path / "out"), "--quiet"]
        return run_command([*command, *more], monkeypatch, capsys), Report.read(tmp_path / "run" / "report.json")

    return run


@pytest.mark.slow
def test_a_run_that_fine_tunes_reports_the_fine_tuned_model(tuned: Any, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"generate": "prompts.jsonl", "generate_tokens": 12}
    ended, report = tuned(
        "--generate", "prompts.jsonl", "--generate-tokens", "12", "--require", "kl<1e-9,tokens>=0,sampled.loops<3"
    )
    assert ended.code == 3, ended.err
    pruned = coprune.evaluate(tmp_path / "run" / "prune" / "model", against="model", quiet=True, **asked).answers
    found = coprune.evaluate(tmp_path / "out", against="model", quiet=True, **asked).answers
    assert found.along.kl != pruned.along.kl, "the training changed nothing, so this test shows nothing"
    assert report.answers.samples == found.samples
    assert report.answers.reference == "dense"
    assert report.answers.along.kl == pytest.approx(found.along.kl, rel=1e-5)
    assert report.answers.sampled == found.sampled
    assert [one.holds for one in report.required] == [False, True, True]
    assert report.required[0].figure == report.answers.along.kl
    # All files are there nevertheless, with the same verdict.
    alone = json.loads((tmp_path / "run" / "train" / "finetune.json").read_text())
    assert alone["required"] == json.loads(report.model_dump_json())["required"]
    assert "kl<1e-9 does not hold" in ended.out
    assert report.answers.verdict() in (tmp_path / "out" / "README.md").read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert report.answers.verdict() in page
    assert '<div class="tag tuned">fine-tuned' in page


@pytest.mark.usefixtures("unrounded")
def test_the_gate_after_fine_tuning_compares_with_the_dense_model(tuned: Any, tmp_path: Path) -> None:
    ended, report = tuned("--no-stream")
    assert ended.code == 0, ended.err
    asked: dict[str, Any] = {"generate": "builtin", "generate_tokens": 64, "generate_temperature": 0, "quiet": True}
    dense, after = (coprune.evaluate(model, **asked).answers for model in ("model", tmp_path / "out"))
    answers = {sample.prompt: sample.answer for sample in after.samples}
    expected = {sample.prompt: sample.answer for sample in dense.samples}
    assert report.answers.reference == "dense"
    assert len(report.answers.samples) == 16
    for sample in report.answers.samples:
        assert (sample.answer, sample.dense) == (answers[sample.prompt], expected[sample.prompt])


def test_answers_of_the_dense_model_are_cached_across_texts(
    inside: Path, prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, measured, measure = list[Any](), list[tuple[str, str]](), run_stages.measure

    def asking(*given: Any) -> Answers:
        asked.append(given[0])
        return answer_generation.ask(*given)

    monkeypatch.setattr(run_answers, "ask", asking)

    def measuring(run: Run, which: str, name: str) -> Measured:
        measured.append((which, name))
        return measure(run, which, name)

    monkeypatch.setattr(run_stages, "measure", measuring)
    write_words(inside / "other.txt", count=300)
    reports = []
    for number, texts in enumerate(((), ("words.txt",), ("other.txt", "words.txt"))):
        more = ["--eval", "--eval-data", ",".join(texts)] if texts else []
        ended, report = prune(*more)
        assert ended.code == 0, ended.err
        reports.append(report)
        for folder in ("run", "out"):
            (tmp_path / folder).rename(tmp_path / f"{folder}{number}")
    assert len(asked) == 1 + len(reports)  # the dense model once, and each result
    assert [name for which, name in measured if which == "dense"] == ["words.txt", "other.txt"]
    samples = [[sample.dense for sample in report.answers.samples] for report in reports]
    assert samples[0] == samples[1] == samples[2]


def test_a_model_whose_code_is_float32_answers_in_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_answers, "multiplies_bfloat16", lambda device: True)
    model = pico_model("xlnet")  # its relative positions are float32 whatever the weights are
    plan = plan_of(AnswersPart(), saves=True)
    loaded = Loaded(InMemory(model), pico_tokenizer(), "xlnet", False)
    look = Look(plan)
    look.prepare(loaded, Reporter(quiet=True))
    assert look.rounds
    look.ask_dense(loaded, Reporter(quiet=True))
    assert look.dense is not None
    assert not look.rounds
