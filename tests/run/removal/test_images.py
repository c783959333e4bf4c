"""Channels, heads and blocks of vision transformers, through the same code as those of language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

import coprune
from coprune.base.errors import UnsupportedModel
from support.pico_images import pico_pixels, save_classifier

SETTINGS: dict[str, Any] = {"dataset": "digits", "nsamples": 8, "eval_images": 8, "align": 16, "quiet": True}


def load(folder: Path) -> PreTrainedModel:
    """As the released transformers loads it, with no key missing or unexpected."""
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded: PreTrainedModel = model.eval()
    return loaded


@pytest.mark.parametrize(
    ("family", "remove", "left"),
    [
        ("transformers vit", "channels=0.4,heads=0.5", "channels 64 → 32 of every block, key-value heads"),
        ("transformers vit", "parameters=0.3", "channels 64 → 16"),
        ("vit", "blocks=0.5", "blocks 2 → 1"),  # timm's names are others in the checkpoint than in memory
    ],
)
def test_a_smaller_vision_transformer_loads_and_computes_what_was_measured(
    family: str, remove: str, left: str, tmp_path: Path
) -> None:
    source = save_classifier(family, tmp_path / "dense")
    result = coprune.prune(source, remove=remove, save_model=tmp_path / "small", **SETTINGS)
    assert result.report.edits[0].startswith(left)
    small, made = load(tmp_path / "small"), result.model
    assert made is not None
    pixels = pico_pixels(family)
    with torch.no_grad():
        torch.testing.assert_close(small(pixels).logits, made(pixels).logits, rtol=1e-5, atol=1e-5)
    assert small.num_parameters() < result.report.model.parameters


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("heads=0.5", "no heads"),
        ("channels=0.4", "no change of the configuration of TimmWrapperForImageClassification"),
    ],
)
def test_what_timm_cannot_say_is_refused(remove: str, message: str, tmp_path: Path) -> None:
    source = save_classifier("vit", tmp_path / "dense")
    with pytest.raises(UnsupportedModel, match=message):
        coprune.prune(source, remove=remove, **SETTINGS)
