"""Answer generation, and the divergence from the dense model along its answers."""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.errors import CopruneError, UnsupportedModel
from coprune.base.precision import total
from coprune.base.progress import Reporter
from coprune.evaluation.answers.answer_records import Along, Answered, Answers
from coprune.evaluation.answers.questions import SEED, Plan, Questions
from coprune.evaluation.batches import bootstrap_interval, inference_logits, slices
from coprune.evaluation.closeness import log_probabilities, summed_kl
from coprune.model.checkpoint.digest import model_digest
from coprune.model.checkpoint.locate import locate
from coprune.model.generation import Generation, generate
from coprune.model.loaded_model import choose_device
from coprune.model.walk.block_calls import forward_logits, input_device
from coprune.recipe.parts import ModelPart
from coprune.store.store import Key, key_of

_BATCH = 16


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    reporter: Reporter,
    batch_size: int | None = None,
) -> Answers:
    """Generate a model's answers, greedy and, if planned, sampled.

    Args:
        model: in memory; not changed.
        tokenizer: its tokenizer.
        questions: the prompts, as token ids.
        reporter: its bar advances by token.
        batch_size: prompts per batch (default: 16).

    Returns:
        One answer per prompt, greedy and sampled.

    Raises:
        UnsupportedModel: transformers cannot generate text with the model.
    """
    found = [_ask(model, tokenizer, questions, 0.0, reporter, batch_size or _BATCH)]
    if (temperature := questions.plan.temperature) > 0:
        found.append(_ask(model, tokenizer, questions, temperature, reporter, batch_size or _BATCH))
    return Answers(greedy=found[0], sampled=found[1] if len(found) > 1 else (), chat=questions.chat)


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    temperature: float,
    reporter: Reporter,
    batch_size: int,
) -> tuple[Answered, ...]:
    settings = Generation(
        max_new_tokens=questions.new_tokens,
        temperature=temperature,
        seed=SEED,
        batch_size=batch_size,
        end_ids=questions.ends,
        pad_id=questions.pad,
    )
    way = f"sampled at {temperature:g}" if temperature else "greedy"
    with reporter.bar(f"Answers, {way}", len(questions.ids) * questions.new_tokens) as advance:
        try:
            answers = generate(model, [list(ids) for ids in questions.ids], settings, advance)
        except ValueError as error:  # for example hybrids without any attention left
            if isinstance(error, CopruneError):
                raise
            raise UnsupportedModel(f"transformers cannot generate text with {type(model).__name__}: {error}") from error
    return tuple(
        Answered(
            # Drop the end token, which not every tokenizer marks as special.
            text=str(tokenizer.decode(answer.tokens[: -1 if answer.ended else None], skip_special_tokens=True)),
            tokens=tuple(answer.tokens),
            ended=answer.ended,
        )
        for answer in answers
    )


def rows_along(model: PreTrainedModel, questions: Questions, answers: Answers) -> Iterator[Tensor]:
    """Yield a model's logits at every predicted token of the dense model's greedy answers.

    Args:
        model: in memory.
        questions: the prompts.
        answers: the dense model's answers to them.

    Yields:
        For every answer with tokens: tokens × vocabulary, in the model's dtype, on its device.
    """
    device = input_device(model)
    for prompt, answer in zip(questions.ids, answers.greedy, strict=True):
        if not answer.tokens:
            continue
        text = torch.tensor([[*prompt, *answer.tokens]], dtype=torch.int64, device=device)
        # One by one, so that neither padding nor other answers affect the logits.
        with inference_logits(model):
            logits = forward_logits(model, text, last=len(answer.tokens) + 1)
        yield logits[0, -len(answer.tokens) - 1 : -1]


def divergence(dense: Iterable[Tensor], rows: Iterable[Tensor]) -> Along:
    """Return the mean KL(dense ‖ other) and Σ min(dense, other) of the next-token distributions along answers.

    Args:
        dense: the dense model's logits, per answer: tokens × vocabulary.
        rows: the other model's, likewise.

    Returns:
        Means over answers with intervals; infinite KL if the other model's output is NaN.
    """
    kl, accepted = torch.stack([_closeness(one, other) for one, other in zip(dense, rows, strict=True)]).unbind(1)
    if bool(kl.isnan().any()):
        return Along(kl=math.inf, interval=None, acceptance=0.0)
    return Along(
        # Rounding can make the divergence of equal distributions negative.
        kl=max(0.0, float(kl.mean())),
        interval=bootstrap_interval(kl),
        acceptance=min(1.0, float(accepted.mean())),
        acceptance_interval=bootstrap_interval(accepted),
    )


def _closeness(dense: Tensor, rows: Tensor) -> Tensor:
    """Return the means of KL and acceptance over one answer's tokens: 2 float64, on the CPU."""
    sums = torch.zeros(2, dtype=torch.float64)
    for part in slices(dense):
        expected, found = (log_probabilities(one[part], rows.device) for one in (dense, rows))
        accepted = total(torch.minimum(expected, found).exp())
        sums += torch.stack([summed_kl(expected, found), accepted]).cpu()
    return sums / len(dense)


class KeptRows:
    """Logits of a model that is about to change, in an anonymous file, since they may not fit in memory."""

    def __init__(self, rows: Iterable[Tensor]) -> None:
        self._file = tempfile.TemporaryFile(prefix="coprune-logits-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []
        for one in rows:
            self._kinds.append((one.shape, one.dtype))
            self._file.write(one.contiguous().cpu().view(torch.uint8).numpy().data)

    def __iter__(self) -> Iterator[Tensor]:
        self._file.seek(0)
        for shape, dtype in self._kinds:
            raw = bytearray(self._file.read(shape.numel() * dtype.itemsize))
            yield torch.frombuffer(raw, dtype=dtype).view(shape)


def answers_key(fingerprint: str, asked: ModelPart, plan: Plan, **more: str) -> Key:
    """Return the store key of answers, or of measurements along them: all that determines them except the batch size.

    Args:
        fingerprint: of the model's files, including the tokenizer's.
        asked: settings of the model.
        plan: the prompts and settings.
        more: anything else that determines the result.
    """
    facts = {
        "model": fingerprint,
        "dtype": asked.dtype,
        "device": choose_device(asked.device).type,  # resolves "auto"
        "prompts": plan.prompts.fingerprint,
        "new_tokens": plan.new_tokens,
        "temperature": plan.temperature,
        "seed": SEED,
        **more,
        "versions": [importlib.metadata.version(package) for package in ("torch", "transformers")],
    }
    return key_of("answers", 3, **facts)


def key_of_files(model: ModelPart, plan: Plan, **more: str) -> Key:
    """Return the store key of the answers of a model in files, which are read for it.

    Args:
        model: names the model.
        plan: the prompts and settings.
        more: anything else that determines the answers.
    """
    return answers_key(model_digest(locate(model.name, model.cache_dir).path), model, plan, **more)
