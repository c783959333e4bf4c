"""Runs that prune and train: values passed between both steps, and results."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import coprune
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.commands import times
from coprune.evaluation.answers import run_answers
from coprune.evaluation.answers.answer_generation import ask
from coprune.evaluation.answers.answer_records import Answers
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.runner.plan import plan_of
from coprune.runner.run_recipe import run_recipe
from coprune.steps.train import training_of
from coprune.training.finetune_report import FinetuneReport
from coprune.training.masks import find_masks
from support.commands import run_command
from support.pico import pico_model
from support.pruned import save, write_text
from support.word_tokenizers import word_tokenizer


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    save(pico_model("llama", vocab_size=1002, num_hidden_layers=2), folder)
    return folder


def test_training_settings_reach_the_training_step() -> None:
    how: dict[str, Any] = {"finetune_tokens": 4096, "finetune_lr": 2e-4, "finetune_accumulate": 2}
    recipe = make_recipe({"model": "m", "finetune": "distill", "finetune_dtype": "bfloat16", **how})
    found = training_of(recipe)
    assert (found.train.tokens, found.train.rate, found.train.accumulate, found.train.dtype) == (
        4096,
        2e-4,
        2,
        "bfloat16",
    )
    assert found.train.teacher == "m"
    alone = plan_of(recipe)[0].recipe.train
    assert alone == type(alone)()
    with pytest.raises(BadInput, match=r"'model.layers.1.\*' depends on numbers"):
        make_recipe({"model": "m", "finetune": "dense", "remove": "blocks=0.5", "exclude": "model.layers.1.*"})


def test_conversations_are_refused_as_training_text(tmp_path: Path) -> None:
    chat, text = tmp_path / "chat.jsonl", write_text(tmp_path / "text.txt", 100)
    chat.write_text('{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}')
    for named, trained in ((str(chat), "wikitext2"), (f"{chat}=0.7,{text}=0.3", str(text))):
        assert training_of(make_recipe({"model": "m", "finetune": "dense", "dataset": named})).calibrate.data == trained


def test_a_model_in_memory_is_trained_but_cannot_be_its_own_teacher(tmp_path: Path) -> None:
    model = pico_model("llama", vocab_size=1002, num_hidden_layers=2)
    small: dict[str, Any] = {"pattern": "2:4", "seqlen": 16, "nsamples": 2, "evaluate": False, "gate": False}
    small |= {"dataset": str(write_text(tmp_path / "text.txt", 700)), "processor": word_tokenizer(), "quiet": True}
    with pytest.raises(BadInput, match="only in memory; name the model's folder, or use finetune='dense'"):
        coprune.prune(model, finetune="distill", save=tmp_path / "distilled", **small)
    assert not (tmp_path / "distilled").exists()
    found = coprune.prune(model, finetune="dense", finetune_tokens=32, save=tmp_path / "run", **small)
    assert found.report.finetuned is not None
    assert found.model is not model


def test_the_strongest_preset_trains_and_returns_its_model(dense: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"seqlen": 16, "nsamples": 4, "device": "cpu", "evaluate": False, "gate": False}
    few: dict[str, Any] = {"finetune_tokens": 65}
    result = coprune.prune(
        str(dense),
        preset="best",
        train="whole",
        pattern="2:4",
        dataset=str(write_text(tmp_path / "text.txt", 700)),
        save=tmp_path / "run",
        quiet=True,
        **small,
        **few,
    )
    assert result.report.finetuned is not None
    assert (result.report.finetuned.mode, result.report.finetuned.steps) == ("distill", 5)
    assert (result.report.recipe.prune.permute, result.report.recipe.prune.rotate) == (True, True)
    assert result.report.saved_model == tmp_path / "run" / "train" / "model"
    assert find_masks(result.model).patterns == {"2:4": 14}
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "prune" / "model")
    trained = result.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert not torch.equal(trained, pruned.model.layers[0].mlp.up_proj.weight)
    assert result.tokenizer is not None


@pytest.mark.parametrize("training", [{"preset": "balanced", "train": "whole"}, {"finetune": "dense"}])
def test_layers_left_alone_by_pruning_are_not_trained(dense: Path, tmp_path: Path, training: dict[str, Any]) -> None:
    text = str(write_text(tmp_path / "text.txt", 700))
    exclude = ["*.layers.0.*", "*.layers.1.mlp.down_proj"]
    asked = {**SMALL, "rotate": False, "permute": False} | training
    result = coprune.prune(
        str(dense), dataset=text, finetune_tokens=65, exclude=exclude, save=tmp_path / "run", quiet=True, **asked
    )
    source = AutoModelForCausalLM.from_pretrained(dense)
    for name, parameter in result.model.named_parameters():
        if ".layers.0." in name or "layers.1.mlp.down_proj" in name:
            assert torch.equal(parameter, source.get_parameter(name)), name
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "prune" / "model")
    up = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(result.model.get_parameter(up), pruned.get_parameter(up))


SMALL: dict[str, Any] = {
    "pattern": "2:4",
    "seqlen": 16,
    "nsamples": 4,
    "device": "cpu",
    "evaluate": False,
    "gate": False,
}


def test_only_the_trained_model_is_pushed(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Any] = []
    monkeypatch.setattr("coprune.runner.run_recipe.require_login", pushed.append)
    monkeypatch.setattr("coprune.runner.run_recipe.push", lambda *asked: pushed.append(asked))
    where: dict[str, Any] = {
        "save": tmp_path / "run",
        "save_model": tmp_path / "model",
        "push_to_hub": "me/small",
        "private": True,
    }
    text = str(write_text(tmp_path / "text.txt", 700))
    coprune.prune(str(dense), finetune="dense", finetune_tokens=32, dataset=text, quiet=True, **SMALL, **where)
    assert pushed == ["me/small", (tmp_path / "model", "me/small", True)]


def test_a_failing_chat_template_is_refused_before_pruning(dense: Path, tmp_path: Path) -> None:
    model = tmp_path / "templated"
    shutil.copytree(dense, model)
    (model / "chat_template.jinja").write_text("{{ raise_exception('no prompts here') }}")
    asked: dict[str, Any] = {**SMALL, "dataset": str(write_text(tmp_path / "text.txt", 700)), "quiet": True}
    with pytest.raises(BadInput, match="chat template"):
        coprune.prune(str(model), finetune="dense", generate="builtin", save=tmp_path / "run", **asked)
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_replaced_once_the_new_one_is_known_to_work(dense: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    where = {"save": tmp_path / "run", "save_model": model, "dataset": str(write_text(tmp_path / "text.txt", 700))}

    def again(**changes: Any) -> Any:
        asked: dict[str, Any] = {**SMALL, **where, "finetune": "dense", "finetune_tokens": 32, **changes}
        return coprune.prune(str(dense), quiet=True, **asked)

    first = again()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    wrong: list[dict[str, Any]] = [
        {"dataset": str(tmp_path / "nowhere.txt")},
        {"finetune": "lora", "finetune_rates": "relative"},
        {"pattern": "3:7"},
    ]
    for changes in wrong:
        with pytest.raises(BadInput):
            again(overwrite=True, **changes)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
    second = again(overwrite=True, seed=1)
    assert first.report.recipe.calibrate.seed != second.report.recipe.calibrate.seed
    assert second.report.saved_model == model
    with pytest.raises(BadInput, match="another run"):
        again()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"save_model": "taken"}, "already exists and is not empty"),
        ({"save_model": "run/prune"}, "would be inside the run's internal folders"),
        ({"save": "taken/run", "save_model": "taken"}, "which will be the model's"),
    ],
)
def test_a_folder_that_cannot_be_the_models_is_refused_before_pruning(
    dense: Path, tmp_path: Path, where: dict[str, str], message: str
) -> None:
    (tmp_path / "taken").mkdir()
    write_text(tmp_path / "taken" / "mine.txt", 700)
    folders: dict[str, Any] = {"save": tmp_path / "run"} | {name: tmp_path / folder for name, folder in where.items()}
    with pytest.raises(BadInput, match=message):
        coprune.prune(
            str(dense), finetune="dense", dataset=str(tmp_path / "taken" / "mine.txt"), quiet=True, **SMALL, **folders
        )
    assert not (tmp_path / "run" / "prune" / "model").exists()


def test_samples_passed_by_the_caller_are_trained_on_unchanged(dense: Path, tmp_path: Path) -> None:
    tokens = torch.arange(40)[:, None] * 10 + torch.zeros(16, dtype=torch.int64)
    text = str(write_text(tmp_path / "text.txt", 700))
    coprune.prune(str(dense), save_model=tmp_path / "pruned", dataset=text, quiet=True, **SMALL)
    how: dict[str, Any] = {
        "quiet": True,
        "evaluate": False,
        "gate": False,
        "device": "cpu",
        "max_steps": 1,
        "held_out": 0,
    }
    found = coprune.finetune(tmp_path / "pruned", "dense", dataset=tokens, save=tmp_path / "one", **how)
    assert (found.windows, found.block_size) == (40, 16)
    with pytest.raises(BadInput, match="the token id 5390 is outside the model's vocabulary of 1002"):
        coprune.finetune(tmp_path / "pruned", "dense", dataset=tokens + 5000, save=tmp_path / "two", **how)


def test_a_run_killed_in_either_step_resumes_from_its_recipe(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    where = {"save": tmp_path / "run", "save_model": tmp_path / "model"}
    asked: dict[str, Any] = {**SMALL, **where, "dataset": str(write_text(tmp_path / "text.txt", 700))}
    asked |= {"finetune": "dense", "finetune_tokens": 32, "quiet": True}
    for at in ("coprune.stages.run_stages._save", "coprune.training.finetuning.run_finetuning"):
        with monkeypatch.context() as patch:
            patch.setattr(at, killed)
            with pytest.raises(KeyboardInterrupt):
                coprune.prune(str(dense), **asked, log_json=tmp_path / "log.jsonl")
        kept = Recipe.from_yaml(tmp_path / "run" / "recipe.yaml")
        # A stored recipe does not log, which does not make it another run.
        assert (kept.train.mode, kept.output.log_json) == ("dense", None)
    found = run_recipe(kept, reporter=Reporter(quiet=True)).report
    assert (found.saved_model, (tmp_path / "model" / "config.json").is_file()) == (tmp_path / "model", True)


def test_a_finished_step_is_reused_if_only_rounding_or_destinations_change(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    asked: dict[str, Any] = {**SMALL, "save": tmp_path / "run", "dataset": str(write_text(tmp_path / "text.txt", 700))}
    asked |= {"finetune": "dense", "finetune_tokens": 32, "quiet": True}
    for at in ("training.finetuning.run_finetuning", "run.context.finish_run_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(f"coprune.{at}", killed)
            with pytest.raises(KeyboardInterrupt):
                coprune.prune(str(dense), **asked)
        asked |= {"batch_size": 2, "cache_dir": tmp_path / "cache"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    found = coprune.prune(str(dense), **asked).report
    assert found.saved_model == tmp_path / "run" / "train" / "model"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")} == before
    with pytest.raises(BadInput, match="another run"):
        coprune.prune(str(dense), **(asked | {"seed": 1}))


def test_pruned_and_trained_models_are_measured_on_the_same_windows(tmp_path: Path) -> None:
    save(pico_model("llama", vocab_size=1002, num_hidden_layers=1, max_position_embeddings=1100), tmp_path / "long")
    text = str(write_text(tmp_path / "text.txt", 2300))
    asked: dict[str, Any] = {"pattern": "2:4", "dataset": text, "eval_data": text, "device": "cpu", "gate": False}
    report = coprune.prune(
        str(tmp_path / "long"),
        "magnitude",
        finetune="dense",
        finetune_tokens=1,
        save=tmp_path / "run",
        quiet=True,
        **asked,
    ).report
    tuned = FinetuneReport.model_validate_json((tmp_path / "run" / "train" / "finetune.json").read_text())
    assert (report.perplexity[0].seqlen, tuned.block_size) == (1100, 1024)
    (change,) = tuned.perplexity
    assert change.seqlen == 1100
    assert change.before == pytest.approx(report.perplexity[0].pruned, rel=1e-4)


def test_a_pruned_model_that_is_trained_answers_once_and_all_of_the_time_has_a_name(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = list[object]()

    def counted(*arguments: Any) -> Answers:
        asked.append(arguments[0])
        return ask(*arguments)

    monkeypatch.setattr(run_answers, "ask", counted)
    monkeypatch.setattr(times, "_LEAST", 0.0)  # small models take no time
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # other tests ask the dense model, too
    text = str(write_text(tmp_path / "text.txt", 700))
    how = "-m magnitude -p 2:4 --seqlen 16 --device cpu --finetune lora --finetune-tokens 32 --no-eval -q"
    command = ["prune", str(dense), *how.split(), "--dataset", text, "--save", str(tmp_path / "run")]
    ended = run_command(command, monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert len(asked) == 3  # the dense, the pruned and the trained model
    total, *parts = map(float, re.findall(r"([\d.]+) s\b", ended.out.partition("\ntime ")[2].partition("\n")[0]))
    assert total == pytest.approx(sum(parts))
    assert "s to load and measure before training, " in ended.out
