"""Router ties: a correct folder is not refused because of them, a wrong one still is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coprune.base.errors import VerificationError
from coprune.base.progress import Reporter
from coprune.model.verification import verify_saved
from coprune.recipe.recipe import make_recipe
from coprune.runner.run_recipe import run_recipe
from coprune.stages import run_stages
from support.pico import pico_model
from support.pico_folder import save, write_words


@pytest.fixture
def undecided(tmp_path: Path) -> dict[str, Any]:
    """Return settings for a bfloat16 mixture whose router values are all equal."""
    sizes: dict[str, Any] = {"num_local_experts": 8, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    model = pico_model("gpt_oss", dtype=torch.bfloat16, **sizes)
    for name, tensor in model.named_parameters():
        if name.endswith("router.weight"):
            tensor.data = tensor.data[:1].repeat(8, 1)
    save(model, tmp_path / "model")
    write_words(tmp_path / "words.txt")
    places = {"save": str(tmp_path / "run"), "save_model": str(tmp_path / "small"), "model": str(tmp_path / "model")}
    data = {"dataset": str(tmp_path / "words.txt"), "nsamples": 4, "seqlen": 16, "evaluate": False}
    return {"remove": "experts=0.25", "score": "random:seed=2", **places, **data}


@pytest.mark.parametrize("stream", [True, False])
def test_router_ties_do_not_count_as_differences(stream: bool, undecided: dict[str, Any], tmp_path: Path) -> None:
    run_recipe(make_recipe(undecided | {"stream": stream}), reporter=Reporter(quiet=True))
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if name.endswith("router.weight")} == {6}


def test_a_wrong_weight_is_found_despite_router_ties(
    undecided: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(folder: Path, *args: Any, **options: Any) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("experts.down_proj"))
        tensors[name][0] *= -3
        save_file(tensors, file, metadata={"format": "pt"})
        verify_saved(folder, *args, **options)

    monkeypatch.setattr(run_stages, "verify_saved", damage)
    with pytest.raises(VerificationError, match="differ from the pruned model's"):
        run_recipe(make_recipe(undecided | {"stream": True}), reporter=Reporter(quiet=True))
