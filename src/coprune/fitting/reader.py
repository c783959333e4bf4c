"""A file or folder that answers: how likely it finds continuations, and what it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coprune.data.conversations import template_text
from coprune.data.tokenizing import encode
from coprune.fitting.in_transformers import InTransformers
from coprune.fitting.tasks import Prompt
from coprune.gguf_files.llama_cpp import LlamaCpp

POSITIONS = 1024
"""Tokens of an item with its answer at most."""
READ = POSITIONS - 64
"""Tokens at the end of a prompt that are read."""
_CHOICES = 8
"""Of an item that are read at a time."""


class Written(NamedTuple):
    """What a model wrote."""

    ids: list[int]
    end: int | None
    """The token that ended it; None where it was stopped."""


@dataclass
class Reader:
    """A file in llama.cpp, or a folder in transformers, with its tokenizer."""

    engine: LlamaCpp | InTransformers
    tokenizer: PreTrainedTokenizerBase
    old_ids: Tensor | None = None
    """The dense model's id of every token, where some were removed; int64."""

    @classmethod
    def open(cls, file: Path, tokenizer: PreTrainedTokenizerBase, old_ids: Sequence[int] | None = None) -> Reader:
        """Load a file or folder. Raises BadInput if it cannot be loaded."""
        known = None if old_ids is None else torch.tensor(old_ids, dtype=torch.int64)
        engine = InTransformers(file, tokenizer) if file.is_dir() else LlamaCpp(file, POSITIONS, branches=_CHOICES)
        return cls(engine, tokenizer, known)

    def ids(self, prompt: Prompt) -> list[int]:
        """Tokenise a prompt, of which the end is read."""
        return self.all_ids(prompt)[-READ:]

    def all_ids(self, prompt: Prompt, more: str = "") -> list[int]:
        """Tokenise a prompt, with more text behind it; a conversation in the tokenizer's template."""
        if isinstance(prompt, str):
            return list(encode(self.tokenizer, prompt + more)["input_ids"])
        messages = [{"role": role, "content": content} for role, content in prompt]
        text = template_text(messages, self.tokenizer, "an item with messages", answers=True)
        return list(encode(self.tokenizer, text + more, add_special_tokens=False)["input_ids"])

    @property
    def begin(self) -> list[int]:
        """Tokens before a text whose every token is predicted."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if isinstance(token, int):
                return [token]
        return []

    def along(self, before: Sequence[int], afters: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return log probabilities (tokens × vocabulary) wherever a token of a continuation is predicted.

        Args:
            before: at least one token.
            afters: continuations, each by itself.
        """
        if isinstance(self.engine, LlamaCpp) and (rows := self.engine.branched(before, afters)) is not None:
            return [one.log_softmax(dim=-1) for one in rows]
        *known, last = before
        self.engine.forget()
        if known:
            self.engine.read(known)
        found = []
        for number, after in enumerate(afters):
            if number and not self.engine.cut_back(len(known)):
                self.engine.forget()
                if known:
                    self.engine.read(known)
            self.engine.read([last, *after[:-1]], all_logits=True)
            found.append(self.engine.last_logits(len(after)).log_softmax(dim=-1))
        return found

    def log_likelihood(self, before: Sequence[int], afters: Sequence[Sequence[int]]) -> list[float]:
        """Sum the log probabilities of every continuation's tokens."""
        rows = self.along(before, afters)
        return [
            float(one[torch.arange(len(after)), torch.tensor(after)].double().sum())
            for one, after in zip(rows, afters, strict=True)
        ]

    def write(self, before: Sequence[int], most: int, enough: Callable[[str], bool] = lambda text: False) -> Written:
        """Continue a prompt greedily. enough: returns whether the text may end."""
        self.engine.forget()
        self.engine.read(before)
        found: list[int] = []
        while True:
            token = int(self.engine.last_logits(1)[0].argmax())
            if self.engine.ends(token):
                return Written(found, token)
            found.append(token)
            if len(found) == most or enough(self.text(found)):
                return Written(found, None)
            self.engine.read([token])

    def invent(self, length: int, generator: torch.Generator) -> list[int]:
        """Draw a text from the model's own distribution, from its beginning until it ends."""
        self.engine.forget()
        self.engine.read(self.begin or [0])
        found: list[int] = []
        while len(found) < length:
            shares = self.engine.last_logits(1)[0].softmax(dim=0)
            token = int(shares.multinomial(1, generator=generator))
            if self.engine.ends(token):
                break
            found.append(token)
            self.engine.read([token])
        return found

    def text(self, ids: Sequence[int]) -> str:
        """Decode tokens."""
        return str(self.tokenizer.decode([*ids], skip_special_tokens=True))
