"""Measure tokens per second of models on this machine: folders in transformers, GGUF files in llama.cpp.

The models take turns in one process, so that other work on the machine affects all of them alike. Only ratios are meaningful.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from coprune.base.devices import describe
from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, unknown_name
from coprune.base.words import Sheet, Shown
from coprune.gguf_files.llama_cpp import LlamaCpp, require_llama_cpp
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import GgufFile, locate
from coprune.model.checkpoint.shards import shard_files
from coprune.model.generation import positions_of
from coprune.recipe.parts import DtypeName

Clock = Callable[[], float]


@dataclass(frozen=True)
class Speed:
    """Tokens per second: median and quartiles over the repeats."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the median with its quartiles."""
        return f"{self.median:.1f} ({self.low:.1f}–{self.high:.1f})"


@dataclass(frozen=True)
class Row:
    """A model and its speed."""

    model: str
    runtime: str
    """Runtime and type of the weights."""
    file_bytes: int
    """Bytes of the files with weights."""
    memory_bytes: int
    """Bytes of the weights in memory."""
    prefill: Speed
    """Speed of reading a whole prompt at once."""
    decode: Speed
    """Speed of generating one sequence, token by token."""


@dataclass(repr=False)
class Bench(Shown):
    """Speed of models on this machine."""

    device: str
    threads: int
    prompt: int
    """Tokens of the prompt."""
    rows: list[Row]

    def headline(self) -> str:
        """Return the models and the decoding speed of the first."""
        names = ", ".join(Path(row.model).name for row in self.rows)
        return f"{names}: {self.rows[0].decode.median:.1f} tokens/s, {self.threads} threads, {self.device}"

    def sheet(self) -> Sheet:
        """Return a row per model."""
        first = self.rows[0]
        rows = [
            (
                row.model,
                row.runtime,
                f"{row.file_bytes / 1e6:.1f}",
                f"{row.memory_bytes / 1e6:.1f}",
                str(row.prefill),
                str(row.decode),
                f"{row.decode.median / first.decode.median:.2f}×",
            )
            for row in self.rows
        ]
        columns = (
            "model",
            "runtime",
            "MB on disk",
            "MB in memory",
            "prefill tokens/s",
            "decode tokens/s",
            "to the first",
        )
        return Sheet(f"{self.threads} threads, {self.device}, prompt of {self.prompt} tokens", rows, columns)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


class _Runner(Protocol):
    runtime: str
    bytes: int
    vocabulary: int

    def prefill(self, ids: Tensor) -> None:
        """Read a prompt with an empty cache: 1 × T int64."""
        ...

    def step(self, token: Tensor) -> None:
        """Read one more token: 1 × 1 int64."""
        ...


class _InTransformers:
    def __init__(self, model: Any, positions: int) -> None:
        limit = positions_of(model)
        if limit is not None and positions > limit:
            cause = f"prompt and generated tokens take {positions} positions, and the model has {limit}"
            raise BadInput(cause, field="prompt", value=positions, fix="use fewer")
        self._model, self._argument = model, cache_argument(model)
        self._cache: Cache | None = None
        self.bytes = weight_bytes(model)
        self.runtime = f"transformers {str(model.dtype).removeprefix('torch.')}"
        self.vocabulary = model.config.get_text_config().vocab_size

    def prefill(self, ids: Tensor) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._model(ids, **{self._argument: self._cache}, logits_to_keep=1)

    def step(self, token: Tensor) -> None:
        self._model(token, **{self._argument: self._cache})


class _InLlamaCpp:
    def __init__(self, file: Path, positions: int) -> None:
        require_llama_cpp(f"{file} is run in llama.cpp", "model", str(file))
        self._model = LlamaCpp(file, positions + 1)
        self.bytes, self.vocabulary = self._model.bytes, self._model.vocabulary
        self.runtime = f"llama.cpp {self._model.type}"

    def prefill(self, ids: Tensor) -> None:
        self._model.forget()
        self._model.read(ids[0].tolist())

    def step(self, token: Tensor) -> None:
        self._model.read(token[0].tolist())


@torch.no_grad()
def bench(
    models: Path | str | Sequence[Path | str],
    *,
    prompt: int = 128,
    tokens: int = 24,
    repeats: int = 5,
    dtype: DtypeName = "auto",
    busy: bool = False,
) -> Bench:
    """Measure prefill and decoding speed of one sequence on the CPU, with torch's number of threads.

    Args:
        models: Hub ids, folders and `smollm2-135m`, which run in transformers, and GGUF files, which run in llama.cpp.
        prompt: number of tokens in the prompt, which decoding attends to.
        tokens: number of decoding steps.
        repeats: number of prefills.
        dtype: of the weights in transformers; by default the checkpoint's.
        busy: measure the processor time of one thread instead of wall time, for a machine with other work.

    Returns:
        Tokens per second and bytes of every model.

    Raises:
        BadInput: a model does not exist, llama.cpp is not installed, or a number is not positive.
    """
    if not all(isinstance(number, Integral) and number >= 1 for number in (prompt, tokens, repeats)):
        raise BadInput("prompt, tokens and repeats must be whole numbers of at least 1")
    if dtype not in get_args(DtypeName):
        raise unknown_name("dtype", str(dtype), get_args(DtypeName), field="dtype")
    if busy and torch.get_num_threads() != 1:
        cause = "processor time is only meaningful with one thread"
        raise BadInput(cause, field="busy", value=busy, fix="set OMP_NUM_THREADS=1")
    listed = [models] if isinstance(models, str | Path) else [*models]
    if not listed:
        raise BadInput("no model is named", field="model")
    entered = [_enter(model, prompt + tokens, dtype) for model in listed]
    clock = time.process_time if busy else time.perf_counter
    vocabulary = min(runner.vocabulary for _, _, runner in entered)
    # Random tokens: their values do not affect the time.
    ids = torch.randint(0, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    runners = [runner for _, _, runner in entered]
    for runner in runners:
        runner.prefill(ids)
    read = _in_turns([partial(runner.prefill, ids) for runner in runners], repeats, clock)
    wrote = _in_turns([partial(runner.step, ids[:, -1:]) for runner in runners], tokens, clock)
    rows = [
        Row(name, runner.runtime, size, runner.bytes, _speed(before, prompt), _speed(after, 1))
        for (name, size, runner), before, after in zip(entered, read, wrote, strict=True)
    ]
    return Bench(describe(torch.device("cpu")), torch.get_num_threads(), prompt, rows)


def _enter(model: Path | str, positions: int, dtype: DtypeName) -> tuple[str, int, _Runner]:
    """Load a model in its runtime, and return its name, the bytes of its files, and the runner."""
    path = expand_home(model)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path.name, path.stat().st_size, _InLlamaCpp(path, positions)
    location = locate(model)
    files = [location.path] if isinstance(location, GgufFile) else shard_files(location.path)
    loaded = load_model(location, dtype, processed=False)[0]
    size = sum(file.stat().st_size for file in files)
    return path.name if path.is_dir() else str(model), size, _InTransformers(loaded, positions)


def _in_turns(calls: Sequence[Callable[[], None]], repeats: int, clock: Clock) -> list[list[float]]:
    """Return the seconds of each call over `repeats` rounds in which the calls take turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, own in zip(calls, seconds, strict=True):
            started = clock()
            call()
            own.append(clock() - started)
    return seconds


def _speed(seconds: Sequence[float], tokens: int) -> Speed:
    if len(seconds) < 2:
        return Speed(*[tokens / seconds[0]] * 3)
    slow, median, fast = (tokens / one for one in reversed(statistics.quantiles(seconds, n=4, method="inclusive")))
    return Speed(median, slow, fast)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers, counting shared ones once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def cache_argument(model: Any) -> str:
    """Return the name of the cache argument, which transformers renamed in 5.2x."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
