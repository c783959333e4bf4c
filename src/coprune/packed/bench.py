"""What packing brings on this machine: prefill and decoding, dense against packed, in turns within one process."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from coprune.base.devices import describe, in_host_memory
from coprune.base.errors import BadInput
from coprune.base.native.build import instruction_set
from coprune.model.opened import refuse_what_loading_decides
from coprune.packed.accelerate import accelerate
from coprune.packed.benched import Bench, Row
from coprune.packed.linear import pack_linears
from coprune.packed.registration import register_with_transformers
from coprune.packed.semi_structured import can_convert, semi_structured_linear
from coprune.packed.timing import Clock, Timing, measure_bandwidth, summarise, time_in_turns, time_once


@dataclass(frozen=True)
class Work:
    """What is timed: sequences at a time, tokens of the prompt, decoding steps, and how often each prefill is done."""

    batches: Sequence[int] = (1, 4)
    prompt: int = 128
    tokens: int = 24
    repeats: int = 5

    def __post_init__(self) -> None:
        if min(self.prompt, self.tokens, self.repeats, *self.batches) < 1:
            raise BadInput("batches, prompt, tokens and repeats must be at least 1")


class LoadArguments(TypedDict, total=False):
    """How a model is loaded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: str


def bench(
    model: Path | str | PreTrainedModel,
    batches: Sequence[int] = (1, 4),
    *,
    prompt: int = 128,
    tokens: int = 24,
    repeats: int = 5,
    **loading: Unpack[LoadArguments],
) -> Bench:
    """Measure prefill and decoding of a pruned causal language model in every form that this device has.

    The forms take turns; the first, dense, is the baseline.

    Args:
        model: a checkpoint folder, dense or packed, or a model in memory, which is not changed.
        batches: sequences at a time.
        prompt: tokens of the prompt, which decoding attends to as well.
        tokens: decoding steps per form.
        repeats: of each prefill.
        loading: `dtype` and `device` (by default the checkpoint's and the CPU) of a model that is loaded.

    Returns:
        Times, tokens per second and speed-ups of every form, and what each takes in memory.

    Raises:
        BadInput: the folder is no checkpoint, or a number is not positive.
    """
    work = Work(batches, prompt, tokens, repeats)
    if isinstance(model, PreTrainedModel):
        refuse_what_loading_decides(loading)
        name, dense = model.name_or_path or type(model).__name__, model
    else:
        name, dense = str(model), _load(Path(model), loading)
    training = dense.training
    try:
        return bench_model(dense.eval(), name, work)
    finally:
        dense.train(training)


def _load(folder: Path, loading: LoadArguments) -> Any:
    if not (folder / "config.json").exists():
        raise BadInput(
            f"{folder} has no config.json", field="model", value=folder, fix="give a checkpoint folder, dense or packed"
        )
    register_with_transformers()
    config = AutoConfig.from_pretrained(folder)
    dense: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=loading.get("dtype", "auto"))
    return dense.to(loading.get("device", "cpu")).eval()


@torch.no_grad()
def bench_model(dense: Any, name: str, work: Work, clock: Clock = time.perf_counter) -> Bench:
    """The same for a model in memory, which is not changed. clock: see time_in_turns."""
    forms = make_forms(dense)
    on_cpu = in_host_memory(dense.device)
    result = Bench(
        model=name,
        device=describe(dense.device),
        threads=torch.get_num_threads(),
        dtype=str(dense.dtype).removeprefix("torch."),
        instruction_set=instruction_set(),
        bandwidth=measure_bandwidth(clock=clock) if on_cpu else 0.0,
        bytes={form: weight_bytes(model) for form, model in forms.items()},
    )
    generator = torch.Generator().manual_seed(0)
    for batch in work.batches:
        vocabulary = dense.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (batch, work.prompt), generator=generator).to(dense.device)
        prefills = {form: partial(_prefill, model, ids) for form, model in forms.items()}
        prefill = time_in_turns(prefills, work.repeats, clock)
        decode = _time_decoding(forms, ids, work.tokens, clock)
        result.rows += _rows("prefill", batch, batch * work.prompt, prefill)
        result.rows += _rows("decode", batch, batch, decode)
    return result


def make_forms(dense: nn.Module) -> dict[str, Any]:
    """The model itself and copies of it in every form that this device has. Weights that stay dense are shared."""
    forms: dict[str, Any] = {"dense": dense}
    packed = share_weights(dense)
    if pack_linears(packed):
        forms["packed"] = packed
    accelerated = share_weights(dense)
    if any(choice.kind != "dense" for choice in accelerate(accelerated)):
        forms["accelerated"] = accelerated
    semi_structured = share_weights(dense)
    convertible = [
        (name, module)
        for name, module in semi_structured.named_modules()
        if type(module) is nn.Linear and can_convert(module)
    ]
    for name, module in convertible:
        semi_structured.set_submodule(name, semi_structured_linear(module))
    if convertible:
        forms["semi-structured"] = semi_structured
    return forms


def share_weights(model: nn.Module) -> Any:
    """A copy of the modules that holds the same parameters."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def _prefill(model: Any, ids: Tensor) -> None:
    model(ids, use_cache=True, logits_to_keep=1)


def _time_decoding(forms: dict[str, Any], ids: Tensor, tokens: int, clock: Clock) -> dict[str, Timing]:
    """Every form decodes the same tokens, one step of each in turn."""
    caches: dict[str, dict[str, DynamicCache]] = {}
    for form, model in forms.items():
        caches[form] = {_cache_argument(model): DynamicCache(config=model.config)}
        model(ids, **caches[form], logits_to_keep=1)
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    step = ids[:, -1:]
    for _ in range(tokens):
        calls: dict[str, Callable[[], object]] = {
            form: partial(model, step, **caches[form]) for form, model in forms.items()
        }
        for form, call in calls.items():
            seconds[form].append(time_once(call, clock))
    return {form: summarise(values[1:] or values) for form, values in seconds.items()}


def _cache_argument(model: Any) -> str:
    """transformers renamed the argument in 5.2x and warns about the old name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _rows(phase: str, batch: int, tokens: int, timings: dict[str, Timing]) -> list[Row]:
    dense = timings["dense"].median
    return [
        Row(phase, form, batch, timing, tokens / timing.median, dense / timing.median)
        for form, timing in timings.items()
    ]
