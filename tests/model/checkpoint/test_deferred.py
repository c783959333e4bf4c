"""Experts that stay in their files until used: the same model, without ever loading a whole layer of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import coprune
from coprune.model.checkpoint import deferred as module
from coprune.model.checkpoint.deferred import Deferred, Stack, deferred, held, untouched
from coprune.model.checkpoint.shards import read_entries
from support.pico import pico_tokens
from support.pico_folder import save_pico
from support.quantised import quantised_pico
from support.sample import sampled
from support.saved import tensors_of

EXPERTS, OUT, IN = 4, 6, 8


def refuse_to_read(*_: Any) -> None:
    raise AssertionError("all experts of a layer were read together")


@pytest.mark.parametrize(
    ("form", "family"),
    sampled(
        [("dense", "mixtral"), ("fp8 block", "deepseek_v3"), ("mxfp4", "gpt_oss"), ("int4", "qwen3_moe")],
        quick=[("mxfp4", "gpt_oss")],
    ),
)
def test_a_streamed_cut_reads_one_expert_at_a_time_and_matches_memory(
    form: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many: dict[str, Any] = {"n_routed_experts": 8} if family == "deepseek_v3" else {}
    source = (
        save_pico(tmp_path / "source", family, **many)
        if form == "dense"
        else quantised_pico(tmp_path, form, family, **many)[0]
    )
    asked: dict[str, Any] = {"remove": "experts=0.5,blocks=0.34", "dataset": pico_tokens(8, 32), "quiet": True}
    asked |= {"evaluate": False, "gate": False}
    coprune.prune(source, save_model=tmp_path / "whole", stream=False, **asked)
    monkeypatch.setattr(Stack, "read_into", refuse_to_read)
    coprune.prune(source, save_model=tmp_path / "apart", stream=True, **asked)
    whole, apart = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "apart")
    assert whole.keys() == apart.keys()
    assert all(torch.equal(raw(whole[name]), raw(apart[name])) for name in whole)


def raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.fixture
def gates(tmp_path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Return unread matrices in a file, and their values."""
    values = [torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) for seed in range(2 * EXPERTS)]
    save_file({f"{number:02d}": value for number, value in enumerate(values)}, tmp_path / "file.safetensors")
    found = [deferred(entry) for _, entry in sorted(read_entries(tmp_path / "file.safetensors").items())]
    assert all(isinstance(one, Deferred) for one in found)
    return [one for one in found if one is not None], values


def both_ways(tensors: list[Tensor]) -> dict[str, Tensor]:
    """Fuse and split experts as transformers does on loading, and as coprune does when it cuts."""
    merged = torch.cat([torch.stack(tensors[:EXPERTS]), torch.stack(tensors[EXPERTS:])], dim=1)
    gate, up = merged.to(torch.float32).chunk(2, dim=1)
    kept = merged.detach().index_select(0, torch.tensor([0, 2]))
    ones = [one.squeeze(0) for one in gate.contiguous().chunk(EXPERTS)]
    beside = torch.cat([ones[0], up[1]], dim=1)
    return {
        "merged": merged,
        "kept": kept,
        "one": ones[3],
        "up": up[2],
        "row": merged[torch.tensor(1)],
        "beside": beside,
    }


def test_splitting_and_fusing_experts_reads_nothing(
    gates: tuple[list[Tensor], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, values = gates
    with monkeypatch.context() as patched:
        patched.setattr(module, "read_tensor", refuse_to_read)
        moved = both_ways(found)
    for name, expected in both_ways(values).items():
        assert isinstance(moved[name], Deferred), name
        assert torch.equal(held(moved[name]), expected), name
    assert torch.equal(moved["row"] @ torch.ones(IN), both_ways(values)["row"] @ torch.ones(IN))
    entry = found[3].place.entry  # type: ignore[attr-defined]
    assert untouched(moved["one"], entry)
    assert not untouched(moved["up"], entry)


def test_weights_in_a_file_cannot_be_changed_in_place(gates: tuple[list[Tensor], list[Tensor]]) -> None:
    for tensor in (gates[0][0], torch.stack(gates[0])[1]):
        with pytest.raises(TypeError, match="would change a matrix that stays in its file"):
            tensor.mul_(2)
