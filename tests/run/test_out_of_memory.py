"""A run out of device memory ends with one message that says where, and resumes with settings that take less."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import coprune
from coprune.base.files import sync
from coprune.base.progress import Reporter
from coprune.base.words import say
from coprune.model.blocks import Block
from coprune.model.walk.recording import Recording
from coprune.pruning import pruner
from coprune.recipe.flags import CommandLine
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.runner.run_recipe import run_recipe
from coprune.stages.run_stages import less_memory
from coprune.steps import prune as steps_prune
from support.pico import pico_model
from support.pico_folder import listing, save_pico, write_words

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full.\nMore of torch's words"
BLOCK = "model.layers.1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_pico(folder / "model", "llama")
    write_words(folder / "words.txt")
    return folder


def recipe_of(place: Path, out: Path, **more: Any) -> Recipe:
    usual = {
        "model": str(place / "model"),
        "method": "sparsegpt",
        "pattern": "2:4",
        "dataset": str(place / "words.txt"),
    }
    sizes = {"nsamples": 6, "seqlen": 16, "batch_size": 3, "evaluate": False, "stream": True}
    return make_recipe({**usual, **sizes, "save": str(out / "run"), "save_model": str(out / "pruned"), **more})


def run(recipe: Recipe) -> list[str]:
    """Return the events of a successful run."""
    return [event.line() for event in run_recipe(recipe, reporter=Reporter(quiet=True)).report.events]


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "pruned" / "model.safetensors")


def said_by(recipe: Recipe) -> str:
    with pytest.raises(coprune.OutOfMemory) as caught:
        run(recipe)
    return caught.value.text(CommandLine())


def full_where(monkeypatch: pytest.MonkeyPatch, too_much: Callable[[Recording, Tensor], bool]) -> None:
    """Simulate a device without memory for one of the blocks under a condition."""
    real = Recording.run

    def run_block(recording: Recording, block: Block, batch: int, hidden: Tensor, *more: Any) -> Tensor:
        if block.name == BLOCK and too_much(recording, hidden):
            raise torch.OutOfMemoryError(FULL)
        return real(recording, block, batch, hidden, *more)

    monkeypatch.setattr(Recording, "run", run_block)


def test_a_run_resumes_with_hidden_states_on_disk(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are the same, since they do not depend on where hidden states are stored."""
    run(recipe_of(place, tmp_path / "undisturbed"))

    def slow(path: Path) -> None:
        time.sleep(0.2)
        sync(path)

    monkeypatch.setattr("coprune.model.checkpoint.writer.sync", slow)
    full_where(monkeypatch, lambda recording, hidden: recording.hidden.bytes_in_memory > 0)
    said = said_by(recipe_of(place, tmp_path))
    assert said.startswith(f"prune: {BLOCK}: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full; the same")
    assert "resumes after its last finished block with --batch-size 1 --activation-memory 0. Restarted" in said
    assert len(said.splitlines()) == 1
    assert len(list((tmp_path / ".pruned.partial").glob("model-*.json"))) == 1
    assert run(recipe_of(place, tmp_path, activation_memory=0)) == []
    assert (
        listing(tmp_path / "pruned")["model.safetensors"]
        == (listing(tmp_path / "undisturbed" / "pruned")["model.safetensors"])
    )


def test_a_run_out_of_memory_resumes_with_smaller_batches(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished blocks are unchanged; the others equal those of smaller batches up to rounding."""
    for size in (3, 1):
        run(recipe_of(place, tmp_path / str(size), batch_size=size))
    full_where(monkeypatch, lambda recording, hidden: len(hidden) > 1)
    assert f"prune: {BLOCK}: CUDA out of memory" in said_by(recipe_of(place, tmp_path))
    # The current settings count, and a journal records all earlier ones.
    assert f"prune: {BLOCK}: CUDA out of memory" in said_by(recipe_of(place, tmp_path, batch_size=2))
    notes = run(recipe_of(place, tmp_path, batch_size=1))
    differ = "Blocks of an earlier run differ in last bits: "
    assert notes == [f"{differ}batch_size was 3 and is 2", f"{differ}batch_size was 2 and is 1"]
    found, large, small = weights(tmp_path), weights(tmp_path / "3"), weights(tmp_path / "1")
    assert found.keys() == large.keys()
    for name, weight in found.items():
        if name.startswith("model.layers.0."):
            assert torch.equal(weight, large[name])
        elif "proj" in name:
            assert int((weight != 0).sum()) == int((small[name] != 0).sum())
            torch.testing.assert_close(weight, small[name], rtol=0, atol=1e-3)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["recipe"]["batch_size"] == 1


def test_running_out_of_memory_while_pruning_names_the_block(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pruner.prune_matrix

    def prune_matrix(matrix: Any, *arguments: Any) -> Any:
        if matrix.name.startswith(BLOCK):
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return real(matrix, *arguments)

    monkeypatch.setattr(pruner, "prune_matrix", prune_matrix)
    assert said_by(recipe_of(place, tmp_path)).startswith(f"prune: {BLOCK}: CUDA error: CUBLAS_STATUS_ALLOC_FAILED")


def test_a_model_in_memory_cannot_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any) -> None:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(steps_prune, "prune_blocks", no_memory)
    with pytest.raises(coprune.OutOfMemory) as caught:
        coprune.prune(pico_model("llama"), "magnitude", evaluate=False, layer_error=False, nsamples=4, quiet=True)
    said = str(caught.value)
    assert "it takes less with batch_size=1, activation_memory=0. Restarted, it takes less with nsamples=1" in said
    assert "stream" not in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stream": False, "save_model": "m"}, "finished block with --batch-size 1 --activation-memory 0 --stream. "),
        ({"batch_size": 1, "activation_memory": 0}, "Restarted, it takes less with --nsamples 32"),
        ({"reconstruct": 2}, "with --activation-memory 0. Restarted, it takes less with --batch-size 1 --nsamples 32"),
        ({"propagation": "sequential"}, "--nsamples 32 --propagation block"),
        ({"stream": False, "permute": True, "pattern": "2:4"}, "it takes less with --activation-memory 0. Restarted"),
    ],
)
def test_advice_on_memory_suits_the_settings(settings: dict[str, Any], words: str) -> None:
    recipe = make_recipe({"model": "m", **settings})
    assert words in say(less_memory(recipe, torch.device("cpu")), CommandLine())
    there = say(less_memory(recipe, torch.device("cuda")), CommandLine())
    assert " --activation-memory" not in there
    assert "--device-activation-memory 0" in there
