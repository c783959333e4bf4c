"""The first hour of a new user's commands, right and wrong; every refusal names a next step."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import coprune as package
from support.commands import Ended, run_command
from support.pico_folder import save_pico, write_words

Type = Callable[[str], Ended]
TEXT = "--dataset words --seqlen 32 --nsamples 2 --no-layer-error -m wanda"
# Commands, and what the refusal suggests instead.
REFUSED = {
    "the command": ("coprune prun model", ["prune"]),
    "an argument": ("coprune merge out/pruned", ["coprune merge", "{adapter} {output}"]),
    "the repository": ("coprune push out/pruned", ["coprune push", "{OWNER/NAME}"]),
    "the model": ("coprune prune", ["coprune prune smollm2-135m --dataset embedded"]),
    "the second model": ("coprune compare model", ["name another one after it"]),
    "an option": (f"coprune prune model {TEXT} --nsampels 3", ["--nsamples"]),
    "a model's name": (f"coprune prune modle {TEXT}", ["did you mean model?"]),
    "a packaged model's name": (f"coprune prune smollm-135m {TEXT}", ["did you mean smollm2-135m?", "--cache-dir"]),
    "a model's path": ("coprune eval out/prunde --data held", ["did you mean out/pruned?"]),
    "a folder of models": ("coprune inspect out", ["did you mean out/pruned?"]),
    "a run for a model": ("coprune eval out/model/0.5/wanda --data held", ["--save-model"]),
    "a run without a model": ("coprune push out/model/0.5/wanda me/pico", ["--save-model"]),
    "a method": (f"coprune prune model {TEXT.replace('wanda', 'wnada')}", ["did you mean 'wanda'?"]),
    "a method to read of": ("coprune methods sparsgpt", ["did you mean 'sparsegpt'?"]),
    "a pattern": (f"coprune prune model {TEXT} -p 24", ["2:4"]),
    "per cent": (f"coprune prune model {TEXT} -s 50", ["--sparsity 0.5"]),
    "a broken row": ("coprune prune model --dataset rows.jsonl", ["rows.jsonl", "line 3 is not JSON"]),
    "a place to save": (f"coprune prune model {TEXT} --save-model /proc/nothing/model", ["/proc", "another name"]),
    "experts of a dense model": (f"coprune prune model {TEXT} --remove experts=0.25", ["no mixture of experts"]),
    "a text": ("coprune prune model --dataset word", ["Did you mean the file words?", "embedded"]),
    "a text's path": ("coprune eval model --data ./words.txt", ["Did you mean words?"]),
    "what is no text": ("coprune prune model --dataset noise", [".jsonl"]),
    "the network": ("coprune prune model", ["--dataset embedded"]),
    "the network to measure": ("coprune eval model", ["'embedded', which needs no network"]),
    "a device": (f"coprune prune model {TEXT} --device cuda:99", ["--device auto", "--device cpu"]),
    "a recipe": ("coprune prune --recipe recipes.yaml", ["did you mean recipe.yaml?"]),
    "a report": ("coprune report out", ["coprune report out/run"]),
    "a report of a model": ("coprune report out/pruned", ["the folder of a finished run"]),
    "the same again": (f"coprune prune model {TEXT}", ["--save", "--overwrite"]),
    "the model's folder": (
        f"coprune prune model {TEXT} --seed 3 --save-model out/pruned",
        ["--save-model", "--overwrite"],
    ),
    "a run in its model": (f"coprune prune model {TEXT} --save-model out/model", ["--save-model"]),
    "a login": ("coprune push out/pruned me/pico", ["hf auth login", "HF_TOKEN"]),
    "what is dense": (
        f"coprune finetune model {TEXT.partition(' --nsamples')[0]}",
        ["coprune prune"],
    ),
    "an example for a file": ("coprune export out/pruned pruned.gguf", ["--like", "-GGUF", "convert_hf_to_gguf.py"]),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with a model, two texts without an ending, and noise."""
    save_pico(tmp_path / "model", num_hidden_layers=2)
    write_words(tmp_path / "words", count=600)
    write_words(tmp_path / "held", count=300, seed=1)
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2"}\n\n{"text": w3}\n')
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    return tmp_path


@pytest.fixture
def typed(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Type:
    """Return a function that types a line in that folder, without a login and without the Hub."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("coprune.report.hub_upload.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(line: str) -> Ended:
        name, *arguments = shlex.split(line)
        assert name == "coprune"
        return run_command(arguments, monkeypatch, capsys)

    return run


def do_what_works(place: Path, typed: Type) -> None:
    """Type a newcomer's correct commands and check their output."""

    def works(line: str) -> str:
        ended = typed(line)
        assert ended.code == 0, (line, ended.err)
        if not line.endswith(("-h", "--help", "--version", "coprune")):
            last = ended.out.splitlines()[-1]
            assert last.startswith("next      "), (line, last)
            assert "coprune " in last or "--save-model" in last, (line, last)
        return ended.out

    assert works("coprune --version") == f"coprune {package.__version__}\n"
    assert "coprune demo" in works("coprune --help")
    assert works("coprune") == works("coprune -h")
    assert "sparsegpt" in works("coprune methods")
    assert "would prune 14 matrices" in works("coprune inspect model")
    assert "matrix.svg" in works("coprune inspect model --plot '*.0.self_attn.q_proj' --dataset words --seqlen 32")
    said = works(f"coprune prune model {TEXT}")
    assert "out/model/0.5/wanda/report.json" in said
    assert said.splitlines()[-1].startswith("next      to keep the model, run the same again with --save-model")
    seeded = typed(f"coprune prune model {TEXT} --seed 1")
    assert "holds a run that differs in seed; this one goes to out/model/0.5/wanda-seed-1." in seeded.err
    assert "out/pruned (reloaded" in works(f"coprune prune model {TEXT} -s 50% --save-model out/pruned --save out/run")
    (place / "recipe.yaml").write_bytes((place / "out/run/recipe.yaml").read_bytes())
    for model in ("out/pruned", "model"):
        measured = works(f"coprune eval {model} --data held --seqlen 32")
        assert "perplexity" in measured
        assert measured.endswith(f"coprune compare BASELINE {model}\n")
    assert "KL held" in works("coprune compare model out/run --data held --seqlen 32")
    assert works("coprune report out/run").startswith("page      out/run/report.html\n")
    assert "at most" in works(f"coprune estimate model {TEXT}")
    (place / "sweep.yaml").write_text(
        "{model: model, dataset: words, seqlen: 32, nsamples: 2, method: [wanda], save: out/s}"
    )
    assert "out/s/results.md" in works("coprune sweep sweep.yaml --workers 1 --no-layer-error")


def test_a_newcomers_commands_work_or_suggest_what_to_type(place: Path, typed: Type) -> None:
    do_what_works(place, typed)
    for what, (line, names) in REFUSED.items():
        ended = typed(line)
        last = ended.err.splitlines()[-1]
        assert (what, ended.code, last[:9]) == (what, 2, "coprune: ")
        assert [name for name in names if name not in last] == [], (what, last)
