"""A few words from a model, to read beside the figures."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.data.tokenizing import encode
from coprune.evaluation.batches import inference_logits

NEW_TOKENS = 32


def continue_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = NEW_TOKENS
) -> str:
    """Append the likeliest next tokens to a prompt, one by one; returns the continuation on one line.

    It runs the whole text through the model for every token, which any model that can be measured can do, with or
    without a cache of its own. It ends early at the tokenizer's end mark, and is empty for a prompt without tokens.
    """
    tokens = torch.tensor([encode(tokenizer, prompt)["input_ids"]], dtype=torch.int64)
    start = tokens.shape[1]
    if start == 0:
        return ""
    with inference_logits(model) as logits_of:
        for _ in range(new_tokens):
            following = logits_of(tokens)[:, -1].argmax(dim=-1, keepdim=True).cpu()
            if int(following) == tokenizer.eos_token_id:
                break
            tokens = torch.cat([tokens, following], dim=1)
    return " ".join(str(tokenizer.decode(tokens[0, start:], skip_special_tokens=True)).split())
