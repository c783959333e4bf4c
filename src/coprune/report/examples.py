"""A classifier's accuracy for the report, with the first images whose predicted class changed."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from coprune.data.images import LabelledImages
from coprune.evaluation.measurement import Accuracy
from coprune.report.figures import AccuracyFacts, ChangedPrediction

_EXAMPLES = 20  # images with a changed prediction that are named
_SHOWN = 12  # of them that are shown
_SIDE = 112  # pixels of a thumbnail's longer side


def accuracy_facts(
    images: LabelledImages, id2label: Mapping[Any, str] | None, dense: Accuracy | None, pruned: Accuracy
) -> AccuracyFacts:
    """Both models' accuracies side by side, with the images whose predicted class changed.

    id2label: the model's names of its classes.
    """
    changed = (
        []
        if dense is None
        else [i for i, (a, b) in enumerate(zip(dense.predicted, pruned.predicted, strict=True)) if a != b]
    )
    return AccuracyFacts(
        data=pruned.data,
        source=pruned.source,
        images=pruned.images,
        dense_top1=None if dense is None else dense.top1,
        dense_top1_interval=None if dense is None else dense.top1_interval,
        dense_top5=None if dense is None else dense.top5,
        pruned_top1=pruned.top1,
        pruned_top1_interval=pruned.top1_interval,
        pruned_top5=pruned.top5,
        pruned_top5_interval=pruned.top5_interval,
        changed=None if dense is None else len(changed),
        examples=[
            _example(i, images, id2label, dense, pruned, shown=place < _SHOWN)
            for place, i in enumerate(changed[:_EXAMPLES])
            if dense is not None
        ],
    )


def class_name(number: int, images: LabelledImages, id2label: Mapping[Any, str] | None) -> str:
    """A class as the model calls it, or as the images do where the model only counts."""
    written = (id2label or {}).get(number, "")
    if written and not written.startswith("LABEL_"):
        return written
    return images.classes[number] if number < len(images.classes) else f"class {number}"


def thumbnail(image: Any) -> str:
    """A small copy of a PIL image as a data URI: JPEG, or PNG for what is tiny already."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    kind, options = ("png", {}) if max(small.size) < _SIDE // 2 else ("jpeg", {"quality": 80})
    stream = io.BytesIO()
    small.save(stream, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _example(
    i: int,
    images: LabelledImages,
    id2label: Mapping[Any, str] | None,
    dense: Accuracy,
    pruned: Accuracy,
    shown: bool,
) -> ChangedPrediction:
    label, before, after = pruned.labels[i], dense.predicted[i], pruned.predicted[i]

    def name(number: int) -> str:
        return class_name(number, images, id2label)

    return ChangedPrediction(
        image=i,
        label=label,
        dense=before,
        pruned=after,
        names=(name(label), name(before), name(after)),
        thumbnail=thumbnail(images.image(i)) if shown else None,
    )
