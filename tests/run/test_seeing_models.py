"""Vision language models as published: only the pruned matrices of their text half change, for text and images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

import coprune
from coprune.model.checkpoint.load import prepare, quiet_transformers
from coprune.model.edits import Edits
from families.build_models import published_model
from families.kept import STRANGE
from families.shrink import tiny_config
from support.word_tokenizers import word_tokenizer

AUTO: Any = transformers.models.auto
TYPES = ("gemma3", "qwen2_5_vl", "qwen3_vl", "qwen3_5_moe", "mistral3", "internvl", "smolvlm")
BESIDE = ("vis", "multi_modal", "connector", *STRANGE)
"""Words in the names of the tower, of its projector, and of tensors that no class loads."""
ASKED: dict[str, dict[str, Any]] = {
    "zeros": {"method": "magnitude", "sparsity": 0.5},
    "channels": {"remove": "channels=0.34", "score": "magnitude"},
    "blocks": {"remove": "blocks=0.5"},
    "experts": {"remove": "experts=0.25"},
}
QUICK = {("qwen3_vl", "zeros"), ("qwen3_5_moe", "experts")}
CASES = [
    pytest.param(name, what, marks=() if (name, what) in QUICK else pytest.mark.slow)
    for name in TYPES
    for what in ASKED
    if (what == "experts") <= ("moe" in name)
]
TEXT = torch.arange(3, 259).reshape(8, 32)


def small_config(model_type: str) -> Any:
    """Return a small configuration whose sizes also match for images."""
    config = tiny_config(model_type)
    if model_type == "gemma3":
        config.mm_tokens_per_image = 4
    return config


def image_inputs(model: Any) -> dict[str, Tensor]:
    """Return an image among words, as the model's processor would prepare it."""
    config = model.config
    sees, generator = config.vision_config, torch.Generator().manual_seed(0)
    token = getattr(config, "image_token_id", None) or config.image_token_index
    if hasattr(sees, "spatial_merge_size"):
        grid, step = torch.tensor([[1, 4, 4]]), sees.spatial_merge_size
        values = sees.in_channels * sees.temporal_patch_size * sees.patch_size**2
        found = {"pixel_values": torch.randn(16, values, generator=generator), "image_grid_thw": grid}
        places = 16 // step**2
    else:
        size = sees.image_size if isinstance(sees.image_size, int) else sees.image_size[0]
        found = {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}
        if config.model_type == "mistral3":
            found["image_sizes"] = torch.tensor([[size, size]])
        if config.model_type == "smolvlm":
            found["pixel_values"] = found["pixel_values"][None]
        with torch.no_grad():
            asked = {name: value for name, value in found.items() if name != "pixel_values"}
            seen = model.get_image_features(found["pixel_values"], **asked)
        seen = getattr(seen, "pooler_output", seen)
        places = sum(part.reshape(-1, part.shape[-1]).shape[0] for part in seen)
    ids = torch.tensor([[5, 6, *[token] * places, 7, 8, 9]])
    kinds = (ids == token).int()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **({"token_type_ids": kinds} if config.model_type == "gemma3" else {}),
        **({"mm_token_type_ids": kinds} if "image_grid_thw" in found else {}),
        **found,
    }


def loaded(folder: Path) -> Any:
    """Load a folder without missing or unexpected tensors, except those that no class loads."""
    with quiet_transformers():
        opened: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    model, info = opened
    assert not info["missing_keys"]
    assert {name for name in info["unexpected_keys"] if not name.startswith("mtp.")} == set()
    return prepare(model)


def save_with_processor(model: Any, folder: Path) -> Path:
    """Save a model as published: with its processor, and a tensor that its class does not load."""
    model_type = model.config.model_type
    marks = ("image", "boi", "eoi", "video", "vision_bos", "vision_eos", "start_image", "end_image", "context_image")
    backend = word_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens={f"{mark}_token": f"w{number}" for number, mark in enumerate(marks)},
    )
    parts = {
        "image_processor": named(AUTO.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES, model_type),
        "tokenizer": tokenizer,
    }
    kind: Any = getattr(transformers, AUTO.processing_auto.PROCESSOR_MAPPING_NAMES[model_type])
    if "video_processor" in kind.get_attributes():
        parts["video_processor"] = named(AUTO.video_processing_auto.VIDEO_PROCESSOR_MAPPING_NAMES, model_type)
    with quiet_transformers():
        model.save_pretrained(folder)
        kind(**parts, chat_template="{{ messages }}").save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({**load_file(weights), **STRANGE}, weights, metadata={"format": "pt"})
    return folder


def named(classes: Any, model_type: str) -> Any:
    """Return the class that an Auto class selects for a model type."""
    return getattr(transformers, classes[model_type]["torchvision"])()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns a type's folder, made once."""
    home = tmp_path_factory.mktemp("published")

    def folder_of(model_type: str) -> Path:
        folder = home / model_type
        return (
            folder
            if folder.is_dir()
            else save_with_processor(published_model(model_type, "text", small_config(model_type)), folder)
        )

    return folder_of


def masked(source: Any, folder: Path, saved: Path) -> Any:
    """Return the source with a folder's edits applied as masks."""
    edits, stored, mine = (
        Edits.read(saved),
        load_file(saved / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    values = {}
    for name, tensor in mine.items():
        placed = edits.place(name)
        values[name] = tensor if placed is None else stored[placed]
        for edit in reversed([*edits.all()]):
            values[name] = edit.uncut(name, values[name])
        assert values[name].shape == tensor.shape
    beside = [name for name in mine if any(part in name for part in BESIDE)]
    assert len(beside) > len(STRANGE)
    for name in beside:
        assert torch.equal(stored[name], mine[name]), name
    with quiet_transformers():
        model = type(source).from_pretrained(None, config=source.config, state_dict=values, dtype=torch.float32)
    prepare(model)
    for block in edits.by_block:
        if block != "rest":
            edits.apply(block, model.get_submodule(block))
    return model


@pytest.mark.parametrize(("model_type", "what"), CASES)
def test_a_pruned_vision_language_model_answers_like_the_masked_source(
    model_type: str, what: str, published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = published(model_type)
    with quiet_transformers():
        coprune.prune(folder, save_model=tmp_path / "saved", dataset=TEXT, evaluate=False, quiet=True, **ASKED[what])
    source, made = loaded(folder), loaded(tmp_path / "saved")
    assert type(made) is type(source)
    before, after = (AutoProcessor.from_pretrained(place) for place in (folder, tmp_path / "saved"))
    assert (type(after), after.to_dict()) == (type(before), before.to_dict())
    inputs = image_inputs(source)
    with torch.no_grad():
        dense = source(**inputs, use_cache=False).logits
        expected = masked(source, folder, tmp_path / "saved")(**inputs, use_cache=False).logits
        found = made(**inputs, use_cache=False).logits
    assert float((dense - expected).abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
