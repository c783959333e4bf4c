"""`coprune eval` and `coprune compare` against direct computation on pico checkpoints; the cache of evaluations."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import coprune
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.evaluation.asked_texts import split_texts
from coprune.recipe.recipe import make_recipe
from coprune.report.run_folder import model_of
from coprune.store.store import Store
from coprune.sweeps.model_comparison import compare_models, labels_of
from support.commands import run_command
from support.pico import pico_model
from support.pico_folder import pico_tokenizer, save, save_pico, write_words
from support.task_items import DEFINITIONS, word_items

SEQLEN = 32


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a dense pico model and three with increasing numbers of zeros."""
    folder = tmp_path_factory.mktemp("models")
    folders = [save_pico(folder / "dense")]
    for fraction in (0.25, 0.5, 0.75):
        model = pico_model("llama")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layers" in name and parameter.ndim == 2:
                    parameter[parameter.abs() < parameter.abs().flatten().quantile(fraction)] = 0
        save(model, folder / f"pruned-{fraction}")
        folders.append(folder / f"pruned-{fraction}")
    return folders


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "words.txt", count=200)


def test_texts_may_have_their_own_settings(
    checkpoints: list[Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [f"{text}", f"{text}@seqlen=16", f"{text}@seqlen=16@tokens=64@batch_size=1"]
    output = tmp_path / "found.json"
    command = ["eval", str(checkpoints[0]), "--data", ",".join(asked), "--seqlen", str(SEQLEN), "--json", str(output)]
    assert run_command(command, monkeypatch, capsys).code == 0
    found = json.loads(output.read_text())["perplexity"]
    assert [result["data"] for result in found] == asked
    assert [(result["seqlen"], result["windows"]) for result in found] == [(SEQLEN, 200 // SEQLEN), (16, 12), (16, 4)]
    assert found[2]["window_nll"] == pytest.approx(found[1]["window_nll"][:4], rel=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("embedded@length=9", "unknown setting of embedded: 'length'"),
        ("embedded@seqlen=1", "whole number of at least 2, not '1'"),
        ("embedded@seqlen=many", "whole number of at least 2, not 'many'"),
        ("embedded,embedded", "given twice"),
    ],
)
def test_invalid_evaluation_texts_are_refused(asked: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        split_texts(asked)


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        return torch.stack([model(window[None]).logits[0] for window in tokens]).double()


def windows_of(folder: Path, text: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][
        0
    ]
    return tokens[: len(tokens) // SEQLEN * SEQLEN].view(-1, SEQLEN)


def test_the_json_of_a_comparison_is_what_direct_computation_gives(
    checkpoints: list[Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval")
    from coprune.evaluation.harness import zero_shot
    from coprune.evaluation.zero_shot import ZeroShotSettings, compare_zero_shot

    monkeypatch.setenv("TASK_DATA", str(word_items(tmp_path / "data")))
    command = ["compare", *map(str, checkpoints), "--data", str(text), "--seqlen", str(SEQLEN), "-q"]
    command += ["--tasks", "piqa,hellaswag", "--limit", "5", "--include-path", str(DEFINITIONS)]
    command += ["--evaluation-cache", str(tmp_path / "cache"), "--json", str(tmp_path / "all.json")]
    command += ["--csv", str(tmp_path / "all.csv"), "--markdown", str(tmp_path / "all.md")]
    ended = run_command(command, monkeypatch, capsys)
    assert ended.code == 0, ended.err
    rows = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == [str(folder) for folder in checkpoints]
    settings = ZeroShotSettings(("piqa", "hellaswag"), include_path=DEFINITIONS, limit=5)
    dense_tasks = zero_shot(AutoModelForCausalLM.from_pretrained(checkpoints[0]), pico_tokenizer(), settings)
    windows = windows_of(checkpoints[0], text)
    dense = logits_of(checkpoints[0], windows)[:, :-1].log_softmax(-1)
    dense_loss = -dense.gather(-1, windows[:, 1:, None]).mean()
    for row, folder in zip(rows, checkpoints, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        weights = row["evaluation"]["weights"]
        assert weights["parameters"] == sum(p.numel() for p in model.parameters())
        assert weights["nonzeros"] == sum(int((p != 0).sum()) for p in model.parameters())
        matrices = [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
        zeros = sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)
        assert weights["matrix_sparsity"] == pytest.approx(zeros)
        assert weights["bytes_on_disk"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        found = logits_of(folder, windows)[:, :-1].log_softmax(-1)
        loss = -found.gather(-1, windows[:, 1:, None]).mean()
        measured = row["evaluation"]["perplexity"][0]
        assert measured["value"] == pytest.approx(math.exp(loss), rel=1e-4)
        tasks = zero_shot(model, pico_tokenizer(), settings)
        if row is rows[0]:
            assert row["perplexity_changes"] is None
            assert row["evaluation"]["closeness"] == []
            continue
        change = row["perplexity_changes"][0]
        assert change["ratio"] == pytest.approx(math.exp(loss - dense_loss), rel=1e-4)
        assert change["difference"] == pytest.approx(math.exp(loss) - math.exp(dense_loss), rel=1e-3, abs=1e-2)
        assert change["ratio_interval"][0] <= change["ratio"] <= change["ratio_interval"][1]
        near = row["evaluation"]["closeness"][0]
        assert near["kl"] == pytest.approx(float((dense.exp() * (dense - found)).sum(-1).mean()), rel=1e-4, abs=1e-7)
        assert near["top1_agreement"] == pytest.approx(float((dense.argmax(-1) == found.argmax(-1)).double().mean()))
        assert row["zero_shot"] == json.loads(compare_zero_shot(dense_tasks, tasks).model_dump_json())
    table = list(csv.DictReader((tmp_path / "all.csv").open(encoding="utf-8")))
    assert [float(line[f"perplexity {text}"]) for line in table] == [
        row["evaluation"]["perplexity"][0]["value"] for row in rows
    ]
    assert [line["mean acc"] for line in table] == [repr(row["zero_shot"]["mean_pruned"]["value"]) for row in rows]
    markdown = (tmp_path / "all.md").read_text(encoding="utf-8").splitlines()
    assert {line.count("|") for line in markdown} == {len(rows) + 2}
    assert f"{rows[0]['evaluation']['perplexity'][0]['value']:.2f}" in ended.out


def recipe(text: Path, **changes: Any) -> Any:
    return make_recipe({"model": "any", "eval_data": str(text), "seqlen": SEQLEN, **changes})


def test_evaluations_are_cached_until_something_changes(
    checkpoints: list[Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(folder) for folder in checkpoints[:2]]
    cache, quiet = Store(tmp_path / "cache"), Reporter(quiet=True)
    first = compare_models(names, recipe(text), quiet, cache)
    loads: list[str] = []
    quiet.listeners.append(lambda event: loads.append(event.facts()["text"]))
    assert compare_models(names, recipe(text), quiet, cache) == first
    assert loads == []
    # Other settings, another text, other weights: measured again.
    compare_models(names, recipe(text, seqlen=SEQLEN // 2), quiet, cache)
    assert len(loads) == 2
    other = write_words(tmp_path / "other.txt", count=200, seed=1)
    compare_models(names, recipe(other), quiet, cache)
    assert len(loads) == 4
    changed = pico_model("llama", seed=3)
    save(changed, tmp_path / "changed")
    third = compare_models([names[0], str(tmp_path / "changed")], recipe(text), quiet, cache)
    assert len(loads) == 6
    assert third.rows[0].evaluation == first.rows[0].evaluation
    assert third.rows[1].evaluation.perplexity[0].value != first.rows[1].evaluation.perplexity[0].value
    # A copy of the same files elsewhere is the same model.
    (tmp_path / "changed").rename(tmp_path / "moved")
    compare_models([names[0], str(tmp_path / "moved")], recipe(text), quiet, cache)
    assert len(loads) == 6


def test_a_run_folder_stands_for_its_saved_model(
    checkpoints: list[Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    prune = ["prune", str(checkpoints[0]), "-m", "magnitude", "--dataset", str(text), "--seqlen", str(SEQLEN), "-q"]
    prune += ["--nsamples", "2", "--no-eval", "--save", str(run)]
    assert run_command([*prune, "--save-model", str(model)], monkeypatch, capsys).code == 0
    cache = Store(tmp_path / "cache")
    found = compare_models([str(checkpoints[0]), str(run)], recipe(text), Reporter(quiet=True), cache, model_of)
    again = compare_models([str(checkpoints[0]), str(model)], recipe(text), Reporter(quiet=True), cache, model_of)
    assert found.rows[1].evaluation == again.rows[1].evaluation
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="no longer"):
        compare_models([str(checkpoints[0]), str(run)], recipe(text), Reporter(quiet=True), cache, model_of)


def test_eval_measures_texts_and_closeness_and_writes_json(
    checkpoints: list[Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = write_words(tmp_path / "other.txt", count=100, seed=5)
    command = ["eval", str(checkpoints[2]), "--data", f"{text},{other}", "--seqlen", str(SEQLEN), "-q"]
    command += ["--against", str(checkpoints[0]), "--json", str(tmp_path / "eval.json")]
    ended = run_command(command, monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert ended.out.count("perplexity") == 2
    assert ended.out.count("top-1 agreement") == 2
    found = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert [result["data"] for result in found["perplexity"]] == [str(text), str(other)]
    assert all(result["per_byte"] < result["value"] for result in found["perplexity"])
    assert [near["data"] for near in found["closeness"]] == [str(text), str(other)]
    assert all(near["kl"] > 0 for near in found["closeness"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "{dense}"], "two models or more"),
        (["eval", "{dense}", "--data", ""], "there is nothing to measure"),
        (["eval", "{dense}", "--tasks", "piqa", "--against", "{dense}"], "give a text with --data"),
        (["compare", "{dense}", "no/such/model", "--data", "{text}"], "no model at no/such/model"),
    ],
)
def test_eval_and_compare_refuse_bad_input(
    arguments: list[str],
    message: str,
    checkpoints: list[Path],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [argument.format(dense=checkpoints[0], text=text) for argument in arguments]
    ended = run_command(filled, monkeypatch, capsys)
    assert ended.code == 2
    assert message in ended.err


def test_evaluations_are_cached_in_the_home_by_default(
    checkpoints: list[Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    models = checkpoints[:2]
    coprune.compare(models, str(text), seqlen=SEQLEN, evaluation_cache="~/kept", quiet=True)
    assert any((tmp_path / "kept").glob("*.json"))
    for wrong, message in ((text, "is a file; name a folder"), (text / "kept", "which is not a folder")):
        with pytest.raises(BadInput, match=message):
            coprune.compare(models, str(text), seqlen=SEQLEN, evaluation_cache=wrong, quiet=True)


def test_models_with_other_tokens_compare_per_byte_with_their_own_bos(
    checkpoints: list[Path], text: Path, tmp_path: Path
) -> None:
    # A word unknown to the other tokenizer, which adds BOS.
    words = tmp_path / "words.txt"
    words.write_text(f"w1 {text.read_text()}")
    dense, other = checkpoints[0], tmp_path / "other"
    save(pico_model("llama", seed=1), other)
    pico_tokenizer("put").save_pretrained(other)
    for first, second, begins in ((dense, other, {"first", "every"}), (other, dense, {"never"})):
        found = coprune.compare([first, second, first], str(words), seqlen=SEQLEN, fresh=True, quiet=True)
        apart, same = found.rows[1:]
        assert (apart.evaluation.closeness, len(same.evaluation.closeness)) == ((), 1)
        assert apart.evaluation.bos is not None
        assert apart.evaluation.bos.used in begins
        assert apart.perplexity_changes is not None
        assert apart.perplexity_changes[0].ratio is None
        assert apart.perplexity_changes[0].bits_per_byte_difference is not None
        assert f"KL {words}" in str(found)


def test_items_of_models_with_equal_names_go_to_separate_folders() -> None:
    assert labels_of(["out/dense", "a/model", "b/model"]) == ["dense", "a__model", "b__model"]
    assert labels_of(["/data/x/foo", "org/foo"]) == ["data__x__foo", "org__foo"]


def test_unusable_files_are_refused_before_a_model_is_loaded(
    checkpoints: list[Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr("coprune.evaluation.model_source.open_model", loaded)
        ended = run_command(["eval", str(checkpoints[0]), "--data", str(tmp_path / "nowhere.txt")], monkeypatch, capsys)
        assert (ended.code, "nowhere.txt" in ended.err) == (2, True)
        for name, message in (("file/found.json", "which is not a folder"), ("", "is a folder")):
            asked = ["eval", str(checkpoints[0]), "--data", str(text), "--seqlen", "32", "--json", str(tmp_path / name)]
            ended = run_command(asked, monkeypatch, capsys)
            assert (ended.code, message in ended.err) == (2, True), ended.err
    found = str(tmp_path / "new" / "found.json")
    asked = ["eval", str(checkpoints[0]), "--data", str(text), "--seqlen", "32", "--json", found]
    assert run_command(asked, monkeypatch, capsys).code == 0
    assert json.loads((tmp_path / "new" / "found.json").read_text())["perplexity"]
