"""Pack a checkpoint folder and unpack it again, byte for byte.

A packed folder is a Hugging Face folder whose safetensors files hold packed tensors under the tensors' own names and whose
`config.json` names coprune as quantization method. `coprune_packed.json` keeps what packing rewrote, to restore it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, unknown_name
from coprune.base.files import require_own_name, whole_folder
from coprune.base.words import Set, Sheet, Shown, say
from coprune.model.checkpoint.companions import own_files
from coprune.model.checkpoint.names import QUANT_METHOD
from coprune.model.checkpoint.shards import MAX_HEADER_BYTES, read_header_bytes, read_json, shard_files
from coprune.packed.encoding import (
    DTYPE_NAMES,
    PackedEncoding,
    ShardWriter,
    check_shard,
    named,
    read_tensors,
    shard_metadata,
    stored_checksum,
    stored_order,
    tensor_bytes,
)
from coprune.packed.format import FORMATS, Format, negative_zeros, pack_tensor, unpack_tensor
from coprune.packed.header import VERSION, is_packed


def pack(source: Path | str, target: Path | str, format: Format = "auto", drop_negative_zeros: bool = False) -> Sizes:
    """Write a packed copy of a dense checkpoint folder: the same model bit for bit, and smaller.

    A tensor that would not shrink stays as it is. One tensor is in memory at a time.

    Args:
        source: a Hugging Face folder with safetensors.
        target: a folder that does not exist or is empty.
        format: `auto` (the smaller layout of each tensor), `bitmask` (any pattern) or `nm` (N:M positions).
        drop_negative_zeros: do not keep weights that are -0.0; unpacking then gives +0.0 in their places.

    Returns:
        Bytes before and after.

    Raises:
        BadInput: something cannot be packed, which is found before anything is written.
    """
    source, target = expand_home(source), expand_home(target)
    if format not in FORMATS:
        raise unknown_name("packed format", format, FORMATS, field="format")
    shards = checkpoint_shards(source)
    config = read_json(source / CONFIG)
    if "quantization_config" in config:
        said = config["quantization_config"]
        method = said.get("quant_method", "unknown") if isinstance(said, dict) else "unknown"
        raise BadInput(
            f"{source} is already quantised or packed ({method})",
            field="source",
            value=source,
            fix="pack a dense folder",
        )
    sizes = Sizes(target, drops_negative_zeros=drop_negative_zeros)
    kept: dict[str, bytes] = {CONFIG: (source / CONFIG).read_bytes()}
    headers: dict[str, bytes] = {}
    with replacing_folder(source, target) as out:
        for shard in shards:
            headers[shard.name] = read_header_bytes(shard)
            _pack_shard(shard, out / shard.name, format, sizes)
        PackedEncoding(format).configure(config)
        _write_json(out / CONFIG, config)
        if (source / INDEX).exists():
            kept[INDEX] = (source / INDEX).read_bytes()
            index = read_json(source / INDEX)
            index.setdefault("metadata", {})["total_size"] = sizes.packed
            _write_json(out / INDEX, index)
        if (out / CARD).is_file():
            kept |= _say_in_card(out / CARD, packed_card)
        write_manifest(out / MANIFEST, kept, headers)
    return sizes


def unpack(source: Path | str, target: Path | str) -> Path:
    """Write the dense folder that a packed one came from, byte for byte.

    Args:
        source: a packed folder, whose checksums are all verified.
        target: a folder that does not exist or is empty.

    Returns:
        The folder that was written.

    Raises:
        BadInput: the folder is not packed, or is damaged; then there is no target.
    """
    source, target = expand_home(source), expand_home(target)
    shards = checkpoint_shards(source)
    config = read_json(source / CONFIG)
    if not is_packed_config(config):
        raise BadInput(
            f"{source} is not a packed folder: its config.json does not name {QUANT_METHOD!r}", field="source"
        )
    # A model that was loaded packed and saved again has no manifest: its tensors come back, not its files' bytes.
    manifest = source / MANIFEST
    files, headers = read_manifest(manifest) if manifest.exists() else ({}, {})
    if missing := sorted(headers.keys() - {shard.name for shard in shards}):
        raise BadInput(f"{source} lacks {missing[0]}, which {MANIFEST} names", field="source", fix="copy it again")
    with replacing_folder(source, target) as out:
        sizes = {}
        for shard in shards:
            check_shard(shard)
            _unpack_shard(shard, out / shard.name, headers.get(shard.name))
            sizes[shard.name] = sum(stored_order(read_header_bytes(out / shard.name)).values())
        del config["quantization_config"]
        _write_json(out / CONFIG, config)
        if (source / INDEX).exists():
            index = read_json(source / INDEX)
            index.setdefault("metadata", {})["total_size"] = sum(sizes.values())
            _write_json(out / INDEX, index)
        if (out / CARD).is_file():
            _say_in_card(out / CARD, dense_card)
        for name, content in files.items():
            (out / name).write_bytes(content)
    return target


def _say_in_card(path: Path, say: Callable[[str], str]) -> dict[str, bytes]:
    """Change a folder's model card to its new storage; return the old card, by name."""
    before = path.read_bytes()
    try:
        path.write_bytes(say(before.decode("utf-8")).encode("utf-8"))
    except UnicodeDecodeError:
        return {}
    return {path.name: before}


def checkpoint_shards(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder, by name. Raises BadInput if it is not one."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder", field="source", value=folder)
    if not (folder / CONFIG).exists():
        fix = "give a checkpoint folder in the Hugging Face layout"
        raise BadInput(f"{folder} has no {CONFIG}", field="source", value=folder, fix=fix)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        first = "save the model with save_pretrained first"
        raise BadInput(f"{folder} has no safetensors files", field="source", value=folder, fix=first)
    if (folder / INDEX).exists():
        shard_files(folder)  # an incomplete folder would make an incomplete one, and its source may be removed then
    return shards


def is_packed_config(config: dict[str, Any]) -> bool:
    """Return whether the content of a config.json declares coprune's packing."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def is_packed_folder(folder: Path | str) -> bool:
    """Return whether a folder is a checkpoint packed by coprune."""
    path = Path(folder) / CONFIG
    return path.is_file() and is_packed_config(read_json(path))


@contextmanager
def replacing_folder(source: Path, target: Path) -> Iterator[Path]:
    """Yield a temporary folder with the source's other files, renamed to the target on success, else removed."""
    require_own_name(target, "target")
    if target.resolve() == source.resolve():
        raise BadInput(f"{target} is the source itself", field="target", value=target, fix="give another folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(
            f"{target} exists and is not empty", field="target", value=target, fix="remove it or give another folder"
        )
    with whole_folder(target) as out:
        for path in own_files(source, below=True):
            inside = path.relative_to(source)
            if path.parent == source and (path.suffix == ".safetensors" or path.name in (CONFIG, INDEX, MANIFEST)):
                continue
            (out / inside.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / inside)
        yield out


def _pack_shard(source: Path, target: Path, format: Format, sizes: Sizes) -> None:
    names = list(stored_order(read_header_bytes(source)))
    packed: list[str] = []
    checksums: dict[str, int] = {}
    with ShardWriter(target, names) as writer:
        for name, tensor in read_tensors(source):
            with named(source, name):
                blob = _pack_one(tensor, format, sizes.drops_negative_zeros)
            sizes.count(name, tensor, blob)
            if blob is not None:
                packed.append(name)
            stored = tensor if blob is None else blob
            checksums[name] = stored_checksum(stored)
            writer.add(name, stored)
        sizes.packed += writer.end
        writer.finish(shard_metadata(packed, checksums))


def _pack_one(tensor: Tensor, format: Format, drop_negative_zeros: bool) -> Tensor | None:
    if is_packed(tensor):
        raise BadInput("it is packed already")
    if tensor.dtype not in DTYPE_NAMES:
        raise BadInput(f"its dtype {tensor.dtype} is not one that coprune can copy")
    return pack_tensor(tensor, format, drop_negative_zeros)


def _unpack_shard(source: Path, target: Path, header: bytes | None) -> None:
    tensors = ((name, unpack_tensor(tensor) if is_packed(tensor) else tensor) for name, tensor in read_tensors(source))
    if header is None:
        with ShardWriter(target, list(stored_order(read_header_bytes(source)))) as writer:
            for name, tensor in tensors:
                writer.add(name, tensor)
            writer.finish({"format": "pt"})
        return
    expected = stored_order(header)
    if list(expected) != list(stored_order(read_header_bytes(source))):
        raise BadInput(f"{source} does not fit the dense file's header", fix="pack the model again")
    with target.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        # Packing keeps the order of the data, so the tensors come in the order in which the dense file has them.
        for (wanted, size), (name, tensor) in zip(expected.items(), tensors, strict=False):
            if name != wanted or tensor.numel() * tensor.dtype.itemsize != size:
                raise BadInput(
                    f"{source}: tensor {name} does not fit the dense file's header", fix="pack the model again"
                )
            file.write(tensor_bytes(tensor))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


IMPORT = "import coprune  # lets transformers load packed weights\n"
STORED = {
    "source": "The weights are stored as the original's are, so any tool that loads the original loads this.",
    "dense": "The weights are stored dense, so any tool that loads the original loads this.",
    "packed": "The weights are stored packed: `pip install coprune`, and `import coprune` before transformers loads this folder. "
    "`coprune unpack FOLDER DENSE` makes a dense folder of it that needs no coprune.",
}
"""Description of each encoding."""


def packed_card(card: str) -> str:
    """Turn the card of a dense folder into that of the packed one, with a section on loading."""
    said = card.replace(STORED["dense"], STORED["packed"]).replace(STORED["source"], STORED["packed"])
    said = re.sub(r"^(```python\n)(?=from transformers import)", rf"\1{IMPORT}", said, count=1, flags=re.MULTILINE)
    if STORED["packed"] in said:
        return said
    head = re.match(r"\s*---\n.*?\n---\n", said, flags=re.DOTALL)
    end = head.end() if head else 0
    return f"{said[:end]}\n> {STORED['packed']}\n\n{said[end:].lstrip()}"


def dense_card(card: str) -> str:
    """Turn the card of a folder that a run wrote packed into that of a dense one."""
    return card.replace(STORED["packed"], STORED["dense"]).replace(IMPORT, "")


CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "coprune_packed.json"
CARD = "README.md"


def write_manifest(path: Path, files: Mapping[str, bytes], headers: Mapping[str, bytes]) -> None:
    """Keep the configuration, index and card, and every safetensors file's header, as they were."""
    content = {
        "version": VERSION,
        "files": {name: file.decode("utf-8") for name, file in files.items()},
        "safetensors_headers": {
            name: base64.b64encode(zlib.compress(header)).decode() for name, header in headers.items()
        },
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return the replaced files and headers. Raises BadInput if the manifest is damaged."""
    content = read_json(path)
    try:
        files, headers = content.get("files", {}), content.get("safetensors_headers", {})
        if not set(files) <= {CONFIG, INDEX, CARD}:
            raise ValueError("it names other files")
        restored = {name: text.encode("utf-8") for name, text in files.items()}
        return restored, {name: _inflated(header) for name, header in headers.items()}
    except (binascii.Error, zlib.error, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} is damaged ({str(error)[:100]})", fix="copy or pack the model again") from error


def _inflated(header: Any) -> bytes:
    """Decompress a header, up to the maximum size of one, since a small one can expand to gigabytes."""
    stream = zlib.decompressobj()
    found = stream.decompress(base64.b64decode(header, validate=True), MAX_HEADER_BYTES + 1)
    if len(found) > MAX_HEADER_BYTES or not stream.eof:
        raise ValueError("a header is cut off or too large")
    return found


@dataclass(repr=False)
class Sizes(Shown):
    """Bytes of a checkpoint's tensors, dense and packed."""

    folder: Path
    """Folder of the packed checkpoint."""
    dense: int = 0
    packed: int = 0
    bytes_before: int = 0
    """Dense bytes of those tensors that were packed."""
    bytes_after: int = 0
    """Packed bytes of the same tensors."""
    negative_zeros: int = 0
    """−0.0 found in matrices. Stored as values, they make a checkpoint larger than its zeros would suggest."""
    drops_negative_zeros: bool = False
    names: list[str] = field(default_factory=list)
    """The tensors that were packed."""

    def count(self, name: str, tensor: Tensor, packed: Tensor | None) -> None:
        """Add a dense tensor, and what it was packed into; None where it stayed as it was."""
        if tensor.ndim >= 2 and tensor.is_floating_point():
            self.negative_zeros += int(negative_zeros(tensor).sum())
        dense = tensor.numel() * tensor.dtype.itemsize
        self.dense += dense
        if packed is not None:
            self.names.append(name)
            self.bytes_before += dense
            self.bytes_after += packed.numel()

    @property
    def ratio(self) -> float:
        """Packed over dense bytes."""
        return self.packed / max(self.dense, 1)

    def headline(self) -> str:
        """Return path and size of the checkpoint."""
        return f"{self.folder}: {self.packed:,} bytes, {self.ratio:.3f} of dense"

    def sheet(self) -> Sheet:
        """Return bytes before and after."""
        rows = [
            ("packed", f"{len(self.names)} tensors, {self.bytes_before:,} → {self.bytes_after:,} bytes"),
            ("in all", f"{self.dense:,} → {self.packed:,} bytes ({self.ratio:.3f}) in {self.folder}"),
        ]
        if self.negative_zeros and not self.drops_negative_zeros:
            smaller = say((Set("drop_negative_zeros", True), " makes it smaller"))
            rows.append(("note", f"{self.negative_zeros:,} weights are -0.0 and kept; {smaller}"))
        return Sheet(self.headline(), rows)
