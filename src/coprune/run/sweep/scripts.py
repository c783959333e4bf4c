"""Shipped sweeps: the batch scripts of the Wanda repository, run for run.

A run of a script is what `coprune prune` makes of the script's command, in the same folder. Two things differ in where
results go: the script of the ablation writes four methods to one folder, which here get one each, and its folders
`2:4` are `2-4` here. The first LLaMA's repository, which the scripts name, has left the Hub: give `--model`.
"""

from __future__ import annotations

from typing import Any

from coprune.base.errors import unknown_name
from coprune.run.sweep.file import Sweep

_ALL_PATTERNS = ["unstructured", "2:4", "4:8"]


def _paper_table(model: str | list[str], folder: str, folders: str = "{pattern}/{method}") -> dict[str, Any]:
    """Three methods × three patterns at 50 %, in the order of the scripts."""
    return {
        "model": model,
        "method": ["wanda", "sparsegpt", "magnitude"],
        "pattern": _ALL_PATTERNS,
        "sparsity": 0.5,
        "save": folder,
        "sweep": {"folders": folders},
    }


SWEEPS: dict[str, dict[str, Any]] = {
    "llama-7b": _paper_table("decapoda-research/llama-7b-hf", "out/llama_7b"),
    "llama-13b": _paper_table("decapoda-research/llama-13b-hf", "out/llama_13b"),
    "llama-30b": _paper_table("decapoda-research/llama-30b-hf", "out/llama_30b"),
    "llama-65b": _paper_table("decapoda-research/llama-65b-hf", "out/llama_65b"),
    "llama-2-7b": _paper_table("meta-llama/Llama-2-7b-hf", "out/llama2_7b"),
    "llama-2-13b": _paper_table("meta-llama/Llama-2-13b-hf", "out/llama2_13b"),
    "llama-2-70b": _paper_table("meta-llama/Llama-2-70b-hf", "out/llama2_70b"),
    "llama-3.2-1b": _paper_table("meta-llama/Llama-3.2-1B", "out/llama_3.2_1b"),
    "opt": _paper_table(
        [f"facebook/opt-{size}" for size in ("125m", "1.3b", "2.7b", "6.7b", "13b")],
        "out/opt",
        "{model}/{pattern}/{method}",
    ),
    "ablate-weight-update": {
        "model": "decapoda-research/llama-7b-hf",
        "nsamples": 128,
        "pattern": ["unstructured", "4:8", "2:4"],
        "method": ["ablate_mag_seq", "ablate_wanda_seq", "ablate_mag_iter", "ablate_wanda_iter"],
        "sparsity": 0.5,
        "save": "out/llama_7b_ablation",
        "sweep": {"folders": "{pattern}/{method}"},
    },
}


def sweep_of_script(name: str) -> Sweep:
    """A shipped sweep. Raises BadInput for an unknown name."""
    if name not in SWEEPS:
        raise unknown_name("script", name, SWEEPS, field="script")
    return Sweep.make(SWEEPS[name])
