"""The data of a training for any task: training samples, held-out samples, and the loss."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.base.words import Setting
from coprune.data.bos import tokens_at_bos
from coprune.data.corpora import calibration_text, holds_out
from coprune.data.images import LabelledImages, Transform
from coprune.data.images import fingerprint as fingerprint_of_images
from coprune.data.in_memory import GivenTokens
from coprune.data.pairs import Pairs, pair_fingerprint
from coprune.data.text import LOCAL_FILE_HINT, Documents, JoinedText
from coprune.data.windows import Windows, fingerprint, held_out_tokens, token_ids
from coprune.evaluation.batches import cut_windows
from coprune.evaluation.tasks import Metric
from coprune.evaluation.tasks.image_task import ImageInputs
from coprune.evaluation.tasks.masked_task import PseudoPerplexity
from coprune.evaluation.tasks.pair_task import PairInputs
from coprune.evaluation.tasks.speech_task import SpeechInputs
from coprune.evaluation.tasks.text_task import TextInputs
from coprune.model.loaded_model import Loaded
from coprune.recipe.recipe import Recipe
from coprune.training.distill import Objective, label_loss, target_loss


@dataclass(frozen=True)
class TrainingData:
    """Training and held-out samples, and their source.

    A sample is a dictionary of tensors: the model's inputs, and `labels`.
    """

    train: Any
    """A dataset with a length."""
    held_out: Any | None
    source: str
    fingerprint: str
    tokens: int = 0
    """Tokens per sample; 0 for images."""
    batch_size: int = 1
    """Samples per forward pass, unless the settings set them."""
    accumulate: int = 8
    """Forward passes per optimiser step, unless the settings set them."""
    given: bool = False
    """Whether the samples are token ids passed by the caller, which are used unchanged."""
    loss: Objective | None = None
    """Loss of training and measurement; None for the model's own, or without targets."""
    has_targets: bool = True
    """Whether the samples have targets; without, only the dense model can teach."""
    unit: str = "windows"
    """Name of the samples."""


def count_held_out(settings: Recipe, samples: int, most: int) -> int:
    """Return the number of samples to hold out for measurements: zero if none are wanted, never all."""
    if not settings.train.held_out:
        return 0
    return max(1, min(most, samples - 1, round(settings.train.held_out * samples)))


MOST_HELD_OUT = 64
EVALUATIONS = 5
"""Number of measurements on held-out samples in a training."""


def stack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples of one size into a batch without padding."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class TextWindows(Dataset[dict[str, Tensor]]):
    """Windows of tokens (N × S int64) as a dataset: the labels of a window are its tokens."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.tokens[index]
        return {"input_ids": window, "labels": window}


def read_training_text(settings: Recipe, tokenizer: PreTrainedTokenizerBase, block_size: int) -> TrainingData:
    """Read a corpus and pack it into windows, the last of which are held out.

    Documents are joined in a random order, separated by EOS. Text of the user's own that perplexity is measured on is left
    out. Raises BadInput if the text does not fill two windows.
    """
    text = calibration_text(settings.calibrate.data, settings.model.cache_dir)
    ids = _stream(text, tokenizer, settings, block_size)
    if settings.evaluate.perplexity and settings.evaluate.data is None and holds_out(settings.calibrate.data):
        ids = ids[: len(ids) - held_out_tokens(len(ids), settings.train.eval_seqlen or block_size)]
    if len(ids) < 2 * block_size:
        raise BadInput(
            f"{text.source} is too short: it has {len(ids)} tokens, and training needs two windows of {block_size}",
            field="seqlen",
            value=block_size,
            fix=("take more text, or shorter windows with ", Setting("seqlen"), f". {LOCAL_FILE_HINT}"),
        )
    windows = cut_windows(torch.tensor(ids, dtype=torch.int64), block_size)
    held_out = count_held_out(settings, len(windows), _most_held_out(settings, block_size))
    train = windows[: len(windows) - held_out]
    watched = TextWindows(windows[len(windows) - held_out :].clone()) if held_out else None
    given = isinstance(text, GivenTokens)
    return TrainingData(TextWindows(train.clone()), watched, text.source, fingerprint(train), block_size, given=given)


def begun(data: TrainingData, bos: int) -> TrainingData:
    """Return training data whose windows all begin with BOS, as in calibration and evaluation."""
    train = TextWindows(tokens_at_bos(data.train.tokens, bos))
    held_out = data.held_out and TextWindows(tokens_at_bos(data.held_out.tokens, bos))
    return replace(data, train=train, held_out=held_out, fingerprint=fingerprint(train.tokens))


def _most_held_out(settings: Recipe, block_size: int) -> int:
    """Return the maximum number of held-out windows; in a short training measuring them takes a twentieth of the time."""
    if settings.train.tokens is None:
        return MOST_HELD_OUT
    # Measuring a window takes about a quarter as long as training on it.
    trained = settings.train.tokens / block_size
    return min(MOST_HELD_OUT, round(0.2 * trained / EVALUATIONS))


def _stream(
    text: JoinedText | Documents | GivenTokens,
    tokenizer: PreTrainedTokenizerBase,
    settings: Recipe,
    block_size: int,
) -> list[int]:
    """Return all tokens of a text."""
    if isinstance(text, GivenTokens):
        given: list[int] = text.tokens.flatten().tolist()
        return given
    if isinstance(text, JoinedText):
        return token_ids(tokenizer, text.text)
    order = list(range(len(text.texts)))
    random.Random(settings.calibrate.seed).shuffle(order)
    mark = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for index in order:
        ids += token_ids(tokenizer, text.texts[index]) + mark
    return ids


class MaskedWindows(TextWindows):
    """Windows with masked tokens. labels: the original tokens, `NOTHING` where not masked (N × S int64)."""

    def __init__(self, tokens: Tensor, labels: Tensor) -> None:
        super().__init__(tokens)
        self._labels = labels

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self._labels[index]}


class PairSamples(Dataset[dict[str, Tensor]]):
    """Pairs as a dataset, padded with `NOTHING`. name: the model's name for the encoder's input."""

    def __init__(self, pairs: Pairs, name: str) -> None:
        self._read, self._written, self._name = pairs.source, pairs.written, name

    def __len__(self) -> int:
        return len(self._written)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        written = self._written[index]
        return {self._name: self._read[index], "written": written, "labels": written[1:]}


_TOKENS_AT_ONCE = 1024
"""Tokens per forward pass, unless the settings set a batch size; recordings are passed one by one."""


def read_whole_texts(
    settings: Recipe, text: TextInputs, metric: Metric[Any], tokenizer: PreTrainedTokenizerBase
) -> TrainingData:
    """Read text for a model that reads texts as a whole, as in calibration.

    Masked models get random masks. Plain text has no targets for vectors and labels, so the dense model has to teach them.
    Raises BadInput.
    """
    masked = metric if isinstance(metric, PseudoPerplexity) else None
    windows, samples = _windows_of_text(settings, text, tokenizer), list[TextWindows]()
    for part in windows:
        text.check_ids(part.tokens)
        hidden = None if masked is None else masked.masked_at_random(part.tokens)
        samples.append(TextWindows(part.tokens) if hidden is None else MaskedWindows(*hidden))
    return TrainingData(
        samples[0],
        samples[1] if samples[1:] else None,
        windows[0].source,
        fingerprint(windows[0].tokens),
        tokens=text.seqlen,
        batch_size=max(1, _TOKENS_AT_ONCE // text.seqlen),
        accumulate=1,
        given=windows[0].given,
        loss=None if masked is None else target_loss,
        has_targets=masked is not None,
    )


def _windows_of_text(settings: Recipe, text: TextInputs, tokenizer: PreTrainedTokenizerBase) -> list[Windows]:
    """Return the training windows, and the held-out ones if there are any, as the model reads them."""
    read = read_training_text(settings, tokenizer, text.seqlen)
    parts = [part.tokens for part in (read.train, read.held_out) if part]
    return [text.as_read(Windows(tokens, "", read.source, read.given)) for tokens in parts]


def read_pairs(settings: Recipe, inputs: PairInputs | SpeechInputs, loaded: Loaded, reporter: Reporter) -> TrainingData:
    """Read pairs or recordings, or make pairs from text, as in calibration. Raises BadInput."""
    own, text, name = inputs.own_pairs(reporter), inputs.text, loaded.model.main_input_name
    if own is None:
        windows = _windows_of_text(settings, text, loaded.processor)
        parts, source, given = [inputs.made_of(part).tokens for part in windows], windows[0].source, windows[0].given
    else:
        count, source, given = count_held_out(settings, len(own.tokens), MOST_HELD_OUT), own.source, False
        if len(own.tokens) < 2:
            raise BadInput(f"{source} has {len(own.tokens)} pair, and training needs two", field="dataset")
        parts = [part for part in own.tokens.split([len(own.tokens) - count, count]) if len(part)]
    for part in parts:
        text.check_ids(part)
    first, heard = parts[0], parts[0].source.is_floating_point()
    return TrainingData(
        PairSamples(first, name),
        PairSamples(parts[1], name) if parts[1:] else None,
        source,
        pair_fingerprint(first),
        tokens=first.shape[1],
        batch_size=1 if heard else max(1, _TOKENS_AT_ONCE // max(first.shape[1], text.seqlen if own is None else 0)),
        accumulate=4 if heard else 1,
        given=given,
        loss=target_loss,
        unit="pairs",
    )


MOST_IMAGES_HELD_OUT = 2048
_BATCH_SIZE = 32
_NAMING = 16  # number of images whose pixels are hashed, besides all labels


class TrainingImages(Dataset[dict[str, Tensor]]):
    """Images that are read and transformed on access. chosen: their indices among all images."""

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
        return f"{hashlib.sha256(labels).hexdigest()[:8]}-{fingerprint_of_images(pixels)}"


def read_training_images(settings: Recipe, inputs: ImageInputs) -> TrainingData:
    """Open the training images and hold random ones out.

    Raises BadInput if there are fewer than two, or if the model does not have one of the labels.
    """
    images, labels = inputs.training_images()
    if len(images) < 2:
        raise BadInput(f"{images.source} has {len(images)} images, and training needs at least two", field="dataset")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.calibrate.seed))
    held_out = count_held_out(settings, len(images), MOST_IMAGES_HELD_OUT)
    chosen = order[held_out:]

    def part(numbers: Tensor) -> TrainingImages:
        return TrainingImages(images, labels, inputs.transform, numbers)

    train, watched = part(chosen), part(order[:held_out]) if held_out else None
    return TrainingData(
        train, watched, images.source, train.fingerprint(), batch_size=_BATCH_SIZE, accumulate=1, loss=image_loss
    )


def image_loss(model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy of a classifier with the labels, an `Objective`.

    Computed here, since the loss of the models writes the problem type into their configuration.
    """
    return label_loss(model(pixel_values=inputs["pixel_values"]).logits, inputs["labels"])
