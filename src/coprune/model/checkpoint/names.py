"""Names that a checkpoint folder uses; nothing heavy is imported here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput

EDITS_FILE = "coprune_edits.json"
"""The file of a folder's edits, beside its weights."""
LICENCES = ("LICENSE*", "NOTICE*")
VOCABULARIES = ("*.model", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.vocab")
"""Files of tokenizers, besides JSON and plain text."""
MODELOPT_FILE = "hf_quant_config.json"
"""The file in which ModelOpt describes the quantisation, beside a configuration."""


def counted_kinds(names: Iterable[str]) -> list[tuple[str, int]]:
    """Return names that differ only in numbers once each, with their count, the most frequent first."""
    return Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names).most_common()


def kinds_of(names: Iterable[str]) -> list[str]:
    """Return the same for people."""
    return [f"{kind} ({count:,})" if count > 1 else kind for kind, count in counted_kinds(names)]


def is_below(name: str, prefix: str) -> bool:
    """Return whether a parameter belongs to the module at a path; the empty path is the model."""
    return not prefix or name.startswith(f"{prefix}.")


def is_below_any(name: str, prefixes: Sequence[str]) -> bool:
    """Return whether a parameter belongs to a module at one of the paths."""
    return any(is_below(name, prefix) for prefix in prefixes)


def refuse_missing(model: str) -> None:
    """Raise BadInput for the name of a model that is no Hub id, and a path at which there is nothing."""
    path = expand_home(model)
    # With `runs/` here, `runs/mdoel` is more likely a typo than a Hub id.
    if not path.exists() and (_looks_like_path(model) or ("/" in model and path.parent.is_dir())):
        raise BadInput(f"there is no model at {model}", field="model", value=model, fix=_nearest(path))


def _looks_like_path(name: str) -> bool:
    """Return whether a name cannot be a Hub id (`name` or `owner/name` of a few safe characters)."""
    return re.fullmatch(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", name) is None or name.endswith((".gguf", ".safetensors"))


def _nearest(path: Path) -> str | None:
    """Suggest a similar name in the same folder, or report that the folder is missing."""
    from coprune.base.files import like_named  # which Windows has no modules for, where this one is imported first

    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    near = like_named(path)
    return f"did you mean {near}?" if near else None
