"""Metadata of a GGUF file with fewer tokens: lists as long as the vocabulary, merges, and token ids."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from coprune.base.errors import UnsupportedModel
from coprune.gguf_files.metadata import Field, Fields

TOKENS = "tokenizer.ggml.tokens"
MERGES = "tokenizer.ggml.merges"
_IDS = re.compile(r".*(_token_ids?|suppress_tokens)")


def tokens_in(fields: Fields) -> list[str]:
    """Return the tokens of a file. Raises UnsupportedModel if it has none."""
    if TOKENS not in fields:
        raise UnsupportedModel("the GGUF file has no tokens")
    found: list[str] = fields[TOKENS].value
    return found


def named_ids(fields: Fields) -> set[int]:
    """Return the token ids in the metadata."""
    found: set[int] = set()
    for key, field in fields.items():
        if _IDS.fullmatch(key):
            found |= set(field.value if isinstance(field.value, list) else [field.value])
    return {number for number in found if 0 <= number < len(tokens_in(fields))}


def without_tokens(fields: Fields, arch: str, old_ids: Sequence[int]) -> dict[str, Field]:
    """Return the metadata for the same model with only some of its tokens.

    Args:
        fields: of the whole model.
        arch: prefix of the keys that describe the model.
        old_ids: the kept ids, ascending.
    """
    tokens = tokens_in(fields)
    kept = {tokens[number] for number in old_ids}
    new = {old: place for place, old in enumerate(old_ids)}
    found = {key: _cut(key, field, len(tokens), kept, new) for key, field in fields.items()}
    size = f"{arch}.vocab_size"
    if size in found:
        found[size] = replace(found[size], value=len(old_ids))
    return found


def stays(merge: str | Sequence[str], tokens: Container[str]) -> bool:
    """Return whether a merge is kept: its two parts and their result are all tokens.

    merge: a pair, or its parts separated by a space.
    """
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first in tokens and second in tokens and first + second in tokens


def _cut(key: str, field: Field, count: int, kept: set[str], new: Mapping[int, int]) -> Field:
    value = field.value
    if key == MERGES:
        return replace(field, value=[merge for merge in value if stays(merge, kept)])
    if _IDS.fullmatch(key):
        if isinstance(value, list):
            return replace(field, value=[new[one] for one in value if one in new])
        return replace(field, value=new.get(value, value))
    if key.startswith("tokenizer.") and isinstance(value, list) and len(value) == count:
        return replace(field, value=[value[number] for number in new])
    return field
