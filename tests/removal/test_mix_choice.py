"""A target size takes the mix of channels and blocks that loses least on the calibration text."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import coprune
from coprune.base.progress import Reporter
from coprune.recipe.recipe import make_recipe
from coprune.removal.by_size import Counted, mixes_for, with_more_blocks
from coprune.removal.channels_and_heads import find_parts
from coprune.run import context
from coprune.runner.run_recipe import run_recipe
from coprune.steps import remove as removal_stage
from support.pico import pico_model, pico_tokens
from support.pico_folder import listing, save_pico, write_words
from support.saved import assert_same_tensors, tensors_of
from support.walking import prove

SETTINGS: dict[str, Any] = {"dataset": pico_tokens(16, 32), "align": 16, "evaluate": False}
DEPTH = 6


@torch.no_grad()
def model_with(cheap: str) -> Any:
    """Return a model in which some parts hardly matter: half of all channels, or half of the blocks."""
    model: Any = pico_model("llama", num_hidden_layers=DEPTH)
    for number, layer in enumerate(model.model.layers):
        down, attention = layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight
        down.mul_(8)  # so that the MLP counts
        if cheap == "channels":
            down[:, ::2] *= 1e-3
        elif number in (2, 3, 4):
            down.mul_(1e-3)
            attention.mul_(1e-3)
    return model


def said_by(model: Any, size: str, capsys: pytest.CaptureFixture[str], **more: Any) -> tuple[dict[str, str], str, Any]:
    """Cut a model to a size; return the shares that the run reports, the line, and the smaller model."""
    result = coprune.prune(model, remove=f"size={size}", **SETTINGS | more)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith(f"size={size}: "))
    chosen = line.removeprefix(f"size={size}: ").partition(" leaves ")[0]
    return dict(one.split("=") for one in chosen.split(",")), line, result.model


@pytest.mark.parametrize("cheap", ["channels", "blocks"])
def test_the_parts_that_hardly_matter_go(cheap: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_with(cheap)
    before = model.num_parameters()
    chosen, line, small = said_by(model, "0.2", capsys)
    assert [*chosen] == [cheap]
    assert small.num_parameters() <= 0.8 * before
    assert f"leaves {small.num_parameters():,} parameters" in line
    losses = [float(loss) for loss in re.findall(r"(\d+\.\d+) with ", line)]
    assert len(losses) > 1
    assert losses == sorted(losses)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gemma3_text", {}),  # a norm leaves no place for a map
        ("llama", {"score": "influence"}),
    ],
)
def test_channels_go_first_where_no_map_replaces_blocks(
    family: str, more: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, line, _ = said_by(pico_model(family), "0.25", capsys, **more)
    assert [*chosen] == ["channels"]
    assert "Predicted loss" not in line


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_pico(folder / "llama", num_hidden_layers=DEPTH)
    write_words(folder / "words.txt")
    return folder


def cut(home: Path, out: Path, **more: Any) -> Path:
    """Cut the model of a folder to a size, and return the smaller one's folder."""
    asked = {"model": str(home / "llama"), "dataset": str(home / "words.txt"), "nsamples": 8, "seqlen": 32}
    asked |= {"remove": "size=0.2", "align": 16, "evaluate": False, "save": out / "run", "save_model": out / "small"}
    run_recipe(make_recipe(asked | more), reporter=Reporter(quiet=True))
    return out / "small"


def test_a_streamed_model_takes_the_same_mix(home: Path, tmp_path: Path) -> None:
    whole, streamed = cut(home, tmp_path / "whole"), cut(home, tmp_path / "streamed", stream=True)
    assert_same_tensors(tensors_of(streamed), tensors_of(whole))


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_resumed_run_compares_nothing_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = listing(cut(home, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(context.Run, "finish_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cut(home, tmp_path / "stopped")
    with monkeypatch.context() as patched:
        patched.setattr(removal_stage, "compare_mixes", interrupt)
        resumed = listing(cut(home, tmp_path / "stopped"))
    for folder in (whole, resumed):
        del folder["README.md"]  # contains folder names
    assert resumed == whole


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_mixes_trade_channels_for_blocks_and_never_leave_too_much(share: float) -> None:
    module = pico_model("llama", num_hidden_layers=16)
    model = prove(module, pico_tokens(1, 24))
    parts = dict(find_parts(model))
    counted, most = Counted.of(model, parts), int((1 - share) * module.num_parameters())
    first = next(mixes_for(counted, parts, most, 16))
    mixes = [first, *with_more_blocks(counted, parts, most, 16, first)]
    assert 3 <= len(mixes) <= 4
    assert all(mix.left == counted.left(mix.levels) <= most for mix in mixes)
    gone = [mix.blocks_gone([16])[0] for mix in mixes]
    kept = [mix.keep.get("channels", {96: 96})[96] for mix in mixes]
    assert gone == sorted(set(gone))
    assert kept == sorted(kept)
    assert all(one.keep != other.keep for one, other in pairwise(mixes))
