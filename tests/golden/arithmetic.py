"""The arithmetic behind figures, which only agree bit for bit under the same arithmetic."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor

from coprune.base.native.compilation import instruction_set

SIZES = (64, 160, 576)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread in torch, since several change the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def arithmetic() -> dict[str, str]:
    """Return what decides the last bits here: versions, the kernels' instruction set, a checksum of torch's operations."""
    with one_thread():
        operations = checksum([result for size in SIZES for result in _operations(size)])
    return {
        "kernels": instruction_set(),
        "operations": operations,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
    }


def checksum(tensors: list[Tensor]) -> str:
    """Return a checksum of the tensors' bytes: 16 hex digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _operations(size: int) -> Iterator[Tensor]:
    """Yield the results of a chain of operations used by pruning and models, size × size."""
    generator = torch.Generator().manual_seed(size)
    x, y = torch.randn(2, size, size, generator=generator)
    product = x @ y.T
    yield product
    yield x[:7] @ y
    yield x.bfloat16() @ y.bfloat16()
    gram = x.T @ x / size + torch.eye(size)
    factor = torch.linalg.cholesky(gram)
    yield factor
    yield torch.cholesky_inverse(factor)
    yield torch.linalg.cholesky(gram.double())
    values, vectors = torch.linalg.eigh(gram.double())
    yield from (values, vectors)
    yield torch.softmax(product, dim=-1)
    yield torch.nn.functional.scaled_dot_product_attention(x[None, None], y[None, None], x[None, None], is_causal=True)
    yield (product / size).exp()
    yield torch.nn.functional.silu(product)
    yield torch.nn.functional.gelu(product, approximate="tanh")
    yield x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)
    yield torch.nn.functional.layer_norm(product, (size,))
    yield product.sum(dim=0).cumsum(dim=0)
