"""Rounding with compensation into GGUF types: bytes, errors, and whole files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from torch import Tensor

import coprune
from coprune.base.errors import BadInput
from coprune.gguf_files.llama_cpp import has_llama_cpp
from coprune.model.checkpoint.formats.block_types import BLOCK_TYPES
from coprune.model.checkpoint.mapped_gguf import decode
from coprune.pruning.linear_algebra import factor_inverse
from coprune.pruning.rounding import Loss, Rounded, round_columns
from support.exported import distance, exportable
from support.pico import pico_model
from support.pico_folder import save
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.sample import crossed

WIDTH = 512
needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")


def weights(how: str) -> Tensor:
    """Return weights of 8 rows, some near the limits of float16 scales."""
    drawn = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))
    drawn[0, :64], drawn[1, 64:128], drawn[2, 100:130] = 0.0, drawn[1, 64:128].abs() + 3, 5.0
    return drawn * {"usual": 1.0, "zeros": 0.0, "tiny": 1e-9, "huge": 1e8}[how]


def gram(seed: int = 1) -> Tensor:
    """Return the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * WIDTH, WIDTH // 4, generator=generator) @ torch.randn(
        WIDTH // 4, WIDTH, generator=generator
    )
    inputs += 5 * torch.randn(inputs.shape, generator=generator)
    return inputs.T @ inputs / len(inputs)


def rounded(weight: Tensor, of: Tensor, kind: str) -> Rounded:
    return round_columns(weight, Loss(of, factor_inverse(of, 0.01), of.diagonal()), BLOCK_TYPES[kind])


@pytest.mark.parametrize(("kind", "how"), crossed([*BLOCK_TYPES], ["usual", "zeros", "tiny", "huge"]))
def test_a_file_holds_the_values_that_were_chosen(kind: str, how: str) -> None:
    made = rounded(weights(how), gram(), kind)
    read = torch.from_numpy(quants.dequantize(made.stored.numpy(), GGMLQuantizationType[kind.upper()]))
    assert torch.equal(read, made.values)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_compensation_lowers_the_error_of_the_outputs(kind: str) -> None:
    weight, of = weights("usual"), gram()
    alone = rounded(weight, of.diagonal().diag(), kind)  # as for uncorrelated inputs
    errors = [float(((off := made.values - weight) @ of * off).sum()) for made in (rounded(weight, of, kind), alone)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("kind", [name for name, kind in BLOCK_TYPES.items() if kind.zero])
def test_rounding_keeps_zeros(kind: str) -> None:
    weight = weights("usual") * (torch.rand(8, WIDTH, generator=torch.Generator().manual_seed(2)) < 0.5)
    assert bool((rounded(weight, gram(), kind).values[weight == 0] == 0).all())


def tensors(file: Path) -> dict[str, Tensor]:
    return {one.name: decode(one) for one in GGUFReader(file).tensors}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"w{3 + place * 7 % 250}" for place in range(9000)))
    return str(file)


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        ("llama", {"hidden_size": 256, "intermediate_size": 512}),
        pytest.param("qwen3moe", {"hidden_size": 64}, marks=pytest.mark.slow),
    ],
)
def test_every_row_of_a_file_is_rounded_from_its_own_row(
    arch: str, sizes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    """Llama's queries and keys have another order of rows, and experts are one tensor."""
    model = distinct_norms(pico_model(arch.replace("moe", "_moe"), num_hidden_layers=2, **sizes))
    save(model, tmp_path / "dense")
    like = write_pico_gguf(model, tmp_path / "f32.gguf", arch=arch)
    how: dict[str, Any] = {"like": like, "type": "q4_0", "quiet": True}
    plain = coprune.export(tmp_path / "dense", tmp_path / "plain.gguf", **how)
    made = coprune.export(tmp_path / "dense", tmp_path / "made.gguf", compensate=True, dataset=text, **how)
    assert made.bytes == plain.bytes
    dense, before, after = (tensors(file) for file in (like, plain.path, made.path))
    for name, values in dense.items():
        if name.startswith("blk.") and values.ndim > 1 and "gate_inp" not in name:
            assert not torch.equal(after[name], before[name]), name
        likeness = torch.cosine_similarity(
            after[name].reshape(-1, values.shape[-1]), values.reshape(-1, values.shape[-1])
        )
        assert float(likeness.min()) > 0.9, name


@needs_llama_cpp
@pytest.mark.parametrize(
    "kind", ["q2_k", pytest.param("q3_k_m", marks=pytest.mark.slow), pytest.param("q4_k_m", marks=pytest.mark.slow)]
)
def test_a_file_is_nearer_to_its_model_in_llama_cpp(kind: str, text: str, tmp_path: Path) -> None:
    dense, like = exportable(tmp_path)
    how: dict[str, Any] = {"like": like, "type": kind, "quiet": True, "dataset": text}
    plain = coprune.export(dense, tmp_path / "plain.gguf", imatrix="auto", **how)
    made = coprune.export(dense, tmp_path / "made.gguf", compensate=True, **how)
    assert made.bytes == plain.bytes
    assert distance(made.path, dense) < distance(plain.path, dense)


def test_compensation_without_rounding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing is rounded"):
        coprune.export(tmp_path, tmp_path / "out.gguf", type="f16", compensate=True)
