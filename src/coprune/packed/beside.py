"""Several models beside each other in the runtimes that are installed: a large one and what became of it, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coprune.base.devices import describe
from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.native.build import instruction_set
from coprune.model.checkpoint.load import DtypeName, load_model
from coprune.model.checkpoint.locate import GgufFile, ModelFolder, is_packed, locate
from coprune.model.checkpoint.shards import shard_files
from coprune.packed.accelerate import accelerate
from coprune.packed.benched import Bench
from coprune.packed.quantizer import load_packed
from coprune.packed.registration import register_with_transformers
from coprune.packed.runtimes import (
    InLlamaCpp,
    InTransformers,
    Runner,
    Work,
    random_prompt,
    require_positions,
    time_runners,
)
from coprune.packed.timing import Clock, measure_bandwidth


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
        """What the tables call it."""
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
        raise BadInput("two of the models have one name and runtime", field="model", fix="rename one")
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
    # Kept packed, which is what is to be measured; what loads a folder for other work unpacks it.
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
