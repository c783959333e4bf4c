"""The runtimes that load a smaller model, from recorded results."""

from __future__ import annotations

from coprune.model.removed import Fewer, SmallerModel
from coprune.report.runtimes import loads_in, refusals, runtimes_tried


def _without(*kinds: str) -> SmallerModel:
    parts = tuple(Fewer(kind=kind, before=4, least=2, most=2, mean=2) for kind in kinds)  # type: ignore[arg-type]
    return SmallerModel(parts=parts, before=100, saved=80)


def test_runtimes_that_derive_the_head_width_are_reported_before_heads_are_removed() -> None:
    told = refusals("qwen2", ["heads"])
    assert told is not None
    assert "vLLM" in told
    assert "mlx-lm" in told
    assert "channels or blocks" in told
    assert refusals("qwen2", ["channels", "blocks"]) is None
    assert not any(name.startswith("vLLM") for name in loads_in("qwen2", [_without("heads")]))


def test_a_runtime_that_expects_layers_in_a_fixed_order_is_reported_before_blocks_are_removed() -> None:
    told = refusals("gpt_oss", ["blocks"])
    assert told is not None
    assert told.startswith("vLLM")
    assert told.endswith("remove channels instead.")


def test_a_runtime_is_named_only_for_tested_parts() -> None:
    assert any(name.startswith("vLLM") for name in loads_in("llama", [_without("channels", "heads", "blocks")]))
    assert any(name.startswith("OpenVINO") for name in loads_in("bert", [_without("channels", "blocks")]))
    assert loads_in("a_family_that_nobody_tried", [_without("channels")]) == []
    assert runtimes_tried("llama", ["experts"]) == []
