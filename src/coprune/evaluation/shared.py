"""How the processes of a run share an evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from coprune.base.processes import Processes
from coprune.data import EvaluationText
from coprune.evaluation.batches import cut_windows
from coprune.evaluation.measurement import Perplexity
from coprune.evaluation.perplexity import aggregate


def shared_perplexity(
    processes: Processes, text: EvaluationText, seqlen: int, measure: Callable[[EvaluationText], Perplexity]
) -> Perplexity:
    """Measure every window of a text in one of the processes. measure: perplexity on a text of whole windows."""
    if processes.size == 1:
        return measure(text)
    windows, sizes = cut_windows(text.tokens, seqlen), cut_windows(text.token_bytes, seqlen)
    own = EvaluationText(
        processes.share(windows).reshape(-1), processes.share(sizes).reshape(-1), text.fingerprint, text.source
    )
    nll = measure(own).losses() if len(own.tokens) else torch.zeros(0, dtype=torch.float64)
    return aggregate(torch.cat(processes.gather(nll)), seqlen, sizes)
