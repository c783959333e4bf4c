"""Corpora by name: what calibration and evaluation read when they are asked for `wikitext2`, a path or a Hub id.

The three corpora of the papers are read as the authors of Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774)
read them: the same files, splits and separators.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from coprune.base.errors import BadInput, unknown_name
from coprune.base.files import like_named
from coprune.data.embedded import embedded_calibration, embedded_evaluation, embedded_lambada
from coprune.data.given import PREFIX, GivenTokens, given_data
from coprune.data.hub import HubCorpus, Part
from coprune.data.local_text import local_text, looks_local
from coprune.data.text import LOCAL_FILE_HINT, Documents, JoinedText

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

# The dataset itself is a script, which `datasets` no longer runs; the Hub keeps a conversion of it in this revision.
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
"""Every corpus that has a name of its own."""

# A dataset of unknown size is streamed: so much of it is several times what 128 windows of 4096 tokens cover.
_ANY_CHARACTERS = 20_000_000
_HUB_ID = re.compile(r"(?P<dataset>[\w.-]+/[\w.-]+)(?::(?P<config>[^:]*))?(?::(?P<column>[^:]+))?")


def calibration_text(name: str, cache_dir: Path | None = None) -> JoinedText | Documents | GivenTokens:
    """Read what calibration samples from.

    name: one of CORPORA; a file or folder (`path` or `path:column`); or a dataset of the Hub, written `owner/name`,
    `owner/name:config` or `owner/name:config:column` (`owner/name::column` without a config), of which the train
    split is read. A name of CORPORA comes before a path of the same name (write ./c4 for the path).
    Raises BadInput if it is none of these, out of reach, or holds no text.
    """
    if (given := given_data(name)) is not None:
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
    """Read what perplexity is computed on: the test split (of a Hub id: test or else validation), or the whole file.

    name and errors: as in `calibration_text`.
    """
    if (given := given_data(name)) is not None:
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
    """Name the corpus whose held-out part belongs to a calibration corpus; None for files and what was handed over."""
    if calibration_name.startswith(PREFIX):
        return None
    if calibration_name in CORPORA or not looks_local(calibration_name):
        return calibration_name
    return None


def holds_out(name: str) -> bool:
    """Whether a name is of the user's own text, which has no test split: its last tenth is held out for perplexity."""
    given = given_data(name)
    return isinstance(given, JoinedText) if given is not None else evaluation_corpus_for(name) is None


def _hub_corpus(name: str) -> HubCorpus:
    if name in HUB_CORPORA:
        return HUB_CORPORA[name]
    match = _HUB_ID.fullmatch(name)
    if match is None:
        other = f"Or give a dataset of the Hub as owner/name[:config][:column]. {LOCAL_FILE_HINT}"
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
