"""timm's architectures with weights from the user's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import coprune
from coprune.base.errors import BadInput
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate

NAME = "test_vit"  # timm's smallest


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Return a model of seven classes, and its weights in both kinds of file."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=7).eval()
    folder = tmp_path_factory.mktemp("weights")
    save_file(model.state_dict(), folder / "w.safetensors")
    torch.save({"state_dict": model.half().state_dict()}, folder / "half.pth")
    return model.float(), folder


@pytest.mark.parametrize(("file", "dtype"), [("w.safetensors", torch.float32), ("half.pth", torch.float16)])
def test_an_architecture_with_a_file_is_a_model(
    trained: tuple[nn.Module, Path], tmp_path: Path, file: str, dtype: torch.dtype
) -> None:
    model, folder = trained
    name = f"timm/{NAME}@{folder / file}"
    found = locate(name, tmp_path)
    assert found.name == name
    loaded, _ = load_model(found)
    assert loaded.dtype == dtype
    for key, tensor in loaded.timm_model.state_dict().items():
        torch.testing.assert_close(tensor.float(), model.state_dict()[key], atol=1e-3, rtol=1e-3)
    made = found.path.stat().st_mtime_ns
    assert locate(name, tmp_path).path == found.path
    assert found.path.stat().st_mtime_ns == made
    assert [path.name for path in found.path.parent.iterdir()] == [found.path.name]


def test_batch_norm_statistics_stay_in_float32(tmp_path: Path) -> None:
    """A half-precision model keeps batch-norm statistics in float32, since they may exceed float16."""
    torch.manual_seed(0)
    tensors = timm.create_model("test_resnet", num_classes=7).state_dict()
    for name, tensor in tensors.items():
        if "running_var" in name:
            tensors[name] = tensor * 1e6
        elif tensor.is_floating_point():
            tensors[name] = tensor.half()
    save_file(tensors, tmp_path / "w.safetensors")
    loaded, _ = load_model(locate(f"timm/test_resnet@{tmp_path / 'w.safetensors'}", tmp_path))
    found = loaded.timm_model.state_dict()
    assert found["bn1.running_var"].max() == 1e6
    assert found["bn1.num_batches_tracked"].dtype == torch.int64
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in tensors.items())


def test_a_timm_model_with_its_own_weights_is_pruned_by_name(trained: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, folder = trained
    images: dict[str, Any] = {"dataset": "digits", "nsamples": 4, "eval_images": 10, "eval_data": "digits"}
    with pytest.raises(BadInput, match="only 7 classes"):
        coprune.prune(f"timm/{NAME}@{folder / 'w.safetensors'}", cache_dir=tmp_path, quiet=True, **images)
    settings: dict[str, Any] = {
        "pattern": "2:4",
        "evaluate": False,
        "cache_dir": tmp_path,
        "save_model": tmp_path / "out",
    }
    report = coprune.prune(
        f"timm/{NAME}@{folder / 'w.safetensors'}", "magnitude", layer_error=False, quiet=True, **settings
    ).report
    assert report.sparsity.matrices == 0.5
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).num_classes == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/no_such_net@{folder}/w.safetensors", "timm has no model 'no_such_net'"),
        (f"timm/{NAME}@{{folder}}/other.safetensors", "there is no file"),
        (f"timm/{NAME}@{{folder}}/notes.txt", "not a weight file"),
        (f"timm/{NAME}@{{folder}}/cut.safetensors", "does not hold the weights of timm's test_vit"),
        ("timm/test_vit2@{folder}/w.safetensors", "does not hold the weights of timm's test_vit2"),
        ("{folder}/w.safetensors", "timm/NAME@"),
    ],
)
def test_invalid_timm_weights_are_refused_and_leave_nothing(
    trained: tuple[nn.Module, Path], tmp_path: Path, name: str, message: str
) -> None:
    _, folder = trained
    (folder / "notes.txt").write_text("no weights")
    (folder / "cut.safetensors").write_bytes((folder / "w.safetensors").read_bytes()[:5000])
    with pytest.raises(BadInput, match=message):
        locate(name.format(folder=folder), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.partial"))
