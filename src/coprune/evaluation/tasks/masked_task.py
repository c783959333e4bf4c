"""Masked language models: pseudo-perplexity on windows of plain text with the tokenizer's special tokens around them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from coprune.base.errors import BadInput
from coprune.base.progress import Advance, Reporter
from coprune.base.words import Set
from coprune.data.text import NOTHING
from coprune.data.windows import EvaluationText
from coprune.evaluation.batches import slices
from coprune.evaluation.measurement import Perplexity
from coprune.evaluation.perplexity import aggregate
from coprune.evaluation.tasks.task import Walked, joined, scored
from coprune.evaluation.tasks.text_task import TextInputs

MASKED_APART = 7
"""One token in this many is masked, about the 15 % that such models are trained with."""


class PseudoPerplexity:
    """Pseudo-perplexity (arXiv 1910.14659), with one token in seven masked at a time."""

    name = "Pseudo-perplexity"
    figures: tuple[str, ...] = ("perplexity",)

    def __init__(self, inputs: TextInputs) -> None:
        self._inputs, self._inside = inputs, inputs.marks.inside(inputs.seqlen)

    def evaluation(self, reporter: Reporter) -> dict[str, EvaluationText]:
        if self._inputs.recipe.evaluate.perplexity and self._inputs.loaded.tokenizer is not None:
            self._mask()
        return self._inputs.evaluation("Pseudo-perplexity is", reporter, self._inputs.opened)

    def _mask(self) -> int:
        loaded = self._inputs.loaded
        mask = None if loaded.tokenizer is None else loaded.tokenizer.mask_token_id
        if not isinstance(mask, int):
            lacks = f"the tokenizer of {loaded.source} has no token that masks another"
            raise BadInput(lacks, field="evaluate", fix=("measure nothing with ", Set("evaluate", False)))
        return mask

    def measure(self, data: EvaluationText, advance: Advance, walked: Walked | None = None) -> Perplexity:
        inputs, mask, positions = self._inputs, self._mask(), torch.arange(self._inputs.seqlen)
        text = (positions >= self._inside.start) & (positions < self._inside.stop)
        turns = [text & (positions % MASKED_APART == turn) for turn in range(MASKED_APART)]
        own = inputs.own_batches(data.tokens, inputs.vocabulary)
        parts = ((batch.masked_fill(where, mask), (batch, where)) for batch in own for where in turns)
        progress = advance, MASKED_APART * sum(map(len, own))
        found = scored(inputs.loaded, parts, lambda logits, beside: _masked_nll(logits, *beside), progress, walked)
        # Every batch has seven scores, which together cover each token once.
        sums = [sum(found[i + 1 : i + MASKED_APART], found[i]) for i in range(0, len(found), MASKED_APART)]
        count = int(text.sum())
        nll = joined(inputs.processes, sums) / count
        return aggregate(nll, inputs.seqlen).model_copy(update={"masked": True, "tokens": len(nll) * count})

    def masked_at_random(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Mask one token in seven at random; return the windows (N × S int64), and the masked tokens with `NOTHING` elsewhere."""
        seeded = torch.Generator().manual_seed(self._inputs.recipe.calibrate.seed)
        there = torch.rand(windows.shape, generator=seeded) < 1 / MASKED_APART
        there[:, : self._inside.start] = there[:, self._inside.stop :] = False
        return windows.masked_fill(there, self._mask()), windows.masked_fill(~there, NOTHING)


def _masked_nll(logits: Tensor, original: Tensor, where: Tensor) -> Tensor:
    """Return the summed negative log likelihood of each window's masked tokens in nats: B float64, on the CPU.

    logits: B × S × vocabulary; original: B × S int64; where: the masked positions, S bool.
    """
    found = []
    for rows, targets in zip(logits[:, where.to(logits.device)], original[:, where].to(logits.device), strict=True):
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for part in slices(rows):
            loss = functional.cross_entropy(rows[part].to(torch.float32), targets[part], reduction="none")
            total += loss.sum(dtype=torch.float64)
        found.append(total)
    return torch.stack(found).cpu()
