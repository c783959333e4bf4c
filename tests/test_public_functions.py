"""Public functions do the same as the commands, and return inspectable results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import coprune
from coprune.pruning.methods import Gram, Pruned, Target
from coprune.pruning.methods.sparsegpt import SparseGPT
from support.commands import run_command
from support.pico import pico_model
from support.pico_folder import pico_tokenizer, save_pico, write_words

SMALL: dict[str, Any] = {"nsamples": 4, "seqlen": 32, "quiet": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pico model, a calibration text and an evaluation text."""
    folder = tmp_path_factory.mktemp("place")
    save_pico(folder / "model", num_hidden_layers=2)
    write_words(folder / "words.txt")
    write_words(folder / "test.txt", count=200, seed=1)
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command, which has to succeed, and returns its standard output."""

    def run(*arguments: object) -> str:
        ended = run_command([str(argument) for argument in arguments], monkeypatch, capsys)
        assert ended.code == 0, ended.err
        return ended.out

    return run


@pytest.fixture(scope="module")
def folder(pruned: coprune.Result, place: Path) -> Path:
    """Return the pruned model as a checkpoint."""
    pruned.model.save_pretrained(place / "pruned")
    pruned.tokenizer.save_pretrained(place / "pruned")
    return place / "pruned"


@pytest.fixture(scope="module")
def pruned(place: Path) -> coprune.Result:
    """Return the pico model pruned to 2:4 in memory."""
    texts: dict[str, Any] = {"dataset": str(place / "words.txt"), "eval_data": str(place / "test.txt")}
    return coprune.prune(place / "model", "wanda", pattern="2:4", **texts, **SMALL)


def test_a_result_has_the_models_tokenizer(pruned: coprune.Result) -> None:
    assert isinstance(pruned.processor, PreTrainedTokenizerBase)
    assert pruned.tokenizer is pruned.processor


def test_a_streamed_result_has_the_tokenizer_too(inside: Path, tmp_path: Path) -> None:
    found = coprune.prune(
        "model", dataset="words.txt", stream=True, save_model=tmp_path / "out", evaluate=False, **SMALL
    )
    assert found.model is not None  # read from its folder
    assert isinstance(found.tokenizer, PreTrainedTokenizerBase)


def test_a_results_repr_is_one_line(pruned: coprune.Result, place: Path) -> None:
    figures = pruned.report.perplexity[0]
    headline = (
        f"model: wanda 2:4, 50.00 % zeros, perplexity {figures.dense:.2f} → {figures.pruned:.2f} on {place}/test.txt"
    )
    assert repr(pruned) == f"<Result of {headline}>"
    assert repr(pruned.report) == f"<Report of {headline}>"


def test_a_result_prints_and_renders_its_figures(pruned: coprune.Result, place: Path) -> None:
    lines = str(pruned).splitlines()
    assert lines[0] == f"model     {place}/model, 94,528 parameters, float32"
    assert lines[2].startswith("sparsity  50.00 % of the 14 pruned matrices")
    assert [line.split()[0] for line in lines] == ["model", "method", "sparsity", "perplexity", "took"]
    html = pruned._repr_html_()
    assert html.count("<tr>") == len(lines)
    assert f"<td>{place}/model, 94,528 parameters, float32</td>" in html


def test_a_method_may_be_an_object_or_a_name(inside: Path) -> None:
    found = [
        coprune.prune("model", method, dataset="words.txt", evaluate=False, **SMALL).report
        for method in ("sparsegpt:block_size=32", SparseGPT(block_size=32), Copied())
    ]
    assert found[0].recipe == found[1].recipe
    assert len({tuple(matrix.mask_checksum for matrix in report.matrices) for report in found}) == 1
    assert found[2].recipe.prune.method.name == f"{__name__}.Copied"


@dataclass(frozen=True)
class Copied:
    """SparseGPT under another name, which no recipe knows."""

    statistic: ClassVar[type[Gram]] = Gram

    def prune(self, weight: Tensor, statistic: Gram, target: Target) -> Pruned:
        return SparseGPT(block_size=32).prune(weight, statistic, target)


def test_a_run_of_an_unregistered_method_reports_that_its_recipe_is_incomplete(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coprune.prune("model", Copied(), dataset="words.txt", evaluate=False, save=tmp_path / "run", **SMALL)
    assert (tmp_path / "run" / "recipe.yaml").read_text().startswith("# This file alone does not repeat the run")
    ended = run_command(["prune", "--recipe", str(tmp_path / "run" / "recipe.yaml")], monkeypatch, capsys)
    assert ended.code == 2
    assert "Copied is a Python object, which a recipe cannot hold" in ended.err


def test_a_preset_prunes_the_same_from_python_and_the_command_line(
    inside: Path, tmp_path: Path, command: Callable[..., str]
) -> None:
    command("prune", "model", "--preset", "balanced", "--train", "blocks", "--dataset", "words.txt",
            "--nsamples", 4, "--seqlen", 32, "--no-eval", "--no-stream", "--save", tmp_path / "run", "-q")  # fmt: skip
    report = coprune.prune("model", preset="balanced", dataset="words.txt", evaluate=False, **SMALL).report
    told = coprune.Report.read(tmp_path / "run" / "report.json")
    assert report.recipe.prune.method.name == "sparsegpt"
    assert [m.mask_checksum for m in report.matrices] == [m.mask_checksum for m in told.matrices]
    assert report.recipe == told.recipe.replaced(save=None)


def test_a_model_in_memory_is_pruned_and_otherwise_unchanged(inside: Path) -> None:
    model = pico_model("mixtral").train().requires_grad_(True)
    model.set_experts_implementation("grouped_mm")
    model.lm_head.requires_grad_(False)
    found = coprune.prune(model, "magnitude", processor=pico_tokenizer(), dataset="words.txt", evaluate=False, **SMALL)
    assert id(found.model) == id(model)
    assert found.report.sparsity.matrices == pytest.approx(0.5, abs=1e-3)
    assert all(module.training for module in model.modules())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["lm_head.weight"]
    assert model.config._experts_implementation == "grouped_mm"


def test_values_that_are_not_models_are_refused() -> None:
    with pytest.raises(coprune.BadInput, match="a Linear is not a transformers model"):
        coprune.prune(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(coprune.BadInput, match="the model is already in memory"):
        coprune.prune(pico_model("llama"), dtype="bfloat16")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what peft asks
def test_a_model_with_adapters_is_refused() -> None:
    """Adapters, wrapped around the model or within its layers, would be pruned like the model's matrices."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        pico_model("llama"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(coprune.BadInput, match=r"unmerged adapters \(.* layers, first .*q_proj.*merge_and_unload"):
            coprune.prune(model, "magnitude", evaluate=False)
    merged = wrapped.merge_and_unload()
    assert coprune.prune(merged, "magnitude", evaluate=False, layer_error=False, quiet=True).model is merged


def test_estimate_gives_the_commands_figures(inside: Path, command: Callable[..., str]) -> None:
    told = json.loads(command("estimate", "model", "--dataset", "words.txt", "--nsamples", 4, "--seqlen", 32, "--json"))
    # The command always writes a run folder with a page, the function only on request.
    found = coprune.estimate("model", dataset="words.txt", stream=None, save="out/run", **SMALL)
    assert found.phases.keys() == told["phases"].keys()
    assert found.fits is told["fits"] is True
    assert found.peak_bytes == pytest.approx(told["peak_bytes"], rel=0.2)
    assert re.match(r"<Estimate of at most \d+\.\d\d GiB", repr(found))
    assert str(found).startswith("memory    at most ")
    assert "<th style" in found._repr_html_()


def test_estimate_leaves_a_model_in_memory_unchanged(inside: Path) -> None:
    model = pico_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert coprune.estimate(model, processor=pico_tokenizer(), dataset="words.txt", **SMALL).fits
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def without_next(told: str) -> str:
    """Return a command's output without its last line, the suggested next command."""
    *lines, last = told.splitlines(keepends=True)
    assert last.startswith("next  ")
    return "".join(lines)


def test_evaluate_gives_the_commands_figures(
    inside: Path, tmp_path: Path, folder: Path, pruned: coprune.Result, command: Callable[..., str]
) -> None:
    options = ["--data", "test.txt", "--seqlen", 32, "--against", "model", "--quiet"]
    told = command("eval", folder, *options, "--json", tmp_path / "found.json")
    found = coprune.evaluate(folder, "test.txt", seqlen=32, against="model", quiet=True)
    assert without_next(told) == f"{found}\n"
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(found.model_dump_json())
    assert found.perplexity[0].value == pytest.approx(pruned.report.perplexity[0].pruned, rel=1e-6)


def test_evaluate_leaves_a_model_in_memory_unchanged(inside: Path, pruned: coprune.Result) -> None:
    pruned.model.train()
    found = coprune.evaluate(
        pruned.model, ["test.txt"], against=pruned.model, processor=pruned.processor, seqlen=32, quiet=True
    )
    assert pruned.model.training
    assert found.perplexity[0].value == pytest.approx(pruned.report.perplexity[0].pruned, rel=1e-6)
    assert found.closeness[0].kl == pytest.approx(0, abs=1e-6)
    assert found.weights.bytes_on_disk == 4 * found.weights.parameters
    assert repr(found) == f"<Evaluation of model: perplexity {found.perplexity[0].value:.2f} on test.txt>"
    assert "<td>KL " in found._repr_html_()


def test_evaluate_says_what_a_model_in_memory_lacks(inside: Path, pruned: coprune.Result) -> None:
    with pytest.raises(
        coprune.BadInput, match="dtype is about loading, but the model is already in memory; leave out dtype"
    ):
        coprune.evaluate(pruned.model, "test.txt", processor=pruned.processor, dtype="bfloat16")
    with pytest.raises(coprune.BadInput, match="tokenizer"):
        coprune.evaluate(pruned.model, "test.txt", quiet=True)
    with pytest.raises(coprune.BadInput, match="unknown recipe field 'sequence'"):
        coprune.evaluate("model", "test.txt", sequence=32)  # type: ignore[call-arg]


def test_texts_are_paths_as_well_as_names(inside: Path) -> None:
    small: dict[str, Any] = {"seqlen": 32, "eval_tokens": 128, "quiet": True}
    both: Any = [Path("test.txt"), Path("words.txt")]
    named = coprune.evaluate("model", "test.txt,words.txt", **small)
    assert coprune.evaluate("model", both, **small) == named
    one = coprune.evaluate("model", Path("test.txt"), **small)
    assert one.perplexity == named.perplexity[:1]
    settings: dict[str, Any] = {"nsamples": 2, "seqlen": 32, "eval_tokens": 128, "quiet": True}
    report = coprune.prune("model", dataset=Path("words.txt"), eval_data=Path("test.txt"), **settings).report
    assert report.perplexity[0].dense == pytest.approx(one.perplexity[0].value)


def test_functions_that_need_a_named_model_refuse_one_in_memory(inside: Path) -> None:
    model: Any = pico_model("llama")
    name: Any = "model"
    with pytest.raises(coprune.BadInput, match="models are compared by name, and a LlamaForCausalLM is in memory"):
        coprune.compare(["model", model], "test.txt")
    with pytest.raises(coprune.BadInput, match=r"from its files, .* coprune\.keep_zeros\(model\)"):
        coprune.finetune(model, dataset="words.txt")
    with pytest.raises(
        coprune.BadInput,
        match="merging reads a model from its folder, and this is a LlamaForCausalLM in memory; save it",
    ):
        coprune.merge(model, "adapter", "merged")
    for call in (
        lambda: coprune.prune(model, processor=name, dataset="words.txt"),
        lambda: coprune.evaluate(model, "test.txt", processor=name),
        lambda: coprune.generate(model, "new.jsonl", processor=name),
    ):
        with pytest.raises(
            coprune.BadInput, match="a processor is a tokenizer or an image processor, but 'model' is a name"
        ):
            call()


def test_compare_gives_the_commands_figures(inside: Path, tmp_path: Path, command: Callable[..., str]) -> None:
    kept = ["--evaluation-cache", tmp_path / "kept", "--json", tmp_path / "found.json", "--csv", tmp_path / "found.csv"]
    told = command("compare", "model", "model", "--data", "test.txt", "--seqlen", 32, "--quiet", *kept)
    found = coprune.compare(
        ["model", Path("model")], "test.txt", seqlen=32, evaluation_cache=tmp_path / "kept", quiet=True
    )
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(found.model_dump_json())
    assert (tmp_path / "found.csv").read_text() == found.to_csv()
    assert [line.split() for line in told.split("\n") if line.split()] == [
        line.split() for line in str(found).splitlines()
    ] or "─" in told
    assert repr(found) == "<Comparison of model with model>"
    assert found._repr_html_().count("<th>model</th>") == 2
    assert found.rows[1].perplexity_changes is not None
    assert found.rows[1].perplexity_changes[0].ratio == 1


def test_inspect_returns_the_data_behind_the_commands_lines(
    inside: Path, pruned: coprune.Result, command: Callable[..., str]
) -> None:
    with pytest.raises(coprune.BadInput, match="not which parts would be removed; leave out remove"):
        coprune.inspect("model", remove="heads=0.5", quiet=True)
    found = coprune.inspect("model", pattern="2:4", exclude="*.q_proj", quiet=True)
    options = ["-p", "2:4", "--exclude", "*.q_proj", "-q"]
    assert without_next(command("inspect", "model", *options)) == f"{found}\n"
    told = without_next(command("inspect", "model", *options, "--matrices"))
    assert told.splitlines() == found.lines(every_matrix=True)
    assert found.blocks == ("model.layers.0", "model.layers.1")
    assert [matrix.block for matrix in found.matrices] == [name for name in found.blocks for _ in range(7)]
    first, second, *_ = found.matrices
    assert (first.name, first.shape, first.target) == ("model.layers.0.self_attn.q_proj", (64, 64), None)
    assert second.target == found.target
    assert str(second.target) == "50.00 % (2:4)"
    assert {matrix.zeros for matrix in found.matrices} == {0}
    assert len(found.chosen) == 12
    assert repr(found) == "<Inspection of model: llama, 94,528 parameters, 2 blocks>"
    assert found._repr_html_().count("<tr>") == 1 + 7


def test_inspect_shows_zeros_and_allocations_of_a_model_in_memory(inside: Path, pruned: coprune.Result) -> None:
    found = coprune.inspect(pruned.model, allocation="owl", processor=pruned.processor, dataset="words.txt", **SMALL)
    assert all(matrix.zeros == matrix.size // 2 for matrix in found.matrices)
    assert len({str(matrix.target) for matrix in found.matrices}) > 1
    assert sum(line.startswith("  model.layers.") for line in found.lines()) == 2
    assert found.lines()[1 + 7].startswith("allocation owl: matrices from ")
    assert coprune.inspect(pruned.model, weights=False).matrices[0].zeros is None


def test_finetune_does_what_the_command_does(
    inside: Path, tmp_path: Path, folder: Path, command: Callable[..., str]
) -> None:
    asked: dict[str, Any] = {"dataset": "words.txt", "seqlen": 16, "max_steps": 2, "eval_data": "test.txt"}
    typed = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
    told = command("finetune", folder, *typed, "--save", tmp_path / "typed", "-q")
    found = coprune.finetune(folder, "lora", save=tmp_path / "called", quiet=True, **asked)
    assert [point.loss for point in found.curve] == [
        point["loss"] for point in json.loads((tmp_path / "typed" / "finetune.json").read_text())["curve"]
    ]
    assert told.splitlines()[1:3] == str(found).splitlines()[1:3]
    change = found.perplexity[0]
    assert repr(found) == f"<FinetuneReport of pruned: lora, 2 steps, perplexity {change.line()}>"
    assert found._repr_html_().count("<tr>") == len(str(found).splitlines())
    merged = coprune.merge(folder, tmp_path / "called" / "adapter", tmp_path / "merged", quiet=True)
    assert (
        without_next(command("merge", folder, tmp_path / "called" / "adapter", tmp_path / "again", "-q"))
        == str(merged).replace(str(tmp_path / "merged"), str(tmp_path / "again")) + "\n"
    )
    assert (merged.folder, merged.sparsity, merged.matrices) == (tmp_path / "merged", 0.5, 14)
    assert repr(merged) == f"<Merged of {tmp_path / 'merged'}: 50.00 % zeros in 14 matrices>"


def test_bench_does_what_the_command_does(folder: Path, command: Callable[..., str]) -> None:
    found = coprune.bench(folder, prompt=4, tokens=2, repeats=1)
    told = without_next(command("bench", folder, "--prompt-tokens", 4, "--decode-tokens", 2, "--repeats", 1))
    assert [line.split()[:3] for line in told.splitlines()] == [line.split()[:3] for line in str(found).splitlines()]
    assert repr(found).startswith(f"<Bench of {folder.name}: ")
    assert found._repr_html_().count("<tr>") == 1 + len(found.rows)


def test_a_sweep_does_what_the_command_does(inside: Path, tmp_path: Path, command: Callable[..., str]) -> None:
    lists = {"model": "model", "dataset": "words.txt", "method": ["magnitude", "wanda"], "nsamples": 4, "seqlen": 32}
    lists |= {"eval_data": "test.txt", "save": str(tmp_path / "sweep"), "check_memory": False}
    (tmp_path / "lists.yaml").write_text(yaml.safe_dump(lists))
    planned = coprune.sweep(lists, dry_run=True)
    assert command("sweep", tmp_path / "lists.yaml", "--dry-run").splitlines() == planned.commands
    assert repr(planned) == f"<SweepResult of {tmp_path / 'sweep'}: 0 of 2 runs done>"
    found = coprune.sweep(lists, workers=1, threads=1, quiet=True)
    assert list(found.reports) == ["magnitude", "wanda"]
    assert found.failures == {}
    alone = coprune.prune("model", "wanda", dataset="words.txt", eval_data="test.txt", **SMALL).report
    assert [m.mask_checksum for m in found.reports["wanda"].matrices] == [m.mask_checksum for m in alone.matrices]
    told = command("sweep", tmp_path / "lists.yaml", "-q")  # everything is done already
    assert f"results   {tmp_path / 'sweep' / 'results.md'}" in told
    figures = [found.reports[name].perplexity[0].pruned for name in ("magnitude", "wanda")]
    assert [line.split()[0:2] for line in str(found).splitlines()[1:]] == [["magnitude", "done"], ["wanda", "done"]]
    assert all(f"perplexity {value:.2f} on test.txt" in found._repr_html_() for value in figures)
    assert all(command_line.endswith("# done") for command_line in coprune.sweep(lists, dry_run=True).commands)


def test_a_sweep_takes_either_a_file_or_a_script() -> None:
    with pytest.raises(coprune.BadInput, match="neither a file nor a script"):
        coprune.sweep()
    with pytest.raises(coprune.BadInput, match=r"a file \(lists\) and a script \(opt\) are named"):
        coprune.sweep({"model": "model"}, script="opt")
