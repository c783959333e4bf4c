"""The folder that a model was read from: the saved model keeps its names, layout, dtypes and companion files.

Tensors that the model's class does not load (layers for speculative decoding, custom tensors) are copied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.base.errors import UnsupportedModel
from coprune.model.checkpoint.companions import Companions, copy_companions
from coprune.model.checkpoint.conversion import Conversion, Renamed
from coprune.model.checkpoint.deferred import deferred, untouched
from coprune.model.checkpoint.file_config import changes_in_file
from coprune.model.checkpoint.load import quiet_transformers, read_config
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.names import is_below, is_below_any
from coprune.model.checkpoint.shards import DTYPES, TensorEntry, read_json, read_tensor, stored_entries
from coprune.model.checkpoint.source_encoding import DecodedEntry, SourceEncoding, source_encoding
from coprune.model.transformers_private import config_of
from coprune.recipe.parts import DtypeName
from coprune.recipe.pattern import Grid

FLOATS = ("F64", "F32", "F16", "BF16")


class Source:
    """A folder with the model that was built from it.

    Raises BadInput if the folder is damaged or lacks weights; no weight is read.
    """

    def __init__(
        self,
        location: ModelFolder,
        model: PreTrainedModel,
        dtype: DtypeName = "auto",
        entries: dict[str, TensorEntry] | None = None,
    ) -> None:
        """Open a folder. dtype: of the output, "auto" for each tensor's own. entries: the folder's tensors, if known."""
        self.location = location
        self.stored_as: SourceEncoding | None = None
        """How the folder stores quantised weights; None if its entries were given."""
        if entries is None:
            self.stored_as = source_encoding(location.path, None if dtype == "auto" else getattr(torch, dtype))
            entries = stored_entries(location.path) if self.stored_as is None else dict(self.stored_as.entries)
        self.entries = entries
        """Location of every tensor, by its name in the files."""
        self._model = model
        self.conversion = Conversion(model, self.entries)
        self._dtype = None if dtype == "auto" else getattr(torch, dtype)

    @property
    def total_bytes(self) -> int:
        """Size of all tensors as they are written."""
        return sum(self._written_bytes(entry) for entry in self.entries.values())

    def _written_bytes(self, entry: TensorEntry) -> int:
        if self._dtype is None or entry.dtype not in FLOATS:
            return entry.nbytes
        return math.prod(entry.shape) * int(self._dtype.itemsize)

    def grid_of(self, parameter: str) -> Grid | None:
        """Return a function that rounds to the values representable in a matrix's stored format.

        None if it can represent any value, or if the parameter is made of several tensors.
        """
        found = (
            group.originals[0] for group in self.conversion.groups if group.target == parameter and not group.converted
        )
        entry = self.entries.get(next(found, ""))
        if not isinstance(entry, DecodedEntry) or len(entry.shape) != 2 or entry.weight.form.transposed:
            return None
        return entry.weight.grid(entry.read_parts())

    def is_revertible(self) -> bool:
        """Return whether the whole model can be saved in its files' layout."""
        without_values = {name: tensor.to("meta") for name, tensor in self._model.state_dict().items()}
        try:
            self.conversion.revert(self.conversion.groups, without_values)
        except UnsupportedModel:
            return False
        return True

    def below(self, prefix: str) -> list[Renamed]:
        """Return the tensors below a module's path."""
        return [group for group in self.conversion.groups if is_below(group.target, prefix)]

    def outside(self, prefixes: Sequence[str]) -> list[Renamed]:
        """Return the tensors below none of these paths."""
        return [group for group in self.conversion.groups if not is_below_any(group.target, prefixes)]

    def as_written(self, groups: Sequence[Renamed], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters under the files' names, in their layout and dtypes (or the requested one).

        state: the model's tensors that the groups cover. Raises UnsupportedModel as `Conversion.revert`.
        """
        tensors = self.conversion.revert(groups, state)
        return {name: self._in_written_dtype(name, tensor) for name, tensor in tensors.items()}

    def _in_written_dtype(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to("cpu")
        if self._dtype is not None:
            return tensor.to(self._dtype) if tensor.is_floating_point() else tensor
        written = DTYPES[self.entries[name].dtype]
        if written == tensor.dtype:
            return tensor
        if untouched(tensor, self.entries[name]):
            return deferred(self.entries[name]) or tensor
        # Computing in a narrower dtype must not round unchanged tensors (such as a router's float32 bias).
        source = read_tensor(self.entries[name])
        return source if torch.equal(source.to(tensor.dtype), tensor) else tensor.to(written)

    @property
    def carried_entries(self) -> dict[str, TensorEntry]:
        """Entries of tensors that the model does not load."""
        return {name: self.entries[name] for name in self.conversion.carried}

    def carried(self) -> dict[str, Tensor]:
        """Return the tensors that the model does not load, unchanged."""
        return {name: read_tensor(entry) for name, entry in self.carried_entries.items()}

    def in_file(self, changes: Mapping[str, Any]) -> dict[str, Any] | None:
        """Translate changes of the model's configuration to its file, which may use other names and places."""
        with quiet_transformers():
            kind, own = type(read_config(self.location.path)), type(self._model.config)

        def read(content: dict[str, Any]) -> Mapping[str, Any]:
            config = config_of(kind, content)
            inside = (part for part in vars(config).values() if type(part) is own)
            found: dict[str, Any] = (config if type(config) is own else next(inside)).to_dict()
            return found

        return changes_in_file(read_json(self.location.path / "config.json"), self._model.config, changes, read)

    def write_companions(self, folder: Path, beside: Companions) -> None:
        """Copy the files beside the weights; a processor is copied unchanged."""
        copy_companions(self.location, folder, beside.dtype)
