"""The content of a `tokenizer.json` with fewer tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from coprune.gguf_files.vocabulary_metadata import stays
from coprune.vocabulary.choose import Kept


def cut_tokenizer(content: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Return the content of `tokenizer.json` with the kept tokens, in their old order, under new ids."""
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
