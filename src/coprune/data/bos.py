"""The BOS token: only at the start of a text, before every window, or absent.

LLaMA's and Gemma's tokenizers add BOS to every text, GPT-2's and Qwen's do not. A corpus is one text, so only the first of
the papers' windows of a LLaMA has it: that is `first`. Some models fail on windows without it, hence `every`: BOS takes the
first position of each window, and the last token is dropped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coprune.base.errors import BadInput
from coprune.base.words import Set
from coprune.data.text import NOTHING
from coprune.data.tokenizing import Tokenizes, encode
from coprune.data.windows import EvaluationText, Windows, fingerprint
from coprune.recipe.parts import AskedBos


def put_by(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS that a tokenizer adds to a text, or None."""
    bos, ids = tokenizer.bos_token_id, encode(tokenizer, "a")["input_ids"]
    return bos if isinstance(bos, int) and ids[:1] == [bos] else None


def bos_of(tokenizer: PreTrainedTokenizerBase, asked: AskedBos) -> int:
    """Return a tokenizer's BOS. Raises BadInput if it has none."""
    bos = tokenizer.bos_token_id
    if not isinstance(bos, int):
        never = ("take ", Set("bos", "never"))
        raise BadInput("the tokenizer has no token that begins a text", field="bos", value=asked, fix=never)
    return bos


def beginning(tokenizer: PreTrainedTokenizerBase | None, asked: AskedBos) -> Tokenizes | None:
    """Return a tokenizer with or without BOS as requested; unchanged for `auto` and `every`, which concern windows.

    Raises:
        BadInput: BOS is requested, but the tokenizer has none.
    """
    if tokenizer is None or asked == "auto":
        return tokenizer
    put = put_by(tokenizer)
    if asked == "never":
        return tokenizer if put is None else _Beginning(tokenizer, None)
    bos = bos_of(tokenizer, asked)
    return tokenizer if asked == "every" or put is not None else _Beginning(tokenizer, bos)


class _Beginning:
    """A tokenizer with its default reversed: with a BOS that it does not add, or (None) without the one that it adds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos: int | None) -> None:
        self._tokenizer, self._bos = tokenizer, bos
        self.is_fast = tokenizer.is_fast

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        """Tokenise a text, with or without BOS."""
        encoded = self._tokenizer(text, **options)
        found = {name: encoded[name] for name in ("input_ids", "offset_mapping") if name in encoded}
        if self._bos is None:
            return {name: values[1:] for name, values in found.items()}
        return {name: [self._bos if name == "input_ids" else (0, 0), *values] for name, values in found.items()}


def windows_at_bos(windows: Windows, bos: int) -> Windows:
    """Return calibration windows that all begin with BOS, without their last token; the caller's ids are unchanged."""
    if windows.given:
        return windows
    begun, marks = windows.tokens[:, :1] == bos, windows.generated
    if marks is not None:
        marks = torch.where(begun, marks, torch.cat([torch.zeros_like(marks[:, :1]), marks[:, :-1]], dim=1))
        marks = marks & (windows.tokens != NOTHING)
    tokens = tokens_at_bos(windows.tokens, bos)
    return replace(windows, tokens=tokens, fingerprint=fingerprint(tokens), generated=marks)


def tokens_at_bos(tokens: Tensor, bos: int) -> Tensor:
    """Return windows of tokens (N × S) that begin with BOS, dropping the last token of those that lacked it."""
    behind = torch.cat([torch.full_like(tokens[:, :1], bos), tokens[:, :-1]], dim=1)
    return torch.where((tokens[:, :1] == bos) | (tokens == NOTHING), tokens, behind)


def begun_by(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> Tensor:
    """Return windows of tokens (N × S) that begin with the BOS that a tokenizer adds; unchanged if it adds none."""
    bos = put_by(tokenizer)
    return tokens if bos is None else tokens_at_bos(tokens, bos)


def text_at_bos(text: EvaluationText, bos: int, seqlen: int) -> EvaluationText:
    """Return an evaluation text whose windows of seqlen tokens all begin with BOS; the caller's ids are unchanged.

    The number of windows stays the same, so each has one text token less.
    """
    if text.given:
        return text
    count, (tokens, sizes) = len(text.tokens) // seqlen, (text.tokens, text.token_bytes.clone())
    if int(tokens[0]) == bos:
        sizes[1] += sizes[0]
        tokens, sizes = tokens[1:], sizes[1:]
    begun = _after(tokens, bos, count, seqlen)
    return replace(text, tokens=begun, token_bytes=_after(sizes, 0, count, seqlen), fingerprint=fingerprint(begun))


def _after(stream: Tensor, first: int, count: int, seqlen: int) -> Tensor:
    """Cut a stream into `count` pieces, each with `first` before it: count · seqlen values."""
    pieces = stream[: count * (seqlen - 1)].view(count, seqlen - 1)
    return torch.cat([torch.full_like(pieces[:, :1], first), pieces], dim=1).flatten()
