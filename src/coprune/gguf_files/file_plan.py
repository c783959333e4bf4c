"""The plan of a new GGUF file: everything except its values, derived and checked before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.progress import Reporter
from coprune.gguf_files.llama_cpp import TOKEN_EMBEDDINGS, tensor_type
from coprune.gguf_files.metadata import Counts, Plan, Planned, architecture, corrected, read_fields
from coprune.gguf_files.smaller import Exported, exported, made, planned_shape, whole_tensors
from coprune.gguf_files.tensor_matching import EXACT, Matcher, Piece
from coprune.gguf_files.verify import STORED_ERROR, WORST_ERROR, require_same_source
from coprune.gguf_files.vocabulary_metadata import without_tokens
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.locate import GgufFile
from coprune.model.checkpoint.mapped_gguf import decode
from coprune.model.checkpoint.shards import read_json
from coprune.model.edit import Configure, CutVocabulary

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Example:
    """A template GGUF file, with the sources of its tensors."""

    path: Path
    reader: Any
    """Reader of the gguf package."""
    pieces: Mapping[str, Sequence[Piece]]
    """Sources of the tensors by name; empty for those that the checkpoint lacks."""

    def values(self, name: str, source: Exported) -> Tensor:
        """Return a tensor's values for the new file, float32."""
        found = self.pieces[name]
        if found:
            return made(name, found, source)
        return decode(next(stored for stored in self.reader.tensors if stored.name == name))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors, rows last."""
        return {stored.name: tuple(int(size) for size in reversed(stored.shape)) for stored in self.reader.tensors}

    @property
    def types(self) -> dict[str, str]:
        """Storage types of the tensors, by name."""
        return {stored.name: stored.tensor_type.name for stored in self.reader.tensors}

    @property
    def mixed(self) -> bool:
        """Whether some matrices are not stored in float32."""
        shapes = self.shapes
        return any(kind != "F32" and len(shapes[name]) > 1 for name, kind in self.types.items())


def read_example(file: GgufFile, source: Exported, reporter: Reporter) -> Example:
    """Match the tensors of a GGUF file to a model's. source: the model to store in the file's layout.

    Raises:
        BadInput: the file cannot be read, or belongs to another model.
        UnsupportedModel: its tensors cannot be distinguished.
    """
    reporter.say("Matching the tensors of the GGUF file to the model's weights")
    reader = gguf_reader(file.path, field="like")
    _require_embeddings(file, source, reader)
    reference, tolerance = _reference(file, source, reader, reporter)
    with reporter.bar("Matching", len(reader.tensors)) as advance:
        pieces = Matcher(reference, tolerance).find(_each(reader, advance))
    _require_all(pieces, reference, source, file)
    require_same_source(pieces, reference, source, file)
    return Example(file.path, reader, pieces)


def _reference(file: GgufFile, source: Exported, reader: Any, reporter: Reporter) -> tuple[Mapping[str, Tensor], float]:
    """Return the tensors to match the file's against, and the relative tolerance.

    transformers reads the file's exact values; for an architecture that it cannot read, use the source folder's values from
    before quantisation.
    """
    if source.location == file:  # a GGUF file exported to another type is its own template
        return source.all_tensors(), EXACT
    try:
        return whole_tensors(file), EXACT
    except BadInput:
        folder = source.source
        if folder is None:
            raise
        reporter.say(
            f"transformers cannot read this architecture's GGUF files, so its weights are matched with those of {folder.name}"
        )
        used = {stored.tensor_type.name.lower() for stored in reader.tensors}
        return exported(folder).all_tensors(), max(STORED_ERROR.get(kind, WORST_ERROR) for kind in used)


def _require_embeddings(file: GgufFile, source: Exported, reader: Any) -> None:
    """Raise BadInput if no tensor of the model has the shape of the file's token embeddings.

    Only removing tokens changes it, so this detects another model from the headers alone.
    """
    table = next((stored for stored in reader.tensors if stored.name == TOKEN_EMBEDDINGS), None)
    if table is None:
        return
    shape = tuple(int(size) for size in reversed(table.shape))
    cuts = [edit for edits in source.edits for edit in edits.all() if isinstance(edit, CutVocabulary)]
    rows = cuts[-1].left if cuts else shape[0]
    before = cuts[0].size if cuts else shape[0]
    if shape[0] != before or all(tuple(tensor.shape) != (rows, *shape[1:]) for tensor in source.tensors.values()):
        raise BadInput(
            f"{file.name} is of another model: its token embeddings are {shape[0]:,} × {shape[1]:,}, but "
            f"{source.location.name} has no tensor of that shape",
            field="like",
            value=str(file.path),
            fix="name a GGUF file of the model that this one was made from",
        )


def _each(reader: Any, advance: Callable[[float], None]) -> Iterator[tuple[str, Tensor]]:
    for stored in reader.tensors:
        yield stored.name, decode(stored)
        advance(1)


def planned(example: Example, source: Exported, kind: str) -> Plan:
    """Plan shapes, types, names and metadata of the new file. Raises UnsupportedModel if metadata cannot express them."""
    shapes = example.shapes
    new = {
        name: planned_shape(own, shapes[name], source) if own else shapes[name] for name, own in example.pieces.items()
    }
    blocks = {int(found[1]): False for name in new if (found := _BLOCK.fullmatch(name))}
    blocks |= {int(found[1]): True for name, shape in new.items() if shape and (found := _BLOCK.fullmatch(name))}
    left = [number for number in sorted(blocks) if blocks[number]]
    types, mixed = example.types, example.mixed
    tensors = {
        _moved(name, left): Planned(name, shape, tensor_type(name, shape, kind, types[name], mixed))
        for name, shape in new.items()
        if shape is not None
    }
    done = [edit for edits in source.edits for edit in edits.all()]
    changes = {place: value for edit in done if isinstance(edit, Configure) for place, value in edit.changes.items()}
    kept = [index for index, number in enumerate(sorted(blocks)) if blocks[number]]
    arch = architecture(example.reader)
    config = {} if source.source is None else read_json(source.source.path / "config.json")
    vocabularies = [edit for edit in done if isinstance(edit, CutVocabulary)]
    told = {size for edit in vocabularies for _, size in edit.tables.values()}
    sizes = {old: left for old, left in _sizes(shapes, new).items() if old not in told}
    fields = corrected(read_fields(example.reader), arch, Counts(changes, sizes, kept, len(blocks), config))
    for edit in vocabularies:  # earliest first
        fields = without_tokens(fields, arch, edit.old_ids)
    return Plan(arch, fields, kind, tensors)


def _moved(name: str, left: Sequence[int]) -> str:
    """Return the name of a tensor after blocks were removed."""
    found = _BLOCK.fullmatch(name)
    return name if found is None else f"blk.{left.index(int(found[1]))}.{found[2]}"


def _sizes(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int] | None]) -> dict[int, int]:
    """Return the replacements for sizes that no tensor has any more. Raises UnsupportedModel if the blocks differ."""
    kinds: dict[tuple[str, tuple[int, ...]], set[tuple[int, ...]]] = {}
    for name, shape in after.items():
        if shape is not None:
            kind = _BLOCK.sub(r"blk.*.\2", name)
            kinds.setdefault((kind, tuple(before[name])), set()).add(tuple(shape))
    for (kind, _), shapes in kinds.items():
        if len(shapes) > 1:
            listed = " and ".join("×".join(map(str, shape)) for shape in sorted(shapes))
            raise UnsupportedModel(
                f"{kind} is {listed} in different blocks, but a GGUF file of this architecture has one size for all"
            )
    pairs = [
        (old, new)
        for (_, was), (shape,) in kinds.items()
        if len(was) == len(shape)
        for old, new in zip(was, shape, strict=True)
    ]
    left = {new for _, new in pairs}
    return {old: new for old, new in pairs if old != new and old not in left}


def _require_all(
    pieces: Mapping[str, Sequence[Piece]], reference: Mapping[str, Tensor], source: Exported, file: GgufFile
) -> None:
    """Raise UnsupportedModel or BadInput if a tensor has no match on one side."""
    alone = [name for name, own in pieces.items() if not own and name.startswith("blk.")]
    if alone:
        raise UnsupportedModel(f"{alone[0]} of {file.name} matches none of the tensors that transformers loads from it")
    used = {name for own in pieces.values() for piece in own for name in piece.names}
    unused = [name for name in reference if name not in used]
    if unused:
        raise UnsupportedModel(f"transformers loads {unused[0]} from {file.name}, but no tensor there has these values")
    placed = {name for one in used if (name := source.name(one)) is not None}
    extra = [name for name in source.tensors if name not in placed and not _is_double(name, placed, source)]
    if extra:
        fix = "name a GGUF file of the model that this one was made from"
        raise BadInput(f"{file.name} lacks {extra[0]}, which the model has", field="like", fix=fix)
    for name, own in pieces.items():
        left = any(source.name(one) is not None for piece in own for one in piece.names)
        if left and any(len(piece.names) > 1 for piece in own):
            made(name, own, source)  # raises if tensors were equal before and differ now


def _is_double(name: str, others: Collection[str], source: Exported) -> bool:
    """Return whether a tensor duplicates another one: some folders store tied embeddings twice."""
    shape = tuple(source.tensors[name].shape)
    alike = (other for other in others if tuple(source.tensors[other].shape) == shape)
    return any(torch.equal(source.tensor(name), source.tensor(other)) for other in alike)
