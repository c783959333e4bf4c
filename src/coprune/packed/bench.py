"""Benchmark of packing on this machine: prefill and decoding, dense against packed, in turns within one process."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args, get_type_hints

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from coprune.base.devices import describe, in_host_memory
from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, unknown_name
from coprune.base.native.build import instruction_set
from coprune.base.words import Sheet, Shown
from coprune.model.checkpoint.load import DtypeName, evaluating, explained, load_model, require_all_weights
from coprune.model.checkpoint.locate import GgufFile, ModelFolder, is_packed, locate
from coprune.model.checkpoint.shards import shard_files
from coprune.model.checkpoint.source_encoding import checkpoint_entries
from coprune.model.loaded_model import choose_device, refuse_what_loading_decides
from coprune.packed.accelerate import accelerate
from coprune.packed.linear import pack_linears
from coprune.packed.quantizer import load_packed
from coprune.packed.registration import register_with_transformers
from coprune.packed.runtimes import (
    InLlamaCpp,
    InTransformers,
    Runner,
    Turns,
    Work,
    random_prompt,
    require_positions,
    time_runners,
)
from coprune.packed.semi_structured import convert_linears
from coprune.packed.timing import Clock, Timing, measure_bandwidth


class BenchArguments(TypedDict, total=False):
    """How a model is loaded and run."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: str
    compile: bool
    """Whether to time a compiled decoding step too, which takes half a minute for thirty blocks before its first token."""


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
            "processor time is only meaningful with one thread",
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
    """Benchmark a model in memory, which is not changed. clock: see time_in_turns."""
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
    """Return the model and copies in every form that this device has. Dense weights are shared."""
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
    """Copy the modules with shared parameters and buffers."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


NO_GAIN = 1.03


@dataclass(frozen=True)
class Row:
    """One timing: a form of the model, at one batch size, in one phase."""

    phase: str
    """prefill (a whole prompt at once) or decode (one token per sequence)."""
    form: str
    """dense, packed (every layer that shrinks), accelerated (where a measurement wins) or semi-structured, some of them
    compiled; where several models were measured, one of them in one runtime."""
    batch: int
    seconds: Timing
    """Seconds of one forward pass."""
    tokens_per_second: float
    speedup: float
    """Median time of the baseline over this one's."""

    @property
    def milliseconds(self) -> str:
        """Median and quartiles, for people."""
        seconds = self.seconds
        return f"{seconds.median * 1e3:.2f} ({seconds.low * 1e3:.2f}–{seconds.high * 1e3:.2f})"


@dataclass(repr=False)
class Bench(Shown):
    """All timings of `bench` on this machine."""

    model: str
    device: str
    threads: int
    dtype: str
    instruction_set: str
    bandwidth: float
    """Bytes per second, measured; 0 where it was not (GPU)."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of each form's weights in memory."""
    rows: list[Row] = field(default_factory=list)
    baselines: dict[str, str] = field(default_factory=dict)
    """Baseline of each form: dense by default."""
    compiling: dict[str, float] = field(default_factory=dict)
    """Seconds that the first step of each compiled form took, at the first batch size."""
    files: dict[str, int] = field(default_factory=dict)
    """Bytes on the disk of each form's weights, where several models were measured."""

    def baseline(self, form: str) -> str:
        """Return the name of the form that another is compared with."""
        return self.baselines.get(form, "dense")

    @property
    def reference(self) -> str:
        """Name of the baseline of all ratios."""
        return "the first in the same runtime" if self.baselines else "dense"

    def gains(self, row: Row) -> bool:
        """Return whether a form is faster than its baseline, or is the baseline."""
        return row.form == self.baseline(row.form) or row.speedup >= NO_GAIN

    def add(self, phase: str, batch: int, tokens: int, timings: Mapping[str, Timing]) -> None:
        """Add the timings of a phase in every form. tokens: of all sequences, in one forward pass."""
        for form, timing in timings.items():
            speedup = timings[self.baseline(form)].median / timing.median
            self.rows.append(Row(phase, form, batch, timing, tokens / timing.median, speedup))

    def add_turns(self, batch: int, prompt: int, turns: Turns, compiled: Iterable[str]) -> None:
        """Add both phases of all forms at one batch size, and the compile times. prompt: tokens."""
        self.add("prefill", batch, batch * prompt, turns.prefill)
        self.add("decode", batch, batch, turns.decode)
        for form in compiled:
            self.compiling.setdefault(form, turns.first[form])

    def headline(self) -> str:
        """Return model, device, and the best speed-up of decoding."""
        best = max((row for row in self.rows if row.phase == "decode"), key=lambda row: row.speedup, default=None)
        speed = "" if best is None else f", decodes {best.speedup:.2f}× as fast {best.form} (batch {best.batch})"
        return f"{Path(self.model).name}: {self.dtype}, {self.threads} threads, {self.device}{speed}"

    def sheet(self) -> Sheet:
        """Return a row per measurement."""
        rows = [
            (
                row.phase,
                str(row.batch),
                row.form,
                row.milliseconds,
                f"{row.tokens_per_second:.1f}",
                f"{row.speedup:.2f}×",
            )
            for row in self.rows
        ]
        return Sheet(self.headline(), rows, ("phase", "batch", "form", "ms (quartiles)", "tokens/s", "speed-up"))

    def __str__(self) -> str:
        """Return a table, which says plainly where there is no gain."""
        lines = [f"{self.model}: {self.dtype}, {self.threads} threads, {self.device}, {self.instruction_set}"]
        wide = max(16, *map(len, self.bytes))
        for form, size in self.bytes.items():
            limit = f", memory allows {self.bandwidth / size:.1f} tokens/s" if self.bandwidth else ""
            share = f"{size / self.bytes[self.baseline(form)]:.2f} of {self.reference}"
            on_disk = f", {self.files[form] / 1e6:.1f} MB on the disk" if form in self.files else ""
            waited = f", compiled in {self.compiling[form]:.0f} s" if form in self.compiling else ""
            lines.append(f"{form:<{wide}} {size / 1e6:9.1f} MB in memory ({share}{limit}){on_disk}{waited}")
        lines.append(
            f"{'phase':<8} {'batch':>5} {'form':<{wide}} {'ms (quartiles)':>24} {'tokens/s':>9} {'speed-up':>9}"
        )
        for row in self.rows:
            verdict = "" if self.gains(row) else "  no gain here"
            lines.append(
                f"{row.phase:<8} {row.batch:>5} {row.form:<{wide}} {row.milliseconds:>24} {row.tokens_per_second:>9.1f} "
                f"{row.speedup:>8.2f}×{verdict}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the report."""
        return asdict(self)


@dataclass(frozen=True)
class Entrant:
    """A model in a runtime."""

    name: str
    kind: str
    """Runtime and type; the first of a kind is what the others of it are compared with."""
    runner: Runner
    file_bytes: int
    vocabulary: int

    @property
    def form(self) -> str:
        """Name in the tables."""
        return f"{self.name} in {self.kind}"


@torch.no_grad()
def bench_beside(
    models: Sequence[Path | str],
    work: Work,
    dtype: DtypeName = "auto",
    *,
    compiles: bool = False,
    clock: Clock = time.perf_counter,
) -> Bench:
    """Measure prefill and decoding of several models in turns, on the CPU.

    Args:
        models: Hub ids, folders and `smollm2-135m` run in transformers, GGUF files that are named as files in llama.cpp.
        work: what is timed; more than one sequence at a time only in transformers.
        dtype: of the weights in transformers.
        compiles: whether those in transformers decode with a compiled step.
        clock: see time_in_turns.

    Raises:
        BadInput: a model is not there, or llama.cpp is not installed.
    """
    entrants = [_enter(model, work, dtype, compiles) for model in models]
    first: dict[str, str] = {}
    for one in entrants:
        first.setdefault(one.kind, one.form)
    forms = {one.form: one for one in entrants}
    if len(forms) < len(entrants):
        raise BadInput("two of the models have the same name and runtime", field="model", fix="rename one")
    result = Bench(
        model=", ".join(dict.fromkeys(one.name for one in entrants)),
        device=describe(torch.device("cpu")),
        threads=torch.get_num_threads(),
        dtype=", ".join(dict.fromkeys(one.kind for one in entrants)),
        instruction_set=instruction_set(),
        bandwidth=measure_bandwidth(clock=clock),
        bytes={form: one.runner.bytes for form, one in forms.items()},
        baselines={form: first[one.kind] for form, one in forms.items()},
        files={form: one.file_bytes for form, one in forms.items()},
    )
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(one.vocabulary for one in entrants)
    for batch in work.batches:
        if compiles:
            torch.compiler.reset()  # it compiles few sizes at a time, and those of other batches come no more
        ids = random_prompt(vocabulary, batch, work.prompt, generator)
        runners = {
            form: one.runner for form, one in forms.items() if batch == 1 or isinstance(one.runner, InTransformers)
        }
        in_transformers = [form for form, runner in runners.items() if isinstance(runner, InTransformers)]
        turns = time_runners(runners, ids, work, clock)
        result.add_turns(batch, work.prompt, turns, in_transformers if compiles else [])
    return result


def _enter(model: Path | str, work: Work, dtype: DtypeName, compiles: bool) -> Entrant:
    path = expand_home(model)
    if path.suffix.lower() == ".gguf" and path.is_file():
        llama = InLlamaCpp(path, work.prompt + work.tokens + 1)
        return Entrant(path.name, f"llama.cpp {llama.type}", llama, path.stat().st_size, llama.vocabulary)
    register_with_transformers()
    location = locate(model)
    packed = isinstance(location, ModelFolder) and is_packed(location)
    # Kept packed for the measurement; other loaders unpack the folder.
    loaded: Any = (
        load_packed(location.path, dtype=dtype).eval() if packed else load_model(location, dtype, processed=False)[0]
    )
    require_positions(loaded, work)
    name = str(model) if not path.is_dir() else path.name
    kind = f"transformers {str(loaded.dtype).removeprefix('torch.')}"
    files = [location.path] if isinstance(location, GgufFile) else shard_files(location.path)
    size = sum(file.stat().st_size for file in files)
    vocabulary = loaded.config.get_text_config().vocab_size
    if packed:
        accelerate(loaded)  # what stayed dense may have a faster product
    kind += ", compiled" if compiles else ""
    runner = InTransformers(loaded, work.prompt + work.tokens if compiles else None)
    return Entrant(f"{name}, packed" if packed else name, kind, runner, size, vocabulary)
