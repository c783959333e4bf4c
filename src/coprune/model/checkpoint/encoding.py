"""The storage of a checkpoint's tensors, and its description in the configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from coprune.model.checkpoint.deferred import held
from coprune.model.checkpoint.formats import Rounding
from coprune.model.checkpoint.names import MODELOPT_FILE
from coprune.model.kept_slices import KeptSlices

Place = Callable[[str], str | None]
"""Returns a tensor's new name, or None if it is removed."""


def keep_place(name: str) -> str | None:
    """Return the name unchanged."""
    return name


class Encoding(Protocol):
    """A way to store tensors in safetensors files."""

    @property
    def name(self) -> str:
        """Short name, used in the names of files that are not dense."""
        ...

    @property
    def journalled(self) -> bool:
        """Whether the journal already stores tensors in this encoding, so that their bytes are copied."""
        return False

    def store(self, name: str, tensor: Tensor, kept: Sequence[KeptSlices]) -> tuple[dict[str, Tensor], Rounding]:
        """Return what a run's unfinished files hold of a dense tensor, by names, and what was rounded for that.

        kept: slices that are left of it, one cut after the other. Raises UnsupportedModel where it cannot be cut so.
        """
        for one in kept:
            tensor = one.cut(tensor)
        return {name: held(tensor)}, Rounding()

    def require_cut(self, name: str, kept: KeptSlices) -> None:
        """Raise UnsupportedModel where `store` cannot keep these slices of a dense tensor."""
        return

    def bytes_of(self, dense: int) -> int:
        """Return how many bytes the tensors take that take so many as the model's weights tell."""
        return dense

    def write(self, file: Path, names: Sequence[str], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write a file of these tensors, which come one by one, as they would lie in a dense checkpoint.

        names: of all of them, beforehand. Raises BadInput for a tensor that cannot be stored.
        """
        ...

    def decode(self, stored: Tensor) -> Tensor:
        """Decode a stored tensor. Raises BadInput if it is damaged."""
        ...

    def complete(self, folder: Path, place: Place) -> None:
        """Update files beside the weights that describe their storage; here those that are no longer true are removed."""
        (folder / MODELOPT_FILE).unlink(missing_ok=True)

    def configure(self, config: dict[str, Any], place: Place = keep_place) -> None:
        """Describe the storage of tensors in the content of `config.json`, in place. place: new names of the source's."""
        ...


class Dense(Encoding):
    """Plain values, readable by any tool."""

    name = "dense"
    journalled = True

    def write(self, file: Path, names: Sequence[str], tensors: Iterable[tuple[str, Tensor]]) -> None:
        save_file(dict(tensors), file, metadata={"format": "pt"})

    def decode(self, stored: Tensor) -> Tensor:
        return stored

    def configure(self, config: dict[str, Any], place: Place = keep_place) -> None:
        for said in (config, config.get("text_config")):
            if isinstance(said, dict):
                said.pop("quantization_config", None)
                said.pop("compression_config", None)


class Untouched(Dense):
    """No storage: the result copies the source's bytes, and edits say which tensors."""

    name = "edits"

    def store(self, name: str, tensor: Tensor, kept: Sequence[KeptSlices]) -> tuple[dict[str, Tensor], Rounding]:
        return {}, Rounding()

    def bytes_of(self, dense: int) -> int:
        return 0


DENSE = Dense()
