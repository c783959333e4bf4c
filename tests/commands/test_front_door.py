"""Missing inputs are reported at once, before the slow import of torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Runs each line like the entry point, without torch and optionally without other packages.
PROGRAM = """
import importlib.util, io, json, shlex, sys
from contextlib import redirect_stderr
sys.modules |= dict.fromkeys(["torch", "transformers", "datasets"])
absent, find = set(json.loads(sys.argv[2])), importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in absent else find(name, *more)
from coprune.commands.app import main
for line in json.loads(sys.argv[1]):
    sys.argv, heard = shlex.split(line), io.StringIO()
    with redirect_stderr(heard):
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code
    print(json.dumps([code, heard.getvalue()]))
"""
# Commands and their messages.
REFUSED = {
    "coprune prune empty -m wanda": "empty is an empty folder",
    "coprune prune empty.gguf -p 2:4": "empty.gguf is an empty file; fetch it again",
    "coprune eval noise.gguf": "noise.gguf is cut off or not a GGUF file",
    "coprune prune half.gguf -m wanda": "half.gguf is cut off or damaged; fetch it again",
    "coprune inspect https://huggingface.co/owner/name/tree/main": "is an address; name the model: owner/name",
    "coprune generate model 'Why is the sky blue?'": "does not end in .jsonl; name the file to write; prompts are read",
    "coprune inspect words.txt": "words.txt is neither a GGUF file nor a folder",
    "coprune finetune configless --dataset words.txt": "configless has no config.json",
    "coprune generate modle out.jsonl": "Hub is out of reach",
    "coprune export empty out.gguf": "empty is an empty folder",
    "coprune export model out.gguf --type q4_km": "unknown type 'q4_km'; did you mean 'q4_k_m'?",
    "coprune fit empty --task words.txt -o out": "empty is an empty folder",
    "coprune fit model --task words.txt --text utf16.txt -o out": "utf16.txt is not UTF-8 text",
    "coprune fit model --task words.txt --types q9_9 -o out": "unknown type 'q9_9'",
    "coprune fit model --task words.txt -o words.txt": "words.txt is a file; name another folder",
    "coprune bench noise.gguf": "noise.gguf is cut off or not a GGUF file",
    "coprune eval model --data utf16.txt": "utf16.txt is not UTF-8 text",
    "coprune sweep nothing.yaml": "the recipe nothing.yaml cannot be read: No such file or directory",
    "coprune estimate nobody/nothing -m wanda": "there is no file or folder nobody/nothing here",
    "coprune prune model": "dataset 'Salesforce/wikitext' is out of reach",
    "coprune prune model --dataset nothing.txt": "there is no file or folder 'nothing.txt'",
    "coprune prune model --dataset empty.txt": "empty.txt holds no text",
    "coprune prune model --dataset words.txt --eval-data c4": "dataset 'allenai/c4' is out of reach",
    "coprune eval model": "the corpus 'embedded', which needs no network",
    "coprune eval model --data wrods.txt": "Did you mean words.txt?",
    "coprune prune model --budget 5m": "prune has no option --budget; it belongs to coprune fit.",
    "coprune fit model --method wanda -o out": "fit has no option --method; it belongs to coprune prune, estimate, sweep.",
    "coprune finetune model --patern 2:4": "No such option: --patern",
    "coprune quantize model": "type: coprune export MODEL OUT.gguf --type q4_k_m --imatrix auto",
    "coprune prune mlx -m wanda": "mlx holds MLX weights, which only MLX can read; use the original model",
    "coprune prune pipeline -m wanda": "pipeline is a diffusion pipeline, which is not supported",
}
WITHOUT_GGUF = {
    "coprune fit whole.gguf --task words.txt -o out": "llama.cpp is not installed; ",
    "coprune export model out.gguf --type q4_k_m": "llama.cpp is not installed; ",
    "coprune prune whole.gguf -m wanda": "GGUF files need the package gguf, which is not installed; pip install 'coprune[gguf]'",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for folder in ("empty", "configless", "model", "mlx", "pipeline/unet"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configless" / "model.safetensors").touch()
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    of_mlx = {"quantization": {"group_size": 64, "bits": 4}}
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(of_mlx | {"quantization_config": of_mlx["quantization"]}))
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "pipeline" / "unet" / "config.json").write_text("{}")
    files = {"empty.gguf": b"", "noise.gguf": b"noise", "half.gguf": b"GGUF\3", "whole.gguf": b"GGUF", "empty.txt": b""}
    files["utf16.txt"] = "words".encode("utf-16")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "words.txt").write_text("".join(f"{number} words, one after another\n" for number in range(1000)))
    return tmp_path


def said(lines: dict[str, str], place: Path, absent: list[str]) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hub"), "XDG_CACHE_HOME": str(place)}
    words = [sys.executable, "-c", PROGRAM, json.dumps(list(lines)), json.dumps(absent)]
    ended = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(found) == len(lines), ended.stderr
    for (line, told), (code, heard) in zip(lines.items(), found, strict=True):
        last = heard.splitlines()[-1]
        assert (code, last[:9], "Traceback" in heard) == (2, "coprune: ", False), (line, heard)
        assert told in last, (line, heard)


def test_missing_inputs_are_reported_before_torch_is_imported(place: Path) -> None:
    said(REFUSED, place, [])


def test_a_missing_extra_is_named_before_torch_is_imported(place: Path) -> None:
    said(WITHOUT_GGUF, place, ["gguf", "llama_cpp_py_sync"])
