"""Perplexity and divergence from the dense model in one pass over a text; the dense model's logits are cached on disk.

`coprune eval MODEL --against DENSE` runs the dense model again for each model, and a table has dozens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coprune.data.windows import evaluation_tokens
from coprune.evaluation.batches import cut_windows
from coprune.evaluation.closeness import compare_logits
from coprune.evaluation.perplexity import window_nll

LogitsOf = Callable[[Tensor], Tensor]
"""A model's logits of one window: 1 × S tokens to 1 × S × vocabulary."""


@dataclass(frozen=True)
class Said:
    """Windows of a text (N × S), and the dense model's logits of them (N × S × vocabulary, float16).

    Rounding logits to float16 (by 0.01 at most) changes a divergence by about 1e-5; that of 8-bit weights is about 1e-3.
    """

    windows: Tensor
    logits: Tensor


def said_by(dense: Callable[[], tuple[Any, Any]], text: str, seqlen: int, tokens: int, file: Path) -> Said:
    """A dense model's logits on a text: read from the file, or computed and written there.

    dense: gives the model and its tokenizer, if they are needed; tokens: of the text.
    """
    if not file.exists():
        model, tokenizer = dense()
        windows = cut_windows(evaluation_tokens(text, tokenizer, seqlen, limit_tokens=tokens).tokens, seqlen)
        begun(windows, tokenizer)
        logits = torch.empty(*windows.shape, model.config.get_text_config().vocab_size, dtype=torch.float16)
        for kept, window in zip(logits, windows, strict=True):
            kept.copy_(model(window[None]).logits[0])
        save_file({"windows": windows, "logits": logits}, partial := file.with_suffix(".partial"))
        partial.replace(file)
    return Said(**load_file(file))


def begun(windows: Tensor, tokenizer: Any) -> Tensor:
    """Write BOS into the windows' first tokens, in place, where the tokenizer begins a text with it."""
    puts = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return windows.index_fill_(1, torch.tensor([0]), tokenizer.bos_token_id) if puts else windows


def in_one_pass(logits_of: LogitsOf, said: Said) -> tuple[float, list[float]]:
    """Perplexity on a text, and each window's divergence from the dense model in nats per token."""
    losses, divergences = [], []
    for window, expected in zip(said.windows, said.logits, strict=True):
        logits = logits_of(window[None])
        losses.append(float(window_nll(logits, window[None])))
        divergences.append(float(compare_logits(expected[None], logits).kl))
    return math.exp(sum(losses) / len(losses)), divergences
