"""The Hub over HTTP with a local stand-in: downloading a model and the papers' texts, and a push, by typed commands."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from safetensors.torch import load

from support.hub import TOKEN, Hub, Repository, serving
from support.pico_folder import save_pico, words_of

SMALL = "-m wanda --seqlen 32 --nsamples 2 --eval-tokens 128 --no-layer-error"
WIKITEXT = "wikitext-2-raw-v1"
CARD = f"""---
configs:
- config_name: {WIKITEXT}
  data_files:
  - {{split: test, path: {WIKITEXT}/test-*}}
  - {{split: train, path: {WIKITEXT}/train-*}}
---
"""
# One process for all lines, since imports take longer than the work.
DRIVER = """
import os, shlex, sys
from coprune.commands.app import main
for line in sys.stdin.read().splitlines():
    if line == "log out":
        del os.environ["HF_TOKEN"]
        continue
    sys.argv = shlex.split(line)
    print("$", line, flush=True)
    try:
        main()
    except SystemExit as end:
        print("ended with", end.code, flush=True)
"""


def parquet_of(rows: list[str]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": rows}), buffer)
    return buffer.getvalue()


def gzipped_rows(count: int, seed: int) -> bytes:
    rows = [{"text": words_of(60, seed + row), "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for row in range(count)]
    return gzip.compress("\n".join(json.dumps(row) for row in rows).encode())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Serve a Hub with a model, WikiText-2 in parquet and C4 in gzipped lines."""
    folder = save_pico(tmp_path_factory.mktemp("hub") / "pico", num_hidden_layers=2)
    with serving() as hub:
        hub.model("owner/pico", folder)
        texts = {split: parquet_of([words_of(40, seed) for seed in range(8)]) for split in ("train", "test")}
        files = {f"{WIKITEXT}/{split}-00000-of-00001.parquet": content for split, content in texts.items()}
        hub.dataset("Salesforce/wikitext", {"README.md": CARD.encode(), **files})
        lines = {"train.00000-of-01024": gzipped_rows(40, 0), "validation.00000-of-00008": gzipped_rows(8, 99)}
        files = {f"en/c4-{part}.json.gz": content for part, content in lines.items()}
        hub.dataset("allenai/c4", {"README.md": b"# C4", **files})
        yield hub


def typed(hub: Hub, place: Path, lines: list[str]) -> tuple[list[str], str]:
    """Type lines with that Hub; return each one's output, and all errors."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    environment["HF_TOKEN"] = TOKEN
    command = [sys.executable, "-c", DRIVER]
    ended = subprocess.run(
        command, input="\n".join(lines), cwd=place, env=environment, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split("$ ")[1:], ended.stderr


@pytest.mark.slow
def test_a_model_and_texts_are_downloaded_and_the_pruned_model_is_pushed(hub: Hub, tmp_path: Path) -> None:
    said, errors = typed(
        hub,
        tmp_path,
        [
            f"coprune prune owner/pico {SMALL} --save-model out/half --push-to-hub me/pico-half",
            f"coprune prune owner/pico {SMALL} --dataset c4 -p 2:4 --save-model out/c4",
            "coprune push out/c4 me/pico-2-4 --private",
            "coprune push out/c4 me/pico-half --private",
            "coprune eval me/pico-2-4 --seqlen 32 --eval-tokens 128",
            "coprune inspect owner/nothing",
            "coprune prune owner/pico --dataset owner/no-text",
            f"coprune prune owner/pico --remove blocks=0.5 -p 2:4 {SMALL} --save-model out/both --push-to-hub me/pico-both",
            "log out",
            f"coprune prune owner/pico {SMALL} --save-model out/logged-out --push-to-hub me/pico-logged-out",
        ],
    )
    assert len(said) == 9
    assert not [line for line in (*said[:3], said[7]) if "ended with" in line], errors
    assert "on wikitext2 (sequence length 32)" in said[0]
    assert "on c4 (sequence length 32)" in said[1]
    half, packed, both = (hub.repositories["models", f"me/pico-{name}"] for name in ("half", "2-4", "both"))
    for repository, folder, private in ((half, "out/half", False), (packed, "out/c4", True), (both, "out/both", False)):
        assert repository.private is private
        assert_same_files(repository, tmp_path / folder)
        assert repository.commits == ["Pruned with coprune"]
    assert f"pushed to {hub.url}/me/pico-2-4" in said[2]
    for line in ("base_model: owner/pico", "; blocks 2 → 1:", "50.00 % of the weights in 7 matrices are zero"):
        assert line in both.files["README.md"].decode()
    weights = load(half.files["model.safetensors"])
    zeros = weights["model.layers.0.mlp.up_proj.weight"].eq(0).float().mean()
    assert zeros == 0.5
    assert "me/pico-half exists and is public; name another one, or leave out --private." in errors
    assert "perplexity" in said[4], errors
    assert "there is no model owner/nothing on the Hub" in errors
    assert "dataset 'owner/no-text' is not on the Hub" in errors
    assert "pushing to me/pico-logged-out needs a login; run `hf auth login`, or set the environment variable" in errors
    assert not (tmp_path / "out/logged-out").exists()
    assert [said[number].splitlines()[-1] for number in (3, 5, 6, -1)] == ["ended with 2"] * 4


def assert_same_files(repository: Repository, folder: Path) -> None:
    there = {path: content for path, content in repository.files.items() if path != ".gitattributes"}
    here = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert there == here
