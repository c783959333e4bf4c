"""Block reconstruction with some counted tokens: the loss is their mean, whatever batches they are in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from coprune.model.walk.recording import record_batches
from coprune.pruning.refine.reconstruct import Examples, Reconstruction
from coprune.pruning.refine.trainable_parameters import Trained
from support.pico import pico_model, pico_tokens
from support.walking import prove

COUNTS = (1, 6, 0, 3)


def batches(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 6, generator=generator) for _ in COUNTS]


def marks() -> list[Tensor]:
    """Return masks of some tokens of each batch, in both samples."""
    return [(torch.arange(8) * 5 % 8 < count).view(2, 4) for count in COUNTS]


def trained(examples: Examples, steps: int) -> tuple[Tensor, float]:
    """Train a matrix; return it, and the error before."""
    block = nn.Linear(6, 6, bias=False)
    block.weight.data = torch.eye(6)
    block.requires_grad_(False)
    parts = [Trained("weight", block.get_parameter("weight"), None)]
    # With so few batches none is held out, so all are watched.
    asked = Reconstruction(steps=steps, learning_rate=0.05, held_out=0)
    done = asked.improve(block, parts, lambda batch, hidden: block(hidden), examples)
    return block.weight.data, done.before


def relative(x: Tensor, y: Tensor) -> Tensor:
    """Return squared errors of tokens (N × H) relative to the dense values, each feature relative to its own size."""
    part = (y.square() / y.square().sum(dim=1, keepdim=True)).mean(dim=0)
    return ((x - y).square() / part).sum(dim=1) / (y.square() / part).sum(dim=1)


def bounded(errors: Tensor) -> Tensor:
    """Bound errors, so that a far too large token counts little more than a completely wrong one."""
    return torch.stack([error if error < 1 else 1 + error.log() for error in errors])


def shares(counts: Sequence[int]) -> list[float]:
    return [count * len(counts) / sum(counts) for count in counts]


def test_the_loss_is_the_mean_over_the_tokens_that_count() -> None:
    inputs, targets, counted = batches(0), batches(1), marks()
    weight, before = trained(Examples(inputs, targets, shares(COUNTS), counted), 8)
    x, y = (torch.cat([one[mark] for one, mark in zip(some, counted, strict=True)]) for some in (inputs, targets))
    errors = bounded(relative(x, y))
    assert len(errors) == sum(COUNTS)
    assert before == pytest.approx(float(errors.mean()), rel=1e-6)
    # The same tokens without the others between them, and without the batch that has none.
    alone = [one[mark][None] for one, mark in zip(inputs, counted, strict=True) if bool(mark.any())]
    aims = [one[mark][None] for one, mark in zip(targets, counted, strict=True) if bool(mark.any())]
    again, _ = trained(Examples(alone, aims, [share for share in shares(COUNTS) if share]), 8)
    torch.testing.assert_close(weight, again)
    # Targets of uncounted tokens have no effect.
    other = [torch.where(mark[..., None], one, 1e3) for one, mark in zip(targets, counted, strict=True)]
    assert torch.equal(trained(Examples(inputs, other, shares(COUNTS), counted), 8)[0], weight)
    assert not torch.equal(trained(Examples(inputs, targets, [1.0] * 4), 8)[0], weight)


def test_gradients_of_batches_add_up_to_the_mean_over_counted_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch's gradients sum to that of the mean over counted tokens, times the number of batches."""
    inputs, targets, counted = batches(0), batches(1), marks()
    found: list[Tensor] = []

    def step(self: torch.optim.AdamW) -> None:
        found.append(self.param_groups[0]["params"][0].grad.clone())

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    trained(Examples(inputs, targets, shares(COUNTS), counted), 3)
    weight = torch.eye(6, requires_grad=True)
    x, y = (torch.cat([one[mark] for one, mark in zip(some, counted, strict=True)]) for some in (inputs, targets))
    bounded(relative(x @ weight.T, y)).mean().backward()
    assert weight.grad is not None
    torch.testing.assert_close(sum(found), len(COUNTS) * weight.grad)


def test_token_shares_depend_only_on_counted_tokens() -> None:
    proven = prove(pico_model("llama"), pico_tokens(1, 24))
    recording = record_batches(proven, pico_tokens(5, 8).split(2))
    assert recording.shares == [1.0, 1.0, 1.0], "a last batch with fewer samples counts as ever"
    recording.counted = [torch.arange(16).view(2, 8) < 4, torch.zeros(2, 8) > 0, torch.arange(8)[None] < 2]
    assert recording.shares == [2.0, 0.0, 1.0]
    assert Reconstruction(steps=3).batches_used(recording.shares) == {0, 2}
    lengths = record_batches(proven, [pico_tokens(2, 8), pico_tokens(1, 32)])
    assert lengths.shares == [16 / 24, 32 / 24]


@pytest.mark.parametrize(
    ("positions", "steps"), [([1024] * 16, 6), ([512] * 64, 12), ([2048] * 4, 6), ([512, 1536], 6)]
)
def test_tokens_set_a_minimum_for_any_sample_length(positions: list[int], steps: int) -> None:
    asked = Reconstruction(steps=6, tokens=6144)
    assert asked.on(positions) == Reconstruction(steps=steps)
    assert Reconstruction(steps=6).on(positions) == Reconstruction(steps=6)


def test_a_recording_knows_each_batchs_number_of_hidden_states() -> None:
    proven = prove(pico_model("llama"), pico_tokens(1, 24))
    assert record_batches(proven, [pico_tokens(2, 8), pico_tokens(1, 32)]).positions == [16, 32]


@pytest.mark.parametrize(("steps", "taken"), [(1, 1), (3, 3), (6, 4), (12, 8), (40, 30)])
def test_a_training_that_improves_nothing_ends_early(steps: int, taken: int) -> None:
    block = nn.Linear(6, 6, bias=False)
    block.weight.data = torch.eye(6)
    block.requires_grad_(False)
    inputs, tried = batches(0), []

    def run(batch: int, hidden: Tensor) -> Tensor:
        tried.append(torch.is_grad_enabled())
        return block(hidden)

    parts = [Trained("weight", block.get_parameter("weight"), None)]
    asked = Reconstruction(steps=steps, held_out=0.25)
    assert asked.improve(block, parts, run, Examples(inputs, inputs, [1.0] * 4)).after == 0
    assert sum(tried) == taken


@pytest.mark.parametrize(("steps", "rate"), [(6, 0.02), (6, 0.3), (12, 0.1), (40, 0.5)])
def test_the_best_watched_state_is_kept(steps: int, rate: float) -> None:
    block = nn.Linear(6, 6, bias=False)
    block.weight.data = torch.eye(6)
    block.requires_grad_(False)
    inputs, targets, seen = batches(0), batches(1), []

    def run(batch: int, hidden: Tensor) -> Tensor:
        output = block(hidden)
        if not torch.is_grad_enabled():
            seen.append(float(examples.error(batch, output, weights)))
        return output

    examples = Examples(inputs, targets, [1.0] * 4)
    weights = examples.weights(range(4))
    parts = [Trained("weight", block.get_parameter("weight"), None)]
    done = Reconstruction(steps=steps, held_out=0.25).improve(block, parts, run, examples, [rate, 1e3, rate / 2])
    assert done.before == seen[0]
    assert len(seen) > 3
    assert done.after == min(seen) == float(examples.error(3, block(inputs[3]), weights))
    assert done.rate in (rate, rate / 2)


def test_a_far_too_large_token_counts_little_more_than_a_wrong_one() -> None:
    targets = [torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])]
    examples, alike = Examples(targets, targets, [1.0]), torch.ones(2)
    near = torch.tensor([[[3.0, 4.0], [0.05, 5.0]]])
    assert float(examples.error(0, near, alike)) == pytest.approx(0.5 * (0.05 / 5) ** 2)
    wrong, huge = (torch.tensor([[[3.0, 4.0], [0.0, value]]]) for value in (-5.0, 155.0))
    assert float(examples.error(0, wrong, alike)) == pytest.approx(0.5 * (1 + math.log(4)))
    assert float(examples.error(0, huge, alike)) == pytest.approx(0.5 * (1 + math.log(900)))


@given(st.lists(st.floats(1 / 8, 8), min_size=2, max_size=6))
def test_each_feature_counts_equally_whatever_its_size(sizes: list[float]) -> None:
    """Silencing any feature costs the same, although one may be 64 times larger."""
    size = torch.tensor(sizes)
    signs = torch.randint(0, 2, (2, 5, len(sizes)), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    examples = Examples([signs], [signs * size], [1.0])
    weights = examples.weights([0])
    for feature in range(len(sizes)):
        silent = torch.ones(len(sizes))
        silent[feature] = 0
        assert float(examples.error(0, signs * size * silent, weights)) == pytest.approx(1 / len(sizes), rel=1e-3)


def test_a_constant_zero_feature_does_not_dominate() -> None:
    target = torch.ones(1, 4, 3) * torch.tensor([1.0, 1.0, 0.0])
    examples = Examples([target], [target], [1.0])
    weights = examples.weights([0])
    assert weights.tolist() == pytest.approx([2 / 3, 2 / 3, 1e4])
    assert float(examples.error(0, target + torch.tensor([0.0, 0.0, 1e-3]), weights)) == pytest.approx(0.0075)
    nothing = Examples([target], [torch.zeros_like(target)], [1.0])
    assert math.isfinite(float(nothing.error(0, target, nothing.weights([0]))))


def test_relative_rates_train_weights_of_any_size_alike() -> None:
    """Weights ten times as large on inputs a tenth as large are the same layer, also after training."""
    inputs = batches(0)
    targets = [batch @ (torch.eye(6) + torch.arange(36).view(6, 6) / 400) for batch in inputs]

    def trained_at(scale: float) -> Tensor:
        block = nn.Linear(6, 6, bias=False)
        block.weight.data = torch.eye(6) * scale
        block.weight.data[0, 1] = 0.5 * scale
        block.requires_grad_(False)
        parts = [Trained("weight", block.get_parameter("weight"), block.weight.data != 0)]
        examples = Examples([batch / scale for batch in inputs], targets, [1.0] * 4)
        Reconstruction(steps=5, held_out=0, learning_rate=0.01).improve(
            block, parts, lambda batch, hidden: block(hidden), examples
        )
        return block.weight.data / scale

    assert not torch.allclose(trained_at(1), torch.eye(6), atol=0.01)
    torch.testing.assert_close(trained_at(10), trained_at(1), rtol=1e-3, atol=1e-4)
