"""The runs with golden figures: every method at two targets in three propagations on four models, and more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from coprune.pruning.methods import METHODS

PICO: dict[str, dict[str, Any]] = {
    "llama": dict(num_hidden_layers=2, intermediate_size=160),
    "gpt2": dict(n_layer=2, n_inner=64),
    "mixtral": dict(num_hidden_layers=2, num_key_value_heads=4, intermediate_size=64),
}
"""Families of models with random weights. Every matrix shape costs time, so only one model has many; its 160
inputs are more than a block of SparseGPT's columns."""
REAL = "smollm2-135m"
"""The real model, whole; `REAL_BLOCKS` has only its first blocks."""
REAL_BLOCKS = "smollm2-blocks"
KEPT_BLOCKS = 2

TARGETS: dict[str, dict[str, Any]] = {"50%": dict(sparsity=0.5), "2:4": dict(pattern="2:4")}
PROPAGATIONS = ("block", "sequential", "dense")
ALLOCATIONS = ("owl", "fisher")

# The normal tests only run quick rows; all rows together take minutes.
COSTLY_ON_WIDE = ("admm", "alps")
"""Methods that skip the widest matrix of the real blocks, which would take longer than all others together."""
SLOW_METHODS = ("ablate", "admm", "alps")
"""The slowest methods even on pico models; the normal tests run them on one model at one target."""
QUICK_METHODS = ("wanda ", "sparsegpt ")
"""Methods that the normal tests run in every propagation on every pico model; the others run in two, on one model."""


@dataclass(frozen=True)
class Row:
    """One run: its name, model, method, and other settings of `coprune.prune`."""

    name: str
    model: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    where: str = "memory"
    """memory: a copy of the loaded model; folder: the path of a checkpoint folder; named: the model's name."""
    dtype: str = "float32"
    slow: bool = False


def all_rows() -> dict[str, Row]:
    """Return every row by name."""
    rows: dict[str, Row] = {}
    for row in (*_table(), *_settings(), *_reals(), *_folders(), *_refusals()):
        assert row.name not in rows, row.name
        rows[row.name] = row
    return rows


def _table() -> Iterator[Row]:
    """Yield methods × targets × propagations × models."""
    for model in (*PICO, REAL_BLOCKS):
        for method in METHODS:
            for target, chosen in TARGETS.items():
                for propagation in PROPAGATIONS:
                    short = f"{method} {target} {propagation}"
                    settings = {**chosen, "propagation": propagation}
                    if model == REAL_BLOCKS and method in COSTLY_ON_WIDE:
                        settings["exclude"] = "*.down_proj"
                    yield Row(f"{model} {short}", model, method, settings, slow=_slow(model, short))


def _slow(model: str, short: str) -> bool:
    if model == REAL_BLOCKS:  # reading the model alone takes half a minute
        return True
    if short.startswith(SLOW_METHODS):
        return model != "llama" or not short.endswith("2:4 block")
    if short.startswith(QUICK_METHODS) and model == "llama":
        return False
    quick = model == "llama" or short.startswith(QUICK_METHODS)
    return not (quick and short.endswith(("50% block", "2:4 sequential")))


def _settings() -> Iterator[Row]:
    """Yield runs with other settings on the pico LLaMA."""
    two_four = TARGETS["2:4"]
    for target, chosen in TARGETS.items():
        for method in ("wanda", "sparsegpt"):
            yield Row(f"llama +refit {method} {target}", "llama", method, {**chosen, "refine": "refit"})
            swaps = {**chosen, "refine": "swaps"}
            yield Row(f"llama +swaps {method} {target}", "llama", method, swaps, slow=target == "2:4")
            yield Row(f"llama +bfloat16 {method} {target}", "llama", method, chosen, dtype="bfloat16")
    for allocation in ALLOCATIONS:
        yield Row(f"llama +{allocation} wanda 50%", "llama", "wanda", {"allocation": allocation})
        yield Row(f"mixtral +{allocation} sparsegpt 50%", "mixtral", "sparsegpt", {"allocation": allocation})
    for model in PICO:
        yield Row(f"{model} +permute wanda 2:4", model, "wanda", {**two_four, "permute": True})
        yield Row(f"{model} +reconstruct wanda 2:4", model, "wanda", {**two_four, **_TRAINED})
    yield Row("llama +rotate wanda 2:4", "llama", "wanda", {**two_four, "rotate": True})
    yield Row("llama +permute ria 2:4", "llama", "ria", {**two_four, "permute": True})
    yield Row("llama +reconstruct-bfloat16 wanda 50%", "llama", "wanda", _TRAINED | {"reconstruct_dtype": "bfloat16"})
    yield Row("llama +refit+reconstruct alps 2:4", "llama", "alps", {**two_four, "refine": "refit", **_TRAINED})
    yield Row("llama wanda 4:8", "llama", "wanda", {"pattern": "4:8"})
    yield Row("llama sparsegpt 1:4", "llama", "sparsegpt", {"pattern": "1:4"})
    yield Row("llama sparsegpt 70%", "llama", "sparsegpt", {"sparsity": 0.7})
    yield Row("llama wanda 0%", "llama", "wanda", {"sparsity": 0.0})
    yield Row("llama +group=matrix wanda 50%", "llama", "wanda", {"group": "matrix"})
    yield Row("llama +include wanda 50%", "llama", "wanda", {"include": ["*.q_proj", "*.layers.1.*"]})
    yield Row("llama +exclude wanda 50%", "llama", "wanda", {"exclude": "*.down_proj"})
    yield Row("llama +seed wanda 50%", "llama", "wanda", {"seed": 1})
    yield Row("llama +spilled wanda 50%", "llama", "wanda", {"activation_memory": 0.0})


_TRAINED: dict[str, Any] = {"reconstruct": 6, "reconstruct_lr": 2.5e-3}


def _reals() -> Iterator[Row]:
    """Yield one run of the whole real model, and others of its first blocks."""
    whole = {"nsamples": 4, "seqlen": 128, "eval_tokens": 2048, "dataset": "embedded", "eval_data": "embedded"}
    yield Row(f"{REAL} wanda 50%", REAL, "wanda", whole, where="named", slow=True)
    refinements: dict[str, dict[str, Any]] = {
        "refit": {"refine": "refit"},
        "swaps": {"refine": "swaps", "include": "*.0.self_attn.*"},
        "permute": {"permute": True},
        "reconstruct": {**_TRAINED, "reconstruct": 4},
    }
    for name, more in refinements.items():
        settings = {**TARGETS["2:4"], **more}
        yield Row(f"{REAL_BLOCKS} +{name} wanda 2:4", REAL_BLOCKS, "wanda", settings, slow=True)
    for allocation in ALLOCATIONS:
        settings = {"allocation": allocation}
        yield Row(f"{REAL_BLOCKS} +{allocation} wanda 50%", REAL_BLOCKS, "wanda", settings, slow=True)
    for method in ("wanda", "sparsegpt"):
        name = f"{REAL_BLOCKS} +bfloat16 {method} 2:4"
        yield Row(name, REAL_BLOCKS, method, TARGETS["2:4"], dtype="bfloat16", slow=True)


def _folders() -> Iterator[Row]:
    """Yield runs of one model from a folder: streamed block by block, and loaded."""
    for model in PICO:
        for stream in (True, False):
            name = f"{model} +{'streamed' if stream else 'loaded'} sparsegpt 2:4"
            yield Row(name, model, "sparsegpt", {**TARGETS["2:4"], "stream": stream}, where="folder")


def _refusals() -> Iterator[Row]:
    """Yield refused combinations, whose figures are the first words of the reason."""
    refused: dict[str, dict[str, Any]] = {
        "reconstruct dense": {"reconstruct": 6, "propagation": "dense"},
        "permute 50%": {"permute": True},
        "sparsity of 2:4": {"pattern": "2:4", "sparsity": 0.6},
        "3:7": {"pattern": "3:7"},
        "unknown option": {"blocksize": 3},
    }
    for name, settings in refused.items():
        yield Row(f"refused {name}", "llama", "wanda", settings)
