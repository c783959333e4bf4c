"""Everything in a folder that was not removed on request is saved, in memory and streamed, or the folder is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

import coprune
from coprune.base.errors import BadInput
from coprune.model.checkpoint.load import quiet_transformers
from families.build_models import Kind, published_model
from families.kept import lost_in_silence, pruned, save_published
from support.pico_hybrids import COMMON
from support.sample import sampled
from support.whole import Differences, differences, stored_tensors

TOKENS = torch.arange(3, 515).reshape(16, 32)
ZEROS: dict[str, Any] = {"method": "magnitude", "sparsity": 0.5}
TYPES: dict[str, Kind] = {
    "gemma3": "text",  # a tower
    "qwen3_5_moe": "text",  # an Auto class loads its text half
    "glm4_moe": "text",  # layers for speculative decoding, numbered as the blocks are
    "qwen3_vl": "text",  # no end token in the configuration of its text model
    "bert": "text",  # no decoder
    "vit": "images",
}


def mtp_layer(folder: Path) -> dict[str, Tensor]:
    """Return a copy of the last block under the next number, with its projection."""
    last = json.loads((folder / "config.json").read_text())["num_hidden_layers"] - 1
    tensors = load_file(folder / "model.safetensors")
    again = {
        name.replace(f".{last}.", f".{last + 1}.", 1): 2 * t
        for name, t in tensors.items()
        if f".layers.{last}." in name
    }
    return {**again, f"model.layers.{last + 1}.eh_proj.weight": torch.ones(8, 4)}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder of every type, as published."""
    home, found = tmp_path_factory.mktemp("published"), {}
    for model_type, kind in TYPES.items():
        found[model_type] = save_published(published_model(model_type, kind), home / model_type, kind)
    weights = found["glm4_moe"] / "model.safetensors"
    save_file(load_file(weights) | mtp_layer(found["glm4_moe"]), weights, metadata={"format": "pt"})
    return found


def made(source: Path, saved: Path, stream: bool | None, **settings: Any) -> Differences:
    data = {"dataset": "digits"} if source.name == "vit" else {"dataset": TOKENS}
    return pruned(source, saved, {**data, "stream": stream, **settings})


@pytest.mark.parametrize(
    ("model_type", "stream"),
    sampled(
        [(name, stream) for name in TYPES for stream in (False, True)],
        quick=[(name, number % 2 == 0) for number, name in enumerate(TYPES)],
    ),
)
def test_pruning_changes_nothing_else(
    published: dict[str, Path], model_type: str, stream: bool, tmp_path: Path
) -> None:
    found = made(published[model_type], tmp_path / "saved", stream, **ZEROS)
    assert (found.unexplained(), found.keys) == ([], {})
    assert set(found.changed.values()) == {"zeros"}


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_removing_experts_keeps_the_vision_tower(published: dict[str, Path], stream: bool, tmp_path: Path) -> None:
    found = made(published["qwen3_5_moe"], tmp_path / "saved", stream, remove="experts=0.25")
    assert found.keys == {"text_config.num_experts": (4, 3)}
    assert {re.sub(r".*experts\.3\..*", "the last expert", name) for name in found.lost} == {"the last expert"}
    assert [line for line in found.unexplained() if not line.startswith("lost")] == []
    with quiet_transformers():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert (type(loaded[0]).__name__, loaded[1]["missing_keys"]) == ("Qwen3_5MoeForConditionalGeneration", set())


def test_parts_are_removed_before_pruning_without_a_run_folder(published: dict[str, Path], tmp_path: Path) -> None:
    found = made(published["gemma3"], tmp_path / "saved", None, remove="channels=0.34", **ZEROS)
    assert (found.unexplained(), found.keys) == ([], {"text_config.intermediate_size": (96, 64)})
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("stream", [False, True])
def test_every_tensor_keeps_its_dtype(stream: bool, tmp_path: Path) -> None:
    source = save_published(nn.Module.to(published_model("glm4_moe", "text"), torch.bfloat16), tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    router = "model.layers.1.mlp.gate.weight"
    weights[router] = weights[router].float() + 1e-4
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    found = made(source, tmp_path / "saved", stream, **ZEROS)
    assert (found.unexplained(), found.keys) == ([], {})
    assert stored_tensors(tmp_path / "saved")[router].dtype == "F32"


def test_fine_tuning_keeps_tensors_that_the_model_does_not_load(published: dict[str, Path], tmp_path: Path) -> None:
    source, words = tmp_path / "pruned", tmp_path / "words.txt"
    made(published["glm4_moe"], source, None, **ZEROS)
    words.write_text(" ".join(f"w{number % 1000}" for number in range(3000)), encoding="utf-8")
    settings: dict[str, Any] = {"dataset": str(words), "max_steps": 1, "seqlen": 32, "evaluate": False, "quiet": True}
    coprune.finetune(source, "dense", save=tmp_path / "run", save_model=tmp_path / "saved", **settings)
    found = differences(source, tmp_path / "saved")
    assert (found.lost, found.new, found.keys, found.files) == ([], [], {}, [])
    assert not any(".layers.2." in name or name.startswith("mtp") for name in found.changed)


def test_a_call_that_saves_streams_and_still_returns_the_model(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {"dataset": TOKENS, "evaluate": False, "quiet": True, "device": "cpu", **ZEROS}
    held = coprune.prune(published["glm4_moe"], **call)
    saved = coprune.prune(published["glm4_moe"], save_model=tmp_path / "saved", **call)
    assert (held.report.recipe.model.stream, saved.report.recipe.model.stream) == (False, None)
    assert held.model is not None
    assert saved.model is not None
    expected = held.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.model.state_dict().items())


HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
NOT_OPENED = {
    ("vit", "ViTModel"): "not an image classifier",
    ("bart", "BartForSequenceClassification"): "an encoder-decoder model",
    ("whisper", "WhisperForAudioClassification"): "no head that predicts tokens",
}


@pytest.mark.parametrize(("model_type", "name"), NOT_OPENED)
def test_a_model_is_refused_rather_than_loaded_as_another_architecture(
    model_type: str, name: str, tmp_path: Path
) -> None:
    layers = (
        {"encoder_layers": 1, "decoder_layers": 1, "d_model": 64, **HEADS} if model_type in ("bart", "whisper") else {}
    )
    config = AutoConfig.for_model(model_type, **{**COMMON, "num_hidden_layers": 2, **layers})
    with quiet_transformers():
        getattr(transformers, name)(config).save_pretrained(tmp_path / "source")
    with pytest.raises(
        BadInput, match=f"{name}, the model that config.json names, (is|has) {NOT_OPENED[model_type, name]}"
    ):
        made(tmp_path / "source", tmp_path / "saved", None, **ZEROS)
    assert not (tmp_path / "saved").exists()


def test_a_class_that_transformers_cannot_run_is_refused_at_worst(tmp_path: Path) -> None:
    """Llama 4 with its tower, which fails on every input in transformers 5.24."""
    source = save_published(published_model("llama4", "text"), tmp_path / "source")
    assert lost_in_silence(source, tmp_path, {"dataset": TOKENS, **ZEROS})[1] == ""
