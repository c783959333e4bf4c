"""Experts in a list of modules are found, scored and removed like those in tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import coprune
from coprune.base.errors import UnsupportedModel
from coprune.removal.expert_calls import ListedCall
from families.removal import kill_and_resume_model
from support.listed_mixture import ListedMixture, listed_mixture
from support.saved import saved_like

IDS = torch.randint(60, (6, 32), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"dataset": IDS, "align": 16, "evaluate": False, "quiet": True}


@pytest.mark.parametrize(
    "remove", [pytest.param("experts=0.25", marks=pytest.mark.slow), "experts=0.5,channels=0.5,blocks=0.5"]
)
def test_the_small_mixture_matches_the_big_one_without_the_experts(remove: str, tmp_path: Path) -> None:
    model = listed_mixture()
    result = coprune.prune(model, remove=remove, save_model=tmp_path / "small", **SETTINGS)
    small: Any = saved_like(model, result.model, tmp_path / "small", rounding=1e-5)
    kept = 3 if "0.25" in remove else 2
    assert {len(layer.mlp.experts) for layer in small.model.layers} == {kept}
    assert {layer.mlp.gate.weight.shape[0] for layer in small.model.layers} == {kept}


def test_gates_and_answers_of_listed_experts_match_the_formula() -> None:
    mixture: Any = listed_mixture().get_submodule("model.layers.0.mlp")
    assert isinstance(mixture, ListedMixture)
    hidden = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))
    out, routed = ListedCall(mixture.experts).watch(mixture.forward, [hidden], {})
    flat = hidden.reshape(-1, 64)
    gates, index = mixture.gate(flat).softmax(dim=-1).topk(2, dim=-1)
    order, wanted = routed.index.argsort(dim=1), index.argsort(dim=1)
    assert torch.equal(routed.index.gather(1, order), index.gather(1, wanted))
    expected = (gates / gates.sum(dim=-1, keepdim=True)).gather(1, wanted)
    torch.testing.assert_close(routed.gates.gather(1, order), expected)
    for token, (experts, answers) in enumerate(zip(routed.index, routed.answers, strict=True)):
        for expert, answer in zip(experts.tolist(), answers, strict=True):
            torch.testing.assert_close(answer, mixture.experts[expert](flat[token]))
    torch.testing.assert_close(routed.total + mixture.shared(flat), out.reshape(-1, 64))


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_killed_run_resumes_to_the_same_bytes(stream: bool, tmp_path: Path) -> None:
    kill_and_resume_model(listed_mixture(), "experts=0.25", tmp_path, stream=stream)


def test_a_module_list_without_a_router_is_left_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of_them(self: Any, hidden: Tensor) -> Tensor:
        out: Tensor = sum((expert(hidden) for expert in self.experts), self.shared(hidden))
        return out + 0 * self.gate(hidden).sum()

    monkeypatch.setattr(ListedMixture, "forward", all_of_them)
    model = listed_mixture()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match="but it could not be proved to be a mixture"):
        coprune.prune(model, remove="experts=0.25", **SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_experts_must_receive_rows_of_tokens() -> None:
    class Doubled(ListedMixture):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden * 2)

    config = listed_mixture().config
    holder: nn.Module = Doubled(config)
    call = ListedCall(holder.experts)  # type: ignore[arg-type]
    assert not call.explains(holder.forward, [torch.randn(1, 5, 64)], {})
