"""Shrink any of transformers' configurations by rule: sizes by their names, layers by their kinds.

Exceptions for single families are in `exceptions.py`, with reasons.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families.exceptions import EXCEPTIONS

VOCABULARY = 1024
"""Slightly more than the words of the tests' tokenizer."""
FIRST_MARK = 1004
"""First token id that is no word, but for images, ends or padding."""
MOST_LAYERS = 8

# The first pattern that matches a name decides; sizes never grow.
_SIZES: list[tuple[str, int]] = [
    (r"vocab|^n_words$", VOCABULARY),
    (r"^(max|n)_(position|seq|target|source|ctx|2d)|max_.*(len|positions)|context_length|^n_ctx$", 128),
    (r"image_size|crop_size", 32),
    (r"patch_size", 8),
    (r"num_latents", 16),
    (r"self_attends", 2),
    (r"window|chunk|block_size|^local_attention$|index_topk", 16),
    (r"experts?_per_tok|top_?k|moe_k$", 2),
    (r"shared_experts?$", 1),
    (r"topk_group", 1),
    (r"n_groups?$", 2),
    (r"mamba.*(d_head|head_dim)", 32),
    (r"head_dim|head_size|dim_head|kv_channels|d_head|^d_kv$|^key_dim$|dim_key", 16),
    (r"rope.*dim|rotary_dim", 8),
    (r"rank", 16),
    (r"(key_value|kv|key).*heads", 2),
    (r"heads|n_head", 4),
    (r"moe.*(size|dim)|expert.*size", 32),
    (r"experts?(_num)?$|num_local_experts", 4),
    (r"period|interval|every_n|_step$|layer_group_size|_freq$|stride_layers", 2),
    (r"(^|_)(num|n|encoder|decoder)_.*layers?$|_layers$|^n_layer$|^depth$", 2),
    (r"intermediate|ffn|inner|feed_forward|^d_?ff$|dim_ff|mlp_(dim|size)", 96),
    (r"state", 16),
    (r"hidden|d_model|dim|width|n_embd|embed|channels|d_latents|size$", 64),
]
_KEPT = r"multiple|label|divis|kernel|conv|segment|type_vocab|pad_idx|lang|factor|merge|stride|reduction|temporal"
_LAYERS = r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers)$"
_SCALE = (
    ("layers", _LAYERS),
    ("width", r"^(hidden_size|d_model|n_embd|intermediate_size|adapter_in_dim|adapter_input_size)$"),
)
_WIDTHS = r"hidden_sizes|embed_dims?$|base_attn_unit_dims|channels$"


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return the configuration of a tiny model of a type. Raises transformers' errors for inconsistent values."""
    return _shrunk(CONFIG_MAPPING[model_type], model_type)


def _shrunk(kind: type[PreTrainedConfig], model_type: str, beside: PreTrainedConfig | None = None) -> PreTrainedConfig:
    """Shrink a configuration. beside: that of the text model, if this is its tower for images or sound."""
    own, default = EXCEPTIONS.get(model_type), kind()
    changes = _changes(default)
    if beside is not None:
        changes |= _in_proportion(changes, default, beside) | _few_layers(default)
    return kind(**{**changes, **(own.settings if own else {})})


def _in_proportion(changes: dict[str, Any], default: PreTrainedConfig, beside: PreTrainedConfig) -> dict[str, Any]:
    """Return the depth and width of a tower in the same proportion to its text model as in full size."""
    ours, theirs = (
        {key: [v for n, v, _ in _values(config) if re.search(pattern, n) and type(v) is int] for key, pattern in _SCALE}
        for config in (default, beside)
    )
    scaled = {}
    for name, value in changes.items():
        for key, pattern in _SCALE:
            if type(value) is int and re.search(pattern, name) and ours[key] and theirs[key]:
                least = 1 if key == "layers" else 16
                wanted = value * max(ours[key]) / max(theirs[key])
                scaled[name] = least * max(1, round((wanted if key == "layers" else min(wanted, value)) / least))
    return scaled


def _changes(default: PreTrainedConfig) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    text = next((value for name, value, _ in _values(default) if name == "text_config"), default)
    heads = next((value for name, value, _ in _values(default) if name == "num_attention_heads"), None)
    for name, value, derived in _values(default):
        if isinstance(value, PreTrainedConfig):
            sees = re.search(r"vision|audio|image", name) is not None
            changes[name] = _shrunk(type(value), value.model_type, text if sees else None)
        elif isinstance(value, int) and not isinstance(value, bool) and not derived:
            changes[name] = small(name, value)
            if re.search(r"(key_value|kv)_heads$", name) and value == heads:
                changes[name] = small("heads", value)
        elif isinstance(value, list | tuple) and value and not derived:
            changes[name] = _small_list(name, value)
        elif name == "eos_token_id" and isinstance(value, list):
            changes[name] = FIRST_MARK
    changes = {name: value for name, value in changes.items() if value is not None}
    return changes | _few_layers(default)


def _values(config: PreTrainedConfig) -> Iterator[tuple[str, Any, bool]]:
    """Yield the fields of a configuration: name, value, and whether it follows from others."""
    for field in fields(config):
        try:
            value = getattr(config, field.name)
        except (AttributeError, RuntimeError):  # values that differ between layers
            value = field.default
        if not field.name.startswith("_"):
            yield field.name, value, field.default is None


def small(name: str, value: int) -> int:
    """Return a size (or a token's id) as small as its name allows."""
    if re.search(r"(token_id|token_index|_ids?|_index|_idx)$", name):
        return value if value < FIRST_MARK else FIRST_MARK + value % (VOCABULARY - FIRST_MARK)
    if re.search(_KEPT, name):
        return value
    return next((min(value, size) for pattern, size in _SIZES if re.search(pattern, name)), value)


def _small_list(name: str, value: list[Any] | tuple[Any, ...]) -> Any:
    """Shrink a list with a value per stage: short stages, and widths in proportion from 16 on."""
    if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value):
        return None
    if re.search(r"^depths?$|num_blocks|block_repeats|n_attn_blocks", name):
        return type(value)(min(entry, 2 if position == 1 else 1) for position, entry in enumerate(value))
    if re.search(_WIDTHS, name) and min(value) >= 16:
        return type(value)(16 * max(1, round(entry / min(value))) for entry in value)
    return type(value)(small(name, entry) for entry in value) if re.search(r"image_size|token_id$", name) else None


def _few_layers(default: PreTrainedConfig) -> dict[str, Any]:
    """Keep one layer of each kind, at least two, and shorten lists with a value per layer."""
    counts = {name: value for name, value, _ in _values(default) if re.search(_LAYERS, name) and isinstance(value, int)}
    if not counts:
        return {}
    layers = max(counts.values())
    lists = {
        name: list(value)
        for name, value, _ in _values(default)
        if isinstance(value, list | tuple) and len(value) == layers > 1
    }
    if not lists:
        return {}
    kinds = list(dict.fromkeys(zip(*(map(str, value) for value in lists.values()), strict=True)))[:MOST_LAYERS]
    rows = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    chosen = [rows.index(kind) for kind in kinds]
    chosen = sorted(chosen if len(chosen) > 1 else [chosen[0], *[i for i in range(layers) if i not in chosen][:1]])
    shorter = {name: [value[i] for i in chosen] for name, value in lists.items()}
    sized = {
        name: [small(name, entry) if type(entry) is int else entry for entry in value]
        for name, value in shorter.items()
    }
    return sized | {name: len(chosen) for name in counts}
