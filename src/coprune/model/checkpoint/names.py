"""File names in a checkpoint folder; this module imports nothing heavy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

EDITS_FILE = "coprune_edits.json"
"""The file of a folder's edits, beside its weights."""
LICENCES = ("LICENSE*", "NOTICE*")
VOCABULARIES = ("*.model", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.vocab")
"""Files of tokenizers, besides JSON and plain text."""
LLAMA_CPP = "llama_cpp_py_sync"
"""The package that contains llama.cpp's library."""
MODELOPT_FILE = "hf_quant_config.json"
"""The file in which ModelOpt describes the quantisation, beside a configuration."""


def counted_kinds(names: Iterable[str]) -> list[tuple[str, int]]:
    """Group names that differ only in numbers; return each group's name and count, most frequent first."""
    return Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names).most_common()


def kinds_of(names: Iterable[str]) -> list[str]:
    """Return the groups of `counted_kinds` as text."""
    return [f"{kind} ({count:,})" if count > 1 else kind for kind, count in counted_kinds(names)]


def is_below(name: str, prefix: str) -> bool:
    """Return whether a parameter lies below a module's path; the empty path is the model."""
    return not prefix or name.startswith(f"{prefix}.")


def is_below_any(name: str, prefixes: Sequence[str]) -> bool:
    """Return whether a parameter lies below one of several modules' paths."""
    return any(is_below(name, prefix) for prefix in prefixes)
