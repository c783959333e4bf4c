"""Read items with a model's file or folder: log probabilities of continuations, and generated text."""

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
"""Maximum tokens of an item with its answer."""
READ = POSITIONS - 64
"""Maximum tokens of a prompt; longer ones are cut at the beginning."""
_CHOICES = 8
"""Choices of an item that are read in parallel."""


class Written(NamedTuple):
    """Text written by a model."""

    ids: list[int]
    end: int | None
    """The token that ended it; None if it was cut off."""


@dataclass
class Reader:
    """A file in llama.cpp, or a folder in transformers, with its tokenizer."""

    engine: LlamaCpp | InTransformers
    tokenizer: PreTrainedTokenizerBase
    old_ids: Tensor | None = None
    """The dense model's id of every token, if some were removed; int64."""

    @classmethod
    def open(cls, file: Path, tokenizer: PreTrainedTokenizerBase, old_ids: Sequence[int] | None = None) -> Reader:
        """Load a file or folder. Raises BadInput if it cannot be loaded."""
        known = None if old_ids is None else torch.tensor(old_ids, dtype=torch.int64)
        engine = InTransformers(file, tokenizer) if file.is_dir() else LlamaCpp(file, POSITIONS, branches=_CHOICES)
        return cls(engine, tokenizer, known)

    def ids(self, prompt: Prompt) -> list[int]:
        """Tokenise a prompt and keep its end."""
        return self.all_ids(prompt)[-READ:]

    def all_ids(self, prompt: Prompt, more: str = "") -> list[int]:
        """Tokenise a prompt followed by more text; a conversation is rendered by the tokenizer's template."""
        if isinstance(prompt, str):
            return list(encode(self.tokenizer, prompt + more)["input_ids"])
        messages = [{"role": role, "content": content} for role, content in prompt]
        text = template_text(messages, self.tokenizer, "an item with messages", answers=True)
        return list(encode(self.tokenizer, text + more, add_special_tokens=False)["input_ids"])

    @property
    def begin(self) -> list[int]:
        """Tokens to put before a text so that each of its tokens is predicted."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if isinstance(token, int):
                return [token]
        return []

    def along(self, before: Sequence[int], afters: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the log probabilities (tokens × vocabulary) at every token of each continuation.

        Args:
            before: the context, at least one token.
            afters: continuations of it, independent of each other.
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
        """Return the log likelihood of every continuation."""
        rows = self.along(before, afters)
        return [
            float(one[torch.arange(len(after)), torch.tensor(after)].double().sum())
            for one, after in zip(rows, afters, strict=True)
        ]

    def write(self, before: Sequence[int], most: int, enough: Callable[[str], bool] = lambda text: False) -> Written:
        """Continue a prompt greedily, up to `most` tokens. enough: returns whether the text may end."""
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
        """Sample a text without a prompt, up to `length` tokens."""
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
