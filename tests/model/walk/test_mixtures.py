"""Mixtures of experts: every expert is pruned by the tokens routed to it, in any family's layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import coprune
from coprune.model.blocks import find_blocks
from coprune.model.matrices import Matrix, find_matrices
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver
from coprune.recipe.pattern import NM, Target, parse_pattern
from support.pico import MIXTURES, pico_model, pico_tokens
from support.pico_folder import save_pico, write_words
from support.published import published_magnitude, published_wanda
from support.sample import sampled
from support.saved import load_clean
from support.walking import Propagation, inputs_by_full_forwards, layers_of, prune_with_walk

TWO_OF_FOUR = Target(NM(2, 4), 0.5)
BATCHES = pico_tokens(40, 32).split(8)
PROPAGATIONS: list[Propagation] = ["block", "sequential"]


def wanda(weight: Tensor, x: Tensor) -> Tensor:
    return weight.masked_fill(published_wanda(weight, x.square().mean(dim=0), 0.5, 2, 4), 0)


def by_hand(experts: Any, hidden: Tensor, index: Tensor) -> Iterator[tuple[int, Tensor, Callable[[], Tensor]]]:
    """Yield the inputs of every expert's two products: (expert, gate_up input, function of gate_up → down input)."""
    transposed = getattr(experts, "is_transposed", False)
    for expert in range(experts.gate_up_proj.shape[0]):
        x = hidden[(index == expert).any(dim=1)]

        def down_input(x: Tensor = x, expert: int = expert) -> Tensor:
            stored = experts.gate_up_proj[expert]
            if not transposed:
                gate, up = (x @ stored.T).chunk(2, dim=-1)
                return nn.functional.silu(gate) * up
            # gpt-oss: in × out, gate and up interleaved, with biases and clamps.
            both = x @ stored + experts.gate_up_proj_bias[expert]
            gate, up = both[:, ::2].clamp(max=experts.limit), both[:, 1::2].clamp(-experts.limit, experts.limit)
            return (up + 1) * gate * torch.sigmoid(gate * experts.alpha)

        yield expert, x, down_input


def weight_of(experts: nn.Module, attribute: str, expert: int) -> Tensor:
    stored = getattr(experts, attribute)[expert]
    return stored.T if getattr(experts, "is_transposed", False) else stored


@torch.no_grad()
def routed(model: PreTrainedModel, experts: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the hidden states and chosen experts that full forwards pass to a module of experts."""
    seen = []
    handle = experts.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append([*args, *kwargs.values()][:2]), with_kwargs=True
    )
    for tokens in BATCHES:
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    hidden = torch.cat([h.reshape(-1, h.shape[-1]) for h, _ in seen])
    return hidden, torch.cat([index.reshape(-1, index.shape[-1]) for _, index in seen])


@torch.no_grad()
def oracle_masks(model: PreTrainedModel, propagation: Propagation) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Prune with full forwards and experts computed by hand; return masks (out × in) and token counts by name."""
    kept, tokens = {}, {}
    for block in find_blocks(model):
        layers = [layer for layer in layers_of(block) if not layer.name.endswith((".gate", ".router"))]
        inputs = inputs_by_full_forwards(model, layers, BATCHES)
        modules = [
            (n, m) for n, m in block.module.named_modules() if hasattr(m, "gate_up_proj") and n.endswith("experts")
        ]
        modules = [(name, module) for name, module in modules if isinstance(module.gate_up_proj, nn.Parameter)]
        dense = {name: routed(model, module) for name, module in modules}
        for name in inputs:
            layer = next(layer for layer in layers if layer.name == name)
            if propagation == "sequential":
                inputs |= inputs_by_full_forwards(model, [layer], BATCHES)
            layer.weight.copy_(wanda(layer.weight, inputs[name]))
            kept[name] = layer.weight != 0
        for name, experts in modules:
            hidden, index = dense[name] if propagation == "block" else routed(model, experts)
            for expert, x, down_input in by_hand(experts, hidden, index):
                gate_up, down = (weight_of(experts, which, expert) for which in ("gate_up_proj", "down_proj"))
                before = down_input()
                gate_up.copy_(wanda(gate_up, x))
                down.copy_(wanda(down, before if propagation == "block" else down_input()))
                for which, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
                    kept[f"{block.name}.{name}.{which}[{expert}]"] = weight != 0
                    tokens[f"{block.name}.{name}.{which}[{expert}]"] = len(x)
    return kept, tokens


def matrices_of(model: PreTrainedModel) -> dict[str, Matrix]:
    return {m.name: m for block in find_blocks(model) for m in find_matrices(block.module, block.name)}


@pytest.mark.parametrize(
    ("family", "propagation"),
    sampled(
        itertools.product(MIXTURES, PROPAGATIONS),
        quick=[(family, PROPAGATIONS[number % 2]) for number, family in enumerate(MIXTURES)],
    ),
)
def test_every_expert_is_pruned_by_its_own_tokens(family: str, propagation: Propagation) -> None:
    model = pico_model(family)
    results = {r.name: r for r in prune_with_walk(model, BATCHES, Solver(METHODS["wanda"]), TWO_OF_FOUR, propagation)}
    kept, tokens = oracle_masks(pico_model(family), propagation)
    assert min(tokens.values()) >= 96, "an expert with few tokens leans on its layer; this test is not of that"
    assert results.keys() == kept.keys()
    found = {name: matrix.read() != 0 for name, matrix in matrices_of(model).items() if name in kept}
    different = sum(int((found[name] != kept[name]).sum()) for name in kept)
    assert different / sum(mask.numel() for mask in kept.values()) < 1e-4
    for name, mask in found.items():
        assert bool((mask.unflatten(1, (-1, 4)).sum(dim=2) == 2).all()), name
        assert results[name].sparsity == 0.5
        assert results[name].tokens == tokens.get(name, 40 * 32)


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_are_left_alone(family: str) -> None:
    model, dense = pico_model(family), pico_model(family)
    names = {r.name for r in prune_with_walk(model, BATCHES[:1], Solver(METHODS["wanda"]), TWO_OF_FOUR)}
    assert not any(name.endswith((".gate", ".router")) for name in names)
    routers = [name for name, _ in dense.named_parameters() if ".gate." in name or ".router." in name]
    assert routers
    assert all(torch.equal(model.get_parameter(name), dense.get_parameter(name)) for name in routers)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_pattern_prunes_experts(name: str) -> None:
    for target in (TWO_OF_FOUR, Target(parse_pattern("unstructured"), 0.625)):
        model = pico_model("mixtral", num_hidden_layers=1)
        results = prune_with_walk(model, BATCHES[:2], Solver(METHODS[name]), target, "sequential")
        experts = [result for result in results if "[" in result.name]
        assert len(experts) == 8
        if name != "wanda_variant" or isinstance(target.pattern, NM):
            assert all(result.sparsity == target.sparsity for result in experts)
        assert all(result.relative_layer_error is not None for result in experts)


def starved(family: str) -> PreTrainedModel:
    """Return a mixture in whose first block no token is routed to expert 2."""
    model = pico_model(family, num_experts_per_tok=1)
    block: Any = find_blocks(model)[0].module
    if family == "gpt_oss":
        block.mlp.router.bias[2] = -1e4
    else:
        # One of s and −s is positive, so the zero of expert 2 is never the largest.
        block.mlp.gate.weight[1] = -block.mlp.gate.weight[0]
        block.mlp.gate.weight[2] = 0
    return model


@pytest.mark.parametrize(
    ("family", "propagation", "method"),
    sampled(
        itertools.product(["mixtral", "qwen3_moe", "gpt_oss"], PROPAGATIONS, ["wanda", "sparsegpt"]),
        quick=[
            ("mixtral", "block", "sparsegpt"),
            ("mixtral", "sequential", "wanda"),
            ("qwen3_moe", "block", "wanda"),
            ("gpt_oss", "sequential", "sparsegpt"),
        ],
    ),
)
def test_an_expert_without_tokens_is_pruned_by_magnitude_and_named(
    family: str, propagation: Propagation, method: str
) -> None:
    model = starved(family)
    dense = matrices_of(starved(family))
    results = prune_with_walk(model, BATCHES, Solver(METHODS[method]), TWO_OF_FOUR, propagation)
    starving = [result for result in results if result.tokens == 0]
    assert {"model.layers.0.mlp.experts.gate_up_proj[2]", "model.layers.0.mlp.experts.down_proj[2]"} <= {
        result.name for result in starving
    }
    for result in starving:
        weight = dense[result.name].read()
        expected = weight.masked_fill(published_magnitude(weight, 0.5, 2, 4), 0)
        assert torch.equal(matrices_of(model)[result.name].read(), expected)
        assert result.relative_layer_error is None
        assert any(event.kind == "no tokens" for event in result.events)


def test_an_expert_with_few_tokens_uses_its_layers_average() -> None:
    model = pico_model("mixtral", num_hidden_layers=1)
    few = BATCHES[:1]
    tokens = few[0][:2]
    results = {r.name: r for r in prune_with_walk(model, [tokens], Solver(METHODS["wanda"]), TWO_OF_FOUR)}
    dense = pico_model("mixtral", num_hidden_layers=1)
    seen = []
    experts: Any = find_blocks(dense)[0].module.mlp.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        dense(input_ids=tokens)
    hidden, index = seen[0]
    chosen = [hidden[(index == expert).any(dim=1)] for expert in range(4)]
    pool = torch.cat(chosen).square().mean(dim=0)
    assert any(0 < len(x) < 64 for x in chosen)
    for expert, x in enumerate(chosen):
        name = f"model.layers.0.mlp.experts.gate_up_proj[{expert}]"
        missing = max(0, 64 - len(x))
        mean_square = (x.square().sum(dim=0) + missing * pool) / (len(x) + missing)
        weight = experts.gate_up_proj[expert]
        assert torch.equal(matrices_of(model)[name].read() == 0, published_wanda(weight, mean_square, 0.5, 2, 4))
        assert any("tokens" in event.kind for event in results[name].events) == (len(x) < 64)


@pytest.mark.parametrize(
    ("family", "stream"),
    sampled(
        itertools.product(MIXTURES, [True, False]),
        quick=[("mixtral", True), ("gpt_oss", False), ("deepseek_v3", True)],
    ),
)
def test_a_saved_mixture_reloads_without_missing_keys(family: str, stream: bool, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model", family)
    data = write_words(tmp_path / "words.txt")
    result = coprune.prune(
        folder,
        "wanda",
        pattern="2:4",
        dataset=str(data),
        nsamples=16,
        seqlen=32,
        stream=stream,
        save_model=tmp_path / "pruned",
        quiet=True,
    )
    loaded = matrices_of(load_clean(tmp_path / "pruned"))
    for matrix in result.report.matrices:
        assert matrix.sparsity == 0.5
        assert loaded[matrix.name].mask_checksum() == matrix.mask_checksum
    counts = {m.name: m.tokens for m in result.report.matrices if m.name.endswith("]")}
    assert counts
    assert all(m.tokens is not None for m in result.report.matrices)
