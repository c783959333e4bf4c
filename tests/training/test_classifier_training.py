"""Fine-tuning of image classifiers, with the same guarantees as for text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

import coprune
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.recipe.recipe import Recipe
from coprune.recipe.views import training_recipe
from coprune.training.adapter_merge import merge
from coprune.training.finetuning import run_finetuning
from coprune.training.masks import find_masks
from support.commands import run_command
from support.pico_images import pico_pixels, save_classifier
from support.pruned import StoppedAt
from support.sample import sampled

FAMILIES = ["vit", "convnext", "transformers convnext"]
MODES = ["dense", "lora", "distill"]
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with pico classifiers pruned to 2:4 by magnitude."""
    folder = tmp_path_factory.mktemp("classifiers")
    for family in FAMILIES:
        source = save_classifier(family, folder / "dense" / family)
        options: dict[str, Any] = {"pattern": "2:4", "layer_error": False, "evaluate": False, "quiet": True}
        coprune.prune(source, "magnitude", save_model=folder / family, **options)
    return folder


def said(home: Path, folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    fast = {"max_steps": 6, "batch_size": 8, "learning_rate": 2e-3}
    data = {"dataset": "digits", "eval_images": 60, "device": "cpu"}
    return {"model": str(home / family), "mode": "dense", "save": folder, **fast, **data, **changes}


def settings(home: Path, folder: Path, family: str = "vit", **changes: Any) -> Recipe:
    return training_recipe(said(home, folder, family, **changes))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("family", "mode"),
    sampled(
        [(f, m) for f in FAMILIES for m in MODES if (f, m) != ("convnext", "lora")],
        quick=[("convnext", "dense"), ("vit", "lora"), ("transformers convnext", "distill")],
    ),
)
def test_every_mode_keeps_every_zero_of_a_classifier(home: Path, tmp_path: Path, family: str, mode: str) -> None:
    teacher = {"teacher": str(home / "dense" / family)} if mode == "distill" else {}
    report = run_finetuning(settings(home, tmp_path / "run", family, mode=mode, **teacher), QUIET)
    before, after = load(home / family), load(tmp_path / "run" / "model")
    assert find_masks(after).patterns == find_masks(before).patterns
    tuned = dict(after.named_parameters())
    changed = {name for name, parameter in before.named_parameters() if not torch.equal(parameter, tuned[name])}
    for name, zero in find_masks(before).pruned.items():
        assert not tuned[name][zero].any(), name
    convolutions = {name for name in find_masks(before).pruned if tuned[name].ndim == 4}
    assert bool(convolutions) == ("convnext" in family)
    if mode == "lora":
        assert changed == set(find_masks(before).pruned) - convolutions
    else:
        assert set(find_masks(before).pruned) <= changed
    assert report.sparsity_after >= report.sparsity_before == 0.5
    assert report.block_size is None
    assert report.perplexity == []
    (accuracy,) = report.accuracy
    assert (accuracy.data, accuracy.images) == ("digits", 60)
    low, high = accuracy.after_top1_interval
    assert low <= accuracy.after_top1 <= high
    assert (
        f"| digits | 60 | {100 * accuracy.before_top1:.2f} % |"
        in (tmp_path / "run" / "model" / "README.md").read_text()
    )
    if not family.startswith("transformers"):
        again = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True).eval()
        with torch.no_grad():
            pixels = pico_pixels(family)
            torch.testing.assert_close(again(pixels), after(pixel_values=pixels).logits)


def test_a_classifier_learns_the_digits(home: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 80, "batch_size": 32, "eval_images": 300}
    report = run_finetuning(settings(home, tmp_path / "run", **changes), QUIET)
    (accuracy,) = report.accuracy
    assert accuracy.before_top1 < 0.3
    assert accuracy.after_top1 > accuracy.before_top1_interval[1] + 0.2
    assert report.held_out[-1].loss < 0.8 * report.curve[0].loss
    assert report.sparsity_after == 0.5


@pytest.mark.slow
def test_an_interrupted_training_resumes_to_the_same_weights(home: Path, tmp_path: Path) -> None:
    run_finetuning(settings(home, tmp_path / "whole", save_every=2), QUIET)
    with pytest.raises(KeyboardInterrupt):
        run_finetuning(settings(home, tmp_path / "cut", save_every=2), StoppedAt(0.6))
    run_finetuning(settings(home, tmp_path / "cut", save_every=2), QUIET)
    whole, cut = load(tmp_path / "whole" / "model").state_dict(), load(tmp_path / "cut" / "model").state_dict()
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


def test_a_masked_adapter_of_a_classifier_is_merged_from_its_folder(home: Path, tmp_path: Path) -> None:
    run_finetuning(settings(home, tmp_path / "run", mode="lora"), QUIET)
    merge(str(home / "vit"), tmp_path / "run" / "adapter", tmp_path / "merged", quiet=True)
    expected, found = load(tmp_path / "run" / "model").state_dict(), load(tmp_path / "merged").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_classifier_is_pruned_and_fine_tuned_in_one_command(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", str(home / "dense" / "convnext"), "-m", "wanda", "-p", "2:4", "--dataset", "digits"]
    command += ["--nsamples", "16", "--eval-images", "40", "--device", "cpu", "--save", str(tmp_path / "run")]
    ended = run_command([*command, "--finetune", "dense", "--finetune-minutes", "0.02"], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "run" / "train" / "finetune.json").read_text())
    assert found["accuracy"][0]["images"] == 40
    tuned = load(tmp_path / "run" / "train" / "model")
    for name, zero in find_masks(load(tmp_path / "run" / "prune" / "model")).pruned.items():
        assert not dict(tuned.named_parameters())[name][zero].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "wikitext2"}, "wikitext2"),
        ({"dataset": None}, "name some with dataset"),
        ({"seqlen": 64}, "leave out seqlen"),
        ({"mode": "lora", "model": "convnext"}, "use mode=.dense"),  # its linear layers are 1 × 1 convolutions
        ({"train": ["nothing"]}, "matches no parameter"),
    ],
)
def test_unsupported_settings_of_classifiers_are_refused_before_writing(
    home: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    family = changes.get("model", "vit")
    given = said(home, tmp_path / "run", family)
    given |= {"teacher": str(home / "dense" / "vit")} if changes.get("mode") == "distill" else {}
    given = {name: value for name, value in {**given, **changes, "model": given["model"]}.items() if value is not None}
    with pytest.raises(BadInput, match=message):
        run_finetuning(training_recipe(given), QUIET)
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_other_classes_is_refused(home: Path, tmp_path: Path) -> None:
    teacher = load(home / "dense" / "transformers convnext")
    teacher.config.num_labels = 7
    teacher.classifier = torch.nn.Linear(teacher.config.hidden_sizes[-1], 7)
    teacher.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").write_bytes(
        (home / "dense" / "transformers convnext" / "preprocessor_config.json").read_bytes()
    )
    given = settings(home, tmp_path / "run", "transformers convnext", mode="distill", teacher=str(tmp_path / "other"))
    with pytest.raises(BadInput, match="head of 7 classes and the model a head of 10"):
        run_finetuning(given, QUIET)
