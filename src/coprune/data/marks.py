"""Special tokens around a text ([CLS] … [SEP]), which encoder models have always been trained with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coprune.data.text import of_each_length
from coprune.data.tokenizing import encode
from coprune.data.windows import EvaluationText, Windows, fingerprint


@dataclass(frozen=True)
class Marks:
    """Special tokens before and after a text."""

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase | None) -> Marks:
        """Return the tokens that a tokenizer puts around any text; none without a tokenizer."""
        if tokenizer is None:
            return cls()
        bare: list[int] = encode(tokenizer, "a", add_special_tokens=False)["input_ids"]
        whole: list[int] = encode(tokenizer, "a")["input_ids"]
        starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
        if not bare or not starts:
            return cls()
        return cls(tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(bare) :]))

    def inside(self, length: int) -> slice:
        """Return the slice of the text in a window of `length` tokens; all of it if the marks leave no room."""
        count = len(self.before) + len(self.behind)
        return slice(len(self.before), length - len(self.behind)) if count < length else slice(0, length)

    def around(self, tokens: Tensor) -> Tensor:
        """Return windows of tokens (N × S) whose first and last tokens are replaced by the marks."""
        found = tokens.clone()
        for rows, length in of_each_length(tokens):
            inside = self.inside(length)
            if inside == slice(0, length):
                continue
            found[rows, : inside.start] = torch.tensor(self.before, dtype=tokens.dtype)
            found[rows, inside.stop : length] = torch.tensor(self.behind, dtype=tokens.dtype)
        return found

    def around_samples(self, windows: Windows) -> Windows:
        """Return calibration windows with marks; ids from the caller are unchanged."""
        if windows.given:
            return windows
        tokens = self.around(windows.tokens)
        return replace(windows, tokens=tokens, fingerprint=fingerprint(tokens))

    def around_text(self, text: EvaluationText, seqlen: int) -> EvaluationText:
        """Return an evaluation text whose windows of seqlen tokens are between marks, without an incomplete last one."""
        if text.given:
            return text
        count = len(text.tokens) // seqlen * seqlen
        tokens = self.around(text.tokens[:count].view(-1, seqlen)).flatten()
        return replace(text, tokens=tokens, token_bytes=text.token_bytes[:count], fingerprint=fingerprint(tokens))
