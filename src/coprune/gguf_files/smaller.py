"""The model to export: its tensors, read one at a time, and what was cut from the source's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.gguf_files.tensor_matching import Piece, squeezed
from coprune.model.checkpoint.deferred import deferred, held
from coprune.model.checkpoint.load import load_model, require_one_part
from coprune.model.checkpoint.locate import GgufFile, Location, ModelFolder
from coprune.model.checkpoint.mapped_gguf import LazyGguf
from coprune.model.checkpoint.shards import TensorEntry, read_tensor
from coprune.model.checkpoint.source_encoding import checkpoint_entries
from coprune.model.edit import Configure
from coprune.model.edits import Edits, history_of
from coprune.model.transformers_private import revert_conversion, saved_tensors


@dataclass
class Exported:
    """Tensors of a checkpoint by name, and the edits that made them from the source's, in a folder or file."""

    tensors: Mapping[str, Tensor | TensorEntry]
    edits: Sequence[Edits]
    """Earliest first."""
    location: Location
    source: ModelFolder | None = None
    """The folder that the edits started from, if available; else the model's own if nothing was cut."""
    narrow: Edits = field(default_factory=Edits)
    """Removal of units that are all zeros; applied after all other edits."""

    def name(self, source: str) -> str | None:
        """Return a source tensor's name in the model, or None if it was removed. Raises BadInput if it is missing."""
        placed = self._names(source)[-1]
        return None if placed is None else self._spelled(placed)

    def _names(self, source: str) -> list[str | None]:
        """Return a source tensor's name before and after each set of edits."""
        names: list[str | None] = [source]
        for edits in self.edits:
            names.append(None if names[-1] is None else edits.place(names[-1]))
        return names

    def _spelled(self, name: str) -> str:
        if name in self.tensors:
            return name
        # Some checkpoints omit the base model's prefix.
        near = [other for other in self.tensors if other.endswith(f".{name}") or name.endswith(f".{other}")]
        if len(near) != 1:
            fix = "name a GGUF file of the model that this one was made from"
            raise BadInput(f"the GGUF file has the tensor {name}, which the model lacks", field="like", fix=fix)
        return near[0]

    def tensor(self, name: str) -> Tensor:
        """Read one of the model's own tensors, float32."""
        own = self._spelled(name)
        return self.narrow.cut(own, held(_deferred(self.tensors[own])))

    def all_tensors(self) -> dict[str, Tensor]:
        """Return the model's own tensors in float32; most are read lazily."""
        return {name: self.narrow.cut(name, _deferred(stored)) for name, stored in self.tensors.items()}

    def shape(self, source: str) -> tuple[int, ...] | None:
        """Return the shape of a source tensor's remaining part."""
        name = self.name(source)
        return None if name is None else self.own_shape(name)

    def own_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one of the model's own tensors."""
        return tuple(self.narrow.cut(name, torch.empty(tuple(self.tensors[name].shape), device="meta")).shape)

    def without(self, edits: Edits) -> Exported:
        """Return the model with further, all-zero units removed."""
        return replace(self, edits=[*self.edits, edits], narrow=edits)

    def read(self, source: str) -> tuple[Tensor, Tensor | None] | None:
        """Return a source tensor without its removed entries (float32, in the source's shape) and the mask of kept ones.

        The mask is None if nothing was removed; the result is None if the whole tensor was.
        """
        name = self.name(source)
        if name is None:
            return None
        tensor = self.tensor(name)
        whole = self._uncut(source, tensor)
        if whole.shape == tensor.shape:
            return tensor, None
        return whole, self._uncut(source, torch.ones(tensor.shape, dtype=torch.bool))

    def _uncut(self, name: str, tensor: Tensor) -> Tensor:
        for edits, called in reversed([*zip(self.edits, self._names(name), strict=False)]):
            for edit in reversed([*edits.all()]):
                tensor = edit.uncut(str(called), tensor)
        return tensor


def _deferred(stored: Tensor | TensorEntry) -> Tensor:
    if not isinstance(stored, TensorEntry):
        return stored.float()
    found = deferred(stored)
    return (read_tensor(stored) if found is None else found).float()


def exported(location: Location) -> Exported:
    """Open a folder or a GGUF file. Raises BadInput if it cannot be read."""
    if not isinstance(location, ModelFolder):
        return Exported(whole_tensors(location), [], location)
    name, edits = history_of(location.path)
    uncut = not any(isinstance(edit, Configure) for one in edits for edit in one.all())
    source = _folder_named(name) or (location if uncut else None)
    return Exported(checkpoint_entries(location.path), edits, location, source)


def _folder_named(name: str | None) -> ModelFolder | None:
    path = Path(name) if name is not None else None
    return ModelFolder(path, str(name)) if path is not None and (path / "config.json").is_file() else None


def whole_tensors(location: Location) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint as transformers loads it, under the names that it would save them by.

    Those of a GGUF file are read lazily.
    """
    if isinstance(location, GgufFile):
        require_one_part(location)
        return LazyGguf(location).tensors()
    model, _ = load_model(location, processed=False)
    return revert_conversion(model, saved_tensors(model))


def planned_shape(pieces: Sequence[Piece], shape: Sequence[int], model: Exported) -> tuple[int, ...] | None:
    """Return a tensor's shape in the new GGUF file, or None if nothing is left of it.

    shape: its shape in the GGUF file that the pieces were found in.
    """
    shapes = [left for piece in pieces if (left := model.shape(piece.names[0])) is not None]
    if not shapes:
        return None
    first = pieces[0]
    sizes = [size for size in (shapes[0] if first.expert is None else shapes[0][1:]) if size > 1] or [1]
    sizes = sizes[::-1] if first.transposed else sizes
    if len(pieces) > 1:
        sizes = [len(shapes) if first.expert is None else shapes[0][0], *sizes]
    return _spread(sizes, shape)


def _spread(sizes: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Insert a shape's dimensions of size one into sizes."""
    if len([size for size in shape if size > 1]) != len(sizes):
        return tuple(sizes) if len(sizes) == len(shape) else (*[1] * (len(shape) - len(sizes)), *sizes)
    left = iter(sizes)
    return tuple(1 if size == 1 else next(left) for size in shape)


def made(name: str, pieces: Sequence[Piece], model: Exported) -> Tensor:
    """Compute a tensor of the new GGUF file in float32. Raises UnsupportedModel if its source is ambiguous."""
    parts = [part for piece in pieces if (part := _made(name, piece, model)) is not None]
    return parts[0] if len(pieces) == 1 else torch.stack(parts)


def _made(name: str, piece: Piece, model: Exported) -> Tensor | None:
    first = _arranged(piece, piece.names[0], model)
    for source in piece.names[1:]:
        if not _are_same(first, _arranged(piece, source, model)):
            raise UnsupportedModel(
                f"{name} could be any of {' and '.join(piece.names[:3])}, which are equal in the GGUF file but differ in the "
                "model"
            )
    return first


def _are_same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _arranged(piece: Piece, source: str, model: Exported) -> Tensor | None:
    read = model.read(source)
    if read is None:
        return None
    tensor, mask = read
    if piece.order is not None and len(squeezed(tensor if piece.expert is None else tensor[piece.expert])) != len(
        piece.order
    ):
        raise BadInput(f"{source} has a different shape in the GGUF file", field="like")
    whole = piece.arrange(tensor)
    if piece.added:  # otherwise the sum would be one more copy
        whole = whole + piece.added
    if mask is None:
        return whole
    kept = piece.arrange(mask)
    if not bool(kept.any()):
        return None
    for dim in range(kept.ndim):
        others = [other for other in range(kept.ndim) if other != dim]
        whole = whole.index_select(dim, (kept.any(dim=others) if others else kept).nonzero().flatten())
    return whole
