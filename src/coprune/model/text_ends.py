"""Tokens that end a text, and what fills a batch of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def ends_of(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens that end a text that a model writes: its tokenizer's, its settings' for generation, its configuration's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    # Some configurations of text models inside of others do not have it at all.
    return ends_among(tokenizer.eos_token_id, own, getattr(model.config.get_text_config(), "eos_token_id", None))


def ends_among(*said: Any) -> tuple[int, ...]:
    """Tokens that end a text, each once. said: ids, lists of ids, or None, as tokenizers and configurations have them."""
    found = [end for one in said for end in (one if isinstance(one, list | tuple) else [one])]
    return tuple(dict.fromkeys(end for end in found if isinstance(end, int)))


def filling(pad: Any, ends: Sequence[int]) -> int:
    """What fills a batch: the tokenizer's own token for that, else one that ends a text, else the first."""
    return pad if isinstance(pad, int) else next(iter(ends), 0)
