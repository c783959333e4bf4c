"""A small model with rows of 256 to export, and how far a file's logits in llama.cpp are from those of its model."""

from __future__ import annotations

from pathlib import Path

import torch

from coprune.gguf_files.llama_cpp import LlamaCpp
from support.pico import pico_model, pico_tokens
from support.pico_folder import save
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.saved import load_clean


def exportable(folder: Path) -> tuple[Path, Path]:
    """Save a Llama; return its folder and a file of it in float32."""
    model = distinct_norms(pico_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2))
    save(model, folder / "dense")
    return folder / "dense", write_pico_gguf(model, folder / "f32.gguf")


def distance(file: Path, dense: Path) -> float:
    """Return the norm of the difference of logits between a file in llama.cpp and a folder in transformers."""
    tokens = pico_tokens(1, 128)
    with torch.no_grad():
        expected = load_clean(dense)(tokens).logits[0]
    engine = LlamaCpp(file)
    found = float((engine.logits(tokens[0].tolist()) - expected).norm())
    engine.close()
    return found
