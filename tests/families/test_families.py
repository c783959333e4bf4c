"""Some model types of different structure, judged as by `make families`; and the page of all types."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from families.build_models import Kind, all_types
from families.family_table import PAGE, RESULTS, Results, page
from families.judge import judge
from support.sample import sampled

SAMPLE = {
    "jetmoe": "experts of attention too",
    "gemma4_text": "blocks are handed what none of them reads",
    "longcat_flash": "a router that may choose experts which do nothing",
    "emu3": "a class that no Auto class loads again",
    "gemma3n_text": "keys and values that layers share",
    "bart": "the decoder of a model that has an encoder too",
    "rwkv": "no attention",
    "zamba2": "one transformer in several layers",
}

ROUTERS = {
    "longcat_flash": ["mlp.router.classifier"],
    "jetmoe": ["mlp.router.layer", "self_attention.experts.router.layer"],
}


@pytest.mark.parametrize("model_type", sampled(SAMPLE, quick=["jetmoe", "bart"]))
def test_a_supported_family_is_pruned(model_type: str, tmp_path: Path) -> None:
    verdict = judge(model_type, all_types("text")[model_type], "text", tmp_path, as_folder=False)
    assert (verdict.result, verdict.reason) == ("works", "")
    assert verdict.matrices
    routers = [line.removeprefix("model.layers.*.") for line in verdict.left_alone if "a router" in line]
    assert [line.partition(" ")[0] for line in routers] == ROUTERS.get(model_type, [])


def test_an_image_classifier_is_pruned(tmp_path: Path) -> None:
    verdict = judge("vit", all_types("images")["vit"], "images", tmp_path, as_folder=False)
    assert (verdict.result, verdict.reason) == ("works", "")


@pytest.mark.slow
def test_an_encoder_decoder_is_pruned(tmp_path: Path) -> None:
    verdict = judge("t5", all_types("seq2seq")["t5"], "seq2seq", tmp_path, as_folder=False)
    assert (verdict.result, verdict.reason) == ("works", "")


@pytest.mark.parametrize("kind", ["masked", pytest.param("labels", marks=pytest.mark.slow), "embeddings"])
def test_encoders_of_whole_texts_are_pruned(kind: Kind, tmp_path: Path) -> None:
    verdict = judge("bert", all_types(kind)["bert"], kind, tmp_path, as_folder=False)
    assert (verdict.result, verdict.reason) == ("works", "")


def test_a_vision_language_model_is_pruned(tmp_path: Path) -> None:
    verdict = judge("qwen3_vl", all_types("seeing")["qwen3_vl"], "seeing", tmp_path, as_folder=False)
    assert (verdict.result, verdict.reason) == ("works", "")


@pytest.mark.slow
def test_layers_for_images_stay_unchanged(tmp_path: Path) -> None:
    verdict = judge("mllama", all_types("text")["mllama"], "text", tmp_path)
    assert (verdict.result, verdict.reason) == ("works", "")
    assert verdict.left_alone[0] == "model.layers.*.cross_attn.q_proj (not used in a forward; 1 layer)"


REFUSED = {
    "dory": "model.layers.0 runs out of order or twice",
    "reformer": "a block returns ReformerOutput",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_an_unsupported_family_is_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    verdict = judge(model_type, all_types("text")[model_type], "text", tmp_path)
    assert verdict.result == "refused"
    assert REFUSED[model_type] in verdict.reason


@pytest.mark.skipif(not RESULTS.exists(), reason="make families was not run")
def test_the_page_matches_the_results() -> None:
    results = Results.read()
    assert PAGE.read_text(encoding="utf-8") == page(results)
    decoders = Counter(verdict.result for verdict in results.verdicts if verdict.kind == "text")
    assert decoders["works"] >= 188
    assert not any(verdict.result == "wrong" for verdict in results.verdicts)
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"{decoders['works']} work and {decoders['refused']} are refused" in readme
