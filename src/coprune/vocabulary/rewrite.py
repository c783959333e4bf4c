"""Token ids in tokenizer, configuration and generation settings, rewritten for the kept tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from coprune.vocabulary.choose import Kept

_NAMES_TOKENS = re.compile(
    r"(.*_)?token_ids?|.*_token_ind(ex|ices)|(begin_)?suppress_tokens|(bad|force)_words_ids|forced_decoder_ids|sequence_bias"
)
_PAIRS = ("forced_decoder_ids",)
"""Lists of places and tokens, of which only the second are ids."""
_SIZE = re.compile(r".*vocab.*")


def cut_tokenizer(content: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Return the content of `tokenizer.json` with the tokens that stay, in their old order, under their new ids."""
    found = {key: copy.deepcopy(value) for key, value in content.items() if key not in ("model", "added_tokens")}
    found["added_tokens"] = [
        {**one, "id": kept.new[one["id"]]} for one in content.get("added_tokens") or () if one["id"] in kept.new
    ]
    model = content["model"]
    vocab, new = model["vocab"], kept.new
    cut = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    if isinstance(vocab, Mapping):
        pairs = sorted((new[number], token) for token, number in vocab.items() if number in new)
        cut["vocab"] = {token: number for number, token in pairs}
    else:
        cut["vocab"] = [entry for number, entry in enumerate(vocab) if number in new]
        if model.get("unk_id") is not None:
            cut["unk_id"] = new[model["unk_id"]]
    if "merges" in model:
        cut["merges"] = [pair for pair in model["merges"] if stays(pair, cut["vocab"])]
    found["model"] = cut
    if isinstance(padding := found.get("padding"), dict) and isinstance(padding.get("pad_id"), int):
        padding["pad_id"] = new[padding["pad_id"]]
    _in_processor(found.get("post_processor"), new)
    order = [*content]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def stays(pair: str | list[str], tokens: Any) -> bool:
    """Return whether a merge is kept: both of its parts are, and their result."""
    first, second = pair.split(" ") if isinstance(pair, str) else pair
    return first in tokens and second in tokens and first + second in tokens


def _in_processor(part: Any, new: Mapping[int, int]) -> None:
    if not isinstance(part, dict):
        return
    if isinstance(special := part.get("special_tokens"), dict):
        for token in special.values():
            token["ids"] = [new[number] for number in token["ids"]]
    for name in ("sep", "cls"):
        if isinstance(part.get(name), list):
            part[name][1] = new[part[name][1]]
    for inner in part.get("processors") or ():
        _in_processor(inner, new)


def ids_in(config: Mapping[str, Any], rows: int) -> set[int]:
    """Return all ids of tokens that a configuration names, at every level. rows: those beyond mean none."""
    found: set[int] = set()

    def note(number: int) -> int:
        if 0 <= number < rows:
            found.add(number)
        return number

    _rewritten(config, note)
    return found


def cut_config(config: Mapping[str, Any], kept: Kept, sizes: Mapping[int, int]) -> dict[str, Any]:
    """Return a configuration with new ids and sizes, at every level.

    sizes: new sizes of a vocabulary by old ones. Ids that are no token's stay as they are.
    """
    renumbered = _rewritten(config, lambda number: kept.new.get(number, number))
    return _resized(renumbered, sizes)


def _rewritten(config: Mapping[str, Any], change: Callable[[int], int]) -> dict[str, Any]:
    return {
        key: _changed(value, change, key in _PAIRS)
        if _NAMES_TOKENS.fullmatch(key)
        else _rewritten(value, change)
        if isinstance(value, Mapping)
        else value
        for key, value in config.items()
    }


def _changed(value: Any, change: Callable[[int], int], pairs: bool) -> Any:
    if type(value) is int:
        return change(value)
    if isinstance(value, list) and pairs and len(value) == 2 and all(type(one) in (int, type(None)) for one in value):
        return [value[0], None if value[1] is None else change(value[1])]
    if isinstance(value, list):
        return [_changed(one, change, pairs) for one in value]
    return value


def _resized(config: Mapping[str, Any], sizes: Mapping[int, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found[key] = _resized(value, sizes)
        else:
            named = _SIZE.fullmatch(key) and type(value) is int and value in sizes
            found[key] = sizes[value] if named else value
    return found


def sizes_in(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Return every size of a vocabulary that a configuration says, by its key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from sizes_in(value)
        elif _SIZE.fullmatch(key) and type(value) is int:
            yield key, value


def cut_tokenizer_config(config: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`, whose added tokens go by their ids."""
    found = dict(config)
    if isinstance(tokens := found.get("added_tokens_decoder"), Mapping):
        found["added_tokens_decoder"] = {
            str(kept.new[int(number)]): token for number, token in tokens.items() if int(number) in kept.new
        }
    return found
