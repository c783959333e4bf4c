"""A model of which there is a configuration and no weight: to tell what it is made of, and what running it would cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from coprune.base.errors import BadInput
from coprune.model.checkpoint.lazy import build_skeleton, forget_parameters
from coprune.model.checkpoint.load import DtypeName, explained, quiet_transformers, read_config
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.names import is_below_any
from coprune.model.checkpoint.weights import InMemory
from coprune.model.room import room_on


class Imagined(InMemory):
    """The model of a configuration, streamed: each block that is acquired gets random weights. It is never written.

    Args:
        location: the folder of the configuration.
        dtype: as it would be loaded; "auto" is the configuration's own.
        device: where blocks are computed.

    Raises:
        BadInput: transformers builds no model from the configuration.
    """

    streams = True

    def __init__(self, location: ModelFolder, dtype: DtypeName, device: torch.device) -> None:
        with quiet_transformers(), explained(location):
            config = read_config(location.path)
            kind = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
            super().__init__(build_skeleton(location, config, kind, device, trust_remote_code=False))
        self._device = device

    # By parameter, of which tied weights are one: storages on the meta device all look alike.
    @property
    def total_bytes(self) -> int:
        """Size of all parameters."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def rest_tensors(self, block_prefixes: Sequence[str]) -> dict[str, Tensor]:
        """The parameters outside the blocks."""
        return {n: p.detach() for n, p in self._model.named_parameters() if not is_below_any(n, block_prefixes)}

    def acquire(self, prefix: str) -> None:
        """Draw the block's weights. Raises BadInput where they have no room."""
        self._draw(self._model.get_submodule(prefix).modules(), prefix)

    def acquire_rest(self, block_prefixes: Sequence[str]) -> None:
        """Draw what lies outside the blocks. Raises BadInput where it has no room."""
        named = self._model.named_modules(remove_duplicate=False)
        self._draw([module for name, module in named if not is_below_any(f"{name}.", block_prefixes)], "the embeddings")

    def release(self, prefix: str) -> None:
        """Forget the block's weights."""
        forget_parameters(self._model.get_submodule(prefix))

    def _draw(self, modules: Iterable[nn.Module], what: str) -> None:
        places = [
            (module, name, parameter)
            for module in modules
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if parameter.is_meta
        ]
        self._require_room(sum({id(p): p.nbytes for _, _, p in places}.values()), what)
        drawn: dict[int, nn.Parameter] = {}
        for module, name, parameter in places:
            if id(parameter) not in drawn:
                real = torch.empty_like(parameter, device=self._device).uniform_(-0.02, 0.02)
                drawn[id(parameter)] = nn.Parameter(real, requires_grad=False)
            module._parameters[name] = drawn[id(parameter)]

    def _require_room(self, needed: int, what: str) -> None:
        available, where = room_on(self._device)
        if available is not None and needed > available:
            raise BadInput(
                f"{what} would take {needed / 2**30:.1f} GiB {where} at a time, and {available / 2**30:.1f} are there",
                field="model",
                fix="use a larger machine",
            )
