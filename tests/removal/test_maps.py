"""Blocks replaced by a linear map: solving it, proving where it can be merged, and whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import coprune
from coprune.base.errors import UnsupportedModel
from coprune.base.processes import ALONE, Processes, joined_processes
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.load import prepare
from coprune.model.checkpoint.weights import InMemory
from coprune.model.matrix_choice import choose_matrices
from coprune.model.removed import MappedBlocks
from coprune.model.walk.model_structure import FoundModel, ProvenModel
from coprune.model.walk.prove import prove_replay
from coprune.removal.block_scores import Mapped, divergences, divergences_mapped
from coprune.removal.maps import Features, MapWalk, Span, best_sets, find_writers, spans_of
from support.pico import pico_model, pico_tokens
from support.pico_pairs import pico_pair_model, pico_pairs
from support.saved import saved_like
from support.together import together

IDS = pico_tokens(8, 32)
SETTINGS: dict[str, Any] = {"dataset": IDS, "align": 16, "evaluate": False, "quiet": True}


@torch.no_grad()
def test_the_map_solves_weighted_least_squares_with_an_exact_error() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, start, end = (torch.randn(200, width, generator=generator) for width in (6, 5, 5))
    split = [slice(0, 70), slice(70, 200)]
    features = Features.of([rows[part] for part in split], [start[part] for part in split])
    found = features.solve([end[part] for part in split])
    weights = 1 / start.norm(dim=1, keepdim=True)
    gram = (rows * weights).T @ (rows * weights)
    ridge = 0.03 * gram.diagonal().mean() * torch.eye(6)  # six columns of 200 tokens
    expected = torch.linalg.solve(gram + ridge, (rows * weights).T @ ((end - start) * weights))
    assert torch.allclose(found.change, expected, atol=1e-5)
    errors = (((start + rows @ found.change - end) * weights) ** 2).sum(dim=1)
    assert found.error == pytest.approx(float(errors.mean()), rel=1e-4)


def proven(module: Any) -> ProvenModel:
    blocks = find_blocks(prepare(module))
    return prove_replay(FoundModel(InMemory(module), blocks, choose_matrices(module, blocks)), pico_tokens(1, 24))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["mlp.down_proj"]),
        ("gpt2", ["mlp.c_proj"]),  # transposed, with a bias
        ("granite", ["mlp.down_proj"]),  # its outputs are scaled by a constant
        ("gpt_neox", ["attention.dense", "mlp.dense_4h_to_h"]),  # both read the same input
        ("gemma2", []),  # followed by a norm
        ("olmo2", []),
    ],
)
def test_matrices_that_write_the_residual_stream_are_found(family: str, expected: list[str]) -> None:
    model = proven(pico_model(family))
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    found = find_writers(model)
    for block in model.blocks:
        names = (
            [matrix.name.removeprefix(f"{block.name}.") for matrix in found[block.index].matrices] if expected else []
        )
        assert names == expected
    assert bool(found) == bool(expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())


def test_a_norm_behind_a_matrix_is_detected_whatever_its_gains() -> None:
    """Gains of one, as in an untrained model, would let every permutation of outputs pass."""
    model = pico_model("gemma2")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.zero_()  # the gain is this plus one
    assert find_writers(proven(model)) == {}


def test_all_experts_of_a_mixture_are_writers() -> None:
    model = proven(pico_model("mixtral"))
    writers = find_writers(model)[1]
    assert [matrix.expert for matrix in writers.matrices] == [0, 1, 2, 3]
    assert not writers.is_one


def test_no_map_is_merged_into_a_pruned_matrix() -> None:
    module: Any = pico_model("llama")
    module.model.layers[1].mlp.down_proj.weight.data[:, ::2] = 0
    assert sorted(find_writers(proven(module))) == [0, 2]


def test_the_sets_of_spans_with_the_least_errors_are_found() -> None:
    errors = {Span(before, count): (before * 7 % 5 + 1) * count**1.5 for before in range(6) for count in (1, 2, 3)}

    def every(left: int, first: int) -> list[tuple[Span, ...]]:
        if not left:
            return [()]
        own = [span for span in errors if span.before >= first and span.count <= left]
        return [(span, *rest) for span in own for rest in every(left - span.count, span.last + 1)]

    sets = every(3, 0)
    for number in (1, 2, 3):
        alike = sorted((sum(map(errors.__getitem__, one)), one) for one in sets if len(one) == number)
        assert [one for one in best_sets(errors, 3, 3, 2) if len(one) == number] == [one for _, one in alike[:2]]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox"])
def test_a_model_with_the_map_is_closer_to_the_dense_one_than_without(family: str) -> None:
    module: Any = pico_model(family, num_hidden_layers=4)
    model = proven(module)
    going = Mapped(tokens=256).choose(model, [IDS], [1])
    assert going.mapped == [going.blocks[0] - 1]
    writers = find_writers(model)
    (span,) = spans_of(going.blocks, going.mapped)
    walk = MapWalk(model, writers, [IDS])
    found = walk.merged([span])[span.before]
    outputs = dict(walk.of_outputs([span]))[span]
    dropped = replace(outputs, change=torch.zeros_like(outputs.change))
    costs = divergences_mapped(model, [IDS], {(span,): {span: found.map}}, writers)
    without = divergences_mapped(model, [IDS], {(span,): {span: dropped}}, writers)
    assert costs[(span,)] < 0.9 * without[(span,)]
    assert without[(span,)] == pytest.approx(divergences(model, [IDS], going.blocks)[going.blocks[0]], rel=1e-3)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("batches", [1, 3])
def test_two_processes_solve_one_map_on_all_batches(batches: int, tmp_path: Path) -> None:
    """With a single batch, the second process has none."""
    module, data = pico_model("llama", num_hidden_layers=4), [pico_tokens(2, 24, seed=seed) for seed in range(batches)]

    def solve(processes: Processes) -> Tensor:
        model = proven(module)
        walk = MapWalk(model, find_writers(model), processes.own(data), processes)
        assert len(dict(walk.of_outputs([Span(0, 2), Span(1, 1)]))) == 2
        return walk.merged([Span(0, 1), Span(2, 1)])[2].map.change

    def both() -> None:
        with joined_processes() as processes:
            torch.save(solve(processes), tmp_path / f"{processes.rank}.pt")

    together(2, both)
    expected = solve(ALONE)
    assert all(torch.allclose(torch.load(tmp_path / f"{rank}.pt"), expected, atol=1e-5) for rank in (0, 1))


@pytest.mark.parametrize(
    ("family", "remove"),
    [
        pytest.param("llama", "blocks=0.5", marks=pytest.mark.slow),
        ("llama", "channels=0.4,heads=0.5,blocks=0.25"),
        pytest.param("gpt2", "blocks=0.25", marks=pytest.mark.slow),
        pytest.param("gpt_neox", "blocks=0.25", marks=pytest.mark.slow),
        ("mixtral", "blocks=0.25"),
        pytest.param("gpt_oss", "blocks=0.25", marks=pytest.mark.slow),
        pytest.param("granite", "blocks=0.25", marks=pytest.mark.slow),
    ],
)
def test_the_saved_model_matches_the_big_one_with_the_map_merged(family: str, remove: str, tmp_path: Path) -> None:
    depth: dict[str, Any] = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    if family == "gpt_oss":
        depth["layer_types"] = ["sliding_attention", "full_attention"] * 2
    model, dense = pico_model(family, **depth), pico_model(family, **depth)
    result = coprune.prune(model, remove=remove, save_model=tmp_path / "small", **SETTINGS)
    saved_like(model, result.model, tmp_path / "small", rounding=1e-6)
    (line,) = [one.line() for one in result.report.edits if isinstance(one, MappedBlocks)]
    assert line.startswith("a linear map of ")
    changed = [n for n, tensor in model.named_parameters() if not torch.equal(tensor, dense.get_parameter(n))]
    if remove.startswith("blocks"):
        assert changed
        assert (
            len({name.partition(".layers." if ".layers." in name else ".h.")[2].split(".")[0] for name in changed}) == 1
        )


def test_families_without_a_place_for_a_map_lose_blocks_without_one_and_report_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = SETTINGS | {"quiet": False}
    result = coprune.prune(pico_model("gemma2"), remove="blocks=0.34", **settings)
    said = capsys.readouterr().err
    assert "Blocks are removed without a map in their place: no map could replace 1 of the blocks" in said
    assert "Blocks to remove, by kl:" in said
    assert not any(isinstance(one, MappedBlocks) for one in result.report.edits)
    with pytest.raises(UnsupportedModel, match="needs a matrix whose result is only added to its output"):
        coprune.prune(pico_model("gemma2"), remove="blocks=0.34", score="map", **SETTINGS)


@torch.no_grad()
@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_a_span_stays_within_the_encoder_or_the_decoder(family: str) -> None:
    module: Any = pico_pair_model(family)
    blocks = find_blocks(module)
    model = prove_replay(FoundModel(InMemory(module), blocks, choose_matrices(module, blocks)), pico_pairs(module, 1))
    if family == "Bart":  # a norm after every matrix
        assert find_writers(model) == {}
        return
    going = Mapped(tokens=30).choose(model, [pico_pairs(module, 3)], [1, 1])
    assert going.blocks == [1, *(index for index in (3, 4) if index in going.blocks)]
    assert [model.blocks[index].part for index in going.mapped] == [0, 1]
