"""The results of every folder in every runtime, as a file of the package and a page of the documentation."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from coprune.report.runtimes import NAMES

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "src" / "coprune" / "report" / "runtimes.csv"
SERVED = Path(__file__).with_name("served.csv")
PAGE = ROOT / "docs" / "runtimes.md"
SOURCE, ZEROS, REAL = "source", "2:4", "smollm2-135m"
_OPENING = """# Runtimes

Where smaller models load: small ones with random weights and real ones, whole and with a part removed, in runtimes that serve
models, on a CPU.

- ✓: as in transformers on the same folder. The log-probabilities of the next token, or the components of an embedding (`bert`,
  `qwen3-embedding`), differ by at most 0.001, and sixteen greedy tokens are the same. `whisper` is given a second of sound.
- A number: what the runtime said, below. Where the whole model has one, the fault is not the cut's.
- –: coprune removes no such part of this model, or it was not tried.

`-fp8` and `-int4` are formats of compressed-tensors, from which [parts are removed as they are](quantised.md). In FP8 vLLM rounds
the inputs of every layer as well, as the configuration asks. Its CPU kernels take experts in FP8 only with scales by blocks of
128 × 128, and in INT4 not with groups of 32. Differences up to 0.02 count as the same in these formats, with which vLLM computes
in float16, and in real models in bfloat16, since mlx-lm rounds Gemma's scale of embeddings to it.

Contexts here are longer than the sliding windows. mlx-lm gives gemma2 none. It takes the layers of gemma3_text, and vLLM and
ONNX Runtime those of gpt_oss, to slide in a fixed order, which no longer holds without a block.

`make runtimes` makes an environment for each of them, since each pins its own torch, and writes this page ({size});
`make_runtimes.py --model gemma-3-270m=gemma.gguf` adds a real model. `coprune prune` says before it removes a part which of these
runtimes refused it in the same family.
"""
_SERVED_OPENING = """
## Served

```bash
python tests/runtimes/serve_models.py
```

starts the server of each runtime on the whole and on the smaller model and asks both over HTTP, as OpenAI's client does. ✓ means
that sixteen greedy tokens give the text that transformers writes, to a chat's question where the model has a chat template.
Tokens are counted per CPU second of the server and its processes, since other work may run on the machine: a
prompt of about 140 tokens, 32 written, the median of five answers in turns ({where}).
"""
_CLOSING = """
## Not tried

SGLang and TensorRT-LLM need a GPU, LiteRT converts through a format of its own, and Ollama runs what llama.cpp runs: a GGUF file
of [`coprune export`](export.md), which is compared with the folder tensor by tensor.
"""


@dataclass(frozen=True)
class Row:
    """The result of one folder in one runtime."""

    model: str
    part: str
    runtime: str
    version: str
    difference: float | None
    """Largest difference from transformers', of five tokens' log-probabilities or an embedding's components; None if it
    was not read."""
    reason: str
    """Why it differs; the runtime's own message if it was refused."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Identifier of the test."""
        return self.model, self.part, self.runtime

    @property
    def same(self) -> bool:
        """Whether the runtime computes the same as transformers."""
        return not self.reason


@dataclass(frozen=True)
class Served:
    """The result of a model server."""

    runtime: str
    version: str
    model: str
    part: str
    type: str
    """Type of the weights."""
    megabytes: float
    reading: float | None
    """Prompt tokens per CPU second; None if not timed."""
    writing: float | None
    """Answer tokens per CPU second."""
    same: bool
    """Whether its greedy text equals that of transformers."""
    processor: str
    date: str


def read_rows() -> list[Row]:
    """Read earlier results."""
    if not ROWS.exists():
        return []
    with ROWS.open(encoding="utf-8", newline="") as file:
        return [
            Row(**{name: row[name] for name in ("model", "part", "runtime", "version", "reason")},
                difference=float(row["difference"]) if row["difference"] else None)
            for row in csv.DictReader(file)
        ]  # fmt: skip


def write_rows(rows: Sequence[Row]) -> None:
    """Write all rows, by model, part and runtime."""
    with ROWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda row: row.key):
            shown = "" if row.difference is None else f"{row.difference:.1e}"
            writer.writerow(asdict(row) | {"difference": shown})


def read_served() -> list[Served]:
    """Read earlier results of servers."""
    if not SERVED.exists():
        return []
    with SERVED.open(encoding="utf-8", newline="") as file:
        return [_served(row) for row in csv.DictReader(file)]


def _served(row: dict[str, str]) -> Served:
    reading, writing = (float(row[name]) if row[name] else None for name in ("reading", "writing"))
    text = {name: row[name] for name in ("runtime", "version", "model", "part", "type", "processor", "date")}
    size, same = float(row["megabytes"]), row["same"] == "True"
    return Served(**text, reading=reading, writing=writing, megabytes=size, same=same)


def write_served(rows: Sequence[Served]) -> None:
    """Write the results of all servers, by runtime and model, the whole one first."""
    with SERVED.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Served)], lineterminator="\n")
        writer.writeheader()
        ordered = sorted(rows, key=lambda row: (row.model != REAL, row.runtime, row.model, row.part != SOURCE))
        for row in ordered:
            shown = {name: f"{value:.1f}" for name, value in asdict(row).items() if isinstance(value, float)}
            writer.writerow(asdict(row) | shown)


def write_page(environments: Path) -> None:
    """Write the documentation's page. environments: folder of the runtimes' environments, whose size is shown."""
    made = (home for home in environments.iterdir() if (home / ".ready").exists())
    size = sum(file.lstat().st_size for home in made for file in home.rglob("*") if file.is_file()) / 1e9
    PAGE.write_text(page(read_rows(), f"{size:.1f} GB, and half an hour of two cores"), encoding="utf-8")


def page(rows: Sequence[Row], size: str) -> str:
    """Return the documentation's page. size: of the environments."""
    found = {row.key: row for row in rows}
    models = list(dict.fromkeys(row.model for row in sorted(rows, key=lambda row: row.model)))
    parts = [SOURCE, *sorted({row.part for row in rows} - {SOURCE, ZEROS}), ZEROS]
    lines, reasons = [_OPENING.format(size=size)], list[str]()
    for runtime in dict.fromkeys(row.runtime for row in sorted(rows, key=lambda row: list(NAMES).index(row.runtime))):
        version = max(row.version for row in rows if row.runtime == runtime)
        lines.append(f"\n## {NAMES[runtime]} {version}\n\n| models | whole | {' | '.join(parts[1:])} |")
        lines.append("| --- |" + " --- |" * len(parts))
        alike: dict[str, list[str]] = {}
        for model in (one for one in models if any((one, part, runtime) in found for part in parts)):
            cells = [_cell(found.get((model, part, runtime)), reasons) for part in parts]
            alike.setdefault(" | ".join(cells), []).append(model)
        lines += [f"| {', '.join(names)} | {cells} |" for cells, names in alike.items()]
    lines.append("\n## What they say\n")
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, *_answers(read_served())]) + "\n" + _CLOSING


def _answers(rows: Sequence[Served]) -> Iterator[str]:
    """Yield the lines about served models."""
    if not rows:
        return
    told = sorted({(row.processor, row.date) for row in rows})
    yield _SERVED_OPENING.format(where="; ".join(f"{processor}, {date}" for processor, date in told))
    yield "| server | model | removed | weights, MB | prompt, tokens per CPU second | answer, tokens per CPU second | same text |"
    yield "| --- | --- | --- | ---: | ---: | ---: | --- |"
    for row in rows:
        name = f"{NAMES.get(row.runtime, 'llama.cpp (xllamacpp)')} {row.version}, {row.type}"
        speeds = " | ".join("–" if speed is None else f"{speed:.1f}" for speed in (row.reading, row.writing))
        removed, same = "–" if row.part == SOURCE else row.part, "✓" if row.same else "no"
        yield f"| {name} | {row.model} | {removed} | {row.megabytes:.1f} | {speeds} | {same} |"


def _cell(row: Row | None, reasons: list[str]) -> str:
    if row is None:
        return "–"
    if row.same:
        return "✓"
    if (reason := _quoted(row.reason)) not in reasons:
        reasons.append(reason)
    return str(reasons.index(reason) + 1)


def _quoted(reason: str) -> str:
    return (
        reason if reason in ("other log-probabilities", "another greedy text") else f"`{reason.replace('`', chr(39))}`"
    )
