"""A model type as published, pruned from a folder: everything not removed on request has to be saved."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, ViTImageProcessor

import coprune
from coprune.base.errors import CopruneError
from coprune.model.checkpoint.load import quiet_transformers
from families.build_models import Kind, image_size
from support.whole import Differences, differences
from support.word_tokenizers import word_tokenizer

STRANGE = {"mtp.layers.0.eh_proj.weight": torch.arange(12.0, dtype=torch.bfloat16).reshape(3, 4)}
"""A tensor that no class of transformers loads, like those of layers for speculative decoding."""
COMPANIONS = {
    "preprocessor_config.json": '{"do_resize": true}',
    "processor_config.json": '{"processor_class": "SomeProcessor"}',
    "video_preprocessor_config.json": '{"fps": 2}',
    "generation_config.json": '{"do_sample": true, "temperature": 0.5}',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "LICENSE": "Use it.",
}


def save_published(
    model: PreTrainedModel, folder: Path, kind: Kind = "text", more: dict[str, Any] | None = None
) -> Path:
    """Save a model as it would be published: with other files, and tensors that its class does not load.

    more: such tensors, instead of the default one.
    """
    with quiet_transformers():
        model.save_pretrained(folder)
        if kind == "images":
            size = image_size(model.config)
            ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
        else:
            word_tokenizer().save_pretrained(folder)
    for name, content in COMPANIONS.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        if not (kind == "images" and file.exists()):
            file.write_text(content, encoding="utf-8")
    weights = folder / "model.safetensors"
    save_file({**load_file(weights), **(STRANGE if more is None else more)}, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "somebodys_key": {"kept": True}}, indent=2))
    return folder


def pruned(source: Path, saved: Path, settings: dict[str, Any]) -> Differences:
    """Prune a folder by name and return the differences. Raises coprune's errors."""
    with quiet_transformers():
        coprune.prune(source, save_model=saved, evaluate=False, quiet=True, device="cpu", **settings)
    return differences(source, saved)


def lost_in_silence(source: Path, target: Path, settings: dict[str, Any]) -> tuple[list[str], str]:
    """Prune a folder in memory and streamed, and compare files.

    Returns:
        The changes with their reasons (or the refusal), and unexplained changes, empty if all is well.
    """
    told: list[str] = []
    for stream in (False, True):
        how = "streamed" if stream else "in memory"
        try:
            found = pruned(source, target / how.replace(" ", "-"), {**settings, "stream": stream})
        except CopruneError as error:
            told.append(f"{how}: refused ({error})")
            continue
        why = Counter(found.changed.values())
        told.append(f"{how}: {', '.join(f'{count} × {name}' for name, count in why.items()) or 'nothing changed'}")
        wrong = [*found.unexplained(), *(f"{key} was {old!r} and is {new!r}" for key, (old, new) in found.keys.items())]
        if wrong:
            return told, f"{how}: {'; '.join(wrong)}"
    return told, ""
