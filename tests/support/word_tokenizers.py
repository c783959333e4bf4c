"""A tokenizer of whole words, so that a test can say what tokens a text has."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def word_tokenizer(start_mark: bool = False, model_max_length: int = 8) -> PreTrainedTokenizerFast:
    """The words w0 … w999 are the tokens 0 … 999, anything else is 1000, and 1001 may stand at the start."""
    vocabulary = {f"w{number}": number for number in range(1000)} | {"<unk>": 1000, "<s>": 1001}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if start_mark:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1001)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=model_max_length)


def words(start: int, stop: int) -> str:
    """The words from start to stop, with single spaces."""
    return " ".join(f"w{number}" for number in range(start, stop))
