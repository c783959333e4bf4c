"""Find near-duplicates among items, and calibration passages that contain text of unseen items."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

_Hashes = npt.NDArray[np.uint64]
_SHINGLE = 5
"""Length of the shingles by which two texts are compared, in characters."""
_COMPARED, _FEWER, _MANY = 400, 120, 20_000
"""Number of last characters that are compared, the smaller number for more than `_MANY` texts."""
_ALIKE, _WITHIN = 0.6, 0.75
"""Thresholds for near-duplicates: weight of shared shingles relative to that of all, or to that of the smaller text."""
_COPIED, _LEAST = 32, 12
"""Length of a copied run of characters, without spaces, that reveals a text; texts from `_LEAST` on are matched whole."""
_BASE = np.uint64(0x9E3779B97F4A7C15)


def normalized(text: str) -> str:
    """Normalise case, width and spaces of a text."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def clusters_of(texts: Sequence[str]) -> list[int]:
    """Number texts so that near-duplicates have the same number.

    Shingles of five characters are compared by the weighted Jaccard index. The more texts contain a shingle, the less it
    counts; one in all texts, such as a shared instruction, does not count at all.

    Args:
        texts: the texts to compare.

    Returns:
        The cluster number of every text.
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
    # Sorted by shingle, texts that share one are neighbours; near-duplicates share rare ones.
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
    """Return the distinct hashes of all shingles of a text; of the whole text if it is shorter."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < width:
        codes = np.pad(codes, (0, width - len(codes)))
    powers = _BASE ** np.arange(1, width + 1, dtype=np.uint64)  # wraps, as it should
    return np.unique(np.lib.stride_tricks.sliding_window_view(codes, width) @ powers)


def holding(passages: Sequence[str], unseen: Sequence[str], seen: Sequence[str]) -> set[int]:
    """Return the indices of passages that contain 32 consecutive characters of an unseen text, or a shorter one whole.

    Args:
        passages: calibration text.
        unseen: texts that must not be in it.
        seen: similar texts that may be; parts that two of them share, such as an instruction, are allowed.
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
