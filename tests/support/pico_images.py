"""Tiny random image classifiers: timm's families in transformers' wrapper, and one of transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.models import register_model, save_for_hf
from timm.models.mlp_mixer import MlpMixer
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperConfig,
    ViTImageProcessor,
)

SIZE = 32
CLASSES = 10


@register_model
def mixer_pico(pretrained: bool = False, **arguments: Any) -> MlpMixer:
    """Build a small mixer, since timm's own have fixed sizes."""
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        arguments.pop(name, None)
    model = MlpMixer(patch_size=8, num_blocks=2, embed_dim=32, img_size=SIZE, **arguments)
    model.pretrained_cfg = {}  # type: ignore[assignment]
    return model


_VIT = dict(depth=2, img_size=SIZE, patch_size=8, embed_dim=32, num_heads=2)
_STAGES = dict(depths=(1, 2, 2, 1))
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", _VIT),
    "deit": ("deit_tiny_patch16_224", _VIT),
    "deit distilled": ("deit_tiny_distilled_patch16_224", _VIT),
    "convnext": ("convnext_atto", dict(_STAGES, dims=(8, 16, 32, 64))),
    "convnext with 1×1 convolutions": ("convnext_atto", dict(_STAGES, dims=(8, 16, 32, 64), conv_mlp=True)),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(_STAGES, img_size=SIZE, window_size=2, embed_dim=16, num_heads=(1, 2, 2, 4)),
    ),
    "mlp-mixer": ("mixer_pico", {}),
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers vit": (
        "vit",
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=SIZE,
            patch_size=8,
        ),
    ),
    "transformers convnext": ("convnext", dict(depths=[1, 2, 1, 1], hidden_sizes=[8, 16, 32, 64])),
    "transformers swin": (
        "swin",
        dict(image_size=64, window_size=2, embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 4]),
    ),
}
CLASSIFIERS = [*TIMM, *TRANSFORMERS]
_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=8)
MORE_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers dinov2": ("dinov2", _SIZES),
    "transformers deit": ("deit", dict(_SIZES, intermediate_size=64)),
    "transformers beit": ("beit", dict(_SIZES, intermediate_size=64)),
}
MORE_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit of twelve blocks": ("vit_tiny_patch16_224", {key: value for key, value in _VIT.items() if key != "depth"}),
}
"""Further families for tests of removal."""


def pico_classifier(family: str, seed: int = 0) -> PreTrainedModel:
    """Build a classifier of ten classes, in evaluation mode, with random weights large enough that every block matters."""
    torch.manual_seed(seed)
    if family in TIMM | MORE_TIMM:
        architecture, arguments = (TIMM | MORE_TIMM)[family]
        config: Any = TimmWrapperConfig(architecture=architecture, model_args=arguments)
        config.num_labels = CLASSES
        config.pretrained_cfg = {"input_size": [3, SIZE, SIZE], "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}
    else:
        kind, arguments = (TRANSFORMERS | MORE_TRANSFORMERS)[family]
        config = AutoConfig.for_model(kind, num_labels=CLASSES, **arguments)
        config.architectures = [
            f"{type(config).__name__.removesuffix('Config')}ForImageClassification"
        ]  # one of DeiT's several classes
    model: PreTrainedModel = AutoModelForImageClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.1)
            elif "gamma" in name or "layer_scale" in name:
                parameter.fill_(1.0)  # ConvNeXt's scales start at a millionth, which would hide every block
    return model.eval().requires_grad_(False)


def pico_pixels(family: str, images: int = 4, seed: int = 0) -> torch.Tensor:
    """Return random images of a family's size: N × 3 × H × W."""
    size = 64 if family == "transformers swin" else SIZE
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(seed))


def save_classifier(family: str, folder: Path) -> Path:
    """Save a pico classifier as its library would, with its image processor; return the folder."""
    model = pico_classifier(family)
    if family in TIMM | MORE_TIMM:
        inner: Any = model.timm_model
        inner.pretrained_cfg = {**inner.pretrained_cfg, **model.config.pretrained_cfg}
        save_for_hf(inner, str(folder), model_args=(TIMM | MORE_TIMM)[family][1], safe_serialization=True)
    else:
        model.save_pretrained(folder)
        ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder
