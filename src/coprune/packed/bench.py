"""What packing brings on this machine: prefill and decoding, dense against packed, in turns within one process."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args, get_type_hints

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from coprune.base.devices import describe, in_host_memory
from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, unknown_name
from coprune.base.native.build import instruction_set
from coprune.model.checkpoint.load import explained, require_all_weights
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.shards import checkpoint_entries
from coprune.model.evaluating import evaluating
from coprune.model.opened import choose_device, refuse_what_loading_decides
from coprune.packed.accelerate import accelerate
from coprune.packed.benched import Bench
from coprune.packed.beside import bench_beside
from coprune.packed.linear import pack_linears
from coprune.packed.registration import register_with_transformers
from coprune.packed.runtimes import InTransformers, Work, random_prompt, require_positions, time_runners
from coprune.packed.semi_structured import convert_linears
from coprune.packed.timing import Clock, measure_bandwidth


class BenchArguments(TypedDict, total=False):
    """How a model is loaded and run."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: str
    compile: bool
    """Also with a compiled decoding step, which takes half a minute for thirty blocks before its first token."""


_MEASURING = ("prompt", "tokens", "repeats", "busy")
_DTYPES = get_args(get_type_hints(BenchArguments)["dtype"])


def bench(
    model: Path | str | PreTrainedModel | Sequence[Path | str],
    batches: Sequence[int] | None = None,
    *,
    prompt: int = 128,
    tokens: int = 24,
    repeats: int = 5,
    busy: bool = False,
    **how: Unpack[BenchArguments],
) -> Bench:
    """Measure prefill and decoding: of a pruned causal language model in every form that this device has, or of several models.

    The forms of one model take turns; the first, dense, is the baseline. So do several models in the runtimes that are installed,
    each compared with the first in the same runtime: GGUF files that are named as files run in llama.cpp, all others in
    transformers.

    Args:
        model: a checkpoint folder, dense or packed, or a model in memory, which is not changed; or a list of folders, names and
            GGUF files.
        batches: sequences at a time; by default 1 and 4 of one model, 1 of several.
        prompt: tokens of the prompt, which decoding attends to as well.
        tokens: decoding steps per form.
        repeats: of each prefill.
        busy: count the processor's time of one thread instead of the clock's, for a machine that does other things meanwhile.
        how: `dtype` and `device` (by default the checkpoint's and the CPU) of a model that is loaded; `compile=True` adds the
            forms with a compiled decoding step (of several models, those in transformers have it).

    Returns:
        Times, tokens per second and speed-ups of every form, and what each takes in memory.

    Raises:
        BadInput: the folder is no whole checkpoint of a language model, or a number is not positive.
    """
    for name in how:
        if name not in BenchArguments.__annotations__:
            raise unknown_name("setting", name, [*BenchArguments.__annotations__, *_MEASURING], field=name)
    several = not isinstance(model, str | Path | PreTrainedModel)
    work = Work(batches or ((1,) if several else (1, 4)), prompt, tokens, repeats)
    clock, compiles = _clock(busy), how.pop("compile", False)
    if not isinstance(model, str | Path | PreTrainedModel):
        if how.get("device", "cpu") != "cpu":
            raise BadInput("several models are measured on the CPU", field="device", value=how["device"])
        for one in model:
            if not isinstance(one, str | Path):
                held = f"several models are measured from their files, and one is a {type(one).__name__}"
                raise BadInput(held, field="model", fix="save it and name the folder, or measure it by itself")
        return bench_beside(model, work, how.get("dtype", "auto"), compiles=compiles, clock=clock)
    if isinstance(model, PreTrainedModel):
        refuse_what_loading_decides(how)
        name, dense = model.name_or_path or type(model).__name__, model
    else:
        name, dense = str(model), _load(expand_home(model), how)
    with evaluating(dense):
        return bench_model(dense, name, work, compiles=compiles, clock=clock)


def _clock(busy: bool) -> Clock:
    if busy and torch.get_num_threads() != 1:
        raise BadInput(
            "the processor's time tells what one thread takes",
            field="busy",
            value=busy,
            fix="let torch have one: OMP_NUM_THREADS=1",
        )
    return time.process_time if busy else time.perf_counter


def _load(folder: Path, how: BenchArguments) -> Any:
    if not (folder / "config.json").exists():
        raise BadInput(
            f"{folder} has no config.json", field="model", value=folder, fix="give a checkpoint folder, dense or packed"
        )
    if (dtype := how.get("dtype", "auto")) not in _DTYPES:
        raise unknown_name("dtype", str(dtype), _DTYPES, field="dtype")
    device = choose_device(how.get("device", "cpu"))
    checkpoint_entries(folder)  # of a damaged file transformers says neither cause nor fix
    register_with_transformers()
    with explained(ModelFolder(folder, str(folder))):
        config = AutoConfig.from_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    dense, info = loaded
    require_all_weights(str(folder), info["missing_keys"])
    return dense.to(device).eval()


@torch.no_grad()
def bench_model(
    dense: Any, name: str, work: Work, *, compiles: bool = False, clock: Clock = time.perf_counter
) -> Bench:
    """The same for a model in memory, which is not changed. clock: see time_in_turns."""
    require_positions(dense, work)
    forms = make_forms(dense)
    fast = next((form for form in ("accelerated", "packed") if form in forms), "dense")
    compiled = {f"{form}, compiled": share_weights(forms[form]) for form in ("dense", fast)} if compiles else {}
    runners = {form: InTransformers(model) for form, model in forms.items()}
    runners |= {form: InTransformers(model, work.prompt + work.tokens) for form, model in compiled.items()}
    on_cpu = in_host_memory(dense.device)
    result = Bench(
        model=name,
        device=describe(dense.device),
        threads=torch.get_num_threads(),
        dtype=str(dense.dtype).removeprefix("torch."),
        instruction_set=instruction_set(),
        bandwidth=measure_bandwidth(clock=clock) if on_cpu else 0.0,
        bytes={form: runner.bytes for form, runner in runners.items()},
    )
    generator = torch.Generator().manual_seed(0)
    for batch in work.batches:
        if compiles:
            torch.compiler.reset()  # it compiles few sizes at a time, and those of other batches come no more
        vocabulary = dense.config.get_text_config().vocab_size
        ids = random_prompt(vocabulary, batch, work.prompt, generator).to(dense.device)
        turns = time_runners(runners, ids, work, clock)
        result.add_turns(batch, work.prompt, turns, compiled)
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
    if convert_linears(semi_structured):
        forms["semi-structured"] = semi_structured
    return forms


def share_weights(model: nn.Module) -> Any:
    """A copy of the modules that holds the same parameters and buffers."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)
