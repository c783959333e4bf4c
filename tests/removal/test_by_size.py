"""`--remove size=…`: the shares of channels, heads and blocks that reach a size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import coprune
from coprune.base.errors import BadInput
from coprune.recipe.recipe import make_recipe
from coprune.recipe.size import Size, size_of
from coprune.recipe.structure import shares
from support.pico import pico_model
from support.pico_folder import save_pico, write_words
from support.saved import load_clean

IDS = torch.randint(60, (4, 32), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"dataset": IDS, "align": 16, "evaluate": False}
COUNTED: dict[str, Any] = SETTINGS | {"score": "kl:tokens=64"}
"""Settings with which counting alone decides, since no map replaces blocks."""


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0.25", Size(gone=0.25)),
        ("25%", Size(gone=0.25)),
        ("100MB", Size(nbytes=100_000_000)),
        ("1.5GiB", Size(nbytes=3 << 29)),
        ("350M", Size(parameters=350_000_000)),
        ("1.2B", Size(parameters=1_200_000_000)),
    ],
)
def test_a_size_is_the_removed_share_or_the_target_size(text: str, size: Size) -> None:
    assert size_of(text) == size
    assert make_recipe({"model": "m", "remove": f"size={text}"}).remove.size == size


def test_shares_may_be_in_per_cent() -> None:
    assert shares(("channels=25%", "heads=50%")) == {"channels": 0.25, "heads": 0.5}


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        ("size=1.5", "is not a size of a model; write the share to remove"),
        ("size=0", "is not a size of a model"),
        ("size=-3MB", "is not a size of a model"),
        ("size=0.2,channels=0.1", "a target size chooses the shares of channels, heads and blocks itself"),
        ("size=0.2,vocabulary=96k", "give the size to keep: .*size=100MB"),
    ],
)
def test_invalid_sizes_are_refused(remove: str, said: str) -> None:
    with pytest.raises((BadInput, ValidationError), match=said):
        make_recipe({"model": "m", "remove": remove})


@pytest.mark.parametrize(
    ("family", "size", "kinds"),
    [
        ("llama", "0.25", ["channels"]),
        ("llama", "0.4", ["channels", "heads"]),
        ("llama", "0.45", ["channels", "heads", "blocks"]),
        ("gpt2", "0.4", ["channels"]),
        ("gemma3_text", "0.3", ["channels"]),
    ],
)
def test_at_least_the_share_is_removed_and_the_choice_is_reported(
    family: str, size: str, kinds: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = pico_model(family)
    before = model.num_parameters()
    result = coprune.prune(model, remove=f"size={size}", **COUNTED)
    left = result.model.num_parameters()
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith(f"size={size}: "))
    chosen = said.removeprefix(f"size={size}: ").partition(" leaves ")[0]
    assert [one.partition("=")[0] for one in chosen.split(",")] == kinds
    assert f"leaves {left:,} parameters" in said
    assert left <= (1 - float(size)) * before
    assert result.report.recipe.remove.parts == (f"size={size}",)


def test_the_example_is_a_quarter_smaller_on_disk(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    example = coprune.Recipe.from_yaml(Path(__file__).parents[2] / "examples" / "a-quarter-smaller.yaml")
    small = example.replaced(
        model=str(folder),
        dataset=str(write_words(tmp_path / "words.txt")),
        nsamples=4,
        seqlen=32,
        align=16,
        evaluate=False,
        generate=None,
        gate=False,
        save=tmp_path / "run",
        save_model=tmp_path / "small",
    )
    coprune.run_recipe(small)
    before, after = (
        sum(file.stat().st_size for file in place.glob("*.safetensors")) for place in (folder, tmp_path / "small")
    )
    assert 0.6 * before < after <= 0.75 * before


def test_no_smaller_share_of_channels_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    model = pico_model("llama")
    most = int(0.75 * model.num_parameters())
    coprune.prune(model, remove="size=0.25", **COUNTED)
    chosen = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("size=0.25: ")).split()[1]
    less = float(chosen.partition("=")[2]) - 16 / model.config.intermediate_size
    result = coprune.prune(pico_model("llama"), remove=f"channels={less}", quiet=True, **SETTINGS)
    assert result.model.num_parameters() > most


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bytes_and_parameters_are_those_of_the_saved_model(tmp_path: Path, stream: bool) -> None:
    folder = save_pico(tmp_path / "model", dtype=torch.bfloat16)
    before = load_clean(folder).num_parameters()
    asked: dict[str, Any] = SETTINGS | {"quiet": True, "stream": stream}
    goal = 2 * before * 7 // 10 // 1000
    coprune.prune(folder, remove=f"size={goal}KB", save_model=tmp_path / "small", **asked)
    tensors = sum(tensor.nbytes for tensor in load_clean(tmp_path / "small").state_dict().values())
    assert 0.9 * goal * 1000 < tensors <= goal * 1000
    coprune.prune(folder, remove=f"size={before * 7 // 10 // 1000}K", save_model=tmp_path / "other", **asked)
    assert load_clean(tmp_path / "other").num_parameters() <= before * 7 // 10
    assert json.loads((tmp_path / "small" / "config.json").read_text())["intermediate_size"] % 16 == 0


@pytest.mark.parametrize(
    ("size", "said"),
    [("1B", r"the model has .* parameters .* already"), ("0.99", r"at least .* parameters .* would be left")],
)
def test_an_unreachable_size_is_refused_with_the_nearest(size: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        coprune.prune(pico_model("llama"), remove=f"size={size}", quiet=True, **SETTINGS)


def test_bytes_of_blocks_of_different_widths_are_refused() -> None:
    with pytest.raises(BadInput, match=r"saved as wide as the widest, .*size=0.25.*allocation='uniform'"):
        coprune.prune(pico_model("llama"), remove="size=300KB", allocation="error", quiet=True, **SETTINGS)
