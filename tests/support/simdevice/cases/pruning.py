"""Cases: methods on a matrix, and whole walks with all their settings."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import coprune
from coprune.base.kernels.ranks import rank_in_groups
from coprune.base.processes import Processes
from coprune.model.matrices import find_matrices, mask_bits, mask_checksum
from coprune.model.walk.inputs import BatchRows, Gathered
from coprune.model.walk.statistics import Gram
from coprune.pruning.methods import METHODS
from coprune.pruning.methods.base import Pruned
from coprune.pruning.refine import REFINEMENTS
from coprune.recipe.pattern import Target, parse_pattern
from support.pico import FAMILIES, MIXTURES
from support.pico_folder import save_pico, write_words
from support.saved import tensors_of
from support.simdevice import NAME
from support.simdevice.cases.case import NEAR, ROUNDED, Alike, Case, pruned_alike

PATTERNS = ("unstructured", "2:4", "4:8")
LOOSE = Alike(moved=0.05, distance=0.3)
"""Tolerance for alternations that depend on their own rounded results, and for as many inputs as tokens (gpt2)."""


def problem(device: str, rows: int = 64, width: int = 128, tokens: int = 512) -> tuple[torch.Tensor, Gram]:
    """Return a random weight and the statistic of random inputs, on a device."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(size, width, generator=generator) for size in (tokens, rows))
    inputs *= torch.linspace(0.5, 2.0, width)
    statistic = Gram(width, torch.device(device))
    statistic.update(inputs.to(device))
    return weight.to(device), statistic


def solved(device: str, method: str, pattern: str) -> Pruned:
    weight, statistic = problem(device)
    target = Target(parse_pattern(pattern), 0.5)
    found = METHODS[method].prune(weight, statistic, target)
    assert found.weight.device.type == found.keep.device.type == device
    return found


def on_a_matrix(names: tuple[str, ...], pattern: str) -> Any:
    def run(folder: Path) -> str:
        for name in names:
            cpu, device = (solved(place, name, pattern) for place in ("cpu", NAME))
            NEAR.compare({name: cpu.weight}, {name: device.weight})
            assert torch.equal(cpu.keep, device.keep.cpu()), name
        return f"{len(names)} methods, the same masks"

    return run


def refined(name: str, pattern: str) -> Any:
    def run(folder: Path) -> str:
        target, found = Target(parse_pattern(pattern), 0.5), {}
        for device in ("cpu", NAME):
            weight, statistic = problem(device)
            start = METHODS["magnitude"].prune(weight, None, target)
            found[device] = {name: REFINEMENTS[name].refine(weight, start, statistic, target).weight}
        return NEAR.compare(found["cpu"], found[NAME])

    return run


def methods() -> tuple[Case, ...]:
    """Return the cases of every method on a matrix, and in walks."""
    matrices = [Case(f"all methods {p}", on_a_matrix(tuple(METHODS), p), p != "4:8") for p in PATTERNS]
    refinements = [
        Case(f"refine {name} {p} on a matrix", refined(name, p), True)
        for name, p in product(("refit", "swaps"), ("unstructured", "2:4"))
    ]
    walks = [
        Case(
            f"{family} {method} {pattern} {propagation}",
            pruned_alike(
                family,
                method,
                LOOSE if family == "gpt2" or method in ("alps", "admm", "dsnot") else ROUNDED,
                pattern=pattern,
                propagation=propagation,
            ),
        )
        for family, method, pattern, propagation in product(
            ("llama", "gpt2", "mixtral"), METHODS, ("unstructured", "2:4"), ("block", "sequential", "dense")
        )
    ]
    return (*matrices, *refinements, *walks)


def refused(folder: Path) -> str:
    """Check that non-finite inputs are reported with their matrix, although they are checked late."""
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 4, device=NAME).requires_grad_(False) for _ in range(2)])
    matrices = list(find_matrices(layers, "block"))
    gathered = Gathered([[matrix] for matrix in matrices], Gram, [BatchRows()], Processes())
    for matrix, value in zip(matrices, (1.0, torch.inf), strict=True):
        gathered.see(0, matrix, torch.full((3, 8), value, device=NAME))
    with pytest.raises(coprune.NumericalError, match=r"block\.1: the activations hold NaN or infinite") as caught:
        next(gathered.take_all())
    return str(caught.value)


def checksums(folder: Path) -> str:
    """Compare the bits of a mask, packed on the device."""
    for shape in ((64, 128), (5, 7), (3, 3), (1, 8)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
        assert mask_checksum(weight.to(NAME)) == mask_checksum(weight), shape
        bits = np.packbits((weight != 0).numpy()).tolist()
        assert mask_bits(weight.to(NAME)).cpu().tolist() == bits, shape
    return "as on the CPU"


def large(_: Path) -> str:
    """Compare work that devices split differently: many groups ranked together, wide Gram matrices in panels."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 5, (5000, 4), generator=generator).float()
    assert torch.equal(rank_in_groups(groups.to(NAME)).cpu().long(), rank_in_groups(groups).long())
    x = torch.randn(16, 2112, generator=generator)
    found, wanted = (Gram(2112, torch.device(device)) for device in (NAME, "cpu"))
    found.update(x.to(NAME))
    wanted.update(x)
    torch.testing.assert_close(found.gram.cpu(), wanted.gram)
    return "as on the CPU"


def streamed(method: str, **settings: Any) -> Any:
    """Return a case that prunes from folder to folder, one block at a time on the device."""

    def run(folder: Path) -> str:
        source, texts = save_pico(folder / "source", num_hidden_layers=2), write_words(folder / "words.txt")
        common = dict(dataset=str(texts), nsamples=8, seqlen=32, batch_size=2, quiet=True, stream=True)
        found = {}
        for device in ("cpu", NAME):
            target = folder / device
            more = {**common, **settings}
            coprune.prune(
                source, method, device=device, save_model=target, eval_data=str(texts), eval_tokens=128, **more
            )
            found[device] = tensors_of(target)
        return NEAR.compare(found["cpu"], found[NAME])

    return run


def walks() -> tuple[Case, ...]:
    """Return the cases of a walk's settings."""
    common = [
        Case("streamed wanda", streamed("wanda"), True),
        Case("inputs that are not finite", refused, True),
        Case("checksums of masks", checksums, True),
        Case("many rows and columns", large, True),
        Case("streamed sparsegpt 2:4", streamed("sparsegpt", pattern="2:4", propagation="sequential")),
        Case(
            "sparsegpt 2:4 sequential",
            pruned_alike("llama", "sparsegpt", pattern="2:4", propagation="sequential"),
            True,
        ),
        # One round, since alternating between directions and masks would amplify rounding.
        Case("wanda dense", pruned_alike("llama", "wanda", propagation="dense"), True),
        Case("experts", pruned_alike("mixtral", "sparsegpt", ROUNDED), True),
        Case("permuted", pruned_alike("llama", "wanda", pattern="2:4", permute=True), True),
        Case("rotated", pruned_alike("llama", "sparsegpt", LOOSE, pattern="2:4", rotate=True)),
        Case(
            "lm_head too",
            pruned_alike("llama", "sparsegpt", include=["lm_head"], changes={"tie_word_embeddings": False}),
        ),
        Case("torch's loop", pruned_alike("llama", "sparsegpt", pattern="2:4", inner_loop="torch")),
    ]
    refinements = [
        Case(f"{family} refine {name}", pruned_alike(family, "wanda", LOOSE, pattern="2:4", refine=name))
        for family, name in product(("llama", "gpt2", "mixtral"), REFINEMENTS)
    ]
    trained = [
        Case(
            f"{family} reconstruct {dtype}",
            pruned_alike(
                family,
                "wanda",
                ROUNDED,
                propagation="block",
                reconstruct=3,
                reconstruct_dtype=dtype,
            ),
            (family, dtype) == ("llama", "float32"),
        )
        for family, dtype in product(("llama", "gpt2", "mixtral"), ("float32", "bfloat16"))
    ]
    return (*common, *refinements, *trained, *allocations(), *dtypes(), *pages())


def allocations() -> list[Case]:
    """Return the cases of uneven sparsity."""
    return [
        Case(
            f"{family} allocation {name}",
            pruned_alike(family, "wanda", ROUNDED, allocation=name),
            (family, name) == ("llama", "owl"),
        )
        for family, name in product(("llama", "gpt2", "mixtral"), ("owl", "fisher"))
    ]


def dtypes() -> list[Case]:
    """Return the cases of 16-bit weights."""
    return [
        Case(
            f"{str(dtype).removeprefix('torch.')} {method} {pattern}",
            pruned_alike("llama", method, ROUNDED, model_dtype=dtype, pattern=pattern),
            (dtype, method, pattern) == (torch.bfloat16, "sparsegpt", "2:4"),
        )
        for dtype, method, pattern in product(
            (torch.bfloat16, torch.float16), ("magnitude", "wanda", "sparsegpt"), ("unstructured", "2:4")
        )
    ]


def pages() -> list[Case]:
    """Return the cases of activations spilled to host memory and to a file."""
    rooms = ((0.0, 0.0), (2e-5, 2e-5), (0.0, None))  # nothing in either, one batch in each, and all in host memory
    return [
        Case(
            f"activations {there} there {here} here {propagation}",
            pruned_alike(
                "llama",
                "sparsegpt",
                pattern="2:4",
                propagation=propagation,
                device_activation_memory=there,
                activation_memory=here,
            ),
            (there, propagation) in ((0.0, "sequential"), (2e-5, "block")),
        )
        for (there, here), propagation in product(rooms, ("block", "sequential", "dense"))
    ]


def families() -> tuple[Case, ...]:
    """Return a case per family."""
    return tuple(
        Case(family, pruned_alike(family, "sparsegpt", ROUNDED, pattern="2:4", changes=own))
        for family, own in (FAMILIES | MIXTURES).items()
    )
