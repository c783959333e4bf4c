"""Labelled images: for calibration, drawn at random and transformed like the model's inputs; for evaluation, in order.

`digits` is scikit-learn's 1,797 handwritten digits, which need no network. Everything else is a folder with one
subfolder per class (the ImageFolder layout), a parquet file or a folder of them, or a dataset of the Hub.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.words import Set
from coprune.data.hub_datasets import load_dataset, require_dataset
from coprune.data.local_text import looks_local
from coprune.data.windows import Samples

Part = Literal["calibration", "evaluation"]
# Use the first split that exists; a folder of classes without splits serves for both.
SPLITS: dict[Part, tuple[str, ...]] = {
    "calibration": ("train", "training"),
    "evaluation": ("validation", "val", "valid", "test"),
}
DIGITS_FOR_EVALUATION = 500


@dataclass(frozen=True)
class LabelledImages:
    """Images read one by one: `image(i)` returns a PIL image in RGB.

    labels: N int64; classes: names by label, if they are known.
    """

    image: Callable[[int], Any]
    """Raises BadInput if the image cannot be read."""
    labels: Tensor
    """Below 0 for an image without a label."""
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, limit: int | None) -> LabelledImages:
        """Return at most `limit` images, evenly spaced, since files are often sorted by class."""
        if limit is None or limit >= len(self):
            return self
        chosen = [i * len(self) // limit for i in range(limit)]
        return LabelledImages(lambda i: self.image(chosen[i]), self.labels[chosen], self.classes, self.source)


def labelled_images(name: str, part: Part, cache_dir: Path | None = None) -> LabelledImages:
    """Open a set of images.

    name: `digits`, a folder of classes, a parquet file or folder of such, or a Hub id.
    Raises BadInput if it is missing, unreadable, or has no images or labels.
    """
    if name == "digits":
        return _digits(part)
    path = expand_home(name)
    if not looks_local(name):
        return _from_dataset(_load_hub(name, cache_dir), name, part)
    if not path.exists():
        fix = "name digits, a folder of classes, a parquet file or a datasets id"
        raise BadInput(f"there is no file or folder {name!r}", fix=fix)
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if files:
        return _from_dataset(_load_parquet(files, part, cache_dir), name, part)
    return _from_folder(path, part)


def draw_images(images: LabelledImages, transform: Transform, nsamples: int, seed: int) -> Samples[Tensor]:
    """Draw calibration images without repetition and transform them. Raises BadInput if there are too few."""
    if nsamples > len(images):
        raise BadInput(
            f"{images.source} holds {len(images)} images, fewer than the {nsamples} samples asked for",
            field="nsamples",
            value=nsamples,
            fix=("use at most ", Set("nsamples", len(images))),
        )
    chosen = random.Random(seed).sample(range(len(images)), nsamples)
    pixels = torch.cat([transform([images.image(i)]) for i in chosen])
    return Samples(pixels, fingerprint(pixels), images.source)


def image_batches(
    images: LabelledImages, transform: Transform, size: int, chosen: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of transformed images (B × C × H × W) with their labels (B), reading no more than one ahead.

    chosen: which images, all by default.
    """
    order = range(len(images)) if chosen is None else chosen
    for start in range(0, len(order), size):
        part = list(order[start : start + size])
        yield transform([images.image(i) for i in part]), images.labels[part]


Transform = Callable[[list[Any]], Tensor]
"""PIL images → pixels, B × C × H × W float32."""


def transform_of(processor: Any, channels: int = 3) -> Transform:
    """Return the model's own transforms: timm's for its models, those of an image processor otherwise.

    channels: number that the model takes; 1 is greyscale. Raises BadInput for an unsupported number.
    """
    if channels not in (1, 3):
        raise BadInput(
            f"the model takes images of {channels} channels, but images are read with 1 (grey) or 3 (colour)"
        )

    def transform(images: list[Any]) -> Tensor:
        read = images if channels == 3 else [image.convert("L") for image in images]
        pixels: Tensor = processor(read, return_tensors="pt")["pixel_values"]
        return pixels

    return transform


def labels_for(images: LabelledImages, id2label: Mapping[Any, str] | None, classes: int) -> Tensor:
    """Return the images' labels in the model's numbering: by name if the model has all names, else unchanged.

    Raises BadInput if an image has no label, or one beyond the model's classes.
    """
    if unknown := int((images.labels < 0).sum()):
        raise BadInput(
            f"{unknown:,} of the {len(images):,} images of {images.source} have no label",
            fix="use images with labels, such as those of another split",
        )
    own = {int(number): str(name) for number, name in (id2label or {}).items()}
    names = {name: number for number, name in own.items()}
    if images.classes and all(name in names for name in images.classes):
        # Two of ImageNet's classes are named crane; if both models number them alike, use the number.
        numbers = [at if own.get(at) == name else names[name] for at, name in enumerate(images.classes)]
        return torch.tensor(numbers)[images.labels]
    if len(images) and int(images.labels.max()) >= classes:
        raise BadInput(
            f"{images.source} has labels up to {int(images.labels.max())} and the model only {classes} classes, which are "
            "named differently",
            fix="evaluate the model on images of its own classes",
        )
    return images.labels


def fingerprint(pixels: Tensor) -> str:
    """Return 16 hex digits of SHA-256 over the float32 values, and the shape."""
    values = pixels.to(device="cpu", dtype=torch.float32).contiguous().numpy().astype("<f4")
    return f"{hashlib.sha256(values.tobytes()).hexdigest()[:16]}-{'x'.join(map(str, pixels.shape))}"


def _digits(part: Part) -> LabelledImages:
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BadInput(
            "the images 'digits' need scikit-learn and Pillow", fix="pip install 'coprune[images]'"
        ) from error
    raw, labels = load_digits(return_X_y=True)
    order = list(range(len(raw)))
    random.Random(0).shuffle(order)
    split = {"evaluation": order[:DIGITS_FOR_EVALUATION], "calibration": order[DIGITS_FOR_EVALUATION:]}[part]

    def image(i: int) -> Any:
        # 17 shades of grey, light on dark.
        pixels = (raw[split[i]].reshape(8, 8) * (255 / 16)).round().astype("uint8")
        return Image.fromarray(pixels).convert("RGB")

    source = f"{len(split)} of the 1,797 digits in scikit-learn"
    classes = tuple(map(str, range(10)))
    return LabelledImages(image, torch.from_numpy(labels)[split].to(torch.int64), classes, source)


def _from_folder(path: Path, part: Part) -> LabelledImages:
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise BadInput("folders of images need torchvision", fix="pip install 'coprune[images]'") from error
    root = next((path / split for split in SPLITS[part] if (path / split).is_dir()), path)
    try:
        folder = ImageFolder(str(root))
    except (FileNotFoundError, OSError) as error:
        raise BadInput(f"{root} is not a folder of images with one subfolder per class: {error}") from error
    labels = torch.tensor(folder.targets, dtype=torch.int64)
    # ImageFolder's loader reads a file as PIL in RGB.
    return LabelledImages(
        lambda i: read_image(lambda: folder[i][0], folder.samples[i][0]), labels, tuple(folder.classes), str(root)
    )


def _load_parquet(files: Sequence[Path], part: Part, cache_dir: Path | None) -> Any:
    named = [file for file in files if any(split in file.name for split in SPLITS[part])]
    try:
        return load_dataset(
            "parquet",
            data_files={"files": [str(file) for file in named or files]},
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
    except Exception as error:  # the library's own errors share no base class
        raise BadInput(f"{files[0]} cannot be read as parquet: {' '.join(str(error).split())[:200]}") from error


def _load_hub(name: str, cache_dir: Path | None) -> Any:
    require_dataset(name, cache_dir)
    try:
        return load_dataset(name, cache_dir=None if cache_dir is None else str(cache_dir))
    except Exception as error:  # the library's own errors share no base class
        raise BadInput(f"dataset {name!r} cannot be read ({' '.join(str(error).split())[:200]})") from error


def _from_dataset(splits: Any, name: str, part: Part) -> LabelledImages:
    from datasets import ClassLabel, Image

    split = next((s for s in ("files", *SPLITS[part]) if s in splits), None)
    if split is None:
        raise BadInput(f"{name} has no split {' or '.join(SPLITS[part])}, only {', '.join(splits)}")
    rows = splits[split]
    column = next((c for c in ("image", "img", "pixel_values") if c in rows.features), None) or next(
        (c for c, kind in rows.features.items() if isinstance(kind, Image)), None
    )
    label = next((c for c in ("label", "labels", "fine_label") if c in rows.features), None) or next(
        (c for c, kind in rows.features.items() if isinstance(kind, ClassLabel)), None
    )
    if column is None or label is None:
        raise BadInput(f"{name} needs a column of images and one of labels, but has {', '.join(rows.features)}")
    kind = rows.features[label]
    rows = rows.cast_column(column, Image())
    labels, classes = read_labels(rows[label][:], tuple(kind.names) if isinstance(kind, ClassLabel) else (), name)

    def image(i: int) -> Any:
        return read_image(lambda: rows[i][column].convert("RGB"), f"image {i} of {name}")

    return LabelledImages(image, labels, classes, f"{name} ({split})")


NO_LABEL = -1
"""Label of an image without one, as in the Hub's test splits."""


def read_labels(values: Sequence[Any], classes: tuple[str, ...], name: str) -> tuple[Tensor, tuple[str, ...]]:
    """Convert a column of labels into numbers.

    Args:
        values: numbers, words, or None where an image has no label.
        classes: names by number, if the dataset has them.
        name: of the dataset, for messages.

    Returns:
        N int64, below 0 where there is no label, and the names by number: words in their order, if the labels are words.

    Raises:
        BadInput: they are neither whole numbers nor words.
    """
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, str) for value in known):
        classes = tuple(sorted(set(known)))
        numbers = {word: number for number, word in enumerate(classes)}
        return torch.tensor([numbers.get(value, NO_LABEL) for value in values], dtype=torch.int64), classes
    for value in known:
        if not isinstance(value, int | float) or not float(value).is_integer():
            raise BadInput(f"{name} has the label {value!r}, which is neither a whole number nor a word")
    return torch.tensor([NO_LABEL if value is None else int(value) for value in values], dtype=torch.int64), classes


def read_image(read: Callable[[], Any], told: str) -> Any:
    """Read one image. told: its name in messages. Raises BadInput if it is missing or damaged."""
    try:
        return read()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's own errors share no base class, and a row without an image is None
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"{told} cannot be read as an image ({why})", fix="repair or remove it") from error


def random_image() -> Any:
    """Return a fixed PIL image of random pixels, for trying a classifier without data."""
    from PIL import Image

    pixels = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
