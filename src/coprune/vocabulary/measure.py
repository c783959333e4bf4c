"""The cost of a smaller vocabulary: tokens per byte from the tokenizers, bits per byte from the model.

The blocks are unchanged, so the dense model can stand in for the smaller one: it reads the smaller tokenizer's tokens
under their old ids, and the softmax is over the kept tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from coprune.base.errors import NumericalError
from coprune.evaluation.batches import inference_logits, slices
from coprune.vocabulary.choose import Kept
from coprune.vocabulary.cut_facts import TextCost
from coprune.vocabulary.rewrite import cut_tokenizer

_EXCERPT = 160
"""Characters shown of the worst passage."""


@dataclass(frozen=True)
class Cuts:
    """Both tokenizers, for the same text."""

    dense: Tokenizer
    cut: Tokenizer
    kept: Kept

    @classmethod
    def of(cls, dense: Tokenizer, content: Mapping[str, Any], kept: Kept) -> Cuts:
        """Make the smaller tokenizer. content: of the dense one's `tokenizer.json`."""
        return cls(dense, Tokenizer.from_str(json.dumps(cut_tokenizer(content, kept))), kept)

    def both(self, text: str) -> tuple[list[int], list[int]]:
        """Return a text's tokens before and after, both under their old ids."""
        before = self.dense.encode(text, add_special_tokens=False).ids
        after = self.cut.encode(text, add_special_tokens=False).ids
        return before, [self.kept.old[token] for token in after]

    def cost(self, label: str, texts: Sequence[str]) -> TextCost:
        """Return the cost of texts in tokens."""
        counts = np.array([[len(ids) for ids in self.both(text)] for text in texts]).sum(axis=0)
        return TextCost(text=label, bytes=_bytes(texts), tokens=(int(counts[0]), int(counts[1])))


@dataclass
class Judge:
    """A model that scores texts, with all tokens or only the kept ones."""

    model: PreTrainedModel
    begin: int | None
    """The token before every text; without one, a text's first token is not counted."""
    _dense: dict[str, float] = field(default_factory=dict)
    """Cached nats of texts with all tokens."""

    def nats(self, ids: Sequence[int], rows: Tensor | None) -> tuple[float, float]:
        """Return the negative log likelihood of a text's tokens: over all tokens, and over the kept ones plus the token itself.

        rows: kept old ids, int64; None for the first value only. Raises NumericalError if the model's outputs are not finite.
        """
        given = ([] if self.begin is None else [self.begin]) + list(ids)
        if len(given) < 2:
            return 0.0, 0.0
        window = torch.tensor([given])
        whole = among = 0.0
        with inference_logits(self.model) as logits_of:
            logits = logits_of(window)[0, :-1]
        targets = window[0, 1:].to(logits.device)
        rows = None if rows is None else rows.to(logits.device)
        for part in slices(logits):
            some, own = logits[part].float(), targets[part]
            said = some.gather(1, own[:, None])[:, 0]
            whole += float((some.logsumexp(1) - said).double().sum())
            if rows is not None:
                left = some[:, rows].logsumexp(1)
                stays = torch.isin(own, rows)
                left = torch.where(stays, left, torch.logaddexp(left, said))
                among += float((left - said).double().sum())
        if not math.isfinite(whole):
            raise NumericalError("the model's outputs are NaN or infinite, so its checkpoint may be damaged")
        return whole, among

    def dense(self, text: str, ids: Sequence[int]) -> float:
        """Return the nats of a text with the full vocabulary, computed once."""
        if text not in self._dense:
            self._dense[text] = self.nats(ids, None)[0]
        return self._dense[text]

    def rise(self, cuts: Cuts, texts: Sequence[str], advance: Callable[[float], None]) -> float:
        """Return the relative rise in bits."""
        rows, before, after = torch.from_numpy(cuts.kept.rows), 0.0, 0.0
        for text in texts:
            old, new = cuts.both(text)
            before += self.dense(text, old)
            after += self.nats(new, rows)[1]
            advance(1)
        return after / max(before, 1e-12) - 1

    def cost(self, cuts: Cuts, label: str, texts: Sequence[str], advance: Callable[[float], None]) -> TextCost:
        """Return the cost of texts before and after, and the worst of them."""
        rows, found = torch.from_numpy(cuts.kept.rows), []
        for text in texts:
            old, new = cuts.both(text)
            whole, among = self.nats(old, rows)
            self._dense[text] = whole
            found.append((whole, among if old == new else self.nats(new, rows)[1], among))
            advance(1)
        size = _bytes(texts)
        before, after, among = (sum(one[place] for one in found) / size / math.log(2) for place in range(3))
        rises = [one[1] / max(one[0], 1e-12) - 1 for one in found]
        worst = max(range(len(rises)), key=rises.__getitem__)
        more = (
            {"worst": " ".join(texts[worst].split())[:_EXCERPT], "worst_rise": rises[worst]} if len(texts) > 1 else {}
        )
        measured = {"bits": (before, after), "renormalised": among, **more}
        return cuts.cost(label, texts).model_copy(update=measured)


def _bytes(texts: Sequence[str]) -> int:
    return max(1, sum(len(text.encode("utf-8", "replace")) for text in texts))


def first_tokens(tokenizer: Tokenizer, texts: Sequence[str], tokens: int, least: int = 1) -> list[str]:
    """Return the first texts, up to a number of tokens. least: minimum number of texts to return."""
    found: list[str] = []
    total = 0
    for text in texts:
        total += len(tokenizer.encode(text, add_special_tokens=False).ids)
        if len(found) >= least and total > tokens:
            break
        found.append(text)
    return found
