"""Datasets of the Hub: loaders on local data in the same formats, and a Hub that is unreachable or refuses.

Only `load_dataset` is replaced, by one that returns real datasets made from local files. A folder in the cache marks
a dataset as downloaded, so that the Hub is not contacted.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest

from coprune.base.errors import BadInput
from coprune.data.corpora import calibration_text, evaluation_text
from coprune.data.text import Documents, JoinedText
from coprune.data.windows import calibration_windows, draw_from_documents, evaluation_tokens
from support.word_tokenizers import word_tokenizer, words


class LocalHub:
    """A stand-in for `datasets.load_dataset` that records requests and returns prepared datasets."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.asked: list[tuple[str, str | None, dict[str, Any]]] = []
        self.splits: dict[str, datasets.Dataset] = {}

    def give(self, dataset: str, **splits: dict[str, list[Any]]) -> None:
        (self.cache / dataset.replace("/", "___")).mkdir()
        self.splits = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}

    def load_dataset(self, path: str, name: str | None = None, **options: Any) -> Any:
        self.asked.append((path, name, options))
        if not options["streaming"]:
            return datasets.DatasetDict(self.splits)
        return datasets.IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in self.splits.items()})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    hub = LocalHub(tmp_path)
    monkeypatch.setattr("datasets.load.load_dataset", hub.load_dataset)
    return hub


def test_wikitext2_is_read_and_joined_as_the_authors_do(hub: LocalHub) -> None:
    train, test = ["", " = Title = \n", " w1 w2 \n"], ["", " w3 \n", ""]
    hub.give("Salesforce/wikitext", train={"text": train}, test={"text": test}, validation={"text": ["w4"]})
    assert calibration_text("wikitext2", hub.cache) == JoinedText(
        " ".join(train), "Salesforce/wikitext wikitext-2-raw-v1 (train)"
    )
    assert evaluation_text("wikitext2", hub.cache).text == "\n\n".join(test)
    path, config, options = hub.asked[0]
    assert (path, config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert options == {"data_files": None, "revision": None, "cache_dir": str(hub.cache), "streaming": False}


def test_ptb_is_read_from_the_converted_files(hub: LocalHub) -> None:
    hub.give("ptb-text-only/ptb_text_only", train={"sentence": ["a b", "c"]}, test={"sentence": ["d", "e"]})
    assert calibration_text("ptb", hub.cache).text == "a b c"
    assert evaluation_text("ptb", hub.cache).text == "d e"
    assert hub.asked[0][2]["revision"] == "refs/convert/parquet"


def c4_files(folder: Path, documents: list[str]) -> dict[str, Path]:
    """Write documents in C4's own format, gzipped JSON lines with three fields."""
    paths = {}
    for split in ("train", "validation"):
        paths[split] = folder / f"c4-{split}.json.gz"
        lines = [json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"}) for text in documents]
        paths[split].write_bytes(gzip.compress("\n".join(lines).encode()))
    return paths


def test_c4_streams_one_file_and_samples_long_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [words(number, number + 5 + 7 * (number % 11)) for number in range(200)]
    paths = c4_files(tmp_path, documents)
    asked = []
    load = datasets.load_dataset

    def load_local(path: str, name: str | None, data_files: dict[str, str], **options: Any) -> Any:
        asked.append((path, name, data_files, options["streaming"]))
        return load("json", data_files={split: str(paths[split]) for split in data_files}, streaming=True)

    monkeypatch.setattr("datasets.load.load_dataset", load_local)
    (tmp_path / "allenai___c4").mkdir()
    found = calibration_windows("c4", word_tokenizer(), nsamples=8, seqlen=40, seed=3, cache_dir=tmp_path)
    expected = draw_from_documents(documents, lambda text: [int(word[1:]) for word in text.split()], 8, 40, 3)
    assert found.tokens.tolist() == expected.tolist()

    text = evaluation_tokens("c4", word_tokenizer(), seqlen=16, cache_dir=tmp_path)
    assert text.tokens.tolist() == [int(word[1:]) for word in " ".join(documents).split()][: 256 * 16]
    assert len(text.tokens) == 256 * 16
    assert asked == [
        ("allenai/c4", None, {"train": "en/c4-train.00000-of-01024.json.gz"}, True),
        ("allenai/c4", None, {"validation": "en/c4-validation.00000-of-00008.json.gz"}, True),
    ]


def test_c4_reads_no_more_documents_than_it_needs(hub: LocalHub) -> None:
    many = {"text": [f"document {number}" for number in range(40_000)]}
    hub.give("allenai/c4", train=many, validation=many)
    found = calibration_text("c4", hub.cache)
    assert isinstance(found, Documents)
    assert found.texts == many["text"][:36_000]
    assert evaluation_text("c4", hub.cache).text == " ".join(many["text"][:1100])


def test_any_dataset_is_streamed_up_to_a_limit(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coprune.data.corpora._ANY_CHARACTERS", 10)
    hub.give("owner/name", train={"id": [1, 2, 3, 4], "body": ["123456", "1234", "more", "never"]})
    text = calibration_text("owner/name:config:body", hub.cache)
    assert text == JoinedText("123456\n\n1234", "owner/name config (train)")
    assert calibration_text("owner/name::body", hub.cache).text == text.text
    assert calibration_text("owner/name", hub.cache).text == text.text
    assert [(config, options["streaming"]) for _, config, options in hub.asked] == [
        ("config", True),
        (None, True),
        (None, True),
    ]


def test_the_test_split_comes_before_validation(hub: LocalHub) -> None:
    hub.give("owner/name", train={"text": ["a"]}, validation={"text": ["b"]}, test={"text": ["c"]})
    assert evaluation_text("owner/name", hub.cache).text == "c"
    del hub.splits["test"]
    assert evaluation_text("owner/name", hub.cache).text == "b"
    del hub.splits["validation"]
    with pytest.raises(BadInput, match="no split 'test' or 'validation', only train"):
        evaluation_text("owner/name", hub.cache)


def test_a_first_row_without_text_does_not_hide_the_column(hub: LocalHub) -> None:
    hub.give("owner/name", train={"text": [None, "a"], "more": ["x", "y"]})
    assert calibration_text("owner/name", hub.cache).text == "\n\na"


def test_an_empty_stream_holds_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_empty(path: str, name: str | None, **options: Any) -> Any:
        return datasets.IterableDatasetDict({"train": datasets.IterableDataset.from_generator(lambda: iter(()))})

    monkeypatch.setattr("datasets.load.load_dataset", load_empty)
    (tmp_path / "owner___name").mkdir()
    with pytest.raises(BadInput, match="holds no text"):
        calibration_text("owner/name", tmp_path)


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        ({"title": ["a"], "body": ["b"]}, "owner/name", "no column named 'text'.*'title', 'body'.*owner/name::column"),
        ({"text": ["a"]}, "owner/name::body", "no text column 'body'.*'text'"),
        ({"tokens": [["a"]]}, "owner/name", "columns of text are: none"),
        ({"text": [None, None]}, "owner/name", "no column named 'text'"),
        ({"text": ["", " "]}, "owner/name", "holds no text"),
    ],
)
def test_datasets_without_text_are_named(hub: LocalHub, rows: dict[str, list[Any]], name: str, message: str) -> None:
    hub.give("owner/name", train=rows)
    with pytest.raises(BadInput, match=message):
        calibration_text(name, hub.cache)


def test_errors_of_the_datasets_library_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, name: str | None, **options: Any) -> Any:
        raise ValueError("Config name is missing.\nPlease pick one")

    monkeypatch.setattr("datasets.load.load_dataset", refuse)
    (tmp_path / "owner___name").mkdir()
    with pytest.raises(BadInput, match=r"'owner/name' cannot be read \(Config name is missing\. Please pick one\)"):
        calibration_text("owner/name", tmp_path)


def test_a_broken_stream_is_an_error_with_the_datasets_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise EOFError("Compressed file ended early")

    def load_broken(path: str, name: str | None, **options: Any) -> Any:
        return datasets.IterableDatasetDict({"train": datasets.IterableDataset.from_generator(rows)})

    monkeypatch.setattr("datasets.load.load_dataset", load_broken)
    (tmp_path / "owner___name").mkdir()
    with pytest.raises(BadInput, match=r"'owner/name' cannot be read .Compressed file ended early"):
        calibration_text("owner/name", tmp_path)


class Refusal(BaseHTTPRequestHandler):
    """A server that answers every request like the Hub for a missing or gated dataset."""

    status, code = 404, "RepoNotFound"
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        self.send_response(self.status)
        self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *values: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "'owner/name' is not on the Hub"),
        (403, "GatedRepo", "'owner/name' is gated.*log in"),
        (503, "", "'owner/name' is out of reach.*path of a file of text"),
    ],
)
def test_a_refusal_of_the_hub_is_reported_without_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    handler: Any = type("Answer", (Refusal,), {"status": status, "code": code, "requests": 0})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(BadInput, match=message):
            calibration_text("owner/name", tmp_path)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert handler.requests <= 2  # the client itself asks twice for missing files; a retry would be a third request


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb", "owner/name"])
def test_an_unreachable_hub_is_reported_without_trying_to_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: LocalHub, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for read in (calibration_text, evaluation_text):
        with pytest.raises(BadInput, match=r"out of reach: .*\.jsonl.*'embedded', which needs no network"):
            read(name, tmp_path)
    assert hub.asked == []


def test_offline_mode_counts_as_an_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="out of reach"):
        calibration_text("wikitext2", tmp_path)


@pytest.mark.parametrize("name", ["wikitext", "imdb", "owner/name:a:b:c", ""])
def test_an_unknown_corpus_lists_the_known_ones(name: str) -> None:
    with pytest.raises(BadInput, match=r"unknown corpus.*embedded.*owner/name\[:config\]\[:column\]"):
        calibration_text(name)
