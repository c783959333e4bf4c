"""What a smaller vocabulary costs and saves beside llama.cpp's quants of the dense model, in bits per byte.

    python benchmarks/vocabulary.py --folder out/vocabulary --model gemma-3-270m.gguf

The dense model is moved off the 4-bit grid that its weights may be on, as in benchmarks/frontier.py. Every row is a GGUF
file, made with an importance matrix where its type takes one. llama.cpp runs it on passages whose tokens were not counted:
Wikipedia, novels, and code. Each row leaves one JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from frontier_models import exported, moved
from tokenizers import Tokenizer
from torch import Tensor

from coprune.base.files import write_text
from coprune.base.progress import Reporter
from coprune.data.corpora import evaluation_text
from coprune.gguf_files.importance import importance_of, read_importance, write_importance
from coprune.gguf_files.llama_cpp import BY_LLAMA_CPP, LlamaCpp, Quantisation, quantize
from coprune.model.checkpoint.load import load_tokenizer
from coprune.model.checkpoint.locate import GgufFile, locate
from coprune.recipe.recipe import make_recipe
from coprune.vocabulary.counts import passages
from coprune.vocabulary.cut import Asked, Cutting
from coprune.vocabulary.gguf import Gguf

DENSE = ("q8_0", "q4_k_m", "q3_k_m", "iq3_xs", "q2_k")
EMBEDDINGS = ("q5_0", "q4_0")
"""Types of the dense model's embedding beside blocks of q4_k_m."""
CONTEXT = 2048


def main() -> None:
    """Make and measure the rows that are asked for and missing, then print all."""
    asked = options()
    torch.set_num_threads(asked.threads)
    asked.folder.mkdir(parents=True, exist_ok=True)
    source = moved(asked)
    for name in rows(asked):
        file = asked.folder / "rows" / f"{name.replace(' ', '-')}.json"
        if not file.exists() and all(part in name for part in asked.only.split(",")):
            write_text(file, json.dumps(measured(asked, make(asked, source, name)), indent=1))
            print(name, file.read_text().replace("\n", ""), flush=True)
    known = [(name, asked.folder / "rows" / f"{name.replace(' ', '-')}.json") for name in rows(asked)]
    table([(name, json.loads(file.read_text())) for name, file in known if file.exists()])


def rows(asked: argparse.Namespace) -> list[str]:
    """Names of the rows: the number of kept tokens, and the file's type."""
    dense = [*(f"dense {kind}" for kind in DENSE), *(f"dense q4_k_m, embedding {kind}" for kind in EMBEDDINGS)]
    return [
        *dense,
        *(f"{size} {kind}" for size in asked.sizes.split(",") for kind in ("q8_0", "q4_k_m", "q4_k_m, embedding q4_0")),
    ]


def make(asked: argparse.Namespace, source: Path, name: str) -> Path:
    """Write the file of a row, unless it exists."""
    tokens, kind = name.split(" ", 1)
    file: Path = asked.folder / f"{name.replace(' ', '-').replace(',', '')}.gguf"
    if file.exists():
        return file
    if tokens == "dense":
        stored, _, embedding = kind.partition(", embedding ")
        exact = exported(asked, source, "f16")
        weighed = importance(asked, exact) if stored in BY_LLAMA_CPP else None
        quantize(exact, file, Quantisation(stored, weighed, embedding or None))
        return file
    whole = make(asked, source, f"dense {kind}")
    settings = {"model": str(whole), "remove": f"vocabulary={tokens}", "vocabulary_text": asked.languages or ()}
    structure = make_recipe(settings).remove
    cutting = Cutting(Gguf(GgufFile(whole, whole.name)), Asked(structure, "embedded", runs=False), Reporter(quiet=True))
    cutting.source.cut(file, cutting.size()[0], Reporter(quiet=True))
    return file


def importance(asked: argparse.Namespace, exact: Path) -> Mapping[str, Tensor]:
    """Return the importance matrix of the dense model, measured once on the text that tokens are counted on."""
    file: Path = asked.folder / "dense.imatrix.gguf"
    if not file.exists():
        write_importance(file, importance_of(exact, "embedded", Reporter(quiet=True)))
    return read_importance(file)


def texts(asked: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Passages by the names of their texts."""
    for name in ("embedded", "embedded-lambada"):
        yield name, list(passages(evaluation_text(name).text[: asked.characters]))
    files = sorted((Path(__file__).parents[1] / "src" / "coprune").rglob("*.py"))
    yield "code", list(passages("".join(file.read_text() for file in files)[20_000:][: asked.characters // 2]))


def measured(asked: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Bytes of a file, and bits per byte, tokens per byte and characters per second of processor time on every text."""
    tokenizer = Tokenizer.from_str(load_tokenizer(GgufFile(file, file.name)).backend_tokenizer.to_str())
    begin = tokenizer.token_to_id("<bos>")
    llama = LlamaCpp(file, CONTEXT, asked.threads)
    found: dict[str, Any] = {"bytes": file.stat().st_size}
    for name, pieces in texts(asked):
        nats, tokens, size, began = [], 0, [], time.process_time()
        for piece in pieces:
            ids = tokenizer.encode(piece, add_special_tokens=False).ids
            given = ([] if begin is None else [begin]) + ids
            logits = llama.logits(given)[:-1]
            said = logits.gather(1, torch.tensor(given[1:])[:, None])[:, 0]
            nats.append(float((logits.logsumexp(1) - said).double().sum()))
            tokens += len(ids)
            size.append(len(piece.encode()))
        bits = [one / math.log(2) for one in nats]
        seconds = time.process_time() - began
        found[name] = {
            "bits": sum(bits) / sum(size),
            "tokens": tokens / sum(size),
            "bytes": sum(size),
            "seconds": seconds,
        }
        found[name]["by_passage"] = [one / count for one, count in zip(bits, size, strict=True)]
    return found


def table(known: list[tuple[str, dict[str, Any]]]) -> None:
    """Print every row beside the dense model in q8_0."""
    if not known:
        return
    first = known[0][1]
    names = [name for name in first if isinstance(first[name], dict)]
    print(f"| row | MB | of dense q8_0 | {' | '.join(f'{name}, bits per byte' for name in names)} | dominated by |")
    print("| --- | ---: | ---: |" + " ---: |" * len(names) + " --- |")
    for name, row in known:
        cells = [f"{row[text]['bits']:.4f} ({row[text]['bits'] / first[text]['bits'] - 1:+.2%})" for text in names]
        better = [
            other
            for other, its in known
            if its["bytes"] <= row["bytes"] and all(its[text]["bits"] < row[text]["bits"] for text in names)
        ]
        share = row["bytes"] / first["bytes"]
        print(
            f"| {name} | {row['bytes'] / 1e6:.1f} | {share:.0%} | {' | '.join(cells)} | {', '.join(better[:2]) or '–'} |"
        )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--like", type=Path)
    parser.add_argument("--sizes", default="96k,64k", help="tokens that are kept, with commas between")
    parser.add_argument("--languages", default="", help="instead of English and code beside the calibration text")
    parser.add_argument("--only", default="", help="parts of rows' names, with commas between them [all rows]")
    parser.add_argument("--characters", type=int, default=60_000, help="of each text that is measured")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training that moves the dense weights")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("out/vocabulary"))
    asked = parser.parse_args()
    asked.model = str(locate(asked.model).path)
    return asked


if __name__ == "__main__":
    main()
