"""The verdict on every model type, as a file beside the tests and as a page of the documentation."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from families.build_models import AUTO, Kind, all_types
from families.judge import Verdict

RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_OPENING = """# Models

This page lists which model types work. Every type that the Auto classes named below build was tried as a tiny random model,
pruned with Wanda to 50 % and to 2:4. `coprune inspect MODEL` shows the same for yours, with the names of all layers.

- **Works**: every mask is the one that forwards of the whole model give, every other tensor is unchanged to the bit, every linear
  layer of a block is pruned or named, and transformers loads what was saved with the same weights.
- **Refused**: coprune says why and changes nothing. The message names the layer.
- **Wrong**: anything else.
- **Not built**: there was no tiny model to try, or transformers does not run it on tokens (or pixels) alone.

A type is named in the first part that it belongs to, and again only where its result differs. `make families` writes this page.
"""
_LEFT_ALONE = {
    "a router": "routers",
    "depth-wise": "depth-wise convolutions",
    "a vector": "vectors",
    "not used in a forward": "layers that a forward does not use",
    "in no product that coprune can observe": "products that cannot be observed",
    "the weight of no linear layer": "weights of no linear layer",
    "a convolution with padding": "convolutions with padding",
    "three dimensions, and none of its matrices is multiplied": "parameters of three dimensions in no product",
}
"""The page's reasons why layers are left alone, by the wording of verdicts on single layers."""
_NOT_BUILT = "transformers builds no tiny model of it"
_REFUSED = {
    "transformers cannot run it on this alone": "transformers cannot run it on this alone",
    "cannot run such inputs alone": "transformers cannot run it on this alone",
    "nothing here makes features of sound": "nothing here makes features of sound for it",
    "without its kernel for CUDA": "its attention needs a kernel for CUDA",
    "checkpoints of it classify": "checkpoints of it classify images",
    "library but it was not found": "a library that it needs was not installed",
    "cannot be loaded by transformers": "transformers cannot load what is saved",
    "is an encoder-decoder model that does not generate text": "an encoder-decoder model that does not generate text",
    "is not a module that a forward calls": "a block is not a module that a forward calls",
}
"""The page's reasons why a type is refused or not built, by the wording of messages with names."""
_TITLES: dict[Kind, str] = {
    "text": "Decoders",
    "images": "Image classifiers",
    "masked": "Masked language models",
    "labels": "Classifiers of text",
    "embeddings": "Models without a head",
    "seq2seq": "Encoders with decoders",
    "speech": "Speech to text",
    "seeing": "Language models that see",
}


@dataclass(frozen=True)
class Results:
    """The verdicts of one run of the script, with versions."""

    verdicts: Sequence[Verdict]
    date: str
    transformers: str
    torch: str

    @classmethod
    def now(cls, verdicts: Sequence[Verdict]) -> Results:
        """Return results with today's date and the installed versions."""
        day = datetime.now(UTC).date().isoformat()
        kinds = list(AUTO)
        ordered = sorted(verdicts, key=lambda verdict: (kinds.index(verdict.kind), verdict.model_type))
        return cls(ordered, day, transformers.__version__, torch.__version__)

    @classmethod
    def read(cls) -> Results:
        """Read the results file."""
        first, *lines = RESULTS.read_text(encoding="utf-8").splitlines()
        return cls([Verdict(**json.loads(line)) for line in lines], **json.loads(first))

    def write(self) -> None:
        """Write one line on the run, and one per type."""
        lines = [{"date": self.date, "transformers": self.transformers, "torch": self.torch}]
        text = [json.dumps(line, ensure_ascii=False) for line in [*lines, *(v.line() for v in self.verdicts)]]
        RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")

    def counts(self, kind: str | None = None) -> str:
        """Return how many types work, are refused, are wrong, or were not built."""
        found = Counter(v.result for v in self.verdicts if kind in (None, v.kind))
        return ", ".join(f"{found[name]} {name}" for name in ("works", "refused", "wrong", "not built")).replace(
            "works", "work"
        )


def page(results: Results) -> str:
    """Return the whole page."""
    lines = _OPENING.splitlines()
    lines += ["", f"Of {results.date}, transformers {results.transformers}, torch {results.torch}."]
    named: set[tuple[str, str, str]] = set()
    for kind, title in _TITLES.items():
        chosen = sorted((v for v in results.verdicts if v.kind == kind), key=lambda v: v.model_type)
        if chosen:
            every = len(all_types(kind))
            tried = f"{every} types" if len(chosen) == every else f"{len(chosen)} of {every} types tried"
            lines += ["", f"## {title}", "", f"`{AUTO[kind].__name__}`, {tried}: {results.counts(kind)}."]
            lines += _parts([v for v in chosen if (v.model_type, v.result, _said(v)) not in named])
            named |= {(v.model_type, v.result, _said(v)) for v in chosen}
    return "\n".join(lines) + "\n"


def _parts(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the lines on types that work, completely or with layers left alone, and on the others."""
    said = {v.model_type: _said(v) for v in verdicts}
    whole = [v.model_type for v in verdicts if v.result == "works" and not said[v.model_type]]
    lines = ["", f"**Work, with every matrix of their blocks pruned**: {_named(whole)}."] if whole else []
    left: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.result == "works" and said[verdict.model_type]:
            left.setdefault(said[verdict.model_type], []).append(verdict.model_type)
    if left:
        lines += ["", "| work | left alone in their blocks |", "| --- | --- |"]
        lines += [f"| {_named(types)} | {text} |" for text, types in left.items()]
    others: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.result != "works":
            others.setdefault(f"{verdict.result} | {said[verdict.model_type]}", []).append(verdict.model_type)
    if others:
        lines += ["", "| types | result | reason |", "| --- | --- | --- |"]
        lines += [f"| {_named(types)} | {text} |" for text, types in others.items()]
    return lines


def _named(types: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in types)


def _said(verdict: Verdict) -> str:
    """Return why layers are left alone, or why the type is refused, as Markdown and without the names of layers."""
    if verdict.result == "works":
        why = {entry.partition(" (")[2].rpartition(";")[0] for entry in verdict.left_alone}
        return ", ".join(sorted(_LEFT_ALONE.get(reason, reason) for reason in why))
    told = next((text for part, text in _REFUSED.items() if part in verdict.reason), None)
    if told is not None or verdict.result == "not built":
        return told or _NOT_BUILT
    clause = re.split(r"[;:.,] ", verdict.reason)[0].removesuffix(".")
    clause = re.sub(r" beside '[^']*'| \(no [\w.]+\)", "", clause)
    clause = re.sub(r"\b\w+(\.\w+)+", "a layer", re.sub(r"only \d+ %", "less than half", clause))
    return clause.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
