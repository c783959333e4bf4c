"""The residual stream in another order: N:M retains more of what reads it, and the model computes what it did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coprune.model.removal.find_parts import insides_of
from coprune.model.stream_order import find_stream_axes
from coprune.model.walk.recording import record_batches
from coprune.pruning.methods import METHODS
from coprune.pruning.permute.apply import permute_model
from coprune.pruning.permute.stream import StreamScores
from coprune.recipe.pattern import NM
from coprune.training.distill import Distillation
from coprune.training.teacher import features_in
from support.pico import pico_model, pico_tokens, randomise_vectors
from support.walking import matrices_of, prove

FAMILIES = [
    "llama",
    "qwen3",
    "gemma2",
    "opt",
    "gpt_neox",
    "gpt2",
    "phi3",
    "falcon",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
]


def hidden_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        states: tuple[torch.Tensor, ...] = model(pico_tokens(4, 24, seed=9), output_hidden_states=True).hidden_states
    return torch.stack(states)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_hidden_states_come_out_in_the_other_order(family: str) -> None:
    model = pico_model(family)
    randomise_vectors(model)
    axes = StreamScores.of(prove(model, pico_tokens(1, 32))).axes
    assert axes is not None
    order = torch.randperm(axes.size, generator=torch.Generator().manual_seed(1))
    before = hidden_of(model)
    axes.permute(model, order)
    assert torch.allclose(hidden_of(model), before[..., order], rtol=1e-3, atol=1e-4)
    axes.permute(model, order.argsort())
    assert torch.allclose(hidden_of(model), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_what_reads_the_stream_retains_more(family: str) -> None:
    model = pico_model(family)
    randomise_vectors(model)
    batches = pico_tokens(16, 32).split(8)
    proven = prove(model, batches[0][:1])
    before = {matrix.name: matrix.read() for matrix in matrices_of(model)}
    found = permute_model(proven, record_batches(proven, batches), METHODS["magnitude"], NM(2, 4))
    assert found.stream is not None
    inside = {
        consumer.name for folds in insides_of(proven).folds.values() for fold in folds for consumer in fold.consumers
    }
    readers = [matrix for matrix in matrices_of(model) if matrix.name not in inside]
    assert found.stream.matrices == len(readers)
    assert found.stream.gained > 0.002
    for matrix in readers:  # a feature's weights stay together, whatever else was permuted
        columns = sorted(before[matrix.name].abs().sum(dim=0).tolist())
        assert sorted(matrix.read().abs().sum(dim=0).tolist()) == pytest.approx(columns, rel=1e-4)


def test_a_model_that_computes_something_else_then_is_put_back() -> None:
    model = pico_model("qwen3_5_text")  # some of its matrices between blocks read the stream beside what is known of it
    randomise_vectors(model)
    batches = pico_tokens(16, 32).split(8)
    before = hidden_of(model)
    proven = prove(model, batches[0][:1])
    assert permute_model(proven, record_batches(proven, batches), METHODS["wanda"], NM(2, 4)).stream is None
    assert torch.allclose(hidden_of(model), before, rtol=1e-4, atol=1e-5)


def test_sizes_that_leave_it_open_are_no_stream() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    known = find_stream_axes(model, 8, inside=())
    assert known is not None
    assert dict(known.axes) == {"0.weight": 1, "1.weight": 0, "1.bias": 0}  # it reads, so its outputs are none of it
    known = find_stream_axes(model, 8, inside=("0.weight",))
    assert known is not None
    assert dict(known.axes) == {"0.weight": 0, "1.weight": 0, "1.bias": 0, "0.bias": 0}
    model.register_parameter("mixing", nn.Parameter(torch.eye(8)))
    assert find_stream_axes(model, 8, inside=()) is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_teacher_is_compared_feature_by_feature(family: str) -> None:
    model, teacher = pico_model(family), pico_model(family)
    assert features_in(model, teacher) is None
    axes = StreamScores.of(prove(model, pico_tokens(1, 32))).axes
    assert axes is not None
    order = torch.randperm(axes.size, generator=torch.Generator().manual_seed(2))
    axes.permute(model, order)
    found = features_in(model, teacher)
    assert found is not None
    assert torch.equal(found, order)
    inputs = {"input_ids": pico_tokens(2, 24, seed=5)}
    with torch.no_grad():
        alike = Distillation(teacher, 1.0, 1.0, 1.0, 0.0, (), found)(model, inputs, torch.arange(2))
        as_they_stand = Distillation(teacher, 1.0, 1.0, 1.0, 0.0)(model, inputs, torch.arange(2))
    assert alike < 1e-6
    assert as_they_stand > 0.5


def test_models_of_another_width_have_no_features_in_common() -> None:
    assert features_in(pico_model("llama"), pico_model("llama", hidden_size=32)) is None
