"""Generate answers to prompts of token ids, in batches, with transformers' `generate` and its cache.

transformers draws random numbers for all rows of a batch from one generator, so a sampled answer would depend on the others in
its batch. Here every prompt has its own random numbers, from the seed and the prompt's index, and a logits processor turns them
into tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.progress import Advance
from coprune.model.checkpoint.load import evaluating
from coprune.model.walk.block_calls import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    """Settings of generation."""

    max_new_tokens: int = 256
    """Maximum number of tokens in an answer, further limited by the model's positions."""
    temperature: float = 1.0
    """Logits are divided by this before sampling; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Tokens are sampled from the likeliest ones whose probabilities sum up to this."""
    seed: int = 0
    batch_size: int = 16
    """Number of prompts in a batch."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""
    pad_id: int = 0
    """The token that pads shorter prompts of a batch; masked."""


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt."""

    tokens: list[int]
    """Token ids without the prompt, including the end token if the model ended the answer."""
    ended: bool
    """Whether the model ended the answer."""


def generate(
    module: PreTrainedModel, prompts: Sequence[list[int]], settings: Generation, advance: Advance | None = None
) -> list[Answer]:
    """Generate answers to prompts, independent of the batch size up to rounding.

    Args:
        module: a language model in memory, on any device. Its own generation settings are ignored, and restored afterwards.
        prompts: token ids, at least one each, fewer than the model's positions.
        settings: of the generation.
        advance: called with the number of new tokens.

    Returns:
        One answer for every prompt, in order.

    Raises:
        BadInput: a prompt is empty, or leaves no position for an answer.
        UnsupportedModel: the model does not generate text.
    """
    if not module.can_generate():
        raise UnsupportedModel(f"{type(module).__name__} does not generate text")
    room = _room(module, prompts)
    answers: dict[int, Answer] = {}
    with _plain(module):
        for batch, most in _batches(module, prompts, settings, room):
            found = _answer_batch(module, [prompts[i] for i in batch], batch, settings, most, advance)
            answers.update(zip(batch, found, strict=True))
    return [answers[i] for i in range(len(prompts))]


def positions_of(module: PreTrainedModel) -> int | None:
    """Return a model's number of positions for prompt and answer; None without a known limit."""
    config: Any = module.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 0
    return int(limit) if int(limit) > 0 else None


def _room(module: PreTrainedModel, prompts: Sequence[list[int]]) -> int | None:
    """Return the model's positions. Raises BadInput for a prompt that is empty or fills all of them."""
    limit = positions_of(module)
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise BadInput(f"prompt {number} has no tokens")
        if limit is not None and len(prompt) >= limit:
            longer = f"prompt {number} has {len(prompt)} tokens, but the model has only {limit} positions for it and its answer"
            raise BadInput(longer, fix="shorten it")
    return limit


def _batches(
    module: PreTrainedModel, prompts: Sequence[list[int]], settings: Generation, room: int | None
) -> Iterator[tuple[list[int], int]]:
    """Yield batches of prompts by index, with the maximum length of their answers; long prompts first.

    Prompts without room for a full answer, and all prompts of a model without a mask, share batches only with others of their
    length.
    """
    masked = _masks(module)
    groups: dict[tuple[int, int], list[int]] = {}
    for place in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        length = len(prompts[place])
        new_tokens = settings.max_new_tokens if room is None else min(settings.max_new_tokens, room - length)
        alone = new_tokens < settings.max_new_tokens or not masked
        groups.setdefault((new_tokens, length if alone else 0), []).append(place)
    for (new_tokens, _), places in groups.items():
        for start in range(0, len(places), settings.batch_size):
            yield places[start : start + settings.batch_size], new_tokens


def _answer_batch(
    module: PreTrainedModel,
    prompts: Sequence[list[int]],
    places: Sequence[int],
    settings: Generation,
    new_tokens: int,
    advance: Advance | None,
) -> list[Answer]:
    device, longest = input_device(module), max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), settings.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    processors = LogitsProcessorList()
    if settings.temperature > 0:
        processors.append(_Draw(settings, _numbers(settings.seed, places, new_tokens, device), longest))
    options: dict[str, Any] = {"attention_mask": mask.to(device)} if _masks(module) else {}
    try:
        written: Tensor = cast(Any, module.generate)(
            tokens.to(device),
            generation_config=_configuration(settings, new_tokens),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([] if advance is None else [_Heard(settings, longest, advance)]),
            **options,
        )
    except (AttributeError, KeyError, TypeError) as error:  # the class reads something that its configuration lacks
        raise UnsupportedModel(f"{type(module).__name__} cannot generate: {error!r}") from error
    return [_cut(row, settings.end_ids) for row in written[:, longest:].tolist()]


def _masks(module: PreTrainedModel) -> bool:
    """Return whether a model takes an attention mask for padding."""
    return "attention_mask" in signature(module.forward).parameters


def _cut(tokens: list[int], end_ids: Iterable[int]) -> Answer:
    """Cut a row of tokens after its end token."""
    ends = set(end_ids)
    for place, token in enumerate(tokens):
        if token in ends:
            return Answer(tokens[: place + 1], True)
    return Answer(tokens, False)


def _configuration(settings: Generation, new_tokens: int) -> GenerationConfig:
    how: dict[str, Any] = dict(eos_token_id=list(settings.end_ids) or None, pad_token_id=settings.pad_id)
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, use_cache=True, **how)


@contextmanager
def _plain(module: PreTrainedModel) -> Iterator[None]:
    """Put a model in evaluation mode and clear its generation settings (penalties, top-k …) in the body."""
    own = module.generation_config
    module.generation_config = GenerationConfig()
    # The head gets a batch's last positions, a strided view. For that torch may copy the head's weight once per row (in
    # bfloat16 on a CPU, with unaligned weights of a mapped file).
    hook = (module.get_output_embeddings() or nn.Identity()).register_forward_pre_hook(_without_gaps)
    try:
        with evaluating(module), torch.no_grad():
            yield
    finally:
        hook.remove()
        module.generation_config = own


def _without_gaps(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)


def _numbers(seed: int, places: Sequence[int], new_tokens: int, device: torch.device) -> Tensor:
    """Return uniform numbers in [0, 1) for sampling: prompts × new tokens float64, determined by seed and prompt index."""
    rows = []
    for place in places:
        # The generator scrambles its seed, so that neighbouring ones are independent.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**63)
        rows.append(torch.rand(new_tokens, dtype=torch.float64, generator=generator))
    return torch.stack(rows).to(device)


class _Draw(LogitsProcessor):
    """Samples a token and masks all others, so that greedy decoding takes it."""

    def __init__(self, settings: Generation, numbers: Tensor, start: int) -> None:
        self._settings, self._numbers, self._start = settings, numbers, start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        number = self._numbers[:, input_ids.shape[1] - self._start, None]
        probability = (scores.to(torch.float64) / self._settings.temperature).softmax(-1)
        tokens = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        if self._settings.top_p < 1:  # else the order does not matter, and sorting takes longer than the head
            probability, tokens = probability.sort(descending=True)
            probability = probability.where(probability.cumsum(-1) - probability < self._settings.top_p, 0)
        up_to = probability.cumsum(-1)
        # The first token at which the cumulative sum exceeds the number's share.
        drawn = (up_to <= number * up_to[:, -1:]).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.gather(1, drawn), 0.0)


class _Heard(StoppingCriteria):
    """Never stops; reports the number of generated tokens."""

    def __init__(self, settings: Generation, start: int, advance: Advance) -> None:
        self._ends = torch.tensor(settings.end_ids, dtype=torch.int64)
        self._start, self._advance = start, advance

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ended = torch.isin(input_ids[:, self._start : -1], self._ends.to(input_ids.device)).any(dim=1)
        self._advance(float((~ended).sum()))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def ends_of(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[int, ...]:
    """Return the end tokens of the tokenizer, the generation settings and the configuration."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    # Some nested text configurations lack it.
    return ends_among(tokenizer.eos_token_id, own, getattr(model.config.get_text_config(), "eos_token_id", None))


def ends_among(*said: Any) -> tuple[int, ...]:
    """Return the distinct end tokens. said: ids, lists of ids, or None, as tokenizers and configurations have them."""
    found = [end for one in said for end in (one if isinstance(one, list | tuple) else [one])]
    return tuple(dict.fromkeys(end for end in found if isinstance(end, int)))


def padding_token(pad: Any, ends: Sequence[int]) -> int:
    """Choose the padding token: the tokenizer's, else an end token, else the first token."""
    return pad if isinstance(pad, int) else next(iter(ends), 0)
