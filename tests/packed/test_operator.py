"""A packed product is one operator: for torch.compile, torch.export and autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from coprune.base.errors import BadInput
from coprune.base.native.build import load_kernels
from coprune.packed.accelerate import accelerate, kernel_linear
from coprune.packed.bench import bench
from coprune.packed.compiled import compile_decoding
from coprune.packed.linear import PackedLinear, pack_linears

WITH_GRADIENTS = torch.ops.coprune.packed_linear.default
WITHOUT = torch.ops.coprune.packed_product.default
needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: Any = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)
    made: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                parameter.mul_(torch.rand_like(parameter) < 0.5)
    assert len(pack_linears(made)) == 14
    return made


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made as ever, and run as they are: compiling them is torch's, and takes a minute."""
    torch._dynamo.reset()
    monkeypatch.setattr("coprune.packed.compiled.torch.compile", partial(torch.compile, backend="aot_eager"))


def layer(dtype: torch.dtype, bias: bool = True) -> tuple[PackedLinear, nn.Linear]:
    torch.manual_seed(1)
    linear = nn.Linear(70, 40, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(torch.rand_like(linear.weight) < 0.4)
    linear = linear.to(dtype)
    packed = PackedLinear.from_linear(linear)
    assert packed is not None
    return packed, linear


# torch 2.15 looks at gradients of its own copies, and warns itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.bfloat16, False)])
def test_the_operator_keeps_what_torch_asks_of_one(dtype: torch.dtype, bias: bool) -> None:
    packed, _ = layer(dtype, bias)
    x = torch.randn(2, 3, 70, dtype=dtype)
    arguments = (packed.packed, packed.starts, packed.bias, 70, dtype, False)
    assert set(torch.library.opcheck(WITHOUT, (x, *arguments)).values()) == {"SUCCESS"}
    x.requires_grad_()
    assert set(torch.library.opcheck(WITH_GRADIENTS, (x, *arguments)).values()) == {"SUCCESS"}


def test_the_operator_gives_what_the_layer_gives_for_every_size_of_batch() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        packed, _ = layer(dtype)
        for rows in (1, 5, 100):
            x = torch.randn(rows, 70).to(dtype)
            with torch.no_grad():
                expected = packed(x)
                for operator in (WITH_GRADIENTS, WITHOUT):
                    assert torch.equal(
                        operator(x, packed.packed, packed.starts, packed.bias, 70, dtype, False), expected
                    )


def test_gradients_are_those_of_the_dense_layer() -> None:
    packed, linear = layer(torch.float32)
    packed.bias = nn.Parameter(packed.bias.detach().clone())
    grads = []
    for one in (packed, linear):
        x = torch.linspace(-1, 1, 210).reshape(3, 70).requires_grad_()
        one(x).square().sum().backward()
        grads.append((x.grad, one.bias.grad))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_model_compiles_as_one_graph_in_which_weights_stay_packed(model: PreTrainedModel) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    ids = torch.arange(12)[None]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend=keep, fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("packed_product" in target for target in targets) == 14
    assert not any("masked_scatter" in target for target in targets)


def test_an_exported_model_gives_the_same_logits(model: PreTrainedModel) -> None:
    ids = torch.arange(12)[None]
    with torch.no_grad():
        exported = torch.export.export(model, (ids,), {"use_cache": False})
        again: Any = exported.module()
        torch.testing.assert_close(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert sum(node.target is WITHOUT for node in exported.graph.nodes) == 14


@pytest.mark.usefixtures("without_inductor")
def test_generate_takes_the_compiled_step_and_writes_the_same(model: PreTrainedModel) -> None:
    asked: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True)
    asked["return_dict_in_generate"] = True
    prompts = (
        {"input_ids": torch.arange(5)[None]},
        {
            "input_ids": torch.arange(10).reshape(2, 5),
            "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        },
    )
    write: Any = model.generate
    expected, before = [write(**prompt, **asked) for prompt in prompts], model.forward
    undo = compile_decoding(model)
    try:
        for prompt, wanted in zip(prompts, expected, strict=True):
            torch._dynamo.utils.counters.clear()
            torch._dynamo.reset()
            found = write(**prompt, **asked)
            assert torch.equal(found.sequences, wanted.sequences)
            torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-5)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one for all steps; the prompt has none
        assert model.config._attn_implementation == "eager"
    finally:
        undo()
    assert model.config._attn_implementation == "sdpa"
    assert model.forward == before
    assert model.generation_config is not None
    assert model.generation_config.cache_implementation is None


@pytest.mark.usefixtures("without_inductor")
def test_a_step_of_more_sizes_than_torch_compiles_writes_the_same(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    write: Any = model.generate
    prompts = [torch.arange(4).repeat(batch, 1) for batch in (1, 2)]
    expected = [write(ids, max_new_tokens=3, do_sample=False, pad_token_id=0) for ids in prompts]
    undo = compile_decoding(model)
    try:
        with torch._dynamo.config.patch(recompile_limit=1):
            for ids, wanted in zip(prompts, expected, strict=True):
                assert torch.equal(write(ids, max_new_tokens=3, do_sample=False, pad_token_id=0), wanted)
    finally:
        undo()
    assert sum("others are slower" in record.message for record in caplog.records) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_bench_compiles_for_every_batch_size_and_tells_how_long_that_took(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("coprune.packed.bench.measure_bandwidth", lambda **_: 1e9)
    monkeypatch.setattr("coprune.packed.bench.make_forms", lambda dense: {"dense": dense})
    with torch._dynamo.config.patch(recompile_limit=1):
        found = bench(model, (1, 2), prompt=4, tokens=2, repeats=1, compile=True)
    assert {row.batch for row in found.rows if "compiled" in row.form} == {1, 2}
    assert "others are slower" not in caplog.text
    assert {row.form for row in found.rows} >= {"dense", "dense, compiled"}
    assert found.compiling["dense, compiled"] > 0
    assert "compiled in" in str(found)
    assert "forward" not in vars(model)


def test_what_is_compiled_is_not_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    settings: Any = model.generation_config
    undo = compile_decoding(model)
    try:
        model.save_pretrained(tmp_path / "model")
        assert settings.cache_implementation == "static"
    finally:
        undo()
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (saved.cache_implementation, saved.disable_compile) == (None, settings.disable_compile)
    assert not {"forward", "save_pretrained"} & vars(model).keys()


def test_what_writes_no_text_is_not_compiled_but_says_what_to_do() -> None:
    with pytest.raises(BadInput, match=r"torch\.compile"):
        accelerate(nn.Sequential(nn.Linear(8, 8)), compile=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, at what its own compiler imports
def test_torch_compile_itself_writes_the_same(model: PreTrainedModel) -> None:
    ids, asked = torch.arange(5)[None], dict(max_new_tokens=12, do_sample=False)
    write: Any = model.generate
    expected = write(ids, **asked)
    torch._dynamo.reset()
    undo = compile_decoding(model)
    try:
        assert torch.equal(write(ids, **asked), expected)
    finally:
        undo()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_layer_by_the_kernels_gives_the_same_and_shares_its_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    embedding = nn.Embedding(45, 70, dtype=dtype)
    linear = nn.Linear(70, 45, dtype=dtype)
    linear.weight = embedding.weight
    fast = kernel_linear(linear)
    assert fast is not None
    assert fast.weight is embedding.weight
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        for rows in (0, 1, 3, 100):
            x = torch.randn(2, rows, 70).to(dtype)
            torch.testing.assert_close(fast(x), linear(x), rtol=tolerance, atol=tolerance)
        arguments = (torch.randn(2, 70).to(dtype), fast.weight.detach(), fast.bias.detach())
        assert set(torch.library.opcheck(torch.ops.coprune.dense_product.default, arguments).values()) == {"SUCCESS"}
    fast(torch.randn(1, 70).to(dtype)).sum().backward()
    assert embedding.weight.grad is not None
