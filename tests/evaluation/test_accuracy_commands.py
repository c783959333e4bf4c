"""`coprune eval` and `coprune compare` of classifiers, against the models' own logits."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import coprune
from coprune.data.images import labelled_images, transform_of
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate
from support.commands import run_command
from support.pico_folder import save_pico
from support.pico_images import save_classifier

LIMIT = 80


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a pico classifier, and its pruned version saved by a run."""
    folder = tmp_path_factory.mktemp("models")
    dense = save_classifier("vit", folder / "dense")
    settings: dict[str, Any] = {"sparsity": 0.9, "layer_error": False, "evaluate": False, "save": folder / "run"}
    coprune.prune(dense, "magnitude", save_model=folder / "pruned", quiet=True, **settings)
    return dense, folder / "run"


@torch.no_grad()
def predictions(folder: Path) -> tuple[Tensor, Tensor]:
    """Return each evaluation image's classes, the likeliest first, and its label."""
    model, processor = load_model(locate(folder))
    images = labelled_images("digits", "evaluation")
    chosen = [i * len(images) // LIMIT for i in range(LIMIT)]
    pixels = transform_of(processor)([images.image(i) for i in chosen])
    logits = model(pixel_values=pixels).logits
    return logits.argsort(dim=1, descending=True), images.labels[chosen]


def test_compare_shows_two_classifiers_side_by_side(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", *map(str, models), "--data", "digits", "--eval-images", str(LIMIT), "--fresh"]
    files = ["--json", str(tmp_path / "c.json"), "--csv", str(tmp_path / "c.csv"), "--markdown", str(tmp_path / "c.md")]
    ended = run_command([*command, *files], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    (dense, labels), (pruned, _) = predictions(models[0]), predictions(models[1].parent / "pruned")
    first, second = json.loads((tmp_path / "c.json").read_text())["rows"]
    right = [(ranked[:, 0] == labels).double() for ranked in (dense, pruned)]
    five = [(ranked[:, :5] == labels[:, None]).any(dim=1).double().mean().item() for ranked in (dense, pruned)]
    for row, top1, top5 in zip((first, second), right, five, strict=True):
        (found,) = row["evaluation"]["accuracy"]
        assert found["top1"] == pytest.approx(top1.mean().item())
        assert found["top5"] == pytest.approx(top5)
        assert found["top1_interval"][0] <= found["top1"] <= found["top1_interval"][1]
        assert row["evaluation"]["closeness"] == []
    assert first["accuracy_changes"] is None
    (change,) = second["accuracy_changes"]
    gained = (right[1] - right[0]).mean().item()
    same = (dense[:, 0] == pruned[:, 0]).double().mean().item()
    assert 0 < same < 1
    assert change["top1_difference"] == pytest.approx(gained)
    assert change["top1_interval"][0] <= gained <= change["top1_interval"][1]
    assert change["top5_difference"] == pytest.approx(five[1] - five[0])
    assert change["agreement"] == pytest.approx(same)
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert float(rows[1]["Δ top-1 digits"]) == pytest.approx(gained)
    assert float(rows[1]["same class digits"]) == pytest.approx(same)
    assert rows[0]["Δ top-1 digits"] == ""
    assert f"| same class digits |  | {100 * same:.2f} % |" in (tmp_path / "c.md").read_text()
    assert "top-5 digits" in ended.out


@pytest.mark.parametrize("family", ["vit", "transformers vit"])
def test_eval_measures_a_classifier(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_classifier(family, tmp_path / "model")
    command = ["eval", str(model), "--data", "digits", "--eval-images", str(LIMIT), "--json", str(tmp_path / "e.json")]
    ended = run_command(command, monkeypatch, capsys)
    assert ended.code == 0, ended.err
    ranked, labels = predictions(model)
    (found,) = json.loads((tmp_path / "e.json").read_text())["accuracy"]
    assert found["predicted"] == ranked[:, 0].tolist()
    assert found["labels"] == labels.tolist()
    assert f"top-1 {100 * (ranked[:, 0] == labels).double().mean():.2f} %" in ended.out


def test_a_classifier_is_not_compared_with_a_language_model(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = save_pico(tmp_path / "text")
    for pair in ((models[0], text), (text, models[0])):
        ended = run_command(["compare", *map(str, pair), "--data", "digits", "--fresh"], monkeypatch, capsys)
        assert ended.code == 2
        assert "classifies images and" in ended.err
