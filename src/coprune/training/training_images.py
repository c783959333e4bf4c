"""Training images: those that a classifier is calibrated on, through its own transforms, with labels as it counts them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from coprune.base.errors import BadInput
from coprune.data.images import LabelledImages, Transform, fingerprint
from coprune.evaluation.tasks import ImageTask
from coprune.recipe.recipe import Recipe
from coprune.training.distill import label_loss
from coprune.training.training_data import TrainingData, count_held_out

MOST_HELD_OUT = 2048
_BATCH_SIZE = 32
_NAMING = 16  # images whose pixels name a training set, besides all labels


class TrainingImages(Dataset[dict[str, Tensor]]):
    """Images that are read and transformed when they are asked for. chosen: their numbers among all images."""

    def __init__(self, images: LabelledImages, labels: Tensor, transform: Transform, chosen: Tensor) -> None:
        self.chosen = chosen
        self._images, self._labels, self._transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = int(self.chosen[index])
        pixels = self._transform([self._images.image(number)])[0]
        return {"pixel_values": pixels, "labels": self._labels[number]}

    def fingerprint(self) -> str:
        """Hash all labels and the pixels of a few images."""
        few = [int(i) for i in torch.linspace(0, len(self) - 1, min(_NAMING, len(self)))]
        pixels = torch.stack([self[i]["pixel_values"] for i in few])
        labels = self._labels[self.chosen].numpy().astype("<i8").tobytes()
        return f"{hashlib.sha256(labels).hexdigest()[:8]}-{fingerprint(pixels)}"


def read_training_images(settings: Recipe, task: ImageTask) -> TrainingData:
    """Open the images to train on; random ones are held out, and of more than max_samples random ones are taken.

    Raises BadInput if there are fewer than two, or labels that the model does not have.
    """
    images, labels = task.training_images()
    if len(images) < 2:
        raise BadInput(f"{images.source} holds {len(images)} images, and training needs two or more", field="dataset")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.calibrate.seed))
    held_out = count_held_out(settings, len(images), MOST_HELD_OUT)
    chosen = order[held_out:][: settings.train.max_samples]

    def part(numbers: Tensor) -> TrainingImages:
        return TrainingImages(images, labels, task.transform, numbers)

    train, watched = part(chosen), part(order[:held_out]) if held_out else None
    return TrainingData(
        train, watched, images.source, train.fingerprint(), batch_size=_BATCH_SIZE, accumulate=1, loss=image_loss
    )


def image_loss(model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy of a classifier with the labels, an `Objective`.

    Computed here, since the models' own loss writes the problem type into their configuration.
    """
    return label_loss(model(pixel_values=inputs["pixel_values"]).logits, inputs["labels"])
