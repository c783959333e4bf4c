"""Image classifiers: calibration images, and accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from coprune.base.errors import BadInput, about
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Advance, Reporter
from coprune.base.words import LeaveOut, Setting
from coprune.data.images import (
    LabelledImages,
    Transform,
    draw_images,
    image_batches,
    labelled_images,
    labels_for,
    random_image,
    transform_of,
)
from coprune.data.windows import Samples
from coprune.evaluation.accuracy import aggregate_accuracy, rank_classes
from coprune.evaluation.measurement import Accuracy
from coprune.evaluation.tasks.task import Data, Remember, Walked, joined, read_anew, scored
from coprune.model.loaded_model import Loaded
from coprune.recipe.recipe import Recipe

BATCH_VALUES = 2**22  # pixel values in a batch: 27 images of 224 × 224
STREAMED_IMAGES = 2048  # images whose hidden states fit in memory together; each such part reads all streamed blocks


class ImageInputs:
    """Images after a classifier's own transforms. Arguments as for `TextInputs`; refuses settings for text."""

    text = None

    def __init__(
        self, recipe: Recipe, loaded: Loaded, processes: Processes = ALONE, remember: Remember = read_anew
    ) -> None:
        self.recipe, self.loaded, self.processes = recipe, loaded, processes  # images are not tokenised
        if recipe.evaluate.runs_tasks:
            cause = f"{loaded.source} classifies images, and zero-shot tasks are for language models"
            raise BadInput(cause, field="tasks", value=recipe.evaluate.tasks.names)
        if recipe.calibrate.calibrate_on == "generated":
            raise BadInput(
                "images have no generated tokens", field="calibrate_on", value="generated", fix=LeaveOut("calibrate_on")
            )

    def named(self, names: str | None) -> str:
        """Return the names of the requested images, by default the dataset. Raises BadInput if that is the default text."""
        if names is None and "data" not in self.recipe.calibrate.model_fields_set:
            raise BadInput(
                f"{self.loaded.source} classifies images, but no images are named",
                field="dataset",
                fix=(
                    *("name some with ", Setting("dataset")),
                    ": digits, a folder of classes, a parquet file or a datasets id",
                ),
            )
        return names or self.recipe.calibrate.data

    @cached_property
    def transform(self) -> Transform:
        """The model's own transforms."""
        processor = self.loaded.processor
        if processor is None:
            needs = "a classifier in memory needs its image processor"
            raise BadInput(needs, field="processor", fix=("give it with ", Setting("processor")))
        # timm's transforms know the number of channels; otherwise transformers' configuration does.
        own = getattr(processor, "data_config", None)
        channels = own["input_size"][0] if own else getattr(self.loaded.model.config, "num_channels", 3)
        return transform_of(processor, int(channels))

    def calibration(self, needed: bool, reporter: Reporter) -> Samples[Tensor] | None:
        recipe = self.recipe
        if not needed and not recipe.evaluate.layer_error:
            return None
        # Layer errors need only about a thousand patches.
        nsamples = recipe.calibrate.samples if needed else min(recipe.calibrate.samples, 64)
        reporter.say(f"Calibration: {nsamples} images from {recipe.calibrate.data}.")
        with about("dataset", recipe.calibrate.data):
            images = labelled_images(self.named(None), "calibration", recipe.model.cache_dir)
        return draw_images(images, self.transform, nsamples, recipe.calibrate.seed)

    def training_images(self) -> tuple[LabelledImages, Tensor]:
        """Return the images of the dataset with their labels (N int64) in the model's numbering."""
        images = labelled_images(self.named(None), "calibration", self.recipe.model.cache_dir)
        return images, self.labels(images)

    def labels(self, images: LabelledImages) -> Tensor:
        """Return the labels of images in the model's numbering: N int64. Raises BadInput for an unknown class."""
        classes = self.loaded.model.config.id2label
        return labels_for(images, classes, len(classes or {}))

    def probe(self, samples: Samples[Tensor] | None, data: Mapping[str, Data]) -> Tensor:
        if samples is not None:
            return samples.tokens[:1].to(self.loaded.device)
        images = next(iter(data.values()), None)
        image = images.image(0) if isinstance(images, LabelledImages) else random_image()
        return self.transform([image]).to(self.loaded.device)

    def batches(self, samples: Tensor, marks: Tensor | None = None) -> Sequence[Tensor]:
        return torch.split(samples.to(self.loaded.device), self.batch_size(samples))

    def batch_size(self, pixels: Tensor) -> int:
        """Return the number of images per batch. pixels: the images."""
        return self.recipe.calibrate.batch_size or max(1, BATCH_VALUES // pixels[0].numel())


class ImageAccuracy:
    """Top-1 and top-5 accuracy."""

    name = "Accuracy"
    figures: tuple[str, ...] = ("accuracy",)

    def __init__(self, inputs: ImageInputs) -> None:
        self._inputs = inputs

    def evaluation(self, reporter: Reporter) -> dict[str, LabelledImages]:
        recipe, found = self._inputs.recipe, dict[str, LabelledImages]()
        if not recipe.evaluate.perplexity:
            return found
        for name in [name.strip() for name in self._inputs.named(recipe.evaluate.data).split(",") if name.strip()]:
            with about("eval_data", name):
                images = labelled_images(name, "evaluation", recipe.model.cache_dir).first(recipe.evaluate.images)
                if len(images) == 0:
                    raise BadInput(f"{name} holds no image")
                self._inputs.labels(images)  # raises for unknown labels
            found[name] = images
        return found

    def measure(self, data: LabelledImages, advance: Advance, walked: Walked | None = None) -> Accuracy:
        inputs, ranked = self._inputs, list[Tensor]()
        own = inputs.processes.share(torch.arange(len(data))).tolist()
        size = inputs.batch_size(inputs.transform([data.image(0)]))
        if walked is not None and len(own) > STREAMED_IMAGES:
            walked = replace(walked, activations=None)  # these are for a single part
        for start in range(0, len(own), STREAMED_IMAGES):
            part = image_batches(data, inputs.transform, size, own[start : start + STREAMED_IMAGES])
            ranked += scored(inputs.loaded, part, lambda logits, _: rank_classes(logits), (advance, len(own)), walked)
        return aggregate_accuracy(joined(inputs.processes, ranked), inputs.labels(data))
