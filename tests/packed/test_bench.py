"""Bench and accelerate: what they report is consistent, and what they convert computes the same. No times asserted."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from coprune.base.errors import BadInput
from coprune.gguf_files.llama_cpp import LlamaCpp
from coprune.packed import accelerate as accelerate_module
from coprune.packed.accelerate import accelerate, kernel_linear
from coprune.packed.bench import Bench, bench, bench_model, make_forms, share_weights
from coprune.packed.folder import pack
from coprune.packed.linear import PackedLinear, pack_linears
from coprune.packed.runtimes import Work
from coprune.packed.semi_structured import can_convert, is_two_of_four
from coprune.packed.timing import Timing, summarise, time_in_turns
from support.pico import pico_model, pico_tokens
from support.pico_folder import save_pico
from support.pico_gguf import write_pico_gguf


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data.masked_fill_(torch.rand(parameter.shape) < 0.6, 0.0)
    return model


def test_bench_measures_every_form_from_dense_and_packed_folders(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coprune.packed.bench.measure_bandwidth", lambda **_: 1e9)
    model.save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    for folder in ("dense", "packed"):
        result = bench(tmp_path / folder, batches=(1, 2), prompt=8, tokens=3, repeats=2)
        assert {row.form for row in result.rows} >= {"dense", "packed"}
        assert result.bytes["packed"] < result.bytes["dense"]
        for row in result.rows:
            tokens = row.batch * (8 if row.phase == "prefill" else 1)
            assert row.tokens_per_second == pytest.approx(tokens / row.seconds.median)
            assert row.seconds.low <= row.seconds.median <= row.seconds.high
            assert row.form != "dense" or row.speedup == 1.0
        json.dumps(result.to_dict())


def test_the_table_says_where_there_is_no_gain(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coprune.packed.bench.measure_bandwidth", lambda **_: 0.0)
    result = bench_model(model, "tiny", Work((1,), prompt=4, tokens=2, repeats=2))
    assert isinstance(result, Bench)
    slow = [row for row in result.rows if row.form != "dense" and row.speedup < 1.03]
    assert str(result).count("no gain here") == len(slow)


def test_the_forms_compute_the_same_and_the_model_is_unchanged(model: PreTrainedModel) -> None:
    names = [type(module) for module in model.modules()]
    ids = torch.arange(6)[None]
    with torch.no_grad():
        for form in make_forms(model).values():
            torch.testing.assert_close(form(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert [type(module) for module in model.modules()] == names


def test_copies_share_the_weights_that_stay_dense(model: PreTrainedModel) -> None:
    copy = share_weights(model)
    assert [id(p) for p in copy.parameters()] == [id(p) for p in model.parameters()]
    pack_linears(copy)
    assert any(isinstance(module, PackedLinear) for module in copy.modules())
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("packed_seconds", "kernel_seconds", "kind", "of_the_head"),
    [
        (0.5, 2.0, "packed", "dense"),
        (0.5, 0.8, "packed", "kernel"),
        (2.0, 0.8, "kernel", "kernel"),
        (2.0, 2.0, "dense", "dense"),
        (0.99, 0.99, "dense", "dense"),
    ],
)
def test_only_what_wins_is_converted(
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    packed_seconds: float,
    kernel_seconds: float,
    kind: str,
    of_the_head: str,
) -> None:
    seconds = {"dense": 1.0, "packed": packed_seconds, "kernel": kernel_seconds}

    def timings(calls: Mapping[str, Any], repeats: int) -> dict[str, Timing]:
        return {name: Timing(*[seconds[name]] * 3) for name in calls}

    monkeypatch.setattr(accelerate_module, "time_in_turns", timings)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(ids).logits
        choices = accelerate(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    pruned = [choice for choice in choices if choice.sparsity > 0.3]
    assert {choice.kind for choice in pruned} == {kind}
    fastest = 1 / min(packed_seconds, kernel_seconds)
    assert all(choice.speedup == pytest.approx(fastest) for choice in pruned)
    head = next(choice for choice in choices if choice.names == ("lm_head",))
    assert head.kind == of_the_head
    assert head.speedup == pytest.approx(1 / kernel_seconds)
    converted = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert converted == ({name for choice in pruned for name in choice.names} if kind == "packed" else set())


def test_alternatives_take_turns() -> None:
    order: list[str] = []
    time_in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert summarise([3.0, 1.0, 2.0]) == Timing(2.0, 1.5, 2.5)
    assert summarise([1.0]) == Timing(1.0, 1.0, 1.0)


def test_two_of_four_is_recognised() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 3, 0]])
    assert is_two_of_four(weight)
    weight[0, 1] = 1.0
    assert not is_two_of_four(weight)
    assert not is_two_of_four(torch.ones(4, 6))
    assert not can_convert(torch.nn.Linear(64, 64))  # not on a GPU


def test_bad_numbers_and_folders(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least 1"):
        accelerate(model, batch=0)
    with pytest.raises(BadInput, match="at least 1"):
        bench(tmp_path, tokens=0)
    with pytest.raises(BadInput, match="whole numbers of at least 1"):
        bench(model, (1,), prompt=2.5)  # type: ignore[arg-type]
    for batches in ("1,4", 4):
        with pytest.raises(BadInput, match=rf"the batches cannot be {batches!r}; list .* as in \[1, 4\]"):
            bench(model, batches)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="from their files, and one is a LlamaForCausalLM; save it"):
        bench([tmp_path, model])  # type: ignore[list-item]
    with pytest.raises(BadInput, match=r"config\.json"):
        bench(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut off", "incomplete", "of another kind"])
def test_a_folder_that_is_no_whole_language_model_is_refused(damage: str, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "pico")
    file, *_ = sorted(folder.glob("*.safetensors"))
    config, index = folder / "config.json", folder / "model.safetensors.index.json"
    if damage == "missing":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "incomplete":
        tensors, said = load_file(file), json.loads(index.read_text())
        del said["weight_map"][(name := min(tensors))], tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
        index.write_text(json.dumps(said))
    else:
        config.write_text(config.read_text().replace('"llama"', '"vit"'))
    with pytest.raises(BadInput, match=r"missing|cut off|lacks|cannot be loaded"):
        bench(folder, (1,), prompt=2, tokens=1, repeats=1)


def test_a_packed_folder_is_measured_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coprune.packed.bench.measure_bandwidth", lambda **_: 1e9)
    model = pico_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                parameter.mul_(torch.rand_like(parameter) < 0.3)
    model.save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "small")
    result = bench([tmp_path / "dense", tmp_path / "small"], prompt=4, tokens=2, repeats=1)
    dense, packed = result.bytes
    assert packed == "small, packed in transformers float32"
    assert result.baseline(packed) == dense
    assert result.bytes[packed] < 0.8 * result.bytes[dense]


def test_models_beside_each_other_in_both_runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp_py_sync")
    monkeypatch.setattr("coprune.packed.bench.measure_bandwidth", lambda **_: 1e9)
    for name, width in (("large", 96), ("small", 32)):
        model = pico_model("llama", intermediate_size=width)
        model.save_pretrained(tmp_path / name)
        write_pico_gguf(model, tmp_path / f"{name}.gguf")
        write_pico_gguf(model, tmp_path / f"{name}-q.gguf", "Q8_0")
    models = [
        tmp_path / name for name in ("large", "small", "large.gguf", "small.gguf", "large-q.gguf", "small-q.gguf")
    ]
    result = bench(models, prompt=8, tokens=3, repeats=2)
    forms = [*(f"{name} in transformers float32" for name in ("large", "small")), "large.gguf in llama.cpp f32"]
    assert [*result.bytes][:3] == forms
    assert result.baseline("small in transformers float32") == "large in transformers float32"
    assert result.baseline("small-q.gguf in llama.cpp q8_0") == "large-q.gguf in llama.cpp q8_0"
    for form, file in zip(result.bytes, models, strict=True):
        assert result.files[form] == (file if file.is_file() else file / "model.safetensors").stat().st_size
        small = result.bytes[form] / result.bytes[result.baseline(form)]
        assert (small < 1) == ("small" in form)
    assert [(row.phase, row.batch) for row in result.rows] == [("prefill", 1)] * 6 + [("decode", 1)] * 6
    assert all(row.speedup == 1 for row in result.rows if row.form == result.baseline(row.form))
    assert str(result).count("of the first in the same runtime") == 6
    with pytest.raises(BadInput, match="same name and runtime"):
        bench([models[0], models[0]], prompt=8, tokens=3, repeats=2)


def test_llama_cpp_goes_on_where_it_was(tmp_path: Path) -> None:
    """Steps after a prompt give what the whole text gives."""
    pytest.importorskip("llama_cpp_py_sync")
    model, tokens = pico_model("llama"), pico_tokens(1, 12)[0].tolist()
    loaded = LlamaCpp(write_pico_gguf(model, tmp_path / "model.gguf"), context=32, threads=1)
    whole = loaded.logits(tokens)
    with torch.no_grad():
        torch.testing.assert_close(whole, model(torch.tensor([tokens])).logits[0], rtol=2e-2, atol=2e-2)
    loaded.forget()
    loaded.read(tokens[:10])
    loaded.read(tokens[10:11])
    loaded.read(tokens[11:], all_logits=True)
    torch.testing.assert_close(loaded.last_logits(1)[0], whole[-1], rtol=1e-2, atol=1e-2)


def test_a_busy_machine_is_measured_by_the_processors_time(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks: list[Any] = []
    monkeypatch.setattr(
        "coprune.packed.bench.bench_model", lambda dense, name, work, compiles, clock: clocks.append(clock)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    bench(model, busy=True)
    bench(model)
    assert clocks == [time.process_time, time.perf_counter]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(BadInput, match="one thread"):
        bench(model, busy=True)


def test_bad_settings_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "dense")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"dtipe": "float16"}, "unknown setting 'dtipe'; did you mean 'dtype'"),
        ({"dtype": "float17"}, "unknown dtype 'float17'"),
        ({"dtype": torch.float32}, "unknown dtype 'torch.float32'; did you mean 'float32'"),
        ({"device": "gpu"}, "the device 'gpu' cannot be used here"),
        ({"prompt": 2048}, "above the model's 2048 positions"),
    ]
    for settings, message in wrong:
        with pytest.raises(BadInput, match=message):
            bench(tmp_path / "dense", (1,), **{"prompt": 8, "tokens": 2, "repeats": 1, **settings})


def test_an_input_of_another_width_is_refused_as_torch_does() -> None:
    linear = torch.nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight.masked_fill_(torch.rand(32, 64) < 0.6, 0.0)
    packed, dense = PackedLinear.from_linear(linear), kernel_linear(linear)
    for layer in (packed, dense):
        if layer is None:  # without a compiler there is no product of ours
            continue
        for width in (16, 32, 128):
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients), pytest.raises((RuntimeError, BadInput)):
                    layer(torch.randn(2, width, requires_grad=gradients))
