"""Zeros that move: the steps of ADMM as they are written, patterns and numbers of zeros that stand, and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.training import move_zeros
from coprune.training.masks import find_masks
from coprune.training.move_zeros import MovingZeros, next_total, penalty_gradient
from coprune.training.run import run_finetuning
from coprune.training.settings import make_settings
from support.pico import pico_model
from support.pruned import StoppedAt, pruned_model, save, settings_for, write_text, zeros_of

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "mixtral"):
        save(pruned_model(family, num_hidden_layers=2), folder / family)
    save(pico_model("llama", vocab_size=1002, num_hidden_layers=2), folder / "dense")
    write_text(folder / "text.txt", 700)
    return folder


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice every other step, so that a few steps see some."""
    monkeypatch.setattr(move_zeros, "INTERVAL", 2)


def run(home: Path, folder: Path, family: str = "llama", reporter: Reporter = QUIET, **changes: Any) -> Any:
    settings = {"mode": "dense", "move_zeros": 0.01, "max_steps": 12, **changes}
    return run_finetuning(make_settings(settings_for(folder, home / family, home / "text.txt", **settings)), reporter)


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_one_tensor_remembers_what_admm_has_in_two(seed: int, rounds: int) -> None:
    """z and u as the paper has them beside their sum, over some rounds of any steps of x and any masks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    pruned = torch.rand(4, 8, generator=generator) < 0.5
    z, u, total = x * ~pruned, x * pruned, x
    for _ in range(rounds):
        torch.testing.assert_close(penalty_gradient(x, total, pruned, 0.3), 0.3 * (x - z + u))
        x = x + torch.randn(4, 8, generator=generator, dtype=torch.float64)
        total = next_total(x, total, pruned)
        torch.testing.assert_close(total, x + u)
        pruned = torch.rand(4, 8, generator=generator) < 0.5
        z = (x + u) * ~pruned
        u = u + x - z


def test_steps_are_those_of_the_paper() -> None:
    """x by Adam on the loss and the penalty, z the best of v̂ (x + u)², u the sum of what differs; then x is cut to z's mask."""
    model = pruned_model("llama", num_hidden_layers=2).requires_grad_(False)
    masks = find_masks(model)
    entry = masks.matrices[0]
    weight = model.get_parameter(entry.parameter).requires_grad_(True)
    before = weight.detach().clone()
    target = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    moving = MovingZeros(model, adam := torch.optim.AdamW([weight], lr=0.05, weight_decay=0), masks, 0.1, lambda: 0.0)

    x, z, u = nn.Parameter(before.clone()), before.clone(), torch.zeros_like(before)
    own = torch.optim.AdamW([x], lr=0.05, weight_decay=0)
    for step in range(1, 7):
        for parameter, optimizer in ((weight, adam), (x, own)):
            optimizer.zero_grad()
            ((parameter - target).square() * torch.arange(1.0, 1 + target.shape[1])).sum().backward()
            if parameter is x:
                assert x.grad is not None
                x.grad += 0.1 * (x.detach() - z + u)
            optimizer.step()
        torch.testing.assert_close(weight, x)
        if step % 2 == 0:
            score = (own.state[x]["exp_avg_sq"] * (x.detach() + u).square()).flatten()
            kept = torch.zeros_like(score)
            kept[score.topk(score.numel() - entry.zeros).indices] = 1
            z = (x.detach() + u) * kept.view_as(z)
            u = u + x.detach() - z
    moving.stand()
    assert entry.pattern.sparsity is None
    torch.testing.assert_close(weight.detach(), x.detach() * (z != 0))
    assert moving.moved is not None
    assert moving.moved == int(((before == 0) & (z != 0)).sum()) / int((z != 0).sum()) > 0
    state = adam.state[weight]["exp_avg"]
    assert bool((state[weight == 0] == 0).all())


def test_what_no_gradient_reaches_keeps_its_zeros_in_place() -> None:
    model = pruned_model("llama", num_hidden_layers=2).requires_grad_(False)
    masks = find_masks(model)
    reached, other = (model.get_parameter(entry.parameter).requires_grad_(True) for entry in masks.matrices[:2])
    before = [weight.detach().clone() for weight in (reached, other)]
    moving = MovingZeros(model, adam := torch.optim.AdamW([reached, other], lr=0.05), masks, 0.1, lambda: 0.0)
    for _ in range(3):
        adam.zero_grad()
        (reached - 1).square().sum().backward()
        adam.step()
    moving.stand()
    assert torch.equal(other.detach(), before[1])
    assert not torch.equal(reached.detach() == 0, before[0] == 0)


@pytest.mark.parametrize(("family", "mode"), [("llama", "dense"), ("mixtral", "dense"), ("llama", "distill")])
def test_zeros_move_and_patterns_stand(home: Path, tmp_path: Path, family: str, mode: str) -> None:
    more: dict[str, Any] = {"teacher": str(home / "dense")} if mode == "distill" else {}
    report = run(home, tmp_path / "run", family, mode=mode, **more)
    before, after = (
        AutoModelForCausalLM.from_pretrained(place) for place in (home / family, tmp_path / "run" / "model")
    )
    old, new = find_masks(before), find_masks(after)
    assert new.patterns == old.patterns == report.patterns
    assert [entry.zeros for entry in new.matrices] == [entry.zeros for entry in old.matrices]
    assert report.sparsity_after == report.sparsity_before
    kept = sum(int((~pruned).sum()) for pruned in new.pruned.values())
    moved = sum(int((old.pruned[name] & ~pruned).sum()) for name, pruned in new.pruned.items())
    assert report.moved == moved / kept > 0.001
    assert report.masks == new.fingerprint() != old.fingerprint()
    assert "zeros moved: " in str(report)
    assert "with its zeros moved" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_an_interrupted_run_goes_on_to_the_same_bytes(home: Path, tmp_path: Path, share: float) -> None:
    """While zeros move, and when they stand again."""
    whole = run(home, tmp_path / "whole", save_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "cut", reporter=StoppedAt(share), save_every=1)
    resumed = run(home, tmp_path / "cut", save_every=1)
    assert [point.loss for point in resumed.curve] == [point.loss for point in whole.curve]
    assert resumed.moved == whole.moved
    one, other = (load_weights(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_of_one_step_is_cut_too(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "run", max_steps=1)
    before = find_masks(AutoModelForCausalLM.from_pretrained(home / "llama"))
    after = find_masks(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"))
    assert after.patterns == before.patterns


def test_what_is_not_trained_keeps_its_zeros_in_place(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "run", train=("*.v_proj",))
    before, after = (
        zeros_of(AutoModelForCausalLM.from_pretrained(place)) for place in (home / "llama", tmp_path / "run" / "model")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".v_proj." in name for name in moved)


def test_a_run_killed_after_its_model_was_saved_is_finished(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("coprune.training.report.FinetuneReport.write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(home, tmp_path / "run")
    assert run(home, tmp_path / "run").moved > 0
    assert (tmp_path / "run" / "finetune.json").is_file()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mode": "lora"}, "leaves the weights alone"),
        ({"optimizer": "sgd"}, "Adam's second moment"),
        ({"patience": 2, "evaluations": 3}, "no best state"),
        ({"move_zeros": 0}, "move_zeros"),
    ],
)
def test_what_does_not_go_together_is_refused(home: Path, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        run(home, tmp_path / "run", **more)


def load_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")
