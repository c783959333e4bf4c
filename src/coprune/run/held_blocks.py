"""Blocks of a window that were pruned and may still be trained, as a killed run finds them again.

They are what they were when the last finished block was done: without them, blocks after it would not come out the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coprune.base.durable import write_durably
from coprune.model.blocks import Block
from coprune.pruning.pruner import MatrixResult

_RESULTS = TypeAdapter(dict[str, list[MatrixResult]])


class HeldBlocks:
    """A file in the folder of a checkpoint in the making, for every finished block that others are held after.

    Only the last three are kept: one counts until the next finished block is noted, which is beside the block after it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, finished: Block, held: Sequence[Block], results: Mapping[str, list[MatrixResult]]) -> None:
        """Write the blocks that are held, and what became of their matrices, before a finished block is written."""
        tensors = {
            f"{block.name}.{name}": tensor.detach().to("cpu", copy=True).contiguous()
            for block in held
            for name, tensor in block.module.state_dict().items()
        }
        own = {block.name: results[block.name] for block in held}
        told = {"results": _RESULTS.dump_json(own).decode(), "digest": _digest(tensors)}
        write_durably(self._file(finished.index), lambda temporary: save_file(tensors, temporary, metadata=told))
        if finished.index > 2:
            self._file(finished.index - 3).unlink(missing_ok=True)

    def results(self, finished: int) -> dict[str, list[MatrixResult]] | None:
        """What became of the blocks that were held after the finished one of this number; None if their file is not whole."""
        try:
            with safe_open(self._file(finished), framework="pt") as file:
                told, same = file.metadata(), _digest({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        return _RESULTS.validate_json(told["results"]) if told["digest"] == same else None

    @torch.no_grad()
    def restore(self, finished: int, block: Block) -> None:
        """Give a block the weights that it had when it was held after the finished one of this number."""
        with safe_open(self._file(finished), framework="pt") as file:
            for name, tensor in block.module.state_dict().items():
                tensor.copy_(file.get_tensor(f"{block.name}.{name}"))

    def remove(self) -> None:
        """Remove all files."""
        for file in self._folder.glob("held-*.safetensors"):
            file.unlink()

    def _file(self, finished: int) -> Path:
        return self._folder / f"held-{finished:05d}.safetensors"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        raw: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        found.update(raw)
    return found.hexdigest()
