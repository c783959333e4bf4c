"""Presets: settings that belong together, for people who do not want to choose."""

from __future__ import annotations

from typing import Any

from coprune.base.errors import unknown_name

_REFIT: dict[str, Any] = {
    "method": "sparsegpt",
    "propagation": "sequential",
    "refine": ("refit:products=bfloat16",),
}
_TRAINED: dict[str, Any] = {
    **_REFIT,
    "finetune": "distill",
    "finetune_accumulate": 1,
    "finetune_rates": "relative",
    "finetune_dtype": "bfloat16",
}

# What each of them measured, and what was tried instead, is in docs/methods.md and LOG.md.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "wanda", "propagation": "sequential"},
    "balanced": {
        **_REFIT,
        "reconstruct": 6,
        "reconstruct_tokens": 6144,
        "reconstruct_rates": "relative",
        "reconstruct_lr": 2.5e-3,
        "reconstruct_dtype": "bfloat16",
        "batch_size": 2,
    },
    "best": {
        "method": "alps",
        "propagation": "sequential",
        "reconstruct": 200,
        "reconstruct_tokens": 204_800,
        "reconstruct_rates": "relative",
        "reconstruct_lr": 2.5e-3,
        "reconstruct_dtype": "bfloat16",
        "batch_size": 2,
    },
    # These train the whole model toward the dense one, which reaches what no block alone can mend; reconstructing blocks
    # before that adds nothing. The fewer steps there are, the longer they may be.
    "tuned": {**_TRAINED, "finetune_tokens": 12_288, "finetune_lr": 2.5e-3},
    "max": {**_TRAINED, "finetune_tokens": 102_400, "finetune_lr": 2e-3},
}


def preset_settings(name: str) -> dict[str, Any]:
    """The recipe fields of a preset, a fresh copy. Raises BadInput for an unknown name."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS, field="preset")
    return dict(PRESETS[name])
