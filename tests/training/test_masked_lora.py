"""Masked LoRA: its product and gradients, merging, and adapters in PEFT's format."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from coprune.base.errors import BadInput
from coprune.training import adapters
from coprune.training.adapters import (
    MaskedProduct,
    add_adapter,
    choose_targets,
    load_adapter,
    merge_adapter,
    save_adapter,
    without_adapters,
)
from coprune.training.masks import Masks, find_masks
from support.pruned import pruned_model, zeros_of

TOKENS = torch.arange(64).reshape(2, 32) * 7 % 1002


def adapted(family: str = "llama", masked: bool = True, rank: int = 4, trained: bool = True) -> tuple[Any, Masks]:
    """Return a pruned model with adapters whose B is nonzero."""
    model = pruned_model(family)
    masks = find_masks(model)
    torch.manual_seed(1)
    peft = add_adapter(model, masks, choose_targets(masks, (), rank), rank, 8.0, masked)
    if trained:
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
    return peft.eval(), masks


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("rows_at_once", [1, 8, 2**22])
def test_product_and_gradients_match_the_formula(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_ROW_VALUES", rows_at_once * 16)
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(24, 16, generator=generator) > 0.6
    weight = torch.randn(24, 16, generator=generator, dtype=torch.float64) * keep
    x = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    a = torch.randn(3, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(24, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
    ours = MaskedProduct.apply(x, weight, a, b, 0.7)  # type: ignore[no-untyped-call, unused-ignore]
    plain = functional.linear(x, weight + 0.7 * (b @ a) * keep)
    torch.testing.assert_close(ours, plain)
    expected = torch.autograd.grad(plain, (x, a, b), target)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, a, b), target), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_merging_keeps_every_zero_and_the_logits(family: str) -> None:
    peft, masks = adapted(family)
    pruned = pruned_model(family)
    unmerged = logits_of(peft)
    assert (unmerged - logits_of(pruned)).abs().max() > 0.01  # the adapters have an effect
    peft.merge_adapter()
    merged = without_adapters(peft, masks)
    after = zeros_of(merged)
    for name, zero in zeros_of(pruned).items():
        assert torch.equal(zero, after[name])
    torch.testing.assert_close(logits_of(merged), unmerged, rtol=1e-5, atol=1e-5 * float(unmerged.abs().max()))


def test_plain_adapters_fill_the_zeros_when_merged() -> None:
    peft, masks = adapted(masked=False)
    merged = zeros_of(peft.merge_and_unload())
    filled = sum(int((pruned & ~merged[name]).sum()) for name, pruned in masks.pruned.items())
    assert filled > 0.99 * sum(entry.zeros for entry in masks.matrices)


def test_unmerging_and_disabling_restore_the_pruned_model() -> None:
    peft, _ = adapted()
    plain, unmerged = logits_of(pruned_model()), logits_of(peft)
    with peft.disable_adapter():
        torch.testing.assert_close(logits_of(peft), plain)
    peft.merge_adapter()
    peft.unmerge_adapter()
    torch.testing.assert_close(logits_of(peft), unmerged, rtol=1e-4, atol=1e-5)


def test_only_the_adapters_are_trained_also_under_autocast() -> None:
    peft, _ = adapted(trained=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = peft(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in peft.named_parameters() if parameter.grad is not None}
    assert gradients
    assert all("lora_" in name for name in gradients)
    assert all(bool(g.any()) for name, g in gradients.items() if "lora_B" in name)


@pytest.mark.parametrize("masked", [True, False])
def test_saved_adapters_reload(masked: bool, tmp_path: Path) -> None:
    peft, masks = adapted(masked=masked)
    save_adapter(peft, tmp_path / "adapter", "card")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = load_adapter(pruned_model(), masks, tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again), logits_of(peft))
    with pytest.raises(BadInput, match="already exists"):
        save_adapter(peft, tmp_path / "adapter", "card")


def test_peft_without_coprune_reads_the_files_and_warns(tmp_path: Path) -> None:
    peft, _ = adapted()
    save_adapter(peft, tmp_path / "adapter", "card")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(pruned_model(), str(tmp_path / "adapter"))
    assert any("coprune_masks" in str(warning.message) for warning in caught)


def test_saved_masked_adapters_merge_and_plain_ones_do_not(tmp_path: Path) -> None:
    peft, masks = adapted()
    save_adapter(peft, tmp_path / "masked", "card")
    merged = merge_adapter(pruned_model(), masks, tmp_path / "masked")
    torch.testing.assert_close(logits_of(merged), logits_of(peft), rtol=1e-4, atol=1e-5)
    plain, masks = adapted(masked=False)
    save_adapter(plain, tmp_path / "plain", "card")
    with pytest.raises(BadInput, match="nonzero"):
        merge_adapter(pruned_model(), masks, tmp_path / "plain")


def test_an_adapter_from_another_model_is_refused(tmp_path: Path) -> None:
    peft, _ = adapted()
    folder = tmp_path / "adapter"
    save_adapter(peft, folder, "card")
    wider = pruned_model(intermediate_size=128)
    with pytest.raises(BadInput, match=r"of another model.*does not fit"):
        load_adapter(wider, find_masks(wider), folder)
    gpt2 = pruned_model("gpt2")
    with pytest.raises(BadInput, match=r"of another model.*no layer"):
        load_adapter(gpt2, find_masks(gpt2), folder)
    otherwise = pruned_model(seed=5)
    with pytest.raises(BadInput, match="other masks"):
        load_adapter(otherwise, find_masks(otherwise), folder)
    (folder / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(BadInput, match="missing or damaged"):
        load_adapter(pruned_model(), find_masks(pruned_model()), folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(BadInput, match="adapter that is not LoRA"):
        load_adapter(pruned_model(), find_masks(pruned_model()), folder)
    with pytest.raises(BadInput, match="holds no adapter"):
        load_adapter(pruned_model(), find_masks(pruned_model()), tmp_path)


def test_a_rank_above_the_width_is_refused() -> None:
    masks = find_masks(pruned_model())
    with pytest.raises(BadInput, match=r"rank 33 is above the width.*k_proj.*at most 32"):
        choose_targets(masks, (), 33)
    assert len(choose_targets(masks, ("*.q_proj", "*.v_proj"), 8)) == 6
    with pytest.raises(BadInput, match="matches none"):
        choose_targets(masks, ("*.nothing",), 8)
