"""Runs that round the values they keep: what is saved lies on the grid, every bit is counted, and all who come later know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import coprune
from coprune.model.edits import Edits
from coprune.model.matrices import find_matrices
from coprune.recipe.decides import Decides
from coprune.recipe.recipe import make_recipe
from coprune.report.schema import Report
from coprune.training.history import History
from support.pico_folder import save_pico, write_words
from support.saved import tensors_of


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_words(folder / "words.txt")
    write_words(folder / "test.txt", count=100, seed=1)
    return folder


def settings(texts: Path, **more: Any) -> dict[str, Any]:
    data = {"dataset": str(texts / "words.txt"), "eval_data": str(texts / "test.txt"), "eval_tokens": 64}
    return {**data, "nsamples": 4, "seqlen": 32, "prompt": "", "quiet": True, **more}


def lie_on_grid(weight: Tensor, group: int, half: int) -> bool:
    """Whether the values of every group are codes of one scale: its largest value has one of the codes, and tells the scale.

    As far as bfloat16 can hold multiples of a scale: by 2⁻⁹ of them, and the scale that is told as much.
    """
    values = weight.float().reshape(-1, group)
    largest = values.gather(1, values.abs().argmax(dim=1, keepdim=True))
    found = (largest == 0)[:, 0]
    for code in (*range(-half, 0), *range(1, half)):
        codes = values / (largest / code)
        near = (codes - codes.round()).abs() <= codes.abs() * (2**-7 if weight.dtype == torch.bfloat16 else 1e-6)
        found |= (near & (codes.round() >= -half) & (codes.round() <= half - 1)).all(dim=1)
    return bool(found.all())


def matrices_of(report: Report) -> list[str]:
    return [f"{matrix.name}.weight" for matrix in report.matrices]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_and_in_memory_the_same_grid_is_saved(dtype: Any, texts: Path, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    reports = {}
    for stream in (True, False):
        asked = settings(texts, pattern="2:4", quantize="int4:group=16", propagation="sequential", dtype=dtype)
        target = tmp_path / str(stream)
        reports[stream] = coprune.prune(folder, "sparsegpt", stream=stream, save_model=target, **asked).report
    streamed, in_memory = (tensors_of(tmp_path / str(stream)) for stream in (True, False))
    assert all(torch.equal(streamed[name], in_memory[name]) for name in streamed)
    for name in matrices_of(reports[True]):
        weight = streamed[name]
        assert lie_on_grid(weight, 16, 8), name
        assert not lie_on_grid(weight + 0.1 * weight.roll(1), 16, 8), name
        assert int((weight.reshape(-1, 4) != 0).sum(dim=1).max()) <= 2
    # Two of four at 4 bits and 2 for the place of each, and 16 bits for 16 weights.
    facts = reports[True].quantized
    assert facts is not None
    assert facts.bits_per_weight == pytest.approx((4 + 2) / 2 + 1)
    assert History.read(tmp_path / "True").grid == "int4:group=16"


def test_without_zeros_and_data_the_report_counts_every_bit(texts: Path, tmp_path: Path) -> None:
    folder, target = save_pico(tmp_path / "model"), tmp_path / "rounded"
    asked = settings(texts, sparsity=0, quantize="int8")
    result = coprune.prune(folder, "magnitude", save=tmp_path / "run", save_model=target, **asked)
    report = Report.read(tmp_path / "run" / "report.json")
    weights = {matrix.name: matrix.shape for matrix in report.matrices}
    bits = sum(rows * width * 8 + rows * 16 for rows, width in weights.values())
    in_matrices = sum(rows * width for rows, width in weights.values())
    assert report.quantized is not None
    assert report.quantized.matrix_bytes == bits // 8
    assert report.quantized.total_bytes == bits // 8 + 4 * (report.model.parameters - in_matrices)
    said = f"int8: {bits / in_matrices:.2f} bits a weight in {len(weights)} matrices"
    assert said in str(report)
    assert said in (tmp_path / "run" / "report.html").read_text()
    card = (target / "README.md").read_text()
    assert "What is kept was rounded to int8" in card
    assert "the files hold the rounded values as float32" in card
    assert result.model is not None
    before = AutoModelForCausalLM.from_pretrained(folder)
    for old, new in zip(find_matrices(before), find_matrices(result.model), strict=True):
        if old.name in weights:
            assert (old.read() - new.read()).abs().max() < 0.01 * old.read().abs().max()
            assert lie_on_grid(new.read(), new.shape[1], 128)


@pytest.mark.parametrize("propagation", ["block", "sequential"])
def test_a_block_is_trained_first_and_rounded_then(propagation: Any, texts: Path, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    asked = settings(texts, propagation=propagation, reconstruct=3, include="*.layers.*")
    results = {
        grid: coprune.prune(folder, "wanda", quantize=grid, save_model=tmp_path / str(grid), **asked)
        for grid in (None, "int4:group=16")
    }
    plain, rounded = (tensors_of(tmp_path / str(grid)) for grid in results)
    report = results["int4:group=16"].report
    assert len(report.reconstructions) == report.model.blocks
    assert {matrix.grid for matrix in report.matrices} == {"int4:group=16"}
    for name in matrices_of(report):
        assert lie_on_grid(rounded[name], 16, 8), name
        assert not (rounded[name] != 0)[plain[name] == 0].any() or ".0." not in name
    # The first block was trained alike: what is not rounded in it is the same.
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(plain[norm], rounded[norm])
    assert not torch.equal(plain[norm], tensors_of(folder)[norm])
    assert Edits.read(tmp_path / "int4:group=16").checksums() == {m.name: m.mask_checksum for m in report.matrices}


def test_a_recipe_with_a_grid_is_another_run_in_another_folder() -> None:
    recipe = make_recipe({"model": "models/pico", "pattern": "2:4", "quantize": {"name": "int4", "group": 32}})
    assert recipe.deciding(Decides.RESULT)["quantize"] == "int4:group=32"
    assert recipe.run_folder == Path("out/pico/2-4-int4-group-32/wanda")
    assert recipe.shape == "2:4, int4:group=32"
    assert make_recipe({"model": "models/pico"}).deciding(Decides.RESULT)["quantize"] is None
