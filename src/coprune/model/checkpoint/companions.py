"""The files that make a folder of weights a model: configuration, generation settings, tokenizer."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from transformers import PreTrainedModel

from coprune.base.files import write_text
from coprune.model.checkpoint.load import quiet_transformers, undoubled
from coprune.model.checkpoint.locate import Location, ModelFolder
from coprune.model.checkpoint.names import LICENCES, VOCABULARIES
from coprune.model.checkpoint.older_keys import add_older_keys
from coprune.model.checkpoint.shards import read_json
from coprune.recipe.parts import DtypeName

CARD_FILE = "README.md"
COPIED = ("*.json", "*.txt", "*.jinja", "*.py", *VOCABULARIES, *LICENCES)
COPIED_BELOW = ("*.json", "*.jinja", *VOCABULARIES)
"""Files copied from subfolders: further chat templates, the modules of sentence-transformers."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
MODULES_FILE = "modules.json"
MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Companions:
    """The companions of a model's weights: its tokenizer or image processor, and the dtype of its tensors."""

    processor: Any
    dtype: DtypeName = "auto"
    source: str | None = None
    """The model's source, as the user named it."""
    location: Location | None = None
    """Origin of a model in memory, while its shapes are unchanged."""


def copy_companions(source: ModelFolder, folder: Path, dtype: DtypeName = "auto") -> None:
    """Copy everything but weights from a checkpoint folder; in the configuration only the dtype changes.

    Links that lead out of the folder are skipped, and so are subfolders with weights (the same in other formats), unless
    they are modules that sentence-transformers runs after the model.

    dtype: of the written weights, "auto" for the source's own. timm's configuration may hold the number of classes twice;
    it is kept once, so that transformers can load the folder too.
    """
    for path in _beside_weights(source.path):
        copied = folder / path.relative_to(source.path)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)
    config = read_json(source.path / "config.json")
    if config.get("model_args"):
        config["model_args"] = undoubled(config["model_args"])
    if dtype not in ("auto", config.get("dtype"), config.get("torch_dtype")):
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _beside_weights(folder: Path) -> Iterator[Path]:
    """Yield the files of a checkpoint folder and its subfolders that belong to the model and are not rewritten."""
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    modules = modules_of(folder)
    for place in [folder, *sorted(path for path in inside if not path.name.startswith("."))]:
        patterns: tuple[str, ...] = COPIED if place == folder else COPIED_BELOW
        files = own_files(place)
        if place in modules:
            patterns = (*COPIED_BELOW, *MODULE_WEIGHTS)
        elif place != folder and any(path.suffix in WEIGHTS for path in files):
            continue
        for path in files:
            anew = path == folder / "config.json" or path.name.endswith(".index.json")
            if not anew and any(fnmatchcase(path.name, pattern) for pattern in patterns):
                yield path


def modules_of(folder: Path | None) -> list[Path]:
    """Return the folders of sentence-transformers' modules that run after the model; empty for other models."""
    if folder is None or not (folder / MODULES_FILE).is_file():
        return []
    try:
        listed = json.loads((folder / MODULES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    paths = [entry.get("path") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    # A name from the file may point outside this folder.
    inside = [folder / path for path in paths if isinstance(path, str) and Path(path).name == path != ".."]
    return [path for path in inside if path.is_dir() and not path.is_symlink()]


def change_config(folder: Path, *changes: Callable[[dict[str, Any]], None]) -> None:
    """Change a folder's configuration; leave the file alone if nothing differs."""
    path = folder / "config.json"
    before = read_json(path)
    after = copy.deepcopy(before)
    for change in changes:
        change(after)
    if after != before:
        write_text(path, json.dumps(after, indent=2, sort_keys=True) + "\n")


def put_into(config: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change a configuration in place. changes: values by dotted path."""
    for place, value in changes.items():
        *path, key = place.split(".")
        part = config
        for name in path:
            if part.get(name) is None:
                part[name] = {}
            part = part[name]
        part[key] = value


def places_in(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value in a configuration with its dotted path."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from places_in(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def save_companions(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Save what save_pretrained would save of a model in memory besides its weights, and the licence of its source.

    processor: its tokenizer or image processor, None for none. timm's models keep theirs in the configuration.
    """
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    change_config(folder, add_older_keys)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if processor is not None:
        with quiet_transformers():
            processor.save_pretrained(folder)
    # A model built in memory has no source, and an empty name would mean the current folder.
    if model.name_or_path and (source := Path(model.name_or_path)).is_dir():
        licences = [path for pattern in LICENCES for path in source.glob(pattern)]
        for path in licences:
            if path.is_file() and is_own(path, source):
                shutil.copyfile(path, folder / path.name)


logger = logging.getLogger(__name__)


def own_files(folder: Path, below: bool = False) -> list[Path]:
    """Return the regular files of a folder by name, skipping links that lead out of it, with a log line.

    below: include subfolders; links to folders are never followed.
    """
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        if not below:
            folders.clear()
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for path in sorted(Path(place) / name for name in [*names, *links]):
            if is_own(path, folder):
                found += [path] if path.is_file() else []
            else:
                logger.warning("%s is skipped: it is a link to something outside the model's folder", path)
    return sorted(found)


def is_own(path: Path, folder: Path) -> bool:
    """Return whether a path resolves to something in a folder or in the Hub's cache of it."""
    # Not Path.resolve, which raises on circular links.
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return True
    # models--owner--name/snapshots/REVISION/config.json -> ../../blobs/HASH
    if home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs":
        return True
    cache = Path(os.path.realpath(HF_HUB_CACHE))
    return real.is_relative_to(cache) and real.relative_to(cache).parts[1:2] == ("blobs",)
