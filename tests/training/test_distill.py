"""Losses of distillation against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coprune.evaluation.tasks.embedding_task import Pooling
from coprune.training.distill import Distillation, divergence, hidden_error
from support.pico import pico_model, pico_tokens
from support.pico_readers import pico_reader


def pair(seed: int = 0, vocabulary: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, vocabulary, generator=generator) * 3 for _ in range(2)]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_matches_its_formula(temperature: float) -> None:
    student, teacher = pair()
    p, q = (torch.softmax(logits.double() / temperature, dim=-1) for logits in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    assert float(divergence(student, teacher, temperature)) == pytest.approx(float(expected), rel=1e-5)
    assert float(divergence(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_of_the_divergence_are_those_of_the_plain_formula(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    # More tokens than are compared at once.
    student, teacher = (torch.randn(3, 50, 20, generator=generator) * 3 for _ in range(2))
    p, q = (torch.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student.requires_grad_()))
    expected = (temperature**2 * (p.exp() * (p - q)).sum(-1).mean(),)
    (plain,) = torch.autograd.grad(expected, student)
    (ours,) = torch.autograd.grad(3 * divergence(student, teacher, temperature), student)
    torch.testing.assert_close(ours, 3 * plain, rtol=1e-4, atol=1e-7)


def test_hidden_error_weighs_tokens_by_their_own_size() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(1, 3, 8, generator=generator)
    dense[:, 0] *= 1000
    student = dense * 1.1
    assert float(hidden_error([student, dense], [dense, dense])) == pytest.approx(0.01 / 2, rel=1e-4)


@pytest.mark.parametrize("counterparts", [(), (1, 3, 3)])
def test_every_block_is_compared_with_its_counterpart(counterparts: tuple[int, ...]) -> None:
    teacher, student = pico_model("llama"), pico_model("llama", seed=1)
    inputs = {"input_ids": pico_tokens(2, 8)}
    dense, own = (model(**inputs, output_hidden_states=True, use_cache=False) for model in (teacher, student))
    states = [dense.hidden_states[index] for index in counterparts or (1, 2, 3)]
    expected = divergence(own.logits, dense.logits, 2.0) + hidden_error(own.hidden_states[1:], states)
    objective = Distillation(teacher, 2.0, True, [counterparts] if counterparts else ())
    assert float(objective(student, inputs)) == pytest.approx(float(expected))


def test_a_student_runs_without_dropout_and_stays_in_training_mode() -> None:
    teacher, student = pico_reader("BertModel"), pico_reader("BertModel").train()
    inputs = {"input_ids": pico_tokens(2, 8)}
    objective = Distillation(teacher, 1.0, True, pooled=Pooling().of_hidden)
    assert float(objective(student, inputs)) == pytest.approx(0, abs=1e-6)
    assert all(part.training for part in student.modules())


def test_the_gradient_leads_toward_the_teacher() -> None:
    teacher, student = pico_model("llama"), pico_model("llama", seed=1).requires_grad_(True)
    objective = Distillation(teacher, 2.0, hidden=True)
    inputs = {"input_ids": pico_tokens(2, 16)}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = objective(student, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
