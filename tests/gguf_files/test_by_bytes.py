"""A GGUF mixture that transformers cannot read: llama.cpp shows the experts' answers, and the cut slices bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

import coprune
from coprune.base.errors import BadInput, UnsupportedModel
from coprune.gguf_files.experts import ExpertFile
from coprune.gguf_files.llama_cpp import LlamaCpp, has_llama_cpp
from coprune.model.checkpoint.locate import GgufFile
from coprune.model.transformers_private import reads_gguf
from support.commands import run_command
from support.pico import pico_model, pico_tokens
from support.pico_folder import listing
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.vocabularies import content_of

pytestmark = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")
TOKENS = pico_tokens(8, 32)
ASKED: dict[str, Any] = {"remove": "experts=keep:6", "dataset": TOKENS, "quiet": True}


def pico_olmoe() -> Any:
    vocabulary = len(json.loads(content_of("bytes"))["model"]["vocab"])
    sizes: dict[str, Any] = {"num_experts": 8, "vocab_size": vocabulary, "num_key_value_heads": 4}
    return distinct_norms(pico_model("olmoe", **sizes))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("olmoe") / "olmoe.gguf"
    return write_pico_gguf(pico_olmoe(), file, arch="olmoe", tokenizer=content_of("bytes"))


def sums_in(folder: Path) -> list[dict[str, torch.Tensor]]:
    found = json.loads((folder / "experts.json").read_text())["sums"]["calibration"]
    return [{name: torch.tensor(values) for name, values in own.items()} for own in found.values()]


def test_scores_match_transformers_and_bytes_match_the_source(source: Path, tmp_path: Path) -> None:
    coprune.prune(pico_olmoe(), save=tmp_path / "walked", evaluate=False, **ASKED)
    result = coprune.prune(source, save=tmp_path / "run", save_model=tmp_path / "small.gguf", **ASKED)
    kept = []
    for walked, own in zip(sums_in(tmp_path / "walked"), sums_in(tmp_path / "run"), strict=True):
        assert int((walked["tokens"] - own["tokens"]).abs().sum()) <= 4  # of 512, where rounding decides ties
        score, expected_score = (sums["weighted"] / sums["tokens"] for sums in (own, walked))
        torch.testing.assert_close(score, expected_score, rtol=0.02, atol=1e-3)
        kept.append(score.argsort(descending=True, stable=True)[:6].sort().values.numpy())
    written = {stored.name: stored for stored in GGUFReader(tmp_path / "small.gguf").tensors}
    for stored in GGUFReader(source).tensors:
        by_expert = "_exps" in stored.name or "gate_inp" in stored.name
        expected = stored.data[kept[int(stored.name.split(".")[1])]] if by_expert else stored.data
        found = written.pop(stored.name)
        assert (found.tensor_type, found.data.shape) == (stored.tensor_type, expected.shape)
        assert np.array_equal(found.data, expected)
    assert not written
    report = result.report
    assert report.left == sum(stored.n_elements for stored in GGUFReader(tmp_path / "small.gguf").tensors)
    assert 0.7 < report.covered["calibration"] < 1
    assert LlamaCpp(tmp_path / "small.gguf", context=8).logits([1, 2]).isfinite().all()


def test_the_command_accepts_text_and_domains_and_blends_known_scores(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"What {name} says is said by the tokenizer of the file itself. " * 40)
    asked = f"prune {source} --remove experts=keep:6 --seqlen 32 --nsamples 2".split()
    places = ["--save", str(tmp_path / "run"), "--save-model", str(tmp_path / "small.gguf")]
    texts = ["--domains", f"one={tmp_path / 'one.txt'},two={tmp_path / 'two.txt'}"]
    ended = run_command([*asked, *texts, *places], monkeypatch, capsys)
    assert (ended.code, "(bytes compared with the source's)" in ended.out) == (0, True)
    known = ["--domains", str(tmp_path / "run" / "experts.json"), "--blend", "one=2,two=1"]
    again = ["--save", str(tmp_path / "again"), "--save-model", str(tmp_path / "other.gguf")]
    ended = run_command([*asked, *known, *again], monkeypatch, capsys)
    assert (ended.code, "no text runs through the model" in ended.out + ended.err) == (0, True)
    assert [ExpertFile(GgufFile(tmp_path / n, n)).parameters for n in ("small.gguf", "other.gguf")] == [
        json.loads((tmp_path / "run" / "report.json").read_text())["left"]
    ] * 2


def test_scores_from_weights_choose_the_same_experts_in_a_file_and_a_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither reads the default text, which is missing here; a file needs neither transformers' class nor llama.cpp."""
    asked = ["prune", str(source), "--remove", "experts=keep:6", "--score", "aimer", "--save", str(tmp_path / "run")]
    ended = run_command([*asked, "--save-model", str(tmp_path / "small.gguf")], monkeypatch, capsys)
    assert (ended.code, "no text is read" in ended.out + ended.err) == (0, True)
    small = coprune.prune(pico_olmoe(), remove="experts=keep:6", score="aimer", evaluate=False, quiet=True).model
    routers = [stored.data for stored in GGUFReader(tmp_path / "small.gguf").tensors if "gate_inp" in stored.name]
    assert len(routers) == 3
    for own, layer in zip(routers, small.model.layers, strict=True):
        assert np.array_equal(own, layer.mlp.gate.weight.numpy())


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"eval_data": "embedded"}, "transformers does not read GGUF files of olmoe"),
        ({"remove": "experts=keep:1"}, "a token goes to 2 experts, and 1 of 8 would be left"),
        (
            {"domains": {"one": "embedded"}, "score": "aimer"},
            "scores experts by their weights, and reads no text",
        ),
        ({"seqlen": 4096, "dataset": "embedded"}, "above this model's limit of 128 positions"),
    ],
)
def test_impossible_cuts_are_refused_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=text):
        coprune.prune(source, save_model="small.gguf", **ASKED | more)
    assert not listing(tmp_path)


def test_experts_with_an_unknown_tensor_are_refused(source: Path, tmp_path: Path) -> None:
    raw = source.read_bytes().replace(b"blk.1.ffn_norm.weight", b"blk.1.ffn_tid2eid.wei")
    (tmp_path / "odd.gguf").write_bytes(raw)
    with pytest.raises(UnsupportedModel, match=r"blk\.1\.ffn_tid2eid\.wei of odd\.gguf distinguishes experts"):
        ExpertFile(GgufFile(tmp_path / "odd.gguf", "odd.gguf"))


def test_readable_architectures_are_those_of_transformers() -> None:
    assert all(map(reads_gguf, ["llama", "qwen2moe", "qwen3moe", "gpt-oss", "minimax-m2"]))
    assert not any(map(reads_gguf, ["olmoe", "deepseek2", "glm4moe", "qwen3next"]))
