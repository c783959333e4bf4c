"""Distillation's losses against their formulas, and the teacher that is run ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coprune.training.distill import Distillation, TeacherCache, divergence, divergence_of_top, hidden_error
from support.pico import pico_model, pico_tokens


def pair(seed: int = 0, vocabulary: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, vocabulary, generator=generator) * 3 for _ in range(2)]


def batch(tokens: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens, "labels": tokens}


def top_of(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    values, indices = torch.log_softmax(teacher / temperature, dim=-1).topk(k, dim=-1)
    return values, indices


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_the_formula(temperature: float) -> None:
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


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 19), st.sampled_from([1.0, 2.0]))
def test_divergence_of_the_likeliest_bounds_the_whole_from_below_and_grows(
    seed: int, k: int, temperature: float
) -> None:
    student, teacher = pair(seed)
    whole = float(divergence(student, teacher, temperature))
    some, more = (float(divergence_of_top(student, *top_of(teacher, n, temperature), temperature)) for n in (k, k + 1))
    assert -1e-5 <= some <= more + 1e-4
    assert more <= whole + 1e-4


def test_divergence_of_all_is_the_whole() -> None:
    student, teacher = pair()
    assert float(divergence_of_top(student, *top_of(teacher, 20, 2.0), 2.0)) == pytest.approx(
        float(divergence(student, teacher, 2.0)), rel=1e-4
    )


def test_hidden_error_weighs_tokens_by_their_own_size() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(1, 3, 8, generator=generator)
    dense[:, 0] *= 1000
    student = dense * 1.1
    assert float(hidden_error([student, dense], [dense, dense])) == pytest.approx(0.01 / 2, rel=1e-4)


def test_the_gradient_leads_toward_the_teacher() -> None:
    teacher, student = pico_model("llama"), pico_model("llama", seed=1).requires_grad_(True)
    objective = Distillation(teacher, 2.0, 1.0, 1.0, 0.5)
    inputs, windows = batch(pico_tokens(2, 16)), torch.arange(2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = objective(student, inputs, windows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_run_ahead_says_what_the_teacher_says(tmp_path: Path) -> None:
    teacher, student = pico_model("llama"), pico_model("llama", seed=1)
    tokens = pico_tokens(35, 8)  # more than one file
    cache = TeacherCache(tmp_path)
    cache.fill(teacher, tokens, 256, 2.0, torch.device("cpu"))
    windows = torch.tensor([3, 34])
    ahead = Distillation(cache, 2.0, 1.0, 0.0, 0.0)(student, batch(tokens[windows]), windows)
    beside = Distillation(teacher, 2.0, 1.0, 0.0, 0.0)(student, batch(tokens[windows]), windows)
    assert float(ahead) == pytest.approx(float(beside), rel=1e-3)


def test_an_interrupted_pass_of_the_teacher_goes_on(tmp_path: Path) -> None:
    teacher, tokens = pico_model("llama"), pico_tokens(40, 8)
    TeacherCache(tmp_path / "whole").fill(teacher, tokens, 5, 2.0, torch.device("cpu"))
    calls = []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 36:
            raise KeyboardInterrupt

    handle = teacher.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        TeacherCache(tmp_path / "cut").fill(teacher, tokens, 5, 2.0, torch.device("cpu"))
    handle.remove()
    calls.clear()
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    TeacherCache(tmp_path / "cut").fill(teacher, tokens, 5, 2.0, torch.device("cpu"))
    handle.remove()
    assert len(calls) == 8
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()
