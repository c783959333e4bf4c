"""Score a model on items: one value per item and metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coprune.base.files import write_durably
from coprune.base.patterns import is_found
from coprune.fitting.reader import POSITIONS, READ, Reader
from coprune.fitting.tasks import Item, Task
from coprune.fitting.writing import is_sound

Scores = dict[str, float]
ANSWER_TOKENS = 32
_LIKELIEST, _DRAWN = 1024, 64
"""Number of likeliest tokens kept of a distribution, and number sampled from the rest to represent it."""
_LEAST = 1e-9
DENSE_SOUND = "dense sound"
"""Score of the dense model, stored with that of the candidate."""


@dataclass
class DenseAnswers:
    """The dense model's answers to items and its token probabilities, by the task's key and the item's index."""

    ids: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    """The token that ended an answer, if one did."""
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """Token ids, positions × tokens int32: for each position the likeliest, then the sampled ones."""
    shares: dict[str, Tensor] = field(default_factory=dict)
    """Probabilities of these tokens, float32."""

    def add(self, reader: Reader, task: Task, place: int) -> None:
        """Generate the dense model's answer to an item."""
        before, key = _before(reader, task.items[place]), item_key(task, place)
        self.ids[key], end = reader.write(before, ANSWER_TOKENS)
        if end is not None:
            self.ends[key] = end
        (rows,) = reader.along(before, [self.positions(key)])
        shares = rows.exp()
        likeliest = shares.topk(min(_LIKELIEST, shares.shape[1]), dim=1).indices
        if shares.shape[1] > _LIKELIEST:
            rest = shares.scatter(1, likeliest, 0.0) + torch.finfo().tiny
            drawn = rest.multinomial(_DRAWN, replacement=True, generator=torch.Generator().manual_seed(place))
            likeliest = torch.cat([likeliest, drawn], dim=1)
        self.tokens[key], self.shares[key] = likeliest.int(), shares.gather(1, likeliest)

    def positions(self, key: str) -> list[int]:
        """Return the tokens of an answer, including the one that ends it."""
        return [*self.ids[key], *([self.ends[key]] if key in self.ends else [])]

    def save(self, file: Path) -> None:
        """Write the answers to a file, atomically."""
        tensors = {f"{key} ids": torch.tensor(ids, dtype=torch.int32) for key, ids in self.ids.items()}
        tensors |= {f"{key} end": torch.tensor([end], dtype=torch.int32) for key, end in self.ends.items()}
        tensors |= {f"{key} tokens": one.contiguous() for key, one in self.tokens.items()}
        tensors |= {f"{key} shares": one.contiguous() for key, one in self.shares.items()}
        write_durably(file, lambda temporary: save_file(tensors, temporary))

    @classmethod
    def load(cls, file: Path) -> DenseAnswers:
        """Read answers from a file."""
        found = cls()
        for name, tensor in load_file(file).items():
            key, _, part = name.partition(" ")
            if part == "ids":
                found.ids[key] = tensor.tolist()
            elif part == "end":
                found.ends[key] = int(tensor)
            else:
                getattr(found, part)[key] = tensor
        return found


def score_item(reader: Reader, task: Task, place: int, dense: DenseAnswers | None) -> Scores:
    """Score a model on one item.

    Args:
        reader: the model.
        task: the items.
        place: index of the item.
        dense: the dense model's answers; needed for prompts.

    Returns:
        A score for every metric of the task's kind.
    """
    item = task.items[place]
    if task.kind == "choice":
        return {"accuracy": float(_chosen(reader, item) == item.answer)}
    if task.kind == "answer":
        return {"accuracy": float(is_right(item, answer_text(reader, item)))}
    if task.kind == "text":
        return {"bits": bits_per_byte(reader, item.text)}
    assert dense is not None
    found = _closeness(reader, item, item_key(task, place), dense)
    return found if task.kind == "prompts" else found | _soundness(reader, item, item_key(task, place), dense)


def item_key(task: Task, place: int) -> str:
    """Return a name of an item that is unique across tasks."""
    return f"{task.key}/{place}"


def _before(reader: Reader, item: Item) -> list[int]:
    return reader.ids(item.prompt) or reader.begin


def _soundness(reader: Reader, item: Item, key: str, dense: DenseAnswers) -> Scores:
    """Score whether the text that a model writes is sound, and whether the dense model's is."""
    ids, end = reader.write(_before(reader, item), ANSWER_TOKENS)
    dense_ended = key in dense.ends
    sound = is_sound(ids, end is not None, dense_ended)
    return {"sound": float(sound), DENSE_SOUND: float(is_sound(dense.ids[key], dense_ended, dense_ended))}


def _chosen(reader: Reader, item: Item) -> str:
    """Return the likeliest choice, by log probability per byte."""
    space = "" if not isinstance(item.prompt, str) or item.prompt.endswith((" ", "\n")) else " "
    before = reader.all_ids(item.prompt)
    wholes = [reader.all_ids(item.prompt, space + choice) for choice in item.choices]
    shared = min(_common(before, whole) for whole in wholes)
    if shared == 0:
        wholes, shared = [[*reader.begin, *whole] for whole in wholes], len(reader.begin)
    # The same start for all choices, so that they can be compared.
    start = min(shared - 1, max(0, max(map(len, wholes)) - POSITIONS))
    found = reader.log_likelihood(wholes[0][start:shared], [whole[shared : start + POSITIONS] for whole in wholes])
    scores = [one / len(choice.encode()) for one, choice in zip(found, item.choices, strict=True)]
    return item.choices[scores.index(max(scores))]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two lists, without the last token of the second."""
    most = min(len(one), len(other) - 1)
    return next((place for place in range(most) if one[place] != other[place]), most)


def answer_text(reader: Reader, item: Item) -> str:
    """Generate a model's answer to an item."""
    line = (lambda text: False) if item.regex else (lambda text: "\n" in text.lstrip())
    return reader.text(reader.write(_before(reader, item), ANSWER_TOKENS, line).ids)


def is_right(item: Item, text: str) -> bool:
    """Return whether an answer is right: it matches the item's pattern, or its first line is the expected answer.

    Case, surrounding spaces and a final full stop are ignored.
    """
    if item.regex:
        return is_found(item.regex, text)
    first, *_ = text.strip().splitlines() or [""]
    return first.strip().rstrip(".").casefold() == item.answer.rstrip(".").casefold()


def bits_per_byte(reader: Reader, text: str) -> float:
    """Return the bits per byte of a text; a long one is read in pieces."""
    ids = reader.all_ids(text)
    before, after = (reader.begin, ids) if reader.begin and ids[:1] != reader.begin else (ids[:1], ids[1:])
    pieces = [after[start : start + READ] for start in range(0, len(after), READ)]
    found = sum(reader.log_likelihood(before, [piece])[0] for piece in pieces)
    return -found / math.log(2) / len(text.encode())


def _closeness(reader: Reader, item: Item, key: str, dense: DenseAnswers) -> Scores:
    """Compare the distributions of the next token along the dense model's answer, including its end."""
    ids = dense.positions(key)
    before, after = _before(reader, item), _own_ids(reader, ids)
    accepted = kl = 0.0
    if after:
        (rows,) = reader.along(before, [after])
        tokens = dense.tokens[key][: len(after)].long()
        expected = dense.shares[key][: len(after)].double()
        found = _of_old(rows.exp(), reader.old_ids, int(tokens.max())).gather(1, tokens).double()
        weights = torch.ones_like(expected)
        if tokens.shape[1] > _LIKELIEST:
            # For sampled tokens the mean of x / p is an unbiased estimate of the sum of x over the rest.
            rest = (1 - expected[:, :_LIKELIEST].sum(1, keepdim=True)).clamp_min(0)
            weights[:, _LIKELIEST:] = rest / _DRAWN / expected[:, _LIKELIEST:].clamp_min(1e-30)
        accepted = float((weights * torch.minimum(expected, found)).sum())
        ratio = expected.clamp_min(1e-30) / found.clamp_min(_LEAST)
        kl = float((weights * expected * ratio.log()).sum())
    lost = len(ids) - len(after)
    return {
        "acceptance": min(1.0, accepted / len(ids)),
        "kl": max(0.0, kl - lost * math.log(_LEAST)) / len(ids),
    }


def _own_ids(reader: Reader, ids: Sequence[int]) -> list[int]:
    """Convert the dense model's token ids to this model's, up to the first token that it lacks."""
    if reader.old_ids is None:
        return [*ids]
    new = {int(old): place for place, old in enumerate(reader.old_ids)}
    found = []
    for old in ids:
        if old not in new:
            break
        found.append(new[old])
    return found


def _of_old(shares: Tensor, old_ids: Tensor | None, largest: int) -> Tensor:
    """Return probabilities indexed by the dense model's ids; 0 for removed tokens."""
    if old_ids is None:
        return shares
    whole = torch.zeros(len(shares), max(largest, int(old_ids.max())) + 1)
    whole[:, old_ids] = shares[:, : len(old_ids)]
    return whole
