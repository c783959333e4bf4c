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

from families.judge import Verdict

RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_OPENING = """# Models

Every type of model that transformers' `AutoModelForCausalLM` and `AutoModelForImageClassification` build, as
`make families` tries it, which also writes this page: a tiny random model, pruned with Wanda to 50 % and to 2:4.

- **works**: every mask is that of activations which forwards of the whole model recorded, every other tensor is as it was
  bit for bit, every linear layer of a block is pruned or named with the reason, and transformers loads what was saved as
  the same class with the same weights.
- **refused**: coprune says why and changes nothing; the reason is what a user reads.
- **wrong**: anything else.
- **not built**: there was no tiny model to try, or transformers itself does not run it on tokens (or pixels) alone.
"""
_TITLES = {"text": "Decoders", "images": "Image classifiers"}
_AUTO = {"text": "AutoModelForCausalLM", "images": "AutoModelForImageClassification"}


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
        ordered = sorted(verdicts, key=lambda verdict: (verdict.kind != "text", verdict.model_type))
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
    """The whole page."""
    lines = _OPENING.splitlines()
    lines += ["", f"Of {results.date}, transformers {results.transformers}, torch {results.torch}."]
    for kind, title in _TITLES.items():
        chosen = sorted((v for v in results.verdicts if v.kind == kind), key=lambda v: v.model_type)
        if not chosen:
            continue
        lines += ["", f"## {title}", "", f"`{_AUTO[kind]}`, {len(chosen)} types: {results.counts(kind)}.", ""]
        lines += ["| type | class | result | left alone, or the reason |", "| --- | --- | --- | --- |"]
        lines += [_row(verdict) for verdict in chosen]
    return "\n".join(lines) + "\n"


_GEMMA = "configurations in which layers share keys and values (E2B, E4B) are refused"
_BESIDE = {"gemma4": _GEMMA, "gemma4_text": _GEMMA}
"""What the tiny models do not show."""


def _row(verdict: Verdict) -> str:
    beside = [_BESIDE[verdict.model_type]] if verdict.model_type in _BESIDE else []
    said = "; ".join(verdict.left_alone + beside) if verdict.result == "works" else verdict.reason
    said = said.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    result = verdict.result if verdict.result == "works" else f"**{verdict.result}**"
    return f"| {verdict.model_type} | {verdict.model_class} | {result} | {said} |"
