"""Memory estimates for every preset from a configuration alone: downloads and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import coprune
from coprune.base.errors import BadInput
from coprune.recipe.presets import PRESETS
from support.commands import run_command
from support.pico_folder import save_pico, write_words

SMALL: dict[str, Any] = {"seqlen": 32, "nsamples": 4, "quiet": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, its configuration alone with and without the tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("estimated")
    save_pico(folder / "whole")
    shutil.copytree(folder / "whole", folder / "shape", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "bare").mkdir()
    shutil.copy(folder / "whole" / "config.json", folder / "bare")
    write_words(folder / "words.txt")
    return folder


def test_a_configuration_alone_gives_the_memory_of_every_preset(place: Path) -> None:
    asked = SMALL | {"dataset": str(place / "words.txt")}
    found = coprune.estimate(place / "shape", presets=True, **asked)
    whole = coprune.estimate(place / "whole", **asked)
    assert found.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.2)
    assert found.phases.keys() == whole.phases.keys()
    assert list(found.presets) == list(PRESETS)
    told = str(found).splitlines()
    for name in PRESETS:
        assert any(line.startswith(f"preset {name} ") and "GiB" in line for line in told)
    assert set(json.loads(found.to_json())["presets"]) == set(PRESETS)


def test_no_text_is_read_for_a_configuration_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    ended = run_command(["estimate", "bare", "--nsamples", "4", "--seqlen", "32"], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert "bare is only a configuration" in ended.err
    assert "the estimate assumes 4 samples of 32 tokens to calibrate" in ended.err
    assert "\npreset balanced " in ended.out  # without a chosen preset all are estimated
    ended = run_command(["estimate", "bare", "--preset", "fast", "--seqlen", "32"], monkeypatch, capsys)
    assert "\npreset balanced " not in ended.out


def test_a_configuration_alone_can_be_inspected_but_not_pruned(place: Path) -> None:
    found, whole = (coprune.inspect(place / name, quiet=True) for name in ("bare", "whole"))
    assert [replace(matrix, zeros=None) for matrix in whole.matrices] == list(found.matrices)
    assert found.parameters == whole.parameters
    with pytest.raises(BadInput, match=r"allocation owl needs weights, and .* is only a configuration"):
        coprune.inspect(place / "bare", allocation="owl", quiet=True)
    with pytest.raises(BadInput, match=r"holds neither model\.safetensors nor"):
        coprune.prune(place / "bare", dataset=torch.zeros(4, 32, dtype=torch.int64), evaluate=False, quiet=True)


def test_only_the_configuration_of_a_hub_id_is_fetched(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append(options)
        return str(place / "bare")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert coprune.inspect("someone/model", quiet=True).blocks
    assert "*.safetensors" in asked[0]["ignore_patterns"]
    assert "*.json" in asked[0]["allow_patterns"]


def test_impossible_sizes_in_a_configuration_are_refused(place: Path, tmp_path: Path) -> None:
    config = json.loads((place / "bare" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(BadInput, match="num_hidden_layers is 1,000,000,000, but without weights at most 1,000"):
        coprune.inspect(tmp_path, quiet=True)
