"""Blocks removed by every score, without training: perplexity on two texts and KL to the dense model on the first.

    python benchmarks/blocks.py [--model smollm2-135m] [--samples 32] [--seqlen 512] [--tokens 5120] [--counts 3,6,9]

In one process, with the functions that `coprune prune --remove blocks=… --score …` calls. Prints lines as they are measured.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from coprune.data.windows import calibration_windows, evaluation_tokens
from coprune.model.blocks import Block, find_blocks
from coprune.model.loaded_model import open_model
from coprune.model.matrix_choice import choose_matrices
from coprune.model.walk.block_calls import forward_logits, replaced_forwards
from coprune.model.walk.model_structure import FoundModel, ProvenModel
from coprune.model.walk.prove import prove_replay
from coprune.recipe.choice import Choice
from coprune.recipe.parts import ModelPart
from coprune.removal.block_scores import BLOCK_SCORES, Going, block_score_named
from coprune.removal.maps import MapWalk, find_writers, spans_of
from coprune.run.calibrating import first_batches

TEXTS = ("embedded", "embedded-lambada")


def main() -> None:
    """Measure every score at every count and print a row for each."""
    asked = _options()
    loaded = open_model(ModelPart(name=asked.model), stream=False)
    tokenizer, module = loaded.tokenizer, loaded.model
    blocks = find_blocks(module)
    found = FoundModel(loaded.weights, blocks, choose_matrices(module, blocks))
    samples = calibration_windows("embedded", tokenizer, asked.samples, asked.seqlen, 0).tokens
    model = prove_replay(found, samples[:1])
    texts = [
        evaluation_tokens(name, tokenizer, asked.seqlen, limit_tokens=asked.tokens).tokens.view(-1, asked.seqlen)
        for name in TEXTS
    ]
    dense = [logits.log_softmax(-1).to(torch.bfloat16) for logits in _logits(model, texts[0])]
    print(f"{asked.model}, {asked.samples} × {asked.seqlen} tokens; dense {_figures(model, texts, dense)}", flush=True)
    batches = [*samples.split(4)]
    for score in asked.scores.split(","):
        chosen: Going | None = None
        for count in sorted(map(int, asked.counts.split(",")), reverse=True):
            started, own = time.perf_counter(), block_score_named(Choice.of(score))
            if chosen is None or score.startswith("map"):  # the others remove one block after another
                chosen = own.choose(model, batches, [count])
            going = Going(chosen.blocks[:count], chosen.mapped)
            seconds = time.perf_counter() - started
            with _without(model, going, batches):
                figures = _figures(model, texts, dense)
            print(f"{score:12} {count:3} {figures} {seconds:6.0f} s  {sorted(going.blocks)}", flush=True)


@contextmanager
def _without(model: ProvenModel, going: Going, batches: Sequence[Tensor]) -> Iterator[None]:
    """Skip some of the model's blocks within the `with` body."""
    with ExitStack() as ended:
        if going.mapped:
            spans, tokens = spans_of(going.blocks, going.mapped), block_score_named(Choice(name="map"))
            some = first_batches(batches, tokens.tokens)  # type: ignore[attr-defined]
            for found in MapWalk(model, find_writers(model), some).merged(spans).values():
                ended.enter_context(found.writers.merged(found.map))
        idle = [block for block in model.blocks if block.index in going.blocks]

        def passed(block: Block) -> object:
            return lambda hidden, *args, **kwargs: model.structure.answers[block.index].wrap(hidden)

        ended.enter_context(replaced_forwards(idle, passed))  # type: ignore[arg-type]
        yield


@torch.no_grad()
def _logits(model: ProvenModel, windows: Tensor) -> Iterator[Tensor]:
    yield from (forward_logits(model.module, window[None])[0].float() for window in windows)


def _figures(model: ProvenModel, texts: Sequence[Tensor], dense: Sequence[Tensor]) -> str:
    found, apart = [], 0.0
    for windows in texts:
        total = 0.0
        for number, logits in enumerate(_logits(model, windows)):
            log_q = logits.log_softmax(-1)
            total += float(torch.nn.functional.nll_loss(log_q[:-1], windows[number, 1:]))
            if windows is texts[0]:
                log_p = dense[number].float()
                apart += float(torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True))
        found.append(math.exp(total / len(windows)))
    return f"{found[0]:8.2f} {found[1]:8.2f}  KL {apart / len(texts[0]):.3f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=5120, help="of each text")
    parser.add_argument("--counts", default="3,6,9", help="numbers of blocks, comma-separated")
    parser.add_argument("--scores", default=",".join(BLOCK_SCORES), help="comma-separated")
    return parser.parse_args()


if __name__ == "__main__":
    main()
