"""Calibration windows drawn as the authors draw them, by a generator that draws the numbers of `random.seed(seed)`."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.words import Setting
from coprune.data.text import LOCAL_FILE_HINT


def draw_windows(ids: list[int], nsamples: int, seqlen: int, seed: int, source: str = "the text") -> Tensor:
    """Draw windows of consecutive tokens whose starts are uniform: nsamples × seqlen int64.

    Raises BadInput if there are not more than seqlen tokens.
    """
    # The published code never uses the last possible start, hence one token more than a window.
    require_length(len(ids), seqlen + 1, source)
    generator = random.Random(seed)
    stream = torch.tensor(ids, dtype=torch.int64)
    starts = [generator.randint(0, len(ids) - seqlen - 1) for _ in range(nsamples)]
    return torch.stack([stream[start : start + seqlen] for start in starts])


def draw_from_documents(
    documents: list[str],
    tokenise: Callable[[str], list[int]],
    nsamples: int,
    seqlen: int,
    seed: int,
    source: str = "the text",
) -> Tensor:
    """Draw random documents until one has more than seqlen tokens, take a random window of it, for every sample.

    Returns nsamples × seqlen int64. The published code may draw a document again, which among its 356,317 hardly
    happens; here a document is used once, so that a smaller pool gives no repeated samples.
    Raises BadInput if fewer than nsamples documents are long enough.
    """
    generator = random.Random(seed)
    drawn: set[int] = set()
    windows: list[Tensor] = []
    while len(windows) < nsamples:
        if len(drawn) == len(documents):
            raise BadInput(
                f"only {len(windows)} of the {len(documents)} documents read from {source} are longer than {seqlen} "
                f"tokens, fewer than the {nsamples} samples asked for",
                fix=("ask for fewer samples with ", Setting("nsamples"), " or shorter ones with ", Setting("seqlen")),
            )
        index = generator.randint(0, len(documents) - 1)
        if index in drawn:
            continue
        drawn.add(index)
        ids = tokenise(documents[index])
        if len(ids) > seqlen:
            start = generator.randint(0, len(ids) - seqlen - 1)
            windows.append(torch.tensor(ids[start : start + seqlen], dtype=torch.int64))
    return torch.stack(windows)


def require_length(tokens: int, needed: int, source: str) -> None:
    """Raise BadInput if a text has fewer tokens than are needed."""
    if tokens < needed:
        raise BadInput(
            f"{source} is too short: it has {tokens} tokens, and one sample needs {needed}",
            fix=("take more text, or shorter samples with ", Setting("seqlen"), f". {LOCAL_FILE_HINT}"),
        )
