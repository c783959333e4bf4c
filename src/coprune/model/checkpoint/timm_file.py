"""A timm architecture with its weights in a file of one's own: `timm/NAME@FILE`, made a folder once and kept."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coprune.base.environment import expand_home, user_cache
from coprune.base.errors import BadInput
from coprune.base.whole_folder import whole_folder

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")


def names_timm_file(name: str) -> bool:
    """Whether a name has the form `timm/NAME@FILE`."""
    return name.startswith("timm/") and "@" in name


def folder_of_timm_file(name: str, cache_dir: Path | None = None) -> Path:
    """A folder that holds the architecture with the file's weights, as timm saves it; made only the first time.

    The head gets as many classes as the file's. Pickled files are read as tensors alone, so that no code in them runs.
    Raises BadInput for an architecture that timm does not know, or a file that is not there or does not fit it.
    """
    architecture, _, written = name.removeprefix("timm/").partition("@")
    file = expand_home(written)
    if importlib.util.find_spec("timm") is None:
        raise BadInput(f"{name} needs timm", field="model", value=name, fix="pip install 'coprune[images]'")
    from timm.models import is_model

    if not is_model(architecture):
        lists = "list its models with `python -c 'import timm; print(timm.list_models())'`"
        raise BadInput(f"timm has no model {architecture!r}", field="model", value=name, fix=lists)
    if not file.is_file():
        raise BadInput(f"there is no file {file}", field="model", value=name)
    if file.suffix not in WEIGHT_FILES:
        ends = f"its name should end in {', '.join(WEIGHT_FILES)}"
        raise BadInput(f"{file} is no file of weights", field="model", value=name, fix=ends)
    with file.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = (cache_dir or user_cache()) / "timm-files" / f"{architecture}-{content}"
    if not folder.is_dir():
        _save(architecture, file, folder)
    return folder


def _save(architecture: str, file: Path, folder: Path) -> None:
    """Build the model with timm and save it as timm does, under a temporary name until it is whole."""
    from timm.models import save_for_hf

    try:
        model = _build(architecture, file)
    except Exception as error:  # what damaged and foreign files raise has no end
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise BadInput(f"{file} does not hold the weights of timm's {architecture}: {reason[:300]}") from error
    try:
        with whole_folder(folder) as out:
            save_for_hf(model, str(out), safe_serialization=True)
    except OSError:
        if not folder.is_dir():  # another process can have been first
            raise


def _build(architecture: str, file: Path) -> Any:
    import timm
    from timm.models import get_pretrained_cfg, load_state_dict

    tensors = load_state_dict(str(file))
    settings = get_pretrained_cfg(architecture)
    heads = settings.classifier if settings is not None else None
    head = tensors.get(f"{heads if isinstance(heads, str) else next(iter(heads or ()), '')}.weight")
    classes: dict[str, Any] = {} if head is None else {"num_classes": len(head)}
    model = timm.create_model(architecture, checkpoint_path=str(file), **classes)
    return model.to(_widest(tensors.values()))


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """What holds the numbers of all tensors: a model has one dtype, and statistics of its norms may be wider than its weights."""
    kinds = {tensor.dtype for tensor in tensors if torch.is_floating_point(tensor)} - {torch.float64}
    return reduce(torch.promote_types, kinds) if kinds else torch.float32
