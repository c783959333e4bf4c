"""Removed experts: the small mixture computes the same as the big one without choosing them, on disk and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import coprune
from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.progress import Reporter
from coprune.recipe.recipe import make_recipe
from coprune.runner.run_recipe import run_recipe
from support.killing import count_lines, killed_at
from support.pico import pico_model
from support.pico_folder import listing, save_pico, write_words
from support.saved import saved_like

IDS = torch.randint(60, (6, 32), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"dataset": IDS, "align": 16, "evaluate": False, "quiet": True}
# Eight experts in two groups, so that each can lose some.
GROUPED: dict[str, Any] = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
SCALED: dict[str, Any] = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
MANY_GROUPS: dict[str, Any] = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}


@pytest.mark.parametrize(
    ("family", "changes", "remove"),
    [
        ("mixtral", {}, "experts=0.25,channels=0.4,heads=0.5,blocks=0.34"),  # saved one by one; all parts together
        pytest.param(
            "qwen2_moe", {}, "experts=0.25", marks=pytest.mark.slow
        ),  # a shared expert with a gate; gates that do not sum to one
        pytest.param("qwen3_moe", {}, "experts=0.5", marks=pytest.mark.slow),
        pytest.param("olmoe", {}, "experts=0.25", marks=pytest.mark.slow),
        ("gpt_oss", {}, "experts=0.25,channels=0.4"),  # in one tensor, with router and expert biases
        pytest.param(
            "deepseek_v2", {}, "experts=0.5", marks=pytest.mark.slow
        ),  # three of sixteen, out of two of four groups
        pytest.param(
            "deepseek_v3", GROUPED, "experts=0.25", marks=pytest.mark.slow
        ),  # correction bias, groups scored by their best two
        (
            "deepseek_v3",
            GROUPED | MANY_GROUPS,
            "experts=0.25",
        ),  # groups that the number of a token's experts does not reveal
        pytest.param(
            "jamba", {}, "experts=0.25", marks=pytest.mark.slow
        ),  # one block of three has a mixture; as many experts as heads
        pytest.param("granitemoehybrid", {}, "experts=0.25", marks=pytest.mark.slow),
        pytest.param("nemotron_h", {}, "experts=0.25", marks=pytest.mark.slow),  # experts without a gate projection
        ("qwen3_next", {}, "experts=keep:20"),  # as many experts as other widths
        pytest.param("lfm2_moe", {}, "experts=0.25", marks=pytest.mark.slow),  # the correction is beside the router
        ("gemma4_text", SCALED, "experts=0.25"),  # a scale per expert in the router's parent
        pytest.param(
            "gemma4_text", SCALED | {"num_experts": 64}, "experts=keep:48", marks=pytest.mark.slow
        ),  # as many experts as the model's width
    ],
)
def test_the_small_mixture_matches_the_big_one_without_the_experts(
    family: str, changes: dict[str, Any], remove: str, tmp_path: Path
) -> None:
    model = _with_corrections(pico_model(family, **changes))
    before = model.num_parameters()
    result = coprune.prune(model, remove=remove, save_model=tmp_path / "small", **SETTINGS)
    assert saved_like(model, result.model, tmp_path / "small", rounding=1e-5).num_parameters() < before
    assert any("experts" in one.line() for one in result.report.edits)


def _with_corrections(model: Any) -> Any:
    """Give router biases and corrections nonzero values, so that a lost one would show."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(part in name for part in ("correction_bias", "expert_bias", "router.bias", "per_expert_scale")):
            tensor.data += torch.rand(tensor.shape, generator=generator)
    return model


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    save_pico(tmp_path / "mixtral", "mixtral", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")

    def run(out: str) -> None:
        settings = {"remove": "experts=0.25,channels=0.4", "align": 16, "nsamples": 4, "seqlen": 16, "stream": False}
        places = {"save": str(tmp_path / out / "run"), "save_model": str(tmp_path / out / "small")}
        data = {"model": str(tmp_path / "mixtral"), "dataset": str(tmp_path / "words.txt"), "evaluate": False}
        run_recipe(make_recipe(settings | places | data), reporter=Reporter(quiet=True))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # children are forked, where pools of threads do not follow
    _, lines = count_lines(lambda: run("whole"), ("run/output",))
    assert killed_at(lambda: run("killed"), lines * 8 // 10, ("run/output",))
    assert list((tmp_path / "killed" / ".small.partial").glob("model-*.json"))
    run("killed")
    torch.set_num_threads(threads)
    whole, found = listing(tmp_path / "whole" / "small"), listing(tmp_path / "killed" / "small")
    assert whole.pop("README.md") is not None  # contains folder names
    assert found.pop("README.md") is not None
    assert found == whole


@pytest.mark.parametrize(
    ("family", "changes", "remove", "message"),
    [
        ("llama", {}, "experts=0.25", "no mixture of experts"),
        ("mixtral", {}, "experts=0.7", "a token goes to 2 experts, and 1 of 4 would be left"),
        ("mixtral", {}, "experts=0.1", "0.1 of 4 experts rounds to none"),
        ("mixtral", {}, "experts=keep:4", "4 of 4 experts are all of them"),
        ("mixtral", {}, "experts=3", "not '3'; to keep 3, write experts=keep:3"),
        ("deepseek_v3", GROUPED, "experts=keep:5", "5 experts cannot be divided equally among 2 groups"),
        ("deepseek_v3", {}, "experts=0.5", "a token goes to 2 experts of 1 of 2 groups, and 2 of 4 would be left"),
        ("deepseek_v3", GROUPED, "experts=0.1", "0.1 of 8 experts in 2 groups rounds to none"),
        ("deepseek_v3", GROUPED | {"num_experts_per_tok": 1}, "experts=0.75", "cannot be removed"),
        ("mixtral", {"score": "reap:seed=1"}, "experts=0.25", "score 'reap' has no options"),
        ("llama4_text", {}, "experts=0.25", "is not given the experts of each token"),
    ],
)
def test_impossible_cuts_are_refused_and_leave_the_model_unchanged(
    family: str, changes: dict[str, Any], remove: str, message: str
) -> None:
    changes = dict(changes)
    settings = SETTINGS | {name: changes.pop(name) for name in ("score",) if name in changes}
    model = pico_model(family, **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((UnsupportedModel, BadInput), match=message):
        coprune.prune(model, remove=remove, **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_rounded_share_is_reported() -> None:
    model = pico_model("olmoe", num_experts=20, num_hidden_layers=1)
    asked = SETTINGS | {"remove": "experts=0.25"}
    rounded = coprune.prune(model, **asked).report.edits[0].line()
    assert rounded.startswith("experts 20 → 16 of every mixture (0.25 of them would leave 15; 16 is easier to serve)")
    exactly = coprune.prune(
        pico_model("olmoe", num_experts=20, num_hidden_layers=1), **asked | {"remove": "experts=keep:15"}
    )
    assert exactly.report.edits[0].line().startswith("experts 20 → 15 of every mixture: ")
