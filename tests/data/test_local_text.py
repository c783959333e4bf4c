"""The user's files and folders in every format, and errors if they cannot be read."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coprune.base.errors import BadInput
from coprune.data.corpora import calibration_text, evaluation_corpus_for, evaluation_text
from coprune.data.local_text import local_text, rows_of
from coprune.data.text import join
from coprune.evaluation.asked_texts import split_texts

TEXTS = ["first\nline", "", "zweite Zeile: ä€😀", "a \u2028 b"]
JOINED = "first\nline\n\nzweite Zeile: ä€😀\n\na \u2028 b"


def write(path: Path, kind: str) -> Path:
    rows = [{"id": number, "text": text, "title": "t"} for number, text in enumerate(TEXTS)]
    contents = {
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n",
        "strings": "\n".join(json.dumps(text) for text in TEXTS if text),
        "json": json.dumps(rows),
        "txt": "\ufeff" + JOINED.replace("\n", "\r\n"),
    }
    content = contents[kind].encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("a.txt", "txt"),
        ("a.txt.gz", "txt"),
        ("wiki.train.raw", "txt"),
        ("README", "txt"),
        ("a.md.gz", "txt"),
        ("a.jsonl", "jsonl"),
        ("a.b.jsonl.gz", "jsonl"),
        ("a.jsonl", "strings"),
        ("A.JSON", "json"),
        ("a.json.gz", "json"),
    ],
)
def test_every_kind_of_file_gives_the_same_text(tmp_path: Path, file: str, kind: str) -> None:
    assert local_text(str(write(tmp_path / file, kind))).text == JOINED


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_columns_are_read_by_name(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"id": [1, 2, 3], "text": pa.array(["one", None, "two"], kind), "more": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert local_text(str(tmp_path / "a.parquet")).text == "one\n\ntwo"
    assert local_text(f"{tmp_path / 'a.parquet'}:more").text == "x\n\ny\n\nz"


def test_a_table_has_one_column_of_text_or_is_refused_with_its_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,body\n1,"one, two"\n2,"three\nfour"\n3,\n')
    assert local_text(str(tmp_path / "a.csv")).text == "one, two\n\nthree\nfour"
    (tmp_path / "b.tsv").write_text("question\tanswer\nwhy?\tso\n")
    with pytest.raises(BadInput, match=r"no column named 'text'.*'question', 'answer'.*path:column"):
        local_text(str(tmp_path / "b.tsv"))
    assert local_text(f"{tmp_path / 'b.tsv'}:answer").text == "so"
    (tmp_path / "c.csv").write_text("")
    with pytest.raises(BadInput, match="cannot be read as a table"):
        local_text(str(tmp_path / "c.csv"))


def test_a_folder_is_read_in_the_order_of_names_without_hidden_files(tmp_path: Path) -> None:
    for name in ["b/1.txt", "a.txt", "c.md", ".hidden.txt", ".cache/x.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    assert local_text(str(tmp_path)).text == "text of a.txt\n\ntext of b/1.txt"


def test_a_folder_without_the_usual_endings_is_read_by_what_its_files_hold(tmp_path: Path) -> None:
    for name in ["wiki.train.raw", "b.md"]:
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "picture").write_bytes(b"\x89PNG\0")
    assert local_text(str(tmp_path)).text == "text of b.md\n\ntext of wiki.train.raw"


def test_a_column_is_found_by_name_or_by_being_the_only_one_of_strings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "hello", "id": 1}\n{"body": null, "id": 2}\n{"id": 3}')
    assert local_text(str(path)).text == "hello"
    path.write_text('{"body": "hello", "title": "short"}')
    with pytest.raises(BadInput, match=r"no column named 'text'.*'body', 'title'.*path:column"):
        local_text(str(path))
    assert local_text(f"{path}:body").text == "hello"
    with pytest.raises(BadInput, match="no text column 'boby'"):
        local_text(f"{path}:boby")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.gz", b"text", "cannot be read"),
        ("a.pdf", b"%PDF-1.4 \xe2\xe3", r"not UTF-8 text \(byte 9\)"),
        ("a", b"text\0text", "null bytes, so it is not text"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-12], "cannot be read"),
        ("a.json", b"", "holds no text"),
        ("a.json", b"[]", "holds no text"),
        ("a.json", b"{}", "must hold rows"),
        ("a.json", b'[{"text": ', "cannot be read"),
        ("a.jsonl", b"3\n4", "must hold rows"),
        ("a.jsonl", b'"a"\n{"text": "b"}', "mixes"),
        ("a.jsonl", b'{"id": 1}', "no column named 'text'.*none"),
        ("a.jsonl", b'{"text": ["tokens"]}', "no column named 'text'"),
        ("a.parquet", b"not parquet", "cannot be read as parquet"),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        ("a.jsonl", b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        ("a.jsonl", b'{"text": "a", "id": ' + b"1" * 5000 + b"}", "cannot be read"),
    ],
)
def test_unreadable_content_is_reported_with_its_file(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        local_text(str(tmp_path / file))
    assert str(tmp_path / file) in str(error.value)


def test_lone_surrogates_in_json_become_replacement_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d whole \\ud83d\\ude00 told \\\\ud83d"}\n')
    assert local_text(str(tmp_path / "a.jsonl")).text == "cut \ufffd whole \U0001f600 told \\ud83d"
    assert rows_of(tmp_path / "a.jsonl") == [{"text": "cut \ufffd whole \U0001f600 told \\ud83d"}]
    assert join(["cut \ud83d"], "", "texts from Python").text == "cut \ufffd"


def test_broken_links_and_pipes_are_not_taken_for_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/gone").symlink_to("nowhere")  # looks like a dataset of the Hub, owner/name
    with pytest.raises(BadInput, match="no file or folder 'data/gone'"):
        calibration_text("data/gone")
    os.mkfifo("pipe")
    with pytest.raises(BadInput, match="pipe is neither a file nor a folder"):
        local_text("pipe")


def test_files_with_unusual_names_are_measured(tmp_path: Path) -> None:
    for name in ("a,b.txt", "c@d.txt", "e@seqlen=8.txt"):
        file = tmp_path / name
        file.write_text("text")
        assert [(text.name, text.settings) for text in split_texts(str(file))] == [(str(file), {})]
    assert [text.settings for text in split_texts(f"{tmp_path / 'c@d.txt'}@seqlen=16")] == [{"seqlen": 16}]


def test_missing_paths_and_folders_without_text_are_refused(tmp_path: Path) -> None:
    for name in [str(tmp_path / "no.txt"), "./no", "~/no/such/folder/of/text", "no_such.jsonl", "no_such.txt:column"]:
        with pytest.raises(BadInput, match="no file or folder"):
            calibration_text(name)
    with pytest.raises(BadInput, match="holds no file to read"):
        local_text(str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(BadInput, match="has no columns"):
        local_text(f"{tmp_path / 'a.txt'}:text")


def test_a_file_has_no_held_out_part_but_can_be_evaluated_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", "txt")
    assert evaluation_corpus_for(str(path)) is None
    assert evaluation_text(str(path)).text == JOINED
    assert evaluation_corpus_for("wikitext2") == "wikitext2"
    assert evaluation_corpus_for("owner/name:config") == "owner/name:config"
    # A corpus name wins over a file of the same name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").write_text("text")
    assert evaluation_corpus_for("c4") == "c4"
    assert evaluation_corpus_for("./c4") is None


def bomb(path: Path) -> Path:
    """Write a few thousand bytes that decompress to megabytes."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(b'{"text": "' + b"a" * 5_000_000 + b'"}\n'))
    else:
        pq.write_table(pa.table({"text": ["a" * 100_000] * 50}), path, use_dictionary=True)
    return path


@pytest.mark.parametrize("file", ["a.txt.gz", "a.jsonl.gz", "a.parquet"])
def test_files_that_decompress_to_a_huge_size_are_refused(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bomb(tmp_path / file)
    assert len(local_text(str(path)).text) >= 5_000_000
    monkeypatch.setattr("coprune.data.local_text._ANY_SIZE", 1_000_000)
    with pytest.raises(BadInput, match=r"decompresses to more than .* bytes, 100 times its size"):
        local_text(str(path))
    if not file.endswith(".txt.gz"):
        with pytest.raises(BadInput, match="decompresses to more than"):
            rows_of(path)
