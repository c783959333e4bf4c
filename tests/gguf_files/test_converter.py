"""A folder is exported without a template if llama.cpp's converter is found; here a stand-in converts pico models."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import coprune
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.fitting.fit_call import _with_template
from coprune.fitting.fit_notes import Asked
from coprune.gguf_files.converter import SCRIPT, find_converter
from coprune.model.checkpoint.load import load_model, quiet_transformers
from coprune.model.checkpoint.locate import GgufFile, locate
from coprune.model.removed import MappedBlocks, SmallerModel
from coprune.report.run_folder import model_of
from support.pico import pico_model, pico_tokens
from support.pico_folder import listing, save
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.saved import load_clean

LLAMA_CPP = os.environ.get("LLAMA_CPP")
TOKENS = pico_tokens(1, 16)
PRUNING: dict[str, Any] = {"dataset": pico_tokens(8, 32), "align": 32, "evaluate": False, "quiet": True}
CONVERTER = f"""
import argparse, os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
parser = argparse.ArgumentParser()
parser.add_argument("model"), parser.add_argument("--outfile"), parser.add_argument("--outtype")
said = parser.parse_args()
assert os.environ["HF_HUB_OFFLINE"] == "1"
assert not list(Path(said.model).glob("*.py"))
from support.pico_gguf import write_pico_gguf
from support.saved import load_clean
write_pico_gguf(load_clean(Path(said.model)), Path(said.outfile), "F16")
"""


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pico llama and a converter."""
    folder = tmp_path_factory.mktemp("place")
    save(distinct_norms(pico_model("llama")), folder / "dense")
    (folder / "dense" / "modeling_own.py").write_text("raise SystemExit(7)\n")
    (folder / "llama.cpp").mkdir()
    (folder / "llama.cpp" / SCRIPT).write_text(CONVERTER)
    return folder


def same_logits(folder: Path, file: Path) -> bool:
    with torch.no_grad(), quiet_transformers():
        made = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        return torch.allclose(made(TOKENS).logits, load_clean(folder)(TOKENS).logits, atol=1e-2)


def test_a_folder_is_converted_to_a_gguf_file(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP", str(place / "llama.cpp" / SCRIPT))
    made = coprune.export(place / "dense", tmp_path / "out" / "made.gguf", quiet=True)
    assert same_logits(place / "dense", made.path)
    assert made.like == place / "dense"
    assert [*listing(tmp_path / "out")] == ["made.gguf"]


def test_a_converter_is_named_or_on_the_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = place / "llama.cpp" / SCRIPT
    assert find_converter() is None
    assert find_converter(script.parent) == find_converter(script) == script
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    assert find_converter() == script


def test_a_converter_is_found_above_llama_cpp_s_programs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = place / "llama.cpp" / "build" / "bin" / "llama-cli"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert find_converter() == place / "llama.cpp" / SCRIPT


@pytest.mark.slow
def test_a_smaller_folder_is_exported_with_its_source_as_template(place: Path, tmp_path: Path) -> None:
    small, dense = tmp_path / "small", tmp_path / "dense"
    shutil.copytree(place / "dense", dense)
    coprune.prune(dense, remove="channels=0.34,blocks=0.34", save_model=small, **PRUNING)
    made = coprune.export(small, tmp_path / "made.gguf", converter=place / "llama.cpp", quiet=True)
    assert same_logits(small, made.path)
    assert [type(one) for one in made.removed] == [MappedBlocks, SmallerModel]
    shutil.rmtree(dense)  # so that the smaller folder itself is converted
    made = coprune.export(small, tmp_path / "again.gguf", converter=place / "llama.cpp", quiet=True)
    assert same_logits(small, made.path)


def test_a_failing_converter_is_reported_with_its_last_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / SCRIPT
    own.write_text("import sys\nprint('first words')\nsys.exit(f'unknown tokenizer in {sys.argv[1]}')\n")
    with pytest.raises(BadInput, match=rf"cannot convert .*: unknown tokenizer in {place / 'dense'}; name a GGUF file"):
        coprune.export(place / "dense", tmp_path / "made.gguf", converter=own)
    assert "first words" in capsys.readouterr().err
    own.write_text("import no_such_package\n")
    with pytest.raises(BadInput, match="pip install no_such_package"):
        coprune.export(place / "dense", tmp_path / "made.gguf", converter=own, quiet=True)
    assert [*listing(tmp_path)] == [SCRIPT]


def test_without_a_converter_the_error_names_both_alternatives(place: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"with like=… \(the Hub lists those of most models.*or with converter=…"):
        coprune.export(place / "dense", tmp_path / "made.gguf", quiet=True)
    shutil.copytree(place / "dense", tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nbase_model:\n- owner/base\n---\n# A model\n")
    with pytest.raises(
        BadInput, match=r"base model: https://huggingface\.co/models\?other=base_model:quantized:owner/base\)"
    ):
        coprune.export(tmp_path / "model", tmp_path / "made.gguf", quiet=True)
    with pytest.raises(BadInput, match=rf"there is no .*absent; give the path of llama\.cpp's {SCRIPT}"):
        coprune.export(place / "dense", tmp_path / "made.gguf", converter=tmp_path / "absent", quiet=True)


def test_a_run_stands_for_the_model_that_it_saved(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finetune.json").write_text("{}")
    shutil.copytree(place / "dense", tmp_path / "run" / "model")
    assert model_of(str(tmp_path / "run")) == str(tmp_path / "run" / "model")
    assert model_of(str(place / "dense")) == str(place / "dense")
    with pytest.raises(BadInput, match=r"which GGUF file .*model was made from"):  # not that it has no config.json
        coprune.export(tmp_path / "run", tmp_path / "made.gguf", quiet=True)


def test_fit_makes_a_template_once(place: Path, tmp_path: Path) -> None:
    asked, reporter = Asked(str(place / "dense"), ()), Reporter(quiet=True)
    made = write_pico_gguf(load_clean(place / "dense"), tmp_path / "made.gguf", "F16")
    (converter := tmp_path / SCRIPT).write_text(
        f"import shutil, sys\nshutil.copy({str(made)!r}, sys.argv[sys.argv.index('--outfile') + 1])\n"
    )
    found = _with_template(asked, tmp_path / "fit", converter, reporter)
    assert found.like is not None
    assert isinstance(locate(found.like), GgufFile)
    written = Path(found.like).stat().st_mtime_ns
    again = _with_template(asked, tmp_path / "fit", place / "absent", reporter)
    assert again == found
    assert Path(found.like).stat().st_mtime_ns == written
    assert _with_template(found, tmp_path / "fit", None, reporter) is found


@pytest.mark.slow
@pytest.mark.skipif(LLAMA_CPP is None, reason="llama.cpp's own converter is not named by $LLAMA_CPP")
def test_llama_cpps_own_converter_works(tmp_path: Path) -> None:
    model, tokenizer = load_model(locate("smollm2-135m"), "bfloat16")
    with quiet_transformers():
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    converter = find_converter(LLAMA_CPP)
    made = coprune.export(tmp_path / "model", tmp_path / "made.gguf", converter=converter, quiet=True)
    assert same_logits(tmp_path / "model", made.path)
