"""The position of BOS in windows: as requested, or by the dense model's loss on a few windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.data.bos import bos_of, put_by
from coprune.evaluation.batches import inference_logits
from coprune.evaluation.perplexity import window_nll
from coprune.model.walk.activations import Activations
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.walk import streamed_logits
from coprune.recipe.parts import AskedBos

CLEARLY_BETTER = 0.05
"""Relative fall in perplexity for which `auto` overrides the tokenizer's default."""
TRIED_TOKENS = 2048
FEWEST, MOST = 2, 8
"""Bounds on the number of windows to try, which together have about `TRIED_TOKENS` tokens."""

Score = Callable[[Sequence[Tensor]], list[Tensor]]
"""Windows (1 × S int64 each) → each one's mean negative log likelihood after its first text token."""


class BosChoice(BaseModel):
    """Where BOS stands in windows, and why."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    asked: AskedBos = "auto"
    used: Literal["first", "every", "never", "as given"] = "never"
    """as given: for token ids passed by the caller."""
    without: float | None = None
    """The dense model's perplexity on a few windows without BOS; None if not tried."""
    with_bos: float | None = None
    """The same with BOS before each window."""
    windows: int = 0
    """Number of windows tried."""

    def line(self) -> str | None:
        """Return a line on the choice, or None if there was none."""
        if self.used == "as given" or (self.asked == "auto" and self.used == "never"):
            return None
        said = {"first": "at the start of the text", "every": "at the start of every window", "never": "nowhere"}
        if self.without is None or self.with_bos is None:
            return said[self.used]
        tried = f"on {self.windows} windows the dense model has perplexity {self.with_bos:.2f} with it and "
        return f"{said[self.used]} ({tried}{self.without:.2f} without)"


def choose_bos(
    asked: AskedBos, tokenizer: PreTrainedTokenizerBase | None, windows: Tensor | None, score: Score
) -> BosChoice:
    """Choose where BOS stands.

    Args:
        asked: the recipe's setting. `auto` keeps the tokenizer's default, unless it adds BOS and the dense model is better by
            5 % in perplexity with BOS in every window.
        tokenizer: the model's; None if there are only token ids.
        windows: N × S int64, windows of text with the tokenizer's default; None if there are none.
        score: scores the dense model on windows.

    Raises:
        BadInput: BOS is requested, but the tokenizer has none.
    """
    if tokenizer is None:
        return BosChoice(asked=asked, used="as given")
    if asked != "auto":
        if asked != "never":
            bos_of(tokenizer, asked)
        return BosChoice(asked=asked, used=asked)
    bos = put_by(tokenizer)
    if bos is None:
        return BosChoice()
    if windows is None or windows.shape[1] < 3:
        return BosChoice(used="first")
    count = min(len(windows), max(FEWEST, min(MOST, TRIED_TOKENS // windows.shape[1])))
    # Drop the first token, which may be BOS itself.
    texts = windows[:count, 1:]
    marked = torch.cat([torch.full_like(texts[:, :1], bos), texts], dim=1)
    found = score([*texts.split(1), *marked.split(1)])
    # Not math.exp, which raises on overflow for a broken model.
    without, with_bos = (float(torch.cat(part).double().mean().exp()) for part in (found[:count], found[count:]))
    used: Literal["first", "every"] = "every" if with_bos < (1 - CLEARLY_BETTER) * without else "first"
    return BosChoice(used=used, without=without, with_bos=with_bos, windows=count)


def score_in_memory(model: PreTrainedModel) -> Score:
    """Return the scoring function of a model in memory."""

    def score(windows: Sequence[Tensor]) -> list[Tensor]:
        length = _text_in(windows)
        with inference_logits(model) as logits_of:
            return [_behind(logits_of(window), window, length) for window in windows]

    return score


def score_of(model: ProvenModel, activations: Activations) -> Score:
    """Return the scoring function of a model whose blocks may be streamed, reading each once."""
    if not model.weights.streams:
        return score_in_memory(model.module)

    def score(windows: Sequence[Tensor]) -> list[Tensor]:
        device, length = model.structure.sample.device, _text_in(windows)
        there = [window.to(device) for window in windows]
        return streamed_logits(model, there, lambda x, t: _behind(x, t, length), activations=activations)

    return score


def _text_in(windows: Sequence[Tensor]) -> int:
    """Return the number of text tokens in each window, without any added BOS."""
    return min(window.shape[1] for window in windows)


def _behind(logits: Tensor, window: Tensor, length: int) -> Tensor:
    """Return the mean negative log likelihood of a window's last `length` tokens except the first, on the CPU."""
    return window_nll(logits[:, -length:], window[:, -length:]).cpu()
