"""Texts that say the same: near-doubles among items, and passages that hold text of items nobody may see."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

_Hashes = npt.NDArray[np.uint64]
_SHINGLE = 5
"""Characters of the pieces by which two texts are compared."""
_COMPARED, _FEWER, _MANY = 400, 120, 20_000
"""Last characters of a text that are compared, and fewer where there are many texts."""
_ALIKE, _WITHIN = 0.6, 0.75
"""Weight of shared pieces over that of all, or over that of the smaller text, from which two texts are near-doubles."""
_COPIED, _LEAST = 32, 12
"""Characters in a row, without spaces, that give a text away; shorter texts are looked for whole, from `_LEAST` on."""
_BASE = np.uint64(0x9E3779B97F4A7C15)


def normalized(text: str) -> str:
    """Return a text without differences of case, width and spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def clusters_of(texts: Sequence[str]) -> list[int]:
    """Number texts such that near-doubles have the same number.

    Pieces of five characters are compared by the weighted Jaccard index; a piece counts less the more texts hold it, and one
    that all hold, as an instruction before every question, not at all.

    Args:
        texts: what to compare.

    Returns:
        A number of every text.
    """
    names = [normalized(text) for text in texts]
    distinct = {name: place for place, name in enumerate(dict.fromkeys(names))}
    found = _alike([*distinct]) if len(distinct) > 1 else [0] * len(distinct)
    return [found[distinct[name]] for name in names]


def _alike(names: Sequence[str]) -> list[int]:
    count, most = len(names), _COMPARED if len(names) <= _MANY else _FEWER
    pieces = [_hashes(name[-most:], _SHINGLE) for name in names]
    _, columns, held_by = np.unique(np.concatenate(pieces), return_inverse=True, return_counts=True)
    ends = np.cumsum([len(one) for one in pieces])
    own = np.split(columns, ends[:-1])
    weights = np.log(count / held_by)
    totals = np.array([weights[one].sum() for one in own])
    # Near-doubles are neighbours in the columns that they alone share.
    order = np.argsort(columns, kind="stable")
    holders = np.repeat(np.arange(count), [len(one) for one in pieces])[order]
    same = columns[order][1:] == columns[order][:-1]
    keys, place = np.unique(holders[:-1][same] * count + holders[1:][same], return_inverse=True)
    shared = np.bincount(place, weights[columns[order][1:][same]], minlength=len(keys))
    first, second = keys // count, keys % count
    likely = shared >= _ALIKE / 2 * np.minimum(totals[first], totals[second])
    links = [
        (one, other)
        for one, other in zip(first[likely].tolist(), second[likely].tolist(), strict=True)
        if _are_alike(weights[np.intersect1d(own[one], own[other])].sum(), totals[one], totals[other])
    ]
    rows, others = np.array(links, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(links)), (rows, others)), shape=(count, count))
    return [int(number) for number in connected_components(graph, directed=False)[1]]


def _are_alike(shared: float, one: float, other: float) -> bool:
    return shared > 0 and (shared >= _ALIKE * (one + other - shared) or shared >= _WITHIN * min(one, other))


def _hashes(text: str, width: int) -> _Hashes:
    """Return hashes of all pieces of a text, each once; of the whole of a shorter one."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < width:
        codes = np.pad(codes, (0, width - len(codes)))
    powers = _BASE ** np.arange(1, width + 1, dtype=np.uint64)  # wraps, as it should
    return np.unique(np.lib.stride_tricks.sliding_window_view(codes, width) @ powers)


def holding(passages: Sequence[str], unseen: Sequence[str], seen: Sequence[str]) -> set[int]:
    """Return the places of passages that hold a part of an unseen text: 32 characters in a row, or a shorter text whole.

    Args:
        passages: text to calibrate on.
        unseen: what must not be in it.
        seen: texts of the same kind that may; what two of them share, as an instruction, gives nothing away.
    """
    shown = [_squeezed(text) for text in seen]
    pieces = [_hashes(text, _COPIED) for text in shown if len(text) >= _COPIED]
    usual, times = np.unique(np.concatenate([np.zeros(0, np.uint64), *pieces]), return_counts=True)
    hidden = [_squeezed(text) for text in unseen]
    long = [_hashes(text, _COPIED) for text in hidden if len(text) >= _COPIED]
    secret = np.setdiff1d(np.concatenate([np.zeros(0, np.uint64), *long]), usual[times > 1])
    short = {text for text in hidden if _LEAST <= len(text) < _COPIED and sum(text in other for other in shown) < 2}
    found = set()
    for place, passage in enumerate(map(_squeezed, passages)):
        if np.isin(_hashes(passage, _COPIED), secret).any() or any(text in passage for text in short):
            found.add(place)
    return found


def _squeezed(text: str) -> str:
    return normalized(text).replace(" ", "")
