"""A tokenizer of whole words, so that tests know a text's tokens."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def word_tokenizer(start_mark: bool = False, model_max_length: int = 8) -> PreTrainedTokenizerFast:
    """Make a tokenizer of the words w0 … w999 as tokens 0 … 999; anything else is 1000, and 1001 an optional start token."""
    vocabulary = {f"w{number}": number for number in range(1000)} | {"<unk>": 1000, "<s>": 1001}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if start_mark:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1001)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=model_max_length)


def words(start: int, stop: int) -> str:
    """Return the words from start to stop, separated by spaces."""
    return " ".join(f"w{number}" for number in range(start, stop))
