"""Structures that the walk cannot reproduce are refused by name before anything is changed."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from coprune.base.errors import NumericalError, UnsupportedModel
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.weights import InMemory
from coprune.model.matrix_choice import choose_matrices
from coprune.model.walk.block_calls import open_streams, replaced_forwards, run_without_blocks
from coprune.model.walk.model_structure import FoundModel, Structure
from coprune.model.walk.prove import prove_replay
from support.toys import ToyBlock, ToyModel

TOKENS = torch.arange(12)[None]


def prove(model: Any) -> Structure:
    blocks = find_blocks(model)
    return prove_replay(FoundModel(InMemory(model), blocks, choose_matrices(model, blocks)), TOKENS).structure


class ChangesBetween(ToyModel):
    def between(self, index: int, hidden: Tensor) -> Tensor:
        return hidden * 2 if index == 2 else hidden


class RunsTwice(ToyModel):
    def run_blocks(self, hidden: Tensor) -> Tensor:
        return self.layers[0](self.layers[0](hidden))


class Backwards(ToyModel):
    def run_blocks(self, hidden: Tensor) -> Tensor:
        for block in reversed(self.layers):
            hidden = block(hidden)
        return hidden


class SkipsOne(ToyModel):
    def run_blocks(self, hidden: Tensor) -> Tensor:
        return self.layers[2](self.layers[0](hidden))


class SkipsTheLast(ToyModel):
    def run_blocks(self, hidden: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](hidden))


class TurnsBack(ToyModel):
    def run_blocks(self, hidden: Tensor) -> Tensor:
        return self.layers[1](self.layers[2](self.layers[0](hidden)))


class DependsOnEarlierBlocks(ToyModel):
    def run_blocks(self, hidden: Tensor) -> Tensor:
        for block in self.layers:
            hidden = block(hidden, scale=hidden.square().mean().sqrt())
        return hidden


class NotesBlock(ToyBlock):
    """A block that leaves values for later ones, and may use those it is given."""

    reads = asks = False

    def forward(self, hidden: Tensor, notes: Any = None, earlier: Tensor | None = None) -> Tensor:
        out = super().forward(hidden)
        if self.reads and "last" in notes:
            out = out + notes["last"].mean()
        if self.asks and earlier is not None:
            out = out * 2
        notes["last"] = hidden
        return out


class LeavesNotes(ToyModel):
    """A model that passes every block the values left and computed by earlier ones."""

    block: type[NotesBlock] = NotesBlock

    def __init__(self) -> None:
        super().__init__(blocks=0)
        torch.manual_seed(0)
        self.layers = nn.ModuleList(self.block() for _ in range(3)).requires_grad_(False)

    def run_blocks(self, hidden: Tensor) -> Tensor:
        notes, first = UserDict[str, Tensor](), hidden
        for block in self.layers:
            hidden = block(hidden, notes=notes, earlier=None if hidden is first else hidden.square())
        return hidden


class ReadsNotes(LeavesNotes):
    block = type("Reads", (NotesBlock,), {"reads": True})


class AsksWhetherThereIsAny(LeavesNotes):
    block = type("Asks", (NotesBlock,), {"asks": True})


class AddsTheFirstHidden(ToyModel):
    def run_blocks(self, hidden: Tensor) -> Tensor:
        return hidden + super().run_blocks(hidden)


class NotANumber(ToyModel):
    def between(self, index: int, hidden: Tensor) -> Tensor:
        return hidden / 0 if index == 1 else hidden


class Random(ToyModel):
    def __init__(self) -> None:
        super().__init__()
        second: Any = self.layers[1]
        second.first = nn.Sequential(second.first, nn.Dropout(0.5).train())


class AnswersOtherwise(ToyModel):
    def forward(self, input_ids: Tensor, use_cache: bool = False, **more: Any) -> Any:
        return SimpleNamespace(pooled=self.run_blocks(self.embeddings(input_ids)))


class Two(NamedTuple):
    hidden: Tensor
    other: Tensor


class TwoStreams(ToyBlock):
    def forward(self, hidden: Tensor, scale: Tensor | None = None) -> Any:
        return Two(super().forward(hidden, scale), hidden)


class AnswersByName(ToyModel):
    def __init__(self) -> None:
        super().__init__(blocks=0)
        self.layers = nn.ModuleList(TwoStreams() for _ in range(3)).requires_grad_(False)

    def run_blocks(self, hidden: Tensor) -> Tensor:
        for block in self.layers:
            hidden = block(hidden).hidden
        return hidden


REFUSED = {
    AnswersByName: "a block returns Two instead of hidden states",
    AnswersOtherwise: "returns neither logits",
    ChangesBetween: "changes the hidden states between the blocks, before layers.2",
    RunsTwice: "layers.0 runs out of order or twice",
    Backwards: "layers.2 runs out of order",
    TurnsBack: "layers.2 runs out of order or twice",
    DependsOnEarlierBlocks: "layers.1 gets an argument that depends on",
    AsksWhetherThereIsAny: "layers.2 gets an argument that depends on",
    Random: "layers.1 replayed",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unsupported_structures_are_refused_unchanged(kind: type[ToyModel]) -> None:
    model = kind()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match=REFUSED[kind]):
        prove(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(block) for block in model.layers)


@pytest.mark.parametrize(("kind", "passed"), [(SkipsOne, 1), (SkipsTheLast, 2)])
def test_blocks_skipped_by_a_forward_are_left_alone(kind: type[ToyModel], passed: int) -> None:
    model: Any = kind()
    matrices = choose_matrices(model, find_blocks(model))
    found = prove_replay(FoundModel(InMemory(model), find_blocks(model), matrices), TOKENS)
    assert [block.name for block in found.passed] == [f"layers.{passed}"]
    assert [(block.index, block.name) for block in found.blocks] == [
        (index, name) for index, name in enumerate(f"layers.{number}" for number in range(3) if number != passed)
    ]
    assert {matrix.name.split(".")[1] for matrix in found.chosen.all()} == {"0", "1", "2"} - {str(passed)}
    assert [(one.why, one.layers) for one in found.chosen.left_out] == [("not used in a forward", 1)] * 2
    assert not any("forward" in vars(block) for block in model.layers)


def test_activations_that_are_not_finite_are_named() -> None:
    with pytest.raises(NumericalError, match=r"layers\.1 of the dense model gives NaN or infinite"):
        prove(NotANumber())


def test_the_heads_input_may_include_more_than_the_blocks_output() -> None:
    # The skip connection around all blocks is part of the model, and is present again when the head runs.
    prove(AddsTheFirstHidden())


def test_arguments_unused_by_blocks_may_depend_on_earlier_blocks() -> None:
    model = LeavesNotes()
    hidden, calls = run_without_blocks(model, find_blocks(model), TOKENS, prove(model).answers)
    for block, call in zip(model.layers, calls, strict=True):
        hidden = call.run(block, hidden)
        assert not call.kwargs["notes"]  # the recorded arguments hold nothing
    assert torch.equal(model.head(hidden), model(TOKENS).logits)


def test_state_left_by_a_block_reaches_the_next() -> None:
    model = ReadsNotes()
    structure = prove(model)
    assert structure.streams == ("notes",)
    hidden, calls = run_without_blocks(model, find_blocks(model), TOKENS, structure.answers)
    calls, streams = open_streams(calls, structure.streams, structure.handed)
    for block, call in zip(model.layers, calls, strict=True):
        hidden = call.run(block, hidden, streams)
    assert torch.equal(model.head(hidden), model(TOKENS).logits)


def test_proof_finds_groups_and_reused_matrices() -> None:
    model = ToyModel()
    structure = prove(model)
    assert [[m.name for m in group] for group in structure.groups[1]] == [["layers.1.first"], ["layers.1.second"]]
    assert structure.reused == []
    model.layers[0].second = model.layers[0].first
    assert prove(model).reused == ["layers.0.first"]


def test_a_patched_forward_of_a_block_is_restored() -> None:
    model = ToyModel()
    own = model.layers[0].forward
    model.layers[0].forward = own
    blocks = find_blocks(model)
    with replaced_forwards(blocks, lambda block: lambda hidden, **more: hidden):
        assert model.layers[0].forward is not own
    assert vars(model.layers[0])["forward"] is own
    assert "forward" not in vars(model.layers[1])


def test_recording_gives_the_first_hidden_states_and_every_call() -> None:
    model = ToyModel()
    hidden, calls = run_without_blocks(model, find_blocks(model), TOKENS, prove(model).answers)
    assert torch.equal(hidden, model.embeddings(TOKENS))
    assert [list(call.kwargs) for call in calls] == [["scale"]] * 3


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = ToyModel()
    name, weight = next((n, p) for n, p in model.layers[1].named_parameters() if p.ndim == 2)
    weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=rf"layers\.1\.{name} of the dense model holds NaN"):
        prove(model)
