"""Weights of tokens by the model's loss without them, rather than by their frequency.

Without a token, the text is split into its parts: the model has to predict the first part, which is less likely, and then the
others at the usual cost of their kind. One pass over some of the counted text gives the first cost of every occurrence;
tokens absent from it get the mean of those with as many parts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer

from coprune.base.progress import Reporter
from coprune.evaluation.batches import inference_logits
from coprune.vocabulary.choose import Weights
from coprune.vocabulary.counts import Texts
from coprune.vocabulary.measure import Judge, first_tokens

TOKENS = 16_384
"""Number of counted tokens that the model reads."""
_FEW = 4.0
"""Number of occurrences that weigh as much as the mean of tokens with as many parts."""
_LATER = 3.0
"""Bits of every further part, on Gemma-3-270M's English."""


def by_bits(
    counts: Weights,
    judge: Judge,
    tokenizer: Tokenizer,
    texts: Texts,
    parts: Callable[[int], Sequence[int] | None],
    reporter: Reporter,
) -> Weights:
    """Return counts times the bits that one occurrence loses.

    Args:
        counts: shares of all tokens.
        judge: the model.
        tokenizer: the whole one.
        texts: what was counted, of which the model reads some.
        parts: what a token is made by.
        reporter: who shows how far it is.
    """
    lost, seen = np.zeros(len(counts)), np.zeros(len(counts))
    pieces = [piece for source in texts.sources if source.weights is None for piece in source.pieces]
    step = max(1, len(pieces) * 500 // TOKENS)
    some = first_tokens(tokenizer, pieces[::step], TOKENS)
    firsts = _Firsts(tokenizer, parts)
    with reporter.bar("Reading what tokens are worth", len(some)) as advance:
        for piece in some:
            ids = tokenizer.encode(piece, add_special_tokens=False).ids
            for token, bits in zip(ids, _first_costs(judge, ids, firsts), strict=True):
                lost[token] += bits
                seen[token] += 1
            advance(1)
    return counts * _expected(lost, seen, np.array([firsts.depth(number) for number in range(len(counts))]))


def _expected(lost: Weights, seen: Weights, depths: Weights) -> Weights:
    """Return the bits of one occurrence: a token's own mean, shrunk toward that of tokens with as many parts."""
    usual = defaultdict[float, float](lambda: float(lost.sum() / max(seen.sum(), 1)))
    for depth in np.unique(depths):
        own = depths == depth
        if seen[own].sum():
            usual[float(depth)] = float(lost[own].sum() / seen[own].sum())
    prior = np.array([usual[float(depth)] for depth in depths])
    first = (lost + _FEW * prior) / (seen + _FEW)
    return np.maximum(first + _LATER * np.maximum(depths - 1, 0), 0.1)


class _Firsts:
    """Into what a token falls apart if only it goes: the two tokens that its last merge joins."""

    def __init__(self, tokenizer: Tokenizer, parts: Callable[[int], Sequence[int] | None]) -> None:
        self._tokenizer, self._parts = tokenizer, parts

    def first(self, token: int) -> int | None:
        """Return the longest part that a token begins with."""
        text = self._tokenizer.id_to_token(token) or ""
        names = [(self._tokenizer.id_to_token(part) or "", part) for part in self._parts(token) or ()]
        begins = [(len(name), part) for name, part in names if name and text.startswith(name)]
        return max(begins)[1] if begins else None

    def depth(self, token: int) -> float:
        """Return the number of pieces of a removed token, at least two if it has parts."""
        own = self._parts(token)
        return 2.0 if own else 1.0


def _first_costs(judge: Judge, ids: Sequence[int], firsts: _Firsts) -> list[float]:
    """Return the bits by which the first part of every token is less likely than the token."""
    given = ([] if judge.begin is None else [judge.begin]) + list(ids)
    with inference_logits(judge.model) as logits_of:
        logits = logits_of(torch.tensor([given]))[0]
    costs = []
    offset = len(given) - len(ids)
    for place, token in enumerate(ids):
        row, first = place + offset - 1, firsts.first(token)
        if row < 0 or first is None:
            costs.append(0.0)
            continue
        costs.append(float(logits[row, token] - logits[row, first]) / math.log(2))
    return costs
