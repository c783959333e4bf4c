"""Types by tensor: the choice for a number of bytes, and the losses behind it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from coprune.base.progress import Reporter
from coprune.gguf_files import sensitivity
from coprune.gguf_files.importance import importance_of, importance_of_head
from coprune.gguf_files.llama_cpp import LlamaCpp, Quantisation, has_llama_cpp, planned_types, quantize, type_number
from coprune.gguf_files.sensitivity import sensitivity_of
from coprune.gguf_files.types_by_tensor import TENSOR_TYPES, choose, losses_of, rounded
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.lazy import LazyCheckpoint
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import GgufFile
from coprune.model.checkpoint.mapped_gguf import LazyGguf, decode
from support.fits import tokens
from support.pico import pico_model
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.vocabularies import content_of

pytestmark = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")
_BITS = {"a": 9, "b": 6, "c": 5, "d": 4, "e": 3}


def drawn(seed: int, convex: bool) -> dict[str, dict[str, tuple[int, float]]]:
    """Return losses of tensors that differ in size and sensitivity; if convex, each bit quarters the loss."""
    generator = random.Random(seed)
    found = {}
    for number in range(40):
        size, scale = generator.randint(1, 60), 10 ** generator.uniform(-3, 1)
        loss = {kind: (size * bits, size * scale * 0.25**bits) for kind, bits in _BITS.items()}
        if not convex:
            loss = {kind: (bytes, one * generator.uniform(0.1, 10)) for kind, (bytes, one) in loss.items()}
        found[f"blk.{number}"] = loss
    return found


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_the_choice_fits_the_bytes_and_more_bytes_lose_less(seed: int, convex: bool) -> None:
    losses = drawn(seed, convex)

    def total(chosen: dict[str, str], place: int) -> float:
        return sum(losses[name][kind][place] for name, kind in chosen.items())

    uniform = {kind: dict.fromkeys(losses, kind) for kind in _BITS}
    least, most = total(uniform["e"], 0), total(uniform["a"], 0)
    assert choose(losses, int(least) - 1) is None
    before = None
    for bytes in range(int(least), int(most) + 400, 400):
        chosen = choose(losses, bytes)
        assert chosen is not None
        assert set(chosen) == set(losses)
        assert total(chosen, 0) <= bytes
        assert before is None or total(chosen, 1) <= before
        before = total(chosen, 1)
    for kind, own in uniform.items():
        if convex and kind not in "ae":
            found = choose(losses, int(total(own, 0)))
            assert found is not None
            assert total(found, 1) < 0.7 * total(own, 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose down projections have rows of 256, and other matrices rows of 64."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    model = distinct_norms(pico_model("llama", vocab_size=tokens(), tie_word_embeddings=True, **sizes))
    return write_pico_gguf(model, tmp_path_factory.mktemp("types") / "f16.gguf", "F16", tokenizer=content_of("bytes"))


@pytest.mark.parametrize("kind", TENSOR_TYPES)
def test_rows_are_rounded_as_the_quantiser_does(kind: str, source: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    name = "blk.0.ffn_down.weight"
    exact = decode(next(one for one in GGUFReader(source).tensors if one.name == name))
    means = {name: torch.rand(1, 256) + 0.1}
    asked = Quantisation("q8_0", means, types={name: kind})
    assert planned_types(source, asked)[name] == type_number(kind)
    quantize(source, tmp_path / "made.gguf", asked)
    stored = {one.name: one for one in GGUFReader(tmp_path / "made.gguf").tensors}
    assert torch.equal(decode(stored[name]), rounded(exact, kind, means[name]))
    assert {one.tensor_type.name for other, one in stored.items() if other != name} <= {"Q8_0", "F32"}


def test_predicted_losses_are_the_divergence_of_the_rounded_model(source: Path, tmp_path: Path) -> None:
    """For every kind of tensor, whatever its row order in the file."""
    samples = torch.randint(8, 250, (24, 64), generator=torch.Generator().manual_seed(0))
    importance = {
        **importance_of(source, samples, Reporter(quiet=True)),
        **importance_of_head(source, samples[:8].flatten().tolist()),
    }
    losses = losses_of(source, importance, sensitivity_of(source, samples, Reporter(quiet=True)), Reporter(quiet=True))
    assert len(losses) == 15

    def logits(file: Path) -> torch.Tensor:
        engine = LlamaCpp(file, 64)
        found = [engine.logits(one.tolist()).log_softmax(-1) for one in samples]
        engine.close()
        return torch.cat(found)

    exact = logits(source)
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd"):
        lower = {name: "q3_k" if "ffn_down" in name else "q4_1" for name in losses if part in name}
        types = dict.fromkeys(losses, "q8_0") | lower
        quantize(source, tmp_path / "made.gguf", Quantisation("q8_0", importance, types=types))
        divergence = float((exact.exp() * (exact - logits(tmp_path / "made.gguf"))).sum(1).mean())
        expected = sum(losses[name][kind][1] for name, kind in types.items())
        assert 0.7 < divergence / expected < 1.6, part


def test_a_streamed_model_has_the_sensitivity_of_one_in_memory(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.randint(8, 250, (3, 64), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(sensitivity, "quickest_on_cpu", lambda: "float32")
    held = list[int]()

    def acquire(self: LazyGguf, prefix: str) -> None:
        LazyCheckpoint.acquire(self, prefix)
        blocks = find_blocks(self.model)
        held.append(sum(not any(one.is_meta for one in block.module.parameters()) for block in blocks))

    monkeypatch.setattr(LazyGguf, "acquire", acquire)
    found = sensitivity._pass(GgufFile(source, source.name), samples, Reporter(quiet=True))
    assert held == [1] * 4  # both blocks, forward and backward
    model, _ = load_model(GgufFile(source, source.name), "float32", processed=False)
    sums: dict[str, list[Any]] = {
        name: [0, 0] for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)
    }

    def watch(name: str) -> Any:
        def seen(module: Any, given: Any, out: torch.Tensor) -> None:
            def add(gradients: torch.Tensor) -> None:
                inputs, own = given[0].detach()[0].square(), gradients[0].square()
                sums[name][0] += inputs.sum(1) @ own
                sums[name][1] += own.sum(1) @ inputs

            out.register_hook(add)

        return seen

    for name in sums:
        model.get_submodule(name).register_forward_hook(watch(name))
    generator = torch.Generator().manual_seed(sensitivity._SEED)
    for sample in samples:
        embedded = model.get_input_embeddings()(sample[None]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        drawn = logits.detach().softmax(-1).multinomial(1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    assert len(sums) == 15
    for name, (rows, columns) in sums.items():
        if name == "lm_head":
            mine = found.head.rows, found.head.columns
        else:
            mine = found.rows[f"{name}.weight"][:, 0], found.columns[f"{name}.weight"][0]
        torch.testing.assert_close(mine[0], rows / samples.numel(), rtol=1e-5, atol=0)
        torch.testing.assert_close(mine[1], columns / rows.sum(), rtol=1e-5, atol=0)
