"""Rotations of attention values: pruning loses less, and the model's outputs stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import coprune
from coprune.base.errors import BadInput
from coprune.model.walk.recording import record_batches
from coprune.pruning.rotation import HeadValues, Rotated, learn_rotation, lost_share, rotate_model
from coprune.recipe.pattern import Target, parse_pattern
from coprune.recipe.recipe import make_recipe
from support.pico import pico_model, pico_tokens, randomise_vectors
from support.pico_folder import save_pico, write_words
from support.sample import of_ten
from support.walking import matrices_of, prove

TARGETS = {
    "2:4": Target(parse_pattern("2:4"), 0.5),
    "1:4": Target(parse_pattern("1:4"), 0.75),
    "50 %": Target(parse_pattern("unstructured"), 0.5),
    "80 %": Target(parse_pattern("unstructured"), 0.8),
}


def some_values(
    seed: int, segments: int, repeats: int, size: int = 8, inputs: int = 20, outputs: int = 12
) -> HeadValues:
    """Return values of heads with correlated outputs."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    answers = random(segments, repeats, 3 * size, size) @ random(size, size)
    gram = answers.mT @ answers / (3 * size)
    return HeadValues(
        random(segments, size, inputs), random(inputs).square(), random(outputs, segments, repeats, size), gram
    )


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    segments=st.integers(1, 3),
    repeats=st.integers(1, 3),
    target=st.sampled_from(list(TARGETS.values())),
)
def test_a_rotation_is_orthogonal_and_never_loses_more(seed: int, segments: int, repeats: int, target: Target) -> None:
    values = some_values(seed, segments, repeats)
    rotation, (before, after) = learn_rotation(values, target.keep)
    identity = torch.eye(8).expand(segments, 8, 8)
    torch.testing.assert_close(rotation @ rotation.mT, identity, atol=1e-5, rtol=0)
    assert float(before) == pytest.approx(float(lost_share(values, identity, target.keep)))
    assert float(after) == pytest.approx(float(lost_share(values, rotation, target.keep)), rel=1e-5)
    assert after <= before


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_rotating_lowers_the_pruning_loss_by_15_percent(target: Target) -> None:
    _, (before, after) = learn_rotation(some_values(1, 2, 2), target.keep)
    assert after < 0.85 * before


def test_scores_are_wandas_for_the_rotated_weights() -> None:
    values = some_values(2, 2, 3)
    rotation = torch.linalg.qr(torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(5)))[0]
    weight, consumer = values.rotated(rotation)
    of_values, of_consumer = values.scores(rotation)
    torch.testing.assert_close(of_values, (weight.square() * values.input_squares).flatten(0, 1))
    # The Gram matrix of rotated outputs, head by head.
    for segment in range(2):
        for head in range(3):
            turned = rotation[segment] @ values.gram[segment, head] @ rotation[segment].T
            columns = slice((segment * 3 + head) * 8, (segment * 3 + head + 1) * 8)
            expected = consumer[:, segment, head].square() * turned.diagonal()
            torch.testing.assert_close(of_consumer[:, columns], expected)


def test_rotating_keeps_the_outputs_of_heads() -> None:
    values = some_values(3, 2, 2)
    rotation, _ = learn_rotation(values, TARGETS["2:4"].keep)
    weight, consumer = values.rotated(rotation)
    whole = torch.einsum("osrd,sdi->osri", values.consumer, values.weight)
    torch.testing.assert_close(torch.einsum("osrd,sdi->osri", consumer, weight), whole, atol=1e-4, rtol=1e-4)


EXPECTED = {
    # The matrices that write values and read attention outputs, if values can be rotated.
    "llama": {"v_proj", "o_proj"},
    "qwen3": {"v_proj", "o_proj"},
    "gemma2": {"v_proj", "o_proj"},
    "opt": {"v_proj", "out_proj"},
    "gpt_neox": {"query_key_value", "dense"},
    "gpt2": {"c_attn", "c_proj"},
    "phi3": {"qkv_proj", "o_proj"},
    "falcon": {"query_key_value", "dense"},
    "mixtral": {"v_proj", "o_proj"},
    "gpt_oss": {"v_proj", "o_proj"},
    "deepseek_v3": {"kv_b_proj", "o_proj"},
    "qwen3_5_text": set[str](),  # attention outputs have a gate per channel
}


def rotate(model: PreTrainedModel, target: Target) -> Rotated:
    batches = pico_tokens(16, 32).split(8)
    proven = prove(model, batches[0][:1])
    return rotate_model(proven, record_batches(proven, batches), target)


@pytest.mark.parametrize("family", of_ten(EXPECTED))
def test_permuting_keeps_the_models_outputs(family: str) -> None:
    model = pico_model(family)
    randomise_vectors(model)
    tokens = pico_tokens(4, 24, seed=9)
    with torch.no_grad():
        before = model(tokens).logits
        weights = {matrix.name: matrix.read() for matrix in matrices_of(model)}
        rotated = rotate(model, TARGETS["2:4"])
        after = model(tokens).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    changed = {matrix.name for matrix in matrices_of(model) if not torch.equal(matrix.read(), weights[matrix.name])}
    assert changed == set(rotated.names)
    assert {name.rpartition(".")[2] for name in changed} == EXPECTED[family]


def pruned_error(place: Path, pattern: str, **more: Any) -> float:
    """Return the mean relative error of the layers that write or read values."""
    data: dict[str, Any] = {
        "dataset": str(place / "words.txt"),
        "evaluate": False,
        "prompt": "",
        "quiet": True,
        "gate": False,
    }
    result = coprune.prune(place / "llama", "sparsegpt", pattern=pattern, nsamples=8, seqlen=32, **data, **more)
    chosen = [m for m in result.report.matrices if m.name.endswith(("v_proj", "o_proj"))]
    return sum(m.relative_layer_error or 0.0 for m in chosen) / len(chosen)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_pruning_loses_less_after_rotation(pattern: str, tmp_path: Path) -> None:
    save_pico(tmp_path / "llama")
    write_words(tmp_path / "words.txt")
    assert pruned_error(tmp_path, pattern, rotate=True) < 0.95 * pruned_error(tmp_path, pattern)


def test_a_pruned_model_is_not_rotated() -> None:
    model = pico_model("llama")
    with torch.no_grad():
        for matrix in matrices_of(model):
            matrix.write(matrix.read().where(matrix.read() > 0, 0.0))
    rotated = rotate(model, TARGETS["2:4"])
    assert not rotated.names
    assert "so it was left as it is" in rotated.describe()


def test_zeros_from_4_bit_rounding_do_not_prevent_rotation() -> None:
    model = pico_model("llama")
    with torch.no_grad():
        for matrix in matrices_of(model):
            weight = matrix.read()
            step = weight.abs().amax(dim=1, keepdim=True) / 7
            matrix.write((weight / step).round() * step)
    zeros = [
        matrix.zeros() / matrix.stored().numel() for matrix in matrices_of(model) if matrix.name.endswith("v_proj")
    ]
    assert min(zeros) > 0.05
    assert {name.rpartition(".")[2] for name in rotate(model, TARGETS["2:4"]).names} == EXPECTED["llama"]


def test_rotate_refuses_a_streamed_model() -> None:
    with pytest.raises(BadInput, match="rotate needs the whole model in memory"):
        make_recipe({"model": "m", "rotate": True, "stream": True})


def test_a_rotation_without_gain_is_reported() -> None:
    told = Rotated(shares=[torch.zeros(2)], names=["o_proj", "v_proj"]).describe()
    assert (
        told
        == "Rotated the values of attention heads, written or read by 2 matrices: the pattern removes 0.00 % less of their score."
    )
