"""What cannot be done as asked: one clear line, exit code 2, and nothing written or overwritten."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.commands import run_command
from support.pico_folder import listing, save_pico, write_words

MODEL = ["prune", "model", "--dataset", "words.txt", "--seqlen", "32", "--nsamples", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a text, and things that are in the way; no test may change any of it."""
    folder = tmp_path_factory.mktemp("place")
    model = save_pico(folder / "model")
    write_words(folder / "words.txt")
    (folder / "short.txt").write_text("w5 w6 w7")
    (folder / "empty").mkdir()
    (folder / "occupied").mkdir()
    (folder / "occupied" / "thesis.txt").write_text("mine")
    (folder / "finished").mkdir()
    (folder / "finished" / "recipe.yaml").write_text("model: model\n")
    (folder / "finished" / "report.json").write_text("{}")
    (folder / "broken.yaml").write_text("model: [unclosed\n")
    (folder / "list.yaml").write_text("- model\n")
    (folder / "unknown.yaml").write_text("model: model\nsparsitty: 0.5\n")
    (folder / "misspelt.yaml").write_text("model: model\ncalibration: {sampels: 3}\n")
    (folder / "twice.yaml").write_text("model: model\nnsamples: 3\ncalibration: {samples: 3}\n")
    (folder / "untyped.yaml").write_text("model: model\ncalibration: {samples: plenty}\n")
    (folder / "unquoted.yaml").write_text("model: model\npattern: 2:4\n")
    (folder / "wrong.yaml").write_text("model: model\nnsamples: plenty\noptions: {group: column}\n")
    for name in ("truncated", "shardless", "nan", "configless", "garbled"):
        (folder / name).mkdir()
        for file in model.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    assert len(shards) > 1
    whole = (model / shards[-1]).read_bytes()
    (folder / "truncated" / shards[-1]).write_bytes(whole[: len(whole) // 2])
    (folder / "shardless" / shards[-1]).unlink()
    (folder / "configless" / "config.json").unlink()
    (folder / "garbled" / "config.json").write_text("{")
    name = "model.layers.1.mlp.down_proj.weight"
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = folder / "nan" / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][3, 5] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def with_recipe(name: str) -> list[str]:
    return ["prune", "--recipe", name]


BAD: dict[str, tuple[list[str], str]] = {
    "no model": (["prune"], "no model is named"),
    "unknown method": ([*MODEL, "--method", "wandaa"], "unknown method 'wandaa'; did you mean 'wanda'?"),
    "unknown pattern": ([*MODEL, "--pattern", "two:four"], "unknown pattern 'two:four'"),
    "ratio of one": ([*MODEL, "--sparsity_ratio", "1.0"], "out of range"),
    "negative ratio": ([*MODEL, "--sparsity", "-0.1"], "out of range"),
    "ratio that is no number": ([*MODEL, "--sparsity", "nan"], "out of range"),
    "ratio against pattern": ([*MODEL, "--sparsity_ratio", "0.6", "--sparsity_type", "2:4"], "contradicts"),
    "N of M with N = M": ([*MODEL, "--pattern", "4:4"], "0 < N < M"),
    "N of M with N = 0": ([*MODEL, "--pattern", "0:4"], "0 < N < M"),
    "M that does not divide": ([*MODEL, "--pattern", "3:5"], "does not divide the 64 inputs of model.layers.0"),
    "unknown option": ([*MODEL, "--nsampels", "3"], "unknown option '--nsampels'; did you mean '--nsamples'?"),
    "unknown method option": ([*MODEL, "--block-sise", "3"], "did you mean '--block-size'?"),
    "another method's option": ([*MODEL, "--block-size", "64"], "unknown option of method 'wanda': 'block_size'"),
    "option without value": ([*MODEL, "--method", "sparsegpt", "--block-size"], "--block-size needs a value"),
    "option of wrong type": ([*MODEL, "--method", "sparsegpt", "--block-size", "wide"], "cannot be 'wide'"),
    "option out of range": ([*MODEL, "--method", "sparsegpt", "--block-size", "0"], "block_size"),
    "option of wrong choice": ([*MODEL, "--group", "column"], "cannot be 'column'"),
    "block size against pattern": ([*MODEL, "-m", "sparsegpt", "-p", "2:4", "--block-size", "66"], "66"),
    "stray argument": ([*MODEL, "elsewhere"], "unexpected argument 'elsewhere'"),
    "exclude of nothing": ([*MODEL, "--exclude", "*.query"], "'*.query' matches none"),
    "include of nothing": ([*MODEL, "--include", "*.query"], "'*.query' matches none"),
    "nothing left": ([*MODEL, "--include", "*.q_proj", "--exclude", "*.q_proj"], "no matrix is left"),
    "unknown corpus": ([*MODEL, "--dataset", "wikitext3"], "wikitext2"),
    "missing text": ([*MODEL, "--dataset", "wrods.txt"], "wrods.txt"),
    "text too short": ([*MODEL, "--dataset", "short.txt"], "too short"),
    "seqlen above the limit": ([*MODEL, "--seqlen", "4096"], "above this model's limit of 128"),
    "seqlen of one": ([*MODEL, "--seqlen", "1"], "seqlen"),
    "no samples": ([*MODEL, "--nsamples", "0"], "nsamples cannot be 0"),
    "no number": ([*MODEL, "--nsamples", "many"], "--nsamples"),
    "number missing": ([*MODEL, "--nsamples"], "--nsamples"),
    "unknown propagation": ([*MODEL, "--propagation", "diagonal"], "'diagonal'"),
    "unknown refinement": ([*MODEL, "--refine", "refitt"], "did you mean 'refit'?"),
    "refinement with a bracket": (
        [*MODEL, "--refine", "refit:rounds=["],
        "option 'rounds' of refinement 'refit' cannot be '['",
    ),
    "refinement without a value": ([*MODEL, "--refine", "refit:rounds"], "write refit:rounds=VALUE"),
    "allocation without an option": ([*MODEL, "--allocation", "owl:"], "lacks an option; write owl:OPTION=VALUE"),
    "option twice": ([*MODEL, "-m", "sparsegpt:block_size=2", "--block-size", "4"], "option block_size is said twice"),
    "unknown preset": ([*MODEL, "--preset", "bestt"], "did you mean 'best'?"),
    "dense target in sequence": ([*MODEL, "--target", "dense", "--propagation", "sequential"], "propagation block"),
    "dense target twice": ([*MODEL, "--target", "dense", "--propagation", "dense"], "would be target pruned"),
    "dense reconstruction": ([*MODEL, "--reconstruct", "5", "--propagation", "dense"], "never computes"),
    "missing model": (["prune", "./modle", "--dataset", "words.txt"], "did you mean model?"),
    "empty folder": (["prune", "empty", "--dataset", "words.txt"], "empty"),
    "no configuration": (["prune", "configless", "--dataset", "words.txt"], "no config.json"),
    "garbled configuration": (["prune", "garbled", "--dataset", "words.txt"], "config.json is not valid JSON"),
    "a text as model": (["prune", "words.txt", "--dataset", "words.txt"], "neither a GGUF file nor a folder"),
    "truncated shard": (["prune", "truncated", "--dataset", "words.txt"], "cut off or damaged"),
    "missing shard": (["prune", "shardless", "--dataset", "words.txt"], "1 are missing"),
    "occupied model folder": ([*MODEL, "--save_model", "occupied"], "not empty"),
    "file as model folder": ([*MODEL, "--save_model", "words.txt"], "words.txt"),
    "occupied run folder": ([*MODEL, "--save", "occupied"], "already holds something"),
    "finished run": ([*MODEL, "--save", "finished"], "already holds a finished run"),
    "file as run folder": ([*MODEL, "--save", "words.txt"], "is a file"),
    "one folder for both": ([*MODEL, "--save", "new", "--save_model", "new"], "are the same"),
    "the model's own folder": ([*MODEL, "--save_model", "model"], "not empty"),
    "unknown device": ([*MODEL, "--device", "abacus"], "device 'abacus'"),
    "absent device": ([*MODEL, "--device", "cuda:7"], "device 'cuda:7'"),
    "unknown dtype": ([*MODEL, "--dtype", "float7"], "'float7'"),
    "broken recipe": (with_recipe("broken.yaml"), "not valid YAML"),
    "recipe without settings": (with_recipe("list.yaml"), "holds no settings"),
    "unknown recipe field": (with_recipe("unknown.yaml"), "unknown recipe field 'sparsitty'; did you mean 'sparsity'?"),
    "wrong recipe value": (with_recipe("wrong.yaml"), "nsamples cannot be 'plenty'"),
    "unknown nested field": (
        with_recipe("misspelt.yaml"),
        "'calibration.sampels'; did you mean 'calibration.samples'?",
    ),
    "nested and flat": (with_recipe("twice.yaml"), "nsamples is said twice, as nsamples and as calibration.samples"),
    "wrong nested value": (with_recipe("untyped.yaml"), "calibration.samples cannot be 'plenty'"),
    "pattern without quotes": (with_recipe("unquoted.yaml"), 'write pattern: "2:4"'),
    "missing recipe": (with_recipe("absent.yaml"), "absent.yaml cannot be read"),
    "variant of another method": ([*MODEL, "-m", "sparsegpt", "--use_variant"], "a variant of wanda"),
    "two models": ([*MODEL, "--model", "other"], "two models are named"),
    "missing evaluation text": ([*MODEL, "--eval-data", "absent.txt"], "absent.txt"),
    "evaluation text too short": ([*MODEL, "--eval-data", "short.txt"], "too short"),
    "too few evaluation tokens": ([*MODEL, "--eval-data", "words.txt", "--eval-tokens", "8"], "8 tokens"),
    "NaN in the weights": (["prune", "nan", *MODEL[2:]], "model.layers.1 of the dense model gives NaN"),
    "unknown command": (["prone"], "prone"),
    "eval without model": (["eval"], "model"),
    "eval of unknown text": (["eval", "model", "--data", "wrods.txt"], "wrods.txt"),
    "inspect of unknown pattern": (["inspect", "model", "--pattern", "4:2"], "0 < N < M"),
    "unknown method listed": (["methods", "wandaa"], "did you mean 'wanda'?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, place, monkeypatch, capsys):
    arguments, message = BAD[case]
    monkeypatch.chdir(place)
    before = listing(place)
    quiet = ["--quiet"] if arguments[0] in ("prune", "eval", "inspect") else []
    # After the command's name, so that an option which lacks its value still lacks it.
    ended = run_command([arguments[0], *quiet, *arguments[1:]], monkeypatch, capsys)
    assert ended.code == 2
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("coprune: ")
    assert message in lines[0]
    assert ended.out == ""
    assert listing(place) == before


def test_a_good_command_in_the_same_place_works(place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(place)
    ended = run_command([*MODEL, "--save", str(tmp_path / "run")], monkeypatch, capsys)
    assert ended.code == 0
    assert Path(tmp_path / "run" / "report.json").is_file()
