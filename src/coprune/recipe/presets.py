"""Presets: settings that belong together, for users who do not want to choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from coprune.base.errors import BadInput, unknown_name
from coprune.base.words import Set, Words
from coprune.recipe.flat import PRESET, TRAIN, flatten, layered
from coprune.recipe.pattern import parse_pattern
from coprune.recipe.train_part import has_adapters

_REFIT: dict[str, Any] = {
    "method": "sparsegpt",
    "propagation": "sequential",
    "refine": ("refit:products=bfloat16",),
}
# Rotate and permute first, which does not change the model's outputs, and allocate zeros where they cost least; each only
# where it applies.
_PREPARED: dict[str, Any] = {"rotate": True, "permute": True, "allocation": "fisher"}
_BLOCK_BY_BLOCK: dict[str, Any] = {
    **_PREPARED,
    "reconstruct_dtype": "bfloat16",
    "batch_size": 2,
}
_TRAINED: dict[str, Any] = {
    **_REFIT,
    **_PREPARED,
    "finetune": "distill",
    "finetune_accumulate": 1,
    "finetune_rates": "relative",
    "finetune_only": "blocks",  # embeddings and head lost nothing and would learn noise
    "finetune_dtype": "bfloat16",
}

# For their measurements and alternatives, see docs/presets.md and LOG.md.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "wanda", "propagation": "sequential"},
    "balanced": {**_REFIT, **_BLOCK_BY_BLOCK, "reconstruct": 6, "reconstruct_tokens": 6144},
    "best": {
        "method": "alps",
        "propagation": "sequential",
        **_BLOCK_BY_BLOCK,
        "reconstruct": 200,
        "reconstruct_tokens": 204_800,
    },
}
"""Settings of the presets by name, fastest first, without training the whole model."""
# Training the whole model toward the dense one recovers what block-wise training cannot; the time for a reconstruction before
# it is better spent on more of these steps. Fewer steps allow a higher rate.
WHOLE: dict[str, dict[str, Any]] = {
    "balanced": {**_TRAINED, "finetune_tokens": 12_288, "finetune_lr": 1.5e-3},
    "best": {**_TRAINED, "finetune_tokens": 122_880, "finetune_lr": 1.2e-3},
}
"""Settings of the training presets when the whole model is trained."""
BARE = "balanced"
"""Default preset, for a run without pruning settings."""
_WAYS = ("whole", "blocks")
_HOW = {
    "method",
    "options",
    "use_variant",
    "refine",
    "allocation",
    "permute",
    "rotate",
    "propagation",
    "remove",
    PRESET,
}
MENDS = ("reconstruct", "finetune")
"""Prefixes of the settings that recover a model."""


def usual_preset(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], Words | None]:
    """Return settings with the default preset if they do not say how to prune, and a message about it."""
    said = flatten(settings)
    if any(word in _HOW or word.startswith(MENDS) for word in said) or said.get("sparsity") == 0:
        return settings, None
    line: Words = (
        f"No method given; using preset {BARE}: SparseGPT and a short training. For plain Wanda: ",
        Set("method", "wanda"),
    )
    return layered(settings, {PRESET: BARE}), line


def preset_settings(name: str, said: Mapping[str, Any] | None = None, train: str | None = None) -> dict[str, Any]:
    """Return a copy of a preset's settings that fits the user's other settings.

    Args:
        name: of the preset.
        said: settings that win over the preset's. Optional steps of the preset are left out if these rule them out: channels
        are permuted for N:M alone; the allocation is uneven only if the pattern allows it and no parts are removed; a streamed
        model gets none of these, nor rotation; adapters are trained at their own rate.

        train: `whole` trains the whole model, `blocks` (the default) one block after another.

    Returns:
        Settings by name. Raises BadInput for an unknown name.
    """
    train = train or "blocks"
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS, field=PRESET)
    if train not in _WAYS:
        raise unknown_name("way to train", train, _WAYS, field=TRAIN)
    beside = flatten(said or {})
    grouped = _is_n_of_m(beside.get("pattern"))
    adapters = has_adapters(beside.get("finetune"))
    left_out = {
        **dict.fromkeys(("finetune_rates", "finetune_lr", "finetune_only"), adapters),
        "permute": beside.get("stream") or not grouped,
        "rotate": beside.get("stream") or beside.get("sparsity") == 0,
        "allocation": grouped or beside.get("stream") or beside.get("sparsity") == 0 or bool(beside.get("remove")),
    }
    settings = WHOLE.get(name, PRESETS[name]) if train == "whole" else PRESETS[name]
    return {word: value for word, value in settings.items() if not left_out.get(word)}


def way_said(settings: Mapping[str, Any]) -> Any:
    """Return what a preset should train; None if not given, for example if `train` holds a part of a recipe."""
    way = settings.get(TRAIN)
    return None if isinstance(way, Mapping | BaseModel) else way


def with_preset(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace a preset with its settings; explicit ones win.

    Raises:
        BadInput: there is no such preset, or a setting is unknown or given twice.
    """
    preset, train = settings.get(PRESET), way_said(settings)
    own = (PRESET, *([] if isinstance(settings.get(TRAIN), Mapping | BaseModel) else [TRAIN]))
    said = {name: value for name, value in settings.items() if name not in own}
    if preset is None and train is not None:
        alone = "train is an option of presets, and no preset is given"
        raise BadInput(alone, field=TRAIN, value=train, fix=("add ", Set(PRESET, BARE)))
    if preset is None:
        return said
    if not isinstance(preset, str):
        raise BadInput(
            f"preset must be one name, not {preset!r}",
            field=PRESET,
            value=preset,
            fix=f"take one of {', '.join(PRESETS)}",
        )
    return layered(preset_settings(preset, said, train), said)


def _is_n_of_m(pattern: Any) -> bool:
    """Return whether a pattern is N:M; invalid ones are left to the recipe."""
    try:
        return isinstance(pattern, str) and parse_pattern(pattern).n_of_m is not None
    except BadInput:
        return False
