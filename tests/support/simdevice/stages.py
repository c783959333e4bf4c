"""Device operations of every stage, compared with allowed ones: python -m support.simdevice.stages [--write].

`counts.json` has the allowed counts; --write updates them after intended changes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import coprune
from coprune.base.reading import reading_later
from coprune.model.matrices import find_matrices
from coprune.model.walk.inputs import Inputs, InputSample
from coprune.model.walk.statistics import Gram, InputMoments, InputNorm
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver, prune_matrix
from coprune.pruning.refine import REFINEMENTS
from coprune.recipe.pattern import Target, parse_pattern
from support.pico_folder import save_pico
from support.simdevice import NAME
from support.simdevice.cases.case import SETTINGS
from support.simdevice.compile_device import missing
from support.simdevice.counting import KINDS, counted
from support.simdevice.run_cases import prepare

TABLE = Path(__file__).with_name("counts.json")
PATTERNS = ("unstructured", "2:4")
ROWS, WIDTH, TOKENS = 64, 256, 512
# Limits for loops that end on convergence, so that rounding does not affect the counts.
CUT_OFF: dict[str, dict[str, int]] = {"alps": {"rounds": 12}, "dsnot": {"cycles": 4}, "swaps": {"steps": 2}}
FEW = ("llama wanda 2:4", "llama sparsegpt 2:4")
"""The runs counted in every test run; `make devices` counts all."""
Counts = dict[str, int]


def solved(solve: Callable[[], object]) -> Counts:
    """Count solving a matrix, including deferred reads with the matrix's report."""

    def work() -> None:
        with reading_later():
            solve()

    return counted(work)


def inputs(seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    """Return inputs of a matrix, T × I on the device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(TOKENS, width, generator=generator) * torch.linspace(0.5, 2.0, width)).to(NAME)


def gram(width: int = WIDTH) -> Gram:
    statistic = Gram(width, torch.device(NAME))
    statistic.update(inputs(width=width))
    return statistic


def weight() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(NAME)


def statistics() -> Iterator[tuple[str, Counts]]:
    """Count adding a batch of inputs to each statistic."""
    for kind in (InputNorm, InputMoments, Gram):
        statistic, x = kind(WIDTH, torch.device(NAME)), inputs()
        yield f"{kind.__name__}: a batch", counted(partial(statistic.update, x))


def methods() -> Iterator[tuple[str, Counts]]:
    """Count pruning a matrix by each method; work shared by matrices with the same inputs counts for the first."""
    for name, plain in METHODS.items():
        method: Any = replace(plain, **CUT_OFF.get(name, {}))
        for pattern in PATTERNS:
            statistic, target = gram(), Target(parse_pattern(pattern), 0.5)
            for which in ("first matrix", "another matrix"):
                dense = weight()
                yield (
                    f"{name} {pattern}: {which}",
                    solved(partial(method.prune, dense, statistic, target)),
                )


def refinements() -> Iterator[tuple[str, Counts]]:
    """Count each refinement of a pruned matrix."""
    for name, plain in REFINEMENTS.items():
        refinement: Any = replace(plain, **CUT_OFF.get(name, {}))
        for pattern in PATTERNS:
            statistic, target, dense = gram(), Target(parse_pattern(pattern), 0.5), weight()
            start = METHODS["wanda"].prune(dense, statistic, target)
            yield (
                f"{name} {pattern}: a matrix",
                solved(partial(refinement.refine, dense, start, statistic, target)),
            )


def whole_matrices() -> Iterator[tuple[str, Counts]]:
    """Count the whole work on a matrix: read, prune, write, measure, record."""
    for name, pattern in (("magnitude", "2:4"), ("wanda", "unstructured"), ("wanda", "2:4"), ("sparsegpt", "2:4")):
        yield f"{name} {pattern}: a matrix and its report", whole_matrix(name, pattern, WIDTH)
    for name in ("wanda", "sparsegpt"):
        yield f"{name} 2:4: a matrix and its report, twice as wide", whole_matrix(name, "2:4", 2 * WIDTH)


def whole_matrix(name: str, pattern: str, width: int) -> Counts:
    layer = torch.nn.Linear(width, ROWS, bias=False, device=NAME).requires_grad_(False)
    (matrix,) = find_matrices(torch.nn.ModuleList([layer]))
    sample = InputSample(width, 1, torch.device(NAME))
    sample.update(inputs(width=width))
    known, target = Inputs(gram(width), sample), Target(parse_pattern(pattern), 0.5)
    return counted(partial(prune_matrix, matrix, known, Solver(METHODS[name]), target, True))


def blocks(names: Container[str] | None = None) -> Iterator[tuple[str, Counts]]:
    """Count a block of a run from folder to folder: the difference between models of three and two blocks."""
    runs: dict[str, dict[str, Any]] = {
        "llama wanda 2:4": {"method": "wanda", "pattern": "2:4"},
        "llama sparsegpt 2:4": {"method": "sparsegpt", "pattern": "2:4"},
        "llama wanda 2:4, twice as many batches": {"method": "wanda", "pattern": "2:4", "batch_size": 1},
        "llama sparsegpt 2:4, twice as many batches": {"method": "sparsegpt", "pattern": "2:4", "batch_size": 1},
        "llama sparsegpt 2:4 sequential": {"method": "sparsegpt", "pattern": "2:4", "propagation": "sequential"},
        "llama wanda, perplexity too": {"method": "wanda", "evaluate": True, "eval_data": SETTINGS["dataset"]},
        "mixtral wanda": {"family": "mixtral", "method": "wanda"},
    }
    for name, settings in runs.items():
        if names is not None and name not in names:
            continue
        few, many = (run_of(number, **settings) for number in (2, 3))
        yield f"{name}: a block", {kind: many[kind] - few[kind] for kind in KINDS}


def run_of(
    number: int,
    *,
    count: Callable[[Callable[[], object]], dict[str, int]] = counted,
    family: str = "llama",
    **settings: Any,
) -> dict[str, int]:
    """Count a streamed run of a model with a number of blocks. count: counts some work."""
    prune: Any = coprune.prune
    with scratch() as folder:
        source = save_pico(folder / "source", family, num_hidden_layers=number)
        given = {**SETTINGS, "device": NAME, "stream": True, "gate": False, **settings}
        return count(lambda: prune(source, save_model=folder / "target", **given))


@contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="simulated-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def count_all(names: Container[str] | None = None) -> dict[str, Counts]:
    """Return every stage's counts. names: of the runs whose blocks are counted, all by default."""
    parts = (statistics, methods, refinements, whole_matrices, partial(blocks, names))
    return {stage: counts for part in parts for stage, counts in part()}


def allowed() -> dict[str, Counts]:
    """Return every stage's allowed counts; those of operators depend on PyTorch, so other versions are not compared."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    kinds = [kind for kind in KINDS if kind != "launch" or table["torch"] == torch_version()]
    return {stage: {kind: counts[kind] for kind in kinds} for stage, counts in table["stages"].items()}


def torch_version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def write(stages: dict[str, Counts]) -> None:
    """Record the present counts as allowed."""
    rows = ",\n".join(f"    {json.dumps(stage)}: {json.dumps(counts)}" for stage, counts in stages.items())
    TABLE.write_text(f'{{\n  "torch": "{torch_version()}",\n  "stages": {{\n{rows}\n  }}\n}}\n', encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="let every stage ask for what it asks for now")
    options = parser.parse_args()
    if reason := missing():
        print(reason)
        return 0
    prepare()
    found = count_all()
    if options.write:
        write(found)
    else:
        for stage, counts in found.items():
            print(f"{stage:45}", "  ".join(f"{counts[kind]:6} {kind}" for kind in KINDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
