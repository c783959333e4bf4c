"""Models in the runtimes that are installed, each of which reads a prompt and then goes on token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from coprune.base.errors import BadInput
from coprune.gguf_files.llama_cpp import LlamaCpp, require_llama_cpp
from coprune.model.generation import positions_of
from coprune.packed.compiled import compile_decoding
from coprune.packed.timing import Clock, Timing, summarise, time_in_turns, time_once


@dataclass(frozen=True)
class Work:
    """Workload of a benchmark: batch sizes, prompt length, decoding steps, repeats of each prefill."""

    batches: Sequence[int] = (1, 4)
    prompt: int = 128
    tokens: int = 24
    repeats: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.batches, str) or not isinstance(self.batches, Iterable):
            listed = "list sequences at a time, as in [1, 4]"
            raise BadInput(f"the batches cannot be {self.batches!r}", field="batches", value=self.batches, fix=listed)
        numbers = (self.prompt, self.tokens, self.repeats, *self.batches)
        if not all(isinstance(number, Integral) and number >= 1 for number in numbers):
            raise BadInput("batches, prompt, tokens and repeats must be whole numbers of at least 1")


def require_positions(model: Any, work: Work) -> None:
    """Raise BadInput where a model in transformers has fewer positions than prompt and decoding take."""
    limit = positions_of(model)
    if limit is not None and work.prompt + work.tokens > limit:
        cause = f"{work.prompt} tokens of the prompt and {work.tokens} more are above the model's {limit} positions"
        raise BadInput(cause, field="prompt", value=work.prompt, fix="take fewer")


class Runner(Protocol):
    """A model in one runtime, with the tokens that it has read."""

    bytes: int
    """Bytes of its weights in memory."""

    def prefill(self, ids: Tensor) -> None:
        """Read a prompt from its beginning: B × T int64."""
        ...

    def step(self, token: Tensor) -> None:
        """Read one more token: B × 1 int64."""
        ...


class InTransformers:
    """A model of transformers in memory; with `context`, its step is compiled, on a cache of so many tokens."""

    def __init__(self, model: Any, context: int | None = None) -> None:
        self._model, self._context = model, context
        self._cache: dict[str, Cache] = {}
        self.bytes = weight_bytes(model)
        if context is not None:
            compile_decoding(model)

    def prefill(self, ids: Tensor) -> None:
        config, size = self._model.config, self._context
        cache = DynamicCache(config=config) if size is None else StaticCache(config=config, max_cache_len=size)
        self._cache = {cache_argument(self._model): cache}
        self._model(ids, **self._cache, logits_to_keep=1)

    def step(self, token: Tensor) -> None:
        self._model(token, **self._cache)


class InLlamaCpp:
    """A GGUF file in llama.cpp, one sequence at a time, with as many threads as torch has."""

    def __init__(self, file: Path, context: int) -> None:
        require_llama_cpp(f"{file} is run in llama.cpp", "model", str(file))
        self._model = LlamaCpp(file, context)
        self.bytes, self.type = self._model.bytes, self._model.type
        self.vocabulary = self._model.vocabulary

    def prefill(self, ids: Tensor) -> None:
        if len(ids) > 1:
            raise BadInput("llama.cpp is measured with one sequence at a time", field="batches", value=len(ids))
        self._model.forget()
        self._model.read(ids[0].tolist())

    def step(self, token: Tensor) -> None:
        self._model.read(token[0].tolist())


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def cache_argument(model: Any) -> str:
    """Return the name of the cache argument, which transformers renamed in 5.2x."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def random_prompt(vocabulary: int, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Return random tokens, batch × length int64; their values do not affect the time."""
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


@dataclass(frozen=True)
class Turns:
    """Timings of several runners, by name."""

    prefill: dict[str, Timing]
    decode: dict[str, Timing]
    first: dict[str, float]
    """Seconds of the first decoding step, which waits for a compiler where there is one; it is not part of `decode`."""


def time_runners(runners: Mapping[str, Runner], ids: Tensor, work: Work, clock: Clock) -> Turns:
    """Time a prefill and decoding steps in turns; all runners read the same tokens."""
    prefill = time_in_turns({name: partial(one.prefill, ids) for name, one in runners.items()}, work.repeats, clock)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    step = ids[:, -1:]
    for _ in range(work.tokens):
        for name, one in runners.items():
            seconds[name].append(time_once(partial(one.step, step), clock))
    first = {name: values[0] for name, values in seconds.items()}
    return Turns(prefill, {name: summarise(values[1:] or values) for name, values in seconds.items()}, first)
