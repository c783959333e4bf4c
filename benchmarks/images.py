"""Accuracy of two small image classifiers against sparsity: does updating the weights matter more for a ViT?

A ViT and a ConvNeXt of timm are trained for a minute or two on 1,297 of scikit-learn's digits (once; they are kept in a
folder), pruned with every method and pattern, and measured on the other 500.

    python benchmarks/images.py              # accuracy after pruning
    python benchmarks/images.py --finetune   # after fine-tuning what was pruned
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch.nn import functional

import coprune
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.data.images import labelled_images
from coprune.recipe.views import training_recipe
from coprune.training.finetuning import run_finetuning

METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
PATTERNS = ("unstructured", "4:8", "2:4")
FINETUNED = [(pattern, method) for pattern in ("unstructured", "2:4") for method in ("magnitude", "wanda", "sparsegpt")]
MODES = ("lora", "dense", "distill")


@dataclass(frozen=True)
class Small:
    """A small version of one of timm's architectures."""

    architecture: str
    size: int
    arguments: dict[str, Any]
    epochs: int


MODELS = {
    "vit": Small(
        "vit_tiny_patch16_224", 16, dict(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=2), epochs=60
    ),
    "convnext": Small("convnext_atto", 32, dict(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48)), epochs=60),
}


def train(small: Small, folder: Path, seed: int = 0) -> None:
    """Train on the calibration part of the digits and save as timm does."""
    torch.manual_seed(seed)
    overlay = dict(input_size=(3, small.size, small.size), crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
    model = timm.create_model(
        small.architecture, num_classes=10, pretrained_cfg_overlay=overlay, drop_path_rate=0.0, **small.arguments
    )
    transform = create_transform(**resolve_data_config(model.pretrained_cfg))
    images = labelled_images("digits", "calibration")
    pixels = torch.stack([transform(images.image(i)) for i in range(len(images))])
    batch, steps = 64, small.epochs * (len(images) // 64)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,))
        shift = torch.randint(-1, 2, (2,)).tolist()  # a small translation is all the augmentation
        logits = model(pixels[chosen].roll(shift, dims=(2, 3)))
        loss = functional.cross_entropy(logits, images.labels[chosen], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 200 == 0:
            print(f"  step {step} of {steps}, loss {float(loss.detach()):.3f}", flush=True)
    save_for_hf(model, str(folder), model_args=small.arguments, safe_serialization=True)


def prune(folder: Path, method: str, pattern: str, nsamples: int, **more: Any) -> Any:
    """Prune one classifier; returns its accuracy before and after."""
    settings: dict[str, Any] = {"pattern": pattern, "dataset": "digits", "nsamples": nsamples, "seed": 0, "quiet": True}
    return coprune.prune(folder, method, **settings, **more).report.accuracy[0]


def pruning_table(folder: Path, nsamples: int) -> None:
    """Print the accuracy that every method leaves."""
    rows = {(m, p): prune(folder, m, p, nsamples) for p in PATTERNS for m in METHODS}
    dense = next(iter(rows.values()))
    low, high = dense.dense_top1_interval
    print(f"\n{folder.name}: dense {dense.dense_top1:.1%} [{low:.1%}, {high:.1%}]")
    print("| method | 50 % | 4:8 | 2:4 |\n| --- | --- | --- | --- |")
    for method in METHODS:
        cells = [rows[method, pattern] for pattern in PATTERNS]
        shown = [shares(c.pruned_top1, *c.pruned_top1_interval) for c in cells]
        print(f"| {method} | {' | '.join(shown)} |", flush=True)


def finetuning_table(folder: Path, nsamples: int, epochs: float, rate: float) -> None:
    """Print the accuracy before and after fine-tuning in every mode that the pruned layers allow."""
    print(f"\n{folder.name}, {epochs:g} epochs\n| pruned to | by | pruned | {' | '.join(MODES)} |")
    print("| --- " * (3 + len(MODES)) + "|")
    for pattern, method in FINETUNED:
        with tempfile.TemporaryDirectory() as work:
            pruned = Path(work) / "pruned"
            found = prune(folder, method, pattern, nsamples, save_model=pruned)
            cells = [shares(found.pruned_top1, *found.pruned_top1_interval)]
            for mode in MODES:
                settings: dict[str, Any] = {"model": str(pruned), "mode": mode, "save": Path(work) / mode}
                settings |= {"dataset": "digits", "epochs": epochs, "learning_rate": rate, "device": "cpu"}
                settings |= {"teacher": str(folder)} if mode == "distill" else {}
                cells.append(accuracy_after(settings))
        print(f"| {pattern} | {method} | {' | '.join(cells)} |", flush=True)


def accuracy_after(settings: dict[str, Any]) -> str:
    """Fine-tune with all zeros kept, and return the accuracy; a dash where the layers get no adapters."""
    try:
        report = run_finetuning(training_recipe(settings), Reporter(quiet=True))
    except BadInput as error:
        if "no adapters" not in str(error):
            raise
        return "–"
    assert report.sparsity_after >= report.sparsity_before
    (found,) = report.accuracy
    return shares(found.after_top1, *found.after_top1_interval)


def shares(value: float, low: float, high: float) -> str:
    """An accuracy with its interval, in per cent."""
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def main() -> None:
    """Train what is not there yet, prune, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/digit-classifiers"))
    parser.add_argument("--nsamples", type=int, default=512)
    parser.add_argument("--finetune", action="store_true", help="fine-tune, and print what that changes")
    parser.add_argument("--epochs", type=float, default=10, help="of fine-tuning")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate of fine-tuning")
    options = parser.parse_args()
    for name, small in MODELS.items():
        folder = options.folder / name
        if not (folder / "config.json").is_file():
            print(f"training {name}")
            train(small, folder)
        if options.finetune:
            finetuning_table(folder, options.nsamples, options.epochs, options.rate)
        else:
            pruning_table(folder, options.nsamples)


if __name__ == "__main__":
    main()
