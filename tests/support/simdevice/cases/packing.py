"""Packed models: made on the device, loaded to it, and decoded from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import coprune
from coprune.base.devices import describe
from coprune.packed.linear import PackedLinear, pack_linears
from support.pico import pico_model, pico_tokens
from support.pico_folder import save
from support.saved import tensors_of
from support.simdevice import NAME
from support.simdevice.cases.case import SETTINGS, Case

TOKENS = pico_tokens(2, 16)
PATTERNS = ("unstructured", "2:4")


def thinned(pattern: str) -> Any:
    return coprune.prune(
        pico_model("llama", num_hidden_layers=2), "magnitude", pattern=pattern, sparsity=0.5, **SETTINGS
    ).model


def on_device(model: Any) -> Any:
    return torch.nn.Module.to(model, NAME)


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.device.type == NAME
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)


def packed_in_place(pattern: str) -> Callable[[Path], str]:
    """Layers are packed where they are, decode, move to the host, and load what was kept of them."""

    def run(folder: Path) -> str:
        model = thinned(pattern)
        with torch.no_grad():
            wanted = model(TOKENS).logits
            names = pack_linears(on_device(model))
            near(model(TOKENS.to(NAME)).logits, wanted)
            steps = model.generate(TOKENS[:, :4].to(NAME), max_new_tokens=4, do_sample=False)
            assert torch.equal(steps.cpu(), thinned(pattern).generate(TOKENS[:, :4], max_new_tokens=4, do_sample=False))
        layer = model.model.layers[0].mlp.up_proj
        assert isinstance(layer, PackedLinear)
        layer.load_state_dict({name: tensor.cpu() for name, tensor in layer.state_dict().items()})
        assert layer.packed.device.type == NAME
        assert torch.equal(layer.weight.cpu(), layer.to_linear().weight.cpu())
        return f"{len(names)} layers"

    return run


def packed_folder(pattern: str, how: str) -> Callable[[Path], str]:
    """A packed folder is loaded to the device: unpacked there, or kept packed."""

    def run(folder: Path) -> str:
        model = thinned(pattern)
        save(model, folder / "dense")
        coprune.pack(folder / "dense", folder / "packed")
        with torch.no_grad():
            wanted = model(TOKENS).logits
            if how == "kept packed":
                loaded = coprune.load_packed(folder / "packed", device_map={"": NAME})
                assert isinstance(loaded.model.layers[0].mlp.up_proj, PackedLinear)
            elif how == "by a map":
                loaded = AutoModelForCausalLM.from_pretrained(folder / "packed", device_map={"": NAME})
            else:
                loaded = on_device(AutoModelForCausalLM.from_pretrained(folder / "packed"))
            near(loaded(TOKENS.to(NAME)).logits, wanted)
        return type(loaded.model.layers[0].mlp.up_proj).__name__

    return run


def accelerated(pattern: str) -> Callable[[Path], str]:
    """What is fastest is chosen on the device, and decodes there."""

    def run(folder: Path) -> str:
        model = thinned(pattern)
        with torch.no_grad():
            wanted = model(TOKENS).logits
            kinds = {choice.kind for choice in coprune.accelerate(on_device(model), repeats=2)}
            near(model(TOKENS.to(NAME)).logits, wanted)
        return ", ".join(sorted(kinds))

    return run


def benched(folder: Path) -> str:
    """Forms of a folder are timed on the device."""
    save(thinned("2:4"), folder / "dense")
    found = coprune.bench(folder / "dense", (1,), prompt=4, tokens=2, repeats=2, device=NAME)
    assert found.device == describe(torch.device(NAME, 0))
    return ", ".join(sorted({row.form for row in found.rows}))


def pruned_again(folder: Path) -> str:
    """A packed folder is pruned further, on the device."""
    save(thinned("unstructured"), folder / "dense")
    coprune.pack(folder / "dense", folder / "packed")
    coprune.prune(folder / "packed", "wanda", sparsity=0.6, device=NAME, save_model=folder / "again", **SETTINGS)
    return f"{len(tensors_of(folder / 'again'))} tensors"


def packings() -> tuple[Case, ...]:
    """Every way to a packed model."""
    return (
        *(Case(f"{p} packed in place", packed_in_place(p), p == "2:4") for p in PATTERNS),
        *(
            Case(f"{p} folder {how}", packed_folder(p, how), (p, how) == ("unstructured", "kept packed"))
            for p in PATTERNS
            for how in ("kept packed", "by a map", "moved")
        ),
        *(Case(f"{p} accelerated", accelerated(p), p == "unstructured") for p in PATTERNS),
        Case("bench", benched),
        Case("a packed folder pruned again", pruned_again),
    )
