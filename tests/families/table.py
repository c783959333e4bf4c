"""What came of every type of model, as a file beside the tests, and as the page in the documentation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from families.build import AUTO, Kind
from families.judge import Verdict

RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_OPENING = """# Models

Every type that the Auto classes of transformers named below build, as a tiny random model
pruned with Wanda to 50 % and to 2:4. `make families` tries them and writes this page.

- **Works**: every mask is the one that forwards of the whole model give, every other tensor is unchanged to the bit, every linear
  layer of a block is pruned or named, and transformers loads what was saved with the same weights.
- **Refused**: coprune says why and changes nothing; the reason is what a user reads.
- **Wrong**: anything else.
- **Not built**: there was no tiny model to try, or transformers does not run it on tokens (or pixels) alone.
"""
_TITLES: dict[Kind, str] = {
    "text": "Decoders",
    "images": "Image classifiers",
    "masked": "Masked language models",
    "labels": "Classifiers of text",
    "embeddings": "Models without a head",
    "seq2seq": "Encoders with decoders",
    "speech": "Speech to text",
}


@dataclass(frozen=True)
class Results:
    """The verdicts of one run of the script, and of which versions."""

    verdicts: Sequence[Verdict]
    date: str
    transformers: str
    torch: str

    @classmethod
    def now(cls, verdicts: Sequence[Verdict]) -> Results:
        """Of this day and of what is installed."""
        day = datetime.now(UTC).date().isoformat()
        kinds = list(AUTO)
        ordered = sorted(verdicts, key=lambda verdict: (kinds.index(verdict.kind), verdict.model_type))
        return cls(ordered, day, transformers.__version__, torch.__version__)

    @classmethod
    def read(cls) -> Results:
        """As they were written."""
        first, *lines = RESULTS.read_text(encoding="utf-8").splitlines()
        return cls([Verdict(**json.loads(line)) for line in lines], **json.loads(first))

    def write(self) -> None:
        """One line on the run, and one for every type."""
        lines = [{"date": self.date, "transformers": self.transformers, "torch": self.torch}]
        text = [json.dumps(line, ensure_ascii=False) for line in [*lines, *(v.line() for v in self.verdicts)]]
        RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")

    def counts(self, kind: str | None = None) -> str:
        """How many work, are refused, are wrong, were not built."""
        found = Counter(v.result for v in self.verdicts if kind in (None, v.kind))
        return ", ".join(f"{found[name]} {name}" for name in ("works", "refused", "wrong", "not built")).replace(
            "works", "work"
        )


def page(results: Results) -> str:
    """Return the whole page."""
    lines = _OPENING.splitlines()
    lines += ["", f"Of {results.date}, transformers {results.transformers}, torch {results.torch}."]
    for kind, title in _TITLES.items():
        chosen = sorted((v for v in results.verdicts if v.kind == kind), key=lambda v: v.model_type)
        if chosen:
            lines += ["", f"## {title}", "", f"`{AUTO[kind].__name__}`, {len(chosen)} types: {results.counts(kind)}."]
            lines += _parts(chosen)
    return "\n".join(lines) + "\n"


def _parts(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the lines on what works, wholly or with layers left alone, and on what does not."""
    said = {v.model_type: _said(v) for v in verdicts}
    whole = [v.model_type for v in verdicts if v.result == "works" and not said[v.model_type]]
    lines = ["", f"**Work, with every matrix of their blocks pruned**: {_named(whole)}."]
    left: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.result == "works" and said[verdict.model_type]:
            left.setdefault(said[verdict.model_type], []).append(verdict.model_type)
    if left:
        lines += ["", "| work | left alone in their blocks, or a limit |", "| --- | --- |"]
        lines += [f"| {_named(types)} | {text} |" for text, types in left.items()]
    others = [v for v in verdicts if v.result != "works"]
    if others:
        lines += ["", "| type | result | reason |", "| --- | --- | --- |"]
        lines += [f"| `{v.model_type}` | {v.result} | {said[v.model_type]} |" for v in others]
    return lines


def _named(types: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in types)


def _said(verdict: Verdict) -> str:
    """Return what is left alone, or the reason, as Markdown."""
    if verdict.result != "works":
        return verdict.reason.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    why: dict[str, list[str]] = {}
    for entry in verdict.left_alone:
        name, _, rest = entry.partition(" (")
        why.setdefault(rest.rpartition(";")[0], []).append(f"`{name.rpartition('.*.')[2]}`")
    parts = [f"{', '.join(names)} ({reason})" for reason, names in why.items()]
    return "; ".join(parts)
