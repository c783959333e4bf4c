"""Statistics of some tokens: in a causal model, those of a text's first tokens equal those of a text that ends there."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from coprune.base.errors import UnsupportedModel
from coprune.model.matrices import Matrix
from coprune.model.walk.block_events import MatricesReady
from coprune.model.walk.inputs import CountedRows, Inputs
from coprune.model.walk.recording import ByBlock, Dense, Moves, Sequential, record_batches
from coprune.model.walk.statistics import Gram, InputMoments, InputNorm, Statistic
from coprune.model.walk.walk import Walk
from support.pico import MIXTURES, MORE_MIXTURES, pico_model, pico_tokens
from support.sample import crossed, of_ten
from support.walking import prove

TOKENS = pico_tokens(4, 24)
LENGTHS = (5, 17, 1, 24)
KINDS: list[type[Statistic]] = [InputNorm, InputMoments, Gram]
MOVES: list[Moves] = [ByBlock(), Sequential(), Dense()]


def first(lengths: Sequence[int]) -> Tensor:
    """Return the mask of each sample's first tokens: samples × S bool."""
    return torch.arange(TOKENS.shape[1])[None] < torch.tensor(lengths)[:, None]


def gathered(
    family: str, batches: Sequence[Tensor], counted: Sequence[Tensor] | None, kind: type[Statistic], moves: Moves
) -> dict[str, Inputs]:
    """Return a walk's statistics by the first matrix of each group, changing every matrix as pruning would."""
    model = pico_model(family)
    proven = prove(model, TOKENS[:1])
    recording = record_batches(proven, batches)
    recording.counted = counted
    found = {}
    for event in Walk(proven, recording, kind, moves):
        if isinstance(event, MatricesReady):
            assert event.inputs is not None
            found[event.matrices[0].name] = event.inputs
            for matrix in event.matrices:
                matrix.write(matrix.read() * 0.9)
    return found


def assert_same(found: dict[str, Inputs], expected: dict[str, Inputs]) -> None:
    assert found.keys() == expected.keys()
    for name, inputs in expected.items():
        assert found[name].sample.count == inputs.sample.count, name
        for mine, other in (
            (found[name].statistic, inputs.statistic),
            (found[name].pool, inputs.pool),
        ):
            assert (mine is None) == (other is None)
            if mine is not None and other is not None:
                assert mine.count == other.count, name
                for which, total in other.sums.items():
                    torch.testing.assert_close(mine.sums[which], total, rtol=1e-4, atol=1e-4 * float(total.abs().max()))


def compare(family: str, kind: type[Statistic], moves: Moves) -> dict[str, Inputs]:
    """Count only each sample's first tokens, and compare with texts that end there."""
    alone = [TOKENS[i : i + 1, :length] for i, length in enumerate(LENGTHS)]
    expected = gathered(family, alone, None, kind, moves)
    found = gathered(family, TOKENS.split(2), first(LENGTHS).split(2), kind, moves)
    assert_same(found, expected)
    return found


@pytest.mark.parametrize("moves", MOVES, ids=["block", "sequential", "dense"])
@pytest.mark.parametrize(("family", "kind"), crossed(["llama", "mixtral"], KINDS))
def test_every_statistic_counts_the_marked_tokens_in_every_propagation(
    family: str, kind: type[Statistic], moves: Moves
) -> None:
    kinds = Statistic.__subclasses__()
    assert {*kinds, *(own for one in kinds for own in one.__subclasses__())} == {*KINDS}, "a statistic is missing here"
    found = compare(family, kind, moves)
    assert max(inputs.sample.count for inputs in found.values()) == sum(LENGTHS)


@pytest.mark.parametrize(
    "family",
    of_ten(["opt", "gpt2", *list(MIXTURES)[1:], *MORE_MIXTURES, "granitemoe"]),
)
def test_experts_of_every_layout_count_the_marked_tokens(family: str) -> None:
    compare(family, Gram, Sequential())


def test_indistinguishable_tokens_are_refused() -> None:
    # Equal tokens are equal rows before attention, but no longer after it, in the second of jetmoe's products.
    with pytest.raises(UnsupportedModel, match=r"output_linear.weight\[\d\] is .* whose tokens are unknown"):
        compare("jetmoe", Gram, Dense())


def test_counted_rows_are_summed_to_the_last_bit() -> None:
    counted = first(LENGTHS)
    found = gathered("llama", [TOKENS], [counted], Gram, Dense())
    model = pico_model("llama")
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(TOKENS))
    expected = Gram(x.shape[-1])
    expected.update(x[counted])
    name = "model.layers.0.self_attn.q_proj"
    statistic = found[name].statistic
    assert statistic is not None
    assert all(torch.equal(statistic.sums[which], total) for which, total in expected.sums.items())
    everything = gathered("mixtral", [TOKENS], None, Gram, Sequential())
    marked = gathered("mixtral", [TOKENS], [torch.ones_like(counted)], Gram, Sequential())
    for name, inputs in everything.items():
        same = marked[name].statistic
        assert same is not None
        assert inputs.statistic is not None
        assert all(torch.equal(same.sums[which], total) for which, total in inputs.statistic.sums.items())


def expert(number: int, width: int) -> Matrix:
    owner = torch.nn.Module()
    owner.weight = torch.nn.Parameter(torch.zeros(4, 3, width))
    return Matrix(f"experts.weight[{number}]", owner, "weight", 1, number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counted_rows_are_found_in_any_order(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 8, 6, generator=generator).to(dtype)
    hidden[1, 3], hidden[0, 2] = hidden[0, 5], hidden[0, 1]  # equal rows, only one of them counted
    counted = torch.rand(2, 8, generator=generator) < 0.5
    counted[0, 5], counted[1, 3] = True, False
    rows = CountedRows(counted)
    rows.hear(torch.randn(2, 8, 6))
    rows.hear(hidden.float().view(-1, 6))  # routers often compute in float32
    rows.hear(torch.randn(2, 8, 5))
    order = torch.randperm(16, generator=generator)
    order = order[(order != 7) & (order != 0)]
    flat = hidden.view(-1, 6)[order]
    found = rows.of(expert(1, 6), flat)
    expected = hidden.view(-1, 6)[order[counted.flatten()[order]]]
    assert torch.equal(found.float().sort(dim=0).values, expected.float().sort(dim=0).values)
    # Later products of the same expert have the same rows.
    after = rows.of(expert(1, 3), flat[:, :3] * 2)
    assert torch.equal(after, found[:, :3] * 2)
    with pytest.raises(UnsupportedModel, match="count all tokens with calibrate_on='all'"):
        rows.of(expert(2, 6), flat + 1)
