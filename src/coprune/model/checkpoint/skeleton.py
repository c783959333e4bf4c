"""A model without its weights: parameters have a shape but no memory, on torch's meta device.

Buffers that no checkpoint holds (rotary tables) are computed for real.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.big_modeling import init_empty_weights
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from coprune.model.checkpoint.load import class_for, prepare
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.transformers_private import build, initialize_again, name_model


def build_skeleton(
    location: ModelFolder, config: Any, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """Build the model of a folder, prepared for the walk, with its generation settings.

    Args:
        location: the folder.
        config: its configuration.
        dtype: of the parameters.
        device: where the buffers go.
        trust_remote_code: whether to run code that the folder brings.
    """

    def built() -> PreTrainedModel:
        model = build(class_for(config), config, dtype=dtype, trust_remote_code=trust_remote_code)
        _compute_buffers(model)
        return model

    with init_empty_weights(include_buffers=False):
        model = built()
    if any(buffer.is_meta for buffer in model.buffers()):
        # Some of timm's modules compute their tables where their parameters are, which therefore must be somewhere.
        model = built()
        forget_parameters(model)
    name_model(model, location.name)
    if (location.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(location.path)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return prepare(model)


def forget_parameters(root: nn.Module) -> None:
    """Put the parameters below a module on the meta device; those that are shared stay shared."""
    forgotten: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            module._parameters[name] = forgotten.setdefault(id(parameter), empty)


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute a new model's buffers again in float32, as from_pretrained does.

    While a model is built, the default dtype is its own, and some families round their position tables to it.
    """
    initialize_again(model, [module for module in model.modules() if any(True for _ in module.buffers(recurse=False))])
