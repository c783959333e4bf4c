"""Cases: measuring text and image models, and running out of device memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import coprune
from coprune.base.progress import Reporter, Said
from coprune.recipe.recipe import make_recipe
from coprune.run.phase_events import BlockPruned
from coprune.runner.run_recipe import run_recipe
from support.pico_folder import save_pico, write_words
from support.saved import tensors_of
from support.simdevice import NAME
from support.simdevice.cases.case import ROUNDED, Case, pruned

TOLERANCE = 0.01


def close(wanted: Any, found: Any, where: str = "") -> float:
    """Raise AssertionError if two reports differ by more than rounding; return the largest relative difference."""
    if isinstance(wanted, dict):
        assert wanted.keys() == found.keys(), where
        return max([0.0, *(close(wanted[key], found[key], f"{where}/{key}") for key in wanted)])
    if isinstance(wanted, list):
        assert len(wanted) == len(found), where
        return max([0.0, *(close(a, b, where) for a, b in zip(wanted, found, strict=True))])
    if not isinstance(wanted, float) or not wanted or "seconds" in where:
        return 0.0
    difference = abs(found / wanted - 1)
    # Relative differences of values near zero are meaningless.
    assert difference < TOLERANCE or abs(wanted) < 1e-5, (where, wanted, found)
    return difference if abs(wanted) >= 1e-5 else 0.0


def evaluated(folder: Path, **settings: Any) -> str:
    model, text = save_pico(folder / "model", num_hidden_layers=2), write_words(folder / "text.txt", 300)
    cpu, device = (
        coprune.evaluate(model, str(text), device=name, seqlen=32, quiet=True, **settings) for name in ("cpu", NAME)
    )
    return f"within {close(cpu.model_dump(mode='json'), device.model_dump(mode='json')):.1e}"


def zero_shot(folder: Path) -> str:
    """Run tasks with a batch size found on the device."""
    from support.task_items import DEFINITIONS, word_items

    os.environ["TASK_DATA"] = str(word_items(folder / "items"))
    return evaluated(folder, tasks="arc_easy,piqa", include_path=str(DEFINITIONS))


def closeness(folder: Path) -> str:
    """Compare two models' predictions."""
    from support.pico import pico_model
    from support.pico_folder import save

    save(pico_model("llama", num_hidden_layers=2, seed=1), folder / "other")
    return evaluated(folder, against=folder / "other")


def evaluations() -> tuple[Case, ...]:
    """Return the cases of perplexity, closeness and tasks."""
    return (
        Case("perplexity and closeness", closeness, True),
        Case("perplexity", evaluated),
        Case("zero-shot", zero_shot),
    )


def classified(family: str, method: str, **settings: Any) -> Callable[[Path], str]:
    def run(folder: Path) -> str:
        pytest.importorskip("timm")
        from support.pico_images import save_classifier

        save_classifier(family, folder / "source")
        given: dict[str, Any] = dict(dataset="digits", nsamples=8, eval_data="digits", eval_images=20, quiet=True)
        found = {}
        for device in ("cpu", NAME):
            coprune.prune(folder / "source", method, device=device, save_model=folder / device, **given, **settings)
            found[device] = tensors_of(folder / device)
        return ROUNDED.compare(found["cpu"], found[NAME])

    return run


def images() -> tuple[Case, ...]:
    """Return the cases of image classifiers, whose patches are convolutions."""
    families = ("vit", "deit", "convnext", "swin", "transformers vit", "transformers convnext")
    return (
        *(Case(f"{family} wanda", classified(family, "wanda"), family == "vit") for family in families),
        Case("vit sparsegpt 2:4 streamed", classified("vit", "sparsegpt", pattern="2:4", stream=True)),
        Case("vit sequential", classified("vit", "sparsegpt", propagation="sequential")),
    )


def out_of_memory(folder: Path) -> str:
    """Check that a run on a too small device ends with one line."""
    from support.simdevice.device import library

    model, text = save_pico(folder / "model", num_hidden_layers=2), write_words(folder / "text.txt")
    settings: dict[str, Any] = dict(dataset=str(text), nsamples=8, seqlen=32, evaluate=False, quiet=True, stream=True)
    library.sim_limit(library.sim_allocated(0) + 600_000)
    try:
        with pytest.raises(coprune.OutOfMemory) as caught:
            coprune.prune(model, "sparsegpt", device=NAME, check_memory=False, **settings)
    finally:
        library.sim_limit(0)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def goes_on(folder: Path) -> str:
    """Check that a run whose device fills up resumes with the batch size named in its message."""
    from support.simdevice.device import library

    model, text = save_pico(folder / "model", num_hidden_layers=3), write_words(folder / "text.txt")
    sizes: dict[str, Any] = dict(nsamples=16, seqlen=64, evaluate=False, stream=True, check_memory=False)
    base = dict(model=str(model), method="wanda", dataset=str(text), **sizes)

    def run(name: str, reporter: Reporter | None = None, **more: Any) -> int:
        """Prune and save under a name; return the peak memory."""
        library.sim_reset_peak(0)
        places = dict(save=str(folder / f"{name}-run"), save_model=str(folder / name))
        run_recipe(make_recipe({**base, **places, "device": NAME, **more}), reporter=reporter or Reporter(quiet=True))
        return int(library.sim_peak(0))

    large, small = run("large", batch_size=16), run("small", batch_size=1)
    assert small < large
    reporter, heard = Reporter(quiet=True), list[str]()
    # Another process takes memory after the first block.
    full = (small + large) // 2
    reporter.listeners.append(lambda event: library.sim_limit(full) if isinstance(event, BlockPruned) else None)
    try:
        # The pruned block runs again for the next one's inputs.
        with pytest.raises(coprune.OutOfMemory, match=r"prune: model\.layers\.0: Simulated device") as caught:
            run("pruned", reporter, batch_size=16)
        said = str(caught.value)
        assert "resumes after its last finished block with batch_size=1" in said
        del caught  # and its frames' tensors on the device
        gc.collect()
        told = Reporter(quiet=True)
        told.listeners.append(lambda event: heard.append(event.text) if isinstance(event, Said) else None)
        run("pruned", told, batch_size=1)
        assert "1 of 3 blocks were finished by an earlier run." in heard
        assert "Blocks of an earlier run differ in last bits: batch_size was 16 and is 1." in heard
    finally:
        library.sim_limit(0)
    run("cpu", batch_size=1, device="cpu")
    return ROUNDED.compare(tensors_of(folder / "cpu"), tensors_of(folder / "pruned"))


def refused_beforehand(folder: Path) -> str:
    """Check that only a run that would not fit the device is refused before it starts."""
    from support.simdevice.device import library

    model, text = save_pico(folder / "model", num_hidden_layers=2), write_words(folder / "text.txt")
    settings: dict[str, Any] = dict(dataset=str(text), nsamples=8, seqlen=32, evaluate=False, quiet=True, stream=True)
    known = coprune.estimate(model, "sparsegpt", device=NAME, **settings).device
    assert known is not None
    library.sim_limit(library.sim_allocated(0) + known.peak_bytes // 2)
    try:
        with pytest.raises(coprune.BadInput, match="would not fit") as caught:
            coprune.prune(model, "sparsegpt", device=NAME, **settings)
    finally:
        library.sim_limit(0)
    coprune.prune(model, "sparsegpt", device=NAME, **settings)  # with enough memory it starts
    return str(caught.value)


def second_device(folder: Path) -> str:
    """Check that a run on the second of two devices leaves the first alone."""
    from support.simdevice.device import library

    library.sim_set_devices(2)
    before = library.sim_allocated(0)
    library.sim_reset_peak(0)
    try:
        found = {
            name: pruned(name, "llama", {"num_hidden_layers": 2}, method="sparsegpt") for name in ("cpu", f"{NAME}:1")
        }
    finally:
        library.sim_set_devices(1)
    assert library.sim_peak(0) == before, "the first device was used"
    states = {name: result.model.state_dict() for name, result in found.items()}
    assert all(tensor.device == torch.device(NAME, 1) for tensor in states[f"{NAME}:1"].values())
    return ROUNDED.compare(states["cpu"], states[f"{NAME}:1"])


def memory() -> tuple[Case, ...]:
    """Return the cases of too little memory, and of a second device."""
    return (
        Case("out of memory", out_of_memory, True),
        Case("goes on with smaller batches", goes_on),
        Case("refused beforehand", refused_beforehand, True),
        Case("second device", second_device, True),
    )
