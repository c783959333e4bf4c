"""keep_zeros in other trainers: plain loops, transformers' Trainer, TRL."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.optimization import Adafactor

import coprune
from support.pico import pico_model
from support.pruned import Restless, pruned_model, zeros_of
from support.word_tokenizers import word_tokenizer

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False),
}
# pruned_model: seven matrices in each of three blocks, alternating between 60 % unstructured and 2:4.
LINE = "Every zero kept: {:.2f} % of 21 matrices (11 × unstructured, 10 × 2:4)."


def tokens_of(step: int) -> Tensor:
    return torch.randint(1002, (2, 16), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        tokens = tokens_of(step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def pruned() -> tuple[PreTrainedModel, dict[str, Tensor], str]:
    """Return a pruned model, its zeros, and the message when they are kept."""
    model = pruned_model().requires_grad_(True)
    zeros = {name: zero for name, zero in zeros_of(model).items() if zero.float().mean() > 0.05}
    share = sum(int(zero.sum()) for zero in zeros.values()) / sum(zero.numel() for zero in zeros.values())
    return model, zeros, LINE.format(100 * share)


def require_kept(model: PreTrainedModel, zeros: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Require unchanged zeros, and that everything else was trained."""
    after = dict(model.named_parameters())
    for name, zero in zeros.items():
        assert torch.equal(after[name] == 0, zero), name
        assert bool((after[name][~zero] != before[name][~zero]).any()), name
    groups = after["model.layers.0.self_attn.k_proj.weight"].reshape(-1, 4)
    assert torch.equal((groups != 0).sum(1), torch.full((len(groups),), 2))


def copies(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_an_optimizer_without_gradients_keeps_zeros_too() -> None:
    model, zeros, _ = pruned()
    before = copies(model)
    with coprune.keep_zeros(model, quiet=True):
        Restless(model.parameters()).step()
    require_kept(model, zeros, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_loop_keeps_every_zero_under(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, zeros, line = pruned()
    before = copies(model)
    with coprune.keep_zeros(model):
        optimizer = OPTIMIZERS[name](model.parameters())
        train(model, optimizer)
    require_kept(model, zeros, before)
    assert capsys.readouterr().err == f"{line}\n"
    train(model, optimizer, steps=1)  # the keeper has been released
    assert not torch.equal(dict(model.named_parameters())["model.layers.0.self_attn.q_proj.weight"] == 0,
                           zeros["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip


def test_zeros_of_frozen_parameters_are_kept_once_unfrozen() -> None:
    model, zeros, _ = pruned()
    before = copies(model)
    model.requires_grad_(False)
    coprune.keep_zeros(model, quiet=True)  # the returned keeper is not referenced
    gc.collect()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    train(model, OPTIMIZERS["adamw"](model.parameters()))
    require_kept(model, zeros, before)


def test_model_and_zero_keeper_can_be_garbage_collected() -> None:
    model, _, _ = pruned()
    keeper = coprune.keep_zeros(model, quiet=True)
    gone = weakref.ref(model.model.layers[0].mlp.up_proj), weakref.ref(keeper)
    del model, keeper
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_releasing_one_of_two_keepers_leaves_the_other_active() -> None:
    model, zeros, _ = pruned()
    before = copies(model)
    first, _ = coprune.keep_zeros(model, quiet=True), coprune.keep_zeros(model, quiet=True)
    first.release()
    train(model, OPTIMIZERS["adamw"](model.parameters()))
    require_kept(model, zeros, before)


def test_weights_changed_outside_an_optimiser_are_reported() -> None:
    model, _, _ = pruned()
    with pytest.raises(coprune.BrokenMask) as caught, coprune.keep_zeros(model):
        model.model.layers[1].mlp.up_proj.weight.data.fill_(1)
    wanted = (
        r"\d+ weights of model.layers.1.mlp.up_proj that were pruned are not zero any more; they were changed by "
        "something other than a torch optimiser."
    )
    assert re.fullmatch(wanted, str(caught.value)), str(caught.value)


def test_a_dense_model_has_nothing_to_keep() -> None:
    with pytest.raises(coprune.BadInput, match="the model is dense"):
        coprune.keep_zeros(pico_model("llama"))


def test_a_model_name_instead_of_a_model_is_refused() -> None:
    name: Any = "out/pruned"
    with pytest.raises(coprune.BadInput, match="takes a model in memory, and 'out/pruned' is a str; load it first"):
        coprune.keep_zeros(name)


def dataset(number: int = 8) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens_of(step)[0], "labels": tokens_of(step)[0]} for step in range(number)]


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = dict(output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, use_cpu=True)
    settings |= dict(learning_rate=1e-2, weight_decay=0.1, save_steps=2, disable_tqdm=True, report_to=[])
    return settings | more


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_transformers_trainer_keeps_every_zero_and_reports_it_at_every_save(
    optim: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, zeros, line = pruned()
    before = copies(model)
    settings = TrainingArguments(**arguments(tmp_path, optim=optim))
    trainer = Trainer(model, settings, train_dataset=dataset(), callbacks=[coprune.keep_zeros(model)])  # type: ignore[arg-type]
    trainer.train()
    require_kept(model, zeros, before)
    assert capsys.readouterr().err.count(line) == 2  # steps 2 and 4
    saved = type(model).from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(dict(saved.named_parameters())[name] == 0, zero) for name, zero in zeros.items())


def test_zeros_of_a_router_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """A router holds its weight itself instead of in a layer."""
    model = pico_model("qwen3_moe", vocab_size=1002).requires_grad_(True)
    name = "model.layers.0.mlp.gate.weight"
    with torch.no_grad():
        model.get_parameter(name)[:, ::2] = 0
        model.get_parameter("model.layers.1.self_attn.q_proj.weight")[:, ::2] = 0
    zero = model.get_parameter(name) == 0
    with coprune.keep_zeros(model):
        train(model, OPTIMIZERS["adamw"](model.parameters()))
        assert torch.equal(model.get_parameter(name) == 0, zero)
        kept = coprune.keep_zeros(model)
        with torch.no_grad():
            model.get_parameter(name)[0, 0] = 1.0
        with pytest.raises(coprune.BrokenMask, match=rf"1 weights of {name} that were zero"):
            kept.verify()
        model.get_parameter(name).data[0, 0] = 0.0


def test_a_trainer_of_another_model_is_refused(tmp_path: Path) -> None:
    model, _, _ = pruned()
    other, _, _ = pruned()
    settings = TrainingArguments(**arguments(tmp_path))
    trainer = Trainer(other, settings, train_dataset=dataset(), callbacks=[coprune.keep_zeros(model)])  # type: ignore[arg-type]
    with pytest.raises(coprune.BadInput, match=r"model is not the one whose zeros are kept; use trainer\.add_callback"):
        trainer.train()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what peft asks
def test_zeros_of_new_adapters_are_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """A new adapter has a matrix of zeros, which has to be trained."""
    peft = pytest.importorskip("peft")
    model, _, line = pruned()
    settings = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=4)
    wrapped = peft.get_peft_model(model, settings)
    with coprune.keep_zeros(wrapped):
        train(wrapped, OPTIMIZERS["adamw"](p for p in wrapped.parameters() if p.requires_grad))
    assert capsys.readouterr().err == f"{line}\n"
    update = wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight
    assert bool(update.any())


@pytest.mark.filterwarnings("ignore")  # TRL's warnings
def test_trl_keeps_every_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model, zeros, line = pruned()
    before = copies(model)
    texts = datasets.Dataset.from_dict({"text": [f"w{n} w{n + 1} w{n + 2} w{n + 3}" for n in range(16)]})
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = "<s>"
    settings = trl.SFTConfig(**arguments(tmp_path, bf16=False, max_length=16))
    trainer = trl.SFTTrainer(
        model, settings, train_dataset=texts, processing_class=tokenizer, callbacks=[coprune.keep_zeros(model)]
    )
    trainer.train()
    require_kept(model, zeros, before)
    assert capsys.readouterr().err.count(line) == 2
