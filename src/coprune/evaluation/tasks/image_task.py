"""Image classifiers: images to calibrate on, and accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from coprune.base.errors import BadInput, NumericalError, about
from coprune.base.processes import Processes
from coprune.base.progress import Advance, Reporter
from coprune.base.words import LeaveOut, Setting
from coprune.data.images import (
    ImageSamples,
    LabelledImages,
    Transform,
    draw_images,
    image_batches,
    labelled_images,
    labels_for,
    random_image,
    transform_of,
)
from coprune.evaluation.batches import inference_logits
from coprune.evaluation.measurement import Accuracy
from coprune.evaluation.tasks.task import Data, Remember, Samples
from coprune.model.loaded_model import Loaded
from coprune.model.walk.activations import Activations
from coprune.model.walk.block_calls import input_device
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.walk import streamed_logits
from coprune.recipe.recipe import Recipe

BATCH_VALUES = 2**22  # of pixels: 27 images of 224 × 224
STREAMED_IMAGES = 2048  # whose hidden states are held at a time where the blocks are streamed


class ImageTask:
    """A classifier: images, and top-1 and top-5 accuracy. Raises BadInput for what only text has."""

    measure_name = "Accuracy"
    figures: tuple[str, ...] = ("accuracy",)

    def __init__(self, recipe: Recipe, loaded: Loaded, processes: Processes, remember: Remember) -> None:
        self._recipe, self._loaded, self._processes = recipe, loaded, processes  # images are not tokenised
        if recipe.evaluate.runs_tasks:
            cause = f"{loaded.source} classifies images, and zero-shot tasks are for language models"
            raise BadInput(cause, field="tasks", value=recipe.evaluate.tasks.names)
        if recipe.calibrate.calibrate_on == "generated":
            raise BadInput(
                "no model wrote images", field="calibrate_on", value="generated", fix=LeaveOut("calibrate_on")
            )

    def _named(self, names: str | None) -> str:
        """Return the requested images: by these names, or the dataset, whose default is a text."""
        if names is None and "data" not in self._recipe.calibrate.model_fields_set:
            raise BadInput(
                f"{self._loaded.source} classifies images, but no images are named",
                field="dataset",
                fix=(
                    *("name some with ", Setting("dataset")),
                    ": digits, a folder of classes, a parquet file or a datasets id",
                ),
            )
        return names or self._recipe.calibrate.data

    @cached_property
    def transform(self) -> Transform:
        """The model's own transforms."""
        if self._loaded.processor is None:
            needs = "a classifier in memory needs its image processor"
            raise BadInput(needs, field="processor", fix=("give it with ", Setting("processor")))
        return transform_of(self._loaded.processor, self._channels)

    @property
    def _channels(self) -> int:
        """Number of image channels, which timm's transforms or transformers' configuration know."""
        own = getattr(self._loaded.processor, "data_config", None)
        return int(own["input_size"][0] if own else getattr(self._loaded.model.config, "num_channels", 3))

    def calibration(self, needed: bool, reporter: Reporter) -> ImageSamples | None:
        recipe = self._recipe
        if not needed and not recipe.evaluate.layer_error:
            return None
        # Layer errors need only about a thousand patches.
        nsamples = recipe.calibrate.samples if needed else min(recipe.calibrate.samples, 64)
        reporter.say(f"Calibration: {nsamples} images from {recipe.calibrate.data}.")
        with about("dataset", recipe.calibrate.data):
            images = labelled_images(self._named(None), "calibration", recipe.model.cache_dir)
        return draw_images(images, self.transform, nsamples, recipe.calibrate.seed)

    def training_images(self) -> tuple[LabelledImages, Tensor]:
        """Return the images of the dataset, and their labels (N int64) in the model's numbering."""
        images = labelled_images(self._named(None), "calibration", self._recipe.model.cache_dir)
        return images, self._labels(images)

    def evaluation(self, reporter: Reporter) -> dict[str, Data]:
        recipe = self._recipe
        if not recipe.evaluate.perplexity:
            return {}
        names = [name.strip() for name in self._named(recipe.evaluate.data).split(",") if name.strip()]
        found: dict[str, Data] = {}
        for name in names:
            with about("eval_data", name):
                images = labelled_images(name, "evaluation", recipe.model.cache_dir).first(recipe.evaluate.images)
                if len(images) == 0:
                    raise BadInput(f"{name} holds no image")
                self._labels(images)  # refuses labels that the model does not have
            found[name] = images
        return found

    @property
    def _classes(self) -> int:
        return len(self._loaded.model.config.id2label or {})

    def probe(self, samples: Samples | None, data: dict[str, Data]) -> Tensor:
        if samples is not None:
            return samples.tokens[:1].to(self._loaded.device)
        images = next(iter(data.values()), None)
        image = images.image(0) if isinstance(images, LabelledImages) else random_image()
        return self.transform([image]).to(self._loaded.device)

    def batches(self, samples: Tensor, marks: Tensor | None = None) -> Sequence[Tensor]:
        return torch.split(samples.to(self._loaded.device), self._batch_size(samples))

    def _batch_size(self, pixels: Tensor) -> int:
        return self._recipe.calibrate.batch_size or max(1, BATCH_VALUES // pixels[0].numel())

    def measure(self, model: ProvenModel, data: Data, activations: Activations, advance: Advance) -> Accuracy:
        assert isinstance(data, LabelledImages)
        own = self._processes.share(torch.arange(len(data))).tolist()
        if model.weights.streams:
            ranked = self._rank_streamed(model, data, own, activations, advance)
        else:
            ranked = self._rank_in_memory(data, own, advance)
        own_ranked = torch.cat(ranked) if ranked else torch.zeros(0, min(5, self._classes), dtype=torch.int64)
        return aggregate_accuracy(torch.cat(self._processes.gather(own_ranked)), self._labels(data))

    def measure_in_memory(self, data: Data, advance: Advance) -> Accuracy:
        assert isinstance(data, LabelledImages)
        return aggregate_accuracy(torch.cat(self._rank_in_memory(data, range(len(data)), advance)), self._labels(data))

    def _labels(self, images: LabelledImages) -> Tensor:
        return labels_for(images, self._loaded.model.config.id2label, self._classes)

    def _rank_in_memory(self, images: LabelledImages, own: Sequence[int], advance: Advance) -> list[Tensor]:
        ranked = []
        size = self._batch_size(self.transform([images.image(0)]))
        with inference_logits(self._loaded.model) as logits_of:
            for pixels, _ in image_batches(images, self.transform, size, own):
                ranked.append(rank_classes(logits_of(pixels)))
                advance(len(pixels) / len(own))
        return ranked

    def _rank_streamed(
        self,
        model: ProvenModel,
        data: LabelledImages,
        own: Sequence[int],
        activations: Activations,
        advance: Advance,
    ) -> list[Tensor]:
        """Rank classes for as many images at a time as fit in memory, since every such part reads all blocks once."""
        device = input_device(model.module)
        size = self._batch_size(self.transform([data.image(0)]))
        ranked = []
        for start in range(0, len(own), STREAMED_IMAGES):
            part = own[start : start + STREAMED_IMAGES]
            windows = [pixels.to(device) for pixels, _ in image_batches(data, self.transform, size, part)]
            ranked += streamed_logits(
                model,
                windows,
                lambda logits, _: rank_classes(logits),
                activations=activations if len(own) <= STREAMED_IMAGES else None,
            )
            advance(len(part) / len(own))
        return ranked


_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def rank_classes(logits: Tensor) -> Tensor:
    """Return the five likeliest classes of each image (fewer if there are not as many): B × 5 int64, on the CPU.

    logits: B × classes. Raises NumericalError for NaN.
    """
    if bool(logits.isnan().any()):
        raise NumericalError("the model's output is NaN for some images")
    return logits.to(torch.float32).topk(min(5, logits.shape[-1]), dim=-1).indices.cpu()


def aggregate_accuracy(ranked: Tensor, labels: Tensor) -> Accuracy:
    """Compute the accuracies from every image's ranked classes (N × 5) and label (N)."""
    hits = ranked == labels[:, None]
    first, five, count = int(hits[:, 0].sum()), int(hits.any(dim=1).sum()), len(labels)
    return Accuracy(
        images=count,
        top1=first / count,
        top1_interval=wilson_interval(first, count),
        top5=five / count,
        top5_interval=wilson_interval(five, count),
        labels=tuple(labels.tolist()),
        predicted=tuple(ranked[:, 0].tolist()),
    )


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the share hits / count; count is at least 1."""
    share, z2 = hits / count, _Z * _Z
    centre = share + z2 / (2 * count)
    spread = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z2 / count)), min(1.0, (centre + spread) / (1 + z2 / count))
