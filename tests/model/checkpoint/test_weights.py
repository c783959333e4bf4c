"""The common interface of models in memory and streamed ones."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import coprune
from coprune.model.checkpoint.companions import Companions
from coprune.model.checkpoint.lazy import LazyCheckpoint
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.source import Source
from coprune.model.checkpoint.weights import InMemory, Weights
from support.saved import load_clean, save_model


def both(folder: Path) -> dict[bool, Weights]:
    """Return a folder's model by whether it is streamed."""
    location, model = ModelFolder(folder, str(folder)), load_clean(folder)
    return {False: InMemory(model, Source(location, model)), True: LazyCheckpoint(location)}


def test_weights_know_whether_they_stream(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "model")
    for streams, weights in both(tmp_path / "model").items():
        assert weights.streams is streams
        block = weights.model.get_submodule("model.layers.0")
        weights.acquire("model.layers.0")
        with torch.no_grad():
            next(block.parameters()).zero_()
        weights.release("model.layers.0")
        weights.acquire("model.layers.0")
        assert bool((next(block.parameters()) != 0).any()) is streams  # the change is lost


def test_weights_are_saved_with_the_files_of_their_model(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "model")
    (tmp_path / "model" / "LICENSE.md").write_text("Use it.")
    (tmp_path / "secret").write_text("Nobody's business.")
    (tmp_path / "model" / "NOTICE").symlink_to(tmp_path / "secret")
    for streams, weights in both(tmp_path / "model").items():
        folder = tmp_path / str(streams)
        folder.mkdir()
        weights.write_companions(folder, Companions(None, "bfloat16" if streams else "auto"))
        config = AutoConfig.from_pretrained(folder)
        assert (folder / "LICENSE.md").read_text(encoding="utf-8") == "Use it."
        assert not (folder / "NOTICE").exists()
        assert config.architectures == ["LlamaForCausalLM"]
        assert config.dtype == (torch.bfloat16 if streams else torch.float32)


def test_tensors_that_the_model_does_not_load_are_carried(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "model", shards="1GB")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), "model.extra": torch.zeros(2)}, file, metadata={"format": "pt"})
    assert LazyCheckpoint(ModelFolder(tmp_path / "model", "model")).carried_entries.keys() == {"model.extra"}
    save_model("llama", tmp_path / "other")
    assert [{*weights.carried_entries} for weights in both(tmp_path / "other").values()] == [set(), set()]


def test_no_code_checks_whether_weights_are_in_memory_by_type() -> None:
    sources = Path(coprune.__file__).parent
    for file in sources.rglob("*.py"):
        asked = re.findall(r"isinstance\([^)]*\b(?:InMemory|LazyCheckpoint)\b", file.read_text(encoding="utf-8"))
        assert asked == [], file
