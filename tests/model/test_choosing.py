"""The products of a forward decide what is a matrix, a mixture or a router; everything else is named, or the model refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.weights import InMemory
from coprune.model.matrix_choice import Chosen, choose_matrices
from coprune.model.walk.block_events import MatricesReady
from coprune.model.walk.model_structure import FoundModel, ProvenModel
from coprune.model.walk.prove import prove_replay
from coprune.model.walk.recording import record_batches
from coprune.model.walk.statistics import InputNorm
from coprune.model.walk.walk import Walk
from support.pico import pico_model
from support.toys import ToyBlock, ToyModel

TOKENS = torch.arange(12)[None]
WIDTH, EXPERTS = 8, 3


def proven(model: Any, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> ProvenModel:
    blocks = find_blocks(model)
    found = FoundModel(InMemory(model), blocks, choose_matrices(model, blocks, include, exclude))
    return prove_replay(found, TOKENS)


def chosen_of(model: Any, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Chosen:
    return proven(model, include, exclude).chosen


def mean_squares(model: Any) -> dict[str, Tensor]:
    """Return the mean squares of the inputs of every matrix in the first block."""
    found = proven(model)
    walk = Walk(found, record_batches(found, [TOKENS]), InputNorm)
    ready = [event for event in walk if isinstance(event, MatricesReady)]
    return {m.name.removeprefix("layers.0."): e.inputs.statistic.mean_square for e in ready for m in e.matrices}


def toy(kind: Callable[[], nn.Module]) -> Any:
    """Return a model of two toy blocks of a kind."""
    model = ToyModel(blocks=0)
    torch.manual_seed(0)
    model.layers = nn.ModuleList(kind() for _ in range(2))
    return model.eval().requires_grad_(False)


def names_in(chosen: Chosen, block: int = 0) -> list[str]:
    return [matrix.name.removeprefix(f"layers.{block}.") for matrix in chosen.blocks[block]]


def lines(chosen: Chosen) -> list[str]:
    return [str(layers).replace("layers.*.", "") for layers in chosen.left_out]


class Stack(nn.Module):
    """Three matrices in one parameter, multiplied by a subclass's rule."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 4)


class OneByOne(Stack):
    def forward(self, hidden: Tensor) -> Tensor:
        return sum(hidden @ table.T for table in self.tables) / EXPERTS


class AtOnce(Stack):
    def forward(self, hidden: Tensor) -> Tensor:
        return torch.bmm(hidden.expand(EXPERTS, -1, -1), self.tables.transpose(1, 2)).mean(dim=0, keepdim=True)


class Elementwise(Stack):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.tables.mean(dim=(0, 1))


class OneBackwards(Stack):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.tables[0]


class Mixture(nn.Module):
    """A mixture with a router and a shared layer, beside layers as wide as the number of experts."""

    stack: type[nn.Module] = OneByOne

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.shared_gate = nn.Linear(WIDTH, 1)
        self.experts = self.stack()
        self.shared = nn.Sequential(nn.Linear(WIDTH, EXPERTS), nn.Linear(EXPERTS, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.router(hidden).softmax(dim=-1).amax(dim=-1, keepdim=True) + self.shared_gate(hidden)
        return weight * self.experts(hidden) + self.shared(hidden)


class MixtureBlock(ToyBlock):
    mixture: type[nn.Module] = Mixture

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.narrow = nn.Linear(WIDTH, EXPERTS)
        self.mlp = self.mixture()

    def forward(self, hidden: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(hidden, scale) + self.mlp(hidden) + self.narrow(hidden).mean(dim=-1, keepdim=True)


def mixture_of(stack: type[nn.Module]) -> Any:
    mixture = type("M", (Mixture,), {"stack": stack})
    return toy(type("B", (MixtureBlock,), {"mixture": mixture}))


ROUTERS = ["mlp.router (a router; 2 layers)", "mlp.shared_gate (a router; 2 layers)"]
OTHERS = ["first", "second", "narrow", "mlp.shared.0", "mlp.shared.1"]
TABLES = [f"mlp.experts.tables[{expert}]" for expert in range(EXPERTS)]


@pytest.mark.parametrize("stack", [OneByOne, AtOnce])
def test_a_mixture_has_experts_and_routers_and_width_alone_makes_none(stack: type[nn.Module]) -> None:
    chosen = chosen_of(mixture_of(stack))
    assert sorted(names_in(chosen)) == sorted(OTHERS + TABLES)
    assert lines(chosen) == ROUTERS


def test_a_router_may_choose_experts_that_do_nothing() -> None:
    class SomeDoNothing(OneByOne):
        """A mixture with experts that do nothing, for which only the first parameter has a place."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.idle = nn.Parameter(torch.randn(2 * EXPERTS, WIDTH, WIDTH) / 4)
            self.tables = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 4)

        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden @ self.idle[0].T)

    model = mixture_of(SomeDoNothing)
    for block in model.layers:
        block.mlp.router = nn.Linear(WIDTH, 2 * EXPERTS)
    assert lines(chosen_of(model)) == ROUTERS


def test_a_parameter_of_three_dimensions_that_is_not_multiplied_is_no_mixture() -> None:
    chosen = chosen_of(mixture_of(Elementwise))
    assert sorted(names_in(chosen)) == sorted([*OTHERS, "mlp.router", "mlp.shared_gate"])
    assert lines(chosen) == [
        "mlp.experts.tables[*] (three dimensions, and none of its matrices is multiplied; 2 layers)"
    ]


def test_experts_in_one_product_see_their_own_inputs() -> None:
    seen = mean_squares(mixture_of(AtOnce))
    for table in TABLES:
        assert torch.equal(seen[table], seen["first"])


def test_products_along_outputs_are_refused_unless_excluded() -> None:
    model = mixture_of(OneBackwards)
    with pytest.raises(
        UnsupportedModel, match=r"tables\[0\] is multiplied along its outputs; leave it out with exclude="
    ):
        chosen_of(model)
    assert not any("tables" in name for name in names_in(chosen_of(model, exclude=["*tables"])))


class Experts(nn.ModuleList):
    """Experts as separate modules, the last without tokens."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, hidden: Tensor) -> Tensor:
        return self[0](hidden) + self[1](hidden)


def test_experts_may_be_separate_modules_and_get_no_token() -> None:
    chosen = chosen_of(mixture_of(Experts))
    assert sorted(names_in(chosen)) == sorted([*OTHERS, *(f"mlp.experts.{expert}" for expert in range(EXPERTS))])
    assert lines(chosen) == ROUTERS


class Unused(ToyBlock):
    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.idle = nn.Linear(WIDTH, WIDTH)


class Unobservable(Unused):
    def forward(self, hidden: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(hidden, scale) + torch.einsum("bsi,oi->bso", hidden, self.idle.weight)


def test_a_layer_unused_in_a_forward_is_left_alone_and_named() -> None:
    chosen = chosen_of(toy(Unused))
    assert names_in(chosen) == ["first", "second"]
    assert lines(chosen) == ["idle (not used in a forward; 2 layers)"]


def test_a_layer_with_unobserved_products_is_left_alone_and_named() -> None:
    chosen = chosen_of(toy(Unobservable))
    assert names_in(chosen) == ["first", "second"]
    assert lines(chosen) == ["idle (in no product that coprune can observe; 2 layers)"]


class Left(Unused):
    def forward(self, hidden: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(hidden, scale) + (self.idle.weight @ hidden.mT).mT


def test_a_weight_may_be_the_left_factor_of_a_product() -> None:
    seen = mean_squares(toy(Left))
    assert torch.equal(seen["idle"], seen["first"])


def test_excluded_layers_are_named() -> None:
    chosen = chosen_of(mixture_of(OneByOne), exclude=["*.first", "*.tables[[]1]"])
    assert lines(chosen) == [
        "first (excluded; 2 layers)",
        ROUTERS[0],
        ROUTERS[1],
        "mlp.experts.tables[*] (excluded; 2 layers)",
    ]
    assert "not included" in lines(chosen_of(mixture_of(OneByOne), include=["*.first"]))[0]


def test_a_router_is_pruned_if_named_explicitly() -> None:
    assert "mlp.router" in names_in(chosen_of(mixture_of(OneByOne), include=["*", "*.router"]))


class Tables(ToyBlock):
    def __init__(self, rows: int = 40) -> None:
        super().__init__(WIDTH)
        self.table = nn.Parameter(torch.randn(rows, WIDTH))
        self.bias_table = nn.Parameter(torch.randn(rows, WIDTH))
        self.kernel = nn.Conv1d(WIDTH, WIDTH, 3)
        self.places = nn.Embedding(2, WIDTH)


def test_tables_are_named_and_a_block_of_mostly_tables_is_refused() -> None:
    class Few(Tables):
        def __init__(self) -> None:
            super().__init__(rows=2)
            self.third, self.fourth = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

        def forward(self, hidden: Tensor, scale: Tensor | None = None) -> Tensor:
            return super().forward(hidden, scale) + self.fourth(self.third(hidden))

    assert lines(chosen_of(toy(Few))) == [
        "table (the weight of no linear layer; 2 layers)",
        "kernel (a convolution in 1 dimension; 2 layers)",
        "places (an embedding; 2 layers)",
    ]
    with pytest.raises(
        UnsupportedModel, match=r"only 20 % of the weights of layers\.0 .* in layers\.0\.table \(40 × 8"
    ):
        chosen_of(toy(Tables))


def test_blocks_without_matrices_are_passed_through_unless_they_are_most_of_the_model() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(WIDTH, WIDTH))

        def forward(self, hidden: Tensor, scale: Tensor | None = None) -> Tensor:
            return hidden * self.table.mean(dim=0)

    model = toy(ToyBlock)
    model.layers.insert(1, Mixing())
    assert lines(chosen_of(model)) == ["table (the weight of no linear layer; 1 layer)"]
    for _ in range(4):
        model.layers.append(Mixing())
    with pytest.raises(
        UnsupportedModel, match=r"only 44 % of the weights of its blocks .* in layers\.1\.table \(8 × 8"
    ):
        chosen_of(model)


def test_weights_shared_outside_the_blocks_are_left_alone() -> None:
    model = ToyModel(blocks=2, width=32)
    model.layers[0].first.weight = model.embeddings.weight
    chosen = chosen_of(model)
    assert "layers.0.first" not in {matrix.name for matrix in chosen.all()}
    assert lines(chosen) == ["first (weights shared with another part of the model; 1 layer)"]


@pytest.mark.parametrize("by_object", [True, False])
def test_weights_shared_by_two_blocks_are_chosen_once(by_object: bool) -> None:
    def sharing() -> ToyModel:
        model = ToyModel(blocks=2, width=32)
        if by_object:
            model.layers[0].first.weight = model.layers[1].second.weight
        else:
            model.layers[0].first.weight.data = model.layers[1].second.weight.data
        return model

    chosen = chosen_of(sharing())
    assert [[matrix.name for matrix in uses] for uses in chosen.several] == [["layers.0.first", "layers.1.second"]]
    assert [matrix.name for matrix in chosen.all()].count("layers.0.first") == 1
    assert not any(name in names_in(chosen, block) for block, name in enumerate(("first", "second")))
    # Excluding it in one of the blocks excludes it in both.
    chosen = chosen_of(sharing(), exclude=["layers.1.*"])
    assert not chosen.several
    assert "first (weights that several blocks share; 1 layer)" in lines(chosen)


def test_a_model_without_matrices_is_refused_even_if_only_a_forward_shows_it() -> None:
    with pytest.raises(BadInput, match="no matrix is left"):
        chosen_of(mixture_of(Elementwise), include=["*.tables"])


def test_a_pattern_may_exclude_layers_that_are_no_matrices() -> None:
    model = pico_model("lfm2")
    assert "model.layers.*.conv.conv" in {layers.kind for layers in chosen_of(model, exclude=["*.conv.conv"]).left_out}


def test_an_expert_may_be_named_by_its_listed_name() -> None:
    everything = names_in(chosen_of(mixture_of(OneByOne)))
    expert = next(name for name in everything if name.endswith("[1]"))
    assert names_in(chosen_of(mixture_of(OneByOne), exclude=[f"*{expert}"])) == [n for n in everything if n != expert]
