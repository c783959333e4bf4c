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

from families.build_models import AUTO, Kind
from families.judge import Verdict

RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_OPENING = """# Models

This page lists which models work. Look for the `model_type` in your model's `config.json`. `coprune inspect MODEL` shows which
matrices of yours would be pruned, and what is left alone: routers, depth-wise convolutions, layers that a forward does not use.

Every type that the Auto classes below build was tried as a tiny random model, pruned with Wanda to 50 % and to 2:4:

- **Works**: all masks are those of the whole model's forward, every other tensor is unchanged to the bit, every linear layer of a
  block is pruned or named, and transformers loads the saved model with the same weights.
- **Refused**: coprune says why, names the layer and changes nothing.
- **Wrong**: anything else.
- **Not built**: no tiny model of it could be made or run here.

A type is listed in the first part that it belongs to, and again only where its result differs. Reasons and layers of each are in
`tests/families/results.jsonl`. `make families` writes this page.
"""
_REFUSED = {
    "transformers cannot run it on this alone": "transformers cannot run it on this alone",
    "cannot run such inputs alone": "transformers cannot run it on this alone",
    "cannot be loaded by transformers": "transformers cannot load what is saved",
    "is an encoder-decoder model that does not generate text": "an encoder-decoder model that does not generate text",
    "is not a module that a forward calls": "a block is not a module that a forward calls",
}
"""The page's reasons why a type is refused, by the wording of messages with names."""
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
            lines += ["", f"## {title}", "", f"`{AUTO[kind].__name__}`, {len(chosen)} types: {results.counts(kind)}."]
            lines += _parts([v for v in chosen if (v.model_type, v.result, _said(v)) not in named])
            named |= {(v.model_type, v.result, _said(v)) for v in chosen}
    return "\n".join(lines) + "\n"


def _parts(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the lines on types that work, that are refused or wrong, and that were not built."""
    lines = _line("Work", [v.model_type for v in verdicts if v.result == "works"])
    others: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.result not in ("works", "not built"):
            others.setdefault(f"{verdict.result} | {_said(verdict)}", []).append(verdict.model_type)
    if others:
        lines += ["", "| types | result | reason |", "| --- | --- | --- |"]
        lines += [f"| {_named(types)} | {text} |" for text, types in others.items()]
    return lines + _line("Not built", [v.model_type for v in verdicts if v.result == "not built"])


def _line(title: str, types: Sequence[str]) -> list[str]:
    return ["", f"**{title}**: {_named(types)}."] if types else []


def _named(types: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in types)


def _said(verdict: Verdict) -> str:
    """Return why the type is refused, as Markdown and without the names of layers."""
    if verdict.result in ("works", "not built"):
        return ""
    told = next((text for part, text in _REFUSED.items() if part in verdict.reason), None)
    if told is not None:
        return told
    clause = re.split(r"[;:.,] ", verdict.reason)[0].removesuffix(".")
    clause = re.sub(r" beside '[^']*'| \(no [\w.]+\)", "", clause)
    clause = re.sub(r"\b\w+(\.\w+)+", "a layer", re.sub(r"only \d+ %", "less than half", clause))
    return clause.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
