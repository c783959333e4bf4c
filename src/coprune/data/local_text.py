"""The user's own text: text files of any name, rows in .json, .jsonl, .csv, .tsv and .parquet, or folders of them.

Valid UTF-8, also gzipped, is text and one document; the other formats have one document per row. All are
joined with blank lines, in the order of the files' names.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.files import like_named, open_given
from coprune.data.speech import holds_recordings
from coprune.data.text import LOCAL_FILE_HINT, JoinedText, choose_text_column, join, whole_characters

_LOOKED_AT = 1 << 16
_ANY_SIZE, _MOST_TIMES = 200_000_000, 100  # text compresses to a third or a fifth, repetitive tables to less
_ROWS = 256
_WITH_ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Endings of files with rows, which may be gzipped."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a surrogate pair; whole pairs match, too


def local_text(name: str) -> JoinedText:
    """Read a file or folder as one text; `path:column` names the column that holds the text.

    Raises BadInput if it does not exist, has no text column or no text, or cannot be decoded.
    """
    path, column = split_column(name)
    texts = [text for file in files_of(path) for text in _read(file, column)]
    return join(texts, "\n\n", str(path))


def split_column(name: str) -> tuple[Path, str | None]:
    """Split `path:column`; an existing path has no column."""
    path = expand_home(name)
    if not path.exists() and ":" in name:
        before, _, column = name.rpartition(":")
        if column and expand_home(before).exists():
            return expand_home(before), column
    return path, None


def looks_local(name: str) -> bool:
    """Return whether a name means a file or folder: it exists, or is written like a path."""
    path, _ = split_column(name)
    endings = {_ending(path), _ending(Path(name.rpartition(":")[0]))}
    written_as_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or not endings.isdisjoint(READERS)
    return name != "" and (os.path.lexists(path) or written_as_path)


def first_row(name: str) -> Any:
    """Return the first row of a file or folder; None if there is none, or a column is given."""
    path, column = split_column(name)
    if column is not None or not path.exists():
        return None
    try:
        rows = next((rows for file in files_of(path) if (rows := rows_of(file))), [])
    except BadInput:
        return None  # text without rows, or a file whose reader says what is wrong with it
    return rows[0] if rows else None


def files_of(path: Path) -> list[Path]:
    """List the readable files of a folder (recursively, without hidden ones), or the file itself.

    Text files with other endings only count in a folder that has no file with a known one.
    """
    if not path.exists():
        near = like_named(path, least=0.7)
        hint = f"Did you mean {near}? {LOCAL_FILE_HINT}" if near else LOCAL_FILE_HINT
        raise BadInput(f"there is no file or folder {str(path)!r}", fix=hint)
    if path.is_file() and not holds_recordings(path):
        return [path]
    if path.is_file():
        raise BadInput(f"{path} is a recording, but text is expected", fix=LOCAL_FILE_HINT)
    if not path.is_dir():
        raise BadInput(f"{path} is neither a file nor a folder", fix=LOCAL_FILE_HINT)
    if holds_recordings(path):
        raise BadInput(f"{path} holds recordings, but text is expected", fix=LOCAL_FILE_HINT)
    seen = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    files = [file for file in seen if _ending(file) in READERS] or [file for file in seen if begins_as_text(file)]
    if not files:
        raise BadInput(f"the folder {path} holds no file to read", fix=LOCAL_FILE_HINT)
    return files


def _ending(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def begins_as_text(file: Path) -> bool:
    """Return whether the beginning of a file is text."""
    try:
        with open_given(file) as stored, gzip.open(stored) if _is_gzipped(file) else stored as stream:
            begin = stream.read(_LOOKED_AT)
        # The last character may be truncated.
        return b"\0" not in begin and bool(begin) and codecs.getincrementaldecoder("utf-8")().decode(begin) is not None
    except (BadInput, OSError, UnicodeDecodeError, EOFError, zlib.error):
        return False


def _is_gzipped(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


def _read(file: Path, column: str | None) -> list[str]:
    reader = READERS.get(_ending(file), _read_txt)
    if column is not None and reader is _read_txt:
        raise BadInput(f"{file} is plain text and has no columns", fix=f"leave out ':{column}'")
    try:
        return reader(file, column)
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 text (byte {error.start})", fix=LOCAL_FILE_HINT) from error
    except BadInput:
        raise
    except (ValueError, EOFError, zlib.error, OSError) as error:
        raise BadInput(f"{file} cannot be read: {error}") from error


def rows_of(file: Path) -> list[Any]:
    """Return all rows of a .json, .jsonl, .csv, .tsv or .parquet file. Raises BadInput for another ending, or a damaged file."""
    ending = _ending(file).removesuffix(".gz")
    if not holds_rows(file):
        raise BadInput(f"{file} has no rows", fix="Rows are read from .jsonl, .json, .csv, .tsv and .parquet files")
    try:
        if ending in (".csv", ".tsv"):
            return _rows_of_table(_content(file), _delimiter(file))
        if ending == ".jsonl":
            return _rows_of_lines(_content(file))
        if ending == ".json":
            rows = _parsed(_content(file))
            return rows if isinstance(rows, list) else [rows]
        return [row for batch in _parquet(file) for row in batch.to_pylist()]
    except BadInput:
        raise
    except (csv.Error, ValueError, EOFError, zlib.error, OSError) as error:
        raise BadInput(f"{file} cannot be read: {error}") from error


def holds_rows(file: Path) -> bool:
    """Return whether a file's ending is that of rows with columns."""
    return _ending(file).removesuffix(".gz") in _WITH_ROWS


def _most_bytes(file: Path) -> int:
    """Return the maximum decompressed size; a small file can expand to gigabytes."""
    return max(_ANY_SIZE, _MOST_TIMES * file.stat().st_size)


def _too_much(file: Path) -> BadInput:
    return BadInput(
        f"{file} decompresses to more than {_most_bytes(file):,} bytes, {_MOST_TIMES} times its size, so it is probably not text",
        fix="decompress it and name the part that you need",
    )


def _parquet(file: Path, columns: list[str] | None = None) -> list[Any]:
    """Return the batches of a parquet file."""
    import pyarrow.parquet as pq

    size, batches = 0, []
    with open_given(file) as stream:
        parquet = pq.ParquetFile(stream)
        claimed = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups))
        for batch in parquet.iter_batches(_ROWS, columns=columns) if claimed <= _most_bytes(file) else ():
            batches.append(batch)
            size += batch.nbytes
            if size > _most_bytes(file):
                break
    if max(size, claimed) > _most_bytes(file):
        raise _too_much(file)
    return batches


def _content(file: Path) -> str:
    with open_given(file) as stored:
        if _is_gzipped(file):
            most = _most_bytes(file)
            with gzip.open(stored) as stream:
                data = stream.read(most + 1)
            if len(data) > most:
                raise _too_much(file)
        else:
            data = stored.read()
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def _rows_of_lines(content: str) -> list[Any]:
    """Parse every line that is not blank as JSON. Raises ValueError with the number of an invalid line."""
    rows = []
    # Not splitlines(): JSON strings may contain U+2028 and similar characters unescaped.
    for number, line in enumerate(content.split("\n"), start=1):
        try:
            rows += [_parsed(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON ({error.msg}, column {error.colno})") from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return rows


def _delimiter(file: Path) -> str:
    return "\t" if _ending(file).startswith(".tsv") else ","


def _rows_of_table(content: str, between: str) -> list[Any]:
    """Return the rows of a table whose first line names the columns, with all cells as text."""
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=between, strict=True)
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num} has more cells than the first line, which names the columns")
        rows.append(row)
    return rows


def _parsed(content: str) -> Any:
    r"""Parse JSON, with lone surrogates ("\ud83d") replaced by the replacement character.

    Raises ValueError if it is invalid, has a number that is not finite, or is nested too deeply.
    """
    try:
        value = json.loads(content)
        return _whole(value) if _HALF.search(content) else value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return {_whole(key): _whole(one) for key, one in value.items()} if isinstance(value, dict) else value


def _read_txt(file: Path, column: str | None) -> list[str]:
    text = _content(file)
    if "\0" in text:
        raise BadInput(f"{file} contains null bytes, so it is not text", fix=LOCAL_FILE_HINT)
    return [text]


def _read_json(file: Path, column: str | None) -> list[str]:
    content = _content(file)
    return _texts_of_rows(_parsed(content), column, str(file)) if content.strip() else []


def _read_jsonl(file: Path, column: str | None) -> list[str]:
    return _texts_of_rows(_rows_of_lines(_content(file)), column, str(file))


def _texts_of_rows(rows: Any, column: str | None, source: str) -> list[str]:
    if not isinstance(rows, list) or not all(isinstance(row, dict | str) for row in rows):
        raise BadInput(f"{source} must hold rows that are JSON objects or strings")
    objects = [row for row in rows if isinstance(row, dict)]
    if not objects:
        return rows
    if len(objects) < len(rows):
        raise BadInput(f"{source} mixes objects and strings, but its rows must be of one kind")
    names = dict.fromkeys(name for row in objects for name in row)
    # A row without text, or with null, adds nothing.
    columns = {name: all(isinstance(row.get(name) or "", str) for row in objects) for name in names}
    chosen = choose_text_column(columns, column, source)
    return [row[chosen] for row in objects if row.get(chosen)]


def _read_parquet(file: Path, column: str | None) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_given(file) as stream:
            kinds = {field.name: field.type for field in pq.read_schema(stream)}
        columns = {name: pa.types.is_string(kind) or pa.types.is_large_string(kind) for name, kind in kinds.items()}
        chosen = choose_text_column(columns, column, str(file))
        return [text for batch in _parquet(file, [chosen]) for text in batch.column(0).to_pylist() if text]
    except pa.ArrowException as error:
        raise BadInput(f"{file} cannot be read as parquet: {error}") from error


def _read_csv(file: Path, column: str | None) -> list[str]:
    """Read the column of text of a table whose first line names the columns."""
    import pyarrow as pa
    from pyarrow import csv as tables

    parsing = tables.ParseOptions(delimiter=_delimiter(file), newlines_in_values=True)
    try:
        table = tables.read_csv(pa.BufferReader(_content(file).encode()), parse_options=parsing)
    except pa.ArrowException as error:
        raise BadInput(f"{file} cannot be read as a table: {error}") from error
    columns = {field.name: pa.types.is_string(field.type) for field in table.schema}
    chosen = choose_text_column(columns, column, str(file))
    return [text for text in table.column(chosen).to_pylist() if text]


READERS: dict[str, Callable[[Path, str | None], list[str]]] = {
    ".txt": _read_txt,
    ".txt.gz": _read_txt,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    **dict.fromkeys((".csv", ".csv.gz", ".tsv", ".tsv.gz"), _read_csv),
    ".parquet": _read_parquet,
}
"""Reader of one file by its ending; by any other it is text."""
