"""Tokenizers as the programs of somebody else that they are: what they do to a text may fail, and may not grow without end."""

from __future__ import annotations

from typing import Any, Protocol

from coprune.base.errors import BadInput, panics_caught


class Tokenizes(Protocol):
    """The part of a tokenizer's interface that is used here."""

    @property
    def is_fast(self) -> bool:
        """Whether the tokenizer can report its tokens' offsets."""
        ...

    def __call__(self, text: str, **options: Any) -> Any:
        """Return `input_ids`, and `offset_mapping` on request."""
        ...


def encode(tokenizer: Tokenizes, text: str, **options: Any) -> Any:
    """Tokenise a text of any length. options: the tokenizer's own. Raises BadInput where the tokenizer fails."""
    try:
        with panics_caught():
            # A corpus is longer than any model's limit, and is cut into windows afterwards.
            return tokenizer(text, verbose=False, **options)
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # what a damaged tokenizer raises has no end
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(
            f"the tokenizer cannot encode {text[:40]!r}{'…' if len(text) > 40 else ''}: {said}",
            fix="is its tokenizer.json whole, and the model's own?",
        ) from error
