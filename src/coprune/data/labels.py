"""What a dataset says of its images, read with care: labels of any kind, and files that may be broken; and one of no dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from coprune.base.errors import BadInput

NO_LABEL = -1
"""Of an image whose class nobody tells, as the Hub's test splits often have it."""


def read_labels(values: Sequence[Any], classes: tuple[str, ...], name: str) -> tuple[Tensor, tuple[str, ...]]:
    """Turn a column of labels into numbers.

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
    """Read one image. told: what it is, for messages. Raises BadInput if it is missing or damaged."""
    try:
        return read()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's own errors share no base class, and a row without an image is None
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"{told} cannot be read as an image ({why})", fix="mend or remove it") from error


def random_image() -> Any:
    """A PIL image of random pixels, always the same: what to try a classifier with where no data were named."""
    from PIL import Image

    pixels = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
