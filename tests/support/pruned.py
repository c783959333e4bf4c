"""Tiny pruned models in folders, half of their matrices 2:4 and the others unstructured, and training text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from coprune.base.progress import Reporter
from coprune.model.blocks import find_blocks
from coprune.model.matrix_choice import choose_matrices
from coprune.recipe.pattern import Target, parse_pattern
from support.pico import pico_model
from support.word_tokenizers import word_tokenizer

pytest.importorskip("peft")
VOCABULARY = 1002
TARGETS = [Target(parse_pattern("unstructured"), 0.6), Target(parse_pattern("2:4"), 0.5)]


def pruned_model(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """Return a pico model pruned by magnitude, matrices alternating between 60 % unstructured and 2:4."""
    model = pico_model(family, vocab_size=VOCABULARY, **changes)
    for position, matrix in enumerate(choose_matrices(model, find_blocks(model)).all()):
        weight = matrix.read()
        matrix.write(weight * TARGETS[position % 2].keep(weight.abs()))
    return model


class Restless(torch.optim.Optimizer):
    """An optimiser that changes every weight, whatever its gradient."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def zeros_of(model: PreTrainedModel) -> dict[str, Any]:
    return {name: parameter == 0 for name, parameter in model.named_parameters() if parameter.ndim >= 2}


def write_text(path: Path, tokens: int = 1400) -> Path:
    """Write sentences in which each word follows from the one before, so that there is something to learn."""
    generator = random.Random(0)
    words: list[str] = []
    while len(words) < tokens:
        start = generator.randrange(0, 200)
        words += [f"w{(start + 3 * i) % 200}" for i in range(generator.randint(8, 30))]
    path.write_text(" ".join(words[:tokens]))
    return path


def settings_for(folder: Path, model: Path, text: Path, **changes: Any) -> dict[str, Any]:
    """Return settings of a run of a few seconds."""
    return {
        "model": str(model),
        "dataset": str(text),
        "seqlen": 16,
        "batch_size": 2,
        "accumulate": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "device": "cpu",
        "evaluate": False,
        "gate": False,
        "held_out": 0.0,
        "save": folder,
        **changes,
    }


class StoppedAt(Reporter):
    """A reporter that raises KeyboardInterrupt after a share of the training."""

    def __init__(self, share: float) -> None:
        super().__init__(quiet=True)
        self.share = share

    def bar(self, description: str, total: float) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def bar() -> Any:
            done = 0.0

            def advance(amount: float) -> None:
                nonlocal done
                done += amount
                if description.startswith("Fine-tuning") and done >= self.share:
                    raise KeyboardInterrupt

            yield advance

        return bar()
