"""The metadata of a GGUF file, and their changes for a smaller model.

The numbers to change are found as in `coprune.removal.smaller_model`: numbers equal to a cut size are tried, until transformers
reads the smaller model's configuration from them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoConfig

from coprune.base.errors import UnsupportedModel
from coprune.gguf_files.llama_cpp import encode, encoded_bytes, file_type
from coprune.model.checkpoint.companions import places_in
from coprune.model.checkpoint.load import quiet_transformers

MOST_CANDIDATES = 500
_OWN = (
    "GGUF.",
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.size_label",
    "split.",
)
"""Keys that the writer sets itself, or that describe the old file."""


@dataclass(frozen=True)
class Field:
    """A metadata value, with the format's numbers for its type and for a list's entry type."""

    value: Any
    type: int
    entries: int | None = None


Fields = Mapping[str, Field]


def read_fields(reader: Any, without: tuple[str, ...] = _OWN) -> dict[str, Field]:
    """Return the metadata that a new file copies. reader: of the gguf package; without: prefixes of keys to leave out."""
    found = {}
    for key, stored in reader.fields.items():
        is_list = len(stored.types) > 0 and stored.types[0].name == "ARRAY"
        if key.startswith(without) or (is_list and len(stored.types) < 2):
            continue
        found[key] = Field(stored.contents(), int(stored.types[0]), int(stored.types[-1]) if is_list else None)
    return found


def architecture(reader: Any) -> str:
    """Return the prefix of the keys that describe the model."""
    return str(reader.fields["general.architecture"].contents())


def write_fields(writer: Any, fields: Fields) -> None:
    """Write all metadata to a writer of the gguf package."""
    from gguf import GGUFValueType

    for key, field in fields.items():
        entries = None if field.entries is None else GGUFValueType(field.entries)
        writer.add_key_value(key, field.value, GGUFValueType(field.type), sub_type=entries)


@dataclass(frozen=True)
class Counts:
    """Changed sizes that the metadata may have to reflect."""

    changes: Mapping[str, Any]
    """New values of the configuration by dotted path."""
    sizes: Mapping[int, int]
    """Replacements for sizes that no tensor has any more."""
    kept_blocks: Sequence[int]
    blocks: int
    """Original number of blocks."""
    config: Mapping[str, Any]
    """The source's configuration, if available."""


def corrected(fields: Fields, arch: str, counts: Counts) -> dict[str, Field]:
    """Return the metadata of the smaller model. Raises UnsupportedModel if a number's meaning is unclear."""
    if not counts.changes and not counts.sizes and len(counts.kept_blocks) == counts.blocks:
        return dict(fields)
    try:
        before = config_of(fields, arch)
    except Exception:  # transformers cannot read this architecture, and raises various errors
        return _by_value(fields, arch, counts)
    wanted = {place: new for place, new in counts.changes.items() if _is_number(new) and _is_number(_at(before, place))}
    kept = {
        key: _without_blocks(field, counts) if key.startswith(f"{arch}.") else field for key, field in fields.items()
    }
    # Numbers that transformers does not read are corrected by value.
    unread = {place: new for place, new in wanted.items() if not _is_read(place, new, kept, (arch, before))}
    wanted = {place: new for place, new in wanted.items() if place not in unread}
    lists = {place: new for place, new in counts.changes.items() if isinstance(_at(before, place), list)}
    told = {_at(before, place) for place in wanted}
    sizes = {old: new for old, new in counts.sizes.items() if old not in told}
    sizes |= {_at(counts.config, place): new for place, new in unread.items() if _is_number(_at(counts.config, place))}
    for changed in islice(_candidates(kept, arch, before, wanted), MOST_CANDIDATES):
        new = kept | changed
        new |= {
            key: replace(field, value=sizes[field.value])
            for key, field in kept.items()
            if key not in changed and key.startswith(f"{arch}.") and _is_number(field.value) and field.value in sizes
        }
        new |= _head_width(fields, new, arch)
        if _says(config_of(new, arch), before, {**wanted, **lists}):
            return new
    said = ", ".join(f"{place} {_short(value)}" for place, value in {**wanted, **lists}.items())
    raise UnsupportedModel(f"the GGUF file's metadata cannot express {said}")


def _is_read(place: str, new: int, fields: Fields, read: tuple[str, Mapping[str, Any]]) -> bool:
    """Return whether a number of the configuration is derived from the metadata.

    read: the architecture, and the configuration derived from the unchanged metadata.
    """
    arch, before = read
    own = {key: field for key, field in fields.items() if key.startswith(f"{arch}.")}
    old = _at(before, place)
    told = {
        key: replace(field, value=_instead(field.value, new)) for key, field in own.items() if _tells(field.value, old)
    }
    try:
        return bool(told) and _at(config_of({**fields, **told}, arch), place) != old
    except Exception:  # inconsistent numbers raise, so they are read
        return True


def _instead(value: Any, new: int) -> Any:
    return [new] * len(value) if isinstance(value, list) else new


def _by_value(fields: Fields, arch: str, counts: Counts) -> dict[str, Field]:
    """Correct every number equal to a cut size, if transformers cannot read the configuration.

    The model's width is never cut, and the number of blocks has its own key. Raises UnsupportedModel if one size became two
    different ones.
    """
    mixed = [place for place, new in counts.changes.items() if isinstance(new, list) and len({*map(str, new)}) > 1]
    if mixed:
        raise UnsupportedModel(f"the GGUF file's {mixed[0]} cannot be read, and blocks of several kinds were removed")
    numbers, named = dict(counts.sizes), {f"{arch}.block_count": (counts.blocks, len(counts.kept_blocks))}
    if (leading := fields.get(f"{arch}.leading_dense_block_count")) is not None:
        left = sum(index < leading.value for index in counts.kept_blocks)
        named[f"{arch}.leading_dense_block_count"] = (leading.value, left)
    changed = [(_at(counts.config, place), new) for place, new in counts.changes.items() if _is_number(new)]
    for pair in named.values():
        if pair in changed and pair[0] != pair[1]:
            changed.remove(pair)
    for old, new in changed:
        if _is_number(old) and numbers.setdefault(old, new) != new:
            raise UnsupportedModel(
                f"{old} became {numbers[old]} and {new}, and the GGUF file does not show which number is which"
            )
    fixed = [*named, *(f"{arch}.{key}" for key in ("embedding_length", "context_length", "vocab_size"))]
    found: dict[str, Field] = {}
    for key, field in fields.items():
        own = key.startswith(f"{arch}.")
        found[key] = _without_blocks(field, counts) if own else field
        if own and key not in fixed and _is_number(field.value) and field.value in numbers:
            found[key] = replace(field, value=numbers[field.value])
    found |= {key: replace(fields[key], value=new) for key, (_, new) in named.items()}
    return found | _head_width(fields, found, arch)


def _candidates(
    fields: Fields, arch: str, before: Mapping[str, Any], wanted: Mapping[str, int]
) -> Iterator[dict[str, Field]]:
    choices = []
    for place in wanted:
        old = _at(before, place)
        keys = [key for key, field in fields.items() if key.startswith(f"{arch}.") and _tells(field.value, old)]
        choices.append([*([key] for key in keys), *([keys] if len(keys) > 1 else []), []])
    for chosen in product(*choices):
        changed = {}
        for keys, new in zip(chosen, wanted.values(), strict=True):
            for key in keys:
                changed[key] = replace(fields[key], value=_instead(fields[key].value, new))
        yield changed


def _tells(value: Any, number: int) -> bool:
    return (_is_number(value) and value == number) or (
        isinstance(value, list) and bool(value) and set(value) == {number}
    )


def _without_blocks(field: Field, counts: Counts) -> Field:
    """Remove the entries of removed blocks from a list with one value per block."""
    if not isinstance(field.value, list) or len(field.value) != counts.blocks:
        return field
    return replace(field, value=[field.value[index] for index in counts.kept_blocks])


def _head_width(before: Fields, after: Fields, arch: str) -> dict[str, Field]:
    """Return the width of a head, which the format would otherwise derive from the embedding and the number of heads."""
    heads, width = f"{arch}.attention.head_count", before.get(f"{arch}.embedding_length")
    said = f"{arch}.attention.key_length"
    if heads not in before or width is None or said in before or after[heads].value == before[heads].value:
        return {}
    one = replace(width, value=width.value // before[heads].value)
    return {said: one, f"{arch}.attention.value_length": one, f"{arch}.rope.dimension_count": one} | {
        key: before[key] for key in (f"{arch}.rope.dimension_count",) if key in before
    }


def _short(value: Any) -> str:
    """Return a value as text; a list with one value per block is shown with one letter each."""
    return "".join(str(one)[:1] for one in value) if isinstance(value, list) else str(value)


def _says(config: Mapping[str, Any], before: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a configuration has the wanted values and leaves all other numbers unchanged."""
    numbers = {place: value for place, value in places_in(before) if _is_number(value)}
    return all(_at(config, place) == value for place, value in {**numbers, **wanted}.items())


def config_of(fields: Fields, arch: str) -> dict[str, Any]:
    """Return the configuration that transformers reads from metadata."""
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        with closing(GGUFWriter(Path(folder) / "metadata.gguf", arch)) as writer:
            write_fields(writer, {key: field for key, field in fields.items() if not key.startswith("tokenizer.")})
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        found: dict[str, Any] = AutoConfig.from_pretrained(folder, gguf_file="metadata.gguf").to_dict()
    return found


def _is_number(value: Any) -> bool:
    return type(value) is int


def _at(config: Mapping[str, Any], place: str) -> Any:
    found: Any = config
    for name in place.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


@dataclass(frozen=True)
class Planned:
    """A tensor of the new file: its shape, its type, and its name in the source file."""

    source: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Plan:
    """A new file, without its values."""

    arch: str
    fields: Fields
    kind: str
    """Type of most tensors."""
    tensors: Mapping[str, Planned]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(encoded_bytes(tensor.shape, tensor.kind)[0] for tensor in self.tensors.values())


def write_gguf(file: Path, plan: Plan, values: Callable[[str], Tensor], advance: Callable[[float], None]) -> None:
    """Write a complete file.

    Args:
        file: its path, which must not exist.
        plan: its content.
        values: returns a tensor in float32 by its name in the source file.
        advance: called with the number of written bytes.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    with closing(GGUFWriter(file, plan.arch)) as writer:
        if "general.alignment" in plan.fields:
            writer.data_alignment = plan.fields["general.alignment"].value
        write_fields(writer, plan.fields)
        writer.add_file_type(file_type(plan.kind))
        writer.add_quantization_version(2)  # version of the blocks' layout, unchanged since 2023
        for name, tensor in plan.tensors.items():
            size, stored = encoded_bytes(tensor.shape, tensor.kind)
            plain: Any = {"f32": np.float32, "f16": np.float16}.get(tensor.kind, np.uint8)
            writer.add_tensor_info(name, stored, np.dtype(plain), size, GGMLQuantizationType[tensor.kind.upper()])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan.tensors.values():
            encoded = encode(values(tensor.source).reshape(tensor.shape), tensor.kind)
            writer.write_tensor_data(encoded)
            advance(encoded.nbytes)
