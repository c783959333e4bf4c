"""Adapters beside a model's weights, in PEFT's own format, in a folder of the model's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from coprune.base.errors import VerificationError
from coprune.base.files import write_text
from coprune.model.checkpoint.load import task_of
from coprune.model.checkpoint.shards import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_entries, read_tensor
from coprune.model.low_rank_factors import Factors, factors_stored, stored_factors
from coprune.model.transformers_private import Conv1D

_PREFIX = "base_model.model."


def adapter_config(model: PreTrainedModel, factors: Mapping[str, Factors]) -> Any:
    """Return PEFT's configuration of added factors: LoRA with scale 1 on layers by their full names.

    Args:
        model: the base model.
        factors: by the names of the layers, all of one rank.
    """
    from peft import LoraConfig

    rank = len(next(iter(factors.values())).down)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=list(factors),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in factors),
        task_type="CAUSAL_LM" if task_of(model.config) == "text" else None,
        inference_mode=True,
    )


def write_adapter(folder: Path, model: PreTrainedModel, factors: Mapping[str, Factors]) -> None:
    """Write what layers add, in the model's dtype.

    Args:
        folder: which is made; what an earlier try left there is replaced.
        model: the one that they are added to.
        factors: by the names of the layers.
    """
    folder.mkdir(exist_ok=True)
    adapter_config(model, factors).save_pretrained(str(folder))
    content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    # PEFT keeps a set, whose order differs between processes.
    content["target_modules"] = list(factors)
    write_text(folder / ADAPTER_CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")
    tensors = {f"{_PREFIX}{name}": tensor for name, tensor in stored_factors(factors, model.dtype).items()}
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def verify_adapter(folder: Path, factors: Mapping[str, Factors]) -> None:
    """Raise VerificationError where a folder's adapter is another than what a model's layers add."""
    entries = read_entries(folder / ADAPTER_WEIGHTS)
    tensors = {name.removeprefix(_PREFIX): read_tensor(entry) for name, entry in entries.items()}
    for name, saved in factors_stored(tensors, factors).items():
        if not all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(saved, factors[name], strict=True)):
            raise VerificationError(f"the saved factors of {name} in {folder} differ from the computed ones")
