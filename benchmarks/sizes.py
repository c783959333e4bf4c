"""Every kind of smaller model: perplexity, bytes on disk and tokens per second (drawn by benchmarks/pictures.py).

    python benchmarks/sizes.py                                  # an hour on one core, then minutes on all for the speed
    python benchmarks/sizes.py --samples 4 --seqlen 128 --tokens 2048    # minutes

Makes the models (channels or blocks removed, and GGUF files of them), measures all on the same text, and times them in
turns in one run, each in its own runtime. Existing models are reused.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import coprune
from coprune.gguf_files.llama_cpp import require_type

PRUNED: dict[str, dict[str, Any]] = {
    "channels-20": {"remove": "channels=0.2"},
    "channels-33": {"remove": "channels=0.33"},
    "uneven-33": {"remove": "channels=0.33", "allocation": "error"},
    "blocks-23": {"remove": "blocks=0.2334"},
}
"""Folders that are pruned, and how."""
FILES = ("f16", "q8_0", "q4_k_m")
"""Types of GGUF files that are made of the dense model and of those with parts removed."""


def main() -> None:
    """Make and measure."""
    asked = _options()
    asked.folder.mkdir(parents=True, exist_ok=True)
    models = make(asked)
    rows: list[dict[str, Any]] = [{"model": name} | quality(model, asked) for name, model in models.items()]
    speeds = speed([str(model) for model in models.values()], asked)
    for row, model in zip(rows, models.values(), strict=True):
        row["tokens_per_second"] = speeds[Path(model).name]
    print(
        f"{asked.model}, {asked.samples} × {asked.seqlen} tokens, {datetime.now(UTC):%Y-%m-%d}, {asked.threads} threads"
    )
    print("| model | MB | perplexity | tokens/s |\n| --- | ---: | ---: | ---: |")
    for row in sorted(rows, key=lambda row: -row["megabytes"]):
        print(f"| {row['model']} | {row['megabytes']:.0f} | {row['perplexity']:.2f} | {row['tokens_per_second']:.0f} |")


def make(asked: argparse.Namespace) -> dict[str, Path | str]:
    """All models by their names in the table."""
    models: dict[str, Path | str] = {"dense": asked.folder / "dense"}
    if not (asked.folder / "dense").exists():
        # A pattern that keeps every weight writes the model as a folder in the dtype of the others.
        _prune(asked, "dense", {"method": "magnitude", "sparsity": 0.0})
    for name, settings in PRUNED.items():
        folder = asked.folder / name
        if not folder.exists():
            _prune(asked, name, settings)
        if not name.startswith("uneven"):  # whose folder is padded; GGUF files of it are not
            models[name] = folder
    for name in ("dense", *PRUNED):
        # Of uneven widths the file that is measured is another one, whose types would not all be the same in four bits.
        for kind in FILES[: 2 if name.startswith("uneven") else None]:
            models[f"{name} {kind}"] = file = asked.folder / f"{name}-{kind}.gguf"
            if not file.exists():
                coprune.export(
                    asked.model if name == "dense" else asked.folder / name, file, type=require_type(kind), quiet=True
                )
    return models


def _prune(asked: argparse.Namespace, name: str, settings: dict[str, Any]) -> None:
    coprune.prune(
        asked.model,
        dtype="bfloat16",
        dataset="embedded",
        nsamples=asked.samples,
        seqlen=asked.seqlen,
        save_model=asked.folder / name,
        save=asked.folder / "runs" / name,
        evaluate=False,
        **settings,
    )


def quality(model: Path | str, asked: argparse.Namespace) -> dict[str, float]:
    """Perplexity and size, measured once."""
    known = asked.folder / "quality" / f"{Path(model).name}.json"
    if not known.exists():
        found = coprune.evaluate(
            _loadable(Path(model)), "embedded", seqlen=asked.seqlen, eval_tokens=asked.tokens, dtype="float32"
        )
        size = (Path(model).stat().st_size if Path(model).is_file() else found.weights.bytes_on_disk) / 1e6
        known.parent.mkdir(exist_ok=True)
        known.write_text(json.dumps({"megabytes": size, "perplexity": found.perplexity[0].value}))
    content: dict[str, float] = json.loads(known.read_text())
    return content


def _loadable(model: Path) -> Path:
    """A model that transformers can load: uneven widths, which it has no class for, are padded with zeros (equal logits)."""
    if not model.name.startswith("uneven"):
        return model
    name, _, kind = model.stem.rpartition("-")
    padded = model.with_name(f"{name}-{kind}-padded.gguf")
    if not padded.exists():
        coprune.export(model.with_name(name), padded, type=require_type(kind), padded=True, quiet=True)
    return padded


def speed(models: list[str], asked: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of decoding one sequence, by the name of a folder or file."""
    known = asked.folder / "bench.json"
    if not known.exists():
        torch.set_num_threads(asked.threads)
        known.write_text(json.dumps(coprune.bench(models, prompt=128, tokens=48).to_dict()))
    rows = json.loads(known.read_text())["rows"]
    return {row["model"]: row["decode"]["median"] for row in rows}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="one that comes from a GGUF file")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=10_240, help="of the text that is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("out/sizes"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
