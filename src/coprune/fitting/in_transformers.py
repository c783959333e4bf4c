"""Run a model folder in transformers, with the interface of a GGUF file in llama.cpp: tokens in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate
from coprune.model.generation import ends_of
from coprune.sweeps.generation_speed import cache_argument, weight_bytes


class InTransformers:
    """A model folder in transformers, with the interface of `LlamaCpp`."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load a model folder. Raises BadInput if it cannot be loaded."""
        self._model: PreTrainedModel | None = load_model(locate(str(folder)), processed=False)[0]
        self._ends, self._argument = ends_of(tokenizer, self._whole), cache_argument(self._whole)
        self._cache: Any = None
        self._logits = torch.empty(0)

    @property
    def _whole(self) -> PreTrainedModel:
        assert self._model is not None
        return self._model

    @property
    def bytes(self) -> int:
        """Bytes of all weights in memory."""
        return weight_bytes(self._whole)

    def forget(self) -> None:
        """Begin a new text."""
        self._cache = None

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], all_logits: bool = False) -> None:
        """Continue the text with more tokens; by default only the logits of the last one are kept."""
        ids = torch.tensor([[*tokens]], dtype=torch.int64)
        out = self._whole(input_ids=ids, use_cache=True, **{self._argument: self._cache})
        self._cache = out[self._argument]
        self._logits = out.logits[0] if all_logits else out.logits[0, -1:]

    def last_logits(self, count: int) -> Tensor:
        """Return the logits of the last `count` tokens, read with `all_logits`: tokens × vocabulary, float32."""
        return self._logits[-count:].float()

    def cut_back(self, length: int) -> bool:
        """Truncate the text to its first `length` tokens. Returns False, without truncating, if the cache cannot do that."""
        layers = getattr(self._cache, "layers", ())
        if not layers or any(
            type(layer).__name__ != "DynamicLayer" for layer in layers
        ):  # windows and states lose the past
            return False
        if (more := self._cache.get_seq_length() - length) > 0:
            self._cache.crop(-more)
        return True

    def ends(self, token: int) -> bool:
        """Return whether a token ends an answer."""
        return token in self._ends

    @property
    def context_bytes(self) -> int:
        """Bytes of the cache."""
        found = [one for layer in getattr(self._cache, "layers", ()) for one in vars(layer).values()]
        return sum(one.numel() * one.element_size() for one in found if isinstance(one, Tensor))

    def close(self) -> None:
        """Release the memory."""
        self._model = self._cache = None
