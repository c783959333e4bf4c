"""A training that could never fit in memory is refused before pruning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coprune.base.devices import DeviceMemory
from coprune.base.errors import BadInput
from coprune.model.checkpoint.locate import GgufFile, ModelFolder, locate
from coprune.recipe.recipe import make_recipe
from coprune.runner.run_recipe import run_recipe
from coprune.training import footprint
from coprune.training.footprint import TRAINED_BYTES, require_room_to_train
from support.pico import pico_model
from support.pruned import save, write_text

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("room") / "dense"
    save(pico_model("llama", vocab_size=1002), folder)
    return folder


def room_of(available: int) -> DeviceMemory:
    return DeviceMemory("cuda:0", allocated=0, peak=0, available=available)


@pytest.mark.parametrize("distills", [False, True])
def test_the_bound_is_weights_gradients_moments_and_the_teacher(dense: Path, distills: bool) -> None:
    weights = pico_model("llama", vocab_size=1002).num_parameters()
    needed = weights * (TRAINED_BYTES + 4 * distills)
    where = ModelFolder(dense, "pico")
    require_room_to_train(where, "all", distills, GPU, lambda device: room_of(needed))
    with pytest.raises(
        BadInput, match=r"training all weights of pico takes at least .* GiB on cuda:0, and .* are available"
    ):
        require_room_to_train(where, "all", distills, GPU, lambda device: room_of(needed - 1))


def test_untrained_weights_outside_the_blocks_have_no_gradients_or_moments(dense: Path) -> None:
    model = pico_model("llama", vocab_size=1002)
    weights, inside = model.num_parameters(), sum(p.numel() for p in model.model.layers.parameters())
    assert 0 < inside < weights
    needed = 16 * inside + 4 * (weights - inside) + 4 * weights
    where = ModelFolder(dense, "pico")
    require_room_to_train(where, "blocks", True, GPU, lambda device: room_of(needed))
    with pytest.raises(BadInput, match=r"training the blocks of pico takes"):
        require_room_to_train(where, "blocks", True, GPU, lambda device: room_of(needed - 1))


def test_a_quantised_file_is_counted_as_loaded() -> None:
    where = locate("smollm2-135m")
    assert isinstance(where, GgufFile)
    needed = 20 * 134_515_008  # counting the tied embeddings once
    require_room_to_train(where, "all", True, GPU, lambda device: room_of(needed))
    with pytest.raises(BadInput, match=r"2\.5 GiB"):
        require_room_to_train(where, "all", True, GPU, lambda device: room_of(needed - 1))


def test_a_training_that_cannot_fit_is_refused_before_pruning(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path / "text.txt", 200)
    asked = {"model": str(dense), "dataset": str(text), "pattern": "2:4", "seqlen": 16, "nsamples": 2, "device": "cpu"}
    asked |= {"save": tmp_path / "run", "finetune": "distill", "evaluate": False, "gate": False, "finetune_tokens": 16}
    monkeypatch.setattr(footprint, "room_on", lambda device, memory: (1000, "of memory"))
    with pytest.raises(
        BadInput,
        match=r"training all weights(?s:.*)finetune='lora-distill', finetune_lr=0\.002, finetune_rates='absolute'",
    ):
        run_recipe(make_recipe(asked))
    assert not (tmp_path / "run").exists()
    run_recipe(make_recipe(asked | {"check_memory": False}))
    assert (tmp_path / "run" / "train" / "model").is_dir()
