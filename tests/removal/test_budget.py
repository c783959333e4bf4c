"""A budget of parameters: what several ways are said to cost is what they cost, and the best of them is taken."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.progress import Event, Reporter, Said
from coprune.data.in_memory import handed_over
from coprune.model.checkpoint.load import prepared
from coprune.recipe.recipe import make_recipe
from coprune.removal import budget
from coprune.removal.cuts import Plan
from coprune.run.context import Run
from coprune.run.prune import read_call
from coprune.run.result import Result
from coprune.run.stages import run_recipe
from support.pico import pico_model

IDS = torch.randint(60, (8, 32), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"dataset": IDS, "align": 16, "evaluate": False}


def run(model: PreTrainedModel, remove: str, **settings: Any) -> tuple[Result, list[str]]:
    """The result, and what was said on the way."""
    lines: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Said):
            lines.append(event.text)

    reporter = Reporter(quiet=True)
    reporter.listeners.append(listen)
    with handed_over({**SETTINGS, "remove": remove, **settings}, "dataset", "eval_data") as named:
        recipe, given = read_call(model, None, None, None, named)
        with prepared(given.model):
            return run_recipe(recipe, given, reporter, write=False), lines


def costs(lines: list[str]) -> dict[str, float]:
    """KL by way, as it was said."""
    found = [re.fullmatch(r"30 % of the blocks' parameters as (.*): KL ([\d.]+)\.", line) for line in lines]
    return {match[1]: float(match[2]) for match in found if match}


def kl(small: Any) -> float:
    """From the dense model, by whole forwards, in nats per token."""
    with torch.no_grad():
        log_p, log_q = (m(IDS, use_cache=False).logits.log_softmax(dim=-1) for m in (pico_model("llama"), small))
    return float((log_p.exp() * (log_p - log_q)).sum() / IDS.numel())


def test_what_a_way_is_said_to_cost_is_what_it_costs_and_the_least_is_taken() -> None:
    # By norms, what goes does not depend on what earlier blocks lost, so that the run does just what was tried.
    result, lines = run(pico_model("llama"), "parameters=0.3", score="magnitude")
    said, heads = costs(lines), "key-value heads with their query heads 2 → 1 of every block"
    ways = {
        "channels 96 → 32 of every block": "channels=0.667",
        f"channels 96 → 64 of every block, {heads}": "channels=0.333,heads=0.5",
        "blocks 3 → 2": "blocks=0.34",
    }
    assert said.keys() == ways.keys()
    for way, remove in ways.items():
        scores = {} if remove.startswith("blocks") else {"score": "magnitude"}
        small = run(pico_model("llama"), remove, **scores)[0].model
        assert said[way] == pytest.approx(kl(small), rel=1e-3)
    best = min(said, key=said.__getitem__)
    assert result.report.edits[0].line().startswith(f"{best}: ")
    assert kl(result.model) == pytest.approx(said[best], rel=1e-3)


@pytest.mark.parametrize(
    ("family", "share", "left"),
    [("gpt2", 0.2, "channels 256 → 176"), ("bloom", 0.3, "blocks 3 → 2"), ("deepseek_v3", 0.1, "channels 32 → ")],
)
def test_at_least_the_budget_goes_in_a_way_that_the_configuration_can_tell(
    family: str, share: float, left: str
) -> None:
    model = pico_model(family)
    before = {name: p.numel() for name, p in model.named_parameters()}
    blocks = sum(size for name, size in before.items() if ".layers." in name or ".h." in name)
    result, _ = run(model, f"parameters={share}")
    assert result.model is not None
    gone = sum(before.values()) - result.model.num_parameters()
    assert gone >= share * blocks * 0.99
    assert left in result.report.edits[0].line()


def test_heads_that_the_configuration_refuses_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of eight heads in a width of 64: such a way could win, and be refused in the end."""
    tried: list[Plan] = []

    def costs(run: Run, plans: Sequence[Plan]) -> list[float]:
        tried.extend(plans)
        return [float("heads" not in plan.keep) for plan in plans]

    monkeypatch.setattr(budget, "costs_of", costs)
    run(pico_model("llama", num_attention_heads=8, num_key_value_heads=4), "parameters=0.2", score="magnitude")
    kept = {plan.keep["heads"][4] for plan in tried if "heads" in plan.keep}
    assert kept <= {1, 2}
    assert kept


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(BadInput, match="already includes heads"):
        make_recipe({"model": "x", "remove": "parameters=0.3,heads=0.5"})
    with pytest.raises(UnsupportedModel, match=r"no cut of channels, heads and blocks removes 99 %"):
        run(pico_model("llama"), "parameters=0.99")
