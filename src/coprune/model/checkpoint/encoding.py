"""The storage of a checkpoint's tensors, and its description in the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


class Encoding:
    """A way to store tensors in safetensors files: here as plain values, readable by any tool."""

    name = "dense"

    def store(self, name: str, tensor: Tensor, kept: Sequence[KeptSlices]) -> tuple[dict[str, Tensor], Rounding]:
        """Encode a dense tensor: return the stored tensors by name, and the rounding.

        kept: the slices to keep, one cut after the other. Raises UnsupportedModel where it cannot be cut there.
        """
        for one in kept:
            tensor = one.cut(tensor)
        return {name: held(tensor)}, Rounding()

    def require_cut(self, name: str, kept: KeptSlices) -> None:
        """Raise UnsupportedModel where `store` cannot keep these slices of a dense tensor."""
        return

    def bytes_of(self, dense: int) -> int:
        """Return the encoded size in bytes. dense: size of the plain values."""
        return dense

    def complete(self, folder: Path, place: Place) -> None:
        """Update the files that describe how weights are stored; for plain values, remove them."""
        (folder / MODELOPT_FILE).unlink(missing_ok=True)

    def configure(self, config: dict[str, Any], place: Place = keep_place) -> None:
        """Describe the storage of tensors in the content of `config.json`, in place. place: new names of the source's."""
        for said in (config, config.get("text_config")):
            if isinstance(said, dict):
                said.pop("quantization_config", None)
                said.pop("compression_config", None)


class Untouched(Encoding):
    """An encoding that stores nothing: the result copies the source's bytes, and edits select the tensors."""

    name = "edits"

    def store(self, name: str, tensor: Tensor, kept: Sequence[KeptSlices]) -> tuple[dict[str, Tensor], Rounding]:
        return {}, Rounding()

    def bytes_of(self, dense: int) -> int:
        return 0


DENSE = Encoding()
