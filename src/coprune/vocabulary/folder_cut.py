"""A checkpoint folder with fewer tokens, made from another one shard by shard, in bounded memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from coprune.base.errors import BadInput, UnsupportedModel, VerificationError
from coprune.base.files import whole_folder, write_text
from coprune.base.progress import Reporter
from coprune.model.checkpoint.companions import copy_companions, own_files
from coprune.model.checkpoint.load import load_tokenizer
from coprune.model.checkpoint.locate import Location, ModelFolder
from coprune.model.checkpoint.names import EDITS_FILE
from coprune.model.checkpoint.shards import (
    INDEX_FILE,
    TensorEntry,
    read_entries,
    read_json,
    stored_entries,
)
from coprune.model.checkpoint.source_encoding import source_encoding
from coprune.model.checkpoint.writer import COPY_BYTES, refuse_occupied
from coprune.model.edit import CutVocabulary, FillZeros
from coprune.model.edits import Edits, pruned_names
from coprune.model.kept_slices import runs_of
from coprune.vocabulary.choose import Kept
from coprune.vocabulary.kinds import Vocabulary
from coprune.vocabulary.rewrite import cut_tokenizer
from coprune.vocabulary.samples import LANGUAGES, SOURCES
from coprune.vocabulary.settings import MAP_FILE, STALE, TOKENIZER_FILE, Settings, matches, resized
from coprune.vocabulary.tables import Table, find_tables


def tokenizer_content(folder: ModelFolder) -> dict[str, Any]:
    """Read the content of a folder's `tokenizer.json`. Raises UnsupportedModel if it only has other tokenizer files."""
    path = folder.path / TOKENIZER_FILE
    if path.is_file():
        return read_json(path)
    others = sorted(one.name for pattern in STALE for one in folder.path.glob(pattern))
    has = f"only {', '.join(others)}" if others else "no tokenizer"
    raise UnsupportedModel(
        f"{folder.name} has {has}, but vocabularies can only be cut in a {TOKENIZER_FILE}",
        fix="create one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)" if others else None,
    )


def refuse_folder(folder: ModelFolder) -> None:
    """Raise BadInput or UnsupportedModel for folders whose vocabulary cannot be cut."""
    coded = source_encoding(folder.path)
    rows = [name for name in (coded.weights if coded is not None else {}) if "embed" in name or "lm_head" in name]
    if rows:
        raise BadInput(
            f"{folder.name} stores rows of the vocabulary quantised ({rows[0]})",
            field="model",
            value=folder.name,
            fix="use a checkpoint whose embedding is not quantised",
        )


def bytes_of(folder: ModelFolder, config: Mapping[str, Any], kept: Kept) -> tuple[int, int]:
    """Return the bytes of all weights before and after a cut. Raises like `find_tables`."""
    entries = stored_entries(folder.path)
    tables, _ = find_tables(folder, config, entries, kept)
    before = sum(entry.nbytes for entry in entries.values())
    return before, before - sum(_saved(entries[name], table, kept) for name, table in tables.items())


def _saved(entry: TensorEntry, table: Table, kept: Kept) -> int:
    return entry.nbytes // table.size * (table.size - kept.below(table.size))


def cut_folder(source: ModelFolder, target: Path, kept: Kept, reporter: Reporter, asked: str | None = None) -> Path:
    """Write a folder's model with the kept tokens.

    Args:
        source: the model.
        target: the folder to write, which only appears when complete.
        kept: the tokens to keep.
        reporter: shows progress.
        asked: the user's name of the source, for the history of the result.

    Returns:
        The target.

    Raises:
        BadInput, UnsupportedModel: the model cannot be cut, or the target exists.
        VerificationError: the written model differs from the expected one.
    """
    refuse_folder(source)
    refuse_occupied(target)
    config, content = read_json(source.path / "config.json"), tokenizer_content(source)
    entries = stored_entries(source.path)
    tables, sizes = find_tables(source, config, entries, kept)
    whole, rows = load_tokenizer(source), max(table.size for table in tables.values())
    settings = Settings.of(source, whole, Vocabulary.of(content), rows).cut(kept)
    settings["config.json"] = resized(settings.get("config.json", config), sizes)
    with whole_folder(target) as out:
        copy_companions(source, out)
        for name in stale_files(source):
            (out / name).unlink(missing_ok=True)
        for name, changed in settings.items():
            write_text(out / name, json.dumps(changed, indent=2, sort_keys=name == "config.json") + "\n")
        cut = cut_tokenizer(content, kept)
        write_text(out / TOKENIZER_FILE, json.dumps(cut, ensure_ascii=False, separators=(",", ":")))
        _write_map(out, kept, tables)
        _write_history(source, out, kept, tables, asked)
        total = sum(entry.nbytes for entry in entries.values())
        with reporter.bar("Writing", total) as advance:
            _write_shards(entries, out, tables, kept, advance)
        _verify(source, out, tables, kept)
        require_same_tokens(whole, ModelFolder(out, str(out)), kept)
    return target


def stale_files(source: ModelFolder) -> list[str]:
    """Return the names of a folder's files that duplicate the vocabulary."""
    return [path.name for path in own_files(source.path) if matches(path.name, STALE)]


def _write_map(out: Path, kept: Kept, tables: Mapping[str, Table]) -> None:
    before = max(table.size for table in tables.values())
    write_text(out / MAP_FILE, json.dumps({"before": before, "old_ids": kept.old}) + "\n")


def edit_of(kept: Kept, tables: Mapping[str, Table]) -> CutVocabulary:
    """Return the cut as an edit. tables: by the source's tensor names."""
    import torch

    size = max(table.size for table in tables.values())
    keep = torch.zeros(size, dtype=torch.bool)
    keep[torch.from_numpy(kept.rows)] = True
    named = {name: (table.axis, table.size) for name, table in tables.items()}
    return CutVocabulary(size=size, left=len(kept.old), ranges=runs_of(keep), tables=named)


def _write_history(source: ModelFolder, out: Path, kept: Kept, tables: Mapping[str, Table], asked: str | None) -> None:
    masks = pruned_names(source.path)
    edits = [edit_of(kept, tables)]
    zeros = [FillZeros(masks=_masks(source.path))] if masks else []
    Edits({"vocabulary": [*edits, *zeros]}).write(out, asked)


def _masks(folder: Path) -> dict[str, str]:
    return {str(name): str(mask) for name, mask in read_json(folder / EDITS_FILE)["masks"].items()}


def _write_shards(
    entries: Mapping[str, TensorEntry],
    out: Path,
    tables: Mapping[str, Table],
    kept: Kept,
    advance: Callable[[float], None],
) -> None:
    """Write every shard under its old name, and the index if there are several."""
    shards: dict[Path, dict[str, TensorEntry]] = {}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].file, item[1].start)):
        shards.setdefault(entry.file, {})[name] = entry
    for file, own in shards.items():
        _write_shard(out / file.name, own, tables, kept, advance)
    if len(shards) > 1 or not (out / "model.safetensors").is_file():
        written = {name: entry for file in shards for name, entry in read_entries(out / file.name).items()}
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(entry.shape) for entry in written.values()),
                "total_size": sum(entry.nbytes for entry in written.values()),
            },
            "weight_map": {name: entry.file.name for name, entry in written.items()},
        }
        write_text(out / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(
    target: Path,
    entries: Mapping[str, TensorEntry],
    tables: Mapping[str, Table],
    kept: Kept,
    advance: Callable[[float], None],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, entry in entries.items():
        table = tables.get(name)
        shape = list(entry.shape)
        size = entry.nbytes
        if table is not None:
            shape[table.axis] = kept.below(table.size)
            size -= _saved(entry, table, kept)
        header[name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            _copy(entry, stream, tables.get(name), kept, advance)


def _copy(
    entry: TensorEntry, target: IO[bytes], table: Table | None, kept: Kept, advance: Callable[[float], None]
) -> None:
    """Copy a tensor piece by piece: all of it, or the rows of the kept tokens."""
    with entry.file.open("rb") as source:
        source.seek(entry.start)
        if table is None:
            for start in range(0, entry.nbytes, COPY_BYTES):
                target.write(source.read(min(COPY_BYTES, entry.nbytes - start)))
                advance(min(COPY_BYTES, entry.nbytes - start))
            return
        rows = kept.rows[: kept.below(table.size)]
        outer = math.prod(entry.shape[: table.axis])
        width = entry.nbytes // (outer * table.size)
        step = max(1, COPY_BYTES // width)
        for _ in range(outer):
            for start in range(0, table.size, step):
                count = min(step, table.size - start)
                piece = np.frombuffer(source.read(count * width), dtype=np.uint8).reshape(count, width)
                own = rows[(rows >= start) & (rows < start + count)] - start
                target.write(piece[own].tobytes())
                advance(count * width)


def _verify(source: ModelFolder, out: Path, tables: Mapping[str, Table], kept: Kept) -> None:
    """Raise VerificationError if written rows differ from the source's."""
    before, after = stored_entries(source.path), stored_entries(out)
    if before.keys() != after.keys():
        raise VerificationError(f"{out} does not hold the tensors of {source.name}")
    places = np.unique(np.linspace(0, len(kept.old) - 1, 64).astype(int))
    for name, table in tables.items():
        for place in (int(one) for one in places if one < kept.below(table.size)):
            if table.axis == 0 and _row(before[name], kept.old[place]) != _row(after[name], place):
                raise VerificationError(f"{name} does not hold the row of the token {kept.old[place]} in {out}")


def _row(entry: TensorEntry, number: int) -> bytes:
    width = entry.nbytes // entry.shape[0]
    with entry.file.open("rb") as stream:
        stream.seek(entry.start + number * width)
        return stream.read(width)


def require_same_tokens(
    whole: PreTrainedTokenizerBase, written: Location, kept: Kept, beyond: Collection[str] = ()
) -> None:
    """Load the smaller tokenizer with transformers, and compare its tokens and texts with the full one's.

    Args:
        whole: the full tokenizer, as loaded by transformers.
        written: the smaller model.
        kept: the kept tokens.
        beyond: extra tokens that it may have without a row.

    Raises:
        VerificationError: its tokens are not the kept ones under their new ids, so one would have no embedding row or
            another's; or it tokenises a text of kept tokens differently, or decodes a text differently.
    """
    loaded = load_tokenizer(written)
    expected = {(token, kept.new[number]) for token, number in whole.get_vocab().items() if number in kept.new}
    there = {(token, number) for token, number in loaded.get_vocab().items() if token not in beyond}
    if wrong := sorted(there ^ expected):
        raise VerificationError(
            f"the smaller tokenizer has {len(loaded):,} tokens for {len(kept.old):,} rows: {wrong[0][0]!r} is the first of"
            f" {len(wrong):,} that should not be there, are missing, or have another id"
        )
    dense, cut = whole.backend_tokenizer, loaded.backend_tokenizer
    for text in (*LANGUAGES.values(), *SOURCES.values()):
        old, new = (one.encode(text, add_special_tokens=False).ids for one in (dense, cut))
        if all(token in kept.new for token in old) and [kept.new[token] for token in old] != new:
            raise VerificationError(f"the smaller tokenizer tokenises {text[:40]!r} differently from the original")
        said, again = (one.decode(ids, skip_special_tokens=False) for one, ids in ((dense, old), (cut, new)))
        if said != again:
            raise VerificationError(f"the smaller tokenizer decodes {text[:40]!r} differently from the original")
