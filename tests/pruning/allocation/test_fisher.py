"""Fisher estimates of the cost of zeros, against the formula and the divergence itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import coprune
from coprune.base.errors import BadInput, NumericalError, UnsupportedModel
from coprune.model.matrix_choice import Chosen
from coprune.model.walk.model_structure import ProvenModel
from coprune.pruning.allocation import allocation_named
from coprune.pruning.allocation.allocation import unit_name
from coprune.pruning.allocation.allocation_plan import plan_targets
from coprune.pruning.allocation.fisher import (
    ByFisher,
    first_removed_at,
    losses_by_gradients,
    sampled_gradients,
    squared_changes,
    watch,
)
from coprune.recipe.pattern import NM, Target, Unstructured
from support.gradients import gradients_of_each
from support.pico import pico_model, pico_tokens
from support.pico_folder import save_pico, write_words
from support.pico_images import pico_classifier, pico_pixels
from support.walking import make_walk, prove

SAMPLES = [(tokens, None) for tokens in pico_tokens(6, 16).split(1)]
ALL_ROWS = ByFisher(rows=10_000, points=3)
TARGET = Target(Unstructured(), 0.6)


def squares_of(model: PreTrainedModel, chosen: Chosen) -> dict[str, Tensor]:
    """Return the sums of squares of every matrix's inputs, from full forwards."""
    found: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = found.get(name, 0) + inputs[0].flatten(0, -2).double().square().sum(dim=0)

        return hook

    handles = [m.owner.register_forward_pre_hook(add(m.name)) for m in chosen.all()]
    with torch.no_grad():
        for tokens, _ in SAMPLES:
            model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return found


def lost(model: ProvenModel, allocation: ByFisher, squares: dict[str, Tensor], **how: Any) -> dict[str, Tensor]:
    watched = watch(allocation, model.chosen, squares, TARGET)
    return losses_by_gradients(model, watched, **{"samples": SAMPLES, **how})


def test_labels_are_drawn_from_each_rows_distribution() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).repeat_interleave(4000, dim=0)
    gradients = sampled_gradients(logits, seed=1)
    p = logits.softmax(dim=-1)
    drawn = p - gradients
    assert torch.equal(drawn.round(), (drawn > 0.5).float())
    assert drawn.sum(dim=1) == pytest.approx(torch.ones(len(p)))
    shares = drawn.view(5, 4000, 7).mean(dim=1)
    assert shares == pytest.approx(p[::4000], abs=0.03)
    assert torch.equal(gradients, sampled_gradients(logits, seed=1))
    assert not torch.equal(gradients, sampled_gradients(logits, seed=2))
    assert sampled_gradients(logits[:70].bfloat16(), seed=1).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "grid", [[Target(Unstructured(), s) for s in (0.2, 0.5, 0.7)], [Target(NM(n, 4), 1 - n / 4) for n in (3, 2, 1)]]
)
def test_changes_are_those_of_wandas_masks(grid: list[Target]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, gradients = torch.randn(2, 9, 12, generator=generator)
    squares = torch.rand(12, generator=generator)
    removed_at = first_removed_at(rows, squares, grid)
    found = squared_changes(rows, gradients, removed_at, len(grid))
    for target, own in zip(grid, found, strict=True):
        taken = rows.masked_fill(target.keep(rows.abs() * squares.sqrt(), "row"), 0)
        assert float(own) == pytest.approx(float((taken * gradients).sum(dim=1).square().sum()), rel=1e-5)
    assert found[0] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_are_half_the_squared_gradients_of_the_removed_weights(family: str) -> None:
    model = pico_model(family)
    proven = prove(model, SAMPLES[0][0])
    squares = squares_of(model, proven.chosen)
    found = lost(proven, ALL_ROWS, squares)
    expected = {name: torch.zeros(3, dtype=torch.float64) for name in squares}
    for _ in gradients_of_each(model, (tokens for tokens, _ in SAMPLES)):
        for matrix in proven.chosen.all():
            weight, gradients = matrix.read(), matrix.gradient()
            score = weight.abs() * squares[matrix.name].sqrt().float()
            for at, target in enumerate(ALL_ROWS.grid(TARGET)):
                taken = weight.masked_fill(target.keep(score, "row"), 0)
                expected[matrix.name][at] += (taken * gradients).sum(dim=1).double().square().sum() / 2
    assert found.keys() == expected.keys()
    for name, own in found.items():
        assert own == pytest.approx(expected[name], rel=1e-3)


def test_a_loss_is_the_divergence_to_second_order() -> None:
    """For a small change of one row, the mean over many samples is the divergence of the distributions."""
    model = pico_model("llama")
    proven = prove(model, SAMPLES[0][0])
    name = "model.layers.1.mlp.down_proj"
    matrix = next(m for m in proven.chosen.all() if m.name == name)
    squares = squares_of(model, proven.chosen)[name]
    weight = matrix.read()
    weight[1:] = 0
    matrix.write(weight)
    tokens = SAMPLES[0][0][:, :8]
    samples = [(tokens, None)] * 200
    found = (
        losses_by_gradients(proven, watch(ALL_ROWS, only(proven, name), {name: squares}, TARGET), samples)[name] / 200
    )
    dense = model(input_ids=tokens).logits.log_softmax(dim=-1)
    for at, own in enumerate(ALL_ROWS.grid(TARGET)):
        keep = own.keep(weight.abs() * squares.sqrt().float(), "row")
        matrix.write(weight.masked_fill(~keep, 0))
        pruned = model(input_ids=tokens).logits.log_softmax(dim=-1)
        divergence = float((dense.exp() * (dense - pruned)).sum())
        assert float(found[at]) == pytest.approx(divergence, rel=0.25)


def only(model: ProvenModel, name: str) -> Chosen:
    return model.only([name]).chosen


def test_fisher_on_a_sample_of_rows_is_close_to_all_rows() -> None:
    model = pico_model("llama")
    proven = prove(model, SAMPLES[0][0])
    squares = squares_of(model, proven.chosen)
    all_rows, some = (lost(proven, ByFisher(rows=rows), squares) for rows in (10_000, 16))
    ratios = torch.stack([some[name][3] / all_rows[name][3] for name in all_rows])
    assert 0.7 < float(ratios.median()) < 1.4


def test_only_counted_tokens_contribute() -> None:
    model = pico_model("llama")
    proven = prove(model, SAMPLES[0][0])
    squares = squares_of(model, proven.chosen)
    none = lost(proven, ALL_ROWS, squares, samples=[(SAMPLES[0][0], torch.zeros(1, 16, dtype=torch.bool))])
    assert all(not own.any() for own in none.values())
    every = [(tokens, torch.ones(1, 16, dtype=torch.bool)) for tokens, _ in SAMPLES]
    found, plain = lost(proven, ALL_ROWS, squares, samples=every), lost(proven, ALL_ROWS, squares)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_fisher_leaves_the_model_unchanged() -> None:
    model = pico_model("llama")
    walk = make_walk(model, pico_tokens(4, 16).split(2))
    model.lm_head.weight.requires_grad_(True)
    plan_targets(allocation_named("fisher"), walk.model, walk.recording, TARGET)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for name, p in model.named_parameters() if name != "lm_head.weight")
    assert all("forward" not in vars(block.module) for block in walk.model.blocks)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_losses_of_experts_in_one_parameter_are_summed() -> None:
    model = pico_model("mixtral")
    walk = make_walk(model, pico_tokens(8, 16).split(4))
    targets = plan_targets(allocation_named("fisher"), walk.model, walk.recording, TARGET)
    found: dict[str, set[float]] = {}
    for name, target in targets.items():
        found.setdefault(unit_name(name), set()).add(target.sparsity)
    assert all(len(own) == 1 for own in found.values())
    assert len({*map(frozenset, found.values())}) > 2


def test_fisher_prunes_the_least_influential_matrices_most() -> None:
    model = pico_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 0.01
    walk = make_walk(model, pico_tokens(8, 32).split(4))
    targets = plan_targets(allocation_named("fisher"), walk.model, walk.recording, TARGET)
    quiet = [targets[f"model.layers.1.mlp.{name}_proj"].sparsity for name in ("gate", "up", "down")]
    assert min(quiet) >= 0.74


def test_models_without_finite_gradients_are_refused() -> None:
    model = pico_model("llama")
    proven = prove(model, SAMPLES[0][0])
    squares = squares_of(model, proven.chosen)
    broken = model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * torch.nan,))
    with pytest.raises(NumericalError, match="gradients of"):
        lost(proven, ALL_ROWS, squares)
    broken.remove()
    cut = model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))
    with pytest.raises(UnsupportedModel, match="no gradients"):
        lost(proven, ALL_ROWS, squares)
    cut.remove()


def test_fisher_loads_a_folder_into_memory(tmp_path: Any) -> None:
    save_pico(tmp_path / "model")
    said: dict[str, Any] = {
        "dataset": str(write_words(tmp_path / "words.txt")),
        "seqlen": 32,
        "nsamples": 4,
        "sparsity": 0.6,
    }
    shown = coprune.inspect(tmp_path / "model", allocation="fisher", quiet=True, **said)
    report = coprune.prune(
        tmp_path / "model", allocation="fisher", evaluate=False, gate=False, quiet=True, **said
    ).report
    planned = [matrix.target.sparsity for matrix in shown.matrices if matrix.target]
    assert [matrix.sparsity for matrix in report.matrices] == pytest.approx(planned, abs=1e-6)
    assert len(set(planned)) > 3
    with pytest.raises(BadInput, match="whole model"):
        coprune.prune(tmp_path / "model", allocation="fisher", stream=True, quiet=True, **said)


def test_fisher_allocates_for_image_classifiers() -> None:
    walk = make_walk(pico_classifier("vit"), [pico_pixels("vit")])
    targets = plan_targets(allocation_named("fisher"), walk.model, walk.recording, TARGET)
    assert len({target.sparsity for target in targets.values()}) > 2
