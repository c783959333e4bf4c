"""Tokenisation with tokenizers that may fail."""

from __future__ import annotations

from typing import Any, Protocol

from coprune.base.errors import BadInput, panics_caught


class Tokenizes(Protocol):
    """The part of a tokenizer's interface used here."""

    @property
    def is_fast(self) -> bool:
        """Whether the tokenizer can report its tokens' offsets."""
        ...

    def __call__(self, text: str, **options: Any) -> Any:
        """Return `input_ids`, and `offset_mapping` on request."""
        ...


def encode(tokenizer: Tokenizes, text: str, **options: Any) -> Any:
    """Tokenise a text of any length. options: the tokenizer's own. Raises BadInput if the tokenizer fails."""
    try:
        with panics_caught():
            # A corpus exceeds any model's limit, and is cut into windows later.
            return tokenizer(text, verbose=False, **options)
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # a damaged tokenizer may raise anything
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(
            f"the tokenizer cannot encode {text[:40]!r}{'…' if len(text) > 40 else ''}: {said}",
            fix="is its tokenizer.json complete, and the model's own?",
        ) from error
