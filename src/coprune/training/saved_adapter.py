"""A saved adapter as it lies in its folder, read as if somebody had made it to mislead.

PEFT takes patterns, copies of layers and more from an adapter's configuration. Here the tensors say which layers are
adapted, and the configuration only how strongly; one that asks for more is refused.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torch import nn

from coprune.base.errors import BadInput
from coprune.model.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from coprune.model.checkpoint.header import DTYPES
from coprune.model.checkpoint.shards import TensorEntry, read_entries, read_json
from coprune.model.transformers_private import Conv1D

# What would make another model of the base, or patterns that somebody else wrote.
_REFUSED = (
    *("layer_replication", "modules_to_save", "rank_pattern", "alpha_pattern", "use_dora", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_qalora", "lora_bias"),
)
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises BadInput if it is missing or damaged, or not one of LoRA."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise BadInput(f"{folder} holds no adapter: there is no {ADAPTER_CONFIG}")
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{folder} holds no adapter of LoRA")
    return config


def adapter_settings(folder: Path, config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The settings of PEFT's LoRA for a saved adapter, with every layer by its full name.

    Args:
        folder: of the adapter.
        config: what `read_adapter_config` read in it.
        model: the one that it is to be put on.

    Raises:
        BadInput: configuration and tensors do not make one adapter of this model.
    """
    asked = [name for name in _REFUSED if config.get(name)]
    if asked or config.get("bias", "none") != "none":
        raise BadInput(f"the adapter in {folder} has {', '.join(asked) or 'biases'}, which coprune does not merge")
    rank, alpha, dropout = (config.get(name) for name in ("r", "lora_alpha", "lora_dropout"))
    if type(rank) is not int or rank < 1:
        raise BadInput(f"the adapter in {folder} has the rank {rank!r}")
    if not _is_number(alpha) or not _is_number(dropout) or not 0 <= float(dropout or 0) < 1:
        raise BadInput(f"the adapter in {folder} has the strength {alpha!r} and the dropout {dropout!r}")
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise BadInput(f"the adapter in {folder} is for {task!r}")
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "use_rslora": bool(config.get("use_rslora")),
        "task_type": task,
        "inference_mode": bool(config.get("inference_mode")),
        "target_modules": _layers(folder, rank, bool(config.get("fan_in_fan_out")), model),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _layers(folder: Path, rank: int, transposed: bool, model: nn.Module) -> list[str]:
    """Compare every tensor of an adapter with the layer that it names; the names of the layers."""
    try:
        entries = read_entries(folder / ADAPTER_WEIGHTS)
    except BadInput as error:
        raise BadInput(f"{folder / ADAPTER_WEIGHTS} is missing or damaged", fix="fetch or save it again") from error
    modules = dict(model.named_modules())
    layers: dict[str, set[str]] = {}
    for name, entry in entries.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise BadInput(f"the adapter in {folder} holds {name!r}, which is no factor of LoRA")
        _check_factor(folder, entry, found, rank, transposed, modules)
        layers.setdefault(found[1], set()).add(found[2])
    single = next((layer for layer, factors in layers.items() if len(factors) < 2), None)
    if single is not None or not layers:
        what = f"one factor of {single} only" if single is not None else "no tensors"
        raise BadInput(f"the adapter in {folder} holds {what}", fix="fetch or save it again")
    return list(layers)


def _check_factor(
    folder: Path, entry: TensorEntry, name: re.Match[str], rank: int, transposed: bool, modules: dict[str, nn.Module]
) -> None:
    """Raise BadInput where a factor does not fit its layer: A is rank × inputs, B is outputs × rank."""
    layer, factor = name[1], name[2]
    module = modules.get(layer)
    if not isinstance(module, nn.Linear | Conv1D):
        raise BadInput(f"the adapter in {folder} is of another model: this one has no layer {layer!r}")
    outputs, inputs = module.weight.shape[::-1] if transposed else module.weight.shape
    if entry.dtype not in DTYPES or not DTYPES[entry.dtype].is_floating_point:
        raise BadInput(f"the adapter in {folder} holds {name[0]} in {entry.dtype}, which is no floating number")
    wanted = (rank, inputs) if factor == "A" else (outputs, rank)
    if entry.shape != wanted:
        raise BadInput(
            f"the adapter in {folder} is of another model: {layer} is {outputs} × {inputs} here, which its tensor of "
            f"{' × '.join(map(str, entry.shape)) or 'one number'} does not fit"
        )
