"""Removing channels, heads and blocks from vision transformers, with the same code as for language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor

import coprune
from coprune.base.errors import UnsupportedModel
from support.pico_images import SIZE, pico_classifier, pico_pixels, save_classifier

SETTINGS: dict[str, Any] = {"dataset": "digits", "nsamples": 8, "eval_images": 8, "align": 16, "quiet": True}


def load(folder: Path) -> PreTrainedModel:
    """Load with the released transformers, without missing or unexpected keys."""
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded: PreTrainedModel = model.eval()
    return loaded


@pytest.mark.parametrize(
    ("family", "remove", "left"),
    [
        ("transformers vit", "channels=0.4,heads=0.5", "channels 64 → 32 of every block, key-value heads"),
        # timm's names differ between checkpoint and memory.
        ("vit", "channels=0.4,blocks=0.5", "channels 128 → 80"),
        pytest.param(
            "vit of twelve blocks", "blocks=0.25", "blocks 12 → 9", marks=pytest.mark.slow
        ),  # known only from the architecture's name
    ],
)
def test_a_smaller_vision_transformer_loads_with_the_measured_outputs(
    family: str, remove: str, left: str, tmp_path: Path
) -> None:
    source = save_classifier(family, tmp_path / "dense")
    result = coprune.prune(source, remove=remove, save_model=tmp_path / "small", **SETTINGS)
    assert result.report.edits[-1].line().startswith(left)
    small, made = load(tmp_path / "small"), result.model
    assert made is not None
    pixels = pico_pixels(family)
    with torch.no_grad():
        torch.testing.assert_close(small(pixels).logits, made(pixels).logits, rtol=1e-5, atol=1e-5)
    assert small.num_parameters() < result.report.model.parameters


def classifier(family: str) -> Any:
    """Return a classifier with nonzero biases, and its image processor."""
    model = pico_classifier(family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("family", "remove", "left"),
    [
        pytest.param("transformers vit", "channels=0.4", "channels 64 → 32", marks=pytest.mark.slow),
        ("transformers vit", "heads=0.5", "key-value heads with their query heads 2 → 1"),
        pytest.param("transformers vit", "blocks=0.5", "blocks 2 → 1", marks=pytest.mark.slow),
        ("transformers dinov2", "channels=0.25", "channels 128 → 96"),  # configured as a multiple of the width
        pytest.param(
            "transformers dinov2", "heads=0.5", "key-value heads with their query heads 2 → 1", marks=pytest.mark.slow
        ),
        pytest.param("transformers dinov2", "blocks=0.5", "blocks 2 → 1", marks=pytest.mark.slow),
        pytest.param(
            "transformers deit", "channels=0.4,heads=0.5,blocks=0.5", "channels 64 → 32", marks=pytest.mark.slow
        ),
        pytest.param(
            "transformers beit", "channels=0.4,heads=0.5,blocks=0.5", "channels 64 → 32", marks=pytest.mark.slow
        ),
        pytest.param(
            "transformers swin",
            "channels=0.5",
            "channels 64 → 32 and 128 → 64 and 256 → 128 and 512 → 256",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_small_classifier_matches_the_silenced_big_one(family: str, remove: str, left: str, tmp_path: Path) -> None:
    model, processor = classifier(family), ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    if "swin" in family:
        processor.size = {"height": 64, "width": 64}
    result = coprune.prune(model, processor=processor, remove=remove, save_model=tmp_path / "small", **SETTINGS)
    assert result.report.edits[-1].line().startswith(left)
    small, pixels = load(tmp_path / "small"), pico_pixels(family)
    with torch.no_grad():
        silent, found = model(pixels).logits, small(pixels).logits
    torch.testing.assert_close(found, silent, rtol=1e-4, atol=1e-4)
    assert small.num_parameters() < model.num_parameters()


@pytest.mark.parametrize(
    ("family", "remove", "message"),
    [
        ("transformers dinov2", "channels=0.4", "no setting of the configuration of Dinov2ForImageClassification"),
        ("vit", "heads=0.5", "no heads"),
    ],
)
def test_sizes_that_a_configuration_cannot_express_are_refused(
    family: str, remove: str, message: str, tmp_path: Path
) -> None:
    source = save_classifier(family, tmp_path / "dense")
    with pytest.raises(UnsupportedModel, match=message):
        coprune.prune(source, remove=remove, **SETTINGS)
