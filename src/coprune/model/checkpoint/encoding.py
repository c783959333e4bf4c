"""How the tensors of a checkpoint are stored, and what its configuration says of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

Place = Callable[[str], str | None]
"""Where a tensor goes, by its name; None if it is left out."""


class Encoding(Protocol):
    """One way of storing tensors in safetensors files."""

    @property
    def name(self) -> str:
        """In a few letters; names the files where they are not the dense ones."""
        ...

    def write(self, file: Path, names: Sequence[str], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write a file of these tensors, which come one by one, as they would lie in a dense checkpoint.

        names: of all of them, beforehand. Raises BadInput for a tensor that cannot be stored.
        """
        ...

    def decode(self, stored: Tensor) -> Tensor:
        """A tensor as it was before it was stored. Raises BadInput if it is damaged."""
        ...

    def configure(self, config: dict[str, Any]) -> None:
        """Say in the content of `config.json`, in place, how the tensors are stored."""
        ...


class Dense:
    """Every value as it is, as any tool reads it."""

    name = "dense"

    def write(self, file: Path, names: Sequence[str], tensors: Iterable[tuple[str, Tensor]]) -> None:
        save_file(dict(tensors), file, metadata={"format": "pt"})

    def decode(self, stored: Tensor) -> Tensor:
        return stored

    def configure(self, config: dict[str, Any]) -> None:
        pass


DENSE = Dense()


def keep_place(name: str) -> str | None:
    """Leave every tensor where it is."""
    return name
