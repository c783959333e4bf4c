"""Image classifiers in the walk, against full forwards with hooks on every layer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageClassification

import coprune
from coprune.base.errors import BadInput
from coprune.model.blocks import find_blocks
from coprune.model.matrices import find_matrices, why_no_matrix
from coprune.model.matrix_choice import choose_matrices
from coprune.model.walk.observe import Observe
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver
from coprune.recipe.pattern import NM, Target
from support.pico_images import CLASSES, CLASSIFIERS, SIZE, TIMM, pico_classifier, pico_pixels, save_classifier
from support.sample import crossed, sampled
from support.walking import (
    Layer,
    Propagation,
    masks,
    prune_with_full_forwards,
    prune_with_walk,
    share_of_different_entries,
    wanda_as_published,
)

TWO_OF_FOUR = Target(NM(2, 4), 0.5)


@pytest.mark.parametrize(("family", "propagation"), crossed([*CLASSIFIERS], ["block", "sequential"]))
def test_masks_of_classifiers_match_full_forwards(family: str, propagation: Propagation) -> None:
    model, oracle = pico_classifier(family), pico_classifier(family)
    batches = pico_pixels(family, 4).split(2)
    results = prune_with_walk(model, batches, Solver(METHODS["wanda"]), TWO_OF_FOUR, propagation)
    prune_with_full_forwards(oracle, batches, wanda_as_published(TWO_OF_FOUR), propagation)
    found, expected = masks(model), masks(oracle)
    assert {result.name for result in results} == set(expected)
    assert share_of_different_entries(found, expected) < 2e-3
    assert all(result.sparsity == 0.5 for result in results)
    for name, mask in found.items():
        assert bool((mask.unflatten(1, (-1, 4)).sum(dim=2) == 2).all()), name
    # Patch embeddings, norms, depth-wise convolutions and the head are unchanged.
    dense, pruned = pico_classifier(family).state_dict(), {f"{name}.weight" for name in found}
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items() if name not in pruned)


def test_blocks_of_stages_are_listed_in_execution_order() -> None:
    blocks = [block.name for block in find_blocks(pico_classifier("convnext"))]
    assert blocks[:4] == [
        "timm_model.stages.0.blocks.0",
        "timm_model.stages.1.downsample",
        "timm_model.stages.1.blocks.0",
        "timm_model.stages.1.blocks.1",
    ]
    assert len(blocks) == 6 + 3


def test_depthwise_convolutions_are_left_out_by_name() -> None:
    model = pico_classifier("convnext")
    blocks = find_blocks(model)
    left = [str(layers) for layers in choose_matrices(model, blocks).left_out]
    assert left == ["timm_model.stages.*.blocks.*.conv_dw (depth-wise; 6 layers)"]
    assert not any("conv_dw" in m.name for b in blocks for m in find_matrices(b.module, b.name))


@pytest.mark.parametrize(
    ("convolution", "is_matrix"),
    [
        (nn.Conv2d(4, 8, 1), True),
        (nn.Conv2d(4, 8, 1, stride=2), True),
        (nn.Conv2d(4, 8, 2, stride=2), True),
        (nn.Conv2d(4, 8, 2, stride=2, padding=1), False),
        (nn.Conv2d(4, 8, 3), False),
        (nn.Conv2d(4, 8, 1, groups=2), False),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1), False),
    ],
)
def test_only_convolutions_of_separate_patches_are_matrices(convolution: nn.Conv2d, is_matrix: bool) -> None:
    assert [len(list(find_matrices(convolution))), why_no_matrix(convolution) is None] == [is_matrix, is_matrix]


@pytest.mark.parametrize("convolution", [nn.Conv2d(4, 8, 2, stride=2), nn.Conv2d(4, 8, 1, stride=2)])
def test_patches_times_the_matrix_give_the_convolution(convolution: nn.Conv2d) -> None:
    (matrix,) = find_matrices(convolution, "conv")
    x = torch.randn(3, 4, 6, 8)
    seen = []
    with torch.no_grad(), Observe([matrix], lambda m, rows: seen.append(rows)):
        expected = convolution(x)
    assert convolution.bias is not None
    found = seen[0] @ matrix.read().T + convolution.bias
    torch.testing.assert_close(found.transpose(1, 2).reshape(expected.shape), expected.detach())


def test_patch_embedding_and_head_are_pruned_if_named() -> None:
    model: Any = pico_classifier("vit")
    batches = pico_pixels("vit").split(2)
    embedding = Layer("timm_model.patch_embed.proj", model.timm_model.patch_embed.proj)
    dense = embedding.weight.clone()
    pruned = prune_with_walk(
        model, batches, Solver(METHODS["wanda"]), TWO_OF_FOUR, include=["*patch_embed.proj", "*head"]
    )
    results = {result.name: result for result in pruned}
    assert sorted(results) == ["timm_model.head", "timm_model.patch_embed.proj"]
    assert all(result.sparsity == 0.5 for result in results.values())
    rows = torch.cat([embedding.rows(batch) for batch in batches])
    assert torch.equal(embedding.weight, wanda_as_published(TWO_OF_FOUR)(dense, rows))


@pytest.mark.parametrize(
    ("family", "stream"),
    sampled(
        itertools.product(["convnext", "deit distilled", "transformers vit"], [False, True]),
        quick=[("convnext", False), ("deit distilled", True), ("transformers vit", True)],
    ),
)
def test_a_saved_classifier_reloads(tmp_path: Path, family: str, stream: bool) -> None:
    source = save_classifier(family, tmp_path / "source")
    saved = tmp_path / "saved"
    result = coprune.prune(
        source,
        "wanda",
        pattern="2:4",
        dataset="digits",
        nsamples=8,
        eval_images=40,
        save_model=saved,
        stream=stream,
        quiet=True,
    )
    report = result.report
    assert report.sparsity.matrices == 0.5
    assert report.model.task == "images"
    (accuracy,) = report.accuracy
    assert accuracy.images == 40
    assert 0 <= accuracy.pruned_top1_interval[0] <= accuracy.pruned_top1 <= accuracy.pruned_top1_interval[1]
    reloaded = AutoModelForImageClassification.from_pretrained(saved).eval()
    found = masks(reloaded)
    assert set(found) == {matrix.name for matrix in report.matrices}
    assert all(bool((mask.unflatten(1, (-1, 4)).sum(dim=2) == 2).all()) for mask in found.values())
    if family in TIMM:
        again = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
        pixels = pico_pixels(family)
        with torch.no_grad():
            torch.testing.assert_close(again(pixels), reloaded(pixel_values=pixels).logits)


@pytest.mark.parametrize(
    "family",
    sampled(["vit", "swin", "convnext", "deit distilled", "transformers vit"], quick=["transformers vit"]),
)
def test_a_preset_with_permutation_and_rotation_works_on_classifiers(tmp_path: Path, family: str) -> None:
    source = save_classifier(family, tmp_path / "source")
    images: dict[str, Any] = {"dataset": "digits", "nsamples": 8, "eval_images": 40, "quiet": True}
    report = coprune.prune(source, preset="balanced", pattern="2:4", **images).report
    assert report.sparsity.matrices == 0.5
    assert report.recipe.prune.rotate
    report = coprune.prune(source, preset="balanced", sparsity=0.6, **images).report
    assert report.sparsity.matrices == pytest.approx(0.6, abs=1e-3)
    assert len({matrix.sparsity for matrix in report.matrices}) > 1


def test_streamed_and_in_memory_runs_agree(tmp_path: Path) -> None:
    source = save_classifier("swin", tmp_path / "source")
    found = [
        coprune.prune(
            source, "wanda", dataset="digits", nsamples=8, eval_images=64, batch_size=6, stream=stream, quiet=True
        ).report
        for stream in (False, True)
    ]
    assert found[0].accuracy == found[1].accuracy
    assert [m.mask_checksum for m in found[0].matrices] == [m.mask_checksum for m in found[1].matrices]


def test_a_classifier_without_named_images_is_refused(tmp_path: Path) -> None:
    source = save_classifier("vit", tmp_path / "source")
    with pytest.raises(BadInput, match="dataset=…"):
        coprune.prune(source, quiet=True)


def test_the_layer_error_of_a_convolution_is_that_of_its_outputs() -> None:
    model: Any = pico_classifier("convnext")
    dense: Any = pico_classifier("convnext")
    batches = [pico_pixels("convnext", 1)]
    solver, include = Solver(METHODS["wanda"]), ["*stages.1.downsample.1"]
    (result,) = prune_with_walk(model, batches, solver, TWO_OF_FOUR, include=include)
    seen = []
    layer = dense.timm_model.stages[1].downsample[1]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        dense(pixel_values=batches[0])
        hook.remove()
        outputs = [
            functional.conv2d(seen[0], w, stride=2)
            for w in (layer.weight, model.timm_model.stages[1].downsample[1].weight)
        ]
    expected = float((outputs[0] - outputs[1]).square().sum() / outputs[0].square().sum())
    assert result.relative_layer_error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_become_greyscale_for_a_greyscale_model(channels: int, tmp_path: Path) -> None:
    shape: dict[str, Any] = dict(depth=2, img_size=SIZE, patch_size=8, embed_dim=32, num_heads=2, in_chans=channels)
    inner: Any = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **shape)
    own = {"input_size": [channels, SIZE, SIZE], "mean": [0.5] * channels, "std": [0.5] * channels, "crop_pct": 1.0}
    inner.pretrained_cfg = {**inner.pretrained_cfg, **own, "num_classes": CLASSES}
    save_for_hf(inner, str(tmp_path / "grey"), model_args=shape, safe_serialization=True)
    asked: dict[str, Any] = dict(dataset="digits", nsamples=4, eval_images=10, save=tmp_path / "run", quiet=True)
    if channels == 4:
        with pytest.raises(BadInput, match="images of 4 channels, but images are read with 1"):
            coprune.prune(str(tmp_path / "grey"), **asked)
    else:
        result = coprune.prune(str(tmp_path / "grey"), pattern="2:4", **asked)
        assert result.report.accuracy[0].images == 10
        assert result.report.sparsity.matrices == pytest.approx(0.5, abs=0.01)
