"""The bound on a run's memory: factors against live tensors, counted parts, and proposals of a refusal."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, GptOssConfig, PretrainedConfig, Qwen3MoeConfig

import coprune
from coprune.base.devices import DeviceMemory
from coprune.base.errors import BadInput
from coprune.base.memory import available_bytes
from coprune.model.loaded_model import Loaded
from coprune.model.matrices import Matrix
from coprune.model.walk.activations import DeviceRoom
from coprune.model.walk.inputs import Inputs, InputSample
from coprune.model.walk.observe import Observe
from coprune.model.walk.recording import record_batches
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver, prune_matrix
from coprune.pruning.refine import refinement_named
from coprune.recipe.choice import Choice
from coprune.recipe.flags import CommandLine
from coprune.recipe.pattern import NM, Target
from coprune.run import memory_bound
from coprune.run.memory_bound import Shapes
from coprune.run.memory_estimate import Estimate, Proposal
from support.commands import run_command
from support.live_bytes import LiveBytes
from support.pico import pico_model, pico_tokens
from support.pico_folder import pico_tokenizer, save_pico, write_words
from support.walking import prove

GIB, MIB = 1 << 30, 1 << 20
BLOCKS = ("llama", "opt", "gpt2", "gemma2", "gemma3_text", "phi3", "bloom", "falcon", "stablelm", "mixtral")
SMALL: dict[str, Any] = {"seqlen": 32, "quiet": True, "evaluate": False}


@pytest.mark.parametrize("method", METHODS)
def test_no_method_takes_more_than_the_bound(method: str) -> None:
    rows, width = 256, 384
    solver = Solver(METHODS[method], (refinement_named(Choice(name="refit")),))
    assert solver.statistic is not None
    inputs = Inputs(solver.statistic(width), InputSample(width, 1))
    inputs.update(torch.randn(2 * width, width))
    linear = nn.Linear(width, rows, bias=False).requires_grad_(False)
    with LiveBytes() as live:
        prune_matrix(Matrix("solved", linear, "weight", input_dim=1), inputs, solver, Target(NM(2, 4), 0.5), True)
    bound = 4 * (memory_bound.OF_WEIGHT * rows * width + memory_bound.OF_INPUTS * width**2)
    assert live.most < bound < 4 * live.most


@pytest.mark.parametrize("family", BLOCKS)
@torch.no_grad()
def test_no_block_takes_more_than_the_bound(family: str) -> None:
    tokens = pico_tokens(1, 128)
    proven = prove(pico_model(family).requires_grad_(False), tokens)
    shapes = Shapes.of(Loaded(proven.weights, None, family, False), proven, Solver(METHODS["wanda"]), removes=False)
    recording, block, live, waiting = record_batches(proven, [tokens]), proven.blocks[0], LiveBytes(), [0]
    hidden = recording.hidden[0]
    with live, Observe(proven.chosen.blocks[0], lambda matrix, x: waiting.append(live.now)):
        recording.run(block, 0, hidden)
    scores = 3 * shapes.heads * tokens.shape[1]
    assert live.most <= 4 * tokens.numel() * (shapes.live + scores)
    assert max(waiting) <= 4 * tokens.numel() * (shapes.waiting + scores)
    block.module.requires_grad_(True)
    with torch.enable_grad(), LiveBytes() as graph:
        kept = recording.calls[0][0].run(block.module, hidden)
        assert kept.requires_grad
        assert graph.now <= 4 * tokens.numel() * (shapes.live + shapes.kept + 4 * shapes.heads * tokens.shape[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("bounded")
    save_pico(folder / "model")
    write_words(folder / "words.txt")
    return folder


def bound(place: Path, **settings: Any) -> Estimate:
    model = pico_model("llama")
    return coprune.estimate(model, processor=pico_tokenizer(), **SMALL | {"dataset": place / "words.txt"} | settings)


def test_more_work_has_a_larger_bound(place: Path) -> None:
    base = bound(place, nsamples=64, propagation="sequential")
    more = bound(place, nsamples=128, propagation="sequential")
    assert more.phases["pruning"] > base.phases["pruning"]
    assert bound(place, nsamples=64, activation_memory=0, propagation="sequential").peak_bytes <= base.peak_bytes
    trained = bound(place, nsamples=64, preset="best", train="whole")
    parameters = sum(parameter.numel() for parameter in pico_model("llama").parameters())
    assert trained.phases["training"] - trained.resident_bytes > 3 * 4 * parameters
    assert "smaller model" in bound(place, nsamples=64, remove="channels=0.5").phases
    mapped, sized = (bound(place, nsamples=64, remove=asked) for asked in ("blocks=0.5", "size=0.2"))
    assert (
        sized.phases["choosing blocks"] - sized.resident_bytes
        > mapped.phases["choosing blocks"] - mapped.resident_bytes
    )


def test_released_memory_does_not_count_in_the_bound(place: Path) -> None:
    before = bound(place).peak_bytes
    assert len(bytearray(2 * GIB)) == 2 * GIB  # held only briefly
    assert bound(place).peak_bytes < before + GIB


def test_proposed_settings_fit_in_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"nsamples": 512, "propagation": "sequential"}
    needed = bound(place, **settings)
    free = int((needed.peak_bytes - needed.resident_bytes) / 1.3)
    monkeypatch.setattr(memory_bound, "available_bytes", lambda: free)
    refused = bound(place, **settings)
    assert not refused.fits
    assert refused.proposal is not None
    assert refused.proposal.enough
    assert bound(place, **settings | refused.proposal.settings).fits
    monkeypatch.setattr(memory_bound, "available_bytes", lambda: MIB)
    none = bound(place, **settings).proposal
    assert none is not None
    assert not none.enough


def test_a_run_on_a_device_is_checked_against_the_devices_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = DeviceMemory("cuda:0", allocated=200 * MIB, peak=200 * MIB, available=80 * GIB)
    monkeypatch.setattr(memory_bound, "device_memory", lambda device: there)
    monkeypatch.setattr(memory_bound, "device_room", lambda device, asked: DeviceRoom(80 * GIB, asked=False))
    here = bound(place)
    assert here.fits
    assert here.device is not None
    assert here.device.phases["pruning"] >= 200 * MIB
    assert "80.20 GiB on cuda:0" in str(here)
    monkeypatch.setattr(memory_bound, "device_memory", lambda device: replace(there, available=0))
    with pytest.raises(BadInput, match=r"the run would not fit\. Estimate: .* of 0\.2 GiB on cuda:0"):
        bound(place).require()


def test_a_run_that_would_not_fit_is_refused_with_settings_that_would() -> None:
    refused = Estimate(2**30, 0, 0)
    for proposal, python, flags in (
        (None, "Or run it all the same with check_memory=False.", "Or run it all the same with --no-check-memory."),
        (
            Proposal({"stream": True, "batch_size": 1}, enough=True, halves=False),
            "It would with stream=True, batch_size=1. Or run",
            "It would with --stream --batch-size 1. Or run",
        ),
        (
            Proposal({"nsamples": 8}, enough=False, halves=True),
            "Even nsamples=8 would not be enough; dtype='bfloat16' and a machine with more memory would help. Or",
            "Even --nsamples 8 would not be enough; --dtype bfloat16 and a machine with more memory would help. Or",
        ),
    ):
        with pytest.raises(BadInput, match=r"^the run would not fit\. Estimate: ") as caught:
            replace(refused, proposal=proposal).require()
        assert python in str(caught.value)
        assert flags in caught.value.text(CommandLine())
        assert caught.value.field == "check_memory"


def test_a_memory_limit_of_the_process_counts() -> None:
    script = (
        "import resource; from coprune.base.memory import available_bytes, _numbers; from pathlib import Path;"
        "used = _numbers(Path('/proc/self/status'))['VmData'];"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + 100 * 2**20, used + 100 * 2**20));"
        "print(available_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 100 * MIB < (available_bytes() or 0)


def test_a_run_that_would_not_fit_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(memory_bound, "available_bytes", lambda: 30 * MIB)
    options = ["--method", "wanda", "--dataset", "words.txt", "--nsamples", "512", "--seqlen", "32", "--no-eval"]
    refused = run_command(["prune", "model", *options, "--save", "run", "--save-model", "out"], monkeypatch, capsys)
    assert refused.code == 2
    assert "would not fit" in refused.err
    assert "--nsamples 128" in refused.err
    assert not (place / "out").exists()


FP8: dict[str, Any] = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
MXFP4: dict[str, Any] = {"quantization_config": {"quant_method": "mxfp4"}}


INT4: dict[str, Any] = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
    }
}
KIMI: dict[str, Any] = {
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
}
KIMI |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
QWEN: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "head_dim": 128}
QWEN |= {"num_experts": 128, "moe_intermediate_size": 1536, "intermediate_size": 12288, "norm_topk_prob": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "weights", "block", "outside", "codes"),
    [
        pytest.param(DeepseekV3Config(**FP8), 1342e9, 23e9, 3.7e9, 11.5e9, id="DeepSeek-V3"),
        pytest.param(DeepseekV3Config(**KIMI, **INT4), 2050e9, 33e9, 4.7e9, 9.6e9, id="Kimi-K2"),
        pytest.param(Qwen3MoeConfig(**QWEN, **FP8), 469e9, 4.9e9, 2.5e9, 2.5e9, id="Qwen3-235B"),
        pytest.param(GptOssConfig(**MXFP4), 234e9, 6.5e9, 2.3e9, 1.8e9, id="gpt-oss-120b"),
    ],
)
def test_a_large_quantised_model_is_bounded_from_its_configuration(
    config: PretrainedConfig, weights: float, block: float, outside: float, codes: float, tmp_path: Path
) -> None:
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    asked: dict[str, Any] = {"nsamples": 4, "seqlen": 512, "quiet": True}
    whole, streamed = (coprune.estimate(tmp_path, "wanda", stream=stream, **asked) for stream in (False, True))
    assert weights < _added(whole) < 1.2 * weights
    assert block < _added(streamed) < 4 * block
    # Removing experts keeps the others encoded: one layer is in memory as stored, and one expert decoded.
    cut = coprune.estimate(tmp_path, remove="experts=0.25", stream=True, **asked)
    assert outside + codes < _added(cut) < 1.25 * (outside + codes) + 1e9


def _added(estimate: Estimate) -> float:
    """Return the bound without what this process already holds, which depends on the tests before."""
    return estimate.peak_bytes - estimate.resident_bytes
