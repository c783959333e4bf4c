"""PEFT adapters as models: PEFT merges one into its base, once, in a cached folder that everything else reads."""

from __future__ import annotations

import importlib.util
import logging
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from coprune.base.environment import expand_home, user_cache
from coprune.base.errors import BadInput, CopruneError
from coprune.base.files import digest_of_files, whole_folder
from coprune.base.validation import explain
from coprune.base.words import Command, Words
from coprune.model.checkpoint.names import LICENCES, VOCABULARIES
from coprune.model.checkpoint.shards import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DTYPES,
    TensorEntry,
    read_entries,
    read_json,
)
from coprune.model.transformers_private import OWN_LAYERS, own_class

logger = logging.getLogger(__name__)

_BESIDE = ("*.json", "*.txt", "*.jinja", *VOCABULARIES, *LICENCES)
"""Files copied beside the merged weights, from the base and from the adapter (its tokenizer); the adapter's take precedence."""
_NOT_BESIDE = ("config.json", "*.index.json", ADAPTER_CONFIG)
_OF_LORA = re.compile(r"base_model\.model\.(.+)\.lora_[A-Za-z_]+(?:\.weight)?")
_PLAIN = re.compile(r"[\w.]+")
_PRUNED = 0.05
"""Minimum share of zeros in the adapted matrices for a base to count as pruned."""


class _Adapter(BaseModel):
    """The fields of adapter_config.json that are read here."""

    model_config = ConfigDict(extra="ignore", strict=True)

    base_model_name_or_path: str = Field(min_length=1)
    peft_type: str
    r: int = Field(1, ge=1)
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    coprune_masks: str | None = None
    megatron_config: None = None
    auto_mapping: dict[str, Any] | None = None
    layer_replication: None = None


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a PEFT adapter rather than a model."""
    others = (file for file in folder.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS)
    return (folder / ADAPTER_CONFIG).is_file() and not any(others)


def base_of(folder: Path, cache_dir: Path | None = None) -> Path:
    """Return the folder of an adapter's base model. Raises BadInput where it is not on this machine."""
    name = _read(folder).base_model_name_or_path
    path = expand_home(name)
    if (path / "config.json").is_file():
        return path
    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, local_files_only=True))
    except (OSError, ValueError) as error:  # ValueError: not a valid Hub id
        fix = f"fetch that (hf download {name}), or write the path of its folder as base_model_name_or_path in {ADAPTER_CONFIG}"
        raise _wrong(folder, f"an adapter of {name}, which is not on this machine", fix) from error


def merged_folder(folder: Path, base: Path, cache_dir: Path | None = None) -> Path:
    """Merge an adapter into its base on first use, and return the cached folder.

    Args:
        folder: the adapter.
        base: its base model; `base_of` finds it.
        cache_dir: coprune's cache [the user's].

    Raises:
        BadInput: PEFT is missing, the adapter is not LoRA or does not fit the base, or the base is pruned.
    """
    _require_mergeable(folder, base)
    # Found by content: another adapter or base under the same name is another model.
    digest = _digest(*_identity(folder), *_identity(base))
    target = (cache_dir or user_cache()) / "merged-adapters" / digest
    _tell(folder, base, target, target.is_dir())
    if not target.is_dir():
        _make(folder, base, target)
    return target


def _identity(folder: Path) -> tuple[tuple[Path, int, int], ...]:
    files = sorted({*folder.glob("*.safetensors"), *folder.glob("*.json")})
    return tuple((file, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)


@cache
def _digest(*files: tuple[Path, int, int]) -> str:
    return digest_of_files(path for path, _, _ in files)


@cache
def _tell(folder: Path, base: Path, target: Path, known: bool) -> None:
    """Log once which merged model is used instead of the adapter."""
    if known:
        logger.warning("%s is an adapter of %s; using the merged model in %s", folder, base, target)
    else:
        logger.warning("Merging the adapter %s into %s", folder, base)


def _read(folder: Path) -> _Adapter:
    try:
        return _Adapter.model_validate(read_json(folder / ADAPTER_CONFIG))
    except ValidationError as error:
        raise explain(error).within(str(folder / ADAPTER_CONFIG)) from None


def _wrong(folder: Path, what: str, fix: Words | None = None) -> BadInput:
    return BadInput(f"{folder} is {what}", field="model", value=str(folder), fix=fix)


def _require_mergeable(folder: Path, base: Path) -> None:
    """Raise BadInput if the files alone show that the merge would fail."""
    config, of = _read(folder), f"an adapter of {base}"
    fix: Words
    if config.coprune_masks is not None:
        fix = ("merge it, which keeps every zero: ", Command("merge", base, folder, "OUT"))
        raise _wrong(folder, f"{of} that was trained with its masks", fix)
    if config.peft_type != "LORA":
        fix = "merge it with PEFT's merge_and_unload() and save the result"
        raise _wrong(folder, f"{of} of type {config.peft_type}; only LORA can be merged here", fix)
    if "quantization_config" in read_json(base / "config.json"):
        fix = "name the folder of the unquantised model as base_model_name_or_path"
        raise _wrong(folder, f"{of}, which is quantised", fix)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise _wrong(folder, f"{of} without {ADAPTER_WEIGHTS}", "save it again with PEFT, as safetensors")
    if importlib.util.find_spec("peft") is None:
        raise _wrong(folder, of, "pip install 'coprune[finetune]'")
    entries = read_entries(folder / ADAPTER_WEIGHTS)
    most = max((size for entry in entries.values() for size in entry.shape), default=0)
    ranks = config.rank_pattern or {}
    patterns = [name for name in {**ranks, **(config.alpha_pattern or {})} if not _PLAIN.fullmatch(name)]
    if max(config.r, *ranks.values(), 1) > most or patterns or not _layers(entries):
        raise _wrong(folder, f"{of} whose configuration does not fit its tensors", "fetch or save it again")


def _layers(entries: dict[str, TensorEntry]) -> list[str]:
    """Return the full names of the layers that have LoRA factors."""
    found = (_OF_LORA.fullmatch(name) for name, entry in entries.items() if entry.dtype in DTYPES)
    return sorted({match[1] for match in found if match is not None})


def _make(folder: Path, base: Path, target: Path) -> None:
    """Merge and save under a temporary name, renamed when complete."""
    merged = _merged(folder, base)
    try:
        with whole_folder(target) as out, _quietly():
            merged.save_pretrained(out)
            for source in (base, folder):
                _copy_beside(source, out)
    except OSError:
        if not target.is_dir():  # another process may have been faster
            raise


def _copy_beside(source: Path, out: Path) -> None:
    for pattern in _BESIDE:
        for file in source.glob(pattern):
            if file.is_file() and not any(file.match(name) for name in _NOT_BESIDE):
                shutil.copyfile(file, out / file.name)


def _merged(folder: Path, base: Path) -> PreTrainedModel:
    from peft import PeftModel

    try:
        with _quietly() as said:
            config = AutoConfig.from_pretrained(base)
            loader = own_class(config) or AutoModelForCausalLM
            model = loader.from_pretrained(base, dtype="auto", **OWN_LAYERS)
            _require_fitting(folder, base, model)
            adapted = PeftModel.from_pretrained(model, str(folder), config=_settings(folder))
            _require_dense(folder, base, adapted)
            merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except (CopruneError, MemoryError):
        raise
    except Exception as error:  # damaged adapters can raise almost anything
        reason = " ".join(str(error).split())[:300] or repr(error)
        raise _wrong(folder, f"an adapter that cannot be merged into {base}: {reason}") from error
    if any("missing adapter keys" in line for line in said):
        raise _wrong(folder, f"an adapter of {base} that lacks tensors", "fetch or save it again")
    return merged


def _require_fitting(folder: Path, base: Path, model: nn.Module) -> None:
    """Raise BadInput where a tensor is of a layer that the base lacks; PEFT would leave it out."""
    layers, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    for name in read_entries(folder / ADAPTER_WEIGHTS):
        found = _OF_LORA.fullmatch(name)
        if name.removeprefix("base_model.model.") not in parameters if found is None else found[1] not in layers:
            fix = "was it trained on another model or version?"
            raise _wrong(folder, f"not an adapter of {base}, which has no layer for {name}", fix)


def _settings(folder: Path) -> Any:
    """Return PEFT's configuration, with full layer names instead of its patterns, which are untrusted input."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    layers: dict[str, Any] = {
        "target_modules": _layers(read_entries(folder / ADAPTER_WEIGHTS)),
        "exclude_modules": None,
    }
    for name, value in (layers | {"layers_to_transform": None, "layers_pattern": None, "auto_mapping": None}).items():
        setattr(config, name, value)
    return config


def _require_dense(folder: Path, base: Path, adapted: nn.Module) -> None:
    """Raise BadInput for a pruned base, whose zeros a plain adapter would fill."""
    layers: Iterable[Any] = (getattr(part, "base_layer", None) for part in adapted.modules())
    matrices: list[Tensor] = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
    if zeros > _PRUNED * sum(matrix.numel() for matrix in matrices):
        fix = "train a masked adapter (coprune finetune), or merge it anyway with PEFT's merge_and_unload()"
        raise _wrong(folder, f"a plain adapter of {base}, which is pruned: merging would fill {zeros:,} zeros", fix)


@contextmanager
def _quietly() -> Iterator[list[str]]:
    """Silence transformers and PEFT, and yield a list that collects their warnings."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    said: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stderr(StringIO()), torch.no_grad():
            warnings.simplefilter("always")
            yield said
            said += [" ".join(str(one.message).split()) for one in caught]
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
