"""A model from a configuration without weights, to report its structure and estimate what pruning would take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.model.checkpoint.lazy import build_skeleton
from coprune.model.checkpoint.load import explained, quiet_transformers, read_config
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.names import is_below_any
from coprune.model.checkpoint.shards import read_json
from coprune.model.checkpoint.source_encoding import quantization_of, stored_share
from coprune.model.checkpoint.weights import InMemory
from coprune.recipe.parts import DtypeName


class Imagined(InMemory):
    """The model of a configuration, entirely on the meta device. It is never run or written.

    Args:
        location: the folder of the configuration.
        dtype: that it would be loaded in; "auto" is the configuration's own.
        device: where blocks would be computed.

    Raises:
        BadInput: transformers builds no model from the configuration.
    """

    streams = True

    def __init__(self, location: ModelFolder, dtype: DtypeName, device: torch.device) -> None:
        with quiet_transformers(), explained(location):
            config = read_config(location.path)
            kind = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
            super().__init__(build_skeleton(location, config, kind, device))
            self._model.tie_weights()  # moving to the meta device untied them
        self.device, self._quantization = device, quantization_of(read_json(location.path / "config.json"))

    @classmethod
    def of(cls, model: PreTrainedModel, device: torch.device) -> Self:
        """Wrap a model that is already on the meta device."""
        found = cls.__new__(cls)
        InMemory.__init__(found, model)
        found.device, found._quantization = device, None
        return found

    @property
    def stored_share(self) -> float:
        """From the configuration's quantisation, counting all tensors as quantised, as nearly all are."""
        return stored_share(self._quantization, self._model.dtype.itemsize)

    # Counted by parameter, since storages on the meta device cannot be told apart; tied weights count once.
    @property
    def total_bytes(self) -> int:
        """Size of all parameters."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def rest_tensors(self, block_prefixes: Sequence[str]) -> dict[str, Tensor]:
        """Return the parameters outside the blocks."""
        return {n: p.detach() for n, p in self._model.named_parameters() if not is_below_any(n, block_prefixes)}
